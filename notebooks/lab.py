"""Give every notebook here what it uses: a model, its source code, checked numbers, exercises.

    MODEL = "nano"                      or "nano-awq", a folder, or a hub id such as OpenGVLab/InternVL2_5-4B-MPO-AWQ
    pipe = lab.open(MODEL)              says beforehand what it will take
    lab.source(minivl.tiling.grid)      the package's own lines
    lab.slider(draw, layer=(0, 3, 1, 0))     to drag
    lab.number("tokens", 256)           printed, and compared by `make notebooks` with the number committed here
    lab.grade(my_function)              an exercise: where it first differs, and a hint the second time

torch takes one thread here until a large model is opened: work as small as nano's gains nothing from more, and beside
another program they wait for each other (minivl/fast/threads.py).
"""
from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")     # nothing here needs it
# Where a notebook takes all threads, to train, one that waits sleeps and does not spin. Spinning, two threads beside
# two busy programs took more than ten times as long; asleep they lose their share. Alone both are as fast.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402

import minivl  # noqa: E402
from minivl import EngineConfig  # noqa: E402
from minivl.config import Config  # noqa: E402
from minivl.files.find import SHIPPED  # noqa: E402
from minivl.files.load import WithoutNormal  # noqa: E402

THREADS = torch.get_num_threads()
torch.set_num_threads(1)
SAMPLES = Path(minivl.__file__).parent / "nano" / "samples"
PICTURES = Path(__file__).parents[1] / "tests" / "golden"
LISTING = ("white-space: pre; word-break: normal; overflow-x: auto; margin: 0; padding: 8px; font-family: monospace; "
           "font-size: 13px; line-height: 1.35; color: #1c2733; background-color: #f6f8fa")
_failures = {}


def open(model: str = "nano") -> minivl.Pipeline:
    """Open the pipeline of a checkpoint. For anything but nano it says first what that needs."""
    if model not in SHIPPED:
        print(f"{model}: the 4B needs 5 GB of memory (AWQ) or 15 (bfloat16 files), 3.3 or 7.4 GB of download if it is "
              "not here yet, and on two CPU cores about 10 s to load, 3 s for each tile, 1 s for each 50 tokens of "
              "prompt.")
        torch.set_num_threads(THREADS)
    pipe = minivl.pipeline(model, EngineConfig(precision="exact"))
    config = pipe.model.config
    print(f"{model}: {count(config) / 1e6:,.1f} million numbers, tiles of {config.force_image_size} pixels")
    return pipe


def count(config: Config) -> int:
    """Count the numbers of a model; each int32 word of an int4 checkpoint stands for eight."""
    with torch.device("meta"), WithoutNormal():
        model = minivl.MiniVL(replace(config, quantization_config=None))
    return sum(p.numel() for p in model.parameters())


class Source:
    """Show lines of the package as code."""

    def __init__(self, thing: object, first: str | None = None, last: str | None = None):
        lines, start = inspect.getsourcelines(thing)
        begin = next((i for i, line in enumerate(lines) if first and first in line), 0)
        end = next((i for i, line in enumerate(lines) if last and i >= begin and last in line), len(lines) - 1)
        self.text = inspect.cleandoc("\n" + "".join(lines[begin:end + 1]))
        path = Path(inspect.getsourcefile(thing)).relative_to(Path(minivl.__file__).parents[1])
        self.place = f"{path.as_posix()}, line {start + begin}"

    def _repr_html_(self) -> str:
        """Colour the lines for a notebook, on a card of their own; long ones scroll. JupyterLab would break them, also
        inside words, and keeps only styles that stand in the elements."""
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PythonLexer
        lines = highlight(f"{self!r}\n", PythonLexer(), HtmlFormatter(noclasses=True, nowrap=True))
        return f'<pre style="{LISTING}">{lines}</pre>'

    def __repr__(self) -> str:
        return f"# {self.place}\n{self.text}"


def source(thing: object, first: str | None = None, last: str | None = None) -> Source:
    """Show the source of a function, class or method; with `first` and `last` only from the line that holds one text to
    the line that holds the other."""
    return Source(thing, first, last)


def slider(draw: Callable, **ranges: tuple) -> None:
    """Add a slider for each name=(from, to, step, start); dragging it calls draw(name=value).

    Where no kernel runs, as on GitHub, a sentence says so; the picture above it is all there is to see.
    """
    from IPython.display import display
    from ipywidgets import FloatSlider, IntSlider, interactive
    controls = {}
    for name, (low, high, step, start) in ranges.items():
        kind = IntSlider if isinstance(step, int) else FloatSlider
        controls[name] = kind(value=start, min=low, max=high, step=step, description=name,
                              style={"description_width": "initial"})
    shown = interactive(draw, **controls)._repr_mimebundle_()
    names = " and ".join(f"{name} ({low} to {high})" for name, (low, high, *_) in ranges.items())
    shown["text/plain"] = f"[slider for {names}: run this notebook to drag it]"
    display(shown, raw=True)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draw random numbers float32[shape], the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def number(name: str, value: object) -> None:
    """Print a number that must stay as it is."""
    print(f"[=] {name}: {f'{value:.4g}' if isinstance(value, float) else value}")


def card(change: str) -> None:
    """Print what nano's card says: the rows of its tables whose first cell holds these words."""
    lines = (Path(minivl.__file__).parent / "nano" / "README.md").read_text("utf-8").splitlines()
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and change in cells[0] and len(cells) > 3:
            print(f"{cells[0]}: {cells[1]} {cells[2]} % -> {cells[3]} %")


def check(name: str, got: torch.Tensor | float, want: torch.Tensor | float, tolerance: float = 0.0) -> None:
    """Compare two tensors or numbers that must agree; print the largest difference relative to the largest value."""
    got = torch.as_tensor(got).float()
    want = torch.as_tensor(want).float()
    if got.shape != want.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}")
    scale = max(float(want.abs().max()), 1e-30) if want.numel() else 1.0
    error = float((got - want).abs().max()) / scale if want.numel() else 0.0
    if error > tolerance:
        raise AssertionError(f"{name}: largest difference {error:.3g} of the largest value, allowed {tolerance:.3g}")
    print(f"[x] {name}: {'equal' if error == 0 else f'largest difference {error:.1e} of the largest value'}")


def first_difference(got: object, want: object, tolerance: float) -> str | None:
    """Find where and how two answers differ; None if they agree. A tuple may stand for a list."""
    if isinstance(got, torch.Tensor) or isinstance(want, torch.Tensor):
        if not (isinstance(got, torch.Tensor) and isinstance(want, torch.Tensor)):
            return f"gave {_kind(got)}, wanted {_kind(want)}"
        if got.shape != want.shape:
            return f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
        if got.dtype != want.dtype:
            return f"gave {str(got.dtype)[6:]} numbers, wanted {str(want.dtype)[6:]}"
        a, b = got.double(), want.double()
        allowed = tolerance * float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0
        same = ((a - b).abs() <= allowed) | (a == b) | (a.isnan() & b.isnan())
        if len(bad := (~same).nonzero()):
            at = tuple(bad[0].tolist())
            return f"first difference at {list(at)}: {got[at]:.6g}, wanted {want[at]:.6g}"
        return None
    if isinstance(want, float) and isinstance(got, (int, float)):
        same = math.isclose(got, want, rel_tol=max(tolerance, 1e-9), abs_tol=1e-12) or got != got and want != want
    else:
        lists = isinstance(got, (list, tuple)) and isinstance(want, (list, tuple))
        same = _plain(got) == _plain(want) and (lists or type(got) is type(want))
    if same:
        return None
    kinds = f" ({_kind(got)}, not {_kind(want)})" if type(got) is not type(want) and _plain(got) == _plain(want) else ""
    return f"gave {_brief(got)}, wanted {_brief(want)}{kinds}"


def grade(attempt: Callable) -> None:
    """Try an exercise on its cases. What it must do, the cases and the hint stand in solutions.py under its name.

    An attempt must also leave what it is given as it is. From the second failure on a hint is shown: what is wrong, if
    all answers are those of a known slip (slips.py).
    """
    import solutions
    name = attempt.__name__
    exercise = solutions.EXERCISES[name]
    solving = bool(os.environ.get("MINIVL_SOLUTIONS"))      # the tests send our own solutions through here
    function = exercise.solution if solving else attempt
    on_a_model = callable(exercise.cases)                   # cases that need nano are made when they are asked for
    cases = exercise.cases() if on_a_model else exercise.cases
    before = solutions.fingerprint() if on_a_model else None
    for case in cases:
        want = exercise.spec(*case)
        got, spoilt = _attempt(function, case)
        if isinstance(got, NotImplementedError):
            print("[ ] not attempted yet")
            return
        problems = [_differs(got, want, exercise.tolerance), spoilt]
        stays = on_a_model and solutions.changed(before)
        if stays:
            problems.append("the model stays changed: put back what you replaced (try ... finally)")
            solutions.put_back()
        problem = " and ".join(filter(None, problems))
        if problem and solving:
            raise AssertionError(f"the solution of {name} is wrong: {problem}")
        if problem:
            print(f"[!] {name}{_shown(case)}: {problem}")
            if _failures.get(name):                         # tries it once more, but not what leaves the model changed
                print(f"    Hint: {exercise.hint if stays else _hint(exercise, name, function, cases)}")
            _failures[name] = _failures.get(name, 0) + 1
            return
    print(f"[x] right in {len(cases)} of {len(cases)} cases")


def _attempt(function: Callable, case: tuple) -> tuple:
    """Call a function with copies: its answer, or what it raised; and what it did to them, or None."""
    given = [_copy(value) for value in case]
    try:
        got = function(*given)
    except Exception as error:
        got = error
    names = list(inspect.signature(function).parameters)
    spoilt = [f"`{names[k] if k < len(names) else k}`" for k, (a, b) in enumerate(zip(given, case))
              if isinstance(a, (list, torch.Tensor)) and first_difference(a, b, 0.0)]
    return got, f"it changes {', '.join(spoilt)}, which it was given: work on a copy" if spoilt else None


def _differs(got: object, want: object, tolerance: float) -> str | None:
    """Compare what two functions gave or raised."""
    if isinstance(got, Exception):
        return None if repr(got) == repr(want) else f"{type(got).__name__}: {got}"
    return first_difference(got, want, tolerance)


def _hint(exercise: object, name: str, function: Callable, cases: tuple) -> str:
    """Say what is wrong if every answer is that of a known slip, else what helps most people."""
    import slips
    answers = [_attempt(function, case)[0] for case in cases]
    for slip, words in slips.SLIPS.get(name, ()):
        if not any(_differs(_attempt(slip, case)[0], got, exercise.tolerance) for case, got in zip(cases, answers)):
            return words
    return exercise.hint


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, torch.Tensor) else list(value) if isinstance(value, list) else value


def _plain(value: object) -> object:
    """Turn tuples, and tensors within lists, into lists: what == can compare."""
    return value.tolist() if isinstance(value, torch.Tensor) else [_plain(v) for v in value] if isinstance(
        value, (list, tuple)) else value


def _kind(value: object) -> str:
    return "None" if value is None else "a tensor" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:197]}..."


def _shown(case: tuple) -> str:
    """Write the arguments of a case, none of them long."""
    parts = [f"tensor{list(v.shape)}" if isinstance(v, torch.Tensor) else v.name if isinstance(v, Path) else
             repr(v) if isinstance(v, (str, int, float, list, tuple, bool)) else type(v).__name__ for v in case]
    return f"({', '.join(p if len(p) < 60 else p[:57] + '...' for p in parts)})"


# ---- 08: a hidden mistake -------------------------------------------------------------------------------------------

class Suspect:
    """Change one line of the package and compare nano with the recorded reference, in a process of its own."""
    CODE = """
import json, sys, tempfile
from weights_tools.verify import mistakes
shown = [m for m in mistakes.MISTAKES if m.shown == "float32"]
mistake = shown[int(sys.argv[1]) % len(shown)]
with tempfile.TemporaryDirectory() as folder:
    sys.path.insert(0, str(mistakes.plant(mistake, folder)))
    from weights_tools.verify import compare
    found = compare.compare(sys.argv[2], compare.Recording.open(sys.argv[3]), pictures=[sys.argv[4]]).json()
print(json.dumps({"name": mistake.name, "file": mistake.file, "old": mistake.old, "new": mistake.new, **found}))
"""

    def __init__(self, number: int):
        package = Path(minivl.__file__).parent
        trace = package.parent / "weights_tools" / "verify" / "nano" / "awq" / "float32.safetensors"
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", self.CODE, str(number), str(package / "nano" / "awq"), str(trace),
             str(SAMPLES / "small-print.png")], capture_output=True, text=True, cwd=package.parent)
        if run.returncode:
            raise RuntimeError(run.stderr[-500:])
        self.found = json.loads(run.stdout)

    def stages(self) -> dict:
        """Give the relative error of each stage (None: no number, as for the prompt), in the order of the model, until
        the first that differs by far."""
        return {row["stage"]: row["error"] for row in self.found["rows"]}

    def differs(self, stage: str) -> bool:
        """Tell whether a stage is beyond the tolerance."""
        return not next(row["agrees"] for row in self.found["rows"] if row["stage"] == stage)

    def note(self, stage: str) -> str:
        """Say what the difference of a stage looks like."""
        return next(row["note"] for row in self.found["rows"] if row["stage"] == stage).split("look at ")[0]

    def accuse(self, file: str) -> None:
        """Print whether `file` of the package, the one you suspect, holds the changed line."""
        print("[x] yes: " + self.found["file"] if file.removeprefix("minivl/") == self.found["file"] else
              f"[!] not {file}: which stage is the first that differs, and which file computes it?")

    def reveal(self) -> None:
        """Print the changed line."""
        print(f"{self.found['name']}\n  {self.found['file']}\n- {self.found['old']}\n+ {self.found['new']}")
