"""heat and overlay show the numbers they are given, and need no colours to be read."""
import pytest
import torch
from drawings import TIGER, parts, words

from minivl import show
from minivl.limits import InputError


def test_heat_tells_every_value():
    m = torch.tensor([[0.0, 1.0, -2.0], [0.5, -0.1, 2.0]])
    drawing = show.heat(m, "row", "column", title="a & b", row_names=["r<0>", "r1"], column_names="xyz", cell=20)
    titles = [e.text for e in parts(drawing, "title")]
    assert titles == [f"[{r}, {c}] = {m[r, c]:.4g}" for r in range(2) for c in range(3)]
    fills = [e.attrib["fill"] for e in parts(drawing, "rect")[1:7]]
    assert fills[0] == "rgb(255,255,255)" and fills[5] == "rgb(11,83,148)" and fills[2] == "rgb(176,78,0)"
    minus = [e.attrib["d"] for e in parts(drawing, "path")]
    assert len(minus) == 1 and minus[0].endswith("h5")          # on the large negative one, without colour
    assert {"a & b", "r<0>", "x", "row", "column"} <= set(words(drawing)) and any("dark 2" in w for w in words(drawing))
    assert {"-2", "0.5"} <= set(words(show.heat(m, numbers=True)))
    assert len(parts(show.heat(torch.zeros(3, 3)), "title")) == 9      # nothing to divide by


def test_a_large_map_is_one_picture():
    m = torch.randn(80, 70)
    drawing = show.heat(m)
    assert len(parts(drawing, "image")) == 1 and len(str(drawing)) < 60_000
    assert len(parts(show.heat(m[:64, :64]), "title")) == 4096


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


@pytest.mark.parametrize("wrong, match", [
    (lambda: show.heat(torch.zeros(2, 3, 4)), "this tensor has shape \\[2, 3, 4\\]; choose one head"),
    (lambda: show.heat(torch.tensor([[float("nan"), 1.0]])), "1 of 2 values are not finite")])
def test_maps_refuse(wrong, match):
    with pytest.raises(InputError, match=match):
        wrong()
