"""Choose the next token from the model's scores: penalties, bans, then the best token or a seeded draw.

V vocabulary.
Source: LMDeploy v0.6.4 messages.py:81-125 and the sampling order of its TurboMind engine (src/turbomind/layers/
sampling_layers); top-p arXiv:1904.09751, repetition penalty arXiv:1909.05858.
"""
from __future__ import annotations

import reprlib
import warnings
from dataclasses import dataclass, fields

import torch

from minivl.limits import InputError, Limits
from minivl.lmdeploy import GENERATION, takes_names_of_lmdeploy

SAMPLING = ("top_p", "top_k", "min_p", "temperature", "repetition_penalty", "random_seed")   # fields for do_sample=True


@takes_names_of_lmdeploy(GENERATION)
@dataclass
class GenerationConfig:
    """How to choose tokens and when to stop: LMDeploy's fields and defaults. Sampling values need do_sample=True."""
    n: int = 1                                  # answers per prompt; only 1
    max_new_tokens: int = 512
    do_sample: bool = False
    top_p: float = 1.0                          # smallest set of tokens with this total probability, (0, 1]
    top_k: int = 50                             # the k most probable tokens; 0: all
    min_p: float = 0.0                          # at least min_p times the most probable token's probability, [0, 1]
    temperature: float = 0.8                    # logits are divided by it, [0, 2]; 0: the most probable token
    repetition_penalty: float = 1.0             # of every token already in prompt or answer; above 1 discourages
    ignore_eos: bool = False                    # do not stop at the model's stop tokens
    random_seed: int | None = None
    stop_words: list[str] | None = None         # the text ends before the first of them
    bad_words: list[str] | None = None          # no token that contains one is ever chosen
    stop_token_ids: list[int] | None = None     # in addition to the model's own
    bad_token_ids: list[int] | None = None
    min_new_tokens: int | None = None           # no stop token before
    skip_special_tokens: bool = True            # in the text
    lookup: int = 0                             # tokens guessed ahead (prompt-lookup decoding); the answer is the same
    logprobs: int | None = None                 # of that many best tokens and the chosen one, of the unmodified scores
    response_format: dict | None = None         # not supported

    def __post_init__(self):
        self.check()
        ignored = [f.name for f in fields(self) if f.name in SAMPLING and getattr(self, f.name) != f.default]
        if ignored and not self.do_sample:      # LMDeploy ignores them without a word
            warnings.warn(f"do_sample is False, so decoding is greedy and {', '.join(ignored)} "
                          f"{'have' if ignored[1:] else 'has'} no effect; set do_sample=True to sample", stacklevel=4)

    def check(self):
        """Refuse values that mean nothing. Fields may be set later: whoever uses a configuration checks it again."""
        def require(good, name, rule):
            if not good:
                value = getattr(self, name)
                size = f" ({len(value)} in all)" if isinstance(value, (list, tuple)) and len(value) > 6 else ""
                raise InputError(f"GenerationConfig.{name} is {reprlib.repr(value)}{size}; it must be {rule}")

        for name in ("n", "max_new_tokens", "top_k", "min_new_tokens", "logprobs", "random_seed", "lookup"):
            value = getattr(self, name)
            optional = value is None and name in ("min_new_tokens", "logprobs", "random_seed")
            require(optional or isinstance(value, int) and not isinstance(value, bool), name, "a whole number")
        for name in ("top_p", "min_p", "temperature", "repetition_penalty"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(number and abs(value) < 1e30, name, "a number")
        for name in ("do_sample", "ignore_eos", "skip_special_tokens"):
            require(isinstance(getattr(self, name), bool), name, "True or False")
        require(self.n == 1, "n", "1; ask several times with other seeds instead")
        require(self.max_new_tokens >= 1, "max_new_tokens", "1 or more")
        require(self.random_seed is None or 0 <= self.random_seed < 2 ** 63, "random_seed", "in 0..2^63-1")
        require(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        require(0 <= self.lookup <= 64, "lookup", "in 0..64, the tokens to guess ahead")
        require(self.top_k >= 0, "top_k", "0 (all tokens) or more")
        require(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        require(0 <= self.temperature <= 2, "temperature", "in [0, 2]")
        require(self.repetition_penalty > 0, "repetition_penalty", "positive; 1 changes nothing")
        require(self.logprobs is None or self.logprobs >= 1, "logprobs", "1 or more")
        require(self.response_format is None, "response_format", "None, structured output is not supported")
        for name in ("stop_words", "bad_words"):
            words = getattr(self, name) or []
            require(isinstance(words, (list, tuple)) and len(words) <= Limits.words
                    and all(isinstance(w, str) and 0 < len(w) <= Limits.word_chars for w in words), name,
                    f"a list of at most {Limits.words} non-empty strings of at most {Limits.word_chars} characters")
        for name in ("stop_token_ids", "bad_token_ids"):
            ids = getattr(self, name) or []
            require(isinstance(ids, (list, tuple)) and len(ids) <= Limits.token_ids
                    and all(type(i) is int and i >= 0 for i in ids), name,     # True is an int too
                    f"a list of at most {Limits.token_ids} token ids")


def probabilities(logits: torch.Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                  min_p: float = 0.0) -> torch.Tensor:
    """Turn scores float[V] into probabilities float32[V]: temperature, top-k, top-p, then min-p; the rest sums to 1."""
    # The largest is 0 and float64 divides: no temperature above 0 can make it overflow.
    logits = ((logits.double() - logits.max()) / temperature).float()
    if 0 < top_k < len(logits):     # by index, not by value: exactly k tokens, also where half precision makes ties
        best = logits.topk(top_k).indices
        logits = torch.full_like(logits, float("-inf")).index_copy(0, best, logits[best])
    p = logits.softmax(-1)                                                  # (V)
    if top_p < 1:
        ordered, index = p.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered       # what the more probable ones have; 0 for the first: it stays
        p = p.index_fill(0, index[before > top_p], 0.0)
    if min_p > 0:
        p = p.where(p >= min_p * p.max(), 0.0)
    return p / p.sum()


def penalise(logits: torch.Tensor, ids: list[int], penalty: float) -> torch.Tensor:
    """Penalise repetition in float[V]: divide the scores of the tokens `ids` by `penalty`, or multiply if negative."""
    ids = torch.tensor(sorted(set(ids)), dtype=torch.long, device=logits.device)
    seen = logits[ids]
    penalised = torch.where(seen > 0, seen / penalty, seen * penalty)
    return logits.index_copy(0, ids, penalised.clamp(max=torch.finfo(logits.dtype).max))    # a tiny penalty overflows


def drawn(p: torch.Tensor, u: float) -> torch.Tensor:
    """Draw from probabilities float32[V] by u in [0, 1): the first token where their running sum exceeds u -> int64[].

    Summed in whole 2^-40, so that the sums are the same in any order: a GPU adds in another than a CPU.
    """
    below = (p.double() * 2 ** 40).round().long().cumsum(0)                 # (V)
    return torch.searchsorted(below, (u * below[-1].double()).long(), right=True)


class Sampler:
    """Choose the next token of one prompt: penalties, bans, then the best or a seeded draw. Remembers what it chose."""

    def __init__(self, config: GenerationConfig, prompt_ids, stop_ids=(), banned_ids=()):
        self.config = config
        self.stop_ids = sorted(stop_ids)
        self.banned_ids = sorted(banned_ids)
        self.seen = list(prompt_ids)            # the answer's tokens follow
        self.count = 0                          # of the answer
        self.generator = torch.Generator()      # on the CPU for every device: the same seed draws the same tokens
        if config.random_seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(config.random_seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """Choose a token id from the scores float32[V]."""
        c = self.config
        banned = self.banned_ids + (self.stop_ids if self.count < (c.min_new_tokens or 0) else [])
        if c.do_sample and c.repetition_penalty != 1:
            logits = penalise(logits, self.seen, c.repetition_penalty)
        if banned:
            logits = logits.index_fill(0, torch.tensor(banned, device=logits.device), float("-inf"))
            if logits.max() == float("-inf"):
                raise InputError("every token is banned, none is left to choose; shorten bad_words, bad_token_ids or "
                                 "min_new_tokens")
        if c.do_sample and c.temperature > 0:
            # On the GPU if they are there, but for MPS, which has no float64. The random number is the CPU's: the same
            # seed, the same token.
            scores = logits.cpu() if logits.device.type == "mps" else logits
            p = probabilities(scores, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p, min_p=c.min_p)
            token = int(drawn(p, torch.rand((), dtype=torch.float64, generator=self.generator).item()))
        else:
            token = int(logits.argmax())
        self.seen.append(token)
        self.count += 1
        return token
