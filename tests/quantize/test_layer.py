"""A layer made int4: against LMDeploy's own output, bit by bit; smoothing, search and clipping against slow ones."""
import copy

import pytest
import torch
from conftest import shared

from minivl import InputError, awq
from minivl.files.formats import open_safetensors
from minivl.internlm2 import InternLM2ForCausalLM
from minivl.qwen2 import Layer, Qwen2ForCausalLM
from weights_tools import quantize as q
from weights_tools.quantize.layer import PARTS

QWEN2 = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
         "mlp.up_proj", "mlp.down_proj")


def golden_layers():
    """(tensors, act_absmax, quantised) of each decoder layer, by their names inside the layer."""
    folder = shared("golden/awq-quantize")
    parts = [{n: t.read().clone() for n, t in open_safetensors(folder / f"{file}.safetensors").items()}
             for file in ("model", "act_absmax", "quantized")]
    for i in range(2):
        prefix = f"language_model.model.layers.{i}."
        yield [{n.removeprefix(prefix): t for n, t in part.items() if n.startswith(prefix)} for part in parts]


def test_lmdeploy_bit_by_bit():
    compared = 0
    for tensors, act_absmax, expected in golden_layers():
        seen = {name: q.Inputs(absmax=absmax) for name, absmax in act_absmax.items()}
        made, _ = q.quantize_layer(tensors, QWEN2, Layer.FEEDS, q.Recipe("lmdeploy", dtype=torch.float16), seen)
        for name, value in expected.items():
            assert torch.equal(made[name], value), name
            compared += 1
    assert compared == 2 * (7 * 3 + 3 + 2)


class Sizes:
    """What a decoder's config says, pairwise different."""
    hidden_size, num_attention_heads, num_key_value_heads, intermediate_size = 96, 6, 2, 160
    num_hidden_layers, vocab_size, rms_norm_eps, rope_theta, bias, rope_scaling = 2, 50, 1e-6, 1e4, False, None
    max_position_embeddings = 1000


def decoder(kind):
    """A decoder with random weights, some of whose inputs are large, and some prompts for it."""
    model = {"qwen2": Qwen2ForCausalLM, "internlm2": InternLM2ForCausalLM}[kind](Sizes)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 1.0 if "norm" in name else p.shape[-1] ** -0.5)
            if "norm" in name:
                p.abs_().add_(0.1)[::17].mul_(25)
    return model.eval(), torch.randn(3, 40, Sizes.hidden_size)


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
@pytest.mark.parametrize("method", ["smooth", "lmdeploy", "awq"])
def test_smoothing_leaves_the_function_as_it_is(kind, method):
    model, x = decoder(kind)
    with torch.no_grad(), q.watched(model.layers[0], every=3) as seen:
        before = model(x)
    layer = {name: t.clone() for name, t in model.layers[0].state_dict().items()}
    old = copy.deepcopy(layer)
    feeds = model.layers[0].FEEDS
    if method == "awq":
        rows = {name: torch.cat(one.rows) for name, one in seen.items()}
        q.search_layer(layer, {name: one.absmean for name, one in seen.items()}, rows, feeds, 32)
    else:
        q.smooth_layer(layer, {name: one.absmax for name, one in seen.items()}, feeds, 32)
    changed = [name for name in old if not torch.allclose(old[name], layer[name])]
    assert len(changed) == {"qwen2": 8, "internlm2": 6}[kind], changed      # all but o_proj, wo and biases
    model.layers[0].load_state_dict(layer)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_a_norm_weight_of_zero_keeps_its_channel():
    norm = torch.tensor([1.0, 0.0, 2.0, 1.0])
    factor = q.smoothing(torch.tensor([1.0, 5.0, 3.0, 0.5]), [torch.randn(8, 4)], 4, 0.5, norm)
    assert factor[1] == 1 and (factor[[0, 2, 3]] > 0).all()
    assert float(factor[[0, 2, 3]].max() * factor[[0, 2, 3]].min()) == pytest.approx(1, rel=1e-5)
    assert torch.equal(q.smoothing(torch.ones(4), [torch.randn(8, 4)], 4, 0.5, norm * 0), torch.ones(4))


def slow_error(x, weight, factor, group_size):
    """What rounding does to the outputs, written out group by group."""
    rounded = torch.empty_like(weight)
    for o in range(len(weight)):
        for start in range(0, weight.shape[1], group_size):
            part = slice(start, start + group_size)
            w = weight[o, part] * factor[part]
            words = q.quantize_linear(w.repeat(8, 1), group_size)
            rounded[o, part] = awq.dequantize(*words).T[0] / factor[part]
    return (x @ (rounded - weight).T).pow(2).mean()


def test_the_search_against_a_slow_one():
    x = torch.randn(30, 64) * (1 + 20 * (torch.rand(64) > 0.9))
    weights = [torch.randn(16, 64), torch.randn(8, 64)]
    mean = x.abs().mean(0)
    factor, errors = q.search(mean, x, weights, 32)
    assert len(errors) == len(q.ALPHAS) == 20
    slow = []
    for alpha in q.ALPHAS:
        s = mean ** alpha
        s = s / (s.max() * s.min()).sqrt()
        slow.append(float(slow_error(x, torch.cat(weights), s, 32)))
        if len(slow) - 1 == errors.index(min(errors)):
            torch.testing.assert_close(factor, s)
    torch.testing.assert_close(torch.tensor(errors), torch.tensor(slow), rtol=1e-4, atol=0)
    assert min(errors) < 0.7 * errors[0]          # outliers: it is worth it


def test_clipping_against_a_slow_one():
    g = 32
    x = torch.randn(50, 64)
    weight = torch.randn(8, 64)
    weight[2, 5] = 9                    # alone: cutting it makes all other steps smaller
    x[:, 5] = 0.01 * x[:, 5]            # and it hardly counts
    groups = x.unflatten(1, (-1, g)).transpose(0, 1)
    got = q.clip(weight, groups.mT @ groups, g)
    for o in range(8):
        for k in range(2):
            part = slice(k * g, k * g + g)
            w = weight[o, part]
            tries = []
            for share in [1 - i / 20 for i in range(10)]:
                cut = w.clamp(-share * w.abs().max(), share * w.abs().max())
                off = awq.dequantize(*q.quantize_linear(cut.repeat(8, 1), g)).T[0] - w
                tries.append((float((x[:, part] @ off).pow(2).sum()), cut))
            least = min(error for error, _ in tries)
            mine = awq.dequantize(*q.quantize_linear(got[o, part].repeat(8, 1), g)).T[0] - w
            assert float((x[:, part] @ mine).pow(2).sum()) == pytest.approx(least, rel=1e-3)
    assert got[2, 5] < 6 and torch.equal(got[got.abs() < 1], weight[got.abs() < 1])


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_each_step_leaves_less_error_where_inputs_are_large(kind):
    model, x = decoder(kind)
    layer = model.layers[0]
    with torch.no_grad(), q.watched(layer, group_size=32, every=1) as seen:
        right = model(x)
    errors = {}
    for recipe in (q.Recipe("rtn", 32), q.Recipe("smooth", 32), q.Recipe("awq", 32), q.Recipe("awq", 32, clip=True)):
        made, off = q.quantize_layer(layer.state_dict(), list(layer.linears), layer.FEEDS, recipe, seen)
        assert set(off) == set(layer.linears) and not any(count for count, _, _ in off.values())
        rounded = {name: t.float() for name, t in made.items() if not name.endswith(PARTS)}
        for name in layer.linears:
            rounded[f"{name}.weight"] = awq.dequantize(*(made[f"{name}.{part}"] for part in PARTS)).T
        copied = copy.deepcopy(model)
        copied.layers[0].load_state_dict(rounded)
        with torch.no_grad():
            errors[str(recipe)] = float((copied(x) - right).norm() / right.norm())
    plain, smooth, search, clipped = errors.values()
    assert search < plain and smooth < plain and clipped < plain, errors
    assert search < 1.05 * smooth and clipped < 1.05 * search, errors


def test_what_rounding_hurts_is_told():
    from weights_tools.quantize.layer import warn_of_hurt
    model, _ = decoder("internlm2")
    layer = model.layers[0]
    with torch.no_grad():
        layer.attention.wo.weight.abs_().add_(0.1)
        layer.feed_forward.w2.weight[:3, 128:] = -0.3
    seen = {name: q.Inputs(absmax=torch.ones(module.in_features)) for name, module in layer.linears.items()}
    _, off = q.quantize_layer(layer.state_dict(), list(layer.linears), layer.FEEDS, q.Recipe("lmdeploy", 32), seen)
    total = sum(module.weight.numel() // 32 for module in layer.linears.values())
    message = (rf"the method lmdeploy puts 291 of {total} groups of weights off by more than half a step, in 2 tensors "
               r"\(attention.wo 288, feed_forward.w2 3\), the worst by 1[0-9.]+ steps, in feed_forward.w2; use another "
               "method, which does not")
    with pytest.warns(UserWarning, match=message):
        warn_of_hurt(off, "lmdeploy")
    warn_of_hurt(q.quantize_layer(layer.state_dict(), list(layer.linears), layer.FEEDS, q.Recipe("rtn", 32))[1], "rtn")


def test_what_half_precision_cannot_hold_is_refused_by_name():
    for name, value in (("feed_forward.w3.weight", float("nan")), ("feed_forward.w3.weight", 7e4),
                        ("ffn_norm.weight", float("inf"))):
        layer = decoder("internlm2")[0].layers[0]
        tensors = layer.state_dict()
        tensors[name].view(-1)[5] = value
        with pytest.raises(InputError, match=f"^layers.7.{name} holds 1 numbers that are NaN, infinite or over"):
            q.quantize_layer(tensors, list(layer.linears), layer.FEEDS, q.Recipe("rtn", 32), where="layers.7.")
        if value == 7e4:
            q.quantize_layer(tensors, list(layer.linears), layer.FEEDS, q.Recipe("rtn", 32, dtype=torch.bfloat16))
    for bad, words in (({"method": "gptq"}, "not one of rtn"), ({"alpha": 2.0}, "alpha 2.0 must be in 0..1"),
                       ({"method": "lmdeploy", "clip": True}, "which clips nothing")):
        with pytest.raises(InputError, match=words):
            q.Recipe(**bad)
