"""Pictures of nano's world: shapes in a 3x3 layout, words and numbers in rows, small print, textures. Pillow only.

    Scene(things, size) -> draw(scene) -> RGB picture

Everything is drawn two or three times larger and averaged down, so that edges are smooth. Sizes are in pixels. Letters
are Pillow's own font (Aileron, inside the library since 10.1), so that every machine draws the same.
"""
from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFilter, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring")
COLOURS = {"red": (214, 40, 40), "orange": (245, 140, 20), "yellow": (246, 220, 50), "green": (40, 150, 60),
           "blue": (35, 85, 205), "purple": (135, 50, 165), "black": (18, 18, 18), "white": (252, 252, 252)}
BACKGROUNDS = ((205, 208, 212), (178, 196, 182), (212, 196, 178), (168, 180, 200), (122, 128, 132), (96, 108, 104),
               (140, 122, 118), (190, 176, 196))
SIZES = ("small", "large")
TILE = 112      # pixels, nano's tile; the pictures are made for it


@dataclass(frozen=True)
class Thing:
    """A shape, a word or a number. `row`, `column` 0..2 of the layout; words and numbers fill a row (column 1)."""
    kind: str                   # one of SHAPES, "word", "number", "print" (small print)
    colour: str
    row: int
    column: int = 1
    size: str = "large"         # shapes only
    text: str = ""
    radius: float = 0.4         # shapes: of the shorter side of a cell; texts: font size in pixels of a tile
    # From the cell's centre, -1..1 of the room there is; print: centre as fractions of the picture.
    shift: tuple = (0.0, 0.0)
    angle: float = 0.0          # degrees
    bold: bool = False

    @property
    def is_text(self) -> bool:
        return self.kind in ("word", "number", "print")


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn. `grid`: (columns, rows) of tiles it is made for; `scale`: pixels per tile pixel."""
    things: tuple
    background: tuple = BACKGROUNDS[0]
    second: tuple | None = None     # colour at the bottom, for a gradient
    grid: tuple = (1, 1)
    scale: float = 1.0
    texture: int | None = None      # seed of a picture from outside the world; no things then

    @property
    def size(self) -> tuple:
        return tuple(max(24, round(TILE * n * self.scale)) for n in self.grid)

    @property
    def shapes(self) -> list:
        """Return the shapes in reading order."""
        return sorted((t for t in self.things if not t.is_text), key=lambda t: (t.row, t.column))

    @property
    def texts(self) -> list:
        """Return words and numbers from top to bottom, small print not among them."""
        return sorted((t for t in self.things if t.kind in ("word", "number")), key=lambda t: t.row)

    def without(self, thing: Thing) -> Scene:
        return replace(self, things=tuple(t for t in self.things if t != thing))

    def with_(self, *things: Thing) -> Scene:
        return replace(self, things=(*self.things, *things))


@functools.lru_cache(maxsize=256)
def _font(size: int):
    return ImageFont.load_default(size)


def _outline(kind: str) -> list:
    """List the corners of a shape around (0, 0), about 1 from the centre."""
    def circle(n, radius=1.0, start=-90.0):
        turns = [math.radians(start + 360 * i / n) for i in range(n)]
        return [(radius * math.cos(t), radius * math.sin(t)) for t in turns]
    if kind in ("circle", "ring"):
        return circle(28)
    if kind == "square":
        return circle(4, 1.18, -135)
    if kind == "triangle":
        return [(x * 1.12, y * 1.12 + 0.18) for x, y in circle(3)]
    if kind == "star":
        return [p for pair in zip(circle(5, 1.12), circle(5, 0.45, -54)) for p in pair]
    if kind == "cross":
        a, b = 0.32, 1.0
        return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
                (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    turns = [2 * math.pi * i / 28 for i in range(28)]       # heart
    return [(16 * math.sin(t) ** 3 / 16,
             -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15 - 0.1)
            for t in turns]


OUTLINES = {kind: _outline(kind) for kind in SHAPES}


def draw(scene: Scene) -> Image.Image:
    """Draw the picture: RGB, `scene.size` pixels."""
    if scene.texture is not None:
        return _texture(random.Random(scene.texture), scene.size)
    width, height = scene.size
    k = 3 if width * height < 30_000 else 2                 # drawn k times larger
    image = Image.new("RGB", (k * width, k * height), scene.background)
    if scene.second is not None:
        ramp = Image.linear_gradient("L").resize(image.size)
        image.paste(Image.new("RGB", image.size, scene.second), mask=ramp)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        if thing.is_text:
            _write(image, thing, scene, k)
        else:
            radius = thing.radius * min(image.size) / 3
            x, y = _centre(thing, image.size)
            c, s = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
            points = [(x + radius * (c * u - s * v), y + radius * (s * u + c * v)) for u, v in OUTLINES[thing.kind]]
            if thing.kind == "ring":
                points.append(points[0])
                inner = [(x + 0.55 * (u - x), y + 0.55 * (v - y)) for u, v in points]
                points = points + inner[::-1]
            pen.polygon(points, fill=COLOURS[thing.colour])
    return image.reduce(k)


def _centre(thing: Thing, size: tuple) -> tuple:
    """Find the centre of a shape in a picture of this size."""
    cell = (size[0] / 3, size[1] / 3)
    return tuple(cell[i] * (n + 0.5) + thing.shift[i] * max(0.0, cell[i] / 2 - thing.radius * min(cell) * 1.05)
                 for i, n in enumerate((thing.column, thing.row)))


def text_size(thing: Thing) -> tuple:
    """Measure a text: width and height in pixels of a tile, before rotation."""
    left, top, right, bottom = _font(round(4 * thing.radius)).getbbox(thing.text, stroke_width=2 if thing.bold else 0)
    return (right - left) / 4, (bottom - top) / 4


def _line(thing: Thing, scene: Scene, k: int) -> tuple:
    """Write a text k times larger than the picture: (mask, turned as it stands; centre x, y; length before turning)."""
    width, height = (k * side for side in scene.size)
    # Words grow with the picture, as shapes do, so that the thumbnail shows them; small print does not.
    grow = 1.0 if thing.kind == "print" else min(scene.grid)
    size = round(k * scene.scale * grow * thing.radius)
    stroke = max(1, round(size / 24)) if thing.bold else 0
    left, top, right, bottom = _font(size).getbbox(thing.text, stroke_width=stroke)
    mask = Image.new("L", (right - left + 4, bottom - top + 4), 0)
    ImageDraw.Draw(mask).text((2 - left, 2 - top), thing.text, fill=255, font=_font(size), stroke_width=stroke)
    length = mask.width
    if thing.angle:
        mask = mask.rotate(thing.angle, Image.Resampling.BILINEAR, expand=True)
    if thing.kind == "print":
        return mask, width * thing.shift[0], height * thing.shift[1], length
    x = width / 2 + thing.shift[0] * max(0.0, (width - mask.width) / 2 - 2 * k)
    y = height * (2 * thing.row + 1) / 6 + thing.shift[1] * max(0.0, (height / 3 - mask.height) / 2)
    return mask, x, y, length


def _write(image: Image.Image, thing: Thing, scene: Scene, k: int):
    mask, x, y, _ = _line(thing, scene, k)
    image.paste(COLOURS[thing.colour], (round(x - mask.width / 2), round(y - mask.height / 2)), mask)


def marks(scene: Scene) -> list:
    """List where everything is: [(thing, letter or "", x, y), ...], centres as fractions of the picture."""
    found = []
    for thing in scene.things:
        if not thing.is_text:
            x, y = _centre(thing, scene.size)
            found.append((thing, "", x / scene.size[0], y / scene.size[1]))
            continue
        _, x, y, length = _line(thing, scene, 4)
        turn, width, height = math.radians(thing.angle), 4 * scene.size[0], 4 * scene.size[1]
        lengths = [_font(100).getlength(thing.text[:i]) for i in range(len(thing.text) + 1)]
        for letter, start, end in zip(thing.text, lengths, lengths[1:]):
            off = ((start + end) / 2 / lengths[-1] - 0.5) * length      # along the line
            found.append((thing, letter, (x + off * math.cos(turn)) / width, (y - off * math.sin(turn)) / height))
    return found


def _texture(rng: random.Random, size: tuple) -> Image.Image:
    """Draw something that is not of the world: blobs, stripes, noise and their mixtures."""
    def patchwork(cells):
        small = Image.new("RGB", (cells, cells))
        small.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(cells * cells)])
        way = rng.choice((Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.NEAREST))
        return small.resize(size, way)

    image = patchwork(rng.randrange(2, 14))
    for _ in range(rng.randrange(0, 3)):
        mask = Image.new("L", (8, 8))
        mask.putdata([rng.randrange(256) for _ in range(64)])
        image.paste(patchwork(rng.randrange(2, 40)), mask=mask.resize(size, Image.Resampling.BICUBIC))
    if rng.random() < 0.4:
        pen = ImageDraw.Draw(image)
        for _ in range(rng.randrange(3, 40)):
            points = [(rng.uniform(-0.2, 1.2) * size[0], rng.uniform(-0.2, 1.2) * size[1])
                      for _ in range(rng.randrange(2, 6))]
            fill = tuple(rng.randrange(256) for _ in range(3))
            if len(points) == 2 or rng.random() < 0.3:
                pen.line(points, fill=fill, width=rng.randrange(1, 6))
            else:
                pen.polygon(points, fill=fill)
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
    return image


# ---- random scenes --------------------------------------------------------------------------------------------------

GRIDS = ((2, 1), (1, 2), (2, 2), (3, 2), (2, 3), (3, 1))     # of pictures with several tiles


@dataclass(frozen=True)
class Style:
    """How a random scene may look. A curriculum narrows it."""
    words: tuple                # that may be written
    wide: float = 0.25          # share of pictures made for several tiles
    made_up: float = 0.4        # share of letters at random among them


def geometry(rng: random.Random, style: Style, wide: bool | None = None) -> dict:
    """Choose background, gradient, grid and scale of a random scene."""
    wide = rng.random() < style.wide if wide is None else wide
    grid = rng.choice(GRIDS) if wide else (1, 1)
    scale = rng.choice((1.0, rng.uniform(0.85, 1.3)))
    background = rng.choice(BACKGROUNDS)
    second = rng.choice(BACKGROUNDS) if rng.random() < 0.25 else None
    return {"background": background, "second": second, "grid": grid, "scale": scale}


def shape(rng: random.Random, cell: tuple, kind: str | None = None, colour: str | None = None,
          size: str | None = None) -> Thing:
    """Make a random shape in `cell` (row, column)."""
    size = size or rng.choice(SIZES)
    radius = rng.uniform(0.19, 0.25) if size == "small" else rng.uniform(0.38, 0.46)
    return Thing(kind or rng.choice(SHAPES), colour or rng.choice(list(COLOURS)), *cell, size, radius=radius,
                 shift=(rng.uniform(-1, 1), rng.uniform(-1, 1)), angle=rng.uniform(-12, 12))


def cells(rng: random.Random, n: int, rows: tuple = (0, 1, 2)) -> list:
    """Choose n different cells of the given rows."""
    return rng.sample([(row, column) for row in rows for column in range(3)], n)


def a_text(rng: random.Random, style: Style, least: int = 2, most: int = 6) -> tuple:
    """Make (kind, text): a number of up to 4 digits, a word of the list, or letters at random."""
    if rng.random() < 0.35:
        return "number", "".join(rng.choice("0123456789") for _ in range(rng.randint(least, min(4, most))))
    if rng.random() >= style.made_up:
        return "word", rng.choice([w for w in style.words if least <= len(w) <= most])
    return "word", "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(max(2, least), most)))


def row_text(rng: random.Random, style: Style, scene: Scene, row: int, kind: str | None = None,
             text: str | None = None) -> Thing:
    """Make a word or number that fills a row; in a long picture large enough for the thumbnail."""
    if text is None:
        kind, text = a_text(rng, style)
    smallest = 15 if scene.grid[0] == scene.grid[1] else 21
    thing = Thing(kind, rng.choice(list(COLOURS)), row, text=text, radius=rng.uniform(smallest, 30),
                  bold=rng.random() < 0.4, shift=(rng.uniform(-1, 1), rng.uniform(-1, 1)),
                  angle=rng.choice((0.0, rng.uniform(-7, 7))))
    while text_size(thing)[0] > 0.92 * TILE * scene.grid[0] / min(scene.grid):
        thing = replace(thing, radius=thing.radius * 0.93)
    return thing


def small_print(rng: random.Random, style: Style, scene: Scene) -> Thing:
    """Make a short line of 11 to 14 pixels, in one tile, away from shapes and other print where that can be done."""
    kind, text = a_text(rng, style, 3, 5)
    taken = {(t.row, t.column) for t in scene.things if t.kind != "print"}
    taken |= {(int(3 * t.shift[1]), int(3 * t.shift[0]) + d)
              for t in scene.things if t.kind == "print" for d in (-1, 0, 1)}
    for attempt in range(40):
        thing = Thing("print", rng.choice(("black", "white", "blue", "red")), 0, text=text, radius=rng.uniform(11, 14),
                      bold=rng.random() < 0.3)
        width, height = text_size(thing)
        columns, rows = scene.grid
        x = rng.randrange(columns) * TILE + rng.uniform(width / 2 + 3, TILE - width / 2 - 3)
        y = rng.randrange(rows) * TILE + rng.uniform(height / 2 + 3, TILE - height / 2 - 3)
        thing = replace(thing, shift=(x / (columns * TILE), y / (rows * TILE)))
        ends = [((x + side * width / 2) / (columns * TILE), (y + up * height / 2) / (rows * TILE))
                for side in (-1, 0, 1) for up in (-1, 1)]
        if not any((int(3 * v), int(3 * u)) in taken for u, v in ends) or attempt > 30:
            break
    return thing
