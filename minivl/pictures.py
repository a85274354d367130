"""Tensors and stages as pictures: SVG without numpy or matplotlib, for notebooks, reports and files.

    heat(attention, "query", "key")          squares, dark is large, the value under the mouse
    overlay(image, weights)                  a picture with a map of its patches over it
    tiles(image, max_num=6)                  how a picture is cut, and what it costs
    bars, curve, strip                       numbers by name, numbers along an axis, stages with their shapes

Each returns a Svg: the last line of a notebook cell shows it, `.save(path)` writes it. Drawn on a white card of their own, so
that they are readable on any page; nothing is told by colour alone.
"""
from __future__ import annotations

import base64
import io
import math
from html import escape
from pathlib import Path

import torch
from PIL import Image

from minivl import tiling
from minivl.limits import InputError

INK, FAINT, LOW, HIGH = "#1c2733", "#8a96a3", (11, 83, 148), (176, 78, 0)     # LOW: positive values; HIGH: negative ones
MOST_SQUARES = 4096     # of a heat map drawn as squares, 0.5 MB; larger ones become one small picture


class Svg:
    """A drawing of `width` x `height` pixels: what stands between <svg> and </svg>."""

    def __init__(self, body: str, width: float, height: float):
        self.body, self.width, self.height = body, width, height

    def __str__(self):
        return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width:.0f}" height="{self.height:.0f}" '
                f'viewBox="0 0 {self.width:.0f} {self.height:.0f}" font-family="system-ui, sans-serif" font-size="12">'
                f'<rect width="100%" height="100%" rx="6" fill="white"/>{self.body}</svg>')

    def _repr_svg_(self):
        return str(self)

    def save(self, path) -> Path:
        """Write it to a file; the path."""
        Path(path).write_text(str(self), encoding="utf-8")
        return Path(path)


def beside(*drawings: Svg, gap: int = 16) -> Svg:
    """Drawings next to each other."""
    body, x = "", 0.0
    for drawing in drawings:
        body += f'<g transform="translate({x:.1f} 0)">{drawing.body}</g>'
        x += drawing.width + gap
    return Svg(body, x - gap, max(d.height for d in drawings))


def text(x, y, words, *, anchor="start", size=12, colour=INK, weight="normal", turn=0) -> str:
    rotate = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" fill="{colour}"{rotate}>'
            f'{escape(str(words))}</text>')


def embedded(image: Image.Image, x, y, width, height, *, crisp: bool = False) -> str:
    """A picture inside a drawing, as a PNG. `crisp`: enlarged pixels stay squares."""
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    style = ' style="image-rendering:pixelated"' if crisp else ""
    return (f'<image x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"{style} preserveAspectRatio="none" '
            f'href="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"/>')


def shade(value: float, top: float) -> tuple:
    """RGB of a number: white is 0, dark is +-top; negative numbers have another hue, and a mark where squares are drawn."""
    part = min(1.0, abs(value) / top) if top > 0 else 0.0
    hue = LOW if value >= 0 else HIGH
    return tuple(round(255 + (h - 255) * part) for h in hue)


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


def tiles(image: Image.Image, *, max_num: int = 12, tile_size: int = 448, use_thumbnail: bool = True, tokens_per_tile: int = 256,
          width: float = 340) -> Svg:
    """How `minivl.tiling.tile` cuts a picture: its grid with the numbers of the tiles, the thumbnail, and the price in tokens."""
    columns, rows = tiling.choose_grid(*image.size, max_num=max_num, tile_size=tile_size)
    cut = tiling.tile(image, max_num=max_num, tile_size=tile_size, use_thumbnail=use_thumbnail)
    side = width / max(columns, 3)
    height, above = rows * side, 24
    body = text(4, 16, f"{image.width}x{image.height} \u2192 {columns}x{rows} tiles of {tile_size}"
                + (" and a thumbnail" if len(cut) > columns * rows else ""), weight="bold")
    for n, piece in enumerate(cut[:columns * rows]):
        x, y = 4 + n % columns * side, above + n // columns * side
        body += embedded(piece.resize((round(side), round(side))), x, y, side, side)
        body += f'<rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" fill="none" stroke="white" stroke-width="3"/>'
        body += f'<rect x="{x:.1f}" y="{y:.1f}" width="20" height="18" fill="white" fill-opacity="0.85"/>' + text(x + 10, y + 13, n, anchor="middle")
    right = 4 + columns * side
    if len(cut) > columns * rows:
        small = min(side, 110.0)
        body += embedded(cut[-1].resize((round(small), round(small))), right + 14, above, small, small)
        body += text(right + 14, above + small + 15, f"{len(cut) - 1}: thumbnail", size=11)
        right, height = right + 14 + small, max(height, small + 18)
    note = f"{len(cut)} x {tokens_per_tile} = {len(cut) * tokens_per_tile} visual tokens"
    return Svg(body + text(4, above + height + 18, note), max(right + 8, 8 + 8 * 44), above + height + 26)


def strip(stages, *, here: str | None = None, width: float = 860) -> Svg:
    """[(name, shape or words), ...] as boxes with arrows; `here` is the one with a heavy frame and a mark."""
    stages = [(str(name), "x".join(map(str, shape)) if isinstance(shape, (tuple, list, torch.Size)) else str(shape)) for name, shape in stages]
    if not stages or here is not None and here not in [name for name, _ in stages]:
        raise InputError(f"{here!r} is none of the stages {', '.join(name for name, _ in stages)}")
    gap = 22
    box = (width - 8 - gap * (len(stages) - 1)) / len(stages)
    body = ""
    for i, (name, shape) in enumerate(stages):
        x, now = 4 + i * (box + gap), name == here
        body += (f'<rect x="{x:.1f}" y="22" width="{box:.1f}" height="44" rx="5" fill="{"#e3edf7" if now else "white"}" stroke="{INK}" '
                 f'stroke-width="{2.5 if now else 1}"/>')
        body += text(x + box / 2, 40, name, anchor="middle", weight="bold" if now else "normal", size=min(12, 1.75 * box / max(4, len(name))))
        body += text(x + box / 2, 57, shape, anchor="middle", colour=FAINT, size=min(11, 1.75 * box / max(4, len(shape))))
        if now:
            body += text(x + box / 2, 15, "\u25bc here", anchor="middle", size=11)
        if i:
            body += f'<path d="M{x - gap + 4:.1f} 44 h{gap - 9} m-4 -4 l4 4 l-4 4" fill="none" stroke="{INK}"/>'
    return Svg(body, width, 74)
