"""The API a person types, shaped like LMDeploy's: pipeline(), chat sessions, streaming.

    pipe = pipeline("OpenGVLab/InternVL2_5-4B-MPO-AWQ")
    print(pipe(("describe this image", load_image("tiger.jpeg"))).text)

Source of the behaviour: LMDeploy v0.6.4 serve/vl_async_engine.py, serve/async_engine.py:545-563, 684-732,
vl/templates.py:116-175; where that version has a trap (a black picture for a missing file, sampling values ignored in
silence, an empty answer for a long prompt) this raises or warns.
"""
from __future__ import annotations

import itertools
import os
import re
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from minivl import prompt as template
from minivl import tiling
from minivl.cache import KVCache
from minivl.config import Config
from minivl.files.find import find
from minivl.files.load import load
from minivl.generation import check_ids, left_pad, steps
from minivl.limits import InputError, Limits
from minivl.media import load_image
from minivl.model import MiniVL
from minivl.sampling import GenerationConfig, Sampler
from minivl.tokenizer import TextStream, Tokenizer

IMAGE_TOKEN = "<IMAGE_TOKEN>"       # in a prompt's text: a picture goes here (LMDeploy's word for prompt.IMAGE)
DETAIL = {"low": 6, "medium": 12, "high": 24}   # OpenAI's `detail` -> most tiles; else the model's own default
TILES_AT_ONCE = 13                  # through the vision tower; bounds its memory. 12 and a thumbnail: a whole picture


@dataclass(frozen=True)
class EngineConfig:
    """How a pipeline runs. Stands where the card has TurbomindEngineConfig."""
    session_len: int | None = None      # tokens of prompt and answer together; default and most: the model's positions
    max_batch_size: int = 8             # prompts decoded together
    device: str | None = None           # default "cpu"
    dtype: str | None = None            # default see minivl.load
    precision: str = "exact"            # or "fast": may round to bfloat16 where that is faster; see minivl.fast
    revision: str | None = None         # of a hub id
    plain_text: bool = False            # True: what users write is text even where it spells <|im_end|> or <image>
    allow_paths: bool = True            # pictures may be local paths
    allow_hosts: tuple = ()             # names of hosts whose pictures may be fetched from non-global addresses
    limits: Limits = Limits()

    def __post_init__(self):
        for name in ("session_len", "max_batch_size"):
            value = getattr(self, name)
            if not (value is None and name == "session_len") and not (_whole(value) and value >= 1):
                raise InputError(f"EngineConfig.{name} is {value!r}; it must be a whole number, 1 or more")
        for name, kind in (("limits", Limits), ("plain_text", bool), ("allow_paths", bool), ("allow_hosts", (tuple, list))):
            if not isinstance(getattr(self, name), kind):
                raise InputError(f"EngineConfig.{name} is {getattr(self, name)!r}; it must be a "
                                 f"{kind.__name__ if isinstance(kind, type) else 'tuple of host names'}")


@dataclass
class Response:
    """One answer. `finish_reason`: "stop" (the model, a stop word or stop token) or "length"."""
    text: str
    generate_token_len: int
    input_token_len: int                # of this turn, placeholders counted
    session_id: int
    finish_reason: str | None
    token_ids: list[int]                # without the stop token
    logprobs: list[dict] | None = None  # per token {id: log-probability}, if asked for
    index: int = 0                      # of the prompt in its batch


@dataclass(frozen=True)
class Picture:
    """A picture with its own tile limit: pipe((text, [Picture("map.png", max_num=24), "photo.jpg"]))."""
    source: object
    max_num: int | None = None


@dataclass
class Session:
    """A conversation. Keeps the keys and values of everything said, so a later turn costs only its own tokens."""
    id: int
    history: list = field(default_factory=list)     # [(prompt as given, answer text), ...]
    response: Response | None = None                # the latest
    ids: list = field(default_factory=list)         # all tokens so far, the answers' as really generated
    cache: KVCache | None = field(default_factory=KVCache)

    def close(self):
        """Frees the cache; the history stays readable."""
        self.cache = None


def pipeline(model_path="nano", backend_config: EngineConfig | None = None) -> Pipeline:
    """`model_path`: folder or hub id of a checkpoint with its tokenizer files, or the shipped "nano" or "nano-awq"."""
    config = backend_config or EngineConfig()
    if not isinstance(config, EngineConfig):
        raise InputError(f"backend_config is a {type(config).__name__}; give minivl.EngineConfig(...)")
    folder = find(model_path, revision=config.revision)
    Config.load(folder)     # before the tokenizer: the better message for a folder that is no checkpoint
    tokenizer = Tokenizer.load(folder)
    return Pipeline(load(folder, device=config.device, dtype=config.dtype, precision=config.precision), tokenizer, config)


def video_prompt(question: str, frames: list) -> list[dict]:
    """Messages for a pipeline from video frames, one tile each: Frame1: <image>, Frame2: <image>, ..., the question."""
    content = []
    for i, frame in enumerate(frames, start=1):
        content += [{"type": "text", "text": f"Frame{i}: "},
                    {"type": "image_data", "image_data": {"data": Picture(frame, max_num=1)}}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


class Pipeline:
    """A loaded model and its tokenizer. Call it with one prompt, or a list of prompts for a batch."""

    def __init__(self, model: MiniVL, tokenizer: Tokenizer, config: EngineConfig | None = None):
        self.model, self.tokenizer, self.config = model, tokenizer, config or EngineConfig()
        vocabulary, room = model.config.llm_config.vocab_size, model.config.llm_config.max_position_embeddings
        if tokenizer.vocab_size > vocabulary:
            raise InputError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is "
                             f"{vocabulary}; they are of different models")
        if model.img_context_token_id != tokenizer.id(template.CONTEXT):
            raise InputError(f"the model takes id {model.img_context_token_id} for {template.CONTEXT}, the tokenizer "
                             f"has {tokenizer.id(template.CONTEXT)}; they are of different models")
        self.room = room if self.config.session_len is None else self.config.session_len
        if not 1 <= self.room <= room:
            raise InputError(f"session_len {self.room} must be in 1..{room}, the positions of this model")
        self.stop_ids = {*model.eos_token_ids, tokenizer.id("<|im_end|>")}
        self._session_ids = itertools.count()
        self._containing = {}       # bad word -> ids of the tokens that contain it

    def __call__(self, prompts, gen_config=None):
        """One prompt -> Response; a list of prompts -> [Response, ...].

        A prompt is a text, (text, picture), (text, [pictures]) or OpenAI-style messages (a list of dicts). A picture is
        a PIL image, a path, a URL, a data: URL, bytes, or Picture(any of them, max_num=). `gen_config`: one, or one
        for each prompt.
        """
        one = not isinstance(prompts, list) or bool(prompts) and all(isinstance(message, dict) for message in prompts)
        prompts = [prompts] if one else prompts
        if not prompts:
            raise InputError("the list of prompts is empty; give at least one prompt")
        configs = gen_config if isinstance(gen_config, (list, tuple)) else [gen_config] * len(prompts)
        if len(configs) != len(prompts):
            raise InputError(f"{len(configs)} generation configs are given for {len(prompts)} prompts; give one, or one "
                             "for each")
        # All prompts are read and checked before any is run: a bad one costs nothing that was done for the others.
        turns = [self._read(p, c) for p, c in zip(prompts, configs)]
        responses, size = [], self.config.max_batch_size
        for first in range(0, len(turns), size):
            answers = [_Answer(t, self, next(self._session_ids), first + i)
                       for i, t in enumerate(turns[first:first + size])]
            for _ in self._run(answers):
                pass
            responses += [answer.response() for answer in answers]
        return responses[0] if one else responses

    def stream(self, prompt, gen_config=None, session: Session | None = None):
        """Yields the answer's text piece by piece, whole characters only. With `session`: as its next turn.

        An iteration that is not finished leaves the session as it was before. The Response is the generator's return
        value, and `session.response`.
        """
        turn = self._read(prompt, gen_config, session)      # here, not at the first next(): errors come at the call
        return self._stream(prompt, turn, session)

    def chat(self, prompt, session: Session | None = None, gen_config=None) -> Session:
        """One turn of a conversation; `session.response` is the answer. session=None starts a new one."""
        session = session or self.session()
        for _ in self.stream(prompt, gen_config, session):
            pass
        return session

    def session(self) -> Session:
        """A new, empty conversation."""
        return Session(next(self._session_ids))

    # ---- what was asked ---------------------------------------------------------------------------------------------

    def _read(self, prompt, gen_config=None, session=None) -> _Turn:
        """Pictures opened and tiled, the prompt tokenized, its length checked. Nothing is computed yet."""
        gen_config = GenerationConfig() if gen_config is None else gen_config
        for value, kind, name in ((gen_config, GenerationConfig, "gen_config"), (session, Session, "session")):
            if value is not None and not isinstance(value, kind):
                raise InputError(f"{name} is a {type(value).__name__}; it must be a {kind.__name__}. Name the argument: "
                                 f"{name}=...")
        check_ids(gen_config, self.model)
        if gen_config.max_new_tokens > self.config.limits.new_tokens:
            raise InputError(f"max_new_tokens is {gen_config.max_new_tokens}, the limit is {self.config.limits.new_tokens}; "
                             "ask for fewer or raise Limits(new_tokens=...)")
        if session is not None and session.cache is None:
            raise InputError("the session is closed; start a new one with session=None")
        pictures, messages = [], []
        for message in self._messages(prompt):
            content, found = self._content(message["content"])
            if message["role"] != "user" and found:
                raise InputError(f"a {message['role']} message holds pictures; they belong to the user's messages")
            messages.append({"role": message["role"], "content": content})
            pictures += found
        if not messages or messages[-1]["role"] != "user":
            raise InputError("the last message must be the user's; add the question to be answered")
        limits, system = self.config.limits, None
        if sum(map(len, pictures)) > limits.pictures:
            raise InputError(f"{sum(map(len, pictures))} pictures exceed the limit of {limits.pictures} in one prompt; give "
                             "fewer or raise Limits(pictures=...)")
        if messages[0]["role"] != "system":
            system = self.model.config.system_message
        characters = sum(len(item.get("text", "")) for m in messages for item in m["content"])
        if characters > limits.prompt_chars:
            raise InputError(f"the prompt has {characters} characters, the limit is {limits.prompt_chars}; shorten it")
        blocks = [[self._tiles(picture) for picture in block] for block in pictures]
        later = session is not None and bool(session.ids)
        if later and len(messages) > 1:
            raise InputError(f"a later turn of a session is one user message, got {len(messages)} messages; the "
                             "session remembers the earlier ones")
        ids = template.encode(self.tokenizer, messages, [sum(map(len, block)) for block in blocks], system,
                              tokens_per_tile=self.model.config.num_image_token, plain=self.config.plain_text,
                              after=session.response.token_ids if later else None)
        held = len(session.ids) if later else 0
        if held + len(ids) >= self.room:
            raise InputError(f"the prompt has {held + len(ids)} tokens and leaves no room for an answer in a context of "
                             f"{self.room}; use fewer or smaller pictures (max_num), a shorter text, or a larger "
                             "session_len")
        return _Turn(ids, [tile for block in blocks for tiles in block for tile in tiles], gen_config,
                     min(gen_config.max_new_tokens, self.room - held - len(ids)), held)

    def _messages(self, prompt) -> list[dict]:
        """A prompt in any of its forms -> [{"role", "content": [items]}, ...]; items: text, image_url or image_data."""
        if isinstance(prompt, str):
            prompt = (prompt, [])
        if isinstance(prompt, tuple):
            if len(prompt) != 2 or not isinstance(prompt[0], str):
                raise InputError("a prompt tuple is (text, picture) or (text, [pictures]), the text first; got "
                                 f"({', '.join(type(part).__name__ for part in prompt)})")
            text, pictures = prompt
            pictures = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
            items = [{"type": "image_data", "image_data": {"data": picture}} for picture in pictures]
            prompt = [{"role": "user", "content": [{"type": "text", "text": text}, *items]}]
        if not isinstance(prompt, list):
            raise InputError(f"a prompt is a {type(prompt).__name__}; give a text, (text, picture), (text, [pictures]) or "
                             "a list of messages")
        messages = []
        for message in prompt:
            if not isinstance(message, dict) or message.get("role") not in template.ROLES:
                raise InputError(f"a message must be a dict with role {', '.join(template.ROLES)}, got "
                                 f"{str(message)[:80]!r}")
            content = message.get("content")
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
                raise InputError(f"a message's content must be a text or a list of items, got {str(content)[:80]!r}")
            if message["role"] == "system" and messages:
                raise InputError("a system message comes after another message; it must be the first")
            if message["role"] == "user" and not any(
                    item.get("type") != "text" or str(item.get("text", "")).strip() for item in content):
                raise InputError("the prompt is empty; write a question")
            messages.append({"role": message["role"], "content": content})
        return messages

    def _content(self, items: list[dict]) -> tuple:
        """Items of one message -> (items for the template, [pictures of each mark]).

        One text: its marks place the pictures; without marks they stand before it, all in one <img></img> pair, as
        LMDeploy 0.6.4 does. Several texts: everything in the order given, a line end after each picture.
        """
        texts, pictures = [], []
        for item in items:
            if item.get("type") == "text" and isinstance(item.get("text"), str):
                texts.append(item["text"])
            else:
                pictures.append(_picture(item))
        if len(texts) > 1 and pictures:
            found, content = iter(pictures), []
            for item in items:
                content += ([item] if item["type"] == "text" else [{"type": "image"}, {"type": "text", "text": "\n"}])
            return self._checked(content), [[picture] for picture in found]
        text, plain = "".join(texts), self.config.plain_text
        if plain or not (IMAGE_TOKEN in text or template.IMAGE in text):
            if len(pictures) > 1 and not plain:
                _warn(f"{len(pictures)} pictures without {IMAGE_TOKEN} in the text share one <img></img> pair; "
                              f"number them for better answers: 'Image-1: {IMAGE_TOKEN}\\nImage-2: {IMAGE_TOKEN}\\n...'")
            front = [{"type": "image"}, {"type": "text", "text": "\n"}] if pictures else []
            return front + [{"type": "text", "text": text}], [pictures] if pictures else []
        text = text.replace(f"<img>{IMAGE_TOKEN}</img>", IMAGE_TOKEN)
        content, blocks, rest = [], [], iter(pictures)
        for part in re.split(f"((?:{re.escape(IMAGE_TOKEN)})+|{re.escape(template.IMAGE)})", text):
            count = part.count(IMAGE_TOKEN) or int(part == template.IMAGE)
            if count:       # neighbouring marks share one pair
                content.append({"type": "image"})
                blocks.append(list(itertools.islice(rest, count)))
            else:
                content.append({"type": "text", "text": part})
        marks = text.count(IMAGE_TOKEN) + text.count(template.IMAGE)
        if not pictures:
            raise InputError(f"the text has {marks} picture mark{'s' * (marks > 1)} ({IMAGE_TOKEN} or {template.IMAGE}) but 0 "
                             "pictures are given; give the pictures, or EngineConfig(plain_text=True) if it is only text")
        if marks != len(pictures):
            raise InputError(f"the text has {marks} picture marks ({IMAGE_TOKEN} or {template.IMAGE}) but "
                             f"{len(pictures)} pictures are given; write one mark for each picture, or none at all")
        return content, blocks

    def _checked(self, content):
        """Several texts with pictures in between: marks in the texts would be ambiguous."""
        texts = [item.get("text", "") for item in content]
        if not self.config.plain_text and any(IMAGE_TOKEN in text or template.IMAGE in text for text in texts):
            raise InputError(f"a message has several texts and a mark {IMAGE_TOKEN} or {template.IMAGE} in one of them; "
                             "use one text with marks, or several without")
        return content

    def _tiles(self, picture: Picture) -> list:
        """Tiles of one picture, thumbnail last."""
        c, limits = self.model.config, self.config.limits
        default = c.max_dynamic_patch if c.dynamic_image_size else 1
        max_num = default if picture.max_num is None else picture.max_num
        if not _whole(max_num) or not 1 <= max_num <= limits.tiles_per_picture:
            raise InputError(f"max_num is {max_num!r}; it must be a whole number in 1..{limits.tiles_per_picture}")
        image = load_image(picture.source, limits=limits, allow_paths=self.config.allow_paths,
                           allow_hosts=self.config.allow_hosts)
        return tiling.tile(image, min_num=min(c.min_dynamic_patch, max_num), max_num=max_num,
                           tile_size=c.force_image_size, use_thumbnail=c.use_thumbnail)

    # ---- the answer -------------------------------------------------------------------------------------------------

    def _stream(self, prompt, turn, session):
        answer = _Answer(turn, self, session.id if session else next(self._session_ids))
        if session is None:
            for _, text in self._run([answer]):
                yield text
            return answer.response()
        if session.cache is None or len(session.ids) != turn.held:
            raise InputError("the session went on or was closed before this stream was read; read a stream to its end "
                             "before the next turn")
        before = session.cache.length
        try:
            for _, text in self._run([answer], session):
                yield text
        except BaseException:       # also Ctrl-C and an abandoned iteration: nothing half-said stays
            session.cache.truncate(before)
            raise
        session.ids += turn.ids + answer.token_ids
        if answer.generated is not None:    # a stop word was cut off: the cache holds tokens that are no longer there
            session.cache.truncate(min(session.cache.length, turn.held + len(turn.ids) + answer.generated))
        session.response = answer.response()
        session.history.append((prompt, answer.text))
        return session.response

    @torch.inference_mode()
    def _run(self, answers: list, session: Session | None = None):
        """Decodes all answers together; yields (row, new text)."""
        model, turns = self.model, [answer.turn for answer in answers]
        with _progress(model, turns):
            rows = [self._embed(turn) for turn in turns]                                    # B x (1, t, D)
            if session is not None and len(session.ids) > session.cache.length:
                # the last token of the previous answer was never fed
                rest = torch.tensor([session.ids[session.cache.length:]])
                rows = [torch.cat([model.embed(rest), rows[0]], dim=1)]
            x, padding = left_pad(rows)                                                     # (B, T, D)
            running = steps(model, x, [answer.sampler(self, session) for answer in answers],
                            cache=session and session.cache, padding=padding, lookup=answers[0].turn.config.lookup)
            tokens, logits = next(running)
        while True:
            for row, answer in enumerate(answers):
                if answer.finish_reason is None:
                    if text := answer.push(tokens[row], logits[row]):
                        yield row, text
            if all(answer.finish_reason for answer in answers):
                return
            tokens, logits = next(running)

    def _embed(self, turn: _Turn):
        """Each prompt by itself, so that no other prompt of the batch can shift its visual tokens: float[1, T, D]."""
        visual = [self.model.visual_tokens(tiling.to_pixel_values(turn.tiles[i:i + TILES_AT_ONCE]))
                  for i in range(0, len(turn.tiles), TILES_AT_ONCE)]
        return self.model.embed(torch.tensor([turn.ids]), torch.cat(visual) if visual else None)

    def containing(self, word: str) -> list[int]:
        """Ids of all tokens whose text contains `word`, for bad_words."""
        if word not in self._containing:
            wanted = word.encode()
            self._containing[word] = [i for i in range(self.tokenizer.vocab_size)
                                      if wanted in self.tokenizer.token_bytes(i)]
        return self._containing[word]


@dataclass
class _Turn:
    """What one prompt has become before anything is computed."""
    ids: list[int]
    tiles: list
    config: GenerationConfig
    max_new_tokens: int
    held: int               # tokens of the session that it follows


class _Answer:
    """One answer while it is being written."""

    def __init__(self, turn: _Turn, pipe: Pipeline, session_id: int, index: int = 0):
        self.turn, self.session_id, self.index = turn, session_id, index
        self.stop_ids = {*(() if turn.config.ignore_eos else pipe.stop_ids), *(turn.config.stop_token_ids or ())}
        self.words = tuple(turn.config.stop_words or ())
        self.stream = TextStream(pipe.tokenizer, turn.config.skip_special_tokens)
        self.text, self.held = "", ""       # emitted; not yet emitted because it may be the start of a stop word
        self.token_ids, self.logprobs, self.finish_reason = [], [], None
        self.sizes = []                     # characters of text after each token, emitted or held
        self.generated = None               # how many of token_ids the model wrote, where that is not all of them
        self.tokenizer = pipe.tokenizer

    def sampler(self, pipe: Pipeline, session: Session | None) -> Sampler:
        placeholder = pipe.model.img_context_token_id
        seen = [i for i in (session.ids if session else []) + self.turn.ids if i != placeholder]
        banned = {i for word in self.turn.config.bad_words or () for i in pipe.containing(word)}
        return Sampler(self.turn.config, seen, self.stop_ids, {*banned, *(self.turn.config.bad_token_ids or ())})

    def push(self, token: int, logits) -> str:
        """Takes the next token; returns the text that is certain now."""
        if token in self.stop_ids:
            return self._end("stop", self.stream.finish())
        text = self.held + self.stream.push(token)
        cut = min((text.find(word) for word in self.words if word in text), default=None)
        if cut is not None:     # the tokens that spell the stop word are not part of the answer
            self.held = ""
            end = self._end("stop", text[:cut], decoder_rest=False)
            self._drop_tokens_after(len(self.text))
            return end
        self.token_ids.append(token)
        # half a character more while the bytes of one are incomplete: such a token goes with what completes it
        self.sizes.append(len(self.text) + len(text) + 0.5 * self.stream.incomplete)
        if self.turn.config.logprobs:
            best = logits.log_softmax(-1).topk(min(self.turn.config.logprobs, len(logits)))
            self.logprobs.append(dict(zip(best.indices.tolist(), best.values.tolist())))
        if len(self.token_ids) >= self.turn.max_new_tokens:
            self.held = ""
            return self._end("length", text + self.stream.finish(), decoder_rest=False)
        keep = max((n for word in self.words for n in range(1, min(len(word), len(text) + 1))
                    if text.endswith(word[:n])), default=0)
        text, self.held = text[:len(text) - keep], text[len(text) - keep:]
        self.text += text
        return text

    def _end(self, reason: str, rest: str, decoder_rest: bool = True) -> str:
        self.finish_reason = reason
        rest = self.held + rest if decoder_rest else rest
        self.text += rest
        return rest

    def _drop_tokens_after(self, size: int):
        """Keeps the tokens of the first `size` characters; a last token that reaches beyond is spelled anew."""
        while self.sizes and self.sizes[-1] > size:
            self.sizes.pop()
        del self.token_ids[len(self.sizes):], self.logprobs[len(self.sizes):]
        self.generated = len(self.token_ids)
        self.token_ids += self.tokenizer.encode(self.text[int(self.sizes[-1]) if self.sizes else 0:], plain=True)

    def response(self) -> Response:
        return Response(self.text, len(self.token_ids), len(self.turn.ids), self.session_id, self.finish_reason,
                        list(self.token_ids), self.logprobs if self.turn.config.logprobs else None, self.index)


def _picture(item: dict) -> Picture:
    """A message's picture item -> Picture; OpenAI's image_url with LMDeploy's max_dynamic_patch, or image_data."""
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


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _warn(message: str):
    """A warning that points at the caller's line, however deep in this package it is raised."""
    here, level, frame = os.path.dirname(__file__), 1, sys._getframe()
    while frame.f_back and os.path.dirname(frame.f_code.co_filename) == here:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


@contextmanager
def _progress(model: MiniVL, turns: list):
    """A bar over the layers that look at the tiles and read the prompt; on a terminal, if it takes over 2 seconds."""
    vision = [*model.vision_model.encoder.layers]
    language = [*model.language_model.layers]
    total = len(vision) * sum(-(-len(turn.tiles) // TILES_AT_ONCE) for turn in turns) + len(language)
    what = f"{sum(len(turn.tiles) for turn in turns)} tiles, {sum(len(turn.ids) for turn in turns)} tokens"
    with tqdm(total=total, desc=what, unit="layer", delay=2, leave=False,
              disable=None) as bar:
        handles = [layer.register_forward_hook(lambda *_: bar.update() and None) for layer in vision + language]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
