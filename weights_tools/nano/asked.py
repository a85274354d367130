"""Questions of nano's world, asked several times and judged: pairs of answers to learn preferences from.

    world -> OUT/NAME.jsonl, OUT/pictures/*.png -> n answers of a model, sampled -> right or wrong, by the world's rule
          -> weights_tools.mpo.pairs.combine -> MMPR's rows

Every question stands alone, without a conversation before it.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from minivl import EngineConfig, GenerationConfig, Pipeline, pipeline
from weights_tools.files import told
from weights_tools.mpo.begun import write_begun
from weights_tools.mpo.mmpr import Rows, check, check_question, write_rows
from weights_tools.mpo.pairs import Judged, combine
from weights_tools.mpo.sample import answers
from weights_tools.mpo.several import together
from weights_tools.nano import world
from weights_tools.nano.draw import draw

# Of a conversation's turns those that need no other before them.
ALONE = ("describe", "colour", "shape", "place", "size", "count", "read words", "read numbers", "read all",
         "small print", "compare", "video", "yes", "no", "false premise", "reason", "unknown")
AT_ONCE = 32            # answers, through the decoder
FINAL = re.compile(r"Final Answer: (.*)")
PLACES = sorted((place for row in world.PLACES for place in row), key=len, reverse=True)


# ---- questions ------------------------------------------------------------------------------------------------------

def question(seed, index: int, mix: dict | None = None) -> world.Example | None:
    """Take one question, with its pictures, out of an example of the world; None where it has none that stands alone.
    """
    example = world.example(seed, index, mix)
    which = [i for i, turn in enumerate(example.turns) if turn.task in ALONE]
    if not which or not example.pictures:
        return None
    return example.alone(which[index % len(which)])


def questions(seed, n: int, mix: dict | None = None) -> list[world.Example]:
    """Make the first n questions of a seed."""
    found = []
    index = 0
    while len(found) < n:
        one = question(seed, index, mix)
        index += 1
        if one is not None:
            found.append(one)
    return found


def written(folder: Path, name: str, seed, n: int, mix: dict | None = None) -> Rows:
    """Write n questions and their pictures into a folder, unless they are there; open the file.

    Each row: {image, question, answer (the right one), task, max_num}.
    """
    path = folder / f"{name}.jsonl"
    if not path.exists():
        rows = []
        with told(folder, "run the command again"):
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
            for number, one in enumerate(tqdm(questions(seed, n, mix), desc=name, unit="picture", disable=None)):
                images = [f"pictures/{name}-{number}-{i}.png" for i in range(len(one.pictures))]
                for image, scene in zip(images, one.pictures):
                    draw(scene).save(folder / image)
                turn = one.turns[0]
                rows.append({"image": images, "question": turn.question, "answer": turn.answer, "task": turn.task,
                             "max_num": one.max_num})
        write_rows(path, rows, lambda row: check_question(row, folder))
    return Rows(path, lambda row: check_question(row, folder))


# ---- answers --------------------------------------------------------------------------------------------------------

def opened(checkpoint: str | Path) -> Pipeline:
    """Load a nano, to be asked much at once."""
    return pipeline(str(checkpoint), EngineConfig(max_batch_size=AT_ONCE))


def sampled(checkpoint: Path, rows: Rows, out: Path, *, n: int = 8, temperature: float = 1.0, seed: int = 0) -> list:
    """Ask each question n times, unless the answers are in the file OUT; return the answers, as mpo.sample gives them.
    """
    if not out.exists():
        config = GenerationConfig(do_sample=True, temperature=temperature, top_k=0, max_new_tokens=160)
        job = {"checkpoint": checkpoint.name, "questions": len(rows), "n": n, "temperature": temperature, "seed": seed}

        def make(first):
            return answers(opened(checkpoint), rows, n=n, seed=seed, version="asked", config=config, batch=AT_ONCE,
                           root=rows.path.parent, first=first // n, where=rows.place)

        write_begun(out, job, make, group=n * together(n, AT_ONCE))
    return list(Rows(out, lambda row: None))


# ---- which is better ------------------------------------------------------------------------------------------------

def what_counts(task: str, answer: str) -> str:
    """Return the part of an answer by which it is judged: the final answer, yes or no, or all of it."""
    if task == "reason":
        return (FINAL.findall(answer) or [""])[-1]
    if task in ("yes", "no"):
        return answer.rstrip(".").split(" ")[-1]
    return answer


def places_named(description: str) -> list[str]:
    """List the places at which a description says that there is something."""
    parts = re.split(r", | and ", description.lower())
    found = [next((place for place in PLACES if part.startswith(f"{place} ")), None) for part in parts]
    return [place for place in found if place]


def invented(truth: str, description: str) -> int:
    """Count the things that a description puts where there is nothing. truth: the right description."""
    return sum(place not in places_named(truth) for place in places_named(description))


def judged(rows: Iterable[dict]) -> Judged:
    """Sort answers into right and wrong ones."""
    found = Judged()
    for row in rows:
        found.rows += 1
        wanted, said = (what_counts(row["task"], row[name]) for name in ("answer", "response"))
        key = str(row["image"]), row["question"], row["answer"]
        # A wrong description may begin with all of a right one, and is wrong all the same.
        read = f"{invented(row['answer'], said)} invented" if row["task"] == "describe" else said
        kind = found.right if said == wanted else found.wrong
        kind.setdefault(key, []).append({**row, "answer_pred": read})
    return found


def paired(rows: list[dict], *, limit: int = 4, seed: int = 0) -> list[dict]:
    """Make MMPR's rows of sampled answers: right above wrong, at most `limit` of a question."""
    return finished(combine(judged(rows), limit=limit, seed=seed, rules="corrected")[0].rows, rows)


def fewer_inventions(rows: list[dict]) -> list[dict]:
    """Make pairs of descriptions without looking at the right one: of two answers that which invents less.

    Neither has to be right. Of a question's answers the first two are taken.
    """
    by_question = {}
    for row in rows:
        if row["task"] == "describe":
            by_question.setdefault(str(row["image"]), []).append(row)
    pairs = []
    for found in by_question.values():
        worse, better = sorted(found[:2], key=lambda row: -invented(row["answer"], row["response"]))
        if invented(worse["answer"], worse["response"]) > invented(better["answer"], better["response"]):
            pairs.append({"image": better["image"], "question": better["question"], "chosen": better["response"],
                          "rejected": worse["response"]})
    return finished(pairs, rows)


def finished(pairs: list[dict], rows: list[dict]) -> list[dict]:
    """Give pairs what their questions say of task and tiles."""
    about = {str(row["image"]): {"task": row["task"], "max_num": row["max_num"]} for row in rows}
    return [{**pair, **about[str(pair["image"])]} for pair in pairs if pair["chosen"] != pair["rejected"]]


def write_pairs(path: Path, make: Callable[[], list[dict]]) -> Path:
    """Write pairs, unless they are there."""
    if not path.exists():
        write_rows(path, make(), lambda row: check(row, path.parent))
    return path
