"""Released integers derived again: LMDeploy's own all equal, and what differs is found and judged."""
import json
import shutil

import pytest
import torch
from conftest import shared

from minivl import InputError, load
from minivl.files.formats import open_safetensors, open_weights
from weights_tools import quantize as q
from weights_tools.files import save_checkpoint
from weights_tools.quantize.rederive import main, rederive
from weights_tools.synthesize import quantization_block, synthesize


def saved_like_lmdeploy(statistics, path):
    """{"layers.0.mlp.down_proj": absmax} as LMDeploy writes it."""
    torch.save({"absmax": {f"model.{name}": value.half() for name, value in statistics.items()}, "max": {}}, path)


def statistics_of(folder, width=1.0):
    layers = load(folder).language_model.layers
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}.{name}": width * torch.rand(m.in_features, generator=generator) + 0.01
            for i, layer in enumerate(layers) for name, m in layer.linears.items()}


@pytest.fixture(scope="module", params=["tiny", "tiny-internlm2"])
def pair(request, tmp_path_factory):
    """A parent, and an AWQ twin with its statistics."""
    folder = tmp_path_factory.mktemp("pair")
    parent = synthesize(folder / "parent", request.param, dtype="bfloat16")
    saved_like_lmdeploy(statistics_of(parent), folder / "inputs_stats.pth")
    found = q.read_statistics(folder / "inputs_stats.pth", load(parent).language_model.layers)
    q.quantize_folder(parent, folder / "awq", q.Recipe("lmdeploy", 32, dtype=torch.float16), statistics=found)
    shutil.copy(folder / "inputs_stats.pth", folder / "awq")
    return parent, folder / "awq"


def test_lmdeploy_s_own_are_derived_bit_by_bit(tmp_path, capsys):
    golden = shared("golden/awq-quantize")
    released = {n: t.read().clone() for n, t in open_safetensors(golden / "quantized.safetensors").items()}
    rest = {n: t.read().half() for n, t in open_weights(golden).items()}
    quantised = {n.rsplit(".", 1)[0] for n in released if n.endswith("qweight")}
    whole = {**{n: t for n, t in rest.items() if n.removesuffix(".weight") not in quantised}, **released}
    (tmp_path / "awq").mkdir()
    config = json.loads((golden / "config.json").read_text())
    config["llm_config"]["quantization_config"] = quantization_block(128)
    (tmp_path / "awq" / "config.json").write_text(json.dumps(config))
    save_checkpoint(whole, tmp_path / "awq")
    stats = {n.removeprefix("language_model.model."): t.read().clone()
             for n, t in open_safetensors(golden / "act_absmax.safetensors").items()}
    saved_like_lmdeploy(stats, tmp_path / "awq" / "inputs_stats.pth")
    assert main([str(golden), str(tmp_path / "awq"), "--json", str(tmp_path / "found.json")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all(": 100.0000 % of " in line and line.endswith(" equal") for line in said), said
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 2 * (2 * 7 + 3 + 2) and not any(one["unexplained"] for one in found)


def test_a_pair_made_here(pair, capsys):
    assert main([str(pair[0]), str(pair[1])]) == 0
    assert capsys.readouterr().out.count("100.0000 %") == 3


def changed(pair, tmp_path, change):
    """A copy of the twin with changed tensors."""
    tensors = {n: t.read().clone() for n, t in open_weights(pair[1]).items()}
    change(tensors)
    shutil.copytree(pair[1], tmp_path / "changed", ignore=shutil.ignore_patterns("model*"))
    save_checkpoint(tensors, tmp_path / "changed")
    return tmp_path / "changed"


def test_what_differs_is_found_and_judged(pair, tmp_path, capsys):
    names = [n for n in open_weights(pair[1]) if n.endswith("qweight") and ".layers.1." in n]

    def change(tensors):
        tensors[names[0]][3, 2] ^= 0b1010           # two bits of one number
        tensors[names[1].replace("qweight", "scales")] *= 1.1
    folder = changed(pair, tmp_path, change)
    assert main([str(pair[0]), str(folder)]) == 1
    bad = {one.name: one for one in rederive(pair[0], folder) if one.unexplained}
    assert set(bad) == {names[0].removesuffix(".qweight"), names[1].replace("qweight", "scales")}
    assert bad[names[0].removesuffix(".qweight")].unexplained == 1
    said = capsys.readouterr().out
    assert "not explained, in 2 tensors" in said and "1 of" in said


def test_rounding_otherwise_is_explained(pair, tmp_path):
    """The same computed in float32, as another machine's half precision would round it otherwise."""
    layers = load(pair[0]).language_model.layers
    found = q.read_statistics(pair[1] / "inputs_stats.pth", layers)
    other = q.quantize_folder(pair[0], tmp_path / "other", q.Recipe("lmdeploy", 32), statistics=found)
    judged = rederive(pair[0], other, pair[1] / "inputs_stats.pth")
    assert any(one.equal < one.numbers for one in judged) and not any(one.unexplained for one in judged)


def test_what_is_refused(pair, tmp_path):
    with pytest.raises(InputError, match="in this order"):
        rederive(pair[1], pair[0])
    with pytest.raises(InputError, match="holds no inputs_stats.pth"):
        rederive(pair[0], shutil.copytree(pair[1], tmp_path / "x", ignore=shutil.ignore_patterns("*.pth")))
    saved_like_lmdeploy({"layers.0.x": torch.ones(3)}, tmp_path / "inputs_stats.pth")
    with pytest.raises(InputError, match="holds no statistics for layers.0"):
        rederive(*pair, tmp_path / "inputs_stats.pth")
    other = synthesize(tmp_path / "other", "tiny" if "wqkv" in str(open_weights(pair[0]).keys()) else "tiny-internlm2")
    with pytest.raises(InputError, match="made from another model"):
        rederive(other, pair[1])
