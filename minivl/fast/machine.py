"""What this machine has: a compiler, the faster of torch's products, and memory that is quick to use again."""
from __future__ import annotations

import ctypes
import math
import mmap
import os
import shutil
import sys
import threading
import time
from functools import lru_cache, partial

import torch
import torch.nn.functional as F


@lru_cache
def has_compiler() -> bool:
    """Say whether there is a C++ compiler. MINIVL_COMPILE=0 in the environment says there is none."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")       # torch looks for these
    name = os.environ.get("CXX") or usual
    return os.environ.get("MINIVL_COMPILE") != "0" and shutil.which(name.split()[0]) is not None


def fastest(*works, repeats: int) -> list[float]:
    """Time functions in turns, after a run of each that warms up: seconds of the fastest run of each."""
    best = [float("inf")] * len(works)
    for i in range(repeats + 1):
        for k, work in enumerate(works):
            start = time.perf_counter()
            work()
            if i:
                best[k] = min(best[k], time.perf_counter() - start)
    return best


def onednn(x, weight, bias=None, activation="none"):
    """Compute F.linear by oneDNN. torch itself takes MKL for float32, which leaves half of some AMD processors unused."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


@lru_cache
def products() -> tuple:
    """Measure once, on [256, 1024] @ [1024, 1024]: (the faster float32 product, whether bfloat16 is faster still).

    In turns, the best of six: a busy moment must not choose for the whole session.
    """
    x, w = torch.randn(256, 1024), torch.randn(1024, 1024)
    floating = [F.linear] + ([onednn] if torch.backends.mkldnn.is_available() else [])
    runs = [partial(f, x, w) for f in floating] + [partial(F.linear, x.bfloat16(), w.bfloat16())]
    *times, half = fastest(*runs, repeats=6)
    return floating[times.index(min(times))], half < 0.8 * min(times)


_kept = threading.local()


def scratch(size: int, dtype: torch.dtype, number: int = 0) -> torch.Tensor:
    """Lend memory kept for each thread, for numbers that the next call replaces: fresh pages would cost more than they do."""
    kept = vars(_kept)
    if len(kept.get((dtype, number), ())) < size:
        with torch.inference_mode(False):       # so that it can be written to in every mode
            kept[dtype, number] = torch.empty(size, dtype=dtype)
    return kept[dtype, number][:size]


def forget_scratch():
    """Give this thread's scratch memory back."""
    vars(_kept).clear()


def glibc(name: str, *numbers: int):
    """Call a function of Linux's usual C library, if it is there: torch's memory comes from it."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), name):
        getattr(library, name)(*numbers)


def keep_memory():
    """Let the process give back what is free now, and keep up to 256 MB of what becomes free later.

    Pages that went back come again one by one, all zeroed: a tenth of the time of a tile.
    """
    glibc("malloc_trim", 0)
    for parameter, value in ((-3, 2 ** 25), (-1, 2 ** 28)):     # M_MMAP_THRESHOLD, at most 32 MB; M_TRIM_THRESHOLD (malloc.h)
        glibc("mallopt", parameter, value)


def huge(shape, dtype: torch.dtype) -> torch.Tensor:
    """Reserve uninitialised memory in pages of 2 MB where the system has them: fewer page tables to walk while it is read."""
    size = math.prod(shape)
    if not hasattr(mmap, "MADV_HUGEPAGE") or not size:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:         # a system without them
        pass
    return torch.frombuffer(memory, dtype=dtype, count=size).view(shape)
