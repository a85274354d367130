"""Choose what stands along an axis: round numbers, written shortly, far enough apart to be read.

    rounds(0.41, 0.6) -> 0.45, 0.5, 0.55, 0.6
"""
from __future__ import annotations

import math
from functools import lru_cache

from PIL import ImageFont

from minivl.show.png import printable

SMALL = 11      # letters along axes
BOLD = 12.3     # as wide as bold letters of 12
WIDER = 1.1     # fonts of browsers, beside Pillow's own


def breadth(words: object, size: float = 12) -> float:
    """Measure words in pixels of a drawing, with room for a browser's font."""
    return WIDER * _font(size).getlength("".join(map(printable, str(words))))


@lru_cache(16)
def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def short(value: float, digits: int = 4) -> str:
    """Write a number for a person: 3328, 0.2891, 4.9e-5. `digits`: that count, two fewer beside a power of ten."""
    if value == round(value) and abs(value) < 1e6:
        return f"{round(value)}"
    if 1e-4 < abs(value) < 1e6:
        return f"{value:.{max(digits, math.floor(math.log10(abs(value))) + 1)}g}"
    number, power = f"{value:.{max(0, digits - 3)}e}".split("e")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{number}e{int(power)}"


def step_of(low: float, high: float, most: int, *, whole: bool = False) -> float:
    """Find the smallest of 1, 2, 5, 10, 20, ... (and 0.5, 0.2, 0.1, ... unless `whole`) that steps from `low` to `high`
    with at most `most` multiples of it on the way."""
    power = math.floor(math.log10((high - low) / most)) if high > low else 0
    for exponent in range(max(0, power) if whole else power, power + 400):
        for first in (1, 2, 5):
            step = first * 10.0 ** exponent
            if len(_multiples(low, high, step)) <= most:
                return step
    return high - low


def rounds(low: float, high: float, most: int = 6, *, whole: bool = False) -> list[float]:
    """Choose round numbers from `low` to `high`, at most `most`."""
    return _multiples(low, high, step_of(low, high, most, whole=whole))


def around(low: float, high: float, most: int = 6, *, whole: bool = False) -> list[float]:
    """Choose round numbers, the first at most `low`, the last at least `high`; from 0 if the two are the same."""
    if low == high:
        low, high = min(low, 0.0), max(low, 0.0) or 1.0
    step = step_of(low, high, most, whole=whole)
    return _multiples(step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9), step)


def around_log(low: float, high: float, most: int = 7) -> list[float]:
    """As `around`, for a logarithmic axis: 1, 2, 5, 10, 20, ..., or powers of ten where those would be too many."""
    first = math.floor(math.log10(low))
    last = math.ceil(math.log10(high)) + 1
    marks = [m * 10.0 ** e for e in range(first, last + 1) for m in (1, 2, 5)]
    begin = max(i for i, mark in enumerate(marks) if mark <= low * (1 + 1e-9))
    end = min(i for i, mark in enumerate(marks) if mark >= high * (1 - 1e-9))
    chosen = marks[begin:max(end, begin + 1) + 1]
    apart = 1
    while len(chosen) > most:
        begin = math.floor(math.log10(low * (1 + 1e-9)) / apart)
        end = math.ceil(math.log10(high * (1 - 1e-9)) / apart)
        chosen = [10.0 ** (apart * n) for n in range(begin, end + 1)]
        apart += 1
    return chosen


def fitting(low: float, high: float, length: float, *, whole: bool = False) -> list[float]:
    """Choose as many round numbers as can be read along `length` pixels, at most 8."""
    for most in range(8, 1, -1):
        chosen = rounds(low, high, most, whole=whole)
        apart = length * step_of(low, high, most, whole=whole) / (high - low or 1.0)
        if max((breadth(short(v, 6), SMALL) for v in chosen), default=0) + 6 <= apart:
            break
    return chosen


def _multiples(low: float, high: float, step: float) -> list[float]:
    first = math.ceil(low / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, math.floor(high / step + 1e-9) + 1)]
