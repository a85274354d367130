"""The loops of `loops.py`, compiled ahead of time by torch, once for all shapes, and kept on disk.

    loop(few_rows, 1, 16)((x, words, scales, zeros))

Source: torch.export, AOTInductor. Without a C++ compiler nothing here is called.
"""
from __future__ import annotations

import atexit
import hashlib
import inspect
import os
import platform
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from minivl.fast.loops import SHIFTS, dequantize, few_rows, half_rows, relayout
from minivl.fast.machine import products
from minivl.limits import InputError

ROWS = 4                # rows of x that one pass over the words serves


def sample(function: Callable, *fixed) -> tuple:
    """Make up arguments to compile a loop for, and say which of their sizes are free: any number from 2 on.

    The latter are {dimension: o, g or a multiple of them} for each argument. The arguments are as large as in a large
    model: the compiler looks at their sizes when it decides how many threads a loop gets.
    """
    from torch.export import Dim
    o, g, O, G = Dim("o", min=2, max=2 ** 24), Dim("g", min=2, max=2 ** 16), 4096, 16
    both = [torch.zeros(O, G), torch.zeros(O, G)]
    sizes = {0: o, 1: g}
    if function is few_rows:
        n, J = fixed
        return (torch.zeros(n, G * 8 * J), torch.zeros(O, G, J), *both), ({1: 8 * J * g}, sizes, sizes, sizes)
    if function is relayout:
        J, = fixed
        return (torch.zeros(O, G, 8, J), SHIFTS, torch.zeros(O, 8, G, J)), (sizes, None, {0: o, 2: g})
    if function is dequantize:
        J, dtype = fixed
        out = torch.zeros(O, G, 8, J, dtype=dtype)
        return (torch.zeros(O, G, J), *both, SHIFTS, out), (sizes, sizes, sizes, None, sizes)
    if function is half_rows:
        n, D, dtype = fixed
        return (torch.zeros(n, D), torch.zeros(4 * O, D, dtype=dtype)), (None, {0: o})
    raise ValueError(f"{function} is none of the loops of loops.py")


class Call(nn.Module):
    """A function as a module, which is what torch.export takes."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, arguments: tuple):
        return self.function(*arguments)


@lru_cache
def cache_folder() -> Path:
    """Find the folder of compiled loops: the user's cache if only the user can write there, else one of this process.

    What lies there is run, so nobody else may write there.
    """
    try:
        xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
        folder = (xdg if xdg.is_absolute() else Path.home() / ".cache") / "minivl"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
        mine = not hasattr(os, "getuid") or about.st_uid == os.getuid() and not about.st_mode & 0o022
        if mine and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):         # no home, or no permission
        pass
    folder = tempfile.mkdtemp(prefix="minivl-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def loop_file(function: Callable, *fixed) -> Path:
    """Name the file of a compiled loop after the function, torch, the processor and all else that matters."""
    processor = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = {line for line in lines if line.startswith(("flags", "Features"))}
    what = [inspect.getsource(function), inspect.getsource(sample), inspect.getsource(build), fixed, torch.__version__,
            sys.version, sorted(processor), os.environ.get("CXX")]
    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    return cache_folder() / f"{function.__name__}-{digest}.pt2"


def build(function: Callable, *fixed) -> Path:
    """Compile a loop into its file. This takes some seconds, and some more for the first loop of a process."""
    path = loop_file(function, *fixed)
    arguments, sizes = sample(function, *fixed)
    # dynamic: as many threads as the caller has when it runs, see threads.py
    settings = {"cpp.enable_floating_point_contract_flag": "fast", "cpp.dynamic_threads": True}
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad(), \
            tempfile.TemporaryDirectory(dir=path.parent) as folder:
        warnings.simplefilter("ignore")                 # of all sorts, from deep inside torch
        program = torch.export.export(Call(function), (arguments,), dynamic_shapes=(sizes,))
        part = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / path.name),
                                                        inductor_configs=settings)
        os.replace(part, path)
    return path


def read(function: Callable, *fixed) -> Callable:
    """Load a loop from its file; build it again if that cannot be read (the disk was full, say)."""
    path = loop_file(function, *fixed)
    if path.exists():
        try:
            return torch._inductor.aoti_load_package(str(path))
        except Exception:
            path.unlink(missing_ok=True)
    return torch._inductor.aoti_load_package(str(build(function, *fixed)))


def hush() -> None:
    """Ignore two warnings of torch's compiler: it looks for numpy, and imports deprecated parts of torch.

    The filters stay for the whole process: putting the old ones back, as catch_warnings does, would undo what another
    thread sets meanwhile.
    """
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch(\.|$)")


_loops, _lock = {}, threading.Lock()
atexit.register(_loops.clear)               # a loop that goes removes the temporary folder it was unpacked into


def loop(function: Callable, *fixed) -> Callable:
    """Get a function of loops.py compiled for fixed sizes and types.

    These are: few_rows (n, J), relayout (J), dequantize (J, dtype), half_rows (n, D, dtype). The result takes one tuple
    of arguments, contiguous and on the CPU: nothing is checked. One thread builds or loads it, others wait.
    """
    if (function, fixed) not in _loops:
        with _lock:
            if (function, fixed) not in _loops:
                hush()
                try:
                    _loops[function, fixed] = read(function, *fixed)
                except Exception as error:              # the compiler's own, of many kinds
                    raise InputError(f"the C++ compiler could not make a loop of {function.__name__}{fixed} in "
                                     f"{cache_folder()} ({type(error).__name__}: {error}); mend it, "
                                     "or set MINIVL_COMPILE=0 to go without, slower") from error
    return _loops[function, fixed]


def warm(J: int, D: int, half: torch.dtype, rounded: bool) -> None:
    """Load or compile all loops of a model in a thread, while the main one waits for the disk."""
    wide = torch.bfloat16 if rounded else torch.float32
    wanted = [(relayout, J), (few_rows, ROWS, J), (few_rows, 1, J), (dequantize, J, wide)]
    if half != torch.float32:
        wanted += [(half_rows, ROWS, D, half), (half_rows, 1, D, half)]

    products()      # measured now, and not while the thread compiles beside it

    def work() -> None:
        try:
            missing = sum(not loop_file(*one).exists() for one in wanted)
            desc = f"compiling {missing} loops, once"
            for one in tqdm(wanted, desc=desc, disable=None if missing else True, leave=False):
                loop(*one)
        except (InputError, OSError):                   # the main thread meets it again, where it needs the loop
            return

    threading.Thread(target=work, daemon=True).start()
