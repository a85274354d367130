"""What weights_tools/language/README.md says of outliers, on the cut that the notebooks have."""
import pytest
import torch
from conftest import GOLDEN, tensors_of

from minivl.awq import dequantize
from weights_tools.quantize import quantize_linear, smoothing


@pytest.fixture(scope="module")
def layer():
    return {name: tensor.float() for name, tensor in tensors_of(GOLDEN / "real-layer.safetensors").items()}


def lost(weight, group_size, factor=1.0):
    """What rounding adds to a weight whose channels are smoothed by a factor."""
    return dequantize(*quantize_linear(weight * factor, group_size)).T / factor - weight


def share(x, off, weight):
    """The square of what is wrong in the outputs, of the square of the outputs."""
    return float((x @ off.T).pow(2).sum() / (x @ weight.T).pow(2).sum())


def test_smoothing_helps_where_channels_are_large_for_all_tokens(layer):
    x = layer["self_attn.q_proj.input"]
    weights = [layer[f"self_attn.{name}_proj.weight"] for name in "qkv"]
    factor = smoothing(x.abs().amax(0), weights, 64, norm=layer["input_layernorm.weight"])
    assert factor.argmax() == 247
    plain = share(x, lost(weights[0], 64), weights[0])
    smooth = share(x, lost(weights[0], 64, factor), weights[0])
    assert 0.004 < plain < 0.006 and smooth < 0.5 * plain


def test_smoothing_serves_the_first_token_alone_where_that_is_the_outlier(layer):
    x, weight = layer["mlp.down_proj.input"], layer["mlp.down_proj.weight"]
    factor = smoothing(x.abs().amax(0), [weight], 64)
    plain, smooth = lost(weight, 64), lost(weight, 64, factor)
    assert share(x[:1], smooth, weight) < 0.01 * share(x[:1], plain, weight)
    assert share(x[1:], smooth, weight) > 2 * share(x[1:], plain, weight)
    rest = smoothing(x[1:].abs().amax(0), [weight], 64)
    assert share(x[1:], lost(weight, 64, rest), weight) < share(x[1:], smooth, weight)


@pytest.mark.parametrize("group_size, low, high", [(32, 0.97, 1.0), (64, 0.1, 0.2), (192, 0.0, 0.03)])
def test_weights_that_were_in_blocks_of_32_are_moved_whole_in_groups_of_32(layer, group_size, low, high):
    """The part of the squared error that is the same for all weights of a group; 1 / g if errors were independent."""
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        off = lost(layer[f"{name}.weight"], group_size).unflatten(1, (-1, group_size))
        assert low < float(off.mean(-1).pow(2).mean() / off.pow(2).mean()) < high
    torch.manual_seed(0)
    off = lost(torch.randn(64, 576), group_size).unflatten(1, (-1, group_size))
    assert float(off.mean(-1).pow(2).mean() / off.pow(2).mean()) < 2 / group_size
