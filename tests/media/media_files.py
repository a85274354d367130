"""Shared by these tests: pictures, damaged files, and what a refusal must look like."""
import contextlib
import functools
import io
import random
import struct
import zlib

import pytest
from PIL import Image, PngImagePlugin

from minivl.limits import InputError


@contextlib.contextmanager
def refused(*words):
    """The block must raise InputError with all these words in its message, and no text of a library in it."""
    with pytest.raises(InputError) as caught:
        yield caught
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert " at 0x" not in message and "BytesIO" not in message and "Errno" not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def encoded(image, format="PNG", **options):
    """The bytes of a picture file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width=48, height=32, seed=0):
    """A picture no two pixels of which are likely to be the same."""
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))


def png_header(width, height, depth=8, colour=2):
    """A PNG that claims a size, with hardly any pixel data behind it."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
            + chunk(b"IEND", b""))


@functools.lru_cache
def fuzz_seeds():
    """Valid files of many kinds, to be damaged."""
    grey = noise(24, 16).convert("L")
    frames = [noise(24, 16, seed) for seed in range(3)]
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 6, "hello"
    info = PngImagePlugin.PngInfo()
    info.add_itxt("key", "text " * 20, zip=True)
    animated = {"save_all": True, "append_images": frames[1:], "duration": 50}
    return [encoded(frames[0], format, **options) for format, options in (
        ("JPEG", {"exif": exif}), ("JPEG", {"progressive": True}), ("MPO", animated),
        ("PNG", {"pnginfo": info, "exif": exif, "icc_profile": b"x" * 99}), ("PNG", animated), ("GIF", animated),
        ("WEBP", {"exif": exif}), ("WEBP", {"lossless": True}), ("WEBP", animated), ("BMP", {}), ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"}), ("TIFF", {"exif": exif}))
    ] + [encoded(grey.convert(mode), format, **options) for mode, format, options in (
        ("P", "PNG", {"transparency": 3}), ("I;16", "PNG", {}), ("1", "BMP", {}), ("P", "BMP", {}), ("F", "TIFF", {}),
        ("1", "TIFF", {"compression": "group4"}), ("I;16", "TIFF", {}), ("CMYK", "JPEG", {}))]


def mutated(data, rng):
    """A file with one to eight places damaged."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        kind, place = rng.random(), rng.randrange(2, min(len(data), rng.choice((120, 10**6))))
        if kind < 0.5:
            data[place] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        elif kind < 0.65:
            data[place:place + 4] = struct.pack(rng.choice("<>") + "I", rng.choice((0, 1, 2**31 - 1, 2**32 - 1)))
        elif kind < 0.75:
            del data[place:place + rng.randrange(1, 9)]
        elif kind < 0.9:
            data[place:place] = rng.randbytes(rng.randrange(1, 9))
        else:
            data = data[:max(place, 12)]
    if data[:4] == b"\x89PNG":      # right checksums again, or Pillow would look at nothing else
        good, place = data[:8], 8
        while place + 12 <= len(data):
            end = place + 12 + int.from_bytes(data[place:place + 4], "big")
            good += data[place:end - 4] + struct.pack(">I", zlib.crc32(data[place + 4:end - 4]))
            place = end
        data = good
    return bytes(data)
