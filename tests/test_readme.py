"""What the README says is run or recomputed: its Python, its memory table, its files and its commands."""
import re
import shlex
from pathlib import Path

import torch

import minivl
from minivl.__main__ import main
from minivl.config import Config
from weights_tools.synthesize import config_json

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_examples_run(monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    monkeypatch.chdir(ROOT)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert out.startswith("In the top left corner there is a large red star, ")
    assert "The heart is in the bottom right corner." in out
    assert "torch.Size([1, 65, 160]) torch.Size([1, 16, 256])" in out


def test_command_lines_run(monkeypatch, capsys):
    """Those that need no download and no terminal."""
    monkeypatch.chdir(ROOT)
    lines = re.findall(r"^\.venv/bin/python -m minivl (chat .*nano/.* -p .*)$", README, re.M)
    assert len(lines) >= 2
    for line in lines:
        assert main(shlex.split(line)) == 0
        assert capsys.readouterr().out.strip()


def weights(size, awq):
    """(bytes in the file, bytes in memory with float32 compute)"""
    with torch.device("meta"):
        state = minivl.MiniVL(Config.from_json(config_json(size, awq=awq))).state_dict()
    kept = sum(t.nbytes if not t.is_floating_point() else 2 * t.numel() for n, t in state.items()
               if n.endswith((".qweight", ".qzeros", ".scales")))
    floats = sum(t.numel() for n, t in state.items() if not n.endswith((".qweight", ".qzeros", ".scales")))
    return kept + 2 * floats, kept + 4 * floats


def test_memory_table():
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")]
            for line in README.splitlines() if re.match(r"\| \d+B \|", line)]
    assert [row[0] for row in rows] == ["1B", "4B", "38B", "78B"]
    for size, _, file, cpu, gpu, *awq in rows:
        numbers = [f"{n / 1e9:.2f}" for n in weights(size, False)]
        assert [file, cpu, gpu] == [*numbers, numbers[0]], size
        if size != "1B":
            numbers = [f"{n / 1e9:.2f}" for n in weights(size, True)]
            assert awq == [*numbers, numbers[0]], size
    llm = config_json("4B")["llm_config"]
    cache = 2 * llm["num_hidden_layers"] * llm["num_key_value_heads"] * 128 * 4
    assert f"{cache / 1e3:.0f} kB a token" in README


def test_reading_order_names_every_file():
    named = set(re.findall(r"^\| `((?:minivl|weights_tools)/[\w/]+\.py)`", README, re.M))
    there = {str(path.relative_to(ROOT))
             for folder in ("minivl", "weights_tools") for path in (ROOT / folder).rglob("*.py")}
    assert named == {name for name in there if not name.endswith("__init__.py")}


def test_commands_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make (\w+)", README, re.M)) == {"demo", "test", "reference", "verify"} <= targets
    for module in set(re.findall(r"python -m (\S+)", README)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_limits_are_all_in_one_table():
    for name in ("picture_bytes", "picture_pixels", "aspect_ratio", "tiles_per_picture", "pictures", "prompt_chars",
                 "new_tokens"):
        assert hasattr(minivl.Limits(), name)
