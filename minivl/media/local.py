"""Read files of this machine, named by a path or a file:// URL; their kind and size are checked first."""
from __future__ import annotations

import os
import re
import stat
import urllib.parse
import urllib.request

from minivl.limits import InputError, Limits


def local_path(source: str | os.PathLike, allow_paths: bool) -> tuple[str, str]:
    """Turn a path or file:// URL into (path, how to name it in messages)."""
    text = os.fsdecode(source)
    name = repr(text if len(text) <= 200 else text[:200] + "...")
    if not allow_paths:
        raise InputError(f"{name}: local paths are not accepted here; give the bytes or a data:image/...;base64, URL")
    scheme = re.match("([a-z][a-z0-9+.-]+)://", text, re.IGNORECASE)
    if scheme is None:
        return text, name
    parts = split_url(text, name)
    if parts.scheme != "file" or parts.netloc.lower() not in ("", "localhost"):
        raise InputError(f"{name}: only http://, https:// and file:/// URLs are read; download the file yourself")
    return urllib.request.url2pathname(parts.path), name


def split_url(url: str, name: str) -> urllib.parse.SplitResult:
    """Split a URL into its parts. Raises InputError for what urlsplit cannot split (unfinished [IPv6], ...)."""
    try:
        return urllib.parse.urlsplit(url)
    except ValueError:
        raise InputError(f"{name}: not a valid URL; check the host name") from None


def file_size(path: str, name: str) -> int:
    """Measure a regular file, in bytes. Devices and pipes are refused: reading them may never end."""
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


def check_bytes(found: int, limit: int, field: str, name: str) -> None:
    """Refuse an empty file, or one with more than `limit` bytes (`field` of Limits)."""
    if found == 0:
        raise InputError(f"{name} is empty (0 bytes); check how it was written")
    if found > limit:
        raise InputError(f"{name} has {found} bytes, the limit is {limit}; "
                         f"make it smaller or raise Limits({field}=...)")


def read_file(path: str, name: str, limits: Limits) -> bytes:
    """Read a regular file of at most limits.picture_bytes."""
    check_bytes(file_size(path, name), limits.picture_bytes, "picture_bytes", name)
    try:
        with open(path, "rb") as file:
            return file.read(limits.picture_bytes + 1)      # +1: a file still growing fails the next check
    except OSError:
        raise InputError(f"{name} cannot be read; check its permissions") from None
