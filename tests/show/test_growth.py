"""growing draws one box for each token and layer, dark in the step that writes it, and says how many bytes that is."""
import pytest
from drawings import parts, words

from minivl import show
from minivl.limits import InputError
from minivl.show.growth import KEPT, NEW


def test_boxes_of_each_step():
    drawing = show.growing([3, 4, 6], layers=2, box_bytes=1024, read=["the prompt", "one", "two more"], title="cache")
    boxes = [e for e in parts(drawing, "rect") if len(e)]
    assert len(boxes) == 2 * (3 + 4 + 6)
    new = [e[0].text.split(",")[0] for e in boxes if e.attrib["fill"] == NEW]
    assert new == [f"token {t}" for t in (0, 1, 2, 3, 4, 5) for _ in range(2)]      # each is written once
    assert sum(e.attrib["fill"] == KEPT for e in boxes) == 2 * (3 + 4)
    assert {"the prompt", "two more", "6 tokens x 2 layers x 1,024 = 12,288 bytes"} <= set(words(drawing))
    assert "one: 4 tokens x 2 layers x 1,024 = 8,192 bytes" in drawing.about


@pytest.mark.parametrize("layers, tokens", [(1, 1), (36, 300), (80, 20)])
def test_any_size_stays_inside_its_drawing(layers, tokens):
    """No wider than a notebook's column, whatever the model."""
    drawing = show.growing([tokens, tokens + 1], layers, 1024)
    assert drawing.width <= 660 and drawing._repr_png_()
    for e in parts(drawing, "rect")[1:]:
        x, y, w, h = (float(e.attrib[k]) for k in ("x", "y", "width", "height"))
        assert x >= 0 and x + w <= drawing.width and y >= 0 and y + h <= drawing.height and w > 0 and h > 0


@pytest.mark.parametrize("lengths, layers, read", [([], 2, []), ([4, 3], 2, []), ([3], 0, []), ([3, 4], 1, ["one"])])
def test_what_does_not_grow_is_refused(lengths, layers, read):
    with pytest.raises(InputError, match="does not grow"):
        show.growing(lengths, layers, 8, read=read)
