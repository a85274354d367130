"""Pictures and videos in, RGB PIL images out: the one module that opens files or talks to the network.

Everything here may come from a stranger, so every check runs before the step it protects (bytes before reading,
pixels before decoding, address before connecting), and whatever cannot be used raises `InputError`.
"""
import base64
import contextlib
import http.client
import io
import ipaddress
import math
import numbers
import os
import re
import socket
import ssl
import stat
import threading
import time
import urllib.parse
import urllib.request
import warnings

from PIL import Image

from minivl.limits import InputError, Limits, offline

# What Pillow may open. Its other plug-ins are left out: some start programs (EPS: Ghostscript), few are well tested.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF"
_MAGIC = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8[79]a|BM|(II|MM)([*+]\0|\0[*+])", re.DOTALL)
_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_ANIMATED = ("GIF", "WEBP", "PNG")      # not TIFF or MPO (phone JPEG): their further pictures are pages or previews

# Containers ffmpeg may open. Playlists (hls, concat, dash, ...) are left out: they make ffmpeg open other files.
_CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
_TOTAL_FRAMES = 1_000_000               # of a whole video, chosen or not: about nine hours at 30 frames per second
# Unlike EXIF in pictures, the rotation phones write IS applied to videos: the reference's reader (decord) does so.
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
_VIDEO_PICTURES = 16                    # the chosen frames together: at most this times Limits.picture_pixels


# ---- pictures ----------------------------------------------------------------------------------------------------

def load_image(source, *, limits=Limits(), allow_paths=True, allow_urls=True, allow_hosts=()):
    """One picture as a new PIL image of mode "RGB", exactly as `Image.open(x).convert("RGB")` gives it.

    source: PIL image, path (str, pathlib.Path, file:// URL), http(s):// URL, data:image/...;base64, URL, or bytes.
    As in the reference, EXIF rotation is NOT applied, alpha is dropped (not blended), animations give frame one.
    allow_hosts: host names that may resolve to private addresses, see `fetch`. Raises InputError.
    """
    if isinstance(source, Image.Image):
        _check_size(*source.size, "the PIL image", limits)
        return _to_rgb(source, "the PIL image")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), "the bytes given", limits)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _decode(_data_url_bytes(source, limits), "the data: URL", limits)
    if isinstance(source, str) and re.match("https?:", source, re.IGNORECASE):
        if not allow_urls:
            raise InputError(f"{_show_url(source)}: URLs are not accepted here; download the picture and give its "
                             "bytes or a data:image/...;base64, URL")
        return _decode(fetch(source, limits=limits, allow_hosts=allow_hosts), _show_url(source), limits)
    if isinstance(source, (str, os.PathLike)):
        path, name = _local_path(source, allow_paths)
        return _decode(_read_file(path, name, limits), name, limits)
    raise InputError(f"a picture cannot be a {type(source).__name__}; give a PIL image, a path, an http(s):// or "
                     "data:image/...;base64, URL, or the bytes of a picture file")


def _decode(data, name, limits):
    """Bytes of a picture file -> RGB image."""
    return _to_rgb(_open_picture(data, name, limits), name)


def _open_picture(data, name, limits):
    """Bytes of a picture file -> PIL image with checked header, pixels not decoded yet."""
    _check_bytes(len(data), limits.picture_bytes, "picture_bytes", name)
    if not _MAGIC.match(data):
        raise InputError(f"{name} is not a picture in an accepted format ({_NAMES}); convert it to one of them")
    with _translated(name, "the header of the picture is damaged, cut short, or claims a size of zero; save it again"):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(*image.size, name, limits)
    return image


def _to_rgb(image, name):
    """Decode and convert. Warns where Pillow's rule makes 16-bit or float greyscale nearly white."""
    with _translated(name, "the picture is cut short or damaged; save or download it again"):
        image.load()
    with _translated(name, f"colour mode {image.mode} cannot be converted to RGB; save the picture as RGB"):
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


def _check_size(width, height, name, limits):
    """Raise InputError for a picture (or frame) of `width` x `height` pixels that is empty, too large or too thin."""
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
def _translated(name, problem, bugs=()):
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
    except MemoryError:
        raise InputError(f"{name} does not fit into the memory when decoded; make it smaller") from None
    except Exception:
        raise InputError(f"{name}: {problem}") from None


# ---- local files and data: URLs ----------------------------------------------------------------------------------

def _local_path(source, allow_paths):
    """str | PathLike | file:// URL -> (path, how to name it in messages)."""
    text = os.fsdecode(source)
    name = repr(text if len(text) <= 200 else text[:200] + "...")
    if not allow_paths:
        raise InputError(f"{name}: local paths are not accepted here; give the bytes or a data:image/...;base64, URL")
    scheme = re.match("([a-z][a-z0-9+.-]+)://", text, re.IGNORECASE)
    if scheme is None:
        return text, name
    parts = _split_url(text, name)
    if parts.scheme != "file" or parts.netloc.lower() not in ("", "localhost"):
        raise InputError(f"{name}: only http://, https:// and file:/// URLs are read; download the file yourself")
    return urllib.request.url2pathname(parts.path), name


def _file_size(path, name):
    """Size in bytes of a regular file. Devices and pipes are refused: reading them may never end."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise InputError(f"{name}: no such file; check the path") from None
    except (OSError, ValueError):       # ValueError: a NUL byte in the path
        raise InputError(f"{name}: not a readable path; check it and its permissions (a picture in base64 needs "
                         "data:image/...;base64, before it)") from None
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{name} is a directory; give one file")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{name} is not a regular file (a pipe, socket or device); copy its content to a file")
    return status.st_size


def _check_bytes(found, limit, field, name):
    """Raise InputError for an empty file or one over `limit` bytes (`field` of Limits)."""
    if found == 0:
        raise InputError(f"{name} is empty (0 bytes); check how it was written")
    if found > limit:
        raise InputError(f"{name} has {found} bytes, the limit is {limit}; "
                         f"make it smaller or raise Limits({field}=...)")


def _read_file(path, name, limits):
    """The bytes of a regular file, at most limits.picture_bytes."""
    _check_bytes(_file_size(path, name), limits.picture_bytes, "picture_bytes", name)
    try:
        with open(path, "rb") as file:
            return file.read(limits.picture_bytes + 1)      # +1: a file still growing fails the next check
    except OSError:
        raise InputError(f"{name} cannot be read; check its permissions") from None


def _data_url_bytes(url, limits):
    """data:image/...;base64,... -> bytes."""
    head, comma, payload = url.partition(",")
    if not comma or not re.fullmatch("data:image/[^;]*(;[^;]*)*;base64", head[:200], re.IGNORECASE):
        raise InputError("a data: URL must start with data:image/...;base64, and then hold the picture in base64")
    _check_bytes(len(payload) * 3 // 4 - payload.count("="), limits.picture_bytes, "picture_bytes", "the data: URL")
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except ValueError:
        raise InputError("the data: URL is not valid base64 after the comma; encode the picture file again") from None


# ---- the network -------------------------------------------------------------------------------------------------

_URL_SAFE = "%/:=&?~#+!$,;'@()*[]"      # stays as written in path and query, besides letters, digits and _.-


def fetch(url, *, limits=Limits(), allow_hosts=()):
    """The bytes behind an http(s) URL; the only code that uses the network. Raises InputError.

    Refused: hosts with any address outside the public internet, unless the host name as written in the URL is in
    `allow_hosts`; more than limits.picture_bytes; more than limits.fetch_seconds in all, redirects included;
    any final status but 200; everything while the environment variable HF_HUB_OFFLINE is true.
    """
    if not isinstance(url, str):
        raise InputError(f"a URL must be a str, not a {type(url).__name__}")
    if not isinstance(allow_hosts, (list, tuple, set, frozenset)):      # ("localhost") without a comma is a str
        raise InputError(f"allow_hosts must be a list or tuple of host names, not {allow_hosts!r}")
    if offline():
        raise InputError(f"{_show_url(url)} is not fetched: HF_HUB_OFFLINE is set; unset it or give a local file")
    # A worker thread, because socket timeouts bound each wait and not the whole: resolving a name has no timeout at
    # all, and a server sending one byte per second never meets one. At the deadline its socket is shut from here.
    allowed = {host.lower() for host in allow_hosts}
    deadline = time.monotonic() + limits.fetch_seconds
    outcome, live = [], []

    def work():
        try:
            outcome.append(_follow(url, deadline, limits, allowed, live))
        except BaseException as error:
            outcome.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(limits.fetch_seconds)
    if worker.is_alive() and not outcome:
        for sock in live:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)      # the TCP one: SSLSocket's own is not thread-safe
        raise _too_slow(url, limits)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _follow(url, deadline, limits, allowed, live):
    """`fetch` inside its thread: get, and follow redirects, checking every stop like the first."""
    first = url
    for _ in range(limits.redirects + 1):
        body, location = _get(url, deadline, limits, allowed, live)
        if location is None:
            return body
        secure = url[:6].lower() == "https:"
        try:
            url = urllib.parse.urljoin(url, location)
        except ValueError:
            raise InputError(f"{_show_url(url)} redirects to something that is not a valid URL; check it") from None
        if secure and url[:5].lower() == "http:":
            raise InputError(f"{_show_url(first)} redirects from https to unprotected http, which is refused; "
                             "use a URL that stays on https")
    raise InputError(f"{_show_url(first)}: more than {limits.redirects} redirects; give the final URL or raise "
                     "Limits(redirects=...)")


def _get(url, deadline, limits, allowed, live):
    """One request -> (body, None), or (None, location) for a redirect."""
    name = _show_url(url)
    parts = _check_url(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        raise InputError(f"{name}: the port is not a number from 0 to 65535") from None
    secure = parts.scheme == "https"
    port = (443 if secure else 80) if port is None else port
    try:
        # Environment proxies (http_proxy) are not used: a proxy would resolve the name again, past the check.
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(_connect(host, port, deadline, allowed, live, name))
            if secure:
                context = ssl.create_default_context()
                sock = stack.enter_context(context.wrap_socket(sock, server_hostname=host,
                                                               do_handshake_on_connect=False))
                live[:] = [sock]
                sock.do_handshake()
                connection = http.client.HTTPSConnection(host, port, context=context)
            else:
                connection = http.client.HTTPConnection(host, port)
            connection.sock = sock      # connected to the very address checked; http.client then does not resolve
            target = urllib.parse.quote(parts.path or "/", safe=_URL_SAFE)
            if parts.query:
                target += "?" + urllib.parse.quote(parts.query, safe=_URL_SAFE)
            connection.request("GET", target, headers={"User-Agent": "minivl", "Accept-Encoding": "identity"})
            with connection.getresponse() as response:
                return _read_response(response, deadline, limits, name)
    except TimeoutError:
        raise _too_slow(url, limits) from None
    except ssl.SSLCertVerificationError:
        raise InputError(f"{name}: the server's certificate is not valid for {host}; check the host name") from None
    except (OSError, http.client.HTTPException):
        raise InputError(f"{name}: the connection failed (refused, broken off, or not speaking "
                         f"{parts.scheme}); check the URL") from None
    except InputError:
        raise
    except ValueError:                  # http.client, on some malformed answers
        raise InputError(f"{name}: the server's answer is not valid HTTP; download the file yourself") from None


def _check_url(url):
    """Split a URL to be fetched; refuse what a careful client does not send."""
    name = _show_url(url)
    # Before splitting: urlsplit silently drops tabs and line breaks, so it would check another URL than is asked for.
    if any(not char.isprintable() or char == " " for char in url):
        raise InputError(f"{name}: the URL holds white space or control characters; write them as %20 and the like")
    parts = _split_url(url, name)
    if parts.scheme not in ("http", "https"):
        raise InputError(f"{name}: only http and https are fetched, not {parts.scheme or 'a URL without a scheme'}")
    if "@" in parts.netloc:
        raise InputError(f"{name}: user name and password in the URL are not accepted; remove the part before @")
    if not parts.hostname:
        raise InputError(f"{name}: the URL names no host; write http(s)://host/path")
    return parts


def _split_url(url, name):
    """urlsplit, with InputError for what it cannot split (unfinished [IPv6], ...)."""
    try:
        return urllib.parse.urlsplit(url)
    except ValueError:
        raise InputError(f"{name}: not a valid URL; check the host name") from None


def _show_url(url):
    """A URL for messages: scheme://host/path. Never user, password or query string, which may hold secrets."""
    try:
        parts = urllib.parse.urlsplit(url)
        text = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    except ValueError:
        return "the URL"
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= 200 else text[:200] + "..."


def _too_slow(url, limits):
    return InputError(f"{_show_url(url)}: took longer than {limits.fetch_seconds:g} seconds; download the file "
                      "yourself or raise Limits(fetch_seconds=...)")


def _connect(host, port, deadline, allowed, live, name):
    """Resolve `host` once, refuse it if any address is not public, and connect to one of the checked addresses.

    Checking and connecting share one answer of the name server: asked twice, it could first name a public address
    and then a private one ("DNS rebinding"). The open socket is also put in `live`, for `fetch` to shut it.
    """
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise InputError(f"{name}: the host name cannot be resolved; check it and the network") from None
    # Numbers in disguise (http://2130706433/, http://0x7f.1/) need no rule of their own: they are resolved by now.
    if host not in allowed and not all(_is_public(answer[4][0]) for answer in answers):
        raise InputError(f"{name}: the host is not on the public internet (its address is private, local or "
                         f"reserved); if you trust it, pass allow_hosts=({host!r},)")
    for place, (family, kind, protocol, _, address) in enumerate(answers):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        sock = socket.socket(family, kind, protocol)
        live[:] = [sock]
        try:
            sock.settimeout(remaining / (len(answers) - place))     # a silent address leaves time for the next
            sock.connect(address)
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            return sock
        except OSError:
            sock.close()
    if time.monotonic() >= deadline:
        raise TimeoutError
    raise ConnectionError


def _is_public(text):
    """Whether an address (as getaddrinfo writes it) is one of the public internet."""
    address = ipaddress.ip_address(text)
    if address.version == 6:
        packed = address.packed
        if address.ipv4_mapped or packed[:12] == bytes.fromhex("0064ff9b") + bytes(8):     # NAT64, RFC 6052
            address = ipaddress.IPv4Address(packed[12:])        # the IPv4 address really meant is the last 4 bytes
        elif packed[0] >> 5 != 1 or packed[:2] == b"\x20\x02":
            return False    # all public addresses begin with the bits 001; 2002:: (6to4) wraps IPv4 and is long dead
    # is_global alone is not enough: it is true for multicast and 192.88.99.0/24 (6to4 again), and in older Pythons
    # for 192.0.0.0/24.
    return address.is_global and not address.is_multicast and address.packed[:3] not in (b"\xc0\0\0", b"\xc0\x58\x63")


def _read_response(response, deadline, limits, name):
    """(body, None) or (None, location) of an HTTP answer."""
    if response.status in (301, 302, 303, 307, 308):
        location = response.headers.get("Location")
        if not location:
            raise InputError(f"{name}: status {response.status} (redirect) without a Location; give the final URL")
        return None, location.encode("latin-1", "replace").decode("utf-8", "replace")   # http.client reads latin-1
    if response.status != 200:
        raise InputError(f"{name}: the server answered with status {response.status}, expected 200; check the URL")
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):        # not asked for; unpacking it could grow past every limit
        raise InputError(f"{name}: the server sent Content-Encoding {encoding[:40]!r}, only identity is accepted; "
                         "download the file yourself")
    promised = response.length                  # Content-Length in bytes, None when the server does not say
    limit = limits.picture_bytes
    if promised is not None and promised > limit:
        raise InputError(f"{name} has {promised} bytes, the limit is {limit}; raise Limits(picture_bytes=...)")
    body = bytearray()
    while chunk := response.read1(65536):       # read1 returns what has come; read would wait for all of it
        body += chunk
        if len(body) > limit:
            raise InputError(f"{name} has more than {limit} bytes, the limit; raise Limits(picture_bytes=...)")
        if time.monotonic() > deadline:
            raise TimeoutError
    if promised is not None and len(body) < promised:
        raise InputError(f"{name}: the connection ended after {len(body)} of {promised} bytes; try again")
    return bytes(body), None


# ---- videos ------------------------------------------------------------------------------------------------------

def frame_indices(max_frame, fps, num_segments, bound=None, *, limits=Limits()):
    """Which frames stand for a video: the middle of each of `num_segments` equal parts, as the reference rounds it.

    max_frame: index of the last frame; fps: frames per second (may be None without bound);
    bound: None for the whole video, or (start, end) in seconds. Returns a list of frame indices. Raises InputError.
    """
    fps, bound = _check_choice(fps, num_segments, bound, limits)
    if isinstance(max_frame, bool) or not isinstance(max_frame, int) or max_frame < 0:
        raise InputError(f"max_frame, the index of the last frame, must be an int >= 0, not {max_frame!r}")
    first, last = 0, max_frame
    if bound is not None or fps is not None:
        start, end = bound or (-100_000, 100_000)       # seconds; the reference's "everything"
        first, last = max(0, round(start * fps)), min(round(end * fps), max_frame)      # round: half to even
    if last < first:
        raise InputError(f"bound {start:g}..{end:g} seconds lies outside the video, which has {max_frame + 1} frames "
                         f"= {(max_frame + 1) / fps:g} seconds at {fps:g} frames per second")
    part = (last - first) / num_segments
    return [int(first + part / 2 + round(part * k)) for k in range(num_segments)]


def _check_choice(fps, num_segments, bound, limits):
    """The checks of `frame_indices` that need no video: (fps, bound) as floats, or None where not given."""
    if isinstance(num_segments, bool) or not isinstance(num_segments, int) or num_segments < 1:
        raise InputError(f"num_segments, the number of frames to take, must be an int >= 1, not {num_segments!r}")
    if num_segments > limits.video_frames:
        raise InputError(f"num_segments is {num_segments}, the limit is {limits.video_frames} frames of one video; "
                         "take fewer or raise Limits(video_frames=...)")
    if fps is not None:
        fps = _finite(fps, "fps")
        if not 0 < fps <= 1e6:
            raise InputError(f"fps must be above 0 and at most 1e6 frames per second, not {fps:g}")
    if bound is None:
        return fps, None
    if not isinstance(bound, (tuple, list)) or len(bound) != 2:
        raise InputError(f"bound must be None or (start, end) in seconds, not {str(bound)[:80]!r}")
    start, end = _finite(bound[0], "the start of bound"), _finite(bound[1], "the end of bound")
    if end < start or max(abs(start), abs(end)) > 1e9:
        raise InputError(f"bound {start:g}..{end:g} seconds must not end before it starts, nor go past 1e9")
    if fps is None:
        raise InputError("bound is in seconds, and this video does not say its frames per second; pass fps=... too")
    return fps, (start, end)


def _finite(value, what):
    """A finite float, or InputError."""
    with contextlib.suppress(OverflowError):            # an int too large for float
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    raise InputError(f"{what} must be a finite number, not {str(value)[:80]!r}")


def load_video(source, *, num_segments=8, bound=None, fps=None, limits=Limits(), allow_paths=True):
    """`num_segments` frames of a video as RGB PIL images, chosen by `frame_indices`.

    source: a video file (MP4, MOV, MKV, WebM, AVI, ...; needs PyAV, the extra "video"), an animated GIF, WebP or PNG,
    a folder of pictures (frame2 comes before frame10), or a list of pictures (as `load_image` takes, without URLs).
    bound: (start, end) in seconds; fps: frames per second, in place of what the file says (folders and lists say
    nothing). Files are bounded by limits.video_bytes, animations by limits.picture_bytes too. Raises InputError.
    """
    _check_choice(1.0 if fps is None else fps, num_segments, bound, limits)     # before opening anything

    def choose(total, rate):
        _check_total(total, name)
        return frame_indices(total - 1, rate if fps is None else fps, num_segments, bound, limits=limits)

    if isinstance(source, (list, tuple)):
        name = "the list of frames"
        return _listed_frames(source, choose(len(source), None), name, limits, allow_paths)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"a video cannot be a {type(source).__name__}; give the path of a video file or of a folder "
                         "of pictures, or a list of PIL images")
    if isinstance(source, str) and re.match("(https?|data):", source, re.IGNORECASE):
        raise InputError("videos are read from local files only, not from URLs; download the file first")
    path, name = _local_path(source, allow_paths)
    if os.path.isdir(path):
        paths = _folder_frames(path, name)
        return _listed_frames(paths, choose(len(paths), None), name, limits, True)
    _check_bytes(_file_size(path, name), limits.video_bytes, "video_bytes", name)
    try:
        with open(path, "rb") as file:
            picture = _MAGIC.match(file.read(16))
    except OSError:
        raise InputError(f"{name} cannot be read; check its permissions") from None
    if picture or path.lower().endswith(_SUFFIXES):
        return _animation_frames(_read_file(path, name, limits), choose, bound is not None and fps is None, name,
                                 limits)
    return _container_frames(path, choose, name, limits)


def _check_total(total, name):
    """Raise InputError for a video without frames, or with too many to walk through."""
    if total < 1:
        raise InputError(f"{name} holds no frames (0): nothing was given, or the video is cut short")
    if total > _TOTAL_FRAMES:
        raise InputError(f"{name} has {total} frames or more, the limit is {_TOTAL_FRAMES}; cut the video")


def _collect(frames, name, limits):
    """Pairs (index, image), made one by one -> {index: image}, bounding the memory they take together."""
    kept, pixels, limit = {}, 0, _VIDEO_PICTURES * limits.picture_pixels
    for index, image in frames:
        kept[index] = image
        pixels += image.width * image.height
        if pixels > limit:
            raise InputError(f"{name}: the first {len(kept)} frames taken hold {pixels} pixels, the limit for all is "
                             f"{limit} ({_VIDEO_PICTURES} times picture_pixels); take fewer frames or smaller ones")
    return kept


def _listed_frames(sources, indices, name, limits, allow_paths):
    """The chosen frames of a list of pictures; only these are opened."""
    options = {"limits": limits, "allow_paths": allow_paths, "allow_urls": False}
    frames = ((index, load_image(sources[index], **options)) for index in sorted(set(indices)))
    kept = _collect(frames, name, limits)
    return [kept[index] for index in indices]


def _folder_frames(folder, name):
    """Paths of the pictures in a folder, in natural order; hidden files (.name) are ignored."""
    try:
        names = [entry for entry in os.listdir(folder) if not entry.startswith(".")]
    except OSError:
        raise InputError(f"{name} cannot be listed; check its permissions") from None
    if not names:
        raise InputError(f"{name} is an empty folder; put the frames in it as pictures ({_NAMES})")
    for entry in names:         # skipping it silently would shift the frames, should it be one in another format
        if not entry.lower().endswith(_SUFFIXES):
            raise InputError(f"{name} holds {entry!r}, which is not a picture ({_NAMES}); keep only frames in it")
    names.sort(key=lambda entry: ([int(part) if part.isdigit() else part.lower()
                                   for part in re.split("([0-9]+)", entry)], entry))
    return [os.path.join(folder, entry) for entry in names]


def _animation_frames(data, choose, need_rate, name, limits):
    """The chosen frames of a GIF, WebP or PNG animation, each as Pillow composes it; a still picture is one frame."""
    image = _open_picture(data, name, limits)
    damaged = "the animation is cut short or damaged; save or download it again"
    with _translated(name, damaged):
        total = image.n_frames if image.format in _ANIMATED and hasattr(image, "n_frames") else 1
    # An animated PNG may begin with a still for viewers that cannot animate; it is not part of the animation.
    skip = 1 if total > 1 and image.info.get("default_image") else 0
    total -= skip

    def go_to(index):
        with _translated(name, damaged):
            image.seek(index + skip)
        _check_size(*image.size, f"frame {index} of {name}", limits)      # a GIF may grow on the way

    rate = None
    if need_rate:
        _check_total(total, name)
        duration = 0.0          # milliseconds
        for index in range(total):
            go_to(index)
            with _translated(name, damaged):
                image.load()    # WebP says the duration only now
                duration += image.info.get("duration", 0)
        if not 0 < duration < math.inf:
            raise InputError(f"{name} does not say how long its frames are shown; pass fps=... with bound")
        rate = 1000 * total / duration
    indices = choose(total, rate)

    def frames():
        for index in sorted(set(indices)):
            go_to(index)
            yield index, _to_rgb(image, f"frame {index} of {name}")

    kept = _collect(frames(), name, limits)
    return [kept[index] for index in indices]


def _container_frames(path, choose, name, limits):
    """The chosen frames of an MP4, MKV, ... in the order shown, through PyAV."""
    with _opened_video(path, name, limits) as (container, stream):
        rate = stream.average_rate if stream.average_rate and stream.average_rate <= 1e6 else None
        total = 0
        for packet in container.demux(stream):      # counted, because headers may not say or be wrong
            total += packet.size > 0 and not packet.is_discard
            if total > _TOTAL_FRAMES:
                break
        indices = choose(total, rate)
        # An MP4 lists where each frame lies: beyond the end of the file means that the end is missing.
        end = max((entry.pos + entry.size for entry in getattr(stream, "index_entries", ())), default=0)
        size = os.path.getsize(path)
        if "mp4" in container.format.name and end > size:
            raise InputError(f"{name}: the video is cut short, it has {size} of {end} bytes; download it again")
    seen, kept = _decode_frames(path, set(indices), name, limits)
    if max(indices) not in kept:                    # fewer frames than packets: choose again from those there are
        indices = choose(seen, rate)
        seen, kept = _decode_frames(path, set(indices), name, limits)
    return [kept[index] for index in indices]


def _decode_frames(path, needed, name, limits):
    """Decode from the start to the last of `needed`: (number of frames seen, {index: RGB image})."""
    seen = 0

    def frames(container, stream):
        nonlocal seen
        for frame in container.decode(stream):
            label = f"frame {seen} of {name}"
            _check_size(frame.width, frame.height, label, limits)       # it may change in mid-video
            if seen in needed:
                if frame.is_corrupt:
                    raise InputError(f"{label} is damaged; save or download the video again")
                image = frame.to_image()
                turn = _TURNS.get(frame.rotation % 360)
                yield seen, image if turn is None else image.transpose(turn)
            seen += 1
            if seen > max(needed):
                return

    with _opened_video(path, name, limits) as (container, stream):
        stream.thread_type = "AUTO"
        kept = _collect(frames(container, stream), name, limits)
    return seen, kept


@contextlib.contextmanager
def _opened_video(path, name, limits):
    """PyAV's (container, best video stream) of a local file; library errors become InputError."""
    try:
        import av       # optional: pictures work without it
    except ImportError:
        raise InputError(f'{name} needs PyAV to be read as a video: pip install av (minivl\'s extra "video"); or give its frames '
                         "as a folder of pictures") from None
    # A Python file in place of a path, no protocols, and a list of containers: a crafted file cannot make ffmpeg
    # open another one. max_pixels stops a stream larger than its container says; generous, as codecs round sizes up.
    options = {"max_pixels": str(2 * limits.picture_pixels + 2**20)}
    rules = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
    # Before PyAV 19, titles that are not UTF-8 are an error unless told otherwise; since then it cannot be told.
    texts = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    bugs = (TypeError, AttributeError, NameError)       # not what damaged files cause, but a change of PyAV
    with contextlib.ExitStack() as stack:
        with _translated(name, "cannot be opened as a video: it is cut short, damaged, or not MP4, MOV, MKV, WebM, "
                               "AVI, MPEG, FLV, OGG or ASF; convert it to MP4", bugs):
            file = stack.enter_context(open(path, "rb"))
            container = stack.enter_context(av.open(file, mode="r", options=options, container_options=rules, **texts))
            stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise InputError(f"{name} holds no video stream in a codec this PyAV can read; save it again as H.264")
        with _translated(name, "the video is cut short or damaged; save or download it again", bugs):
            stream.codec_context.options = options
            width, height = stream.codec_context.width, stream.codec_context.height
            if width and height:        # else unknown until the first frame is decoded, which is checked as well
                _check_size(width, height, name, limits)
            yield container, stream     # what the caller demuxes and decodes is translated as well
