"""Say in one sentence, with the numbers, that a device has no memory left."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minivl.limits import InputError


@contextmanager
def full_memory_told(device: torch.device, need: str, way_out: str) -> Iterator[None]:
    """Turn torch's error of several lines into an InputError: what was wanted, what the device has, what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        free, total = torch.cuda.mem_get_info(device)
        raise InputError(f"no memory left on {device} for {need}: {free / 1e9:.1f} of its {total / 1e9:.1f} GB are "
                         f"free; {way_out}") from None
