"""Cut a picture into the tiles that a checkpoint was trained on: `tiling.tile` with the numbers of its config.json."""
from __future__ import annotations

from PIL import Image

from minivl import tiling
from minivl.config import Config


def most_tiles(config: Config) -> int:
    """Look up the most tiles of a picture where nobody asks for another number; the thumbnail is not counted."""
    return config.max_dynamic_patch if config.dynamic_image_size else 1


def tile_for(config: Config, image: Image.Image, max_num: int | None = None) -> list[Image.Image]:
    """Cut an RGB picture into [tile, ...], the thumbnail last. `max_num`: instead of the checkpoint's own limit."""
    max_num = most_tiles(config) if max_num is None else max_num
    min_num = min(config.min_dynamic_patch, max_num)
    return tiling.tile(image, min_num=min_num, max_num=max_num, tile_size=config.force_image_size,
                       use_thumbnail=config.use_thumbnail)


def grid_for(config: Config, width: int, height: int, max_num: int | None = None) -> tuple[int, int, int]:
    """Tell how tile_for cuts a picture of a size -> columns, rows, and the number of tiles with the thumbnail."""
    max_num = most_tiles(config) if max_num is None else max_num
    columns, rows = tiling.choose_grid(width, height, min_num=min(config.min_dynamic_patch, max_num), max_num=max_num,
                                       tile_size=config.force_image_size)
    return columns, rows, columns * rows + (config.use_thumbnail and columns * rows > 1)
