"""weights_tools: what is written is what the released files are, what is read back is what was written."""
import hashlib
import http.server
import inspect as signatures
import json
import os
import pickletools
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors import safe_open

import minivl
import weights_tools
from minivl.awq import dequantize
from minivl.checkpoint import open_weights, safetensors_header
from minivl.limits import InputError
from minivl.prompt import SYSTEM, encode
from weights_tools import download, files, inspect, synthesize
from weights_tools.synthesize import SIZES, config_json, meta_tensors, random_tensor

ROOT = Path(__file__).parents[2]
SHARED = Path(__file__).parents[3] / "shared"
SMALL = {"config.json", "generation_config.json", "preprocessor_config.json", "vocab.json", "merges.txt",
         "added_tokens.json"}


def shared(path: str) -> Path:
    if not (SHARED / path).exists():
        pytest.skip(f"needs {path} of the full golden data beside this checkout")
    return SHARED / path


def stored(folder) -> dict[str, torch.Tensor]:
    return {name: tensor.read().clone() for name, tensor in open_weights(folder).items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# ---- files ----------------------------------------------------------------------------------------------------------

def odd_tensors():
    base = torch.randn(6, 5)
    return {"f32": base, "transposed": base.t(), "view": base[2:4], "twin": base.view(-1), "f16": torch.randn(3).half(),
            "bf16": torch.randn(2, 2, 2).bfloat16(), "i32": torch.tensor([[-2**31, 2**31 - 1]], dtype=torch.int32),
            "bool": torch.tensor([True, False, True]), "empty": torch.empty(0, 4), "scalar": torch.tensor(2.5),
            "parameter": torch.nn.Parameter(torch.randn(4))}


def test_safetensors_round_trip(tmp_path):
    tensors = odd_tensors()
    path = files.save_safetensors(tensors, tmp_path / "x.safetensors", {"note": "mine"})
    with safe_open(path, framework="pt") as f:
        metadata = f.metadata()
        assert set(f.keys()) == set(tensors)
        found = {name: f.get_tensor(name) for name in tensors}
    assert same(found, {name: tensor.detach() for name, tensor in tensors.items()})
    assert (metadata["format"], metadata["note"]) == ("pt", "mine")
    plain = bytes(tensors["transposed"].contiguous().view(torch.uint8).flatten().tolist())    # bytes by another way
    assert json.loads(metadata["sha256"])["transposed"] == hashlib.sha256(plain).hexdigest()
    assert json.loads(metadata["sha256"]).keys() == tensors.keys()
    (tmp_path / "touched").touch()
    assert path.stat().st_mode == (tmp_path / "touched").stat().st_mode         # not for the owner alone
    assert sorted(os.listdir(tmp_path)) == ["touched", "x.safetensors"]


@pytest.mark.parametrize("tensor", [torch.empty(3, device="meta"), torch.eye(3).to_sparse(), torch.tensor(1j)],
                         ids=["meta", "sparse", "complex"])
def test_tensor_that_cannot_be_stored(tensor, tmp_path):
    with pytest.raises(InputError, match="odd .* cannot be stored"):
        files.save_safetensors({"odd": tensor}, tmp_path / "x.safetensors")
    assert not os.listdir(tmp_path)


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = files.save_safetensors({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    before = path.read_bytes()
    monkeypatch.setattr(files, "serialize_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.save_safetensors({"x": torch.zeros(2)}, path)
    assert os.listdir(tmp_path) == ["x.safetensors"] and path.read_bytes() == before


def test_plan_shards():
    def plan(sizes, most):
        return [len(shard) for shard in files.plan_shards({str(i): n for i, n in enumerate(sizes)}, most)]

    assert plan([3, 3, 2, 5, 1], 6) == [2, 1, 2]        # the docstring's example
    assert plan([7, 1, 7, 7, 1], 6) == [1, 1, 1, 1, 1]  # larger than a shard: alone
    assert plan([1, 2, 3], 100) == [3]
    with pytest.raises(InputError, match="0 bytes"):
        plan([1], 0)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_checkpoint_in_shards(format, tmp_path):
    tensors = {f"layer.{i}": torch.randn(10, i + 1) for i in range(8)}
    written = files.save_checkpoint(tensors, tmp_path / "out", format=format, shard_bytes=800)
    stem = files.STEM[format]
    assert [p.name for p in written] == [f"{stem}-0000{k}-of-00003.{format}" for k in (1, 2, 3)] + [
        f"{stem}.{format}.index.json"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(p.name for p in written)
    index = json.loads(written[-1].read_text())
    assert index["metadata"] == {"total_size": sum(40 * (i + 1) for i in range(8))}
    for path in written[:-1]:
        names = [name for name, file in index["weight_map"].items() if file == path.name]
        assert 0 < sum(tensors[name].nbytes for name in names) <= 800
    assert same(stored(tmp_path / "out"), tensors)


def test_bin_holds_plain_tensors_only(tmp_path):
    tensors = odd_tensors()
    [path] = files.save_checkpoint(tensors, tmp_path, format="bin")
    assert same(stored(tmp_path), {name: tensor.detach() for name, tensor in tensors.items()})
    with zipfile.ZipFile(path) as archive:
        [pickled] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        strings = [arg for op, arg, _ in pickletools.genops(archive.read(pickled)) if op.name == "GLOBAL"]
        sizes = [info.file_size for info in archive.infolist() if re.search(r"/data/\d+$", info.filename)]
    assert {s.split(" ")[0] for s in strings} <= {"collections", "torch", "torch._utils"}
    assert {s.split(" ")[1] for s in strings if s.startswith("torch._utils")} == {"_rebuild_tensor_v2"}
    # a view of 2 rows is 40 bytes and not the 120 it was cut from, and nobody shares: one record each
    assert sorted(sizes) == sorted(tensor.nbytes for tensor in tensors.values())


def test_weights_are_not_overwritten_unasked(tmp_path):
    first, second = {"a": torch.randn(50), "b": torch.randn(50)}, {"c": torch.randn(7)}
    files.save_checkpoint(first, tmp_path, format="bin", shard_bytes=200)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="already holds weights .*--overwrite"):
        files.save_checkpoint(second, tmp_path)
    assert same(stored(tmp_path), first)

    def make(name):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        files.save_checkpoint(second, tmp_path, make=make, overwrite=True)
    assert same(stored(tmp_path), first)            # complete until the new one is

    files.save_checkpoint(second, tmp_path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "notes.txt"]       # no shard, index or .bin left
    assert same(stored(tmp_path), second)


def test_one_shard_in_memory_at_a_time(tmp_path):
    import gc
    import weakref
    alive, most = weakref.WeakSet(), []
    specs = {f"t{i}": torch.empty(100, device="meta") for i in range(12)}

    def make(name):
        gc.collect()
        alive.add(tensor := torch.full((100,), float(name[1:])))
        most.append(len(alive))
        return tensor
    files.save_checkpoint(specs, tmp_path, make=make, shard_bytes=1200)
    assert max(most) <= 4           # three make a shard; one more while the loop variable still holds the last
    with pytest.raises(ValueError, match="announced"):
        files.save_checkpoint(specs, tmp_path, make=lambda name: torch.ones(99), overwrite=True)


def test_disk_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000))
    with pytest.raises(InputError, match="0.002 GB, .* has 0.000 GB free"):
        files.save_checkpoint({"a": torch.empty(500_000)}, tmp_path)
    with pytest.raises(InputError, match="format 'pt' is not one of safetensors, bin"):
        files.save_checkpoint({}, tmp_path, format="pt")


# ---- the sizes, from names and shapes alone -------------------------------------------------------------------------

@pytest.mark.parametrize("size, parameters, tensors, tensors_awq, gb_awq", [
    ("1B", 938_193_024, 637, 973, 1.347), ("4B", 3_712_637_952, 781, 1285, 3.318),
    ("38B", 38_388_164_992, 1366, 2262, 30.577), ("78B", 78_408_318_336, 1558, 2678, 52.869)])
def test_totals_of_the_released_sizes(size, parameters, tensors, tensors_awq, gb_awq):
    plain, awq = (meta_tensors(config_json(size, awq=awq)) for awq in (False, True))
    assert sum(t.numel() for t in plain.values()) == parameters
    assert sum(t.nbytes for t in plain.values()) == 2 * parameters
    assert (len(plain), len(awq)) == (tensors, tensors_awq)
    assert round(sum(t.nbytes for t in awq.values()) / 1e9, 3) == gb_awq
    rows = [inspect.Tensor(name, "", tuple(t.shape), t.nbytes, "", None) for name, t in awq.items()]
    assert inspect.totals(rows)["total"]["weights"] == parameters       # eight weights a word, constants not counted
    if size in ("4B", "38B"):       # as many files of 2 GB as the releases have
        assert len(files.plan_shards({n: t.nbytes for n, t in awq.items()}, 2 * 10**9)) == {"4B": 2, "38B": 16}[size]


def released_names(layers: int, vision_layers: int, small_tower: bool, awq: bool) -> set[str]:
    """The names of the released files, spelled out."""
    names = {"vision_model.embeddings." + n for n in ("class_embedding", "patch_embedding.weight",
                                                      "patch_embedding.bias", "position_embedding")}
    per_layer = ["norm1.weight", "norm2.weight", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias",
                 "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias", "ls1", "ls2"]
    per_layer += (["norm1.bias", "norm2.bias", "attn.qkv.bias"] if small_tower
                  else ["attn.q_norm.weight", "attn.k_norm.weight"])
    names |= {f"vision_model.encoder.layers.{i}.{n}" for i in range(vision_layers) for n in per_layer}
    names |= {f"mlp1.{i}.{n}" for i in (0, 1, 3) for n in ("weight", "bias")}
    names |= {"language_model." + n for n in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    qkv = [f"self_attn.{n}_proj" for n in "qkv"]
    linears = [*qkv, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    per_layer = ["input_layernorm.weight", "post_attention_layernorm.weight", *(n + ".bias" for n in qkv)]
    per_layer += [f"{n}.{t}" for n in linears for t in (("qweight", "qzeros", "scales") if awq else ("weight",))]
    return names | {f"language_model.model.layers.{i}.{n}" for i in range(layers) for n in per_layer}


@pytest.mark.parametrize("awq", [False, True], ids=["plain", "awq"])
@pytest.mark.parametrize("size, layers, vision_layers, small", [("4B", 36, 24, True), ("78B", 80, 45, False)])
def test_names_are_the_released_ones(size, layers, vision_layers, small, awq):
    assert set(meta_tensors(config_json(size, awq=awq))) == released_names(layers, vision_layers, small, awq)


def test_shapes_of_the_4b_awq_layers():
    tensors = meta_tensors(config_json("4B", awq=True))
    for module, qweight, qzeros, scales, bias in [      # as released
            ("self_attn.q_proj", [2048, 256], [16, 256], [16, 2048], [2048]),
            ("self_attn.k_proj", [2048, 32], [16, 32], [16, 256], [256]),
            ("self_attn.v_proj", [2048, 32], [16, 32], [16, 256], [256]),
            ("self_attn.o_proj", [2048, 256], [16, 256], [16, 2048], None),
            ("mlp.gate_proj", [2048, 1376], [16, 1376], [16, 11008], None),
            ("mlp.up_proj", [2048, 1376], [16, 1376], [16, 11008], None),
            ("mlp.down_proj", [11008, 256], [86, 256], [86, 2048], None)]:
        prefix = f"language_model.model.layers.35.{module}."
        found = {n.removeprefix(prefix): (list(t.shape), t.dtype) for n, t in tensors.items() if n.startswith(prefix)}
        wanted = {"qweight": (qweight, torch.int32), "qzeros": (qzeros, torch.int32), "scales": (scales, torch.float16)}
        assert found == {**wanted, **({"bias": (bias, torch.float16)} if bias else {})}


# ---- synthesize -----------------------------------------------------------------------------------------------------

FORMS = {       # name -> options; the shards of 0.3 MB make four files of the AWQ model, six of the other
    "plain": {}, "plain-shards": {"shard_gb": 0.0003}, "plain-bin": {"format": "bin"},
    "plain-bin-shards": {"format": "bin", "shard_gb": 0.0003}, "awq": {"awq": True},
    "awq-shards": {"awq": True, "shard_gb": 0.0003}, "awq-bin": {"awq": True, "format": "bin"},
    "awq-bin-shards": {"awq": True, "format": "bin", "shard_gb": 0.0003},
    "awq-top": {"awq": True, "config_quirk": "top"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name of a form -> its folder, made once."""
    folder, done = tmp_path_factory.mktemp("forms"), {}

    def make(form):
        if form not in done:
            done[form] = synthesize.synthesize(folder / form, "tiny", seed=3, **FORMS[form])
        return done[form]
    return make


def logits(folder, **load):
    model, tokenizer = minivl.load(folder, **load), minivl.Tokenizer.load(folder)
    ids = encode(tokenizer, [{"role": "user", "content": "<image>\nWhat is this? 是什么🙂"}], [3],
                 tokens_per_tile=model.config.num_image_token)
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(torch.tensor([ids]), pixels)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_and_computes_the_same(form, made):
    folder = made(form)
    found = logits(folder)
    assert found.isfinite().all() and 0.3 < found.std() < 3
    kind = form.split("-")[0]
    if form != kind:
        assert torch.equal(found, logits(made(kind)))
    weights = {p.name for p in files.weight_files(folder)}
    assert set(os.listdir(folder)) == SMALL | weights
    assert ("safetensors" in min(weights)) == ("bin" not in form)
    assert any(name.endswith("index.json") for name in weights) == ("shards" in form)
    if "shards" in form:
        index = json.loads(next(folder.glob("*.index.json")).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in open_weights(folder).values())
        assert set(index["weight_map"]) == set(meta_tensors(config_json("tiny", awq=kind == "awq")))
    config = json.loads((folder / "config.json").read_text())
    assert ("quantization_config" in config, "quantization_config" in config["llm_config"]) == (
        form == "awq-top", kind == "awq" and form != "awq-top")
    assert sum(p.stat().st_size for p in folder.iterdir()) < 2_000_000


def test_forms_hold_identical_tensors_of_the_released_dtypes(made):
    plain, awq = stored(made("plain-bin-shards")), stored(made("awq-bin"))
    assert same(plain, stored(made("plain"))) and same(awq, stored(made("awq-shards")))
    assert {t.dtype for t in plain.values()} == {torch.bfloat16}
    assert {t.dtype for t in awq.values()} == {torch.float16, torch.int32}


def test_seed_decides_every_tensor(tmp_path, made):
    again = synthesize.synthesize(tmp_path / "again", "tiny", awq=True, seed=3)
    other = synthesize.synthesize(tmp_path / "other", "tiny", awq=True, seed=4)
    first, second = stored(again), stored(other)
    assert same(first, stored(made("awq")))
    assert not [name for name in first if torch.equal(first[name], second[name])]
    assert not torch.equal(logits(again), logits(other))
    q, k = (first[f"language_model.model.layers.{i}.mlp.up_proj.qweight"] for i in (0, 1))
    assert not torch.equal(q, k)        # nor are two layers alike


@pytest.mark.parametrize("form", ["plain", "awq"])
def test_half_precision_computes_finite_logits(form, made):
    expected = logits(made(form))
    for dtype in ("float16", "bfloat16"):
        found = logits(made(form), dtype=dtype)
        assert found.isfinite().all()
        assert (found - expected).norm() < 0.1 * expected.norm()


def test_values_are_of_a_sane_scale():
    """Real widths, so that the rule shows and not the luck of a tiny tensor: std 1/sqrt(fan in), less on branches."""
    like = {n: torch.empty(1, *shape, device="meta")[0] for n, shape in {
        "mlp.gate_proj.weight": (1000, 2048), "mlp.down_proj.weight": (500, 11008), "mlp1.0.weight": (4096,),
        "model.norm.weight": (2048,), "attn.qkv.bias": (3072,), "ls1": (1024,)}.items()}
    at = "language_model.model.layers.0."
    values = {n: random_tensor(n if n == "mlp1.0.weight" else at + n, t, seed=0, layers=36) for n, t in like.items()}
    std, mean = ({n: float(getattr(t, what)()) for n, t in values.items()} for what in ("std", "mean"))
    assert std["mlp.gate_proj.weight"] == pytest.approx(2048 ** -0.5, rel=0.02)
    assert std["mlp.down_proj.weight"] == pytest.approx(11008 ** -0.5 / 72 ** 0.5, rel=0.02)
    for norm in ("mlp1.0.weight", "model.norm.weight"):
        assert mean[norm] == pytest.approx(1, abs=0.02) and std[norm] == pytest.approx(0.1, rel=0.1)
    for name in ("vision_model.encoder.layers.0.attn.proj.weight", "vision_model.encoder.layers.0.mlp.fc2.weight",
                 at + "self_attn.o_proj.weight"):
        branch = random_tensor(name, torch.empty(500, 1024, device="meta"), seed=0, layers=24)
        assert float(branch.std()) == pytest.approx(1024 ** -0.5 / 48 ** 0.5, rel=0.02)
    assert std["attn.qkv.bias"] == pytest.approx(0.02, rel=0.1)
    assert 0.1 <= values["ls1"].min() < 0.12 and 0.98 < values["ls1"].max() <= 1
    like = {"qweight": torch.empty(11008, 32, dtype=torch.int32, device="meta"),
            "qzeros": torch.empty(86, 32, dtype=torch.int32, device="meta"),
            "scales": torch.empty(86, 256, dtype=torch.float16, device="meta")}
    int4 = {n: random_tensor(f"{at}mlp.down_proj.{n}", t, seed=0, layers=36) for n, t in like.items()}
    weight = dequantize(**int4)
    assert float(weight.std()) == pytest.approx(11008 ** -0.5 / 72 ** 0.5, rel=0.02)
    assert abs(float(weight.mean())) < 0.01 * weight.std()      # a common mean would grow from layer to layer
    assert int4["qweight"].min() < -2**30 and int4["qweight"].max() > 2**30      # the sign bit is used as well
    assert int4["scales"].dtype == torch.float16


def test_long_tensor_is_made_in_chunks_of_its_own_numbers(monkeypatch):
    like = torch.empty(1000, 3, device="meta")
    monkeypatch.setattr(synthesize, "CHUNK", 64)
    chunked = random_tensor("a.weight", like, seed=0, layers=1)
    assert len(set(chunked.flatten().tolist())) > 2900      # the last chunk of 56 is filled, none is repeated


@pytest.mark.parametrize("form", ["plain-shards", "awq", "awq-bin", "plain-bin-shards"])
def test_flipped_bit_is_found_with_its_tensor(form, made, tmp_path):
    name = "language_model.model.layers.1.mlp.up_proj." + ("qweight" if "awq" in form else "weight")
    for path in made(form).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensor = open_weights(tmp_path)[name]
    values = tensor.read().clone()
    data = bytearray(tensor.file.read_bytes())
    data[data.index(bytes(files.raw_bytes(values))) + 1001] ^= 4
    del tensor
    path = next(p for p in files.weight_files(tmp_path) if p.stat().st_size == len(data)
                and bytes(files.raw_bytes(values)) in p.read_bytes())
    path.write_bytes(data)
    with pytest.raises(InputError, match=re.escape(f"{name} does not match its")):
        minivl.load(tmp_path)


def test_bfloat16_awq_as_some_requantised_files(tmp_path):
    folder = synthesize.synthesize(tmp_path / "x", awq=True, dtype="bfloat16")
    assert {t.dtype for t in stored(folder).values()} == {torch.bfloat16, torch.int32}
    assert logits(folder).isfinite().all()


def test_other_group_size(tmp_path):
    folder = synthesize.synthesize(tmp_path / "x", awq=True, group_size=64)
    assert open_weights(folder)["language_model.model.layers.0.mlp.down_proj.scales"].shape == (4, 128)
    assert logits(folder).isfinite().all()


@pytest.mark.parametrize("wrong, message", [
    ({"size": "2B"}, "size '2B' is not one of tiny, 1B, 4B, 38B, 78B"),
    ({"size": "4B"}, "needs the real Qwen2 vocabulary .*--tokenizer"),
    ({"size": "4B", "tokenizer": "."}, "lacks vocab.json, merges.txt, added_tokens.json"),
    ({"tokenizer": "."}, "tiny size has a tokenizer of its own"),
    ({"awq": True, "group_size": 96}, "group size 96 must divide .* 128 and 256"),
    ({"config_quirk": "top"}, "only AWQ files have"),
    ({"dtype": "float32"}, "dtype 'float32' is not one of float16, bfloat16"),
    ({"shard_gb": float("nan")}, "shards of nan GB"),
    ({"format": "pt"}, "format 'pt'")])
def test_wrong_wishes(wrong, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        synthesize.synthesize(tmp_path / "x", **wrong)
    assert not (tmp_path / "x").exists()


def test_real_vocabulary_is_checked_and_copied(tmp_path, monkeypatch, made):
    source = shared("qwen2_tokenizer")
    monkeypatch.setattr(synthesize, "save_checkpoint", lambda tensors, out, **_: out.mkdir())    # 3 GB less
    folder = synthesize.synthesize(tmp_path / "x", "4B", awq=True, tokenizer=source)
    for name in synthesize.TOKENIZER_FILES:
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert minivl.Tokenizer.load(folder).vocab_size == json.loads(
        (folder / "config.json").read_text())["llm_config"]["vocab_size"] == 151674
    # The released file's bytes: all 31 tokens, their order is their ids.
    ids = {token: 151643 + i for i, token in enumerate(synthesize.ADDED_TOKENS)}
    assert synthesize.json_text(ids).encode() == (source / "added_tokens.json").read_bytes()
    with pytest.raises(InputError, match="has 600 tokens, size 4B has 151674"):
        synthesize.synthesize(tmp_path / "y", "4B", tokenizer=made("plain"))


def test_small_files_have_the_released_lengths():
    for size, length, ids in [("4B", 129, [151644, 151645, 151643]), ("38B", 117, [151644, 151645])]:
        small = synthesize.generation_and_preprocessor(size, config_json(size))
        assert json.loads(small["generation_config.json"])["eos_token_id"] == ids
        assert (len(small["generation_config.json"]), len(small["preprocessor_config.json"])) == (length, 287)


def test_tiny_tokenizer(made):
    tokenizer = minivl.Tokenizer.load(made("plain"))
    assert tokenizer.vocab_size == SIZES["tiny"][1]["vocab_size"] == 600
    assert list(tokenizer.added) == list(synthesize.ADDED_TOKENS)
    assert min(tokenizer.added.values()) == 569
    for text in (SYSTEM, "A red square, 42!", "naïve 👩‍👩‍👧 🙂\n\n\t  ", "左边有一个红色的正方形。", "\x00\x7f\u2028",
                 "don't"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and len(ids) <= len(text.encode())
    assert len(tokenizer.encode("What do you see in this picture?")) < 16       # there are merges, and they serve
    assert synthesize.tiny_tokenizer() == synthesize.tiny_tokenizer()
    model = minivl.load(made("plain"))
    assert model.img_context_token_id == tokenizer.id("<IMG_CONTEXT>") == 593
    assert set(model.eos_token_ids) == {tokenizer.id(t) for t in ("<|im_end|>", "<|im_start|>", "<|endoftext|>")}


# ---- inspect --------------------------------------------------------------------------------------------------------

def run_inspect(capsys, *arguments) -> tuple[int, str]:
    code = inspect.main([str(a) for a in arguments])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("form", ["plain", "plain-bin-shards", "awq-shards", "awq-bin"])
def test_inspect_counts_the_same_weights_in_every_form(form, made, capsys):
    code, out = run_inspect(capsys, made(form), "--json")
    report = json.loads(out)
    assert code == 0 and report["fits"] is True and not any(report["problems"].values()) and report["note"] is None
    tensors = {t["name"]: t for t in report["tensors"]}
    assert list(tensors) == list(meta_tensors(config_json("tiny", awq="awq" in form)))      # in the model's order
    total = report["totals"]["total"]
    assert total["weights"] == 787_200
    assert total["bytes"] == sum(t.nbytes for t in open_weights(made(form)).values())
    assert total["stored"] == sum(t.numel() for t in stored(made(form)).values())
    parts = {part: row for part, row in report["totals"].items() if part != "total"}
    assert list(parts) == ["vision_model", "mlp1", "embeddings", "decoder layers", "norm and head"]
    assert all(sum(row[key] for row in parts.values()) == total[key] for key in total)
    weight = "language_model.model.layers.2.mlp.down_proj." + ("qweight" if "awq" in form else "weight")
    assert tensors[weight] == {
        "name": weight, "dtype": "int32" if "awq" in form else "bfloat16", "bytes": 16384 if "awq" in form else 65536,
        "shape": [256, 16] if "awq" in form else [128, 256], "stored": 4096 if "awq" in form else 32768,
        "weights": 32768, "module": "AWQLinear" if "awq" in form else "Linear", "part": "decoder layers",
        "file": open_weights(made(form))[weight].file.name}
    for name, module in [("vision_model.encoder.layers.0.ls1", "Layer"), ("mlp1.0.weight", "LayerNorm"),
                         ("vision_model.embeddings.position_embedding", "Embeddings"), ("mlp1.3.bias", "Linear"),
                         ("vision_model.embeddings.patch_embedding.weight", "Conv2d"),
                         ("language_model.model.norm.weight", "RMSNorm"),
                         ("language_model.model.embed_tokens.weight", "Embedding")]:
        assert tensors[name]["module"] == module


def test_inspect_text(made, capsys):
    code, out = run_inspect(capsys, made("awq"))
    assert code == 0 and out.rstrip().endswith("fits config.json")
    [row] = [line for line in out.splitlines() if "language_model.model.layers.0.mlp.up_proj.qzeros" in line]
    assert re.split("  +", row)[1:] == ["int32", "[1, 32]", "128", "AWQLinear", "model.safetensors"]
    assert re.search(r"\ntotal +133 +404,016 +787,200 +442,368 +919,488\n", out)
    short = run_inspect(capsys, made("awq"), "--summary")[1]
    assert out.endswith(short) and "qzeros" not in short
    some = run_inspect(capsys, made("awq"), "--filter", "*.layers.0.*qzeros")[1]
    assert some.count(".qzeros") == 7 and "7 tensors that match, of 133" in some
    with pytest.raises(InputError, match="none of the 133 tensors matches 'nothing'"):
        inspect.main([str(made("awq")), "--filter", "nothing"])


def test_inspect_reads_no_tensor(made, tmp_path):
    """Only the header of a safetensors file: damaged values do not matter to it."""
    for path in made("awq").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "model.safetensors"
    start = safetensors_header(path)[2]
    path.write_bytes(path.read_bytes()[:start] + bytes(path.stat().st_size - start))
    assert inspect.inspect(tmp_path).problems == inspect.inspect(made("awq")).problems


def test_inspect_names_what_does_not_fit(made, tmp_path, capsys):
    tensors = stored(made("awq"))
    at = "language_model.model.layers.1.self_attn."
    del tensors[at + "q_proj.bias"]
    tensors["surplus"] = torch.ones(2)
    tensors[at + "o_proj.scales"] = tensors[at + "o_proj.scales"][:, :64]
    tensors[at + "v_proj.qzeros"] = tensors[at + "v_proj.qzeros"].to(torch.int64)
    tensors[at + "k_proj.bias"] = tensors[at + "k_proj.bias"].float()        # no problem: converted at load
    files.save_checkpoint(tensors, tmp_path)
    (tmp_path / "config.json").write_bytes((made("awq") / "config.json").read_bytes())
    code, out = run_inspect(capsys, tmp_path, "--summary", "--json")
    assert code == 1 and json.loads(out)["fits"] is False
    assert json.loads(out)["problems"] == {
        "missing": [at + "q_proj.bias [128]"], "unexpected": ["surplus [2] in model.safetensors"],
        "misshapen": [at + "o_proj.scales is [1, 64] in model.safetensors, [1, 128] in the model"],
        "dtype": [at + "v_proj.qzeros is torch.int64 in model.safetensors, the model takes torch.int32"]}
    code, out = run_inspect(capsys, tmp_path)
    assert code == 1 and out.rstrip().endswith("does not fit config.json: 4 problems")
    assert f"missing: {at}q_proj.bias [128]\n" in out and re.search(r"\nsurplus +float32 +\[2\] +8 +- ", out)
    with pytest.raises(InputError, match="4 problems"):         # and the loader sees the same
        minivl.load(tmp_path)


def test_inspect_missing_shard_and_stale_shard(made, tmp_path, capsys):
    for path in made("awq-shards").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "model-00002-of-00004.safetensors"
    shard.rename(tmp_path / "model-00002-of-00009.safetensors")      # another name, same tensors: found by its pattern
    assert run_inspect(capsys, tmp_path, "--summary")[0] == 0
    shard.write_bytes((tmp_path / "model-00002-of-00009.safetensors").read_bytes())
    with pytest.raises(InputError, match="is in model-00002-of-00004.safetensors and in model-00002-of-00009"):
        inspect.inspect(tmp_path)
    shard.unlink()
    (tmp_path / "model-00002-of-00009.safetensors").unlink()
    code, out = run_inspect(capsys, tmp_path, "--summary")
    assert code == 1 and "missing: language_model." in out


def test_inspect_single_file(made, tmp_path, capsys):
    shard = made("awq-shards") / "model-00003-of-00004.safetensors"
    code, out = run_inspect(capsys, shard)
    assert code == 0 and "tensors of other files are not missed" in out and "AWQLinear" in out
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(shard.read_bytes())
    report = inspect.inspect(alone)
    assert report.problems is None and "no config.json" in report.note
    assert {t.module for t in report.tensors} == {None} and len(report.tensors) == len(safetensors_header(shard)[0])
    with pytest.raises(InputError, match="not a .safetensors file"):
        inspect.inspect(made("awq") / "config.json")


def test_inspect_lists_what_minivl_cannot_run(capsys):
    code, out = run_inspect(capsys, shared("golden/vit6b-internlm2"))
    assert code == 0 and "nothing compared: llm_config.architectures is InternLM2ForCausalLM" in out
    assert re.search(r"attention\.wqkv\.weight +float16 +\[256, 128\] +65,536 +- ", out)
    assert re.search(r"\nembeddings +1 .*\ndecoder layers +21 .*\nnorm and head +2 ", out)


# ---- the hub, played by objects that take only calls the installed client takes -------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stands for HfApi and the download functions: repository "Org/name" is a local folder."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.calls = Path(folder), []
        for name in ("HfApi", "hf_hub_download", "snapshot_download", "try_to_load_from_cache"):
            monkeypatch.setattr(huggingface_hub, name, self.checked(getattr(huggingface_hub, name)))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def checked(self, real):
        """Our method of that name, after the real function's signature has taken the arguments."""
        def call(*args, **kwargs):
            bound = signatures.signature(real).bind(*args, **kwargs)
            self.calls.append((real.__name__, dict(bound.arguments)))
            return getattr(self, real.__name__)(**bound.arguments)
        return call

    def HfApi(self):
        api = huggingface_hub.hf_api.HfApi()
        return SimpleNamespace(**{name: self.checked(getattr(api, name)) for name in (
            "model_info", "list_repo_files", "parse_safetensors_file_metadata")})

    def model_info(self, repo_id, revision=None, files_metadata=False):
        assert files_metadata       # without it the hub leaves sizes and digests out
        siblings = []
        for path in sorted(self.folder.iterdir()):
            size = path.stat().st_size
            lfs = (huggingface_hub.hf_api.BlobLfsInfo(size=size, pointer_size=134, sha256=hashlib.sha256(
                path.read_bytes()).hexdigest()) if path.suffix in (".bin", ".safetensors", ".pth") else None)
            siblings.append(huggingface_hub.hf_api.RepoSibling(path.name, size=size, lfs=lfs))
        return SimpleNamespace(siblings=siblings, sha=COMMIT)

    def list_repo_files(self, repo_id, revision=None):
        return sorted(os.listdir(self.folder))

    def parse_safetensors_file_metadata(self, repo_id, filename, revision=None):
        entries = safetensors_header(self.folder / filename)[0]
        return SimpleNamespace(tensors={name: huggingface_hub.utils.TensorInfo(dtype, list(shape), (begin, end))
                                        for name, (dtype, shape, begin, end) in entries.items()})

    def hf_hub_download(self, repo_id, filename, revision=None):
        assert not filename.endswith((".safetensors", ".bin")), "inspect must not fetch weights"
        return str(self.folder / filename)

    def try_to_load_from_cache(self, repo_id, filename, revision=None):
        assert revision == COMMIT       # and answers None: nothing is there

    def snapshot_download(self, repo_id, revision=None, local_dir=None, allow_patterns=None):
        target = Path(local_dir or self.folder.parent / "cache")
        target.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            (target / name).write_bytes((self.folder / name).read_bytes())
        return str(target)


@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    """A repository with the sharded AWQ checkpoint and what else lies in a real one."""
    def start(form):
        folder = tmp_path / "repository"
        folder.mkdir()
        for path in made(form).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        for name in ("modeling_internvl_chat.py", "inputs_stats.pth", "README.md"):
            (folder / name).write_text("not for us")
        return Hub(folder, monkeypatch)
    return start


def test_inspect_of_the_hub_fetches_no_weights(hub, made, capsys):
    played = hub("awq-shards")
    code, out = run_inspect(capsys, "Org/name", "--revision", "refs/pr/1", "--json")
    local = json.loads(run_inspect(capsys, made("awq-shards"), "--json")[1])
    assert code == 0 and {**json.loads(out), "source": ""} == {**local, "source": ""}
    assert {arguments.get("revision") for name, arguments in played.calls if name != "HfApi"} == {"refs/pr/1"}
    assert [arguments["filename"] for name, arguments in played.calls if name == "hf_hub_download"] == ["config.json"]


def test_inspect_of_a_remote_pickle(hub):
    hub("awq-bin")
    with pytest.raises(InputError, match=r"pickled .bin files.*weights_tools.download.*refs/pr/1"):
        inspect.inspect("Org/name")
    with pytest.raises(InputError, match="./Org does not exist"):
        inspect.inspect("./Org")


@pytest.mark.parametrize("form", ["awq-shards", "awq-bin"])
def test_download(form, hub, made, tmp_path, capsys):
    played = hub(form)
    folder = download.download("Org/name", revision="v1", to=tmp_path / "to")
    assert set(os.listdir(folder)) == set(os.listdir(made(form))) - {"preprocessor_config.json"}     # no code, no .pth
    assert {arguments.get("revision") for name, arguments in played.calls if name != "HfApi"} == {"v1"}
    out = capsys.readouterr().out
    for path in files.weight_files(folder):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert path.suffix == ".json" or f"{digest}  {path.name}  as on the hub\n" in out
    assert out.endswith(f"give this folder to minivl\n{folder}\n") and f"destination: {tmp_path / 'to'} (--to)" in out
    assert torch.equal(logits(folder), logits(made(form)))
    download.download("Org/name", revision="v1", to=tmp_path / "to")        # a second time
    out = capsys.readouterr().out
    assert out.count("(already there)") == len(os.listdir(folder)) and "to fetch: 0.000 GB" in out


def test_dry_run_only_lists(hub, tmp_path, capsys):
    played = hub("awq-shards")
    assert download.main(["Org/name", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert not [name for name, _ in played.calls if name == "snapshot_download"]
    total = sum(p.stat().st_size for p in played.folder.iterdir()
                if p.suffix not in (".py", ".pth", ".md") and p.name != "preprocessor_config.json")
    assert f"10 files {' ' * 33}{total:>7,} bytes" in out and "the hub's cache" in out and ".pth" not in out
    assert sorted(re.findall(r"\n  (model\S*) +([\d,]+) bytes", out)) == [
        (p.name, f"{p.stat().st_size:,}") for p in files.weight_files(played.folder)]


def test_download_refusals(hub, made, tmp_path, monkeypatch):
    played = hub("awq-shards")
    played.snapshot_download = lambda **_: pytest.fail("must not download")
    with monkeypatch.context() as m:
        m.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=300_000))
        with pytest.raises(InputError, match=r"Org/name needs 0.001 GB more, .* has 0.000 GB free; .*--to"):
            download.download("Org/name", to=tmp_path / "far" / "away")
    with pytest.raises(InputError, match=r"holds other weights \(model.safetensors, 1 files\)"):
        download.download("Org/name", to=made("awq"))
    with monkeypatch.context() as m:
        m.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
            download.download("Org/name")
    for path in files.weight_files(played.folder):
        path.unlink()
    with pytest.raises(InputError, match="no weights among the"):
        download.download("Org/name")


def test_download_that_differs_from_the_hub(hub, tmp_path):
    played = hub("awq-bin")
    honest, cut = played.snapshot_download, 0

    def damaged(**arguments):
        path = Path(honest(**arguments)) / "pytorch_model.bin"
        data = bytearray(path.read_bytes())
        data[5000] ^= 1
        path.write_bytes(data[:len(data) - cut])
        return str(path.parent)
    played.snapshot_download = damaged
    digest = hashlib.sha256((played.folder / "pytorch_model.bin").read_bytes()).hexdigest()
    with pytest.raises(InputError, match=f"pytorch_model.bin has sha256 .*, on the hub it is {digest}; .*delete"):
        download.download("Org/name", to=tmp_path / "to")
    cut = 9
    size = (played.folder / "pytorch_model.bin").stat().st_size
    with pytest.raises(InputError, match=f"has {size - 9} bytes in .*, on the hub {size}"):
        download.download("Org/name", to=tmp_path / "to2")


@pytest.mark.parametrize("name, message", [
    ("RepositoryNotFoundError", "there is no Org/name on the hub .*private"),
    ("GatedRepoError", "is gated .*hf auth login"),
    ("RevisionNotFoundError", "no revision 'v1'"), ("LocalEntryNotFoundError", "cannot be reached"),
    ("ConnectionError", r"\(ConnectionError: no route\).*; check the network")])
@pytest.mark.parametrize("tool", [download.download, inspect.inspect])
def test_hub_errors_become_words(name, message, tool, hub):
    played = hub("awq")
    kind = getattr(huggingface_hub.errors, name, ConnectionError)
    # The real constructors of the others want an HTTP response.
    error = kind("no route") if kind is ConnectionError else kind.__new__(kind)

    def fail(**_):
        raise error
    played.model_info = played.list_repo_files = fail
    with pytest.raises(InputError, match=message):
        tool("Org/name", revision="v1")


class LocalHub(http.server.BaseHTTPRequestHandler):
    """The few requests of the real client that a download makes, answered from `folder` as repository Org/name."""
    folder: Path

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.split("?")[0]
        content = {p.name: p.read_bytes() for p in self.folder.iterdir()}
        sha256 = {n: hashlib.sha256(c).hexdigest() for n, c in content.items() if n.endswith((".safetensors", ".pth"))}
        blob = {n: hashlib.sha1(b"blob %d\0" % len(c) + c).hexdigest() for n, c in content.items()}
        resolve = re.fullmatch(r"/Org/name/resolve/(?:main|[0-9a-f]{40})/(.+)", path)
        if re.fullmatch(r"/api/models/Org/name(/revision/(main|[0-9a-f]{40}))?", path):
            siblings = [{"rfilename": n, "size": len(c), "blobId": blob[n], **({"lfs": {
                "sha256": sha256[n], "size": len(c), "pointerSize": 134}} if n in sha256 else {})}
                for n, c in content.items()]
            self.answer(200, json.dumps({"id": "Org/name", "sha": COMMIT, "tags": [], "siblings": siblings}).encode())
        elif re.fullmatch(r"/api/models/Org/name/tree/(main|[0-9a-f]{40})", path):
            self.answer(200, json.dumps([{"type": "file", "path": n, "size": len(c), "oid": blob[n], **({"lfs": {
                "oid": sha256[n], "size": len(c), "pointerSize": 134}} if n in sha256 else {})}
                for n, c in content.items()]).encode())
        elif resolve and resolve[1] in content:
            data, name = content[resolve[1]], resolve[1]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256.get(name, blob[name])}"', "Accept-Ranges": "bytes"}
            if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                self.answer(206, data[first:last + 1], headers)
            else:
                self.answer(200, data, headers)
        elif path.startswith("/api/models/"):
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def answer(self, code, body, headers=None):
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def test_real_client_against_a_local_hub(made, tmp_path):
    """The installed huggingface_hub itself, on real requests; in a process of its own, for this one is offline."""
    repository = tmp_path / "repository"
    repository.mkdir()
    for path in made("awq-shards").iterdir():
        (repository / path.name).write_bytes(path.read_bytes())
    (repository / "inputs_stats.pth").write_text("not for us")
    handler = type("Handler", (LocalHub,), {"folder": repository})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = ("import sys; from weights_tools import run, download, inspect\n"
                "assert run(lambda: inspect.main(['Org/name', '--summary'])) == 0\n"
                "assert run(lambda: download.main(['Org/name'])) == 0\n"
                "sys.exit(run(lambda: download.main(['Org/other'])))")
        env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
               "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=env, capture_output=True,
                              text=True, timeout=120, check=False)
        server.shutdown()
    again = subprocess.run([sys.executable, "-W", "ignore", "-c", "import minivl; minivl.load('Org/name'); print('loaded')"],
                           cwd=ROOT, env={**env, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=60,
                           check=False)
    assert again.stdout == "loaded\n", again.stderr      # offline, though README and code were never fetched
    assert done.returncode == 2, done.stderr
    assert "error: there is no Org/other on the hub" in done.stderr and "Traceback" not in done.stderr
    assert "fits config.json" in done.stdout and done.stdout.count("as on the hub") == 4
    folder = Path(done.stdout.splitlines()[-1])
    assert folder.is_relative_to(tmp_path / "home") and not (folder / "inputs_stats.pth").exists()
    assert torch.equal(logits(folder), logits(made("awq")))


# ---- command lines --------------------------------------------------------------------------------------------------

def test_commands_end_in_one_line(tmp_path, capsys):
    assert weights_tools.run(lambda: synthesize.main([str(tmp_path / "x"), "--awq", "--shard-gb", "0.0003"])) == 0
    assert re.search(r"x: tiny AWQ, random weights of seed 0, 0\.001 GB, [\d.]+ s\n$", capsys.readouterr().out)
    assert weights_tools.run(lambda: synthesize.main([str(tmp_path / "x")])) == 2
    assert re.fullmatch(r"error: .* already holds weights .*\n", capsys.readouterr().err)
    assert weights_tools.run(lambda: inspect.main([str(tmp_path)])) == 2
    assert re.fullmatch(r"error: no weights among .*\n", capsys.readouterr().err)

    def interrupted():
        raise KeyboardInterrupt
    assert weights_tools.run(interrupted) == 130


@pytest.mark.parametrize("tool", [synthesize, inspect, download])
def test_help(tool, capsys):
    with pytest.raises(SystemExit) as exit:
        tool.main(["--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and out.startswith(f"usage: python -m {tool.__name__}")
    assert tool.__doc__.splitlines()[0] in out


def test_reader_of_a_pipe_may_leave(made):
    done = subprocess.run(f"{sys.executable} -W ignore -m weights_tools.inspect {made('awq')} | head -1", shell=True,
                          cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("tensor") and not done.stderr
