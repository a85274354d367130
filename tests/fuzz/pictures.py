"""Altered picture files: those that Pillow writes, damaged, and files made to cost much: scans, frames, tags, ..."""
from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, PngImagePlugin

WRITTEN = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "PCX",
           "SGI", "DIB", "DDS", "IM", "MSP", "SPIDER", "XBM", "BLP", "QOI", "EPS", "PDF")


def cases(seed: int, n: int) -> Iterator[tuple[str, bytes]]:
    """Make `n` files, each with a name that says what it is; the same for the same seed."""
    rng = random.Random(seed)
    files = seeds()
    for i in range(n):
        kind = rng.random()
        name, data = rng.choice(files)
        if kind < 0.15:
            bomb = rng.choice(BOMBS)
            name, data = bomb.__name__, bomb(rng)
            if rng.random() < 0.3:
                data = mutated(data, rng)
        elif kind < 0.3:
            name, data = f"{name} spliced", spliced(data, rng.choice(files)[1], rng)
        else:
            data = mutated(data, rng)
        yield f"{name} {i}", data


def encoded(image: Image.Image, format: str, **options) -> bytes:
    """The bytes of a picture file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture no two pixels of which are likely to be the same."""
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))


@functools.lru_cache
def seeds() -> list[tuple[str, bytes]]:
    """Valid files, (format, bytes), of every format this Pillow writes, and several kinds of those that matter."""
    frames = [noise(24, 16, seed) for seed in range(4)]
    info = PngImagePlugin.PngInfo()
    info.add_itxt("key", "text " * 20, zip=True)
    info.add_text("key", "text " * 20, zip=True)
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 6, "hello"
    animated = {"save_all": True, "append_images": frames[1:], "duration": 50}
    kinds = [(format, {}) for format in WRITTEN] + [
        ("JPEG", {"progressive": True, "exif": exif, "icc_profile": b"x" * 400}), ("JPEG", {"subsampling": 0}),
        ("JPEG", {"restart_marker_rows": 1}), ("PNG", {"pnginfo": info, "exif": exif, "icc_profile": b"x" * 99}),
        ("PNG", animated), ("PNG", {**animated, "default_image": True}), ("GIF", animated), ("WEBP", animated),
        ("GIF", {**animated, "disposal": 2}), ("GIF", {"interlace": 0}), ("WEBP", {"lossless": True, "exif": exif}),
        ("TIFF", {"exif": exif, "big_tiff": True}), ("TIFF", {"tiffinfo": {700: b"<x:xmpmeta/>", 278: 3}}),
        ("TIFF", animated), ("AVIF", animated), ("MPO", animated)] + [
        ("TIFF", {"compression": kind}) for kind in (
            "tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate", "lzma", "zstd", "webp", "tiff_deflate")]
    found = []
    for format, options in kinds:
        accepted = not options and format in WRITTEN[:6]
        for mode in ("RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "I;16", "F") if accepted else ("RGB",):
            try:
                picture = frames[0].convert("L" if mode in ("1", "LA", "I;16", "F") else "RGB").convert(mode)
                found.append((format, encoded(picture, format, **options)))
            except (OSError, KeyError, ValueError, TypeError, AttributeError):      # this Pillow does not write it
                pass
    return found


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A file with one to eight places damaged; PNG checksums are right again."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        if len(data) < 4:
            break
        kind, place = rng.random(), rng.randrange(min(2, len(data)), min(len(data), rng.choice((40, 120, 10**6))))
        if kind < 0.4:
            data[place] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        elif kind < 0.6:
            number = rng.choice((0, 1, 2**16 - 1, 2**24, 2**31 - 1, 2**32 - 1, rng.randrange(2**32)))
            data[place:place + 4] = struct.pack(rng.choice("<>") + "I", number)
        elif kind < 0.7:
            data[place:place + 2] = struct.pack(rng.choice("<>") + "H", rng.choice((0, 1, 2**15, 2**16 - 1, 9000)))
        elif kind < 0.78:
            del data[place:place + rng.randrange(1, 9)]
        elif kind < 0.86:
            data[place:place] = rng.randbytes(rng.randrange(1, 9))
        elif kind < 0.94:           # a part again, many times
            part = bytes(data[place:place + rng.randrange(1, 200)])
            data[place:place] = part * rng.choice((1, 3, 100))
        else:
            data = data[:max(place, 12)]
    return checked(bytes(data))


def checked(data: bytes) -> bytes:
    """A PNG with the checksums put right, or Pillow would look at nothing else."""
    if not data.startswith(b"\x89PNG"):
        return data
    good, place = [data[:8]], 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place:place + 4], "big")
        good += data[place:end - 4], struct.pack(">I", zlib.crc32(data[place + 4:end - 4]))
        place = end
    return b"".join(good)


def spliced(first: bytes, second: bytes, rng: random.Random) -> bytes:
    """The beginning of one file and the end of another."""
    return first[:rng.randrange(1, len(first))] + second[rng.randrange(len(second)):]


# ---- files that order much work --------------------------------------------------------------------------------------

def segment(code: int, body: bytes) -> bytes:
    """A segment of a JPEG."""
    return bytes((0xFF, code)) + struct.pack(">H", len(body) + 2) + body


def jpeg_scans(width: int, height: int, scans: int, code: int = 0xC2, components: int = 1) -> bytes:
    """A JPEG of many scans over a picture, each of a few bytes: everything after them is taken as zeros."""
    table = b"".join(segment(0xC4, kind + b"\1" + b"\0" * 16) for kind in (b"\0", b"\x10"))
    frame = struct.pack(">BHHB", 8, height, width, components) + b"".join(
        bytes((i + 1, 0x11, 0)) for i in range(components))
    first = segment(0xDA, bytes((components,)) + b"".join(bytes((i + 1, 0)) for i in range(components))
                    + (b"\0\0\0" if code in (0xC2, 0xCA) else b"\0\x3f\0")) + b"\0"
    again = segment(0xDA, b"\1\1\0" + (b"\1\5\0" if code in (0xC2, 0xCA) else b"\0\x3f\0")) + b"\0"
    return b"".join((b"\xff\xd8", segment(0xDB, b"\0" + b"\1" * 64), segment(code, frame), table, first,
                     again * (scans - 1), b"\xff\xd9"))


def gif(width: int, height: int, frames: int, across: int = 1, down: int = 1, disposal: int = 0, block: int = 255,
        extra: bytes = b"") -> bytes:
    """A GIF of a large canvas and many small frames."""
    place = struct.pack("<HHHHB", 0, 0, across, down, 0)
    one = b"!\xf9\4" + bytes((disposal << 2,)) + b"\5\0\0\0," + place + b"\2"
    pixels = b"\x44\x01"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\1\2\3\xff\0\0" + extra + (
        one + bytes((len(pixels),)) + pixels + b"\0") * frames + b";"


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int = 8, colour: int = 2, before: bytes = b"", frames: int = 0, split: int = 0,
        interlace: int = 0) -> bytes:
    """A PNG of a flat picture, in `split` chunks, with many small frames after it."""
    row = (width * depth * {2: 3, 4: 2, 6: 4}.get(colour, 1) + 7) // 8
    packer = zlib.compressobj(1)
    pixels = b"".join([packer.compress(b"\4" + b"\0" * row) for _ in range(height)] + [packer.flush()])
    body = chunk(b"IDAT", pixels) if not split else b"".join(
        chunk(b"IDAT", pixels[i:i + split]) for i in range(0, len(pixels), split))
    pixel = zlib.compress(b"\0" * ((depth * {2: 3, 4: 2, 6: 4}.get(colour, 1) + 7) // 8 + 1))
    after, control = b"", b""
    if frames:
        control = chunk(b"acTL", struct.pack(">II", frames, 0)) + chunk(b"fcTL", struct.pack(
            ">IIIIIHHBB", 0, width, height, 0, 0, 1, 10, 0, 0))
        after = b"".join(chunk(b"fcTL", struct.pack(">IIIIIHHBB", 2 * i - 1, 1, 1, 0, 0, 1, 10, i % 3, i % 2))
                         + chunk(b"fdAT", struct.pack(">I", 2 * i) + pixel) for i in range(1, frames))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    palette = chunk(b"PLTE", b"\1\2\3") if colour == 3 else b""
    return b"".join((b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), palette, before, control, body, after,
                     chunk(b"IEND", b"")))


def tiff(tags: dict[int, tuple[int, int, bytes]], body: bytes = b"", order: str = "<", big: bool = False,
         repeat: int = 1) -> bytes:
    """A TIFF of these tags: number -> (type, count, bytes); bytes of {body} as offset mean where `body` lies."""
    word, room, head = ("Q", 8, 16) if big else ("I", 4, 8)
    start = head + len(body)
    entries, rest = b"", b""
    here = start + (8 if big else 2) + len(tags) * repeat * (20 if big else 12) + room
    for tag, (kind, count, value) in sorted(tags.items()):
        if len(value) > room:
            place, rest = struct.pack(order + word, here + len(rest)), rest + value
        else:
            place = value.ljust(room, b"\0")
        entries += struct.pack(order + ("HHQ" if big else "HHI"), tag, kind, count) + place
    magic = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    return (magic + (struct.pack(order + "HHQ", 8, 0, start) if big else struct.pack(order + "I", start)) + body
            + struct.pack(order + ("Q" if big else "H"), len(tags) * repeat) + entries * repeat + b"\0" * room + rest)


def tiff_tags(width: int, height: int, compression: int = 1, rows: int | None = None, bits: int = 8,
              strips: tuple[list[int], list[int]] = ([8], [1])) -> dict[int, tuple[int, int, bytes]]:
    """The tags that every TIFF needs, of a grey picture."""
    long = "<I"
    offsets, sizes = (b"".join(struct.pack(long, value) for value in values) for values in strips)
    return {256: (4, 1, struct.pack(long, width)), 257: (4, 1, struct.pack(long, height)),
            258: (3, 1, struct.pack("<H", bits)), 259: (3, 1, struct.pack("<H", compression)),
            262: (3, 1, struct.pack("<H", 1)), 273: (4, len(strips[0]), offsets), 277: (3, 1, struct.pack("<H", 1)),
            278: (4, 1, struct.pack(long, rows or height)), 279: (4, len(strips[1]), sizes)}


def webp(width: int, height: int, frames: int) -> bytes:
    """A WebP of a large canvas and many small frames."""
    still = encoded(Image.new("RGB", (2, 2)), "WEBP", lossless=True)[12:]
    frame = b"\0" * 6 + b"\1\0\0\1\0\0" + b"\x32\0\0\0" + still
    frame = b"ANMF" + struct.pack("<I", len(frame)) + frame + b"\0" * (len(frame) % 2)
    body = (b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + struct.pack("<I", width - 1)[:3]
            + struct.pack("<I", height - 1)[:3] + b"ANIM" + struct.pack("<IIH", 6, 0, 0) + frame * frames)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp_runs(width: int, height: int, runs: bytes, kind: int = 1) -> bytes:
    """A run-length coded BMP."""
    palette = b"".join(bytes((i, i // 2, i // 3, 0)) for i in range(256 if kind == 1 else 16))
    start = 54 + len(palette)
    return (b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, 8 if kind == 1 else 4, kind, len(runs), 0, 0, 0, 0) + palette + runs)


def side(rng):
    return rng.choice((1, 64, 500, 2000, 9000, 16000, 65535))


def many_scans(rng):
    size = side(rng), side(rng)
    return jpeg_scans(*size, rng.choice((1, 2, 20, 1000, 20_000)), rng.choice((0xC0, 0xC1, 0xC2, 0xC9, 0xCA)),
                      rng.choice((1, 3, 4)))


def many_segments(rng):
    kind = rng.choice((0xE0, 0xE1, 0xE2, 0xED, 0xFE, 0xDD, 0xC4, 0xDB))
    exif = b"Exif\0\0" + tiff({0x8769: (4, 1, b"\x08\0\0\0"), 0x11A: (5, 8000, b"\1\0\0\0" * 16000)})
    body = rng.choice((b"", b"\0" * 65, exif[:65_000], b"MPF\0" + exif[6:60_000], b"ICC_PROFILE\0\1\1" + b"x" * 1000))
    number = min(rng.choice((1, 100, 30_000)), 2**22 // (len(body) + 4))
    return b"\xff\xd8" + segment(kind, body) * number + jpeg_scans(16, 16, 1)[2:]


def many_frames(rng):
    return gif(side(rng), side(rng), rng.choice((1, 2, 100, 2000, 20_000)), rng.choice((1, 1, 9000)),
               rng.choice((1, 1, 9000)), rng.randrange(4))


def many_blocks(rng):
    extra = rng.choice((b"!\xfe\1x\0", b"!\xfe" + b"\1x" * 1000 + b"\0", b"\x07", b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0"))
    return gif(64, 64, 2, extra=extra * rng.choice((1, 1000, 500_000 // len(extra))))


def many_png_frames(rng):
    return png(*rng.choice(((64, 64), (64, 64), (2000, 2000))), colour=rng.choice((0, 2, 6)),
               frames=rng.choice((2, 100, 2000)))


@functools.lru_cache
def one_large_png(depth: int, colour: int, split: int) -> bytes:
    """Kept: packing it takes longer than most of the cases."""
    return png(3000, 2000, depth, colour, split=split)


def large_png(rng):
    data = one_large_png(rng.choice((8, 16)), rng.choice((0, 6)), rng.choice((0, 8)))
    larger = struct.pack(">II", *rng.choice(((3000, 2000), (9000, 9000), (2**31 - 1, 1), (65535, 65535))))
    return checked(data[:16] + larger + data[24:28] + bytes((rng.randrange(2),)) + data[29:])


def png_texts(rng):
    text = zlib.compress(b"a" * rng.choice((1000, 10**7)))
    kind = rng.choice((b"zTXta\0\0", b"iTXta\0\1\0\0\0", b"iCCPa\0\0", b"eXIf", b"prVt"))
    return png(8, 8, before=chunk(kind[:4], kind[4:] + text) * rng.choice((1, 50, 1000)))


def many_chunks(rng):
    kind = rng.choice((b"IDAT", b"gAMA", b"prVt", b"PLTE", b"fcTL", b"acTL", b"tEXt"))
    return png(8, 8, before=chunk(kind, rng.choice((b"", b"\0" * 26))) * rng.choice((10, 10_000, 300_000)))


def long_tag(rng):
    tag = rng.choice((258, 270, 273, 282, 305, 320, 339, 347, 529, 530, 532, 700, 33432, 34377, 34665, 37500, 60000))
    kind = rng.choice((1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 16))
    size = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}[kind]
    count = rng.choice((3, 1000, 2**18, 2**20))
    return tiff({**tiff_tags(8, 8), tag: (kind, count, b"\1" * (size * count))}, b"\0" * 64, big=rng.random() < 0.2)


def many_tags(rng):
    tags = {tag: (4, 300, b"\1\0\0\0" * 300) for tag in range(1000, 1000 + rng.choice((10, 2000)))}
    return tiff({**tags, **tiff_tags(8, 8)}, b"\0" * 64, repeat=rng.choice((1, 20)))


def many_strips(rng):
    number = rng.choice((10, 5000, 65_000, 300_000))
    coded = rng.choice((b"\0" * 64, zlib.compress(b"\0" * 64), b"\0\0\xff\xff" * 5000, jpeg_scans(8, 1, 1000)))
    return tiff(tiff_tags(rng.choice((8, 1000)), number, rng.choice((1, 5, 7, 8, 32773, 34925, 50000)), 1, strips=(
        [8] * number, [len(coded)] * number)), coded)


def large_strip(rng):
    coded = rng.choice((jpeg_scans(2000, 2000, 500), zlib.compress(b"\0" * 10**7), b"\x80\0\0" * 9))
    tags = tiff_tags(side(rng), side(rng), rng.choice((5, 6, 7, 8, 34925, 50001)), strips=([8], [len(coded)]),
                     rows=rng.choice((None, 1, 2**31, 2**32 - 1)), bits=rng.choice((1, 8, 16, 32)))
    if rng.random() < 0.5:
        tags |= {322: (4, 1, struct.pack("<I", side(rng))), 323: (4, 1, struct.pack("<I", side(rng))),
                 324: tags.pop(273), 325: tags.pop(279)}
    return tiff(tags, coded)


def many_webp_frames(rng):
    return webp(side(rng) + 1, side(rng) + 1, rng.choice((1, 2, 100, 3000, 30_000)))


def many_runs(rng):
    runs = rng.choice((b"\1\1", b"\0\0", b"\0\2\0\1", b"\xff\1", b"\0\x03\1\2\3\0", b"\0\2\xff\xff"))
    return bmp_runs(side(rng), side(rng), runs * rng.choice((10, 10_000, 1_000_000)), rng.choice((1, 2)))


BOMBS = (many_scans, many_segments, many_frames, many_blocks, many_png_frames, large_png, png_texts, many_chunks,
         long_tag, many_tags, many_strips, large_strip, many_webp_frames, many_runs)
