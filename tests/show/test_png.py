"""Notebooks get a drawing as a picture: what the SVG says, painted where it says it."""
import io

import pytest
import torch
from drawings import TIGER, words
from PIL import Image, ImageChops, ImageStat

from minivl import show
from minivl.limits import InputError
from minivl.show.png import printable

BLUE, WHITE, RED = (0, 0, 255), (255, 255, 255), (255, 0, 0)
EVERY = [
    lambda: show.bars([3, -1.5], ["tower", "minus"], title="times", unit="s"),
    lambda: show.curve({"error": [1, 0.1, 0.01], "limit": [1, 1, 1]}, log=True, x="layer", ticks="abc",
                       crosses=[(1, 0.1)]),
    lambda: show.heat(torch.tensor([[1.0, -2.0]]), "query", "key", title="attention", row_names=["r"],
                      column_names="xy", numbers=True),
    lambda: show.heat(torch.randn(80, 70), cell=6),
    lambda: show.heat(torch.randn(9, 9)),
    lambda: show.overlay(TIGER, torch.rand(4, 4), title="looks"),
    lambda: show.tiles(TIGER, max_num=6),
    lambda: show.strip([("tiles", "P"), ("words", [1, 2])], here="words"),
    lambda: show.dials([[0.0, 7.0]], ["pair 0"], [0, 1], title="turned"),
    lambda: show.sharing(4, 2),
    lambda: show.look(["red", "star"], torch.ones(2), torch.eye(2), torch.eye(2), title="looks"),
    lambda: show.stream(1.0, [("attention 0", 2.0, 2.5)]),
    lambda: show.word(0x75316420),
    lambda: show.rounding([1.0], {"one": ([0.0, 1.0], [1.0])}),
    lambda: show.beside(show.bars([1], ["one"]), show.bars([2], ["two"]))]


def painted(body, width=60, height=40):
    """The picture of a drawing, in pixels of the drawing."""
    picture = Image.open(io.BytesIO(show.Svg(body, width, height)._repr_png_()[0])).convert("RGB")
    assert picture.size == (2 * width, 2 * height)
    return picture.resize((width, height), Image.Resampling.NEAREST)


def inked(picture):
    """(left, top, right, bottom) of everything that is not white."""
    return ImageChops.invert(picture).getbbox()


@pytest.mark.parametrize("make", EVERY)
def test_every_drawing_is_a_picture_with_words(make):
    """Of the size of the SVG, twice as fine, not empty; its words are those of the SVG's label."""
    drawing = make()
    data, facts = drawing._repr_png_()
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG" and picture.size == pytest.approx((2 * drawing.width, 2 * drawing.height), abs=2)
    assert (facts["width"], facts["height"]) == (round(drawing.width), round(drawing.height))
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 2
    assert facts["alt"] == drawing.about and drawing.about in repr(drawing) and len(drawing.about) > 10
    assert not {"_repr_svg_", "_repr_html_", "_repr_mimebundle_"} & set(dir(drawing))      # these come before the PNG


def test_the_words_hold_the_numbers():
    bars, _, heat, _, _, _, tiles, strip, *_, both = (make() for make in EVERY)
    assert bars.about == "times: tower 3 s, minus -1.5 s"
    assert heat.about == "attention: 1 x 2 squares, query x key, from -2 to 1"
    assert tiles.about.endswith(f"7 x 256 = {7 * 256} visual tokens")
    assert strip.about == "stages: tiles (P), words (1x2); here: words"
    assert both.about == "bars: one 1; bars: two 2"
    assert show.Svg(show.text(0, 9, "a < b"), 9, 9).about == "a < b"
    assert 'aria-label="a &lt; &quot;b&quot;"' in str(show.Svg("", 9, 9, 'a < "b"'))


def test_rectangles():
    p = painted('<rect x="10" y="5" width="20" height="10" fill="blue"/>')
    assert inked(p) == (10, 5, 30, 15) and p.getpixel((10, 5)) == p.getpixel((29, 14)) == BLUE
    p = painted('<rect x="10" y="5" width="20" height="10" fill="none" stroke="blue" stroke-width="2"/>')
    assert inked(p) == (9, 4, 31, 16) and p.getpixel((20, 10)) == WHITE and p.getpixel((20, 5)) == BLUE
    p = painted('<rect x="10" y="5" width="20" height="20" rx="8" fill="blue" stroke="red" stroke-width="2"/>')
    assert p.getpixel((10, 5)) == WHITE and p.getpixel((20, 15)) == BLUE and p.getpixel((20, 5)) == RED
    p = painted('<rect x="0" y="0" width="60" height="40" fill="blue"/>'
                '<rect x="0" y="0" width="30" height="40" fill="white" fill-opacity="0.5"/>')
    assert p.getpixel((40, 20)) == BLUE and p.getpixel((10, 20)) == pytest.approx((128, 128, 255), abs=2)
    p = painted("".join(f'<rect x="{x / 3:.1f}" y="0" width="0.3" height="40" fill="blue"/>' for x in range(180)))
    assert p.getpixel((30, 20)) != WHITE            # narrow ones are not lost


def test_lines():
    p = painted('<line x1="10" x2="50" y1="20" y2="20" stroke="blue" stroke-width="2"/>')
    assert inked(p) == (10, 19, 51, 21) or inked(p) == (10, 19, 50, 21)
    p = painted('<polyline points="0,20 60,20" fill="none" stroke="blue" stroke-width="2" stroke-dasharray="6 4"/>')
    row = [p.getpixel((x, 20)) == BLUE for x in range(60)]
    assert [row[x] for x in (2, 8, 12, 18, 22, 28)] == [True, False] * 3
    p = painted('<path d="M10 10 h20 m-4 -4 l4 4 V30 H5 v-4" fill="none" stroke="blue" stroke-width="2"/>')
    assert all(p.getpixel(at) == BLUE for at in ((20, 10), (30, 20), (15, 30), (5, 28)))
    assert p.getpixel((20, 20)) == WHITE
    p = painted('<g transform="translate(20.0 10)"><circle cx="5" cy="5" r="4" fill="red"/></g>')
    assert inked(p) == (21, 11, 29, 19) and p.getpixel((25, 15)) == RED


def test_words():
    assert inked(painted(show.text(10, 20, "Hxg")))[0] == pytest.approx(10, abs=2)
    left, top, right, bottom = inked(painted(show.text(30, 20, "H", anchor="middle")))
    assert (left + right) / 2 == pytest.approx(30, abs=1) and bottom == pytest.approx(20, abs=1) and bottom - top >= 8
    assert inked(painted(show.text(50, 20, "Hxg", anchor="end")))[2] == pytest.approx(50, abs=2)
    left, top, right, bottom = inked(painted(show.text(30, 35, "HHH", turn=-90)))       # upwards
    assert bottom == pytest.approx(35, abs=2) and bottom - top > 20 and right == pytest.approx(30, abs=1)
    thin, bold = (ImageStat.Stat(ImageChops.invert(painted(show.text(5, 20, "HHH", weight=w)))).sum[0]
                  for w in ("normal", "bold"))
    assert bold > 1.1 * thin


def test_a_letter_that_the_font_lacks_is_written_in_digits():
    """No box that looks like every other: two unknown letters can be told apart."""
    pictures = {w: painted(show.text(0, 20, w)).tobytes() for w in ("\u4e2d", "\\u4e2d", "\u6587", "\u00e9", "e")}
    assert pictures["\u4e2d"] == pictures["\\u4e2d"] != pictures["\u6587"]
    assert pictures["\u00e9"] != pictures["e"]
    for make in EVERY:          # what the drawings write themselves is in the font
        assert all(printable(letter) == letter for word in words(make()) if word for letter in word)


def test_pictures_inside():
    chess = Image.new("RGB", (2, 1), "blue")
    chess.putpixel((1, 0), RED)
    p = painted(show.embedded(chess, 10, 10, 20, 20, crisp=True))
    assert inked(p) == (10, 10, 30, 30)
    assert p.getpixel((19, 15)) == BLUE and p.getpixel((20, 15)) == RED
    assert painted(show.embedded(chess, 10, 10, 20, 20)).getpixel((20, 15)) not in (BLUE, RED)


@pytest.mark.parametrize("body, match", [
    ("<ellipse/>", "this one has ellipse; save"),
    ('<path d="M0 0 C1 1 2 2 3 3" stroke="red"/>', "this one has C; save")])
def test_what_is_not_painted_is_refused(body, match):
    with pytest.raises(InputError, match=match):
        show.Svg(body, 9, 9)._repr_png_()
