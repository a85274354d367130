"""A checkpoint of any size run one decoder layer at a time: its weights come from the files and go again.

    prompts -> tower and embeddings, block by block -> activations on disk -> layer 0 -> activations on disk -> ...

All prompts pass a layer before the next one is read, so every weight is read once. In memory are the weights of one
layer and one prompt; the activations, float32[N, D] of all N tokens, lie in files that are mapped into memory.
"""
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from minivl import tiling
from minivl.files.load import opened, read_tensors
from minivl.limits import InputError
from weights_tools.files import raw_bytes
from weights_tools.quantize.prompts import counted

TILES = 8               # looked at together
CPU = torch.device("cpu")


class Stream:
    """The model of a checkpoint folder, on `meta`; what computes is filled for as long as it does."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        self.folder = folder
        self.dtype = dtype
        self.model, self.stored = opened(folder)
        self.names = {module: name for name, module in self.model.named_modules()}
        self.layers = list(self.model.language_model.layers)

    def read(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Read the tensors of a module, by their names inside it, as they are computed with."""
        prefix = f"{self.names[module]}."
        found = read_tensors((prefix + name for name in module.state_dict()), self.stored, CPU, self.dtype)
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    @contextmanager
    def filled(self, *modules: nn.Module) -> Iterator[None]:
        """Give modules their weights for as long as the block lasts."""
        try:
            for module in modules:
                module.load_state_dict(self.read(module), assign=True)
            yield
        finally:
            for module in modules:
                module.to("meta")

    def through(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Run one decoder layer, which must be filled, on a whole prompt float[T, D]: same shape.

        By the decoder's own `through`, which knows its RoPE, with one layer in place of all.
        """
        body = self.model.language_model.body
        whole = body.layers
        norm = body.norm
        try:
            body.layers = nn.ModuleList([self.layers[layer]])
            body.norm = nn.Identity()
            position = torch.arange(len(x))[None]
            return body.through(x[None], position, None, None)[0]
        finally:
            body.layers = whole
            body.norm = norm

    def embedded(self, prompts: Iterable[tuple[list[int], list]]) -> Iterator[torch.Tensor]:
        """Yield the vectors that the decoder reads of each prompt, (ids, tiles) -> float[T, D]."""
        model = self.model
        tower = model.vision_model
        table = model.language_model.embeddings
        table.load_state_dict({"weight": self.stored[f"{self.names[table]}.weight"].read()}, assign=True)   # mapped
        blocks = list(tower.encoder.layers)
        undo = [table.register_forward_hook(lambda module, args, rows: rows.to(self.dtype))]
        for block in blocks:
            undo.append(block.register_forward_pre_hook(self._fill))
            undo.append(block.register_forward_hook(self._empty))
        try:
            with self.filled(tower.embeddings, model.mlp1):
                for ids, tiles in prompts:
                    yield model.embed(torch.tensor([ids]), self._visual(tiles))[0]      # (T, D)
        finally:
            for hook in undo:
                hook.remove()
            table.to("meta")

    def _visual(self, tiles: list) -> torch.Tensor | None:
        parts = [self.model.visual_tokens(tiling.to_pixel_values(tiles[i:i + TILES]).to(self.dtype))
                 for i in range(0, len(tiles), TILES)]
        return torch.cat(parts) if parts else None

    def _fill(self, module: nn.Module, args):
        module.load_state_dict(self.read(module), assign=True)

    def _empty(self, module: nn.Module, args, out):
        module.to("meta")


def write_embedded(stream: Stream, prompts: Iterable[tuple[list[int], list]], path: Path) -> list[int]:
    """Write what the decoder reads of all prompts to a file, float32[N, D]; return the tokens of each prompt."""
    lengths = []
    with open(path, "wb") as file, torch.no_grad():
        for x in tqdm(stream.embedded(counted(prompts)), desc="reading prompts", unit="prompt", disable=None):
            if not x.isfinite().all():
                raise InputError(f"what the decoder reads of prompt {len(lengths) + 1} holds numbers that are NaN or "
                                 f"infinite: the tower exceeds {str(stream.dtype)[6:]}; compute in bfloat16 or float32")
            wide = x.float().contiguous()       # its memory is written: it must have a name
            file.write(raw_bytes(wide))
            lengths.append(len(x))
    return lengths


def mapped(path: Path, tokens: int, width: int) -> torch.Tensor:
    """Map a file of activations into memory, made if it is not there: float32[tokens, width]."""
    size = 4 * tokens * width
    with open(path, "ab") as file:      # a mapped file grows by what is written, and no error can say that there is no
        if file.tell() != size and hasattr(os, "posix_fallocate"):      # room: the process is killed
            file.truncate(size)
            os.posix_fallocate(file.fileno(), 0, size)
    return torch.from_file(str(path), shared=True, size=tokens * width, dtype=torch.float32).view(tokens, width)


def pass_layer(stream: Stream, layer: int, before: torch.Tensor, after: torch.Tensor, lengths: list[int],
               bar: tqdm | None = None):
    """Run one decoder layer, which must be filled, on all prompts: float32[N, D] -> written to float32[N, D].

    Raises InputError that names the layer and the linear where numbers become infinite or NaN.
    """
    with torch.no_grad():
        for x, y in zip(before.split(lengths), after.split(lengths)):
            with numbers_stay_finite(stream, layer):
                y.copy_(stream.through(layer, x.to(stream.dtype)))
            if bar is not None:
                bar.update(len(x))


@contextmanager
def numbers_stay_finite(stream: Stream, layer: int) -> Iterator[None]:
    """Refuse what a linear of a layer puts out where it is not finite: named, with what it was given."""
    def look(name):
        def check(module, args, out):
            if not out.isfinite().all():
                largest = float(args[0].float().abs().max())
                raise InputError(
                    f"{stream.names[stream.layers[layer]]}.{name} puts out {int((~out.isfinite()).sum())} numbers that "
                    f"are NaN or infinite in {str(out.dtype)[6:]} (its inputs reach {largest:.4g}, the largest number "
                    f"is {torch.finfo(out.dtype).max:.4g}); compute in bfloat16 or float32")
        return check
    undo = [module.register_forward_hook(look(name)) for name, module in stream.layers[layer].linears.items()]
    try:
        yield
    finally:
        for hook in undo:
            hook.remove()
