"""InternLM2's recipe: BPE over the characters of a text, and bytes for characters that have no piece.

    text -> cut at added tokens (<|im_start|>, <img>, ...) -> spaces become U+2581 (and one more in front, where the
    model has a dummy prefix) -> cut at the pieces that are never merged -> merges -> ids

Decoding follows the original's slow class, which tidies the text: "boat ." becomes "boat.".
Source: tokenization_internlm2.py and tokenization_internlm2_fast.py of InternVL @2410d1d; clean_up_tokenization and
_decode of transformers 4.46.3; SentencePieceExtractor there for the order of merges; SentencePiece 0.2.0 for the rest.
"""
from __future__ import annotations

import codecs
from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, models

from minivl.limits import InputError
from minivl.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNUSED, USER_DEFINED, Model

FORCED = {"<unk>": 0, "<s>": 1, "</s>": 2}      # whatever the model calls its first three pieces
# What the original replaces in every decoded text, in this order. Only spaces go.
TIDIED = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
          (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))
MIDDLE = " 'nvr"            # the characters of these but for their last ones
MAX_MERGES = 2 ** 20        # some 200,000 in the released model

# Each broken byte is one U+FFFD, as in SentencePiece; Python's "replace" makes one of several.
codecs.register_error("each byte", lambda error: ("\ufffd", error.start + 1))


class InternLM2:
    """What InternLM2's tokenizer does in its own way. `added`: token -> id; `special`: ids of those left out."""

    begin = [FORCED["<s>"]]         # ids that every prompt begins with

    def __init__(self, backend: tokenizers.Tokenizer, model: Model, added: dict[str, int], special: set[int]):
        self.bpe = backend.model
        self.pieces = model.pieces
        self.dummy_prefix = model.dummy_prefix
        self.added = added
        self.added_ids = set(added.values())
        # The other added tokens stand apart in a decoded text, with a space on both sides.
        self.inside = {i for i in special if i < len(model.pieces)}
        self.apart = self.added_ids - self.inside
        self.whole = {piece.text: i for i, piece in enumerate(model.pieces) if piece.type == USER_DEFINED}
        self.at_added = _cutter(added)
        self.at_whole = _cutter(self.whole)
        self.at_harmless = _cutter(text for text, i in self.whole.items() if i not in self.added_ids)

    def ids_of(self, text: str, plain: bool) -> list[int]:
        """Encode a text. `plain`: nothing in it becomes the id of an added token."""
        ids = []
        for part in [text] if plain else _cut(text, self.at_added):
            if not plain and part in self.added:
                ids.append(self.added[part])
            elif part:
                spelled = SPACE * self.dummy_prefix + part.replace(" ", SPACE)
                for piece in _cut(spelled, self.at_harmless if plain else self.at_whole):
                    if piece in self.whole and not (plain and self.whole[piece] in self.added_ids):
                        ids.append(self.whole[piece])
                    else:
                        ids += [token.id for token in self.bpe.tokenize(piece)]
        return ids

    def bytes_of(self, id: int, token: str) -> bytes:
        """Say which bytes a token stands for."""
        if id in self.added_ids:
            return token.encode("utf-8")
        text, _, kind = self.pieces[id]
        if kind == BYTE:
            return bytes([int(text[3:5], 16)])
        return b"" if kind == CONTROL else text.replace(SPACE, " ").encode("utf-8")

    def writer(self, skip_special_tokens: bool) -> Writer:
        """Make what turns tokens into text."""
        return Writer(self, skip_special_tokens)


class Writer:
    """Write the text of tokens, whole characters only, and only what no later token can change.

    The original puts a space before the text between two special tokens, or before a first one, and none if no special
    token follows. So where they are shown, such a text is given out when it ends.
    """

    def __init__(self, recipe: InternLM2, skip_special_tokens: bool):
        self.recipe = recipe
        self.at_once = skip_special_tokens
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="each byte")
        self.apart = False      # whether a token that stands apart, or a text, was given out before this text
        self._begin()

    def _begin(self):
        """Begin a text: what stands between two tokens that stand apart."""
        self.first = True       # no token yet since the begin, or since a special token shown
        self.after_special = False
        self.run = []           # texts of tokens whose end is waited for
        self.untidied = []      # the end of the text from a space on, if what follows may take one of its spaces
        self.given = False      # whether some of this text was given out
        self.empty = True       # whether it has no token

    def push(self, id: int, data: bytes) -> str:
        """Take a token and its bytes; return the text that is certain now."""
        if id in self.recipe.apart:
            text = self._end() + " " * self.apart + data.decode("utf-8")
            self.apart = True
            return text
        self.empty = False
        if id in self.recipe.inside:
            text = " " * (not self.after_special) + self._rest() + data.decode("utf-8")
            self.first = self.after_special = True
            return self._certain(text)
        if self.first and self.recipe.dummy_prefix and self.recipe.pieces[id].type != BYTE:
            data = data.removeprefix(b" ")
        self.first = self.after_special = False
        text = self.decoder.decode(data)
        if self.at_once:
            return self._certain(text)
        self.run.append(text)
        return ""

    @property
    def incomplete(self) -> bool:
        """Tell whether a part of the last tokens' text is not given out yet."""
        return bool(self.decoder.getstate()[0] or self.run or self.untidied)

    def finish(self) -> str:
        """Return what is left."""
        lone = self.apart and not self.empty and not self.given
        return self._end() or " " * lone

    def _rest(self) -> str:
        """End a run of tokens: its text as far as it was waited for."""
        text = "".join(self.run) + self.decoder.decode(b"", final=True)
        self.run = []
        return text

    def _certain(self, text: str, last: bool = False) -> str:
        """Add to the text; return it up to a space that may go yet."""
        self.untidied.append(text)
        if len(self.untidied) > 1 and not last and not text.strip(MIDDLE):
            return ""           # as before, and at once: there may be thousands of spaces
        text = "".join(self.untidied)
        end = -1 if last else text.find(" ", len(text.rstrip(MIDDLE)))
        self.untidied = [text[end:]] if end >= 0 else []
        text = text[:end] if end >= 0 else text
        for old, new in TIDIED:
            text = text.replace(old, new)
        if text and not self.given:
            text = " " * self.apart + text
            self.given = self.apart = True
        return text

    def _end(self) -> str:
        text = self._certain(self._rest(), last=True)
        self._begin()
        return text


def _cutter(tokens: Iterable[str]) -> tokenizers.Tokenizer:
    """Make what finds tokens in a text, the longest at each place, in a time that does not depend on their number."""
    cutter = tokenizers.Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    cutter.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return cutter


def _cut(text: str, cutter: tokenizers.Tokenizer) -> list[str]:
    """Cut a text into the tokens that are found and what stands between them."""
    return [text[start:end] for start, end in cutter.encode(text).offsets]


def build(model: Model, added: dict[str, int], special: set[int]) -> tuple[tokenizers.Tokenizer, InternLM2]:
    """Put the vocabulary together, for what is looked up and for merging, and the recipe that works with it."""
    names = {i: token for token, i in added.items()}
    vocabulary = {names.get(i, piece.text): i for i, piece in enumerate(model.pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges(model, set(names)), byte_fallback=True))
    backend.add_tokens([AddedToken(token, normalized=False, special=i in special) for token, i in added.items()])
    return backend, InternLM2(backend, model, added, special)


def merges(model: Model, taken: set[int]) -> list[tuple[str, str]]:
    """List the pairs of pieces whose whole is a piece, the whole with the highest score first.

    The file holds only the pieces. `taken`: ids of added tokens, whose pieces no text may spell.
    """
    ids = {text: i for i, (text, _, kind) in enumerate(model.pieces) if kind in (NORMAL, UNUSED) and i not in taken}
    found = []
    for text, whole in ids.items():
        for cut in range(1, len(text)):
            left = ids.get(text[:cut])
            right = None if left is None else ids.get(text[cut:])
            if right is not None:
                found.append((-model.pieces[whole].score, whole, left, right))
                if model.pieces[whole].type == UNUSED:
                    raise InputError(f"marks piece {whole}, {text[:60]!r}, as unused, though pieces {left} and "
                                     f"{right} make it up; take the tokenizer.model of the original model")
                if len(found) > MAX_MERGES:
                    raise InputError(f"has over {MAX_MERGES} pairs of pieces that make up a third, no known model has "
                                     "so many; take the tokenizer.model of the original model")
    found.sort()
    return [(model.pieces[left].text, model.pieces[right].text) for _, _, left, right in found]
