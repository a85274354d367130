"""Rounding to int4: a group of weights -> a step, a zero point, and a number 0..15 for each weight.

Rounding gives a group of weights sixteen values at equal steps, one of them zero. LMDeploy lays them from the smallest
weight to the largest. Where all weights have one sign zero lies outside, the zero point (0..15) cannot say so, and the
group is lost (mit-han-lab/llm-awq#193). So by default the range is widened to hold zero.

O outputs, I inputs of a linear, g group size: inputs that share a step and a zero point.
Source: LMDeploy v0.6.4 lite/quantization/awq.py:323-353.
"""
from __future__ import annotations

import torch

from minivl.awq import dequantize, pack
from minivl.limits import InputError

GROUP = 128             # the released g
ROUNDINGS = ("with-zero", "lmdeploy")   # how a group's sixteen values are chosen
SMALLEST = 2.0**-24     # of float16's steps; float16 weights are multiples of it
HALF_A_STEP = 0.52      # and what float16 takes of the scale: 2^-11 of 15 steps, twice where it computes too


def grid(w: torch.Tensor, rounding: str = ROUNDINGS[0],
         stored: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the values (q - zero) * scale, q = 0..15, of each group: float[..., g] -> scale, zero, both [..., 1].

    with-zero: from min(w, 0) to max(w, 0). The scale is of the dtype `stored`, float16 or bfloat16, rounded up, so that
    no weight is off by more than half a step. lmdeploy: from min w to max w, in w's dtype; the zero point is clamped to
    0..15.
    """
    low = w.amin(-1, keepdim=True)                                                      # (..., 1)
    high = w.amax(-1, keepdim=True)
    if rounding == "lmdeploy":
        scale = (high - low).clamp(min=1e-5) / 15
        return scale, (-torch.round(low / scale)).clamp(0, 15)
    if rounding != "with-zero":
        raise InputError(f"rounding {rounding!r} is not one of {', '.join(ROUNDINGS)}")
    step = (high.clamp(min=0).float() - low.clamp(max=0).float()).clamp(min=SMALLEST) / 15
    near = step.to(stored)
    # Positive half-precision numbers are ordered as their bits are: one more is the next larger number.
    scale = (near.view(torch.int16) + (near.float() < step)).view(stored)
    return scale, -torch.round(low.clamp(max=0).float() / scale.float())


def numbers(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Round groups float[..., g] to the numbers of their grid: float[..., g], whole, 0..15. Half goes to even."""
    return (torch.round(w / scale) + zero).clamp(0, 15)


def nearest(weight: torch.Tensor, group_size: int = GROUP, rounding: str = ROUNDINGS[0]) -> torch.Tensor:
    """Round a weight to the values that int4 can hold: float32[O, I] -> float32[O, I], what dequantising would give."""
    w = weight.unflatten(-1, (-1, group_size))                                          # (O, I/g, g)
    scale, zero = grid(w, rounding)                                                     # (O, I/g, 1)
    return ((numbers(w, scale, zero) - zero) * scale).flatten(-2)


def quantize_linear(weight: torch.Tensor, group_size: int = GROUP, rounding: str = ROUNDINGS[0],
                    stored: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round to int4: float[O, I] -> qweight int32[I, O/8], qzeros int32[I/g, O/8], scales [I/g, O].

    Each group of inputs has the values that `grid` chooses: q = w / s + z, rounded half to even, clamped to 0..15.
    The scales are of the dtype `stored`; as LMDeploy rounds they have the weight's dtype, and so has the arithmetic.
    """
    O, I = weight.shape
    check_size("a linear", I, O, group_size)
    if not weight.isfinite().all():
        raise InputError(f"{int((~weight.isfinite()).sum())} of {weight.numel()} weights are NaN or infinite; they "
                         "cannot be rounded")
    w = weight.view(O, I // group_size, group_size)                                     # (O, I/g, g)
    scale, zero = grid(w, rounding, stored)                                             # (O, I/g, 1)
    if not scale.to(stored).isfinite().all():
        raise InputError(f"weights from {float(weight.min()):.4g} to {float(weight.max()):.4g} span too much for "
                         f"scales in {str(stored)[6:]}, whose largest number is {torch.finfo(stored).max:g}; scale the "
                         "weights down, or store bfloat16")
    q = numbers(w if rounding == "lmdeploy" else w.float(), scale, zero)                # (O, I/g, g)
    columns = q.view(O, I).t().to(torch.uint8)                                          # (I, O)
    return pack(columns), pack(zero[..., 0].t().to(torch.uint8)), scale[..., 0].t().contiguous()


def steps_off(weight: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Compute the largest error of each group, [O, I/g], in steps of its range with zero in it; a half can be had.

    Where the stored step is larger, because half precision or the method has no smaller one, it is in stored steps.
    """
    w = weight.float().view(len(weight), len(scales), -1)                               # (O, I/g, g)
    rounded = dequantize(qweight, qzeros, scales).T.view(w.shape)
    step = (w.amax(-1).clamp(min=0) - w.amin(-1).clamp(max=0)) / 15                     # (O, I/g)
    return (rounded - w).abs().amax(-1) / torch.maximum(step, scales.T.float())


def check_size(name: str, I: int, O: int, group_size: int, hint: str = ""):
    """Refuse a linear of I inputs and O outputs whose weights cannot be packed in groups."""
    if group_size < 1 or I % group_size or O % 8:
        raise InputError(f"{name}, {I} -> {O}, cannot be packed: group size {group_size} must be at least 1 and divide "
                         f"{I}{hint}; 8 must divide {O}")
