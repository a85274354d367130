"""Valid small files of every kind, made once per process in a folder that goes with it."""
import atexit
import functools
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from minivl import Tokenizer
from minivl.sentencepiece import read_model
from weights_tools.synthesize import synthesize

sys.path.append(str(Path(__file__).parents[1] / "media"))       # as pytest does for the tests there

from media_files import encoded, fuzz_seeds, noise

TOKENIZER = ("vocab.json", "merges.txt", "added_tokens.json")
INDEX = "model.safetensors.index.json"


@functools.lru_cache(None)
def folder(form: str = "safetensors") -> Path:
    """A tiny AWQ checkpoint: as "safetensors", as "bin", or in "shards"."""
    top = Path(tempfile.mkdtemp(prefix="minivl-fuzz-"))
    atexit.register(shutil.rmtree, top, ignore_errors=True)
    options = {"safetensors": {}, "bin": {"format": "bin"}, "shards": {"shard_gb": 0.0006}}[form]
    return synthesize(top / form, "tiny", awq=True, **options)


@functools.lru_cache(None)
def safetensors() -> bytes:
    """model.safetensors with digests, as weights_tools writes it."""
    return (folder() / "model.safetensors").read_bytes()


@functools.lru_cache(None)
def released() -> bytes:
    """The same tensors without digests, as released files are."""
    length = int.from_bytes(safetensors()[:8], "little")
    header = json.loads(safetensors()[8:8 + length])
    text = json.dumps({**header, "__metadata__": {"format": "pt"}}).encode()
    return len(text).to_bytes(8, "little") + text + safetensors()[8 + length:]


@functools.lru_cache(None)
def bin() -> bytes:
    """pytorch_model.bin."""
    return (folder("bin") / "pytorch_model.bin").read_bytes()


@functools.lru_cache(None)
def tensors() -> dict[str, torch.Tensor]:
    """What all of these weight files hold."""
    return dict(torch.load(folder("bin") / "pytorch_model.bin", weights_only=True))


@functools.lru_cache(None)
def json_files() -> dict[str, bytes]:
    """Name -> the small files of the checkpoint, tokenizer.json, tokenizer_config.json and an index among them."""
    files = {path.name: path.read_bytes() for path in sorted(folder().iterdir()) if path.suffix in (".json", ".txt")}
    tokenizer = Tokenizer.load(folder())
    decoder = {str(i): {"content": token, "special": i in tokenizer.special_ids, "lstrip": False}
               for token, i in tokenizer.added.items()}
    config = {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
              "additional_special_tokens": ["<img>", "</img>"], "add_bos_token": False, "model_max_length": 8192}
    return {**files, "tokenizer.json": tokenizer.backend.to_str().encode(),
            "tokenizer_config.json": json.dumps(config).encode(), INDEX: (folder("shards") / INDEX).read_bytes()}


@functools.lru_cache(None)
def sentencepiece_folder() -> Path:
    """The golden tokenizer of an InternLM2 model."""
    return Path(__file__).parents[1] / "golden" / "internlm2-tokenizer"


@functools.lru_cache(None)
def sentencepiece() -> list[bytes]:
    """tokenizer.model, without and with a dummy prefix."""
    return [(sentencepiece_folder() / name / "tokenizer.model").read_bytes() for name in ("", "dummy-prefix")]


@functools.lru_cache(None)
def sentencepiece_pieces() -> list[tuple]:
    """Its pieces: (text, score, type)."""
    return [tuple(piece) for piece in read_model(sentencepiece_folder() / "tokenizer.model").pieces]


def pictures() -> list[bytes]:
    """Pictures of every accepted format."""
    return fuzz_seeds()


@functools.lru_cache(None)
def videos() -> list[tuple[str, bytes]]:
    """(suffix, file) of animations and, where PyAV is installed, of videos."""
    frames = [noise(48, 32, k) for k in range(6)]
    animated = {"save_all": True, "append_images": frames[1:], "duration": 60}
    found = [(suffix, encoded(frames[0], format, **animated))
             for suffix, format in (("gif", "GIF"), ("webp", "WEBP"), ("png", "PNG"))]
    try:
        import av
    except ImportError:
        return found
    top = Path(tempfile.mkdtemp(prefix="minivl-fuzz-"))
    atexit.register(shutil.rmtree, top, ignore_errors=True)
    for suffix, codec in (("mp4", "mpeg4"), ("mp4", "libx264"), ("mkv", "mpeg4"), ("avi", "mjpeg"), ("webm", "libvpx"),
                          ("mov", "libx264"), ("ts", "mpeg2video"), ("flv", "flv")):
        path = top / f"{codec}.{suffix}"
        with av.open(str(path), "w") as out:
            stream = out.add_stream(codec, 25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for k in range(12):
                picture = Image.new("RGB", (64, 48), (20 * k, 90, 255 - 20 * k))
                picture.paste(frames[k % 6], (k, 5))
                out.mux(stream.encode(av.VideoFrame.from_image(picture)))
            out.mux(stream.encode())
        found.append((suffix, path.read_bytes()))
    return found
