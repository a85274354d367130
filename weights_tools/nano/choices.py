"""Multiple choice out of the world's questions: which part of an answer is asked for, and what else it might be.

    seed -> asked() -> Asked: pictures, question, the world's sentence, the right part of it, others of its kind
         -> options() -> {"A": .., "B": .., ..} and the right letter

Wrong options are of the same kind as the right one: other colours, other places, another word that differs in a letter,
another text of the same picture. A reader who looks for the one option that an answer contains must find the right one
in the world's own sentence; so no option contains another, and the sentence contains no wrong one.
"""
from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from weights_tools.nano import evaluate, world
from weights_tools.nano.draw import COLOURS, SHAPES, SIZES, Style, Thing, cells, shape

PLACES = tuple(place for row in world.PLACES for place in row)
IS_IT = rf"(?i)\bis the \w+ ({'|'.join(COLOURS)})"
MISSING = ("NA", "NAN", "NULL", "NONE")        # words that a reader of tables may take for an empty cell


@dataclass(frozen=True)
class Asked:
    """One question of the world that stands alone."""
    scenes: tuple           # of draw.Scene
    question: str           # without the marks of pictures, and without a word about steps
    sentence: str           # the world's answer
    right: str              # the part of it that is asked for
    wrong: tuple            # texts of the same kind that are not right
    task: str


def asked(seed: str, task: str, mix: dict, style: Style | None = None) -> Iterator[Asked]:
    """Yield questions of a task, endless, one from each example of the mix that has one."""
    for index in itertools.count():
        example = world.example(f"{evaluate.HELD_OUT} {seed}", index, mix, style)
        # "Is the star red?" without a star has no right word: "no" says too little
        which = [i for i, turn in enumerate(example.turns)
                 if turn.task == task and not (task == "false premise" and re.search(IS_IT, turn.question))]
        if not which:
            continue
        turn = example.turns[which[index % len(which)]]
        rng = random.Random(f"{evaluate.HELD_OUT} {seed} {index} wrong")
        found = right_and_wrong(rng, example, turn)
        if found:
            question = re.sub(r"[^\n]*<image>\n| (Think|Give) step by step.*", "", turn.question)
            right, wrong = found
            yield Asked(example.pictures, question, turn.answer, right, tuple(w for w in wrong if w != right), task)


def right_and_wrong(rng: random.Random, example: world.Example, turn: world.Turn) -> tuple[str, list[str]] | None:
    """Find the part of an answer that is asked for, and others of its kind; None where there are none."""
    said = turn.answer.rstrip(".")
    last = said.split(" ")[-1]
    if turn.task in ("colour", "shape", "size"):
        return last, list({"colour": COLOURS, "shape": SHAPES, "size": SIZES}[turn.task])
    if turn.task == "place":
        return said.split(" is ")[-1], list(PLACES)
    if turn.task == "count" or last in world.NUMBERS:
        return last, near_numbers(last, world.NUMBERS)
    if turn.task in ("read words", "read numbers", "small print"):
        right = re.findall(r'"(.*)"', said)[0]
        return (right, misread(rng, example, right)) if findable(right) else None
    if turn.task == "compare":
        return said, other_changes(rng, *example.pictures)
    if turn.task == "false premise":
        others = supposed(turn.question)
        return said, list(others) or misread(rng, example, rng.choice(world.TRAINED))
    if turn.task == "reason":
        final = turn.answer.split("Final Answer: ")[-1]
        return None if final == "none" else (final, like(final))
    return said, []


def near_numbers(right: str, words: tuple) -> list[str]:
    """List the numbers up to three away."""
    n = words.index(right)
    return [words[m] for m in range(max(0, n - 3), min(len(words), n + 4))]


def misread(rng: random.Random, example: world.Example, right: str) -> list[str]:
    """List other texts: those of the same picture, and some that differ in a letter or altogether."""
    others = [thing.text for scene in example.pictures for thing in scene.things if thing.is_text]
    thing = Thing("word", "red", 0, text=right)
    return list(filter(findable, others + [world.near(rng, thing) for _ in range(6)]))


def findable(text: str) -> bool:
    """Tell whether a text in a long answer means itself: two letters stand in many words."""
    return len(text) > 2 or text.isdigit()


def other_changes(rng: random.Random, first, second) -> list[str]:
    """List what else might have become of two pictures: a change of another thing, place or kind; none that did."""
    found = ["Nothing changed"]
    then, now = ({(thing.row, thing.column): thing for thing in scene.shapes} for scene in (first, second))
    for cell in cells(rng, 9):
        place, old = world.PLACES[cell[0]][cell[1]], then.get(cell)
        if old is None:
            new = shape(rng, cell)
            # of a thing that moved it is true that it appeared there
            if cell not in now or world.name(new, size=False) != world.name(now[cell], size=False):
                found.append(world.changed(None, new, place))
        else:
            found += [world.changed(old, None, place), world.changed(old, world.another(rng, old), place)]
            free = [(r, c) for r, c in cells(rng, 9) if (r, c) not in then]
            if free:
                moved = world.PLACES[free[0][0]][free[0][1]]
                found.append(f"{world.changed(old, None, place)}, it is now {moved}")
    return found


def supposed(question: str) -> tuple:
    """List what might be said if the thing that is asked about were there; () for a text."""
    said = question.lower()
    if "colour" in said or "color" in said:
        return tuple(COLOURS)
    if said.startswith("where"):
        return PLACES
    if "how big" in said or "small or large" in said:
        return SIZES
    return tuple(SHAPES) if any(place in said for place in PLACES) else ()


def like(final: str) -> list[str]:
    """List final answers of the same kind."""
    if final.isdigit():
        n = int(final)
        return [str(m) for m in range(max(0, n - 3), n + 4)]
    return list(next(words for words in (("yes", "no"), COLOURS, SHAPES) if final in words))


def options(rng: random.Random, one: Asked, most: int = 4, also: str | None = None) -> tuple[dict, str] | None:
    """Choose up to `most` options: ({letter: text}, the right letter); None where none is wrong for certain.

    also: a wrong option that must be among them.
    """
    chosen = [one.right]
    wrong = list(dict.fromkeys(one.wrong))
    rng.shuffle(wrong)
    for text in ([also] if also else []) + wrong:
        if len(chosen) < most and apart(text, one.sentence) and all(apart(text, other) for other in chosen):
            chosen.append(text)
    if len(chosen) < 2 or also and also not in chosen:
        return None
    if any(text.upper() in MISSING for text in chosen):
        return None
    rng.shuffle(chosen)
    letters = dict(zip("ABCDEFGH", chosen))
    return letters, next(letter for letter, text in letters.items() if text == one.right)


def apart(text: str, other: str) -> bool:
    """Tell whether neither text contains the other, whatever the case."""
    return text.lower() not in other.lower() and other.lower() not in text.lower()
