"""Altered videos and animations: damaged, and made to cost much: tables of many samples, many streams, large frames."""
from __future__ import annotations

import functools
import io
import random
import struct
from collections.abc import Iterator

from fuzz import bytes as altered
from fuzz import pictures, seeds

MATRIX = struct.pack(">9I", 65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)


def cases(seed: int, n: int) -> Iterator[tuple[str, bytes]]:
    """Make `n` files, each with a name that ends with the suffix; the same for the same seed."""
    rng = random.Random(seed)
    files = seeds.videos()
    for i in range(n):
        kind = rng.random()
        suffix, data = rng.choice(files)
        if kind < 0.5:
            for name, changed in altered.cases(seed * n + i, 1, [data, rng.choice(files)[1]], 600):
                yield f"{name}.{suffix}", changed
        elif kind < 0.75:
            yield f"mutated {i}.{suffix}", pictures.mutated(data, rng)
        else:
            bomb = rng.choice(BOMBS)
            suffix, data = bomb(rng)
            if rng.random() < 0.3:
                data = pictures.mutated(data, rng)
            yield f"{bomb.__name__} {i}.{suffix}", data


def box(kind: str, *parts: bytes) -> bytes:
    """A box of an MP4."""
    body = b"".join(parts)
    return struct.pack(">I4s", len(body) + 8, kind.encode()) + body


def numbers(*values: int) -> bytes:
    """Numbers of four bytes, after version and flags."""
    return struct.pack(f">{len(values) + 1}I", 0, *values)


def mp4(width: int = 16, height: int = 16, *, sizes: bytes, times: bytes, chunks: bytes, places: bytes,
        edits: bytes = b"", after: bytes = b"", tracks: int = 1, kind: bytes = b"mp4v") -> bytes:
    """An MP4 of video tracks with these tables."""
    entry = struct.pack(">I4s6xH16xHHIIIH32xHh", 86, kind, 1, width, height, 72 << 16, 72 << 16, 0, 1, 24, -1)
    table = box("stbl", box("stsd", numbers(1), entry), box("stts", times), box("stsc", chunks), box("stsz", sizes),
                box("stco", places))
    track = box("trak", box("tkhd", struct.pack(">IIIIII", 7, 0, 0, 1, 0, 10**6) + b"\0" * 16 + MATRIX
                            + struct.pack(">II", width << 16, height << 16)), edits,
                box("mdia", box("mdhd", numbers(0, 0, 1000, 10**6, 0)), box("hdlr", numbers(0) + b"vide" + b"\0" * 13),
                    box("minf", box("vmhd", struct.pack(">IQ", 1, 0)),
                        box("dinf", box("dref", numbers(1), box("url ", struct.pack(">I", 1)))), table)))
    head = box("mvhd", struct.pack(">IIIIIIH10x", 0, 0, 0, 1000, 10**6, 65536, 256), MATRIX, b"\0" * 24, numbers(2)[4:])
    rest = box("mvex", box("trex", numbers(1, 1, 1, 1, 0)))
    return box("ftyp", b"isom\0\0\2\0isomiso2") + box("moov", head, track * tracks, rest) + after


def plain_tables(samples: int, size: int = 1, at: int = 0) -> dict[str, bytes]:
    """The tables of `samples` samples of one size and duration, in one chunk: some bytes for any number of them."""
    return {"sizes": numbers(size, samples), "times": numbers(1, samples, 1), "chunks": numbers(1, 1, samples, 1),
            "places": numbers(1, at)}


def many(rng: random.Random) -> int:
    """A number of entries that a file may claim."""
    return rng.choice((5, 900_000, 10**7, 170_000_000, 2**31 - 1, 2**32 - 1))


def many_samples(rng):
    return "mp4", mp4(**{**plain_tables(many(rng), rng.choice((0, 1))), **(
        {} if rng.random() < 0.5 else {"times": numbers(1, many(rng), 1)})})


def many_edits(rng):
    number = rng.choice((1, 60, 1000, 20_000))
    edit = box("edts", box("elst", numbers(number), struct.pack(">IiI", 10**6, 0, 65536) * number))
    return "mp4", mp4(**plain_tables(rng.choice((5, 100_000, 900_000))), edits=edit)


def many_in_fragments(rng):
    run = box("trun", struct.pack(">II", 0, many(rng)))
    track = box("traf", box("tfhd", struct.pack(">II", 0x20000, 1)), run * rng.choice((1, 50)))
    part = box("moof", box("mfhd", numbers(1)), track)
    return "mp4", mp4(**plain_tables(0), after=part * rng.choice((1, 100)) + box("mdat", b"\0" * 64))


def many_tracks(rng):
    return "mp4", mp4(**plain_tables(5), tracks=rng.choice((1, 30, 64, 65, 1000)))


def many_boxes(rng):
    after = box("free") * rng.choice((10, 200_000)) + box("moof", box("traf")) * rng.choice((10, 50_000))
    return "mp4", mp4(**plain_tables(5), after=after)


@functools.lru_cache
def jpeg(width: int, height: int) -> bytes:
    """A plain JPEG of nearly no bytes."""
    return pictures.jpeg_scans(width, height, 1, 0xC0)


def large_frames(rng):
    """Motion JPEG whose frames are larger than the container says, or have many scans."""
    frame = rng.choice((jpeg(64, 64), jpeg(9000, 9000), jpeg(4000, 4000), pictures.jpeg_scans(500, 500, 1000)))
    number = rng.choice((3, 50, 400))
    tables = {"sizes": numbers(len(frame), number), "times": numbers(1, number, 1), "chunks": numbers(1, 1, number, 1)}
    start = len(mp4(**tables, places=numbers(1, 0), kind=b"jpeg")) + 8
    return "mov", mp4(**tables, places=numbers(1, start), kind=b"jpeg", after=box("mdat", frame * number))


def large_header(rng):
    return "mp4", mp4(rng.choice((1, 65535)), rng.choice((1, 9000, 65535)), **plain_tables(900), kind=rng.choice(
        (b"mp4v", b"raw ", b"jpeg", b"mjp2", b"avc1", b"hvc1", b"av01", b"png ")))


def ebml(number: int, body: bytes, known: bool = True) -> bytes:
    """An element of a Matroska file."""
    name = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return name + ((1 << 56 | len(body)).to_bytes(8, "big") if known else b"\1" + b"\xff" * 7) + body


def matroska(rng):
    """Many tracks, many small blocks, many times."""
    track = b"".join((ebml(0x73C5, b"\1"), ebml(0x83, b"\1"), ebml(0x86, rng.choice(
        (b"V_MJPEG", b"V_UNCOMPRESSED", b"V_VP8", b"A_PCM/INT/LIT", b"S_TEXT/UTF8"))),
        ebml(0xE0, ebml(0xB0, struct.pack(">H", rng.choice((16, 65535)))) + ebml(0xBA, struct.pack(">H", 16)))))
    number = rng.choice((1, 2, 60, 300))
    tracks = b"".join(ebml(0xAE, ebml(0xD7, bytes((i % 250 + 1,))) + track) for i in range(number))
    block = ebml(0xA3, bytes((0x80 + rng.choice((1, 2)),)) + b"\0\0\x80" + rng.choice((b"", b"x", jpeg(16, 16))))
    cues = ebml(0x1C53BB6B, ebml(0xBB, ebml(0xB3, b"\0") + ebml(0xB7, ebml(0xF7, b"\1") + ebml(0xF1, b"\0")))
                * rng.choice((1, 20_000)))
    body = (ebml(0x1549A966, ebml(0x2AD7B1, b"\x0f\x42\x40")) + ebml(0x1654AE6B, tracks) + cues
            + ebml(0x1F43B675, ebml(0xE7, b"\0") + block * rng.choice((3, 1000, 60_000))))
    return "mkv", ebml(0x1A45DFA3, ebml(0x4282, b"matroska")) + ebml(0x18538067, body, rng.random() < 0.5)


def animation(rng):
    """The animations among the pictures, and still pictures that are no video."""
    bomb = rng.choice((pictures.many_frames, pictures.many_png_frames, pictures.many_webp_frames, pictures.many_blocks))
    return {"many_frames": "gif", "many_blocks": "gif", "many_png_frames": "png"}.get(bomb.__name__, "webp"), bomb(rng)


def noise_in_a_stream(rng):
    """An MPEG transport stream that must be found again and again."""
    file = io.BytesIO()
    for _ in range(rng.choice((10, 20_000))):
        file.write(b"\x47\x40\x00\x10" + rng.randbytes(16) * 11 + b"\0" * 8)
        file.write(rng.randbytes(rng.choice((0, 0, 0, 3))))
    return "ts", file.getvalue()


BOMBS = (many_samples, many_edits, many_in_fragments, many_tracks, many_boxes, large_frames, large_header, matroska,
         animation, noise_in_a_stream)
