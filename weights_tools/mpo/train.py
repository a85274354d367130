"""Teach a model what is preferred: python -m weights_tools.mpo.train CHECKPOINT DATA OUT

    DATA -> the reference's log-probabilities of all answers, once -> steps of the MPO loss -> a checkpoint in OUT

DATA is a meta.json of MMPR or one file of pairs, .jsonl. Defaults are those that InternVL2.5-MPO was trained with; a
small model wants larger rates and fewer pairs a step. Interrupt it at any time: the same command goes on from the last
state in OUT and ends with the same numbers. OUT/log.jsonl has a line for each step, OUT/curves.svg draws them. Large
models are trained by several processes: torchrun --nproc-per-node 8 -m weights_tools.mpo.train ... --device cuda

A model that learns preferences may forget other things. So give conversations that it shall answer as before as --keep
(python -m weights_tools.rows --help): it is held to the reference's probabilities at their answers, by KL.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from minivl import load, lora, options
from minivl.config import Config
from minivl.fast.threads import at_most
from minivl.files.adapters import FILE as ADAPTER
from minivl.files.find import find
from minivl.files.formats import open_weights
from minivl.limits import InputError, is_there
from minivl.model import MiniVL
from minivl.tokenizer import Tokenizer
from weights_tools import run
from weights_tools.files import check_apart, check_free_of_weights, save_checkpoint, save_safetensors, small_files
from weights_tools.lora import about_lora, recomputed, sha256_of, useful_threads, without_lora
from weights_tools.mpo import curves, distributed
from weights_tools.mpo.batch import Located, Pair, Pairs, collate, encoded, pair_logps
from weights_tools.mpo.loss import RewardShift
from weights_tools.mpo.mmpr import read_datasets
from weights_tools.mpo.reference import reference_logps, sha256_of_checkpoint, sha256_of_pairs
from weights_tools.mpo.steps import (
    NoShift,
    Plan,
    Task,
    averaged,
    batches,
    first_losses,
    losses,
    optimisers,
    settled,
    told,
)
from weights_tools.rows import Row, read_rows
from weights_tools.train.loop import Loop
from weights_tools.train.objective import answer_logits
from weights_tools.train.optimisers import rate
from weights_tools.train.step import half_is_faster, precision, take_step


def train(folder: str | Path, pairs: Pairs, out: str | Path, plan: Plan, *, reference: str | Path | None = None,
          keep: Sequence[Row] = (), device: str = "cpu", save_every: int = 50,
          stop_at: int | None = None) -> Path | None:
    """Learn preferences from pairs: a checkpoint, or a LoRA, in the folder OUT; or go on where an earlier run stopped.

    reference: the checkpoint that rewards are measured against (default: the one that learns). keep: rows to be
    answered as it does. Returns OUT, or None where it stops after `stop_at` steps of this call. Raises InputError for
    pairs that cannot be learned from, with file and line.
    """
    folder, out = Path(folder), Path(out)
    other = None if reference is None or Path(reference).resolve() == folder.resolve() else Path(reference)
    _check(folder, out, plan)
    rank, ranks = distributed.world()
    tokenizer = Tokenizer.load(folder)
    model = loaded(folder, device)
    plan = settled(plan, model, len(pairs))
    of = [sha256_of_checkpoint(one) for one in (folder, *([other] if other else []))] + [sha256_of_pairs(pairs)]
    loop = Loop(out, sha256_of([asdict(plan), of, ranks], list(keep)), save_every=save_every, watch_every=1,
                quiet=True, writes=rank == 0, stop_at=stop_at)
    distributed.wait()      # until all have read what an earlier run left
    task = Task(plan, model, distributed.forward if ranks > 1 else answer_logits, tokenizer, pairs,
                torch.zeros(len(pairs), 2), keep)
    half = loop.keep("half", lambda: distributed.agreed(
        lambda: half_is_faster(device) if plan.dtype is None else plan.dtype == "bfloat16"))
    threads = loop.keep("threads", partial(useful_threads, model, partial(first_losses, task)))
    if rank == 0:
        tqdm.write(told(task, half))
    with precision(device, half), at_most(threads):
        frozen = loaded(other, device) if other else model
        task.logps = of_reference(loop.folder, [*of, half], task, frozen, Tokenizer.load(other) if other else None)
    if keep:
        task.before = before(task, other or folder, frozen)
    del frozen              # the memory is needed, unless the rows to keep need the model
    learned, about = prepared(task, folder)
    if not run_steps(loop, task, learned, device, half, threads):
        return None
    weights = lora.learned(model) if plan.lora else distributed.whole(model.state_dict())
    if rank == 0:
        curves.draw(out)
        if plan.lora:
            save_safetensors(weights, out / ADAPTER, about)
        else:
            save(weights, folder, out)
    loop.finish()
    distributed.wait()
    return out


def loaded(folder: Path, device: str) -> MiniVL:
    """Load a checkpoint to learn, or a part of it where several processes train."""
    if distributed.world()[1] > 1:
        return distributed.load(folder, device)
    return load(folder, device=device, dtype="float32")


def _check(folder: Path, out: Path, plan: Plan):
    if is_there(out / ADAPTER):
        raise InputError(f"{out / ADAPTER} is there already, whole; choose another folder, or delete it to learn anew")
    check_apart(folder, out)
    check_free_of_weights(out, overwrite=False)
    if distributed.world()[1] > 1 and (plan.lora or plan.optimiser != "adamw"):
        raise InputError(f"--lora {plan.lora} --optimiser {plan.optimiser} are for one process; several have a part of "
                         "each matrix: leave out --lora and take adamw, or start it without torchrun")
    if Config.load(folder).quantization_config and not plan.lora:
        raise InputError(f"{folder} is int4, and int4 weights do not learn; learn beside them (--lora RANK), or make a "
                         "float checkpoint of it with python -m weights_tools.dequantize")


def prepared(task: Task, folder: Path) -> tuple[torch.nn.Module, dict | None]:
    """Let the model learn: (what of it learns, a LoRA's metadata)."""
    plan, model = task.plan, task.model
    if not plan.lora:
        return model, None
    model.requires_grad_(False)
    about = about_lora(folder, model, plan.lora, 2.0 * plan.lora)
    torch.manual_seed(plan.seed)
    lora.add(model, lora.linears(model), plan.lora, 2.0 * plan.lora)
    return torch.nn.ParameterDict({name.replace(".", "/"): p for name, p in lora.learned(model).items()}), about


def save(state: dict[str, torch.Tensor], folder: Path, out: Path):
    """Write a checkpoint in the dtypes, and with the small files, of the one it was made from."""
    stored = open_weights(folder)
    tensors = {name: tensor.to(stored[name].dtype) for name, tensor in state.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{name} exceeds {tensor.dtype} with what was learned, or is NaN; start again with a "
                             "lower rate")
    save_checkpoint(tensors, out, small=small_files(folder))


# ---- the reference --------------------------------------------------------------------------------------------------

@torch.no_grad()
def of_reference(out: Path, of: list, task: Task, frozen: MiniVL, tokenizer: Tokenizer | None) -> torch.Tensor:
    """Compute the reference's log-probabilities of all pairs, or read them; tokenizer: of another reference."""
    plan = task.plan
    digest = hashlib.sha256(json.dumps([of, plan.micro, plan.max_num, plan.max_tokens]).encode()).hexdigest()

    def logps(numbers: range) -> torch.Tensor:
        pairs = [task.pair(place) for place in numbers]
        for place, pair in zip(numbers if tokenizer else (), pairs):
            _check_same(task.pairs[place], pair, frozen.config, tokenizer, plan)
        batch = collate(pairs, frozen.config.force_image_size).to(frozen.device)
        return pair_logps(frozen, batch, task.forward)[0]

    return reference_logps(out, digest, task.pairs, logps, plan.micro)


def _check_same(located: Located, pair: Pair, config: Config, tokenizer: Tokenizer, plan: Plan):
    theirs = encoded(located, config, tokenizer, max_num=plan.max_num, most=plan.max_tokens)
    if (theirs.chosen, theirs.rejected) != (pair.chosen, pair.rejected):
        raise InputError(f"{located.where}: the reference reads question and answers as {len(theirs.chosen)} and "
                         f"{len(theirs.rejected)} other ids, the checkpoint as {len(pair.chosen)} and "
                         f"{len(pair.rejected)}; take a reference with the same tokenizer, template and tiles")


def before(task: Task, folder: Path, frozen: MiniVL) -> Callable:
    """Return answer_logits of the reference, for what is to be kept: (ids, labels, pixels) -> (logits, tokens)."""
    def with_lora_off(*batch):
        with without_lora(task.model):
            return task.forward(task.model, *batch)

    if frozen is task.model and task.plan.lora:
        return with_lora_off
    if frozen is task.model:
        frozen = loaded(folder, str(task.model.device))
    return partial(task.forward, frozen.requires_grad_(False))


# ---- the steps -------------------------------------------------------------------------------------------------------

def run_steps(loop: Loop, task: Task, learned: torch.nn.Module, device: str, half: bool, threads: int) -> bool:
    """Take the steps that are left; False if the loop stops before its end."""
    plan = task.plan
    opts = optimisers(plan, task.model, list(learned.parameters()))
    alone = distributed.world()[1] == 1
    shift = NoShift() if not plan.shift else RewardShift() if alone else distributed.SharedShift()
    seen = {}

    def step(number, batch):
        share = rate(number, plan.steps, warmup=math.ceil(plan.warmup * plan.steps))
        terms = []
        with precision(device, half), at_most(threads), recomputed(task.model):
            loss = take_step(losses(task, shift, *batch, terms), opts, share)
        seen.clear()
        loss = float(distributed.mean(torch.tensor(loss, dtype=torch.float64)))
        seen.update({"loss": loss, **averaged(terms), "delta": shift.value, "lr": plan.lr * share})
        return loss, sum(ids.numel() for ids in (*(one.ids for one, _ in batch[0]), *(one[0] for one in batch[1])))

    return loop.run(1, "mpo", plan.steps, batches=partial(batches, task), step=step, watch=lambda: seen,
                    optimisers=opts if alone else [distributed.WholeOptimiser(one) for one in opts],
                    parts={"learned": learned if alone else distributed.WholeModel(learned), "shift": shift})


# ---- the command ----------------------------------------------------------------------------------------------------

def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    plan = Plan()
    parser = argparse.ArgumentParser(prog="python -m weights_tools.mpo.train", description=__doc__,
                                     formatter_class=options.Help)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="what learns: folder, hub id or short name; int4 only with --lora")
    add("data", metavar="DATA", help="pairs, .jsonl, or a meta.json of MMPR")
    add("out", metavar="OUT", help="folder for the checkpoint, the state of a stopped training, log and curves")
    add("--root", metavar="FOLDER", help="where the pictures of a .jsonl are (default: beside it)")
    add("--reference", metavar="FOLDER", help="what rewards are measured against (default: CHECKPOINT)")
    add("--keep", metavar="FILE", help="a JSONL file of what it shall go on answering as the reference does")
    add("--hold", type=float, default=plan.hold, metavar="W", help="weight of that (default %(default)s)")
    add("--lora", type=int, default=plan.lora, metavar="RANK", help="learn a LoRA of this rank (default: all weights)")
    add("--lr", type=float, default=plan.lr, help="highest learning rate (default %(default)s)")
    add("--batch", type=int, metavar="N", help="pairs of a step (default 256, of 38B and more 512)")
    add("--micro", type=int, default=plan.micro, metavar="N", help="pairs at once (default %(default)s)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, default=plan.epochs, help="default %(default)s")
    length.add_argument("--steps", type=int, metavar="N", help="in place of --epochs")
    add("--beta", type=float, default=plan.beta, help="of rewards (default %(default)s)")
    add("--weights", type=float, nargs=3, default=plan.weights, metavar=("P", "Q", "G"),
        help="of preference, quality, generation (default 0.8 0.2 1)")
    add("--no-shift", dest="shift", action="store_false", help="leave delta at 0, to see what it is good for")
    add("--optimiser", choices=("adamw", "muon"), default=plan.optimiser, help="default %(default)s")
    add("--weight-decay", type=float, default=plan.weight_decay, help="of matrices (default %(default)s)")
    add("--warmup", type=float, default=plan.warmup, metavar="PART", help="of the steps (default %(default)s)")
    add("--max-tiles", type=int, metavar="N", help="of a picture, where DATA does not say (default: CHECKPOINT's)")
    add("--max-tokens", type=int, default=plan.max_tokens, metavar="N", help="of a question and its answer (default "
        "%(default)s); longer ones are refused")
    add("--dtype", choices=("float32", "bfloat16"), help="of products; weights are float32 (default: the faster one)")
    add("--seed", type=int, default=plan.seed, help="of the order of pairs, and of a LoRA's begin")
    add("--device", default="cpu", help="cpu (default) or cuda")
    args = parser.parse_args(argv)
    check_options(args, options.given(parser, argv))
    return args


def check_options(args: argparse.Namespace, given: dict[str, str]):
    """Refuse numbers that mean nothing, and options that would do nothing."""
    if args.keep is None:
        options.refuse(given, ["hold"], "without --keep")
    if args.root is not None and not args.data.endswith("jsonl"):
        raise InputError(f"--root has no effect beside {args.data}: a meta.json says itself where the pictures are")
    for name in ("batch", "micro", "steps", "max_tiles", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"{options.option(name)} is {value}; it must be at least 1")
    for name in ("lr", "epochs", "beta"):
        value = getattr(args, name)
        if not 0 < value < math.inf:
            raise InputError(f"--{name} is {value}; it must be more than 0 and finite")
    for name, value in (("hold", args.hold), ("weight_decay", args.weight_decay), ("lora", args.lora),
                        *(("weights", value) for value in args.weights)):
        if not 0 <= value < math.inf:
            raise InputError(f"{options.option(name)} is {value}; it must be 0 or more, and finite")
    if not 0 <= args.warmup <= 1 or not any(args.weights):
        raise InputError(f"--warmup is {args.warmup}, it must be in 0..1; --weights are {args.weights}, one must be "
                         "more than 0")


def plan_of(args: argparse.Namespace) -> Plan:
    """Take the plan from the command line."""
    return Plan(lr=args.lr, batch=args.batch, micro=args.micro, epochs=args.epochs, steps=args.steps, beta=args.beta,
                weights=tuple(args.weights), shift=args.shift, optimiser=args.optimiser,
                weight_decay=args.weight_decay, warmup=args.warmup, lora=args.lora, hold=args.hold,
                max_num=args.max_tiles, max_tokens=args.max_tokens, dtype=args.dtype, seed=args.seed)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    pairs = Pairs(read_datasets(args.data, args.root))
    keep = read_rows(args.keep) if args.keep else []
    train(find(args.checkpoint), pairs, args.out, plan_of(args), keep=keep, device=distributed.start(args.device),
          reference=find(args.reference) if args.reference else None)
    if distributed.world()[0] == 0:
        print(f"{args.out}: {'a LoRA' if args.lora else 'the checkpoint'}, log.jsonl and {curves.FILE}")
    distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
