"""Optimisers: Muon for the matrices inside a network, AdamW for all else, and the learning rate over the steps."""
from __future__ import annotations

import math
from collections import defaultdict

import torch


class Muon(torch.optim.Optimizer):
    """Momentum, then every matrix replaced by the nearest orthogonal one: all its directions learn at the same rate.

    For the two-dimensional weights inside a network. The update has the root mean square 0.2 * lr, as AdamW's has.
    Newton-Schulz runs in the precision of the step. torch.optim.Muon is not used: it always takes bfloat16, which many
    CPUs multiply hundreds of times slower.
    Source: https://kellerjordan.github.io/posts/muon/; the scale: arXiv:2502.16982 section 2.2.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.mul_(group["momentum"]).add_(p.grad)
                    update = p.grad.add(buffer, alpha=group["momentum"])    # Nesterov
                    update = update.flatten(1)                              # a convolution as a matrix
                    shapes[update.shape].append((p, update))
            for shape, pairs in shapes.items():         # matrices of one shape together
                updates = orthogonalise(torch.stack([update for _, update in pairs]))
                for (p, _), update in zip(pairs, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalise(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Bring all singular values near 1 (0.7..1.2) and keep the singular vectors: float[n, r, c] -> same shape."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):      # s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5 of every singular value s
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def muon_and_adamw(parts: list, lr: float, weight_decay: float, tables=()) -> list:
    """Return [Muon, AdamW] over `parts`, pairs (parameters, share of the learning rate).

    Muon takes matrices and convolutions. AdamW takes the rest, at half the rate and without weight decay on vectors.
    `tables`: matrices that are AdamW's all the same, because each row has a life of its own (embeddings, heads).
    """
    own_rows = {id(p) for p in tables}
    muon = []
    adamw = []
    for params, share in parts:
        matrices = [p for p in params if p.ndim in (2, 4) and id(p) not in own_rows]
        inside = {id(p) for p in matrices}
        rest = [p for p in params if id(p) not in inside]
        muon.append({"params": matrices, "lr": share * lr})
        adamw += [
            {"params": [p for p in rest if p.ndim == 2], "lr": share * lr / 2, "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim != 2], "lr": share * lr / 2, "weight_decay": 0.0}]
    return [Muon(muon, lr=lr, weight_decay=weight_decay), torch.optim.AdamW(adamw, betas=(0.9, 0.98), eps=1e-10)]


def rate(step: int, steps: int, warmup: int = 0, floor: float = 0.0) -> float:
    """Return the share of the learning rate at a step: a rise over `warmup` steps, a cosine down to `floor`."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / max(1, warmup)) * (floor + (1 - floor) * cosine)
