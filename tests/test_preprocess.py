"""One call of `tile` for every caller that has a checkpoint's config."""
from dataclasses import replace

import pytest
from conftest import GOLDEN

import minivl
from minivl.config import Config
from minivl.preprocess import most_tiles, tile_for
from minivl.tiling import tile


@pytest.fixture(scope="module")
def config():
    return Config.load(GOLDEN / "qwen2-awq")


@pytest.fixture(scope="module")
def image():
    return minivl.load_image(GOLDEN / "tiger.jpeg")


def data(tiles):
    return [piece.tobytes() for piece in tiles]


def test_the_numbers_are_those_of_the_config(config, image):
    size = config.force_image_size
    assert most_tiles(config) == config.max_dynamic_patch > 6
    assert data(tile_for(config, image)) == data(tile(image, max_num=config.max_dynamic_patch, tile_size=size))
    assert data(tile_for(config, image, 2)) == data(tile(image, max_num=2, tile_size=size))
    plain = replace(config, use_thumbnail=False)
    assert data(tile_for(plain, image, 2)) == data(tile(image, max_num=2, tile_size=size, use_thumbnail=False))
    larger = replace(config, force_image_size=2 * size)
    assert {piece.size for piece in tile_for(larger, image)} == {(2 * size, 2 * size)}


def test_a_checkpoint_without_dynamic_tiling_gets_one_tile(config, image):
    fixed = replace(config, dynamic_image_size=False)
    assert most_tiles(fixed) == 1 and len(tile_for(fixed, image)) == 1
    assert len(tile_for(fixed, image, 6)) == len(tile_for(config, image, 6)) > 2


def test_a_limit_below_the_config_s_minimum_wins(config, image):
    many = replace(config, min_dynamic_patch=4)
    assert len(tile_for(many, image)) > 4 and len(tile_for(many, image, 2)) == 3
