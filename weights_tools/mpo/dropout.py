"""Dropout-NTP: rejected answers for chosen ones: python -m weights_tools.mpo.dropout CHECKPOINT ROWS.jsonl OUT.jsonl

    {"image": "a.png", "question": "Describe it.", "chosen": "A red star on a white ground."}       a line of ROWS
    {.., "rejected": "A red star in the night sky."}                                                a line of OUT

A chosen answer is cut at half of its words, and the model finishes it without the picture, so from what it reads alone.
A row whose end comes out as it was is left out. Other keys stay; "image" and "max_num" are as in mpo.sample. Stopped,
the same command goes on.
Source: InternVL mmpr_data_pipeline_dropout_ntp.py @2410d1d; the name, arXiv:2411.10442.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from minivl import GenerationConfig, InputError, Pipeline, options
from minivl.chat.requests import Turn
from weights_tools import run
from weights_tools.mpo.begun import write_begun
from weights_tools.mpo.mmpr import Rows, check_chosen
from weights_tools.mpo.pairs import truncate
from weights_tools.mpo.prompts import without_picture
from weights_tools.mpo.several import add_options, how, job_of, named, opened, several, together, with_pictures


def rejected(pipe: Pipeline, rows: Sequence[dict], **settings) -> Iterator[dict]:
    """Yield a pair for each row {question, chosen, image?}, in order, but where it came out as it was: see `finished`.
    """
    return filter(differs, finished(pipe, rows, **settings))


def differs(row: dict) -> bool:
    """Tell whether the rejected answer is another one than the chosen."""
    return row["rejected"].strip() != row["chosen"].strip()


def finished(pipe: Pipeline, rows: Sequence[dict], *, seed: int = 0, ratio: float = 0.5, with_picture: bool = False,
             config: GenerationConfig | None = None, batch: int = 8, max_num: int | None = None,
             root: Path | None = None, first: int = 0,
             where: Callable[[int], str] = "rows[{}]".format) -> Iterator[dict]:
    """Yield each row with "rejected": the first `ratio` of the chosen answer's words, and how the model finishes them.

    config: how tokens are chosen; default temperature 0.7, 2048 tokens. first: number of the row to begin with. root,
    where: as in `sample.answers`.
    """
    config = config or GenerationConfig(do_sample=True, temperature=0.7, max_new_tokens=2048)
    begins = {}

    def turn_of(i):
        row = rows[i]
        with named(where(i)):
            begins[i] = truncate(row["chosen"], ratio)
            asked = with_pictures(row, row["question"], root, max_num) if with_picture else without_picture(
                row["question"])
            return begun_by(pipe, pipe.turn(asked, config), begins[i])

    for i, (answer,) in several(pipe, turn_of, len(rows), n=1, seed=seed, batch=batch, first=first, what="finishing"):
        yield {**rows[i], "rejected": begins.pop(i) + answer.text}


def begun_by(pipe: Pipeline, turn: Turn, text: str) -> Turn:
    """Put the beginning of an answer after a prompt, for the model to go on with it: these tokens are no new ones."""
    ids = turn.ids + pipe.tokenizer.encode(text, plain=True)
    room = pipe.room - turn.start - len(ids)
    if room < 1:
        raise InputError(f"question and first part of the answer have {len(ids)} tokens and leave no room in a context "
                         f"of {pipe.room}; shorten them, or take a smaller --ratio")
    return replace(turn, ids=ids, max_new_tokens=min(turn.config.max_new_tokens, room))


# ---- the command ----------------------------------------------------------------------------------------------------

def arguments(argv: list | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.mpo.dropout", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, hub id or short name")
    parser.add_argument("rows", metavar="ROWS.jsonl", help="questions with chosen answers")
    parser.add_argument("out", metavar="OUT.jsonl", help="file to write, as MMPR's: image, question, chosen, rejected")
    parser.add_argument("--ratio", type=float, default=0.5, help="of the words that stay (default %(default)s)")
    parser.add_argument("--with-picture", action="store_true", help="the model sees the picture while it finishes")
    add_options(parser, new_tokens=2048)
    args = parser.parse_args(argv)
    if not args.with_picture:
        options.refuse(options.given(parser, argv), ("max_num",), "without --with-picture")
    return args


def main(argv: list | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    path = Path(args.rows)
    root = Path(args.root or path.parent)
    config = how(args)
    truncate("", args.ratio)        # refuses what is no share
    rows = Rows(path, lambda row: check_chosen(row, root))

    def make(first):
        return finished(opened(args), rows, seed=args.seed, ratio=args.ratio, with_picture=args.with_picture,
                        config=config, batch=args.batch, max_num=args.max_num, root=root, first=first,
                        where=rows.place)

    job = job_of(args, path, ratio=args.ratio, with_picture=args.with_picture)
    made, kept = write_begun(Path(args.out), job, make, group=together(1, args.batch), keep=differs)
    print(f"{args.out}: {kept:,} pairs; {made - kept:,} answers were finished as they had been, left out")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
