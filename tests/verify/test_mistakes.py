"""mistakes: each planted one still fits the source and is caught, at the right stage."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN

from minivl.checkpoint import SHIPPED
from minivl.tracing import place
from weights_tools.verify import compare, mistakes

ROOT = Path(__file__).parents[2]
TIGER = GOLDEN / "tiger.jpeg"
needs_reference = pytest.mark.skipif(not (ROOT / ".reference" / "ready").exists(),
                                     reason="no reference environment, see `make reference`")
needs_nano = pytest.mark.skipif(not SHIPPED["nano"].is_dir(),
                                reason="nano is not trained yet: minivl/nano/float16 is missing")


def test_every_mistake_still_fits_the_source():
    assert len(mistakes.MISTAKES) >= 20 and len({m.name for m in mistakes.MISTAKES}) == len(mistakes.MISTAKES)
    for mistake in mistakes.MISTAKES:
        assert (mistakes.PACKAGE / mistake.file).read_text().count(mistake.old) == 1, mistake.name
        assert mistake.stage in (*compare.INPUTS, "greedy_scores") or place(mistake.stage)
        assert mistake.shown in ("float32", "bfloat16", "quiet")


@needs_reference
def test_mistakes_against_transformers(tiny, tmp_path):
    done = subprocess.run([sys.executable, "-m", "weights_tools.verify.mistakes", str(tiny), str(TIGER), "--json", str(tmp_path / "m.json")],
                          cwd=ROOT, capture_output=True, text=True)
    rows = json.loads((tmp_path / "m.json").read_text())
    assert done.returncode == 0 and len(rows) == len(mistakes.MISTAKES) + 3, done.stdout


def test_no_traces_is_no_success(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        mistakes.main([str(tiny), str(TIGER), "--traces", str(tmp_path)])
    assert "holds no traces" in capsys.readouterr().err


@needs_nano
def test_every_mistake_is_caught_on_the_shipped_model(tmp_path):
    """Against transformers' committed traces, in float32, bfloat16 and the quiet copy; and the page says what was found."""
    done = subprocess.run([sys.executable, "-m", "weights_tools.verify.mistakes", "--nano", "--json", str(tmp_path / "m.json"), "--page",
                           str(tmp_path / "page.md")], cwd=ROOT, capture_output=True, text=True)
    rows = json.loads((tmp_path / "m.json").read_text())
    assert done.returncode == 0 and len(rows) == len(mistakes.MISTAKES) + 3, done.stdout

    def facts(text):    # the first five columns: errors differ a little between machines
        return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:6]] for line in text.splitlines() if line.startswith("|")]
    committed = (ROOT / "weights_tools" / "verify" / "MISTAKES.md").read_text("utf-8")
    assert facts(committed) == facts((tmp_path / "page.md").read_text("utf-8")) and len(facts(committed)) == len(rows) + 2
