"""The tools as commands: one line for an error, help, the end of a pipe."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

import weights_tools
from weights_tools import download, inspect, synthesize

ROOT = Path(__file__).parents[2]


def test_commands_end_in_one_line(tmp_path, capsys):
    assert weights_tools.run(lambda: synthesize.main([str(tmp_path / "x"), "--awq", "--shard-gb", "0.0003"])) == 0
    assert re.search(r"x: tiny AWQ, random weights of seed 0, 0\.001 GB, [\d.]+ s\n$", capsys.readouterr().out)
    assert weights_tools.run(lambda: synthesize.main([str(tmp_path / "x")])) == 2
    assert re.fullmatch(r"error: .* already holds weights .*\n", capsys.readouterr().err)
    assert weights_tools.run(lambda: inspect.main([str(tmp_path)])) == 2
    assert re.fullmatch(r"error: .* has no weights; .*\n", capsys.readouterr().err)

    def interrupted():
        raise KeyboardInterrupt
    assert weights_tools.run(interrupted) == 130


@pytest.mark.parametrize("tool", [synthesize, inspect, download])
def test_help(tool, capsys):
    with pytest.raises(SystemExit) as exit:
        tool.main(["--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and out.startswith(f"usage: python -m {tool.__name__}")
    assert tool.__doc__.splitlines()[0] in " ".join(out.split())       # whose lines may be broken


def test_reader_of_a_pipe_may_leave(made):
    done = subprocess.run(f"{sys.executable} -W ignore -m weights_tools.inspect {made('awq')} | head -1", shell=True,
                          cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("tensor") and not done.stderr
