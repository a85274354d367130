"""heat and overlay show the numbers they are given, and need no colours to be read."""
import base64
import io

import pytest
import torch
from drawings import TIGER, boxes, parts, words
from PIL import Image

from minivl import show
from minivl.limits import InputError
from minivl.show.svg import shade


def test_heat_tells_every_value():
    m = torch.tensor([[0.0, 1.0, -2.0], [0.5, -0.1, 2.0]])
    drawing = show.heat(m, "row", "column", title="a & b", row_names=["r<0>", "r1"], column_names="xyz", cell=20)
    titles = [e.text for e in parts(drawing, "title")]
    assert titles == [f"[{r}, {c}] = {m[r, c]:.4g}" for r in range(2) for c in range(3)]
    fills = [e.attrib["fill"] for e in parts(drawing, "rect")[1:7]]
    assert fills[0] == "rgb(255,255,255)" and fills[5] == "rgb(11,83,148)" and fills[2] == "rgb(176,78,0)"
    minus = [e.attrib["d"] for e in parts(drawing, "path")]
    assert len(minus) == 2 and minus[0].endswith("h5")          # on both negative ones, without colour
    assert {"a & b", "r<0>", "x", "row", "column"} <= set(words(drawing))
    assert {"-2", "0", "2"} <= set(words(drawing))              # along the bar that explains the colours
    assert {"-2", "0.5"} <= set(words(show.heat(m, numbers=True)))
    assert len(parts(show.heat(torch.zeros(3, 3)), "title")) == 9      # nothing to divide by


def test_a_large_map_is_one_picture():
    m = torch.randn(80, 70)
    drawing = show.heat(m)
    assert len(parts(drawing, "image")) == 2 and len(str(drawing)) < 60_000
    assert len(parts(show.heat(m[:64, :64]), "title")) == 4096


def test_overlay_frames_the_heaviest_squares():
    m = torch.zeros(4, 4)
    m[1, 2], m[3, 0], m[0, 0] = 3, 2, 1
    drawing = show.overlay(TIGER, m, width=400)
    frames = [e.attrib for e in parts(drawing, "rect") if e.attrib.get("stroke-width") == "2"]
    height = 400 * TIGER.height / TIGER.width
    corners = [float(f[k]) for f in frames for k in "xy"]
    assert corners == pytest.approx([204, 4 + height / 4, 4, 4 + height * 3 / 4, 4, 4], abs=0.1)
    assert {"4 x 4 squares; clear 3, pale 0", "framed: the largest, 1 to 3"} <= set(words(drawing))
    assert show.overlay(TIGER, m / 7, title="layer 0: 20.4% on the picture", width=192).width <= 200     # four beside
    assert not parts(drawing, "circle")
    looks = show.overlay(TIGER, m, width=400, looker=6)
    dot = parts(looks, "circle")[0].attrib
    assert [float(dot[k]) for k in ("cx", "cy")] == pytest.approx([254, 4 + height * 3 / 8], abs=0.1)
    assert "dot: the square that looks" in words(looks) and looks.about.endswith("looks from [1, 2]")
    pale = [e for e in parts(drawing, "rect") if e.attrib.get("fill-opacity") == "0.85"]
    assert len(pale) == 13
    m[3, 0], m[0, 0] = 0.2, 1e-5     # a fifteenth is framed, next to nothing is not
    assert "framed: the largest, 1 to 2" in words(show.overlay(TIGER, m))


@pytest.mark.parametrize("wrong, match", [
    (lambda: show.heat(torch.zeros(2, 3, 4)), "this tensor has shape \\[2, 3, 4\\]; choose one head"),
    (lambda: show.heat(torch.tensor([[float("nan"), 1.0]])), "1 of 2 values are not finite")])
def test_maps_refuse(wrong, match):
    with pytest.raises(InputError, match=match):
        wrong()


def test_the_bar_below_a_map_says_what_each_colour_is():
    def bar(m, **how):
        """[(number, colour above it), ...]"""
        drawing = show.heat(m, **how)
        image = parts(drawing, "image")[-1].attrib
        shades = Image.open(io.BytesIO(base64.b64decode(image["href"].partition(",")[2])))
        x, y, width = (float(image[k]) for k in ("x", "y", "width"))
        below = [e for e in parts(drawing, "text") if float(e.attrib["y"]) > y]
        place = [min(shades.width - 1, int((float(e.attrib["x"]) - x) / width * shades.width)) for e in below]
        return [(float(e.text), shades.getpixel((at, 0))) for e, at in zip(below, place)]

    def near(found, v, top):
        return max(abs(a - b) for a, b in zip(found, shade(v, top))) <= 4

    assert [v for v, _ in bar(torch.tensor([[0.0, 3.0]]))] == [0, 1, 2, 3]
    assert {v for v, _ in bar(torch.tensor([[-4.0, -1.0]]))} == {-4, -3, -2, -1, 0}      # no colour that is not there
    for m, how, top in (([[-2.0, 1.0]], {}, 2.0), ([[0.2, 0.7]], {"top": 1.0}, 1.0), ([[-0.3, -0.1]], {}, 0.3)):
        colours = bar(torch.tensor(m), **how)
        assert len(colours) >= 4 and all(near(colour, v, top) for v, colour in colours)


def test_numbers_fit_their_squares():
    """Fewer digits first, then smaller letters; none is lost."""
    m = torch.tensor([[0.000862, 3.68e-06, -1.94e-05, 0.0], [1.0, 0.6902, 100.25, -331.0]])
    for cell, digits in ((90, ["0.000862", "4e-6"]), (54, ["0.00086", "4e-6"]), (20, ["0.0009", "4e-6"])):
        drawing = show.heat(m, numbers=True, cell=cell)
        squares = [e.attrib for e in parts(drawing, "rect") if len(e)]
        left, right = (min(float(s["x"]) for s in squares), max(float(s["x"]) + cell for s in squares))
        inside = [(words, box) for words, box in boxes(drawing) if left < box[0][0] and box[1][0] < right]
        written = [w for w, _ in inside]
        assert all(d in written for d in digits)
        for words_, box in inside:
            if words_ in digits:
                assert box[1][0] - box[0][0] <= cell
