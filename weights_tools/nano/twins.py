"""A picture and its twin, in which one thing is changed, and two questions about both: yes here, no there.

    rng, sort -> twins() -> (scene, its twin), two questions, each with whether it is so in the one and in the other

Who answers without looking, or looks at half of it, has one of the two pictures wrong.
"""
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from weights_tools.nano import draw, world
from weights_tools.nano.draw import COLOURS, SHAPES, Scene, Style, Thing
from weights_tools.nano.world import a


@dataclass(frozen=True)
class Twins:
    """Two pictures, and questions about them: ((question, yes about the first, yes about the second), ...)."""
    scenes: tuple[Scene, Scene]
    questions: tuple[tuple[str, bool, bool], ...]


def twins(rng: random.Random, sort: str) -> Twins:
    """Make one pair of a sort (a key of SORTS)."""
    while True:
        if sort == "text":
            return texts(rng)
        scene = world.shapes_scene(rng, Style(world.TRAINED), least=2)
        things = world.unique(scene.shapes)
        if things:
            return SORTS[sort](rng, scene, rng.choice(things))


def either(scene: Scene, twin: Scene, first: str, second: str) -> Twins:
    """Ask what is so in the first picture alone, then what is so in the second alone."""
    return Twins((scene, twin), ((first, True, False), (second, False, True)))


def presence(rng: random.Random, scene: Scene, thing: Thing) -> Twins:
    """Another shape lies in its place."""
    new = rng.choice([kind for kind in SHAPES if kind not in [t.kind for t in scene.shapes]])
    twin = scene.without(thing).with_(replace(thing, kind=new))
    return either(scene, twin, f"Is there {a(thing.kind)}?", f"Is there {a(new)}?")


def recoloured(rng: random.Random, scene: Scene, thing: Thing) -> tuple[Scene, str]:
    new = rng.choice([colour for colour in COLOURS if colour != thing.colour])
    return scene.without(thing).with_(replace(thing, colour=new)), new


def pair(rng: random.Random, scene: Scene, thing: Thing) -> Twins:
    twin, new = recoloured(rng, scene, thing)
    return either(scene, twin, *(f"Is there {a(colour)} {thing.kind}?" for colour in (thing.colour, new)))


def colour(rng: random.Random, scene: Scene, thing: Thing) -> Twins:
    twin, new = recoloured(rng, scene, thing)
    return either(scene, twin, f"Is the {thing.kind} {thing.colour}?", f"Is the {thing.kind} {new}?")


def place(rng: random.Random, scene: Scene, thing: Thing) -> Twins:
    taken = [(t.row, t.column) for t in scene.shapes]
    row, column = next(cell for cell in draw.cells(rng, 9) if cell not in taken)
    moved = replace(thing, row=row, column=column)
    return either(scene, scene.without(thing).with_(moved),
                  f"Is the {thing.kind} {world.place(thing)}?", f"Is the {thing.kind} {world.place(moved)}?")


def count(rng: random.Random, scene: Scene, thing: Thing) -> Twins:
    """It is not there any more."""
    n = len(scene.shapes)
    return either(scene, scene.without(thing), *(
        "Is there one shape?" if m == 1 else f"Are there {world.NUMBERS[m]} shapes?" for m in (n, n - 1)))


def premise(rng: random.Random, scene: Scene, thing: Thing) -> Twins:
    """It is not there any more, and is asked about as if it were."""
    return Twins((scene, scene.without(thing)), ((f"Is the {thing.kind} {thing.colour}?", True, False),
                                                 (f"Is there {a(thing.kind)}?", True, False)))


def texts(rng: random.Random) -> Twins:
    """Another text of the same length stands there."""
    style = Style(world.TRAINED)
    empty = Scene((), **draw.geometry(rng, style))
    thing = draw.row_text(rng, style, empty, rng.randrange(3))
    new = next(text for text in iter(lambda: world.near(rng, thing), None) if len(text) == len(thing.text))
    twin = replace(draw.row_text(rng, style, empty, thing.row, thing.kind, new), colour=thing.colour)
    return either(empty.with_(thing), empty.with_(twin), f'Does it say "{thing.text}"?', f'Does it say "{new}"?')


SORTS: dict[str, Callable] = {"presence": presence, "pair": pair, "colour": colour, "place": place, "count": count,
                              "premise": premise, "text": texts}
