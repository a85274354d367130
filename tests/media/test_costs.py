"""Files of a few bytes that order much work: refused, or done in the time and memory that Limits promises."""
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from media_files import encoded, noise, refused
from PIL import Image

from minivl import Limits, load_image, load_video
from minivl.media.parts import parts_of

sys.path.append(str(Path(__file__).parents[1]))

from fuzz import pictures as made

MEASURE = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
import PIL.BmpImagePlugin, PIL.GifImagePlugin, PIL.JpegImagePlugin, PIL.PngImagePlugin, PIL.TiffImagePlugin
import PIL.WebPImagePlugin
from minivl.limits import InputError
from minivl.media import load_image, load_video
for path in sys.argv[1:]:
    start = time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (load_image, load_video):
        try:
            load(path)
            found = "loaded"
        except InputError as error:
            found = str(error)
        print(json.dumps([found, time.process_time() - start,
                          (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20]))
"""


def measured(*paths):
    """[[what became of it, CPU seconds, GB above the start], ...], two for each path: as a picture, as a video."""
    out = subprocess.run([sys.executable, "-c", MEASURE, *map(str, paths)], check=True, capture_output=True, text=True)
    return [json.loads(line) for line in out.stdout.splitlines()]


def progressive(repeats, size=(400, 300)):
    """A progressive JPEG whose last scan of coefficients is repeated."""
    parts = encoded(noise(*size), "JPEG", progressive=True).split(b"\xff\xda")
    return b"\xff\xda".join([*parts[:-1], *[parts[-2]] * repeats, parts[-1]])


def strips(number, coded, compression, width=1000, rows=1):
    """A TIFF of strips that all lie at one place."""
    places = [8] * number, [len(coded)] * number
    return made.tiff(made.tiff_tags(width, number * rows, compression, rows, strips=places), coded)


def long_tag(tag, kind, count):
    """A TIFF with a tag of 2 MB."""
    return made.tiff({**made.tiff_tags(8, 8), tag: (kind, count, b"\1\0\0\0" * 2 ** 19)}, b"\0" * 64)


EXIF = b"Exif\0\0" + made.tiff({0x11A: (5, 8000, b"\1\0\0\0" * 16_000)})[:65_000]
BOMBS = {      # name: (the file, words of the refusal as a picture or None, and as a video)
    "jpeg scans": lambda: (made.jpeg_scans(9000, 9000, 1000), "as much work as 81000000000 pixels", ...),
    "jpeg scans, coded": lambda: (progressive(9000), "decoding_work", ...),
    "jpeg segments": lambda: (b"\xff\xd8" + made.segment(0xE1, b"") * 300_000, "200001 segments or more", ...),
    "jpeg exif": lambda: (b"\xff\xd8" + made.segment(0xE1, EXIF) + encoded(noise(), "JPEG")[2:], None, None),
    "jpeg of 4 components": lambda: (made.jpeg_scans(9000, 9000, 2, components=4), "decoding_bytes", ...),
    "png chunks": lambda: (made.png(8, 8, before=made.chunk(b"gAMA", b"") * 300_000), "200001 chunks or more", ...),
    "apng": lambda: (made.png(3000, 3000, frames=2000), None, "2000 frames of 9000000 pixels"),
    "gif canvas": lambda: (made.gif(9000, 9000, 2000), None, "2000 frames of 81000000 pixels"),
    "gif that grows": lambda: (made.gif(9, 9, 2000, 9000, 9000), "cut short", "2000 frames of 81000000 pixels"),
    "gif two frames": lambda: (made.gif(9000, 9000, 2), None, "decoding_bytes"),
    "gif many frames": lambda: (made.gif(1, 1, 20_000), None, None),
    "gif blocks": lambda: (made.gif(9, 9, 1, extra=b"!\xfe" + b"\1x" * 300_000 + b"\0"), "blocks or more", ...),
    "webp canvas": lambda: (made.webp(16_000, 16_000, 2), "decoding takes 4096000000 bytes", ...),
    "webp frames": lambda: (made.webp(2000, 2000, 2000), None, "2000 frames of 4000000 pixels"),
    "webp small frames": lambda: (made.webp(2, 2, 40_000), None, "40000 frames of 4 pixels"),
    "bmp runs": lambda: (made.bmp_runs(100, 100, b"\0\2\0\0" * 2_000_000), "decoding_work", ...),
    "tiff tag of numbers": lambda: (long_tag(60_000, 4, 2 ** 19), None, None),
    "tiff tag of fractions": lambda: (long_tag(282, 5, 2 ** 18), None, None),
    "tiff colours": lambda: (long_tag(320, 4, 2 ** 19), "524288 values in one tag", ...),
    "tiff strips": lambda: (strips(300_000, bytes(1000), 1), "300000 values in one tag", ...),
    "tiff strips over each other": lambda: (strips(9000, b"x" * 2 ** 20, 8, 10), "9437184000 bytes", ...),
    "tiff tile": lambda: (made.tiff({**made.tiff_tags(8, 8), **{322: (4, 1, b"\0\0\1\0"), 323: (4, 1, b"\0\0\1\0"),
                                     324: (4, 1, b"\x08\0\0\0"), 325: (4, 1, b"\x40\0\0\0")}}, b"\0" * 64),
                          "as much work as", ...),
    "tiff jpeg scans": lambda: (strips(1, made.jpeg_scans(3000, 3000, 1000), 7, 3000, 3000), "decoding_work", ...)}


AT_LIMIT = {   # the largest that is accepted, of some kinds
    "jpeg at the limit": lambda: made.jpeg_scans(9400, 9500, 10, components=3), "gif": lambda: made.gif(3000, 3000, 36),
    "webp": lambda: made.webp(7400, 7400, 1)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """name -> what became of it, as a picture and as a video; all in one process, which starts slowly."""
    folder = tmp_path_factory.mktemp("costs")
    paths = {}
    for name in (*BOMBS, *AT_LIMIT):
        paths[name] = folder / str(len(paths))
        paths[name].write_bytes(BOMBS[name]()[0] if name in BOMBS else AT_LIMIT[name]())
    lines = measured(*paths.values())
    return {name: lines[2 * i:2 * i + 2] for i, name in enumerate(paths)}


@pytest.mark.parametrize("name", BOMBS)
def test_what_costs_much_is_refused(found, name):
    """Before: seconds to minutes, or gigabytes. `...`: as a video it is refused as as a picture."""
    _, picture, animation = BOMBS[name]()
    for words, (answer, seconds, memory) in zip((picture, picture if animation is ... else animation), found[name]):
        assert answer == "loaded" if words is None else words in answer
        assert seconds < 4 and memory < 0.9


@pytest.mark.parametrize("name", AT_LIMIT)
def test_what_is_at_the_limits_is_within_time_and_memory(found, name):
    for answer, seconds, memory in found[name]:
        assert answer == "loaded" and seconds < 10 and memory < 1.05


def test_what_no_pixel_depends_on_is_left_out():
    """And what is left gives the same pixels: Pillow itself, on the whole file, is the reference."""
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 1, "text " * 1000
    second = {"save_all": True, "append_images": [noise(seed=1)]}
    for format, options in (
            ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("TIFF", {}), ("TIFF", second),
            ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"big_tiff": True}), ("TIFF", {"compression": "jpeg"}),
            ("TIFF", {"tiffinfo": {278: 3}, "compression": "tiff_adobe_deflate"})):
        for mode in ("RGB", "L", "CMYK") if format != "PNG" else ("RGB", "L", "P", "I;16"):
            picture = noise().convert("L").convert(mode) if mode == "I;16" else noise().convert(mode)
            data = encoded(picture, format, exif=exif, **options)
            parts = parts_of(data, "x", Limits())
            left = Image.open(io.BytesIO(parts.data))
            assert b"text text" not in parts.data or format == "TIFF"      # there only its tag goes
            assert not left.getexif().get(0x10E)
            whole = Image.open(io.BytesIO(data))
            assert (left.mode, left.convert("RGB").tobytes()) == (whole.mode, whole.convert("RGB").tobytes())


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("xmp", [None, 3, 6])
def test_tiff_is_turned_as_pillow_turns_it(orientation, xmp):
    """By its tag or, where it has none, by XMP."""
    tags = made.tiff_tags(2, 3, strips=([8], [6]))
    if orientation:
        tags[274] = (3, 1, struct.pack("<H", orientation))
    if xmp:
        text = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="%d"/>' % xmp
        tags[700] = (1, len(text), text)
    data = made.tiff(tags, bytes(range(6)))
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    assert (load_image(data).size, load_image(data).tobytes()) == (whole.size, whole.tobytes())


def test_limits_can_be_raised_and_lowered(tmp_path):
    data = progressive(20)
    with refused("as much work as 3600000 pixels", "3599999", "decoding_work"):
        load_image(data, limits=Limits(decoding_work=3_599_999))
    assert load_image(data, limits=Limits(decoding_work=3_600_000)).size == (400, 300)
    with refused("decoding takes 1200000 bytes", "decoding_bytes"):
        load_image(data, limits=Limits(decoding_bytes=1_199_999))
    assert load_image(data, limits=Limits(decoding_bytes=1_200_000)).size == (400, 300)
    data = made.gif(20, 10, 5)
    (tmp_path / "x.gif").write_bytes(data)
    count = next(n for n in range(100) if _loads(tmp_path / "x.gif", Limits(picture_parts=n)))
    with refused(f"{count} blocks or more, the limit is {count - 1}", "picture_parts"):
        load_video(tmp_path / "x.gif", limits=Limits(picture_parts=count - 1))


def _loads(path, limits):
    try:
        return load_video(path, limits=limits)
    except ValueError:
        return None


def test_a_jpeg_with_junk_and_marks_in_its_pixels():
    """FF FF before a marker, junk between segments, restart markers, an end inside a comment: as libjpeg reads it."""
    picture = noise(64, 64)
    plain = encoded(picture, "JPEG", restart_marker_blocks=3)
    want = Image.open(io.BytesIO(plain)).tobytes()
    comment = made.segment(0xFE, b"\xff\xd9 \xff\xda \xff\xd8")
    for data in (plain, plain[:2] + comment + plain[2:], plain[:2] + b"\xff\xff" + plain[3:], plain + plain,
                 plain[:2] + made.segment(0xE5, b"\xff\xda" * 3000) + plain[2:]):
        assert load_image(data, limits=Limits(decoding_work=64 * 64)).tobytes() == want


def test_compressed_text_is_never_opened():
    text = zlib.compress(b"a" * 10 ** 8)
    for kind in (b"zTXta\0\0", b"iTXta\0\1\0\0\0", b"iCCPa\0\0"):
        assert load_image(made.png(8, 8, before=made.chunk(kind[:4], kind[4:] + text) * 50)).size == (8, 8)
