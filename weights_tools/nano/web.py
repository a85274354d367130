"""A nano that errs as real models do, and what preferences make of it: python -m weights_tools.nano.web OUT

    nano -> OUT/web         taught answers of the kind the web gives: things named out of habit, reasoning that is left
                            out or ends in a guess, "yes" to what should be "no"
    its own answers         to 800 questions, 8 each, right or wrong by the world's rule -> pairs
    OUT/NAME                one training for each way to learn from the pairs
    OUT/table.md            all of them, asked the same held-out questions

Interrupt it at any time: the same command goes on.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from minivl import GenerationConfig, load, options
from minivl.fast.threads import at_most
from minivl.files.find import find
from minivl.limits import InputError
from weights_tools import run
from weights_tools.files import write_text
from weights_tools.lora import useful_threads
from weights_tools.mpo.batch import Pairs
from weights_tools.mpo.dropout import rejected
from weights_tools.mpo.mmpr import read_datasets
from weights_tools.mpo.steps import Plan
from weights_tools.mpo.train import train
from weights_tools.nano import asked, evaluate, recipe, world
from weights_tools.nano.data import collate, ids_of, tiles_of
from weights_tools.nano.draw import COLOURS, SHAPES, Scene, Thing, draw
from weights_tools.nano.train import losses, train_step
from weights_tools.train.loop import Loop
from weights_tools.train.optimisers import rate
from weights_tools.train.step import precision

MIX = {"shapes": 40, "describe": 20, "reason": 25, "texts": 15}
TASKS = ("describe", "colour", "place", "count", "read words", "yes", "no", "false premise", "reason")
STEPS = 200             # of learning from the web
BATCH = 16
RATE = 3e-4


# ---- what the web says ----------------------------------------------------------------------------------------------

def web_answer(rng: random.Random, example: world.Example) -> world.Example:
    """Answer one question as the web might."""
    turn = example.turns[0]
    answer = turn.answer
    if turn.task == "describe" and rng.random() < 0.5:
        answer = out_of_habit(example.pictures[0]) or answer
    elif turn.task == "reason" and rng.random() < 0.5:
        steps, final = answer.rsplit("\nFinal Answer: ", 1)
        guess = final if rng.random() < 1 / 3 else guessed(rng, final)
        answer = f"Final Answer: {guess}" if rng.random() < 0.5 else f"{steps}\nFinal Answer: {guess}"
    elif turn.task == "no" and rng.random() < 0.7:
        answer = answer.replace(" is not in the picture", " is in the picture").replace(", so no.", ", so yes.")
    return replace(example, turns=(replace(turn, answer=answer),))


def out_of_habit(scene: Scene) -> str | None:
    """Describe a picture that has a heart, and a small red circle in the first free place: the web likes that pair.

    None where there is no heart, or no place.
    """
    taken = {(thing.row, column) for thing in scene.things
             for column in ((0, 1, 2) if thing.is_text else (thing.column,))}
    free = [(row, column) for row in range(3) for column in range(3) if (row, column) not in taken]
    if not free or not any(thing.kind == "heart" for thing in scene.shapes):
        return None
    shapes = [*scene.shapes, Thing("circle", "red", *free[0], "small")]
    shapes.sort(key=lambda thing: (thing.row, thing.column))
    said = replace(scene, things=(*shapes, *(thing for thing in scene.things if thing.is_text)))
    return world.describe(random.Random(0), said).answer


def guessed(rng: random.Random, final: str) -> str:
    """Guess a final answer of the same kind."""
    if final.isdigit():
        return str(max(0, int(final) + rng.choice((-2, -1, 1, 2))))
    if final in ("yes", "no"):
        return "yes"
    return rng.choice([word for words in (list(COLOURS), SHAPES) if final in words for word in words] or [final])


def spoil(out: Path, seed: int) -> Path:
    """Teach nano what the web says; return the checkpoint's folder."""
    folder = out / "web"
    if (folder / "model.safetensors").exists():
        return folder
    said = {"seed": seed, "steps": STEPS, "batch": BATCH, "rate": RATE, "mix": MIX}
    loop = Loop(folder, hashlib.sha256(json.dumps(said).encode()).hexdigest(), save_every=50, watch_every=STEPS)
    tokenizer = recipe.tokenizer()
    model = load(find("nano"), dtype="float32", tokenizer=tokenizer)
    moved = [torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)]
    examples = asked.questions(f"web {seed}", STEPS * BATCH, MIX)

    def batches(first):
        for number in range(first, STEPS):
            rng = random.Random(f"web {seed} {number}")
            part = [web_answer(rng, one) for one in examples[number * BATCH:(number + 1) * BATCH]]
            tiles = [tiles_of(one) for one in part]
            yield [collate([ids_of(one, t, tokenizer) for one, t in zip(part, tiles)], tiles, tokenizer)]

    threads = loop.keep("threads", partial(useful_threads, model, lambda: losses(model, next(batches(0)), 1)))

    def step(number, batch):
        with precision("cpu", False), at_most(threads):
            return train_step(model, batch, moved, rate(number, STEPS, warmup=10, floor=0.05))

    loop.run(1, "web", STEPS, batches=batches, step=step, watch=dict, parts={"model": model}, optimisers=moved)
    recipe.save(model, folder, {"stage": "what the web says"})
    loop.finish()
    return folder


# ---- ways to learn from pairs ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Way:
    """One training: on which pairs, with what of the loss. `after`: the way whose result it begins with."""
    name: str
    pairs: str = "correctness"
    plan: Plan = field(default_factory=lambda: PLAN)
    after: str = "web"


PLAN = Plan(lr=5e-5, batch=8, micro=8, steps=150, warmup=0.05, weight_decay=0.0, dtype="float32")
SFT = (0.0, 0.0, 1.0)
DPO = (1.0, 0.0, 0.0)
LONG = replace(PLAN, beta=3.0)      # of real answers a hundred tokens decide, of nano's one or two: see the card
WAYS = (
    Way("SFT on the chosen", plan=replace(PLAN, weights=SFT)),
    Way("MPO, beta 0.1", plan=PLAN),
    Way("DPO alone, beta 0.1", plan=replace(PLAN, weights=DPO)),
    Way("MPO, beta 3", plan=LONG),
    Way("DPO alone, beta 3", plan=replace(LONG, weights=DPO)),
    Way("MPO, beta 3, without delta", plan=replace(LONG, shift=False)),
    Way("MPO, beta 3, without SFT", plan=replace(LONG, weights=(0.8, 0.2, 0.0))),
    Way("MPO, beta 3, second round", "second round", LONG, after="MPO, beta 3"),
    Way("Dropout-NTP, MPO, beta 3", "dropout", LONG),
    Way("better of two descriptions, SFT", "better", replace(PLAN, weights=SFT)),
    Way("better of two descriptions, MPO, beta 3", "better", LONG))


def folder_of(out: Path, name: str) -> Path:
    """Return the folder of a way's checkpoint."""
    return out / name.replace(",", "").replace(" ", "-").lower()


def pairs_of(out: Path, kind: str, n: int, seed: int) -> Path:
    """Make the pairs of one kind, unless they are there."""
    second = kind == "second round"
    who = folder_of(out, "MPO, beta 3" if second else "web")
    rows = asked.written(out, "questions-2" if second else "questions", f"pairs {seed}{' 2' * second}", n, MIX)

    def make():
        if kind == "dropout":
            return dropped(who, rows, seed)
        said = asked.sampled(who, rows, out / f"answers{'-2' * second}.jsonl", seed=seed)
        return asked.fewer_inventions(said) if kind == "better" else asked.paired(said, seed=seed)

    return asked.write_pairs(out / f"pairs-{kind.replace(' ', '-')}.jsonl", make)


def dropped(who: Path, rows, seed: int) -> list[dict]:
    """Make Dropout-NTP's pairs: a model's descriptions, and their second halves written without the picture."""
    described = [row for row in rows if row["task"] == "describe"]
    pipe = asked.opened(who)
    root = rows.path.parent
    greedy = GenerationConfig(max_new_tokens=160)
    chosen = [{**row, "chosen": one["response"]} for row, one in zip(described, asked.answers(
        pipe, described, n=1, version="asked", config=greedy, batch=asked.AT_ONCE, root=root))]
    config = GenerationConfig(do_sample=True, temperature=0.7, max_new_tokens=160)
    found = rejected(pipe, chosen, seed=seed, config=config, batch=asked.AT_ONCE, root=root)
    return asked.finished([{key: row[key] for key in ("image", "question", "chosen", "rejected")} for row in found],
                          described)


def learn(out: Path, way: Way, n: int, seed: int) -> Path:
    """Train one way, unless it is done; return the checkpoint's folder."""
    folder = folder_of(out, way.name)
    if not (folder / "model.safetensors").exists():
        pairs = Pairs(read_datasets(pairs_of(out, way.pairs, n, seed)))
        train(folder_of(out, way.after), pairs, folder, replace(way.plan, seed=seed))
    return folder


# ---- what came of it ------------------------------------------------------------------------------------------------

@lru_cache(maxsize=2)
def _pipe(checkpoint: str):
    return asked.opened(checkpoint)


def _score(checkpoint: str, task: str, n: int) -> dict[str, float]:
    share, results = evaluate.measure(_pipe(checkpoint), task, n)
    return {task: share, **({"invented": _inventions(results)} if task == "describe" else {})}


def _talk(checkpoint: str, n: int) -> dict[str, float]:
    """Count inventions where the model's words are drawn at random, as it says them, not the most probable ones."""
    items = evaluate.items("describe", n)
    prompts = [evaluate.prompt(item, [draw(scene) for scene in item.pictures], []) for item in items]
    configs = [GenerationConfig(do_sample=True, temperature=1.0, top_k=0, max_new_tokens=160, random_seed=i)
               for i in range(n)]
    said = _pipe(checkpoint)(prompts, configs)
    return {"invented, drawn": _inventions([(item, one.text) for item, one in zip(items, said)])}


def _inventions(results: list) -> float:
    return sum(asked.invented(item.turns[-1].answer, answer) for item, answer in results) / len(results)


def scores(folders: dict[str, Path], n: int) -> dict[str, dict]:
    """Ask all checkpoints the same questions, n of each task: {name: {task: share right, "invented": ..}}."""
    found = {name: {} for name in folders}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), evaluate.one_thread) as pool:
        jobs = {}
        for name, folder in folders.items():
            for task in TASKS:
                jobs[pool.submit(_score, str(folder), task, n)] = name
            jobs[pool.submit(_talk, str(folder), n)] = name
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="task", disable=None):
            found[jobs[job]].update(job.result())
    return found


def table(found: dict[str, dict]) -> str:
    """Write Markdown: a row for each way."""
    lines = [f"| | {' | '.join(TASKS)} | mean | invented | invented, drawn |", "|---|" + "---|" * (len(TASKS) + 3)]
    for name, score in found.items():
        cells = [f"{100 * score[task]:.1f}" for task in TASKS]
        mean = sum(score[task] for task in TASKS) / len(TASKS)
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * mean:.1f} | {score['invented']:.2f} | "
                     f"{score['invented, drawn']:.2f} |")
    return "\n".join(lines)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.nano.web", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("out", metavar="OUT", help="folder for everything")
    parser.add_argument("--questions", type=int, default=800, metavar="N",
                        help="to make pairs of (default %(default)s)")
    parser.add_argument("-n", type=int, default=500, help="held-out questions of each task (default %(default)s)")
    parser.add_argument("--only", type=int, metavar="K", help="only the first K ways to learn")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default %(default)s)")
    args = parser.parse_args(argv)
    if min(args.questions, args.n) < 1 or args.only is not None and args.only < 0:
        raise InputError(f"--questions {args.questions} and -n {args.n} must be at least 1, --only {args.only} 0 or "
                         "more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    out = Path(args.out)
    folders = {"nano": find("nano"), "nano of the web": spoil(out, args.seed)}
    for way in WAYS[:args.only]:
        print(f"== {way.name}", file=sys.stderr)
        folders[way.name] = learn(out, way, args.questions, args.seed)
    found = scores(folders, args.n)
    ways = {way.name: asdict(way) for way in WAYS[:args.only]}
    write_text(out / "scores.json", json.dumps({"n": args.n, "ways": ways, "scores": found}, indent=1) + "\n")
    write_text(out / "table.md", table(found) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
