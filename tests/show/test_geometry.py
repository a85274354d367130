"""What a decoder does, drawn as arrows and lines that are where the numbers say."""
import math

import pytest
import torch
from drawings import parts, words

from minivl import show
from minivl.limits import InputError
from minivl.show.geometry import BLUE, ORANGE


def lines(drawing, colour):
    """Every polyline of one colour as points."""
    return [[tuple(map(float, p.split(","))) for p in e.attrib["points"].split()]
            for e in parts(drawing, "polyline") if e.attrib["stroke"] == colour]


def test_dials_point_where_the_angles_say():
    drawing = show.dials([[0.0, math.pi / 2, -1.0], [3 * math.pi, 0.001, 6000.0]], ["near", "far"], "abc")
    shafts = [line for line in lines(drawing, BLUE) if len(line) == 2]
    ways = [math.atan2(a[1] - b[1], b[0] - a[0]) for a, b in shafts]
    for way, angle in zip(ways, (0, math.pi / 2, -1, math.pi, 0.001, 6000)):
        assert math.cos(way) == pytest.approx(math.cos(angle), abs=0.02)
        assert math.sin(way) == pytest.approx(math.sin(angle), abs=0.02)
    assert {"0°", "90°", "1.5 turns", "0.057°", "955 turns"} <= set(words(drawing))
    assert "near: 0°, 90°, -57°" in drawing.about and len(lines(drawing, ORANGE)) == 5      # the first has not turned
    assert show.dials([[1.0]], ["one"], ["a"], title="a title", rows="r", columns="c")._repr_png_()


@pytest.mark.parametrize("H, K", [(8, 4), (16, 2), (64, 8), (3, 3), (4, 1)])
def test_each_query_head_has_a_line_to_its_kv_head(H, K):
    drawing = show.sharing(H, K)
    heads = [float(e.attrib["cx"]) for e in parts(drawing, "circle")]
    boxes = [float(e.attrib["x"]) + float(e.attrib["width"]) / 2 for e in parts(drawing, "rect")[1:]]
    ends = {round(line[0][0]): line[1][0] for colour in (BLUE, ORANGE) for line in lines(drawing, colour)}
    assert len(heads) == H and len(boxes) == K and drawing.width <= 860
    for h, x in enumerate(heads):
        assert ends[round(x)] == pytest.approx(boxes[h // (H // K)], abs=0.2)


def test_attention_in_a_plane():
    """Shares and mean are those of attention; long arrows stay inside."""
    q, k, v = torch.tensor([1.0, 2.0]), torch.randn(4, 2), torch.randn(4, 2)
    drawing = show.look(["a", "b", "c", "d"], q, k, v)
    weights = (k @ q / 2 ** 0.5).softmax(0)
    assert all(f"{float(w):.0%}" in words(drawing) for w in weights)
    mean = weights @ v
    assert f"({float(mean[0]):.2f}, {float(mean[1]):.2f})" in drawing.about
    shafts = [line for line in lines(drawing, ORANGE) if len(line) == 2]
    assert len(shafts) == 2
    (x0, y0), (x1, y1) = shafts[0]
    assert (x1 - x0) / (y0 - y1) == pytest.approx(1 / 2, abs=0.05)
    assert all(0 <= x <= drawing.width and 0 <= y <= drawing.height for c in (BLUE, ORANGE)
               for line in lines(drawing, c) for x, y in line)


def test_a_stream_is_as_high_as_it_is_long():
    drawing = show.stream(2.0, [("attention 0", 3.0, 4.0), ("MLP 0", 1.0, 8.0)])
    rects = parts(drawing, "rect")[1:]
    high = [float(e.attrib["height"]) for e in rects if e.attrib.get("fill-opacity")]
    boxes = [float(e.attrib["height"]) for e in rects if not e.attrib.get("fill-opacity")]
    assert [h / high[0] for h in high] == pytest.approx([1, 2, 4], rel=0.02)
    assert boxes[0] / high[0] == pytest.approx(1.5, rel=0.02) and boxes[1] / boxes[0] == pytest.approx(1 / 3, rel=0.02)
    assert {"attention 0", "MLP 0", "2.0", "4.0", "8.0", "3.0", "1.0"} <= set(words(drawing))


@pytest.mark.parametrize("wrong, match", [
    (lambda: show.dials([[1.0, 2.0]], ["a"], ["b"]), "one name for each row"),
    (lambda: show.sharing(8, 3), "3 kv heads cannot share 8"),
    (lambda: show.look(["a"], torch.ones(2), torch.ones(2, 2), torch.ones(1, 2)), "1 words need"),
    (lambda: show.stream(1.0, []), "at least one branch")])
def test_geometry_refuses(wrong, match):
    with pytest.raises(InputError, match=match):
        wrong()
