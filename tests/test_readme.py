"""What the READMEs say is run or recomputed: Python, commands, the memory table, file tables, links."""
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

import minivl
from minivl.__main__ import main
from minivl.choose import weights
from minivl.family import IN_INT4, SIZES
from weights_tools.synthesize import config_json

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
# Each folder's own README; the notes of a trained nano and of what was tried are about the past.
GUIDES = [ROOT / "README.md", *sorted((ROOT / ".github").glob("*.md")), ROOT / "tests" / "fuzz" / "README.md",
          *sorted(path for folder in ("minivl", "weights_tools") for path in (ROOT / folder).rglob("README.md"))]
each_guide = pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))


def test_python_examples_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for folder in (ROOT, ROOT / "minivl"):
        blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.S)
        assert len(blocks) == 1
        exec(compile(blocks[0], "README.md", "exec"), {})
    out = capsys.readouterr().out
    answer = out.splitlines()[0]
    assert answer.startswith("In the top left corner there is a large red star, ")
    assert "The heart is in the bottom right corner." in out
    assert "torch.Size([1, 65, 160]) torch.Size([1, 16, 256])" in out
    quoted = " ".join(line.removeprefix(">").strip() for line in README.splitlines() if line.startswith(">"))
    assert quoted.split() == f"describe this image *{answer}*".split()


def test_command_lines_run(monkeypatch, capsys):
    """Those that need no download and no terminal."""
    monkeypatch.chdir(ROOT)
    lines = [shlex.split(line) for line in re.findall(r"^\.venv/bin/minivl (chat .*nano/.* -p .*)$", README, re.M)]
    assert len(lines) >= 2
    for line in lines:
        assert main(line) == 0
        assert capsys.readouterr().out.strip()
    assert '\nminivl = "minivl.__main__:main"\n' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_memory_table():
    lines = [line for line in README.splitlines() if re.match(r"\| \d+B \|", line)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == [*SIZES]
    for size, parts, *cells, _ in rows:
        tower, decoder = SIZES[size]
        base = re.sub(r".*/|-(Instruct|chat)$", "", decoder["_name_or_path"])
        assert parts.lower() == f"{base.replace('internlm2_5', 'internlm2.5').replace('_', '.')}, {tower}".lower()
        wanted = [f"{n / 1e9:.2f}" for sums in (weights(size), weights(size, awq=True))
                  for n in (sums.half, sums.float32)]
        assert cells == (wanted if size in IN_INT4 else [*wanted[:2], "not released", ""]), size
    llm = config_json("4B")["llm_config"]
    cache = 2 * llm["num_hidden_layers"] * llm["num_key_value_heads"] * 128 * 4
    assert f"{cache / 1e3:.0f} kB a token" in README


@pytest.mark.parametrize("folder", ["minivl", "weights_tools"])
def test_every_file_is_named_once(folder):
    """A folder's README has a table of its files and of those in folders below that have no README of their own."""
    named = []
    for guide in (ROOT / folder).rglob("README.md"):
        files = re.findall(r"^\| `([\w/]+\.py)`", guide.read_text("utf-8"), re.M)
        named += [(guide.parent / file).relative_to(ROOT) for file in files]
    there = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted(there)


def test_notebooks_and_their_minutes():
    """The table's minutes are those that the notebooks themselves state."""
    rows = re.findall(r"^\| \[(\d\d) [^]]+\]\((notebooks/\S+)\) \| [^|]+ \| (\d+) \+ (\d+) \|$", README, re.M)
    assert [file for _, file, *_ in rows] == sorted(f"notebooks/{p.name}" for p in (ROOT / "notebooks").glob("*.ipynb"))
    for number, file, reading, exercises in rows:
        data = json.loads((ROOT / file).read_text("utf-8"))
        text = ["".join(cell["source"]) for cell in data["cells"] if cell["cell_type"] == "markdown"]
        time = re.search(r"\*\*Time\*\* \| (\d+) minutes to read, (\d+) seconds to run,", text[0])
        each = re.findall(r"^\*\*\d · [^*(]+\((\d+) minutes", "\n".join(text), re.M)
        assert (int(reading), int(exercises), len(each)) == (int(time[1]), sum(map(int, each)), 4), number
        assert int(time[2]) < (120 if number == "11" else 60), number
    assert "runs offline in under a minute (11: two)" in README


def test_readme_shows_these_targets():
    assert set(re.findall(r"^make ([\w-]+)", README, re.M)) == {"demo", "test", "reference", "verify"}


@each_guide
def test_commands_exist(guide):
    text = guide.read_text("utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.M)) <= targets
    for module in set(re.findall(r"python -m (\w+(?:\.\w+)*)", text)):
        spec = importlib.util.find_spec(module)
        assert spec, module
        assert not spec.submodule_search_locations or importlib.util.find_spec(f"{module}.__main__"), module


@each_guide
def test_links_lead_somewhere(guide):
    text = guide.read_text("utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text):
        if link.startswith("http"):
            continue
        path, _, section = link.partition("#")
        to = guide.parent / path
        assert to.exists(), link
        if section:
            headings = [heading.lower() for heading in re.findall(r"^#+ (.*)", to.read_text("utf-8"), re.M)]
            assert section in {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}, link


def test_security_names_a_test_for_each_promise():
    text = (ROOT / ".github" / "SECURITY.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| **")]
    assert len(rows) > 8
    for row in rows:
        named = re.findall(r"`(tests/[\w/.]+)`", row)
        assert named and all((ROOT / name).exists() for name in named), row
    files = {path.name for path in (ROOT / "tests" / "fuzz").glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.py)`", (ROOT / "tests/fuzz/README.md").read_text("utf-8"))) == files


def test_limits_are_all_in_one_table():
    for name in ("picture_bytes", "picture_pixels", "aspect_ratio", "tiles_per_picture", "pictures", "prompt_chars",
                 "new_tokens"):
        assert hasattr(minivl.Limits(), name)
