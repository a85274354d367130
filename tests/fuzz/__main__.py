"""Run altered files through minivl in worker processes and print what became of them.

    python -m fuzz [KIND=N ...] [--seed N] [--workers N]        thousands of each kind, or N of those named
    python -m fuzz FILE ...                                     cases that were saved, again, each with its traceback
"""
import argparse
import collections
import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from fuzz import worker
from minivl.options import Help

ALL = {"safetensors": 10_000, "bin": 5_000, "json": 2_000, "sentencepiece": 2_000, "pictures": 10_000, "videos": 1_000}
OUTCOMES = ("InputError", "loaded whole", "other", "hang", "crash", "over 1 GB")
GOOD = OUTCOMES[:2]
SAVED = Path("build/fuzz")
START = ["-m", "fuzz.worker"]
SILENCE = 300               # seconds without a line: the case waits for something for ever


class Results:
    """What became of the cases: counts, the costliest, and the failing ones."""

    def __init__(self, jobs, seed):
        self.jobs, self.seed = jobs, seed
        self.counts = {kind: collections.Counter() for kind in jobs}
        self.seconds = dict.fromkeys(jobs, 0.0)     # most of one case
        self.taken = dict.fromkeys(jobs, 0)
        self.failures = []                          # (place, kind, name, outcome, text)
        self.lock = threading.Lock()

    def add(self, case, outcome, text, seconds=0.0, taken=0):
        """Count one case."""
        place, kind, name = case
        with self.lock:
            self.counts[kind][outcome] += 1
            self.seconds[kind] = max(self.seconds[kind], seconds)
            self.taken[kind] = max(self.taken[kind], taken)
            if outcome not in GOOD:
                self.failures.append((place, kind, name, outcome, text))

    def table(self):
        """The table of a run, in Markdown."""
        lines = ["| kind | tried | " + " | ".join(OUTCOMES) + " | most CPU s | most MB |", "|---" + "|---:" * 9 + "|"]
        for kind, counts in self.counts.items():
            cells = [sum(counts.values()), *(counts[outcome] for outcome in OUTCOMES)]
            lines.append(f"| {kind} | " + " | ".join(f"{n:,}" for n in cells)
                         + f" | {self.seconds[kind]:.1f} | {self.taken[kind] / 1e6:.0f} |")
        return "\n".join(lines)

    def save(self):
        """Write the failing cases and what is known of them into build/fuzz/."""
        wanted = {place: (outcome, text) for place, _, _, outcome, text in self.failures}
        if not wanted:
            return
        SAVED.mkdir(parents=True, exist_ok=True)
        for place, kind, name, data in worker.cases(self.jobs, self.seed):
            if place in wanted:
                path = SAVED / file_name(kind, f"{self.seed}-{place}", name)
                path.write_bytes(data)
                path.with_name(path.name + ".txt").write_text("\n".join(wanted[place]), "utf-8", errors="replace")
                print(f"{wanted[place][0]}: {path}\n    {wanted[place][1].strip().splitlines()[-1][:200]}")


def file_name(kind, number, name):
    """What a saved case is called: kind, number, and the name from which `again` needs the begin or the suffix."""
    return f"{kind}-{number} " + re.sub(r"[^\w. -]", "_", name if len(name) < 120 else name[:60] + ".." + name[-60:])


def run(jobs, seed=0, workers=None):
    """Run the cases in worker processes -> Results."""
    results = Results(jobs, seed)
    workers = workers or os.cpu_count()
    threads = [threading.Thread(target=_share, args=(results, share, workers)) for share in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _share(results, share, of):
    """Run one share, in as many processes as it takes."""
    skip = 0
    last = sum(results.jobs.values())
    while skip < last:
        case, problem, text = _process(results, share, of, skip)
        if problem is None:
            return
        if case is None:        # before its first case: nothing to go on with
            raise RuntimeError(f"a worker ended at once ({problem}):\n{text}")
        if problem:
            results.add(case, problem, text)
        skip = case[0] + 1


def _process(results, share, of, skip):
    """Run a worker to its end or first failure: (last case, "hang", "crash", "" if counted, None at the end, text)."""
    task = {"jobs": results.jobs, "seed": results.seed, "share": share, "of": of, "skip": skip}
    case = None
    with tempfile.TemporaryFile("w+", errors="replace") as errors, subprocess.Popen(
            [sys.executable, "-W", "ignore", *START, json.dumps(task)], stdout=subprocess.PIPE,
            stderr=errors, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}) as process:
        try:
            for line in _lines(process):
                line = json.loads(line)
                if isinstance(line[0], int):
                    case = line
                    continue
                results.add(case, *line)
                if line[0] in ("hang", "over 1 GB"):    # what it keeps would count against the next case
                    return case, "", ""
                done = case
                case = None
                if done[0] + of >= sum(results.jobs.values()):
                    return done, None, ""
        finally:
            silent = process.poll() is None
            process.kill()
        code = process.wait()
        errors.seek(0)
        text = f"exit status {code}\n{errors.read()[-3000:]}"
    if case is None and code == 0:
        return None, None, ""
    return case, "hang" if silent or code == -24 else "crash", text        # 24: SIGXCPU


def _lines(process):
    """Yield the lines a process writes, until it ends or is silent for long."""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        rest = b""
        while selector.select(SILENCE):
            new = os.read(process.stdout.fileno(), 65536)
            if not new:
                process.wait()
                return
            *lines, rest = (rest + new).split(b"\n")
            yield from lines


def again(path):
    """Run one saved case in this process."""
    kind, _, rest = Path(path).name.partition("-")
    name = rest.partition(" ")[2]
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "case"
        folder.mkdir()
        start = worker.ready()
        outcome, text, seconds, taken = worker.measured(kind, name, Path(path).read_bytes(), folder, start)
    print(f"{path}\n{outcome}, {seconds:.2f} s of CPU time, {taken / 1e6:.0f} MB\n{text}")
    return outcome in GOOD


def arguments(argv=None):
    """Read the options."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__,
                                     formatter_class=Help)
    parser.add_argument("what", nargs="*", metavar="KIND=N | FILE")
    parser.add_argument("--seed", type=int, help="default 0")
    parser.add_argument("--workers", type=int, help="default: one for each processor")
    options = parser.parse_args(argv)
    options.files = [what for what in options.what if os.path.exists(what)]
    if options.files and (options.files != options.what or (options.seed, options.workers) != (None, None)):
        parser.error("FILE is a case that was saved, and is run alone: without KIND=N, --seed and --workers")
    try:
        options.jobs = {} if options.files else {kind: int(n) for kind, n in (w.split("=") for w in options.what)}
    except ValueError:
        parser.error(f"{' '.join(options.what)}: give saved cases that exist, or KIND=N like bin=100")
    if unknown := options.jobs.keys() - ALL.keys():
        parser.error(f"no kind {', '.join(sorted(unknown))}; kinds are {', '.join(ALL)}")
    return options


def main(argv=None):
    """Run the command; its exit code."""
    options = arguments(argv)
    if options.files:
        return int(not all([again(path) for path in options.files]))
    start = time.time()
    results = run(options.jobs or ALL, options.seed or 0, options.workers)
    results.save()
    print(results.table())
    print(f"seed {options.seed or 0}, {time.time() - start:.0f} s")
    return int(bool(results.failures))


if __name__ == "__main__":
    sys.exit(main())
