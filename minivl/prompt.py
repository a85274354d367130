"""Write a conversation as the text, or the ids, that the decoder reads: chat template and picture placeholders.

    <|im_start|>system\\n{SYSTEM}<|im_end|>\\n
    <|im_start|>user\\n<img><IMG_CONTEXT>...</img>\\nWhat is this?<|im_end|>\\n
    <|im_start|>assistant\\n

One <IMG_CONTEXT> placeholder per visual token: 256 for each tile of 448 px.
Source: InternVL internvl/conversation.py:238-247, 393-402 and modeling_internvl_chat.py:343-398 @2410d1d.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

from minivl.limits import InputError
from minivl.tokenizer import Tokenizer

# The trained default, part of every prompt: "You are InternVL, in Chinese Shusheng Wanxiang, a multimodal large
# language model developed jointly by Shanghai AI Laboratory, Tsinghua University and several partners."
SYSTEM = ("你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
          "联合开发的多模态大语言模型。")
IMAGE = "<image>"                   # in a user's text: a picture goes here
CONTEXT = "<IMG_CONTEXT>"
ROLES = ("system", "user", "assistant")
_PICTURE = object()                 # stands between the texts of a message, where a picture goes


def render(messages: Sequence, tiles_per_image: Sequence[int] = (), system: str | None = None, *,
           tokens_per_tile: int = 256, plain: bool = False) -> str:
    """Write the prompt as text. An answer is left open if the last message is the user's.

    `messages`: [{"role": "user", "content": "<image>\\nWhat is this?"}, ...] or the original's history of pairs
    [(question, answer), ..., (question, None)]. Content may be a list of {"type": "text", "text": ...} and
    {"type": "image"}. Pictures are taken from `tiles_per_image` (tiles of each, thumbnail included) in order.
    `system` None: a leading system message, else SYSTEM. `plain`: text is only text, `<image>` is no mark. In the
    system's and the assistant's text it never is one.
    """
    return "".join(text for _, text in _segments(messages, tiles_per_image, system, tokens_per_tile, plain))


def encode(tokenizer: Tokenizer, messages: Sequence, tiles_per_image: Sequence[int] = (), system: str | None = None, *,
           tokens_per_tile: int = 256, plain: bool = False, after: list[int] | None = None,
           most: int | None = None) -> list[int]:
    """Write the prompt as ids, `tokenizer.begin` first.

    `plain`: what users wrote becomes ordinary text tokens even where it spells <|im_end|>.

    `after`: the token ids of the answer that this one user message follows in a conversation. Then only what comes
    after that answer is encoded, so that a session need not read the rest again:

        encode(t, [(q1, None)]) + answer + encode(t, [(q2, None)], after=answer) == encode(t, [(q1, text), (q2, None)])

    where `answer` are the ids of `text`. `most`: see Tokenizer.encode; the caller still counts.
    """
    segments = _segments(messages, tiles_per_image, system, tokens_per_tile, plain)
    ids = [] if after is not None else tokenizer.begin
    if after is not None:
        turn = segments.index((False, "user\n")) - 1
        # an empty answer is only its header, as in _segments
        segments = ([(True, "<|im_end|>"), (False, "\n")] if after else []) + segments[turn:]
    if not plain:
        return ids + tokenizer.encode("".join(text for _, text in segments), most=most)
    run = ""
    for is_token, text in [*segments, (True, "")]:
        if is_token:        # a run of text is encoded as a whole, with its header: "user\n" + "\nHi" has one token \n\n
            ids += tokenizer.encode(run, plain=True, most=most) + tokenizer.encode(text)
            run = ""
        else:
            run += text
    return ids


def _segments(messages: Sequence, tiles_per_image: Sequence[int], system: str | None, tokens_per_tile: int,
              plain: bool) -> list[tuple[bool, str]]:
    """Cut the prompt into [(is_token, text), ...]: added tokens of the template, and the texts between them."""
    messages = [m for item in messages for m in _as_messages(item)]
    if messages and messages[0]["role"] == "system":
        if system is not None:
            raise InputError("a system text is given twice, as `system` and as the first message; give one of them")
        system = messages[0]["content"]
        messages = messages[1:]
    contents = [(m["role"], _split(m["content"], plain or m["role"] != "user")) for m in messages]
    system = _split(SYSTEM if system is None else system, plain=True)
    everything = [part for parts in [system, *(parts for _, parts in contents)] for part in parts]
    marks = everything.count(_PICTURE)
    if marks != len(tiles_per_image):
        raise InputError(f"the messages have {marks} picture marks ({IMAGE}) but {len(tiles_per_image)} pictures "
                         f"are given; write one {IMAGE} where each picture belongs")
    if any(type(tiles) is not int or tiles < 1 for tiles in tiles_per_image):
        raise InputError(f"tiles per picture are {list(tiles_per_image)}; every picture has at least one")
    tiles = iter(tiles_per_image)

    def body(parts: list) -> Iterator[tuple[bool, str]]:
        for part in parts:
            if part is _PICTURE:
                yield from [(True, "<img>"), (True, CONTEXT * (tokens_per_tile * next(tiles))), (True, "</img>")]
            else:
                yield False, part

    segments = [(True, "<|im_start|>"), (False, "system\n"), *body(system), (True, "<|im_end|>"), (False, "\n")]
    for role, parts in contents:
        segments += [(True, "<|im_start|>"), (False, role + "\n"), *body(parts)]
        if parts:           # an empty message is only its header, as in the original
            segments += [(True, "<|im_end|>"), (False, "\n")]
    if contents and contents[-1][0] == "user":
        segments += [(True, "<|im_start|>"), (False, "assistant\n")]
    # Also without a picture: another turn may bring one. In the whole, as two texts may spell it together.
    if not plain and "".join(text for _, text in segments).count(CONTEXT) != tokens_per_tile * sum(tiles_per_image):
        raise InputError(f"a message spells {CONTEXT}, which would take the place of a visual token; remove it, or "
                         "treat what users write as text with plain=True (in a pipeline: "
                         "EngineConfig(plain_text=True))")
    return segments


def _as_messages(item: dict | Sequence) -> list[dict]:
    """Turn one item of a history into messages: a message is one, a pair (question, answer) is two."""
    if isinstance(item, dict):
        if item.get("role") not in ROLES:
            raise InputError(f"a message has role {item.get('role')!r}; roles are {', '.join(ROLES)}")
        return [{"role": item["role"], "content": item.get("content") or ""}]
    if isinstance(item, (tuple, list)) and len(item) == 2:
        question, answer = item
        return ([{"role": "user", "content": question}]
                + ([] if answer is None else [{"role": "assistant", "content": answer}]))
    raise InputError(f"a message is a {type(item).__name__}; it must be a dict with role and content, or a pair "
                     "(question, answer)")


def _split(content: str | Sequence[dict], plain: bool) -> list:
    """Split the content of a message into [text or _PICTURE, ...] without empty texts."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise InputError(f"a message's content is a {type(content).__name__}; it must be a text or a list of items")
    parts = []
    for item in content:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "image":
            parts.append(_PICTURE)
        elif kind == "text" and isinstance(item.get("text"), str):
            texts = [item["text"]] if plain else item["text"].split(IMAGE)
            for i, text in enumerate(texts):
                parts += [_PICTURE] * (i > 0) + [text] * bool(text)
        else:
            raise InputError(f"message content has an item {str(item)[:60]!r}; items are "
                             '{"type": "text", "text": ...} and {"type": "image"}')
    return parts
