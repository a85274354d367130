"""minivl.media: what a picture becomes, what is refused and how it says so, all offline."""
import base64
import contextlib
import functools
import io
import os
import pathlib
import random
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib

import pytest
from PIL import Image, PngImagePlugin

from minivl import media
from minivl.limits import InputError, Limits
from minivl.media import fetch, frame_indices, load_image, load_video


@pytest.fixture(autouse=True)
def _no_outside_settings(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


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
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width=48, height=32, seed=0):
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))


def png_header(width, height, depth=8, colour=2):
    """A PNG that claims a size, with hardly any pixel data behind it."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
            + chunk(b"IEND", b""))


# ---- load_image: sources -----------------------------------------------------------------------------------------

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


def test_bad_data_urls():
    for url in ("data:image/png,abc", "data:text/plain;base64,aGVsbG8=", "data:image/png;base64"):
        with refused("must start with data:image/...;base64,"):
            load_image(url)
    for payload in ("abc", "@@@@", "iVBO=Rw0K", "é" * 8):
        with refused("not valid base64"):
            load_image("data:image/png;base64," + payload)
    with refused("the data: URL is empty"):
        load_image("data:image/png;base64,")
    with refused("the data: URL is not a picture"):
        load_image("data:image/png;base64," + base64.b64encode(b"hello there").decode())


# ---- load_image: sizes -------------------------------------------------------------------------------------------

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


# ---- load_image: damaged files -----------------------------------------------------------------------------------

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
    image = Image.open(io.BytesIO(data))
    image.close()
    with refused("the PIL image"):
        load_image(image)


def test_text_bomb_in_png():
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b" * 10_000_000, zip=True)
    data = encoded(noise(), "PNG", pnginfo=info)
    assert len(data) < 50_000
    with refused("header of the picture is damaged"):
        load_image(data)


def test_memory_error(monkeypatch):
    def load(_self):
        raise MemoryError
    monkeypatch.setattr(Image.Image, "load", load)
    with refused("the PIL image", "memory"):
        load_image(noise())


def test_mode_without_rule():
    with refused("colour mode La", "RGB"):
        load_image(Image.new("La", (2, 2)))


@functools.lru_cache
def fuzz_seeds():
    grey, frames = noise(24, 16).convert("L"), [noise(24, 16, seed) for seed in range(3)]
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


# ---- load_image: what a picture becomes --------------------------------------------------------------------------

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


# ---- fetch -------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def http_server(answer, tls=None, listen=True):
    """A server on 127.0.0.1: `answer(connection, request)` sends whatever it likes. Gives (port, requests seen)."""
    requests, listener = [], socket.create_server(("127.0.0.1", 0))

    def serve(connection):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.enter_context(connection)
            if tls is not None:
                connection = stack.enter_context(tls.wrap_socket(connection, server_side=True))
            request = b""
            while listen and b"\r\n\r\n" not in request and (part := connection.recv(4096)):
                request += part
            requests.append(request.decode("latin-1"))
            answer(connection, requests[-1])

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1], requests
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def reply(body=b"", status="200 OK", headers=(), length=True):
    head = [f"HTTP/1.1 {status}", *headers] + ([f"Content-Length: {len(body)}"] if length else [])
    message = "\r\n".join(head).encode("utf-8") + b"\r\n\r\n" + body
    return lambda connection, _request: connection.sendall(message)


LOCAL = {"allow_hosts": ("127.0.0.1",)}


def answers(table, calls=None):
    """A stand-in for socket.getaddrinfo: host -> list of addresses."""
    def getaddrinfo(host, port, *_args, **_options):
        if calls is not None:
            calls.append(host)
        if host not in table:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "",
                 (address, port, 0, 0) if ":" in address else (address, port)) for address in table[host]]
    return getaddrinfo


def test_fetch_and_load_from_a_server(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")      # must not be used
    data = encoded(noise())
    with http_server(reply(data)) as (port, requests):
        assert fetch(f"http://127.0.0.1:{port}/a%20b/é.png?x=1&y=ü#part", **LOCAL) == data
        assert load_image(f"HTTP://127.0.0.1:{port}", **LOCAL).tobytes() == noise().tobytes()
    first, second = requests
    assert first.startswith("GET /a%20b/%C3%A9.png?x=1&y=%C3%BC HTTP/1.1\r\n") and second.startswith("GET / HTTP/1.1")
    assert f"Host: 127.0.0.1:{port}\r\n" in first
    assert "User-Agent: minivl\r\n" in first and "Accept-Encoding: identity\r\n" in first
    assert "cookie" not in first.lower() and "authorization" not in first.lower()


def test_fetch_body_forms():
    chunked = b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n"
    for answer in (reply(b"abcdefg", length=False), reply(chunked, headers=["Transfer-Encoding: chunked"],
                                                          length=False)):
        with http_server(answer) as (port, _):
            assert fetch(f"http://127.0.0.1:{port}/", **LOCAL) == b"abcdefg"


def test_name_is_resolved_once_and_sent_as_host(monkeypatch):
    calls = []
    monkeypatch.setattr(socket, "getaddrinfo", answers({"pictures.example": ["127.0.0.1"]}, calls))
    with http_server(reply(b"x")) as (port, requests):
        assert fetch(f"http://Pictures.example:{port}/", allow_hosts=["pictures.EXAMPLE"]) == b"x"
    assert f"Host: pictures.example:{port}\r\n" in requests[0] and calls == ["pictures.example"]


@pytest.mark.parametrize("value", ["1", "on", "Yes", "TRUE"])
def test_offline(monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with refused("https://host/a.png", "HF_HUB_OFFLINE"):
        fetch("https://host/a.png?token=secret")


def test_offline_false_values(monkeypatch):
    with http_server(reply(b"x")) as (port, _):
        for value in ("", "0", "no", "false"):
            monkeypatch.setenv("HF_HUB_OFFLINE", value)
            assert fetch(f"http://127.0.0.1:{port}/", **LOCAL) == b"x"


PRIVATE = ["127.0.0.1", "127.255.255.254", "10.0.0.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
           "0.0.0.0", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.0.0.8", "192.0.2.1",
           "198.18.0.1", "192.88.99.1", "::1", "::", "fe80::1", "fe80::1%2", "fc00::1", "fd12::1", "fec0::1", "ff02::1",
           "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "2002:7f00:1::", "2002:0808:0808::",
           "2001:0:4136:e378:8000:63bf:3fff:fdd2", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100::1"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused(monkeypatch, address):
    # also when only one of several addresses is private
    monkeypatch.setattr(socket, "getaddrinfo", answers({"evil.example": ["93.184.216.34", address]}))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    with refused("http://evil.example/a", "not on the public internet", "allow_hosts=('evil.example',)"):
        fetch("http://evil.example/a?token=secret")


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808",
                                     "::ffff:8.8.8.8"])
def test_public_addresses_are_connected_to_as_checked(monkeypatch, address):
    """Also DNS rebinding: a second question would get 127.0.0.1, so it must not be asked."""
    table, connected = {"good.example": [address]}, []

    def getaddrinfo(*args, **options):
        result = answers(table)(*args, **options)
        table["good.example"] = ["127.0.0.1"]
        return result

    def connect(_self, target):
        connected.append(target[:2])
        raise ConnectionRefusedError
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with refused("http://good.example:8080/", "connection failed"):
        fetch("http://good.example:8080/")
    assert connected == [(address, 8080)] and table["good.example"] == ["127.0.0.1"]


def test_second_address_is_tried(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", answers({"two.example": ["127.0.0.9", "127.0.0.1"]}))
    with http_server(reply(b"x")) as (port, _):     # listens on 127.0.0.1 only
        assert fetch(f"http://two.example:{port}/", allow_hosts=["two.example"]) == b"x"


def test_silent_address_leaves_time_for_the_next(monkeypatch):
    waits = []

    def connect(self, _target):
        waits.append(self.gettimeout())
        raise TimeoutError
    monkeypatch.setattr(socket, "getaddrinfo", answers({"two.example": ["8.8.8.8", "8.8.4.4"]}))
    monkeypatch.setattr(socket.socket, "connect", connect)
    with refused("connection failed"):
        fetch("http://two.example/", limits=Limits(fetch_seconds=8))
    assert waits == pytest.approx([4, 8], abs=0.5)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "017700000001", "[::1]",
                                  "[::ffff:127.0.0.1]", "0", "localhost."])
def test_spellings_of_this_machine(host):
    with pytest.raises(InputError, match="not on the public internet|cannot be resolved"):
        fetch(f"http://{host}/")


def test_allow_hosts_is_the_name_as_written():
    with http_server(reply(b"x")) as (port, _):
        with refused("not on the public internet"):
            fetch(f"http://127.0.0.1:{port}/", allow_hosts=["localhost"])
        with refused("not on the public internet"):
            fetch(f"http://localhost:{port}/", allow_hosts=["127.0.0.1"])
        assert fetch(f"http://localhost:{port}/", allow_hosts=["localhost"]) == b"x"
        for wrong in ("127.0.0.1", None):
            with refused("allow_hosts must be a list or tuple", repr(wrong)):
                fetch(f"http://127.0.0.1:{port}/", allow_hosts=wrong)


@pytest.mark.parametrize("url, words", [
    ("http://user:secret@host/", ["http://host/", "user name and password"]),
    ("http://secret@host/", ["user name and password"]),
    ("http://good.example\\@evil.example/", ["user name and password"]),
    ("http://host/a b", ["white space or control characters"]),
    ("http://host/a\r\nX-Header: 1", ["white space or control characters"]),
    ("http://ho\tst/", ["white space or control characters"]),
    ("http://host/\x7f", ["white space or control characters", "http://host/?"]),
    ("http://host/\u2028", ["white space or control characters"]),
    (" http://host/", ["white space or control characters"]),
    ("ftp://host/", ["only http and https", "ftp"]),
    ("file:///etc/passwd", ["only http and https", "file"]),
    ("no url", ["white space"]), ("nourl", ["without a scheme"]),
    ("http:///path", ["names no host"]), ("http://", ["names no host"]),
    ("http://host:99999/", ["the port is not a number"]), ("http://host:http/", ["the port is not a number"]),
    ("http://[::1/", ["not a valid URL"]),
    ("http://a..b/", ["cannot be resolved"]), ("http://" + "a" * 70 + ".example/", ["cannot be resolved"])])
def test_urls_refused_before_connecting(monkeypatch, url, words):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    with refused(*words) as caught:
        fetch(url)
    assert "secret" not in str(caught.value)


def test_not_a_str():
    for wrong in (None, b"http://host/", 3):
        with refused("must be a str, not a " + type(wrong).__name__):
            fetch(wrong)


def test_unknown_host(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", answers({}))
    with refused("http://nowhere.example/", "cannot be resolved"):
        fetch("http://nowhere.example/?token=secret")


def test_connection_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with refused(f"http://127.0.0.1:{port}/x", "connection failed"):
        load_image(f"http://127.0.0.1:{port}/x?token=secret", **LOCAL)


@pytest.mark.parametrize("status", ["404 Not Found", "500 Oops", "204 No Content", "206 Partial Content", "304 Same",
                                    "401 Unauthorized"])
def test_only_status_200(status):
    with http_server(reply(b"", status)) as (port, _):
        with refused(f"http://127.0.0.1:{port}/a", "status " + status[:3], "expected 200"):
            fetch(f"http://127.0.0.1:{port}/a?token=secret", **LOCAL)


def test_size_limit():
    limits = Limits(picture_bytes=1000)

    def endless(connection, _request):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b"x" * 1000)

    def promise(connection, _request):                  # only the header: must be refused before any body comes
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n")
        time.sleep(5)
    with http_server(promise) as (port, _):
        start = time.monotonic()
        with refused("has 1001 bytes, the limit is 1000", "picture_bytes"):
            fetch(f"http://127.0.0.1:{port}/", limits=limits, **LOCAL)
        assert time.monotonic() - start < 2
    for answer in (endless, reply(b"x" * 1001, length=False)):
        with http_server(answer) as (port, _):
            with refused("more than 1000 bytes, the limit", "picture_bytes"):
                fetch(f"http://127.0.0.1:{port}/", limits=limits, **LOCAL)
    with http_server(reply(b"x" * 1000)) as (port, _):
        assert len(fetch(f"http://127.0.0.1:{port}/", limits=limits, **LOCAL)) == 1000


def test_answers_that_break_off_or_are_no_http():
    with http_server(lambda c, _: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")) as (port, _):
        with refused("the connection ended after 3 of 10 bytes"):
            fetch(f"http://127.0.0.1:{port}/", **LOCAL)
    for message in (b"", b"hello\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200,
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc",
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc",
                    b"HTTP/1.1 200 OK\r\n" + b"A" * 70_000 + b": b\r\n\r\n"):
        with http_server(lambda c, _, message=message: c.sendall(message)) as (port, _):
            with refused(f"http://127.0.0.1:{port}/: the "):        # connection failed, or answer is not valid HTTP
                fetch(f"http://127.0.0.1:{port}/", **LOCAL)


def test_content_encoding():
    with http_server(reply(b"x", headers=["Content-Encoding: gzip"])) as (port, _):
        with refused("Content-Encoding 'gzip'", "identity"):
            fetch(f"http://127.0.0.1:{port}/", **LOCAL)
    with http_server(reply(b"x", headers=["Content-Encoding: Identity"])) as (port, _):
        assert fetch(f"http://127.0.0.1:{port}/", **LOCAL) == b"x"


def drip_header(connection, _request):
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


def drip_body(connection, _request):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


def drip_redirects(connection, _request):
    time.sleep(0.2)
    reply(status="302 Found", headers=["Location: /again"])(connection, _request)


def silence(_connection, _request):
    time.sleep(5)


@pytest.mark.parametrize("answer", [drip_header, drip_body, drip_redirects, silence])
def test_deadline(answer):
    start = time.monotonic()
    with http_server(answer) as (port, _):
        with refused(f"http://127.0.0.1:{port}/", "longer than 0.5 seconds", "fetch_seconds"):
            fetch(f"http://127.0.0.1:{port}/?token=secret", limits=Limits(fetch_seconds=0.5), **LOCAL)
    assert 0.4 < time.monotonic() - start < 1.5


def test_deadline_leaves_no_thread_behind():
    before = set(threading.enumerate())
    gone = threading.Event()

    def answer(connection, request):
        try:
            drip_header(connection, request)
        finally:
            gone.set()
    with http_server(answer) as (port, _):
        with refused("longer than 0.3 seconds"):
            fetch(f"http://127.0.0.1:{port}/", limits=Limits(fetch_seconds=0.3), **LOCAL)
        assert gone.wait(2)                     # the connection was really shut, not just forgotten
    until = time.monotonic() + 2
    while set(threading.enumerate()) - before and time.monotonic() < until:
        time.sleep(0.02)
    assert not set(threading.enumerate()) - before


def test_slow_name_server(monkeypatch):
    release = threading.Event()

    def getaddrinfo(*_args, **_options):
        release.wait(5)
        raise socket.gaierror
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with refused("longer than 0.3 seconds"):
        fetch("http://slow.example/", limits=Limits(fetch_seconds=0.3))
    release.set()


def redirect(target, status="302 Found"):
    return lambda connection, request: (
        reply(b"arrived") if request.startswith("GET /end") else
        reply(status=status, headers=[f"Location: {target}"]))(connection, request)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 Other", "307 Temporary", "308 Permanent"])
def test_redirects_are_followed(status):
    for target in ("/end", "end?x=1", "//127.0.0.1:{port}/end", "http://127.0.0.1:{port}/end", "/end/é"):
        port_box = []

        def answer(connection, request, target=target, port_box=port_box):
            redirect(target.format(port=port_box[0]), status)(connection, request)
        with http_server(answer) as (port, requests):
            port_box.append(port)
            assert fetch(f"http://127.0.0.1:{port}/", **LOCAL) == b"arrived"
            assert len(requests) == 2
    assert requests[1].startswith("GET /end/%C3%A9 ")


@pytest.mark.parametrize("target, words", [
    ("http://10.0.0.1/a", ["http://10.0.0.1/a", "not on the public internet"]),
    ("http://169.254.169.254/latest/", ["not on the public internet"]),
    ("http://localhost/a", ["http://localhost/a", "not on the public internet"]),
    ("http://[::ffff:10.0.0.1]/", ["not on the public internet"]),
    ("file:///etc/passwd", ["only http and https", "file"]), ("ftp://host/x", ["only http and https", "ftp"]),
    ("http://user:pw@127.0.0.1/", ["user name and password"]), ("/a b", ["white space"]),
    ("", ["status 302", "without a Location"]), ("http://[", ["redirects to something that is not a valid URL"]),
    ("http://127.0.0.1:x/", ["the port is not a number"])])
def test_redirects_are_checked_like_the_first_url(target, words):
    with http_server(redirect(target)) as (port, requests):
        with refused(*words):
            fetch(f"http://127.0.0.1:{port}/", **LOCAL)
        assert len(requests) == 1


def test_redirect_name_is_checked_again(monkeypatch):
    """The first host is allowed by name; the next one resolves to a private address and is not."""
    monkeypatch.setattr(socket, "getaddrinfo", answers({"a.example": ["127.0.0.1"], "b.example": ["127.0.0.1"]}))
    with http_server(lambda c, r: redirect(f"http://b.example:{port_box[0]}/end")(c, r)) as (port, requests):
        port_box = [port]
        with refused("http://b.example", "not on the public internet"):
            fetch(f"http://a.example:{port}/", allow_hosts=["a.example"])
        assert len(requests) == 1
        assert fetch(f"http://a.example:{port}/", allow_hosts=["a.example", "b.example"]) == b"arrived"


def test_redirect_loop():
    with http_server(redirect("/again")) as (port, requests):
        with refused(f"http://127.0.0.1:{port}/start", "more than 5 redirects", "Limits(redirects"):
            fetch(f"http://127.0.0.1:{port}/start", **LOCAL)
        assert len(requests) == 6
        with refused("more than 0 redirects"):
            fetch(f"http://127.0.0.1:{port}/", limits=Limits(redirects=0), **LOCAL)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(certificate and key file) for pictures.example, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", path, "-out", str(path) + ".crt", "-days", "2", "-subj", "/CN=pictures.example",
                    "-addext", "subjectAltName=DNS:pictures.example"], check=True, capture_output=True)
    with open(path, "ab") as file:
        file.write(pathlib.Path(str(path) + ".crt").read_bytes())
    return path


def test_https(monkeypatch, certificate):
    names = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    monkeypatch.setattr(socket, "getaddrinfo",
                        answers({"pictures.example": ["127.0.0.1"], "other.example": ["127.0.0.1"]}))
    allowed = {"allow_hosts": ["pictures.example", "other.example"]}

    def answer(connection, request):
        if request.startswith("GET /down"):
            return reply(status="302 Found", headers=["Location: http://pictures.example/"])(connection, request)
        if request.startswith("GET /drip"):
            return drip_header(connection, request)
        return reply(b"secret picture")(connection, request)
    with http_server(answer, tls=context) as (port, requests):
        with refused("certificate is not valid for pictures.example"):          # signed by nobody known
            fetch(f"https://pictures.example:{port}/", **allowed)
        assert not requests
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetch(f"https://pictures.example:{port}/", **allowed) == b"secret picture"
        assert names[-1] == "pictures.example" and f"Host: pictures.example:{port}\r\n" in requests[0]
        with refused("certificate is not valid for other.example"):
            fetch(f"https://other.example:{port}/", **allowed)
        with refused("redirects from https to unprotected http"):
            fetch(f"https://pictures.example:{port}/down", **allowed)
        start = time.monotonic()
        with refused("longer than 0.5 seconds"):
            fetch(f"https://pictures.example:{port}/drip", limits=Limits(fetch_seconds=0.5), **allowed)
        assert time.monotonic() - start < 1.5
    with http_server(lambda connection, _request: time.sleep(5)) as (port, _):      # never answers the handshake
        with refused("longer than 0.3 seconds"):
            fetch(f"https://pictures.example:{port}/", limits=Limits(fetch_seconds=0.3), **allowed)
    with http_server(reply(b"x"), listen=False) as (port, _):                       # speaks http on an https port
        with refused("connection failed", "https"):
            fetch(f"https://pictures.example:{port}/", limits=Limits(fetch_seconds=2), **allowed)


# ---- frame_indices -----------------------------------------------------------------------------------------------

def test_frame_indices_golden():
    assert frame_indices(299, 30, 8) == [18, 55, 93, 130, 168, 205, 242, 280]
    assert frame_indices(1000, 25, 6, (2, 5)) == [56, 68, 81, 94, 106, 118]
    assert frame_indices(5, 24, 8) == [0, 1, 1, 2, 2, 3, 4, 4]
    assert frame_indices(0, None, 3) == [0, 0, 0]
    assert frame_indices(299, None, 8) == frame_indices(299, 30, 8)


def test_frame_indices_round_half_to_even():
    # parts of 2.5 frames: 1.25 + round(0, 2.5 -> 2, 5, 7.5 -> 8); half up would give 4 for the second
    assert frame_indices(10, None, 4) == [1, 3, 6, 9]
    # start 0.5 * 5 = 2.5 -> 2, end 1.5 * 5 = 7.5 -> 8
    assert frame_indices(100, 5, 3, (0.5, 1.5)) == [3, 5, 7]


def test_frame_indices_bounds():
    assert frame_indices(299, 30, 2, (-5, 2)) == [15, 45]           # clamped to 0..60
    assert frame_indices(299, 30, 2, [9, 100]) == [277, 291]        # clamped to 270..299, part 14.5: 277.25 and + 14
    assert frame_indices(299, 30, 3, (1, 1)) == [30, 30, 30]
    assert frame_indices(2_000_000, 10, 1) == [500_000]             # the reference stops at 100000 seconds
    for bound in ((20, 30), (-5, -1), (10.1, 11)):
        with refused(f"bound {bound[0]:g}..{bound[1]:g} seconds lies outside the video", "300 frames", "10 seconds"):
            frame_indices(299, 30, 2, bound)


def test_frame_indices_stay_inside():
    rng = random.Random(3)
    for _ in range(2000):
        last, count = rng.randrange(200), rng.randrange(1, 40)
        found = frame_indices(last, rng.choice((None, 0.5, 29.97)), count)
        assert len(found) == count and found == sorted(found) and 0 <= found[0] and found[-1] <= last


@pytest.mark.parametrize("arguments, words", [
    ((299, 30, 0), ["num_segments", "0"]), ((299, 30, -3), ["-3"]), ((299, 30, 2.5), ["2.5"]),
    ((299, 30, True), ["True"]),
    ((299, 30, 513), ["513", "512", "video_frames"]), ((-1, 30, 8), ["max_frame", "-1"]), ((1.5, 30, 8), ["max_frame"]),
    ((299, float("nan"), 8), ["fps must be a finite number"]), ((299, "30", 8), ["fps must be a finite number"]),
    ((299, 0, 8), ["fps must be above 0"]), ((299, -1, 8), ["fps must be above 0"]), ((299, 1e7, 8), ["1e+07"]),
    ((299, 30, 8, (float("nan"), 2)), ["start of bound", "nan"]), ((299, 30, 8, (0, float("inf"))), ["end of bound"]),
    ((299, 30, 8, (0, 10**400)), ["end of bound"]), ((299, 30, 8, (0, 1e300)), ["1e9"]),
    ((299, 30, 8, (5, 2)), ["5..2", "end before it starts"]), ((299, 30, 8, (5,)), ["(start, end)"]),
    ((299, 30, 8, 5), ["(start, end)"]), ((299, 30, 8, "ab"), ["(start, end)"]), ((299, 30, 8, ("a", "b")), ["bound"]),
    ((299, None, 8, (0, 1)), ["bound is in seconds", "pass fps"])])
def test_frame_indices_bad_input(arguments, words):
    with refused(*words):
        frame_indices(*arguments)


def test_frame_indices_limit_can_be_raised():
    assert len(frame_indices(299, 30, 513, limits=Limits(video_frames=513))) == 513


# ---- load_video: pictures ----------------------------------------------------------------------------------------

def grey_frames(count, size=(16, 16), step=10):
    return [Image.new("RGB", size, (step * index,) * 3) for index in range(count)]


def every(count):
    """Frame numbers that `num_segments=100` takes of a video of `count` frames: all of them, some several times."""
    indices = frame_indices(count - 1, None, 100)
    assert set(indices) == set(range(count))
    return indices


def levels(frames):
    """Grey level / 10 of each frame: its number, for frames made by `grey_frames`."""
    assert all(type(frame) is Image.Image and frame.mode == "RGB" for frame in frames)
    return [round(frame.getpixel((frame.width // 2, frame.height // 2))[1] / 10) for frame in frames]


def test_folder_in_natural_order(tmp_path):
    for index, frame in enumerate(grey_frames(12)):
        frame.save(tmp_path / f"Frame{index}.PNG" if index % 2 else tmp_path / f"frame{index}.png")
    (tmp_path / ".hidden.txt").write_text("ignored")
    assert levels(load_video(tmp_path, num_segments=100)) == every(12)
    assert levels(load_video(str(tmp_path), num_segments=4)) == [1, 4, 7, 9] == frame_indices(11, None, 4)
    assert levels(load_video(tmp_path.as_uri(), num_segments=2, bound=(1, 2), fps=5)) == [6, 8]
    with refused("bound is in seconds", "pass fps"):
        load_video(tmp_path, bound=(1, 2))
    with refused("local paths are not accepted"):
        load_video(tmp_path, allow_paths=False)
    (tmp_path / "frame3.txt").write_text("stray")
    with refused("'frame3.txt'", "not a picture"):
        load_video(tmp_path)


def test_folder_problems(tmp_path):
    (tmp_path / ".hidden.png").write_bytes(b"x")
    with refused("is an empty folder"):
        load_video(tmp_path)
    (tmp_path / "1.png").write_bytes(encoded(noise()))
    (tmp_path / "2.png").write_bytes(encoded(noise())[:300])
    with refused("2.png", "cut short"):
        load_video(tmp_path, num_segments=4)
    assert load_video(tmp_path, num_segments=1)[0].size == (48, 32)     # only what is chosen is opened
    with refused("1.png", "1536 pixels", "100"):
        load_video(tmp_path, num_segments=1, limits=Limits(picture_pixels=100))


def test_list_of_frames(tmp_path):
    frames = grey_frames(10)
    frames[3].save(tmp_path / "x.png")
    mixed = [*frames[:3], tmp_path / "x.png", encoded(frames[4]), *frames[5:]]
    assert levels(load_video(mixed, num_segments=100)) == every(10)
    assert levels(load_video(tuple(mixed), num_segments=4)) == [1, 3, 5, 8] == frame_indices(9, None, 4)
    assert levels(load_video(frames, num_segments=2, bound=(1, 2), fps=3)) == [3, 5]
    assert levels(load_video(frames[:1], num_segments=3)) == [0, 0, 0]
    with refused("the list of frames holds no frames"):
        load_video([])
    with refused("local paths are not accepted"):
        load_video(mixed, num_segments=100, allow_paths=False)
    with refused("URLs are not accepted"):
        load_video(["http://127.0.0.1/x.png"], num_segments=1)
    with refused("a picture cannot be a int"):
        load_video([1, 2])


def test_total_frames_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(media, "_TOTAL_FRAMES", 9)
    (tmp_path / "x.gif").write_bytes(animation("GIF", {}, count=10))
    for source in (grey_frames(10), tmp_path / "x.gif"):
        with refused("has 10 frames", "the limit is 9"):
            load_video(source)


def test_memory_of_all_frames_is_bounded(tmp_path):
    frames, limits = grey_frames(20), Limits(picture_pixels=256)         # 16 pictures of 256 pixels are the limit
    assert len(load_video(frames, num_segments=16, limits=limits)) == 16
    assert len(load_video(frames[:16], num_segments=100, limits=limits)) == 100     # repeated frames cost nothing
    with refused("first 17 frames", "4352 pixels", "4096"):
        load_video(frames, num_segments=100, limits=limits)


ANIMATIONS = [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})]


def animation(format, options, count=12, duration=100):
    """The left half changes, the right half stays: writers then store only the part that changed."""
    frames = [Image.new("RGB", (32, 16), (200, 30, 60)) for _ in range(count)]
    for index, frame in enumerate(frames):
        frame.paste((index * 10,) * 3, (0, 0, 20, 16))
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=duration, **options)


@pytest.mark.parametrize("format, options", ANIMATIONS)
def test_animation(tmp_path, format, options):
    path = tmp_path / "animation.bin"           # recognized by content, not by name
    path.write_bytes(animation(format, options))
    frames = load_video(path, num_segments=100)
    assert levels(frames) == every(12)
    assert {frame.getpixel((30, 8)) for frame in frames} == {(200, 30, 60)}       # composed with what was there
    assert levels(load_video(path, num_segments=4)) == [1, 4, 7, 9]
    # 100 ms a frame = 10 frames per second: 0.5..1 s is frames 5..10
    assert levels(load_video(path, num_segments=2, bound=(0.5, 1))) == [6, 8] == frame_indices(11, 10, 2, (0.5, 1))
    assert levels(load_video(path, num_segments=2, bound=(0.5, 1), fps=4)) == [2, 3] == frame_indices(11, 4, 2, (.5, 1))
    with refused("lies outside the video", "1.2 seconds"):
        load_video(path, bound=(5, 6))


@pytest.mark.parametrize("format, options", ANIMATIONS)
def test_animation_mean_duration(tmp_path, format, options):
    path = tmp_path / "x.gif"
    path.write_bytes(animation(format, options, count=4, duration=[50, 350, 200, 200]))
    # mean 200 ms = 5 frames per second: 0.4..0.6 s is frames 2..3
    assert levels(load_video(path, num_segments=1, bound=(0.4, 0.6))) == [2]
    path.write_bytes(animation(format, options, count=4, duration=5000))        # a slide show: 0.2 frames per second
    assert levels(load_video(path, num_segments=1, bound=(10, 15))) == [2]


@pytest.mark.parametrize("format, options", ANIMATIONS)
def test_animation_cut_short(tmp_path, format, options):
    path, data = tmp_path / "x.gif", encoded(noise(seed=0), format, save_all=True, duration=100,
                                             append_images=[noise(seed=seed) for seed in range(1, 6)], **options)
    for share in (0.02, 0.3, 0.9):
        path.write_bytes(data[:int(len(data) * share)])
        with refused("x.gif", "cut short"):
            load_video(path, num_segments=6, bound=(0, 0.5), limits=Limits())


def test_animation_without_durations(tmp_path):
    path = tmp_path / "x.gif"
    path.write_bytes(animation("GIF", {}, duration=0))
    assert levels(load_video(path, num_segments=100)) == every(12)
    with refused("x.gif", "how long its frames are shown", "pass fps"):
        load_video(path, bound=(0, 1))
    assert len(load_video(path, bound=(0, 1), fps=10)) == 8


def test_animated_png_with_a_still_in_front(tmp_path):
    path, frames = tmp_path / "x.png", grey_frames(4)
    path.write_bytes(encoded(Image.new("RGB", (16, 16), "white"), "PNG", save_all=True, append_images=frames,
                             duration=100, default_image=True))
    with Image.open(path) as image:
        assert image.n_frames == 5
    assert levels(load_video(path, num_segments=100)) == every(4)
    assert levels(load_video(path, num_segments=2, bound=(0.1, 0.3))) == [1, 2] == frame_indices(3, 10, 2, (0.1, 0.3))


def test_still_pictures_are_videos_of_one_frame(tmp_path):
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    for format in ("JPEG", "PNG", "BMP", "GIF", "WEBP"):
        (tmp_path / "x").write_bytes(encoded(red, format))
        assert len(load_video(tmp_path / "x", num_segments=3)) == 3
    for format in ("TIFF", "MPO"):                      # further pages and previews are not frames
        (tmp_path / "x").write_bytes(encoded(red, format, save_all=True, append_images=[blue]))
        assert all(frame.getpixel((4, 4))[0] > 250 for frame in load_video(tmp_path / "x", num_segments=100))


def test_animation_that_grows(tmp_path):
    """The second frame of this GIF is larger than the canvas its header announces; Pillow grows the canvas."""
    small, large = (encoded(noise(size, size).quantize(256), "GIF") for size in (8, 64))
    (tmp_path / "x.gif").write_bytes(small[:-1] + large[13 + 3 * 256:])
    assert load_video(tmp_path / "x.gif", num_segments=1, limits=Limits(picture_pixels=64))[0].size == (8, 8)
    if load_video(tmp_path / "x.gif", num_segments=100)[-1].size == (8, 8):
        pytest.skip("this Pillow (10.0) crops to the canvas")
    with refused("frame 1", "64x64 = 4096 pixels", "4095"):
        load_video(tmp_path / "x.gif", num_segments=100, limits=Limits(picture_pixels=4095))


def test_animation_limits(tmp_path):
    path = tmp_path / "x.gif"
    path.write_bytes(animation("GIF", {}))
    size = path.stat().st_size
    for field in ("video_bytes", "picture_bytes"):
        with refused(f"has {size} bytes, the limit is {size - 1}", field):
            load_video(path, limits=Limits(**{field: size - 1}))
    with refused("32x16 = 512 pixels", "511"):
        load_video(path, limits=Limits(picture_pixels=511))
    with refused("is 32x16, an aspect ratio of 2", "1.5"):
        load_video(path, limits=Limits(aspect_ratio=1.5))
    with refused("num_segments is 8", "the limit is 7"):
        load_video(path, limits=Limits(video_frames=7))
    path.write_text("not a gif")
    with refused("x.gif", "not a picture"):
        load_video(path)
    path.write_bytes(b"")
    with refused("empty (0 bytes)"):
        load_video(path)


def test_load_video_bad_sources(tmp_path):
    for wrong in (None, 3, b"bytes", noise()):
        with refused("a video cannot be a " + type(wrong).__name__):
            load_video(wrong)
    for url in ("http://host/x.mp4", "HTTPS://host/x.mp4", "data:video/mp4;base64,AAAA"):
        with refused("local files only", "download"):
            load_video(url)
    with refused("'no/such.mp4'", "no such file"):
        load_video("no/such.mp4")
    with refused("local paths are not accepted"):
        load_video("no/such.mp4", allow_paths=False)
    with refused("num_segments"):       # before looking for the file
        load_video("no/such.mp4", num_segments=0)
    with refused("end before it starts"):
        load_video("no/such.mp4", bound=(3, 1))


# ---- load_video: containers --------------------------------------------------------------------------------------

def write_video(path, frames, codec="mpeg4", container=None, title="", patch=lambda data: data):
    """Ten frames per second; `patch` may change the bytes of each packet."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=container or {}) as output:
        output.metadata["title"] = title
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for frame in [*map(av.VideoFrame.from_image, frames), None]:
            for packet in stream.encode(frame):
                patched = av.Packet(patch(bytes(packet)))
                patched.stream, patched.time_base, patched.is_keyframe = stream, packet.time_base, packet.is_keyframe
                patched.pts, patched.dts, patched.duration = packet.pts, packet.dts, packet.duration
                output.mux(patched)
    return path


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    path = tmp_path / "x.mp4"
    path.write_bytes(b"\0\0\0\x20ftypisom" + b"\0" * 100)
    with refused("x.mp4", 'pip install av (minivl\'s extra "video")'):
        load_video(path)


@pytest.mark.parametrize("name, codec", [("x.mp4", "mpeg4"), ("x.mp4", "libx264"), ("x.mov", "libx264"),
                                         ("x.mkv", "libx264"), ("x.webm", "libvpx"), ("x.avi", "mpeg4"),
                                         ("x.ts", "libx264")])
def test_video_frames_are_exact(tmp_path, name, codec):
    """libx264 stores frames out of order (B frames); MKV, WebM and TS do not say how many there are."""
    path = write_video(tmp_path / name, grey_frames(20, (64, 48)), codec)
    frames = load_video(path, num_segments=100)
    assert levels(frames) == every(20) and frames[0].size == (64, 48)
    assert levels(load_video(path)) == [1, 3, 6, 8, 11, 13, 15, 18] == frame_indices(19, 10, 8)
    assert levels(load_video(path, num_segments=3, bound=(0.5, 1.1))) == [6, 8, 10]
    assert levels(load_video(path, num_segments=2, bound=(0.5, 1.1), fps=5)) == frame_indices(19, 5, 2, (.5, 1.1))
    with refused("lies outside the video", "2 seconds at 10 frames"):
        load_video(path, bound=(7, 8))
    path.rename(tmp_path / "no_suffix")
    assert levels(load_video(tmp_path / "no_suffix", num_segments=1)) == [9] == frame_indices(19, 10, 1)


def test_more_packets_than_frames(tmp_path):
    """VP8 frames can say "do not show me": then there are fewer frames than packets, and decoding must count them."""
    order = iter(range(20))

    def hide_every_fourth(data):
        return bytes([data[0] & ~16]) + data[1:] if next(order) % 4 == 3 else data
    path = write_video(tmp_path / "x.webm", grey_frames(20, (64, 48)), "libvpx", patch=hide_every_fourth)
    shown = [index for index in range(20) if index % 4 != 3]
    assert levels(load_video(path, num_segments=5)) == [shown[index] for index in frame_indices(14, 10, 5)]
    assert levels(load_video(path, num_segments=1, bound=(1.4, 1.4))) == [18]


@pytest.mark.parametrize("matrix, corner", [
    ((0, 1, 0, -1, 0, 0), (1, 0)), ((-1, 0, 0, 0, -1, 0), (1, 1)), ((0, -1, 0, 1, 0, 0), (0, 1)),
    ((1, 0, 0, 0, 1, 0), (0, 0))])
def test_video_rotation_is_applied(tmp_path, matrix, corner):
    """A phone's MP4 says how to turn it, in the matrix of its track header; the white corner moves."""
    frame = Image.new("RGB", (64, 32))
    frame.paste("white", (0, 0, 32, 16))
    path = write_video(tmp_path / "x.mp4", [frame] * 3)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    assert struct.unpack(">9i", data[place:place + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)
    data[place:place + 24] = struct.pack(">6i", *(65536 * value for value in matrix))
    path.write_bytes(data)
    image = load_video(path, num_segments=1)[0]
    assert image.size == ((64, 32) if matrix[1] == 0 else (32, 64))
    bright = {(x, y): image.getpixel((x * (image.width - 1), y * (image.height - 1)))[0] > 128
              for x in (0, 1) for y in (0, 1)}
    assert [place for place, white in bright.items() if white] == [corner]


def test_video_limits(tmp_path, monkeypatch):
    path = write_video(tmp_path / "x.mp4", grey_frames(20, (64, 32)))
    size = path.stat().st_size
    with refused(f"has {size} bytes, the limit is {size - 1}", "video_bytes"):
        load_video(path, limits=Limits(video_bytes=size - 1))
    assert len(load_video(path, limits=Limits(video_bytes=size, picture_pixels=2048))) == 8
    with refused("x.mp4' is 64x32 = 2048 pixels", "2047"):
        load_video(path, limits=Limits(picture_pixels=2047))
    with refused("an aspect ratio of 2", "1.5"):
        load_video(path, limits=Limits(aspect_ratio=1.5))
    with refused("first 17 frames"):
        load_video(path, num_segments=100, limits=Limits(picture_pixels=2048))
    monkeypatch.setattr(media, "_TOTAL_FRAMES", 19)
    with refused("has 20 frames", "19"):
        load_video(path)


def test_video_that_changes_size(tmp_path):
    """The container and the first frames are small; every later frame is checked as well."""
    order = iter(range(6))
    large = encoded(noise(320, 240), "JPEG")
    path = write_video(tmp_path / "x.mkv", [noise(64, 48)] * 6, "mjpeg",
                       patch=lambda data: large if next(order) == 4 else data)
    sizes = [frame.size for frame in load_video(path, num_segments=100)]
    assert sizes == [(320, 240) if index == 4 else (64, 48) for index in every(6)]
    with refused("frame 4 of", "320x240 = 76800 pixels", "70000"):
        load_video(path, num_segments=100, limits=Limits(picture_pixels=70_000))


def test_video_title_that_is_not_utf8(tmp_path):
    path = write_video(tmp_path / "x.mkv", grey_frames(5, (64, 48)), title="\u00e9\u00e9")
    data = path.read_bytes()
    assert data.count(b"\xc3\xa9\xc3\xa9") == 1
    path.write_bytes(data.replace(b"\xc3\xa9\xc3\xa9", b"\xe9\xe9\xe9\xe9"))
    assert levels(load_video(path, num_segments=100)) == every(5)


def test_video_damaged(tmp_path):
    path = write_video(tmp_path / "x.mp4", [noise(64, 48, seed) for seed in range(20)], "libx264",
                       container={"movflags": "faststart"})
    data = path.read_bytes()
    assert len(load_video(path)) == 8
    import av
    for share in (0.95, 0.6):
        path.write_bytes(data[:int(len(data) * share)])
        words = [f"{int(len(data) * share)} of {len(data)} bytes"] if hasattr(av.stream.Stream, "index_entries") else []
        with refused("x.mp4", "cut short", *words):
            load_video(path)
    for share in (0.01, 0.05):
        path.write_bytes(data[:int(len(data) * share)])
        with refused("x.mp4"):
            load_video(path)
    path.write_bytes(data[:len(data) // 2] + b"\xff" * (len(data) // 2))
    with refused("x.mp4"):
        load_video(path)
    path.write_bytes(b"only words, many of them" * 100)
    with refused("x.mp4", "cannot be opened as a video", "MP4"):
        load_video(path)


def test_video_with_one_damaged_frame(tmp_path):
    order = iter(range(10))
    path = write_video(tmp_path / "x.mkv", [noise(64, 48, seed) for seed in range(10)],
                       patch=lambda data: data[:len(data) // 2] if next(order) == 5 else data)
    with refused("frame 5 of", "is damaged"):
        load_video(path, num_segments=100)
    assert len(load_video(path, num_segments=100, bound=(0, 0.4))) == 100       # frames 0 to 4 only


def test_video_without_a_video_stream(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=8000, layout="mono")
        for index in range(4):
            frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
            frame.sample_rate, frame.pts = 8000, index * 1024
            frame.planes[0].update(bytes(frame.planes[0].buffer_size))
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with refused("sound.mp4", "no video stream"):
        load_video(path)


def test_playlists_cannot_open_other_files(tmp_path):
    av = pytest.importorskip("av")
    segment = write_video(tmp_path / "segment.ts", grey_frames(10, (64, 48)), "libx264")
    playlist = (f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{segment.as_uri()}\n#EXT-X-ENDLIST\n",
                "ffconcat version 1.0\nfile segment.ts\n")
    for text in playlist:
        path = tmp_path / "evil.mp4"
        path.write_text(text)
        with refused("evil.mp4", "cannot be opened as a video"):
            load_video(path)
    path.write_bytes(b"YUV4MPEG2 W2 H2 F10:1 C420jpeg\nFRAME\n" + b"\x80" * 6)        # harmless, but not listed
    with refused("evil.mp4", "cannot be opened as a video"):
        load_video(path)
    # The danger is real: without the rules of media.py, ffmpeg follows the playlist.
    path.write_text(playlist[0])
    path.rename(tmp_path / "evil.m3u8")
    with open(tmp_path / "evil.m3u8", "rb") as file, av.open(file, mode="r") as container:
        assert sum(1 for _ in container.decode(video=0)) == 10


@pytest.mark.filterwarnings("ignore")
def test_video_fuzz(tmp_path):
    rng, outcomes = random.Random(11), {"taken": 0, "refused": 0}
    frames = [noise(32, 32, seed) for seed in range(6)]
    seeds = [write_video(tmp_path / f"x.{kind}", frames, codec).read_bytes() for kind, codec in (
        ("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx"))]
    for _ in range(120):
        (tmp_path / "fuzz.mp4").write_bytes(mutated(rng.choice(seeds), rng))
        try:
            load_video(tmp_path / "fuzz.mp4", num_segments=3, bound=rng.choice((None, (0, 0.3))),
                       limits=Limits(picture_pixels=10**6))
            outcomes["taken"] += 1
        except InputError as error:
            assert " at 0x" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10, outcomes
