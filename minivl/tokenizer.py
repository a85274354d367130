"""Turn text into ids and back: byte-level BPE, the Qwen2 recipe, through the `tokenizers` library.

Text -> NFC -> split by a pattern (one digit at a time) -> bytes as printable characters -> merges -> ids.
Added tokens (<|im_start|>, <img>, ...) are cut out of the text first and get one id each.
A folder with tokenizer.model has InternLM2's recipe instead, see internlm2_tokenizer.py.

The files give a vocabulary, merges and added tokens; the recipe is ours, whichever files they come from. So nothing
that was saved along with them (truncation, padding, a dropout) can change an id.
Source: Qwen2Converter and tokenization_qwen2.py of transformers 4.37.2/4.52.4; which file's word on an added token
counts: tokenization_utils_base.py of 5.23.0; special flags: InternVL internvl/train/constants.py @2410d1d.
"""
from __future__ import annotations

import codecs
import os
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from minivl import internlm2_tokenizer, sentencepiece
from minivl.config import read_json, read_text, renamed
from minivl.limits import InputError, is_there

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# The released added tokens that decoded text leaves out, for old folders where no file says so. All others stay in it.
SPECIAL = {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
           "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>",
           "<box>", "</box>", "<unk>", "<s>", "</s>", "<|plugin|>", "<|interpreter|>", "<|action_end|>",
           "<|action_start|>"}
REQUIRED = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
OF_PIECES = ("<|im_start|>", "<|im_end|>")     # of these, InternLM2 has those in place of unused pieces
QWEN2_FILES = ("vocab.json", "merges.txt")
MODEL_FILE = "tokenizer.model"
JSON_FILES = ("vocab.json", "added_tokens.json", "tokenizer.json", "tokenizer_config.json")
# What a tokenizer may hold: over twice the largest known, so that any loads in seconds and less than 1 GB.
MAX_FILES = 24_000_000      # bytes of its JSON files together; 16 MB where a folder has both forms
MAX_TOKENS = 2 ** 19        # 151,665 in the released ones; as many merges
MAX_ADDED = 20_000          # 24 in the released ones, a thousand where places are tokens
MAX_ADDED_CHARS = 1_000_000     # of all added tokens: they become one automaton that is searched for
WORDS_KEPT = 100            # texts whose tokens `containing` remembers
FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
         "additional_special_tokens", "extra_special_tokens")       # keys of tokenizer_config.json


class Tokenizer:
    """Turn text into ids and ids into text. `Tokenizer.load(folder)` reads the files of a checkpoint.

    `recipe`: how text becomes ids and ids become text; default Qwen2's.
    """

    def __init__(self, backend: tokenizers.Tokenizer, recipe: internlm2_tokenizer.InternLM2 | None = None):
        self.backend = backend
        self._containing = {}       # text -> ids of the tokens that contain it
        self.added = {token.content: id for id, token in sorted(backend.get_added_tokens_decoder().items())}
        self.special_ids = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        self.recipe = recipe or Qwen2(backend)
        missing = [token for token in REQUIRED if token not in self.added]
        if missing:
            raise InputError(f"the tokenizer has no {', '.join(missing)}; "
                             "are its files those of an InternVL model?")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder: tokenizer.model, tokenizer.json, or vocab.json and merges.txt.

        Added tokens may stand in tokenizer.json, tokenizer_config.json or added_tokens.json. All of these files that
        are there are read and must agree. Raises InputError.
        """
        listing = read_listing(Path(folder))
        return cls(*_internlm2(listing, Path(folder))) if listing.pieces else cls(_qwen2(listing, Path(folder)))

    @property
    def begin(self) -> list[int]:
        """List the ids that every prompt begins with, once: [1], <s>, of InternLM2; none of Qwen2."""
        return list(self.recipe.begin)

    @cached_property
    def vocab_size(self) -> int:
        """Count the ids: one more than the largest."""
        return 1 + max(self._ids)

    @cached_property
    def _ids(self) -> list[int]:
        return sorted(self.backend.get_vocab(with_added_tokens=True).values())

    def unused(self, rows: int) -> list[int]:
        """List the ids below `rows` that no token has: the padding of an embedding, or holes."""
        return without_token(self._ids, rows)

    def id(self, token: str) -> int:
        """Look up the id of one added token or vocabulary entry, e.g. `<|im_end|>`."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise InputError(f"the tokenizer has no token {token!r}")
        return found

    def encode(self, text: str, *, plain: bool = False, most: int | None = None) -> list[int]:
        """Encode a text as ids. `plain`: what spells an added token (`<|im_end|>`) is encoded as its characters.

        Any text, also a part of one: `begin` is not put in front of it. `minivl.prompt.encode` does so for a prompt.
        `most`: of far more ids than these only so many are made that the text can be refused: a character can become
        six ids, and each takes 250 bytes while the library works.
        """
        if not isinstance(text, str):
            raise InputError(f"a text to encode cannot be a {type(text).__name__}; give a str")
        _utf8(text)
        size = len(text) if most is None else most + 1000
        while size < len(text):
            # Cut within a word, the begin of a text can have some ids more than in the whole, but not twice as many.
            if len(self._ids_of(text[:size], plain)) > 2 * most + 1000:
                raise InputError(f"the text has {len(text)} characters, already the first {size} of them have over "
                                 f"{2 * most + 1000} tokens and there is room for {most}; use a shorter text")
            size *= 2
        return self._ids_of(text, plain)

    def _ids_of(self, text: str, plain: bool) -> list[int]:
        with library_errors("the text cannot be encoded; remove what is unusual in it"):
            return self.recipe.ids_of(text, plain)

    def decode(self, ids: Iterable[int] | torch.Tensor, *, skip_special_tokens: bool = True) -> str:
        """Decode ids (a tensor: int64[T]) into a text. Broken UTF-8 becomes U+FFFD, as everywhere."""
        ids = list(ids.tolist() if hasattr(ids, "tolist") else ids)
        if unknown := [i for i in ids if type(i) is not int]:
            raise InputError(f"id {str(unknown[0])[:30]!r} is a {type(unknown[0]).__name__}; ids are whole numbers")
        stream = TextStream(self, skip_special_tokens)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def token_bytes(self, id: int) -> bytes:
        """Look up the bytes one token stands for; a character may be spread over several tokens."""
        token = self.backend.id_to_token(id) if type(id) is int and 0 <= id < 2 ** 31 else None
        if token is None:
            raise InputError(f"id {str(id)[:30]} is not in the vocabulary (0..{self.vocab_size - 1})")
        return self.recipe.bytes_of(id, token)

    def containing(self, text: str) -> list[int]:
        """Find the ids of all tokens that contain a text, for bad_words.

        It looks at every token, so what it found for the latest texts is kept.
        """
        if text not in self._containing:
            wanted = _utf8(text)
            while len(self._containing) >= WORDS_KEPT:
                self._containing.pop(next(iter(self._containing), None), None)
            self._containing[text] = [i for i in self._ids if wanted in self.token_bytes(i)]
        return self._containing[text]


def _utf8(text: str) -> bytes:
    """Encode a text. Raises InputError for half a surrogate pair, which json.loads makes of `\\ud800`."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the text holds half a surrogate pair at character {error.start}, which no UTF-8 can hold; "
                         "remove it") from None


@contextmanager
def library_errors(problem: str) -> Iterator[None]:
    """Turn what the tokenizers library raises inside into an InputError. A panic of its Rust is no Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, InputError) or not (isinstance(error, Exception)
                                                 or type(error).__name__ == "PanicException"):
            raise
        raise InputError(problem) from None


class TextStream:
    """Turn tokens into text while they arrive: `push` returns the characters that are certain, `finish` the rest."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self.tokenizer = tokenizer
        self.skip = tokenizer.special_ids if skip_special_tokens else ()
        self.writer = tokenizer.recipe.writer(skip_special_tokens)

    def push(self, id: int) -> str:
        """Take one token and return the characters it makes certain, often none or several."""
        return "" if id in self.skip else self.writer.push(id, self.tokenizer.token_bytes(id))

    @property
    def incomplete(self) -> bool:
        """Tell whether some text of the last tokens is not given out yet: a part of a character, most often."""
        return self.writer.incomplete

    def finish(self) -> str:
        """Return what is left: U+FFFD for a character that never became whole, what was waited for, most often ""."""
        return self.writer.finish()


# ---- Qwen2's recipe: the steps --------------------------------------------------------------------------------------

class Qwen2:
    """What Qwen2's tokenizer does in its own way: a character of its vocabulary is a byte."""

    begin = ()      # ids that every prompt begins with

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        self.added = set(backend.get_added_tokens_decoder())

    def ids_of(self, text: str, plain: bool) -> list[int]:
        """Encode a text. `plain`: nothing in it becomes the id of an added token."""
        if not plain:
            return self.backend.encode(text).ids
        pieces = self.backend.pre_tokenizer.pre_tokenize_str(self.backend.normalizer.normalize_str(text))
        return [token.id for piece, _ in pieces for token in self.backend.model.tokenize(piece)]

    def bytes_of(self, id: int, token: str) -> bytes:
        """Say which bytes a token stands for."""
        if id in self.added or not all(c in self._byte_of for c in token):
            return token.encode("utf-8")
        return bytes(self._byte_of[c] for c in token)

    def writer(self, skip_special_tokens: bool) -> Characters:
        """Make what turns tokens into text."""
        return Characters()

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """Build GPT-2's table: printable bytes stand for themselves, the other 68 for the characters from U+0100 on."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in printable]
        return {**{chr(b): b for b in printable}, **{chr(0x100 + i): b for i, b in enumerate(others)}}


class Characters:
    """Join the bytes of tokens and give out whole characters."""

    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int, data: bytes) -> str:
        """Take a token and its bytes; return the characters it completes."""
        return self.decoder.decode(data)

    @property
    def incomplete(self) -> bool:
        """Tell whether the last tokens end inside a character."""
        return bool(self.decoder.getstate()[0])

    def finish(self) -> str:
        """Return U+FFFD for a character that never became whole, else nothing."""
        return self.decoder.decode(b"", final=True)


# ---- from files -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Listing:
    """Say what the tokenizer's files list, whichever of them are in a folder. Any of the tables may be empty."""
    files: dict[str, dict]          # name -> the parsed JSON
    vocabulary: dict[str, int]      # token -> id, of the model
    added: dict[str, int]           # token -> id, in the order of the ids
    flags: dict[str, dict]          # added token -> {"special": bool, ...}
    pieces: sentencepiece.Model | None      # of tokenizer.model

    @property
    def vocab_size(self) -> int:
        """Count the ids: one more than the largest."""
        return 1 + max([*self.vocabulary.values(), *self.added.values()], default=-1)

    def unused(self, rows: int) -> list[int]:
        """List the ids below `rows` that no token has; none where the folder has no vocabulary."""
        return without_token([*self.vocabulary.values(), *self.added.values()], rows) if self.vocabulary else []


def without_token(ids: Iterable[int], rows: int) -> list[int]:
    """List the numbers below `rows` that are not among the ids."""
    return sorted(set(range(rows)).difference(ids))


def read_listing(folder: Path) -> Listing:
    """Read which tokens the files of a folder list, with which ids. Refuses files that contradict each other."""
    there = [name for name in JSON_FILES if is_there(folder / name)]
    if (total := sum((folder / name).stat().st_size for name in there)) > MAX_FILES:
        raise InputError(f"{' and '.join(there)} in {folder} have {total} bytes together, at most {MAX_FILES} are "
                         "read; they are not the released ones, download them again")
    files = {name: read_json(folder / name) for name in there}
    vocabularies, added, flags = {}, {}, {}
    pieces = _sentencepiece(folder)
    if pieces:
        added[MODEL_FILE] = internlm2_tokenizer.FORCED
    if "vocab.json" in files:
        vocabularies["vocab.json"] = files["vocab.json"]
    if "added_tokens.json" in files:
        added["added_tokens.json"] = files["added_tokens.json"]
    # tokenizer_config.json comes last: as in transformers, its word on a token's flags counts most.
    if "tokenizer.json" in files:
        model, tokens = (files["tokenizer.json"].get(key) for key in ("model", "added_tokens"))
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or not _are_tokens(tokens):
            raise InputError(f"tokenizer.json in {folder} is JSON but not a BPE tokenizer; download it again")
        vocabularies["tokenizer.json"] = model["vocab"]
        added["tokenizer.json"] = {token["content"]: token.get("id") for token in tokens}
        flags.update((token["content"], token) for token in tokens)
    config = files.get("tokenizer_config.json", {})
    if listed := config.get("added_tokens_decoder"):
        if not isinstance(listed, dict) or not _are_tokens([*listed.values()]):
            raise InputError(f"added_tokens_decoder of tokenizer_config.json in {folder} must map ids to tokens; "
                             "download it again")
        added["tokenizer_config.json"] = {token["content"]: int(i) if re.fullmatch("[0-9]{1,10}", i) else i
                                          for i, token in listed.items()}
        flags.update((token["content"], token) for token in listed.values())
    for name, table in (*vocabularies.items(), *added.items()):
        if not all(type(i) is int and 0 <= i < 2 ** 31 for i in table.values()):
            raise InputError(f"{name} in {folder} must map tokens to ids; download it again")
        if "" in table or re.search("[\ud800-\udfff]", "".join(table)):
            raise InputError(f"{name} in {folder} holds an empty token or half a surrogate pair, which is no text; "
                             "download it again")
    tokens = _agreed(added, folder)
    _bounded("added tokens", len(tokens), MAX_ADDED, folder)
    _bounded("characters in added tokens", sum(map(len, tokens)), MAX_ADDED_CHARS, folder)
    if pieces:
        vocabularies[MODEL_FILE] = _left_over(pieces, tokens, folder)
    vocabulary = _same_vocabulary(vocabularies, tokens, folder)
    _bounded("tokens in its vocabulary", len(vocabulary), MAX_TOKENS, folder)
    _agreed({"the added tokens": tokens, **vocabularies}, folder)
    owner = {}
    for token, i in (*vocabulary.items(), *tokens.items()):
        if owner.setdefault(i, token) != token:
            raise InputError(f"the tokenizer files in {folder} give id {i} to {_named(owner[i])} and to "
                             f"{_named(token)}; they do not belong together, download them again")
    named = {text for key in NAMED for text in _texts(config.get(key))}
    return Listing(files, vocabulary, dict(sorted(tokens.items(), key=lambda item: item[1])),
                   {token: _flags(token, flags.get(token), token in named or bool(pieces) and tokens[token] < 3)
                    for token in tokens}, pieces)


def _sentencepiece(folder: Path) -> sentencepiece.Model | None:
    """Read tokenizer.model, where there is one."""
    if not is_there(folder / MODEL_FILE):
        return None
    if other := [name for name in QWEN2_FILES if is_there(folder / name)]:
        raise InputError(f"{folder} holds {MODEL_FILE}, of InternLM2, and {' and '.join(other)}, of Qwen2; keep the "
                         "files of one model")
    model = sentencepiece.read_model(folder / MODEL_FILE)
    _bounded(f"pieces in {MODEL_FILE}", len(model.pieces), MAX_TOKENS, folder)
    return model


def _left_over(model: sentencepiece.Model, added: dict[str, int], folder: Path) -> dict[str, int]:
    """List the pieces, text -> id, whose ids no added token takes. Only those that no text is made of may be taken."""
    count = len(model.pieces)
    names = {i: token for token, i in added.items()}
    beyond = sorted(i for i in names if i >= count)
    if beyond != [*range(count, count + len(beyond))]:
        raise InputError(f"{MODEL_FILE} in {folder} has {count} pieces, and the added tokens go on with id "
                         f"{next(i for i, due in zip(beyond, range(count, 2 ** 31)) if i != due)}; "
                         "they are of different models, keep the files of one")
    for token in REQUIRED:
        if token in added and (added[token] < count) != (token in OF_PIECES):
            raise InputError(f"{MODEL_FILE} in {folder} has {count} pieces and {token} has id {added[token]}, in the "
                             f"released ones it {'is one of' if token in OF_PIECES else 'comes after'} the pieces; "
                             "they are of different models, keep the files of one")
    for i, (text, _, kind) in enumerate(model.pieces):
        ordinary = kind in (sentencepiece.NORMAL, sentencepiece.BYTE) and not text.startswith("[UNUSED_TOKEN_")
        if ordinary and i in names:
            raise InputError(f"id {i} is {_named(text)} in {MODEL_FILE} and the added token {_named(names[i])} "
                             f"({folder}); the files are of different models, keep those of one")
    return {piece.text: i for i, piece in enumerate(model.pieces) if i not in names}


def _bounded(what: str, count: int, most: int, folder: Path):
    if count > most:
        raise InputError(f"the tokenizer in {folder} has {count} {what}, at most {most} are taken; no known model has "
                         "so many, take the tokenizer files of the original model")


def _named(token: str) -> str:
    """Name a token in a message: a long one by its begin."""
    return repr(token) if len(token) <= 60 else f"{token[:60]!r}..."


def _are_tokens(listed: object) -> bool:
    """Whether it is a list of objects with a content, and nothing but true or false in their flags."""
    return isinstance(listed, list) and all(
        isinstance(token, dict) and isinstance(token.get("content"), str)
        and all(isinstance(token.get(flag, False), bool) for flag in FLAGS) for token in listed)


def _agreed(tables: dict[str, dict[str, int]], folder: Path) -> dict[str, int]:
    """Put tables token -> id together; a token must have the same id in all of them."""
    together, source = {}, {}
    for name, table in tables.items():
        for token, i in table.items():
            if together.setdefault(token, i) != i:
                raise InputError(f"{_named(token)} has id {together[token]} in {source[token]} and {i} in {name} "
                                 f"({folder}); the files are of different models, keep those of one")
            source.setdefault(token, name)
    return together


def _same_vocabulary(found: dict[str, dict[str, int]], added: dict[str, int], folder: Path) -> dict[str, int]:
    """Return the vocabulary of any of the files; but for added tokens, all must have the same."""
    vocabularies = list(found.values())
    for one, other in zip(vocabularies, vocabularies[1:]):
        if differing := {t for t, _ in one.items() ^ other.items()} - added.keys():
            token = min(differing)
            raise InputError(f"{' and '.join(found)} in {folder} differ in {len(differing)} tokens of their "
                             f"vocabularies ({_named(token)} is {one.get(token)} and {other.get(token)}); keep the "
                             "files of one model")
    return {token: i for table in vocabularies for token, i in table.items()}


def _texts(named: object) -> list[str]:
    """List the texts of the tokens that a key of tokenizer_config.json names: one, a list, or a dict of them."""
    if isinstance(named, dict) and "content" not in named:
        named = list(named.values())
    items = named if isinstance(named, list) else [named]
    texts = [item.get("content") if isinstance(item, dict) else item for item in items]
    return [text for text in texts if isinstance(text, str)]


def _flags(token: str, said: dict | None, named: bool) -> dict[str, bool]:
    """Collect the flags of an added token: what a file said, else the released list."""
    flags = {flag: (said or {}).get(flag, False) for flag in FLAGS}
    return {**flags, "special": named or (flags["special"] if said else token in SPECIAL)}


def _merges(listing: Listing, folder: Path) -> list[tuple[str, str]]:
    """Read the merges, from merges.txt, tokenizer.json or both; each must join two tokens to a third."""
    found = {}
    if is_there(folder / "merges.txt"):
        text = read_text(folder / "merges.txt")
        _bounded("lines in merges.txt", text.count("\n"), MAX_TOKENS, folder)
        lines = [line.strip() for line in text.split("\n")]      # as Qwen2Tokenizer does
        found["merges.txt"] = [tuple(line.split()) for line in lines[lines[0].startswith("#version:"):] if line]
    if "tokenizer.json" in listing.files:
        listed = listing.files["tokenizer.json"]["model"].get("merges")
        good = isinstance(listed, list) and all(
            isinstance(m, str) or isinstance(m, list) and all(isinstance(part, str) for part in m) for m in listed)
        if not good:
            raise InputError(f"tokenizer.json in {folder} is JSON but not a BPE tokenizer; download it again")
        _bounded("merges in tokenizer.json", len(listed), MAX_TOKENS, folder)
        found["tokenizer.json"] = [tuple(m.split(" ") if isinstance(m, str) else m) for m in listed]
    words = listing.vocabulary
    for name, merges in found.items():      # the library panics at some that do not fit
        bad = [m for m in merges if len(m) != 2 or m[0] not in words or m[1] not in words or m[0] + m[1] not in words]
        if bad:
            raise InputError(f"{name} in {folder} does not fit the vocabulary: {len(bad)} of {len(merges)} merges "
                             f"(the first is {' '.join(bad[0])[:40]!r}) do not join two tokens to a third; download "
                             "both again")
    if len(found) == 2 and found["merges.txt"] != found["tokenizer.json"]:
        raise InputError(f"merges.txt ({len(found['merges.txt'])}) and tokenizer.json ({len(found['tokenizer.json'])}) "
                         f"in {folder} hold different merges; keep the files of one model")
    return next(iter(found.values()), [])


# ---- InternLM2's recipe: from files ---------------------------------------------------------------------------------

def _internlm2(listing: Listing, folder: Path) -> tuple[tokenizers.Tokenizer, internlm2_tokenizer.InternLM2]:
    """Build the tokenizer of a folder by InternLM2's recipe. A tokenizer.json there adds nothing."""
    config = listing.files.get("tokenizer_config.json", {})
    for option, good in (("add_bos_token", config.get("add_bos_token", True) is True),
                         ("add_eos_token", not config.get("add_eos_token")),
                         ("bos_token", _texts(config.get("bos_token", "<s>")) == ["<s>"]),
                         ("sp_model_kwargs", not config.get("sp_model_kwargs"))):
        _refuse(option, config.get(option), good, folder, "tokenizer_config.json", "InternLM2")
    for token, flags in listing.flags.items():
        for flag in ("lstrip", "rstrip", "single_word"):
            _refuse(f"{flag} of {_named(token)}", True, not flags[flag], folder, "the added tokens", "InternLM2")
    special = {i for token, i in listing.added.items() if listing.flags[token]["special"]}
    own = [text for text, _, kind in listing.pieces.pieces if kind == sentencepiece.USER_DEFINED]
    _bounded(f"pieces in {MODEL_FILE} that are never merged", len(own), MAX_ADDED, folder)
    _bounded("characters in them", sum(map(len, own)), MAX_ADDED_CHARS, folder)
    try:
        with library_errors(f"is refused by the tokenizers library with the added tokens of {folder}; download them "
                            "again"):
            backend, recipe = internlm2_tokenizer.build(listing.pieces, listing.added, special)
    except InputError as problem:
        raise InputError(f"{MODEL_FILE} in {folder} {problem}") from None
    _check_added(backend, listing.added, folder)
    return backend, recipe


def _check_added(backend: tokenizers.Tokenizer, added: dict[str, int], folder: Path):
    """Make sure that the library gave the added tokens their ids."""
    for token, i in added.items():
        if backend.token_to_id(token) != i:
            raise InputError(f"added token {_named(token)} in {folder} got id {backend.token_to_id(token)} instead of "
                             f"{i}; download the tokenizer files again")


# ---- Qwen2's recipe: from files --------------------------------------------------------------------------------------

def _qwen2(listing: Listing, folder: Path) -> tokenizers.Tokenizer:
    """Build the tokenizer of a folder by Qwen2's recipe. Refuses files that were written by another."""
    pair = is_there(folder / "vocab.json") and is_there(folder / "merges.txt")
    if not pair and "tokenizer.json" not in listing.files:
        other = next(filter(None, (renamed(folder / n) for n in ("tokenizer.json", *QWEN2_FILES, MODEL_FILE)
                                   if not is_there(folder / n))), "copy the tokenizer files of the model there")
        raise InputError(f"{folder} has neither vocab.json and merges.txt nor tokenizer.json nor tokenizer.model; "
                         f"{other}")
    if not listing.added:
        raise InputError(f"{folder} lists no added tokens; copy added_tokens.json, tokenizer_config.json or "
                         "tokenizer.json of the model there")
    _refuse_other_recipes(listing.files, folder)
    vocabulary, added = listing.vocabulary, listing.added
    if lacking := [c for c in pre_tokenizers.ByteLevel.alphabet() if c not in vocabulary]:
        raise InputError(f"the vocabulary in {folder} has tokens for {256 - len(lacking)} of the 256 bytes, text with "
                         "the others would vanish; is it that of a Qwen2 model?")
    merges = _merges(listing, folder)
    own = [i for token, i in vocabulary.items() if token not in added]
    if [*sorted(own), *added.values()] != list(range(len(own) + len(added))):
        # The library numbers added tokens on from the vocabulary; those with ids of their own have to be in it.
        vocabulary = {**vocabulary, **added}
    with library_errors(f"the tokenizers library refuses the vocabulary and merges in {folder}; download them again"):
        backend = _built(vocabulary, merges, [AddedToken(token, **listing.flags[token]) for token in added])
    _check_added(backend, added, folder)
    return backend


def _built(vocabulary: dict[str, int], merges: list[tuple[str, str]], added: list[AddedToken]) -> tokenizers.Tokenizer:
    """Put the parts together."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_tokens(added)
    return backend


def _refuse_other_recipes(files: dict[str, dict], folder: Path):
    """Refuse a tokenizer.json or tokenizer_config.json that would give other ids, or another text, than the recipe.

    Options that cannot change anything are not looked at: with a token for every byte nothing is ever unknown, and
    truncation and padding are about whole batches, not about how a text is encoded.
    """
    if "tokenizer.json" in files:
        data = files["tokenizer.json"]
        model = data["model"]
        _refuse("model.type", model.get("type", "BPE"), model.get("type", "BPE") == "BPE", folder)
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
            _refuse(f"model.{option}", model.get(option), not model.get(option), folder)
        for part, inside in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"),
                             ("post_processor", "processors"), ("decoder", "decoders")):
            value = data.get(part)
            steps = value.get(inside) if isinstance(value, dict) and value.get("type") == "Sequence" else [value]
            steps = [step for step in steps if step is not None] if isinstance(steps, list) else [steps]
            good = all(isinstance(step, dict) for step in steps) and _as_in_the_recipe(part, steps)
            _refuse(part, value, good, folder)
    config = files.get("tokenizer_config.json", {})
    for option, token in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token"), ("add_prefix_space", None)):
        acts = config.get(option) and (token is None or config.get(token))
        _refuse(option, config.get(option), not acts, folder, "tokenizer_config.json")


def _as_in_the_recipe(part: str, steps: list[dict]) -> bool:
    """Whether the steps of a part of tokenizer.json mean what the recipe does."""
    kinds = [step.get("type") for step in steps]
    if part == "normalizer":        # transformers' Qwen2 tokenizer has NFC even where the file has null
        return kinds in ([], ["NFC"])
    if part == "pre_tokenizer":
        split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
        return (kinds == ["Split", "ByteLevel"] and steps[0] == split
                and steps[1].get("add_prefix_space") is False and steps[1].get("use_regex") is False)
    if part == "decoder":
        return kinds == ["ByteLevel"]
    # A template that only repeats the text adds no id.
    bare = [step for step in steps if step.get("type") == "TemplateProcessing" and _adds_nothing(step.get("single"))]
    return all(step.get("type") == "ByteLevel" or step in bare for step in steps)


def _adds_nothing(single: object) -> bool:
    return isinstance(single, list) and len(single) == 1 and isinstance(single[0], dict) and "Sequence" in single[0]


def _refuse(name: str, value: object, good: bool, folder: Path, file: str = "tokenizer.json", family: str = "Qwen2"):
    if not good:
        raise InputError(f"{name} of {file} in {folder} is {reprlib.repr(value)[:80]}, which is not the recipe of "
                         f"{family} that minivl follows; take the tokenizer files of the original model")
