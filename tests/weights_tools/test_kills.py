"""Killed at any file operation, a tool leaves nothing that looks whole, and ends with the same files when run again."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Tool -> how far from one operation to the next in the ordinary run.
STEPS = {"synthesize": 100, "quantize": 90, "training": 60}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks up folders in /proc")


def killed(folder, **steps) -> dict:
    pairs = [f"{tool}:{step}" for tool, step in steps.items()]
    done = subprocess.run([sys.executable, "-W", "ignore", str(HERE / "kills.py"), str(folder), *pairs],
                          env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_and_run_again(tmp_path):
    for tool, found in killed(tmp_path, **STEPS).items():
        assert found["killed"] >= found["operations"] // STEPS[tool] > 0 and not found["wrong"], (tool, found)


@pytest.mark.slow
@pytest.mark.parametrize(("tool", "step"), [
    ("quantize", 11), ("training", 15), ("synthesize", 30), ("synthesize-bin", 33), ("download", 60), ("nano", 200)])
def test_more_kills(tool, step, tmp_path):
    """At some operations; at each of them: kills.py FOLDER TOOL:1, minutes for each tool."""
    found = killed(tmp_path, **{tool: step})[tool]
    print(tool, found)
    # The hub's client counts its pieces as they come: a killed run may have one less than the whole one.
    assert found["killed"] >= (found["operations"] - 5) // step > 0 and not found["wrong"], found
