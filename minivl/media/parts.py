"""Take from a picture file the parts that its pixels depend on, and weigh, before Pillow sees it, what decoding costs.

A few bytes can order much work: a JPEG's thousand scans over one picture, a TIFF's tag of millions of numbers, a tiny
GIF of a large canvas and thousands of frames. So the files are walked here first, in one pass over their parts, which
are counted; whatever is not needed (texts, EXIF, colour profiles, thumbnails, further pages) is left out.
Source: ITU T.81 (JPEG); W3C PNG 3 (APNG too); GIF89a; RFC 9649 (WebP); TIFF 6.0, its Technical Note 2, BigTIFF.
"""
from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from minivl.limits import InputError, Limits

FRAME_WORK = 2 ** 14        # pixels, whose time each frame of an animation takes besides its pixels
FRAME_PASSES = 3            # over the canvas, that Pillow's composing of one frame takes
FRAME_BYTES = 28            # of memory for each pixel of the canvas: what is drawn, what was before, masks


@dataclass
class Parts:
    """What is left of a picture file, and what decoding it takes."""
    data: bytes
    passes: float = 1       # over every pixel, in the time of a plain JPEG's
    pixel_bytes: int = 8    # of memory for each pixel, at the peak: what is decoded, and its RGB copy
    buffer: int = 0         # more bytes of memory
    pixels: int = 0         # at least so many are decoded, whatever width and height say
    work: int = 0           # more work, in pixels
    frames: int = 1         # of an animation
    frame_work: int = FRAME_WORK
    canvas: int = 0         # pixels of the largest picture that its frames are drawn on


def parts_of(data: bytes, name: str, limits: Limits) -> Parts:
    """Walk a picture file of a known format. Raises InputError for too many parts, never for damage: Pillow does."""
    for magic, walk in ((b"\xff\xd8", _jpeg), (b"\x89PNG", _png), (b"GIF", _gif), (b"RIFF", _webp), (b"BM", _bmp),
                        (b"II", _tiff), (b"MM", _tiff)):
        if data.startswith(magic):
            return walk(data, name, limits)
    return Parts(data)


def check_cost(parts: Parts, width: int, height: int, name: str, limits: Limits) -> None:
    """Refuse a picture that takes too much work or memory, first frame only."""
    pixels = max(width * height, parts.pixels)
    work = round(pixels * parts.passes) + parts.work
    if work > limits.decoding_work:
        raise InputError(f"{name} of {width}x{height} pixels takes as much work as {work} pixels, the limit is "
                         f"{limits.decoding_work}; save it again as a plain JPEG or PNG, or raise "
                         "Limits(decoding_work=...)")
    check_memory(pixels * parts.pixel_bytes + parts.buffer, f"{name} of {width}x{height} pixels", limits)


def check_animation(parts: Parts, frames: int, kept: int, name: str, limits: Limits) -> None:
    """Refuse an animation whose `frames` together take too much work, or, with those to be kept, too much memory."""
    work = max(frames, parts.frames) * (FRAME_PASSES * parts.canvas + parts.frame_work)
    if work > limits.decoding_work:
        raise InputError(f"{name} has {frames} frames of {parts.canvas} pixels, which take as much work as {work} "
                         f"pixels, the limit is {limits.decoding_work}; cut it, make it smaller, or raise "
                         "Limits(decoding_work=...)")
    check_memory(parts.canvas * (FRAME_BYTES + 4 * kept), f"{name}, {kept} frames of {parts.canvas} pixels", limits)


def check_memory(found: int, what: str, limits: Limits) -> None:
    """Refuse what takes too much memory while it is decoded."""
    if found > limits.decoding_bytes:
        raise InputError(f"{what}: decoding takes {found} bytes of memory, the limit is {limits.decoding_bytes}; "
                         "make it smaller or raise Limits(decoding_bytes=...)")


class _Count:
    """Count the parts of a file; past the limit, refuse it."""

    def __init__(self, what: str, name: str, limits: Limits):
        self.found = 0
        self.what, self.name, self.limit = what, name, limits.picture_parts

    def add(self, number: int = 1) -> None:
        self.found += number
        if self.found > self.limit:
            raise InputError(f"{self.name} has {self.found} {self.what} or more, the limit is {self.limit}; save it "
                             "again or raise Limits(picture_parts=...)")


# ---- JPEG -----------------------------------------------------------------------------------------------------------
# Markers: FF and a code, then (most of them) a size of two bytes, which counts itself, and as many bytes. Behind a
# "start of scan" lie coded pixels, where an FF is followed by 0 or by a restart marker.

JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)
JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}     # "start of frame": how the picture is coded
JPEG_APPS = {*range(0xE1, 0xF0), 0xFE} - {0xEE}     # of applications, and comments; E0 and EE say what the colours mean
ARITHMETIC = 6              # such a scan takes the time of so many


def _jpeg(data: bytes, name: str, limits: Limits) -> Parts:
    kept, place, scans, components, coded = [data[:2]], 2, 0, 1, 0
    count = _Count("segments", name, limits)
    while found := JPEG_MARKER.search(data, place):
        count.add()
        code = found[1][0]
        if scans:
            kept.append(data[place:found.start()])      # coded pixels
        end = found.end() + (0 if code in (0xD8, 0xD9) else int.from_bytes(data[found.end():found.end() + 2], "big"))
        segment = data[found.start():end]
        if code not in JPEG_APPS:
            kept.append(segment)
        if code in JPEG_SIZES and len(segment) > 9:
            coded = code
            components = max(components, segment[9])
        if code == 0xDA:
            scans += 1
        place = max(end, found.end())
        if code == 0xD9:    # what follows are further pictures
            break
    else:
        kept.append(data[place:])
    several = scans > 1 or coded in (0xC2, 0xC6, 0xCA, 0xCE)
    return Parts(b"".join(kept), passes=max(scans, 1) * (ARITHMETIC if coded > 0xC8 else 1),
                 pixel_bytes=max(8, 4 + 2 * components) if several else 8)


# ---- PNG ------------------------------------------------------------------------------------------------------------
# 8 bytes, then chunks: size, kind, content, checksum (4 bytes each but the content).

PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT")


def _png(data: bytes, name: str, limits: Limits) -> Parts:
    kept, place, frames = [data[:8]], 8, 0
    count = _Count("chunks", name, limits)
    while place < len(data):
        count.add()
        end = place + 12 + int.from_bytes(data[place:place + 4], "big")
        kind = data[place + 4:place + 8]
        if kind in PNG_KEPT or end > len(data):
            kept.append(data[place:end])
        frames += kind == b"fcTL"
        place = end
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26].ljust(10, b"\0"))
    channels = {2: 3, 4: 2, 6: 4}.get(colour, 1)
    # The inflated bytes and their filters take the time, about half that of a JPEG's pixel each.
    return Parts(b"".join(kept), passes=max(1.0, channels * depth / 16), frames=max(frames, 1), canvas=width * height)


# ---- GIF ------------------------------------------------------------------------------------------------------------
# A header of 13 bytes and a palette, then blocks: "!" kind, or "," with a place and a palette, and then sub-blocks of a
# size byte and as many bytes, up to a size of 0.

def _gif(data: bytes, name: str, limits: Limits) -> Parts:
    count = _Count("blocks", name, limits)
    frames = 0
    try:
        width, height = struct.unpack("<HH", data[6:10])
        place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
        while data[place] != 0x3B:      # ";" ends it
            kind = data[place]
            place += 1
            count.add()
            if kind not in (0x21, 0x2C):
                continue
            if kind == 0x2C:
                frames += 1
                left, top, across, down = struct.unpack("<HHHH", data[place:place + 8])
                width, height = max(width, left + across), max(height, top + down)
                place += 9 + (3 << (data[place + 8] & 7) + 1 if data[place + 8] & 128 else 0)
            place += 1
            blocks = 1
            while size := data[place]:
                place += size + 1
                blocks += 1
                if blocks > count.limit:
                    break
            place += 1
            count.add(blocks)
    except (IndexError, struct.error):      # cut short
        pass
    return Parts(data, frames=max(frames, 1), canvas=width * height if frames else 0)


# ---- WebP -----------------------------------------------------------------------------------------------------------
# "RIFF", a size, "WEBP", then chunks: kind, size (little-endian), content, padded to an even size.

def _webp(data: bytes, name: str, limits: Limits) -> Parts:
    count = _Count("chunks", name, limits)
    place, frames, width, height = 12, 0, 0, 0
    while place + 8 <= len(data):
        count.add()
        kind, size = struct.unpack("<4sI", data[place:place + 8])
        body = data[place + 8:place + 18]
        if place == 12 and kind == b"VP8X":
            width, height = (int.from_bytes(body[i:i + 3], "little") + 1 for i in (4, 7))
        elif place == 12 and kind == b"VP8 ":
            width, height = (int.from_bytes(body[i:i + 2], "little") & 0x3FFF for i in (6, 8))
        elif place == 12 and kind == b"VP8L":
            bits = int.from_bytes(body[1:5], "little")
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        frames += kind == b"ANMF"
        place += 8 + size + size % 2
    # libwebp makes two canvases as soon as it is asked for the size; then the pixels, their bytes, and the RGB copy.
    parts = Parts(data, passes=2.5, pixel_bytes=16, pixels=width * height,
                  frames=max(frames, 1), canvas=width * height,
                  frame_work=FRAME_WORK + frames)      # it finds a frame by going through all
    if width and height:
        check_cost(parts, width, height, name, limits)
    return parts


# ---- BMP ------------------------------------------------------------------------------------------------------------

def _bmp(data: bytes, name: str, limits: Limits) -> Parts:
    header, compression = data[14:18], data[30:34]
    if int.from_bytes(header, "little") >= 40 and int.from_bytes(compression, "little") in (1, 2):
        return Parts(data, passes=60, work=300 * len(data))       # run-length coded, which Pillow reads in Python
    return Parts(data)


# ---- TIFF -----------------------------------------------------------------------------------------------------------
# A header of 8 (BigTIFF: 16) bytes tells where the first directory is: a number of entries (tag, type, count of values,
# and the values or where they are), then where the next directory, of a further picture, is.

TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
TIFF_WHOLE = {1: "B", 3: "H", 4: "I", 16: "Q"}      # types of unsigned integers
TIFF_RAW = (1, 2, 7)        # bytes and texts, which Pillow takes as they are
WIDTH, HEIGHT, BITS, COMPRESSION, OFFSETS, ORIENTATION, SAMPLES, ROWS, SIZES = (
    256, 257, 258, 259, 273, 274, 277, 278, 279)
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_SIZES, XMP = 322, 323, 324, 325, 700
TIFF_KEPT = {WIDTH, HEIGHT, BITS, COMPRESSION, 262, 263, 266, OFFSETS, ORIENTATION, SAMPLES, ROWS, SIZES, 284, 292, 293,
             317, 320, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_SIZES, 332, 338, 339, 340, 341, 347,
             *range(512, 522), 529, 530, 531, 532, 50674}
STRIP_WORK = 2 ** 12        # pixels, whose time each strip or tile takes besides its pixels
TIFF_PASSES = {5: 1, 32773: 1, 1: 1, 34925: 8, 50001: 3}    # LZMA takes long, and WebP


def _tiff(data: bytes, name: str, limits: Limits) -> Parts:
    try:
        order = "<" if data.startswith(b"II") else ">"
        big = 43 in data[2:4]
        word, entry, room = ("Q", "HHQ8s", 8) if big else ("I", "HHI4s", 4)
        start, = struct.unpack_from(order + word, data, 8 if big else 4)
        number, = struct.unpack_from(order + ("Q" if big else "H"), data, start)
        start += 8 if big else 2
        _Count("tags", name, limits).add(number)
        tags = {}
        for i in range(number):
            tag, kind, values, place = struct.unpack_from(order + entry, data, start + i * struct.calcsize("<" + entry))
            if tag in TIFF_KEPT | {XMP} and tag not in tags and kind in TIFF_BYTES:
                tags[tag] = (kind, values, place)
    except (struct.error, OverflowError):       # cut short, or points past the end
        return Parts(data[:8] if data[:4] in (b"II*\0", b"MM\0*") else data[:16])
    if ORIENTATION in tags or XMP in tags and tags[XMP][0] not in TIFF_RAW:
        tags.pop(XMP, None)                     # Pillow looks there for an orientation that no tag gives
    for kind, values, _ in tags.values():
        if kind not in TIFF_RAW:
            _Count("values in one tag", name, limits).add(values)

    def read(tag: int, default: int) -> list[int]:
        kind, values, place = tags.get(tag, (0, 0, b""))
        if kind not in TIFF_WHOLE or not values:
            return [default]
        size = values * TIFF_BYTES[kind]
        at = int.from_bytes(place, "little" if order == "<" else "big")
        found = place[:size] if size <= room else data[at:at + size]
        return list(struct.unpack(order + f"{len(found) // TIFF_BYTES[kind]}{TIFF_WHOLE[kind]}",
                                  found[:len(found) // TIFF_BYTES[kind] * TIFF_BYTES[kind]])) or [default]

    parts = _tiff_parts(data, read, name, limits)
    entries = b"".join(struct.pack(order + entry, tag, *tags[tag]) for tag in sorted(tags))
    head = data[:4] + (struct.pack(order + "HH", 8, 0) if big else b"")
    body = data[16 if big else 8:]
    odd = len(data) % 2
    parts.data = b"".join((head, struct.pack(order + word, len(data) + odd), body, b"\0" * odd,
                           struct.pack(order + ("Q" if big else "H"), len(tags)), entries, b"\0" * room))
    return parts


def _tiff_parts(data: bytes, read, name: str, limits: Limits) -> Parts:
    """Weigh the strips or tiles of a TIFF. `read(tag, default)`: the values of a tag."""
    width, height, compression = read(WIDTH, 0)[0], read(HEIGHT, 0)[0], read(COMPRESSION, 1)[0]
    samples, bits = read(SAMPLES, 1)[0], max(read(BITS, 1))
    tiled = read(TILE_OFFSETS, -1) != [-1]
    across = read(TILE_WIDTH, 1)[0] if tiled else width
    down = read(TILE_HEIGHT, 1)[0] if tiled else min(read(ROWS, height)[0], height)
    number = -(-width // max(across, 1)) * -(-height // max(down, 1))       # strips or tiles
    _Count("tiles" if tiled else "strips", name, limits).add(number)
    offsets, sizes = (read(tag, 0) for tag in ((TILE_OFFSETS, TILE_SIZES) if tiled else (OFFSETS, SIZES)))
    passes = TIFF_PASSES.get(compression, 2)
    taken = sum(sizes[:number * max(samples, 1)])
    if compression != 1 and number > 1 and (taken > limits.picture_bytes or sizes == [0]):
        raise InputError(f"{name} is a TIFF of {number} strips or tiles with {taken or 'an unknown number of'} bytes, "
                         f"the limit is {limits.picture_bytes}; save it again or raise Limits(picture_bytes=...)")
    if compression == 7:
        passes *= max(data.count(b"\xff\xda", at, at + size) for at, size in zip(offsets, sizes)) or 1
    elif compression == 6:
        passes *= data.count(b"\xff\xda") or 1
    return Parts(data, passes=max(passes, samples * bits / 16), pixels=number * across * down,
                 buffer=across * down * samples * bits // 8, work=STRIP_WORK * number)
