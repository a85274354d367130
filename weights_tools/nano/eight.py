"""Nano's own eight benchmarks, in files like those of the card's eight: python -m weights_tools.nano.eight OUT

    world, held-out seed -> questions -> OUT/NanoMMBench_V11.tsv, NanoMMStar.tsv, .. NanoMMVet.tsv

Each has the columns, the sort of question and the scorer of the benchmark after which it is named; pictures are PNG in
base64. `python -m weights_tools.evaluate nano --data OUT` asks them. Nano is asked the plain question: it was never
taught to read options (NOTES.md); who can read them finds them in the columns.
"""
from __future__ import annotations

import argparse
import base64
import csv
import io
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minivl import options as command
from minivl.limits import InputError
from weights_tools import run
from weights_tools.files import new_file, told
from weights_tools.nano import evaluate, world
from weights_tools.nano.choices import Asked, asked, options
from weights_tools.nano.draw import Scene, Style, draw
from weights_tools.nano.twins import SORTS, twins

ABCD = ("A", "B", "C", "D")
COPY = 10 ** 6          # between the indices of a question's copies, whose options are in another order
AND = "<AND>"           # between the things that a full answer names


@dataclass(frozen=True)
class Part:
    """One category of a benchmark: which of the world's questions it asks."""
    category: str
    wider: str                                              # l2-category, or MathVista's skill
    task: str
    mix: dict                                               # of the world's examples
    which: Callable[[Asked], bool] = lambda one: True
    style: Style | None = None
    denied: bool = False                                    # "it is not in the picture" is among the options


def texts_of(one: Asked) -> list:
    return [thing for scene in one.scenes for thing in scene.texts]


def alone(one: Asked, tilted: bool | None = None) -> bool:
    """Tell whether the text that is asked for is the only one, and perhaps tilted or not."""
    texts = texts_of(one)
    return len(texts) == 1 and tilted in (None, texts[0].angle != 0)


def final(one: Asked, *kinds: str) -> bool:
    """Tell whether a question's final answer is of one of these kinds."""
    kind = "digits" if "digit" in one.question else "number" if one.right.isdigit() else \
        "yes or no" if one.right in ("yes", "no") else "thing"
    return kind in kinds


SHAPES = {"shapes": 1}
TEXTS = {"texts": 1}
PRINT = {"print": 1}
REASON = {"reason": 1}
COMPARE = {"compare": 1}
NEW_WORDS = Style(world.HELD_OUT, made_up=0)                # never written in training
# The first part of each is not about numbers: where all cells of a column are digits, a reader takes "007" for 7. And
# "no" is no option where the whole answer is searched for one: "cannot" contains it.
MMBENCH = (Part("colour", "one thing", "colour", SHAPES), Part("shape", "one thing", "shape", SHAPES),
           Part("place", "one thing", "place", SHAPES), Part("size", "one thing", "size", SHAPES),
           Part("count", "all things", "count", SHAPES), Part("word", "text", "read words", TEXTS),
           Part("number", "text", "read numbers", TEXTS),
           Part("relation", "steps", "reason", REASON, lambda one: final(one, "number", "thing")))
MMSTAR = (Part("perception", "shape", "shape", SHAPES), Part("perception", "place", "place", SHAPES),
          Part("premise", "false", "false premise", SHAPES), Part("premise", "true", "colour", SHAPES, denied=True),
          Part("number", "count", "count", SHAPES),
          Part("reasoning", "steps", "reason", REASON, lambda one: final(one, "number", "thing")))
MMMU = (Part("changes", "two pictures", "compare", COMPARE, lambda one: "how many" not in one.question.lower()),
        Part("numbers", "two pictures", "compare", COMPARE, lambda one: "how many" in one.question.lower()),
        Part("small print", "text", "small print", PRINT), Part("words", "text", "read words", TEXTS))
OPEN = ("words",)               # subjects without options, as some of MMMU's questions
AI2D = (Part("", "", "read words", TEXTS), Part("", "", "colour", TEXTS), Part("", "", "place", TEXTS),
        Part("", "", "shape", TEXTS), Part("", "", "read numbers", TEXTS))
OCR = (Part("Regular Text Recognition", "", "read words", TEXTS, lambda one: alone(one, False), NEW_WORDS),
       Part("Irregular Text Recognition", "", "read words", TEXTS, lambda one: alone(one, True), NEW_WORDS),
       Part("Non-Semantic Text Recognition", "", "read words", TEXTS, alone, Style((), made_up=1)),
       Part("Digit String Recognition", "", "read numbers", TEXTS, alone),
       Part("Scene Text-centric VQA", "", "read words", TEXTS, lambda one: len(texts_of(one)) > 1),
       Part("Key Information Extraction", "", "read numbers", TEXTS, lambda one: len(texts_of(one)) > 1),
       Part("Doc-oriented VQA", "", "small print", PRINT))
MATH = (Part("yes or no", "logical reasoning", "reason", REASON, lambda one: final(one, "yes or no")),
        Part("numbers of things", "arithmetic reasoning", "reason", REASON, lambda one: final(one, "number")),
        Part("beside it", "spatial reasoning", "reason", REASON, lambda one: final(one, "thing")),
        Part("digits", "arithmetic reasoning", "reason", REASON, lambda one: final(one, "digits")))
VET = (Part("rec,spat", "", "describe", {"describe": 1}), Part("ocr,rec,spat", "", "describe", TEXTS),
       Part("ocr", "", "read all", TEXTS))


# ---- questions ------------------------------------------------------------------------------------------------------

Asking = tuple[int, Part, Asked, dict, str]


def questions(name: str, parts: Sequence[Part], n: int, seed: int, closed: bool = False) -> Iterator[Asking]:
    """Yield n questions, one of each part in turn: (number, its part, question, its options, the right letter).

    closed: only questions that can have options; else they have none.
    """
    streams = [chosen(part, f"{name} {seed}", closed) for part in parts]
    for number in range(n):
        yield number, parts[number % len(parts)], *next(streams[number % len(parts)])


def chosen(part: Part, seed: str, closed: bool) -> Iterator[tuple[Asked, dict, str]]:
    """Yield the questions of one part, endless: (question, options, the right letter)."""
    seed = f"{seed} {part.category} {part.wider}"
    rng = random.Random(f"{evaluate.HELD_OUT} {seed} {part.task}")
    for one in asked(seed, part.task, part.mix, part.style):
        if not part.which(one):
            continue
        denied = one.sentence.split(" is ")[0] + " is not in the picture" if part.denied else None
        found = options(rng, one, also=denied) if closed else ({}, "")
        if found:
            yield one, *found


def picture(*scenes: Scene) -> str:
    """Write one picture as base64 of a PNG, several as a Python list of them."""
    found = []
    for scene in scenes:
        file = io.BytesIO()
        draw(scene).save(file, "PNG")
        found.append(base64.b64encode(file.getvalue()).decode())
    return found[0] if len(found) == 1 else str(found)


# ---- benchmarks: (n, seed) -> rows, {column: cell} ------------------------------------------------------------------

def mmbench(n: int, seed: int) -> Iterator[dict]:
    """Each question once with its options in every order that turning them round gives; the copies refer to the first.
    """
    for number, part, one, letters, right in questions("MMBench", MMBENCH, n, seed, closed=True):
        for turn in range(len(letters)):
            texts = list(letters.values())
            turned = dict(zip(ABCD, texts[turn:] + texts[:turn]))
            yield {"index": number + 1 + turn * COPY, "image": number + 1 if turn else picture(*one.scenes),
                   "question": one.question, **turned,
                   "answer": next(letter for letter, text in turned.items() if text == letters[right]),
                   "category": part.category, "l2-category": part.wider, "split": "dev"}


def mmstar(n: int, seed: int) -> Iterator[dict]:
    for number, part, one, letters, right in questions("MMStar", MMSTAR, n, seed, closed=True):
        yield {"index": number, "image": picture(*one.scenes), "question": one.question, **letters, "answer": right,
               "category": part.category, "l2-category": part.wider}


def mmmu(n: int, seed: int) -> Iterator[dict]:
    """n questions of the split that counts, and a tenth more of the other; some have two pictures, some no options."""
    for number, part, one, letters, right in questions("MMMU", MMMU, n + n // 10, seed, closed=True):
        free = part.category in OPEN
        yield {"index": number, "image": picture(*one.scenes), "question": one.question, **({} if free else letters),
               "answer": one.right if free else right, "category": part.category, "l2-category": part.wider,
               "split": "validation" if number < n else "dev"}


def mathvista(n: int, seed: int) -> Iterator[dict]:
    """Numbers are to be written, anything else is to be chosen."""
    for number, part, one, letters, right in questions("MathVista", MATH, n, seed, closed=True):
        free = one.right.isdigit()
        yield {"index": number, "image": picture(*one.scenes), "question": one.question, "answer": one.right,
               "question_type": "free_form" if free else "multi_choice", "answer_type": "integer" if free else "text",
               "choices": "" if free else str(list(letters.values())), "answer_option": "" if free else right,
               "task": part.category, "skills": str([part.wider])}


def hallusionbench(n: int, seed: int) -> Iterator[dict]:
    """Sets of two pictures and two questions: a question is right when it is about both, a picture with both."""
    numbers = dict.fromkeys(SORTS, 0)
    for number in range(-(-n // 4)):
        sort = list(SORTS)[number % len(SORTS)]
        pair = twins(random.Random(f"{evaluate.HELD_OUT} HallusionBench {seed} {number}"), sort)
        for figure, scene in enumerate(pair.scenes, start=1):
            name = f"nano_VD_{sort}_{numbers[sort]}_{figure}"
            for question, (text, *truth) in enumerate(pair.questions):
                yield {"index": f"{name}_{question}", "image": f"{name}_0" if question else picture(scene),
                       "question": text, "answer": "Yes" if truth[figure - 1] else "No", "category": "VD",
                       "l2-category": sort}
        numbers[sort] += 1


def ai2d(n: int, seed: int) -> Iterator[dict]:
    for number, _, one, letters, right in questions("AI2D", AI2D, n, seed, closed=True):
        yield {"index": number, "image": picture(*one.scenes), "question": one.question, **letters, "answer": right}


def ocrbench(n: int, seed: int) -> Iterator[dict]:
    for number, part, one, *_ in questions("OCRBench", OCR, n, seed):
        yield {"index": number, "image": picture(*one.scenes), "question": one.question, "answer": str([one.right]),
               "category": part.category}


def mmvet(n: int, seed: int) -> Iterator[dict]:
    """The truth is all that there is to name; weights_tools.evaluate.score.named compares."""
    for number, part, one, *_ in questions("MMVet", VET, n, seed):
        yield {"index": f"nano_{number}", "image": picture(*one.scenes), "question": one.question,
               "answer": AND.join(named(one)), "category": part.category}


def named(one: Asked) -> list[str]:
    """List what a full answer names: each thing with its place, or each text."""
    scene = one.scenes[0]
    if one.task == "read all":
        return [thing.text for thing in scene.texts]
    things = [*scene.shapes, *scene.texts]
    return [f"{world.place(thing)} {world.name(thing)}" for thing in things] or ["the picture is empty"]


# Name -> columns, in the order of the files that are released, and rows.
ASKED = ("index", "image", "question")
BENCHMARKS: dict[str, tuple[tuple[str, ...], Callable]] = {
    "MMBench_V11": ((*ASKED, "hint", *ABCD, "answer", "category", "l2-category", "split"), mmbench),
    "MMStar": ((*ASKED, *ABCD, "answer", "category", "l2-category"), mmstar),
    "MMMU": ((*ASKED, *ABCD, "answer", "category", "l2-category", "split"), mmmu),
    "MathVista": ((*ASKED, "answer", "question_type", "answer_type", "choices", "answer_option", "task", "skills"),
                  mathvista),
    "HallusionBench": ((*ASKED, "answer", "category", "l2-category"), hallusionbench),
    "AI2D": ((*ASKED, *ABCD, "answer"), ai2d),
    "OCRBench": ((*ASKED, "answer", "category"), ocrbench),
    "MMVet": ((*ASKED, "answer", "category"), mmvet)}


def write(path: Path, columns: Sequence[str], rows: Iterator[dict], n: int) -> int:
    """Write a file, tabs between the cells, whole or not at all; return how many rows it has. n: rows, for the bar."""
    written = 0
    with new_file(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        table = csv.DictWriter(text, columns, delimiter="\t", lineterminator="\n")
        table.writeheader()
        for row in tqdm(rows, total=n, desc=path.stem, unit="row", leave=False, disable=None):
            table.writerow(row)
            written += 1
        text.flush()
        text.detach()
    return written


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.nano.eight", description=__doc__,
                                     formatter_class=command.Help)
    parser.add_argument("out", metavar="OUT", help="folder for the eight files")
    parser.add_argument("-n", type=int, default=200,
                        help="questions of each, NanoHallusionBench in fours (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="others with another one, never those of a training (default %(default)s)")
    args = parser.parse_args(argv)
    if args.n < 1:
        raise InputError(f"-n is {args.n}; ask at least one question")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    out = Path(args.out)
    with told(out, "choose another folder"):
        out.mkdir(parents=True, exist_ok=True)
    for name, (columns, rows) in BENCHMARKS.items():
        path = out / f"Nano{name}.tsv"
        written = write(path, columns, rows(args.n, args.seed), args.n)
        print(f"{path}: {written} rows, {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
