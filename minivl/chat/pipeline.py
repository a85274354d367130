"""The API a person types, shaped like LMDeploy's: pipeline(), chat sessions, streaming.

    pipe = pipeline("OpenGVLab/InternVL2_5-4B-MPO-AWQ")
    print(pipe(("describe this image", load_image("tiger.jpeg"))).text)

Source of the behaviour: LMDeploy v0.6.4 serve/vl_async_engine.py, serve/async_engine.py; where that version has a trap
(sampling values ignored in silence, an empty answer for a long prompt) this raises or warns.
"""
from __future__ import annotations

import itertools
import os
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm import tqdm

from minivl import prompt as template
from minivl import tiling
from minivl.cache import KVCache
from minivl.chat.answers import Answer, Response
from minivl.chat.requests import Turn, check_room, is_whole, read_request, warn
from minivl.config import Config
from minivl.files.find import find
from minivl.files.load import load
from minivl.generation import check_ids, left_pad, steps, visual_tokens
from minivl.limits import InputError, Limits
from minivl.lmdeploy import ENGINE, takes_names_of_lmdeploy
from minivl.model import MiniVL
from minivl.sampling import GenerationConfig
from minivl.tokenizer import Tokenizer

TILES_AT_ONCE = 13                  # through the vision tower; bounds its memory. 12 and a thumbnail: a whole picture


@takes_names_of_lmdeploy(ENGINE)
@dataclass(frozen=True)
class EngineConfig:
    """How a pipeline runs. Stands where the card has TurbomindEngineConfig; its other fields: see minivl.lmdeploy."""
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
    lora: str | os.PathLike | None = None   # what weights_tools.lora learned on this checkpoint

    def __post_init__(self):
        for name in ("session_len", "max_batch_size"):
            value = getattr(self, name)
            if not (value is None and name == "session_len") and not (is_whole(value) and value >= 1):
                raise InputError(f"EngineConfig.{name} is {value!r}; it must be a whole number, 1 or more")
        for name, kind in (("limits", Limits), ("plain_text", bool), ("allow_paths", bool)):
            if not isinstance(getattr(self, name), kind):
                raise InputError(f"EngineConfig.{name} is {getattr(self, name)!r}; it must be a {kind.__name__}")
        if not isinstance(self.lora, (str, os.PathLike, type(None))):
            raise InputError(f"EngineConfig.lora is {self.lora!r}; it must be the path of a LoRA file")
        if not isinstance(self.allow_hosts, (tuple, list)):
            raise InputError(f"EngineConfig.allow_hosts is {self.allow_hosts!r}; it must be a tuple of host names")


class Session:
    """A conversation. Keeps the keys and values of everything said, so a later turn costs only its own tokens.

    It belongs to the pipeline that started it, and one turn at a time runs on it, in whichever thread. It cannot be
    copied or pickled: two conversations would write into one cache.
    """

    def __init__(self, id: int, owner: Pipeline):
        self.id = id
        self.history = []                   # [(prompt as given, answer text), ...]
        self.response = None                # the latest Response
        self.ids = []                       # all tokens so far, the answers' as really generated
        self.cache = KVCache()              # None once it is closed and no turn runs
        self.closed = False
        self._owner = weakref.ref(owner)    # a session that somebody keeps does not keep the weights
        self._turn = threading.Lock()       # held by the turn that runs

    def __repr__(self) -> str:
        turns = f"{len(self.history)} turn{'s' * (len(self.history) != 1)}"
        return f"<Session {self.id}: {turns}, {len(self.ids)} tokens{', closed' * self.closed}>"

    def __reduce_ex__(self, protocol):
        raise InputError(f"session {self.id} cannot be copied or pickled, its {len(self.ids)} tokens lie in one cache; "
                         "start another with pipe.session() and ask again what both share")

    def close(self):
        """Free the cache; the history stays readable. A turn that runs ends with an error at its next text."""
        self.closed = True
        if not self._turn.locked():         # else the turn frees it as it ends
            self.cache = None

    def check(self, owner: Pipeline):
        """Refuse a turn of another pipeline, after the end, or while another turn runs."""
        if self._owner() is not owner:
            raise InputError(f"session {self.id} was started by another pipeline; start one here with session=None")
        if self.closed:
            raise InputError("the session is closed; start a new one with session=None")
        if self._turn.locked():
            raise self._busy()

    def _busy(self) -> InputError:
        return InputError(f"session {self.id} is busy with its turn {len(self.history) + 1}; read that stream to its "
                          "end or close() it first, or start another session")

    @contextmanager
    def running(self, turn: Turn) -> Iterator[None]:
        """Hold the session for one turn. Any way out but the end of the block leaves it as it was before."""
        if not self._turn.acquire(blocking=False):
            raise self._busy()
        try:
            if self.closed or len(self.ids) != turn.start:
                raise InputError("the session went on or was closed before this stream was read; read a stream to its "
                                 "end before the next turn")
            before = self.cache.length
            try:
                yield
            except BaseException:           # also Ctrl-C and an abandoned iteration: nothing half-said stays
                self.cache.truncate(before)
                raise
        finally:
            self._turn.release()
            if self.closed:                 # meanwhile
                self.cache = None

    def unread(self) -> list[int]:
        """The last tokens that are not in the cache yet: the end of the previous answer was never fed to the model."""
        return self.ids[self.cache.length:]

    def add(self, prompt, answer: Answer):
        """Remember a finished turn: what was asked, as given, and its answer."""
        turn = answer.turn
        if answer.written is not None:      # a stop word was cut off: the cache holds tokens that are no longer there
            self.cache.truncate(min(self.cache.length, turn.start + len(turn.ids) + answer.written))
        self.response = answer.response()
        self.history.append((prompt, answer.text))
        self.ids += turn.ids + answer.token_ids     # last: who prepares a turn meanwhile sees by their number it is old


def pipeline(model_path="nano", backend_config: EngineConfig | None = None) -> Pipeline:
    """Load a model and its tokenizer.

    `model_path`: folder, hub id or short name (4b-mpo-awq) of a checkpoint with its tokenizer files, or the shipped
    "nano" or "nano-awq".
    """
    config = backend_config or EngineConfig()
    if not isinstance(config, EngineConfig):
        raise InputError(f"backend_config is a {type(config).__name__}; give minivl.EngineConfig(...)")
    folder = find(model_path, revision=config.revision)
    Config.load(folder)     # before the tokenizer: the better message for a folder that is no checkpoint
    tokenizer = Tokenizer.load(folder)
    model = load(folder, device=config.device, dtype=config.dtype, precision=config.precision, tokenizer=tokenizer,
                 lora=config.lora)
    return Pipeline(model, tokenizer, config, name=str(model_path))


class Pipeline:
    """A loaded model and its tokenizer. Call it with one prompt, or a list of prompts for a batch."""

    def __init__(self, model: MiniVL, tokenizer: Tokenizer, config: EngineConfig | None = None, *, name: str = ""):
        _check_tokenizer(model, tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.config = config or EngineConfig()
        positions = model.config.llm_config.max_position_embeddings
        asked = self.config.session_len or positions
        self.room = min(asked, positions)
        if asked > positions:       # as in the card's snippets on a small model; what does not fit is refused later
            warnings.warn(f"session_len {asked} is more than this model's {positions} positions; {positions} are used",
                          stacklevel=3)
        self.name = name                    # in its repr
        # of the tokenizer at hand: a model that was put together by hand does not know them
        self.unused_ids = tokenizer.unused(model.config.llm_config.vocab_size)
        self.stop_ids = {*model.eos_token_ids, tokenizer.id("<|im_end|>")}
        self._session_ids = itertools.count()

    def __call__(self, prompts, gen_config=None) -> Response | list[Response]:
        """Answer one prompt -> Response; a list of prompts -> [Response, ...].

        All prompts are checked before any is run. If the model then cannot finish one of a list, the others get their
        answers, its own Response has finish_reason "error", and a warning says so; a single prompt raises InputError.

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
            raise InputError(f"{len(configs)} generation configs are given for {len(prompts)} prompts; give one, or "
                             "one for each")
        # All prompts are read and checked before any is run: a bad one costs nothing that was done for the others.
        turns = [self.turn(prompt, config) for prompt, config in zip(prompts, configs)]
        answers = [self._answer(turn, next(self._session_ids), index) for index, turn in enumerate(turns)]
        if one:
            for _ in self._write(answers):
                pass
            return answers[0].response()
        size = self.config.max_batch_size
        return [answer.response() for first in range(0, len(answers), size)
                for answer in self._finish(answers[first:first + size])]

    def _finish(self, answers: list[Answer]) -> list[Answer]:
        """Write a batch to its end; if one prompt stops it, write each alone and mark those that cannot be finished."""
        troubled = None
        try:
            for _ in self._write(answers):
                pass
        except InputError as error:
            troubled = InputError(str(error))       # without its traceback, which holds the batch's memory
        if troubled is None:
            return answers
        if len(answers) > 1:
            again = [self._answer(answer.turn, answer.session_id, answer.index) for answer in answers]
            return [answer for one in again for answer in self._finish([one])]
        answers[0].fail(troubled)
        warn(f"prompt {answers[0].index + 1} of the list was not finished: {troubled}")
        return answers

    def _write(self, answers: list[Answer], session: Session | None = None) -> Iterator[str]:
        return write(self.model, answers, session, self.unused_ids)

    def __repr__(self) -> str:
        model = self.model
        llm = model.config.llm_config
        size = sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6
        int4 = "int4, computed in " if model.config.quantization_config else ""
        return (f"<Pipeline {self.name or 'without a name'}: {size:,.0f} MB, {llm.num_hidden_layers} layers of "
                f"{llm.hidden_size}, {int4}{str(model.dtype).removeprefix('torch.')} on {model.device}, "
                f"precision {self.config.precision}, context {self.room}>")

    def stream(self, prompt, gen_config=None, session: Session | None = None) -> Iterator[str]:
        """Yield the answer's text piece by piece, whole characters only. With `session`: as its next turn.

        An iteration holds the session from its first piece to its end, to close() or until nobody keeps it; one that
        is not finished leaves the session as it was before. The Response is the generator's return value, and
        `session.response`.
        """
        turn = self.turn(prompt, gen_config, session)       # here, not at the first next(): errors come at the call
        return self._stream(prompt, turn, session)

    def chat(self, prompt, session: Session | None = None, gen_config=None) -> Session:
        """Take one turn of a conversation; `session.response` is the answer. session=None starts a new one."""
        session = self.session() if session is None else session
        for _ in self.stream(prompt, gen_config, session):
            pass
        return session

    def session(self) -> Session:
        """Start a new, empty conversation."""
        return Session(next(self._session_ids), self)

    def turn(self, prompt, gen_config: GenerationConfig | None = None, session: Session | None = None) -> Turn:
        """Read a request: open and tile its pictures, encode its text, check its length. The model computes nothing."""
        gen_config = GenerationConfig() if gen_config is None else gen_config
        self._check(gen_config, session)
        start = len(session.ids) if session is not None else 0
        engine = self.config
        ids, tiles = read_request(prompt, self.model.config, self.tokenizer, limits=engine.limits,
                                  plain_text=engine.plain_text, allow_paths=engine.allow_paths,
                                  allow_hosts=engine.allow_hosts,
                                  after=session.response.token_ids if start else None, start=start, room=self.room)
        return Turn(ids, tiles, gen_config, min(gen_config.max_new_tokens, self.room - start - len(ids)), start)

    def text_turn(self, text: str, gen_config: GenerationConfig | None = None) -> Turn:
        """Read a text that is to be continued as it stands: no chat template, no pictures."""
        gen_config = GenerationConfig() if gen_config is None else gen_config
        self._check(gen_config, None)
        if not text or len(text) > self.config.limits.prompt_chars:
            raise InputError(f"the text has {len(text)} characters; give 1 to {self.config.limits.prompt_chars}")
        ids = self.tokenizer.begin + self.tokenizer.encode(text, plain=self.config.plain_text, most=self.room)
        check_room(len(ids), self.room)
        return Turn(ids, [], gen_config, min(gen_config.max_new_tokens, self.room - len(ids)), 0)

    def _check(self, gen_config, session):
        for value, kind, name in ((gen_config, GenerationConfig, "gen_config"), (session, Session, "session")):
            if value is not None and not isinstance(value, kind):
                raise InputError(f"{name} is a {type(value).__name__}; it must be a {kind.__name__}. Name the "
                                 f"argument: {name}=...")
        check_ids(gen_config, self.model)
        most = self.config.limits.new_tokens
        if gen_config.max_new_tokens > most:
            raise InputError(f"max_new_tokens is {gen_config.max_new_tokens}, the limit is {most}; "
                             "ask for fewer or raise Limits(new_tokens=...)")
        if session is not None:
            session.check(self)

    def _answer(self, turn: Turn, session_id: int, index: int = 0) -> Answer:
        return Answer(turn, self.tokenizer, self.stop_ids, session_id, index)

    def _stream(self, prompt, turn: Turn, session: Session | None):
        if session is None:
            answer = self._answer(turn, next(self._session_ids))
            yield from self._write([answer])
            return answer.response()
        with session.running(turn):
            answer = self._answer(turn, session.id)
            for text in self._write([answer], session):
                if session.closed:
                    raise InputError(f"session {session.id} was closed while turn {len(session.history) + 1} was "
                                     "written; start a new one with session=None")
                yield text
            session.add(prompt, answer)
        return session.response


def _check_tokenizer(model: MiniVL, tokenizer: Tokenizer):
    """Refuse a tokenizer of another model."""
    vocabulary = model.config.llm_config.vocab_size
    if tokenizer.vocab_size > vocabulary:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is "
                         f"{vocabulary}; they are of different models")
    placeholder = tokenizer.id(template.CONTEXT)
    if model.img_context_token_id != placeholder:
        raise InputError(f"the model takes id {model.img_context_token_id} for {template.CONTEXT}, the tokenizer "
                         f"has {placeholder}; they are of different models")


# ---- on the model ---------------------------------------------------------------------------------------------------

@torch.inference_mode()
def write(model: MiniVL, answers: list[Answer], session: Session | None = None,
          unused_ids: Sequence[int] = ()) -> Iterator[str]:
    """Write all answers together, one token of each at a time, and yield new text as it becomes certain.

    `session`: what its one answer continues. `unused_ids`: those that no token has.
    """
    earlier = [] if session is None else session.ids
    with progress(model, [answer.turn for answer in answers]):
        rows = [embed(model, answer.turn) for answer in answers]                            # B x (1, t, D)
        if session is not None and session.unread():
            rows = [torch.cat([model.embed(torch.tensor([session.unread()])), rows[0]], dim=1)]
        x, padding = left_pad(rows)                                                         # (B, T, D)
        samplers = [answer.sampler(earlier, model.img_context_token_id) for answer in answers]
        running = steps(model, x, samplers, cache=session and session.cache, padding=padding,
                        lookup=answers[0].turn.config.lookup, unused=unused_ids)
        tokens, logits = next(running)                                                      # B ids, (B, V)
    while True:
        for answer, token, scores in zip(answers, tokens, logits):
            if answer.finish_reason is None and (text := answer.push(token, scores)):
                yield text
        if all(answer.finish_reason for answer in answers):
            return
        tokens, logits = next(running)


def embed(model: MiniVL, turn: Turn) -> torch.Tensor:
    """Embed one prompt with its pictures: float[1, T, D].

    By itself, so that no other prompt of a batch can shift its visual tokens.
    """
    starts = range(0, len(turn.tiles), TILES_AT_ONCE)
    visual = visual_tokens(model, (tiling.to_pixel_values(turn.tiles[i:i + TILES_AT_ONCE]) for i in starts))
    return model.embed(torch.tensor([turn.ids]), torch.cat(visual) if visual else None)


@contextmanager
def progress(model: MiniVL, turns: list[Turn]):
    """Show how many layers have looked at the tiles and read the prompt; on a terminal, after 2 seconds."""
    vision = [*model.vision_model.encoder.layers]
    language = [*model.language_model.layers]
    tiles = sum(len(turn.tiles) for turn in turns)
    tokens = sum(len(turn.ids) for turn in turns)
    total = len(vision) * sum(-(-len(turn.tiles) // TILES_AT_ONCE) for turn in turns) + len(language)
    what = f"{tiles} tiles, {tokens} tokens"
    with tqdm(total=total, desc=what, unit="layer", delay=2, leave=False, disable=None) as bar:
        handles = [layer.register_forward_hook(lambda *_: bar.update() and None) for layer in vision + language]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
