"""Round a decoder's linears to int4 by several recipes, and measure what it loses: the perplexity of a text."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy

import torch
import torch.nn.functional as F

from minivl.awq import dequantize
from minivl.qwen2 import Qwen2ForCausalLM
from weights_tools.quantize.inputs import Inputs, watched
from weights_tools.quantize.layer import PARTS, Recipe, quantize_layer
from weights_tools.quantize.rounding import GROUP

METHODS = {"rtn": {"method": "rtn"}, "smooth": {"method": "smooth"}, "lmdeploy": {"method": "lmdeploy"},
           "awq": {"method": "awq"}, "awq-clip": {"method": "awq", "clip": True}}
# One of so many inputs is kept for the search. It must not divide the 512 tokens of a piece: the first token of each,
# whose inputs are the largest of all, would always be kept.
EVERY = 7


@torch.no_grad()
def perplexity(decoder: Qwen2ForCausalLM, ids: torch.Tensor, done: Callable = lambda: None) -> float:
    """Compute exp of the mean surprise, -log p, of all tokens of int[B, T] but the first of each row.

    Each row is read by itself, from position 0. `done()` is called after each.
    """
    total = 0.0
    for row in ids:
        scores = decoder(decoder.embeddings(row[None, :-1]))[0]                         # (T - 1, V)
        total += float(F.cross_entropy(scores, row[1:], reduction="sum"))
        done()
    return math.exp(total / ids[:, 1:].numel())


@torch.no_grad()
def calibration(decoder: Qwen2ForCausalLM, ids: torch.Tensor, group_size: int = GROUP,
                done: Callable = lambda: None) -> list[dict[str, Inputs]]:
    """Read int[B, T]; return for each layer what its linears were given, all that any recipe asks for."""
    with ExitStack() as stack:
        seen = [stack.enter_context(watched(layer, group_size, EVERY)) for layer in decoder.layers]
        for row in ids:
            decoder.body(decoder.embeddings(row[None]))
            done()
    return seen


@torch.no_grad()
def rounded(decoder: Qwen2ForCausalLM, seen: Sequence[dict[str, Inputs]], recipe: Recipe) -> Qwen2ForCausalLM:
    """Copy a decoder and round every linear of its layers to int4, kept as the float numbers that int4 stands for.

    seen: of `calibration`. What a layer computes changes by the rounding alone.
    """
    copy = deepcopy(decoder)
    for layer, inputs in zip(copy.layers, seen):
        tensors, _ = quantize_layer(layer.state_dict(), list(layer.linears), layer.FEEDS, recipe, inputs)
        for name in layer.linears:
            tensors[f"{name}.weight"] = dequantize(*(tensors.pop(f"{name}.{part}") for part in PARTS)).T
        layer.load_state_dict(tensors, strict=True)
    return copy
