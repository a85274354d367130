"""Draw numbers by name as bars, numbers along an axis as curves."""
from __future__ import annotations

import math
from html import escape

from minivl.limits import InputError
from minivl.show.svg import FAINT, Svg, shade, text


def bars(values, names, *, title: str = "", unit: str = "", width: float = 520) -> Svg:
    """Numbers with their names, one bar each, the number at its end."""
    values, names = [float(v) for v in values], [str(n) for n in names]
    if len(values) != len(names) or not values:
        raise InputError(f"{len(values)} values and {len(names)} names; give one name for each value")
    low, high = min(0.0, *values), max(0.0, *values)
    label = 7 * max(len(n) for n in names) + 10
    ends = [f"{value:.4g}{' ' + unit if unit else ''}" for value in values]
    room, above = max(60.0, width - label - 12 - 6.5 * max(map(len, ends))), 26 if title else 6
    scale = room / (high - low or 1.0)
    zero = label - low * scale
    body = text(4, 16, title, weight="bold") if title else ""
    for i, (value, name) in enumerate(zip(values, names)):
        y = above + 20 * i
        x = zero + min(0.0, value) * scale
        body += text(label - 6, y + 13, name, anchor="end")
        body += (f'<rect x="{x:.1f}" y="{y + 2}" width="{max(0.5, abs(value) * scale):.1f}" height="15" fill="rgb{shade(math.copysign(1, value), 1)}">'
                 f'<title>{escape(name)}: {value:.5g} {escape(unit)}</title></rect>')
        body += text(zero + max(0.0, value) * scale + 5, y + 14, ends[i], size=11)
    return Svg(body, max(width, label + room + 12 + 6.5 * max(map(len, ends))), above + 20 * len(values) + 6)


def curve(series: dict, *, title: str = "", x: str = "", y: str = "", log: bool = False, width: float = 560, height: float = 260) -> Svg:
    """{name: [y, ...] or [(x, y), ...]} as lines, each with its own mark and its name at its end. `log`: a logarithmic y axis."""
    lines = {name: [(float(p[0]), float(p[1])) if isinstance(p, (tuple, list)) else (float(i), float(p)) for i, p in enumerate(points)]
             for name, points in series.items()}
    points = [p for line in lines.values() for p in line]
    if not points or not all(math.isfinite(v) for p in points for v in p):
        raise InputError("a curve needs finite numbers; leave out what is not")
    if log and min(b for _, b in points) <= 0:
        raise InputError("a logarithmic axis needs numbers above 0")
    at = (lambda v: math.log10(v)) if log else (lambda v: v)
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in ([a for a, _ in points], [at(b) for _, b in points]))
    left, top, right, bottom = 74, 30 if title else 12, 8 * max(len(n) for n in lines) + 16, 40

    def place(a, b):
        return (left + (width - left - right) * (a - x0) / (x1 - x0 or 1), top + (height - top - bottom) * (1 - (at(b) - y0) / (y1 - y0 or 1)))

    body = text(left, 18, title, weight="bold") if title else ""
    for i in range(5):
        value = y0 + (y1 - y0) * i / 4
        level = top + (height - top - bottom) * (1 - i / 4)
        body += f'<line x1="{left}" x2="{width - right}" y1="{level:.1f}" y2="{level:.1f}" stroke="{FAINT}" stroke-opacity="0.4"/>'
        body += text(left - 6, level + 4, f"{10 ** value if log else value:{'.2g' if log else '.4g'}}", anchor="end", size=11, colour=FAINT)
    for value in (x0, x1):
        body += text(place(value, 10 ** y0 if log else y0)[0], height - bottom + 16, f"{value:.4g}", anchor="middle", size=11, colour=FAINT)
    body += text((left + width - right) / 2, height - 8, x, anchor="middle", colour=FAINT)
    body += text(14, (top + height - bottom) / 2, y, anchor="middle", colour=FAINT, turn=-90)
    for n, (name, line) in enumerate(lines.items()):
        colour, dash = ("rgb(11,83,148)", "rgb(176,78,0)", "rgb(60,110,60)", "rgb(120,60,120)")[n % 4], ("", "6 4", "2 3", "8 3 2 3")[n % 4]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*p) for p in line))
        body += f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}"/>'
        for p in line if len(line) <= 60 else ():
            a, b = place(*p)
            body += f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="{colour}"><title>{escape(name)}: {p[0]:.4g}, {p[1]:.4g}</title></circle>'
        a, b = place(*line[-1])
        body += text(a + 7, b + 4, name, colour=colour)
    return Svg(body, width, height)
