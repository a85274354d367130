"""Smoothing, the idea of AWQ: a channel with large inputs matters more, so its weights are made larger before rounding.

What comes before the channel (a norm, or up_proj) is made smaller by the same factor. The product stays, the rounding
error moves to where it matters less. Nothing is left to undo at run time.

    smooth   factor from inputs and weights, with a fixed alpha, as LMDeploy does it
    search   factor from the inputs alone, with the alpha that leaves the least error, as the paper does it

O outputs, I inputs of a linear, g group size, n tokens.
Source: LMDeploy v0.6.4 lite/quantization/awq.py:130-236, 294-320; AWQ arXiv:2306.00978, equation 5;
mit-han-lab/llm-awq awq/quantize/auto_scale.py @460d6d45.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from weights_tools.quantize.rounding import GROUP, nearest

ALPHAS = tuple(i / 20 for i in range(20))       # 0 is no smoothing: a search never does worse on what it looks at
ROWS = 1024             # outputs at a time


def smoothing(act_absmax: torch.Tensor, weights: Iterable, group_size: int = GROUP, alpha: float = 0.5,
              norm: torch.Tensor | None = None) -> torch.Tensor:
    """Return the factor of each input channel, [I]: large where inputs are large and weights small within their group.

    act_absmax [I]; weights: the linears that read these channels, each [O, I]; norm: weight of the norm before, [I].
    """
    w = torch.cat(list(weights))
    share = w.view(-1, group_size).abs()
    share = share / share.amax(1, keepdim=True).clamp(min=1e-4)                         # of the largest in its group
    size = share.view(w.shape).mean(0)                                                  # (I)
    factor = (act_absmax.to(w.dtype).pow(alpha) / size.pow(1 - alpha).clamp(min=1e-4)).clamp(min=1e-4)
    return balanced(factor, norm)


def balanced(factor: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
    """Scale factors [I] so that the largest times the smallest is 1, and leave alone what a norm weight of zero hides.
    """
    # A norm weight of zero: nothing to move there.
    dead = norm == 0 if norm is not None else torch.zeros_like(factor, dtype=torch.bool)
    # LMDeploy's rounding in half precision, found by comparing bits: float32 here, but not after a norm.
    wide = factor if norm is not None else factor.float()
    rest = wide[~dead] if not dead.all() else wide
    scaled = (wide / (rest.max() * rest.min()).sqrt()).to(factor.dtype)
    return torch.where(dead, torch.ones_like(scaled), scaled)


def smooth_layer(tensors: dict, act_absmax: dict, feeds, group_size: int = GROUP,
                 alpha: float = 0.5) -> dict[str, torch.Tensor]:
    """Smooth one decoder layer in place, given its tensors by their names inside it ("mlp.up_proj.weight", ...).

    act_absmax: "mlp.down_proj" -> largest |input| of each of its channels, [I]. feeds: the layer's FEEDS, (before,
    readers) where `before` is a norm or a linear. What the layer computes does not change.
    Returns {reader: factor [I]}.
    """
    def factor_of(readers, weights, norm):
        return smoothing(act_absmax[readers[0]], weights, group_size, alpha, norm)
    return _each_feed(tensors, feeds, factor_of)


def search_layer(tensors: dict, mean: dict, rows: dict, feeds, group_size: int = GROUP) -> dict[str, torch.Tensor]:
    """Smooth one decoder layer in place, each feed with its own best alpha. Returns {reader: factor [I]}.

    mean: "mlp.down_proj" -> mean |input| of each channel, [I]; rows: some of these inputs, float32[n, I]. See `search`.
    """
    def factor_of(readers, weights, norm):
        return search(mean[readers[0]], rows[readers[0]], weights, group_size, norm)[0]
    return _each_feed(tensors, feeds, factor_of)


def search(mean: torch.Tensor, rows: torch.Tensor, weights: list[torch.Tensor], group_size: int = GROUP,
           norm: torch.Tensor | None = None) -> tuple[torch.Tensor, list[float]]:
    """Find the alpha whose factors, mean |input|^alpha, leave the least error in what the readers put out.

    mean [I], rows float32[n, I], weights: each [O, I] -> the factors [I], and for each of ALPHAS the mean square of
    X W^T - (X / s) Q(s W)^T over tokens and outputs, Q rounding to int4. The paper's code looks at what the whole
    attention or MLP puts out; this looks at the linears themselves, which is cheaper and asks nothing of their names.
    """
    factors = [balanced(mean.clamp(min=1e-8).pow(alpha).clamp(min=1e-4), norm) for alpha in ALPHAS]
    errors = []
    for factor in factors:
        error = 0.0
        for part in (part for weight in weights for part in weight.split(ROWS)):        # (O of the part, I)
            lost = nearest(part * factor, group_size) / factor - part
            error += float((rows @ lost.T).pow(2).sum())
        errors.append(error / len(rows) / sum(map(len, weights)))
    return factors[errors.index(min(errors))], errors


def _each_feed(tensors: dict, feeds, factor_of: Callable) -> dict[str, torch.Tensor]:
    """Move a factor from what comes before into what reads it, feed after feed."""
    factors = {}
    for before, readers in feeds:
        weights = [tensors[f"{name}.weight"] for name in readers]
        source = tensors[f"{before}.weight"]
        is_norm = source.ndim == 1
        factor = factor_of(readers, weights, source if is_norm else None)
        source.div_(factor if is_norm else factor[:, None])
        for name, w in zip(readers, weights):
            w.mul_(factor)
            factors[name] = factor
    return factors
