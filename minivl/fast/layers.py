"""The faster modules. Each is the definition's own class with a method replaced, and gives way if that was changed.

A module becomes faster by a new `__class__` alone: it stays the object it was, with its name, hooks and children. So a
model's structure is written once, in `qwen2.py` and `vit.py`. A weight moves to where it is read faster; whoever looks
at it by its released name gets it back, and the module is its definition again.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import nn

from minivl import internlm2, qwen2, vit
from minivl.awq import AWQLinear, unpack
from minivl.fast import compiled, machine
from minivl.fast.compiled import ROWS
from minivl.fast.edits import INT4, once, stands_for, untouched
from minivl.fast.loops import SHIFTS, dequantize, few_rows, half_rows, numbers, packed_words, released, rows_of_numbers
from minivl.fast.machine import huge, onednn, scratch
from minivl.limits import InputError

FEW = 64                # rows up to which words are multiplied as they are, instead of dequantised first:
                        # 64 rows by 2048 x 11008 take 16 x 0.56 ms against 1.4 + 8.3
FEW_ON_GPU = 24         # the same for torch's int4 product on a GPU:
                        # 24 rows by gate and up take 84 us against 42 + 41, 32 take 102 (H100)
NEAR = 2 ** 15          # bytes of x that stay in the nearest cache while the words of a part pass by
BLOCK = 2 ** 22         # weights dequantised at a time, which stay in the cache until they are multiplied
PIECE = 1024            # rows that one product takes, which stay in the cache beside the weights
QUERIES = 256           # of a prompt, compared with the keys in one product
WAY_OUT = "load the model with precision=None"


def pieces(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cut float[..., D] into rows, in pieces of about PIECE."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.tensor_split(max(1, round(len(rows) / PIECE)))


def by_pieces(function: Callable, x: torch.Tensor) -> torch.Tensor:
    """Apply a function of rows, [n, D] -> [n, O], to float[..., D] -> [..., O]."""
    y = [function(rows) for rows in pieces(x)]
    y = y[0] if len(y) == 1 else torch.cat(y)
    return y.view(*x.shape[:-1], y.shape[-1])


def refuse_gradients(x: torch.Tensor, what: str) -> None:
    """Raise where gradients would be lost without a word."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise InputError(f"{what} has no gradients; {WAY_OUT}, or compute under torch.no_grad()")


class Moved:
    """What modules with moved weights share: no saving, loading or copying; looking at a weight brings it back."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        raise InputError(f"{prefix}* of this model was re-laid to be fast and cannot be saved; {WAY_OUT} and save that")

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        raise InputError(f"{prefix}* of this model was re-laid to be fast and takes no other weights; {WAY_OUT}")

    def __deepcopy__(self, memo):
        raise InputError("a model that was re-laid to be fast cannot be copied; "
                         f"load it twice, or {WAY_OUT} and copy that")


def told_apart(module: nn.Module, definition: type, tensors: dict[str, torch.Tensor | None]) -> None:
    """Turn a module back into its definition, with its tensors under their released names."""
    module.__class__ = definition
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)
    once(f"a weight of {definition.__name__} was looked at: this module is computed by its definition from now on, so "
         f"that a change of it counts. {WAY_OUT[0].upper() + WAY_OUT[1:]} to look at all of them")


# ---- linears --------------------------------------------------------------------------------------------------------

class Linear(Moved, nn.Linear):
    """nn.Linear in float32, by the product that is faster here; if rounded, in bfloat16.

    oneDNN takes blocks of a weight, and would cut them anew for each product. Cutting them once saves 6 %.
    """

    @classmethod
    def of(cls, linear: nn.Linear, rounded: bool = False) -> Linear:
        """Turn an nn.Linear into one of these, in place. Returns it."""
        dtype = torch.bfloat16 if rounded else torch.float32
        blocks = linear.weight.detach().to(dtype)
        if torch.backends.mkldnn.is_available() and (rounded or machine.products()[0] is onednn):
            blocks = torch.ops.mkldnn._reorder_linear_weight(blocks, PIECE)
        del linear.weight
        linear.register_buffer("blocks", blocks, persistent=False)
        linear.__class__ = cls
        return linear

    @property
    def weight(self) -> nn.Parameter:
        """Put the weight back -> float32[O, I]."""
        blocks = self.blocks
        del self.blocks
        weight = blocks.to_dense().float() if blocks.is_mkldnn else blocks.float()
        told_apart(self, nn.Linear, {"weight": nn.Parameter(weight)})
        return self.weight

    def product(self, rows: torch.Tensor, activation: str = "none") -> torch.Tensor:
        """Multiply float[n, I] -> [n, O] in the dtype of the weight."""
        bias = None if self.bias is None else self.bias.detach().to(self.blocks.dtype)
        if activation == "none" and not self.blocks.is_mkldnn:
            return F.linear(rows.to(self.blocks.dtype), self.blocks, bias)
        return onednn(rows.to(self.blocks.dtype), self.blocks, bias, activation)

    @stands_for((nn.Linear, "forward"))
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        refuse_gradients(x, "this linear")
        return by_pieces(self.product, x).to(x.dtype)


class HalfLinear(nn.Linear):
    """A head whose weight stays in half precision, as released, with products and sums in float32."""

    @stands_for((nn.Linear, "forward"))
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return F.linear(x.float(), self.weight.float())
        rows = x.reshape(-1, x.shape[-1]).float().contiguous()              # (n, D)
        if len(rows) <= ROWS and machine.has_compiler() and x.device.type == "cpu":
            n = 1 if len(rows) == 1 else ROWS
            padded = F.pad(rows, (0, 0, 0, n - len(rows)))
            y = compiled.loop(half_rows, n, x.shape[-1], self.weight.dtype)((padded, self.weight))[:len(rows)]  # (n, V)
        else:
            step = max(1, BLOCK // x.shape[-1])
            y = torch.cat([machine.products()[0](rows, part.float()) for part in self.weight.split(step)], dim=1)
        return y.view(*x.shape[:-1], -1)


class HalfEmbedding(nn.Embedding):
    """Rows of a half-precision table, as float32."""

    @stands_for((nn.Embedding, "forward"))
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).float()


# ---- int4 -----------------------------------------------------------------------------------------------------------

class Words(nn.Module):
    """AWQLinears of one input, side by side: compiled loops for few rows; for many, dequantise and multiply."""

    def __init__(self, *linears: AWQLinear, rounded: bool = False):
        super().__init__()
        I, groups = linears[0].qweight.shape[0], linears[0].scales.shape[0]
        parts = next((n for n in range(1, groups) if groups % n == 0 and I // n * 4 <= NEAR and groups // n > 1), 1)
        self.sizes = [m.scales.shape[1] for m in linears]
        self.scale_dtype = linears[0].scales.dtype
        self.rounded = rounded      # many rows in bfloat16

        def stored(make, dtype, *J):        # [O, I/g, *J] of each linear -> [parts, all O, I/g/parts, *J]
            out = huge((parts, sum(self.sizes), groups // parts, *J), dtype)
            for linear, place in zip(linears, out.split(self.sizes, dim=1)):
                place.copy_(make(linear).unflatten(1, (parts, -1)).transpose(0, 1))
            return out

        words = stored(lambda m: packed_words(m.qweight, groups, compiled.loop), torch.int32, I // groups // 8)
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("scales", stored(lambda m: m.scales.T, torch.float32), persistent=False)
        self.register_buffer("zeros", stored(lambda m: unpack(m.qzeros).T, torch.float32), persistent=False)
        bias = None if linears[0].bias is None else torch.cat([m.bias for m in linears])
        self.register_buffer("bias", bias, persistent=False)
        # Views of all linears together, and of each. Made once, which saves 40 us a layer.
        both = self.words.view(torch.float32), self.scales, self.zeros
        self.whole = list(zip(*both))
        self.of = [list(zip(*split)) for split in zip(*(t.split(self.sizes, dim=1) for t in both))]

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply float[..., I] -> float32[..., all O]; many rows in `memory`, float32[n O] or more, if given."""
        return self.multiply(x, self.whole, self.bias, memory)

    def part(self, x: torch.Tensor, at: int) -> torch.Tensor:
        """Multiply float[..., I] -> float32[..., O] by linear number `at`."""
        bias = None if self.bias is None else self.bias.split(self.sizes)[at]
        return self.multiply(x, self.of[at], bias)

    def multiply(self, x: torch.Tensor, parts: list[tuple], bias: torch.Tensor | None,
                 memory: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply float[..., I] -> float32[..., O]. parts: words, scales and zeros of each stretch of inputs."""
        if x.device.type != "cpu" or self.scales.dtype != torch.float32:
            raise InputError(f"these int4 weights are laid out for float32 on the CPU, not for {self.scales.dtype} on "
                             f"{x.device.type}; load the model again with device= and dtype= instead of moving it")
        refuse_gradients(x, "compiled int4")
        rows = x.reshape(-1, x.shape[-1]).float()                           # (n, I)
        inputs = rows.chunk(len(parts), dim=1)
        if len(rows) <= FEW:
            found = [few(one.contiguous(), part) for one, part in zip(inputs, parts)]
            y = sum(found[1:], found[0])                                    # (n, O)
        else:
            n, O = len(rows), parts[0][0].shape[0]
            y = (torch.empty(n * O) if memory is None else memory[:n * O]).view(n, O)
            for i, (one, part) in enumerate(zip(inputs, parts)):
                self.many(one, *part, y, first=not i)
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], -1)

    def many(self, x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, y: torch.Tensor,
             first: bool) -> None:
        """Write x @ W into y if this is the first stretch of inputs, else add it."""
        _, groups, J = words.shape
        I = x.shape[1]
        dtype = torch.bfloat16 if self.rounded else torch.float32
        product = F.linear if self.rounded else machine.products()[0]
        x = x.to(dtype).contiguous()
        step = max(8, BLOCK // I // 8 * 8)                                  # outputs at a time
        memory = scratch(max(BLOCK, 8 * I), dtype)
        for block in zip(words.split(step), scales.split(step), zeros.split(step), y.split(step, dim=1)):
            W = memory[:len(block[0]) * I].view(-1, groups, 8, J)
            compiled.loop(dequantize, J, dtype)((*block[:3], SHIFTS, W))
            found = product(x, W.view(-1, I))                               # (n, step)
            block[3].copy_(found) if first else block[3].add_(found)

    def released(self, at: int) -> dict[str, torch.Tensor]:
        """Collect the tensors of linear number `at` under their released names."""
        words, scales, zeros = ([t.cpu() for t in split] for split in zip(*self.of[at]))
        q = torch.cat([numbers(part.contiguous().view(torch.int32)) for part in words])                 # (I, O)
        found = {"qweight": released(q), "qzeros": released(torch.cat(zeros, dim=1).T),
                 "scales": torch.cat(scales, dim=1).T.to(self.scale_dtype).contiguous()}
        return found if self.bias is None else {**found, "bias": self.bias.split(self.sizes)[at].clone()}


def few(x: torch.Tensor, part: tuple) -> torch.Tensor:
    """Multiply x float32[n, I] @ W -> float32[n, O] by the compiled loop, ROWS rows at a time.

    part: words, scales, zeros.
    """
    J = part[0].shape[2]
    if len(x) == 1:
        return compiled.loop(few_rows, 1, J)((x, *part))
    y = [compiled.loop(few_rows, ROWS, J)((F.pad(rows, (0, 0, 0, ROWS - len(rows))).contiguous(), *part))
         for rows in x.split(ROWS)]
    return torch.cat(y)[:len(x)]


class OpWords(nn.Module):
    """AWQLinears of one input, rounded to bfloat16, by torch's own int4 product. Needs no C++ compiler.

    That product rounds x, the scales s and (8 - z) s to bfloat16, about three decimal digits, and sums in float32. On a
    GPU it is made for few rows; for more, the words are unpacked and multiplied, so they are kept beside its layout.
    """

    def __init__(self, *linears: AWQLinear):
        super().__init__()
        self.sizes = [m.scales.shape[1] for m in linears]
        self.group = linears[0].qweight.shape[0] // linears[0].scales.shape[0]

        def keep(name: str, tensor: torch.Tensor | None) -> None:
            self.register_buffer(name, tensor, persistent=False)

        keep("qzeros", torch.cat([m.qzeros for m in linears], dim=1))
        keep("scales", torch.cat([m.scales for m in linears], dim=1))
        keep("bias", None if linears[0].bias is None else torch.cat([m.bias for m in linears]))
        scales = self.scales.float()
        both = torch.stack([scales, (8 - unpack(self.qzeros).float()) * scales], dim=-1).bfloat16()
        # The product computes (q - 8) * scale + zero.
        keep("both", both)                                                  # (I/g, O, 2): scale and zero
        if self.qzeros.is_cuda:
            keep("qweight", torch.cat([m.qweight for m in linears], dim=1))
            q = unpack(self.qweight).T.contiguous()                         # (O, I)
            keep("packed", torch._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8))
        else:
            if len(linears) == 1:
                q = rows_of_numbers(linears[0].qweight)                     # (O, I)
            else:       # copies: each call uses the same memory
                q = torch.cat([rows_of_numbers(m.qweight).clone() for m in linears])
            # A layout for this very CPU: never saved.
            keep("packed", torch._convert_weight_to_int4pack_for_cpu(q, 1))

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply float[..., I] -> [..., all O] in x's dtype. `memory` is for Words."""
        refuse_gradients(x, "torch's int4 product")
        rows = x.reshape(-1, x.shape[-1])
        if x.is_cuda and len(rows) > FEW_ON_GPU:
            unpacked = on_gpu(spread, *self.qweight.shape, len(self.scales))
            W = unpacked(self.qweight, self.qzeros, self.scales, x.dtype)                       # (I, O)
            y = F.linear(rows, W.T, self.bias)                                                  # (n, O)
        else:
            y = self.product(rows.bfloat16().contiguous()).to(x.dtype)
            y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply bfloat16[n, I] -> bfloat16[n, all O], without the bias."""
        op = torch._weight_int4pack_mm if rows.is_cuda else torch._weight_int4pack_mm_for_cpu
        return op(rows, self.packed, self.group, self.both)

    def part(self, x: torch.Tensor, at: int) -> torch.Tensor:
        """Multiply float[..., I] -> [..., O] by linear number `at`."""
        return self(x).split(self.sizes, dim=-1)[at].contiguous()

    def released(self, at: int) -> dict[str, torch.Tensor]:
        """Collect the tensors of linear number `at` under their released names."""
        words = [size // 8 for size in self.sizes]
        qweight = self.qweight if self.qzeros.is_cuda else released(self.numbers())
        found = {"qweight": qweight.split(words, 1)[at], "qzeros": self.qzeros.split(words, 1)[at],
                 "scales": self.scales.split(self.sizes, 1)[at]}
        if self.bias is not None:
            found["bias"] = self.bias.split(self.sizes)[at]
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}

    def numbers(self) -> torch.Tensor:
        """Read the int4 numbers uint8[I, O] back out of the product's own layout, by multiplying the unit matrix."""
        I = self.both.shape[0] * self.group
        rows = torch.eye(I, dtype=torch.bfloat16).split(256)
        W = torch.cat([self.product(some).float() for some in rows]).view(-1, self.group, self.both.shape[1])
        scale, zero = self.both.float()[:, None].unbind(-1)                 # each (I/g, 1, O)
        # |q - 8| <= 8 and three roundings of 2^-9 each: far less than half a step off. A scale of 0 hides q.
        q = torch.where(scale == 0, 8, ((W - zero) / scale).round() + 8)
        return q.clamp(0, 15).to(torch.uint8).view(I, -1)


def spread(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Compute what awq.dequantize does, bit for bit, without a loop -> dtype[I, O]. A compiler makes one pass of it."""
    I, groups = qweight.shape[0], scales.shape[0]
    column = torch.arange(8, device=qweight.device, dtype=torch.int32)
    shift = column // 2 * 4 + column % 2 * 16                               # where a word holds its eight columns
    q = qweight.view(groups, I // groups, -1, 1) >> shift & 0xF             # (I/g, g, O/8, 8)
    z = qzeros.view(groups, 1, -1, 1) >> shift & 0xF                        # (I/g, 1, O/8, 8)
    s = scales.view(groups, 1, -1, 8)
    return ((q - z).float() * s.float()).to(dtype).view(I, -1)              # (I, O)


@cache
def on_gpu(function: FunctionType, *sizes: int) -> Callable:
    """Compile a function for the GPU by torch's compiler, once for these sizes; without Triton it runs as it is.

    For these sizes only, because with sizes left open `spread` takes five times as long. Each gets a code object of its
    own: torch counts how often one was compiled, and after eight times runs it uncompiled.
    """
    try:
        import triton  # noqa: F401
    except ImportError:
        return function
    compiled.hush()
    code = function.__code__.replace(co_name=f"{function.__name__}_{'_'.join(map(str, sizes))}")
    return torch.compile(FunctionType(code, function.__globals__), dynamic=not sizes)


class Int4(Moved, AWQLinear):
    """An AWQLinear whose words lie in a store, perhaps beside those of its neighbours."""

    def released(self, name: str) -> torch.Tensor | None:
        """Put all tensors back and return one."""
        store, at = self.__dict__.pop("store"), self.__dict__.pop("at")
        self._modules.pop("words", None)
        told_apart(self, AWQLinear, {"bias": None, **store.released(at)})
        return getattr(self, name)

    qweight = property(lambda self: self.released("qweight"))
    qzeros = property(lambda self: self.released("qzeros"))
    scales = property(lambda self: self.released("scales"))
    bias = property(lambda self: None if self.store.bias is None else self.released("bias"))

    @stands_for(*INT4)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.store.part(x, self.at)


def pack(store: nn.Module, linears: Sequence[AWQLinear]) -> nn.Module:
    """Leave the words of AWQLinears to the store that was made of them. Returns the store."""
    for at, linear in enumerate(linears):
        for name in ("qweight", "qzeros", "scales", "bias"):
            linear._buffers.pop(name)
        linear.__class__ = Int4
        linear.__dict__.update(store=store, at=at)      # not as a child: it is one of the module that reads all of it
    return store


def together(store: nn.Module, parts: Sequence[nn.Module]) -> bool:
    """Say whether one product may stand for those of all parts: all in the store, none watched or changed."""
    return all(type(part) is Int4 and part.store is store and untouched(part) for part in parts)


# ---- the decoder ----------------------------------------------------------------------------------------------------

class FastAttention(qwen2.Attention):
    """qwen2.Attention with q, k and v from one product, by the store `side_by_side`."""

    @stands_for((qwen2.Attention, "qkv"), *INT4)
    def qkv(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        parts = self.q_proj, self.k_proj, self.v_proj
        if not together(self.side_by_side, parts):
            return super().qkv(x)
        y = self.side_by_side(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)         # (B, H + 2K, T, E)
        return y.split([size // self.head_dim for size in self.side_by_side.sizes], dim=1)

    @stands_for((qwen2.Attention, "rotated"), (qwen2, "rotate"))
    def rotated(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Sequence[torch.Tensor]:
        H, K = q.shape[1], k.shape[1]
        follows = q.data_ptr() + H * q.stride(1) * q.element_size() == k.data_ptr() and q.stride() == k.stride()
        if not follows:
            return super().rotated(q, k, cos, sin)
        # They still lie side by side, as one product wrote them, so both are turned together in half as many calls.
        both = q.as_strided((q.shape[0], H + K, *q.shape[2:]), q.stride())
        turn = on_gpu(qwen2.rotate) if q.is_cuda else qwen2.rotate         # on a GPU, one call instead of five
        return turn(both, cos, sin).split([H, K], dim=1)


# What both decoders have under names of their own: the same faster version, made for each.

def mlp_of(definition: type, gate: str, up: str) -> type:
    """Make an MLP with gate and up from one product, and the rows of a long prompt in pieces."""
    class FastMLP(definition):
        @stands_for((definition, "gate_up"), *INT4)
        def gate_up(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
            if not together(self.side_by_side, (getattr(self, gate), getattr(self, up))):
                return super().gate_up(x)
            rows = x[..., 0].numel()
            memory = None
            if not x.is_cuda and FEW < rows <= 2 * PIECE:
                # Fresh memory for this, the widest tensor of all, would cost more than computing its numbers.
                memory = scratch(2 * PIECE * sum(self.side_by_side.sizes), torch.float32, 1)
            return self.side_by_side(x, memory).chunk(2, dim=-1)

        @stands_for((definition, "gated"))
        def gated(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.gate_up(x)
            if torch.is_grad_enabled() or type(getattr(self, gate)) is not Int4:
                return F.silu(first) * second
            return F.silu(first, inplace=True).mul_(second)     # in place: nobody else has them

        @stands_for((definition, "forward"))
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.is_cuda or x[..., 0].numel() <= FEW:
                return super().forward(x)
            return by_pieces(super().forward, x)

    return FastMLP


def norm_of(definition: type) -> type:
    """Make an RMSNorm of one call; in float32 equal up to the order of additions."""
    class FastNorm(definition):
        @stands_for((definition, "forward"))
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    return FastNorm


def attend_of(definition: type) -> type:
    """Make an Attend that reads a prompt head by head, QUERIES queries at a time with the keys that they may see."""
    class PromptByHead(definition):
        @stands_for((definition, "forward"))
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                    mask: torch.Tensor | None) -> torch.Tensor:
            (B, H, T, E), K, product = q.shape, k.shape[1], machine.products()[0]
            if mask is not None or T < QUERIES or product is not onednn:
                return super().forward(q, k, v, mask)
            later = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
            y = torch.empty(B, H, T, E)
            for b in range(B):
                for h in range(H):
                    if h % (H // K) == 0:       # the next kv head
                        keys, values = (t[b, h * K // H].contiguous() for t in (k, v))              # 2 x (T, E)
                    for start in range(0, T, QUERIES):
                        end = min(start + QUERIES, T)
                        n = end - start
                        shares = product(q[b, h, start:end] * E ** -0.5, keys[:end])                # (n, end)
                        shares[:, start:].masked_fill_(later[:n, :n], -math.inf)
                        y[b, h, start:end] = product(torch.softmax(shares, -1, out=shares), values[:end].T)
            return y

    return PromptByHead


FastMLP = mlp_of(qwen2.MLP, "gate_proj", "up_proj")
FastFeedForward = mlp_of(internlm2.FeedForward, "w1", "w3")
# Module -> its faster version, and the linears of the same input that it puts into one store. InternLM2's wqkv is one.
SIDE_BY_SIDE = {qwen2.Attention: (FastAttention, ("q_proj", "k_proj", "v_proj")),
                qwen2.MLP: (FastMLP, ("gate_proj", "up_proj")),
                internlm2.FeedForward: (FastFeedForward, ("w1", "w3"))}
NORMS = {definition: norm_of(definition) for definition in (qwen2.RMSNorm, internlm2.RMSNorm)}
ATTENDS = {definition: attend_of(definition) for definition in (qwen2.Attend, internlm2.Attend)}


# ---- the tower ------------------------------------------------------------------------------------------------------

class HeadByHead(vit.Attend):
    """vit.Attend, one head after the other, by the faster product: 355 ms a tile.

    torch's fused attention goes through MKL and takes 580.
    """

    @stands_for((vit.Attend, "forward"))
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:       # (N, H, 1+P, E)
        product, y, shape = machine.products()[0], [], q.shape
        q, k, v = (t.contiguous().flatten(0, 1) for t in (q, k, v))         # (N H, 1+P, E): each head in one piece
        for one_q, one_k, one_v in zip(q, k, v):
            shares = product(one_q * shape[-1] ** -0.5, one_k)              # (1+P, 1+P)
            y.append(product(torch.softmax(shares, -1, out=shares), one_v.T))       # (1+P, E)
        return torch.stack(y).view(shape)


class GeluInside(vit.MLP):
    """vit.MLP whose exact GELU is taken while a product's result is still in the cache, which saves 100 ms a tile."""

    @stands_for((vit.MLP, "widened"), (nn.Linear, "forward"))
    def widened(self, x: torch.Tensor) -> torch.Tensor:
        if type(self.fc1) is not Linear or not untouched(self.fc1):
            return super().widened(x)
        refuse_gradients(x, "this linear")
        return by_pieces(partial(self.fc1.product, activation="gelu"), x).to(x.dtype)

    @stands_for((vit.MLP, "forward"))
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return by_pieces(super().forward, x)
