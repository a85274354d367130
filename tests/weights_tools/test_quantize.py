"""The quantiser against LMDeploy's own output, bit by bit, and against its definition."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import shared
from torch import nn

from minivl import InputError, awq, load, pipeline
from minivl.files.find import SHIPPED
from minivl.files.formats import open_weights
from minivl.qwen2 import Layer
from minivl.tokenizer import Tokenizer
from weights_tools import quantize as q
from weights_tools.nano.evaluate import conversations

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PARTS = ("qweight", "qzeros", "scales")


def golden_layers():
    """(tensors, act_absmax, quantised) of each decoder layer, by their names inside the layer."""
    folder = shared("golden/awq-quantize")

    def read(file):
        from safetensors.torch import load_file
        return load_file(folder / file)

    parts = [read(f) for f in ("model.safetensors", "act_absmax.safetensors", "quantized.safetensors")]
    for i in range(2):
        prefix = f"language_model.model.layers.{i}."
        yield [{n.removeprefix(prefix): t for n, t in part.items() if n.startswith(prefix)} for part in parts]


def test_smoothing_and_rounding_are_those_of_lmdeploy():
    compared = 0
    for tensors, act_absmax, expected in golden_layers():
        q.smooth_layer(tensors, act_absmax, Layer.FEEDS)
        for name in LINEARS:
            for part, value in zip(PARTS, q.quantize_linear(tensors.pop(f"{name}.weight"))):
                tensors[f"{name}.{part}"] = value
        for name, value in expected.items():
            assert torch.equal(tensors[name], value), name
            compared += 1
    assert compared == 2 * (7 * 3 + 3 + 2)


@pytest.mark.parametrize("group_size", [32, 128])
def test_rounding_against_its_definition(group_size):
    I, O = 256, 24
    weight = torch.randn(O, I) * (0.3 + torch.rand(O, 1)) + 0.1 * torch.randn(O, 1)
    weight[3, :group_size] = 0.25           # a group without spread, all positive
    weight[4, :group_size] = torch.rand(group_size) + 1     # zero lies outside
    qweight, qzeros, scales = q.quantize_linear(weight, group_size)
    numbers, zeros = awq.unpack(qweight), awq.unpack(qzeros)
    for o in range(O):
        for g in range(I // group_size):
            group = weight[o, g * group_size:(g + 1) * group_size]
            s = max(float(group.max() - group.min()), 1e-5) / 15
            z = min(max(-round(float(group.min()) / s), 0), 15)
            assert scales[g, o] == pytest.approx(s, rel=1e-5)
            assert int(zeros[g, o]) == z
            for k in (0, 1, group_size - 1):
                expected = min(max(round(float(group[k]) / s) + z, 0), 15)
                between = abs(float(group[k]) / s % 1 - 0.5) < 1e-3
                assert abs(int(numbers[g * group_size + k, o]) - expected) <= between
    error = (awq.dequantize(qweight, qzeros, scales).T - weight).abs().view(O, -1, group_size)
    usual = [o for o in range(O) if o not in (3, 4)]
    steps = (error / scales.T[..., None])[usual]
    assert steps.max() < 1.01           # half a step, and half more at one end: the zero point is rounded too
    assert steps.mean() < 0.3


def test_smoothing_leaves_the_function_as_it_is(tiny_float):
    model = load(tiny_float)
    ids = torch.randint(0, 500, (2, 9))
    before = model(ids)
    with q.watch_inputs(model) as seen:
        model(ids)
    assert [list(largest) for largest in seen] == [list(LINEARS)] * len(model.language_model.layers)
    changed = 0
    for largest, layer in zip(seen, model.language_model.layers):
        tensors = {name: t for name, t in layer.state_dict().items()}
        old = tensors["mlp.down_proj.weight"].clone()
        q.smooth_layer(tensors, largest, layer.FEEDS)
        changed += not torch.allclose(old, layer.mlp.down_proj.weight)
    assert changed == len(model.language_model.layers)
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-4)


class FusedLayer(nn.Module):
    """A decoder layer as InternLM2 names it: q, k, v in one linear, gate, up, down are w1, w3, w2. Nothing attends."""
    FEEDS = (("attention_norm", ("attention.wqkv",)), ("ffn_norm", ("feed_forward.w1", "feed_forward.w3")),
             ("feed_forward.w3", ("feed_forward.w2",)))

    def __init__(self, D=128, width=256):
        super().__init__()
        self.attention_norm = nn.RMSNorm(D)
        self.attention = nn.ModuleDict({"wqkv": nn.Linear(D, 2 * D, bias=False), "wo": nn.Linear(D, D, bias=False)})
        self.ffn_norm = nn.RMSNorm(D)
        self.feed_forward = nn.ModuleDict({"w1": nn.Linear(D, width, bias=False), "w2": nn.Linear(width, D, bias=False),
                                           "w3": nn.Linear(D, width, bias=False)})

    @property
    def linears(self):
        names = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
        return {name: self.get_submodule(name) for name in names}

    def forward(self, x):
        q, v = self.attention.wqkv(self.attention_norm(x)).chunk(2, dim=-1)
        x = x + self.attention.wo(q.tanh() * v)
        h = self.ffn_norm(x)
        return x + self.feed_forward.w2(nn.functional.silu(self.feed_forward.w1(h)) * self.feed_forward.w3(h))


class FusedDecoder(nn.Module):
    """What quantize asks of a decoder: `layers`, under whatever name they are saved."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(FusedLayer() for _ in range(2))
        self.output = nn.Linear(128, 10, bias=False)

    layers = property(lambda self: self.blocks)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


class FusedModel(nn.Module):
    """A model around it."""

    def __init__(self):
        super().__init__()
        self.language_model = FusedDecoder()

    def forward(self, x):
        return self.language_model(x)


def test_another_decoder_s_names():
    model = FusedModel()
    x = torch.randn(50, 128)
    x[:, ::17] *= 20
    with q.watch_inputs(model) as seen, torch.no_grad():
        exact = model(x)
    errors = {}
    for name, act_absmax in (("smoothed", seen), ("plain", None)):
        tensors = q.quantize(model, act_absmax)
        int4 = {n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")}
        assert int4 == {f"language_model.blocks.{i}.{linear}" for i in range(2) for linear in FusedLayer().linears}
        assert {n for n in tensors if n.endswith(".weight")} == {"language_model.output.weight", *(
            f"language_model.blocks.{i}.{norm}.weight" for i in range(2) for norm in ("attention_norm", "ffn_norm"))}
        rounded = {n: t.float() for n, t in tensors.items() if n.endswith(".weight")}
        for n in int4:
            rounded[f"{n}.weight"] = awq.dequantize(*(tensors[f"{n}.{part}"] for part in PARTS)).T
        copy = FusedModel()
        copy.load_state_dict(rounded)
        with torch.no_grad():
            errors[name] = float((copy(x) - exact).norm() / exact.norm())
    assert errors["smoothed"] < errors["plain"] < 0.3, errors


def test_calibration_takes_any_prompts():
    """Read with their answers: each of the prompt's tokens is seen, and the largest input of each channel is kept."""
    model = load("nano")
    tokenizer = Tokenizer.load(SHIPPED["nano"])
    prompts = list(conversations(3))
    assert [message["role"] for message in prompts[0]][-2:] == ["assistant", "user"]
    one_by_one = [q.calibration(model, tokenizer, [prompt]) for prompt in prompts]
    together = q.calibration(model, tokenizer, iter(prompts))
    assert len(together) == len(model.language_model.layers)
    for i, largest in enumerate(together):
        assert list(largest) == list(model.language_model.layers[i].linears)
        for name, value in largest.items():
            assert torch.equal(value, torch.stack([seen[i][name] for seen in one_by_one]).amax(0)), name
    other = q.calibration(model, tokenizer, ["a plain text"])
    assert not torch.equal(other[0]["mlp.down_proj"], together[0]["mlp.down_proj"])
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(InputError, match="no prompts to calibrate on"):
        q.calibration(model, tokenizer, [])


def test_nothing_of_nano_is_imported_with_it():
    code = "import sys, weights_tools.quantize; print([m for m in sys.modules if m.startswith('weights_tools.nano')])"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr[-2000:]


def test_a_norm_weight_of_zero_keeps_its_channel():
    norm = torch.tensor([1.0, 0.0, 2.0, 1.0])
    factor = q.smoothing(torch.tensor([1.0, 5.0, 3.0, 0.5]), [torch.randn(8, 4)], 4, 0.5, norm)
    assert factor[1] == 1 and (factor[[0, 2, 3]] > 0).all()
    assert float(factor[[0, 2, 3]].max() * factor[[0, 2, 3]].min()) == pytest.approx(1, rel=1e-5)


@pytest.fixture(scope="module")
def tiny_float(tmp_path_factory):
    from weights_tools.synthesize import synthesize
    return synthesize(tmp_path_factory.mktemp("tiny") / "float", "tiny", dtype="float16")


def test_the_command(tiny_float, tmp_path, capsys):
    assert q.main([str(tiny_float), str(tmp_path / "awq"), "--examples", "2"]) == 0
    assert "smoothed, alpha 0.5" in capsys.readouterr().out
    assert len(pipeline(tmp_path / "awq")("hello").token_ids) > 0
    names = set(open_weights(tmp_path / "awq"))
    assert "language_model.model.layers.0.mlp.up_proj.qweight" in names
    assert not any(n.startswith("language_model.model.layers") and n.endswith("proj.weight") for n in names)
    with pytest.raises(InputError, match="already holds weights"):
        q.main([str(tiny_float), str(tmp_path / "awq")])
    with pytest.raises(InputError, match="quantised already"):
        q.main([str(tmp_path / "awq"), str(tmp_path / "again")])
    with pytest.raises(InputError, match="alpha 2.0"):
        q.main([str(tiny_float), str(tmp_path / "x"), "--alpha", "2"])
    with pytest.raises(InputError, match="cannot be packed"):
        q.quantize_linear(torch.randn(12, 128))


def test_the_dtype_is_said_once(tiny_float, tmp_path):
    """transformers 5 names it `dtype`, which would win over the torch_dtype written here."""
    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((tiny_float / "config.json").read_text())
    for part in (config, config["llm_config"], config["vision_config"]):
        part["dtype"] = part.pop("torch_dtype")
    (source / "config.json").write_text(json.dumps(config))
    out = q.save_quantized(source, tmp_path / "out", {"any": torch.zeros(2)})
    written = json.loads((out / "config.json").read_text())
    for part in (written, written["llm_config"], written["vision_config"]):
        assert part["torch_dtype"] == "float16" and "dtype" not in part


def test_smoothing_helps_where_a_few_inputs_are_large():
    I, O = 256, 64
    x, weight = torch.randn(500, I), torch.randn(O, I)
    x[:, ::37] *= 30
    factor = q.smoothing(x.abs().amax(0), [weight])

    def error(scaled, factor):
        W = awq.dequantize(*q.quantize_linear(scaled))
        return ((x / factor) @ W - x @ weight.T).norm() / (x @ weight.T).norm()

    assert error(weight * factor, factor) < 0.7 * error(weight, 1)
