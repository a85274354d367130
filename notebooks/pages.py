"""Write the notebooks as pages that need no network: `make html`.

    python notebooks/pages.py [--out build/html] [NOTEBOOK ...]

nbconvert's own pages load MathJax, and more, from elsewhere. Here each formula becomes MathML, which browsers draw.
"""
from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import nbformat
from jinja2 import DictLoader
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

FOLDER = Path(__file__).parent
EMPTY = ("html_head_js", "jupyter_widgets", "html_head_js_mathjax", "html_head_js_mermaidjs")       # what loads scripts
TEMPLATE = "{% extends 'index.html.j2' %}" + "".join(f"{{% block {name} %}}{{% endblock %}}" for name in EMPTY) + """
{% block html_head_css %}<style>math { font-family: FONTS; }</style>{% endblock %}
{% block data_png scoped %}
<div class="jp-RenderedImage jp-OutputArea-output">
{% set about = output | get_metadata('alt', 'image/png') or output.data['text/plain'] %}
{% set width = output | get_metadata('width', 'image/png') %}
<img src="data:image/png;base64,{{ output.data['image/png'] }}" alt="{{ about | escape_html }}"
 {% if width %}width="{{ width }}"{% endif %}>
</div>
{% endblock data_png %}
""".replace("FONTS", "'STIX Two Math', 'Cambria Math', 'Latin Modern Math', 'DejaVu Math TeX Gyre', math")

def mathml(tex: str, display: str) -> str:
    """Make MathML of a formula, "inline" or a "block" of its own.

    Two things the converter leaves out: room around names of functions, and that an escaped _ within words is a _.
    """
    tex = re.sub(r"(\\(?:cos|sin|log))(?![A-Za-z])", r"\\,\1\\,", tex)
    tex = re.sub(r"\\text\{[^{}]*\}", lambda words: re.sub(r"\\([_%&#$])", r"\1", words[0]), tex)
    return convert(tex, display=display)


class Renderer(IPythonRenderer):
    """Markdown to HTML, TeX to MathML."""

    def inline_math(self, body: str) -> str:
        return mathml(body, "inline")

    def block_math(self, body: str) -> str:
        return mathml(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")


def markdown(source: str) -> str:
    """Make HTML of a cell of words."""
    return MarkdownWithMath(renderer=Renderer(escape=False)).render(source)


def page(notebook: Path) -> str:
    """Make one HTML page of a notebook, with its outputs and everything it shows."""
    exporter = HTMLExporter(
        extra_loaders=[DictLoader({"offline.html.j2": TEMPLATE})], template_file="offline.html.j2",
        filters={"markdown2html": markdown})
    about = {"metadata": {"name": notebook.stem, "path": str(notebook.parent)}}
    cells = nbformat.read(notebook, as_version=4)
    cells.metadata.pop("widgets", None)     # a slider needs a kernel, as its words say
    for output in (output for cell in cells.cells for output in cell.get("outputs", ())):
        output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return exporter.from_notebook_node(cells, about)[0]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="notebooks/pages.py", description="Write notebooks as pages for no network.")
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("[0-9]*.ipynb")))
    parser.add_argument("--out", type=Path, default=FOLDER.parent / "build" / "html")
    return parser.parse_args(argv)


def main() -> None:
    """Write build/html/*.html."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    for notebook in args.notebooks:
        path = args.out / f"{notebook.stem}.html"
        path.write_text(page(notebook), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
