"""A packed word and what rounding does, drawn from the package's own rules."""
import pytest
import torch
from drawings import parts, words

from minivl import awq, show
from minivl.limits import InputError


def boxes(drawing):
    """(x, fill) of the eight columns at the bottom."""
    return [(float(e.attrib["x"]), e.attrib["fill"]) for e in parts(drawing, "rect") if e.attrib.get("rx") == "4"]


@pytest.mark.parametrize("numbers", [range(8), (15, 3, 0, 9, 8, 1, 14, 7)])
def test_a_word_shows_each_number_at_its_column(numbers):
    """Also of a negative int32."""
    packed = awq.pack(torch.tensor(list(numbers)))
    drawing = show.word(packed[0], title="a word")
    big = sorted((float(e.attrib["x"]), e.text) for e in parts(drawing, "text") if e.attrib["font-size"] == "14")
    assert [int(number) for _, number in big] == list(numbers)
    bits = "".join(e.text for _, e in sorted((float(e.attrib["x"]), e) for e in parts(drawing, "text")
                                             if e.text in ("0", "1") and e.attrib["font-size"] == "12"))
    assert int(bits, 2) == int(packed[0]) & 0xFFFFFFFF
    assert len(boxes(drawing)) == 8 and len({fill for _, fill in boxes(drawing)}) == 2
    assert str(show.word(int(packed[0]) & 0xFFFFFFFF, title="a word")) == str(drawing)


def test_rounding_leads_from_each_weight_to_its_level():
    levels = torch.arange(16.0)
    drawing = show.rounding([0.4, 7.6], {"one": (levels, [0.0, 8.0]), "two": (levels - 15, [0.0, 0.0])})
    assert {"one", "two", "largest error 0.4", "largest error 7.6"} <= set(words(drawing))
    ways = [[float(p.split(",")[0]) for p in e.attrib["points"].split()] for e in parts(drawing, "polyline")]
    strokes = [float(e.attrib["x1"]) for e in parts(drawing, "line") if e.attrib.get("stroke-width") == "1.6"]
    assert len(ways) == 4 and len(strokes) == 32 and all(way[1] in strokes for way in ways)
    assert len({e.attrib["stroke"] for e in parts(drawing, "polyline")}) == 2
    with pytest.raises(InputError, match="where each of them goes"):
        show.rounding([1.0, 2.0], {"one": (levels, [1.0])})
