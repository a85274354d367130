"""load_image: what a picture becomes, what is refused and how it says so."""
import base64
import contextlib
import io
import os
import random
import re
import struct
import warnings
import zlib

import pytest
from media_files import encoded, fuzz_seeds, mutated, noise, png_header, refused
from PIL import Image, PngImagePlugin

from minivl import load_image, load_video
from minivl.limits import InputError, Limits

# ---- sources ------------------------------------------------------------------------------------------------------

def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    picture, data = noise(), encoded(noise())
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    sources = [picture, str(path), path, path.as_uri(), path.as_uri().replace("file://", "FILE://localhost"), url,
               url.replace("data:image/png", "DATA:image/x;charset=utf-8"), url[:60] + "\n" + url[60:], data,
               bytearray(data), memoryview(data)]
    for source in sources:
        image = load_image(source)
        assert type(image) is Image.Image and image.mode == "RGB"
        assert image.tobytes() == picture.tobytes()


def test_the_result_is_a_copy():
    picture = noise()
    load_image(picture).putpixel((0, 0), (1, 2, 3))
    assert picture.getpixel((0, 0)) == noise().getpixel((0, 0)) != (1, 2, 3)


def test_wrong_types():
    for wrong in (None, 3, 2.5, [noise()], {"image": 1}, object()):
        with refused("a picture cannot be a " + type(wrong).__name__, "PIL image", "path", "bytes"):
            load_image(wrong)


def test_torch_tensor():
    torch = pytest.importorskip("torch")
    with refused("cannot be a Tensor"):
        load_image(torch.zeros(3, 4, 4))


def test_paths_and_urls_can_be_forbidden(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(encoded(noise()))
    for source in (path, str(path), path.as_uri(), "FILE:///etc/passwd"):
        with refused("local paths are not accepted"):
            load_image(source, allow_paths=False)
    for url in ("http://127.0.0.1/x.png?token=secret", "HTTPS://127.0.0.1/x.png"):
        with refused("URLs are not accepted", "://127.0.0.1/x.png"):
            load_image(url, allow_urls=False)
    assert load_image(path.read_bytes(), allow_paths=False, allow_urls=False).size == (48, 32)


def test_missing_directory_and_special_files(tmp_path):
    with refused("'no/such.png'", "no such file"):
        load_image("no/such.png")
    with refused("is a directory"):
        load_image(tmp_path)
    with refused("not a readable path"):
        load_image("a\0b.png")
    with refused("not a readable path", "base64", "..."):       # base64 without its data: prefix
        load_image("iVBORw0KGgo" * 100_000)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        for path in (tmp_path / "pipe.png", "/dev/zero"):
            with refused("not a regular file"):
                load_image(path)
            with refused("not a regular file"):
                load_video(path)
    (tmp_path / "empty.png").write_bytes(b"")
    with refused("empty.png", "empty (0 bytes)"):
        load_image(tmp_path / "empty.png")
    with refused("empty (0 bytes)"):
        load_image(b"")


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(encoded(noise()))

    def forbidden(*_args, **_options):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("builtins.open", forbidden)
    with refused("x.png", "cannot be read", "permissions"):
        load_image(path)


def test_other_urls():
    for url in ("ftp://host/x.png", "s3://bucket/x.png", "file://server/share/x.png"):
        with refused(url, "only http://, https:// and file:/// URLs"):
            load_image(url)
    with refused("not a valid URL"):
        load_image("file://[/x.png")


# ---- sizes --------------------------------------------------------------------------------------------------------

def test_byte_limit_comes_before_reading(tmp_path):
    path = tmp_path / "huge.png"
    with open(path, "wb") as file:
        file.write(encoded(noise()))
        file.truncate(2**34)                # sparse: reading these 16 GiB would not end well
    with refused("huge.png", str(2**34), str(64 * 2**20), "picture_bytes"):
        load_image(path)
    data = encoded(noise())
    exact = Limits(picture_bytes=len(data))
    assert load_image(data, limits=exact).size == (48, 32)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    assert load_image(url, limits=exact).size == (48, 32)
    for source in (data, url):
        with refused(f"has {len(data)} bytes, the limit is {len(data) - 1}", "picture_bytes"):
            load_image(source, limits=Limits(picture_bytes=len(data) - 1))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pixel_limit_comes_before_decoding():
    # Pillow's own guard stops this one: more than twice MAX_IMAGE_PIXELS
    with refused("more than 89478485 pixels", "MAX_IMAGE_PIXELS", "picture_pixels"):
        load_image(png_header(50_000, 50_000))
    with refused("10001x10000 = 100010000 pixels", "100000000", "picture_pixels"):      # not: "cut short"
        load_image(png_header(10_001, 10_000))
    with refused("48x32 = 1536 pixels", "1535"):
        load_image(encoded(noise()), limits=Limits(picture_pixels=1535))
    with refused("the PIL image is 48x32 = 1536 pixels", "1535"):
        load_image(noise(), limits=Limits(picture_pixels=1535))
    assert load_image(encoded(noise()), limits=Limits(picture_pixels=1536)).size == (48, 32)


def test_pillows_bomb_warning_as_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with refused("more than 89478485 pixels"):
            load_image(png_header(9_500, 9_500))


def test_aspect_ratio():
    with refused("1x10000", "ratio of 10000", "the limit is 200", "aspect_ratio"):
        load_image(encoded(Image.new("L", (1, 10_000))))
    with refused("201x1", "ratio of 201"):
        load_image(Image.new("RGB", (201, 1)))
    assert load_image(Image.new("RGB", (200, 1))).size == (200, 1)
    assert load_image(Image.new("RGB", (201, 1)), limits=Limits(aspect_ratio=201)).size == (201, 1)


def test_zero_size():
    with refused("size of zero"):
        load_image(png_header(0, 10))
    with refused("no pixels (0x5)"):
        load_image(Image.new("RGB", (0, 5)))


# ---- damaged files ------------------------------------------------------------------------------------------------

def test_not_a_picture(tmp_path):
    path = tmp_path / "text.png"
    path.write_text("only words")
    with refused("text.png", "not a picture", "JPEG, PNG, WebP, GIF, BMP, TIFF"):
        load_image(path)
    for kind in ("PPM", "TGA", "ICO", "EPS", "PDF"):
        with refused("not a picture", "JPEG, PNG, WebP, GIF, BMP, TIFF"):
            load_image(encoded(noise(), kind))
    for damaged in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0" + b"\xff" * 40, b"RIFF\0\0\0\0WEBPVP8 "):
        with refused("the bytes given", "header of the picture is damaged"):
            load_image(damaged)


@pytest.mark.parametrize("format, options", [
    ("JPEG", {}), ("PNG", {}), ("GIF", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"})])
def test_truncated(format, options):
    data = encoded(noise(), format, **options)
    assert load_image(data).size == (48, 32)
    for share in (0.3, 0.6, 0.9):
        with refused("cut short"):
            load_image(data[:int(len(data) * share)])
    lazy = data[:int(len(data) * 0.6)]
    with contextlib.suppress(OSError, UserWarning):     # some of these do not even open in Pillow: nothing to give
        image = Image.open(io.BytesIO(lazy))
        with refused("the PIL image: the picture is cut short"):
            load_image(image)


def test_truncated_pil_image_and_closed_one():
    data = encoded(noise(), "JPEG")
    image = Image.open(io.BytesIO(data[:len(data) // 2]))
    with refused("the PIL image: the picture is cut short"):
        load_image(image)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_closed_pil_image(tmp_path, format):
    path = tmp_path / "x"
    path.write_bytes(encoded(noise(), format))
    made = noise()
    with Image.open(path) as unread:
        pass
    with open(path, "rb") as file:
        of_file = Image.open(file)
    with Image.open(path) as read:
        read.load()
    if format != "WEBP":        # Pillow's WebP keeps the whole file when it is opened
        for image in (unread, of_file):
            with refused("the PIL image is closed", "image.copy()"):
                load_image(image)
    wanted = load_image(path).tobytes()
    assert load_image(read).tobytes() == wanted         # its pixels were read before its file was closed
    with Image.open(path) as image:
        assert load_image(image).tobytes() == wanted
    for image in (made, read):
        image.close()
        with refused("the PIL image is closed"):
            load_image(image)
    with refused("the PIL image is closed"):
        load_video([noise(), made])


def test_png_with_texts_over_pillows_limits():
    """A megabyte that XMP, a workflow or a profile takes in a PNG is no reason not to show its picture."""
    long = "b" * 10_000_000
    for how in ("tEXt", "zTXt", "iTXt", "iCCP", "after the pixels"):
        info = PngImagePlugin.PngInfo()
        more = {}
        if how in ("tEXt", "zTXt"):
            info.add_text("a", long, zip=how == "zTXt")
        if how == "iTXt":
            info.add_itxt("a", long, zip=True)
        if how == "iCCP":
            more["icc_profile"] = long.encode()
        data = encoded(noise(), "PNG", pnginfo=info, **more)
        if how == "after the pixels":
            text = b"zTXta\0\0" + zlib.compress(long.encode())
            chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
            data = data[:-12] + chunk + data[-12:]
        assert load_image(data).tobytes() == noise().tobytes(), how
    with refused("text or colour profile over Pillow's limit", "give the file itself"):
        load_image(Image.open(io.BytesIO(data)))


def test_png_cut_inside_a_text():
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b" * 1000)
    data = encoded(noise(), "PNG", pnginfo=info)
    for size in range(8, data.index(b"IDAT") + 4, 7):
        with refused("the bytes given"):
            load_image(data[:size])
    with refused("the bytes given"):        # a size that goes round the end
        load_image(data[:33] + b"\xff\xff\xff\xff" + data[37:])


def test_memory_error(monkeypatch):
    def load(_self):
        raise MemoryError
    monkeypatch.setattr(Image.Image, "load", load)
    with refused("the PIL image", "memory"):
        load_image(noise())


def test_mode_without_rule():
    with refused("colour mode La", "RGB"):
        load_image(Image.new("La", (2, 2)))


@pytest.mark.filterwarnings("ignore")
def test_fuzz(tmp_path):
    rng, path, outcomes = random.Random(7), tmp_path / "fuzz.gif", {"taken": 0, "refused": 0}
    limits = Limits(picture_pixels=10**6)
    for _ in range(600):
        data = mutated(rng.choice(fuzz_seeds()), rng)
        path.write_bytes(data)
        bound = rng.choice((None, (0, 0.1)))
        for load, source, options in ((load_image, data, {}), (load_video, path, {"num_segments": 3, "bound": bound})):
            try:
                load(source, limits=limits, **options)
                outcomes["taken"] += 1
            except InputError as error:
                assert " at 0x" not in str(error)
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 200, outcomes       # both kinds really occur


# ---- what a picture becomes ---------------------------------------------------------------------------------------

def pixels(image):
    image = load_image(image)
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


def test_alpha_is_dropped_not_blended():
    assert pixels(encoded(Image.new("RGBA", (2, 1), (255, 0, 0, 0)))) == [(255, 0, 0)] * 2
    assert pixels(Image.new("RGBA", (2, 1), (255, 0, 0, 0))) == [(255, 0, 0)] * 2
    assert pixels(encoded(Image.new("LA", (1, 1), (50, 0)))) == [(50, 50, 50)]
    webp = encoded(Image.new("RGBA", (8, 8), (10, 200, 30, 0)), "WEBP", lossless=True, exact=True)
    assert set(pixels(webp)) == {(10, 200, 30)}


@pytest.mark.parametrize("transparency", [None, 1, b"\xff\0", b"\x80\x10\x20"])
def test_palette_is_expanded(transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([1, 2, 3, 255, 0, 0, 0, 128, 7])
    for x in range(3):
        image.putpixel((x, 0), x)
    options = {} if transparency is None else {"transparency": transparency}
    data = encoded(image, "PNG", **options)
    assert Image.open(io.BytesIO(data)).info.keys() & {"transparency"} == options.keys()
    lazy = Image.open(io.BytesIO(data))
    with warnings.catch_warnings():
        warnings.simplefilter("error")          # Pillow would warn about transparency as bytes
        assert pixels(data) == pixels(lazy) == [(1, 2, 3), (255, 0, 0), (0, 128, 7)]
    assert lazy.info.keys() & {"transparency"} == options.keys()        # the caller's own image is left as it was


def test_one_bit_and_grey_with_transparency():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image)) == [(0, 0, 0), (255, 255, 255)]
    grey = Image.new("L", (2, 1), 77)
    assert pixels(encoded(grey, "PNG", transparency=77)) == [(77, 77, 77)] * 2
    assert pixels(encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG", transparency=(9, 8, 7))) == [(9, 8, 7)]


def test_cmyk():
    c, m, y, k = 40, 90, 200, 50
    expected = [(255 - ink) * (255 - k) / 255 for ink in (c, m, y)]
    image = Image.new("CMYK", (16, 16), (c, m, y, k))
    for data, tolerance in ((encoded(image, "TIFF"), 1), (encoded(image, "JPEG", quality=100), 3)):
        assert Image.open(io.BytesIO(data)).mode == "CMYK"
        assert pixels(data)[0] == pytest.approx(expected, abs=tolerance)


def test_exif_rotation_is_not_applied():
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x112] = 6         # "turn by 90 degrees to show"
    result = load_image(encoded(image, "JPEG", exif=exif, quality=100, subsampling=0))
    assert result.size == (40, 20)
    assert result.getpixel((2, 10))[0] > 240 and result.getpixel((37, 10))[2] > 240


def test_first_picture_of_many():
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    for format in ("GIF", "PNG", "TIFF", "WEBP", "MPO"):        # MPO: a phone's JPEG with a second picture inside
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(red, format, save_all=True, append_images=[blue], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 2
        r, g, b = load_image(data).getpixel((4, 4))
        assert r >= 253 and g <= 2 and b <= 2, format


@pytest.mark.parametrize("mode, format, values", [
    ("I;16", "PNG", [0, 100, 255, 256, 65535]), ("I;16", "TIFF", [0, 100, 255, 256, 65535]),
    ("I;16B", "TIFF", [0, 100, 255, 256, 65535]), ("I", "TIFF", [0, 100, 255, 256, 2**31 - 1]),
    ("F", "TIFF", [0, 100, 255, 300.5, 1e6])])
def test_deep_greyscale_is_clipped_with_a_warning(mode, format, values):
    code = {"I;16": "<5H", "I;16B": ">5H", "I": "=5i", "F": "=5f"}[mode]
    image = Image.frombytes(mode, (5, 1), struct.pack(code, *values))
    data = encoded(image, format)
    for source in (data, image):
        found = mode if source is image else Image.open(io.BytesIO(data)).mode
        assert found in (mode, "I")         # Pillow 10.0 reads 16-bit PNG as I
        with pytest.warns(UserWarning, match=re.escape(f"up to {values[-1]:g} are cut off at 255 (mode {found})")):
            assert pixels(source) == [(v, v, v) for v in (0, 100, 255, 255, 255)]
    with pytest.warns(UserWarning, match="up to 256 are cut off"):
        load_image(Image.frombytes(mode, (5, 1), struct.pack(code, 0, 1, 100, 254, 256)))
    image = Image.frombytes(mode, (5, 1), struct.pack(code, 0, 1, 100, 254, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(encoded(image, format)) == [(v, v, v) for v in (0, 1, 100, 254, 255)]


def test_same_as_the_reference_rule():
    for data in fuzz_seeds():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = Image.open(io.BytesIO(data)).convert("RGB")
            except OSError:         # some Pillow 10 cannot read the MPO it wrote
                with refused("cut short"):
                    load_image(data)
            else:
                assert load_image(data).tobytes() == expected.tobytes()
