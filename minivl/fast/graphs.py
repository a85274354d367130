"""On a GPU: one step of the decoder recorded once and replayed for every token (CUDA graphs).

A step of the 4B model is about a thousand small kernels, and launching them one by one takes six times as long as
running them. A recording replays them all in one go, but always on the same memory. So while it is in use, a recording
owns the keys and values, and the place of the next token is a number on the device:

    KVCache      keys [B, K, S, E] that grow        position: a Python number       mask: none, or by padding
    Fixed        keys [B, K, capacity, E]           position: int64[1] on the GPU   mask: hides what is not filled

The step runs the definition's own modules. If a reader changes them between two prompts, `signature` shows it and the
step is recorded anew. B prompts, K kv heads, E head dim, D width, S tokens so far, V vocabulary.
"""
from __future__ import annotations

import sys
import weakref
from functools import lru_cache
from types import ModuleType

import torch
from torch import nn

from minivl import internlm2, qwen2
from minivl.cache import KVCache
from minivl.fast.edits import stands_for

ROOM = 256              # tokens that a new recording has room for, at least, beyond those in the cache
IDLE = 4                # recordings kept for the next prompts


class Fixed:
    """What a recorded step sees as its KVCache: memory that stays where it is, and the place of the next token."""

    def __init__(self, layers: dict, at: torch.Tensor):
        self.layers = layers        # layer index -> [keys, values], each float[B, K, capacity, E]
        self.at = at                # int64[1], on their device

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """Store k, v float[B, K, 1, E] of the new token -> keys and values, each float[B, K, capacity, E].

        Places that are not filled yet are among them: the mask hides these.
        """
        for stored, new in zip(self.layers[layer], (k, v)):
            stored.index_copy_(2, self.at, new)
        return self.layers[layer]


def step(language: nn.Module, inputs: torch.Tensor, fixed: Fixed, padding: torch.Tensor) -> torch.Tensor:
    """Compute logits as `scores` does, with the position on the device: float[B, 1, D] -> float32[B, 1, V].

    padding int64[B]: tokens at the start of each row that nobody sees. Advances `fixed.at`.
    """
    capacity = fixed.layers[0][0].shape[2]
    key = torch.arange(capacity, device=inputs.device)
    mask = (key <= fixed.at) & (key >= padding[:, None])                                # (B, capacity)
    position = (fixed.at - padding)[:, None]                                            # (B, 1)
    hidden = language.body.through(inputs, position, mask[:, None, None], fixed)        # (B, 1, D)
    scores = language.head(hidden).float()                                              # (B, 1, V)
    fixed.at.add_(1)
    return scores


def signature(language: nn.Module) -> list | None:
    """List what a recording depends on, to compare: the modules, their code and its file's, where their weights lie.

    None if there are hooks: a replay would not call them.
    """
    file = sys.modules[type(language.body).__module__]
    modules = list(language.modules())
    if any(m._forward_hooks or m._forward_pre_hooks for m in modules):
        return None
    kinds = {kind for module in modules for kind in type(module).__mro__}
    code = [value for kind in kinds for value in vars(kind).values() if callable(value)]
    functions = [value for value in vars(file).values() if callable(value)]
    patched = [value for module in modules for value in vars(module).values() if callable(value)]
    tensors = [t for module in modules for t in (*module._parameters.values(), *module._buffers.values())]
    places = [t.data_ptr() for t in tensors if t is not None]
    # Weak references to modules: this list hangs on one of them, and a cycle would keep a model until it is collected.
    return [*map(weakref.ref, modules), *code, *functions, *patched, *places]


@lru_cache
def stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that everything is recorded on: cuBLAS keeps some 32 MB for each one that it ever worked on."""
    return torch.cuda.Stream(device)


class Recording:
    """A step of B prompts with room for `capacity` tokens, and the memory that it works on."""

    def __init__(self, cache: KVCache, inputs: torch.Tensor, capacity: int):
        self.capacity, self.graph = capacity, None
        keys = cache.layers[0][0]
        self.layers = {layer: [t.new_zeros(*t.shape[:2], capacity, t.shape[3]) for t in both]
                       for layer, both in cache.layers.items()}
        self.inputs = torch.empty_like(inputs)
        self.padding = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
        self.fixed = Fixed(self.layers, torch.zeros(1, dtype=torch.int64, device=keys.device))

    def fits(self, cache: KVCache, inputs: torch.Tensor) -> bool:
        """Say whether a cache can move in: the same prompts, layers and dtype, and room for more."""
        return (self.inputs.shape == inputs.shape and self.inputs.dtype == inputs.dtype
                and self.layers.keys() == cache.layers.keys() and cache.length + 1 <= self.capacity)

    def take(self, cache: KVCache, padding: torch.Tensor | None) -> None:
        """Copy what a cache holds, and make it hold this memory from now on."""
        for layer, both in cache.layers.items():
            for mine, its in zip(self.layers[layer], both):
                mine[:, :, :cache.length] = its[:, :, :cache.length]
        cache.layers = dict(self.layers)        # a dict of its own: when the cache grows, it moves out
        self.padding.copy_(torch.zeros_like(self.padding) if padding is None else padding)

    def record(self, language: nn.Module, length: int) -> None:
        """Run the step once, so that all it needs is set up, then record it."""
        side = stream(self.inputs.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.fixed.at.fill_(length)
            step(language, self.inputs, self.fixed, self.padding)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=side):
            self.scores = step(language, self.inputs, self.fixed, self.padding)

    def replay(self, inputs: torch.Tensor, length: int) -> torch.Tensor:
        """Replay the step for the tokens at position `length`: float[B, 1, D] -> logits float32[B, 1, V]."""
        self.inputs.copy_(inputs)
        self.fixed.at.fill_(length)
        self.graph.replay()
        return self.scores.clone()              # the next token overwrites them


def recording_of(language: nn.Module, cache: KVCache, inputs: torch.Tensor, padding: torch.Tensor | None) -> Recording:
    """Find the recording that a cache lives in, or move it into an idle one of the decoder's or a new one."""
    found = vars(cache).get("recording")
    if found and cache.layers[0] is found.layers[0] and found.fits(cache, inputs):
        return found
    idle = vars(language).setdefault("idle", [])
    if found:                                           # outgrown
        cache.leaves.detach()
        keep(idle, found)
    fitting = [r for r in idle if r.fits(cache, inputs) and cache.length + ROOM // 2 <= r.capacity]
    if fitting:
        found = min(fitting, key=lambda r: r.capacity)
        idle.remove(found)
    else:
        capacity = 1 << (cache.length + ROOM - 1).bit_length()          # a power of two: few sizes
        found = Recording(cache, inputs, capacity)
    found.take(cache, padding)
    cache.recording = found
    cache.leaves = weakref.finalize(cache, keep, idle, found)   # when the cache is gone, the next may have it
    return found


def recorded(module: ModuleType, definition: type, body: type) -> type:
    """Make a decoder with its steps of one token per prompt recorded. Prompts are read as in the definition."""
    class Recorded(definition):
        @stands_for((definition, "scores"), (body, "forward"), (module, "attention_mask"), (KVCache, "append"))
        def scores(self, inputs_embeds: torch.Tensor, cache: KVCache | None = None, padding: torch.Tensor | None = None,
                   last: int = 1) -> torch.Tensor:
            one = inputs_embeds.shape[1] == 1 and type(cache) is KVCache and cache.length > 0
            if not one or torch.is_grad_enabled():
                vars(self).pop("seen", None)        # a prompt is read: its first step looks again at what was changed
                return super().scores(inputs_embeds, cache, padding, last)
            if "seen" not in vars(self):
                vars(self)["seen"] = signature(self)
            if self.seen is None:
                return super().scores(inputs_embeds, cache, padding, last)
            with torch.inference_mode():
                recording = recording_of(self, cache, inputs_embeds, padding)
                # At every token: the same list is not compared entry by entry.
                if recording.graph is None or recording.of is not self.seen and recording.of != self.seen:
                    recording.inputs.copy_(inputs_embeds)
                    recording.record(self, cache.length)
                recording.of = self.seen
                scores = recording.replay(inputs_embeds, cache.length)
                cache.length += 1
            return scores

    return Recorded


RECORDED = {definition: recorded(module, definition, body) for module, definition, body in (
    (qwen2, qwen2.Qwen2ForCausalLM, qwen2.Qwen2Model),
    (internlm2, internlm2.InternLM2ForCausalLM, internlm2.InternLM2Model))}


def keep(idle: list, recording: Recording) -> None:
    """Keep a recording for the next prompts; the oldest goes if there are too many."""
    idle.append(recording)
    del idle[:-IDLE]
