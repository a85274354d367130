"""tiles shows what tiling cuts, strip where we are; every drawing can be put beside another and saved."""
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from drawings import NS, TIGER, parts, words

import minivl
from minivl import show
from minivl.limits import InputError


def test_tiles_shows_what_tiling_cuts():
    drawing = show.tiles(TIGER, max_num=6)
    cut = minivl.tiling.tile(TIGER, max_num=6)
    assert len(parts(drawing, "image")) == len(cut) == 7
    assert [w for w in words(drawing) if w.isdigit()] == [str(i) for i in range(6)]
    assert f"7 x 256 = {7 * 256} visual tokens" in words(drawing) and "6: thumbnail" in words(drawing)
    one = show.tiles(TIGER, max_num=1)
    assert len(parts(one, "image")) == 1 and not any("thumbnail" in w for w in words(one))


def test_strip_marks_where_we_are(tmp_path):
    stages = [("tiles", torch.Size([7, 3, 448, 448])), ("tower", [7, 1025, 1024]), ("words", "a tiger")]
    drawing = show.strip(stages, here="tower")
    assert {"7x3x448x448", "a tiger", "here"} <= set(words(drawing)) and len(parts(drawing, "path")) == 2 + 1
    both = show.beside(drawing, show.bars([1], ["x"]))
    assert both.width > drawing.width and len(parts(both, "g")) == 2
    assert ET.parse(both.save(tmp_path / "x.svg")).getroot().tag == NS + "svg"
    assert re.fullmatch(r"<svg [^<]*>.*</svg>", str(both), re.S)


@pytest.mark.parametrize("count", [1, 7, 20])
def test_a_long_strip_goes_on_in_the_next_row(count):
    """No wider than a notebook's column, however many stages; letters keep their size, words stay in their boxes."""
    drawing = show.strip([(f"stage number {i}", [i, 448, 448]) for i in range(count)])
    assert drawing.width <= 560 and len(parts(drawing, "path")) == count - 1
    boxes = [{k: float(v) for k, v in e.attrib.items() if k in ("x", "y", "width", "height")}
             for e in parts(drawing, "rect")[1:]]
    assert len(boxes) == count and len({(b["x"], b["y"]) for b in boxes}) == count
    assert all(b["x"] + b["width"] <= drawing.width and b["y"] + b["height"] <= drawing.height for b in boxes)
    for e in parts(drawing, "text"):
        half = float(e.attrib["font-size"]) * 0.5 * len(e.text) / 2
        assert float(e.attrib["font-size"]) >= 11
        assert any(b["x"] <= float(e.attrib["x"]) - half and float(e.attrib["x"]) + half <= b["x"] + b["width"]
                   and b["y"] < float(e.attrib["y"]) < b["y"] + b["height"] for b in boxes)


@pytest.mark.parametrize("wrong, match", [
    (lambda: show.strip([("a", "b")], here="c"), "'c' is none of the stages a")])
def test_stages_refuse(wrong, match):
    with pytest.raises(InputError, match=match):
        wrong()
