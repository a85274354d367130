"""Write an answer: tokens in, text out as soon as it is certain, until a stop token, a stop word or the length ends it.

Source of the behaviour: LMDeploy v0.6.4 serve/async_engine.py:545-563, 684-732.
"""
from __future__ import annotations

from dataclasses import dataclass

from minivl.chat.requests import Turn
from minivl.limits import InputError
from minivl.sampling import Sampler
from minivl.tokenizer import TextStream, Tokenizer


@dataclass
class Response:
    """One answer. `finish_reason`: "stop" (the model, a stop word or stop token), "length", or "error".

    "error": one prompt of a batch could not be finished. `text` is what was written until then, `error` says why.
    """
    text: str
    generate_token_len: int
    input_token_len: int                # of this turn, placeholders counted
    session_id: int
    finish_reason: str | None
    token_ids: list[int]                # without the stop token
    logprobs: list[dict] | None = None  # per token {id: log-probability} of the best and of itself, if asked for
    index: int = 0                      # of the prompt in its batch
    error: str | None = None


class Answer:
    """One answer while it is being written. `stop_ids`: of the model; what the request adds is added here."""

    def __init__(self, turn: Turn, tokenizer: Tokenizer, stop_ids: set, session_id: int, index: int = 0):
        self.turn = turn
        self.tokenizer = tokenizer
        self.session_id = session_id
        self.index = index
        self.stop_ids = {*(() if turn.config.ignore_eos else stop_ids), *(turn.config.stop_token_ids or ())}
        self.stop_words = tuple(turn.config.stop_words or ())
        self.stream = TextStream(tokenizer, turn.config.skip_special_tokens)
        self.text = ""
        self.waiting = ""                   # text not yet given out: it may be the start of a stop word
        self.token_ids = []
        self.logprobs = []
        self.finish_reason = None
        self.error = None
        self.sizes = []                     # characters of text after each token, given out or waiting
        self.written = None                 # how many of token_ids the model wrote, where that is not all of them

    def sampler(self, earlier: list[int], placeholder: int | None) -> Sampler:
        """Make what chooses its tokens. `earlier`: the session's tokens; `placeholder`: the id in a picture's place.

        Placeholders do not count as repeated: LMDeploy's dummy id there made it penalise `!`.
        """
        config = self.turn.config
        seen = [i for i in earlier + self.turn.ids if i != placeholder]
        banned = {i for word in config.bad_words or () for i in self.tokenizer.containing(word)}
        return Sampler(config, seen, self.stop_ids, banned | {*(config.bad_token_ids or ())})

    def push(self, token: int, logits) -> str:
        """Take the next token and the scores float32[V] it was chosen from; returns the text that is certain now."""
        stopped = token in self.stop_ids
        last = stopped or len(self.token_ids) + 1 >= self.turn.max_new_tokens
        text = self.waiting + ("" if stopped else self.stream.push(token))
        if not stopped:
            self._keep(token, logits, text)
        if last:        # what the stream waited with may hold a stop word, too
            text += self.stream.finish()
        self.waiting = ""
        cut = min((text.find(word) for word in self.stop_words if word in text), default=None)
        if cut is not None:     # the tokens that spell the stop word are not part of the answer
            end = self._end("stop", text[:cut])
            self._drop_tokens_after(len(self.text))
            return end
        if last:
            return self._end("stop" if stopped else "length", text)
        certain = len(text) - self._possible_stop_word(text)
        self.waiting = text[certain:]
        self.text += text[:certain]
        return text[:certain]

    def _keep(self, token: int, logits, text: str):
        self.token_ids.append(token)
        # no end yet, while the bytes of a character are incomplete: such a token goes with what completes it
        self.sizes.append(float("inf") if self.stream.incomplete else len(self.text) + len(text))
        if self.turn.config.logprobs:
            logits = logits.log_softmax(-1)
            best = logits.topk(min(self.turn.config.logprobs, len(logits)))
            # -inf: an id that no token has
            kept = {i: value for i, value in zip(best.indices.tolist(), best.values.tolist())
                    if value > float("-inf")}
            self.logprobs.append({**kept, token: float(logits[token])})     # a drawn token may not be among the best

    def _possible_stop_word(self, text: str) -> int:
        """Count the characters at the end of a text that a stop word begins with."""
        return max((n for word in self.stop_words for n in range(1, min(len(word), len(text) + 1))
                    if text.endswith(word[:n])), default=0)

    def fail(self, error: InputError):
        """End it because the model cannot go on; what was written stays."""
        self._end("error", self.waiting + self.stream.finish())
        self.error = str(error)

    def _end(self, reason: str, rest: str) -> str:
        self.finish_reason = reason
        self.text += rest
        return rest

    def _drop_tokens_after(self, size: int):
        """Keep the tokens of the first `size` characters; a last token that reaches beyond is spelled anew."""
        while self.sizes and self.sizes[-1] > size:
            self.sizes.pop()
        del self.token_ids[len(self.sizes):]
        del self.logprobs[len(self.sizes):]
        self.written = len(self.token_ids)
        start = self.sizes[-1] if self.sizes else 0
        self.token_ids += self.tokenizer.encode(self.text[start:], plain=True)

    def response(self) -> Response:
        """Make the Response of what is written so far."""
        return Response(self.text, len(self.token_ids), len(self.turn.ids), self.session_id, self.finish_reason,
                        list(self.token_ids), self.logprobs if self.turn.config.logprobs else None, self.index,
                        self.error)
