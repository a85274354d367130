"""Run every notebook as a reader would: python notebooks/run.py [--write] [NOTEBOOK ...]

    a fresh kernel -> all cells in order -> no error, no warning, the committed [=] numbers again,
                                             under 60 s (11: 120) and 500 kB

`--write` puts the outputs into the files (`make notebooks`); without it nothing is changed. tests/test_notebooks.py
sends our own solutions through the checker.
"""
from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent
SECONDS = 60
LONGER = {"11": 120, "13": 120}      # they train twice and more
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
    try:
        fresh, seconds = execute(path)
    except CellExecutionError as error:
        return [f"a cell failed: {str(error)[-600:]}"]
    limit = LONGER.get(path.name[:2], SECONDS)
    if seconds > limit:
        found.append(f"took {seconds:.0f} s, the limit is {limit}")
    found += [f"wrote to stderr: {text.strip()[:200]}" for text in texts(fresh, "stderr") if text.strip()]
    before = numbers(committed)
    now = numbers(fresh)
    if not write:
        found += [f"{name!r} was {before.get(name)}, now {now.get(name)}" for name in before.keys() | now.keys()
                  if not same(before.get(name, "not there"), now.get(name, "not there"))]
    exercises = sum(text.count("[ ] not attempted yet") for text in texts(fresh))
    if write and not found:
        for cell in fresh.cells:
            cell.metadata.pop("execution", None)        # times of the run: a diff for nothing
        nbformat.write(fresh, path)
    size = path.stat().st_size
    if size > BYTES:
        found.append(f"has {size} bytes, the limit is {BYTES}")
    print(f"{path.name}: {seconds:.1f} s, {size / 1e3:.0f} kB, {len(now)} checked numbers, {exercises} exercises"
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
