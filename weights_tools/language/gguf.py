"""Read a GGUF file, the format of llama.cpp: facts about the model and its tokenizer, and tensors, often in 4 bits.

    "GGUF", version, how many tensors, how many facts    u32 and u64, all numbers little-endian
    fact:    its key (u64 length, UTF-8), u32 kind, value       a list: u32 kind, u64 length, the values
    tensor:  name, u32 number of sizes, each a u64, the one that runs fastest first; u32 type, u64 where it begins
    zeros up to a multiple of the alignment, then the tensors in that order, each begun at such a multiple

    type    block    bytes    value
    F32         1        4    float32
    F16         1        2    float16
    Q4_1       32       20    q * d + m    float16 d and m, 16 bytes: the low halves are q 0..15, the high ones 16..31
    Q8_0       32       34    q * d        float16 d, 32 signed bytes

The file carries no checksum: an altered weight cannot be seen, any other damage is refused.
Source: ggml docs/gguf.md; src/ggml-common.h (block_q4_1, block_q8_0), src/ggml-quants.c (dequantize_row_*).
"""
from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch

from minivl.limits import InputError, clip

VERSIONS = (2, 3)           # 1 had lengths of 32 bits; 3 differs from 2 in big-endian files, which are refused
TEXT, LIST = 8, 9           # of the kinds of a value; the others are numbers, in the letters of `struct`
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MAX_SIZES = 4               # GGML_MAX_DIMS
TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
         12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 30: "BF16"}
BLOCKS = {"F32": (1, 4), "F16": (1, 2), "Q4_1": (32, 20), "Q8_0": (32, 34)}     # those read -> values, bytes


@dataclass(frozen=True)
class GGUF:
    """What a file holds: facts by their keys; of each tensor its type and bytes, and its shape, slowest size first."""
    facts: dict[str, object]
    shapes: dict[str, tuple[int, ...]]
    stored: dict[str, tuple[str, memoryview]]

    def tensor(self, name: str) -> torch.Tensor:
        """Dequantise one tensor: float32, of its shape."""
        return dequantised(*self.stored[name]).view(self.shapes[name])


def dequantised(kind: str, data: bytes | memoryview) -> torch.Tensor:
    """Compute the values of blocks of the type `kind`, one of BLOCKS: float32[values]."""
    if not len(data):
        return torch.zeros(0)
    data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if kind == "F32":
        return data.view(torch.float32)
    if kind == "F16":
        return data.view(torch.float16).float()
    blocks = data.view(-1, BLOCKS[kind][1])                                             # (blocks, bytes)
    d = blocks[:, :2].contiguous().view(torch.float16).float()                          # (blocks, 1)
    if kind == "Q8_0":
        return (blocks[:, 2:].contiguous().view(torch.int8) * d).flatten()
    m = blocks[:, 2:4].contiguous().view(torch.float16).float()                         # (blocks, 1)
    q = torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], dim=1)                      # (blocks, 32)
    return (q * d + m).flatten()


def read_gguf(data: bytes, name: str) -> GGUF:
    """Read a whole file. `name`: what errors call it. Raises InputError for what is cut, altered or not known."""
    try:
        return _read(_Cursor(data))
    except InputError as problem:
        raise InputError(f"{name} {problem}") from None


def _read(cursor: _Cursor) -> GGUF:
    """Read a file. Its errors go on after the name of the file."""
    if cursor.take(4, "its first word") != b"GGUF":
        raise InputError("is no GGUF file, its first four bytes are not GGUF; give the file that holds the model")
    version = cursor.number("I", "its version")
    if version not in VERSIONS:
        raise InputError(f"is of GGUF version {version}, read are {VERSIONS[0]} and {VERSIONS[1]}, little-endian; "
                         "convert it with a current llama.cpp")
    tensors = cursor.number("Q", "the number of tensors")
    facts = {}
    for _ in range(cursor.number("Q", "the number of facts")):
        key = cursor.text("a key")
        if key in facts:
            raise InputError(f"is damaged: it has {clip(key, 60)} twice; download it again")
        facts[key] = cursor.value(cursor.number("I", key), key)
    alignment = facts.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"is damaged: its alignment {clip(alignment, 60)} is no power of two; download it again")
    listed = {}
    for i in range(tensors):
        name = cursor.text(f"the name of tensor {i}")
        if name in listed:
            raise InputError(f"is damaged: it lists the tensor {clip(name, 60)} twice; download it again")
        listed[name] = _listed(cursor, name)
    return _with_bytes(cursor, facts, listed, alignment)


def _listed(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], str, int, int]:
    """Read what stands of a tensor in the list: shape, type, number of bytes, where it begins."""
    shown = clip(name, 60)
    count = cursor.number("I", shown)
    if not 1 <= count <= MAX_SIZES:
        raise InputError(f"is damaged: {shown} has {count} sizes, 1 to {MAX_SIZES} are possible; download it again")
    shape = tuple(reversed([cursor.number("Q", shown) for _ in range(count)]))
    number = cursor.number("I", shown)
    kind = TYPES.get(number, f"number {number}")
    if kind not in BLOCKS:
        raise InputError(f"holds {shown} in the type {kind}, read are {', '.join(BLOCKS)}; give a file in these types")
    values, size = BLOCKS[kind]
    if shape[-1] % values:
        raise InputError(f"is damaged: rows of {shown} have {shape[-1]} values, {kind} stores blocks of {values}; "
                         "download it again")
    return shape, kind, math.prod(shape) // values * size, cursor.number("Q", shown)


def _with_bytes(cursor: _Cursor, facts: dict, listed: dict, alignment: int) -> GGUF:
    """Find the bytes of the listed tensors, which must lie one after the other up to the end of the file."""
    first = cursor.at + -cursor.at % alignment
    due = 0
    stored = {}
    for name, (_, kind, size, begin) in listed.items():
        if begin != due:
            raise InputError(f"is damaged: {clip(name, 60)} begins at byte {begin} of the tensors, those before it end "
                             f"at {due}; download it again")
        stored[name] = kind, memoryview(cursor.data)[first + begin:first + begin + size]
        if len(stored[name][1]) != size:
            raise InputError(f"is cut: {clip(name, 60)} needs {size} bytes, {len(stored[name][1])} are there; download "
                             "it again")
        end = first + begin + size
        due += size + -size % alignment
    # The last tensor may be padded as the others are.
    if listed and len(cursor.data) not in (end, first + due):
        raise InputError(f"is damaged: {len(cursor.data) - end} bytes follow its last tensor; download it again")
    return GGUF(facts, {name: shape for name, (shape, *_) in listed.items()}, stored)


class _Cursor:
    """Read bytes one after the other, and no further than there are any."""

    def __init__(self, data: bytes):
        self.data = data
        self.at = 0

    def take(self, size: int, what: str) -> bytes:
        """Read so many bytes."""
        left = len(self.data) - self.at
        if size > left:
            raise InputError(f"is cut or damaged: {clip(what, 60)} needs {size} bytes at byte {self.at}, {left} are "
                             "left; download it again")
        self.at += size
        return bytes(self.data[self.at - size:self.at])

    def number(self, letter: str, what: str):
        """Read one number, of a letter of `struct`."""
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))[0]

    def text(self, what: str) -> str:
        """Read a text with its length before it."""
        data = self.take(self.number("Q", what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"is damaged: {clip(what, 60)} is not UTF-8; download it again") from None

    def value(self, kind: int, what: str):
        """Read a value of this kind: number, text, or a list of either."""
        if kind == TEXT:
            return self.text(what)
        if kind in NUMBERS:
            return self.number(NUMBERS[kind], what)
        if kind != LIST:
            raise InputError(f"is damaged: {clip(what, 60)} is of kind {kind}, there are 0 to 12; download it again")
        inner = self.number("I", what)
        count = self.number("Q", what)
        if inner in NUMBERS:
            each = struct.calcsize(f"<{NUMBERS[inner]}")
            data = self.take(count * each, what)
            return list(struct.unpack(f"<{count}{NUMBERS[inner]}", data))
        if inner != TEXT:
            raise InputError(f"is damaged: {clip(what, 60)} is a list of kind {inner}, which is neither numbers nor "
                             "texts; download it again")
        return [self.text(what) for _ in range(count)]
