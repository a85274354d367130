"""Nano learns from its own answers, by MPO: python -m weights_tools.nano.prefer OUT

    nano -> 8 answers each to questions of all tasks, most of them of reasoning -> pairs -> OUT/mpo-1
         -> the same again with new questions -> OUT/mpo-2, and beside it OUT/sft-1, -2: the chosen answers alone
    OUT/table.md    all tasks before and after; where reasoning goes wrong; what a description in words helps

Interrupt it at any time: the same command goes on.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from minivl import GenerationConfig, options
from minivl.files.find import find
from minivl.limits import InputError
from weights_tools import run
from weights_tools.files import write_text
from weights_tools.mpo.batch import Pairs
from weights_tools.mpo.mmpr import Rows, read_datasets
from weights_tools.mpo.steps import Plan
from weights_tools.mpo.train import train
from weights_tools.nano import asked, evaluate, world
from weights_tools.nano.draw import draw

MIX = {"shapes": 14, "texts": 20, "print": 10, "compare": 7, "video": 4, "reason": 35, "describe": 6, "count": 4}
ROUNDS = 2
PLAN = Plan(lr=5e-4, optimiser="muon", batch=12, micro=12, steps=200, beta=1.0, weights=(0.1, 0.025, 1.0),
            weight_decay=0.0, warmup=0.05, dtype="float32")
WAYS = {"mpo": PLAN, "sft": replace(PLAN, weights=(0.0, 0.0, 1.0))}


def learn(out: Path, way: str, n: int, seed: int) -> Path:
    """Learn in rounds, each from the answers of the model that the last one made; return the last checkpoint."""
    before = find("nano")
    for number in range(1, ROUNDS + 1):
        folder = out / f"{way}-{number}"
        if not (folder / "model.safetensors").exists():
            rows = asked.written(out, f"questions-{number}", f"prefer {seed} {number}", n, MIX)
            # The first answers are nano's own, for each way.
            who = "nano" if number == 1 else way
            make = partial(pairs_of, before, rows, out / f"answers-{who}-{number}.jsonl", seed)
            pairs = asked.write_pairs(out / f"pairs-{who}-{number}.jsonl", make)
            train(before, Pairs(read_datasets(pairs)), folder, replace(WAYS[way], seed=seed + number))
        before = folder
    return before


def pairs_of(checkpoint: Path, rows: Rows, answers: Path, seed: int) -> list[dict]:
    """Ask a checkpoint and pair its answers."""
    return asked.paired(asked.sampled(checkpoint, rows, answers, seed=seed), seed=seed)


# ---- where reasoning goes wrong -------------------------------------------------------------------------------------

def sentences(answer: str) -> list[str]:
    """Split a reasoning: "The star is on the left. ... One is above it.\\nFinal Answer: 1"."""
    return re.split(r"(?<=\.)\s", answer)


def seen_first(truth: str) -> int:
    """Count the sentences of a right reasoning that say what is seen; the later ones follow from them."""
    return 1 if truth.startswith("The number is ") else 2


def blame(items: list, answers: list[str]) -> dict[str, int]:
    """Count wrong answers by the first sentence that is wrong: "sees", "concludes", or "other" (it is all else right).
    """
    found = {"sees": 0, "concludes": 0, "other": 0}
    for item, answer in zip(items, answers):
        if evaluate.is_right(item.turns[-1], answer):
            continue
        truth = item.turns[-1].answer
        wrong = next((i for i, (x, y) in enumerate(zip(sentences(truth), sentences(answer))) if x != y), None)
        found["other" if wrong is None else "sees" if wrong < seen_first(truth) else "concludes"] += 1
    return found


def with_words(item: world.Example) -> world.Example:
    """Put a right description before a question: what is in the picture, in words."""
    told = world.describe(random.Random(0), item.pictures[0])
    asks = item.turns[0]
    return replace(item, turns=(world.Turn("<image>\nDescribe the picture.", told.answer, "describe"),
                                replace(asks, question=asks.question.replace("<image>\n", ""))))


def reasoning(checkpoint: str, n: int) -> dict[str, float]:
    """Ask n questions of reasoning, as they are and after a right description: what is wrong, share right in words."""
    pipe = asked.opened(checkpoint)
    _, results = evaluate.measure(pipe, "reason", n)
    found = blame(*zip(*results))
    items = [with_words(item) for item, _ in results]
    config = GenerationConfig(max_new_tokens=160)
    right = 0
    for start in range(0, n, 100):
        part = items[start:start + 100]
        prompts = [evaluate.prompt(one, [draw(scene) for scene in one.pictures], [one.turns[0].answer])
                   for one in part]
        right += sum(evaluate.is_right(one.turns[-1], said.text) for one, said in zip(part, pipe(prompts, config)))
    return {**found, "right with a description": right / n}


def table(found: dict[str, dict], reasons: dict[str, dict], n: int) -> str:
    """Write Markdown: all tasks, then what is wrong with reasoning."""
    lines = [evaluate.table(list(found), list(found.values())), "",
             "| reasoning | sees wrong | concludes wrong | other | right with a description before |",
             "|---|---|---|---|---|"]
    for name, one in reasons.items():
        counts = [f"{100 * one[what] / n:.1f}" for what in ("sees", "concludes", "other")]
        lines.append(f"| {name} | {' | '.join(counts)} | {100 * one['right with a description']:.1f} |")
    return "\n".join(lines)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.nano.prefer", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("out", metavar="OUT", help="folder for everything")
    parser.add_argument("--questions", type=int, default=2000, metavar="N",
                        help="of each round, to make pairs of (default %(default)s)")
    parser.add_argument("-n", type=int, default=500, help="held-out questions of each task (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default %(default)s)")
    args = parser.parse_args(argv)
    if min(args.questions, args.n) < 1:
        raise InputError(f"--questions {args.questions} and -n {args.n} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    out = Path(args.out)
    folders = {"nano": find("nano"), **{way: learn(out, way, args.questions, args.seed) for way in WAYS}}
    tasks = tuple(evaluate.TARGETS)
    shares, _ = evaluate.side_by_side(list(folders.values()), args.n, tasks)
    found = dict(zip(folders, shares))
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), evaluate.one_thread) as pool:
        jobs = {name: pool.submit(reasoning, str(folder), args.n) for name, folder in folders.items()}
        reasons = {name: job.result() for name, job in jobs.items()}
    told = table(found, reasons, args.n)
    plans = {way: asdict(plan) for way, plan in WAYS.items()}
    write_text(out / "scores.json", json.dumps({"n": args.n, "rounds": ROUNDS, "plans": plans, "scores": found,
                                                "reasoning": reasons}, indent=1) + "\n")
    write_text(out / "table.md", told + "\n")
    print(told)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
