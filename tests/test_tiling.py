"""Dynamic tiling against the original's tables, and against a spec that says the rule in words."""
import hashlib
import json

import pytest
import torch
from conftest import GOLDEN, shared
from PIL import Image

import minivl
from minivl.tiling import MEAN, STD, choose_grid, tile, to_pixel_values

TABLE = json.loads((GOLDEN / "tiling.json").read_text())


def test_400_rows_of_the_original():
    assert len(TABLE["grids"]) == 400
    for width, height, low, high, side, want in TABLE["grids"]:
        got = choose_grid(width, height, min_num=low, max_num=high, tile_size=side)
        assert list(got) == want, f"{width}x{height}, {low}..{high} tiles of {side}"


@pytest.mark.parametrize("size, counts", {       # of the original at max_num 1, 6, 12, 24; thumbnail counted
    "448x448": (1, 1, 1, 1), "633x633": (1, 1, 1, 1), "634x634": (1, 5, 5, 5), "897x897": (1, 5, 5, 5),
    "1000x1000": (1, 5, 10, 10), "640x480": (1, 7, 13, 13), "800x600": (1, 7, 13, 13), "1024x768": (1, 7, 13, 13),
    "1600x1200": (1, 7, 13, 13), "4032x3024": (1, 7, 13, 13), "500x375": (1, 7, 13, 13), "375x500": (1, 7, 13, 13),
    "640x427": (1, 7, 7, 7), "1344x896": (1, 7, 7, 7), "1100x733": (1, 7, 7, 7), "1280x720": (1, 3, 9, 16),
    "1920x1080": (1, 3, 9, 16), "1080x1920": (1, 3, 9, 16), "2000x1000": (1, 3, 9, 19), "896x448": (1, 3, 3, 3),
    "700x350": (1, 3, 3, 3), "450x225": (1, 3, 3, 3), "1200x400": (1, 4, 4, 4), "3000x200": (1, 7, 13, 16),
    "10x100": (1, 7, 11, 11), "600x600": (1, 1, 1, 1), "640x640": (1, 5, 5, 5), "900x900": (1, 5, 5, 5),
    "100x2000": (1, 7, 13, 21)}.items())
def test_tile_counts(size, counts):
    width, height = map(int, size.split("x"))
    image = Image.new("RGB", (width, height))
    assert tuple(len(tile(image, max_num=m, tile_size=448)) for m in (1, 6, 12, 24)) == counts


@pytest.mark.parametrize("size, grid", [((375, 500), (3, 4)), ((1280, 720), (4, 2)), ((10, 100), (1, 10)),
                                        ((100, 2000), (1, 12)), ((800, 600), (4, 3)), ((1920, 1080), (4, 2))])
def test_grids_are_columns_by_rows(size, grid):
    assert choose_grid(*size, max_num=12) == grid


def test_the_rule_in_words():
    """Smallest difference of aspect ratios; on exact ties the larger grid if the picture exceeds half its pixels."""
    for width in range(16, 1200, 61):
        for height in range(16, 1200, 67):
            grids = sorted(((c, r) for c in range(1, 13) for r in range(1, 13) if c * r <= 12),
                           key=lambda g: g[0] * g[1])
            smallest = min(abs(width / height - c / r) for c, r in grids)
            tied = [g for g in grids if abs(width / height - g[0] / g[1]) == smallest]
            want = [g for i, g in enumerate(tied) if i == 0 or width * height > 0.5 * 448 ** 2 * g[0] * g[1]][-1]
            assert choose_grid(width, height, max_num=12) == want, (width, height)


@pytest.mark.parametrize("key", TABLE["tile_sha256"])
def test_tile_hashes_of_the_card_pictures(key):
    name, limit = key.split("@")
    path = GOLDEN / name if (GOLDEN / name).exists() else shared(f"images/{name}")
    tiles = tile(minivl.load_image(path), max_num=int(limit))
    assert [hashlib.sha256(t.tobytes()).hexdigest() for t in tiles] == TABLE["tile_sha256"][key]


def pattern(width, height):
    """pixel(x, y, c) = (7x + 13y + 29c) mod 256"""
    numbers = bytes((7 * x + 13 * y + 29 * c) % 256 for y in range(height) for x in range(width) for c in range(3))
    return Image.frombytes("RGB", (width, height), numbers)


@pytest.mark.parametrize("size, count, hashes, moments", [
    ((640, 427), 7, {0: "b98a651f464c", 1: "e5fdc87f506a", 2: "d34649e6a2cb", 6: "0b0a151f6c97"}, (0.227603, 1.237963)),
    ((1000, 1000), 10, {0: "fe7a5925c976", 1: "d242aaafb010", 2: "f653a012f96c", 9: "c56a5fd45bd3"},
     (0.226617, 1.231446)),
    ((300, 500), 7, {0: "c083d9a800d3", 1: "0bb3cdcbe9f5", 2: "7f375ed9b6dd", 6: "846feeaac4c8"}, None)])
def test_pixels_of_a_pattern(size, count, hashes, moments):
    tiles = tile(pattern(*size), max_num=12)
    assert len(tiles) == count
    for i, want in hashes.items():
        assert hashlib.sha256(tiles[i].tobytes()).hexdigest()[:12] == want, i
    if moments:
        x = to_pixel_values(tiles)
        assert (round(float(x.mean()), 6), round(float(x.double().std()), 6)) == moments


def test_tiles_run_row_by_row_and_the_thumbnail_is_last():
    image = Image.new("RGB", (112, 56))
    for i, colour in enumerate([(255, 0, 0), (0, 255, 0)]):
        image.paste(colour, (56 * i, 0, 56 * i + 56, 56))
    left, right, thumbnail = tile(image, max_num=2, tile_size=56)
    assert left.getpixel((20, 20)) == (255, 0, 0) and right.getpixel((30, 30)) == (0, 255, 0)
    assert thumbnail.size == (56, 56) and thumbnail.getpixel((5, 5)) == (255, 0, 0)
    assert len(tile(image, max_num=2, tile_size=56, use_thumbnail=False)) == 2
    assert len(tile(image, max_num=1, tile_size=56)) == 1     # a single tile has no thumbnail


def test_normalisation_by_hand():
    image = Image.new("RGB", (14, 14), (10, 128, 255))
    x = to_pixel_values([image, image])
    assert x.shape == (2, 3, 14, 14) and x.dtype == torch.float32
    for channel, value in enumerate((10, 128, 255)):
        assert x[1, channel, 3, 5].item() == pytest.approx((value / 255 - MEAN[channel]) / STD[channel], abs=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="0x5 pixels; both sides must be at least 1"):
        choose_grid(0, 5)
    with pytest.raises(ValueError, match="min_num 3 and max_num 2"):
        choose_grid(5, 5, min_num=3, max_num=2)
    with pytest.raises(ValueError, match="mode RGBA; convert it"):
        tile(Image.new("RGBA", (5, 5)))
