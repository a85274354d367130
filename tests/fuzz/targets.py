"""What is done with the bytes of a kind. An InputError is the right answer; what is loaded must be what the files say.

Each takes (name, bytes, a folder of its own) and raises what minivl raises, or Wrong for what was loaded wrongly.
"""
import json as stdlib_json
import shutil

import torch
from PIL import Image

import minivl
from fuzz import seeds
from minivl.files.formats import DTYPES, open_weights
from minivl.internlm2_tokenizer import TIDIED
from minivl.tokenizer import TextStream

TEXTS = ("Grüße, 世界 🐅 1234 don't <img>\n\n  x<|im_end|>", "e\u0301 \ufb01", "a" * 200 + "!", " \t\r\n<box> [1]", "")


class Wrong(Exception):
    """Say that something was loaded that the files do not say."""


def safetensors(name, data, folder):
    """Open and load it as the weights of a checkpoint; compare every tensor."""
    _checkpoint(folder, "safetensors", "model.safetensors", data)
    loaded = {key: tensor.read() for key, tensor in open_weights(folder).items()}
    length = int.from_bytes(data[:8], "little")
    header = stdlib_json.loads(data[8:8 + length])
    if header.get("__metadata__", {}).keys() >= _metadata(seeds.safetensors()).keys() - {"format"}:     # the digests
        _compare(loaded, seeds.tensors())
    for key, entry in header.items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            plain = torch.frombuffer(bytearray(data[8 + length + begin:8 + length + end] or b"\0"), dtype=torch.uint8)
            if loaded[key].dtype != DTYPES[entry["dtype"]] or list(loaded[key].shape) != entry["shape"] or (
                    end > begin and not torch.equal(loaded[key].flatten().view(torch.uint8), plain)):
                raise Wrong(f"{key} is not what its header says")
    minivl.load(folder)


def bin(name, data, folder):
    """Open and load it as the weights of a checkpoint."""
    _checkpoint(folder, "bin", "pytorch_model.bin", data)
    loaded = {key: tensor.read() for key, tensor in open_weights(folder).items()}
    if name.startswith("bytes"):
        _compare(loaded, seeds.tensors())
    minivl.load(folder)


def json(name, data, folder):
    """Put the file into a checkpoint, load all of it, encode and decode texts, ask about a picture."""
    file = name.split()[0]
    _checkpoint(folder, "shards" if file == seeds.INDEX else "safetensors", file, data)
    if file == "tokenizer.json":        # alone: beside the others it is compared with them, and mostly refused
        for other in seeds.TOKENIZER:
            (folder / other).unlink(missing_ok=True)
    try:
        pipe = minivl.pipeline(folder)
    finally:
        for path in folder.iterdir():       # the next case may be of another file
            if path.suffix != ".safetensors" and path.name != "form":
                path.unlink()
    _check_tokenizer(pipe.tokenizer)
    if "token" not in file and file not in ("merges.txt", "vocab.json"):        # those may change what is computed
        pipe(("<image>\nWhat is this?", Image.new("RGB", (90, 60))), minivl.GenerationConfig(max_new_tokens=2))
    pipe.tokenizer.containing("a")


def sentencepiece(name, data, folder):
    """Load it as the tokenizer of an InternLM2 model, encode and decode texts."""
    folder = folder.with_name("tokenizer")      # the other kinds' checkpoint must not have these files
    folder.mkdir(exist_ok=True)
    for file in ("added_tokens.json", "tokenizer_config.json"):
        shutil.copyfile(seeds.sentencepiece_folder() / file, folder / file)
    (folder / "tokenizer.model").write_bytes(data)
    tokenizer = minivl.Tokenizer.load(folder)
    _check_tokenizer(tokenizer)
    for text in TEXTS:
        ids = tokenizer.encode(text, plain=True)
        if set(ids) & set(tokenizer.added.values()):
            raise Wrong(f"{text!r} as plain text gave an added token")
        if _tidied(tokenizer.decode(ids)).lstrip(" ") != _tidied(text).lstrip(" "):
            raise Wrong(f"{text!r} came back as {tokenizer.decode(ids)!r}")
    tokenizer.containing("a")


def _tidied(text):
    for old, new in TIDIED:
        text = text.replace(old, new)
    return text


def _check_tokenizer(tokenizer):
    for text in TEXTS:
        for plain in (False, True):
            ids = tokenizer.encode(text, plain=plain)
            stream = TextStream(tokenizer)
            if tokenizer.decode(ids) != "".join(map(stream.push, ids)) + stream.finish():
                raise Wrong(f"a stream shows {text!r} differently")


def pictures(name, data, folder):
    """Open it as a picture."""
    image = minivl.load_image(data)
    _check_picture(image)


def videos(name, data, folder):
    """Take frames of it, of the whole or, for every third file, of its first part."""
    path = folder / f"case.{name.rpartition('.')[2]}"
    path.write_bytes(data)
    try:
        frames = minivl.load_video(path, num_segments=5, bound=(0, 0.3) if len(data) % 3 == 0 else None)
    finally:
        path.unlink()
    if len(frames) != 5:
        raise Wrong(f"{len(frames)} frames are given, 5 were wanted")
    for image in frames:
        _check_picture(image)


def _checkpoint(folder, form, file, data):
    """Make `folder` a checkpoint in this form with one file replaced; the large files are copied once."""
    mark = folder / "form"
    if not mark.exists() or mark.read_text() != form:
        shutil.rmtree(folder)
        shutil.copytree(seeds.folder(form), folder)
        mark.write_text(form)
    for path in seeds.folder(form).iterdir():
        if path.suffix in (".json", ".txt"):
            shutil.copyfile(path, folder / path.name)
    (folder / file).write_bytes(data)


def _metadata(data):
    return stdlib_json.loads(data[8:8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def _compare(loaded, known):
    """Every loaded tensor must be one of the known, in dtype, shape and bytes."""
    for key, tensor in loaded.items():
        right = known.get(key)
        if right is None or (right.dtype, right.shape) != (tensor.dtype, tensor.shape) or not torch.equal(
                right.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)):
            raise Wrong(f"{key} was altered, and loaded")


def _check_picture(image):
    if type(image) is not Image.Image or image.mode != "RGB" or not image.width or not image.height:
        raise Wrong(f"the picture is {image!r}")
    image.getpixel((image.width - 1, image.height - 1))
