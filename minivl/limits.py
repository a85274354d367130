"""State what is refused: one exception class for every input error, every limit in one table, the system's errors."""
from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class InputError(ValueError):
    """Say that something the caller gave cannot be used: what was found, and what to do next."""


@dataclass(frozen=True)
class Limits:
    """Bound what is accepted, before the costly work starts. `Limits(picture_pixels=10**9)` raises one bound."""
    picture_bytes: int = 64 * 2**20        # of one file, URL or data: URL
    picture_pixels: int = 100_000_000      # width * height, read from the header before decoding
    picture_parts: int = 200_000           # chunks, segments, blocks, tags, strips of one file; each takes microseconds
    # For one picture file, in the time of a plain JPEG's pixel, 5 ns: scans of a JPEG, frames of an animation; see
    # media/parts.py
    decoding_work: int = 1_000_000_000
    decoding_bytes: int = 900_000_000      # of memory, at the peak of decoding one picture, animation or video
    aspect_ratio: float = 200.0            # long side / short side; the reference would squeeze it into tiles unasked
    video_bytes: int = 2 * 2**30           # of one video file
    # As decoding_work. A minute of 1080p with a key frame every 250, x264's default, is 2 to 4 * 10^9 for 8 frames.
    video_work: int = 5_000_000_000
    video_frames: int = 512                # frames taken from one video
    pictures: int = 512                    # pictures and frames in one prompt
    tiles_per_picture: int = 40            # max_num; the reference's own tables go up to 24 (thumbnail not counted)
    prompt_chars: int = 2_000_000          # before tokenizing; the context length bounds the tokens
    messages: int = 10_000                 # messages of a prompt, and items in all of them
    words: int = 100                       # stop_words, bad_words
    word_chars: int = 200                  # each of them
    token_ids: int = 300_000               # stop_token_ids, bad_token_ids; more than any vocabulary has
    new_tokens: int = 32_768               # max_new_tokens
    fetch_seconds: float = 10.0            # a URL: the whole transfer, redirects included
    redirects: int = 5                     # a URL: followed at most


def clip(value: object, most: int = 200) -> str:
    """Shorten what a file or a caller gave, for a message: at most `most` characters of it, then how many it has."""
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def first_of(problems: list[str], separator: str = "\n  ", most: int = 20) -> str:
    """Join problems, clipped, but at most `most` of them and the count of the others."""
    more = [f"... and {len(problems) - most} more"] if len(problems) > most else []
    return separator.join([clip(problem) for problem in problems[:most]] + more)


# What to do about an error of the operating system.
NEXT = {errno.EACCES: "check the permissions", errno.EPERM: "check the permissions",
        errno.ENOSPC: "free some space and run again", errno.EDQUOT: "free some of your quota and run again",
        errno.EFBIG: "raise the limit of a file's size (ulimit -f) and run again",
        errno.EROFS: "choose a place that can be written to", errno.EMFILE: "raise the limit of open files (ulimit -n)"}


def in_words(error: OSError, what: str, left: str = "") -> OSError:
    """Say an error of the operating system in one sentence: what cannot be done, why, what is left, the next step."""
    if error.errno is None or error.strerror is None:       # it is said in words already
        return error
    why = error.strerror[:1].lower() + error.strerror[1:]
    parts = [f"{what} ({why})", left, NEXT.get(error.errno, "check the path")]
    said = OSError("; ".join(part for part in parts if part))
    said.errno = error.errno
    return said


def sentence(error: Exception) -> str:
    """Say an error that ends a command in one sentence."""
    if isinstance(error, OSError):
        error = in_words(error, f"{error.filename or 'a file'} cannot be read or written")
    return str(error)


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Turn an error of the operating system while something is read into an InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(str(in_words(error, f"{error.filename or path} cannot be read"))) from None


def is_there(path: str | os.PathLike) -> bool:
    """Tell whether a file is there. Refuses what lies there and is none: a device or a pipe may never end."""
    with reading(path):
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError, ValueError):     # the last: a NUL byte in the path
            return False
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is a {'folder' if stat.S_ISDIR(mode) else 'device, pipe or socket'}, no file; put "
                         "the file there")
    return True


def offline() -> bool:
    """Tell whether HF_HUB_OFFLINE, the hub client's variable, forbids all network use now."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
