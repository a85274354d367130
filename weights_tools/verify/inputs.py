"""What four engines feed the model for one question and its pictures: why two of them answer differently.

    python -m weights_tools.verify CHECKPOINT PICTURE ... -p QUESTION --inputs

The model is the same function everywhere, up to rounding; prompt, picture and tiles are not. Written from each engine's source, not run:
    original        InternVL modeling_internvl_chat.py:343-398, train/dataset.py:813-866 @2410d1d
    lmdeploy 0.6.4  vl/templates.py:160-175, vl/model/internvl.py:16-163 (the version the model card names)
    lmdeploy 0.16   serve/processors/multimodal.py:322-352, vl/model/internvl.py:173-205 @1263d5c
    transformers    5.23 image_utils.py, image_transforms.py, models/internvl/processing_internvl.py; chat template of
                    convert_internvl_weights_to_hf.py @015d3b2
"""
from __future__ import annotations

import re
from dataclasses import dataclass

from PIL import Image, ImageOps

import minivl
from minivl.limits import InputError
from minivl.prompt import SYSTEM
from minivl.tiling import choose_grid, tile, to_pixel_values
from minivl.tracing import relative_error


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


def as_stored(path) -> Image.Image:
    """The picture with its transparency and its EXIF marks."""
    minivl.load_image(path)     # refuses what is no picture, or too large
    with Image.open(path) as image:
        image.load()
        return image


def as_rgb(image: Image.Image) -> Image.Image:
    """The original, LMDeploy, minivl: transparency is dropped, rotation marks are not looked at."""
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """transformers, given a file: turned as the EXIF mark says, transparency dropped. image_utils.py:514."""
    return ImageOps.exif_transpose(image).convert("RGB")


def on_white(image: Image.Image) -> Image.Image:
    """transformers, given a PIL image: transparency on white, not turned. image_transforms.py:778."""
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def cut(image: Image.Image, config, max_num: int) -> list:
    """The tiles of an RGB picture for a checkpoint."""
    return tile(image, min_num=config.min_dynamic_patch, max_num=max_num, tile_size=config.force_image_size,
                use_thumbnail=config.use_thumbnail)


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def engines(config, tokenizer, paths: list, question: str) -> list:
    """[Fed, ...]; the original first."""
    if "<image>" in question:
        raise InputError("the question has <image> in it; give the bare question, each engine puts the pictures where it does")
    images, per_tile, system = [as_stored(p) for p in paths], config.num_image_token, config.system_message or SYSTEM

    def marks(tiles):
        return [f"<IMG_CONTEXT x {per_tile * n}>" for n in tiles]

    def original(c):
        return turn("system", system) + turn("user", "".join(f"<img>{m}</img>\n" for m in c) + question)

    def lmdeploy_064(c):
        return turn("system", system) + turn("user", (f"<img>{''.join(c)}</img>\n" if c else "") + question)

    def lmdeploy_016(c):
        return turn("system", system) + turn("user", question + "".join(f"<img>{m}</img>\n" for m in c))

    def transformers(c):
        return turn("user", "".join(f"<img>{m}</img>\n" for m in c) + question)

    several, limits = len(paths) > 1, (config.min_dynamic_patch, config.max_dynamic_patch)
    table = [("original chat", as_rgb, original, limits, [
                 "with several pictures the caller writes the <image> marks: here one per line; the documentation writes "
                 "Image-1: <image>, Image-2: <image>"] if several else []),
             ("LMDeploy 0.6.4", as_rgb, lmdeploy_064, limits,
              ["all pictures inside one <img></img> pair; the training had one pair each"] * several
              + ["AWQ models: tower and decoder compute in float16; the original in bfloat16",
                 "its own list of ids has 0 at the pictures' places, which a repetition penalty sees"]),
             ("LMDeploy 0.16", as_rgb, lmdeploy_016, limits,
              ["(text, picture) puts the text first", "the template is the tokenizer's own chat_template where there is one: then its "
               "system message, or none, stands here"]),
             ("transformers", upright, transformers, (1, 12),
              ["the chat template has no default system message", "tiles are resized as tensors by torchvision, not by Pillow: pixels "
               "differ a little (not in the numbers here)"])]
    fed, reference = [], None
    for engine, opened, prompt, (least, most), remarks in table:
        rgb = [opened(image) for image in images]
        grids = [choose_grid(*im.size, min_num=least, max_num=most, tile_size=config.force_image_size) for im in rgb]
        pixels = [to_pixel_values(tile(im, min_num=least, max_num=most, tile_size=config.force_image_size,
                                       use_thumbnail=config.use_thumbnail or engine == "transformers")) for im in rgb]
        counts = [len(t) for t in pixels]
        shown = prompt(marks(counts)) + "<|im_start|>assistant\n"
        full = shown
        for mark, n in zip(marks(counts), counts):
            full = full.replace(mark, "<IMG_CONTEXT>" * (per_tile * n), 1)
        reference = reference or pixels
        errors = [relative_error(a, b) if a.shape == b.shape else None for a, b in zip(pixels, reference)]
        for path, image, error in zip(paths, images, errors):
            if error != 0.0 and image.getexif().get(0x0112, 1) != 1:
                remarks = [*remarks, f"{path}: a file is turned as its EXIF mark says"]
            if engine == "transformers" and ("A" in image.getbands() or "transparency" in image.info):
                remarks = [*remarks, f"{path}: of a file the transparency is dropped, as everywhere; a PIL image handed over is put on white"]
        fed.append(Fed(engine, shown, tokenizer.encode(full), [im.size for im in rgb], grids, counts, errors, remarks))
    return fed


def text(fed: list) -> str:
    """Side by side, one block for each engine; then what differs from the original."""
    lines, first = [], fed[0]
    for one in fed:
        lines += [f"== {one.engine} " + "=" * max(0, 100 - len(one.engine))]
        lines += ["    " + line for line in one.prompt.rstrip("\n").split("\n")]
        pictures = [f"{w}x{h} -> {c}x{r} tiles{' and thumbnail' if n > c * r else ''}" for (w, h), (c, r), n in zip(one.sizes, one.grids, one.tiles)]
        lines += [f"  {len(one.ids)} ids {str(one.ids[:6])[:-1]}, ...; " + ("; ".join(pictures) or "no picture")]
        differ = []
        if one.ids != first.ids:
            where = next((i for i, (a, b) in enumerate(zip(one.ids, first.ids)) if a != b), min(len(one.ids), len(first.ids)))
            differ.append(f"ids differ from number {where} on")
        for i, error in enumerate(one.pixel_error):
            if error is None or error > 0:
                differ.append(f"picture {i + 1}: {'another number of tiles' if error is None else f'pixels differ by {error:.1%}'}")
        if one is not first:
            lines.append("  against the original: " + ("; ".join(differ) or "the same ids and pixels"))
        lines += [f"  - {remark}" for remark in one.remarks]
    return "\n".join(lines)


def known(prompt: str, fed: list) -> str:
    """The engine that makes this prompt (placeholders taken out) where the original does not; "" if there is none."""
    bare = [re.sub(r"<IMG_CONTEXT x \d+>", "", one.prompt) for one in fed]
    for one, theirs in zip(fed[1:], bare[1:]):
        if prompt == theirs != bare[0]:
            return f"this is the prompt of {one.engine}, a known difference between engines: {'; '.join(one.remarks)}"
    return ""


def known_opening(path, pixels, config, max_num: int) -> str:
    """Why a picture's pixels may differ without a mistake: rotation mark, transparency, another resize; "" if none explains it."""
    image, ours = as_stored(path), cut(minivl.load_image(path), config, max_num)
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
