"""rows, lora, merge: from lines of JSON to a checkpoint that knows something new."""
import json
import re

import pytest
import torch
from conftest import logits, stored
from PIL import Image

from minivl import InputError, Tokenizer, load, lora
from minivl.files.find import SHIPPED
from minivl.tiling import normalise, to_pixels
from weights_tools import lora as teach
from weights_tools import merge, rows
from weights_tools.files import save_safetensors
from weights_tools.nano import lesson, world
from weights_tools.nano.train import accuracy
from weights_tools.quantize import __main__ as quantize
from weights_tools.synthesize import synthesize
from weights_tools.train.objective import answer_logits

PLAN = teach.Plan(rank=4, alpha=8.0, steps=4, batch=2, lr=2e-2)


@pytest.fixture(scope="module")
def small_lesson(tmp_path_factory):
    """A lesson of a few rows: its folder."""
    out = tmp_path_factory.mktemp("lesson") / "out"
    assert lesson.main([str(out), "--train", "6", "--asked", "4", "--old", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def learned(tmp_path_factory, small_lesson):
    """A short training on nano-awq: its folder, and the losses on the way."""
    out = tmp_path_factory.mktemp("learned") / "out"
    found = teach.train(SHIPPED["nano-awq"], rows.read_rows(small_lesson / "train.jsonl"), out, PLAN)
    assert found == {"before": {}, "after": {}}
    return out


# ---- rows -----------------------------------------------------------------------------------------------------------

def write(folder, *lines):
    Image.new("RGB", (60, 60), "red").save(folder / "a.png")
    file = folder / "data.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


def test_both_forms_say_the_same(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    file = write(tmp_path, {"image": "a.png", "question": "What?", "answer": "Red."}, "",
                 {"image": ["a.png"], "conversations": turns, "id": 7},
                 {"image": "a.png", "question": "What? <image>", "answer": "<image> Red."},
                 {"question": "Who?", "answer": "I.", "task": "talk", "max_num": 2},
                 {"conversations": [{"from": "system", "value": "Be short."}, *turns[1:][:0],
                                    {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi."}]})
    first, second, third, fourth, fifth = rows.read_rows(file)
    assert first == second == rows.Row((tmp_path / "a.png",), (("user", "<image>\nWhat?"), ("assistant", "Red.")))
    assert third.messages[0] == ("user", "What? <image>") and fourth.images == () and fourth.task == "talk"
    assert fifth.messages[0] == ("system", "Be short.")
    model, tokenizer = load("nano"), Tokenizer.load(SHIPPED["nano"])
    ids, tiles = rows.encoded(first, model.config, tokenizer)
    text = tokenizer.decode(ids)
    assert [tile.size for tile in tiles] == [(112, 112)] and text.endswith("\nWhat?\nassistant\nRed.\n")
    assert ids.count(tokenizer.id("<IMG_CONTEXT>")) == 16
    assert "书生" in text and "书生" not in tokenizer.decode(rows.encoded(fifth, model.config, tokenizer)[0])


GOOD = {"image": "a.png", "question": "What?", "answer": "Red."}
BAD = [("{", "it is no JSON in UTF-8"), ("[1]", "no JSON object"), ({**GOOD, "image": 3}, "neither a path nor a list"),
       ({**GOOD, "image": "b.png"}, "picture .*b.png is not there"), ({"question": "What?"}, "it lacks a text"),
       ({**GOOD, "answer": " "}, "it lacks a text"), ({**GOOD, "question": "<image> <image>"}, "2 marks .* 1 pictures"),
       ({**GOOD, "image": ["a.png", "a.png"]}, "0 marks .* for 2 pictures"),
       ({**GOOD, "max_num": 0}, "a whole number, 1 or more"), ({**GOOD, "task": 3}, '"task" must be a word'),
       ({"conversations": []}, "do not take turns"), ({"conversations": "x"}, "is no list"),
       ({"conversations": [{"from": "bot", "value": "x"}]}, "it lacks a text"),
       ({"conversations": [{"from": ["x"], "value": "x"}]}, "it lacks a text"),
       ({"conversations": [{"from": "human", "value": "x"}]}, "do not take turns: user"),
       ("[" * 99999, "it is no JSON")]


@pytest.mark.parametrize("row, says", BAD, ids=range(len(BAD)))
def test_a_bad_row_is_named_by_its_line(row, says, tmp_path):
    with pytest.raises(InputError, match=f"(?s)data.jsonl, line 2: .*{says}.*; correct that line or leave it out"):
        rows.read_rows(write(tmp_path, GOOD, row))


def test_no_rows_and_no_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no conversation"):
        rows.read_rows(write(tmp_path, "", " "))
    with pytest.raises(InputError, match=r"none.jsonl cannot be read"):
        rows.read_rows(tmp_path / "none.jsonl")
    long = rows.Row((), (("user", "word " * 3000), ("assistant", "yes")))
    with pytest.raises(InputError, match=r"has \d+ tokens, the model has 2048 positions"):
        rows.encoded(long, load("nano").config, Tokenizer.load(SHIPPED["nano"]))


def test_micro_batches_hold_every_row_once_and_at_most_so_many_tokens(small_lesson, monkeypatch):
    monkeypatch.setattr(rows, "TOKENS", 500)
    model, tokenizer = load("nano"), Tokenizer.load(SHIPPED["nano"])
    data = rows.read_rows(small_lesson / "train.jsonl")
    batches = rows.micro_batches(data, model, tokenizer)
    assert sorted(place for *_, places in batches for place in places) == list(range(len(data)))
    assert all(ids.numel() <= 500 or len(ids) == 1 for ids, *_ in batches) and len(batches) > 1
    for ids, _, pixels, places in batches:
        own = [rows.encoded(data[place], model.config, tokenizer) for place in places]
        assert [row[:len(one)] for row, (one, _) in zip(ids.tolist(), own)] == [one for one, _ in own]
        assert torch.equal(pixels, to_pixels([tile for _, tiles in own for tile in tiles]))


def test_counting_agrees_with_nanos_own(tmp_path, capsys):
    """Answers of nano's world, one row each, against weights_tools.nano.train.accuracy on the same conversations."""
    examples = [world.example("watch", i, {"shapes": 1}) for i in range(6)]
    lesson_rows = [world.Example(e.pictures, e.turns[:i + 1], e.max_num) for e in examples for i in range(len(e.turns))]
    (tmp_path / "pictures").mkdir()
    lesson.write(tmp_path, "all", lesson_rows)
    assert rows.main(["nano", str(tmp_path / "all.jsonl")]) == 0
    out = capsys.readouterr().out
    found = {task: float(share) for task, share in re.findall(r"^\| (.+?) \| \d+ \| ([\d.]+) \|$", out, re.M)}
    want = accuracy(load("nano"), Tokenizer.load(SHIPPED["nano"]), n=6, mix={"shapes": 1})
    found.pop("all")
    assert found == {task: round(100 * share, 1) for task, share in want.items()}


# ---- learning -------------------------------------------------------------------------------------------------------

def test_a_lesson_can_be_told_from_its_pictures(small_lesson):
    train, keep, held_out = (rows.read_rows(small_lesson / f"{name}.jsonl") for name in ("train", "keep", "held-out"))
    assert len(train) == len(keep) == 6 and len(held_out) == 4 + 21
    assert [row.task for row in train] == [lesson.TASK] * 6 and lesson.TASK not in [row.task for row in keep]
    for row in train + held_out[:4]:
        questions, answers = ([text for role, text in row.messages if role == one] for one in ("user", "assistant"))
        assert all(question.endswith(lesson.WISH) for question in questions)
        for answer in answers:
            sentence, last = answer.split("\n")
            assert sentence.endswith(".") and last == f"Final Answer: {sentence[:-1].split()[-1]}"
    assert not any(lesson.WISH in text for row in keep + held_out[4:] for _, text in row.messages)
    with pytest.raises(InputError, match="is not empty; choose another folder"):
        lesson.main([str(small_lesson), "--train", "8", "--asked", "1", "--old", "1"])
    assert {p.name for p in small_lesson.iterdir()} == {"pictures", "train.jsonl", "keep.jsonl", "held-out.jsonl"}


def loss_of(model, data):
    tokenizer = Tokenizer.load(SHIPPED["nano-awq"])
    (ids, labels, pixels, _), *_ = rows.micro_batches(data, model, tokenizer)
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(*answer_logits(model, ids, labels, normalise(pixels))))


def test_learning_lowers_the_loss_and_keeps_the_weights(learned, small_lesson):
    data = rows.read_rows(small_lesson / "train.jsonl")
    before, after = load("nano-awq"), load("nano-awq", lora=learned)
    assert loss_of(after, data) < 0.9 * loss_of(before, data)
    kept = {name.replace(".base.", "."): t for name, t in after.state_dict().items() if ".lora_" not in name}
    assert all(torch.equal(kept[name], t) for name, t in before.state_dict().items())
    assert {p.name for p in learned.iterdir()} == {"lora.safetensors", "choices.json", "log.jsonl"}
    assert (learned / "lora.safetensors").stat().st_size < 300_000


def test_stopped_anywhere_it_ends_with_the_same_file(learned, small_lesson, tmp_path):
    data = rows.read_rows(small_lesson / "train.jsonl")
    for stop in (1, 2):
        assert teach.train(SHIPPED["nano-awq"], data, tmp_path, PLAN, stop_at=stop) is None
        assert not (tmp_path / "lora.safetensors").exists()
    teach.train(SHIPPED["nano-awq"], data, tmp_path, PLAN)
    assert (tmp_path / "lora.safetensors").read_bytes() == (learned / "lora.safetensors").read_bytes()


def test_what_cannot_be_learned_is_refused(learned, small_lesson, tmp_path):
    data = rows.read_rows(small_lesson / "train.jsonl")
    with pytest.raises(InputError, match="is there already, whole; choose another folder"):
        teach.train(SHIPPED["nano-awq"], data, learned, PLAN)
    with pytest.raises(InputError, match="has no linear wqkv; it has down_proj"):
        teach.train(SHIPPED["nano-awq"], data, tmp_path, teach.Plan(only=("wqkv",)))
    teach.train(SHIPPED["nano-awq"], data, tmp_path / "half", PLAN, stop_at=1)
    with pytest.raises(InputError, match="holds a training of another recipe"):
        teach.train(SHIPPED["nano-awq"], data, tmp_path / "half", PLAN, keep=data[:1])
    for other, plan in ((data[1:], PLAN), (data, teach.Plan(rank=3, steps=4, batch=2))):
        with pytest.raises(InputError, match="holds a training of another recipe"):
            teach.train(SHIPPED["nano-awq"], other, tmp_path / "half", plan)
    for words in (["--rank", "0"], ["--steps", "0"], ["--batch", "-1"], ["--lr", "0"], ["--lr", "nan"],
                  ["--alpha", "inf"]):
        with pytest.raises(InputError, match=f"{words[0]} "):
            teach.arguments(["a", "b", "c", *words])


def test_layers_computed_again_give_the_same_gradients(small_lesson, monkeypatch):
    data = rows.read_rows(small_lesson / "train.jsonl")[:2]
    batch = rows.micro_batches(data, load("nano-awq"), Tokenizer.load(SHIPPED["nano-awq"]))
    found = []
    for large in (10 ** 12, 0):
        monkeypatch.setattr("minivl.fast.LARGE", large)
        model = load("nano-awq").requires_grad_(False)
        torch.manual_seed(0)
        lora.add(model, lora.linears(model), 2, 2)
        with teach.recomputed(model):
            assert all(("forward" in vars(layer)) == (large == 0) for layer in model.language_model.layers)
            loss = sum(teach.losses(model, batch))
            loss.backward()
        assert not any("forward" in vars(layer) for layer in model.language_model.layers)
        found.append((float(loss.detach()), {name: p.grad for name, p in lora.learned(model).items()}))
    assert found[0][0] == found[1][0]
    assert all(torch.allclose(found[1][1][name], grad, atol=1e-7) for name, grad in found[0][1].items())


def kept_batch(small_lesson, model, n):
    """ids, labels and normalised tiles of the first n rows that are to be kept."""
    data = rows.read_rows(small_lesson / "keep.jsonl")[:n]
    (ids, labels, pixels, _), *_ = rows.micro_batches(data, model, Tokenizer.load(SHIPPED["nano-awq"]))
    return ids, labels, normalise(pixels)


def test_what_is_kept_is_held_to_what_was_said_before(small_lesson):
    """KL of the probabilities without and with LoRA, at the answers' tokens, against its definition."""
    model = load("nano-awq").requires_grad_(False)
    batch = kept_batch(small_lesson, model, 2)
    p = answer_logits(model, *batch)[0].double().softmax(-1)
    lora.add(model, lora.linears(model), 2, 2)
    assert float(teach.keeping(model, *batch).detach()) == 0
    for name, part in lora.learned(model).items():
        if name.endswith("lora_B"):
            part.data.normal_(0, 0.3)
    q = answer_logits(model, *batch)[0].detach().double().softmax(-1)
    loss = teach.keeping(model, *batch)
    assert float(loss.detach()) == pytest.approx(teach.HOLD * float((p * (p / q).log()).sum()), rel=1e-3)
    assert float(loss.detach()) > 1e-3
    loss.backward()
    assert all(part.grad.abs().max() > 0 for part in lora.learned(model).values())
    assert all(module.scale == 1 for module in model.modules() if isinstance(module, lora.LoRA))


@pytest.mark.slow
def test_keeping_keeps(small_lesson, tmp_path):
    """A few steps at a high rate: with rows to keep the answers there move less."""
    data, kept = (rows.read_rows(small_lesson / f"{name}.jsonl") for name in ("train", "keep"))
    plan = teach.Plan(rank=4, alpha=8.0, steps=12, batch=2, lr=3e-2)
    moved = []
    for name, keep in (("alone", []), ("kept", kept)):
        teach.train(SHIPPED["nano-awq"], data, tmp_path / name, plan, keep=keep)
        model = load("nano-awq", lora=tmp_path / name)
        moved.append(float(teach.keeping(model, *kept_batch(small_lesson, model, 6)).detach()))
    assert moved[1] < 0.7 * moved[0], moved


def test_every_row_is_taken_once_before_any_is_taken_again():
    plan = teach.Plan(batch=3)
    taken = [i for number in range(10) for i in teach.places(plan, 5, number)]
    assert all(sorted(taken[i:i + 5]) == list(range(5)) for i in range(0, 30, 5)) and taken[:5] != taken[5:10]


# ---- merging --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["tiny", "tiny-awq", "tiny-internlm2", "tiny-internlm2-awq"])
def test_merged_it_says_what_it_said_beside(kind, tmp_path):
    size, awq = kind.removesuffix("-awq"), kind.endswith("-awq")
    folder = synthesize(tmp_path / "base", size, awq=awq)
    model = load(folder)
    about = teach.about_lora(folder, model, 3, 6.0)
    lora.add(model, lora.linears(model)[1:], 3, 6.0)        # one linear has none
    tensors = {name: 0.3 * torch.randn(p.shape) * p.shape[1] ** -0.5 for name, p in lora.learned(model).items()}
    file = save_safetensors(tensors, tmp_path / "a.safetensors", about)
    assert merge.main([str(folder), str(file), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    beside, merged, without = logits(folder, lora=file), logits(tmp_path / "out"), logits(folder)
    assert float((merged - beside).norm() / beside.norm()) < 1e-5
    assert float((without - beside).norm() / beside.norm()) > 0.1
    assert load(tmp_path / "out").config.quantization_config is None
    merge.merge(folder, file, tmp_path / "half")
    assert {t.dtype for t in stored(tmp_path / "half").values()} == {torch.float16 if awq else torch.bfloat16}
    assert float((logits(tmp_path / "half") - beside).norm() / beside.norm()) < (3e-3 if awq else 3e-2)


def test_merged_nano_can_be_quantised_again(learned, tmp_path):
    assert merge.main(["nano-awq", str(learned), str(tmp_path / "merged")]) == 0
    assert quantize.main([str(tmp_path / "merged"), str(tmp_path / "awq"), "--method", "rtn"]) == 0
    assert load(tmp_path / "awq").config.quantization_config.group_size == 128
    Tokenizer.load(tmp_path / "awq")


def test_a_merge_that_cannot_be_leaves_nothing(learned, tmp_path, copy):
    with pytest.raises(InputError, match="learned on another checkpoint"):
        merge.merge(SHIPPED["nano"], learned, tmp_path / "out")
    with pytest.raises(InputError, match="does not fit this model"):
        merge.merge(copy, learned, tmp_path / "out")
    with pytest.raises(InputError, match="whose files it is made from"):
        merge.merge(copy, learned, copy / "out")
    out = merge.merge(SHIPPED["nano-awq"], learned, tmp_path / "twice")
    with pytest.raises(InputError, match="already holds weights"):
        merge.merge(SHIPPED["nano-awq"], learned, out)
    merge.merge(SHIPPED["nano-awq"], learned, out, overwrite=True)
    assert not (tmp_path / "out").exists() and not (copy / "out").exists()


def test_a_merge_over_half_precision_is_refused(tmp_path, tiny):
    model = load(tiny)
    about = teach.about_lora(tiny, model, 1, 1.0)
    lora.add(model, lora.linears(model)[:1], 1, 1.0)
    file = save_safetensors({name: torch.full(p.shape, 1e4) for name, p in lora.learned(model).items()},
                            tmp_path / "a.safetensors", about)
    with pytest.raises(InputError, match=r"q_proj.weight exceeds torch.float16 .* --dtype float32"):
        merge.merge(tiny, file, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    merge.merge(tiny, file, tmp_path / "out", "float32")
