"""Continue a prompt: read it whole (prefill), then write one token after the other; one prompt or a batch.

B prompts, T tokens of the longest prompt, D language width, V vocabulary.
A batch is padded on the left, so that the last token of every row is a real one; nobody looks at padding and positions
start at the first real token: each prompt gets what it gets alone.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from minivl.cache import KVCache
from minivl.fast.threads import at_most, pace
from minivl.forks import check_process
from minivl.limits import InputError
from minivl.memory import full_memory_told
from minivl.model import MiniVL
from minivl.sampling import GenerationConfig, Sampler


def prompt_lookup(ids: list[int], most: int) -> list[int]:
    """Guess the next tokens, for prompt-lookup decoding: copy what followed when the last three (or two) stood before.

    Returns up to `most` tokens, perhaps none. An answer that copies from its prompt, as in reading a document aloud, is
    mostly guessed right.
    """
    for n in (3, 2):
        end = ids[-n:]
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start] == end[0] and ids[start:start + n] == end:
                copy = ids[start + n:start + n + most]
                while len(copy) < most:     # a repetition goes on
                    copy.append(copy[-(len(ids) - start - n)])
                return copy
    return []


@torch.inference_mode()
def steps(model: MiniVL, inputs_embeds: torch.Tensor, samplers: list, *, cache: KVCache | None = None,
          padding: torch.Tensor | None = None, lookup: int = 0,
          unused: Sequence[int] = ()) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Read float[B, T, D], then write forever: yields (tokens: B ids, logits float32[B, V] they were chosen from).

    `samplers`: one for each prompt, called with float32[V]. The caller stops. At each yield the cache holds everything
    but the tokens just yielded. `lookup`: with one prompt, so many guessed tokens are read along with each chosen one,
    and those are kept that would have been chosen anyway (see `prompt_lookup`). `unused`: ids that no token has; their
    scores become -inf, so that they are never chosen.
    """
    language = model.language_model
    cache = cache or KVCache()
    count = 0
    x = inputs_embeds
    unused = torch.tensor(unused, dtype=torch.long, device=x.device)
    guessed = []
    prompt, later = pace(model, "prompt"), pace(model, "tokens")
    while True:
        check_process()
        # Of the prompt only the last token's scores are needed.
        with full_memory_told(x.device, f"{len(x)} prompts of {cache.length + x.shape[1]} tokens",
                              "ask for fewer at once, with fewer tiles (max_num) or a shorter text"), \
                later.step(x.shape) if count else prompt.each(language.layers):
            scores = language.scores(x, cache, padding, 1 + len(guessed))   # (B, 1 + guessed, V)
        end = cache.length - len(guessed)
        for i in range(1 + len(guessed)):
            cache.length = end + i
            logits = scores[:, i]                                           # (B, V)
            with at_most(later.now):
                tokens, logits = choose(logits, samplers, unused, count + 1, model.dtype)
            yield tokens, logits
            if cache.length != end + i:
                raise InputError(f"the cache held {end + i} tokens at the last step and holds {cache.length} now; one "
                                 "cache serves one iteration at a time, give each its own KVCache()")
            count += 1
            if guessed[i:i + 1] != tokens:
                break
        guessed = prompt_lookup(samplers[0].seen, lookup) if lookup and len(samplers) == 1 else []
        ids = torch.tensor([[token, *guessed] for token in tokens], device=scores.device)
        x = language.embeddings(ids)                                        # (B, 1 + guessed, D)


def choose(logits: torch.Tensor, samplers: list, unused: torch.Tensor, number: int,
           dtype: torch.dtype) -> tuple[list[int], torch.Tensor]:
    """Choose the next token of each prompt from float32[B, V] -> (tokens: B ids, the logits without `unused` ids).

    unused int64[u]: ids that no token has, perhaps none. number, dtype: which new token it is, and what the model
    computes in; for the message.
    """
    if not bool(torch.isfinite(logits).all()):
        raise InputError(f"the model computed NaN or infinite scores for new token {number} in {dtype}; load it with "
                         "dtype='bfloat16' or 'float32', or check the weights with `python -m weights_tools.inspect`")
    if len(unused):
        logits = logits.index_fill(1, unused, float("-inf"))
    return [sample(row) for sample, row in zip(samplers, logits)], logits


def left_pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pad tensors [1, t, ...] of different lengths t with 0 on the left: [B, T, ...], and int[B], the padding of each.

    The padding is None where all are of one length: the plain causal path, without a mask.
    """
    T = max(row.shape[1] for row in rows)
    padding = torch.tensor([T - row.shape[1] for row in rows], device=rows[0].device)
    with full_memory_told(padding.device, f"{len(rows)} prompts of {T} tokens", "ask for fewer or shorter ones"):
        padded = [torch.cat([row.new_zeros(1, T - row.shape[1], *row.shape[2:]), row], dim=1) for row in rows]
        return torch.cat(padded), padding if bool(padding.any()) else None


@torch.inference_mode()
def visual_tokens(model: MiniVL, parts: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Look at tiles, some at a time, with as many threads as are faster now: each float[n, 3, R, R] -> [n, L, D]."""
    with pace(model, "tiles").each(model.vision_model.encoder.layers):
        return [model.visual_tokens(pixel_values) for pixel_values in parts]


@torch.inference_mode()
def generate(model: MiniVL, input_ids: torch.Tensor | list[list[int]], pixel_values: torch.Tensor | None = None, *,
             max_new_tokens: int, ignore_eos: bool = False,
             config: GenerationConfig | None = None) -> torch.Tensor | list[list[int]]:
    """Continue token ids: int[T] -> int[n]; int[B, T] -> int[B, n]; a list of id lists -> a list of them.

    Ends after the model's stop token (included) or max_new_tokens; a finished row of a tensor repeats its stop token.
    pixel_values: normalised float[N, 3, R, R], tiles of all prompts in order. `config`: how to choose, default greedy;
    its max_new_tokens does not count here, and what needs text (stop_words, bad_words, logprobs) is for a pipeline.
    """
    config = GenerationConfig() if config is None else config
    rows = checked_rows(input_ids)
    check_request(model, rows, max_new_tokens, config)
    ids, padding = left_pad([torch.tensor([row]) for row in rows])          # (B, T)
    visual = None if pixel_values is None else visual_tokens(model, [pixel_values])[0]
    x = model.embed(ids, visual)                                            # (B, T, D)
    padding = None if padding is None else padding.to(x.device)
    stop = {*(() if ignore_eos or config.ignore_eos else model.eos_token_ids), *(config.stop_token_ids or ())}
    samplers = [Sampler(config, row, stop, config.bad_token_ids or []) for row in rows]
    answers = [[] for _ in rows]
    running = steps(model, x, samplers, padding=padding, lookup=config.lookup, unused=model.unused_ids)
    for count, (tokens, _) in enumerate(running, start=1):
        for answer, token in zip(answers, tokens):
            if not (answer and answer[-1] in stop):
                answer.append(token)
        if count == max_new_tokens or all(answer[-1] in stop for answer in answers):
            break
    if not isinstance(input_ids, torch.Tensor):
        return answers
    n = max(map(len, answers))
    result = torch.tensor([answer + answer[-1:] * (n - len(answer)) for answer in answers])
    return result if input_ids.ndim == 2 else result[0]


def checked_rows(input_ids) -> list[list[int]]:
    """Bring int[T], int[B, T] or a list of id lists into one form: the ids of each prompt. Anything else is refused."""
    if isinstance(input_ids, torch.Tensor):
        if input_ids.ndim not in (1, 2) or input_ids.dtype not in (torch.int64, torch.int32):
            raise InputError(f"input_ids have shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}; give int64 "
                             "or int32 [T] or [B, T]")
        rows = (input_ids if input_ids.ndim == 2 else input_ids[None]).tolist()
    else:
        if not isinstance(input_ids, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in input_ids):
            raise InputError(f"input_ids are a {type(input_ids).__name__}; give int[T], int[B, T] or a list of id "
                             "lists")
        if not all(type(i) is int and abs(i) < 2 ** 31 for row in input_ids for i in row):
            raise InputError("input_ids hold something that is no token id; give lists of whole numbers")
        rows = list(input_ids)
    if not rows or not all(len(row) for row in rows):
        raise InputError("input_ids are empty; there must be at least one prompt, and one token in each")
    return rows


def check_request(model: MiniVL, rows: list[list[int]], max_new_tokens: int, config: GenerationConfig):
    """Refuse what `generate` cannot do: what needs text, ids beyond the vocabulary, more tokens than positions."""
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number, 1 or more")
    if not isinstance(config, GenerationConfig):
        raise InputError(f"config is a {type(config).__name__}; it must be a GenerationConfig")
    unused = [name for name in ("stop_words", "bad_words", "logprobs") if getattr(config, name)]
    if unused:
        raise InputError(f"generate() has no text and cannot use {', '.join(unused)}; use a pipeline")
    check_ids(config, model)
    room = model.config.llm_config.max_position_embeddings
    longest = max(map(len, rows))
    if longest + max_new_tokens > room:
        raise InputError(f"{longest} prompt tokens + {max_new_tokens} new ones exceed the model's {room} positions; "
                         "shorten the prompt or ask for fewer")


def check_ids(config: GenerationConfig, model: MiniVL):
    """Refuse a config with values that mean nothing, or token ids that are not in the vocabulary."""
    config.check()
    vocabulary = model.config.llm_config.vocab_size
    beyond = [i for i in [*(config.stop_token_ids or ()), *(config.bad_token_ids or ())] if i >= vocabulary]
    if beyond:
        raise InputError(f"stop_token_ids and bad_token_ids hold {beyond[0]}, the vocabulary has ids "
                         f"0..{vocabulary - 1}")
