"""Draw notebooks/trip.svg, the drawing at the top of the README: python notebooks/trip.py

The numbers are those of InternVL2_5-4B for tests/golden/tiger.jpeg, computed from its config and the package's tiling.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from minivl import tiling
from minivl.config import Config
from minivl.show import FAINT, INK, Svg, embedded, text
from minivl.show.axes import breadth
from weights_tools.synthesize import config_json

HERE = Path(__file__).parent
BLUE = "#e3edf7"
SAND = "#fbf3e6"
DIM = "#46535f"


def box(x: float, y: float, width: float, height: float, lines: Sequence[str], fill: str = "white") -> str:
    """Draw a rounded box with words; the first line is bold."""
    body = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{INK}"/>'
    for i, line in enumerate(lines):
        body += text(x + width / 2, y + 18 + 15 * i, line, anchor="middle", weight="bold" if i == 0 else "normal",
                     size=12 if i == 0 else 11, colour=INK if i == 0 else DIM)
    return body


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """Draw an arrow to the right or downwards."""
    head = "-5 -4 l5 4 l-5 4" if y1 == y2 else "-4 -5 l4 5 l4 -5"
    return f'<path d="M{x1} {y1} L{x2} {y2} m{head}" fill="none" stroke="{INK}" stroke-width="1.4"/>'


def small(tile: Image.Image, x: float, y: float, side: int, dash: str = "") -> str:
    """Draw a tile with a frame, `side` pixels wide, in few colours, as the README carries it."""
    style = f' stroke-dasharray="{dash}"' if dash else ""
    return embedded(tile.resize((side + 28, side + 28)).quantize(96).convert("RGB"), x, y, side, side) + (
        f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="none" stroke="{INK}"{style}/>')


def draw() -> Svg:
    """Draw the way of a picture through the 4B: tiles, tower, unshuffle, projector, prompt, decoder, scores, a word."""
    c = Config.from_json(config_json("4B"))
    v = c.vision_config
    llm = c.llm_config
    R = c.force_image_size
    P = (R // v.patch_size) ** 2
    C = v.hidden_size
    L = c.num_image_token
    D = llm.hidden_size
    image = Image.open(HERE.parent / "tests" / "golden" / "tiger.jpeg").convert("RGB")
    columns, rows = tiling.choose_grid(*image.size, max_num=c.max_dynamic_patch, tile_size=R)
    tiles = tiling.tile(image, max_num=c.max_dynamic_patch, tile_size=R)
    N = len(tiles)
    side = 62
    step = side + 4
    x = 16
    y = 44
    body = text(16, 24, "A picture becomes words: InternVL2.5-4B", weight="bold", size=15)
    for n, tile in enumerate(tiles[:-1]):
        body += small(tile, x + n % columns * step, y + n // columns * step, side)
    y += rows * step + 6
    body += small(tiles[-1], x, y, side, dash="4 3")
    body += text(x + side + 8, y + 20, f"{columns} x {rows} tiles and the", size=11)
    body += text(x + side + 8, y + 35, "whole, made small", size=11)
    body += text(x + side + 8, y + 54, f"{N} x 3 x {R} x {R}", size=11, colour=FAINT)

    left = x + columns * step + 36
    body += arrow(left - 34, 92, left - 2, 92)
    body += box(left, 56, 168, 74, ["vision tower", f"{v.num_hidden_layers} layers, every patch",
                                    "looks at every patch", f"{N} x {1 + P:,} x {C:,}"], BLUE)
    body += arrow(left + 170, 92, left + 200, 92)
    body += box(left + 202, 56, 150, 74, ["pixel unshuffle", "2 x 2 patches", "become one vector",
                                          f"{N} x {L} x {4 * C:,}"], BLUE)
    body += arrow(left + 354, 92, left + 384, 92)
    body += box(left + 386, 56, 150, 74, ["projector", "two matrices, into", "the decoder's space",
                                          f"{N} x {L} x {D:,}"], BLUE)

    y = 168
    body += f'<rect x="{left}" y="{y}" width="536" height="46" rx="6" fill="{SAND}" stroke="{INK}"/>'
    body += text(left + 10, y + 19, "prompt", weight="bold")
    at = left + 66
    seen = f"{N * L:,} visual tokens"
    for words in ("<|im_start|>user  <img>", seen, "</img>", "describe this image"):
        length = breadth(words, 11)
        if words in ("describe this image", seen):
            body += (f'<rect x="{at - 5:.1f}" y="{y + 6}" width="{length + 4:.1f}" height="18" '
                     f'fill="{BLUE if words == seen else "white"}"/>')
        if words == seen:
            body += (f'<path d="M{left + 461} 132 V149 H{at + length / 2:.1f} V{y + 4} m-4 -5 l4 5 l4 -5" fill="none" '
                     f'stroke="{INK}" stroke-width="1.4"/>')
        body += text(at, y + 19, words, size=11)
        at += length + 9
    body += text(left + 66, y + 37, f"blue: the picture; white: the question; words are rows of a table, "
                 f"{llm.vocab_size:,} x {D:,}", size=10.5, colour=DIM)
    body += arrow(left + 90, y + 48, left + 90, y + 80)

    y = 250
    body += box(left, y, 200, 74, ["decoder, Qwen2", f"{llm.num_hidden_layers} layers, int4: each token",
                                   "looks at those before it", f"T x {D:,}"], BLUE)
    body += arrow(left + 202, y + 37, left + 232, y + 37)
    body += box(left + 234, y, 130, 74, ["scores", "one for each token", "of the vocabulary", f"{llm.vocab_size:,}"],
                BLUE)
    body += arrow(left + 366, y + 37, left + 396, y + 37)
    body += box(left + 398, y, 138, 74, ["a word", "the best, or one drawn", "at random; and again",
                                         "until <|im_end|>"], SAND)
    body += (f'<path d="M{left + 467} {y + 76} v14 H{left + 100} v-12 m-4 5 l4 -5 l4 5" fill="none" stroke="{INK}" '
             'stroke-width="1.4"/>')
    body += text(left + 284, y + 104, "one token a step; keys and values of the earlier ones are kept",
                 anchor="middle", size=10.5, colour=FAINT)
    return Svg(body, left + 550, y + 116, "A picture becomes words: tiles, vision tower, pixel unshuffle, projector, "
               "prompt, decoder, scores, a word")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()      # takes no options
    print(draw().save(HERE / "trip.svg"))
