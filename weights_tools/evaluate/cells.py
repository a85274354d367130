"""Cut a TSV file into rows of cells, and read numbers and missing values, as pandas.read_csv(path, sep="\\t") does.

Rows that pandas would fail on or fill up are broken here, and those after them are read. At most one row is in memory.
Source: pandas 2.2.3 pandas/_libs/src/parser/tokenizer.c, pandas/_libs/parsers.pyx; compared with it row by row.
"""
from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from weights_tools.evaluate.benchmarks import MISSING

MOST_LINE = 2**28       # bytes of a line: three of the largest pictures that are accepted, in base64
MOST_TEXT = 2**20       # bytes of a cell in quotes that goes over several lines; more is a quote that was never closed
BOM = b"\xef\xbb\xbf"

INTEGER = re.compile(r"\s*[+-]?\d{1,18}\s*", re.ASCII)
NUMBER = re.compile(r"\s*[+-]?(\d{1,18}(\.\d*)?|\.\d+)(e[+-]?\d+)?\s*|[+-]?(inf|infinity)", re.ASCII | re.IGNORECASE)
TRUTH = re.compile("(true|TRUE|True)|false|FALSE|False")


@dataclass(frozen=True)
class Raw:
    """One row of the file as it stands, or why it cannot be read."""
    cells: list[bytes]      # without their quotes; of a broken row those before the error
    offset: int             # of its first byte
    line: int               # the header is 1
    why: str | None = None


def rows(file: BinaryIO, width: int, pictures: Collection[int], line: int = 1) -> Iterator[Raw]:
    """Yield the rows from where an open file stands; blank lines are none. pictures: the columns of base64.

    A broken row of several lines may be a quote that was never closed: the lines after its first are read anew. Until
    one is a whole row, they are parts of the broken one, but for those with as many tabs as a row has.
    """
    parts = False
    while True:
        offset = file.tell()
        cells, lines, second, why = _row(file, pictures)
        if not lines:
            return
        if cells and not why and len(cells) != width:
            why = f"it has {len(cells)} cells, the header has {width}"
        if cells and not (parts and why and _tabs(file, offset) != width - 1):
            yield Raw(cells, offset, line, why)
        if cells:
            parts = bool(why) and (parts or lines > 1)
        if why and lines > 1:
            file.seek(second)
            lines = 1
        line += lines


def _tabs(file: BinaryIO, offset: int) -> int:
    """Count the tabs of the line at an offset; the file stays where it is."""
    here = file.tell()
    file.seek(offset)
    tabs = file.readline(MOST_LINE).count(b"\t")
    file.seek(here)
    return tabs


def header(file: BinaryIO) -> tuple[list[bytes], int]:
    """Read the names of the columns from a file's beginning: (names, how many lines they take)."""
    if file.read(len(BOM)) != BOM:
        file.seek(0)
    line = 1
    while True:
        cells, lines, _, why = _row(file, ())
        line += lines
        if cells or not lines:
            return ([] if why else cells), line - 1


def one(file: BinaryIO, offset: int, pictures: Collection[int]) -> list[bytes]:
    """Read the cells of the row that begins at an offset."""
    file.seek(offset)
    return _row(file, pictures)[0]


def _row(file: BinaryIO, pictures: Collection[int]) -> tuple[list[bytes], int, int, str | None]:
    """Read one row: (its cells, how many lines it has, where the second begins, why it is broken).

    No cells: a blank line; no lines: the end. A broken row has the cells before the error, at least one.
    """
    text = file.readline(MOST_LINE)
    if len(text) == MOST_LINE and not text.endswith(b"\n"):
        while text and not text.endswith(b"\n"):
            text = file.readline(MOST_TEXT)
        return [b""], 1, file.tell(), f"the line has more than {MOST_LINE} bytes"
    second = file.tell()
    if not text.strip(b" \r\n"):
        return [], bool(text), second, None
    cells = []
    lines = 1
    at = 0
    why = None
    while at is not None:
        cell = b""
        more = 0
        if text.startswith(b'"', at):
            cell, text, at, more = _quoted(file, text, at + 1, len(cells) in pictures)
            lines += more
            if at is None:
                return cells or [b""], lines, second, "a quote is not closed"
        end = text.find(b"\t", at)
        rest = text[at:end] if end >= 0 else _without_end(text[at:])
        at = end + 1 if end >= 0 else None
        cells.append(cell + rest)
        if b"\r" in rest:
            why = "it holds a carriage return outside quotes, which ends a line"
        elif rest and more:
            why = "a quote is not closed, or text follows the quote that closes several lines"
    return cells, lines, second, why


def _quoted(file: BinaryIO, text: bytes, at: int, picture: bool) -> tuple[bytes, bytes, int | None, int]:
    """Read a cell from behind its quote: (the cell, the line it ends in, where, how many lines further that is).

    The place is None where the quote is not closed.
    """
    parts = []
    lines = 0
    size = 0
    while True:
        end = text.find(b'"', at)
        parts.append(text[at:end] if end >= 0 else text[at:])
        if end >= 0 and text.startswith(b'""', end):        # two quotes are one
            parts.append(b'"')
            at = end + 2
        elif end >= 0:
            return b"".join(parts), text, end + 1, lines
        else:
            size += len(parts[-1])
            # Base64 holds no tab: it is a cell of another row.
            if b"\t" in parts[-1] if picture else size > MOST_TEXT:
                return b"", text, None, lines
            text = file.readline(MOST_LINE)
            if not text:
                return b"", text, None, lines
            at = 0
            lines += 1


def _without_end(text: bytes) -> bytes:
    return text.removesuffix(b"\n").removesuffix(b"\r") if text.endswith(b"\n") else text.removesuffix(b"\r")


# ---- numbers --------------------------------------------------------------------------------------------------------

@dataclass
class Column:
    """What all cells of a column have in common: they decide how each is read."""
    kinds: list = field(default_factory=lambda: [INTEGER, NUMBER, TRUTH])       # those that fit all so far
    missing: bool = False

    def see(self, text: str):
        """Count one more cell."""
        if text in MISSING:
            self.missing = True
        elif self.kinds:
            self.kinds = [kind for kind in self.kinds if kind.fullmatch(text)]
            if NUMBER in self.kinds and "inf" not in text.lower() and abs(float(text)) == float("inf"):
                self.kinds.remove(NUMBER)       # pandas leaves 1e400 as text

    def read(self, text: str) -> str | None:
        """Turn a cell into the text of what pandas makes of it: of 0.50, if all are numbers, 0.5. None: missing."""
        if text in MISSING:
            return None
        kind = self.kinds[0] if self.kinds else None
        if kind is INTEGER:
            return str(float(text) if self.missing else int(text))
        if kind is NUMBER:
            return str(float(text))
        return text.capitalize() if kind is TRUTH else text

    @property
    def whole(self) -> bool:
        """Tell whether all cells are whole numbers."""
        return self.kinds[:1] == [INTEGER] and not self.missing
