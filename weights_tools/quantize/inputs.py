"""What the linears of a decoder layer are given while it runs: the statistics that smoothing and clipping go by.

    largest |input| and mean |input| of each channel        always
    some of the inputs, evenly spread over all tokens       for the search
    sums of x x^T over the inputs x of each group           for clipping

Also kept in files, so that they need not be taken twice, and read from LMDeploy's inputs_stats.pth.
"""
from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from minivl.files.formats import open_safetensors
from minivl.limits import InputError, reading

ROWS = 512              # inputs kept for the search, as many as the paper's code takes to clip


@dataclass
class Inputs:
    """The inputs of a linear, or of several that read the same: I channels, n tokens so far."""
    absmax: torch.Tensor | float = 0.0      # float32[I]
    total: torch.Tensor | float = 0.0       # float64[I], the sum of |input|
    count: int = 0                          # n
    rows: list | None = None                # of float32[some, I]; None: none are kept
    every: int = 1                          # one of so many tokens is kept
    gram: torch.Tensor | None = None        # float32[I/g, g, g]
    group_size: int | None = None           # g; None: no sums are taken

    def see(self, x: torch.Tensor):
        """Take note of float[n, I]."""
        x = x.float()
        size = x.abs()
        self.absmax = torch.maximum(size.amax(0), torch.as_tensor(self.absmax))
        self.total = self.total + size.sum(0, dtype=torch.float64)
        if self.rows is not None:
            self.rows.append(x[-self.count % self.every::self.every].clone())
        if self.group_size:
            groups = x.unflatten(-1, (-1, self.group_size)).transpose(0, 1)             # (I/g, n, g)
            gram = groups.mT @ groups                                                   # (I/g, g, g)
            self.gram = gram if self.gram is None else self.gram.add_(gram)
        self.count += len(x)

    @property
    def absmean(self) -> torch.Tensor:
        """Return the mean |input| of each channel, float32[I]."""
        return (self.total / max(1, self.count)).float()


@contextmanager
def watched(layer, group_size: int | None = None, every: int | None = None):
    """Yield {"mlp.down_proj": Inputs, ...} of one decoder layer, filled while it runs.

    group_size: sums for clipping are taken in groups of so many; every: one of so many inputs is kept for the search.
    Linears that are given the same tensor (q, k and v) share one.
    """
    seen = {name: None for name in layer.linears}
    last = {}

    def hook(name):
        def note(module, args):
            x = args[0].detach()
            if last.get("input") is not args[0]:
                last.update(input=args[0], name=name)
                if seen[name] is None:
                    seen[name] = Inputs(rows=None if every is None else [], every=every or 1, group_size=group_size)
                seen[name].see(x.flatten(0, -2))
            seen[name] = seen[last["name"]]
        return note

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layer.linears.items()]
    try:
        yield seen
    finally:
        last.clear()
        for handle in handles:
            handle.remove()


def read_statistics(path: str | os.PathLike, layers: list) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Read statistics: of each decoder layer {"mlp.down_proj": {"absmax": float32[I], "absmean": ...}}.

    path: what `--save-stats` wrote, or the inputs_stats.pth that LMDeploy leaves beside a checkpoint, which is read
    with weights_only. layers: the decoder's, on any device; statistics that are not of theirs are refused.
    Source of the format: LMDeploy v0.6.4 lite/quantization/calibration.py, export.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        with reading(path):
            flat = {name: stored.read() for name, stored in open_safetensors(path).items()}
    else:
        flat = _lmdeploys(path)
    found = []
    for i, layer in enumerate(layers):
        found.append({})
        for name, module in layer.linears.items():
            of_one = {}
            for kind in ("absmax", "absmean"):
                keys = [key for key in flat if key.endswith(f"layers.{i}.{name}.{kind}")]
                if keys:
                    of_one[kind] = _checked(path, keys[0], flat[keys[0]], module.in_features)
            if "absmax" not in of_one:
                raise InputError(f"{path} holds no statistics for layers.{i}.{name}; they are of another model "
                                 f"({len(flat)} entries, the first {min(flat, default='none')})")
            found[-1][name] = of_one
    return found


def _checked(path: Path, key: str, value, channels: int) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.numel() != channels or not value.is_floating_point():
        shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputError(f"{path}: {key} is {shape}, the linear has {channels} inputs; the statistics are of another "
                         "model")
    value = value.detach().flatten().float()
    if not value.isfinite().all() or value.min() < 0:
        raise InputError(f"{path}: {key} holds numbers that are negative, NaN or infinite; they cannot be sizes of "
                         "inputs, calibrate again (in bfloat16 or float32, if these came from float16)")
    return value


def _lmdeploys(path: Path) -> dict[str, torch.Tensor]:
    """Read inputs_stats.pth, {"absmax": {"model.layers.0.mlp.down_proj": float16[I]}, ...}, as one flat dict."""
    try:
        with reading(path), open(path, "rb") as file:
            data = torch.load(file, weights_only=True, map_location="cpu")
        return {f"{name}.{kind}": value for kind in ("absmax", "absmean") if kind in data
                for name, value in dict(data[kind]).items()}
    except InputError:
        raise
    except Exception:       # pickle, zip, type and runtime errors
        raise InputError(f"{path} is not a file of statistics: neither safetensors that --save-stats wrote, nor "
                         "LMDeploy's inputs_stats.pth") from None
