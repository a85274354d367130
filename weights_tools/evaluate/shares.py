"""Several processes answer together, each with the whole model: of --workers, or of torchrun on several devices.

    chunk k of a file of questions -> process k modulo their number -> a file of its own -> the first puts all in order

They need nothing of each other but a folder that all of them see.
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from tqdm import tqdm

from minivl import EngineConfig, InputError, Pipeline, pipeline
from weights_tools import run
from weights_tools.evaluate import answers
from weights_tools.evaluate.tasks import Task, plan


def world(args: argparse.Namespace) -> tuple[int, int]:
    """Return (number of this process, processes), as torchrun or --workers has started them."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and args.workers > 1:
        raise InputError(f"--workers {args.workers} is given to {processes} processes of torchrun; leave it out there")
    return (int(os.environ["RANK"]), processes) if processes > 1 else (0, args.workers)


def useful(tasks: Sequence[Task], workers: int) -> int:
    """Return how many processes have something to ask: no more than there are chunks without answers."""
    return max(1, min(workers, sum(answers.chunks(len(task.rows), task.how) for task in tasks
                                   if not task.is_answered())))


def device_of(device: str, share: int) -> str:
    """Give each process a device of its own, as far as there are."""
    if device != "cuda" or not torch.cuda.device_count():
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', share)) % torch.cuda.device_count()}"


@contextmanager
def helpers(args: argparse.Namespace) -> Iterator[Sequence]:
    """Start the processes of --workers but the first, which is this one; they end with it, however it ends."""
    spawn = multiprocessing.get_context("spawn")
    started = [spawn.Process(target=_help, args=(args, share), daemon=True) for share in range(1, args.workers)]
    for one in started:
        one.start()
    try:
        yield started
    finally:
        for one in started:
            one.terminate()
            one.join()


def _help(args: argparse.Namespace, share: int):
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.exit(run(lambda: Asker(args, share, args.workers).all(plan(args))))


class Asker:
    """Answers a share of all tasks; `started`: the other processes, where this one has started them."""

    def __init__(self, args: argparse.Namespace, share: int, shares: int, started: Sequence = ()):
        self.args, self.share, self.shares, self.started = args, share, shares, started
        self.pipe = None
        if args.workers > 1 and args.device == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // args.workers))

    def all(self, tasks: Sequence[Task]) -> int:
        """Answer all tasks; the first process waits for the others. Returns an exit code."""
        tasks = [task for task in tasks if task.same is None]
        for number, task in enumerate(tasks):
            with self.bar(task, f"{task.name} ({number + 1} of {len(tasks)})") as tick:
                self.write(task, number, tick)
        for number, task in enumerate(tasks if self.share == 0 else ()):
            if not self.waited(task):
                ended = [one.exitcode for one in self.started]
                warnings.warn(f"processes of --workers ended with {', '.join(map(str, ended))} before their share was "
                              "answered; this one answers the rest", stacklevel=2)
                self.shares = 1
                with self.bar(task, f"{task.name}, the rest") as tick:
                    self.write(task, number, tick)
        return 0

    def write(self, task: Task, number: int, tick: Callable[[], None]):
        """Answer this process's share of a task. The model is loaded when there is something to ask."""
        share = (self.share + number) % self.shares     # else the first would get the odd chunk of each task
        if not task.is_answered():
            self.pipe = self.pipe or opened(self.args, self.share)
            answers.write(task.path, task.job, lambda done: answers.ask(
                self.pipe, task.rows, task.how, done=done, share=(share, self.shares)), self.share, tick)

    def waited(self, task: Task) -> bool:
        """Wait for the answers of the other processes; False if they ended without."""
        with self.bar(task, f"{task.name}, other processes") as tick:
            while True:
                over = [one.exitcode is not None for one in self.started]
                if task.is_answered():
                    return True
                if self.shares == 1 or over and all(over):
                    return False
                time.sleep(0.3)
                tick()

    @contextmanager
    def bar(self, task: Task, what: str) -> Iterator[Callable[[], None]]:
        """Show how many of a task's rows all processes have answered; gives what moves it, once a second."""
        last = 0.0

        def tick():
            nonlocal last
            if time.monotonic() > last + 1:
                shown.update(answers.count(task.path) - shown.n)
                last = time.monotonic()

        with tqdm(total=len(task.rows), initial=answers.count(task.path), desc=what, unit="answer", leave=False,
                  disable=True if self.share else None) as shown:
            yield tick


def opened(args: argparse.Namespace, share: int) -> Pipeline:
    """Load the checkpoint. Warns where its context has less room than answers may take."""
    pipe = pipeline(args.checkpoint, EngineConfig(device=device_of(args.device, share), precision=args.precision,
                                                  lora=args.lora))
    if args.max_new_tokens >= pipe.room and share == 0:
        warnings.warn(f"--max-new-tokens {args.max_new_tokens} is more than the context of {pipe.room}; an answer ends "
                      "where the context does", stacklevel=2)
    return pipe
