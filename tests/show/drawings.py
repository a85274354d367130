"""Shared by these tests: a picture, and the parts of a drawing."""
import xml.etree.ElementTree as ET

from conftest import GOLDEN
from PIL import Image

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
