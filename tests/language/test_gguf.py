"""The reader of GGUF files against a slow definition of its types, and on files that are cut, altered or of others."""
import itertools
import random
import struct

import gguf_files as files
import pytest
import torch
from fuzz import bytes as alterations

from minivl import InputError
from weights_tools.language.gguf import BLOCKS, read_gguf

FACTS = {"a": 1, "b": -2.5, "c": True, "d": "tiger 🐅", "e": [1, 2], "f": ["x", ""], "general.alignment": 64}


def half(data, at):
    return struct.unpack_from("<e", data, at)[0]


def slow(kind, data):
    """The values of stored bytes, one after the other, by the table of formats."""
    if kind in ("F32", "F16"):
        letter, size = {"F32": ("f", 4), "F16": ("e", 2)}[kind]
        return [struct.unpack_from(f"<{letter}", data, at)[0] for at in range(0, len(data), size)]
    values = []
    for at in range(0, len(data), BLOCKS[kind][1]):
        d = half(data, at)
        if kind == "Q8_0":
            values += [d * struct.unpack_from("<b", data, at + 2 + i)[0] for i in range(32)]
        else:
            halves = [byte % 16 for byte in data[at + 4:at + 20]] + [byte // 16 for byte in data[at + 4:at + 20]]
            values += [q * d + half(data, at + 2) for q in halves]
    return values


def stored(kind, blocks, seed=0):
    """Random bytes of a type; the float16 numbers in them are small ones."""
    rng = random.Random(seed)
    data = bytearray(rng.randrange(256) for _ in range(blocks * BLOCKS[kind][1]))
    numbers = {"F32": 0, "F16": 1, "Q8_0": 1, "Q4_1": 2}[kind]
    for at in range(0, len(data), BLOCKS[kind][1]):
        data[at:at + 2 * numbers] = struct.pack(f"<{numbers}e", *[rng.uniform(-1, 1) for _ in range(numbers)])
        if kind == "F32":
            data[at:at + 4] = struct.pack("<f", rng.gauss(0, 1))
    return bytes(data)


def small():
    tensors = {"one": ("Q4_1", (3, 64), stored("Q4_1", 6)), "two": ("Q8_0", (2, 1, 32), stored("Q8_0", 2)),
               "three": ("F16", (5,), stored("F16", 5)), "four": ("F32", (7, 3), stored("F32", 21))}
    return files.gguf(FACTS, tensors, alignment=64), tensors


def test_every_type_against_a_slow_definition():
    data, tensors = small()
    read = read_gguf(data, "x")
    assert read.facts == FACTS and {kind for kind, *_ in tensors.values()} == {*BLOCKS}
    for name, (kind, shape, numbers) in tensors.items():
        got = read.tensor(name)
        assert got.dtype == torch.float32 and got.shape == shape == read.shapes[name]
        assert got.flatten().tolist() == torch.tensor(slow(kind, numbers)).tolist()     # both rounded to float32


@pytest.mark.parametrize("kind, given", [(0, 255), (1, -1), (2, 65535), (3, -2), (4, 2**32 - 1), (5, -3), (6, 0.5),
                                         (7, False), (10, 2**64 - 1), (11, -4), (12, 1e300)])
def test_every_kind_of_number(kind, given):
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.fact("n", given, kind)
    assert read_gguf(data, "x").facts == {"n": given}


def test_any_cut_is_refused():
    """But for the zeros after the last tensor, which some writers leave out."""
    data, tensors = small()
    end = len(data) - -len(tensors["four"][2]) % 64
    for size in range(len(data)):
        if size == end:
            assert read_gguf(data[:size], "x").tensor("four").shape == (7, 3)
            continue
        with pytest.raises(InputError, match="^x is (cut|no GGUF|damaged)"):
            read_gguf(data[:size], "x")


def test_altered_files_are_refused_or_read_whole():
    """No checksum tells of an altered weight, so what is read need only be as large as the file says."""
    data, _ = small()
    whole = 0
    for name, altered in alterations.cases(3, 300, [data]):
        try:
            read = read_gguf(altered, "x")
        except InputError:
            continue
        whole += 1
        for tensor in read.shapes:
            assert read.tensor(tensor).shape == read.shapes[tensor], name
        assert sum(len(numbers) for _, numbers in read.stored.values()) <= len(altered), name
    assert 20 < whole < 280


@pytest.mark.parametrize("number, name", [(2, "Q4_0"), (12, "Q4_K"), (14, "Q6_K"), (30, "BF16"), (77, "number 77")])
def test_other_types_are_refused_by_name(number, name):
    with pytest.raises(InputError, match=f"holds w in the type {name}, read are F32, F16, Q4_1, Q8_0"):
        read_gguf(files.gguf({}, {"w": (number, (32,), bytes(64))}), "x")


def two(begin=None, shape=(4,), version=3, names=("a", "b"), tail=b"", **facts):
    return files.gguf(facts, {name: ("F32", shape, bytes(16)) for name in names}, version=version, begin=begin) + tail


@pytest.mark.parametrize("data, words", [
    (two(tail=bytes(64)), "80 bytes follow its last tensor"),
    (two(begin=0), "b begins at byte 0 of the tensors, those before it end at 32"),
    (two(version=1), "of GGUF version 1, read are 2 and 3"),
    (two(version=3 << 24), "of GGUF version 50331648"),         # big-endian
    (two().replace(files.text("b"), files.text("a")), "lists the tensor a twice"),
    (two(shape=(1,) * 5), "a has 5 sizes"),
    (two(shape=()), "a has 0 sizes"),
    (two(shape=(2**40, 2**40)), "a needs 4835703278458516698824704 bytes"),
    (files.gguf({}, {"w": ("Q8_0", (16,), bytes(34))}), "rows of w have 16 values, Q8_0 stores blocks of 32"),
    (two(**{"general.alignment": 24}), "alignment 24 is no power of two"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * files.fact("k", 1), "has k twice"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.text("k") + struct.pack("<IIQ", 9, 9, 1), "a list of kind 9"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.text("k") + struct.pack("<IIQ", 9, 6, 2**60), "needs 46116860"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "a key needs 8 bytes"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"\xff" + bytes(4), "a key is not UTF-8"),
    (b"PK\3\4" + bytes(40), "is no GGUF file")])
def test_what_is_wrong_is_said(data, words):
    with pytest.raises(InputError, match=f"^a.gguf .*{words}.*; "):
        read_gguf(data, "a.gguf")


def test_no_order_of_types_matters():
    for kinds in itertools.permutations(BLOCKS):
        tensors = {kind: (kind, (64,), stored(kind, 64 // BLOCKS[kind][0], seed)) for seed, kind in enumerate(kinds)}
        read = read_gguf(files.gguf({}, tensors), "x")
        assert all(read.tensor(kind).tolist() == torch.tensor(slow(kind, tensors[kind][2])).tolist() for kind in kinds)
