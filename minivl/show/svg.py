"""Build an SVG drawing from its parts: words, pictures, colours, drawings beside each other."""
from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

INK = "#1c2733"
FAINT = "#8a96a3"
LOW = (11, 83, 148)     # positive values
HIGH = (176, 78, 0)     # negative ones


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
