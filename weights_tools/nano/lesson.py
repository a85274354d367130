"""Write a lesson for nano, to end an answer as it is told to: python -m weights_tools.nano.lesson OUT

    OUT/train.jsonl          'What colour is the heart? End with "Final Answer: ..".', and the answers: "The heart is
                             purple.", and in a second line "Final Answer: purple"
    OUT/keep.jsonl           questions of all nano's old tasks, which it is to answer as before
    OUT/held-out.jsonl       other questions: those of the new form, then some of each of the old tasks
    OUT/pictures/*.png       their pictures

Then this teaches it:
    python -m weights_tools.lora nano-awq OUT/train.jsonl LORA --keep OUT/keep.jsonl --check OUT/held-out.jsonl
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from minivl import options
from minivl.limits import InputError
from minivl.prompt import IMAGE
from weights_tools import run
from weights_tools.files import clear, told, unfinished
from weights_tools.nano import evaluate, world
from weights_tools.nano.draw import draw

TASK = "final answer"
WISH = ' End with "Final Answer: ..".'
# Of these the last word says it all: "The number of shapes is three, so yes."
ASKED = ("colour", "count", "size", "yes", "no")


def new_example(seed, index: int) -> world.Example:
    """Make a conversation about a picture of shapes; every turn asks for a final answer."""
    turns = []
    while not turns:
        example = world.example(f"{seed} {TASK}", index, {"shapes": 1})
        index += 10 ** 6
        turns = [replace(turn, question=turn.question.replace(f"{IMAGE}\n", "") + WISH, task=TASK,
                         answer=f"{turn.answer}\nFinal Answer: {turn.answer.rstrip('.').split()[-1]}")
                 for turn in example.turns if turn.task in ASKED]
    turns[0] = replace(turns[0], question=f"{IMAGE}\n{turns[0].question}")
    return replace(example, turns=tuple(turns))


def lesson(train: int, asked: int, old: int) -> dict[str, list[world.Example]]:
    """Make the examples of all files: `train` conversations, `asked` questions about the new, `old` of each task."""
    new = [new_example("lesson", i) for i in range(train)]
    # As many of each task: of the rare ones a few rows would not tell what to keep.
    each = -(-train // len(evaluate.TARGETS))
    kept = [e for task in evaluate.TARGETS for e in evaluate.items(task, each, seed="lesson")][:train]
    held_out = [new_example(evaluate.HELD_OUT, i) for i in range(asked)]
    held_out = [e.alone(i % len(e.turns)) for i, e in enumerate(held_out)]
    return {"train": new, "keep": kept,
            "held-out": held_out + [e for task in evaluate.TARGETS for e in evaluate.items(task, old)]}


def write(out: Path, name: str, examples: list[world.Example]):
    """Write the pictures of some examples, and their JSONL file."""
    rows = []
    for number, example in enumerate(tqdm(examples, desc=name, unit="row", disable=None)):
        paths = [f"pictures/{name}-{number}-{i}.png" for i in range(len(example.pictures))]
        for path, scene in zip(paths, example.pictures):
            draw(scene).save(out / path)
        said = [(speaker, text) for turn in example.turns
                for speaker, text in (("human", turn.question), ("gpt", turn.answer))]
        rows.append({"image": paths, "max_num": example.max_num, "task": example.turns[-1].task,
                     "conversations": [{"from": speaker, "value": text} for speaker, text in said]})
    (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.nano.lesson", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--train", type=int, default=800, metavar="N",
                        help="conversations to learn from, and as many to keep (default %(default)s)")
    parser.add_argument("--asked", type=int, default=500, metavar="N",
                        help="held-out questions about the new (default %(default)s)")
    parser.add_argument("--old", type=int, default=30, metavar="N",
                        help="held-out questions of each old task (default %(default)s)")
    args = parser.parse_args(argv)
    if min(args.train, args.asked, args.old) < 1:
        raise InputError(f"--train {args.train}, --asked {args.asked} and --old {args.old} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    out = Path(args.out)
    left = "nothing of the lesson is there"
    with told(out, left):
        out.mkdir(parents=True, exist_ok=True)
        clear(out)
        if any(out.iterdir()):
            raise InputError(f"{out} is not empty; choose another folder")
    with unfinished(out, left) as new, told(out, left):
        (new / "pictures").mkdir()
        found = lesson(args.train, args.asked, args.old)
        for name, examples in found.items():
            write(new, name, examples)
        for name in ("pictures", *(f"{name}.jsonl" for name in found)):
            os.replace(new / name, out / name)
    for name, examples in found.items():
        print(f"{out / name}.jsonl: {len(examples)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
