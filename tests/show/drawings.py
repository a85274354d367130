"""Shared by these tests: a picture, and the parts of a drawing."""
import math
import re
import xml.etree.ElementTree as ET

from conftest import GOLDEN
from PIL import Image, ImageFont

from minivl.show.png import printable

TIGER = Image.open(GOLDEN / "tiger.jpeg").convert("RGB")
NS = "{http://www.w3.org/2000/svg}"


def parts(drawing, tag):
    """All elements of one kind; the drawing must be well-formed XML on a card of its own, for dark pages."""
    root = ET.fromstring(str(drawing))
    if root.tag != NS + "svg" or root[0].attrib["fill"] != "white":
        raise AssertionError(f"{root.tag} begins with {root[0].attrib}")
    return [e for e in root.iter(NS + tag)]


def words(drawing):
    """Every text in it."""
    return [e.text for e in parts(drawing, "text")]


def boxes(drawing):
    """[(words, four corners (x, y)), ...]: where each text of the drawing lies, as its PNG has it."""
    found = []

    def walk(parent, x, y):
        for e in parent:
            if e.tag == NS + "g":
                dx, dy = (float(v) for v in re.findall(r"-?[\d.]+", e.attrib["transform"]))
                walk(e, x + dx, y + dy)
            elif e.tag == NS + "text" and e.text:
                size = float(e.attrib["font-size"])
                wide = ImageFont.load_default(size).getlength("".join(map(printable, e.text)))
                start = {"start": 0, "middle": -wide / 2, "end": -wide}[e.attrib["text-anchor"]]
                turn = math.radians(float(re.findall(r"-?[\d.]+", e.attrib.get("transform", "0"))[0]))
                end, up, down = start + wide, -0.72 * size, 0.1 * size
                corners = [(start, up), (end, up), (end, down), (start, down)]
                at = x + float(e.attrib["x"]), y + float(e.attrib["y"])
                found.append((e.text, [(at[0] + a * math.cos(turn) - b * math.sin(turn),
                                        at[1] + a * math.sin(turn) + b * math.cos(turn)) for a, b in corners]))

    walk(ET.fromstring(str(drawing)), 0.0, 0.0)
    return found


def overlap(one, other):
    """Whether two turned boxes touch: no side of either has one box on each of its two sides."""
    for box in (one, other):
        for (x0, y0), (x1, y1) in zip(box, box[1:]):
            side = [[(x - x0) * (y1 - y0) - (y - y0) * (x1 - x0) for x, y in b] for b in (one, other)]
            if min(side[0]) >= max(side[1]) or min(side[1]) >= max(side[0]):
                return False
    return True


def faults(drawing):
    """What no reader wants: texts over each other or beyond the edge."""
    texts = boxes(drawing)
    found = [f"{a!r} over {b!r}" for i, (a, one) in enumerate(texts) for b, other in texts[:i] if overlap(one, other)]
    return found + [f"{words!r} beyond the edge" for words, box in texts for x, y in box
                    if not (-0.5 <= x <= drawing.width + 0.5 and -0.5 <= y <= drawing.height + 0.5)]
