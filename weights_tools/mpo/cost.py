"""What a step of preference training costs at the real sizes: python -m weights_tools.mpo.cost [SIZE ...]

    one layer of the decoder, one of the tower, patches and projector, some rows of embeddings and head, AdamW: random,
    at their real shapes -> forward and backward of one pair, measured: seconds, and memory at the highest point
    -> times the layers: a pair, a step, memory of one process, and of each of eight, computed

Nothing is downloaded, and the model is never there as a whole. Layers are computed again on the way back, weights are
float32, as `train` has it. Seconds on a CPU are processor seconds, of all threads together, so that other programs do
not count. Both answers have the same length.
"""
from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minivl import options
from minivl.config import Config
from minivl.limits import InputError
from minivl.model import MiniVL
from weights_tools import run
from weights_tools.mpo.loss import RewardShift, generation, mpo
from weights_tools.mpo.steps import Plan, optimisers
from weights_tools.synthesize import SIZES, config_json
from weights_tools.train.step import precision

ROWS = 4096             # of embeddings and head, at most: the rest is computed
GB = 1e9
RANKS = 8


@dataclass(frozen=True)
class Work:
    """What is measured for: one pair."""
    tokens: int         # of a conversation, its answer included
    answer: int
    tiles: int
    half: bool          # products in bfloat16


@dataclass(frozen=True)
class Cost:
    """What a part of the model was measured to cost."""
    forward: float      # seconds
    backward: float     # with the second forward, where there is one
    peak: int           # bytes more than before, at the highest point; gradients of its weights included

    @property
    def seconds(self) -> float:
        """Both ways."""
        return self.forward + self.backward


# ---- measuring ------------------------------------------------------------------------------------------------------

def clock(device: str) -> float:
    """Tell the time in seconds: of the processor on a CPU, of the wall elsewhere."""
    if torch.device(device).type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def silent():
    """Throw away what is written to stderr by anybody: torch's profiler says twice that it runs, whoever asks."""
    own = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)


def highest(device: str, work: Callable[[], None]) -> int:
    """Run some work; return the bytes that it had at its highest point beyond those before it."""
    if torch.device(device).type != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with silent(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                          profile_memory=True) as seen:
        work()
    now = most = 0
    for event in sorted((e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"),
                        key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measured(device: str, forward: Callable[[], torch.Tensor]) -> Cost:
    """Measure a part: `forward` gives what it computes, whose sum the way back starts from."""
    times = []

    def work():
        times.append(clock(device))
        y = forward()
        times.append(clock(device))
        y.float().mean().backward()
        times.append(clock(device))

    peak = highest(device, work)
    start, middle, end = times
    return Cost(middle - start, end - middle, peak)


def one_layer(config: dict, device: str) -> MiniVL:
    """Make a model of one layer each, with few rows of embeddings and head; random, float32."""
    llm = {**config["llm_config"], "num_hidden_layers": 1, "vocab_size": min(ROWS, config["llm_config"]["vocab_size"])}
    config = Config.from_json({**config, "llm_config": llm,
                               "vision_config": {**config["vision_config"], "num_hidden_layers": 1}})
    with torch.device(device):
        model = MiniVL(config)
    with torch.no_grad():
        for p in model.parameters():        # what `load` would fill is not set: numbers near 0 take 100 times as long
            p.normal_(0.0, 0.02) if p.ndim > 1 else p.fill_(1.0)
    return model


def parts(model: MiniVL, work: Work, device: str) -> dict[str, Callable[[], torch.Tensor]]:
    """List what is measured: name -> its forward. B = 1, so two rows of `tokens`."""
    config = model.config
    C, D, R = config.vision_config.hidden_size, config.llm_config.hidden_size, config.force_image_size
    places = (R // config.vision_config.patch_size) ** 2 + 1
    make = lambda *shape: torch.randn(*shape, device=device, requires_grad=True)
    language, tower = model.language_model, model.vision_model
    ids = torch.randint(language.head.out_features, (2, work.tokens), device=device)
    learned = ids[:, :work.answer].reshape(-1)

    def loss():
        logits = language.head(hidden).float()
        logps = -F.cross_entropy(logits, learned, reduction="none").view(2, 1, -1).sum(-1)
        counts = torch.tensor([work.answer], device=device)
        return mpo(*logps, *logps.detach(), generation(logps[0], counts), RewardShift()).total

    x = make(2, work.tokens, D)
    seen = make(work.tiles, places, C)
    hidden = make(2 * work.answer, D)
    pixels = torch.randn(work.tiles, config.vision_config.num_channels, R, R, device=device)
    return {"decoder layer": lambda: checkpoint(language.body, x, use_reentrant=False),
            "tower layer": lambda: checkpoint(tower.encoder.layers[0], seen, use_reentrant=False),
            "patches": lambda: tower.embeddings(pixels),
            "projector": lambda: model.mlp1(model.pixel_unshuffle(seen[:, 1:])),
            "embeddings": lambda: language.embeddings(ids),
            "head and loss": loss}


def measure(config: dict, work: Work, device: str) -> dict[str, Cost]:
    """Measure every part for one pair, and "AdamW": the step of a decoder layer, its gradients clipped before."""
    model = one_layer(config, device)
    found = {}
    with precision(device, work.half):
        for name, forward in parts(model, work, device).items():
            model.zero_grad()
            found[name] = measured(device, forward)
    model.zero_grad()
    layer = model.language_model.layers[0]
    opts = optimisers(Plan(), model, list(layer.parameters()))
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(2):              # the first makes its state
        start = clock(device)
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        for optimiser in opts:
            optimiser.step()
        found["AdamW"] = Cost(clock(device) - start, 0.0, 0)
    return found


# ---- the whole model, computed --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Shape:
    """What is counted of a whole model."""
    parameters: int
    layer: int          # parameters of a decoder layer
    outside: int        # parameters outside all layers: gathered by each process for a whole forward and backward
    layers: int
    tower_layers: int
    rows: float         # times the rows of embeddings and head that are measured
    table: int          # parameters of the embeddings, which are looked up, not multiplied
    kept: Callable[[Work], int]         # bytes: the inputs of all layers, for one pair


def shape_of(config: dict) -> Shape:
    """Count the parameters of a model, which is not made."""
    config = Config.from_json(config)
    with torch.device("meta"):
        model = MiniVL(config)
    size = lambda module: sum(p.numel() for p in module.parameters())
    layers, tower = model.language_model.layers, model.vision_model.encoder.layers
    places = (config.force_image_size // config.vision_config.patch_size) ** 2 + 1
    kept = lambda work: 4 * (len(layers) * 2 * work.tokens * config.llm_config.hidden_size
                             + len(tower) * work.tiles * places * config.vision_config.hidden_size)
    vocabulary = config.llm_config.vocab_size
    return Shape(size(model), size(layers[0]), size(model) - size(layers) - size(tower), len(layers), len(tower),
                 vocabulary / min(ROWS, vocabulary), size(model.language_model.embeddings), kept)


def pair_seconds(shape: Shape, costs: dict[str, Cost]) -> float:
    """Compute the time of a pair, forward and backward, from its parts."""
    times = {"decoder layer": shape.layers, "tower layer": shape.tower_layers, "patches": 1, "projector": 1,
             "embeddings": shape.rows, "head and loss": shape.rows}
    return sum(costs[name].seconds * n for name, n in times.items())


def step_seconds(shape: Shape, costs: dict[str, Cost], pairs: int) -> float:
    """Compute the time of a step: its pairs, and the optimiser's share for every parameter."""
    return pairs * pair_seconds(shape, costs) + costs["AdamW"].seconds * shape.parameters / shape.layer


def at_full_size(shape: Shape, costs: dict[str, Cost]) -> dict[str, float]:
    """Compute the highest point of every part, bytes, with all rows of embeddings and head."""
    peaks = {name: cost.peak for name, cost in costs.items()}
    rest = 4 * shape.table * (1 - 1 / shape.rows)       # the gradient of the rows that were not there
    return {**peaks, "embeddings": peaks["embeddings"] + rest,
            "head and loss": shape.rows * peaks["head and loss"]}


def memory(shape: Shape, costs: dict[str, Cost], work: Work) -> dict[str, float]:
    """Compute the memory of a training, bytes: of one process, and of each of RANKS (FSDP2).

    A process of several has its part of weights, gradients and AdamW's two means; it gathers what is outside the layers
    and two layers at once, with their gradients. One process alone keeps a copy in bfloat16 of each matrix that is
    multiplied, for the length of a step, if products are in bfloat16.
    """
    whole = 4 * shape.parameters
    largest = max(at_full_size(shape, costs).values())
    activations = shape.kept(work) + largest
    copies = 2 * (shape.parameters - shape.table) if work.half else 0
    return {"weights": whole, "gradients": whole, "AdamW": 2 * whole, "copies in bfloat16": copies,
            "inputs of the layers": shape.kept(work), "largest part": largest,
            "one process": 4 * whole + copies + activations,
            f"each of {RANKS}": 4 * whole / RANKS + 8 * (shape.outside + 2 * shape.layer) + activations}


def scaled(first: float, second: float, tokens: tuple[int, int], to: int) -> float:
    """Continue two measurements to more tokens: a T + b T^2 through both, neither a nor b below 0."""
    T, U = tokens
    b = max(0.0, (second / U - first / T) / (U - T))
    a = max(0.0, second / U - b * U)
    return a * to + b * to * to


# ---- the tables -----------------------------------------------------------------------------------------------------

def table(size: str, shape: Shape, found: dict[Work, dict[str, Cost]], pairs: int, longest: int) -> str:
    """Write what was measured, and what was computed of it, as Markdown."""
    works = list(found)
    head = [f"{'bfloat16' if w.half else 'float32'}, {w.tokens:,} tokens" for w in works]
    lines = [f"| {size}, {shape.parameters / GB:.2f} billion parameters | {' | '.join(head)} |",
             "|---|" + "---|" * len(works)]

    def row(name, cells):
        lines.append(f"| {name} | {' | '.join(cells)} |")

    for name in next(iter(found.values())):
        if name != "AdamW":
            row(f"measured: {name}, forward + backward, s; highest, GB",
                [f"{c[name].forward:.2f} + {c[name].backward:.2f}; {c[name].peak / GB:.2f}" for c in found.values()])
    row("measured: AdamW, one decoder layer, s", [f"{c['AdamW'].seconds:.2f}" for c in found.values()])
    row("computed: one pair, s", [f"{pair_seconds(shape, c):,.0f}" for c in found.values()])
    row(f"computed: a step of {pairs} pairs, hours",
        [f"{step_seconds(shape, c, pairs) / 3600:,.1f}" for c in found.values()])
    for name in memory(shape, next(iter(found.values())), works[0]):
        row(f"computed: {name}, GB", [f"{memory(shape, c, w)[name] / GB:.1f}" for w, c in found.items()])
    if longest and len({w.tokens for w in works}) == 2:
        lines += [""] + [beyond(shape, found, half, longest) for half in sorted({w.half for w in works})]
    return "\n".join(lines)


def beyond(shape: Shape, found: dict[Work, dict[str, Cost]], half: bool, longest: int) -> str:
    """Say what a pair of the longest conversations would cost, and how it grows."""
    works = sorted((w for w in found if w.half == half), key=lambda w: w.tokens)
    tokens = tuple(w.tokens for w in works)
    seconds = [pair_seconds(shape, found[w]) for w in works]
    parts_of = [at_full_size(shape, found[w]) for w in works]
    largest = max(scaled(*(one[name] for one in parts_of), tokens, longest) for name in parts_of[0])
    kept = shape.kept(Work(longest, works[0].answer, works[0].tiles, half))
    return (f"{'bfloat16' if half else 'float32'}: {tokens[1] / tokens[0]:g} times the tokens took "
            f"{seconds[1] / seconds[0]:.2f} times the time. Computed for {longest:,} tokens, by a T + b T^2 through "
            f"both: {scaled(*seconds, tokens, longest):,.0f} s a pair; inputs of the layers "
            f"{kept / GB:.1f} GB, largest part {largest / GB:.1f} GB.")


# ---- the command ----------------------------------------------------------------------------------------------------

def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.mpo.cost", description=__doc__,
                                     formatter_class=options.Help)
    add = parser.add_argument
    add("sizes", metavar="SIZE", nargs="*", default=["4B"], help=f"of {', '.join(SIZES)} (default 4B)")
    add("--tokens", type=int, nargs="+", default=[1024, 2048], metavar="N",
        help="of a conversation; two numbers also tell how it grows (default 1024 2048)")
    add("--answer", type=int, default=256, metavar="N", help="tokens of each answer (default %(default)s)")
    add("--tiles", type=int, default=2, metavar="N", help="of the picture (default %(default)s)")
    add("--pairs", type=int, default=256, metavar="N", help="of a step (default %(default)s)")
    add("--longest", type=int, default=8192, metavar="N", help="tokens to compute for (default %(default)s)")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"],
        help="of products (default both)")
    add("--device", default="cpu", help="cpu (default) or cuda")
    args = parser.parse_args(argv)
    for size in args.sizes:
        if size not in SIZES:
            raise InputError(f"size {size!r} is not one of {', '.join(SIZES)}")
    for name in ("answer", "tiles", "pairs", "longest"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if min(args.tokens) <= args.answer:
        raise InputError(f"--tokens {min(args.tokens)} have no room for a question before --answer {args.answer}; give "
                         "more tokens or a shorter answer")
    if len(set(args.tokens)) != 2:
        options.refuse(options.given(parser, argv), ["longest"], "without two numbers of --tokens")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    threads = f", {torch.get_num_threads()} threads, processor seconds" if args.device == "cpu" else ""
    print(f"{args.device}{threads}; one pair, {args.tiles} tiles, answers of {args.answer} tokens")
    for size in args.sizes:
        config = config_json(size)
        tiny = Work(args.answer + 1, args.answer, 1, False)
        measure(config, tiny, args.device)          # warms up
        found = {}
        for dtype in args.dtype:
            for tokens in args.tokens:
                work = Work(tokens, args.answer, args.tiles, dtype == "bfloat16")
                found[work] = measure(config, work, args.device)
        print(f"\n{table(size, shape_of(config), found, args.pairs, args.longest)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
