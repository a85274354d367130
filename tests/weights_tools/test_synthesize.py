"""synthesize: names, shapes, dtypes and files of the released checkpoints, with random numbers of a sane scale."""
import json
import os
import re

import pytest
import torch
from conftest import FORMS, logits, same, shared, stored

import minivl
from minivl.awq import dequantize
from minivl.files.formats import open_weights
from minivl.limits import InputError
from minivl.prompt import SYSTEM
from weights_tools import files, inspect, synthesize
from weights_tools.synthesize import SIZES, config_json, meta_tensors, random_tensor

SMALL = {"config.json", "generation_config.json", "preprocessor_config.json", "vocab.json", "merges.txt",
         "added_tokens.json"}


# ---- the sizes, from names and shapes alone -------------------------------------------------------------------------

@pytest.mark.parametrize("size, parameters, tensors, tensors_awq, gb_awq", [
    ("1B", 938_193_024, 637, 973, 1.347), ("2B", 2_205_754_368, 517, 757, 2.176),
    ("4B", 3_712_637_952, 781, 1285, 3.318), ("8B", 8_075_365_376, 573, 893, 5.818),
    ("26B", 25_514_186_112, 934, 1414, 23.309),
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


# ---- whole checkpoints ----------------------------------------------------------------------------------------------

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
    ({"size": "3B"}, "size '3B' is not one of tiny, tiny-internlm2, 1B, 2B, 4B, 8B, 26B, 38B, 78B"),
    ({"size": "4B"}, "needs the real Qwen2 vocabulary .*--tokenizer"),
    ({"size": "4B", "tokenizer": "."}, "lacks vocab.json, merges.txt, added_tokens.json"),
    ({"tokenizer": "."}, "size tiny has a tokenizer of its own"),
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

    def save_small(tensors, out, small, **_):       # without the weights, 3 GB
        out.mkdir()
        for name, content in small.items():
            (out / name).write_bytes(content)
    monkeypatch.setattr(synthesize, "save_checkpoint", save_small)
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
