"""Write several answers to each of many prompts: its pictures are looked at once, and its tokens read once, for all.

    prompt -> keys and values of all its tokens but the last -> copied for B answers -> one token of each at a time

Each answer draws from its own seed: what it says does not depend on what is written beside it.
"""
from __future__ import annotations

import argparse
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from minivl import EngineConfig, GenerationConfig, Picture, Pipeline, pipeline
from minivl.cache import KVCache, copied
from minivl.chat.answers import Answer
from minivl.chat.pipeline import embed
from minivl.chat.requests import Turn
from minivl.files.adapters import FILE
from minivl.files.find import find
from minivl.generation import steps
from minivl.limits import InputError
from weights_tools.mpo.begun import digest_of_checkpoint, digest_of_file

BATCHES = 4     # are made of prompts that are sorted by length


def several(pipe: Pipeline, turn_of: Callable[[int], Turn], prompts: int, *, n: int, seed: int, batch: int,
            first: int = 0, what: str = "sampling") -> Iterator[tuple[int, list[Answer]]]:
    """Write n answers to each prompt, from number `first` on, `batch` at a time: yields (number, answers) in order.

    turn_of(i) reads prompt i. Answer k of prompt i is always the same for one seed, but for the last digits of the
    scores, which another batch may round otherwise. To have these too, let `first` be a multiple of `together`.
    """
    size = together(n, batch)
    with tqdm(total=prompts * n, initial=first * n, desc=what, unit="answer", disable=None) as bar:
        for start in range(first, prompts, size):
            numbers = range(start, min(start + size, prompts))
            turns = [turn_of(i) for i in numbers]
            answers = [[_answer(pipe, turn, seed_of(seed, i, k)) for k in range(n)] for i, turn in zip(numbers, turns)]
            _write(pipe, turns, answers, batch, bar)
            yield from zip(numbers, answers)


def together(n: int, batch: int) -> int:
    """Count the prompts that are sorted together, n answers each, to be written `batch` at a time."""
    for name, value in (("answers to each question", n), ("answers at a time", batch)):
        if type(value) is not int or value < 1:
            raise InputError(f"{value!r} {name} are asked for; it must be a whole number, 1 or more")
    return max(1, BATCHES * batch // n)


def seed_of(seed: int, prompt: int, sample: int) -> int:
    """Make the seed of one answer, in 0..2^63-1."""
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt} {sample}".encode()).digest()[:8], "big") >> 1


def _answer(pipe: Pipeline, turn: Turn, seed: int) -> Answer:
    seeded = replace(turn, config=replace(turn.config, random_seed=seed)) if turn.config.do_sample else turn
    return Answer(seeded, pipe.tokenizer, pipe.stop_ids, 0)


# ---- on the model ---------------------------------------------------------------------------------------------------

def _write(pipe: Pipeline, turns: list[Turn], answers: list[list[Answer]], batch: int, bar: tqdm):
    """Write all answers to some prompts, those to prompts of like length together."""
    order = sorted(range(len(turns)), key=lambda i: len(turns[i].ids))
    jobs = [(i, answer) for i in order for answer in answers[i]]
    prompts = {}
    for start in range(0, len(jobs), batch):
        part = jobs[start:start + batch]
        wanted = dict.fromkeys(i for i, _ in part)      # each once
        prompts = {i: prompts.get(i) or read(pipe.model, turns[i]) for i in wanted}
        write_batch(pipe, [answer for _, answer in part], [prompts[i] for i, _ in part], bar)


def read(model, turn: Turn) -> tuple[torch.Tensor, KVCache]:
    """Read a prompt but for its last token: (the embedding of that one float[1, 1, D], the cache of the others)."""
    x = embed(model, turn)                                                  # (1, T, D)
    cache = KVCache()
    next(steps(model, x[:, :-1], [lambda logits: 0], cache=cache))
    return x[:, -1:], cache


@torch.inference_mode()
def write_batch(pipe: Pipeline, answers: list[Answer], prompts: list[tuple], bar: tqdm):
    """Write some answers together, a token of each at a time; prompts: what `read` makes of each one's."""
    model = pipe.model
    caches = [cache for _, cache in prompts]
    cache = copied([(one, 0, 0, one.length) for one in caches], len(caches))
    padding = torch.tensor([cache.length - one.length for one in caches], device=model.device)
    x = torch.cat([last for last, _ in prompts])                            # (B, 1, D)
    samplers = [answer.sampler([], model.img_context_token_id) for answer in answers]
    for tokens, logits in steps(model, x, samplers, cache=cache, padding=padding if padding.any() else None,
                                unused=pipe.unused_ids):
        for answer, token, scores in zip(answers, tokens, logits):
            if answer.finish_reason is None:
                answer.push(token, scores)
                bar.update(answer.finish_reason is not None)
        if all(answer.finish_reason for answer in answers):
            return


# ---- what both commands share ---------------------------------------------------------------------------------------

def add_options(parser: argparse.ArgumentParser, new_tokens: int):
    """Add the options of writing answers to a parser."""
    add = parser.add_argument
    add("--temperature", type=float, default=0.7, help="default %(default)s")
    add("--top-k", type=int, default=50, help="of so many tokens the next one is drawn (default %(default)s; 0: all)")
    add("--top-p", type=float, default=1.0, help="or of those with this probability together (default %(default)s)")
    add("--max-new-tokens", type=int, default=new_tokens, metavar="N", help="of an answer (default %(default)s)")
    add("--seed", type=int, default=0, help="default %(default)s")
    add("--batch", type=int, default=8, metavar="N", help="answers written together (default %(default)s)")
    add("--max-num", type=int, metavar="N", help="most tiles of a picture (default the model's own); a row's own "
        "max_num comes first")
    add("--root", metavar="FOLDER", help="of the pictures (default the one that the rows are in)")
    add("--lora", metavar="FILE", help="what python -m weights_tools.lora learned on the checkpoint")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--precision", choices=["exact", "fast"], default="exact",
        help="default %(default)s; fast may round to bfloat16")


def how(args: argparse.Namespace) -> GenerationConfig:
    """Read how tokens are chosen from the options."""
    return GenerationConfig(do_sample=True, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                            max_new_tokens=args.max_new_tokens)


def job_of(args: argparse.Namespace, rows: Path, **others) -> dict:
    """Write down all that decides the answers, {option: value}, to know the work by; `others`: more options."""
    lora = args.lora and Path(args.lora)
    if lora:
        lora = digest_of_file(lora / FILE if lora.is_dir() else lora)
    names = ("temperature", "top_k", "top_p", "max_new_tokens", "seed", "batch", "max_num", "root", "device",
             "precision")
    settings = {**others, **{name: getattr(args, name) for name in names}}
    spelled = {name: f"--{name}".replace("_", "-") if len(name) > 1 else f"-{name}" for name in settings}
    return {"checkpoint": digest_of_checkpoint(find(args.checkpoint)), "rows": digest_of_file(rows), "lora": lora,
            **{spelled[name]: value for name, value in settings.items()}}


def opened(args: argparse.Namespace) -> Pipeline:
    """Load the checkpoint. Warns where its context has less room than answers may take."""
    pipe = pipeline(args.checkpoint, EngineConfig(device=args.device, precision=args.precision, lora=args.lora))
    if args.max_new_tokens >= pipe.room:
        warnings.warn(f"--max-new-tokens {args.max_new_tokens} is more than the context of {pipe.room}; an answer ends "
                      "where the context does", stacklevel=2)
    return pipe


def with_pictures(row: dict, text: str, root: Path | None, max_num: int | None):
    """Write a prompt for a pipeline: a text, or (text, [pictures]). image: a path below `root`, a PIL image, a list."""
    found = row.get("image") or []
    found = found if isinstance(found, list) else [found]
    most = row.get("max_num", max_num)
    found = [Picture(str(root / one) if root is not None and isinstance(one, str) else one, most) for one in found]
    return (text, found) if found else text


@contextmanager
def named(place: str) -> Iterator[None]:
    """Say of a wrong row where it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
