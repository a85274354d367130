"""Altered model.safetensors: any byte, or the header's values, names, order and length."""
import json
import random

from fuzz import bytes as any_bytes
from fuzz import seeds

VALUES = (None, True, False, 0, 1, -1, 4, 2**31, 2**53, 2**63, 2**64, 10**30, 0.5, 1e300, "", "x", "F16", "F32", "BF16",
          "I32", "U8", "F4", "F8_E4M3", "\u6a21", [], {}, [0], [0, 4], [-1, 3], [True], [1.0], [[1]], ["1"], [2**62, 4],
          [0, 2**62, 2**62], [1] * 40, [4, 0], [0, 0], [0, 1, 2], {"0": 1, "1": 2})
TEXTS = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"01", b"9" * 5000, b'"\\ud800"', b'"\xff"', b'"\\u0000"',
         b"[" * 9000 + b"]" * 9000, b'{"a":' * 9000, b'[0, 4], "data_offsets": [0, 4]', b'[1], "shape": [2]',
         b'"F32", "dtype": "F16"', b"// x", b"\0", b"'F16'", b"[0, 4,]")


def cases(seed, n):
    """Alter by turns any byte, half of the time in the header, and what the header says."""
    rng = random.Random(seed)
    blind = any_bytes.cases(seed, n, [seeds.safetensors(), seeds.released()], 25_000)
    for _ in range(n):
        yield next(blind) if rng.random() < 0.4 else headers(rng, rng.choice((seeds.safetensors(), seeds.released())))


def headers(rng, data):
    """Alter the header: values, names, order; its text; its length."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    names = [name for name in header if name != "__metadata__"]
    changes = []
    mark = None
    for _ in range(rng.choice((1, 1, 1, 2))):
        change = rng.choice(("value", "value", "value", "text", "text", "text", "without", "rename", "swap", "metadata",
                             "dtype", "shape", "offsets", "key", "order"))
        changes.append(change)
        one, other = (header.setdefault(rng.choice(names), {}) for _ in range(2))
        field = rng.choice(("dtype", "shape", "data_offsets"))
        if not (isinstance(one, dict) and isinstance(other, dict)):
            continue
        if change == "value":
            one[field] = rng.choice(VALUES)
        elif change == "text":
            mark = "MARK"
            one[field] = mark
        elif change == "without":
            one.pop(field, None)
        elif change == "rename":
            name = rng.choice(names)
            header[rng.choice(("", "x" * 100_000, "a/b", "\u6a21", "__metadata__ ", rng.choice(names)))] = header[name]
        elif change == "swap":
            one[field], other[field] = other.get(field), one.get(field)
        elif change == "metadata":
            header["__metadata__"] = rng.choice((*VALUES, {"format": "pt", "sha256": "[" * 3000}, {"sha256": "{}"},
                                                 {"sha256 of dtype, shape and bytes": "[1]"}, {"format": 1}))
        elif change == "dtype":
            one["dtype"] = {"F16": "BF16", "I32": "F32", "F32": "I32"}.get(one.get("dtype"), "I16")
        elif change == "shape" and isinstance(one.get("shape"), list):
            one["shape"] = rng.choice((one["shape"][::-1], one["shape"] + [1], [1, *one["shape"]], one["shape"] * 2))
        elif change == "offsets" and isinstance(one.get("data_offsets"), list):
            one["data_offsets"] = [end + rng.choice((0, 0, 2, -2, 64)) if isinstance(end, int) else end
                                   for end in one["data_offsets"]]
        elif change == "key":
            one[rng.choice(("name", "Dtype", "extra", ""))] = rng.choice(VALUES)
        elif change == "order":
            header = dict(sorted(header.items(), key=lambda _: rng.random()))
    text = json.dumps(header).encode()
    if mark:
        text = text.replace(b'"MARK"', rng.choice(TEXTS))
    if rng.random() < 0.1:
        changes.append("encoded")
        text = rng.choice((text.decode(errors="replace").encode("utf-16"), b"\xef\xbb\xbf" + text, b" " + text,
                           text + b" " * 64, text + b"\0", text + text, b""))
    told = len(text)
    if rng.random() < 0.1:
        changes.append("length")
        told = rng.choice((told + 1, told - 1, told + 8, 0, 1, len(data), 2**31, 2**63, 2**64 - 1)) % 2**64
    return f"header {' '.join(changes)}", told.to_bytes(8, "little") + text + data[8 + length:]
