"""Several processes that train one model together, started by torchrun; alone, each of these does nothing."""
from __future__ import annotations

import torch
import torch.distributed as dist


def world() -> tuple[int, int]:
    """Return (number of this process, processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean(values: torch.Tensor) -> torch.Tensor:
    """Average a tensor over the processes."""
    if not dist.is_initialized():
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()


def gathered(values: torch.Tensor, rows: int) -> list[torch.Tensor]:
    """Collect float32[n, k] of each process, padded to float32[rows, k]."""
    if not dist.is_initialized():
        return [values]
    padded = torch.zeros(rows, values.shape[1])
    padded[:len(values)] = values
    found = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(found, padded)
    return found
