"""Draw matrices as squares: on their own, or over the picture they belong to."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image

from minivl.limits import InputError
from minivl.show.axes import BOLD, SMALL, breadth, fitting, rounds, short
from minivl.show.svg import FAINT, INK, Svg, beside_axis, embedded, shade, text, tick

MOST_SQUARES = 4096     # of a heat map drawn as squares, 0.5 MB; larger ones become one small picture


def matrix(values: torch.Tensor | Sequence) -> torch.Tensor:
    """Make a matrix of a tensor or nested lists: float32[rows, columns], finite, on the CPU. One row of a vector."""
    m = torch.as_tensor(values).detach().float().cpu()
    if m.ndim == 1:
        m = m[None]
    if m.ndim != 2 or not m.numel():
        raise InputError(f"a map needs rows and columns, this tensor has shape {list(m.shape)}; choose one head, "
                         "tile or channel first")
    if not torch.isfinite(m).all():
        raise InputError(f"{int((~torch.isfinite(m)).sum())} of {m.numel()} values are not finite; replace them first "
                         "(nan_to_num)")
    return m


def heat(values: torch.Tensor | Sequence, rows: str = "", columns: str = "", *, title: str = "",
         row_names: Sequence | None = None, column_names: Sequence | None = None, cell: float = 0, top: float = 0,
         numbers: bool = False) -> Svg:
    """Draw a matrix [R, C] as squares: white is 0, dark is `top` (default: the largest |value|), as a bar
    below it says.

    Negative values are orange and carry a minus sign. `rows`, `columns`: what the axes count. `cell`: the side of a
    square in pixels. `numbers`: print each value.
    """
    m = matrix(values)
    R, C = m.shape
    cell = cell or max(6, min(28, 480 / max(R, C)), 14 if row_names or column_names else 0) * (1.6 if numbers else 1)
    top = top or float(m.abs().max()) or 1.0
    width = C * cell
    height = R * cell
    down = _named(row_names, R, cell, 19)
    along = _named(column_names, C, cell, max(breadth(C - 1, SMALL) + 6, 18))
    turned = any(breadth(name, SMALL) > cell * (1 if column_names else 5) - 2 for name in along.values())
    left = 34 + max(breadth(name, SMALL) for name in down.values())
    above = (22 if title else 4) + (18 if columns else 0)
    above += 8 + (0.87 * max(breadth(name, SMALL) for name in along.values()) if turned else 8)
    body = text(left, 16, title, weight="bold") if title else ""
    body += text(left + width / 2, 34 if title else 14, columns, anchor="middle", colour=FAINT) if columns else ""
    body += beside_axis(12, above + height / 2, rows)
    if R * C > MOST_SQUARES:
        pixels = bytes(v for row in m.tolist() for x in row for v in shade(x, top))
        body += embedded(Image.frombytes("RGB", (C, R), pixels), left, above, width, height, crisp=True)
    else:
        body += _squares(m, left, above, cell, top, numbers)
    body += (f'<rect x="{left:.1f}" y="{above:.1f}" width="{width:.1f}" height="{height:.1f}" fill="none" '
             f'stroke="{FAINT}"/>')
    for r, name in down.items():
        body += text(left - 5, above + (r + 0.5) * cell + 4, name, anchor="end", size=SMALL,
                     colour=INK if row_names else FAINT)
    for c, name in along.items():
        middle = left + (c + 0.5) * cell
        body += text(middle + 4 if turned else middle, above - 5, name, anchor="start" if turned else "middle",
                     size=SMALL, colour=INK if column_names else FAINT, turn=-60 if turned else 0)
    low = float(m.min())
    high = float(m.max())
    length = max(120, min(width, 240))
    body += _colour_bar(left, above + height + 10, length, low, high, top, bool((m == m.round()).all()))
    reach = max((left + (c + 0.5) * cell + (4 + breadth(name, SMALL) / 2 if turned else breadth(name, SMALL) / 2)
                 for c, name in along.items()), default=0)
    full = max(left + width + 12, left + length + 20, reach + 12, left + breadth(title, BOLD) + 8,
               left + width / 2 + breadth(columns) / 2 + 4)
    sides = f"{rows or 'rows'} x {columns or 'columns'}"
    about = f"{title or 'map'}: {R} x {C} squares, {sides}, from {low:.3g} to {high:.3g}"
    return Svg(body, full, above + height + 38, about)


def _named(names: Sequence | None, count: int, cell: float, room: float) -> dict[int, str]:
    """Choose which rows or columns say their name, or their number if they have none: {index: words}. Each needs
    `room` pixels."""
    if names:
        return {i: str(names[i]) for i in range(0, min(count, len(names)), math.ceil(13 / cell))}
    most = max(1, int((count - 1) * cell / room) + 1)
    return {int(i): short(i) for i in rounds(0, count - 1, most, whole=True)}


def _colour_bar(x: float, y: float, length: float, low: float, high: float, top: float, whole: bool) -> str:
    """Draw what colour each number from `low` to `high` has: from 0 to `top`, -`top` to 0, or both. `whole`: no
    fractions."""
    begin = -top if low < -top / 255 else 0.0
    end = top if high > 0 or not begin else 0.0
    shades = [shade(begin + (end - begin) * (i + 0.5) / 120, top) for i in range(120)]
    strip = Image.frombytes("RGB", (120, 1), bytes(v for one in shades for v in one))
    body = embedded(strip, x, y, length, 8, crisp=True)
    body += f'<rect x="{x:.1f}" y="{y:.1f}" width="{length:.1f}" height="8" fill="none" stroke="{FAINT}"/>'
    for value in fitting(begin, end, length, whole=whole):
        at = x + length * (value - begin) / (end - begin)
        body += tick(at, y + 8)
        body += text(at, y + 22, short(value, 6), anchor="middle", size=SMALL, colour=FAINT)
    return body


def _squares(m: torch.Tensor, left: float, above: float, cell: float, top: float, numbers: bool) -> str:
    """Draw one square for each value of m[R, C], which says the value when the mouse is over it."""
    body = ""
    dash = min(5.0, cell - 3)
    if numbers:
        written, size = _fitted({v for row in m.tolist() for v in row}, cell - 5)
    for r, row in enumerate(m.tolist()):
        for c, v in enumerate(row):
            x = left + c * cell
            y = above + r * cell
            red, green, blue = shade(v, top)
            body += (f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell:.1f}" height="{cell:.1f}" '
                     f'fill="rgb({red},{green},{blue})"><title>[{r}, {c}] = {v:.4g}</title></rect>')
            ink = "white" if abs(v) > 0.6 * top else INK
            if numbers:
                body += text(x + cell / 2, y + cell / 2 + 4, written[v], anchor="middle", size=size, colour=ink)
            elif v < -0.02 * top and cell >= 6:        # as soon as it is seen to be orange
                body += (f'<path d="M{x + cell / 2 - dash / 2:.1f} {y + cell / 2:.1f} h{dash:.3g}" '
                         f'stroke="{ink}"/>')
    return body


def _fitted(values: set[float], room: float) -> tuple[dict[float, str], float]:
    """Write each number in at most `room` pixels: {number: words} and the size of the letters. Fewer digits first, then
    smaller letters."""
    written = {}
    for v in values:
        for digits in (3, 2, 1):
            written[v] = short(v, digits)
            if breadth(written[v], SMALL) <= room:
                break
    widest = max(breadth(w, SMALL) for w in written.values())
    return written, SMALL * min(1.0, room / widest)


def overlay(image: Image.Image, weights: torch.Tensor | Sequence, *, title: str = "", width: float = 320,
            looker: int | None = None) -> Svg:
    """Draw a map [rows, columns] over a picture: what has no weight is pale, the heaviest squares are framed and
    numbered 1, 2, 3, if they are a twentieth of the first at least. `looker`: the square, counted row by row, whose
    map it is; it gets a dot."""
    m = matrix(weights)
    R, C = m.shape
    height = width * image.height / image.width
    top = float(m.max()) or 1.0
    above = 24 if title else 4
    body = text(4, 16, title, weight="bold") if title else ""
    body += embedded(image.convert("RGB").resize((round(width), round(height))), 4, above, width, height)
    w = width / C
    h = height / R
    for r, row in enumerate(m.tolist()):
        for c, v in enumerate(row):
            pale = 0.85 * (1 - max(0.0, v) / top)
            body += (f'<rect x="{4 + c * w:.1f}" y="{above + r * h:.1f}" width="{w:.2f}" height="{h:.2f}" fill="white" '
                     f'fill-opacity="{pale:.2f}"><title>[{r}, {c}] = {v:.4g}</title></rect>')
    best = m.flatten().topk(min(3, m.numel()))
    # What is next to nothing beside the largest is not heavy.
    heaviest = [divmod(k, C) for v, k in zip(best.values.tolist(), best.indices.tolist()) if v >= 0.05 * best.values[0]]
    for n, (r, c) in enumerate(heaviest, start=1):
        x = 4 + c * w
        y = above + r * h
        body += (f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="none" stroke="{INK}" '
                 f'stroke-width="2"/><rect x="{x:.1f}" y="{y:.1f}" width="13" height="13" fill="white"/>')
        body += text(x + 3, y + 11, n, size=10, weight="bold")
    note = f"{R} x {C} squares; clear {short(top, 3)}, pale 0"
    framed = "framed: the largest" + (f", 1 to {len(heaviest)}" if len(heaviest) > 1 else "")
    places = ", ".join(f"[{r}, {c}]" for r, c in heaviest)
    about = f"{title or 'map over a picture'}: {note}; heaviest at [row, column] {places}"
    notes = [note, framed]
    if looker is not None:
        r, c = divmod(looker, C)
        for radius, colour in ((5.5, INK), (3.5, "white")):
            body += (f'<circle cx="{4 + (c + 0.5) * w:.1f}" cy="{above + (r + 0.5) * h:.1f}" r="{radius}" '
                     f'fill="{colour}"/>')
        notes.append("dot: the square that looks")
        about += f"; looks from [{r}, {c}]"
    for i, words in enumerate(notes):
        body += text(4, above + height + 15 + 14 * i, words, size=SMALL, colour=FAINT)
    return Svg(body, max(width + 8, 8 + breadth(note, SMALL), 8 + breadth(title, BOLD)),
               above + height + 8 + 14 * len(notes), about)
