"""Rounding against its definition, and against what the released checkpoints were made by."""
import pytest
import torch

from minivl import InputError, awq
from weights_tools import quantize as q


@pytest.mark.parametrize("rounding", q.ROUNDINGS)
@pytest.mark.parametrize("group_size", [32, 128])
def test_rounding_against_its_definition(group_size, rounding):
    I, O = 256, 24
    weight = torch.randn(O, I) * (0.3 + torch.rand(O, 1)) + 0.1 * torch.randn(O, 1)
    weight[3, :group_size] = 0.25           # a group without spread, all positive
    weight[4, :group_size] = torch.rand(group_size) + 1     # zero lies outside
    weight[5, :group_size] = 0
    qweight, qzeros, scales = q.quantize_linear(weight, group_size, rounding)
    numbers, zeros = awq.unpack(qweight), awq.unpack(qzeros)
    for o in range(O):
        for g in range(I // group_size):
            group = weight[o, g * group_size:(g + 1) * group_size].tolist()
            low, high = min(group), max(group)
            if rounding == "with-zero":
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
    assert lost.nonzero().tolist() == ([[3, 0], [4, 0]] if rounding == "lmdeploy" else [])
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




def test_bfloat16_scales_are_rounded_up_too():
    weight = torch.randn(64, 256)
    qweight, qzeros, scales = q.quantize_linear(weight, 64, stored=torch.bfloat16)
    assert scales.dtype == torch.bfloat16
    assert q.steps_off(weight, qweight, qzeros, scales).max() <= 0.50001
    exact = (weight.view(64, 4, 64).amax(-1) - weight.view(64, 4, 64).amin(-1)).T / 15
    assert (scales.float() >= exact).all() and (scales.float() <= exact * (1 + 2**-7)).all()


@pytest.mark.parametrize("rounding", q.ROUNDINGS)
def test_nearest_is_what_the_words_say(rounding):
    weight = torch.randn(24, 128).half().float()
    qweight, qzeros, scales = q.quantize_linear(weight, 32, rounding)
    off = (q.nearest(weight, 32, rounding) - awq.dequantize(qweight, qzeros, scales).T).abs().max()
    assert off < 2e-6 * weight.abs().max()


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(InputError, match="8 must divide 12"):
        q.quantize_linear(torch.randn(12, 128))
    for size in (48, 0, -1):
        with pytest.raises(InputError, match=f"group size {size} must be at least 1 and divide 128"):
            q.quantize_linear(torch.randn(8, 128), size)
    for rounding in q.ROUNDINGS:
        weight = torch.randn(8, 128)
        weight[1, 7] = float("nan")
        with pytest.raises(InputError, match="1 of 1024 weights are NaN or infinite"):
            q.quantize_linear(weight, rounding=rounding)
        with pytest.raises(InputError, match="span too much for scales in float16, whose largest number is 65504"):
            q.quantize_linear(torch.randn(8, 128) * 1e7, rounding=rounding)
        q.quantize_linear(torch.randn(8, 128) * 1e7, rounding=rounding, stored=torch.bfloat16)
    with pytest.raises(InputError, match="rounding 'gptq' is not one of with-zero, lmdeploy"):
        q.quantize_linear(torch.randn(8, 128), rounding="gptq")
