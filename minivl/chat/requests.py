"""Read what was asked: a prompt in any of its forms -> messages -> pictures in their places -> tiles and token ids.

    "text" | (text, picture) | (text, [pictures]) | [{"role": ..., "content": ...}, ...]

Nothing here knows the model. What reading needs of it are plain values: the checkpoint's Config and its Tokenizer.
Source of the behaviour: LMDeploy v0.6.4 vl/templates.py:116-175; where that version has a trap (a black picture for a
missing file) this raises or warns.
"""
from __future__ import annotations

import os
import re
import sys
import warnings
from dataclasses import dataclass

from PIL import Image

from minivl import prompt as template
from minivl.config import Config
from minivl.limits import InputError, Limits
from minivl.media import load_image
from minivl.preprocess import most_tiles, tile_for
from minivl.sampling import GenerationConfig
from minivl.tokenizer import Tokenizer

IMAGE_TOKEN = "<IMAGE_TOKEN>"       # in a prompt's text: a picture goes here (LMDeploy's word for prompt.IMAGE)
MARKS = f"{IMAGE_TOKEN} or {template.IMAGE}"
# Where a text is cut: neighbouring IMAGE_TOKENs share one <img></img> pair, as in LMDeploy; the template's own do not.
MARK = re.compile(f"((?:{re.escape(IMAGE_TOKEN)})+|{re.escape(template.IMAGE)})")
DETAIL = {"low": 6, "medium": 12, "high": 24}   # OpenAI's `detail` -> most tiles; else the model's own default
PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep


@dataclass(frozen=True)
class Picture:
    """A picture with its own tile limit: pipe((text, [Picture("map.png", max_num=24), "photo.jpg"]))."""
    source: object
    max_num: int | None = None


@dataclass
class Turn:
    """What one prompt has become before anything is computed."""
    ids: list[int]              # of what is new
    tiles: list[Image.Image]    # of all pictures, in order
    config: GenerationConfig
    max_new_tokens: int         # that are asked for and have room
    start: int                  # tokens of the session that it follows


def video_prompt(question: str, frames: list) -> list[dict]:
    """Make messages from the frames of a video, one tile each: Frame1: <image>, Frame2: <image>, ..., the question."""
    content = []
    for i, frame in enumerate(frames, start=1):
        content += [_text(f"Frame{i}: "), _data(Picture(frame, max_num=1))]
    return [{"role": "user", "content": [*content, _text(question)]}]


def read_request(prompt, config: Config, tokenizer: Tokenizer, *, limits: Limits = Limits(), plain_text: bool = False,
                 allow_paths: bool = True, allow_hosts: tuple = (),
                 after: list[int] | None = None, start: int = 0,
                 room: int | None = None) -> tuple[list[int], list[Image.Image]]:
    """Read a prompt in any of its forms: (token ids, the tiles of all its pictures).

    `plain_text`, `allow_paths`, `allow_hosts`: see EngineConfig. `after`: the token ids of the answer that this prompt
    follows in a session, which has `start` tokens by now; then only what is new is in the ids. `room`: what session,
    prompt and answer have together. Pictures and text are read only as far as there is room.
    """
    messages, blocks = [], []
    for message in read_messages(prompt, limits):
        # only the user brings pictures: what the others wrote is text, whatever it spells
        content, found = place_pictures(message["content"], plain_text or message["role"] != "user")
        if message["role"] != "user" and found:
            raise InputError(f"a {message['role']} message holds pictures; they belong to the user's messages")
        messages.append({"role": message["role"], "content": content})
        blocks += found
    _check_messages(messages, blocks, limits)
    tiles, end = [[] for _ in blocks], start
    for opened, block in zip(tiles, blocks):
        for picture in block:
            opened.append(open_tiles(picture, config, limits, allow_paths, allow_hosts))
            end += len(opened[-1]) * config.num_image_token
            check_room(end, room)
    if after is not None and len(messages) > 1:
        raise InputError(f"a later turn of a session is one user message, got {len(messages)} messages; the "
                         "session remembers the earlier ones")
    system = None if messages[0]["role"] == "system" else config.system_message
    ids = template.encode(tokenizer, messages, [sum(map(len, block)) for block in tiles], system,
                          tokens_per_tile=config.num_image_token, plain=plain_text, after=after,
                          most=None if room is None else room - start)
    check_room(start + len(ids), room)
    return ids, [tile for block in tiles for picture in block for tile in picture]


def check_room(tokens: int, room: int | None):
    """Refuse a prompt that has so many tokens, perhaps more, in a context of `room`."""
    if room is not None and tokens >= room:
        raise InputError(f"the prompt has at least {tokens} tokens and leaves no room for an answer in a context of "
                         f"{room}; use fewer or smaller pictures (max_num), a shorter text, or a larger session_len")


# ---- from a prompt to messages --------------------------------------------------------------------------------------

def read_messages(prompt, limits: Limits = Limits()) -> list[dict]:
    """Bring a prompt into one form: [{"role", "content": [items]}, ...]; items: text, image_url or image_data."""
    if isinstance(prompt, str):
        prompt = (prompt, [])
    if isinstance(prompt, tuple):
        prompt = [_message_of_pair(prompt, limits)]
    if not isinstance(prompt, list):
        raise InputError(f"a prompt is a {type(prompt).__name__}; give a text, (text, picture), (text, [pictures]) or "
                         "a list of messages")
    items = len(prompt)
    _check_items(items, limits)
    messages = []
    for message in prompt:
        messages.append(_read_message(message))
        items += len(messages[-1]["content"])
        _check_items(items, limits)
    if any(message["role"] == "system" for message in messages[1:]):
        raise InputError("a system message comes after another message; it must be the first")
    return messages


def _check_items(items: int, limits: Limits):
    if items > limits.messages:
        raise InputError(f"the prompt has over {limits.messages} messages and items in them, the limit; ask in "
                         "fewer or raise Limits(messages=...)")


def _message_of_pair(prompt: tuple, limits: Limits) -> dict:
    """(text, picture) or (text, [pictures]) as one message of the user."""
    if len(prompt) != 2 or not isinstance(prompt[0], str):
        raise InputError("a prompt tuple is (text, picture) or (text, [pictures]), the text first; got "
                         f"({', '.join(type(part).__name__ for part in prompt)})")
    text, pictures = prompt
    pictures = pictures if isinstance(pictures, (list, tuple)) else [pictures]
    _check_pictures(len(pictures), limits)
    return {"role": "user", "content": [_text(text), *map(_data, pictures)]}


def _read_message(message) -> dict:
    """One message, its content a list of items whatever it was."""
    if not isinstance(message, dict) or message.get("role") not in template.ROLES:
        raise InputError(f"a message must be a dict with role {', '.join(template.ROLES)}, got {str(message)[:80]!r}")
    content = message.get("content")
    if isinstance(content, str):
        content = [_text(content)]
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise InputError(f"a message's content must be a text or a list of items, got {str(content)[:80]!r}")
    if message["role"] == "user" and not any(
            item.get("type") != "text" or str(item.get("text", "")).strip() for item in content):
        raise InputError("the prompt is empty; write a question")
    return {"role": message["role"], "content": content}


def _check_messages(messages: list[dict], blocks: list[list[Picture]], limits: Limits):
    """Refuse a conversation that nobody asks anything in, and what exceeds the limits."""
    if not messages or messages[-1]["role"] != "user":
        raise InputError("the last message must be the user's; add the question to be answered")
    _check_pictures(sum(map(len, blocks)), limits)
    characters = sum(len(item.get("text", "")) for message in messages for item in message["content"])
    if characters > limits.prompt_chars:
        raise InputError(f"the prompt has {characters} characters, the limit is {limits.prompt_chars}; shorten it")


def _check_pictures(pictures: int, limits: Limits):
    if pictures > limits.pictures:
        raise InputError(f"{pictures} pictures exceed the limit of {limits.pictures} in one prompt; give "
                         "fewer or raise Limits(pictures=...)")


# ---- the pictures of a message --------------------------------------------------------------------------------------

def place_pictures(items: list[dict], plain_text: bool = False) -> tuple[list[dict], list[list[Picture]]]:
    """Find the place of each picture of a message: (items for the template, [the pictures of each <img></img> pair]).

    One text: its marks place the pictures; without marks they stand before it, all in one pair, as LMDeploy 0.6.4 does.
    Several texts: everything in the order given, a line end after each picture.
    """
    texts, pictures = [], []
    for item in items:
        if item.get("type") == "text" and isinstance(item.get("text"), str):
            texts.append(item["text"])
        else:
            pictures.append(read_picture(item))
    if len(texts) > 1 and pictures:
        if not plain_text and any(MARK.search(text) for text in texts):
            raise InputError(f"a message has several texts and a mark {MARKS} in one of them; use one text with marks, "
                             "or several without")
        return _in_their_order(items), [[picture] for picture in pictures]
    text = "".join(texts)
    if not plain_text and MARK.search(text):
        return _at_the_marks(text, pictures)
    if len(pictures) > 1 and not plain_text:
        warn(f"{len(pictures)} pictures without {IMAGE_TOKEN} in the text share one <img></img> pair; "
              f"number them for better answers: 'Image-1: {IMAGE_TOKEN}\\nImage-2: {IMAGE_TOKEN}\\n...'")
    if not pictures:
        return [_text(text)], []
    return [{"type": "image"}, _text("\n"), _text(text)], [pictures]


def _in_their_order(items: list[dict]) -> list[dict]:
    content = []
    for item in items:
        content += [item] if item["type"] == "text" else [{"type": "image"}, _text("\n")]
    return content


def _at_the_marks(text: str, pictures: list[Picture]) -> tuple[list[dict], list[list[Picture]]]:
    text = text.replace(f"<img>{IMAGE_TOKEN}</img>", IMAGE_TOKEN)
    content, blocks, marks = [], [], 0
    for i, part in enumerate(MARK.split(text)):
        if i % 2 == 0:      # between two marks
            content.append(_text(part))
            continue
        count = part.count(IMAGE_TOKEN) or 1
        content.append({"type": "image"})
        blocks.append(pictures[marks:marks + count])
        marks += count
    if not pictures:
        raise InputError(f"the text has {marks} picture mark{'s' * (marks > 1)} ({MARKS}) but 0 pictures are given; "
                         "give the pictures, or EngineConfig(plain_text=True) if it is only text")
    if marks != len(pictures):
        raise InputError(f"the text has {marks} picture marks ({MARKS}) but {len(pictures)} pictures are given; write "
                         "one mark for each picture, or none at all")
    return content, blocks


def read_picture(item: dict) -> Picture:
    """Read a message's picture item: OpenAI's image_url with LMDeploy's max_dynamic_patch, or image_data."""
    kind = item.get("type")
    value = item.get(kind) if kind in ("image_url", "image_data") else None
    if kind == "image_url" and isinstance(value, dict) and "url" in value:
        detail = value.get("detail")
        most = DETAIL.get(detail) if isinstance(detail, str) else None
        return Picture(value["url"], value.get("max_dynamic_patch", most))
    if kind == "image_data" and isinstance(value, dict) and "data" in value:
        data = value["data"]
        return data if isinstance(data, Picture) else Picture(data)
    raise InputError(f"a message holds an item {str(item)[:80]!r}; items are "
                     '{"type": "text", "text": ...}, {"type": "image_url", "image_url": {"url": ...}} and '
                     '{"type": "image_data", "image_data": {"data": picture}}')


def open_tiles(picture: Picture, config: Config, limits: Limits = Limits(), allow_paths: bool = True,
               allow_hosts: tuple = ()) -> list[Image.Image]:
    """Open a picture and cut it into [tile, ...], the thumbnail last."""
    max_num = most_tiles(config) if picture.max_num is None else picture.max_num
    if not is_whole(max_num) or not 1 <= max_num <= limits.tiles_per_picture:
        raise InputError(f"max_num is {max_num!r}; it must be a whole number in 1..{limits.tiles_per_picture}")
    image = load_image(picture.source, limits=limits, allow_paths=allow_paths, allow_hosts=allow_hosts)
    return tile_for(config, image, max_num)


def is_whole(value) -> bool:
    """Whether it is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _data(picture) -> dict:
    return {"type": "image_data", "image_data": {"data": picture}}


def warn(message: str):
    """Warn at the caller's line, however deep in this package it happens."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)
