"""Draw what happens to a picture: the tiles it is cut into, the stages of the model."""
from __future__ import annotations

from collections.abc import Iterable

import torch
from PIL import Image

from minivl import tiling
from minivl.limits import InputError
from minivl.show.axes import BOLD, SMALL, breadth
from minivl.show.svg import FAINT, INK, Svg, embedded, text


def tiles(image: Image.Image, *, max_num: int = 12, tile_size: int = 448, use_thumbnail: bool = True,
          tokens_per_tile: int = 256, width: float = 340) -> Svg:
    """Draw how `minivl.tiling.tile` cuts a picture: its grid with the numbers of the tiles, the thumbnail, and the
    price in visual tokens. `width`: of the grid, in pixels of the drawing."""
    columns, rows = tiling.choose_grid(*image.size, max_num=max_num, tile_size=tile_size)
    cut = tiling.tile(image, max_num=max_num, tile_size=tile_size, use_thumbnail=use_thumbnail)
    has_thumbnail = len(cut) > columns * rows
    side = width / max(columns, 3)
    height = rows * side
    above = 24
    title = f"{image.width}x{image.height}: {columns}x{rows} tiles of {tile_size}"
    title += " and a thumbnail" if has_thumbnail else ""
    body = text(4, 16, title, weight="bold")
    for n, piece in enumerate(cut[:columns * rows]):
        x = 4 + n % columns * side
        y = above + n // columns * side
        body += embedded(piece.resize((round(side), round(side))), x, y, side, side)
        body += (f'<rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" fill="none" stroke="white" '
                 f'stroke-width="3"/><rect x="{x:.1f}" y="{y:.1f}" width="20" height="18" fill="white" '
                 f'fill-opacity="0.85"/>')
        body += text(x + 10, y + 13, n, anchor="middle")
    right = 4 + columns * side
    if has_thumbnail:
        small = min(side, 110.0)
        body += embedded(cut[-1].resize((round(small), round(small))), right + 14, above, small, small)
        body += text(right + 14, above + small + 15, f"{len(cut) - 1}: thumbnail", size=11)
        right += 14 + small
        height = max(height, small + 18)
    note = f"{len(cut)} x {tokens_per_tile} = {len(cut) * tokens_per_tile} visual tokens"
    body += text(4, above + height + 18, note)
    return Svg(body, max(right + 8, 8 + breadth(title, BOLD), 8 + breadth(note)), above + height + 26,
               f"{title}, {note}")


def strip(stages: Iterable[tuple], *, here: str | None = None, width: float = 560) -> Svg:
    """Draw [(name, shape or words), ...] as boxes with arrows, in rows of at most `width` pixels; the one called `here`
    has a heavy frame and a mark."""
    stages = [(str(name), _shape(shape)) for name, shape in stages]
    names = [name for name, _ in stages]
    if not stages or here is not None and here not in names:
        raise InputError(f"{here!r} is none of the stages {', '.join(names)}")
    gap = 22
    body = ""
    x = 4
    top = 22
    right = 0
    for i, (name, shape) in enumerate(stages):
        now = name == here
        box = round(max(60, breadth(name, BOLD) + 14, breadth(shape, SMALL) + 14))
        if i and x + box > width - 4:       # an arrow leads into each further row
            x = 4 + gap
            top += 68
        middle = x + box / 2
        body += (f'<rect x="{x}" y="{top}" width="{box}" height="44" rx="5" '
                 f'fill="{"#e3edf7" if now else "white"}" stroke="{INK}" stroke-width="{2.5 if now else 1}"/>')
        body += text(middle, top + 18, name, anchor="middle", weight="bold" if now else "normal")
        body += text(middle, top + 35, shape, anchor="middle", colour=FAINT, size=11)
        if now:
            body += text(middle, top - 8, "here", anchor="middle", size=11, weight="bold")
            body += f'<path d="M{middle - 4:.1f} {top - 6} l4 4 l4 -4" fill="none" stroke="{INK}"/>'
        if i:
            body += f'<path d="M{x - gap + 4} {top + 22} h{gap - 9} m-4 -4 l4 4 l-4 4" fill="none" stroke="{INK}"/>'
        right = max(right, x + box)
        x += box + gap
    about = "stages: " + ", ".join(f"{name} ({shape})" for name, shape in stages) + (f"; here: {here}" if here else "")
    return Svg(body, right + 4, top + 52, about)


def _shape(shape: object) -> str:
    """Write a shape as 7x3x448x448, words as they are."""
    return "x".join(map(str, shape)) if isinstance(shape, (tuple, list, torch.Size)) else str(shape)
