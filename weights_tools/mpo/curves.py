"""Curves of a training: OUT/log.jsonl -> OUT/curves.svg."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from minivl import show
from minivl.limits import InputError, reading
from minivl.show.svg import Svg
from weights_tools.files import write_text

FILE = "curves.svg"
CHARTS = (("loss and its terms", ("loss", "preference", "quality", "generation", "kept")),
          ("rewards", ("chosen", "rejected", "margin", "delta")), ("pairs told apart", ("accuracy",)))
MOST = 120          # points of a curve; of more steps each is the mean of some


def read_log(folder: str | Path) -> list[dict]:
    """Read the lines of a training's log, one of each step: of a step done twice, after a kill, the last."""
    path = Path(folder) / "log.jsonl"
    with reading(path):
        lines = path.read_text(encoding="utf-8").splitlines()
    try:
        steps = {line["step"]: line for line in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no log of a training, a JSON object with a step in each line") from None
    return [steps[step] for step in sorted(steps)]


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbouring points until at most MOST are left."""
    size = max(1, -(-len(points) // MOST))
    parts = [points[i:i + size] for i in range(0, len(points), size)]
    return [tuple(sum(values) / len(part) for values in zip(*part)) for part in parts]


def curves(lines: Sequence[dict]) -> Svg:
    """Draw what the lines of a log say, step by step."""
    drawn = []
    for title, names in CHARTS:
        series = {name: smoothed([(line["step"], line[name]) for line in lines if name in line]) for name in names}
        drawn.append(show.curve({name: points for name, points in series.items() if points}, title=title, x="step"))
    return show.beside(*drawn)


def draw(folder: str | Path) -> Path:
    """Write a training's curves beside its log."""
    path = Path(folder) / FILE
    write_text(path, str(curves(read_log(folder))))
    return path
