"""mistakes: each planted one still fits the source and is caught, at the right stage."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN

from minivl.files.find import SHIPPED
from minivl.tracing import place
from weights_tools.synthesize import synthesize
from weights_tools.verify import compare, mistakes

ROOT = Path(__file__).parents[2]
TIGER = GOLDEN / "tiger.jpeg"
needs_reference = pytest.mark.skipif(not (ROOT / ".reference" / "ready").exists(),
                                     reason="no reference environment, see `make reference`")
needs_nano = pytest.mark.skipif(not SHIPPED["nano"].is_dir(),
                                reason="nano is not trained yet: minivl/nano/float16 is missing")


def test_every_mistake_still_fits_the_source():
    names = {mistake.name for mistake in mistakes.MISTAKES}
    assert len(mistakes.MISTAKES) >= 20 and len(names) == len(mistakes.MISTAKES)
    for mistake in mistakes.MISTAKES:
        assert (mistakes.PACKAGE / mistake.file).read_text().count(mistake.old) == 1, mistake.name
        assert mistake.stage in (*compare.INPUTS, "greedy_scores") or place(mistake.stage)
        assert mistake.shown in mistakes.RUNS


def test_a_precision_takes_the_mistakes_of_what_it_replaces():
    whole = mistakes.planted(mistakes.RUNS)
    assert [shown for mistake, shown in whole if mistake is None] == list(mistakes.RUNS)
    of = {name: [mistake for mistake, _ in mistakes.planted(mistakes.RUNS, None, name) if mistake]
          for name in (mistakes.QWEN2, mistakes.INTERNLM2)}
    assert {*of[mistakes.QWEN2], *of[mistakes.INTERNLM2]} == {*mistakes.MISTAKES}
    assert {mistake.file for mistake in of[mistakes.QWEN2]} & {"qwen2.py", "internlm2.py"} == {"qwen2.py"}
    assert {mistake.file for mistake in of[mistakes.INTERNLM2]} & {"qwen2.py", "internlm2.py"} == {"internlm2.py"}
    exact = mistakes.planted(["float32", "quiet"], "exact")
    assert exact[:2] == [(None, "float32"), (None, "quiet")]
    files = [mistake.file for mistake, _ in exact[2:]]
    assert set(files) == {"vit.py", "qwen2.py", "awq.py"} and len(files) >= 20
    assert not [mistake for mistake, shown in exact if shown == "bfloat16"]


def run(*arguments, json_to) -> tuple:
    """Run the command: (its result, the rows it wrote)."""
    done = subprocess.run([sys.executable, "-m", "weights_tools.verify.mistakes", *map(str, arguments), "--json",
                           str(json_to)], cwd=ROOT, capture_output=True, text=True)
    return done, json.loads(json_to.read_text())


@pytest.mark.slow
@needs_reference
@pytest.mark.parametrize("decoder", [mistakes.QWEN2, mistakes.INTERNLM2])
def test_mistakes_against_transformers(tiny, tmp_path, decoder, warm_reference):
    folder = tiny if decoder == mistakes.QWEN2 else synthesize(tmp_path / "x", "tiny-internlm2", awq=True)
    assert mistakes.decoder_of(folder) == decoder
    done, rows = run(folder, TIGER, json_to=tmp_path / "m.json")
    runs = 3 if decoder == mistakes.QWEN2 else 4
    assert done.returncode == 0 and len(rows) == len(mistakes.planted(mistakes.RUNS, None, decoder)) - 4 + runs


def test_no_traces_is_no_success(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        mistakes.main([str(tiny), str(TIGER), "--traces", str(tmp_path)])
    assert "holds no traces" in capsys.readouterr().err


@pytest.mark.slow
@needs_nano
def test_every_mistake_is_caught_on_the_shipped_model(tmp_path):
    """Against transformers' committed traces, in float32, bfloat16 and the quiet copy; and the page says so."""
    done, rows = run("--nano", "--page", tmp_path / "page.md", json_to=tmp_path / "m.json")
    assert done.returncode == 0 and len(rows) == len(mistakes.planted(mistakes.RUNS[:3])), done.stdout

    def facts(text):    # the first five columns: errors differ a little between machines
        lines = [line for line in text.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:6]] for line in lines]
    committed = facts((ROOT / "weights_tools" / "verify" / "MISTAKES.md").read_text("utf-8"))
    assert committed == facts((tmp_path / "page.md").read_text("utf-8")) and len(committed) == len(rows) + 2


@pytest.mark.slow
@needs_nano
def test_every_mistake_is_caught_on_a_prepared_model(tmp_path):
    """The same for what minivl.fast replaces: decoder, tower and int4 of the shipped model, counted as large."""
    done, rows = run("--nano", "--precision", "exact", json_to=tmp_path / "m.json")
    assert len(rows) == len(mistakes.planted(["float32", "quiet"], "exact"))
    assert done.returncode == 0, done.stdout
