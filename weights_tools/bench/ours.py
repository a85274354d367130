"""minivl as an engine: each method does one job of the bench and returns its seconds."""
from __future__ import annotations

import time
from collections.abc import Callable

import torch

import minivl
from minivl.awq import AWQLinear
from minivl.cache import KVCache
from minivl.fast.layers import OpWords, Words
from weights_tools.bench.timing import CONTEXT, median_step
from weights_tools.files import save_torch

OURS = {"exact": "exact", "fast": "fast", "lean": "exact", "op": "fast", "released": None}      # engine -> precision
UNCOMPILED = ("lean", "op")     # as on a machine without a C++ compiler


def part_of(name: str, module: torch.nn.Module) -> str | None:
    """Say which part of a step a module is, for the profile; None: it belongs to the rest.

    An Int4 whose words lie beside others' is passed by: its time is in their product, and a hook would part them.
    """
    if isinstance(module, (Words, OpWords)) or type(module) is AWQLinear:
        return "int4"
    return "head" if name == "lm_head" else "attention" if name.endswith("attend") else None


class Ours:
    """Run minivl on one device."""

    def __init__(self, checkpoint, precision: str | None, device: str = "cpu", dtype: str | None = None):
        self.model = minivl.load(checkpoint, precision=precision, device=device, dtype=dtype)
        self.language = self.model.language_model

    def wait(self):
        """Wait until the device has done what it was asked."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, work: Callable) -> float:
        """Time a function: its seconds."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def embed(self, batch: int, tokens: int) -> torch.Tensor:
        """Embed some ids: float[B, T, D]."""
        ids = torch.arange(batch * tokens).view(batch, tokens) % min(1000, self.model.config.llm_config.vocab_size)
        return self.language.embeddings(ids.to(self.model.device))

    def tiles(self, n: int) -> float:
        """Look at n tiles of noise."""
        R = self.model.config.force_image_size
        x = torch.randn(n, 3, R, R, device=self.model.device)
        return self.timed(lambda: self.model.visual_tokens(x))

    def prompt(self, tokens: int) -> float:
        """Read a prompt."""
        x = self.embed(1, tokens)
        return self.timed(lambda: self.language.scores(x, KVCache()))

    def batch(self, n: int, tokens: int) -> float:
        """Add a token to each of n prompts: the median step."""
        cache = KVCache()

        def step(scores):
            scores = self.language.scores(self.language.embeddings(scores[:, -1].argmax(-1)[:, None]), cache)
            self.wait()
            return scores

        last = self.language.scores(self.embed(n, CONTEXT), cache)
        if self.model.device.type == "cuda":
            for _ in range(2):              # the first records what the others replay
                last = step(last)
        return median_step(step, last, tokens)

    def scores(self, path: str) -> float:
        """Write log probabilities [68, V] to a file: of a prompt's last 64 tokens, then of four read one by one.

        The prompt starts with a tile. Nothing is timed.
        """
        c = self.model.config
        cache = KVCache()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, min(c.llm_config.vocab_size, 1000), (1, 260), generator=generator)
        pixels = torch.randn(1, 3, c.force_image_size, c.force_image_size, generator=generator)
        x = torch.cat([self.model.visual_tokens(pixels).flatten(0, 1)[None], self.language.embeddings(ids)], dim=1)
        found = [self.language.scores(x[:, :-4], cache, last=64)[0]]
        found += [self.language.scores(x[:, t:t + 1], cache)[0] for t in range(x.shape[1] - 4, x.shape[1])]
        save_torch(torch.cat(found).float().log_softmax(-1), path)
        return 0.0

    def profile(self, tokens: int) -> dict[str, float]:
        """Split a step into shares by what it is spent on: {"int4", "head", "attention", "the rest"}.

        The rest is what is missing to a step without hooks: looking takes time too. Each the fastest of three runs.
        """
        def seconds():
            cache = KVCache()
            x = self.embed(1, 1)
            start = time.perf_counter()
            for _ in range(tokens // 3 + 1):
                self.language.scores(x, cache)
            return time.perf_counter() - start

        total = min(seconds() for _ in range(3))
        spent = {"int4": 0.0, "head": 0.0, "attention": 0.0}
        hooks = []
        for name, module in self.language.named_modules():
            if kind := part_of(name, module):
                def before(module, inputs):
                    module.started = time.perf_counter()

                def after(module, inputs, output, kind=kind):
                    spent[kind] += time.perf_counter() - module.started

                hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        looks = []
        for _ in range(3):
            spent.update(dict.fromkeys(spent, 0.0))
            seconds()
            looks.append(dict(spent))
        for hook in hooks:
            hook.remove()
        spent = min(looks, key=lambda look: sum(look.values()))
        return {kind: share / total for kind, share in {**spent, "the rest": total - sum(spent.values())}.items()}
