"""One HTML page with a sample of pairs: the pictures, the question, both answers with what differs marked.

    python -m weights_tools.mpo.show pairs.jsonl --html page.html       pictures beside the file, or in --root
    python -m weights_tools.mpo.show meta.json --html page.html -n 40

The page holds everything, small pictures too, and fetches nothing. Texts are shown as texts, whatever they hold.
"""
from __future__ import annotations

import argparse
import base64
import difflib
import io
import random
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from minivl import options
from minivl.limits import InputError
from minivl.media import load_image
from weights_tools import run
from weights_tools.files import write_text
from weights_tools.mpo.mmpr import Rows, pictures, read_datasets

SIDE = 320              # of a picture on the page, at most
CJK = "\u3000-\u9fff\uf900-\ufaff\uff00-\uffef"       # written without spaces: each letter counts as a word
WORD = re.compile(rf"[{CJK}]\s*|[^\s{CJK}]+\s*|\s+")

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
article { border-top: 1px solid #8886; padding: 1rem 0; }
h1, h2, p, pre, li { overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0 0 .5rem; } h3 { margin: 0; font-size: .9rem; }
pre { font: inherit; white-space: pre-wrap; margin: .3rem 0; }
img { max-width: 100%; height: auto; margin: 0 .4rem .4rem 0; vertical-align: top; }
.both { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.both > div { border-left: .3rem solid; padding-left: .7rem; min-width: 0; }
.chosen { border-color: #2a8a4a !important; } .rejected { border-color: #c43a3a !important; }
ins, del { text-decoration: underline 2px; text-underline-offset: 3px; border-radius: 2px; }
ins { background: #2a8a4a38; text-decoration-color: #2a8a4a; }
del { background: #d4303038; text-decoration-style: wavy; text-decoration-color: #c43a3a; }
@media (max-width: 44rem) { .both { grid-template-columns: 1fr; } body { margin: 1rem auto; } }
"""


def difference(chosen: str, rejected: str) -> tuple[str, str]:
    """Write both answers as HTML, the words that only the one has in <ins>, those of the other in <del>."""
    one, other = WORD.findall(chosen), WORD.findall(rejected)
    strip = lambda words: [word.strip() for word in words]
    blocks = difflib.SequenceMatcher(None, strip(one), strip(other), autojunk=False).get_opcodes()
    mark = lambda tag, same, words: escape("".join(words)) if same or not words else _marked(tag, "".join(words))
    return ("".join(mark("ins", kind == "equal", one[a:b]) for kind, a, b, _, _ in blocks),
            "".join(mark("del", kind == "equal", other[a:b]) for kind, _, _, a, b in blocks))


def _marked(tag: str, text: str) -> str:
    words = text.rstrip()       # the mark ends where the words do
    return f"<{tag}>{escape(words)}</{tag}>{text[len(words):]}"


def small(image: Image.Image, name: str, quality: int = 85) -> str:
    """Write a picture as an <img> that holds it as JPEG, at most SIDE pixels wide and high."""
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    url = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    return f'<img src="{url}" width="{image.width}" height="{image.height}" alt="{escape(name)}" decoding="async">'


def article(row: dict, where: str, root: Path) -> str:
    """Write one pair."""
    chosen, rejected = difference(row["chosen"], row["rejected"])
    images = "".join(small(load_image(root / image), Path(image).name) for image in pictures(row))
    truth = f"<p>Known answer: {escape(str(row['answer_gt']))}</p>" if "answer_gt" in row else ""
    return (f"<article><h2>{escape(where)}</h2>{images}<pre>{escape(row['question'])}</pre>{truth}"
            f'<div class="both"><div class="chosen"><h3>chosen</h3><pre>{chosen}</pre></div>'
            f'<div class="rejected"><h3>rejected</h3><pre>{rejected}</pre></div></div></article>')


def page(datasets: Sequence[tuple[str, Path, Rows]], n: int = 20, seed: int = 0) -> str:
    """Write the page: at most n pairs of all, each as likely. datasets: (name, folder of pictures, rows) of each."""
    sizes = [len(rows) for _, _, rows in datasets]
    drawn = sorted(random.Random(seed).sample(range(sum(sizes)), min(n, sum(sizes))))
    articles = []
    for i in tqdm(drawn, desc="pairs", unit="pair", disable=None):
        at = 0
        while i >= sizes[at]:
            i -= sizes[at]
            at += 1
        name, root, rows = datasets[at]
        try:
            articles.append(article(rows[i], f"{name}, line {rows.lines[i]}", root))
        except InputError as error:
            raise rows.wrong(rows.lines[i], str(error)) from None
    table = "".join(f"<li>{escape(name)}: {size:,} pairs</li>" for (name, _, _), size in zip(datasets, sizes))
    text = ("<!doctype html><html lang='en'><head><meta charset='utf-8'><title>pairs</title>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<style>{STYLE}</style></head><body><h1>{len(drawn)} of {sum(sizes):,} pairs</h1><ul>{table}</ul>"
            "<p>What only <ins>the chosen answer</ins> has, and what only <del>the rejected one</del> has.</p>"
            f"{''.join(articles)}</body></html>")
    return text.encode("utf-8", "replace").decode("utf-8")      # JSON can hold half a letter


def arguments(argv: list | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.mpo.show", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("file", metavar="FILE", help="pairs, .jsonl; or a meta.json, for all files it names")
    parser.add_argument("--html", metavar="OUT", required=True, help="the page to write")
    parser.add_argument("--root", metavar="FOLDER", help="where the pictures of a .jsonl are (default: beside it)")
    parser.add_argument("-n", type=int, default=20, help="pairs to show (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default %(default)s)")
    args = parser.parse_args(argv)
    if args.root is not None and not args.file.endswith("jsonl"):
        raise InputError(f"--root has no effect beside {args.file}: a meta.json says itself where the pictures are")
    if args.n < 1:
        raise InputError(f"-n is {args.n}; show 1 pair or more")
    return args


def main(argv: list | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    datasets = read_datasets(args.file, args.root)
    write_text(args.html, page([(one.name, one.root, one.rows()) for one in datasets], args.n, args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
