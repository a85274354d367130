"""Turn text into ids and back: byte-level BPE, the Qwen2 recipe, through the `tokenizers` library.

Text -> NFC -> split by a pattern (one digit at a time) -> bytes as printable characters -> merges -> ids.
Added tokens (<|im_start|>, <img>, ...) are cut out of the text first and get one id each.
Source: Qwen2Converter and tokenization_qwen2.py of transformers 4.37.2/4.52.4; special flags: InternVL
internvl/train/constants.py @2410d1d.
"""
from __future__ import annotations

import codecs
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from minivl.config import read_json, read_text
from minivl.limits import InputError

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# Added tokens that stay visible in decoded text; all others are "special" and dropped by skip_special_tokens.
NOT_SPECIAL = {"<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
               "<|repo_name|>", "<|file_sep|>"}
REQUIRED = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")


class Tokenizer:
    """Turn text into ids and ids into text. `Tokenizer.load(folder)` reads the files of a checkpoint."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        self._containing = {}       # text -> ids of the tokens that contain it
        self.added = {token.content: id for id, token in sorted(backend.get_added_tokens_decoder().items())}
        self.special_ids = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        missing = [token for token in REQUIRED if token not in self.added]
        if missing:
            raise InputError(f"the tokenizer has no {', '.join(missing)}; "
                             "is added_tokens.json that of an InternVL model?")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder: vocab.json, merges.txt and added_tokens.json, or tokenizer.json.

        Where both are there the first three win: their recipe is verified. Raises InputError.
        """
        folder = Path(folder)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return cls(_qwen2(folder))
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{folder} has neither vocab.json and merges.txt nor tokenizer.json; copy the tokenizer "
                             "files of the model there")
        read_json(path)     # says what is wrong in our words; the library's error is a Rust one
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except (InputError, KeyboardInterrupt):
            raise
        except BaseException:   # the library raises plain Exception, and Rust's panics are no Exception at all
            raise InputError(f"{path} is JSON but not a tokenizer; download it again") from None

    @cached_property
    def vocab_size(self) -> int:
        """Count the ids: one more than the largest."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    def id(self, token: str) -> int:
        """Look up the id of one added token or vocabulary entry, e.g. `<|im_end|>`."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise InputError(f"the tokenizer has no token {token!r}")
        return found

    def encode(self, text: str, *, plain: bool = False) -> list[int]:
        """Encode a text as ids. `plain`: what spells an added token (`<|im_end|>`) is encoded as its characters."""
        if not isinstance(text, str):
            raise InputError(f"a text to encode cannot be a {type(text).__name__}; give a str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the text holds half a surrogate pair at character {error.start}, which no UTF-8 can "
                             "hold; remove it") from None
        if not plain:
            return self.backend.encode(text).ids
        pieces = self.backend.pre_tokenizer.pre_tokenize_str(self.backend.normalizer.normalize_str(text))
        return [token.id for piece, _ in pieces for token in self.backend.model.tokenize(piece)]

    def decode(self, ids: Iterable[int] | torch.Tensor, *, skip_special_tokens: bool = True) -> str:
        """Decode ids (a tensor: int64[T]) into a text. Broken UTF-8 becomes U+FFFD, as everywhere."""
        ids = list(ids.tolist() if hasattr(ids, "tolist") else ids)
        unknown = [i for i in ids
                   if not isinstance(i, int) or not 0 <= i < 2 ** 31 or self.backend.id_to_token(i) is None]
        if unknown:
            raise InputError(f"id {str(unknown[0])[:30]} is not in the vocabulary (0..{self.vocab_size - 1})")
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, id: int) -> bytes:
        """Look up the bytes one token stands for; a character may be spread over several tokens."""
        token = self.backend.id_to_token(id)
        if token is None:
            raise InputError(f"id {id} is not in the vocabulary (0..{self.vocab_size - 1})")
        if token in self.added or not all(c in self._byte_of for c in token):
            return token.encode("utf-8")
        return bytes(self._byte_of[c] for c in token)

    def containing(self, text: str) -> list[int]:
        """Find the ids of all tokens that contain a text, for bad_words.

        It looks at every token, so what it found for a text is kept.
        """
        if text not in self._containing:
            wanted = text.encode()
            self._containing[text] = [i for i in range(self.vocab_size) if wanted in self.token_bytes(i)]
        return self._containing[text]

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """Build GPT-2's table: printable bytes stand for themselves, the other 68 for the characters from U+0100 on."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in printable]
        return {**{chr(b): b for b in printable}, **{chr(0x100 + i): b for i, b in enumerate(others)}}


class TextStream:
    """Turn tokens into text while they arrive: `push` returns the characters that are complete, `finish` the rest."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self.tokenizer = tokenizer
        self.skip = tokenizer.special_ids if skip_special_tokens else ()
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Take one token and return the characters it completes, often none or several."""
        return "" if id in self.skip else self.decoder.decode(self.tokenizer.token_bytes(id))

    @property
    def incomplete(self) -> bool:
        """Tell whether the last tokens end inside a character."""
        return bool(self.decoder.getstate()[0])

    def finish(self) -> str:
        """Return U+FFFD for a character that never became whole, else nothing."""
        return self.decoder.decode(b"", final=True)


def _qwen2(folder: Path) -> tokenizers.Tokenizer:
    """Build the tokenizer of vocab.json, merges.txt and added_tokens.json."""
    vocabulary = read_json(folder / "vocab.json")
    added = read_json(folder / "added_tokens.json")
    for name, table in (("vocab.json", vocabulary), ("added_tokens.json", added)):
        if not all(isinstance(i, int) and i >= 0 for i in table.values()):
            raise InputError(f"{name} in {folder} must map tokens to ids; download it again")
        if any("\ud800" <= c <= "\udfff" for token in table for c in token):
            raise InputError(f"{name} in {folder} holds half a surrogate pair, which is no text; download it again")
    ids = [*vocabulary.values(), *added.values()]
    if sorted(ids) != list(range(len(ids))):
        raise InputError(f"vocab.json ({len(vocabulary)} entries) and added_tokens.json ({len(added)}) in {folder} do "
                         f"not number their tokens 0..{len(ids) - 1} once each; the files do not belong together")
    lines = read_text(folder / "merges.txt").split("\n")
    try:
        merges = [tuple(line.split(" ")) for line in lines[lines[0].startswith("#version"):] if line]
        model = models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False)
    except Exception:       # not UTF-8, a line without two halves, a merge of unknown tokens
        raise InputError(f"merges.txt in {folder} does not fit vocab.json; download both again") from None
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    for token in sorted(added, key=added.get):      # one by one, in id order: the library numbers them as they come
        backend.add_tokens([AddedToken(token, normalized=False, special=token not in NOT_SPECIAL)])
        if backend.token_to_id(token) != added[token]:
            raise InputError(f"added token {token} got id {backend.token_to_id(token)}, added_tokens.json in {folder} "
                             f"says {added[token]}; is it in vocab.json too?")
    return backend
