"""Train nano: python -m weights_tools.nano.train OUT [--quick]

    example -> tiles, ids, labels -> loss on the answers -> Muon and AdamW -> OUT/stage-1, stage-2, ...

Interrupt it at any time: the same command goes on from the last checkpoint and ends with the same weights. Every stage
ends with a float16 checkpoint folder, from which the next one starts.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm import tqdm

from minivl import load
from minivl.limits import InputError
from minivl.model import MiniVL
from minivl.tiling import normalise
from minivl.tokenizer import Tokenizer
from weights_tools import run
from weights_tools.nano import differences, recipe, warmup, world
from weights_tools.nano.data import IGNORE, MICRO, Batches, collate, ids_of, tiles_of
from weights_tools.nano.draw import Style

# ---- model and optimiser --------------------------------------------------------------------------------------------

def answer_logits(model: MiniVL, ids, labels, pixel_values):
    """Logits float32[n, V] at the n positions before a supervised token, and these tokens int64[n].

    Right padding needs no mask: nothing real stands after it. The head runs only where an answer is learned.
    """
    visual = model.visual_tokens(pixel_values) if len(pixel_values) else None
    x = model.language_model.model(model.embed(ids, visual))               # (B, T, D)
    wanted = labels[:, 1:] != IGNORE
    return model.language_model.lm_head(x[:, :-1][wanted]).float(), labels[:, 1:][wanted]


class Muon(torch.optim.Optimizer):
    """Momentum, then every matrix replaced by the nearest orthogonal one: all its directions learn at the same rate.

    For the two-dimensional weights inside the network. The update has the root mean square 0.2 * lr, as AdamW's has.
    Newton-Schulz runs in the precision of the step. torch.optim.Muon is not used, it always takes bfloat16, which many CPUs
    do hundreds of times slower. Source: https://kellerjordan.github.io/posts/muon/; the scale: arXiv:2502.16982 section 2.2.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.mul_(group["momentum"]).add_(p.grad)
                    update = p.grad.add(buffer, alpha=group["momentum"]).flatten(1)     # Nesterov; a convolution as matrix
                    shapes[update.shape].append((p, update))
            for shape, pairs in shapes.items():         # matrices of one shape together
                updates = orthogonalise(torch.stack([update for _, update in pairs]))
                for (p, _), update in zip(pairs, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalise(x, steps=5):
    """float[n, r, c] -> matrices with the same singular vectors and singular values near 1 (0.7..1.2)."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):      # s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5 of every singular value s
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def optimisers(model: MiniVL, stage: recipe.Stage, head=None) -> list:
    """Muon for the matrices of the patches, the blocks and the projector; AdamW for embeddings, head, norms and biases."""
    shares = {"decoder": 0.0, "tower": 1.0} if stage.task == "squares" else {"decoder": 1.0, "tower": stage.tower}
    muon, adamw, heads = [], [], list(head.parameters()) if head else []
    for part, share in shares.items():
        learned = {n: p for n, p in model.named_parameters() if n.startswith("language_model.") == (part == "decoder")}
        for p in learned.values():
            p.requires_grad_(share > 0)
        if share > 0:
            matrices = {n: p for n, p in learned.items() if p.ndim in (2, 4) and "embed_tokens" not in n and "lm_head" not in n}
            rest, heads = [p for n, p in learned.items() if n not in matrices] + heads, []
            muon.append({"params": list(matrices.values()), "lr": share * stage.lr})
            adamw += [{"params": [p for p in rest if p.ndim == 2], "lr": share * stage.lr / 2, "weight_decay": stage.weight_decay},
                      {"params": [p for p in rest if p.ndim != 2], "lr": share * stage.lr / 2, "weight_decay": 0.0}]
    return [Muon(muon, lr=stage.lr, weight_decay=stage.weight_decay), torch.optim.AdamW(adamw, betas=(0.9, 0.98), eps=1e-10)]


def rate(stage: recipe.Stage, step: int) -> float:
    """Learning rate at a step, as a share of the stage's: warm-up, then a cosine down to its floor."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return min(1.0, (step + 1) / max(1, stage.warmup)) * (stage.floor + (1 - stage.floor) * cosine)


@lru_cache
def half_is_faster(device: str) -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32, measured: 4.7 times on a CPU with instructions for
    it, far slower on one without."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype, device=device)
        float((x @ x)[0, 0])
        start = time.perf_counter()
        float((x @ x)[0, 0])
        seconds.append(time.perf_counter() - start)
    return seconds[1] < seconds[0]


@contextmanager
def precision(device: str, half: bool):
    """How a step computes. Attention as two matrix products and a softmax: with torch's fused one in bfloat16 a step took 0.21 s
    on 2 CPU cores, so 0.16."""
    kind = torch.device(device).type
    with torch.autocast(kind, torch.bfloat16, enabled=half), sdpa_kernel(SDPBackend.MATH) if kind == "cpu" else nullcontext():
        yield


def train_step(model: MiniVL, batch: list, opts: list, share: float, head=None) -> tuple:
    """One step on a list of micro-batches: (loss per supervised token or square, their number)."""
    device = model.device
    count = sum(len(m[0]) if len(m) == 2 else int((m[1][:, 1:] != IGNORE).sum()) for m in batch)
    total = 0.0
    for *wanted, x in batch:
        wanted, x = [t.to(device) for t in wanted], normalise(x.to(device))
        if len(wanted) == 1:        # "squares"
            loss = warmup.loss_and_hits(head(model.visual_tokens(x)), wanted[0])[0] * len(x) / count
        else:
            with differences.halfway(model, on=head is not None) as states:
                logits, tokens = answer_logits(model, *wanted[:2], x)
            loss = F.cross_entropy(logits, tokens, reduction="sum") / count
            if head:                # "differences"
                scores = head(differences.last_picture(states[0], wanted[0], model.img_context_token_id))
                loss = loss + differences.loss_and_hits(scores, wanted[2])[0] / len(batch)
        loss.backward()
        total += loss.item()
    if not math.isfinite(total):
        raise InputError(f"the loss is {total}; lower the learning rate and start again from the last stage")
    torch.nn.utils.clip_grad_norm_([p for o in opts for g in o.param_groups for p in g["params"]], 1.0)
    for opt in opts:
        for group in opt.param_groups:
            group.setdefault("full", group["lr"])
            group["lr"] = group["full"] * share
        opt.step()
        opt.zero_grad()
    return total, count


@torch.no_grad()
def watch(model: MiniVL, tokenizer: Tokenizer, stage: recipe.Stage, head=None, n: int = 384) -> dict:
    """How a stage goes, on n held-out examples: task or field -> share right."""
    if stage.task == "squares":
        *wanted, x = Batches(replace(stage, batch=n), "watch", tokenizer)[0][0]
        return warmup.loss_and_hits(head(model.visual_tokens(normalise(x.to(model.device)))), wanted[0].to(model.device))[1]
    return accuracy(model, tokenizer, n=n, mix=stage.mix, style=Style(world.TRAINED, wide=stage.wide))


@torch.no_grad()
def accuracy(model: MiniVL, tokenizer: Tokenizer, seed="watch", n=192, **how) -> dict:
    """task -> share of answers exactly right on n held-out conversations, teacher forced.

    An answer is right if every token is the most probable one after the right tokens before it: then, and only then,
    greedy generation writes exactly this answer (given the right history).
    """
    right, seen = defaultdict(int), defaultdict(int)
    for start in range(0, n, MICRO):
        examples = [world.example(seed, i, **how) for i in range(start, min(n, start + MICRO))]
        tiles = [tiles_of(e) for e in examples]
        ids, labels, x = collate([ids_of(e, t, tokenizer) for e, t in zip(examples, tiles)], tiles, tokenizer)
        device = model.device
        logits, wanted = answer_logits(model, ids.to(device), labels.to(device), normalise(x.to(device)))
        hits = (logits.argmax(-1) == wanted).tolist()
        for example, row in zip(examples, (labels[:, 1:] != IGNORE).tolist()):
            for turn, run in zip(example.turns, "".join("01"[v] for v in row).replace("0", " ").split()):
                seen[turn.task] += 1
                right[turn.task] += all(hits[:len(run)])
                del hits[:len(run)]
    return {task: right[task] / seen[task] for task in sorted(seen)}


# ---- the loop -------------------------------------------------------------------------------------------------------

def train(out, stages=recipe.STAGES, *, seed: int = recipe.SEED, workers: int = 0, device: str = "cpu",
          save_every: int = 250, watch_every: int = 250, watch_n: int = 384,
          stop_at: int | None = None) -> Path:
    """Run all stages into the folder `out`, or go on where an earlier run stopped; the folder of the last stage.

    `watch_n`: held-out examples that are tried every `watch_every` steps, and at the end of a stage.
    `stop_at`: leave after this many steps of this call, with a checkpoint (for tests and for lent machines).
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    digest, state_file, done = recipe.sha256(stages, seed), out / "state.pt", 0
    state = torch.load(state_file, weights_only=True, map_location=device) if state_file.exists() else {}
    if state and state["recipe"] != digest:
        raise InputError(f"{out} holds a training of another recipe ({state['recipe'][:12]}, this one is {digest[:12]}); "
                         "choose another folder")
    fast_half = state["fast_half"] if state else half_is_faster(device)
    model = recipe.initial(seed)
    for number, stage in enumerate(stages, start=1):
        folder = out / f"stage-{number}"
        if (folder / "model.safetensors").exists():
            model = load(folder)
            continue
        recipe.save_small_files(folder)
        tokenizer = Tokenizer.load(folder)
        model.img_context_token_id = tokenizer.id("<IMG_CONTEXT>")
        model = model.float().train().to(device)
        torch.manual_seed(seed)
        heads = {"squares": warmup.head, "differences": differences.head}
        head = heads[stage.task](recipe.LLM["hidden_size"]).to(device) if stage.task in heads else None
        opts, first, half = optimisers(model, stage, head), 0, stage.half and fast_half
        if state.get("stage") == number:
            model.load_state_dict(state["model"])
            if head:
                head.load_state_dict(state["head"])
            for opt, saved in zip(opts, state["optimisers"]):
                opt.load_state_dict(saved)
            first = state["step"]
        loader = DataLoader(Batches(stage, seed, tokenizer), batch_size=None, sampler=range(first, stage.steps),
                            num_workers=workers, prefetch_factor=8 if workers else None)
        start, tokens, mean = time.perf_counter(), 0, None
        with tqdm(total=stage.steps, initial=first, desc=stage.name, unit="step", disable=None) as bar:
            for step, batch in enumerate(loader, start=first):
                with precision(device, half):
                    loss, count = train_step(model, batch, opts, rate(stage, step), head)
                mean = loss if mean is None else 0.98 * mean + 0.02 * loss
                tokens += sum(m[0].numel() for m in batch)
                bar.update()
                bar.set_postfix_str(f"loss {mean:.3f}, {tokens / (time.perf_counter() - start):.0f} tokens/s")
                done += 1
                last = step + 1 == stage.steps
                if (step + 1) % watch_every == 0 or last:
                    seen = {k: round(v, 3) for k, v in watch(model, tokenizer, stage, head, watch_n).items()}
                    line = {"stage": stage.name, "step": step + 1, "loss": round(mean, 4), **seen}
                    with open(out / "log.jsonl", "a") as log:
                        log.write(json.dumps({**line, "seconds": round(time.perf_counter() - start)}) + "\n")
                    tqdm.write(" ".join(f"{k} {v}" for k, v in line.items()))
                if not last and ((step + 1) % save_every == 0 or done == stop_at):
                    state = {"recipe": digest, "fast_half": fast_half, "stage": number, "step": step + 1,
                             "model": model.state_dict(), "head": head and head.state_dict(), "optimisers": [opt.state_dict() for opt in opts]}
                    torch.save(state, partial := state_file.with_suffix(".partial"))
                    os.replace(partial, state_file)
                if done == stop_at and not last:
                    return folder
        recipe.save(model, folder, {"recipe": digest, "stage": stage.name, "products": "bfloat16" if half else "float32"})
        model = load(folder)        # the next stage starts from what the file holds, float16
        state_file.unlink(missing_ok=True)
        state = {}
    return folder


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights_tools.nano.train", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", help="folder for checkpoints, log and the finished stages")
    parser.add_argument("--quick", action="store_true", help="the short recipe, planned for 25 minutes on 2 CPU cores")
    parser.add_argument("--seed", type=int, default=recipe.SEED, help="default %(default)s, that of the shipped files")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pictures (default %(default)s: on two cores one "
                        "made a step 1.6 times as long; with a GPU take a few)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--steps", type=int, help="cut every stage to this many steps, for a look")
    args = parser.parse_args(argv)
    stages = recipe.QUICK if args.quick else recipe.STAGES
    if args.steps:
        stages = tuple(replace(s, steps=min(s.steps, args.steps), warmup=min(s.warmup, args.steps)) for s in stages)
    print(train(args.out, stages, seed=args.seed, workers=args.workers, device=args.device))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
