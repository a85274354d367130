"""The trainer: what a pair becomes, one forward for both answers, exact resume, what it learns, what it refuses."""
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import shared, stored
from PIL import Image

from minivl import InputError, Tokenizer, load
from minivl.files.adapters import FILE as ADAPTER
from minivl.tiling import normalise
from weights_tools import lora
from weights_tools.mpo import batch, curves, reference, steps, train
from weights_tools.mpo.loss import sequence_logps
from weights_tools.mpo.mmpr import read_datasets, read_meta
from weights_tools.rows import read_rows
from weights_tools.synthesize import synthesize

PLAN = steps.Plan(lr=1e-3, batch=2, micro=1, steps=5, dtype="float32")
ROWS = [{"image": "a.png", "question": "What is it?", "chosen": "A red square.", "rejected": "A dog, I think."},
        {"question": "Say hello.", "chosen": "Hello!", "rejected": ""},
        {"image": ["a.png", "b.png"], "question": "<image> or <image>?", "chosen": "Both.", "rejected": "Neither one."}]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny random float checkpoint."""
    return synthesize(tmp_path_factory.mktemp("plain") / "tiny", "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of pictures, of ROWS and of conversations to keep."""
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (60, 60), "red").save(folder / "a.png")
    Image.new("RGB", (120, 60), "blue").save(folder / "b.png")
    write(folder / "pairs.jsonl", *ROWS)
    write(folder / "keep.jsonl", {"image": "b.png", "question": "What is it?", "answer": "A blue sea."},
          {"question": "Who are you?", "answer": "Nobody."})
    return folder


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def pairs_of(path):
    return batch.Pairs(read_datasets(path))


def trained(folder, data, out, plan=PLAN, **options):
    return train.train(folder, pairs_of(data / "pairs.jsonl"), out, plan, **options)


# ---- pairs ----------------------------------------------------------------------------------------------------------

def test_the_original_s_ids_and_labels():
    """The original's dataset class, with two visual tokens a tile."""
    folder = shared("golden/mmpr/train")
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    tokenizer = Tokenizer.load(shared("qwen2_tokenizer"))
    config = SimpleNamespace(num_image_token=expected["num_image_token"], system_message=None, force_image_size=448,
                             min_dynamic_patch=1, use_thumbnail=True, dynamic_image_size=True, max_dynamic_patch=6,
                             llm_config=SimpleNamespace(max_position_embeddings=32768))
    one = read_meta(folder / "meta.json")[0]
    pairs = batch.Pairs([replace(one, root=shared("images"))])
    by_place = dict(zip(pairs.places, range(len(pairs))))
    for i, sample in enumerate(expected["samples"]):
        pair = batch.encoded(pairs[by_place[i]], config, tokenizer)
        assert len(pair.tiles) == sample["num_tiles"] * (sample["image_flags"] != [0])
        made = batch.collate([pair], 448)
        for row, name in enumerate(("chosen", "rejected")):
            n = len(sample[f"{name}_input_ids"])
            assert made.ids[row, :n].tolist() == sample[f"{name}_input_ids"]
            assert made.labels[row, :n].tolist() == sample[f"{name}_labels"]
            assert (made.labels[row, n:] == batch.IGNORE).all()


def test_marks_beyond_the_pictures_stay_text_and_odd_answers_are_learned(plain, data, tmp_path):
    shutil.copy(data / "a.png", tmp_path)
    rows = [{"image": "a.png", "question": "<image> <image>", "chosen": "\nx", "rejected": ""},
            {"question": "<image>?", "chosen": "x", "rejected": "<image>"}]
    pairs = pairs_of(write(tmp_path / "pairs.jsonl", *rows))
    config, tokenizer = load(plain).config, Tokenizer.load(plain)
    both = sorted((batch.encoded(pairs[i], config, tokenizer) for i in range(2)), key=lambda pair: -len(pair.tiles))
    assert [tokenizer.decode(pair.chosen).count("<image>") for pair in both] == [1, 1]
    end = tokenizer.id("<|im_end|>")
    learned = lambda row: [i for i in row.tolist() if i != batch.IGNORE]
    labels = batch.collate(both, config.force_image_size).labels
    assert [tokenizer.decode(learned(row)[:-1]) for row in labels][1:] == ["x", "", "<image>"]
    assert "x" in tokenizer.decode(learned(labels[0])) and all(learned(row)[-1] == end for row in labels)
    assert learned(labels[2]) == [end]


def test_most_tiles_by_row_dataset_plan_and_checkpoint(plain, data):
    config, tokenizer = load(plain).config, Tokenizer.load(plain)
    wide = {"image": "b.png", "question": "?", "chosen": "x", "rejected": "y"}
    tiles = lambda row, of_dataset, of_plan: len(batch.encoded(
        batch.Located(row, data, of_dataset, "here"), config, tokenizer, max_num=of_plan).tiles)
    assert [tiles({**wide, "max_num": 1}, 2, 2), tiles(wide, 1, 2), tiles(wide, None, 1), tiles(wide, None, None)] == [
        1, 1, 1, 3]
    both = {**wide, "image": ["b.png", "b.png"], "question": "<image><image>"}
    assert [tiles(both, None, 2), tiles(both, None, 4)] == [2, 6]       # as many of each


def test_one_forward_gives_what_two_give(plain, data):
    """Pictures of one and of three tiles, a pair without, padded: the sums of sequence_logps, and its gradients."""
    model, tokenizer = load(plain), Tokenizer.load(plain)
    pairs = pairs_of(data / "pairs.jsonl")
    encoded = [batch.encoded(pairs[i], model.config, tokenizer) for i in range(3)]
    made = batch.collate(encoded, model.config.force_image_size)
    assert sorted(len(pair.tiles) for pair in encoded) == [0, 1, 4] and len(made.pixels) == 5
    sums, counts = batch.pair_logps(model, made)
    weights = torch.randn(2, 3)
    (sums * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for half, ids, labels in zip(range(2), made.ids.chunk(2), made.labels.chunk(2)):
        want, number = sequence_logps(model(ids, normalise(made.pixels)), labels)
        torch.testing.assert_close(sums[half], want, rtol=1e-5, atol=1e-4)
        assert counts[half].tolist() == number.tolist()
        (want * weights[half]).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-4, msg=name)


# ---- a training -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(plain, data, tmp_path_factory):
    """A training that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert trained(plain, data, out) == out
    return out


def test_it_learns_what_is_preferred(plain, whole):
    lines = curves.read_log(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert {"loss", "preference", "quality", "generation", "chosen", "rejected", "margin", "accuracy", "delta",
            "lr"} < set(lines[0])
    # Before anything is learned the model is the reference.
    assert lines[0]["preference"] == pytest.approx(math.log(2), abs=1e-4) and abs(lines[0]["margin"]) < 1e-3
    assert lines[0]["quality"] == pytest.approx(2 * math.log(2), abs=1e-4)
    for line in lines:
        assert line["loss"] == pytest.approx(
            0.8 * line["preference"] + 0.2 * line["quality"] + line["generation"], rel=1e-5)
    assert lines[-1]["margin"] > 0.01 and lines[-1]["accuracy"] == 1
    assert lines[-1]["preference"] < lines[0]["preference"]
    before, after = stored(plain), stored(whole)
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {
        name: (t.dtype, t.shape) for name, t in after.items()}
    assert not torch.equal(before["vision_model.embeddings.patch_embedding.weight"],
                           after["vision_model.embeddings.patch_embedding.weight"])       # nothing is frozen
    load(whole)
    assert sorted(path.name for path in whole.iterdir() if not (plain / path.name).exists()) == [
        "choices.json", "curves.svg", "log.jsonl", "reference.safetensors"]
    assert "pairs told apart" in (whole / "curves.svg").read_text()


@pytest.mark.parametrize("stop_at", [2, 4])
def test_stopped_anywhere_it_ends_with_the_same_bytes(plain, data, whole, tmp_path, stop_at):
    calls = 1
    while trained(plain, data, tmp_path / "out", stop_at=stop_at) is None:
        calls += 1
    assert calls == math.ceil(5 / stop_at)
    for file in ("model.safetensors", "reference.safetensors", "curves.svg"):
        assert (tmp_path / "out" / file).read_bytes() == (whole / file).read_bytes()


def test_killed_in_the_reference_it_goes_on(plain, data, whole, tmp_path, monkeypatch):
    """Killed after the second pair: only the third is computed again."""
    asked = []
    original = train.pair_logps

    def killed(*args):
        asked.append(args)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return original(*args)
    monkeypatch.setattr(train, "pair_logps", killed)
    monkeypatch.setattr(train, "reference_logps", lambda *args: reference.reference_logps(*args, save_every=1))
    with pytest.raises(KeyboardInterrupt):
        trained(plain, data, tmp_path / "out")
    half = stored_logps(tmp_path / "out")
    assert half.isfinite().all(1).tolist() == [True, True, False]
    trained(plain, data, tmp_path / "out", stop_at=1)
    assert len(asked) == 4
    assert (tmp_path / "out" / reference.FILE).read_bytes() == (whole / reference.FILE).read_bytes()


def stored_logps(folder):
    from safetensors import safe_open
    with safe_open(folder / reference.FILE, "pt") as file:
        return file.get_tensor("logps")


def test_a_large_model_computes_its_layers_again(plain, data, whole, tmp_path, monkeypatch):
    """Each of tower and decoder, in each forward that learns; nothing else changes."""
    seen = []
    original = lora.checkpoint

    def spy(layer, *args, **options):
        seen.append(layer.__self__)
        return original(layer, *args, **options)
    monkeypatch.setattr("minivl.fast.LARGE", 0)
    monkeypatch.setattr(lora, "checkpoint", spy)
    trained(plain, data, tmp_path / "out")
    kinds = [type(layer).__module__ for layer in seen]
    config = load(plain).config
    assert kinds.count("minivl.qwen2") == 10 * config.llm_config.num_hidden_layers
    assert 0 < kinds.count("minivl.vit") <= 10 * config.vision_config.num_hidden_layers
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_gradients_add_up_over_micro_batches(plain, data, tmp_path):
    """By preference alone two pairs at once are two pairs one by one."""
    lines = []
    for micro in (1, 2):
        trained(plain, data, tmp_path / str(micro), replace(PLAN, micro=micro, weights=(1, 0, 0), steps=3))
        lines.append(curves.read_log(tmp_path / str(micro)))
    assert lines[0][-1]["loss"] < lines[0][0]["loss"] - 0.01
    for one, two in zip(*lines):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4) and one["delta"] == two["delta"] == 0


def test_lora_on_int4(tiny, data, tmp_path):
    plan = replace(PLAN, steps=3, lora=2, lr=1e-2, optimiser="muon")
    assert trained(tiny, data, tmp_path / "parts", plan, stop_at=2) is None
    trained(tiny, data, tmp_path / "parts", plan)
    trained(tiny, data, tmp_path / "whole", plan)
    assert (tmp_path / "parts" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    load(tiny, lora=tmp_path / "whole")
    lines = curves.read_log(tmp_path / "whole")
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-4) and lines[-1]["margin"] > 1e-3
    with pytest.raises(InputError, match="is there already, whole"):
        trained(tiny, data, tmp_path / "whole", plan)


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_kept(plain, data, tmp_path, rank):
    """Held hard, the model moves less from the reference on what it shall keep."""
    keep = read_rows(data / "keep.jsonl")
    drifts = []
    for hold in (0.0, 100.0):
        out = tmp_path / f"{hold:g}"
        trained(plain, data, out, replace(PLAN, steps=3, hold=hold, lora=rank, lr=1e-2 if rank else 1e-3), keep=keep)
        drifts.append([line["kept"] for line in curves.read_log(out)])
    assert drifts[0][0] == pytest.approx(0, abs=1e-6) and drifts[0][-1] > 1e-3
    assert 0 <= drifts[1][-1] < 0.5 * drifts[0][-1]


def test_another_reference(plain, whole, data, tmp_path):
    """Rewards are measured against it: not zero at the first step."""
    trained(whole, data, tmp_path / "out", replace(PLAN, steps=1), reference=plain)
    first = curves.read_log(tmp_path / "out")[0]
    assert first["margin"] > 0.01 and first["preference"] < math.log(2)
    torch.testing.assert_close(stored_logps(tmp_path / "out"), stored_logps(whole), rtol=0, atol=0)


# ---- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("row, message", [
    ({**ROWS[0], "rejected": ROWS[0]["chosen"]}, "the chosen and the rejected answer are the same"),
    ({**ROWS[0], "chosen": " "}, "the chosen answer is empty"),
    ({**ROWS[0], "image": "c.png"}, "there is no picture"),
    ({**ROWS[0], "image": "broken.png"}, "broken.png"),
    ({**ROWS[0], "chosen": "word " * 200}, r"the chosen answer has \d+ tokens, \d+ before the answer; 150 have room"),
    ({**ROWS[0], "rejected": "word " * 200}, "the rejected answer has"),
    ({**ROWS[0], "question": "a <IMG_CONTEXT>"}, "spell <IMG_CONTEXT>"),
    ({**ROWS[0], "max_num": 0}, "max_num is 0"), ({**ROWS[0], "max_num": 99}, "max_num is 99")])
def test_a_pair_that_cannot_be_learned_from_is_named(plain, data, tmp_path, row, message):
    for file in ("a.png", "b.png"):
        shutil.copy(data / file, tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    write(tmp_path / "pairs.jsonl", ROWS[1], row)
    with pytest.raises(InputError, match=rf"pairs\.jsonl, line 2: .*{message}"):
        trained(plain, tmp_path, tmp_path / "out", replace(PLAN, max_tokens=150))


def test_other_pairs_or_another_recipe_do_not_go_on(plain, data, whole, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    out = tmp_path / "out"
    assert trained(plain, data, out, stop_at=1) is None
    with pytest.raises(InputError, match="another recipe"):
        trained(plain, data, out, replace(PLAN, lr=1e-4))
    Image.new("RGB", (90, 60), "red").save(tmp_path / "data" / "a.png")
    with pytest.raises(InputError, match="another recipe"):
        trained(plain, tmp_path / "data", out)
    (tmp_path / "other").mkdir()
    shutil.copy(whole / reference.FILE, tmp_path / "other")
    with pytest.raises(InputError, match="log-probabilities of other pairs, or by another model"):
        trained(plain, tmp_path / "data", tmp_path / "other")
    with pytest.raises(InputError, match="already holds weights"):
        trained(plain, data, whole)


def test_a_reference_that_reads_other_ids(plain, data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(plain, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "system_message": "Be short."}))
    with pytest.raises(InputError, match=r"pairs\.jsonl, line \d: the reference reads .* other ids"):
        trained(plain, data, tmp_path / "out", reference=other)


def test_what_else_is_refused(plain, tiny, data, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="int4 weights do not learn; .*--lora RANK.*dequantize"):
        trained(tiny, data, tmp_path / "out")
    with pytest.raises(InputError, match="--batch 3 is no multiple of --micro 2"):
        trained(plain, data, tmp_path / "out", replace(PLAN, batch=3, micro=2))
    for change in ({"lora": 2}, {"optimiser": "muon"}):
        with monkeypatch.context() as patch, pytest.raises(InputError, match="are for one process"):
            patch.setattr("weights_tools.mpo.distributed.world", lambda: (0, 2))
            trained(plain, data, tmp_path / "out", replace(PLAN, **change))
    with pytest.raises(InputError, match="lies in"):
        trained(plain, data, plain / "out")
    entry = {"root": str(data), "annotation": str(data / "pairs.jsonl"), "repeat_time": 1}
    meta = tmp_path / "meta.json"
    for change, message in (({"data_augment": True}, "data_augment of 'mine' is true"),
                            ({"repeat_time": 0}, "leaves no pair")):
        meta.write_text(json.dumps({"mine": {**entry, **change}}))
        with pytest.raises(InputError, match=message):
            pairs_of(meta)


# ---- the plan, the order, the command -------------------------------------------------------------------------------

def test_the_card_s_numbers_are_the_defaults(plain):
    plan = train.plan_of(train.arguments(["m", "d", "o"]))
    assert plan == steps.Plan()
    assert (plan.lr, plan.epochs, plan.beta, plan.weights, plan.weight_decay, plan.warmup, plan.max_tokens) == (
        1e-6, 1, 0.1, (0.8, 0.2, 1.0), 0.05, 0.03, 8192)
    model = load(plain)
    optimiser, = steps.optimisers(plan, model, list(model.parameters()))
    assert {(g["betas"], g["eps"]) for g in optimiser.param_groups} == {((0.9, 0.999), 1e-8)}
    assert [{p.ndim > 1 for p in g["params"]} for g in optimiser.param_groups] == [{True}, {False}]
    large = SimpleNamespace(parameters=lambda: [torch.empty(1, device="meta").expand(38 * 10**9)])
    assert [steps.settled(plan, one, 3001).batch for one in (model, large)] == [256, 512]
    assert steps.settled(plan, model, 3001).steps == 12


def test_every_pair_of_every_dataset_comes_once_an_epoch(plain, data, tmp_path):
    entry = {"root": str(data), "annotation": str(data / "pairs.jsonl"), "repeat_time": 2}
    (tmp_path / "meta.json").write_text(json.dumps({"one": entry, "two": {**entry, "repeat_time": 1}}))
    pairs = pairs_of(tmp_path / "meta.json")
    assert len(pairs) == 9
    model, tokenizer = load(plain), Tokenizer.load(plain)
    task = steps.Task(replace(PLAN, batch=3, steps=6), model, None, tokenizer, pairs, torch.arange(18.).view(9, 2))
    drawn = [int(logps[0, 0]) // 2 for batch_, kept in steps.batches(task, 0) for _, logps in batch_]
    assert sorted(drawn[:9]) == sorted(drawn[9:]) == list(range(9)) and drawn[:9] != drawn[9:]
    assert [int(logps[0, 0]) // 2 for batch_, _ in steps.batches(task, 2) for _, logps in batch_] == drawn[6:]


def test_curves_of_many_steps_and_of_a_run_that_was_killed(tmp_path):
    write(tmp_path / "log.jsonl", *({"step": step, "loss": 1 / step, "margin": 0.1 * step, "accuracy": 1.0}
                                    for step in [*range(1, 301), *range(251, 351)]))
    assert [line["step"] for line in curves.read_log(tmp_path)] == list(range(1, 351))
    points = curves.smoothed([(step, 2.0 * step) for step in range(350)])
    assert len(points) == 117 and all(y == pytest.approx(2 * x) for x, y in points)
    curves.draw(tmp_path)
    (tmp_path / "log.jsonl").write_text("[]\n")
    with pytest.raises(InputError, match="is no log of a training"):
        curves.read_log(tmp_path)


@pytest.mark.parametrize("words, message", [
    ("--weights 0 0 0", "--weights are"), ("--warmup 2", "must be in 0..1"), ("--lr 0", "--lr is 0.0"),
    ("--beta nan", "--beta is nan"), ("--hold 1", "--hold has no effect without --keep"), ("--micro 0", "at least 1"),
    ("--lora -1", "0 or more"), ("--weights 1 1 -1", "--weights is -1.0"), ("--max-tiles 0", "--max-tiles is 0")])
def test_options_that_mean_nothing(words, message):
    with pytest.raises(InputError, match=message):
        train.arguments(["m", "d.jsonl", "o", *words.split()])


def test_the_command(plain, data, tmp_path, capsys):
    assert train.main([str(plain), str(data / "pairs.jsonl"), str(tmp_path / "out"), "--steps", "1", "--batch", "1",
                       "--keep", str(data / "keep.jsonl"), "--hold", "2", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "3 pairs: 1 steps of 1, 1 at once; all weights by adamw, rate 1e-06; at most 12 tiles a picture and " in out
    assert "tokens; products in float32; 2 rows kept, weight 2" in out
    assert f"{tmp_path / 'out'}: the checkpoint, log.jsonl and curves.svg" in out
    assert load(tmp_path / "out")
