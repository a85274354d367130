"""Int4 as loops a compiler likes: the same numbers as in `awq.py`, in another order.

    words           int32[O, I/g, J]    J = g/8 words for each output and group
                                        nibble n of word j: q of input  g*group + J*n + j
    scales, zeros   float32[O, I/g]

The inputs that a row of words meets thus lie side by side: eight shifts of 16 words meet 8 x 16 neighbouring inputs,
and the sum over a group stays in registers. One token reads every word once; that, not arithmetic, is what it costs.
The functions are plain torch and run as they are; `compiled.py` makes loops of them.
"""
from collections.abc import Callable

import torch

from minivl.awq import PACK_ORDER
from minivl.fast.machine import scratch

SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)      # of the eight 4-bit numbers in a word


def relayout(turned: torch.Tensor, shifts: torch.Tensor, out: torch.Tensor) -> None:
    """Re-lay released words, turned to [O/8, I/g, 8, J], into out [O/8, 8, I/g, J].

    A released word holds one input of eight neighbouring columns; a word of `out`, eight inputs of one column.
    shifts int32[8]: where a released word holds its eight columns. Words are given as float32, see few_rows.
    """
    q = turned.view(torch.int32)[:, None] >> shifts[:, None, None, None] & 0xF      # (O/8, 8, I/g, 8, J)
    word = q[:, :, :, 0]
    for n in range(1, 8):
        word = word | q[:, :, :, n] << 4 * n
    out.copy_(word.view(torch.float32))


def few_rows(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Multiply x float32[n, I] @ W -> float32[n, O] for small n, without ever holding W.

    `words` are given as float32, every bit kept: the compiler loads floats in one instruction, int32 in many.
    """
    n, (_, groups, J) = x.shape[0], words.shape
    words, x = words.view(torch.int32), x.view(n, groups, 8, J)
    lanes = x.sum(2)                                                        # (n, I/g, J): what zero points multiply
    q = [(words >> 4 * k & 0xF).float() for k in range(8)]                  # 8 x (O, I/g, J)
    y = []
    for row in range(n):
        # Two chains of fused multiply-adds: neither need wait for the other.
        one, two = q[0] * x[row, :, 0] - zeros[..., None] * lanes[row], q[4] * x[row, :, 4]
        for k in range(1, 4):
            one, two = one + q[k] * x[row, :, k], two + q[k + 4] * x[row, :, k + 4]
        y.append(((one + two) * scales[..., None]).sum((1, 2)))             # (O)
    return torch.stack(y)                                                   # (n, O)


def dequantize(words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, shifts: torch.Tensor,
               out: torch.Tensor) -> None:
    """Write W, transposed as in nn.Linear, to out float32 or bfloat16[O, I/g, 8, J]. shifts: 0, 4, ..., 28."""
    q = words.view(torch.int32)[:, :, None] >> shifts[:, None] & 0xF        # (O, I/g, 8, J)
    out.copy_((q.float() - zeros[..., None, None]) * scales[..., None, None])


def half_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply x float32[n, D] by weight float16 or bfloat16[V, D] -> float32[n, V], products and sums in float32."""
    weight = weight.float()
    return torch.stack([(weight * row).sum(-1) for row in x])


def turned(qweight: torch.Tensor) -> torch.Tensor:
    """Transpose released qweight int32[I, O/8] -> int32[O/8, I], in memory that the next call uses again."""
    I, columns = qweight.shape
    out = scratch(qweight.numel(), torch.int32, 1).view(columns, I)
    for rows in range(0, I, 128):                       # 128 at a time: twice as fast as all at once
        out[:, rows:rows + 128] = qweight[rows:rows + 128].T
    return out


def packed_words(qweight: torch.Tensor, groups: int, loop: Callable) -> torch.Tensor:
    """Re-lay released qweight int32[I, O/8] -> words int32[O, I/g, g/8], in memory that the next call uses again.

    loop: compiled.loop, which makes a loop of `relayout`.
    """
    I, columns = qweight.shape
    J = I // groups // 8
    out = scratch(qweight.numel(), torch.float32, 2).view(columns, 8, groups, J)
    place = [PACK_ORDER.index(column) for column in range(8)]
    released = turned(qweight).view(columns, groups, 8, J).view(torch.float32)
    loop(relayout, J)((released, SHIFTS[place], out))
    return out.view(torch.int32).flatten(0, 1)          # (O, I/g, J)


def numbers(words: torch.Tensor) -> torch.Tensor:
    """Read words int32[O, I/g, J] back -> the int4 numbers uint8[I, O], in the order of awq.unpack."""
    O, groups, J = words.shape
    q = words[:, :, None] >> SHIFTS[:, None] & 0xF      # (O, I/g, 8, J)
    return q.to(torch.uint8).view(O, groups * 8 * J).T.contiguous()


def released(q: torch.Tensor) -> torch.Tensor:
    """Pack numbers 0..15 [..., O] -> int32[..., O/8] in the released order, even if awq.PACK_ORDER was changed."""
    columns = q.to(torch.int32).unflatten(-1, (-1, 8))                      # (..., O/8, 8)
    packed = torch.zeros_like(columns[..., 0])
    for nibble, column in enumerate(PACK_ORDER):
        packed |= columns[..., column] << 4 * nibble
    return packed


def rows_of_numbers(qweight: torch.Tensor) -> torch.Tensor:
    """Unpack released qweight int32[I, O/8] -> numbers 0..15 int32[O, I], in memory that the next call uses again."""
    I, columns = qweight.shape
    words, shifted = turned(qweight), scratch(qweight.numel(), torch.int32, 0).view(columns, I)
    out = scratch(8 * qweight.numel(), torch.int32, 2).view(columns, 8, I)
    for nibble, column in enumerate(PACK_ORDER):
        torch.bitwise_right_shift(words, 4 * nibble, out=shifted)
        torch.bitwise_and(shifted, 0xF, out=out[:, column])
    return out.view(8 * columns, I)
