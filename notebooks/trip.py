"""Draws notebooks/trip.svg, the drawing at the top of the README: python notebooks/trip.py

The numbers are those of InternVL2_5-4B for tests/golden/tiger.jpeg, computed from its config and the package's tiling.
"""
from pathlib import Path

from PIL import Image

from minivl import tiling
from minivl.config import Config
from minivl.show import FAINT, INK, Svg, embedded, text
from weights_tools.synthesize import config_json

HERE = Path(__file__).parent
BLUE, SAND = "#e3edf7", "#fbf3e6"


def box(x, y, width, height, lines, fill="white"):
    """A rounded box; the first line is bold."""
    body = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{INK}"/>'
    for i, line in enumerate(lines):
        body += text(x + width / 2, y + 18 + 15 * i, line, anchor="middle", weight="bold" if i == 0 else "normal", size=12 if i == 0 else 11,
                     colour=INK if i == 0 else "#46535f")
    return body


def arrow(x1, y1, x2, y2, label=""):
    head = "-5 -4 l5 4 l-5 4" if y1 == y2 and x2 > x1 else "5 -4 l-5 4 l5 4" if y1 == y2 else "-4 -5 l4 5 l4 -5"
    middle = text((x1 + x2) / 2, y1 - 6, label, anchor="middle", size=10.5, colour=FAINT) if label else ""
    return f'<path d="M{x1} {y1} L{x2} {y2} m{head}" fill="none" stroke="{INK}" stroke-width="1.4"/>' + middle


def draw() -> Svg:
    c = Config.from_json(config_json("4B"))
    v, llm, R = c.vision_config, c.llm_config, c.force_image_size
    image = Image.open(HERE.parent / "tests" / "golden" / "tiger.jpeg").convert("RGB")
    columns, rows = tiling.choose_grid(*image.size, max_num=c.max_dynamic_patch, tile_size=R)
    tiles = tiling.tile(image, max_num=c.max_dynamic_patch, tile_size=R)
    N, P, C, L, D = len(tiles), (R // v.patch_size) ** 2, v.hidden_size, c.num_image_token, llm.hidden_size
    side, x0, y0 = 62, 16, 44
    body = text(16, 24, "A picture becomes words: InternVL2.5-4B", weight="bold", size=15)
    for n, tile in enumerate(tiles[:-1]):
        x, y = x0 + n % columns * (side + 4), y0 + n // columns * (side + 4)
        body += embedded(tile.resize((side + 28, side + 28)).quantize(96).convert("RGB"), x, y, side, side) + f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="none" stroke="{INK}"/>'
    body += embedded(tiles[-1].resize((side + 28, side + 28)).quantize(96).convert("RGB"), x0, y0 + rows * (side + 4) + 6, side, side)
    body += f'<rect x="{x0}" y="{y0 + rows * (side + 4) + 6}" width="{side}" height="{side}" fill="none" stroke="{INK}" stroke-dasharray="4 3"/>'
    note = y0 + rows * (side + 4) + 26
    body += text(x0 + side + 8, note, f"{columns} x {rows} tiles and the", size=11) + text(x0 + side + 8, note + 15, "whole, made small", size=11)
    body += text(x0 + side + 8, note + 34, f"{N} x 3 x {R} x {R}", size=11, colour=FAINT)
    left = x0 + columns * (side + 4) + 30
    body += arrow(left - 28, 92, left + 4, 92)
    body += box(left + 6, 56, 168, 74, ["vision tower", f"{v.num_hidden_layers} layers, every patch", "looks at every patch", f"{N} x {1 + P:,} x {C:,}"], BLUE)
    body += arrow(left + 176, 92, left + 206, 92)
    body += box(left + 208, 56, 150, 74, ["pixel unshuffle", "2 x 2 patches", "become one vector", f"{N} x {L} x {4 * C:,}"], BLUE)
    body += arrow(left + 360, 92, left + 390, 92)
    body += box(left + 392, 56, 150, 74, ["projector", "two matrices, into", "the decoder's space", f"{N} x {L} x {D:,}"], BLUE)
    tokens = N * L
    body += arrow(left + 467, 132, left + 467, 166)
    px, py, cell = left + 6, 168, 536
    body += f'<rect x="{px}" y="{py}" width="{cell}" height="46" rx="6" fill="{SAND}" stroke="{INK}"/>'
    body += text(px + 10, py + 19, "prompt", weight="bold") + text(px + 66, py + 19, f"<|im_start|>user  <img> [ {tokens:,} visual tokens ] </img>  describe this image", size=11)
    body += text(px + 66, py + 36, f"words: rows of a table, {llm.vocab_size:,} x {D:,}; visual tokens: in the places kept for them", size=10.5, colour="#46535f")
    body += arrow(px + 90, py + 48, px + 90, py + 80)
    y = py + 82
    body += box(left + 6, y, 200, 74, ["decoder, Qwen2", f"{llm.num_hidden_layers} layers, int4: each token", "looks at those before it", f"T x {D:,}"], BLUE)
    body += arrow(left + 208, y + 37, left + 238, y + 37)
    body += box(left + 240, y, 130, 74, ["scores", "one for each token", "of the vocabulary", f"{llm.vocab_size:,}"], BLUE)
    body += arrow(left + 372, y + 37, left + 402, y + 37)
    body += box(left + 404, y, 138, 74, ["a word", "the best, or drawn", "by lot; and again", "until <|im_end|>"], SAND)
    body += f'<path d="M{left + 473} {y + 76} v14 H{left + 106} v-12 m-4 5 l4 -5 l4 5" fill="none" stroke="{INK}" stroke-width="1.4"/>'
    body += text(left + 290, y + 104, "one token a step; keys and values of the earlier ones are kept", anchor="middle", size=10.5, colour=FAINT)
    return Svg(body, left + 556, y + 116)


if __name__ == "__main__":
    print(draw().save(HERE / "trip.svg"))
