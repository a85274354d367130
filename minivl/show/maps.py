"""Draw matrices as squares: on their own, or over the picture they belong to."""
from __future__ import annotations

import torch
from PIL import Image

from minivl.limits import InputError
from minivl.show.svg import FAINT, INK, Svg, embedded, shade, text

MOST_SQUARES = 4096     # of a heat map drawn as squares, 0.5 MB; larger ones become one small picture


def matrix(values) -> torch.Tensor:
    """A tensor or nested lists -> float32[rows, columns], finite."""
    m = torch.as_tensor(values).detach().float().cpu()
    if m.ndim == 1:
        m = m[None]
    if m.ndim != 2 or not m.numel():
        raise InputError(f"a map needs rows and columns, this tensor has shape {list(m.shape)}; choose one head, tile or channel first")
    if not torch.isfinite(m).all():
        raise InputError(f"{int((~torch.isfinite(m)).sum())} of {m.numel()} values are not finite; replace them first (nan_to_num)")
    return m


def heat(values, rows: str = "", columns: str = "", *, title: str = "", row_names=None, column_names=None, cell: float = 0, top: float = 0,
         numbers: bool = False) -> Svg:
    """A matrix as squares: white is 0, dark is `top` (default: the largest |value|, stated below). Negative values are orange
    and carry a minus sign. `rows`, `columns`: what the axes count. `numbers`: print each value."""
    m = matrix(values)
    R, C = m.shape
    cell = cell or max(6, min(28, 480 / max(R, C))) * (1.6 if numbers else 1)
    top = top or float(m.abs().max()) or 1.0
    left = 26 + (max(len(str(n)) for n in row_names) * 7 if row_names else 0)
    above = (22 if title else 4) + 18 + (max(len(str(n)) for n in column_names) * 6 if column_names else 0)
    body = text(left, 16, title, weight="bold") if title else ""
    body += text(left + C * cell / 2, above - 6 - (max(len(str(n)) for n in column_names) * 6 if column_names else 0), columns, anchor="middle", colour=FAINT)
    body += text(12, above + R * cell / 2, rows, anchor="middle", colour=FAINT, turn=-90)
    if R * C > MOST_SQUARES:
        pixels = bytes(v for row in m.tolist() for x in row for v in shade(x, top))
        body += embedded(Image.frombytes("RGB", (C, R), pixels), left, above, C * cell, R * cell, crisp=True)
    else:
        for r, row in enumerate(m.tolist()):
            for c, v in enumerate(row):
                x, y = left + c * cell, above + r * cell
                red, green, blue = shade(v, top)
                body += (f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell:.1f}" height="{cell:.1f}" fill="rgb({red},{green},{blue})">'
                         f'<title>[{r}, {c}] = {v:.4g}</title></rect>')
                light = "white" if abs(v) > 0.6 * top else INK
                if numbers:
                    body += text(x + cell / 2, y + cell / 2 + 4, f"{v:.3g}", anchor="middle", size=11, colour=light)
                elif v < -0.15 * top and cell >= 9:
                    body += text(x + cell / 2, y + cell / 2 + 3, "\u2212", anchor="middle", size=9, colour=light)
    body += f'<rect x="{left}" y="{above}" width="{C * cell:.1f}" height="{R * cell:.1f}" fill="none" stroke="{FAINT}"/>'
    for r, name in enumerate(row_names or ()):
        body += text(left - 4, above + (r + 0.5) * cell + 4, name, anchor="end", size=11)
    for c, name in enumerate(column_names or ()):
        body += text(left + (c + 0.5) * cell + 4, above - 4, name, size=11, turn=-60)
    low = float(m.min())
    notes = [f"{R} x {C}; white 0, dark {top:.3g}"] + ([f"orange, minus: down to {low:.3g}"] if low < 0 else [])
    for i, note in enumerate(notes):
        body += text(left, above + R * cell + 16 + 14 * i, note, size=11, colour=FAINT)
    return Svg(body, max(left + C * cell + 12, left + 6.2 * max(map(len, notes)), left + 7.4 * len(title)), above + R * cell + 10 + 14 * len(notes))


def overlay(image: Image.Image, weights, *, title: str = "", width: float = 320) -> Svg:
    """A picture with a map float[rows, columns] over it: what has no weight is pale, the heaviest squares are framed and
    numbered 1, 2, 3."""
    m = matrix(weights)
    R, C = m.shape
    height = width * image.height / image.width
    top, above = float(m.max()) or 1.0, 24 if title else 4
    body = text(4, 16, title, weight="bold") if title else ""
    body += embedded(image.convert("RGB").resize((round(width), round(height))), 4, above, width, height)
    w, h = width / C, height / R
    for r, row in enumerate(m.tolist()):
        for c, v in enumerate(row):
            body += (f'<rect x="{4 + c * w:.1f}" y="{above + r * h:.1f}" width="{w:.2f}" height="{h:.2f}" fill="white" '
                     f'fill-opacity="{0.85 * (1 - max(0.0, v) / top):.2f}"><title>[{r}, {c}] = {v:.4g}</title></rect>')
    for n, flat in enumerate(m.flatten().topk(min(3, m.numel())).indices.tolist(), start=1):
        x, y = 4 + flat % C * w, above + flat // C * h
        body += f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="none" stroke="{INK}" stroke-width="2"/>'
        body += f'<rect x="{x:.1f}" y="{y:.1f}" width="13" height="13" fill="white"/>' + text(x + 3, y + 11, n, size=10, weight="bold")
    return Svg(body + text(4, above + height + 15, f"{R} x {C} squares; clear {top:.3g}, pale 0", size=11, colour=FAINT), width + 8, above + height + 22)
