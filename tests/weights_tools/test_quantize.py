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
            for part, value in zip(PARTS, q.quantize_linear(tensors.pop(f"{name}.weight"), method="lmdeploy")):
                tensors[f"{name}.{part}"] = value
        for name, value in expected.items():
            assert torch.equal(tensors[name], value), name
            compared += 1
    assert compared == 2 * (7 * 3 + 3 + 2)


@pytest.mark.parametrize("method", q.METHODS)
@pytest.mark.parametrize("group_size", [32, 128])
def test_rounding_against_its_definition(group_size, method):
    I, O = 256, 24
    weight = torch.randn(O, I) * (0.3 + torch.rand(O, 1)) + 0.1 * torch.randn(O, 1)
    weight[3, :group_size] = 0.25           # a group without spread, all positive
    weight[4, :group_size] = torch.rand(group_size) + 1     # zero lies outside
    weight[5, :group_size] = 0
    qweight, qzeros, scales = q.quantize_linear(weight, group_size, method)
    numbers, zeros = awq.unpack(qweight), awq.unpack(qzeros)
    for o in range(O):
        for g in range(I // group_size):
            group = weight[o, g * group_size:(g + 1) * group_size].tolist()
            low, high = min(group), max(group)
            if method == "with-zero":
                low, high = min(low, 0), max(high, 0)
                s, z = float(scales[g, o]), round(-low / float(scales[g, o]))
                assert -1e-7 < s / ((high - low) / 15 or 2**-24) - 1 < 2**-10
            else:
                s = max(high - low, 1e-5) / 15
                z = min(max(-round(low / s), 0), 15)
                assert float(scales[g, o]) == pytest.approx(s, rel=1e-5)
            assert int(zeros[g, o]) == z
            for k in (0, 1, group_size - 1):
                expected = min(max(round(group[k] / s) + z, 0), 15)
                between = abs(group[k] / s % 1 - 0.5) < 1e-3
                assert abs(int(numbers[g * group_size + k, o]) - expected) <= between
    steps = q.steps_off(weight, qweight, qzeros, scales)
    lost = steps > 0.501
    assert lost.nonzero().tolist() == ([[3, 0], [4, 0]] if method == "lmdeploy" else [])
    assert steps[~lost].max() > 0.4


def case_of(name):
    """Groups of 128 weights that people really have."""
    noise = torch.randn(8, 128)
    return {"both signs": noise, "positive": noise * 0.02 + 0.2, "negative": noise * 0.02 - 0.2,
            "far from zero": 10 + noise.abs(), "constant": torch.full_like(noise, 0.3),
            "constant, negative": torch.full_like(noise, -0.3), "zero": noise * 0, "one weight": noise * (noise > 3.2),
            "the last bits of float16": torch.randint(-40, 41, noise.shape) * 2.0**-24,
            "the last bits, positive": torch.randint(1, 7, noise.shape) * 2.0**-24,
            "less than float16 has": noise * 1e-30, "as large as float16 has": noise.clamp(-3, 3) * 21_000}[name]


CASES = ("both signs", "positive", "negative", "far from zero", "constant", "constant, negative", "zero", "one weight",
         "the last bits of float16", "the last bits, positive", "less than float16 has", "as large as float16 has")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_weight_is_off_by_more_than_half_a_step(name, dtype):
    weight = case_of(name).to(dtype)
    qweight, qzeros, scales = q.quantize_linear(weight)
    assert scales.dtype == torch.float16 and scales.isfinite().all() and (scales > 0).all()
    error = (awq.dequantize(qweight, qzeros, scales).T - weight.float()).abs().amax(1)
    assert (error <= 0.50001 * scales[0].float()).all()
    low, high = weight.float().amin(1).clamp(max=0), weight.float().amax(1).clamp(min=0)
    assert (scales[0].float() <= (high - low) / 15 * (1 + 2**-10) + 2**-24).all()      # and no step is needlessly large
    assert q.steps_off(weight, qweight, qzeros, scales).max() <= 0.50001
    if name.startswith(("constant", "zero")):
        assert (error <= 2e-3 * weight.float().abs().amax(1)).all()


def one_sided():
    """A model with groups of one sign in two of its linears."""
    model = FusedModel()
    with torch.no_grad():
        model.language_model.blocks[0].attention.wo.weight.abs_().add_(0.1)
        model.language_model.blocks[1].feed_forward.w2.weight[:3, 128:] = -0.3
    return model


def test_what_rounding_hurts_is_told():
    model = one_sided()
    total = sum(w.numel() // 128 for n, w in model.named_parameters() if w.ndim == 2) - 10
    message = (rf"the method lmdeploy puts 131 of {total} groups of weights off by more than half a step, in 2 tensors "
               r"\(language_model.blocks.0.attention.wo 128, language_model.blocks.1.feed_forward.w2 3\), "
               r"the worst by 15.0 steps, in language_model.blocks.1.feed_forward.w2; use the method with-zero, "
               r"which does not")
    with pytest.warns(UserWarning, match=message):
        q.quantize(model, None, method="lmdeploy")
    tensors = q.quantize(model, None)           # warns of nothing: a warning is an error here
    parts = [tensors[f"language_model.blocks.1.feed_forward.w2.{part}"] for part in PARTS]
    weight = model.language_model.blocks[1].feed_forward.w2.weight.detach()
    assert float((awq.dequantize(*parts).T - weight).abs().max()) < 0.5 * 0.3 / 15


def test_what_float16_or_the_groups_cannot_hold_is_refused_by_name():
    def broken(change):
        model = FusedModel()
        with torch.no_grad():
            change(model.language_model.blocks[1])
        return model
    for value in (float("nan"), float("inf"), 7e4):
        def change(block, value=value):
            block.feed_forward.w3.weight[2, 5] = value
        with pytest.raises(InputError, match="blocks.1.feed_forward.w3.weight holds 1 numbers that are NaN"):
            q.quantize(broken(change), None)
    with pytest.raises(InputError, match="blocks.1.ffn_norm.weight holds 128 numbers"):
        q.quantize(broken(lambda block: block.ffn_norm.weight.fill_(1e5)), None)
    for group_size in (96, 0, -1):
        with pytest.raises(InputError, match=f"wqkv, 128 -> 256, cannot be packed: group size {group_size} must.*; 128 "
                                             "divides all"):
            q.quantize(FusedModel(), None, group_size)
    with pytest.raises(InputError, match="8 must divide 12"):
        q.quantize_linear(torch.randn(12, 128))
    with pytest.raises(InputError, match="group size 48 must be at least 1 and divide 128"):
        q.quantize_linear(torch.randn(8, 128), 48)
    for method in q.METHODS:
        weight = torch.randn(8, 128)
        weight[1, 7] = float("nan")
        with pytest.raises(InputError, match="1 of 1024 weights are NaN or infinite"):
            q.quantize_linear(weight, method=method)
        with pytest.raises(InputError, match="span too much for scales in float16, whose largest number is 65504"):
            q.quantize_linear(torch.randn(8, 128) * 1e7, method=method)
    with pytest.raises(InputError, match="method 'gptq' is not one of with-zero, lmdeploy"):
        q.quantize_linear(torch.randn(8, 128), method="gptq")


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
    assert "smoothed, alpha 0.5, method with-zero" in capsys.readouterr().out
    assert len(pipeline(tmp_path / "awq")("hello").token_ids) > 0
    names = set(open_weights(tmp_path / "awq"))
    assert "language_model.model.layers.0.mlp.up_proj.qweight" in names
    assert not any(n.startswith("language_model.model.layers") and n.endswith("proj.weight") for n in names)
    with pytest.raises(InputError, match="already holds weights"):
        q.main([str(tiny_float), str(tmp_path / "awq")])
    with pytest.raises(InputError, match="quantised already"):
        q.main([str(tmp_path / "awq"), str(tmp_path / "again")])
    assert q.main([str(tiny_float), str(tmp_path / "theirs"), "--plain", "--method", "lmdeploy"]) == 0
    assert "round to nearest, method lmdeploy" in capsys.readouterr().out
    with pytest.raises(InputError, match="cannot be packed: group size 96 must be at least 1"):
        q.main([str(tiny_float), str(tmp_path / "x"), "--group-size", "96"])
    with pytest.raises(InputError, match="alpha 2.0"):
        q.main([str(tiny_float), str(tmp_path / "x"), "--alpha", "2"])


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
