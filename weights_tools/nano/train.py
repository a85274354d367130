"""Train nano: python -m weights_tools.nano.train OUT [--quick]

    example -> tiles, ids, labels -> loss on the answers -> Muon and AdamW -> OUT/stage-1, stage-2, ...

Interrupt it at any time: the same command goes on from the last checkpoint and ends with the same weights. Every stage
ends with a float16 checkpoint folder, from which the next one starts. Optimisers, step and loop are those of
weights_tools/train; what is nano's own stands here.
"""
from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from minivl import load, options
from minivl.fast.threads import at_most, threads_that_help
from minivl.limits import InputError
from minivl.model import MiniVL
from minivl.tiling import normalise
from minivl.tokenizer import Tokenizer
from weights_tools import run
from weights_tools.nano import differences, recipe, warmup, world
from weights_tools.nano.data import MICRO, Batches, collate, ids_of, tiles_of
from weights_tools.nano.draw import Style
from weights_tools.train import optimisers as core
from weights_tools.train.loop import Loop
from weights_tools.train.objective import answer_logits, supervised
from weights_tools.train.step import half_is_faster, precision, take_step

HEADS = {"squares": warmup.head, "differences": differences.head}       # of tasks that have one, thrown away afterwards


# ---- what a step learns ---------------------------------------------------------------------------------------------

def optimisers(model: MiniVL, stage: recipe.Stage, head: nn.Module | None = None) -> list:
    """Return Muon for the matrices of patches, blocks and projector, AdamW for embeddings, heads and vectors.

    What the stage does not teach is frozen.
    """
    decoder = list(model.language_model.parameters())
    inside = {id(p) for p in decoder}
    tower = [p for p in model.parameters() if id(p) not in inside]
    squares = stage.task == "squares"
    parts = []
    heads = list(head.parameters()) if head else []
    for params, share in ((decoder, 0.0 if squares else 1.0), (tower, 1.0 if squares else stage.tower)):
        for p in params:
            p.requires_grad_(share > 0)
        if share > 0:
            parts.append((params + (heads if not parts else []), share))
    tables = [model.language_model.embeddings.weight, model.language_model.head.weight, *heads]
    return core.muon_and_adamw(parts, stage.lr, stage.weight_decay, tables)


def rate(stage: recipe.Stage, step: int) -> float:
    """Return the learning rate at a step, as a share of the stage's."""
    return core.rate(step, stage.steps, stage.warmup, stage.floor)


def losses(model: MiniVL, batch: list, count: int, head: nn.Module | None = None) -> Iterator[torch.Tensor]:
    """Yield the loss of each micro-batch, as its part of the mean over `count` learned tokens or squares."""
    for *wanted, x in batch:
        wanted = [t.to(model.device) for t in wanted]
        x = normalise(x.to(model.device))
        if len(wanted) == 1:        # "squares"
            yield warmup.loss_and_hits(head(model.visual_tokens(x)), wanted[0])[0] * len(x) / count
            continue
        with differences.halfway(model, on=head is not None) as states:
            logits, tokens = answer_logits(model, *wanted[:2], x)
        loss = F.cross_entropy(logits, tokens, reduction="sum") / count
        if head:                    # "differences"
            scores = head(differences.last_picture(states[0], wanted[0], model.img_context_token_id))
            loss = loss + differences.loss_and_hits(scores, wanted[2])[0] / len(batch)
        yield loss


def train_step(model: MiniVL, batch: list, opts: list, share: float, head: nn.Module | None = None) -> tuple:
    """Take one step on a list of micro-batches: (loss per learned token or square, their number)."""
    count = sum(len(m[0]) if len(m) == 2 else int(supervised(m[1]).sum()) for m in batch)
    return take_step(losses(model, batch, count, head), opts, share), count


# ---- how it goes ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def watch(model: MiniVL, tokenizer: Tokenizer, stage: recipe.Stage, head: nn.Module | None = None,
          n: int = 384) -> dict:
    """Try a stage on n held-out examples: task or field -> share right."""
    if stage.task == "squares":
        wanted, x = Batches(replace(stage, batch=n), "watch", tokenizer)[0][0]
        scores = head(model.visual_tokens(normalise(x.to(model.device))))
        return warmup.loss_and_hits(scores, wanted.to(model.device))[1]
    return accuracy(model, tokenizer, n=n, mix=stage.mix, style=Style(world.TRAINED, wide=stage.wide))


def turns_right(examples: list, learned: torch.Tensor, hits: torch.Tensor) -> Iterator[tuple[str, bool]]:
    """Yield of each turn its task, and whether all tokens of its answer are right.

    learned: bool[B, T-1], see `supervised`; hits: bool[n], of the n tokens that are learned, one after the other.
    """
    hits = hits.tolist()
    for example, row in zip(examples, learned.tolist()):
        for turn, answer in zip(example.turns, "".join("01"[v] for v in row).replace("0", " ").split()):
            yield turn.task, all(hits[:len(answer)])
            del hits[:len(answer)]


@torch.no_grad()
def accuracy(model: MiniVL, tokenizer: Tokenizer, seed="watch", n: int = 192, **how) -> dict:
    """Count answers that are exactly right on n held-out conversations, teacher forced: task -> share.

    An answer is right if every token is the most probable one after the right tokens before it: then, and only then,
    greedy generation writes exactly this answer (given the right history). `how`: other arguments of world.example.
    """
    right = defaultdict(int)
    seen = defaultdict(int)
    for start in range(0, n, MICRO):
        examples = [world.example(seed, i, **how) for i in range(start, min(n, start + MICRO))]
        tiles = [tiles_of(e) for e in examples]
        rows = [ids_of(e, t, tokenizer) for e, t in zip(examples, tiles)]
        ids, labels, x = (t.to(model.device) for t in collate(rows, tiles, tokenizer))
        logits, wanted = answer_logits(model, ids, labels, normalise(x))
        for task, is_right in turns_right(examples, supervised(labels), logits.argmax(-1) == wanted):
            seen[task] += 1
            right[task] += is_right
    return {task: right[task] / seen[task] for task in sorted(seen)}


# ---- all stages -----------------------------------------------------------------------------------------------------

def train(out, stages=recipe.STAGES, *, seed: int = recipe.SEED, workers: int = 0, device: str = "cpu",
          save_every: int = 250, watch_every: int = 250, watch_n: int = 384, stop_at: int | None = None) -> Path:
    """Run all stages into the folder `out`, or go on where an earlier run stopped; return the folder of the last stage.

    `watch_n`: held-out examples that are tried every `watch_every` steps, and at the end of a stage.
    `stop_at`: leave after this many steps of this call, with a checkpoint (for tests and for lent machines).
    """
    loop = Loop(out, recipe.sha256(stages, seed), device, save_every, watch_every, stop_at)
    fast_half = loop.keep("fast_half", lambda: half_is_faster(device))
    tokenizer = recipe.tokenizer()
    model = recipe.initial(seed)
    for number, stage in enumerate(stages, start=1):
        folder = loop.folder / f"stage-{number}"
        if not (folder / "model.safetensors").exists():
            model.img_context_token_id = tokenizer.id("<IMG_CONTEXT>")
            torch.manual_seed(seed)
            half = stage.half and fast_half
            model = model.float().train().to(device)
            examples = Batches(stage, seed, tokenizer)
            # Sums in another order give other weights: the number of threads, once found, stays for the training.
            threads = loop.keep("threads", partial(useful_threads, model, stage, examples, half, device))
            with at_most(threads):
                done = run_stage(loop, number, stage, model, tokenizer, examples, half, workers, watch_n)
            if not done:
                return folder
            note = {"recipe": loop.recipe, "stage": stage.name, "products": "bfloat16" if half else "float32"}
            recipe.save(model, folder, note)
            loop.finish()
        model = load(folder)        # the next stage starts from what the file holds, float16
    loop.finish()                   # also after a kill between the last stage's files and its own call
    return folder


def useful_threads(model: MiniVL, stage: recipe.Stage, examples: Batches, half: bool, device: str) -> int:
    """Tell how many threads to train with: measured as things are, on the forward and backward of one micro-batch."""
    with torch.random.fork_rng(devices=[]):     # the real head is drawn later
        head = HEADS[stage.task](recipe.LLM["hidden_size"]).to(device) if stage.task in HEADS else None
    batch = examples[0][:1]

    def work():
        with precision(device, half):
            for loss in losses(model, batch, 1, head):
                loss.backward()

    threads = threads_that_help(work)
    model.zero_grad()
    return threads


def run_stage(loop: Loop, number: int, stage: recipe.Stage, model: MiniVL, tokenizer: Tokenizer, examples: Batches,
              half: bool, workers: int, watch_n: int) -> bool:
    """Train the model through one stage; False where the loop stops before its end."""
    head = HEADS[stage.task](recipe.LLM["hidden_size"]).to(loop.device) if stage.task in HEADS else None
    opts = optimisers(model, stage, head)

    def batches(first):
        return DataLoader(examples, batch_size=None, sampler=range(first, stage.steps), num_workers=workers,
                          prefetch_factor=8 if workers else None)

    def step(n, batch):
        with precision(loop.device, half):
            loss, _ = train_step(model, batch, opts, rate(stage, n), head)
        return loss, sum(m[0].numel() for m in batch)

    return loop.run(number, stage.name, stage.steps, batches=batches, step=step, optimisers=opts,
                    parts={"model": model, **({"head": head} if head else {})},
                    watch=lambda: watch(model, tokenizer, stage, head, watch_n))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.nano.train", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("out", metavar="OUT", help="folder for checkpoints, log and the finished stages")
    parser.add_argument("--quick", action="store_true", help="the short recipe, planned for 25 minutes on 2 CPU cores")
    parser.add_argument("--seed", type=int, default=recipe.SEED, help="default %(default)s, that of the shipped files")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pictures (default %(default)s: on "
                        "two cores one made a step 1.6 times as long; with a GPU take a few)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--steps", type=int, help="cut every stage to this many steps, for a look")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1 or args.workers < 0:
        raise InputError(f"--steps {args.steps} must be 1 or more, --workers {args.workers} 0 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    stages = recipe.QUICK if args.quick else recipe.STAGES
    if args.steps:
        stages = tuple(replace(s, steps=min(s.steps, args.steps), warmup=min(s.warmup, args.steps)) for s in stages)
    print(train(args.out, stages, seed=args.seed, workers=args.workers, device=args.device))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
