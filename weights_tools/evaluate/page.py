"""One HTML page with questions, their pictures, and what was answered: what a run got right and wrong, to look at.

The page holds everything, small pictures too, and fetches nothing: its policy forbids all but its own style and script,
which are named in it by their digests. Texts are shown as texts, whatever they hold.
"""
from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tqdm import tqdm

from minivl.limits import InputError
from weights_tools.evaluate import differences
from weights_tools.evaluate.benchmarks import OPTIONS, Answer, Row, Verdict
from weights_tools.evaluate.results import Result, categories
from weights_tools.files import new_file
from weights_tools.mpo.show import small

MOST = 400      # questions on a page, with a picture 20 kB each
READ_BY = {"rule": "read by a rule", "judge": "read by the judge", "nobody": "read by nobody"}
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Item:
    """A question on the page, and what one run, or two, said to it."""
    benchmark: str
    row: Row
    states: tuple[str, ...]                             # words it can be filtered by; the first stands in its head
    said: tuple[tuple[str, Answer, Verdict], ...]       # who, what and how right that is


def state(answer: Answer, verdict: Verdict) -> str:
    """Say in a word or two how right an answer is."""
    if answer.refused is not None:
        return "not asked"
    if verdict.right is None:
        return "cannot be told"
    return "right" if verdict.right == 1 else "wrong" if verdict.right == 0 else "partly right"


def write_report(path: Path, results: Sequence[Result], settings: dict, cells: Sequence[Sequence[str]]):
    """Write the page of a run: the table, what differs from the card, and questions of each benchmark."""
    items = []
    part = []
    for result in results:
        chosen = choose(result, MOST // len(results))
        items += [_item(result, i) for i in chosen]
        if len(chosen) < len(result.rows):
            part.append(f"{len(chosen):,} of {len(result.rows):,} of {result.name}")
    shown = (f"On this page are {', '.join(part)}, evenly from the file, half of them not right if there are as many."
             if part else "All questions are on this page.")
    sections = "".join(
        f"<h3>{_text(result.name)}</h3>{sentences(differences.of_result(result, settings))}"
        f"<details><summary>Parts of the number</summary>{table([[n, f'{v:.1f}'] for n, v in result.numbers.items()])}"
        "</details>" for result in results)
    of_run = sentences(differences.of_run(results, settings))
    head = (f"{table([*zip(*cells)])}<p class=faint>In brackets: the 95 % interval.</p><details><summary>What differs "
            f"from the card's setting, and the parts of each number</summary>{of_run}{sections}</details>"
            f"<p class=faint>{_text(shown)}</p>")
    write(path, f"{settings['checkpoint']}: answers", head, items)


def _item(result: Result, i: int) -> Item:
    answer = result.answers[i]
    verdict = result.verdicts[i]
    states = [state(answer, verdict), READ_BY[verdict.by]]
    if answer.finish_reason == "length":
        states.append("cut at the token limit")
    return Item(result.name, result.rows[i], tuple(states), (("", answer, verdict),))


def choose(result: Result, most: int) -> list[int]:
    """Choose rows to show, evenly from the file: half of them not right, or as many as there are of either."""
    right = [i for i, one in enumerate(result.verdicts) if one.right == 1]
    others = [i for i, one in enumerate(result.verdicts) if one.right != 1]
    of_others = min(len(others), max(most - most // 2, most - len(right)))
    return sorted(evenly(others, of_others) + evenly(right, min(len(right), most - of_others)))


def evenly(numbers: Sequence, most: int) -> list:
    """Take so many, evenly from the whole."""
    return [numbers[i * len(numbers) // most] for i in range(most)]


# ---- the page -------------------------------------------------------------------------------------------------------

def write(path: Path, title: str, head: str, items: Sequence[Item]):
    """Write a page. head: HTML that stands above the questions."""
    style = (HERE / "page.css").read_text("utf-8")
    script = (HERE / "page.js").read_text("utf-8")
    policy = (f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
              "base-uri 'none'; form-action 'none'")
    marks = Marks()
    with new_file(path) as file:
        put = lambda text: file.write(text.encode("utf-8", "replace"))      # JSON can hold half a letter
        put(f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
            f'content="{policy}"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><title>{_text(title)}</title><link rel="icon" '
            f'href="data:,"><style>{style}</style></head><body><header><h1>{_text(title)}</h1>{head}</header>')
        put(marks.form(items))
        put("<main>")
        for number, item in enumerate(tqdm(items, desc=path.name, unit="question", disable=None)):
            put(article(item, marks.of(item), number))
        put(f'<p id="none" hidden>No question is like this.</p></main><script>{script}</script></body></html>\n')


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class Marks:
    """Short names for what questions are filtered by, so that no stranger's text stands in an attribute of theirs."""

    def __init__(self):
        self.names = {}

    def _mark(self, *what: str) -> str:
        return self.names.setdefault(what, f"m{len(self.names)}")

    def of(self, item: Item) -> list[str]:
        """List the marks of a question."""
        return [self._mark("benchmark", item.benchmark),
                *(self._mark("category", item.benchmark, one) for one in dict.fromkeys(categories(item.row))),
                *(self._mark("state", one) for one in item.states)]

    def form(self, items: Sequence[Item]) -> str:
        """Write the filters, each choice with the number of its questions. Without scripts they are not shown."""
        counts = {}
        for item in items:
            for mark in self.of(item):
                counts[mark] = counts.get(mark, 0) + 1
        option = lambda what: (f'<option value="{self.names[what]}">{_text(what[-1])} ({counts[self.names[what]]})'
                               "</option>")
        of = lambda *start: "".join(option(what) for what in self.names if what[:len(start)] == start)
        benchmarks = [what[1] for what in self.names if what[0] == "benchmark"]
        grouped = "".join(f'<optgroup label="{_text(one)}" data-of="{self.names["benchmark", one]}">'
                          f'{of("category", one)}</optgroup>' for one in benchmarks)
        select = lambda name, label, choices: (f'<label>{label} <select id="{name}"><option value="">all</option>'
                                               f"{choices}</select></label>")
        return (f'<form id="filters" role="search" hidden>{select("benchmark", "Benchmark", of("benchmark"))}'
                f'{select("category", "Category", grouped)}{select("state", "Verdict", of("state"))}'
                '<label>Text <input id="text" type="search" autocomplete="off" spellcheck="false"></label>'
                '<output id="count"></output><p class="faint keys"><kbd>j</kbd> next, <kbd>k</kbd> previous question, '
                '<kbd>/</kbd> text</p></form>')


def article(item: Item, marks: Sequence[str], number: int) -> str:
    """Write one question."""
    first, *_ = item.states
    place = ", ".join([item.benchmark, f"index {item.row.index}", *dict.fromkeys(categories(item.row))])
    kind = {"right": "good", "wrong": "bad", "not asked": "bad"}.get(first, "")
    said = "".join(_said(*one) for one in item.said)
    return (f'<article id="q{number}" tabindex="-1" data-marks="{" ".join(marks)}"><h2>{_text(place)} '
            f'<span class="state {kind}">{_text(first)}</span></h2><div class="pictures">{_pictures(item.row)}</div>'
            f'{_question(item.row.fields)}<div class="said{" both" if len(item.said) > 1 else ""}">{said}</div>'
            "</article>\n")


def _question(fields: Mapping[str, str | None]) -> str:
    """Write what the file asks, and the answer that it calls true."""
    parts = [f"<p class=words dir=auto>{_text(fields[name])}</p>" for name in ("hint", "question", "choices")
             if fields.get(name)]
    options = [letter for letter in OPTIONS if fields.get(letter) is not None]
    truth = fields.get("answer_option") or fields.get("answer") or "not known"
    mark = lambda letter: " class=truth" if letter == truth else ""
    item = lambda letter: f"<li{mark(letter)}><b>{letter}.</b> {_text(fields[letter])}</li>"
    if options:
        parts.append(f"<ul class=options dir=auto>{''.join(map(item, options))}</ul>")
    if truth not in options:
        parts.append(f"<p><span class=faint>Truth</span> <bdi>{_text(truth)}</bdi></p>")
    return "".join(parts)


def _said(who: str, answer: Answer, verdict: Verdict) -> str:
    """Write what one run answered, and what the scorer made of it."""
    name = f"<h3>{_text(who)}: {_text(state(answer, verdict))}</h3>" if who else ""
    kind = {1: "good", 0: "bad"}.get(verdict.right, "")
    if answer.refused is not None:
        return f'<div class="one bad">{name}<p class=words>Not asked: {_text(answer.refused)}</p></div>'
    found = "nothing" if verdict.extracted is None else verdict.extracted
    by = {"rule": "by a rule", "judge": "by the judge", "nobody": ""}[verdict.by]
    partly = f"; worth {verdict.right:g}" if verdict.right not in (None, 0, 1) else ""
    note = f'<p class=faint><bdi>{_text(verdict.note)}</bdi></p>' if verdict.note else ""
    more = [("All that it said", answer.said)] if answer.said is not None else []
    more.append(("As it was asked", answer.question))
    details = "".join(f"<details><summary>{label}</summary><pre dir=auto>{_text(text)}</pre></details>"
                      for label, text in more)
    cut = ", cut at the limit" if answer.finish_reason == "length" else ""
    tiles = " + ".join(map(str, answer.tiles)) or "none"
    return (f'<div class="one {kind}">{name}<pre dir=auto>{_text(answer.prediction or "")}</pre><p><span '
            f"class=faint>Read in it</span> <bdi>{_text(found)}</bdi> <span class=faint>{by}{partly}</span></p>{note}"
            f"{details}<p class=faint>{answer.tokens:,} tokens{cut}, tiles {tiles}, {answer.seconds:.1f} s</p></div>")


def _pictures(row: Row) -> str:
    """Write the pictures of a row, or why there are none."""
    try:
        return "".join(small(image, f"picture {k}", quality=80) for k, image in enumerate(row.pictures(), start=1))
    except InputError as error:
        return f'<p class="faint words">{_text(error)}</p>'


def table(lines: Sequence[Sequence[str]]) -> str:
    """Write a table whose first row is its head, where it has more than two columns."""
    head = len(lines) and len(lines[0]) > 2
    cell = lambda tag, text: f"<{tag}>{_text(text)}</{tag}>"
    row = lambda tag, line: f"<tr>{cell('th', line[0])}{''.join(cell(tag, one) for one in line[1:])}</tr>"
    return (f'<div class="wide" tabindex="0"><table>{row("th", lines[0]) if head else ""}'
            f'{"".join(row("td", line) for line in lines[head:])}</table></div>')


def sentences(said: Sequence[str]) -> str:
    """Write sentences as a list."""
    return f"<ul>{''.join(f'<li>{_text(one)}</li>' for one in said)}</ul>"


def _text(text: object) -> str:
    """Write any text so that HTML shows it."""
    return escape(str(text))
