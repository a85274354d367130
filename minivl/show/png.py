"""Paint a drawing as a picture, for pages that show no SVG: JupyterLab drops what it did not run, GitHub spoils it.

    an Svg -> PNG, two pixels for each of the drawing

Only what the drawings of this folder are made of: rect, line, polyline, path (M L H V), circle, text, image, g.
"""
from __future__ import annotations

import base64
import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import lru_cache

from PIL import Image, ImageColor, ImageDraw, ImageFont

from minivl.limits import InputError

SHARP = 2       # pixels of the PNG for one of the drawing: clear on fine screens too
SMOOTH = 2      # painted so many times larger, as Pillow's lines have hard edges
UNIT = SHARP * SMOOTH
ANCHOR = {"start": "ls", "middle": "ms", "end": "rs"}
NUMBER = r"-?\d+(?:\.\d+)?"


def png(svg: str) -> bytes:
    """Paint an SVG of this folder; PNG with at most 256 colours."""
    root = ET.fromstring(svg)
    size = round(float(root.get("width")) * UNIT), round(float(root.get("height")) * UNIT)
    canvas = Image.new("RGB", size, "white")
    _Painter(canvas).children(root, 0.0, 0.0)
    data = io.BytesIO()
    small = canvas.reduce(SMOOTH)
    small.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
    return data.getvalue()


class _Painter:
    """Paint elements one over the other on `canvas`, which has UNIT pixels for each of the drawing."""

    def __init__(self, canvas: Image.Image):
        self.canvas = canvas
        self.draw = ImageDraw.Draw(canvas, "RGBA")

    def children(self, parent: ET.Element, x: float, y: float) -> None:
        """Paint the elements of `parent`, whose origin is at (x, y)."""
        for e in parent:
            tag = e.tag.split("}")[-1]
            if tag == "title":      # is said by the mouse, not painted
                continue
            if tag not in ("g", "rect", "line", "polyline", "path", "circle", "text", "image"):
                raise InputError(f"a drawing is painted from g, rect, line, polyline, path, circle, text and image, "
                                 f"this one has {tag}; save() writes any SVG")
            if tag == "g":
                dx, dy = map(float, re.findall(NUMBER, e.get("transform")))
                self.children(e, x + dx, y + dy)
            else:
                getattr(self, tag)(e, x, y)

    def rect(self, e: ET.Element, x: float, y: float) -> None:
        if e.get("width") == "100%":
            return      # the white card is there
        x += float(e.get("x"))
        y += float(e.get("y"))
        width = float(e.get("width"))
        height = float(e.get("height"))
        rx = float(e.get("rx", 0)) * UNIT
        box = [round(x * UNIT), round(y * UNIT), round((x + width) * UNIT) - 1, round((y + height) * UNIT) - 1]
        if _colour(e, "fill") and box[2] >= box[0] and box[3] >= box[1]:
            self.draw.rounded_rectangle(box, rx, fill=_colour(e, "fill"))
        if rx and _colour(e, "stroke"):
            half = _thickness(e) / 2
            box = [box[0] - half, box[1] - half, box[2] + half, box[3] + half]
            self.draw.rounded_rectangle(box, rx + half, outline=_colour(e, "stroke"), width=_thickness(e))
        elif _colour(e, "stroke"):
            corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
            self._stroke(e, corners + corners[:2])

    def line(self, e: ET.Element, x: float, y: float) -> None:
        self._stroke(e, [(x + float(e.get(f"x{i}")), y + float(e.get(f"y{i}"))) for i in (1, 2)])

    def polyline(self, e: ET.Element, x: float, y: float) -> None:
        numbers = [float(v) for v in re.findall(NUMBER, e.get("points"))]
        self._stroke(e, [(x + a, y + b) for a, b in zip(numbers[::2], numbers[1::2])])

    def path(self, e: ET.Element, x: float, y: float) -> None:
        for points in _subpaths(e.get("d")):
            self._stroke(e, [(x + a, y + b) for a, b in points])

    def circle(self, e: ET.Element, x: float, y: float) -> None:
        at = (x + float(e.get("cx"))) * UNIT, (y + float(e.get("cy"))) * UNIT
        r = float(e.get("r")) * UNIT
        self.draw.ellipse([at[0] - r, at[1] - r, at[0] + r, at[1] + r], fill=_colour(e, "fill"))

    def image(self, e: ET.Element, x: float, y: float) -> None:
        picture = Image.open(io.BytesIO(base64.b64decode(e.get("href").partition(",")[2]))).convert("RGB")
        crisp = "pixelated" in e.get("style", "")
        left, top = (x + float(e.get("x"))) * UNIT, (y + float(e.get("y"))) * UNIT
        size = round(float(e.get("width")) * UNIT), round(float(e.get("height")) * UNIT)
        way = Image.Resampling.NEAREST if crisp else Image.Resampling.BILINEAR
        self.canvas.paste(picture.resize(size, way), (round(left), round(top)))

    def text(self, e: ET.Element, x: float, y: float) -> None:
        at = (x + float(e.get("x"))) * UNIT, (y + float(e.get("y"))) * UNIT
        size = float(e.get("font-size")) * UNIT
        words = "".join(map(printable, e.text or ""))
        how = {"font": ImageFont.load_default(size), "anchor": ANCHOR[e.get("text-anchor")],
               "stroke_width": round(size / 40) if e.get("font-weight") == "bold" else 0}
        turn = float(re.findall(NUMBER, e.get("transform", "0"))[0])
        if not turn:
            self.draw.text(at, words, fill=_colour(e, "fill"), **how)
            return
        reach = math.ceil(how["font"].getlength(words) + size)
        mask = Image.new("L", (2 * reach, 2 * reach))
        ImageDraw.Draw(mask).text((reach, reach), words, fill=255, **how)
        mask = mask.rotate(-turn, Image.Resampling.BICUBIC)
        self.canvas.paste(_colour(e, "fill")[:3], (round(at[0]) - reach, round(at[1]) - reach), mask)

    def _stroke(self, e: ET.Element, points: list[tuple[float, float]]) -> None:
        """Draw lines through points, dashed where the element says so."""
        dashes = [float(v) * UNIT for v in re.findall(NUMBER, e.get("stroke-dasharray", ""))]
        points = [(a * UNIT, b * UNIT) for a, b in points]
        for piece in _dashed(points, dashes) if dashes else [points]:
            self.draw.line(piece, fill=_colour(e, "stroke"), width=_thickness(e), joint="curve")


def _colour(e: ET.Element, which: str) -> tuple[int, ...] | None:
    """Read the "fill" or "stroke" of an element, with its opacity: (red, green, blue, alpha); None for none."""
    name = e.get(which, "none")
    if name == "none":
        return None
    return (*ImageColor.getrgb(name)[:3], round(255 * float(e.get(f"{which}-opacity", 1))))


def _thickness(e: ET.Element) -> int:
    return max(1, round(float(e.get("stroke-width", 1)) * UNIT))


def _subpaths(d: str) -> Iterator[list[tuple[float, float]]]:
    """Read the lines of a path: M, L, H and V; small letters count from the point before."""
    points = []
    x = y = 0.0
    for letter, rest in re.findall(r"([A-Za-z])([^A-Za-z]*)", d):
        numbers = [float(v) for v in re.findall(NUMBER, rest)]
        near = letter.islower()
        if letter not in "MmLlHhVv":
            raise InputError(f"a path is painted from M, L, H and V, this one has {letter}; save() writes any SVG")
        if letter in "Mm" and points:
            yield points
            points = []
        pairs = ([(v, 0.0 if near else y) for v in numbers] if letter in "Hh" else
                 [(0.0 if near else x, v) for v in numbers] if letter in "Vv" else zip(numbers[::2], numbers[1::2]))
        for a, b in pairs:
            x, y = (x + a, y + b) if near else (a, b)
            points.append((x, y))
    yield points


def _dashed(points: list[tuple[float, float]], dashes: list[float]) -> Iterator[list[tuple[float, float]]]:
    """Cut a line through points into its dashes; `dashes`: lengths drawn and left out in turn."""
    piece = [points[0]]
    turn = 0
    left = dashes[0]
    for (x, y), (x1, y1) in zip(points, points[1:]):
        length = math.hypot(x1 - x, y1 - y)
        while length > left:
            x, y = x + (x1 - x) * left / length, y + (y1 - y) * left / length
            length -= left
            if turn % 2 == 0:
                yield [*piece, (x, y)]
            piece = [(x, y)]
            turn += 1
            left = dashes[turn % len(dashes)]
        left -= length
        piece.append((x1, y1))
    if turn % 2 == 0:
        yield piece


@lru_cache(1024)
def printable(letter: str) -> str:
    """Keep a letter that Pillow's own font has, write another one as \\u4e2d: an empty box would say nothing."""
    font = ImageFont.load_default(20)
    missing = font.getmask("\uffff")
    drawn = font.getmask(letter)
    return ascii(letter)[1:-1] if (drawn.size, bytes(drawn)) == (missing.size, bytes(missing)) else letter
