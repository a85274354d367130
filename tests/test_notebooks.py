"""Notebooks without running them: their form, and our own solutions through the checker. `make notebooks` runs them."""
import json
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import minivl

FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
sys.path.insert(0, str(FOLDER))
import lab  # noqa: E402
import solutions  # noqa: E402


def cells(path, kind):
    return ["".join(c["source"]) for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == kind]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_form(path):
    """The contract of a notebook, as far as a program can read it."""
    text, code = cells(path, "markdown"), cells(path, "code")
    lines = [[line for line in c.splitlines() if line.strip()] for c in code]
    assert len(text) + len(code) <= 40 and sum(map(len, lines)) <= 200
    assert max(map(len, lines)) <= 15 and max(len(line) for cell in lines for line in cell) <= 105
    assert sum(len(t.split()) for t in text) <= 1200
    first, last = text[0], text[-1]
    assert re.match(r"# \d\d · .*\?\n|# 00 · A picture becomes words\n", first)
    assert all(word in first for word in ("**You need**", "**You read**", "**Time**", "GB of memory", "Letters:"))
    assert "## Now you can" in last and "*Exact here:*" in last
    whole = "\n".join(text)
    predictions = [int(n) for n in re.findall(r"\*\*Predict \((\d)\)", whole)]
    assert len(predictions) >= 3 and predictions == list(range(1, len(predictions) + 1))
    assert whole.count("*Look at:*") >= 3 and "## What breaks" in whole and "Reference:" in last + "".join(text)
    assert "$" in whole and "Simplified" in whole and "lab.source(" in "".join(code) and "lab.check(" in "".join(code)
    assert re.search("[Tt]oy\\b", whole + "".join(code)) or path.stem.startswith("00")
    assert "show.strip(STAGES" in "".join(code)
    for link in re.findall(r"\]\(([^)#]+)\)", whole):
        assert link.startswith("http") or (path.parent / link).exists(), link
    graded = [re.findall(r"lab\.grade\((\w+)\)", c) for c in code]
    assert sum(map(len, graded)) == 4
    for names, source in zip(graded, code):
        for name in names:
            assert f"def {name}(" in source and "raise NotImplementedError" in source and name in solutions.EXERCISES


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_committed_outputs(path):
    """Complete, in order, without errors, warnings, paths of a machine or progress bars."""
    data = json.loads(path.read_text("utf-8"))
    code = [c for c in data["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 500_000
    outputs = [o for c in code for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    shown = json.dumps([{k: v for k, v in o.items() if k != "data"} for o in outputs])
    assert "/home/" not in shown and "/tmp/" not in shown and "it/s]" not in shown
    assert sum("[ ] not attempted yet" in "".join(o.get("text", "")) for o in outputs) == 4


# The forms that JupyterLab 4 shows of a notebook which it did not run; it drops SVG, scripts and styles.
UNTRUSTED = {"text/plain", "text/html", "text/markdown", "text/latex", "image/png", "image/jpeg"}


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_committed_outputs_show_without_trust(path):
    """Drawings as pictures with words for them; sources whose lines scroll; a slider says that it needs a kernel."""
    cells = [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    outputs = [o for c in cells for o in c["outputs"] if "data" in o]
    drawings = 0
    for o in outputs:
        forms = {form: "".join(v) for form, v in o["data"].items() if not form.endswith("+json")}
        assert set(forms) <= UNTRUSTED and "image/svg+xml" not in json.dumps(o)
        if len(forms) < len(o["data"]):
            assert set(forms) == {"text/plain"} and re.match(r"\[slider for .* run this notebook", forms["text/plain"])
        if forms["text/plain"].startswith("[drawing: "):
            drawings += 1
            assert set(forms) == {"text/plain", "image/png"}
            facts = o["metadata"]["image/png"]
            assert forms["text/plain"] == f"[drawing: {facts['alt']}]" and facts["width"] <= 860
        if html := forms.get("text/html"):
            assert html.startswith("<pre style=") and "overflow-x: auto" in html
            assert not re.search(r"<(script|style|svg)|class=", html)
        assert " at 0x" not in forms["text/plain"] or "image/png" in forms
    assert drawings == sum(bool(re.search(r"(?m)^(show\.|drawing$)", "".join(c["source"]))) for c in cells)


@pytest.mark.parametrize("name", solutions.EXERCISES)
def test_solutions(name, monkeypatch, capsys):
    exercise = solutions.EXERCISES[name]

    def attempt(*_):
        raise NotImplementedError
    attempt.__name__ = name
    lab.grade(attempt)
    assert capsys.readouterr().out == "[ ] not attempted yet\n"
    monkeypatch.setenv("MINIVL_SOLUTIONS", "1")
    lab.grade(attempt)
    cases = exercise.cases() if callable(exercise.cases) else exercise.cases
    assert f"[x] right in {len(cases)} of" in capsys.readouterr().out
    assert exercise.hint.endswith((".", "?"))


def test_a_wrong_attempt_is_told_where_and_hinted_at_the_second_time(capsys):
    def stitch(pixel_values, columns, rows):
        return solutions.stitch(pixel_values, columns, rows).flip(2)
    lab._failures.clear()
    lab.grade(stitch)
    first = capsys.readouterr().out
    assert "first difference at [0, 0, 0]" in first and "Hint" not in first
    lab.grade(stitch)
    assert "Hint: Drop the thumbnail" in capsys.readouterr().out

    def tiles_of(width, height, max_num):
        return width / height
    lab.grade(tiles_of)
    assert "tiles_of(800, 600, 12): gave 1.33" in capsys.readouterr().out

    def top_p(probs, p):
        return 1 / 0
    lab.grade(top_p)
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_model_must_be_put_back(capsys):
    def averaged(pipe, question, picture):
        answer = solutions.averaged(pipe, question, picture)
        pipe.model.visual_tokens = lambda pixel_values: torch.ones(len(pixel_values), 16, 256)
        return answer
    lab.grade(averaged)
    assert "the model stays changed" in capsys.readouterr().out
    assert "visual_tokens" not in vars(solutions.nano().model)


def test_slider(monkeypatch):
    seen = []
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    lab.slider(lambda layer, share: seen.append((layer, share)), layer=(0, 3, 1, 2), share=(0.0, 1.0, 0.1, 0.5))
    assert seen == [(2, 0.5)]
    assert shown[0]["text/plain"] == "[slider for layer (0 to 3) and share (0.0 to 1.0): run this notebook to drag it]"
    assert "application/vnd.jupyter.widget-view+json" in shown[0]


def test_card(capsys):
    lab.card("pictures exchanged")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 5
    for line in lines:
        assert re.fullmatch(r"pictures exchanged[^:]*: [a-z ]+ [\d.]+ % -> [\d.]+ %", line)


def test_open_counts_the_numbers_in_int4_words(capsys):
    for model in ("nano", "nano-awq"):
        lab.open(model)
        assert capsys.readouterr().out == f"{model}: 4.6 million numbers, tiles of 112 pixels\n"


def test_check(capsys):
    lab.check("equal", torch.ones(2), torch.ones(2))
    assert capsys.readouterr().out == "[x] equal: equal\n"
    with pytest.raises(AssertionError, match="shape"):
        lab.check("x", torch.ones(2), torch.ones(3))
    with pytest.raises(AssertionError, match="allowed 1e-05"):
        lab.check("x", torch.ones(2), torch.tensor([1.0, 1.1]), 1e-5)


def test_the_recorded_layer_has_sinks():
    """What 09 shows of it, and what its file says of itself."""
    with safe_open(lab.PICTURES / "attention-sink.safetensors", "pt") as file:
        facts, q, k, v = file.metadata(), *(file.get_tensor(name).float() for name in "qkv")
    assert (q.shape, k.shape, v.shape) == ((9, 128, 64), (3, 128, 64), (3, 128, 64))
    assert len(json.loads(facts["tokens"])) == 128 and "Apache" in facts["model"]
    scores = (q @ k.repeat_interleave(3, 0).mT / 8).masked_fill(torch.ones(128, 128, dtype=torch.bool).triu(1), -1e9)
    first = scores.softmax(-1)[:, 32:, 0].mean(1)
    assert 0.2 < first.min() < 0.3 and 0.7 < first.max() < 0.8
    assert (3 * v[:, 0].norm(dim=-1) < v.norm(dim=-1).median(1).values).all()


def test_the_recorded_layer_has_outliers():
    """What a notebook about int4 shows of it: channels that are large for all tokens, and a token that is."""
    path = lab.PICTURES / "real-layer.safetensors"
    with safe_open(path, "pt") as file:
        facts, tensors = file.metadata(), {name: file.get_tensor(name).float() for name in file.keys()}    # noqa: SIM118
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "input_layernorm.weight": [576], "self_attn.q_proj.input": [128, 576], "mlp.down_proj.input": [128, 1536],
        "mlp.down_proj.weight": [192, 1536], **{f"self_attn.{name}_proj.weight": [192, 576] for name in "qkv"}}
    assert len(json.loads(facts["tokens"])) == 128 and "Apache" in facts["model"] and "rows" in facts["changed"]
    assert path.stat().st_size < 2_000_000
    x = tensors["self_attn.q_proj.input"].abs()
    assert x.amax(0).argmax() == 247 and x[:, 247].median() > 20 * x.median()
    x = tensors["mlp.down_proj.input"].abs()
    assert x[0, 1229] > 3000 and x[1:].max() < 10 and x.median() < 0.1


def test_changed_numbers_are_noticed():
    import run
    assert run.same("3328", "3328") and run.same("0.5001", "0.5")
    assert not run.same("1", "2") and not run.same("(2, 2)", "(3, 3)")


def test_a_busy_machine_gets_more_time(monkeypatch):
    import run
    assert 1 <= run.slower() < 100
    path = run.HERE / "00_a_picture_becomes_words.ipynb"
    notebook = run.nbformat.read(path, as_version=4)
    monkeypatch.setattr(run, "execute", lambda path: (notebook, 100.0))
    monkeypatch.setattr(run, "slower", lambda: 1.5)
    assert run.problems(path) == ["took 100 s, the limit is 90 on a machine 1.5 times slower than a quiet laptop; make "
                                  "it shorter, or run it again when the machine is quiet"]
    monkeypatch.setattr(run, "slower", lambda: 2.0)
    assert run.problems(path) == []


def test_source_says_where_it_lies():
    """Also in a folder of the package."""
    shown = lab.source(minivl.load_image, "def load_image", "allow_hosts")
    assert re.fullmatch(r"minivl/media/pictures\.py, line \d+", shown.place)
    assert shown.text.startswith("def load_image(")
    html = shown._repr_html_()
    assert re.match(r'<pre style="[^"]*white-space: pre;[^"]*overflow-x: auto', html) and "class=" not in html
    assert unescape(re.sub("<[^>]+>", "", html)) == f"{shown!r}\n"
    assert not hasattr(shown, "_repr_markdown_")


# A notebook's code cells one after the other, on the int4 twin as a large checkpoint is prepared. Each runs in a fork
# of one process, which has torch and its compiler imported: {path: [exit code, end of what was said]}.
PREPARED = """
import ast, json, os, sys, tempfile, traceback
from weights_tools.verify.mistakes import warm_compiler
warm_compiler()
import minivl.fast
minivl.fast.LARGE = 0

def work(path):
    space = {"__name__": "__main__"}
    for cell in json.load(open(path, encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]).replace('MODEL = "nano"', 'MODEL = "nano-awq"'))
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, "cell", "exec"), space)
            if last:
                eval(compile(ast.Expression(last.value), "cell", "eval"), space)
    assert any(type(m).__name__ in ("Int4", "AWQLinear") for m in space["pipe"].model.modules())

found = {}
for path in sys.argv[1:]:
    said = tempfile.TemporaryFile("w+")
    child = os.fork()
    if not child:
        code = 1
        try:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            work(path)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said.seek(0)
    found[path] = code, said.read()[-2000:]
print(json.dumps(found))
"""
ON_THE_4B = [p for p in PATHS if p.stem[:2] not in ("08", "10", "11", "12", "13", "14")]


@pytest.fixture(scope="module")
def prepared():
    """path -> (exit code, what was said at the end) of all of them."""
    env = {**os.environ, "PYTHONPATH": f"{FOLDER.parent}{os.pathsep}{FOLDER}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", PREPARED, *map(str, ON_THE_4B)], cwd=FOLDER, env=env,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the notebooks are run in forks")
@pytest.mark.parametrize("path", ON_THE_4B, ids=lambda p: p.stem)
def test_a_notebook_runs_on_a_prepared_awq_checkpoint(path, prepared):
    """All but 08 and 10 to 14 say that they run on the 4B: every cell, on what minivl.fast makes of such a model."""
    code, said = prepared[str(path)]
    assert code == 0, said
