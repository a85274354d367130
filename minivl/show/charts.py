"""Draw numbers: by name as bars, along an axis as curves."""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import cycle

from minivl.limits import InputError
from minivl.show.axes import BOLD, SMALL, around, around_log, breadth, fitting, short
from minivl.show.svg import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, Svg, beside_axis, shade, text, tick

STYLES = ((BLUE, ""), (ORANGE, "6 4"), (GREEN, "2 3"), (PURPLE, "8 3 2 3"))
MOST_DOTS = 60      # of one curve; where there are more, only its line is drawn
SHORT_UNIT = 3      # letters of a unit that each bar repeats
LINE = 14           # pixels from one line of words to the next


def bars(values: Iterable | dict[str, Iterable], names: Iterable, *, title: str = "", unit: str = "",
         width: float = 520) -> Svg:
    """Draw numbers with their names: one bar each, the number at its end.

    `values`: a number for each name, or several in series, {"before": [...], "after": [...]}: those of one name below
    each other, a colour for each series, explained above. A `unit` of some letters is written once, below the bars.
    """
    series = values if isinstance(values, dict) else {"": values}
    series = {name: [float(v) for v in of_series] for name, of_series in series.items()}
    names = [str(n) for n in names]
    for name, of_series in series.items():
        if len(of_series) != len(names) or not names:
            where = f" in {name!r}" if name else ""
            raise InputError(f"{len(of_series)} values and {len(names)} names{where}; give one name for each value")
    if not 1 <= len(series) <= len(STYLES):
        raise InputError(f"bars have 1 to {len(STYLES)} colours, these are {len(series)} series; draw them apart")
    numbers = [v for of_series in series.values() for v in of_series]
    if not all(map(math.isfinite, numbers)):
        raise InputError("bars need finite numbers; leave out what is not")
    low = min(0.0, *numbers)
    high = max(0.0, *numbers)
    after = f" {unit}" if unit else ""
    at_end = after if len(unit) <= SHORT_UNIT else ""
    label = max(map(breadth, names)) + 14
    end = max(breadth(short(v) + at_end, SMALL) for v in numbers)
    room = max(60.0, width - label - 12 - end)
    scale = room / (high - low or 1.0)
    zero = label - low * scale
    body = text(4, 16, title, weight="bold") if title else ""
    above = 26 if title else 6
    several = len(series) > 1
    legend = label
    if several:
        for name, (colour, _) in zip(series, STYLES):
            body += f'<rect x="{legend:.1f}" y="{above}" width="11" height="11" fill="{colour}"/>'
            body += text(legend + 16, above + 10, name)
            legend += 16 + breadth(name) + 18
        above += 22
    thick = 13 if several else 15
    group = len(series) * (thick + 1) + (10 if several else 4)
    for i, name in enumerate(names):
        top = above + group * i + 2
        body += text(label - 6, top + (group - (10 if several else 4)) / 2 + 3, name, anchor="end")
        for k, (of_name, of_series) in enumerate(series.items()):
            value = of_series[i]
            y = top + k * (thick + 1)
            x = zero + min(0.0, value) * scale
            colour = STYLES[k][0] if several else f"rgb{shade(math.copysign(1, value), 1)}"
            said = f"{name}: {of_name + ' ' if several else ''}{value:.5g}{after}"
            body += (f'<rect x="{x:.1f}" y="{y}" width="{max(0.5, abs(value) * scale):.1f}" height="{thick}" '
                     f'fill="{colour}"><title>{escape(said)}</title></rect>')
            body += text(zero + max(0.0, value) * scale + 5, y + thick - 3, short(value) + at_end, size=SMALL)
    height = above + group * len(names) + 6
    if unit and not at_end:
        body += text(label, height + 8, unit, size=SMALL, colour=FAINT)
        height += 16
    full = max(width, label + room + 12 + end, 8 + breadth(title, BOLD), legend, label + breadth(unit, SMALL))
    about = "; ".join((f"{of_name}: " if several else "") +
                      ", ".join(f"{name} {short(value)}{after}" for name, value in zip(names, of_series))
                      for of_name, of_series in series.items())
    return Svg(body, full, height, f"{title or 'bars'}: {about}")


def curve(series: dict[str, Sequence], *, title: str = "", x: str = "", y: str = "", log: bool = False,
          ticks: Sequence[str] = (), crosses: Iterable[tuple[float, float]] = (), width: float = 560,
          height: float = 260) -> Svg:
    """Draw {name: [y, ...] or [(x, y), ...]} as lines, each with its own dashes and its name at its end; round numbers
    along the axes.

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
    y0 = min(b for _, b in points)
    y1 = max(b for _, b in points)
    levels = around_log(y0, y1) if log else around(y0, y1, whole=all(b == round(b) for _, b in points))
    y0, y1 = (math.log10(v) if log else v for v in (levels[0], levels[-1]))
    shown = [short(v, 6) for v in levels]
    ticks = [str(t) for t in ticks]
    turned = max((breadth(t, SMALL) for t in ticks), default=0)
    left = 34 + max(breadth(v, SMALL) for v in shown)
    right = width - max(16 + max(map(breadth, lines)), 14 + turned / 2)
    top = 34 if title else 14
    bottom = height - 40 - 0.87 * turned

    def across(a):
        return left + (right - left) * (a - x0) / (x1 - x0 or 1)

    def down(b):
        return top + (bottom - top) * (1 - ((math.log10(b) if log else b) - y0) / (y1 - y0))

    start = max(4, min(left, width - 8 - breadth(title, BOLD)))
    body = text(start, 18, title, weight="bold") if title else ""
    for value, said in zip(levels, shown):
        body += (f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{down(value):.1f}" y2="{down(value):.1f}" '
                 f'stroke="{FAINT}" stroke-opacity="0.4"/>')
        body += text(left - 6, down(value) + 4, said, anchor="end", size=SMALL, colour=FAINT)
    apart = (right - left) / max(1, len(ticks) - 1)
    for i in range(0, len(ticks), math.ceil(LINE / apart)):
        body += text(across(i) - 3, bottom + 14, ticks[i], size=SMALL, colour=FAINT, turn=60)
    whole = all(a == round(a) for a, _ in points)
    for value in () if ticks else fitting(x0, x1, right - left, whole=whole):
        body += tick(across(value), bottom)
        body += text(across(value), bottom + 16, short(value, 6), anchor="middle", size=SMALL, colour=FAINT)
    body += text((left + right) / 2, height - 6, x, anchor="middle", colour=FAINT) if x else ""
    body += beside_axis(14, (top + bottom) / 2, y)
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
    heights = _apart([level for _, level in ends], top, bottom)
    for name, (end, level), lies, (colour, _) in zip(lines, ends, heights, cycle(STYLES)):
        if abs(lies - level) > 1:       # moved: a short stroke says whose name it is
            body += f'<path d="M{end:.1f} {level:.1f} L{end + 6:.1f} {lies:.1f}" fill="none" stroke="{colour}"/>'
        body += text(end + 7, lies + 4, name, colour=colour)
    ranges = ", ".join(f"{name} from {line[0][1]:.4g} to {line[-1][1]:.4g}" for name, line in lines.items())
    return Svg(body, max(width, start + breadth(title, BOLD) + 8), height,
               f"{title or ' by '.join(filter(None, (y, x))) or 'curves'}: {ranges}")


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
