"""Run a share of the cases, one after another, and write a line for each begin and each outcome; the limits of a case.

    python -m fuzz.worker '{"jobs": {"bin": 500}, "seed": 0, "share": 0, "of": 2, "skip": 0}'

A case that hangs or crashes ends the process; the runner starts the next one after it.
"""
import contextlib
import faulthandler
import importlib
import json
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from fuzz import targets
from minivl import InputError

CPU_SECONDS = 5             # of one case, in all threads
KILL_SECONDS = 15           # of CPU time: the system ends the process
MEMORY = 2**30              # bytes that one case may take above what the process had at its start
MESSAGE = 5000              # characters of an error: some twenty problems


def cases(jobs, seed):
    """Yield (place in the whole, kind, name, bytes) of every kind's cases."""
    place = 0
    for kind, n in jobs.items():
        for name, data in importlib.import_module(f"fuzz.{kind}").cases(seed, n):
            yield place, kind, name, data
            place += 1


def judge(kind, name, data, folder):
    """Run one case: (outcome, what to say about it)."""
    try:
        getattr(targets, kind)(name, data, folder)
        return "loaded whole", ""
    except InputError as error:
        text = str(error)
        if len(text) > MESSAGE or " at 0x" in text or "Errno" in text:
            return "other", f"a message of {len(text)} characters: {text[:1000]}"
        return "InputError", text
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:       # also the PanicException of a library in Rust
        return "other", traceback.format_exc()


def measured(kind, name, data, folder, start):
    """Run one case within its limits: (outcome, what to say, CPU seconds, bytes). `start`: the process's at first."""
    _forget_peak()
    before = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(before) + KILL_SECONDS, resource.RLIM_INFINITY))
    outcome, text = judge(kind, name, data, folder)
    seconds, taken = time.process_time() - before, peak_memory() - start
    if taken > MEMORY:
        outcome = "over 1 GB"
    elif seconds > CPU_SECONDS:
        outcome = "hang"
    return outcome, text, seconds, taken


def peak_memory():
    """The most bytes in memory since `_forget_peak`, where the system can forget; else since the process began."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_peak():
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def ready():
    """Prepare this process: a crash leaves a trace, nothing takes the whole machine's memory; its bytes by now."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 6 * MEMORY, resource.RLIM_INFINITY))
    return peak_memory()


def main(jobs, seed, share, of, skip):
    """Run every `of`-th case from `skip` on, and write what becomes of it as lines of JSON."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)       # what a library prints does not get between the lines
    with tempfile.TemporaryDirectory(prefix="minivl-fuzz-") as top:
        folder = Path(top) / "case"
        folder.mkdir()
        for kind in jobs:       # what is loaded once is no case's
            name, data = next(importlib.import_module(f"fuzz.{kind}").cases(seed, 1))
            judge(kind, name, data, folder)
        start = ready()
        for place, kind, name, data in cases(jobs, seed):
            if place % of == share and place >= skip:
                print(json.dumps([place, kind, name]), file=out)
                outcome, text, seconds, taken = measured(kind, name, data, folder, start)
                print(json.dumps([outcome, text[-3000:], seconds, taken]), file=out)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
