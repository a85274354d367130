"""Open pictures: a PIL image, a path, a URL or bytes in, a PIL image of mode "RGB" out.

Everything here may come from a stranger, so every check runs before the step it protects (bytes before reading,
pixels before decoding), and whatever cannot be used raises `InputError`.
"""
from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from collections.abc import Collection, Iterator

from PIL import Image

from minivl.limits import InputError, Limits
from minivl.media.fetch import data_url_bytes, fetch, show_url
from minivl.media.local import check_bytes, local_path, read_file
from minivl.media.parts import Parts, check_cost, parts_of

# What Pillow may open. Its other plug-ins are left out: some start programs (EPS: Ghostscript), few are well tested.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF"
MAGIC = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8[79]a|BM|(II|MM)([*+]\0|\0[*+])", re.DOTALL)
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def load_image(source: Image.Image | str | os.PathLike | bytes | bytearray | memoryview, *, limits: Limits = Limits(),
               allow_paths: bool = True, allow_urls: bool = True, allow_hosts: Collection[str] = ()) -> Image.Image:
    """Open one picture as a new PIL image of mode "RGB", exactly as `Image.open(x).convert("RGB")` gives it.

    source: a PIL image, path (str, pathlib.Path, file:// URL), http(s):// URL, data: URL (base64 or percent-coded,
    whatever type it states), or bytes.
    As in the reference, EXIF rotation is NOT applied, alpha is dropped (not blended), animations give frame one.
    allow_hosts: host names that may resolve to private addresses, see `fetch`. Raises InputError.
    """
    if isinstance(source, Image.Image):
        _check_open(source)
        check_size(*source.size, "the PIL image", limits)
        return to_rgb(source, "the PIL image")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), "the bytes given", limits)
    if isinstance(source, str) and re.match(r"\s*data:", source, re.IGNORECASE):
        return _decode(*data_url_bytes(source, limits), limits)
    if isinstance(source, str) and re.match("https?:", source, re.IGNORECASE):
        if not allow_urls:
            raise InputError(f"{show_url(source)}: URLs are not accepted here; download the picture and give its "
                             "bytes or a data:image/...;base64, URL")
        return _decode(fetch(source, limits=limits, allow_hosts=allow_hosts), show_url(source), limits)
    if isinstance(source, (str, os.PathLike)):
        path, name = local_path(source, allow_paths)
        return _decode(read_file(path, name, limits), name, limits)
    raise InputError(f"a picture cannot be a {type(source).__name__}; give a PIL image, a path, an http(s):// or "
                     "data:image/...;base64, URL, or the bytes of a picture file")


def _check_open(image: Image.Image) -> None:
    """Refuse a PIL image that was closed, itself or its file, before its pixels were read."""
    file = getattr(image, "fp", None)
    closed = bool(getattr(image, "tile", None)) and (file is None or getattr(file, "closed", False))
    try:
        image.im.mode       # noqa: B018  Pillow keeps an error in place of a closed image's pixels
    except ValueError:
        closed = True
    except (AssertionError, AttributeError):        # not read yet
        pass
    if closed:
        raise InputError("the PIL image is closed, its pixels are gone; use it inside the `with Image.open(...)` "
                         "block, or give a copy made there: image.copy()")


def _decode(data: bytes, name: str, limits: Limits) -> Image.Image:
    """Decode the bytes of a picture file into an RGB image."""
    return to_rgb(open_picture(data, name, limits)[0], name)


def open_picture(data: bytes, name: str, limits: Limits) -> tuple[Image.Image, Parts]:
    """Open the bytes of a picture file as a PIL image: the header is checked, the pixels are not decoded yet."""
    check_bytes(len(data), limits.picture_bytes, "picture_bytes", name)
    if not MAGIC.match(data):
        raise InputError(f"{name} is not a picture in an accepted format ({FORMAT_NAMES}); convert it to one of them")
    parts = parts_of(data, name, limits)
    with translated(name, "the header of the picture is damaged, cut short, or claims a size of zero; save it again"):
        image = Image.open(io.BytesIO(parts.data), formats=FORMATS)
    check_size(*image.size, name, limits)
    check_cost(parts, *image.size, name, limits)
    return image, parts


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Decode a picture and convert it to RGB. Warn where Pillow's rule makes 16-bit or float greyscale nearly white."""
    with translated(name, "the picture is cut short or damaged; save or download it again"):
        image.load()
    with translated(name, f"colour mode {image.mode} cannot be converted to RGB; save the picture as RGB"):
        if "transparency" in image.info:
            # Same pixels without it, but Pillow would warn about (and could stumble over) odd transparency entries.
            image = image.copy()
            del image.info["transparency"]
        largest = 0
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            # getextrema knows I, F and I;16, but not I;16B and friends.
            largest = (image.convert("I") if image.mode.startswith("I;16") else image).getextrema()[1]
        rgb = image.convert("RGB")
    if largest > 255:
        warnings.warn(f"{name}: greyscale values up to {largest:g} are cut off at 255 (mode {image.mode}), as in the "
                      "reference, so the picture may be nearly white; scale it to 8 bits first", stacklevel=4)
    return rgb


def check_size(width: int, height: int, name: str, limits: Limits) -> None:
    """Refuse a picture or frame of `width` x `height` pixels that is empty, too large or too thin."""
    if width < 1 or height < 1:
        raise InputError(f"{name} has no pixels ({width}x{height}); give a picture at least 1x1 large")
    if width * height > limits.picture_pixels:
        raise InputError(f"{name} is {width}x{height} = {width * height} pixels, the limit is "
                         f"{limits.picture_pixels}; make it smaller or raise Limits(picture_pixels=...)")
    ratio = max(width, height) / min(width, height)
    if ratio > limits.aspect_ratio:
        raise InputError(f"{name} is {width}x{height}, an aspect ratio of {ratio:g}, the limit is "
                         f"{limits.aspect_ratio:g}; crop it or raise Limits(aspect_ratio=...)")


@contextlib.contextmanager
def translated(name: str, problem: str, bugs: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn whatever a decoding library raises (but `bugs`) into an InputError that says `problem`, not its own text.

    Every Exception, because damaged files make Pillow raise almost anything (OSError, SyntaxError, struct.error,
    KeyError, ...), and without the text, because Pillow's holds memory addresses. Keep library calls only inside.
    """
    try:
        yield
    except (InputError, *bugs):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # Pillow's own guard, process-wide, and lower than a raised Limits.picture_pixels: not ours to change.
        raise InputError(f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels, refused by Pillow; make it smaller, "
                         "or raise both PIL.Image.MAX_IMAGE_PIXELS and Limits(picture_pixels=...)") from None
    except ValueError as error:
        if "MAX_TEXT" in str(error):    # of a PIL image only: bytes come here without their texts
            problem = ("it holds a text or colour profile over Pillow's limit (PngImagePlugin.MAX_TEXT_CHUNK); give "
                       "the file itself, which is read without it")
        raise InputError(f"{name}: {problem}") from None
    except MemoryError:
        raise InputError(f"{name} does not fit into the memory when decoded; make it smaller") from None
    except Exception:
        raise InputError(f"{name}: {problem}") from None
