"""Build an SVG drawing from its parts: words, pictures, colours, drawings beside each other."""
from __future__ import annotations

import base64
import io
import re
from html import escape, unescape
from os import PathLike
from pathlib import Path

from PIL import Image

from minivl.show.png import png

INK = "#1c2733"
FAINT = "#65717e"       # five times as dark as the card: small words stay legible
LOW = (11, 83, 148)     # positive values
HIGH = (176, 78, 0)     # negative ones
# What is told apart: two or more kinds in one drawing.
BLUE, ORANGE, GREEN, PURPLE = (f"rgb({r},{g},{b})" for r, g, b in (LOW, HIGH, (60, 110, 60), (120, 60, 120)))


class Svg:
    """Hold a drawing of `width` x `height` pixels; `body` is what stands between <svg> and </svg>.

    `about`: what is to be seen, for those who do not see it; the words of the drawing if not given.
    """

    def __init__(self, body: str, width: float, height: float, about: str = ""):
        self.body = body
        self.width = width
        self.height = height
        self.about = about or unescape(" ".join(re.findall(r"<text[^>]*>([^<]*)</text>", body))) or "a picture"

    def __str__(self) -> str:
        size = f"{self.width:.0f} {self.height:.0f}"
        return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width:.0f}" height="{self.height:.0f}" '
                f'viewBox="0 0 {size}" role="img" aria-label="{escape(self.about)}" '
                'font-family="system-ui, sans-serif" font-size="12">'
                f'<rect width="100%" height="100%" rx="6" fill="white"/>{self.body}</svg>')

    def __repr__(self) -> str:
        return f"[drawing: {self.about}]"

    def _repr_png_(self) -> tuple[bytes, dict]:
        """Show the drawing in a notebook: as a picture, the one form that every page shows without trusting it."""
        return png(str(self)), {"width": round(self.width), "height": round(self.height), "alt": self.about,
                                "unconfined": True}     # wide ones scroll and keep their letters' size

    def save(self, path: str | PathLike) -> Path:
        """Write the drawing to a file and return its path."""
        Path(path).write_text(str(self), encoding="utf-8")
        return Path(path)


def beside(*drawings: Svg, gap: float = 16) -> Svg:
    """Put drawings next to each other, `gap` pixels apart."""
    body = ""
    x = 0.0
    for drawing in drawings:
        body += f'<g transform="translate({x:.1f} 0)">{drawing.body}</g>'
        x += drawing.width + gap
    return Svg(body, x - gap, max(drawing.height for drawing in drawings), "; ".join(d.about for d in drawings))


def text(x: float, y: float, words: object, *, anchor: str = "start", size: float = 12, colour: str = INK,
         weight: str = "normal", turn: float = 0) -> str:
    """Write words at (x, y): the left end of their base line, or its middle or end with `anchor` "middle" or "end".

    `turn`: degrees, clockwise.
    """
    rotate = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
            f'fill="{colour}"{rotate}>{escape(str(words))}</text>')


def beside_axis(x: float, y: float, words: str) -> str:
    """Write what an axis from top to bottom counts, left of it: upwards, a single letter upright."""
    return text(x, y, words, anchor="middle", colour=FAINT, turn=-90 if len(words) > 1 else 0) if words else ""


def tick(x: float, y: float) -> str:
    """Mark where a number stands below an axis."""
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + 4:.1f}" stroke="{FAINT}"/>'


def embedded(image: Image.Image, x: float, y: float, width: float, height: float, *, crisp: bool = False) -> str:
    """Place a picture inside a drawing, as a PNG. `crisp`: enlarged pixels stay squares."""
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    style = ' style="image-rendering:pixelated"' if crisp else ""
    return (f'<image x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"{style} '
            f'preserveAspectRatio="none" href="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"/>')


def shade(value: float, top: float) -> tuple[int, ...]:
    """Choose the RGB colour of a number: white is 0, dark is +-top. Negative numbers have another hue, and a mark of
    their own where squares are drawn."""
    part = min(1.0, abs(value) / top) if top > 0 else 0.0
    hue = LOW if value >= 0 else HIGH
    return tuple(round(255 + (h - 255) * part) for h in hue)
