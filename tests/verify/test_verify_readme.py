"""What the README of verify says is recomputed: its commands, options, files and the number of mistakes."""
import re
from pathlib import Path

from weights_tools.verify import __main__ as cli
from weights_tools.verify import mistakes

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "weights_tools" / "verify"
README = (FOLDER / "README.md").read_text("utf-8")


def test_commands_and_options_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"^make (\w+)", README, re.M)) == {"reference", "verify"} <= set(targets)
    assert set(re.findall(r"python -m (\S+)", README)) == {"weights_tools.verify", "weights_tools.verify.mistakes"}
    known = {option for action in cli.parser_of_options()._actions for option in action.option_strings}
    table = set(re.findall(r"`(--[\w-]+)", README[:README.index("## Numbers")]))
    assert table == known - {"-h", "--help", "-p", "--prompt"}


def test_files_are_all_named():
    named = set(re.findall(r"^\| `(\w+\.py)`", README, re.M))
    assert named == {path.name for path in FOLDER.glob("*.py")} - {"__init__.py"}


def test_mistakes_are_counted():
    shown = [mistake.shown for mistake in mistakes.MISTAKES]
    assert f"shown by {len(shown)} planted mistakes" in README
    assert f"Float32 shows {shown.count('float32')}." in README
    assert (shown.count("bfloat16"), shown.count("quiet"), shown.count("long")) == (5, 1, 2)
    assert f"[The {len(mistakes.planted(mistakes.RUNS)) - len(mistakes.RUNS)}\nof a Qwen2 decoder" in README
    assert "Five show only in half precision" in README and "One, the eps of LayerNorm" in README
    assert f"shown by {len(shown)} planted mistakes" in (ROOT / "README.md").read_text("utf-8")
