"""What a step of preference training learns: pairs of a step -> batches -> losses, and what is logged of them."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from minivl.limits import InputError
from minivl.model import MiniVL
from minivl.preprocess import most_tiles
from minivl.tiling import normalise
from minivl.tokenizer import Tokenizer
from weights_tools.lora import places
from weights_tools.mpo import distributed
from weights_tools.mpo.batch import Pair, Pairs, collate, encoded, pair_logps, pixels_of
from weights_tools.mpo.loss import Losses, RewardShift, generation, mpo
from weights_tools.rows import Row
from weights_tools.rows import encoded as encoded_row
from weights_tools.train.objective import drift, ids_and_labels, supervised
from weights_tools.train.optimisers import muon_and_adamw

LARGEST = 3 * 10**10    # parameters from which the card's models, 38B and 78B, had 512 pairs a step, not 256


@dataclass(frozen=True)
class Plan:
    """All that decides what is learned, beside checkpoint, reference and pairs."""
    lr: float = 1e-6
    batch: int | None = None            # pairs of a step, and as many rows to be kept; None: 256, or 512, see LARGEST
    micro: int = 1                      # pairs at once, in each process: the mean that moves delta is over these
    epochs: float = 1.0
    steps: int | None = None            # in place of epochs
    beta: float = 0.1
    weights: tuple = (0.8, 0.2, 1.0)    # of preference, quality, generation
    shift: bool = True                  # False: delta stays 0
    optimiser: str = "adamw"            # or "muon"
    weight_decay: float = 0.05          # of matrices
    warmup: float = 0.03                # part of the steps in which the rate rises
    lora: int = 0                       # rank; 0: all weights learn
    hold: float = 1.0                   # weight of what is to be kept
    max_num: int | None = None          # most tiles of a picture; None: the checkpoint's
    max_tokens: int = 8192              # of question and answer
    dtype: str | None = None            # of products: "float32" or "bfloat16"; None: the faster one
    seed: int = 0


class NoShift(RewardShift):
    """A delta that stays 0: to see what it is good for."""

    def update(self, rewards: torch.Tensor) -> float:
        """Leave it."""
        return self.value


@dataclass
class Task:
    """What a step needs."""
    plan: Plan
    model: MiniVL
    forward: Callable                   # answer_logits, or what stands in for it
    tokenizer: Tokenizer
    pairs: Pairs
    logps: torch.Tensor                 # float32[P, 2], the reference's
    keep: Sequence[Row] = ()
    before: Callable | None = None      # answer_logits of the reference

    def pair(self, place: int) -> Pair:
        """Encode a pair."""
        return encoded(self.pairs[place], self.model.config, self.tokenizer, max_num=self.plan.max_num,
                       most=self.plan.max_tokens)


def settled(plan: Plan, model: MiniVL, pairs: int) -> Plan:
    """Put numbers in the place of what is left open."""
    ranks = distributed.world()[1]
    batch = plan.batch or (512 if sum(p.numel() for p in model.parameters()) >= LARGEST else 256)
    if batch % (plan.micro * ranks):
        raise InputError(f"--batch {batch} is no multiple of --micro {plan.micro} x {ranks} processes; change one, so "
                         "that each process has as many pairs")
    return replace(plan, batch=batch, steps=plan.steps or max(1, math.ceil(plan.epochs * pairs / batch)),
                   weights=tuple(plan.weights))


def told(task: Task, half: bool) -> str:
    """Say what was chosen."""
    plan = task.plan
    what = f"a LoRA of rank {plan.lora}" if plan.lora else "all weights"
    kept = f"; {len(task.keep):,} rows kept, weight {plan.hold:g}" if task.keep else ""
    config = task.model.config
    tokens = min(plan.max_tokens, config.llm_config.max_position_embeddings)
    return (f"{len(task.pairs):,} pairs: {plan.steps} steps of {plan.batch}, {plan.micro} at once; {what} by "
            f"{plan.optimiser}, rate {plan.lr:g}; at most {plan.max_num or most_tiles(config)} tiles a picture and "
            f"{tokens} tokens; products in {'bfloat16' if half else 'float32'}{kept}")


def optimisers(plan: Plan, model: MiniVL, learned: list) -> list:
    """Return what moves the parameters that learn."""
    if plan.optimiser == "muon":
        tables = [model.language_model.embeddings.weight, model.language_model.head.weight]
        return muon_and_adamw([(learned, 1.0)], plan.lr, plan.weight_decay, tables)
    groups = [{"params": [p for p in learned if p.ndim > 1], "weight_decay": plan.weight_decay},
              {"params": [p for p in learned if p.ndim == 1], "weight_decay": 0.0}]
    return [torch.optim.AdamW([group for group in groups if group["params"]], lr=plan.lr, betas=(0.9, 0.999), eps=1e-8)]


def batches(task: Task, first: int) -> Iterator[tuple[list, list]]:
    """Make the batches of the steps from `first` on: ([(Batch, logps float32[2, micro]), ...], [rows to keep, ...]).

    All pairs of all datasets in random order, drawn from the seed, then all in another one: the last step of an epoch
    has some of the next. Each process has its share.
    """
    for number in range(first, task.plan.steps):
        yield (pair_batches(task, places(task.plan, len(task.pairs), number)),
               kept_batches(task, places(task.plan, len(task.keep), number) if task.keep else []))


def _parts(numbers: list[int], micro: int) -> list[list[int]]:
    rank, ranks = distributed.world()
    mine = numbers[rank::ranks]
    return [mine[i:i + micro] for i in range(0, len(mine), micro)]


def pair_batches(task: Task, numbers: list[int]) -> list[tuple]:
    """Make [(Batch, the reference's logps float32[2, micro]), ...] of this process's share of pairs."""
    side = task.model.config.force_image_size
    return [(collate([task.pair(place) for place in part], side), task.logps[part].T)
            for part in _parts(numbers, task.plan.micro)]


def kept_batches(task: Task, numbers: list[int]) -> list[tuple]:
    """Make [(ids, labels, pixels), ...] of this process's share of rows to keep."""
    found = []
    for part in _parts(numbers, task.plan.micro):
        ids, tiles = zip(*(encoded_row(task.keep[place], task.model.config, task.tokenizer) for place in part))
        pixels = pixels_of([tile for one in tiles for tile in one], task.model.config.force_image_size)
        found.append((*ids_and_labels(list(ids), task.tokenizer), pixels))
    return found


def losses(task: Task, shift: RewardShift, batch: list[tuple], kept: list[tuple],
           terms: list[dict]) -> Iterator[torch.Tensor]:
    """Yield the loss of each micro-batch, as its part of a mean over them; what it is made of goes into `terms`.

    Of rows to keep KL(reference || model), as its part of the mean over their tokens in all processes.
    """
    plan, device = task.plan, task.model.device
    for one, logps in batch:
        sums, counts = pair_logps(task.model, one.to(device), task.forward)
        found = mpo(*sums, *logps.to(device), generation(sums[0], counts[0]), shift, beta=plan.beta,
                    weights=plan.weights)
        terms.append(terms_of(found))
        yield found.total / len(batch)
    count = distributed.mean(torch.tensor(float(sum(int(supervised(labels).sum()) for _, labels, _ in kept))))
    for ids, labels, pixels in kept:
        rows = (ids.to(device), labels.to(device), normalise(pixels.to(device)))
        with torch.no_grad():
            was = task.before(*rows)[0]
        kl = drift(was, task.forward(task.model, *rows)[0]) / count.to(device)
        terms.append({"kept": kl.item() * len(kept)})
        yield plan.hold * kl


def first_losses(task: Task) -> Iterator[torch.Tensor]:
    """Yield the losses of one micro-batch: to measure time."""
    return losses(task, RewardShift(), pair_batches(task, places(task.plan, len(task.pairs), 0))[:1], [], [])


def terms_of(found: Losses) -> dict[str, float]:
    """List what is logged of a micro-batch."""
    means = {"preference": found.preference, "quality": found.quality, "generation": found.generation,
             "chosen": found.chosen_rewards, "rejected": found.rejected_rewards}
    return {**{name: values.detach().mean().item() for name, values in means.items()}, "margin": found.margin,
            "accuracy": found.accuracy}


def averaged(terms: list[dict]) -> dict[str, float]:
    """Average what is logged over the micro-batches that have it, and over the processes."""
    names = list(dict.fromkeys(name for one in terms for name in one))
    values = [[one[name] for one in terms if name in one] for name in names]
    means = distributed.mean(torch.tensor([sum(one) / len(one) for one in values], dtype=torch.float64))
    return dict(zip(names, means.tolist()))
