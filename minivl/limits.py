"""State what is refused: one exception class for every input error, and every limit in one table."""
from __future__ import annotations

import os
from dataclasses import dataclass


class InputError(ValueError):
    """Say that something the caller gave cannot be used: what was found, and what to do next."""


@dataclass(frozen=True)
class Limits:
    """Bound what is accepted, before the costly work starts. `Limits(picture_pixels=10**9)` raises one bound."""
    picture_bytes: int = 64 * 2**20        # of one file, URL or data: URL
    picture_pixels: int = 100_000_000      # width * height, read from the header before decoding
    aspect_ratio: float = 200.0            # long side / short side; the reference would squeeze it into tiles unasked
    video_bytes: int = 2 * 2**30           # of one video file
    video_frames: int = 512                # frames taken from one video
    pictures: int = 512                    # pictures and frames in one prompt
    tiles_per_picture: int = 40            # max_num; the reference's own tables go up to 24 (thumbnail not counted)
    prompt_chars: int = 2_000_000          # before tokenizing; the context length bounds the tokens
    unbroken_chars: int = 131_072          # of a prompt without a space after a word, a line end, ...: tokenized whole
    messages: int = 10_000                 # messages of a prompt, and items in all of them
    words: int = 100                       # stop_words, bad_words
    word_chars: int = 200                  # each of them
    token_ids: int = 300_000               # stop_token_ids, bad_token_ids; more than any vocabulary has
    new_tokens: int = 32_768               # max_new_tokens
    fetch_seconds: float = 10.0            # a URL: the whole transfer, redirects included
    redirects: int = 5                     # a URL: followed at most


def offline() -> bool:
    """Tell whether HF_HUB_OFFLINE, the hub client's variable, forbids all network use now."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
