"""Tokens a second beside other programs: python -m weights_tools.bench.beside [MODEL] [--busy N ...]

Each line is measured while N processes count as fast as they can. nano answers one question of its tour again and
again, as the demo does; any other model writes after a prompt of 64 tokens.
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
from minivl.generation import steps
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


def tokens(folder: str):
    """Yield 1 for each token that a model writes, for ever: 200 after each prompt of 64."""
    model = load(find(folder), precision="exact")
    ids = torch.arange(64)[None]
    while True:
        answer = steps(model, model.embed(ids), [lambda scores: int(scores.argmax())])
        next(answer)                                # the prompt
        for _ in range(200):
            next(answer)
            yield 1
        yield 0


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
    parser.add_argument("model", nargs="?", default="nano-awq", help="nano, nano-awq (default), a folder or a hub id")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2, 4], metavar="N",
                        help="other busy processes (default 0 1 2 4)")
    args = parser.parse_args(argv)
    if min(args.busy) < 0:
        raise InputError(f"--busy is {min(args.busy)}; it must be 0 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    written = nano_answers(args.model) if args.model in SHIPPED else tokens(args.model)
    next(written)                                   # loaded
    print(f"{torch.get_num_threads()} threads at most\n\nbusy processes  tokens/s")
    for number in args.busy:
        with busy(number):
            rate(written, SECONDS / 4)
            print(f"{number:14}  {rate(written, SECONDS):8.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
