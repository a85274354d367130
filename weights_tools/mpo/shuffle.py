"""The order in which the original trainer reads a file's rows: what numpy's default_rng(seed).shuffle does to a list.

    seed -> SeedSequence: 4 x 64 bits -> PCG64: 32 bits each time -> a number below n, without bias -> swap from the end

Source: numpy/random: bit_generator.pyx, src/pcg64, random_interval of src/distributions; PCG: O'Neill 2014,
HMC-CS-2014-0905. Used in InternVL internvl_chat/internvl/train/internvl_chat_mpo.py:291-303 @2410d1d.
"""
from __future__ import annotations

from collections.abc import Iterator

M32 = 2**32 - 1
M64 = 2**64 - 1
M128 = 2**128 - 1


def shuffle(items: list, seed: int):
    """Shuffle a list in place, at most 2**32 long, as numpy does from the same seed, an integer in 0..2**32 - 1."""
    bits = _pcg64(_seed_sequence(seed))
    for i in reversed(range(1, len(items))):
        j = _below(i + 1, bits)
        items[i], items[j] = items[j], items[i]


def _below(n: int, bits: Iterator[int]) -> int:
    """Draw a number in 0..n-1: as many bits as it can have; what is too large is drawn again."""
    mask = (1 << (n - 1).bit_length()) - 1
    return next(value for value in (word & mask for word in bits) if value < n)


def _pcg64(words: list[int]) -> Iterator[int]:
    """Yield 32 bits each time, of four seeds of 64 bits: each 128-bit state gives two."""
    start = words[0] << 64 | words[1]
    step = (words[2] << 64 | words[3]) << 1 & M128 | 1
    following = lambda state: (state * 0x2360ED051FC65DA44385DF649FCCF645 + step) & M128
    state = following(step + start)
    while True:
        state = following(state)
        folded = (state >> 64) ^ (state & M64)
        turn = state >> 122
        turned = (folded >> turn | folded << 64 - turn) & M64
        yield turned & M32
        yield turned >> 32


def _seed_sequence(seed: int) -> list[int]:
    """Mix a seed of 32 bits into four words of 64 bits."""
    factor = 0x43B0D7E5

    def scrambled(value: int, multiplier: int = 0x931E8875) -> int:
        nonlocal factor
        value ^= factor
        factor = factor * multiplier & M32
        value = value * factor & M32
        return value ^ value >> 16

    pool = [scrambled(value) for value in (seed, 0, 0, 0)]
    for source in range(4):
        for to in range(4):
            if source != to:
                mixed = (0xCA01F9DD * pool[to] - 0x4973F715 * scrambled(pool[source])) & M32
                pool[to] = mixed ^ mixed >> 16
    factor = 0x8B51F9DD
    halves = [scrambled(pool[i % 4], 0x58F38DED) for i in range(8)]
    return [halves[i] | halves[i + 1] << 32 for i in range(0, 8, 2)]
