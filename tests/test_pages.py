"""`make html`: notebooks as pages that show without a network, formulas as MathML."""
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbconvert", reason="`make setup` installs it with jupyter")
pytest.importorskip("latex2mathml", reason="the extra `html` brings it")
FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
sys.path.insert(0, str(FOLDER))
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JUPYTER_PLATFORM_DIRS", "1")      # else it warns
    import pages


class Seen(HTMLParser):
    """What a page would fetch, its formulas and its words outside of code and formulas."""

    def __init__(self, html):
        super().__init__()
        self.fetched, self.scripts, self.pictures, self.formulas, self.words, self.inside = [], 0, [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.scripts += tag == "script"
        if tag in ("script", "img", "link", "iframe", "source"):
            where = [v for k, v in attrs.items() if k in ("src", "href", "srcset")]
            self.fetched += [v for v in where if not v.startswith("data:")]
        if tag == "img":
            self.pictures.append(attrs.get("alt"))
        if tag == "math":
            self.formulas.append("")
        if tag in ("math", "pre", "code", "style", "script", "title"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if "math" in self.inside:
            self.formulas[-1] += data
        elif not self.inside:
            self.words.append(data)
        elif "style" in self.inside:
            self.fetched += re.findall(r"(?:@import|url\()\s*[\"']?((?!data:|#)[^)\"';\s]+)", data)


def formulas(path):
    """The TeX of each formula of a notebook's words, outside of code."""
    cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
    bare = [re.sub(r"```.*?```|``.*?``|`[^`]*`", "", source, flags=re.S) for source in cells]
    return [m.strip("$") for source in bare for m in re.findall(r"(?<!\\)\$\$.+?\$\$|(?<!\\)\$.+?\$", source, re.S)]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_a_page_needs_no_network_and_shows_its_formulas(path):
    html = pages.page(path)
    seen = Seen(html)
    assert seen.fetched == [] and seen.scripts == 0
    tex = formulas(path)
    assert len(seen.formulas) == len(tex) >= 1
    for source, shown in zip(tex, seen.formulas):       # no command or sign that was not understood
        assert shown.strip() and not re.search(r"[\\{}$]", shown), source
    words = " ".join(seen.words)
    assert "$" not in words and not re.search(r"\\[A-Za-z]{2,}", words)
    fonts = re.findall(r"--jp-code-font-family(?:-default)?:\s*([^;]+);", html)
    assert fonts and all("monospace" in f or f.startswith("var(") for f in fonts)
    cells = nbformat.read(path, 4).cells
    outputs = [o for c in cells for o in c.get("outputs", ()) if "image/png" in o.get("data", ())]
    said = [o.metadata["image/png"]["alt"] for o in outputs if "image/png" in o.metadata]
    assert len(seen.pictures) >= len(outputs) and set(said) <= set(seen.pictures) and all(seen.pictures)


@pytest.mark.parametrize("tex, wanted", [
    (r"$x_i^2$", "msubsup"), (r"$\frac{a}{b}$", "mfrac"), (r"$\sqrt{x}$", "msqrt"), (r"$\text{if } x$", "mtext"),
    ("$$\\begin{cases} a & b \\\\ c & d \\end{cases}$$", "mtable"),
    ("$$\\begin{pmatrix} a & b \\\\ c & d \\end{pmatrix}$$", "mtable"),
    ("\\begin{align} a &= b \\\\ c &= d \\end{align}", "mtable"), (r"$a < b$", "&#x0003C;")])
def test_kinds_of_formulas(tex, wanted):
    html = pages.markdown(f"A line\n\n{tex}\n\nand `$code$`, *words*.")
    assert html.count("<math") == 1 and wanted in html and "<code>$code$</code>" in html and "<em>words</em>" in html
    assert ('display="block"' in html) == (not tex.startswith("$") or tex.startswith("$$"))


def test_words_and_functions_of_a_formula():
    seen = Seen(pages.markdown(r"$\text{max\_num} + \text{50 \%} + x \cos\alpha$"))
    assert all(words in seen.formulas[0].replace("\xa0", " ") for words in ("max_num", "50 %", "cosα"))
    assert pages.mathml(r"x \cos\alpha", "inline").count("<mspace") == 2


def test_files(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a" / "b" / f"{PATHS[0].stem}.html"
    monkeypatch.setattr("sys.argv", ["pages.py", "--out", str(path.parent), str(PATHS[0])])
    pages.main()
    assert capsys.readouterr().out == f"{path}\n" and path.read_text("utf-8").startswith("<!DOCTYPE html>")
