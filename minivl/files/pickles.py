"""Read what torch.save writes of a dict of tensors, and nothing else: where each tensor lies in the file.

    end of the file -> directory -> records, one after another -> data.pkl -> name -> Place

torch's own reader and Python's pickle and zipfile never see the file: a pickle is a program, and two readers of one zip
can be shown two different ones. torch.save has written one form since version 1.6 (compared: files of 1.6, 2.2 and
2.13), in which all but the names, sizes, checksums and paddings is fixed. So each header is computed and compared, and
the pickle is read by a grammar without recursion, which builds no object of it.

    zip (APPNOTE.TXT 4.3), by torch's miniz:
        record      local header, name, zip64 field of a record from 4 GB on, padding field "FB" of "Z"s to the next 64
                    bytes; the bytes, not compressed; unless there are none, a descriptor with their CRC-32 and size
        directory   the same names once more; then always three ends: zip64, its locator, the old one without a comment
    pickle (Lib/pickletools.py), protocol 2, every word, name and tuple put into the memo under the next number:
        file        PROTO 2, {} or OrderedDict(), items in MARK ... SETITEMS or one SETITEM, attributes, STOP
        attributes  of an OrderedDict: {"_metadata": dicts of words and numbers}, skipped
        item        name, tensor
        tensor      torch._utils._rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, OrderedDict())
                    or _rebuild_parameter(tensor, requires_grad, OrderedDict()), or one seen before
        storage     persistent id ("storage", torch.HalfStorage, key of the record data/KEY, device, length)
"""
from __future__ import annotations

import math
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import torch

from minivl.limits import InputError

MAX_DIRECTORY = 16_000_000      # bytes; the released ones stay below 0.1 MB
MAX_PICKLE = 4_000_000          # bytes; the released ones stay below 0.2 MB
MAX_NAME = 500                  # characters of a tensor's name: messages hold names
MAX_DIMS = 32                   # of a tensor; released ones have at most 4
STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
            "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
            "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
            "BoolStorage": torch.bool}
KEY = re.compile(r"data/([0-9]{1,20})")                     # torch 1.6 takes an address for it
NOTE = re.compile(r"version|byteorder|\.[\w./]{1,64}")      # what torch notes beside the tensors
DEVICE = re.compile(r"[a-z]\w*(:[0-9]+)?")

FAR = 2**32 - 1     # sizes and offsets from here on are in a zip64 field
LINE = struct.Struct("<4sHHHHHHIIIHHHHHII")
LOCAL = struct.Struct("<4sHHHHHIIIHH")
ENDS = struct.Struct("<4sQHHIIQQQQ 4sIQI 4sHHHHIIH")

STOP, REDUCE, BUILD, PERSISTENT, DICT, MARK, SETITEM, SETITEMS = b".", b"R", b"b", b"Q", b"}", b"(", b"s", b"u"
GLOBAL, STRING, NONE, TRUE, FALSE, FLOAT, EMPTY_TUPLE, TUPLE = b"c", b"X", b"N", b"\x88", b"\x89", b"G", b")", b"t"
GET, LONG_GET, PUT, LONG_PUT = b"h", b"j", b"q", b"r"
SHORT_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}
INTS = BYTE, SHORT, INT, LONG = b"K", b"M", b"J", b"\x8a"
ORDERED_DICT = "collections OrderedDict"
TENSOR = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
# For a message alone, where the grammar has failed: a dict under a name that training programs use, and a torch.dtype.
INNER = re.compile(rb"X.\0\0\0((?:model_)?state_dict|model|module|net|params)(?:q.|r.{4})"
                   rb"(?:}|ccollections\nOrderedDict\n|h.\)R|j.{4}\)R)", re.S)
DTYPE = re.compile(rb"ctorch\n((?!\w+Storage)\w+)\n")
BATCH = 1000        # items between MARK and SETITEMS, which Python's pickle never exceeds; fewer: the dict is complete


class Place(NamedTuple):
    """Where a tensor lies: from byte `at` of the file on, its shape and strides in numbers of `dtype`."""
    at: int
    shape: tuple
    stride: tuple
    dtype: torch.dtype


class Global(NamedTuple):
    """A class or function that the pickle names: its module and name, with a blank between them."""
    name: str


class Record(NamedTuple):
    """A record of the zip: its bytes lie at `at` .. `at + size`."""
    at: int
    size: int
    crc: int


def read_places(path: Path, verify: bool) -> dict[str, Place]:
    """Find the tensors of a file of torch.save: name -> Place. `verify`: compare the records with their checksums.

    Raises InputError for every file that torch.save does not write of a dict of names and dense tensors.
    """
    with open(path, "rb") as f:
        records = _records(f, path.name)
        tensors = {}
        for name, record in records.items():
            key = KEY.fullmatch(name)
            if key:
                tensors[key[1]] = record
            elif name != "data.pkl" and (not NOTE.fullmatch(name) or record.size > 4096):
                _damaged(path.name, f"torch.save writes no record {name[:100]!r} of {record.size} bytes")
        order = records.get("byteorder")
        if order and _read(f, order.at, order.size) != b"little":
            raise InputError(f"{path.name} was not written on a little-endian machine; write it again on one")
        pickle = records.get("data.pkl")
        if not pickle or pickle.size > MAX_PICKLE:
            _damaged(path.name, f"its data.pkl has {pickle.size if pickle else 0} bytes")
        data = _read(f, pickle.at, pickle.size)
    if zlib.crc32(data) != pickle.crc:
        _damaged(path.name, "its data.pkl does not match its checksum")
    grammar = _Pickle(data, path, tensors)
    places = grammar.read()
    if verify:
        _verify(path, records, {f"data/{key}": name for key, (_, name) in grammar.used.items()})
    return places


def a_shape(shape: Sequence[int]) -> bool:
    """Tell whether torch can hold a tensor of this shape, an empty one too."""
    return len(shape) <= MAX_DIMS and math.prod(max(n, 1) for n in shape) < 2**60


def _damaged(file: str, why: str) -> NoReturn:
    raise InputError(f"{file} is not a whole PyTorch file (a zip of tensors): {why}; download it again") from None


def _records(f: BinaryIO, file: str) -> dict[str, Record]:
    """Read the directory, and compare it and each record's headers with what torch writes: name -> Record.

    The records must follow each other from the first byte of the file to the directory, the directory to the end.
    """
    size = f.seek(0, os.SEEK_END)
    f.seek(max(size - ENDS.size, 0))
    ends = f.read()
    count, length, begin = ENDS.unpack(ends)[7:10] if size >= ENDS.size else (0, 0, 0)
    if begin + length + ENDS.size != size or ends != _ends(count, length, begin) or length > MAX_DIRECTORY:
        _damaged(file, f"its {size} bytes do not end as torch.save ends a file; it was cut short, padded or written by "
                 "something else")
    f.seek(begin)
    directory = f.read(length)
    records = {}
    folders = set()
    at = entry = 0
    for _ in range(count):
        name, method, crc, size = _claimed(directory, entry, file)
        if method:
            raise InputError(f"{file} has compressed records, torch writes none such; do not use this checkpoint")
        f.seek(at + LOCAL.size - 2)
        line, header, after = _headers(name, crc, size, at, int.from_bytes(f.read(2), "little"))
        start = at + len(header)
        if start + size + len(after) > begin or not directory.startswith(line, entry) \
                or _read(f, at, len(header)) != header or _read(f, start + size, len(after)) != after:
            _damaged(file, f"its record {name[:100]!r} has not the headers that torch.save writes")
        folder, _, short = name.decode(errors="replace").partition("/")
        folders.add(folder)
        if short in records or len(folders) > 1:
            raise InputError(f"{file} has repeated records ({name[:100]!r}), torch writes none such; do not use this "
                             "checkpoint")
        records[short] = Record(start, size, crc)
        at = start + size + len(after)
        entry += len(line)
    if (at, entry) != (begin, length):
        _damaged(file, f"its records end at {at} and its directory begins at {begin}")
    return records


def _claimed(directory: bytes, entry: int, file: str) -> tuple[bytes, int, int, int]:
    """Read what a line of the directory leaves open: name, compression, checksum, size."""
    if entry + LINE.size > len(directory):
        _damaged(file, "its directory is cut short")
    _, _, _, _, method, _, _, crc, size, _, length, *_ = LINE.unpack_from(directory, entry)
    end = entry + LINE.size + length
    if size == FAR:
        size = int.from_bytes(directory[end + 4:end + 12], "little")
    return directory[end - length:end], method, crc, size


def _headers(name: bytes, crc: int, size: int, at: int, extra: int) -> tuple[bytes, bytes, bytes]:
    """Compute what torch writes around a record at `at`: its line in the directory, local header, descriptor.

    `extra`: bytes between the name and the record, which is padding.
    """
    flags = 0x808 if size else 0x800            # the name is UTF-8; a descriptor follows
    wide = _zip64([size, size] * (size >= FAR) + [at] * (at >= FAR))
    early = _zip64([size, 0] * (size >= FAR) + [at] * (at >= FAR))
    line = LINE.pack(b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, min(size, FAR), min(size, FAR), len(name), len(wide), 0, 0,
                     0, 0, min(at, FAR)) + name + wide
    # torch writes the local header before it knows the checksum and the stored size, and leaves zeros.
    padding = max(extra - len(wide) - 4, 0)
    header = LOCAL.pack(b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(name), len(wide) + 4 + padding) + name + early
    header += b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    after = struct.pack("<4sIQQ" if wide else "<4sIII", b"PK\7\10", crc, size, size) if size else b""
    return line, header, after


def _zip64(numbers: list[int]) -> bytes:
    return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


def _ends(count: int, length: int, begin: int) -> bytes:
    """Compute the last bytes of a file with a directory of `count` records and `length` bytes from `begin` on."""
    few = min(count, 2**16 - 1)
    return ENDS.pack(b"PK\6\6", 44, 0x31e, 45, 0, 0, count, count, length, begin,
                     b"PK\6\7", 0, begin + length, 1,
                     b"PK\5\6", 0, 0, few, few, min(length, FAR), min(begin, FAR), 0)


def _read(f: BinaryIO, at: int, size: int) -> bytes:
    f.seek(at)
    return f.read(size)


def _verify(path: Path, records: dict[str, Record], names: dict[str, str]):
    """Compare each record with its CRC-32. `names`: of the tensors, by record."""
    def checksum(record: Record) -> int:
        crc = 0
        left = record.size
        with open(path, "rb", buffering=0) as f:
            f.seek(record.at)
            while left and (chunk := f.read(min(left, 2**20))):
                crc = zlib.crc32(chunk, crc)
                left -= len(chunk)
        return crc

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (name, record), crc in zip(records.items(), pool.map(checksum, records.values())):
            if crc != record.crc:
                raise InputError(f"{path.name}: {names.get(name, name)} does not match its checksum; the file was "
                                 "altered or damaged, download it again")


class _Pickle:
    """Read data.pkl by the grammar above: a method for each rule, which begins at the byte `at` or after `op`."""

    def __init__(self, data: bytes, path: Path, records: dict[str, Record]):
        self.data, self.path, self.file, self.records = data, path, path.name, records
        self.shown = sum(record.size for record in records.values())
        self.at = 0
        self.memo = []      # str, Global or Place; None: a tuple or dict, which torch names only once
        self.used = {}      # key of a record -> its dtype, its first tensor

    def read(self) -> dict[str, Place]:
        """Read it all: name -> Place."""
        if self.data[:1] == b"\x80" and self.data[1:2] != b"\2":
            raise InputError(f"{self.file} has a pickle of protocol {self.data[1:2].hex()}, torch.save writes 2; save "
                             "it again without pickle_protocol, or download it again")
        self.expect(b"\x80\2")
        op = self.take(1)
        if op == DICT:
            self.put(None)
        elif op == GLOBAL and self.known(op, "it") == Global(ORDERED_DICT):
            self.empty()
        else:
            self.not_a_dict("it holds one object, or a list")
        places = {}
        for name in self.names():
            if name in places:
                _damaged(self.file, f"it holds {name} twice")
            places[name] = self.tensor(name)
        if op == GLOBAL and self.data[self.at:self.at + 1] == DICT:
            self.skip(3)
            self.expect(BUILD)
        self.expect(STOP)
        if self.at != len(self.data):
            _damaged(self.file, f"{len(self.data) - self.at} bytes follow its pickle")
        if len(self.used) != len(self.records):
            _damaged(self.file, f"{len(self.records) - len(self.used)} of its records belong to no tensor")
        return places

    def names(self) -> Iterator[str]:
        """Read the items of a dict: yield each key; the caller reads the value before it asks for the next."""
        count = BATCH
        while count == BATCH:
            count = 0
            op = self.take(1)
            if op == MARK:
                while (op := self.take(1)) != SETITEMS:
                    yield self.string(op)
                    count += 1
            elif op in (STRING, GET, LONG_GET):
                yield self.string(op)
                self.expect(SETITEM)
            elif op in INTS:
                self.not_a_dict("a key is a number")
            else:
                self.at -= 1

    def tensor(self, name: str) -> Place:
        """Read a tensor, or a parameter, which is one."""
        found = self.known(self.take(1), name)
        parameter = found == Global(PARAMETER)
        if parameter:
            found = self.known(self.take(1), name)
        place = self.rebuilt(name) if found == Global(TENSOR) else found
        if not isinstance(place, Place):
            self.not_a_dict(f"{name} is no tensor")
        if parameter:
            self.flag()
            self.ordered_dict(self.take(1))
            self.expect(SHORT_TUPLES[3])
            self.put(None)
            self.expect(REDUCE)
            self.put(place)
        return place

    def rebuilt(self, name: str) -> Place:
        """Read the arguments of _rebuild_tensor_v2 and compare them with the record that they name."""
        self.expect(MARK + MARK)
        word = self.string(self.take(1))
        kind = self.known(self.take(1), name)
        key = self.string(self.take(1))
        device = self.string(self.take(1))      # it is read to the CPU, whatever it says
        numel = self.number(self.take(1))
        if word != "storage" or not isinstance(kind, Global) or not DEVICE.fullmatch(device) \
                or not kind.name.endswith("Storage"):
            self.damaged()
        self.expect(TUPLE)
        self.put(None)
        self.expect(PERSISTENT)
        offset = self.number(self.take(1))
        shape = self.numbers()
        stride = self.numbers()
        self.flag()
        self.ordered_dict(self.take(1))
        self.expect(TUPLE)
        self.put(None)
        self.expect(REDUCE)
        dtype = STORAGES.get(kind.name.removeprefix("torch "))
        if dtype is None:
            raise InputError(f"{self.file}: {name} is in a {kind.name.removeprefix('torch ')}; known are "
                             f"{', '.join(STORAGES)}")
        record = self.records.get(key, Record(0, 0, 0))
        if key not in self.records or record.size != numel * dtype.itemsize:
            raise InputError(f"{self.file}: {name} claims {numel * dtype.itemsize} bytes, its record data/{key[:20]} "
                             f"holds {record.size}; the file was altered or damaged, download it again")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride)) if 0 not in shape else -1
        shown = math.prod(shape) * dtype.itemsize       # more than there are, where it repeats some; how often is bound
        if len(shape) != len(stride) or min(offset, *shape, *stride, 0) < 0 or last >= numel or shown > self.shown \
                or not a_shape(shape) or self.used.get(key, (dtype,))[0] != dtype:
            raise InputError(f"{self.file}: {name} (offset {offset}, shape {list(shape)}, strides {list(stride)}) does "
                             f"not lie in its record of {numel} {dtype}; the file was altered or damaged, download it "
                             "again")
        self.used.setdefault(key, (dtype, name))
        return self.put(Place(record.at + offset * dtype.itemsize, shape, stride, dtype))

    def ordered_dict(self, op: bytes):
        """Read an empty OrderedDict()."""
        if self.known(op, "an attribute") != Global(ORDERED_DICT):
            self.damaged()
        self.empty()

    def empty(self):
        """Read the call that makes one."""
        self.expect(EMPTY_TUPLE + REDUCE)
        self.put(None)

    def skip(self, depth: int):
        """Read and forget a word, a number, or at most `depth` dicts of such in one another."""
        op = self.take(1)
        nested = op == DICT
        if nested:
            self.put(None)
        elif op in INTS:
            self.number(op)
        elif op == FLOAT:
            self.take(8)
        elif op == STRING:
            self.string(op)
        elif op not in (NONE, TRUE, FALSE):
            found = self.known(op, "an attribute")
            nested = found == Global(ORDERED_DICT)
            if nested:
                self.empty()
            elif not isinstance(found, str):
                self.damaged()
        if nested:
            if not depth:
                self.damaged()
            for _ in self.names():
                self.skip(depth - 1)

    def known(self, op: bytes, name: str) -> str | Global | Place:
        """Read a class or function, or what stands in the memo. `name`: of the tensor that it belongs to."""
        if op in (GET, LONG_GET):
            index = int.from_bytes(self.take(1 if op == GET else 4), "little")
            if index >= len(self.memo) or self.memo[index] is None:
                self.damaged()
            return self.memo[index]
        if op != GLOBAL:
            self.not_a_dict(f"{name} is no tensor")
        end = self.data.find(b"\n", self.data.find(b"\n", self.at) + 1)
        called = self.take(max(end + 1 - self.at, 1))[:-1].decode("ascii", "replace").replace("\n", " ")
        if re.fullmatch(r"torch\._utils _rebuild_\w+", called) and called not in (TENSOR, PARAMETER):
            dtype = called.endswith("_rebuild_tensor_v3") and DTYPE.search(self.data, self.at)
            kind = f"of dtype {dtype[1][:40].decode()}" if dtype else f"made by {called.split()[1][:60]}"
            known = ", ".join(str(one).removeprefix("torch.") for one in STORAGES.values())
            raise InputError(f"{self.file}: {name[:100]} is a tensor {kind}, which is unknown here; known are dense "
                             f"ones of {known}: save it as one of them")
        if called not in (ORDERED_DICT, TENSOR, PARAMETER) and not re.fullmatch(r"torch \w+Storage", called):
            raise InputError(f"{self.file} holds more than tensors (its pickle asks for {called[:100]!r}); refused, "
                             "nothing of it was run. Do not use this checkpoint")
        return self.put(Global(called))

    def string(self, op: bytes) -> str:
        """Read a word."""
        if op != STRING:
            word = self.known(op, "a key")
            if not isinstance(word, str):
                self.damaged()
            return word
        length = int.from_bytes(self.take(4), "little")
        try:
            word = self.take(length).decode()
        except UnicodeDecodeError:
            self.damaged()
        if length > MAX_NAME:
            _damaged(self.file, f"it has a name of {length} bytes")
        return self.put(word)

    def number(self, op: bytes) -> int:
        """Read an integer of at most 64 bits."""
        if op not in INTS:
            self.damaged()
        length = self.take(1)[0] if op == LONG else {BYTE: 1, SHORT: 2, INT: 4}[op]
        if length > 8:
            self.damaged()
        return int.from_bytes(self.take(length), "little", signed=op in (INT, LONG))

    def numbers(self) -> tuple[int, ...]:
        """Read a tuple of integers."""
        op = self.take(1)
        if op == EMPTY_TUPLE:
            return ()
        found = []
        marked = op == MARK
        op = self.take(1) if marked else op
        while op in INTS and len(found) < MAX_DIMS:
            found.append(self.number(op))
            op = self.take(1)
        if op != SHORT_TUPLES.get(len(found), TUPLE) or marked != (len(found) > 3):
            self.damaged()
        self.put(None)
        return tuple(found)

    def flag(self):
        """Read True or False."""
        if self.take(1) not in (TRUE, FALSE):
            self.damaged()

    def put(self, value: str | Global | Place | None) -> str | Global | Place | None:
        """Read that the memo takes a value, under the next number."""
        index = len(self.memo)
        self.expect(PUT + index.to_bytes(1, "little") if index < 256 else LONG_PUT + index.to_bytes(4, "little"))
        self.memo.append(value)
        return value

    def expect(self, what: bytes):
        """Read just these bytes."""
        if self.take(len(what)) != what:
            self.damaged()

    def take(self, count: int) -> bytes:
        """Read the next bytes."""
        taken = self.data[self.at:self.at + count]
        if len(taken) < count:
            self.damaged()
        self.at += count
        return taken

    def damaged(self) -> NoReturn:
        """Refuse what torch.save does not write."""
        _damaged(self.file, f"torch.save does not write what is at byte {self.at} of its data.pkl, for a dict of names "
                 "and tensors")

    def not_a_dict(self, what: str) -> NoReturn:
        """Refuse what holds something else than tensors."""
        inner = INNER.search(self.data)
        if inner:
            key = inner[1].decode()
            raise InputError(f"{self.file} is what a training program saved: its tensors are in an inner dict, "
                             f"{key!r}; save that alone once: python -c \"import torch; f = {str(self.path)!r}; "
                             f"torch.save(torch.load(f, map_location='cpu', weights_only=True)[{key!r}], f)\"")
        raise InputError(f"{self.file} does not hold a dict of names and tensors ({what}); save the model's "
                         "state_dict() alone, or download it again")
