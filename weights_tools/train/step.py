"""One step of training: losses of micro-batches -> gradients, added up and clipped -> the optimisers move."""
from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from minivl.fast import products
from minivl.limits import InputError


def take_step(losses, optimisers: list, share: float) -> float:
    """Go down the sum of some losses at a share of the learning rate; return the sum.

    `losses`: scalars, one of each micro-batch, each divided already by what the whole batch has to count. Given by a
    generator, the next is computed when the gradients of the last are there: memory for one micro-batch.
    """
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    if not math.isfinite(total):
        raise InputError(f"the loss is {total}; lower the learning rate and start again from the last stage")
    torch.nn.utils.clip_grad_norm_([p for o in optimisers for g in o.param_groups for p in g["params"]], 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group.setdefault("full", group["lr"])
            group["lr"] = group["full"] * share
        optimiser.step()
        optimiser.zero_grad()
    return total


def half_is_faster(device: str) -> bool:
    """Tell whether products in bfloat16 are faster than in float32: measured on a CPU, known of a CUDA device."""
    kind = torch.device(device).type
    if kind == "cuda":      # since Ampere
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return kind == "cpu" and products()[1]


@contextmanager
def precision(device: str, half: bool):
    """Compute steps inside in float32, or with matrix products in bfloat16 where `half`; weights stay float32.

    On a CPU attention is two matrix products and a softmax: with torch's fused one in bfloat16 a step of nano took
    0.21 s on 2 cores, so 0.16.
    """
    kind = torch.device(device).type
    attention = sdpa_kernel(SDPBackend.MATH) if kind == "cpu" else nullcontext()
    with torch.autocast(kind, torch.bfloat16, enabled=half), attention:
        yield
