"""Draw where the patches of a tile go: into a row of vectors, and by fours into visual tokens."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from minivl.limits import InputError
from minivl.pixel_unshuffle import pixel_unshuffle
from minivl.show.maps import matrix
from minivl.show.svg import FAINT, INK, Svg, embedded, text

PLACES = ("#d5e5f4", "#fde3c8", "#d8ecd2", "#e9daf0")   # of the four patches of a square, in reading order
LEGIBLE = 16            # pixels of a square that a number fits into
LONGEST = 64            # patches whose numbers are written out


def patches(tile: Image.Image, patch: int = 14, *, width: float = 224) -> Svg:
    """Draw a square tile cut into patches, numbered row by row, and the row of vectors they become, CLS first."""
    side = tile.width // patch
    if tile.width != tile.height or side < 2 or side * patch != tile.width:
        raise InputError(f"a tile of {tile.width}x{tile.height} pixels is not a square of patches of {patch}; give one "
                         f"of {max(2, side) * patch}x{max(2, side) * patch}, as minivl.tiling.tile cuts them")
    P = side ** 2
    cell = width / side
    above = 26
    body = text(4, 16, f"a tile of {side} x {side} patches", weight="bold")
    body += embedded(tile.convert("RGB"), 4, above, width, width, crisp=True)
    for i in range(side + 1):
        at = i * cell
        body += f'<path d="M{4 + at:.1f} {above} v{width} M4 {above + at:.1f} h{width}" fill="none" stroke="{FAINT}"/>'
    for n in range(P) if cell >= LEGIBLE else ():
        x = 4 + n % side * cell
        y = above + n // side * cell
        body += (f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{5 * len(str(n)) + 2}" height="9" fill="white" '
                 'fill-opacity="0.7"/>')
        body += text(x + 2, y + 8.5, n, size=8)
    left = width + 44
    body += (f'<path d="M{width + 14} {above + width / 2} h20 m-5 -4 l5 4 l-5 4" fill="none" stroke="{INK}" '
             'stroke-width="1.4"/>')
    body += text(left, 16, f"1 + {P} = {1 + P} vectors", weight="bold")
    rows = [("CLS", None), *((str(n), n) for n in range(min(4, P - 1))), ("...", None), (str(P - 1), P - 1)]
    step = width / len(rows)
    for i, (name, n) in enumerate(rows):
        y = above + i * step
        body += text(left + 28, y + step / 2 + 4, name, anchor="end")
        if n is not None:
            x0, y0 = n % side * patch, n // side * patch
            piece = tile.convert("RGB").crop((x0, y0, x0 + patch, y0 + patch))
            body += embedded(piece, left + 34, y + 2, step - 6, step - 6, crisp=True)
        if name != "...":
            bar = left + 34 + step + 26
            body += (f'<path d="M{bar - 24:.1f} {y + step / 2:.1f} h18 m-4 -3 l4 3 l-4 3" fill="none" '
                     f'stroke="{FAINT}"/>') if n is not None else ""
            body += (f'<rect x="{bar:.1f}" y="{y + step / 2 - 7:.1f}" width="150" height="14" '
                     f'fill="{PLACES[0] if n is not None else PLACES[1]}" stroke="{INK}"/>')
            what = f"W x + b, + position {n + 1}" if n is not None else "learned, + position 0"
            body += text(bar + 75, y + step / 2 + 4, what, anchor="middle", size=11)
    return Svg(body, left + 34 + step + 26 + 158, above + width + 10,
               f"a tile cut into {side} x {side} patches, numbered row by row from the top left: {1 + P} vectors"
               f", CLS first, then patch 0 to patch {P - 1}, each W x + b, and a learned position added to each")


def unshuffle(x: torch.Tensor | Sequence, *, title: str = "") -> Svg:
    """Draw which patches of x[P, C] `minivl.pixel_unshuffle` joins into which visual token, with all their numbers."""
    x = matrix(x)
    P, C = x.shape
    side = round(P ** 0.5)
    if side * side != P or side % 2 or P > LONGEST or C > 4:
        raise InputError(f"x has shape {[P, C]}; to be drawn it needs 4, 16, 36 or 64 patches and at most 4 channels")
    tokens = pixel_unshuffle(x.view(1, side, side, C))[0].flatten(0, 1)         # (P/4, 4C)
    box = 18 + 18 * C
    above = 44
    body = text(4, 16, title or f"{P} patches of {C} numbers become {P // 4} tokens of {4 * C}", weight="bold")
    body += text(4, 36, f"{side} x {side} patches", colour=FAINT)

    def square(left, top, place, numbers):
        out = (f'<rect x="{left}" y="{top}" width="{box}" height="30" fill="{PLACES[place]}" stroke="{FAINT}"/>')
        return out + text(left + box / 2, top + 20, " ".join(f"{v:g}" for v in numbers), anchor="middle")

    for n, numbers in enumerate(x.tolist()):
        row, column = divmod(n, side)
        body += square(4 + column * box, above + row * 30, row % 2 * 2 + column % 2, numbers)
    for t in range(P // 4):
        row, column = divmod(t, side // 2)
        body += (f'<rect x="{4 + 2 * column * box}" y="{above + 60 * row}" width="{2 * box}" height="60" fill="none" '
                 f'stroke="{INK}" stroke-width="2.5"/>')
    left = 4 + side * box + 96
    middle = above + 15 * side
    body += (f'<path d="M{left - 86} {middle} h24 m-6 -5 l6 5 l-6 5" fill="none" stroke="{INK}" stroke-width="1.6"/>')
    step = max(38, 30 * side / (P // 4))
    for k, name in enumerate(("(0,0)", "(0,1)", "(1,0)", "(1,1)")):
        body += text(left + (k + 0.5) * box, 36, name, anchor="middle", colour=FAINT)
    body += text(left - 8, 36, "(dy,dx)", anchor="end", colour=FAINT)
    for t, numbers in enumerate(tokens.tolist()):
        top = above + t * step
        body += text(left - 8, top + 20, f"token {t}", anchor="end")
        for place in range(4):
            body += square(left + place * box, top, place, numbers[place * C:(place + 1) * C])
        body += (f'<rect x="{left}" y="{top}" width="{4 * box}" height="30" fill="none" stroke="{INK}" '
                 'stroke-width="2.5"/>')
    rows = "; ".join(f"token {t}: " + " ".join(f"{v:g}" for v in row) for t, row in enumerate(tokens.tolist()))
    height = above + max(30 * side, step * (P // 4)) + 8
    return Svg(body, left + 4 * box + 8, height, f"{title or 'pixel unshuffle'}: {side} x {side} patches, each framed "
               f"square of 2 x 2 becomes one token; {rows}")
