"""Where patches go is drawn as the package computes it."""
import pytest
import torch
from drawings import TIGER, parts, words

from minivl import show
from minivl.limits import InputError
from minivl.pixel_unshuffle import PixelUnshuffle


def test_patches_are_numbered_row_by_row_and_cls_comes_first():
    drawing = show.patches(TIGER.resize((56, 56)))
    numbers = [w for w in words(drawing) if w.isdigit()]
    assert numbers[:16] == [str(n) for n in range(16)]
    assert words(drawing).index("CLS") < words(drawing).index("W x + b, + position 1")
    assert "1 + 16 = 17 vectors" in words(drawing) and "W x + b, + position 16" in words(drawing)
    assert not [w for w in words(show.patches(TIGER.resize((448, 448)))) if w == "512"]     # too small to be read
    assert drawing.width <= 860 and drawing.width == show.patches(TIGER.resize((448, 448))).width


@pytest.mark.parametrize("side, C", [(2, 1), (4, 2), (6, 3)])
def test_unshuffle_draws_the_tokens_of_the_package(side, C):
    x = torch.randperm(side * side * C).view(side * side, C)
    drawing = show.unshuffle(x)
    squares = [[int(v) for v in w.split()] for w in words(drawing) if w.replace(" ", "").isdigit()]
    assert squares[:len(x)] == x.tolist()
    tokens = PixelUnshuffle()(x[None])[0]
    assert squares[len(x):] == tokens.view(-1, C).tolist()
    boxes = [e.attrib for e in parts(drawing, "rect")[1:]]
    assert all(float(b["x"]) + float(b["width"]) <= drawing.width and
               float(b["y"]) + float(b["height"]) <= drawing.height for b in boxes)
    # A patch has the same tint on both sides.
    tints = [b["fill"] for b in boxes if b["fill"] != "none"]
    pairs = list(zip(map(tuple, squares), tints, strict=True))
    assert set(pairs[:len(x)]) == set(pairs[len(x):])


@pytest.mark.parametrize("wrong, match", [
    (lambda: show.patches(TIGER.resize((50, 50))), "50x50 pixels .* 42x42"),
    (lambda: show.patches(TIGER.resize((28, 42))), "28x42"),
    (lambda: show.unshuffle(torch.zeros(9, 2)), r"\[9, 2\]"),
    (lambda: show.unshuffle(torch.zeros(256, 2)), "at most 4 channels")])
def test_squares_refuse(wrong, match):
    with pytest.raises(InputError, match=match):
        wrong()
