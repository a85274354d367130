"""What this machine has: a compiler, the faster of torch's products, and memory that is quick to use again."""
from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F


@lru_cache
def has_compiler() -> bool:
    """Say whether there is a C++ compiler. MINIVL_COMPILE=0 in the environment says there is none."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")       # torch looks for these
    name = os.environ.get("CXX") or usual
    return os.environ.get("MINIVL_COMPILE") != "0" and shutil.which(name.split()[0]) is not None


def fastest(*works: Callable, repeats: int) -> list[float]:
    """Time functions in turns, after one run of each to warm up -> seconds of the fastest run of each."""
    best = [float("inf")] * len(works)
    for i in range(repeats + 1):
        for k, work in enumerate(works):
            start = time.perf_counter()
            work()
            if i:
                best[k] = min(best[k], time.perf_counter() - start)
    return best


def onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
           activation: str = "none") -> torch.Tensor:
    """Compute F.linear by oneDNN. torch takes MKL for float32, which leaves half of some AMD processors unused."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


@lru_cache
def products() -> tuple[Callable, bool]:
    """Measure once, on [256, 1024] @ [1024, 1024] -> the faster float32 product, whether bfloat16 is faster still.

    In turns, the best of six: a busy moment must not choose for the whole session.
    """
    x, w = torch.randn(256, 1024), torch.randn(1024, 1024)
    floating = [F.linear] + ([onednn] if torch.backends.mkldnn.is_available() else [])
    runs = [partial(f, x, w) for f in floating] + [partial(F.linear, x.bfloat16(), w.bfloat16())]
    *times, half = fastest(*runs, repeats=6)
    return floating[times.index(min(times))], half < 0.8 * min(times)


_kept = threading.local()


def scratch(size: int, dtype: torch.dtype, number: int = 0) -> torch.Tensor:
    """Lend memory that each thread keeps, for numbers that the next call replaces.

    Fresh pages would cost more than computing what they hold.
    """
    kept = vars(_kept)
    if len(kept.get((dtype, number), ())) < size:
        with torch.inference_mode(False):       # so that it can be written to in every mode
            kept[dtype, number] = torch.empty(size, dtype=dtype)
    return kept[dtype, number][:size]


def forget_scratch() -> None:
    """Give back this thread's scratch memory."""
    vars(_kept).clear()


def glibc(name: str, *numbers: int) -> None:
    """Call a function of Linux's usual C library, if it is there: torch's memory comes from it."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), name):
        getattr(library, name)(*numbers)


def keep_memory() -> None:
    """Give the system back the memory that is free now, and keep up to 256 MB of what becomes free later.

    Pages given back return one by one, each zeroed first: that takes a tenth of the time of a tile.
    """
    glibc("malloc_trim", 0)
    glibc("mallopt", -3, 2 ** 25)       # M_MMAP_THRESHOLD in malloc.h: 32 MB, the most it takes
    glibc("mallopt", -1, 2 ** 28)       # M_TRIM_THRESHOLD


def huge(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Reserve uninitialised memory, in pages of 2 MB where the system has them: reading it walks fewer page tables."""
    size = math.prod(shape)
    if not hasattr(mmap, "MADV_HUGEPAGE") or not size:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):      # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=size).view(shape)
