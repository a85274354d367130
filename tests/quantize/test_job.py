"""A checkpoint of any size, layer by layer: as the whole model at once would give it, stopped or not."""
import hashlib
import json
import os

import pytest
import torch
from PIL import Image

import minivl
from minivl import InputError, tiling
from minivl.config import Config
from minivl.files.formats import open_weights
from minivl.tokenizer import Tokenizer
from weights_tools import quantize as q
from weights_tools.files import save_checkpoint
from weights_tools.quantize import prompts
from weights_tools.quantize.__main__ import main
from weights_tools.quantize.job import WORK, kept_of
from weights_tools.quantize.stream import Stream
from weights_tools.synthesize import synthesize

SIZES = ("tiny", "tiny-internlm2")


@pytest.fixture(scope="module", params=SIZES)
def source(request, tmp_path_factory):
    return synthesize(tmp_path_factory.mktemp(request.param) / "float", request.param, dtype="bfloat16")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two rows with pictures, one without, and a text."""
    folder = tmp_path_factory.mktemp("data")
    Image.effect_noise((90, 40), 80).convert("RGB").save(folder / "a.png")
    Image.new("RGB", (30, 60), "red").save(folder / "b.png")
    lines = [{"image": "a.png", "question": "What is this?", "answer": "Noise."},
             {"image": ["a.png", "b.png"], "question": "<image> and <image>?", "chosen": "Noise, then red."},
             {"question": "Who?", "answer": "Nobody, as far as one can tell from here."}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    return folder


def shown(source, rows):
    """The prompts of both files, as the command takes them."""
    config, tokenizer = Config.load(source), Tokenizer.load(source)
    return [*prompts.from_rows(rows / "rows.jsonl", config, tokenizer),
            *prompts.from_text(rows / "text.txt", tokenizer, length=40)]


def files_of(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def args_of(source, out, rows, *more):
    return [str(source), str(out), "--pictures", str(rows / "rows.jsonl"), "--text", str(rows / "text.txt"), "--length",
            "40", "--group-size", "32", *more]


@pytest.mark.parametrize("recipe", [q.Recipe("rtn", 32), q.Recipe("smooth", 32, 0.3), q.Recipe("lmdeploy", 32),
                                    q.Recipe("awq", 32, clip=True), q.Recipe("awq", 32, dtype=torch.bfloat16)], ids=str)
def test_as_the_whole_model_would_give_it(source, rows, recipe, tmp_path):
    found = shown(source, rows)
    out = q.quantize_folder(source, tmp_path / "out", recipe, prompts=lambda: found)
    made = {name: stored.read() for name, stored in open_weights(out).items()}
    model = minivl.load(source, dtype=recipe.dtype)
    layers = model.language_model.layers
    every = kept_of([len(ids) for ids, _ in found])
    watches = [q.watched(layer, 32, every) for layer in layers]
    seen = [watch.__enter__() for watch in watches]
    with torch.no_grad():
        for ids, tiles in found:
            x = tiling.to_pixel_values(tiles) if tiles else None
            model(torch.tensor([ids]), x)
    compared = 0
    for i, layer in enumerate(layers):
        where = f"language_model.model.layers.{i}."
        wanted, _ = q.quantize_layer(layer.state_dict(), list(layer.linears), layer.FEEDS, recipe, seen[i])
        for name, tensor in wanted.items():
            got = made[where + name]
            assert got.dtype == tensor.dtype
            if recipe.dtype == torch.float32:
                assert (got != tensor).float().mean() < 0.002, name     # sums in another order
            compared += 1
    assert compared == sum(".layers." in name and "vision" not in name for name in made)
    kept = recipe.stored
    for name, tensor in open_weights(source).items():
        if name in made:
            assert made[name].dtype == kept and (".layers." in name and "vision" not in name or
                                                 torch.equal(made[name], tensor.read().to(kept)))
    assert (made.keys() & set(open_weights(source))) < made.keys()
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == str(kept)[6:]
    few = minivl.GenerationConfig(max_new_tokens=4)
    assert minivl.pipeline(out)(("What?", str(rows / "a.png")), few).token_ids
    assert not (out / WORK).exists()


def test_first_tokens_are_not_kept_more_often():
    """In 40 pieces of 512 tokens one of 40 would be every first token of a piece, were it one of 32 or 64."""
    for pieces, length in ((32, 512), (40, 512), (64, 512), (50, 300), (3, 7), (1, 5)):
        every = kept_of([length] * pieces)
        kept = range(0, pieces * length, every)
        first = sum(i % length == 0 for i in kept)
        assert first <= 1 + pieces // every and len(kept) >= min(pieces * length, 300)


def test_statistics_are_kept_and_read(source, rows, tmp_path):
    stats = tmp_path / "stats.safetensors"
    assert main(args_of(source, tmp_path / "a", rows, "--save-stats", str(stats))) == 0
    assert main([str(source), str(tmp_path / "b"), "--group-size", "32", "--stats", str(stats)]) == 0
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert a == b
    layers = minivl.load(source).language_model.layers
    found = q.read_statistics(stats, layers)
    assert [set(layer) for layer in found] == [set(layer.linears) for layer in layers]
    theirs = {kind: {f"model.layers.{i}.{name}": one[kind].half() for i, layer in enumerate(found)
                     for name, one in layer.items()} for kind in ("absmax", "absmean")}
    theirs["max"] = {}
    torch.save(theirs, tmp_path / "inputs_stats.pth")
    again = q.read_statistics(tmp_path / "inputs_stats.pth", layers)
    for one, other in zip(found, again):
        for name in one:
            torch.testing.assert_close(one[name]["absmax"], other[name]["absmax"], rtol=1e-3, atol=0)
    assert main([str(source), str(tmp_path / "c"), "--group-size", "32", "--method", "lmdeploy", "--dtype", "float16",
                 "--stats", str(tmp_path / "inputs_stats.pth")]) == 0


def test_statistics_of_another_model_are_refused(source, tmp_path):
    layers = minivl.load(source).language_model.layers
    name, module = next(iter(layers[0].linears.items()))
    good = {f"model.layers.{i}.{n}": torch.ones(m.in_features) for i, layer in enumerate(layers)
            for n, m in layer.linears.items()}
    key = f"model.layers.0.{name}"

    class Evil:
        def __reduce__(self):
            return os.system, ("true",)
    for data, words in (({"absmax": {}}, "holds no statistics for layers.0"),
                        ({"absmax": {**good, key: torch.ones(7)}}, rf"is \[7\], the linear has {module.in_features}"),
                        ({"absmax": {**good, key: -torch.ones(module.in_features)}}, "negative, NaN or infinite"),
                        ({"absmax": {**good, key: torch.full((module.in_features,), torch.inf)}}, "calibrate again"),
                        ({"absmax": {**good, key: "text"}}, "is str"), ({"absmax": 3}, "not a file of statistics"),
                        ({"absmax": Evil()}, "not a file of statistics")):
        torch.save(data, tmp_path / "inputs_stats.pth")
        with pytest.raises(InputError, match=words):
            q.read_statistics(tmp_path / "inputs_stats.pth", layers)
    (tmp_path / "text.pth").write_text("no zip")
    with pytest.raises(InputError, match="neither safetensors"):
        q.read_statistics(tmp_path / "text.pth", layers)
    with pytest.raises(InputError, match="no such file|does not exist|cannot be read"):
        q.read_statistics(tmp_path / "none.pth", layers)


BAD_ROWS = [("", "holds no rows"), ("\n \n", "holds no rows"), ("{", "line 1"), ("[]\n", "line 1: a row must be"),
            ('{"question": "a", "answer": "b"}\n{"image": "none.png", "question": "a", "answer": "b"}\n',
             "line 2: .*none.png"),
            ('{"image": 5, "question": "a", "answer": "b"}', "line 1: image must be"),
            ('{"question": "a"}', "line 1: .*must be texts"),
            ('{"question": "<image>", "answer": "b"}', "line 1: .*0 pictures"),
            ('{"question": "a", "answer": "b"}', "at least 128")]


@pytest.mark.parametrize("text, words", BAD_ROWS)
def test_bad_calibration_leaves_nothing(source, tmp_path, text, words):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(InputError, match=words):
        main([str(source), str(tmp_path / "out"), "--group-size", "32", "--pictures", str(tmp_path / "rows.jsonl")])
    assert not (tmp_path / "out").exists()


def test_what_else_is_refused(source, rows, tmp_path, capsys):
    out = tmp_path / "out"
    for more, words in ((["--method", "awq"], "give --pictures"), (["--stats", "none.pth"], "none.pth"),
                        (["--text", str(tmp_path / "none.txt")], "none.txt"),
                        (["--method", "rtn", "--group-size", "96"], "group size 96 must be")):
        with pytest.raises(InputError, match=words):
            main([str(source), str(out), *more])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 99)
    with pytest.raises(InputError, match="UTF-8|utf-8"):
        main([str(source), str(out), "--group-size", "32", "--text", str(tmp_path / "latin.txt")])
    for place in (source, source / "inside"):
        with pytest.raises(InputError, match="whose files it is made from"):
            main([str(source), str(place), "--method", "rtn", "--group-size", "32"])
    assert not out.exists() and not (source / "inside").exists()
    assert main([str(source), str(out), "--method", "rtn", "--group-size", "32"]) == 0
    assert "int4, rtn, group 32" in capsys.readouterr().out
    before = files_of(out)
    with pytest.raises(InputError, match="already holds weights"):
        main([str(source), str(out), "--method", "rtn", "--group-size", "32"])
    with pytest.raises(InputError, match="quantised already"):
        main([str(out), str(tmp_path / "again"), "--method", "rtn"])
    assert files_of(out) == before and not (tmp_path / "again").exists()
    assert main([str(source), str(out), "--method", "rtn", "--group-size", "64", "--overwrite"]) == 0
    assert files_of(out) != before


def test_a_disk_that_is_too_small(source, rows, tmp_path, monkeypatch):
    """Before the prompts are read, and again when it is known how many tokens they are."""
    from types import SimpleNamespace

    from weights_tools.quantize import job
    out = tmp_path / "out"
    result = job.announced(Stream(source), q.Recipe("smooth", 32))
    needed = sum(t.nbytes * (1 + ("language_model.model.layers" in name)) for name, t in result.items()) + 1000
    for free in (1000, needed):
        monkeypatch.setattr(job.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with pytest.raises(InputError, match="free some space, choose another disk, or calibrate on fewer tokens"):
            main(args_of(source, out, rows, "--length", "20"))
        assert not out.exists()


def test_a_layer_that_overflows_is_named(rows, tmp_path):
    source = synthesize(tmp_path / "float", "tiny", dtype="float16")
    argv = [str(source), str(tmp_path / "out"), "--group-size", "32", "--dtype", "float16", "--text"]
    tensors = {name: stored.read().clone() for name, stored in open_weights(source).items()}
    tensors["language_model.model.layers.1.mlp.up_proj.weight"] *= 1e5      # float16 can hold the weights
    tensors["mlp1.3.weight"] *= 1e5
    save_checkpoint(tensors, source, overwrite=True)
    name = "language_model.model.layers.1.mlp.up_proj"
    with pytest.raises(InputError, match="prompt 1 holds numbers .*: the tower exceeds float16; compute in bfloat16"):
        main([*argv, str(rows / "text.txt"), "--pictures", str(rows / "rows.jsonl")])
    words = r"puts out \d+ numbers that are NaN or infinite in float16 .*bfloat16"
    with pytest.raises(InputError, match=f"{name} {words}"):
        main([*argv, str(rows / "text.txt")])
    assert not (tmp_path / "out").exists()


def test_another_job_in_the_same_place_is_refused(source, rows, tmp_path, monkeypatch):
    from weights_tools.quantize import job

    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(job, "_assemble", stop)
    out = tmp_path / "out"
    argv = args_of(source, out, rows)
    with pytest.raises(KeyboardInterrupt):
        main(argv)
    kept = files_of(out / WORK)
    assert "layer-00001.safetensors" in kept
    for other in (["--method", "awq"], ["--alpha", "0.4"], ["--samples", "2"]):
        with pytest.raises(InputError, match="holds an unfinished job with other options"):
            main([*argv, *other])
    assert files_of(out / WORK) == kept
    monkeypatch.undo()
    monkeypatch.setattr(job, "quantize_layer", stop)        # all layers are there
    assert main(argv) == 0 and not (out / WORK).exists()
    fresh = args_of(source, tmp_path / "fresh", rows)
    monkeypatch.undo()
    assert main(fresh) == 0 and files_of(tmp_path / "fresh") == files_of(out)
