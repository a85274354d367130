"""Dynamic tiling: a picture of any size -> a grid of square tiles -> pixel_values.

A fixed-size ViT sees only R x R pixels. So the picture is stretched to the best fitting grid of R x R tiles, cut
along the grid, and, if that gave more than one tile, the whole picture is added once more as a small thumbnail.

N tiles (thumbnail included, always last), R tile side in pixels.
Source: InternVL internvl/train/dataset.py:813-866 and build_transform :276 @2410d1d; arXiv:2404.16821 section 3.3.
"""
import torch
from PIL import Image

MEAN = (0.485, 0.456, 0.406)   # ImageNet's, per RGB channel, of pixels scaled to 0..1
STD = (0.229, 0.224, 0.225)


def choose_grid(width: int, height: int, *, min_num: int = 1, max_num: int = 12,
                tile_size: int = 448) -> tuple[int, int]:
    """Choose the (columns, rows) whose aspect ratio is nearest to the picture's, with min_num..max_num tiles.

    On an exact tie the larger grid wins if the picture has more than half of that grid's pixels:
    600x600 stays 1x1, 640x640 becomes 2x2. Area is asked on ties only: 800x600 is 4x3, an exact fit.
    """
    if width < 1 or height < 1:
        raise ValueError(f"picture is {width}x{height} pixels; both sides must be at least 1")
    if not all(isinstance(n, int) for n in (min_num, max_num)) or not 1 <= min_num <= max_num:
        raise ValueError(f"min_num {min_num!r} and max_num {max_num!r} must be whole numbers with "
                         "1 <= min_num <= max_num")
    # Of two grids with equally many tiles that tie, the order decides: the first, or for a large picture the last. That
    # can happen only for min_num > 1 (with exactly 4 tiles, 5:8 lies just between 1x4 and 2x2), and the reference
    # leaves it to the order of a Python set: the same set gives the same order here.
    grids = {(i, j) for n in range(min_num, max_num + 1) for i in range(1, n + 1) for j in range(1, n + 1)
             if min_num <= i * j <= max_num}
    aspect = width / height
    best = (1, 1)
    best_difference = float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(aspect - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif difference == best_difference and width * height > 0.5 * tile_size ** 2 * columns * rows:
            best = (columns, rows)
    return best


def tile(image: Image.Image, *, min_num: int = 1, max_num: int = 12, tile_size: int = 448,
         use_thumbnail: bool = True) -> list[Image.Image]:
    """Cut an RGB picture into [tile, ...] row by row, then the thumbnail if there is more than one tile."""
    if image.mode != "RGB":
        raise ValueError(f"picture has mode {image.mode}; convert it with image.convert('RGB')")
    columns, rows = choose_grid(*image.size, min_num=min_num, max_num=max_num, tile_size=tile_size)
    # The aspect ratio is not kept and nothing is padded. Bicubic with Pillow's antialiasing, 8 bits per channel:
    # a tensor resize gives other pixels.
    stretched = image.resize((tile_size * columns, tile_size * rows), Image.Resampling.BICUBIC)
    tiles = [stretched.crop((x, y, x + tile_size, y + tile_size))
             for y in range(0, tile_size * rows, tile_size) for x in range(0, tile_size * columns, tile_size)]
    if use_thumbnail and len(tiles) > 1:
        tiles.append(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))
    return tiles


def to_pixel_values(tiles: list[Image.Image]) -> torch.Tensor:
    """Turn [RGB tile, ...] with pixels 0..255 into normalised float32[N, 3, R, R]."""
    if not tiles:
        raise ValueError("no tiles are given; cut a picture with tile()")
    return normalise(to_pixels(tiles))


def to_pixels(tiles: list[Image.Image]) -> torch.Tensor:
    """Stack [RGB tile, ...], at least one, as uint8[N, R, R, 3]."""
    return torch.stack([torch.frombuffer(bytearray(t.tobytes()), dtype=torch.uint8).view(t.height, t.width, 3)
                        for t in tiles])


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Normalise uint8[N, R, R, 3] to float32[N, 3, R, R] with the mean and spread the tower was trained on."""
    x = pixels.permute(0, 3, 1, 2).float() / 255                                  # (N, 3, R, R)
    mean, std = (torch.tensor(c, device=pixels.device).view(1, 3, 1, 1) for c in (MEAN, STD))
    return ((x - mean) / std).contiguous()                                       # (N, 3, R, R)
