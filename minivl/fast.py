"""The same model, fast: int4 in an order a compiled loop likes, a head in half the bytes, the better matrix product.

    prepare(model, "exact")     float32 as `awq.py` defines it, up to the order of additions
    prepare(model, "fast")      what this machine does faster in bfloat16 may be rounded to it

`awq.py` says what int4 is; here the same numbers lie as

    words   int32[O, I/g, J]    J = g/8 words for each output and group. Nibble n of word j: q of input  g*group + J*n + j
    scales, zeros   float32[O, I/g]

so that the inputs a row of words meets lie side by side: eight shifts of 16 words meet 8 x 16 neighbouring inputs, and the
sum over a group stays in registers. One token reads every word once; that, not arithmetic, is what a token costs. So the
words lie in huge pages, and a layer with many inputs is cut into parts whose inputs stay in the processor's nearest cache.
Everything is plain torch. Where a C++ compiler is at hand torch makes loops of the functions below, once, for all shapes, and
keeps them on disk; without one the definition in awq.py serves, or torch's own int4 product, which rounds.
"""
import atexit
import ctypes
import hashlib
import inspect
import math
import mmap
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
import warnings
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from minivl import vit
from minivl.awq import PACK_ORDER, AWQLinear, unpack
from minivl.limits import InputError
from minivl.qwen2 import MLP, Attend, Attention, RMSNorm, rotate

SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)      # of the eight 4-bit numbers in a word
ROWS = 4                # rows of x that one pass over the words serves
FEW = 64                # rows up to which words are multiplied as they are: for 64 of them, 2048 x 11008, 16 x 0.56 ms against 1.4 + 8.3
NEAR = 2 ** 15          # bytes of x that stay in the nearest cache while the words of a part pass by
BLOCK = 2 ** 22         # weights dequantised at a time: they stay in the cache until they are multiplied
PIECE = 1024            # rows that one product takes: with the weights they stay in the cache
QUERIES = 256           # of a prompt that one product compares with the keys
LARGE = 10 ** 8         # numbers in a model; below, measuring and compiling would take longer than what is saved


# ---- the layout and its three loops ---------------------------------------------------------------------------------

def relayout(turned, shifts, out):
    """Released words, turned to [O/8, I/g, 8, J] -> out [O/8, 8, I/g, J]: of eight neighbouring columns' words the words of each.

    shifts int32[8]: where a released word holds its eight columns. Both given as float32, see few_rows.
    """
    q = turned.view(torch.int32)[:, None] >> shifts[:, None, None, None] & 0xF      # (O/8, 8, I/g, 8, J)
    word = q[:, :, :, 0]
    for n in range(1, 8):
        word = word | q[:, :, :, n] << 4 * n
    out.copy_(word.view(torch.float32))


def few_rows(x, words, scales, zeros):
    """x float32[n, I] @ W -> float32[n, O] for small n, without ever holding W.

    `words` are given as float32: the compiler loads floats in one instruction, int32 in many. Each bit pattern survives.
    """
    n, (O, groups, J) = x.shape[0], words.shape
    words, x = words.view(torch.int32), x.view(n, groups, 8, J)
    lanes = x.sum(2)                                                        # (n, I/g, J): what the zero point multiplies
    q = [(words >> 4 * k & 0xF).float() for k in range(8)]                  # 8 x (O, I/g, J)
    y = []
    for row in range(n):
        # Two chains of fused multiply-adds: the next need not wait for the last.
        one, two = q[0] * x[row, :, 0] - zeros[..., None] * lanes[row], q[4] * x[row, :, 4]
        for k in range(1, 4):
            one, two = one + q[k] * x[row, :, k], two + q[k + 4] * x[row, :, k + 4]
        y.append(((one + two) * scales[..., None]).sum((1, 2)))             # (O)
    return torch.stack(y)                                                   # (n, O)


def dequantize(words, scales, zeros, shifts, out):
    """Into out float32 or bfloat16[O, I/g, 8, J], which is W transposed, as nn.Linear has it. shifts: 0, 4, ..., 28."""
    q = words.view(torch.int32)[:, :, None] >> shifts[:, None] & 0xF        # (O, I/g, 8, J)
    out.copy_((q.float() - zeros[..., None, None]) * scales[..., None, None])


def half_rows(x, weight):
    """x float32[n, D], weight float16 or bfloat16[V, D] -> float32[n, V], products and sums in float32."""
    weight = weight.float()
    return torch.stack([(weight * row).sum(-1) for row in x])


# ---- what this machine has ------------------------------------------------------------------------------------------

@lru_cache
def has_compiler() -> bool:
    """Whether there is a C++ compiler. MINIVL_COMPILE=0 in the environment says there is none."""
    name = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")     # torch looks for these
    return os.environ.get("MINIVL_COMPILE") != "0" and shutil.which(name.split()[0]) is not None


def sample(name: str, *fixed) -> tuple:
    """What a loop is compiled for: its arguments, and which of their sizes may be any from 2 on: {dimension: o, g, multiples}.

    The sizes here are those of a large model: the compiler looks at them when it decides how many threads a loop gets.
    """
    from torch.export import Dim
    o, g, O, G = Dim("o", min=2, max=2 ** 24), Dim("g", min=2, max=2 ** 16), 4096, 16
    if name == "few_rows":
        n, J = fixed
        x, both, sizes = torch.zeros(n, G * 8 * J), [torch.zeros(O, G), torch.zeros(O, G)], {0: o, 1: g}
        return (x, torch.zeros(O, G, J), *both), ({1: 8 * J * g}, sizes, sizes, sizes)
    if name == "relayout":
        J, = fixed
        return (torch.zeros(O, G, 8, J), SHIFTS, torch.zeros(O, 8, G, J)), ({0: o, 1: g}, None, {0: o, 2: g})
    if name == "dequantize":
        J, dtype = fixed
        both, out, sizes = [torch.zeros(O, G), torch.zeros(O, G)], torch.zeros(O, G, 8, J, dtype=dtype), {0: o, 1: g}
        return (torch.zeros(O, G, J), *both, SHIFTS, out), (sizes, sizes, sizes, None, sizes)
    if name == "half_rows":
        n, D, dtype = fixed
        return (torch.zeros(n, D), torch.zeros(4 * O, D, dtype=dtype)), (None, {0: o})
    raise ValueError(f"no loop called {name}")


class Call(nn.Module):
    """A function as a module, which is what torch.export takes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, arguments):
        return self.function(*arguments)


@lru_cache
def cache_folder() -> Path:
    """Where compiled loops are kept: the user's cache, if nobody else can write there; what lies in it is run. Else a folder of this
    process alone."""
    try:
        xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
        folder = (xdg if xdg.is_absolute() else Path.home() / ".cache") / "minivl"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
        mine = not hasattr(os, "getuid") or about.st_uid == os.getuid() and not about.st_mode & 0o022
        if mine and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):         # no home, or not for us
        pass
    folder = tempfile.mkdtemp(prefix="minivl-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def package(name: str, *fixed) -> Path:
    """The file of a compiled loop, named after the function, torch, the processor and all else that matters."""
    processor = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))} \
        if os.path.exists("/proc/cpuinfo") else platform.processor()
    what = [inspect.getsource(globals()[name]), inspect.getsource(sample), inspect.getsource(build), fixed, torch.__version__,
            torch.get_num_threads(), sys.version, sorted(processor), os.environ.get("CXX")]
    return cache_folder() / f"{name}-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.pt2"


def build(name: str, *fixed) -> Path:
    """Compile a loop ahead of time, once: some seconds, the first of a process some more. Source: torch.export, AOTInductor."""
    path = package(name, *fixed)
    arguments, sizes = sample(name, *fixed)
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        warnings.simplefilter("ignore")                 # of all sorts, from deep inside torch
        program = torch.export.export(Call(globals()[name]), (arguments,), dynamic_shapes=(sizes,))
        part = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / path.name), inductor_configs={
            "cpp.enable_floating_point_contract_flag": "fast"})
        os.replace(part, path)
    return path


def _read(name: str, *fixed):
    """The loop from its file; one that cannot be read (a disk that was full) is built again."""
    path = package(name, *fixed)
    if path.exists():
        try:
            return torch._inductor.aoti_load_package(str(path))
        except Exception:
            path.unlink(missing_ok=True)
    return torch._inductor.aoti_load_package(str(build(name, *fixed)))


_loops, _lock = {}, threading.Lock()
atexit.register(_loops.clear)               # a loop unpacks itself into a temporary folder, and removes it when it goes


def loop(name: str, *fixed):
    """A function of this file, compiled for fixed sizes and types: few_rows (n, J), relayout (J), dequantize (J, dtype), half_rows
    (n, D, dtype). Arguments must be contiguous and on the CPU: nothing is checked. One thread builds or loads it, others wait."""
    if (name, fixed) not in _loops:
        with _lock:
            if (name, fixed) not in _loops:
                # torch's compiler looks for numpy, and imports deprecated parts of torch. Filters stay: putting them back, as
                # catch_warnings does, would undo what the main thread sets meanwhile.
                warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
                warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch(\.|$)")
                try:
                    _loops[name, fixed] = _read(name, *fixed)
                except Exception as error:              # the compiler's own, of many kinds
                    raise InputError(f"the C++ compiler could not make a loop of {name}{fixed} in {cache_folder()} "
                                     f"({type(error).__name__}: {error}); mend it, or set MINIVL_COMPILE=0 to go without, "
                                     "slower") from error
    return _loops[name, fixed]


def warm(J: int, D: int, half, rounded: bool):
    """Have all loops of a model ready, in a thread, while the main one waits for the disk."""
    wanted = [("relayout", J), ("few_rows", ROWS, J), ("few_rows", 1, J), ("dequantize", J, torch.bfloat16 if rounded else torch.float32)]
    if half != torch.float32:
        wanted += [("half_rows", ROWS, D, half), ("half_rows", 1, D, half)]

    products()      # measured now: not while the thread compiles beside it

    def work():
        try:
            missing = sum(not package(*one).exists() for one in wanted)
            for one in tqdm(wanted, desc=f"compiling {missing} loops, once", disable=None if missing else True, leave=False):
                loop(*one)
        except (InputError, OSError):                   # met again, in the main thread, where the loop is needed
            return

    threading.Thread(target=work, daemon=True).start()


def fastest(*works, repeats: int) -> list:
    """Seconds of the fastest run of each, in turns, after one that warms up."""
    best = [float("inf")] * len(works)
    for i in range(repeats + 1):
        for k, work in enumerate(works):
            start = time.perf_counter()
            work()
            if i:
                best[k] = min(best[k], time.perf_counter() - start)
    return best


def _onednn(x, weight, bias=None, activation="none"):
    """F.linear through oneDNN. torch itself takes MKL for float32, which leaves half of some AMD processors unused."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


@lru_cache
def products():
    """(float32 product, whether bfloat16 is faster): measured once on [256, 1024] @ [1024, 1024]. In turns, the best of six:
    a busy moment must not choose for the whole session."""
    x, w = torch.randn(256, 1024), torch.randn(1024, 1024)
    floating = [F.linear] + ([_onednn] if torch.backends.mkldnn.is_available() else [])
    runs = [partial(f, x, w) for f in floating] + [partial(F.linear, x.bfloat16(), w.bfloat16())]
    *times, half = fastest(*runs, repeats=6)
    return floating[times.index(min(times))], half < 0.8 * min(times)


_kept = threading.local()


def _scratch(size: int, dtype, number: int = 0):
    """Memory kept for each thread, for numbers that the next call replaces: fresh pages would cost more than they do."""
    kept = vars(_kept)
    if len(kept.get((dtype, number), ())) < size:
        with torch.inference_mode(False):       # so that it can be written to in every mode
            kept[dtype, number] = torch.empty(size, dtype=dtype)
    return kept[dtype, number][:size]


def glibc(name: str, *numbers: int):
    """Call a function of Linux's usual C library, if it is there: torch's memory comes from it."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), name):
        getattr(library, name)(*numbers)


def keep_memory():
    """Give back what is free, then keep up to 256 MB of what becomes free: pages that go back come again one by one, all zeroed,
    a tenth of the time of a tile."""
    glibc("malloc_trim", 0)
    for parameter, value in ((-3, 2 ** 25), (-1, 2 ** 28)):     # M_MMAP_THRESHOLD, at most 32 MB; M_TRIM_THRESHOLD (malloc.h)
        glibc("mallopt", parameter, value)


def pieces(x):
    """float[..., D] -> the rows in pieces of about PIECE."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.tensor_split(max(1, round(len(rows) / PIECE)))


def by_pieces(function, x):
    """What a function of rows, [n, D] -> [n, O], makes of float[..., D]: [..., O]."""
    y = [function(rows) for rows in pieces(x)]
    y = y[0] if len(y) == 1 else torch.cat(y)
    return y.view(*x.shape[:-1], y.shape[-1])


def refuse_gradients(x, what: str):
    """An error, where they would be lost."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise InputError(f"{what} has no gradients; load the model with precision=None, or compute under torch.no_grad()")


def huge(shape, dtype):
    """Uninitialised memory in pages of 2 MB where the system has them: fewer page tables to walk while all of it is read."""
    size = math.prod(shape)
    if not hasattr(mmap, "MADV_HUGEPAGE") or not size:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:         # a system without them
        pass
    return torch.frombuffer(memory, dtype=dtype, count=size).view(shape)


def turned(qweight):
    """Released qweight int32[I, O/8] -> its transpose, in memory that the next call uses again."""
    I, columns = qweight.shape
    out = _scratch(qweight.numel(), torch.int32, 1).view(columns, I)
    for rows in range(0, I, 128):                       # 128 rows: twice as fast as all at once
        out[:, rows:rows + 128] = qweight[rows:rows + 128].T
    return out


def packed_words(qweight, groups: int):
    """Released qweight int32[I, O/8] -> words int32[O, I/g, g/8], in memory that the next call uses again."""
    (I, columns), J = qweight.shape, qweight.shape[0] // groups // 8
    out = _scratch(qweight.numel(), torch.float32, 2).view(columns, 8, groups, J)
    place = [PACK_ORDER.index(column) for column in range(8)]
    loop("relayout", J)((turned(qweight).view(columns, groups, 8, J).view(torch.float32), SHIFTS[place], out))
    return out.view(torch.int32).flatten(0, 1)          # (O, I/g, J)


def rows_of_numbers(qweight):
    """Released qweight int32[I, O/8] -> int32[O, I], a number in each, in memory that the next call uses again."""
    I, columns = qweight.shape
    words, shifted = turned(qweight), _scratch(qweight.numel(), torch.int32, 0).view(columns, I)
    out = _scratch(8 * qweight.numel(), torch.int32, 2).view(columns, 8, I)
    for nibble, column in enumerate(PACK_ORDER):
        torch.bitwise_right_shift(words, 4 * nibble, out=shifted)
        torch.bitwise_and(shifted, 0xF, out=out[:, column])
    return out.view(8 * columns, I)


# ---- modules --------------------------------------------------------------------------------------------------------

class Linear(nn.Module):
    """nn.Linear, float32, by the product that is faster here; in mode "fast" perhaps in bfloat16.

    oneDNN takes blocks of a weight, and would cut them out anew in each product; cut once, 6 % are saved.
    """

    def __init__(self, linear: nn.Linear, rounded: bool = False):
        super().__init__()
        self.dtype = torch.bfloat16 if rounded else torch.float32
        weight = linear.weight.detach().to(self.dtype)
        if torch.backends.mkldnn.is_available() and (rounded or products()[0] is _onednn):
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, PIECE)
        self.register_buffer("blocks", weight, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(self.dtype), persistent=False)

    @property
    def weight(self):
        """A copy, to look at: float32[O, I]."""
        return self.blocks.to_dense().float() if self.blocks.is_mkldnn else self.blocks

    def forward(self, x):
        refuse_gradients(x, "this linear")
        product = _onednn if self.blocks.is_mkldnn else F.linear
        return by_pieces(lambda rows: product(rows.to(self.dtype), self.blocks, self.bias), x).to(x.dtype)


class PackedLinear(nn.Module):
    """What AWQLinears of one input compute, side by side: compiled loops for few rows, dequantise and multiply for many."""

    def __init__(self, *linears: AWQLinear, rounded: bool = False):
        super().__init__()
        I, groups = linears[0].qweight.shape[0], linears[0].scales.shape[0]
        parts = next((n for n in range(1, groups) if groups % n == 0 and I // n * 4 <= NEAR and groups // n > 1), 1)

        def stored(make, dtype, *J):        # [O, I/g, *J] of each linear -> [parts, all O, I/g/parts, *J]
            sizes = [m.scales.shape[1] for m in linears]
            out = huge((parts, sum(sizes), groups // parts, *J), dtype)
            for linear, place in zip(linears, out.split(sizes, dim=1)):
                place.copy_(make(linear).unflatten(1, (parts, -1)).transpose(0, 1))
            return out

        words = stored(lambda m: packed_words(m.qweight, groups), torch.int32, I // groups // 8)
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("scales", stored(lambda m: m.scales.T, torch.float32), persistent=False)
        self.register_buffer("zeros", stored(lambda m: unpack(m.qzeros).T, torch.float32), persistent=False)
        bias = None if linears[0].bias is None else torch.cat([m.bias for m in linears])
        self.register_buffer("bias", bias, persistent=False)
        self.rounded = rounded      # many rows in bfloat16
        self.parts = list(zip(self.words.view(torch.float32), self.scales, self.zeros))     # views, made once: 40 us a layer

    def forward(self, x, memory=None):
        """float[..., I] -> float32[..., O]; for many rows in `memory`, float32[n O] or more, if given."""
        if x.device.type != "cpu" or self.scales.dtype != torch.float32:
            raise InputError(f"these int4 weights are laid out for float32 on the CPU, not for {self.scales.dtype} on {x.device.type}; load "
                             "the model again with device= and dtype= instead of moving it")
        refuse_gradients(x, "compiled int4")
        rows = x.reshape(-1, x.shape[-1]).float()                           # (n, I)
        inputs = rows.chunk(len(self.parts), dim=1)
        if len(rows) <= FEW:
            found = [self.few(one.contiguous(), part) for one, part in zip(inputs, self.parts)]
            y = sum(found[1:], found[0])                                    # (n, O)
        else:
            n, O = len(rows), self.words.shape[1]
            y = (torch.empty(n * O) if memory is None else memory[:n * O]).view(n, O)
            for i, (one, part) in enumerate(zip(inputs, self.parts)):
                self.many(one, *part, y, first=not i)
        return (y if self.bias is None else y.add_(self.bias)).view(*x.shape[:-1], -1)

    def few(self, x, part):
        J = part[0].shape[2]
        if len(x) == 1:
            return loop("few_rows", 1, J)((x, *part))
        y = [loop("few_rows", ROWS, J)((F.pad(rows, (0, 0, 0, ROWS - len(rows))).contiguous(), *part)) for rows in x.split(ROWS)]
        return torch.cat(y)[:len(x)]

    def many(self, x, words, scales, zeros, y, first):
        """Into y, or added to it."""
        (O, groups, J), I = words.shape, x.shape[1]
        dtype = torch.bfloat16 if self.rounded else torch.float32
        product, x = F.linear if self.rounded else products()[0], x.to(dtype).contiguous()
        step = max(8, BLOCK // I // 8 * 8)                                  # outputs at a time
        memory = _scratch(max(BLOCK, 8 * I), dtype)
        for block in zip(words.split(step), scales.split(step), zeros.split(step), y.split(step, dim=1)):
            W = memory[:len(block[0]) * I].view(-1, groups, 8, J)
            loop("dequantize", J, dtype)((*block[:3], SHIFTS, W))
            found = product(x, W.view(-1, I))                               # (n, step)
            block[3].copy_(found) if first else block[3].add_(found)


class OpLinear(nn.Module):
    """What an AWQLinear computes, rounded to bfloat16, by torch's own int4 product. Needs no compiler.

    On a GPU that product is made for few rows; for many, the definition unpacks the words, which are kept for it (untested there).
    """

    def __init__(self, linear: AWQLinear):
        super().__init__()
        self.group = linear.qweight.shape[0] // linear.scales.shape[0]
        scales, zeros = linear.scales.float(), unpack(linear.qzeros).float()
        both = torch.stack([scales, (8 - zeros) * scales], dim=-1).bfloat16()   # the op computes (q - 8) * scale + zero
        if linear.qweight.device.type == "cpu":
            # a layout for this very CPU: never saved
            packed, self.definition = torch._convert_weight_to_int4pack_for_cpu(rows_of_numbers(linear.qweight), 1), None
        else:
            self.definition = linear
            q = unpack(linear.qweight).T.contiguous()                       # (O, I)
            packed = torch._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("both", both, persistent=False)                # (I/g, O, 2)
        self.register_buffer("bias", linear.bias, persistent=False)

    def forward(self, x):
        if self.definition is not None and x[..., 0].numel() > FEW:
            return self.definition(x)
        product = torch._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else torch._weight_int4pack_mm
        y = product(x.reshape(-1, x.shape[-1]).bfloat16(), self.packed, self.group, self.both).to(x.dtype)      # (n, O)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


class HalfLinear(nn.Linear):
    """A head whose weight stays in half precision as released; products and sums in float32."""

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1]).float().contiguous()              # (n, D)
        if len(rows) <= ROWS and has_compiler() and x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad):
            n = 1 if len(rows) == 1 else ROWS
            padded = F.pad(rows, (0, 0, 0, n - len(rows)))
            y = loop("half_rows", n, x.shape[-1], self.weight.dtype)((padded, self.weight))[:len(rows)]     # (n, V)
        else:
            step = max(1, BLOCK // x.shape[-1])
            y = torch.cat([products()[0](rows, part.float()) for part in self.weight.split(step)], dim=1)
        return y.view(*x.shape[:-1], -1)


class HalfEmbedding(nn.Embedding):
    """Rows of a half-precision table, as float32."""

    def forward(self, ids):
        return super().forward(ids).float()


# ---- a whole model --------------------------------------------------------------------------------------------------

class FastAttention(Attention):
    """qwen2.Attention with q, k and v from one product."""

    def __init__(self, attention: Attention, rounded: bool):
        nn.Module.__init__(self)
        self.layer, self.head_dim, self.attend = attention.layer, attention.head_dim, PromptByHead()
        self.heads = [p.qweight.shape[1] * 8 // self.head_dim for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.qkv_proj = PackedLinear(attention.q_proj, attention.k_proj, attention.v_proj, rounded=rounded)
        self.o_proj = PackedLinear(attention.o_proj, rounded=rounded)

    def forward(self, x, cos, sin, mask, cache):
        x = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)     # (B, H + 2K, T, E)
        qk, v = x.split([sum(self.heads[:2]), self.heads[2]], dim=1)
        q, k = rotate(qk, cos, sin).split(self.heads[:2], dim=1)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))


class HeadByHead(nn.Module):
    """vit.Attend, one head after the other by the faster product: torch's fused attention goes through MKL, 580 ms a tile against 355."""

    def forward(self, q, k, v):                                             # (N, H, 1+P, E)
        product, y, shape = products()[0], [], q.shape
        q, k, v = (t.contiguous().flatten(0, 1) for t in (q, k, v))         # (N H, 1+P, E): each head in one piece
        for one_q, one_k, one_v in zip(q, k, v):
            shares = product(one_q * shape[-1] ** -0.5, one_k)              # (1+P, 1+P)
            y.append(product(torch.softmax(shares, -1, out=shares), one_v.T))       # (1+P, E)
        return torch.stack(y).view(shape)


class PromptByHead(Attend):
    """qwen2.Attend; a prompt's heads one after the other, some hundred queries at a time with the keys that they may see."""

    def forward(self, q, k, v, mask):
        (B, H, T, E), K, product = q.shape, k.shape[1], products()[0]
        if mask is not None or T < QUERIES or product is not _onednn:
            return super().forward(q, k, v, mask)
        later, y = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1), torch.empty(B, H, T, E)
        for b in range(B):
            for h in range(H):
                if h % (H // K) == 0:       # the next kv head
                    keys, values = k[b, h * K // H].contiguous(), v[b, h * K // H].contiguous()     # (T, E)
                for start in range(0, T, QUERIES):
                    end = min(start + QUERIES, T)
                    shares, n = product(q[b, h, start:end] * E ** -0.5, keys[:end]), end - start    # (n, end)
                    shares[:, start:].masked_fill_(later[:n, :n], -math.inf)
                    y[b, h, start:end] = product(torch.softmax(shares, -1, out=shares), values[:end].T)
        return y


class GeluInside(vit.MLP):
    """vit.MLP whose exact GELU is taken while a product's result is still in the cache: 100 ms a tile."""

    def forward(self, x):
        one, two = self.fc1, self.fc2
        return by_pieces(lambda rows: two(_onednn(rows.to(one.dtype), one.blocks, one.bias, "gelu")), x).to(x.dtype)


class FastNorm(RMSNorm):
    """qwen2.RMSNorm in one call; float32 only."""

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class FastMLP(MLP):
    """qwen2.MLP with gate and up from one product."""

    def __init__(self, mlp: MLP, rounded: bool):
        nn.Module.__init__(self)
        self.gate_up_proj = PackedLinear(mlp.gate_proj, mlp.up_proj, rounded=rounded)
        self.down_proj = PackedLinear(mlp.down_proj, rounded=rounded)

    def forward(self, x):
        if x[..., 0].numel() <= FEW:
            return self.part(x, None)
        # Fresh memory for the widest tensor of all would cost more than its numbers.
        memory = _scratch(2 * PIECE * self.gate_up_proj.words.shape[1], torch.float32, 1)
        return by_pieces(partial(self.part, memory=memory), x)

    def part(self, x, memory):
        gate, up = self.gate_up_proj(x, memory).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate, inplace=True).mul_(up))


def is_large(model) -> bool:
    """Whether a model (also on `meta`) is worth the seconds that measuring and compiling take."""
    return sum(t.numel() for t in model.state_dict().values()) >= LARGE


def keeps_half(model) -> bool:
    """Whether embeddings and head stay in half precision as released: in a large AWQ model."""
    return is_large(model) and any(isinstance(m, AWQLinear) for m in model.modules())


def relays(model) -> bool:
    """Whether the int4 fits the compiled loops: whole words in a group, and two groups or more."""
    linears = [m for m in model.modules() if isinstance(m, AWQLinear)]
    return bool(linears) and all(m.qweight.shape[0] // len(m.scales) % 8 == 0 and len(m.scales) > 1 for m in linears)


def places(model, kind) -> list:
    """(parent, name) of all modules of exactly this type. Only their places: each goes as soon as it is replaced."""
    return [(parent, name) for parent in model.modules() for name, child in parent.named_children() if type(child) is kind]


def prepare(model, precision: str):
    """Replace modules of a MiniVL by faster ones, in place. Returns it.

    "exact": what the model computes, up to the order of additions. "fast": rounded to bfloat16 where that is faster here.
    Small models keep their modules, but that "fast" takes torch's int4 product for any AWQ linear it does not re-lay.
    """
    large = model.device.type == "cpu" and is_large(model)
    if large and model.dtype == torch.float32:
        rounded = precision == "fast" and products()[1]
        for parent, name in places(model, nn.Linear):
            linear = getattr(parent, name)
            if linear.weight.dtype == torch.float32:
                setattr(parent, name, Linear(linear, rounded))
            else:                                       # the head, kept as released
                linear.__class__ = HalfLinear
                if has_compiler():
                    linear.weight.data = huge(linear.weight.shape, linear.weight.dtype).copy_(linear.weight)
        embedding = model.language_model.model.embed_tokens
        if embedding.weight.dtype != torch.float32:
            embedding.__class__ = HalfEmbedding
        if products()[0] is _onednn:
            for layer in model.vision_model.encoder.layers:
                layer.attn.attend = HeadByHead()
                layer.mlp.__class__ = GeluInside
        glibc("malloc_trim", 0)     # what the weights before were leaves the memory before the int4 comes
        if has_compiler() and relays(model):
            for layer in model.language_model.model.layers:
                layer.self_attn, layer.mlp = FastAttention(layer.self_attn, rounded), FastMLP(layer.mlp, rounded)
            for norm in [m for m in model.language_model.modules() if type(m) is RMSNorm]:
                norm.__class__ = FastNorm
    if precision == "fast":
        for parent, name in places(model.language_model, AWQLinear):
            setattr(parent, name, OpLinear(getattr(parent, name)))
    vars(_kept).clear()
    if large:
        keep_memory()       # now: while weights are replaced, what they leave goes back
    return model
