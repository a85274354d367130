"""What four engines feed the model for one question and its pictures: why two of them answer differently.

    python -m weights_tools.verify CHECKPOINT PICTURE ... -p QUESTION --inputs

The model is the same function everywhere, up to rounding; prompt, picture and tiles are not. Written from each engine's
source, not run:
    original        InternVL modeling_internvl_chat.py:343-398, train/dataset.py:813-866 @2410d1d
    lmdeploy 0.6.4  vl/templates.py:160-175, vl/model/internvl.py:16-163 (the version the model card names)
    lmdeploy 0.16   serve/processors/multimodal.py:322-352, vl/model/internvl.py:173-205 @1263d5c
    transformers    5.23 image_utils.py, image_transforms.py, models/internvl/processing_internvl.py; chat template of
                    convert_internvl_weights_to_hf.py @015d3b2
"""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

import minivl
from minivl.config import Config
from minivl.limits import InputError
from minivl.preprocess import tile_for
from minivl.prompt import SYSTEM
from minivl.tiling import choose_grid, tile, to_pixel_values
from minivl.tracing import relative_error

ORIENTATION = 0x0112    # of the EXIF marks


@dataclass
class Fed:
    """What one engine gives the model."""
    engine: str
    prompt: str             # a picture's placeholders written as <IMG_CONTEXT x 1792>
    ids: list
    sizes: list             # of each picture after opening
    grids: list             # columns, rows
    tiles: list             # thumbnails included
    pixel_error: list       # relative, against the original's tiles; None where the numbers of tiles differ
    remarks: list


def as_stored(path: str | Path) -> Image.Image:
    """Open the picture with its transparency and its EXIF marks."""
    minivl.load_image(path)     # refuses what is no picture, or too large
    with Image.open(path) as image:
        image.load()
        return image


def has_transparency(image: Image.Image) -> bool:
    """Tell whether a picture has an alpha channel or a transparent colour."""
    return "A" in image.getbands() or "transparency" in image.info


def as_rgb(image: Image.Image) -> Image.Image:
    """Drop transparency and pass over rotation marks, as the original, LMDeploy and minivl do."""
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF mark says and drop transparency, as transformers does. image_utils.py:514."""
    return ImageOps.exif_transpose(image).convert("RGB")


def on_white(image: Image.Image) -> Image.Image:
    """Put transparency on white and turn nothing, as transformers does with a PIL image. image_transforms.py:778."""
    if has_transparency(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def cut(image: Image.Image, config: Config, max_num: int) -> list:
    """Cut an RGB picture into tiles for a checkpoint."""
    return tile_for(config, image, max_num)


def turn(role: str, text: str) -> str:
    """Write one message of a prompt."""
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


@dataclass(frozen=True)
class Engine:
    """How one engine opens a picture and writes a prompt. `prompt(system, marks, question)`: marks for each picture."""
    name: str
    opened: Callable
    prompt: Callable
    tiles: tuple | None = None      # fewest and most of a picture; None: the checkpoint's
    thumbnail: bool | None = None   # None: the checkpoint's
    remarks: tuple = ()
    several: tuple = ()             # remarks where there are several pictures


def _original(system, marks, question):
    return turn("system", system) + turn("user", "".join(f"<img>{m}</img>\n" for m in marks) + question)


def _lmdeploy_064(system, marks, question):
    return turn("system", system) + turn("user", (f"<img>{''.join(marks)}</img>\n" if marks else "") + question)


def _lmdeploy_016(system, marks, question):
    return turn("system", system) + turn("user", question + "".join(f"<img>{m}</img>\n" for m in marks))


def _transformers(system, marks, question):
    return turn("user", "".join(f"<img>{m}</img>\n" for m in marks) + question)


ENGINES = (
    Engine("original chat", as_rgb, _original, several=(
        "with several pictures the caller writes the <image> marks: here one per line; the documentation writes "
        "Image-1: <image>, Image-2: <image>",)),
    Engine("LMDeploy 0.6.4", as_rgb, _lmdeploy_064, remarks=(
        "AWQ models: tower and decoder compute in float16; the original in bfloat16",
        "its own list of ids has 0 at the pictures' places, which a repetition penalty sees"), several=(
        "all pictures inside one <img></img> pair; the training had one pair each",)),
    Engine("LMDeploy 0.16", as_rgb, _lmdeploy_016, remarks=(
        "(text, picture) puts the text first",
        "the template is the tokenizer's own chat_template where there is one: then its system message, or none, "
        "stands here")),
    Engine("transformers", upright, _transformers, tiles=(1, 12), thumbnail=True, remarks=(
        "the chat template has no default system message",
        "tiles are resized as tensors by torchvision, not by Pillow: pixels differ a little (not in the numbers "
        "here)")),
)


def engines(config: Config, tokenizer: minivl.Tokenizer, paths: list, question: str) -> list:
    """Write down what each engine feeds the model: [Fed, ...]; the original first."""
    if "<image>" in question:
        raise InputError("the question has <image> in it; give the bare question, each engine puts the pictures where "
                         "it does")
    images = [as_stored(path) for path in paths]
    pixels = [tiles_of(engine, config, images) for engine in ENGINES]
    return [feed(engine, config, tokenizer, paths, images, question, mine, pixels[0])
            for engine, mine in zip(ENGINES, pixels)]


def limits(engine: Engine, config: Config) -> tuple:
    """Give the fewest and most tiles of a picture."""
    return engine.tiles or (config.min_dynamic_patch, config.max_dynamic_patch)


def tiles_of(engine: Engine, config: Config, images: list) -> list:
    """Cut the pictures as an engine does: a float32[tiles, 3, R, R] for each."""
    least, most = limits(engine, config)
    thumbnail = config.use_thumbnail if engine.thumbnail is None else engine.thumbnail
    return [to_pixel_values(tile(engine.opened(image), min_num=least, max_num=most, tile_size=config.force_image_size,
                                 use_thumbnail=thumbnail)) for image in images]


def feed(engine: Engine, config: Config, tokenizer: minivl.Tokenizer, paths: list, images: list, question: str,
         pixels: list, original: list) -> Fed:
    """Write down what one engine feeds the model. `pixels`: its tiles of each picture; `original`: the original's."""
    per_tile = config.num_image_token
    counts = [len(tiles) for tiles in pixels]
    marks = [f"<IMG_CONTEXT x {per_tile * n}>" for n in counts]
    shown = engine.prompt(config.system_message or SYSTEM, marks, question) + "<|im_start|>assistant\n"
    full = shown
    for mark, n in zip(marks, counts):
        full = full.replace(mark, "<IMG_CONTEXT>" * (per_tile * n), 1)
    least, most = limits(engine, config)
    sizes = [engine.opened(image).size for image in images]
    grids = [choose_grid(*size, min_num=least, max_num=most, tile_size=config.force_image_size) for size in sizes]
    errors = [relative_error(a, b) if a.shape == b.shape else None for a, b in zip(pixels, original)]
    remarks = [*(engine.several if len(paths) > 1 else ()), *engine.remarks]
    for path, image, error in zip(paths, images, errors):
        if error != 0.0 and image.getexif().get(ORIENTATION, 1) != 1:
            remarks.append(f"{path}: a file is turned as its EXIF mark says")
        if engine.name == "transformers" and has_transparency(image):
            remarks.append(f"{path}: of a file the transparency is dropped, as everywhere; a PIL image handed over is "
                           "put on white")
    return Fed(engine.name, shown, tokenizer.begin + tokenizer.encode(full), sizes, grids, counts, errors, remarks)


def parting(a: Sequence, b: Sequence) -> int:
    """Find the first place where two texts or lists differ; the length of the shorter if one begins the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def text(fed: list) -> str:
    """Write the engines side by side, one block each; then what differs from the original."""
    lines = []
    first = fed[0]
    for one in fed:
        lines += [f"== {one.engine} " + "=" * max(0, 100 - len(one.engine))]
        lines += ["    " + line for line in one.prompt.rstrip("\n").split("\n")]
        pictures = [f"{w}x{h} -> {c}x{r} tiles{' and thumbnail' if n > c * r else ''}"
                    for (w, h), (c, r), n in zip(one.sizes, one.grids, one.tiles)]
        lines += [f"  {len(one.ids)} ids {str(one.ids[:6])[:-1]}, ...; " + ("; ".join(pictures) or "no picture")]
        differ = []
        if one.ids != first.ids:
            differ.append(f"ids differ from number {parting(one.ids, first.ids)} on")
        for i, error in enumerate(one.pixel_error):
            if error is None or error > 0:
                what = "another number of tiles" if error is None else f"pixels differ by {error:.1%}"
                differ.append(f"picture {i + 1}: {what}")
        if one is not first:
            lines.append("  against the original: " + ("; ".join(differ) or "the same ids and pixels"))
        lines += [f"  - {remark}" for remark in one.remarks]
    return "\n".join(lines)


def known(prompt: str, fed: list) -> str:
    """Name the engine that makes this prompt (placeholders taken out) where the original does not; "" if none does."""
    bare = [re.sub(r"<IMG_CONTEXT x \d+>", "", one.prompt) for one in fed]
    for one, theirs in zip(fed[1:], bare[1:]):
        if prompt == theirs != bare[0]:
            return f"this is the prompt of {one.engine}, a known difference between engines: {'; '.join(one.remarks)}"
    return ""


def known_opening(path: str | Path, pixels, config: Config, max_num: int) -> str:
    """Say why a picture's pixels may differ without a mistake: rotation mark, transparency, another resize.

    "" if none of these explains it.
    """
    image = as_stored(path)
    ours = cut(minivl.load_image(path), config, max_num)
    for opened, what in ((upright, "turned the picture by its EXIF mark, as transformers does with files"),
                         (on_white, "put the picture's transparency on white, as transformers does with PIL images")):
        theirs = cut(opened(image), config, max_num)
        if [t.tobytes() for t in theirs] != [t.tobytes() for t in ours]:
            values = to_pixel_values(theirs)
            if values.shape == pixels.shape and relative_error(values, pixels) < 1e-5:
                return f"a known difference: the reference {what}"
    plain = to_pixel_values(ours)
    if plain.shape == pixels.shape and relative_error(plain, pixels) < 2e-2 and (plain - pixels).mean().abs() < 1e-3:
        return "as small as another bicubic filter: torchvision resizes tensors, transformers' fast processor uses it"
    return ""
