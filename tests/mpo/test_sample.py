"""Sampled answers: what the pipeline itself would say with each seed, in any batch, also after a kill."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minivl import GenerationConfig, InputError, Picture, Pipeline, pipeline
from weights_tools.mpo import sample
from weights_tools.mpo.mmpr import Rows, check_answer
from weights_tools.mpo.pairs import judge, parse
from weights_tools.mpo.prompts import PROMPTS, prompt
from weights_tools.mpo.sample import answers
from weights_tools.mpo.several import seed_of, several
from weights_tools.nano import evaluate
from weights_tools.nano.draw import draw

HOW = GenerationConfig(do_sample=True, temperature=1.5, max_new_tokens=12)
TASKS = ("colour", "read words", "talk", "compare", "reason", "describe")


@pytest.fixture(scope="module")
def nano():
    return pipeline("nano")


@pytest.fixture(scope="module")
def rows():
    """Questions about one picture of one tile or several, about two pictures, about none."""
    found = []
    for task in TASKS:
        (example,) = evaluate.items(task, 1, seed="sampled")
        turn = example.turns[-1]
        pictures = [draw(scene) for scene in example.pictures]
        found.append({"question": turn.question, "answer": turn.answer, "task": task, "max_num": example.max_num,
                      **({"image": pictures if len(pictures) > 1 else pictures[0]} if pictures else {})})
    return found


def said(pipe, rows, **settings):
    settings = {"n": 4, "seed": 5, "version": "asked", "config": HOW, **settings}
    return [row["response"] for row in answers(pipe, rows, **settings)]


# ---- what is sampled ------------------------------------------------------------------------------------------------

def test_each_answer_is_the_one_of_its_seed(nano, rows):
    """What is read once and copied gives what the pipeline gives that reads each prompt anew."""
    found = said(nano, rows)
    for i, row in enumerate(rows):
        images = row.get("image") or []
        images = [Picture(one, row["max_num"]) for one in (images if isinstance(images, list) else [images])]
        for k in range(4):
            config = GenerationConfig(do_sample=True, temperature=1.5, max_new_tokens=12,
                                      random_seed=seed_of(5, i, k))
            assert found[4 * i + k] == nano((row["question"], images), config).text
    assert sum(len(set(found[4 * i:4 * i + 4])) > 1 for i in range(len(rows))) >= 3


def test_an_answer_depends_on_nothing_beside_it(nano, rows):
    whole = said(nano, rows)
    assert said(nano, rows, batch=1) == said(nano, rows, batch=64) == whole
    assert said(nano, [rows[5], rows[5], *rows[2:4]])[8:] == whole[8:16]
    assert said(nano, rows[:4], first=3) == whole[12:16]
    assert said(nano, rows[:2], n=2) == whole[:2] + whole[4:6]


def test_a_picture_is_looked_at_once(nano, rows):
    tiles = []
    tokens = []
    hooks = [nano.model.vision_model.register_forward_pre_hook(lambda _, inputs: tiles.append(len(inputs[0]))),
             nano.model.language_model.layers[0].register_forward_pre_hook(
                 lambda _, inputs: tokens.append(tuple(inputs[0].shape[:2])))]
    try:
        said(nano, rows, batch=3)       # the answers to a question are spread over two batches
    finally:
        for hook in hooks:
            hook.remove()
    turns = [nano.turn((row["question"], [])) for row in rows if "image" not in row]
    assert len(tiles) == len([row for row in rows if "image" in row]) and sum(tiles) < 40
    prompts = [shape for shape in tokens if shape[1] > 1]
    assert len(prompts) == len(rows) and {B for B, _ in prompts} == {1}
    assert len(turns[0].ids) - 1 in {T for _, T in prompts}
    assert max(B for B, T in tokens if T == 1) == 3


def test_seeds():
    found = {seed_of(seed, row, k) for seed in range(3) for row in range(20) for k in range(20)}
    assert len(found) == 1200 and all(0 <= one < 2 ** 63 for one in found)
    assert seed_of(1, 2, 3) == 4487740463121531623       # on every machine, in every version


# ---- the rows -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("version", PROMPTS)
def test_rows_are_what_pairs_reads(nano, rows, version):
    found = list(answers(nano, rows[:3], n=2, version=version, config=GenerationConfig(
        do_sample=True, temperature=1.0, max_new_tokens=3)))
    assert len(found) == 6
    for i, row in enumerate(found):
        asked = rows[i // 2]
        check_answer({**row, "image": "x.png"})
        assert row["question"] == prompt(asked["question"], version, picture="image" in asked)
        assert row["question_orig"] == asked["question"] and row["prompt_version"] == version
        assert {name: row[name] for name in asked if name != "question"} == {
            name: asked[name] for name in asked if name != "question"}
    assert version != "asked" or {row["finish_reason"] for row in found} == {"length"}
    judged = judge([{**row, "image": "x.png"} for row in found])
    assert judged.rows == 6
    assert (version == "asked") == (found[0]["question"] == rows[0]["question"])


def test_right_answers_of_a_model_that_knows_no_template(nano, rows):
    found = list(answers(nano, rows[:2], n=3, version="asked"))
    assert all("finish_reason" not in row for row in found)
    assert sum(map(len, judge([{**row, "image": "x"} for row in found]).right.values())) == 6


def test_what_an_asked_model_says_is_its_answer():
    assert parse("The heart is red.", "asked") == (None, "The heart is red.")
    assert parse("Two and two.\nFinal Answer: 4", "asked") == ("Two and two.", "4")
    assert parse("", "asked") == (None, "") and parse("a\nb", "asked") == (None, "a\nb")


# ---- what is wrong --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, settings, said_of_it", [
    ({"question": "why " * 3000}, {}, r"rows\[1\]: the text has \d+ characters, .* room for 2048"),
    ({"image": "nowhere.png"}, {}, r"rows\[1\]: .*nowhere.png"),
    ({"max_num": 99}, {}, r"rows\[1\]: max_num is 99"),
    ({}, {"version": "fr"}, r"rows\[0\]: there is no prompt version 'fr'"),
    ({}, {"n": 0}, "0 answers to each question are asked for; it must be a whole number"),
    ({}, {"batch": 0}, "0 answers at a time"),
    ({}, {"config": GenerationConfig()}, "without chance 4 answers to a question are the same; set a temperature"),
])
def test_wrong_rows_and_settings(nano, rows, change, settings, said_of_it):
    with pytest.raises(InputError, match=said_of_it):
        said(nano, [rows[0], {**rows[0], **change}], **settings)


LINE = {"image": "a.png", "question": "Is it red?", "answer": "yes"}


@pytest.mark.parametrize("change, said_of_it", [
    ({"image": "b.png"}, "there is no picture .*b.png; check image"),
    ({"question": " <image>\n"}, "the question is empty"), ({"question": None}, "question is a NoneType"),
    ({"answer": ...}, "answer, the known one, must be a text or a number"), ({"answer": " "}, "is empty; write it"),
    ({"image": ["a.png"]}, "0 <image> for 1 pictures"),
])
def test_wrong_lines(tmp_path, change, said_of_it):
    (tmp_path / "a.png").write_bytes(b"")
    wrong = {name: value for name, value in {**LINE, **change}.items() if value is not ...}
    (tmp_path / "q.jsonl").write_text(json.dumps(LINE) + "\n\n" + json.dumps(wrong) + "\n")
    with pytest.raises(InputError, match=f"q.jsonl, line 3: .*{said_of_it}"):
        sample.main(["nano", str(tmp_path / "q.jsonl"), str(tmp_path / "o.jsonl")])
    assert not (tmp_path / "o.jsonl").exists()


def test_a_line_that_shows_wrong_when_it_is_read(tmp_path):
    """The picture is there, but is none. Nothing was made, so nothing is left."""
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "q.jsonl").write_text("\n" + json.dumps(LINE) + "\n")
    with pytest.raises(InputError, match="q.jsonl, line 2: .*a.png"):
        sample.main(["nano", str(tmp_path / "q.jsonl"), str(tmp_path / "o.jsonl"), "--max-new-tokens", "9"])
    assert sorted(os.listdir(tmp_path)) == ["a.png", "q.jsonl"]


# ---- the command ----------------------------------------------------------------------------------------------------

@pytest.fixture
def questions(tmp_path):
    rows = []
    for i, example in enumerate(evaluate.items("read words", 30, seed="sampled")):
        draw(example.pictures[0]).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": example.turns[0].question, "answer": example.turns[0].answer})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return tmp_path / "q.jsonl"


@pytest.mark.slow
def test_killed_and_run_again(questions, nano, capsys, monkeypatch):
    """The killed run ends as one that was never stopped: with the bytes that `answers` alone gives."""
    out = questions.with_name("o.jsonl")
    begun = questions.with_name(".begun-o.jsonl")
    command = ["nano", str(questions), str(out), "-n", "4", "--version", "asked", "--temperature", "1.5",
               "--max-new-tokens", "12", "--seed", "5"]
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "weights_tools.mpo.sample", *command],
                               env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, stderr=subprocess.PIPE)
    try:
        while process.poll() is None and not (begun.exists() and begun.read_bytes().count(b"\n") > 30):
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        problems = process.communicate()[1]
    assert not out.exists(), problems
    there = begun.read_bytes()
    assert there.count(b"\n") > 30, problems
    with pytest.raises(InputError, match="holds .* rows of another work: --temperature 1.5 there and 1.0 here; repeat"):
        sample.main([*command, "--temperature", "1"])
    begun.write_bytes(there + b'{"image": "7.p')
    asked = []
    turn = Pipeline.turn
    monkeypatch.setattr(Pipeline, "turn", lambda *given: asked.append(1) or turn(*given))
    assert sample.main(command) == 0
    assert 0 < len(asked) < 30
    wanted = answers(nano, Rows(questions, lambda row: None), n=4, seed=5, version="asked", config=HOW,
                     root=questions.parent)
    assert out.read_bytes() == b"".join(json.dumps(row).encode() + b"\n" for row in wanted)
    assert not begun.exists()
    assert "o.jsonl: 120 answers to 30 questions; " in capsys.readouterr().out
    assert len(Rows(out, check_answer)) == 120
    with pytest.raises(InputError, match="is there already"):
        sample.main(command)


def test_a_word_where_the_context_is_shorter(questions):
    questions.write_text(questions.read_text("utf-8").splitlines()[0] + "\n", "utf-8")
    with pytest.warns(UserWarning, match="--max-new-tokens 4096 is more than the context of 2048; an answer ends"):
        sample.main(["nano", str(questions), str(questions.with_name("o.jsonl")), "-n", "1", "--version", "asked"])
    (row,) = Rows(questions.with_name("o.jsonl"), check_answer)
    assert row["response"] and "finish_reason" not in row


def test_numbers_of_prompts_in_order(nano, rows):
    numbers = [i for i, found in several(nano, lambda i: nano.turn(rows[2]["question"], HOW), 5, n=3, seed=0, batch=2)
               if len(found) == 3]
    assert numbers == [0, 1, 2, 3, 4]
