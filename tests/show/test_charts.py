"""bars and curves show the numbers they are given, and need no colours to be read."""
import pytest
from drawings import parts, words

from minivl import show
from minivl.limits import InputError


def test_bars_and_curves():
    drawing = show.bars([3, -1.5, 0], ["tower", "minus", "none"], unit="s")
    assert [w for w in words(drawing) if w.endswith(" s")] == ["3 s", "-1.5 s", "0 s"]
    width = {e[0].text.split(":")[0]: float(e.attrib["width"]) for e in parts(drawing, "rect") if len(e)}
    assert width["tower"] == pytest.approx(2 * width["minus"], rel=0.01) and width["none"] < 1
    drawing = show.curve({"a": [1, 0.1, 0.01], "b": [(0, 0.5), (2, 0.05)]}, log=True, x="layer")
    lines = parts(drawing, "polyline")
    assert len(lines) == 2 and lines[0].attrib["stroke-dasharray"] != lines[1].attrib["stroke-dasharray"]
    assert {"a", "b"} <= set(words(drawing))
    ys = [float(p.split(",")[1]) for p in lines[0].attrib["points"].split()]
    assert ys[2] - ys[1] == pytest.approx(ys[1] - ys[0], abs=0.2)       # decades are equally far apart
    assert show.curve({"one": [5.0]}) and show.curve({"flat": [1, 1]})


def ends(drawing, *names):
    """name -> the height at which it stands beside the end of its curve"""
    return {e.text: float(e.attrib["y"]) - 4 for e in parts(drawing, "text") if e.text in names}


def test_names_at_the_same_height_keep_apart():
    drawing = show.curve({"up": [0, 8, 8], "flat": [8, 8, 8], "down": [9, 9, 8], "low": [1, 0, 0]})
    level = ends(drawing, "up", "flat", "down", "low")
    up, flat, down = sorted(level[name] for name in ("up", "flat", "down"))
    assert flat - up >= 12 and down - flat >= 12            # lines of 12 pixels
    place = [float(line.attrib["points"].split()[-1].split(",")[1]) for line in parts(drawing, "polyline")]
    assert flat == pytest.approx(place[0], abs=0.2)         # the block of three stays centred on their end
    assert level["low"] == pytest.approx(place[3], abs=0.2)
    strokes = [e.attrib["d"] for e in parts(drawing, "path")]
    assert len(strokes) == 2 and all(f" {place[0]:.1f} L" in d for d in strokes)      # from an end to its name


@pytest.mark.parametrize("last", [8, 0])
def test_names_stay_inside_the_drawing(last):
    """At the upper and at the lower edge."""
    drawing = show.curve({name: [8 - last, last] for name in "abcde"}, height=200)
    level = sorted(ends(drawing, *"abcde").values())
    assert min(b - a for a, b in zip(level, level[1:])) >= 12 and level[0] >= 12 and level[-1] <= 160
    apart = ends(show.curve({"a": [0, 1], "b": [0, 3], "c": [0, 2]}), *"abc")
    assert apart["b"] < apart["c"] < apart["a"]             # the order of the curves


def test_names_along_the_axis_and_crosses():
    stages = [f"stage {i}" for i in range(70)]
    drawing = show.curve({"error": range(70)}, ticks=stages, crosses=[(3, 3.0), (69, 69.0)])
    shown = [w for w in words(drawing) if w and w.startswith("stage")]
    assert shown[0] == "stage 0" and 20 <= len(shown) <= 32
    assert [e.text for e in parts(drawing, "title")] == [f"stage {i}: error {i}" for i in range(70)]
    dots = [(float(e.attrib["cx"]), float(e.attrib["cy"])) for e in parts(drawing, "circle")]
    crosses = [e.attrib["d"] for e in parts(drawing, "path")]
    assert len(crosses) == 2
    for (x, y), cross in zip((dots[3], dots[69]), crosses):
        assert [float(v) for v in cross[1:].split(" l")[0].split()] == pytest.approx([x - 5, y - 5], abs=0.11)


@pytest.mark.parametrize("wrong, match", [
    (lambda: show.bars([1, 2], ["a"]), "2 values and 1 names"),
    (lambda: show.bars({"before": [1], "after": [1, 2]}, ["a"]), "2 values and 1 names in 'after'"),
    (lambda: show.bars({str(k): [1] for k in range(5)}, ["a"]), "1 to 4 colours, these are 5"),
    (lambda: show.bars({}, ["a"]), "1 to 4 colours, these are 0"),
    (lambda: show.bars([float("nan")], ["a"]), "bars need finite numbers"),
    (lambda: show.curve({"a": [1, float("inf")]}), "needs finite numbers"),
    (lambda: show.curve({"a": [1, 0]}, log=True), "numbers above 0")])
def test_charts_refuse(wrong, match):
    with pytest.raises(InputError, match=match):
        wrong()


def test_series_have_a_colour_each_and_a_legend():
    values = {"before": [80, -20], "after": [90, 0.5]}
    drawing = show.bars(values, ["read words", "place"], unit="%", title="right answers")
    boxes = [e.attrib for e in parts(drawing, "rect")[1:]]
    legend, painted = boxes[:2], boxes[2:]
    assert len(painted) == 4 and len({b["fill"] for b in legend}) == 2
    assert [b["fill"] for b in painted] == [legend[0]["fill"], legend[1]["fill"]] * 2
    for mark, name in zip(legend, ("before", "after")):         # each name right of its colour
        word, = [e.attrib for e in parts(drawing, "text") if e.text == name]
        assert 0 < float(word["x"]) - float(mark["x"]) < 24 and abs(float(word["y"]) - float(mark["y"])) < 12
    tops = [float(b["y"]) for b in painted]
    assert tops[0] < tops[1] < tops[2] < tops[3]
    assert tops[2] - tops[1] > tops[1] - tops[0]                # those of one name are together
    lefts = [float(b["x"]) for b in painted]
    assert lefts[2] < lefts[0] == lefts[1] == lefts[3]
    assert [w for w in words(drawing) if w.endswith("%")] == ["80 %", "90 %", "-20 %", "0.5 %"]
    assert drawing.about == "right answers: before: read words 80 %, place -20 %; after: read words 90 %, place 0.5 %"


def test_a_long_unit_is_written_once():
    drawing = show.bars([0.9998, 4.936e-5], ["'In'", "' in'"], unit="probability")
    assert words(drawing) == ["'In'", "0.9998", "' in'", "4.9e-5", "probability"]
    assert drawing.about == "bars: 'In' 0.9998 probability, ' in' 4.9e-5 probability"
