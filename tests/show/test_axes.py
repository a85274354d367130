"""Numbers along axes are round and short; no words of a drawing lie over others or beyond its edge."""
import itertools
import math
import random

import pytest
import torch
from drawings import TIGER, boxes, faults, parts, words

from minivl import show
from minivl.show import axes

LONG = "a rather long name of something"


def is_round(v):
    """1, 2, 5 times a power of ten divide the steps."""
    first = v / 10 ** math.floor(math.log10(v) + 1e-9)
    return min(abs(first - n) for n in (1, 2, 5, 10)) < 1e-6


def test_round_numbers_around_any_range():
    rng = random.Random(0)
    for _ in range(300):
        low = rng.uniform(-1, 1) * 10 ** rng.uniform(-6, 5)
        high = low + 10 ** rng.uniform(-6, 5) + abs(low) * 1e-3
        outer = axes.around(low, high)
        inner = axes.rounds(low, high)
        tiny = 1e-6 * (high - low)
        assert outer[0] <= low + tiny and outer[-1] >= high - tiny and 2 <= len(outer) <= 8
        assert all(low - tiny <= v <= high + tiny for v in inner) and 1 <= len(inner) <= 6
        steps = [b - a for a, b in itertools.pairwise(outer)]
        assert max(steps) - min(steps) < 1e-6 * max(steps) and is_round(steps[0])
        assert len({axes.short(v, 6) for v in outer}) == len(outer)         # told apart
    assert axes.around(-3.13, 3.1) == [-4, -2, 0, 2, 4] and axes.around(0, 95) == [0, 20, 40, 60, 80, 100]
    assert axes.around(0, 3, whole=True) == [0, 1, 2, 3] and axes.around(5, 5)[0] == 0
    for _ in range(100):
        low = 10 ** rng.uniform(-12, 3)
        high = low * 10 ** rng.uniform(0, 12)
        marks = axes.around_log(low, high)
        assert marks[0] <= low * 1.001 and marks[-1] >= high * 0.999 and 2 <= len(marks) <= 7
        assert all(map(is_round, marks)) and marks == sorted(set(marks))


@pytest.mark.parametrize("value, said", [
    (3328.0, "3328"), (0.28913, "0.2891"), (4.936e-05, "4.9e-5"), (-0.0, "0"), (0.0, "0"), (12345.6, "12346"),
    (2e-05, "2e-5"), (1e6, "1e6"), (-1.5, "-1.5"), (0.9998, "0.9998"), (1.96e-07, "2e-7"), (9.99e-5, "1e-4"),
    (1e-4, "1e-4"), (1.1e-4, "0.00011")])
def test_short_numbers(value, said):
    assert axes.short(value) == said


def tensor(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


DRAWINGS = {
    "bars": lambda: show.bars([0.99984, 4.936e-5, 0], ["x", LONG, "W" * 12], title=LONG, unit="probability"),
    "bars below 0": lambda: show.bars([-3, 2, -0.001], ["x", "y", LONG], unit="MB", width=100),
    "series": lambda: show.bars({"before": [95, 100, 0], LONG: [40, 25.1234, 1e-5]}, ["colour", LONG, "x"],
                                title=LONG * 3, unit="%"),
    "narrow series": lambda: show.bars({LONG: [1], LONG + "!": [2], "c": [3]}, ["x"], unit="of length", width=120),
    "curve": lambda: show.curve({LONG: [0.4071, 0.6011, 0.5], "b": [0.5, 0.51, 0.5]}, title=LONG * 3, x=LONG, y=LONG),
    "curve, large": lambda: show.curve({"a": [(123456, 1.234e9), (987654, 7e9)]}, x="tokens", y="FLOP", width=300),
    "curve, log": lambda: show.curve({"a": [1e-10, 3.7], "b": [1e-10, 3.7]}, log=True, title="t", x="step", y="%"),
    "curve of names": lambda: show.curve({"error": range(40)}, x="stage", height=460,
                                         ticks=[f"{LONG} {i}" for i in range(40)]),
    "curve, no names of axes": lambda: show.curve({"a": [5.0]}),
    "heat": lambda: show.heat(tensor(24, 24), "i", "o", title=f"W wrong - W: {LONG}", cell=8),
    "heat, wide": lambda: show.heat(tensor(3, 40).abs(), "group", "output column", title="s", cell=10),
    "heat, many": lambda: show.heat(tensor(80, 300) * 1e-7, "row", "column"),
    "heat, names": lambda: show.heat(tensor(9, 9), "who looks", "at whom", row_names=[f"{LONG} {i}" for i in range(9)],
                                     column_names=[f"{LONG} {i}" for i in range(9)], cell=22, title="t"),
    "heat, digits": lambda: show.heat(tensor(4, 8), "visual token", "channel", row_names=range(4), numbers=True,
                                      column_names=range(8), cell=44, title="4 tokens of 8 channels"),
    "heat, close names": lambda: show.heat(tensor(40, 40), row_names=[f"n{i}" for i in range(40)],
                                           column_names=[f"name {i}" for i in range(40)], cell=7),
    "heat, numbers": lambda: show.heat(tensor(4, 4) * torch.tensor([1, 1e-3, 1e-6, 1e-10]), numbers=True, cell=30),
    "heat, one": lambda: show.heat([[3.0]], "i", "o", title=LONG, numbers=True),
    "overlay": lambda: show.overlay(TIGER, tensor(4, 4).abs() * 1e-6, title=LONG * 2, width=150),
    "tiles": lambda: show.tiles(TIGER, max_num=4, width=120),
    "strip": lambda: show.strip([(LONG, (7, 3, 448, 448)), ("W" * 12, LONG), ("c", (1,))], here="c"),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_no_words_over_others_or_beyond_the_edge(name):
    assert not faults(DRAWINGS[name]())
    assert not faults(show.beside(DRAWINGS[name](), DRAWINGS[name]()))


def test_the_faults_are_seen():
    row = show.text(0, 12, "one") + show.text(10, 14, "two") + show.text(90, 14, "three")
    row += show.text(50, 40, "up", turn=-60)
    assert faults(show.Svg(row, 100, 50)) == ["'two' over 'one'"] + ["'three' beyond the edge"] * 2
    turned = show.text(20, 80, "who looks", turn=-60) + show.text(40, 80, "at whom", turn=-60)
    assert not faults(show.Svg(turned, 100, 90))       # their upright boxes would meet
    assert len(boxes(show.Svg(turned, 100, 90))) == 2


def test_axes_say_round_numbers():
    said = words(show.curve({"pair 0": [(k, math.sin(k) * 3.13) for k in range(40)]}, x="position", y="angle"))
    assert [w for w in said if w.lstrip("-").isdigit()] == ["-4", "-2", "0", "2", "4", *map(str, range(0, 40, 5))]
    said = words(show.curve({"loss": [8.4, 1.0, 0.32]}, log=True))
    assert {"0.2", "0.5", "1", "2", "5", "10"} <= set(said)
    said = words(show.heat(torch.rand(24, 24), "i", "o", cell=8))
    assert said.count("0") == 3 and said.count("5") == said.count("20") == 2      # down and along, the bar


def test_a_letter_stands_upright():
    """Turned, the i of i and o would be a dash."""
    for name, drawing in (("i", show.heat(torch.rand(2, 2), "i", "o")), ("y", show.curve({"a": [1, 2]}, y="y"))):
        assert [e for e in parts(drawing, "text") if e.text == name and "transform" not in e.attrib]
