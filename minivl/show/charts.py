"""Draw numbers: by name as bars, along an axis as curves."""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import cycle

from minivl.limits import InputError
from minivl.show.svg import FAINT, INK, Svg, shade, text

STYLES = (("rgb(11,83,148)", ""), ("rgb(176,78,0)", "6 4"), ("rgb(60,110,60)", "2 3"), ("rgb(120,60,120)", "8 3 2 3"))
MOST_DOTS = 60      # of one curve; where there are more, only its line is drawn
MOST_TICKS = 32     # names along an axis
LINE = 14           # pixels from one line of words to the next


def bars(values: Iterable, names: Iterable, *, title: str = "", unit: str = "", width: float = 520) -> Svg:
    """Draw numbers with their names: one bar each, the number at its end."""
    values = [float(v) for v in values]
    names = [str(n) for n in names]
    if len(values) != len(names) or not values:
        raise InputError(f"{len(values)} values and {len(names)} names; give one name for each value")
    low = min(0.0, *values)
    high = max(0.0, *values)
    label = 7 * max(len(n) for n in names) + 10
    ends = [f"{value:.4g}{' ' + unit if unit else ''}" for value in values]
    room = max(60.0, width - label - 12 - 6.5 * max(map(len, ends)))
    above = 26 if title else 6
    scale = room / (high - low or 1.0)
    zero = label - low * scale
    body = text(4, 16, title, weight="bold") if title else ""
    for i, (value, name) in enumerate(zip(values, names)):
        y = above + 20 * i
        x = zero + min(0.0, value) * scale
        body += text(label - 6, y + 13, name, anchor="end")
        body += (f'<rect x="{x:.1f}" y="{y + 2}" width="{max(0.5, abs(value) * scale):.1f}" height="15" '
                 f'fill="rgb{shade(math.copysign(1, value), 1)}">'
                 f'<title>{escape(name)}: {value:.5g} {escape(unit)}</title></rect>')
        body += text(zero + max(0.0, value) * scale + 5, y + 14, ends[i], size=11)
    about = f"{title or 'bars'}: " + ", ".join(f"{name} {end}" for name, end in zip(names, ends))
    return Svg(body, max(width, label + room + 12 + 6.5 * max(map(len, ends))), above + 20 * len(values) + 6, about)


def curve(series: dict[str, Sequence], *, title: str = "", x: str = "", y: str = "", log: bool = False,
          ticks: Sequence[str] = (), crosses: Iterable[tuple[float, float]] = (), width: float = 560,
          height: float = 260) -> Svg:
    """Draw {name: [y, ...] or [(x, y), ...]} as lines, each with its own dashes and its name at its end.

    `x`, `y`: what the axes count. `log`: a logarithmic y axis. `ticks`: what x = 0, 1, 2, ... are called, in place of
    numbers. `crosses`: points (x, y) to mark.
    """
    lines = {name: [_point(i, p) for i, p in enumerate(points)] for name, points in series.items()}
    points = [p for line in lines.values() for p in line]
    if not points or not all(math.isfinite(v) for p in points for v in p):
        raise InputError("a curve needs finite numbers; leave out what is not")
    if log and min(b for _, b in points) <= 0:
        raise InputError("a logarithmic axis needs numbers above 0")
    x0 = min(a for a, _ in points)
    x1 = max(a for a, _ in points)
    y0 = min(math.log10(b) if log else b for _, b in points)
    y1 = max(math.log10(b) if log else b for _, b in points)
    left = 74
    right = width - 8 * max(len(n) for n in lines) - 16
    top = 30 if title else 12
    bottom = height - 40 - max((5 * len(name) for name in ticks), default=0)

    def across(a):
        return left + (right - left) * (a - x0) / (x1 - x0 or 1)

    def down(b):
        return top + (bottom - top) * (1 - ((math.log10(b) if log else b) - y0) / (y1 - y0 or 1))

    body = text(left, 18, title, weight="bold") if title else ""
    for i in range(5):
        value = y0 + (y1 - y0) * i / 4
        level = top + (bottom - top) * (1 - i / 4)
        shown = f"{10 ** value:.2g}" if log else f"{value:.4g}"
        body += (f'<line x1="{left}" x2="{right}" y1="{level:.1f}" y2="{level:.1f}" stroke="{FAINT}" '
                 f'stroke-opacity="0.4"/>')
        body += text(left - 6, level + 4, shown, anchor="end", size=11, colour=FAINT)
    for i in range(0, len(ticks), len(ticks) // MOST_TICKS + 1):
        body += text(across(i) - 3, bottom + 14, ticks[i], size=11, colour=FAINT, turn=60)
    for value in () if ticks else (x0, x1):
        body += text(across(value), bottom + 16, f"{value:.4g}", anchor="middle", size=11, colour=FAINT)
    body += text((left + right) / 2, height - 8, x, anchor="middle", colour=FAINT)
    body += text(14, (top + bottom) / 2, y, anchor="middle", colour=FAINT, turn=-90)
    for (name, line), (colour, dash) in zip(lines.items(), cycle(STYLES)):
        path = " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in line)
        body += (f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" '
                 f'stroke-dasharray="{dash}"/>')
        for a, b in line if ticks or len(line) <= MOST_DOTS else ():
            said = f"{ticks[int(a)]}: {name} {b:.4g}" if ticks else f"{name}: {a:.4g}, {b:.4g}"
            body += (f'<circle cx="{across(a):.1f}" cy="{down(b):.1f}" r="2.6" fill="{colour}">'
                     f'<title>{escape(said)}</title></circle>')
    for a, b in crosses:
        body += (f'<path d="M{across(a) - 5:.1f} {down(b) - 5:.1f} l10 10 m0 -10 l-10 10" stroke="{INK}" '
                 f'stroke-width="2.5"/>')
    ends = [(across(line[-1][0]), down(line[-1][1])) for line in lines.values()]
    levels = _apart([level for _, level in ends], top, bottom)
    for name, (end, level), lies, (colour, _) in zip(lines, ends, levels, cycle(STYLES)):
        if abs(lies - level) > 1:       # moved: a short stroke says whose name it is
            body += f'<path d="M{end:.1f} {level:.1f} L{end + 6:.1f} {lies:.1f}" fill="none" stroke="{colour}"/>'
        body += text(end + 7, lies + 4, name, colour=colour)
    ranges = ", ".join(f"{name} from {line[0][1]:.4g} to {line[-1][1]:.4g}" for name, line in lines.items())
    return Svg(body, width, height, f"{title or ' by '.join(filter(None, (y, x))) or 'curves'}: {ranges}")


def _apart(levels: Sequence[float], top: float, bottom: float) -> list[float]:
    """Move names that would overlap just far enough apart, between `top` and `bottom`; those that touch stay centred
    on where they belong."""
    order = sorted(range(len(levels)), key=lambda i: levels[i])
    blocks = []     # of names that touch: [sum of where each would have the first of all names stand, how many]
    for rank, i in enumerate(order):
        blocks.append([levels[i] - LINE * rank, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    firsts = [total / count for total, count in blocks for _ in range(count)]
    moved = [0.0] * len(levels)
    for rank, (i, first) in enumerate(zip(order, firsts)):
        moved[i] = min(max(first, top), bottom - LINE * (len(levels) - 1)) + LINE * rank
    return moved


def _point(i: int, p: object) -> tuple[float, float]:
    """Read one point of a curve: (x, y), or y at x = i."""
    return (float(p[0]), float(p[1])) if isinstance(p, (tuple, list)) else (float(i), float(p))
