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

from minivl.limits import InputError
from weights_tools.bench.machine import lines_of, machine, work_of
from weights_tools.bench.ours import OURS, UNCOMPILED, Ours

JOBS = {    # name -> (what is asked, unit); seconds become `count / seconds` of the unit, or stay seconds
    "tile": ({"tiles": 1}, "s/tile"), "prefill 128": ({"prompt": 128}, "tok/s"), "prefill 512": ({"prompt": 512}, "tok/s"),
    "prefill 1792": ({"prompt": 1792}, "tok/s"), "decode 1": ({"batch": 1}, "tok/s"), "decode 4": ({"batch": 4}, "tok/s")}


def serve(engine: str, checkpoint: str, tokens: int):
    """The loop of a worker process: a line of JSON in, a line out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)           # whatever a library prints goes to stderr
    start = time.perf_counter()
    if engine in OURS:
        it = Ours(checkpoint, OURS[engine])
        torch.set_grad_enabled(False)
    else:
        from weights_tools.bench import peers
        it = peers.start(engine, checkpoint)
    loaded = time.perf_counter() - start
    it.prompt(2), it.batch(1, 1)
    ready = time.perf_counter() - start

    def say(message):
        print(json.dumps(message), file=answers, flush=True)

    say({"load": loaded, "first token": ready})
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if "scores" in job:
                say(it.scores(job["scores"]))
            elif "tiles" in job:
                say(it.tiles(job["tiles"]))
            elif "prompt" in job:
                say(it.prompt(job["prompt"]))
            elif "batch" in job:
                say(it.batch(job["batch"], tokens))
            elif "profile" in job:
                say(it.profile(tokens))
            else:
                say(peak())
        except (AttributeError, NotImplementedError):       # this engine has no such part
            say(None)


def peak() -> dict:
    """GB: most memory of the process so far, file pages included, and what is its own now."""
    status = dict(line.split(":", 1) for line in lines_of("/proc/self/status") if ":" in line)
    return {key: int(status[field].split()[0]) * 1024 / 1e9 for key, field in (("peak", "VmHWM"), ("own", "RssAnon"))
            if field in status}


class Worker:
    """An engine in its own process."""

    def __init__(self, engine, checkpoint, python, tokens):
        self.engine = engine
        root = str(Path(__file__).resolve().parents[2])
        self.process = subprocess.Popen(
            [python, "-W", "ignore", "-m", "weights_tools.bench", str(checkpoint), "--serve", engine, "--tokens", str(tokens)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root, **({"MINIVL_COMPILE": "0"} if engine in UNCOMPILED else {})})
        self.started = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            self.end()
            raise InputError(f"{self.engine} ended with code {self.process.returncode}; its last words are above. For other "
                             "people's engines install the extra `peers`, or name a Python that has them with --peers-python")
        return json.loads(line)

    def ask(self, **job):
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return self.read()

    def end(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


# ---- all together ---------------------------------------------------------------------------------------------------

def bench(checkpoint, engines, *, python=sys.executable, rounds: int = 3, tokens: int = 16, jobs=tuple(JOBS)) -> dict:
    """{"machine", "work", "engines": {engine: {job: {"best", "median", "unit"}, "load", ...}}}."""
    from minivl.files.find import find
    from minivl.config import Config
    folder = find(checkpoint)
    report = {"checkpoint": str(checkpoint), "machine": machine(), "work": work_of(Config.load(folder)), "engines": {}}
    workers = []
    try:
        for engine in engines:
            print(f"{engine}: loading", file=sys.stderr)
            workers.append(Worker(engine, folder, sys.executable if engine in OURS else python, tokens))
        seconds = {(w.engine, job): [] for w in workers for job in jobs}
        for i in range(rounds + 1):         # the first round warms up
            for job in jobs:
                for worker in workers:
                    print(f"round {i} of {rounds}: {job}, {worker.engine}   ", end="\r", file=sys.stderr)
                    found = worker.ask(**JOBS[job][0])
                    if found is not None and (i or rounds == 0):
                        seconds[worker.engine, job].append(found)
        for worker in workers:
            entry = dict(worker.started)
            for job in jobs:
                found, (asked, unit) = seconds[worker.engine, job], JOBS[job]
                if found:
                    count = asked.get("prompt") or asked.get("batch")
                    values = [count / s if count else s for s in found]
                    entry[job] = {"best": (max if count else min)(values), "median": statistics.median(values), "unit": unit}
            if worker.engine in OURS:
                entry["profile"] = worker.ask(profile=True)
            entry["memory"] = worker.ask()
            report["engines"][worker.engine] = entry
    finally:
        for worker in workers:
            worker.end()
    print(" " * 60, end="\r", file=sys.stderr)
    return report


def accuracy(checkpoint, engines, tokens: int = 1) -> dict:
    """{engine: {"logits", "KL", "same best", "largest KL"}} against the first of the engines, over 68 tokens of one prompt."""
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

    def centred(x):         # log probabilities and scores differ by a constant for each token
        return x - x.mean(-1, keepdim=True)

    report = {}
    for engine in engines[1:]:
        other = found[engine]
        kl = (right.exp() * (right - other)).sum(-1)                                    # (68)
        report[engine] = {"logits": float((centred(other) - centred(right)).norm() / centred(right).norm()), "KL": float(kl.mean()),
                          "largest KL": float(kl.max()), "same best": float((right.argmax(-1) == other.argmax(-1)).float().mean())}
    return report
