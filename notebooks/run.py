"""Run every notebook as a reader would: python notebooks/run.py [--write] [NOTEBOOK ...]

    a fresh kernel -> all cells in order -> no error, no warning, the committed [=] numbers again,
                                             under 60 s (11 and 13: 120) and 500 kB

The seconds are those of two quiet cores of a laptop: a fixed piece of work, timed before and after each notebook, says
how much slower the machine is just now, and the notebook may take so much longer.

`--write` puts the outputs into the files (`make notebooks`); without it nothing is changed. tests/test_notebooks.py
sends our own solutions through the checker.
"""
from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")      # as in lab.py; the kernels inherit it

import nbformat  # noqa: E402
import torch  # noqa: E402
from nbclient import NotebookClient  # noqa: E402
from nbclient.exceptions import CellExecutionError  # noqa: E402

HERE = Path(__file__).parent
SECONDS = 60
LONGER = {"11": 120, "13": 120}      # they train twice and more
YARDSTICK = 0.1         # seconds that the work of `slower` takes on the quiet machine that the limits are for
BYTES = 500_000
NUMBER = re.compile(r"^\[=\] (.*): (.*)$", re.M)


def texts(notebook: nbformat.NotebookNode, stream: str = "stdout") -> list[str]:
    """Collect what each code cell printed."""
    return ["".join(o["text"] for o in cell.get("outputs", ()) if o.output_type == "stream" and o.name == stream)
            for cell in notebook.cells if cell.cell_type == "code"]


def numbers(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Collect {name: value} of every line that lab.number printed."""
    return {name: value for text in texts(notebook) for name, value in NUMBER.findall(text)}


def same(a: str, b: str) -> bool:
    """Tell whether two values are equal, or numbers within one percent: another processor adds in another order."""
    try:
        return a == b or math.isclose(float(a), float(b), rel_tol=0.01)
    except ValueError:
        return False


def slower() -> float:
    """Tell how many times slower this machine is just now than a quiet laptop, at training and at Python's own."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))
    x = torch.randn(512, 256)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(10):
            model(x).square().mean().backward()
            sorted(str(i) for i in range(4000))
        times.append(time.perf_counter() - start)
    return max(1.0, statistics.median(times) / YARDSTICK)


def execute(path: Path) -> tuple[nbformat.NotebookNode, float]:
    """Run a notebook in a fresh kernel; return (the notebook with its outputs, seconds)."""
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    NotebookClient(notebook, timeout=300, kernel_name="python3", extra_arguments=["--log-level=ERROR"],
                   resources={"metadata": {"path": str(HERE)}}).execute()
    return notebook, time.perf_counter() - start


def problems(path: Path, write: bool = False) -> list[str]:
    """Run one notebook and list everything that is wrong with it."""
    committed = nbformat.read(path, as_version=4)
    found = []
    before = slower()
    try:
        fresh, seconds = execute(path)
    except CellExecutionError as error:
        return [f"a cell failed: {str(error)[-600:]}"]
    times = (before + slower()) / 2
    limit = times * LONGER.get(path.name[:2], SECONDS)
    if seconds > limit:
        found.append(f"took {seconds:.0f} s, the limit is {limit:.0f} on a machine {times:.1f} times slower than a "
                     "quiet laptop; make it shorter, or run it again when the machine is quiet")
    found += [f"wrote to stderr: {text.strip()[:200]}" for text in texts(fresh, "stderr") if text.strip()]
    then = numbers(committed)
    now = numbers(fresh)
    if not write:
        found += [f"{name!r} was {then.get(name)}, now {now.get(name)}" for name in then.keys() | now.keys()
                  if not same(then.get(name, "not there"), now.get(name, "not there"))]
    exercises = sum(text.count("[ ] not attempted yet") for text in texts(fresh))
    if write and not found:
        for cell in fresh.cells:
            cell.metadata.pop("execution", None)        # times of the run: a diff for nothing
        nbformat.write(fresh, path)
    size = path.stat().st_size
    if size > BYTES:
        found.append(f"has {size} bytes, the limit is {BYTES}")
    busy = f" (the machine is {times:.1f} times slower than usual)" if times > 1.2 else ""
    print(f"{path.name}: {seconds:.1f} s{busy}, {size / 1e3:.0f} kB, {len(now)} checked numbers, {exercises} exercises"
          f"{', ' + str(len(found)) + ' PROBLEMS' if found else ''}")
    return found


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")))
    parser.add_argument("--write", action="store_true", help="put the outputs into the files")
    args = parser.parse_args(argv)
    for path in args.notebooks:
        if not path.is_file():
            parser.error(f"{path} is no file; name notebooks, or none for all")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the notebooks named on the command line, or all of them; the exit code is 1 if anything is wrong."""
    args = arguments(argv)
    bad = {path: found for path in args.notebooks if (found := problems(path, args.write))}
    for path, found in bad.items():
        for problem in found:
            print(f"{path.name}: {problem}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
