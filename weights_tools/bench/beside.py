"""Work a second beside other programs: python -m weights_tools.bench.beside [MODEL] [--busy N ...]

Each line is measured while N processes count as fast as they can. nano answers one question of its tour again and
again, as the demo does; any other model writes, reads prompts of 64 and of 512 tokens, and looks at tiles.
"""
from __future__ import annotations

import argparse
import subprocess
import sys
import time
from contextlib import contextmanager

import torch

from minivl import load, options, pipeline
from minivl.demo import SAMPLES
from minivl.files.find import SHIPPED, find
from minivl.generation import steps, visual_tokens
from minivl.limits import InputError
from weights_tools import run

SECONDS = 20            # of each measurement, after one of a quarter


@contextmanager
def busy(number: int):
    """Let so many other processes keep a processor busy while the block runs."""
    others = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def nano_answers(name: str):
    """Yield the tokens of answers of the shipped model, how many each time, for ever."""
    pipe = pipeline(name)
    while True:
        response = pipe(("describe this image", str(SAMPLES / "shapes.png")))
        yield response.generate_token_len


def prompts(model, length: int):
    """Yield a prompt's tokens each time that a model has read one, for ever."""
    x = model.embed(torch.arange(length)[None])
    while True:
        next(steps(model, x, [lambda scores: 0]))
        yield length


def tokens(model):
    """Yield 1 for each token that a model writes, for ever: 200 after each prompt of 64."""
    x = model.embed(torch.arange(64)[None])
    while True:
        answer = steps(model, x, [lambda scores: int(scores.argmax())])
        next(answer)                                # the prompt
        for _ in range(200):
            next(answer)
            yield 1
        yield 0


def tiles(model):
    """Yield 1 for each tile that a model has looked at, one at a time, for ever."""
    side = model.config.force_image_size
    pixels = torch.rand(1, model.config.vision_config.num_channels, side, side)
    while True:
        visual_tokens(model, [pixels])
        yield 1


def rate(written, seconds: float) -> float:
    """Count tokens for some seconds -> tokens a second."""
    start = time.perf_counter()
    count = 0
    while time.perf_counter() - start < seconds:
        count += next(written)
    return count / (time.perf_counter() - start)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.bench.beside", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("model", nargs="?", default="nano-awq",
                        help="nano, nano-awq (default), a folder, hub id or short name such as 4b-mpo-awq")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2, 4], metavar="N",
                        help="other busy processes (default 0 1 2 4)")
    args = parser.parse_args(argv)
    if min(args.busy) < 0:
        raise InputError(f"--busy is {min(args.busy)}; it must be 0 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    if args.model in SHIPPED:
        work = {"tokens": nano_answers(args.model)}
    else:
        model = load(find(args.model), precision="exact")
        work = {"tokens": tokens(model), "of prompts of 64": prompts(model, 64),
                "of prompts of 512": prompts(model, 512), "tiles": tiles(model)}
    for written in work.values():
        next(written)                               # loaded, and warm
    print(f"{torch.get_num_threads()} threads at most; each a second\n\nbusy processes  {'  '.join(work)}")
    for number in args.busy:
        print(f"{number:14}", end="", flush=True)
        with busy(number):
            for name, written in work.items():
                rate(written, SECONDS / 4)
                print(f"  {rate(written, SECONDS):{len(name)}.2f}", end="", flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
