"""Sample answers to questions that have known ones: python -m weights_tools.mpo.sample CHECKPOINT QUESTIONS OUT.jsonl

    {"image": "a.png", "question": "What colour is it?", "answer": "red"}     a line of QUESTIONS, broken off here
    {"image": .., "question": the whole prompt, "question_orig": .., "answer": .., "response": .., "prompt_version": ..}

"image" may be a list, with a mark <image> in the question for each, or missing. Other keys stay; "max_num" is the most
tiles of each picture. A response that was not finished has "finish_reason": "length". Stopped, the same command goes
on. Then `python -m weights_tools.mpo.pairs OUT.jsonl PAIRS` tells right from wrong.
--version asked: the question alone is the prompt, for a model that was not taught the others, and all that it says is
its answer, or what follows "Final Answer:".
Source: InternVL mmpr_data_pipeline_correctness.py @2410d1d. At the card's time: -n 8 --temperature 1 --max-new-tokens
2048.
"""
from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from minivl import GenerationConfig, InputError, Pipeline, options
from weights_tools import run
from weights_tools.mpo.begun import write_begun
from weights_tools.mpo.mmpr import Rows, check_question
from weights_tools.mpo.prompts import PROMPTS, prompt
from weights_tools.mpo.several import add_options, how, job_of, named, opened, several, together, with_pictures


def answers(pipe: Pipeline, rows: Sequence[dict], *, n: int = 32, seed: int = 0, version: str = "en",
            config: GenerationConfig | None = None, batch: int = 8, max_num: int | None = None,
            root: Path | None = None, first: int = 0,
            where: Callable[[int], str] = "rows[{}]".format) -> Iterator[dict]:
    """Yield n answers to each question {question, answer, image?, max_num?}, in order, as `pairs.judge` reads them.

    config: how tokens are chosen, with do_sample=True; default temperature 0.7, 4096 tokens. image: a path below
    `root`, a PIL image, or a list of them. first: number of the question to begin with. where(number): its place,
    which an InputError names.
    """
    config = config or GenerationConfig(do_sample=True, temperature=0.7, max_new_tokens=4096)
    if n > 1 and not (config.do_sample and config.temperature > 0):
        raise InputError(f"without chance {n} answers to a question are the same; set a temperature above 0, or ask "
                         "for 1 answer")
    texts = {}

    def turn_of(i):
        row = rows[i]
        with named(where(i)):
            texts[i] = prompt(row["question"], version, picture=bool(row.get("image")))
            return pipe.turn(with_pictures(row, texts[i], root, max_num), config)

    for i, written in several(pipe, turn_of, len(rows), n=n, seed=seed, batch=batch, first=first):
        row = {**rows[i], "question": texts.pop(i), "question_orig": rows[i]["question"]}
        for answer in written:
            cut = {"finish_reason": "length"} if answer.finish_reason == "length" else {}
            yield {**row, "response": answer.text, "prompt_version": version, **cut}


# ---- the command ----------------------------------------------------------------------------------------------------

def arguments(argv: list | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.mpo.sample", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, hub id or short name")
    parser.add_argument("questions", metavar="QUESTIONS", help="a JSONL file")
    parser.add_argument("out", metavar="OUT.jsonl", help="file to write; its name chooses how answers will be judged")
    parser.add_argument("-n", type=int, default=32, help="answers to each question (default %(default)s)")
    parser.add_argument("--version", dest="prompt_version", choices=[*PROMPTS], default="en",
                        help="of the prompt (default %(default)s)")
    add_options(parser, new_tokens=4096)
    return parser.parse_args(argv)


def main(argv: list | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    path = Path(args.questions)
    root = Path(args.root or path.parent)
    config = how(args)
    group = args.n * together(args.n, args.batch)
    rows = Rows(path, lambda row: check_question(row, root))
    cut = Counter()

    def make(first):
        return answers(opened(args), rows, n=args.n, seed=args.seed, version=args.prompt_version, config=config,
                       batch=args.batch, max_num=args.max_num, root=root, first=first // args.n, where=rows.place)

    def keep(row):
        cut[row.get("finish_reason")] += 1
        return True

    made, _ = write_begun(Path(args.out), job_of(args, path, n=args.n, version=args.prompt_version), make, group=group,
                          keep=keep)
    print(f"{args.out}: {made:,} answers to {len(rows):,} questions; {cut['length']:,} were not finished")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
