"""One decoder layer from float to int4: smooth, cut, round, pack. How, is a `Recipe`."""
from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from minivl.limits import InputError, first_of
from weights_tools.quantize.clipping import UNCUT, clip
from weights_tools.quantize.inputs import Inputs
from weights_tools.quantize.rounding import GROUP, HALF_A_STEP, ROUNDINGS, quantize_linear, steps_off
from weights_tools.quantize.smoothing import search_layer, smooth_layer

METHODS = {
    "rtn": "round to nearest, no smoothing",
    "smooth": "smoothed with a fixed alpha, from the largest inputs",
    "lmdeploy": "the same with alpha 0.5, rounded as LMDeploy does, which the release was made by: groups of one sign "
                "are lost",
    "awq": "smoothed with the alpha that leaves the least error, searched for each norm, from the mean inputs",
}
PARTS = ("qweight", "qzeros", "scales")


@dataclass(frozen=True)
class Recipe:
    """How a layer is made int4.

    dtype: of the arithmetic; what is stored is float16, or bfloat16 if that is bfloat16.
    The method lmdeploy with dtype float16 gives LMDeploy's own integers, bit by bit.
    """
    method: str = "smooth"
    group_size: int = GROUP
    alpha: float = 0.5
    clip: bool = False
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        if self.method not in METHODS:
            raise InputError(f"method {self.method!r} is not one of {', '.join(METHODS)}")
        if self.method == "lmdeploy" and self.clip:
            raise InputError("the method lmdeploy is LMDeploy's own, which clips nothing; clip with smooth or awq")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha {self.alpha} must be in 0..1")

    @property
    def rounding(self) -> str:
        """Name how a group's values are chosen, see `rounding.grid`."""
        return ROUNDINGS[self.method == "lmdeploy"]

    @property
    def stored(self) -> torch.dtype:
        """Return the dtype of scales, norms, biases and everything that stays float."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16

    @property
    def needs_inputs(self) -> bool:
        """Tell whether anything must be known of the inputs."""
        return self.method != "rtn" or self.clip

    @property
    def needs_prompts(self) -> bool:
        """Tell whether more must be known than `inputs.read_statistics` can give."""
        return self.method == "awq" or self.clip

    def __str__(self):
        parts = [self.method, f"group {self.group_size}"]
        parts += [f"alpha {self.alpha:g}"] * (self.method in ("smooth", "lmdeploy"))
        return ", ".join(parts + ["clipped"] * self.clip)


def quantize_layer(tensors: dict, linears: list[str], feeds, recipe: Recipe, seen: dict[str, Inputs] | None = None,
                   where: str = "") -> tuple[dict, dict]:
    """Make one decoder layer int4, given its tensors by their names inside it: (its new tensors, what rounding hurt).

    seen: of each linear what it is given, from `inputs.watched`; None where the recipe needs nothing of it.
    where: the layer's name, for messages. Hurt: {linear: (groups off by more than half a step, of all, worst)}.
    """
    dtype = recipe.dtype if recipe.method == "lmdeploy" else torch.float32
    layer = {name: in_half(where + name, t, recipe.stored).to(dtype) for name, t in tensors.items()}
    factors = {}
    if recipe.method == "awq":
        rows = {name: torch.cat(one.rows) for name, one in seen.items()}
        factors = search_layer(layer, {name: one.absmean for name, one in seen.items()}, rows, feeds,
                               recipe.group_size)
    elif recipe.method != "rtn":
        absmax = {name: one.absmax for name, one in seen.items()}
        factors = smooth_layer(layer, absmax, feeds, recipe.group_size, recipe.alpha)
    off = {}
    for name in linears:
        weight = layer.pop(f"{name}.weight")
        if recipe.clip and name.rsplit(".", 1)[-1] not in UNCUT:
            weight = clip(weight.float(), smoothed_gram(seen[name].gram, factors.get(name)), recipe.group_size)
        if recipe.method == "lmdeploy":     # it smooths in place, in the dtype of the weights
            weight = in_half(f"{where}{name}.weight", weight, recipe.stored).to(dtype)
        parts = packed(where + name, weight, recipe)
        steps = steps_off(weight, *parts)
        off[name] = (int((steps > HALF_A_STEP).sum()), steps.numel(), float(steps.max()))
        layer.update({f"{name}.{part}": value for part, value in zip(PARTS, parts)})
    return {name: in_half(where + name, t, recipe.stored) if t.is_floating_point() else t
            for name, t in layer.items()}, off


def packed(name: str, weight: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a linear as the recipe says: qweight, qzeros and scales, in the dtype that is stored."""
    try:
        qweight, qzeros, scales = quantize_linear(weight, recipe.group_size, recipe.rounding, recipe.stored)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return qweight, qzeros, scales.to(recipe.stored)


def smoothed_gram(gram: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """Compute the sums of x x^T, float32[I/g, g, g], of inputs that smoothing has divided by factors [I]."""
    if factor is None:
        return gram
    inverse = 1 / factor.float().view(len(gram), -1)                                    # (I/g, g)
    return gram * inverse[:, :, None] * inverse[:, None, :]


def in_half(name: str, tensor: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Round a tensor to float16 or bfloat16; a copy. Raises InputError, which names it, where that cannot hold it."""
    half = tensor.detach().to(dtype, copy=True)
    if not half.isfinite().all():
        raise InputError(f"{name} holds {int((~half.isfinite()).sum())} numbers that are NaN, infinite or over "
                         f"{str(dtype)[6:]}'s largest, {torch.finfo(dtype).max:g}; give a checkpoint that it can hold"
                         + (", or store bfloat16" if dtype == torch.float16 else ""))
    return half


def warn_of_hurt(off: dict[str, tuple[int, int, float]], method: str):
    """Warn of groups that are off by more than half a step: {linear: (how many, of how many, the worst in steps)}."""
    hurt = {name: found for name, found in off.items() if found[0]}
    if not hurt:
        return
    worst = max(hurt, key=lambda name: hurt[name][2])
    tensors = first_of([f"{name} {hurt[name][0]}" for name in sorted(hurt, key=lambda n: -hurt[n][0])], ", ", 3)
    groups = sum(count for count, _, _ in hurt.values())
    warnings.warn(f"the method {method} puts {groups} of {sum(count for _, count, _ in off.values())} groups of "
                  f"weights off by more than half a step, in {len(hurt)} tensors ({tensors}), the worst by "
                  f"{hurt[worst][2]:.1f} steps, in {worst}; use another method, which does not", stacklevel=3)
