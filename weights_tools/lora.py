"""Teach a model something new, its weights frozen, float or int4: python -m weights_tools.lora FOLDER DATA OUT

    rows of DATA -> loss on the answers -> A and B of each decoder linear -> OUT/lora.safetensors

DATA is a JSONL file of conversations about pictures, see python -m weights_tools.rows --help. Interrupt it at any time:
the same command goes on from the last state in OUT and ends with the same numbers. What is learned counts for FOLDER's
checkpoint alone: load it with minivl.load(FOLDER, lora=OUT), or merge the two by python -m weights_tools.merge.

A model that learns only the new forgets of the old. So give rows of what it shall go on doing as --keep: at the tokens
of their answers it is held to the probabilities that FOLDER gives, by KL(FOLDER || with LoRA), right or wrong. That
keeps more than teaching it the right answers again. Look with --check.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minivl import load, lora, options
from minivl.fast.replace import is_large
from minivl.fast.threads import at_most, threads_that_help
from minivl.files.adapters import FILE, vectors_digest
from minivl.files.find import find
from minivl.files.formats import open_weights
from minivl.limits import InputError, first_of, is_there, reading
from minivl.model import MiniVL
from minivl.tiling import normalise
from minivl.tokenizer import Tokenizer
from weights_tools import run
from weights_tools.files import save_safetensors
from weights_tools.rows import Row, count_right, micro_batches, read_rows, table
from weights_tools.train.loop import Loop
from weights_tools.train.objective import answer_logits, drift, supervised
from weights_tools.train.optimisers import rate
from weights_tools.train.step import half_is_faster, precision, take_step

HOLD = 6.0              # weight of what is to be kept, see weights_tools/README.md for what others did


@dataclass(frozen=True)
class Plan:
    """All that decides what is learned, beside the checkpoint and the rows."""
    rank: int = 8
    alpha: float = 16.0         # of the factor alpha / rank on what is learned
    only: tuple = ()            # last parts of the linears' names, ("q_proj", "v_proj"); (): all of the decoder's
    steps: int = 100
    batch: int = 8              # rows of a step, and as many to be kept
    lr: float = 2e-3
    seed: int = 0


def train(folder: str | Path, rows: list[Row], out: str | Path, plan: Plan, *, keep: list[Row] = (),
          check: list[Row] = (), device: str = "cpu", save_every: int = 50, stop_at: int | None = None) -> dict | None:
    """Learn a LoRA from rows into OUT/lora.safetensors, or go on where an earlier run stopped.

    `keep`: rows that are to be answered as before; each step sees as many of them as of the others. Returns {"before":
    ..., "after": ...}, what `count_right` finds in the rows of `check`. `stop_at`: leave after this many steps of this
    call, with a state, and return None.
    """
    out = Path(out)
    if is_there(out / FILE):
        raise InputError(f"{out / FILE} is there already, whole; choose another folder, or delete it to learn anew")
    tokenizer = Tokenizer.load(folder)
    model = load(folder, device=device, dtype="float32", tokenizer=tokenizer).requires_grad_(False)
    about = about_lora(folder, model, plan.rank, plan.alpha)
    recipe = sha256_of([asdict(plan), about, len(keep)], [*rows, *keep])
    loop = Loop(out, recipe, device, save_every=save_every, watch_every=plan.steps, stop_at=stop_at)
    before = loop.keep(f"right before, of {sha256_of([], check)}", lambda: count_right(model, tokenizer, check))
    torch.manual_seed(plan.seed)
    lora.add(model, chosen(model, plan.only), plan.rank, plan.alpha)
    learned = torch.nn.ParameterDict({name.replace(".", "/"): p for name, p in lora.learned(model).items()})
    if not run_steps(loop, plan, (rows, keep), model, tokenizer, learned):
        return None
    save_safetensors(lora.learned(model), out / FILE, about)
    loop.finish()
    return {"before": before, "after": count_right(model, tokenizer, check)}


def about_lora(folder: str | Path, model: MiniVL, rank: int, alpha: float) -> dict[str, str]:
    """Write the metadata of a LoRA file for the checkpoint of a folder; `model` is its model, without LoRA yet."""
    return {"rank": str(rank), "alpha": repr(float(alpha)), "base": Path(folder).name,
            "vectors": vectors_digest(model, open_weights(folder))}


def run_steps(loop: Loop, plan: Plan, rows: tuple[list[Row], list[Row]], model: MiniVL, tokenizer: Tokenizer,
              learned: torch.nn.ParameterDict) -> bool:
    """Take the steps that are left, on the rows to learn and those to keep; False if the loop stops before its end."""
    optimisers = [torch.optim.AdamW(learned.parameters(), lr=plan.lr, weight_decay=0.0)]
    half = loop.keep("half", lambda: half_is_faster(loop.device))
    first = micro_batches(rows[0][:4], model, tokenizer)
    threads = loop.keep("threads", partial(useful_threads, model, partial(losses, model, first)))

    def batches(first):
        for number in range(first, plan.steps):
            yield [micro_batches([part[i] for i in places(plan, len(part), number)], model, tokenizer) if part else []
                   for part in rows]

    def step(number, batch):
        share = rate(number, plan.steps, warmup=math.ceil(plan.steps / 20), floor=0.05)
        with precision(loop.device, half), at_most(threads), recomputed(model):
            loss = take_step(losses(model, *batch), optimisers, share)
        return loss, sum(ids.numel() for part in batch for ids, *_ in part)

    return loop.run(1, "lora", plan.steps, batches=batches, step=step, watch=dict, optimisers=optimisers,
                    parts={"lora": learned})


def losses(model: MiniVL, batch: list[tuple], kept: list[tuple] = ()):
    """Yield the loss of each micro-batch, as its part of a mean over tokens: of all that are taught, of all kept."""
    for part, loss_of in ((batch, teaching), (kept, keeping)):
        count = sum(int(supervised(labels).sum()) for _, labels, *_ in part)
        for ids, labels, pixels, _ in part:
            ids, labels, pixels = (t.to(model.device) for t in (ids, labels, pixels))
            yield loss_of(model, ids, labels, normalise(pixels)) / count


def teaching(model: MiniVL, ids, labels, x) -> torch.Tensor:
    """Compute -log p of the answers' tokens, added up."""
    logits, tokens = answer_logits(model, ids, labels, x)
    return F.cross_entropy(logits, tokens, reduction="sum")


def keeping(model: MiniVL, ids, labels, x) -> torch.Tensor:
    """Compute KL(as it was || as it is) at the answers' tokens, added up, times HOLD."""
    with torch.no_grad(), without_lora(model):
        before = answer_logits(model, ids, labels, x)[0]                                # (n, V)
    return HOLD * drift(before, answer_logits(model, ids, labels, x)[0])


@contextmanager
def without_lora(model: MiniVL):
    """Let the model compute inside as if it had no LoRA."""
    found = {module: module.scale for module in model.modules() if isinstance(module, lora.LoRA)}
    try:
        for module in found:
            module.scale = 0.0
        yield
    finally:
        for module, scale in found.items():
            module.scale = scale


@contextmanager
def recomputed(model: MiniVL):
    """Keep of a large model's layers only the inputs, and compute each again on the way back.

    Else a linear of int4 would keep its weight, dequantised, for the gradient to its input: 11 GB in the 4B.
    """
    layers = [*model.vision_model.encoder.layers, *model.language_model.layers] if is_large(model) else []
    for layer in layers:
        layer.forward = partial(checkpoint, type(layer).forward.__get__(layer), use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def useful_threads(model: MiniVL, losses: Callable[[], Iterable[torch.Tensor]]) -> int:
    """Tell how many threads to train with: measured on some losses, all for a large model."""
    if is_large(model) or torch.get_num_threads() == 1:
        return torch.get_num_threads()

    def work():
        for loss in losses():
            loss.backward()

    threads = threads_that_help(work)
    model.zero_grad()
    return threads


def chosen(model: MiniVL, only: tuple) -> list[str]:
    """List the decoder's linears whose name ends in one of `only`, all of them if that is empty."""
    names = lora.linears(model)
    ends = {name.rsplit(".", 1)[1] for name in names}
    unknown = sorted(set(only) - ends)
    if unknown:
        raise InputError(f"this decoder has no linear {first_of(unknown, ', ')}; it has {', '.join(sorted(ends))}")
    return [name for name in names if not only or name.rsplit(".", 1)[1] in only]


def places(plan: Plan, rows: int, number: int) -> list[int]:
    """Choose the rows of a step: all in random order, then all in another one, and so on."""
    at = range(number * plan.batch, (number + 1) * plan.batch)
    return [_order(plan.seed, i // rows, rows)[i % rows] for i in at]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, rows: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(rows), rows)


def sha256_of(first: list, rows: list[Row]) -> str:
    """Sum up what JSON can hold and what rows say: their texts, and the names and sizes of their pictures."""
    digest = hashlib.sha256(json.dumps(first).encode())
    for row in rows:
        digest.update(json.dumps([row.messages, row.max_num, [image.name for image in row.images]]).encode())
        for image in row.images:
            with reading(image):
                digest.update(str(image.stat().st_size).encode())
    return digest.hexdigest()


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    plan = Plan()
    parser = argparse.ArgumentParser(prog="python -m weights_tools.lora", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("checkpoint", metavar="FOLDER", help="a checkpoint, float or AWQ: folder, hub id or short name")
    parser.add_argument("data", metavar="DATA", help="a JSONL file to learn from")
    parser.add_argument("out", metavar="OUT", help="folder for the LoRA, the state of a stopped training and its log")
    parser.add_argument("--rank", type=int, default=plan.rank, metavar="R", help="default %(default)s")
    parser.add_argument("--alpha", type=float, help="what is learned counts alpha / R times (default 2 R)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME",
                        help="linears, such as q_proj v_proj (default: all of the decoder)")
    parser.add_argument("--steps", type=int, default=plan.steps, metavar="N", help="default %(default)s")
    parser.add_argument("--batch", type=int, default=plan.batch, metavar="N",
                        help="rows of a step, and as many of --keep (default %(default)s)")
    parser.add_argument("--lr", type=float, default=plan.lr, help="highest learning rate (default %(default)s)")
    parser.add_argument("--seed", type=int, default=plan.seed, help="of the random begin and the order of rows")
    parser.add_argument("--keep", metavar="FILE", help="a JSONL file of what it shall go on answering as before")
    parser.add_argument("--check", metavar="FILE", help="a JSONL file to count right answers in, before and after")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    args = parser.parse_args(argv)
    args.alpha = 2.0 * args.rank if args.alpha is None else args.alpha
    if min(args.rank, args.steps, args.batch) < 1:
        raise InputError(f"--rank {args.rank}, --steps {args.steps} and --batch {args.batch} must be at least 1")
    if not (0 < args.lr < math.inf and 0 < args.alpha < math.inf):
        raise InputError(f"--lr {args.lr} and --alpha {args.alpha} must be more than 0 and finite")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    plan = Plan(args.rank, args.alpha, tuple(sorted(set(args.only))), args.steps, args.batch, args.lr, args.seed)
    rows = read_rows(args.data)
    check = read_rows(args.check) if args.check else []
    keep = read_rows(args.keep) if args.keep else []
    found = train(find(args.checkpoint), rows, args.out, plan, keep=keep, check=check, device=args.device)
    if check:
        print(table(found))
    path = Path(args.out) / FILE
    print(f"{path}: rank {plan.rank}, {plan.steps} steps of {plan.batch} from {len(rows)} rows, "
          f"{path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
