"""Read tokenizer.model, the protobuf file of a SentencePiece model: its pieces, and what is done to a text before them.

    message = fields, one after the other     field = key, value      key = varint: 8 * number of the field + wire type
    wire type 0: varint    1: 8 bytes    2: varint n, then n bytes (text or a message)    5: 4 bytes
    varint: 7 bits in each byte, the lowest first; the top bit says that another byte follows

Fields without a meaning here are skipped by their wire type.
Source: sentencepiece_model.proto of SentencePiece 0.2.0; protobuf's "Encoding" page.
"""
from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minivl.config import LFS
from minivl.limits import InputError, is_there, reading

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)      # types of a piece
ALGORITHMS = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
SPACE = "\u2581"            # in the text of pieces
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]                      # the text of the BYTE pieces
# Over twice the only one known, InternLM2's, which has 1.5 MB and 92,544 pieces.
MAX_BYTES = 4 * 2 ** 20
MAX_PIECE = 512             # characters; the time for finding its halves grows with the square


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its place. A space is SPACE in the text."""
    text: str
    score: float        # the pair of neighbours is merged first whose whole has the highest
    type: int


@dataclass(frozen=True)
class Model:
    """A BPE model with all 256 bytes, whose text is not normalised but for spaces and, perhaps, one put in front."""
    pieces: list[Piece]
    dummy_prefix: bool      # a space is put before every text


def read_model(path: Path) -> Model:
    """Read tokenizer.model. Raises InputError for a damaged file, and for a model with other rules than InternLM2's."""
    if not is_there(path):
        raise InputError(f"{path.parent} has no {path.name}; is the download complete?")
    with reading(path):
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_BYTES else b""
    if size > MAX_BYTES:
        raise InputError(f"{path.name} in {path.parent} has {size} bytes, at most {MAX_BYTES} are read; it is not the "
                         "released file, download it again")
    if data.startswith(LFS.encode()):
        raise InputError(f"{path.name} in {path.parent} is a git-lfs pointer of {size} bytes, not the file it stands "
                         "for; run `git lfs pull` in that folder, or download the file")
    try:
        return _model(data)
    except InputError as problem:
        raise InputError(f"{path.name} in {path.parent} {problem}") from None


def _model(data: bytes) -> Model:
    """Read a ModelProto. Its errors go on after the name of the file."""
    parts = _message(data, {1: 2, 2: 2, 3: 2, 5: 2}, "the file")
    # What is there twice is one message after the other: protobuf reads it so, too.
    trainer = _message(b"".join(parts.get(2, [])), {3: 0, 24: 0, 35: 0}, "trainer_spec")
    normalizer = _message(b"".join(parts.get(3, [])), {2: 2, 3: 0, 4: 0, 5: 0}, "normalizer_spec")
    denormalizer = _message(b"".join(parts.get(5, [])), {2: 2}, "denormalizer_spec")
    kind = trainer.get(3, [1])[-1]
    if kind != 2:
        raise InputError(f"is a {ALGORITHMS.get(kind, f'model_type {kind}')} model of {len(parts.get(1, []))} pieces, "
                         "InternLM2's is BPE and nothing else is read; take the tokenizer.model of the original model")
    for name, found, wanted in (
            ("trainer_spec.byte_fallback", trainer.get(35, [0])[-1], 1),
            ("trainer_spec.treat_whitespace_as_suffix", trainer.get(24, [0])[-1], 0),
            ("normalizer_spec.remove_extra_whitespaces", normalizer.get(4, [1])[-1], 0),
            ("normalizer_spec.escape_whitespaces", normalizer.get(5, [1])[-1], 1),
            ("the length of normalizer_spec.precompiled_charsmap", len(normalizer.get(2, [b""])[-1]), 0),
            ("the length of denormalizer_spec.precompiled_charsmap", len(denormalizer.get(2, [b""])[-1]), 0)):
        if found != wanted:
            raise InputError(f"has {found} for {name}, InternLM2's has {wanted}, and no other rule is followed; take "
                             "the tokenizer.model of the original model")
    pieces = [_piece(piece, i) for i, piece in enumerate(parts.get(1, []))]
    _check(pieces)
    return Model(pieces, bool(normalizer.get(3, [1])[-1]))


def _piece(data: bytes, i: int) -> Piece:
    fields = _message(data, {1: 2, 2: 5, 3: 0}, f"piece {i}")
    try:
        text = fields.get(1, [b""])[-1].decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"is damaged: the text of piece {i} is not UTF-8; download it again") from None
    return Piece(text, struct.unpack("<f", fields.get(2, [bytes(4)])[-1])[0], fields.get(3, [NORMAL])[-1])


def _check(pieces: list[Piece]):
    """Refuse pieces that cannot be: empty, twice there, too long, of no type, without a score, bytes missing."""
    place = {}
    for i, (text, score, kind) in enumerate(pieces):
        named = repr(text[:60])
        problem = ""
        if not text or len(text) > MAX_PIECE:
            problem = f"piece {i} has {len(text)} characters, 1 to {MAX_PIECE} are taken"
        elif place.setdefault(text, i) != i:
            problem = f"pieces {place[text]} and {i} are both {named}"
        elif not NORMAL <= kind <= BYTE:
            problem = f"piece {i}, {named}, is of type {kind}, there are {NORMAL} to {BYTE}"
        elif not math.isfinite(score):
            problem = f"piece {i}, {named}, has score {score}"
        elif len(text) == 1 and kind in (UNKNOWN, CONTROL):
            problem = f"piece {i}, {named}, is of type {kind}, and this character would vanish from a text"
        if problem:
            raise InputError(f"is damaged: {problem}; download it again")
    if SPACE not in place:
        raise InputError(f"has no piece for the space among its {len(pieces)}; download it again")
    found = {piece.text for piece in pieces if piece.type == BYTE}
    if found != set(BYTES):
        raise InputError(f"has pieces for {len(found & set(BYTES))} of the 256 bytes and {len(found - set(BYTES))} "
                         "other pieces of their type, characters without a piece would vanish; download it again")


# ---- the encoding ---------------------------------------------------------------------------------------------------

def _message(data: bytes, wires: dict[int, int], what: str) -> dict[int, list]:
    """Read the fields of a message that `wires` names, number -> wire type, each as the list of its values."""
    found = {}
    for number, wire, value in _fields(data, what):
        if number in wires:
            if wire != wires[number]:
                raise InputError(f"is damaged: field {number} of {what} has wire type {wire} instead of "
                                 f"{wires[number]}; download it again")
            found.setdefault(number, []).append(value)
    return found


def _fields(data: bytes, what: str) -> Iterator[tuple[int, int, int | bytes]]:
    """Cut a message into its fields: (number, wire type, value)."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place, what)
        wire = key & 7
        if wire == 0:
            value, place = _varint(data, place, what)
        elif wire in (1, 2, 5):
            size, place = _varint(data, place, what) if wire == 2 else (8 if wire == 1 else 4, place)
            if size > len(data) - place:
                raise InputError(f"is cut or damaged: {what} has {len(data) - place} bytes left at byte {place}, a "
                                 f"field there says {size}; download it again")
            value = data[place:place + size]
            place += size
        else:
            raise InputError(f"is damaged, or no SentencePiece model: wire type {wire} at byte {place} of {what}; "
                             "download it again")
        yield key >> 3, wire, value


def _varint(data: bytes, place: int, what: str) -> tuple[int, int]:
    """Read a varint: (its value, the place after it)."""
    value = 0
    for i, byte in enumerate(data[place:place + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, place + i + 1
    raise InputError(f"is cut or damaged: {what} ends inside a number at byte {place}, or it has over 10 bytes; "
                     "download it again")
