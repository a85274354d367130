"""Alterations that know nothing of a file's kind: flipped bytes, numbers, cuts, repetitions, splices of two files."""
import random
import struct
from collections.abc import Iterator

NUMBERS = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63, 2**64 - 1)
TEXTS = (b'"', b"{", b"}", b"[[[[[[[[", b"null", b"-1", b"1e999", b"\\ud800", b"\xff\xfe", b"\0", b"9" * 40, b"../" * 9)


def cases(seed: int, n: int, files: list[bytes], head: int = 200) -> Iterator[tuple[str, bytes]]:
    """Alter `files`, each in one to eight places; half of the places lie in the first `head` bytes."""
    rng = random.Random(seed)
    for _ in range(n):
        data = bytearray(rng.choice(files))
        names = []
        for _ in range(rng.choice((1, 1, 2, 4, 8))):
            alter = rng.choice((flip, flip, number, number, text, cut, delete, repeat, splice, swap))
            names.append(alter.__name__)
            place = rng.randrange(min(len(data), rng.choice((head, 2**30))) or 1)
            alter(data, place, rng, files)
        yield f"bytes {' '.join(sorted(set(names)))}", bytes(data)


def flip(data, place, rng, files):
    """One byte becomes another."""
    data[place:place + 1] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))])


def number(data, place, rng, files):
    """A whole number, of 2, 4 or 8 bytes, replaces what is there."""
    kind, size = rng.choice((("H", 2), ("I", 4), ("Q", 8)))
    data[place:place + size] = struct.pack(rng.choice("<>") + kind, rng.choice(NUMBERS) % 2**(8 * size))


def text(data, place, rng, files):
    """A piece of text goes in, or replaces as much."""
    piece = rng.choice(TEXTS)
    data[place:place + rng.choice((0, len(piece)))] = piece


def cut(data, place, rng, files):
    """The file ends here, or a few bytes before its end."""
    del data[rng.choice((place, max(len(data) - rng.randrange(1, 99), 0))):]


def delete(data, place, rng, files):
    """Some bytes go."""
    del data[place:place + rng.choice((1, 2, 4, 8, 100, 10_000))]


def repeat(data, place, rng, files):
    """Some bytes come twice or many times."""
    size = rng.choice((1, 4, 16, 1000))
    data[place:place] = data[place:place + size] * rng.choice((1, 1, 3, 200))


def splice(data, place, rng, files):
    """Go on with another file, or with a piece of one."""
    other = rng.choice(files)
    start = rng.randrange(len(other))
    if rng.random() < 0.3:
        data[place:] = other[start:]
    else:
        data[place:place] = other[start:start + rng.choice((4, 64, 1000))]


def swap(data, place, rng, files):
    """Two pieces change places."""
    size = rng.choice((1, 4, 16, 64))
    other = rng.randrange(len(data) or 1)
    if abs(place - other) >= size:
        data[place:place + size], data[other:other + size] = data[other:other + size], data[place:place + size]
