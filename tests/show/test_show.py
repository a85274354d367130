"""Drawings are well-formed, show the numbers they are given, and need no colours to be read."""
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from conftest import GOLDEN
from PIL import Image

import minivl
from minivl import show
from minivl.limits import InputError

TIGER = Image.open(GOLDEN / "tiger.jpeg").convert("RGB")
NS = "{http://www.w3.org/2000/svg}"


def parts(drawing, tag):
    root = ET.fromstring(str(drawing))
    assert root.tag == NS + "svg" and root[0].attrib["fill"] == "white"      # a card of its own, for dark pages
    return [e for e in root.iter(NS + tag)]


def words(drawing):
    return [e.text for e in parts(drawing, "text")]


def test_heat_tells_every_value():
    m = torch.tensor([[0.0, 1.0, -2.0], [0.5, -0.1, 2.0]])
    drawing = show.heat(m, "row", "column", title="a & b", row_names=["r<0>", "r1"], column_names="xyz", cell=20)
    titles = [e.text for e in parts(drawing, "title")]
    assert titles == [f"[{r}, {c}] = {m[r, c]:.4g}" for r in range(2) for c in range(3)]
    fills = [e.attrib["fill"] for e in parts(drawing, "rect")[1:7]]
    assert fills[0] == "rgb(255,255,255)" and fills[5] == "rgb(11,83,148)" and fills[2] == "rgb(176,78,0)"
    assert words(drawing).count("\u2212") == 1                 # the large negative one, without colour
    assert {"a & b", "r<0>", "x", "row", "column"} <= set(words(drawing)) and any("dark 2" in w for w in words(drawing))
    assert {"-2", "0.5"} <= set(words(show.heat(m, numbers=True)))
    assert len(parts(show.heat(torch.zeros(3, 3)), "title")) == 9      # nothing to divide by


def test_a_large_map_is_one_picture():
    m = torch.randn(80, 70)
    drawing = show.heat(m)
    assert len(parts(drawing, "image")) == 1 and len(str(drawing)) < 60_000
    assert len(parts(show.heat(m[:64, :64]), "title")) == 4096


def test_bars_and_curves():
    drawing = show.bars([3, -1.5, 0], ["tower", "minus", "none"], unit="s")
    assert [w for w in words(drawing) if w.endswith(" s")] == ["3 s", "-1.5 s", "0 s"]
    width = {e[0].text.split(":")[0]: float(e.attrib["width"]) for e in parts(drawing, "rect") if len(e)}
    assert width["tower"] == pytest.approx(2 * width["minus"], rel=0.01) and width["none"] < 1
    drawing = show.curve({"a": [1, 0.1, 0.01], "b": [(0, 0.5), (2, 0.05)]}, log=True, x="layer")
    lines = parts(drawing, "polyline")
    assert len(lines) == 2 and lines[0].attrib["stroke-dasharray"] != lines[1].attrib["stroke-dasharray"] and {"a", "b"} <= set(words(drawing))
    ys = [float(p.split(",")[1]) for p in lines[0].attrib["points"].split()]
    assert ys[2] - ys[1] == pytest.approx(ys[1] - ys[0], abs=0.2)       # decades are equally far apart
    assert show.curve({"one": [5.0]}) and show.curve({"flat": [1, 1]})


def test_overlay_frames_the_heaviest_squares():
    m = torch.zeros(4, 4)
    m[1, 2], m[3, 0], m[0, 0] = 3, 2, 1
    drawing = show.overlay(TIGER, m, width=400)
    frames = [e.attrib for e in parts(drawing, "rect") if e.attrib.get("stroke-width") == "2"]
    height = 400 * TIGER.height / TIGER.width
    corners = [float(f[k]) for f in frames for k in "xy"]
    assert corners == pytest.approx([204, 4 + height / 4, 4, 4 + height * 3 / 4, 4, 4], abs=0.1)
    pale = [e for e in parts(drawing, "rect") if e.attrib.get("fill-opacity") == "0.85"]
    assert len(pale) == 13


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
    assert {"7x3x448x448", "a tiger", "\u25bc here"} <= set(words(drawing)) and len(parts(drawing, "path")) == 2
    both = show.beside(drawing, show.bars([1], ["x"]))
    assert both.width > drawing.width and len(parts(both, "g")) == 2
    assert ET.parse(both.save(tmp_path / "x.svg")).getroot().tag == NS + "svg" and both._repr_svg_() == str(both)
    assert re.fullmatch(r"<svg [^<]*>.*</svg>", str(both), re.S)


@pytest.mark.parametrize("wrong, match", [
    (lambda: show.heat(torch.zeros(2, 3, 4)), "this tensor has shape \\[2, 3, 4\\]; choose one head"),
    (lambda: show.heat(torch.tensor([[float("nan"), 1.0]])), "1 of 2 values are not finite"),
    (lambda: show.bars([1, 2], ["a"]), "2 values and 1 names"),
    (lambda: show.curve({"a": [1, float("inf")]}), "needs finite numbers"),
    (lambda: show.curve({"a": [1, 0]}, log=True), "numbers above 0"),
    (lambda: show.strip([("a", "b")], here="c"), "'c' is none of the stages a")])
def test_refusals(wrong, match):
    with pytest.raises(InputError, match=match):
        wrong()
