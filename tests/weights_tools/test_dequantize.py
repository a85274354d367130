"""dequantize: the float checkpoint computes what the AWQ one does, in every form; what it refuses leaves nothing."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import logits, stored

from minivl import InputError, awq, load
from minivl.config import Config
from minivl.files.find import SHIPPED
from weights_tools import dequantize as d
from weights_tools import files
from weights_tools import quantize as q
from weights_tools.synthesize import config_json, meta_tensors, synthesize


@pytest.mark.parametrize("form", ["awq", "awq-bin-shards", "awq-top"])
def test_it_computes_the_same(made, form, tmp_path):
    """The words of a file in either format become weights that are read without awq.py, and nothing else changes."""
    source = made(form)
    out = d.dequantize(source, tmp_path / "out", "float32")
    assert torch.equal(logits(out), logits(source))
    d.dequantize(source, tmp_path / "half")
    assert (logits(tmp_path / "half") - logits(source)).abs().max() < 2e-2
    assert {path.name for path in source.iterdir() if "model" not in path.name} <= {p.name for p in out.iterdir()}


@pytest.mark.parametrize("size, dtype", [("tiny", "float16"), ("tiny-internlm2", "bfloat16")])
def test_names_shapes_and_config_are_those_of_a_float_checkpoint(size, dtype, tmp_path):
    source = synthesize(tmp_path / "awq", size, awq=True, config_quirk="top", shard_gb=0.0003)
    out = d.dequantize(source, tmp_path / "out", dtype)
    wanted = meta_tensors(config_json(size, dtype=dtype))
    found = stored(out)
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in wanted.items()}
    config, like = json.loads((out / "config.json").read_text()), config_json(size, dtype=dtype)
    assert config == {**like, "_name_or_path": config["_name_or_path"]}
    parts = stored(source)
    for name in (n.removesuffix(".qweight") for n in parts if n.endswith(".qweight")):
        W = awq.dequantize(*(parts[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")))
        assert torch.equal(found[f"{name}.weight"], W.T.to(d.DTYPES[dtype])), name


def groups(tensors, name):
    """Numbers [I/g, g, O] and zero points [I/g, O] of one linear."""
    zeros = awq.unpack(tensors[f"{name}.qzeros"]).int()
    return awq.unpack(tensors[f"{name}.qweight"]).int().view(len(zeros), -1, zeros.shape[-1]), zeros


def unlike(before, after, name, method):
    """(which groups have other integers now, which do not use both 0 and 15), each [I/g, O]."""
    (n, z), (m, y) = groups(before, name), groups(after, name)
    low, high = n.amin(1), n.amax(1)
    if method == "with-zero":
        low, high = torch.minimum(low, z), torch.maximum(high, z)
    return (n != m).any(1) | (z != y), (low > 0) | (high < 15)


@pytest.mark.parametrize("rounding", q.ROUNDINGS)
def test_quantised_again_it_has_the_same_integers(rounding):
    """Nano: quantised, dequantised, quantised. Of 15,360 groups 50 (with-zero) and 2 (lmdeploy) change, none of which
    used both 0 and 15."""
    changed = 0
    for layer in load("nano").language_model.layers:
        for name, module in layer.linears.items():
            first = words(module.weight.detach(), 128, rounding)
            again = words(awq.dequantize(*first.values(), torch.float16).T.float().contiguous(), 128, rounding)
            other, narrow = unlike(first, again, "x", rounding)
            assert not (other & ~narrow).any(), name
            changed += int(other.sum())
    assert 0 < changed <= {"with-zero": 60, "lmdeploy": 5}[rounding]


def test_a_checkpoint_quantised_again_is_the_same_but_for_few_groups(tmp_path):
    rtn = q.Recipe("rtn")
    first = stored(q.quantize_folder(SHIPPED["nano"], tmp_path / "awq", rtn))
    again = stored(q.quantize_folder(d.dequantize(tmp_path / "awq", tmp_path / "float"), tmp_path / "again", rtn))
    assert first.keys() == again.keys()
    for name in first:
        if name.endswith("qweight"):
            assert (awq.unpack(first[name]) != awq.unpack(again[name])).float().mean() < 0.01, name


def words(weight, group_size, rounding):
    parts = q.quantize_linear(weight, group_size, rounding)
    return {"x.qweight": parts[0], "x.qzeros": parts[1], "x.scales": parts[2].half()}


@pytest.mark.parametrize("method", q.ROUNDINGS)
@pytest.mark.parametrize("dtype", d.DTYPES)
def test_which_groups_are_stable(method, dtype):
    """Groups of one sign, far from zero, of all sizes that float16 has: those that use 0 and 15 are stable."""
    w = torch.randn(256, 16, 32) * torch.empty(256, 16, 1).uniform_(-17, 3).exp()
    w[::4] += 1.3 * w[::4].abs().amax(-1, keepdim=True)
    w[1::4] -= w[1::4].abs().amax(-1, keepdim=True) / 2

    before = words(w.view(256, 512).half().float(), 32, method)
    after = words(awq.dequantize(*before.values(), d.DTYPES[dtype]).T.half().float().contiguous(), 32, method)
    other, narrow = unlike(before, after, "x", method)
    exceptions = narrow | (before["x.scales"] < 2e-6) if dtype == "bfloat16" else narrow
    assert other.any() and not (other & ~exceptions).any()


def test_what_is_refused_leaves_nothing(made, tmp_path, monkeypatch):
    source = made("awq")
    with pytest.raises(InputError, match="is a float checkpoint"):
        d.main([str(made("plain")), str(tmp_path / "out")])
    inside = tmp_path / "copy"
    shutil.copytree(source, inside)
    for out in (inside, inside / "out", tmp_path / "x" / ".." / "copy"):
        with pytest.raises(InputError, match="whose files it is made from; choose a folder elsewhere"):
            d.main([str(inside), str(out)])
    (tmp_path / "link").symlink_to(inside)
    with pytest.raises(InputError, match="choose a folder elsewhere"):
        d.main([str(inside), str(tmp_path / "link" / "out")])
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000))
    with pytest.raises(InputError, match="free some space"):
        d.main([str(source), str(tmp_path / "deep" / "out")])
    monkeypatch.undo()
    (inside / "model.safetensors").write_bytes((inside / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match="model.safetensors"):
        d.main([str(inside), str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "link"]
    assert {path.name for path in inside.iterdir()} == {path.name for path in source.iterdir()}


def test_numbers_too_large_for_the_dtype(made, tmp_path):
    source = made("awq")
    tensors = stored(source)
    name = "language_model.model.layers.1.mlp.down_proj.scales"
    tensors[name][0, 0] = 60000
    shutil.copytree(source, tmp_path / "large", ignore=shutil.ignore_patterns("model*"))
    files.save_checkpoint(tensors, tmp_path / "large")
    with pytest.raises(InputError, match=r"layers.1.mlp.down_proj.weight would hold NaN or infinity .* in float16; .* "
                                         "bfloat16 or float32"):
        d.dequantize(tmp_path / "large", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert stored(d.dequantize(tmp_path / "large", tmp_path / "out", "bfloat16"))


def test_tables_that_old_versions_saved_are_left_out(made, tmp_path):
    tensors = stored(made("awq"))
    names = set(stored(made("plain")))
    table = 1e6 ** (-torch.arange(0, 32, 2).float() / 32)
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = table
    shutil.copytree(made("awq"), tmp_path / "old", ignore=shutil.ignore_patterns("model*"))
    files.save_checkpoint(tensors, tmp_path / "old")
    assert set(stored(d.dequantize(tmp_path / "old", tmp_path / "out"))) == names


def test_the_command(made, tmp_path, capsys):
    out = tmp_path / "out"
    assert d.main([str(made("awq")), str(out), "--dtype", "bfloat16"]) == 0
    assert "out: float checkpoint in bfloat16, 0.00" in capsys.readouterr().out
    assert Config.load(out).quantization_config is None
    with pytest.raises(InputError, match="already holds weights"):
        d.main([str(made("awq")), str(out)])
    assert d.main([str(made("awq")), str(out), "--overwrite"]) == 0
    assert {t.dtype for t in stored(out).values()} == {torch.float16}
