"""Draw what a decoder does as geometry: arrows that turn, heads that share, attention in a plane, a stream that grows.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from minivl.limits import InputError
from minivl.show.maps import matrix
from minivl.show.svg import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, Svg, text

TURN = 2 * math.pi


def dials(angles: torch.Tensor | Sequence, row_names: Sequence, column_names: Sequence, *, rows: str = "",
          columns: str = "", title: str = "", size: float = 62) -> Svg:
    """Draw angles [R, C] in radians as dials: an arrow that started to the right, and how far it has turned.

    An angle of more than one turn fills its ring; the words below it count. `size`: the width of a dial in pixels.
    """
    m = matrix(angles)
    if m.shape != (len(row_names), len(column_names)):
        raise InputError(f"{list(m.shape)} angles, {len(row_names)} names of rows and {len(column_names)} of columns; "
                         "give one name for each row and each column")
    left = 14 + 7 * max(len(str(name)) for name in row_names)
    above = (24 if title else 4) + 34
    step = size + 20
    body = text(4, 17, title, weight="bold") if title else ""
    body += text(left, above - 22, columns, colour=FAINT) + text(4, above - 22, rows, colour=FAINT)
    for c, name in enumerate(column_names):
        body += text(left + (c + 0.5) * size, above - 5, name, anchor="middle", size=11)
    for r, name in enumerate(row_names):
        body += text(left - 8, above + r * step + size / 2 + 4, name, anchor="end", size=11)
        for c, angle in enumerate(m[r].tolist()):
            body += _dial(left + (c + 0.5) * size, above + r * step + size / 2, size / 2 - 5, angle)
    bottom = above + step * len(m) + 10
    body += text(4, bottom, "blue arrow: where it points; orange: how far it has turned, from the dashed line on",
                 size=11, colour=FAINT)
    said = "; ".join(f"{name}: " + ", ".join(map(_turned, row)) for name, row in zip(row_names, m.tolist()))
    about = f"{title or 'dials'}, {columns or 'columns'} {', '.join(map(str, column_names))}: {said}"
    return Svg(body, max(left + size * m.shape[1] + 8, 8 + 7.2 * len(title), 450), bottom + 8, about)


def _dial(x: float, y: float, r: float, angle: float) -> str:
    """Draw one dial round (x, y): the way it went as an orange arc, where it is as a blue arrow."""
    way = min(max(angle, -TURN), TURN)
    body = _line(_arc(x, y, r, 0, TURN), FAINT, 0.8)
    body += f'<line x1="{x:.1f}" x2="{x + r:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{FAINT}" stroke-dasharray="3 3"/>'
    if way:
        body += _line(_arc(x, y, r, 0, way), ORANGE, 3.5)
    body += arrow(x, y, x + 0.84 * r * math.cos(angle), y - 0.84 * r * math.sin(angle), BLUE, 2.4)
    return body + text(x, y + r + 15, _turned(angle), anchor="middle", size=11)


def _turned(angle: float) -> str:
    """Write how far something has turned: 57°, or 1.6 turns."""
    degrees = math.degrees(angle)
    if abs(degrees) >= 360:
        return f"{degrees / 360:,.0f} turns" if abs(degrees) >= 36000 else f"{degrees / 360:.3g} turns"
    return f"{degrees:.2g}°" if abs(degrees) < 10 else f"{degrees:.0f}°"


def _arc(x: float, y: float, r: float, start: float, end: float) -> list[tuple[float, float]]:
    """List points of an arc, counter-clockwise where `end` is the larger angle."""
    n = max(2, math.ceil(abs(end - start) * 10))
    return [(x + r * math.cos(a), y - r * math.sin(a)) for a in (start + (end - start) * i / n for i in range(n + 1))]


def _line(points: Iterable[tuple[float, float]], colour: str, width: float, dash: str = "") -> str:
    """Draw a line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'


def arrow(x: float, y: float, to_x: float, to_y: float, colour: str = INK, width: float = 1.5) -> str:
    """Draw an arrow from (x, y); one too short for its head is a dot."""
    length = math.hypot(to_x - x, to_y - y)
    if length < 3:
        return f'<circle cx="{to_x:.1f}" cy="{to_y:.1f}" r="{width:.1f}" fill="{colour}"/>'
    head = min(3.2 * width + 2, length / 2)
    way = math.atan2(to_y - y, to_x - x)
    wings = [(to_x - head * math.cos(way + turn), to_y - head * math.sin(way + turn)) for turn in (0.5, -0.5)]
    return _line([(x, y), (to_x, to_y)], colour, width) + _line([wings[0], (to_x, to_y), wings[1]], colour, width)


def sharing(query_heads: int, kv_heads: int, *, title: str = "") -> Svg:
    """Draw which kv head each query head reads: head h reads h // G, G = query heads / kv heads."""
    if kv_heads < 1 or query_heads % kv_heads:
        raise InputError(f"{kv_heads} kv heads cannot share {query_heads} query heads evenly; give a divisor")
    G = query_heads // kv_heads
    step = min(56.0, 800 / query_heads)
    r = min(16.0, step / 2 - 1)
    left = 20.0
    top = 62 if title else 40
    low = top + 110
    body = text(4, 17, title, weight="bold") if title else ""
    body += text(4, top - 24, f"{query_heads} query heads q", colour=FAINT)
    for h in range(query_heads):
        x = left + (h + 0.5) * step
        colour = (BLUE, ORANGE)[h // G % 2]
        under = left + (h // G * G + G / 2) * step
        body += _line([(x, top + r), (under, low - 14)], colour, 2)
        body += f'<circle cx="{x:.1f}" cy="{top}" r="{r:.1f}" fill="{colour}"/>'
        body += text(x, top + 4, h, anchor="middle", size=11, colour="white") if step >= 24 else ""
    for g in range(kv_heads):
        x = left + (g + 0.5) * G * step
        half = min(G * step / 2 - 3, 34)
        colour = (BLUE, ORANGE)[g % 2]
        body += (f'<rect x="{x - half:.1f}" y="{low - 14}" width="{2 * half:.1f}" height="28" rx="4" fill="white" '
                 f'stroke="{colour}" stroke-width="2"/>')
        body += text(x, low + 4, f"k, v {g}" if half > 20 else g, anchor="middle", size=11)
    shared = f"each is read by {G}" if G > 1 else "each is read by one"
    body += text(4, low + 34, f"{kv_heads} heads of keys and values, {shared}; only these are kept in the cache",
                 colour=FAINT)
    reads = ", ".join(f"{g * G} to {g * G + G - 1} read kv head {g}" if G > 1 else f"{g} reads kv head {g}"
                      for g in range(kv_heads))
    return Svg(body, max(left * 2 + step * query_heads, 440), low + 44, f"{title or 'heads'}: query heads {reads}")


def look(words: Sequence[str], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, title: str = "") -> Svg:
    """Draw attention of the last token in two dimensions: q [2], k and v [n, 2] of n words.

    A plane with the query and the keys, a table with each score, its e to the power and its weight, a plane with the
    values and their weighted mean.
    """
    k, v = matrix(k), matrix(v)
    if k.shape != (len(words), 2) or v.shape != k.shape or q.shape != (2,):
        raise InputError(f"{len(words)} words need keys and values [{len(words)}, 2] and a query [2]; got "
                         f"{list(k.shape)}, {list(v.shape)} and {list(q.shape)}")
    q = q.float().cpu()
    scores = k @ q / math.sqrt(2)                                                       # (n)
    weights = scores.softmax(0)
    mean = weights @ v                                                                  # (2)
    size = 220.0
    above = 48 if title else 24
    body = text(4, 17, title, weight="bold") if title else ""
    keys = [(word, at, BLUE, 2.0) for word, at in zip(words, k.tolist())]
    body += text(4, above - 8, f"keys (blue), query of \"{words[-1]}\" (orange)", size=11, colour=FAINT)
    body += _plane(4, above, size, [*keys, ("q", q.tolist(), ORANGE, 3.5)])
    table = size + 24
    places = [table + 80, table + 132, table + 180, table + 226]
    for at, name in zip(places, ("q · k", "/ root 2", "e^", "share")):
        body += text(at, above - 8, name, anchor="end", size=11, colour=FAINT)
    row = size / (len(words) + 1)
    for i, word in enumerate(words):
        y = above + row * (i + 0.6)
        body += text(table, y, word, weight="bold")
        numbers = f"{float(k[i] @ q):.2f}", f"{float(scores[i]):.2f}", f"{math.exp(scores[i]):.2f}", \
            f"{float(weights[i]):.0%}"
        for at, number in zip(places, numbers):
            body += text(at, y, number, anchor="end")
        body += (f'<rect x="{places[3] + 8:.1f}" y="{y - 10:.1f}" width="{max(0.5, 60 * float(weights[i])):.1f}" '
                 f'height="12" fill="{BLUE}"/>')
    y = above + row * (len(words) + 0.6)
    body += f'<line x1="{table}" x2="{places[3]}" y1="{y - 16:.1f}" y2="{y - 16:.1f}" stroke="{FAINT}"/>'
    body += text(table, y, "sum", colour=FAINT)
    body += text(places[2], y, f"{float(scores.exp().sum()):.2f}", anchor="end") + \
        text(places[3], y, "100%", anchor="end")
    right = places[3] + 82
    values = [(word, at, BLUE, 1 + 4 * w) for word, at, w in zip(words, v.tolist(), weights.tolist())]
    body += text(right, above - 8, "values (blue, thick: large share), mean (orange)", size=11, colour=FAINT)
    body += _plane(right, above, size, [*values, ("y", mean.tolist(), ORANGE, 3.5)])
    shares = ", ".join(f"{word} {w:.0%}" for word, w in zip(words, weights.tolist()))
    return Svg(body, right + size + 44, above + size + 8,
               f"{title or 'attention in a plane'}: shares {shares}; weighted mean ({mean[0]:.2f}, {mean[1]:.2f})")


def _plane(x: float, y: float, size: float, arrows: Sequence[tuple]) -> str:
    """Draw arrows [(name, (a, b), colour, width), ...] from the middle of a square plane with its corner at (x, y)."""
    reach = 1.4 * max(max(abs(a), abs(b)) for _, (a, b), _, _ in arrows) or 1.0
    cx, cy, scale = x + size / 2, y + size / 2, size / 2 / reach
    body = f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="none" stroke="{FAINT}"/>'
    for n in range(-int(reach), int(reach) + 1):
        faint = f'stroke="{FAINT}" stroke-opacity="{0.8 if n == 0 else 0.2}"'
        body += f'<line x1="{cx + n * scale:.1f}" x2="{cx + n * scale:.1f}" y1="{y}" y2="{y + size}" {faint}/>'
        body += f'<line x1="{x}" x2="{x + size}" y1="{cy + n * scale:.1f}" y2="{cy + n * scale:.1f}" {faint}/>'
        body += text(cx + n * scale + 2, cy + 11, n, size=9, colour=FAINT) if n else ""
    for name, (a, b), colour, width in arrows:
        to_x, to_y = cx + a * scale, cy - b * scale
        body += arrow(cx, cy, to_x, to_y, colour, width)
        if colour == ORANGE:        # its name above its tip: it may lie along another arrow
            body += text(to_x, to_y - 8, name, colour=colour, weight="bold", anchor="middle")
            continue
        length = math.hypot(a, b) or 1.0
        body += text(to_x + 11 * a / length, to_y - 11 * b / length + 4, name, colour=colour, weight="bold",
                     anchor="start" if a > 0.3 * length else "end" if a < -0.3 * length else "middle")
    return body


def stream(start: float, branches: Sequence[tuple[str, float, float]], *, title: str = "") -> Svg:
    """Draw a residual stream: its length at the start, and [(name, length added, length after), ...] of each branch.

    The stream is as high as its vectors are long, and so is the box of what a branch adds. Names that begin alike
    have one colour.
    """
    if not branches:
        raise InputError("a stream needs at least one branch; give (name, length added, length after)")
    most = max(start, *(max(added, after) for _, added, after in branches))
    step = min(96.0, 760 / len(branches))
    tall = 84 / most
    top = 28 if title else 4
    floor = top + 16 + tall * max(added for _, added, _ in branches)      # where the boxes stand
    axis = floor + 82       # the middle of the stream
    kinds = list(dict.fromkeys(name.split()[0] for name, _, _ in branches))
    colours = dict(zip(kinds, (ORANGE, GREEN, PURPLE, INK)))
    body = text(4, 17, title, weight="bold") if title else ""
    x = 8.0
    before = start
    body += _band(x, axis, step * 0.6, before * tall) + text(x, axis + 62, f"{before:.1f}", size=11)
    x += step * 0.6
    for name, added, after in branches:
        colour = colours.get(name.split()[0], INK)
        high = max(1.5, added * tall)
        body += _band(x, axis, step, after * tall)
        body += (f'<rect x="{x - 22:.1f}" y="{floor - high:.1f}" width="44" height="{high:.1f}" fill="{colour}">'
                 f'<title>{name} adds {added:.4g}</title></rect>')
        body += text(x, floor - high - 5, f"{added:.1f}", anchor="middle", size=11, colour=colour)
        body += text(x, floor + 13, name, anchor="middle", size=11, colour=colour)
        body += arrow(x, floor + 18, x, axis - 9, colour, 1.8)
        body += f'<circle cx="{x:.1f}" cy="{axis}" r="8" fill="white"/>'
        body += _line(_arc(x, axis, 8, 0, TURN), INK, 1.2) + text(x, axis + 4, "+", anchor="middle", weight="bold")
        body += text(x + step / 2, axis + 62, f"{after:.1f}", anchor="middle", size=11)
        x += step
        before = after
    body += text(8, axis + 80, "above: how long the vector is that a branch adds; below (blue): how long the stream is "
                 "after it", size=11, colour=FAINT)
    said = ", ".join(f"{name} adds {added:.1f}, then {after:.1f}" for name, added, after in branches)
    return Svg(body, max(x + 10, 620), axis + 90, f"{title or 'residual stream'}: {start:.1f} long; {said}")


def _band(x: float, y: float, width: float, high: float) -> str:
    """Draw a piece of the stream, `high` pixels high round y."""
    return (f'<rect x="{x:.1f}" y="{y - high / 2:.1f}" width="{width:.1f}" height="{max(1.0, high):.1f}" fill="{BLUE}" '
            'fill-opacity="0.35"/>')
