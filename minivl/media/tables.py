"""Read how many entries the tables of an MP4 claim: a few bytes can make ffmpeg write tables of gigabytes.

An MP4 is boxes in boxes: size, kind, content. Most tables hold their entries, but a table of sizes may say one size for
all samples, a table of times one duration for many, a fragment one default for all; and each edit may show all samples.
Source: ISO/IEC 14496-12 (2022), 8.6.1, 8.6.6, 8.7.3, 8.8.8.
"""
from __future__ import annotations

import struct
from typing import BinaryIO

from minivl.limits import InputError

INSIDE = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf")      # boxes of boxes
MOST_BOXES = 100_000
EDITED = 4              # times the most samples: how many the edits of a track may show together; most have one edit


def check_tables(file: BinaryIO, name: str, most: int) -> None:
    """Refuse an MP4 one of whose tracks claims more than `most` samples. Other files have no such tables.

    Every file is walked, whatever it begins with: ffmpeg takes one for an MP4 if a box further on looks like it.
    """
    end = file.seek(0, 2)
    _Tables(file, name, most).read(0, end, 0)
    file.seek(0)


class _Tables:
    """Walk the boxes, and count what they claim."""

    def __init__(self, file: BinaryIO, name: str, most: int):
        self.file, self.name, self.most = file, name, most
        self.boxes = self.fragments = self.edits = self.samples = 0

    def read(self, place: int, end: int, depth: int) -> None:
        """Walk the boxes between two places."""
        while place + 8 <= end:
            self.boxes += 1
            self._check(self.boxes, MOST_BOXES, "boxes")
            self.file.seek(place)
            size, kind = struct.unpack(">I4s", self.file.read(8))
            start = place + 8
            if size == 1:
                size = int.from_bytes(self.file.read(8), "big")
                start += 8
            stop = min(place + size if size else end, end)
            if stop < start:
                return      # damaged: ffmpeg says so
            if kind in INSIDE and depth < 8:
                self.read(start, stop, depth + 1)
            elif kind in (b"stsz", b"stz2"):
                self.samples = max(self.samples, self._numbers(start + 8, 1)[0])
                self._check(self.samples, self.most, "samples in a track")
            elif kind in (b"stts", b"ctts"):
                entries, = self._numbers(start + 4, 1)
                self._check(entries, self.most, "entries in a table of times")
                self._check(sum(self._numbers(start + 8, 2 * entries)[::2]), self.most, "samples with times")
            elif kind == b"elst":
                self.edits = max(self.edits, self._numbers(start + 4, 1)[0])
                self._check(self.edits, self.most, "edits in a track")
            elif kind == b"trun":
                self.fragments += self._numbers(start + 4, 1)[0]
                self._check(self.fragments, self.most, "samples in fragments")
            self._check(self.samples * self.edits, EDITED * self.most, "samples times edits")
            place = stop

    def _numbers(self, place: int, count: int) -> tuple[int, ...]:
        """Read numbers of four bytes; those past the end of the file are left out, but one is always given."""
        self.file.seek(place)
        data = self.file.read(4 * count)
        return struct.unpack(f">{len(data) // 4}I", data[:len(data) // 4 * 4]) or (0,)

    def _check(self, found: int, most: int, what: str) -> None:
        if found > most:
            raise InputError(f"{self.name} claims {found} {what}, the limit is {most}; cut the video or save it again")
