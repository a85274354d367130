"""What tests ask with: a picture, noise, and answers made from the parts alone."""
import torch
from conftest import GOLDEN
from PIL import Image

import minivl
from minivl import EngineConfig, GenerationConfig, Pipeline
from minivl.prompt import encode

SHORT = GenerationConfig(max_new_tokens=12)
TIGER = GOLDEN / "tiger.jpeg"


def noise(width, height, seed=0):
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (3 * width * height,), generator=g)
    return Image.frombytes("RGB", (width, height), bytes(values.tolist()))


def with_config(pipe, **values):
    return Pipeline(pipe.model, pipe.tokenizer, EngineConfig(**values))


def expected(pipe, messages, pictures, tiles_per_block, system=None, max_new_tokens=12, **options):
    """Straight from the parts: render, encode, tiles, generate."""
    ids = encode(pipe.tokenizer, messages, tiles_per_block, system, tokens_per_tile=4, **options)
    tiles = [t for p in pictures for t in minivl.tiling.tile(p, max_num=12, tile_size=56)]
    pixels = minivl.tiling.to_pixel_values(tiles) if tiles else None
    got = minivl.generate(pipe.model, [ids], pixels, max_new_tokens=max_new_tokens)[0]
    return ids, [t for t in got if t not in pipe.stop_ids]


def forced(pipe, monkeypatch, ids):
    """Makes the pipeline write these tokens."""
    script = iter(ids)
    monkeypatch.setattr(minivl.sampling.Sampler, "__call__", lambda self, logits: next(script))


def counted(model):
    """Counts tiles through the tower and tokens through the decoder."""
    count = {"tiles": 0, "tokens": 0}

    def add(key, size):
        def hook(module, args):
            count[key] += size(args[0])
        return hook
    count["handles"] = [
        model.vision_model.register_forward_pre_hook(add("tiles", len)),
        model.language_model.model.register_forward_pre_hook(add("tokens", lambda x: x.shape[0] * x.shape[1]))]
    return count
