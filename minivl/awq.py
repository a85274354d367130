"""AWQ int4: what a released qweight holds, and the linear layer made of it.

I in features, O out features, g group size (128).  W[i, o] = (q[i, o] - z[i // g, o]) * s[i // g, o],  y = x @ W + b

    qweight int32[I, O/8]     q, eight 4-bit numbers 0..15 in each word
    qzeros  int32[I/g, O/8]   z, packed the same way
    scales  float16[I/g, O]   s  (bfloat16 in some re-quantised files)

A word holds eight neighbouring *output* columns, but not in their natural order. Drawn as hexadecimal digits,
highest bits left, the columns of the word are

    bit   31..28 27..24 23..20 19..16 15..12 11..8   7..4   3..0
    column    7      5      3      1      6      4      2      0        columns 0..7 = 0..7  ->  0x75316420

(even columns in the low half: one mask then yields the two neighbours 0 and 1 in the halves of a 32-bit register,
which is what the GPU kernels wanted.) Activation-awareness has left no trace to undo: AWQ's per-channel factors are
folded into these numbers and the norms before. There is no +1 on the zero points; that is GPTQ's convention.
Source: LMDeploy v0.6.4 lite/quantization/modules/linear.py:91-137, awq.py:323-353; AutoAWQ packing_utils.py @88e4c76b;
AWQ arXiv:2306.00978.
"""
import torch
import torch.nn.functional as F
from torch import nn

PACK_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)   # nibble i (bits 4i..4i+3) holds column PACK_ORDER[i]


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Unpack int32[..., O/8] into uint8[..., O]: numbers 0..15 in the natural order of columns.

    0x75316420 (1966171168) -> 0 1 2 3 4 5 6 7.
    """
    if packed.dtype != torch.int32:
        raise ValueError(f"packed words have dtype {packed.dtype}, the released format is int32")
    columns = torch.empty(*packed.shape, 8, dtype=torch.uint8, device=packed.device)    # (..., O/8, 8)
    for nibble, column in enumerate(PACK_ORDER):
        # Mask after the shift: int32 >> copies the sign bit in from the left.
        columns[..., column] = (packed >> 4 * nibble) & 0xF
    return columns.flatten(-2)                                                          # (..., O)


def pack(numbers: torch.Tensor) -> torch.Tensor:
    """Pack integers 0..15 [..., O] into int32[..., O/8]: the inverse of `unpack`."""
    if numbers.shape[-1] % 8:
        raise ValueError(f"{numbers.shape[-1]} columns cannot be packed, 8 go into a word; pad to a multiple of 8")
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) <= 15:
        raise ValueError(f"numbers span {int(numbers.min())}..{int(numbers.max())}, four bits hold 0..15")
    columns = numbers.to(torch.int32).unflatten(-1, (-1, 8))                            # (..., O/8, 8)
    packed = torch.zeros_like(columns[..., 0])                                          # (..., O/8)
    for nibble, column in enumerate(PACK_ORDER):
        packed |= columns[..., column] << 4 * nibble
    return packed


def dequantize(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor,
               dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Compute the weight `dtype`[I, O], orientation x @ W: transposed with respect to nn.Linear.weight.

    It is computed in float32 and rounded once at the end. For float16 that equals the float16 product bit by bit,
    because q - z is a small integer; for bfloat16 it saves the scale from losing 3 bits first.
    """
    I, O, groups = qweight.shape[0], 8 * qweight.shape[1], scales.shape[0]
    if groups == 0 or I % groups or scales.shape != (groups, O) or qzeros.shape != (groups, O // 8):
        raise ValueError(f"qweight {tuple(qweight.shape)} needs qzeros [I/g, {O // 8}] and scales [I/g, {O}] with I/g "
                         f"dividing {I}; got {tuple(qzeros.shape)} and {tuple(scales.shape)}")
    W = unpack(qweight).to(torch.float32).view(groups, I // groups, O)                  # (I/g, g, O)
    W -= unpack(qzeros)[:, None]                                                        # one z per group and column
    W *= scales[:, None]
    return W.view(I, O).to(dtype)                                                       # (I, O)


def matmul(x: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor,
           bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute x @ W + bias: float[..., I] -> float[..., O] in x's dtype.

    The weight exists in full only inside this call.
    """
    W = dequantize(qweight, qzeros, scales, x.dtype)        # (I, O)
    return F.linear(x, W.T, bias)                           # (..., O); in half precision rounded once, after the bias


class AWQLinear(nn.Module):
    """nn.Linear whose weight is held as released: buffers qweight, qzeros, scales and perhaps bias."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, group_size: int = 128):
        super().__init__()
        if in_features % group_size or out_features % 8:
            raise ValueError(f"AWQ linear {in_features} -> {out_features}: group size {group_size} must divide the in "
                             "features and 8 the out features")
        self.in_features = in_features
        self.out_features = out_features
        groups = in_features // group_size
        self.register_buffer("qweight", torch.empty(in_features, out_features // 8, dtype=torch.int32))
        self.register_buffer("qzeros", torch.empty(groups, out_features // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.empty(groups, out_features, dtype=torch.float16))
        self.register_buffer("bias", torch.empty(out_features) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return matmul(x, self.qweight, self.qzeros, self.scales, self.bias)
