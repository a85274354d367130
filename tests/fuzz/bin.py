"""Altered pytorch_model.bin: any byte, the opcodes of its pickle, the fields of its zip."""
import functools
import io
import pickletools
import random
import struct
import zipfile
import zlib

from fuzz import bytes as any_bytes
from fuzz import seeds

# The parts of a zip as torch writes them, and what may be altered in each (all but the signature).
PARTS = {"local": struct.Struct("<4sHHHHHIIIHH"), "after": struct.Struct("<4sIII"),
         "line": struct.Struct("<4sHHHHHHIIIHHHHHII"), "zip64 end": struct.Struct("<4sQHHIIQQQQ"),
         "locator": struct.Struct("<4sIQI"), "end": struct.Struct("<4sHHHHIIH")}
NUMBERS = (0, 1, 2, 7, 8, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
NAMES = (b"os\nsystem\n", b"builtins\neval\n", b"torch\nload\n", b"torch._utils\n_rebuild_sparse_tensor\n",
         b"torch._utils\n_rebuild_tensor_v2\n", b"torch._utils\n_rebuild_parameter\n", b"collections\nOrderedDict\n",
         b"torch\nFloatStorage\n", b"torch\nLongStorage\n", b"torch\nByteStorage\n", b"torch.storage\nUntypedStorage\n")
OPCODES = (*(bytes([code]) for code in b"(.0125NQRabdeost)]}lu\x85\x86\x87\x88\x89\x81\x92\x93\x94\x8f\x90\x91"),
           *(b"c" + name for name in NAMES), b"ios\nsystem\n", b"h\0", b"h\1", b"j\5\0\0\0", b"q\0", b"r\0\1\0\0",
           b"p0\n", b"g0\n", b"\x80\2", b"\x80\4", b"K\0", b"K\1", b"M\1\1", b"J\xff\xff\xff\xff", b"J\0\0\0\x7f",
           b"\x8a\1\xff", b"\x8a\x08" + b"\x7f" * 8, b"\x8a\xff", b"\x8b\xff\xff\xff\x7f", b"I01\n", b"L9L\n", b"F1\n",
           b"G" + b"\x7f\xf8" + b"\0" * 6, b"X\1\0\0\0a", b"X\xff\xff\xff\x7f", b"X\4\0\0\0\xff\xfe\xed\xa0",
           b"S'a'\n", b"T\1\0\0\0a", b"U\1a", b"Va\n", b"\x8c\1a", b"B\1\0\0\0a", b"C\1a", b"\x82\1", b"\x84\1\0\0\0",
           b"P1\n", b"\x95" + b"\xff" * 8)


def cases(seed, n):
    """Alter by turns any byte (half of the time in the pickle, which comes first), opcodes, and fields of the zip."""
    rng = random.Random(seed)
    blind = any_bytes.cases(seed, n, [seeds.bin()], 20_000)
    for _ in range(n):
        kind = rng.choice((None, opcodes, opcodes, zips))
        yield kind(rng, unzipped(seeds.bin())) if kind else next(blind)


def opcodes(rng, records):
    """Alter one to three opcodes; half of the time, number the memo anew, so that it is not the first to be wrong."""
    operations = list(split(dict(records)["data.pkl"]))
    names = set()
    for _ in range(rng.choice((1, 1, 2, 3))):
        operations = operations or [b"."]       # after a cut at 0
        place = rng.randrange(min(len(operations), rng.choice((60, 10**6, 10**6))))
        other = rng.randrange(len(operations))
        change = rng.choice(("delete", "repeat", "replace", "insert", "swap", "copy", "argument", "argument", "tower",
                             "nest", "cut"))
        names.add(change)
        if change == "delete":
            del operations[place:place + rng.choice((1, 1, 2, 5))]
        elif change == "repeat":
            operations[place:place] = operations[place:place + rng.choice((1, 2, 20))]
        elif change == "replace":
            operations[place:place + 1] = [rng.choice(OPCODES)]
        elif change == "insert":
            operations.insert(place, rng.choice(OPCODES))
        elif change == "swap":
            operations[place:place + 1], operations[other:other + 1] = (operations[other:other + 1],
                                                                        operations[place:place + 1])
        elif change == "copy":
            operations[place:place] = operations[other:other + rng.randrange(1, 40)]
        elif change == "argument":
            operations[place] = argument(rng, operations[place])
        elif change == "tower":
            operations[place:place] = tower(rng.choice(("put twice", "proto between", "plain")))
        elif change == "nest":
            opened, closed = rng.choice(((b")", b"\x85"), (b"}", b""), (b"(", b"t"), (b"]", b"a"), (b"h\0", b"R")))
            operations[place:place] = [opened * 5000 + closed * 5000]
        elif change == "cut":
            del operations[place:]
    pickle = b"".join(numbered(operations) if rng.random() < 0.5 else operations)
    return f"opcodes {' '.join(sorted(names))}", zipped([(n, pickle if n == "data.pkl" else d) for n, d in records])


def zips(rng, records):
    """Alter the structure of the zip: one or two fields, or the records, or what is around them."""
    change = rng.choice(("field", "field", "field", "order", "name", "twice", "without", "before", "after", "both",
                         "compressed", "size", "folder"))
    place = rng.randrange(len(records))
    name, data = records[place]
    if change == "field":
        altered = {}
        for _ in range(rng.choice((1, 1, 2))):
            part = rng.choice(list(PARTS))
            field = rng.randrange(1, len(PARTS[part].unpack(b"\0" * PARTS[part].size)))
            number = rng.choice((place, rng.randrange(3)))
            altered[part, number if part in ("local", "after", "line") else 0, field] = rng.choice(NUMBERS)
        return f"zip {sorted({part for part, *_ in altered})} field", zipped(records, altered)
    if change == "order":
        rng.shuffle(records)
    elif change == "name":
        records[place] = rng.choice(("data.pkl", "data/0", "data/00", "../x", "", "code/x.py", "byteorder")), data
    elif change == "twice":
        records.insert(rng.randrange(len(records)), (name, rng.choice((data, b"other", b""))))
    elif change == "without":
        del records[place]
    elif change == "size":
        records[place] = name, rng.choice((data + b"\0", data[:-1], data * 2, b""))
    whole = zipped(records, folder=rng.choice(("archive", "a", "", "\u6a21")) if change == "folder" else "archive")
    if change == "compressed":
        whole = deflated(records)
    elif change in ("before", "after", "both"):
        piece = rng.choice((b"\0", b"x" * 100, whole, whole[-98:], whole[-22:], b"PK\5\6" + b"\0" * 18))
        whole = piece * (change != "after") + whole + piece * (change != "before")
    return f"zip {change}", whole


def argument(rng, operation):
    """Alter the argument of an opcode, as far as it has one."""
    code = operation[:1]
    if code and code in b"KMJhqjr":
        return code + (rng.choice(NUMBERS) % 2**(8 * len(operation) - 8)).to_bytes(len(operation) - 1, "little")
    if code == b"c":
        return code + rng.choice(NAMES)
    if code == b"X":
        text = rng.choice((b"", b"storage", b"0", b"1", b"meta", b"\xff\xfe", b"a" * 70_000, operation[5:] + b"x"))
        return code + len(text).to_bytes(4, "little") + text
    return operation


def tower(kind, height=60, first=200):
    """Build a tuple of twice the one below, of twice ...: hashing it would take 2^60 steps."""
    between = {"plain": b"", "proto between": b"\x80\2", "put twice": b"q\xff"}[kind]
    return [b"K\1K\1\x86", between, b"q" + bytes([first])] + [part for _ in range(height) for part in (
        b"h" + bytes([first]), b"h" + bytes([first]), b"\x86", between, b"q" + bytes([first]))]


def split(pickle):
    """Cut a pickle into its opcodes, each with its argument."""
    starts = [place for *_, place in pickletools.genops(pickle)] + [len(pickle)]
    return [pickle[a:b] for a, b in zip(starts, starts[1:])]


def numbered(operations):
    """Number what the memo takes from 0 on, and what is taken from it likewise."""
    new = {}
    for operation in operations:
        code, index = operation[:1], int.from_bytes(operation[1:], "little")
        if code in b"qr" and code:
            new[index] = len(new) if index not in new else new[index]
            operation = b"q" + bytes([new[index]]) if new[index] < 256 else b"r" + new[index].to_bytes(4, "little")
        elif code in b"hj" and code:
            index = new.get(index, index) % 2**32
            operation = b"h" + bytes([index]) if index < 256 else b"j" + index.to_bytes(4, "little")
        yield operation


@functools.lru_cache(4)
def _records(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name.partition("/")[2], archive.read(name)) for name in archive.namelist()]


def unzipped(data):
    """List the records of a zip: (name without its folder, bytes)."""
    return list(_records(data))


_crc = functools.lru_cache(4096)(zlib.crc32)


def zipped(records, altered=None, folder="archive"):
    """Write a zip as torch.save does. `altered`: (part, number of the record, field) -> another value."""
    def packed(part, number, *values):
        values = list(values)
        for (where, which, field), value in (altered or {}).items():
            if (where, which) == (part, number):
                size = PARTS[part].unpack(b"\xff" * PARTS[part].size)[field]    # the largest value
                values[field] = value & size
        return PARTS[part].pack(*values)

    out, lines = bytearray(), bytearray()
    for number, (name, data) in enumerate(records):
        name = f"{folder}/{name}".encode()
        flags, crc, size, at = 0x808 if data else 0x800, _crc(data), len(data), len(out)
        padding = -(at + 30 + len(name) + 4) % 64
        out += packed("local", number, b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(name), 4 + padding) + name
        out += b"FB" + padding.to_bytes(2, "little") + b"Z" * padding + data
        if data:
            out += packed("after", number, b"PK\7\10", crc, size, size)
        lines += packed("line", number, b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, size, size, len(name), 0, 0, 0, 0, 0, at)
        lines += name
    at, size, count = len(out), len(lines), len(records)
    out += lines + packed("zip64 end", 0, b"PK\6\6", 44, 0x31E, 45, 0, 0, count, count, size, at)
    out += packed("locator", 0, b"PK\6\7", 0, at + size, 1)
    return bytes(out + packed("end", 0, b"PK\5\6", 0, 0, count, count, size, at, 0))


def deflated(records):
    """Write a zip of compressed records, as other tools do."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records:
            archive.writestr(f"archive/{name}", data)
    return out.getvalue()
