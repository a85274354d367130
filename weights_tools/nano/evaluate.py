"""Measure how often nano answers exactly right: python -m weights_tools.nano.evaluate [CHECKPOINT ...]

    held-out pictures and questions -> minivl.pipeline, greedy -> share of answers that are right, per task

Every question is asked through the public pipeline, alone with its pictures (follow-ups: in a conversation with the
model's own earlier answers). Right means the whole answer, word by word; reasoning is judged by its "Final Answer:"
line alone.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import lru_cache, partial
from multiprocessing import get_context

import torch
from torch import nn
from tqdm import tqdm

from minivl import EngineConfig, GenerationConfig, Picture, Pipeline, options, pipeline
from minivl.limits import InputError
from weights_tools import run
from weights_tools.files import write_text
from weights_tools.nano import world
from weights_tools.nano.draw import Style, draw

# What is asked -> the share of right answers that was aimed at when nano was planned (None: no aim was set).
TARGETS = {"describe": None, "colour": 0.97, "shape": 0.97, "place": 0.97, "size": None, "count": 0.92,
           "read words": 0.90, "read new words": None, "read letters": None, "read numbers": None, "read all": None,
           "small print": None, "compare": 0.90, "video": 0.95, "follow-up": 0.92, "yes": 0.95, "no": 0.95,
           "false premise": None, "reason": 0.60, "unknown": None, "talk": None}
STYLES = {"read words": Style(world.TRAINED, made_up=0), "read new words": Style(world.HELD_OUT, made_up=0),
          "read letters": Style((), made_up=1)}     # words seen in training; never seen; letters at random
HELD_OUT = "held out"       # the seed of these questions; training uses others


def items(task: str, n: int, seed=HELD_OUT, wide: bool = False) -> list:
    """Make the first n questions of a task: conversations of which the last turn counts, one from each picture.

    `wide`: only about pictures of several tiles.
    """
    style = STYLES.get(task, Style(world.TRAINED))
    wanted = "read words" if task in STYLES else task
    found = []
    index = 0
    while len(found) < n:
        example = world.example(seed, index, style=style)
        index += 1
        which = [i for i, turn in enumerate(example.turns) if turn.task == wanted]
        if not which or wide and (example.max_num == 1 or example.pictures[0].grid == (1, 1)):
            continue
        i = which[index % len(which)]
        found.append(replace(example, turns=example.turns[:i + 1]) if task == "follow-up" else example.alone(i))
    return found


def prompt(item: world.Example, pictures: list, answers: list) -> list:
    """Write messages for the pipeline: the turns so far with the given answers, then the next question."""
    messages = []
    for i, (turn, answer) in enumerate(zip(item.turns, [*answers, None])):
        content = [{"type": "text", "text": turn.question}]
        if i == 0:
            content += [{"type": "image_data", "image_data": {"data": Picture(p, item.max_num)}} for p in pictures]
        messages.append({"role": "user", "content": content})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


def conversations(n: int, seed="calibration") -> Iterator[list]:
    """Yield n conversations with their right answers as prompts for the pipeline: to be read, not to be answered."""
    for i in range(n):
        example = world.example(seed, i)
        whole = replace(example, turns=(*example.turns, world.Turn("Thank you!", "", "talk")))
        yield prompt(whole, [draw(scene) for scene in example.pictures], [turn.answer for turn in example.turns])


def is_right(turn: world.Turn, answer: str) -> bool:
    """Judge an answer word by word; of a reasoning only what follows "Final Answer:"."""
    if turn.task == "reason":
        final = re.findall(r"Final Answer: (.*)", answer)
        return final[-1:] == re.findall(r"Final Answer: (.*)", turn.answer)
    return answer == turn.answer


def ask(pipe: Pipeline, questions: list, pictures: list | None = None) -> list:
    """Return the answers to the last turn of each item. `pictures`: drawn ones, in place of each item's own."""
    pictures = pictures or [[draw(scene) for scene in item.pictures] for item in questions]
    answers = [[] for _ in questions]
    for turn in range(max(len(item.turns) for item in questions)):
        now = [i for i, item in enumerate(questions) if len(item.turns) > turn]
        prompts = [prompt(questions[i], pictures[i], answers[i]) for i in now]
        responses = pipe(prompts, GenerationConfig(max_new_tokens=160))
        for i, response in zip(now, responses):
            answers[i].append(response.text)
    return [a[-1] for a in answers]


def measure(pipe: Pipeline, task: str, n: int, seed=HELD_OUT, change: Callable | None = None,
            wide: bool = False) -> tuple:
    """Ask n questions: (share right, [(item, answer), ...]). `change(items, pictures)` may alter the pictures first."""
    questions = items(task, n, seed, wide)
    results = []
    for first in range(0, n, 100):
        part = questions[first:first + 100]
        pictures = [[draw(scene) for scene in item.pictures] for item in part]
        if change:
            pictures = change(part, pictures)
        results += zip(part, ask(pipe, part, pictures))
    return sum(is_right(item.turns[-1], answer) for item, answer in results) / n, results


@lru_cache(maxsize=3)
def _pipe(checkpoint: str, precision: str = "exact"):
    return pipeline(checkpoint, EngineConfig(max_batch_size=25, precision=precision))


def _share(checkpoint: str, task: str, n: int, precision: str) -> float:
    return measure(_pipe(checkpoint, precision), task, n)[0]


def _ablations(checkpoint: str, n: int) -> list:
    return ablations(_pipe(checkpoint), n)


def one_thread():
    torch.set_num_threads(1)


def side_by_side(checkpoints: list, n: int, tasks: tuple = tuple(TARGETS), ablations_n: int = 0,
                 precision: str = "exact") -> tuple:
    """Measure all: ([{task: share right} of each checkpoint], ablations of the first or []).

    One process with one thread on each core.
    """
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), one_thread) as pool:
        # The longest first.
        changes = pool.submit(_ablations, str(checkpoints[0]), ablations_n) if ablations_n else None
        jobs = {(c, task): pool.submit(_share, str(c), task, n, precision) for c in checkpoints for task in tasks}
        for job in tqdm(as_completed(jobs.values()), total=len(jobs), unit="task", disable=None):
            job.result()
        scores = [{task: jobs[c, task].result() for task in tasks} for c in checkpoints]
        return scores, changes.result() if changes else []


# ---- what the parts are good for ------------------------------------------------------------------------------------

class WrongOrder(nn.Module):
    """Pixel unshuffle as F.pixel_unshuffle orders it, (c, dy, dx) instead of (dy, dx, c)."""

    def forward(self, x):
        side = round(x.shape[1] ** 0.5)
        grid = x.view(len(x), side, side, -1).permute(0, 3, 1, 2)
        return nn.functional.pixel_unshuffle(grid, 2).flatten(2).transpose(1, 2)


def shuffled(seed, part: list, pictures: list) -> list:
    """Give every question the picture of another one."""
    order = list(range(len(part)))
    random.Random(seed).shuffle(order)
    other = {order[i]: order[i - 1] for i in range(len(order))}
    return [pictures[other[i]] for i in range(len(part))]


def ablations(pipe: Pipeline, n: int) -> list:
    """Change one part at a time: [(what, task, share right as it is, share right so), ...], on the same questions."""
    def one_tile(part, pictures):
        part[:] = [replace(item, max_num=1) for item in part]
        return pictures

    model = pipe.model
    before = {}
    rows = []
    config, unshuffle = model.config, model.pixel_unshuffle

    def row(what, task, change=None, config=config, unshuffle=unshuffle, wide=False):
        if (task, wide) not in before:
            before[task, wide] = measure(pipe, task, n, wide=wide)[0]
        model.config, model.pixel_unshuffle = config, unshuffle
        try:
            rows.append((what, task, before[task, wide], measure(pipe, task, n, change=change, wide=wide)[0]))
        finally:
            model.config, model.pixel_unshuffle = original

    original = config, unshuffle
    row("one tile only (max_num=1)", "small print", one_tile)
    for task in ("count", "place", "read words", "small print"):
        row("no thumbnail (pictures of several tiles)", task, config=replace(config, use_thumbnail=False), wide=True)
    for task in ("colour", "shape", "read words"):
        row("pixel unshuffle in the wrong channel order", task, unshuffle=WrongOrder())
    for task in ("colour", "shape", "place", "count", "read words", "yes", "no"):
        row("pictures exchanged between the questions", task, partial(shuffled, 0))
    return rows


def table(names: list, scores: list) -> str:
    """Write Markdown: task, aim, one column for each checkpoint."""
    lines = ["| task | aim | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for task, aim in TARGETS.items():
        cells = [f"{100 * s[task]:.1f}" for s in scores]
        lines.append(f"| {task} | {f'{100 * aim:.0f}' if aim else ''} | " + " | ".join(cells) + " |")
    means = [sum(s.values()) / len(s) for s in scores]
    return "\n".join([*lines, "| mean | | " + " | ".join(f"{100 * m:.1f}" for m in means) + " |"])


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and refuse what would have no effect."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.nano.evaluate", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", default=["nano", "nano-awq"],
                        help="folders (default: the shipped ones, nano and nano-awq)")
    parser.add_argument("-n", type=int, default=500, help="questions per task (default %(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TARGETS, metavar="TASK", help="only these")
    parser.add_argument("--precision", choices=("exact", "fast"), default="exact",
                        help="of the pipeline, see minivl.fast (default %(default)s)")
    parser.add_argument("--ablations", action="store_true", help="what the parts are good for, on the first checkpoint")
    parser.add_argument("--wrong", type=int, default=0, metavar="K", help="print K wrong answers of each task")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to this file")
    args = parser.parse_args(argv)
    if args.n < 1:
        raise InputError(f"-n is {args.n}; ask at least one question")
    if args.wrong < 0:
        raise InputError(f"--wrong is {args.wrong}; it must be 0 or more")
    if args.ablations:
        options.refuse(options.given(parser, argv), ("tasks", "precision"),
                       "with --ablations, which has tasks of its own and runs the modules as released")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    tasks = args.tasks or list(TARGETS)
    start = time.perf_counter()
    scores, rows = side_by_side(args.checkpoints, args.n, tuple(tasks), args.n if args.ablations else 0,
                                args.precision)
    report = {"questions": args.n, "seed": HELD_OUT, **{str(c): score for c, score in zip(args.checkpoints, scores)}}
    print(f"{args.n * len(tasks)} questions for each, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(table([str(c) for c in args.checkpoints], scores) if not args.tasks else json.dumps(report, indent=1))
    for checkpoint in args.checkpoints if args.wrong else ():
        for task in tasks:
            _, results = measure(_pipe(str(checkpoint), args.precision), task, args.n)
            wrong = [(item.turns[-1], answer) for item, answer in results if not is_right(item.turns[-1], answer)]
            for turn, answer in wrong[:args.wrong]:
                print(f"{task}: {turn.question!r}\n    right {turn.answer!r}\n    wrote {answer!r}", file=sys.stderr)
    if args.ablations:
        report["ablations"] = rows
        print("\n| change | task | as it is | so |\n|---|---|---|---|")
        for what, task, before, after in rows:
            print(f"| {what} | {task} | {100 * before:.1f} | {100 * after:.1f} |")
    if args.json:
        write_text(args.json, json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
