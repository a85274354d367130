"""Dropout-NTP: an answer is cut and goes on as if the model had written it so far, with the picture or without."""
import json
from types import SimpleNamespace

import pytest
from conftest import GOLDEN, shared

from minivl import GenerationConfig, InputError, Picture, pipeline
from minivl.prompt import render
from minivl.tokenizer import Tokenizer
from weights_tools.mpo import dropout
from weights_tools.mpo.dropout import begun_by, finished, rejected
from weights_tools.mpo.mmpr import Rows, check
from weights_tools.mpo.pairs import truncate
from weights_tools.nano import evaluate
from weights_tools.nano.draw import draw

GREEDY = GenerationConfig(max_new_tokens=60)


@pytest.fixture(scope="module")
def nano():
    return pipeline("nano")


@pytest.fixture(scope="module")
def described():
    """Pictures, and what is right to say of them."""
    return [{"image": draw(example.pictures[0]), "question": example.turns[-1].question, "max_num": example.max_num,
             "chosen": example.turns[-1].answer} for example in evaluate.items("describe", 3, seed="dropped")]


# ---- how an answer goes on ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_goes_on_where_it_was_cut(nano, described, ratio):
    """The model's own answer, cut anywhere between two words, is finished as it was."""
    rows = [{**row, "chosen": nano((row["question"], [Picture(row["image"], row["max_num"])]), GREEDY).text}
            for row in described]
    found = list(finished(nano, rows, ratio=ratio, with_picture=True, config=GREEDY))
    assert [row["rejected"] for row in found] == [row["chosen"] for row in rows]
    assert list(rejected(nano, rows, ratio=ratio, with_picture=True, config=GREEDY)) == []
    blind = [{**row, "chosen": nano(row["question"].replace("<image>", "").strip(), GREEDY).text} for row in rows]
    assert list(rejected(nano, blind, ratio=ratio, config=GREEDY)) == []


@pytest.mark.parametrize("load", [lambda: pipeline("nano").tokenizer, lambda: Tokenizer.load(shared("qwen2_tokenizer")),
                                  lambda: Tokenizer.load(GOLDEN / "internlm2-tokenizer")], ids=["nano", "qwen2", "lm2"])
def test_the_ids_of_the_whole(nano, load):
    """The beginning of an answer has the tokens that it has in a conversation that holds it."""
    tokenizer = load()
    for text in ("The large red", "", "2 + 2", "第一，", "(a) \"So", "a  b\nc"):
        conversation = render([("Why?", text or None)])
        stub = SimpleNamespace(tokenizer=tokenizer, room=999)
        turn = nano.turn("Why?", GREEDY)
        turn.ids = tokenizer.encode(render([("Why?", None)]))
        assert begun_by(stub, turn, text).ids == tokenizer.encode(conversation.removesuffix("<|im_end|>\n")), text


# ---- rejected answers -----------------------------------------------------------------------------------------------

def test_rejected_without_the_picture(nano, described):
    rows = [{**row, "image": "is not opened.png", "task": "describe"} for row in described]
    config = GenerationConfig(do_sample=True, temperature=1.5, max_new_tokens=30)
    found = list(rejected(nano, rows, config=config, seed=3))
    assert len(found) == 3
    for row, pair in zip(rows, found):
        begin = truncate(row["chosen"])
        assert pair == {**row, "rejected": pair["rejected"]}
        assert pair["rejected"].startswith(begin) and len(pair["rejected"]) > len(begin)
        check(pair)
    for batch in (1, 2):
        assert list(rejected(nano, rows, config=config, seed=3, batch=batch)) == found
    assert list(rejected(nano, rows, config=config, seed=3, first=1)) == found[1:]
    assert list(rejected(nano, rows, config=config, seed=4)) != found
    with pytest.raises(InputError, match=r"rows\[0\]: .*is not opened.png"):
        list(rejected(nano, rows, config=config, with_picture=True))


def test_one_word_leaves_nothing_to_begin_with(nano):
    (pair,) = rejected(nano, [{"question": "hello", "chosen": "Stop."}], config=GREEDY)
    assert pair["rejected"] == nano("hello", GREEDY).text


def test_no_room_for_an_end(nano):
    with pytest.raises(InputError, match=r"rows\[1\]: question and first part .* have \d+ tokens .* of 2048"):
        list(rejected(nano, [{"question": "hello", "chosen": "a b"}, {"question": "hello", "chosen": "red " * 9000}]))
    (pair,) = finished(nano, [{"question": "hello", "chosen": "red " * 2 * (2048 - 60)}], config=GREEDY)
    assert pair["rejected"].startswith("red red")


# ---- the command ----------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path, described):
    described[0]["image"].save(tmp_path / "a.png")
    return tmp_path


def written(folder, *rows):
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return [str(folder / "r.jsonl"), str(folder / "o.jsonl")]


def test_command(folder, nano, capsys):
    """At temperature 0 nano says again what it said; so that row is left out."""
    question = "<image>\nDescribe the picture."
    again = nano("Describe the picture.", GREEDY).text
    files = written(folder, {"image": "a.png", "question": question, "chosen": again},
                    {"image": "a.png", "question": question, "chosen": "A horse and a cart.", "answer_gt": "x"},
                    {"question": "hello", "chosen": "No."})
    assert dropout.main(["nano", *files, "--temperature", "0", "--max-new-tokens", "60"]) == 0
    assert capsys.readouterr().out.endswith("o.jsonl: 2 pairs; 1 answers were finished as they had been, left out\n")
    pairs = list(Rows(folder / "o.jsonl", lambda row: check(row, folder)))
    assert [pair["chosen"] for pair in pairs] == ["A horse and a cart.", "No."]
    assert pairs[0]["rejected"].startswith("A horse") and pairs[0]["answer_gt"] == "x"
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "o.jsonl", "r.jsonl"]


@pytest.mark.parametrize("change, said_of_it", [
    ({"image": "b.png"}, "there is no picture .*b.png"), ({"chosen": " "}, "chosen is empty; write it"),
    ({"question": "<image>"}, "question is empty"), ({"chosen": 3}, "chosen is a int; it must be a text"),
])
def test_wrong_lines(folder, change, said_of_it):
    right = {"image": "a.png", "question": "Describe it.", "chosen": "A red star."}
    files = written(folder, right, {**right, **change})
    with pytest.raises(InputError, match=f"r.jsonl, line 2: {said_of_it}"):
        dropout.main(["nano", *files])
    with pytest.raises(InputError, match=r"the share of words to keep is 2.0; it must be in 0..1"):
        dropout.main(["nano", *files, "--ratio", "2"])
