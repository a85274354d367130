"""Draw matrices as squares: on their own, or over the picture they belong to."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from minivl.limits import InputError
from minivl.show.svg import FAINT, INK, Svg, embedded, shade, text

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
    """Draw a matrix [R, C] as squares: white is 0, dark is `top` (default: the largest |value|, stated below it).

    Negative values are orange and carry a minus sign. `rows`, `columns`: what the axes count. `cell`: the side of a
    square in pixels. `numbers`: print each value.
    """
    m = matrix(values)
    R, C = m.shape
    cell = cell or max(6, min(28, 480 / max(R, C))) * (1.6 if numbers else 1)
    top = top or float(m.abs().max()) or 1.0
    names_above = max(len(str(n)) for n in column_names) * 6 if column_names else 0
    left = 26 + (max(len(str(n)) for n in row_names) * 7 if row_names else 0)
    above = (22 if title else 4) + 18 + names_above
    width = C * cell
    height = R * cell
    body = text(left, 16, title, weight="bold") if title else ""
    body += text(left + width / 2, above - 6 - names_above, columns, anchor="middle", colour=FAINT)
    body += text(12, above + height / 2, rows, anchor="middle", colour=FAINT, turn=-90)
    if R * C > MOST_SQUARES:
        pixels = bytes(v for row in m.tolist() for x in row for v in shade(x, top))
        body += embedded(Image.frombytes("RGB", (C, R), pixels), left, above, width, height, crisp=True)
    else:
        body += _squares(m, left, above, cell, top, numbers)
    body += f'<rect x="{left}" y="{above}" width="{width:.1f}" height="{height:.1f}" fill="none" stroke="{FAINT}"/>'
    for r, name in enumerate(row_names or ()):
        body += text(left - 4, above + (r + 0.5) * cell + 4, name, anchor="end", size=11)
    for c, name in enumerate(column_names or ()):
        body += text(left + (c + 0.5) * cell + 4, above - 4, name, size=11, turn=-60)
    low = float(m.min())
    notes = [f"{R} x {C}; white 0, dark {top:.3g}"] + ([f"orange, minus: down to {low:.3g}"] if low < 0 else [])
    for i, note in enumerate(notes):
        body += text(left, above + height + 16 + 14 * i, note, size=11, colour=FAINT)
    full = max(left + width + 12, left + 6.2 * max(map(len, notes)), left + 7.4 * len(title))
    sides = f"{rows or 'rows'} x {columns or 'columns'}"
    about = f"{title or 'map'}: {R} x {C} squares, {sides}, from {low:.3g} to {float(m.max()):.3g}"
    return Svg(body, full, above + height + 10 + 14 * len(notes), about)


def _squares(m: torch.Tensor, left: float, above: float, cell: float, top: float, numbers: bool) -> str:
    """Draw one square for each value of m[R, C], which says the value when the mouse is over it."""
    body = ""
    for r, row in enumerate(m.tolist()):
        for c, v in enumerate(row):
            x = left + c * cell
            y = above + r * cell
            red, green, blue = shade(v, top)
            body += (f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell:.1f}" height="{cell:.1f}" '
                     f'fill="rgb({red},{green},{blue})"><title>[{r}, {c}] = {v:.4g}</title></rect>')
            ink = "white" if abs(v) > 0.6 * top else INK
            if numbers:
                body += text(x + cell / 2, y + cell / 2 + 4, f"{v:.3g}", anchor="middle", size=11, colour=ink)
            elif v < -0.15 * top and cell >= 9:
                body += f'<path d="M{x + cell / 2 - 2.5:.1f} {y + cell / 2:.1f} h5" stroke="{ink}"/>'
    return body


def overlay(image: Image.Image, weights: torch.Tensor | Sequence, *, title: str = "", width: float = 320) -> Svg:
    """Draw a map [rows, columns] over a picture: what has no weight is pale, the heaviest squares are framed and
    numbered 1, 2, 3."""
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
    heaviest = [divmod(flat, C) for flat in m.flatten().topk(min(3, m.numel())).indices.tolist()]
    for n, (r, c) in enumerate(heaviest, start=1):
        x = 4 + c * w
        y = above + r * h
        body += (f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="none" stroke="{INK}" '
                 f'stroke-width="2"/><rect x="{x:.1f}" y="{y:.1f}" width="13" height="13" fill="white"/>')
        body += text(x + 3, y + 11, n, size=10, weight="bold")
    note = f"{R} x {C} squares; clear {top:.3g}, pale 0"
    places = ", ".join(f"[{r}, {c}]" for r, c in heaviest)
    about = f"{title or 'map over a picture'}: {note}; heaviest at [row, column] {places}"
    return Svg(body + text(4, above + height + 15, note, size=11, colour=FAINT), width + 8, above + height + 22, about)
