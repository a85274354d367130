"""Every engine in a process of its own, asked in turns, so that a busy moment hurts all."""
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from minivl.config import Config
from minivl.files.find import find
from minivl.limits import InputError
from weights_tools.bench.machine import lines_of, machine, work_of
from weights_tools.bench.ours import OURS, UNCOMPILED, Ours

# name -> (what is asked, unit); seconds become `count / seconds` of the unit, or stay seconds
JOBS = {
    "tile": ({"tiles": 1}, "s/tile"),
    "prefill 128": ({"prompt": 128}, "tok/s"),
    "prefill 512": ({"prompt": 512}, "tok/s"),
    "prefill 1792": ({"prompt": 1792}, "tok/s"),
    "decode 1": ({"batch": 1}, "tok/s"),
    "decode 4": ({"batch": 4}, "tok/s"),
}


# ---- in the worker process ------------------------------------------------------------------------------------------

def open_engine(engine: str, checkpoint: str):
    """Load a checkpoint into the engine of this name, ours or other people's."""
    if engine in OURS:
        ours = Ours(checkpoint, OURS[engine])
        torch.set_grad_enabled(False)
        return ours
    from weights_tools.bench import peers
    return peers.start(engine, checkpoint)


def answer(engine, job: dict, tokens: int):
    """Do one job and return its seconds (of a profile its shares, of no job the memory); None: the engine cannot."""
    try:
        if "scores" in job:
            return engine.scores(job["scores"])
        if "tiles" in job:
            return engine.tiles(job["tiles"])
        if "prompt" in job:
            return engine.prompt(job["prompt"])
        if "batch" in job:
            return engine.batch(job["batch"], tokens)
        if "profile" in job:
            return engine.profile(tokens)
        return peak()
    except (AttributeError, NotImplementedError):       # this engine has no such part
        return None


def serve(engine: str, checkpoint: str, tokens: int):
    """Answer jobs until there are no more: a line of JSON in, a line out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)           # whatever a library prints goes to stderr

    def say(message):
        print(json.dumps(message), file=answers, flush=True)

    start = time.perf_counter()
    opened = open_engine(engine, checkpoint)
    loaded = time.perf_counter() - start
    opened.prompt(2)
    opened.batch(1, 1)
    ready = time.perf_counter() - start
    say({"load": loaded, "first token": ready})
    for line in sys.stdin:
        say(answer(opened, json.loads(line), tokens))


def peak() -> dict:
    """Read the GB of this process: the most so far, with pages of files, and what is its own now."""
    status = dict(line.split(":", 1) for line in lines_of("/proc/self/status") if ":" in line)
    return {key: int(status[field].split()[0]) * 1024 / 1e9 for key, field in (("peak", "VmHWM"), ("own", "RssAnon"))
            if field in status}


# ---- in the process that asks ---------------------------------------------------------------------------------------

class Worker:
    """Hold an engine in a process of its own: started when made, asked in lines of JSON."""

    def __init__(self, engine: str, checkpoint, python: str, tokens: int):
        self.engine = engine
        command = [python, "-W", "ignore", "-m", "weights_tools.bench", str(checkpoint), "--serve", engine,
                   "--tokens", str(tokens)]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        if engine in UNCOMPILED:
            env["MINIVL_COMPILE"] = "0"
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.started = self.read()

    def read(self):
        """Read the next answer; an engine that ended is an InputError."""
        line = self.process.stdout.readline()
        if not line:
            self.end()
            raise InputError(f"{self.engine} ended with code {self.process.returncode}; its last words are above. "
                             "For other people's engines install the extra `peers`, or name a Python that has them "
                             "with --peers-python")
        return json.loads(line)

    def ask(self, **job):
        """Ask for one job and wait for the answer."""
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return self.read()

    def end(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def take_turns(workers: list[Worker], jobs, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Ask every worker for every job, round after round: {(engine, job): seconds}."""
    seconds = {(w.engine, job): [] for w in workers for job in jobs}
    for i in range(rounds + 1):         # the first round warms up
        for job in jobs:
            for worker in workers:
                print(f"round {i} of {rounds}: {job}, {worker.engine}   ", end="\r", file=sys.stderr)
                found = worker.ask(**JOBS[job][0])
                if found is not None and (i or rounds == 0):
                    seconds[worker.engine, job].append(found)
    return seconds


def summary(job: str, seconds: list[float]) -> dict:
    """Turn the seconds of a job into {"best", "median", "unit"}."""
    asked, unit = JOBS[job]
    count = asked.get("prompt") or asked.get("batch")
    values = [count / s if count else s for s in seconds]
    return {"best": (max if count else min)(values), "median": statistics.median(values), "unit": unit}


def bench(checkpoint, engines, *, python: str = sys.executable, rounds: int = 3, tokens: int = 16,
          jobs=tuple(JOBS)) -> dict:
    """Measure engines in turns: {"machine", "work", "engines": {engine: {job: its summary, "load", "memory", ...}}}."""
    folder = find(checkpoint)
    report = {"checkpoint": str(checkpoint), "machine": machine(), "work": work_of(Config.load(folder)), "engines": {}}
    workers = []
    try:
        for engine in engines:
            print(f"{engine}: loading", file=sys.stderr)
            workers.append(Worker(engine, folder, sys.executable if engine in OURS else python, tokens))
        seconds = take_turns(workers, jobs, rounds)
        for worker in workers:
            entry = dict(worker.started)
            for job in jobs:
                if found := seconds[worker.engine, job]:
                    entry[job] = summary(job, found)
            if worker.engine in OURS:
                entry["profile"] = worker.ask(profile=True)
            entry["memory"] = worker.ask()
            report["engines"][worker.engine] = entry
    finally:
        for worker in workers:
            worker.end()
    print(" " * 60, end="\r", file=sys.stderr)
    return report


# ---- how far from exact ---------------------------------------------------------------------------------------------

def accuracy(checkpoint, engines, tokens: int = 1) -> dict[str, dict[str, float]]:
    """Compare engines with the first of them over 68 tokens of one prompt: {engine: what `distance` finds}."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in engines:              # one after the other: each needs the memory of a model
            print(f"{engine}: loading", file=sys.stderr)
            worker = Worker(engine, checkpoint, sys.executable, tokens)
            try:
                worker.ask(scores=str(Path(folder) / engine))
            finally:
                worker.end()
            found[engine] = torch.load(Path(folder) / engine, weights_only=True)
    right = found[engines[0]]
    return {engine: distance(found[engine], right) for engine in engines[1:]}


def distance(other: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """Compare log probabilities [68, V] with the right ones: {"logits", "KL", "largest KL", "same best"}."""
    def centred(x):         # log probabilities and scores differ by a constant for each token
        return x - x.mean(-1, keepdim=True)

    kl = (right.exp() * (right - other)).sum(-1)                                    # (68)
    same = right.argmax(-1) == other.argmax(-1)                                     # (68)
    return {"logits": float((centred(other) - centred(right)).norm() / centred(right).norm()), "KL": float(kl.mean()),
            "largest KL": float(kl.max()), "same best": float(same.float().mean())}
