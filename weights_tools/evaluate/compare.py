"""Two runs beside each other, question by question: did a change hurt, and which answers did it change?

    RUN1, RUN2 -> the questions both were asked -> difference, its interval, McNemar's test -> compare.md .json .html

Both runs answer the same questions, so most of the chance in a score is in both and falls out of the difference: its
interval is narrower than those of the scores, and is what to look at.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from minivl.limits import InputError, clip, is_there
from weights_tools.evaluate import intervals, page, results, score, tsv
from weights_tools.evaluate.benchmarks import Row
from weights_tools.evaluate.differences import FEW
from weights_tools.evaluate.report import COLUMNS, markdown_table, plain
from weights_tools.evaluate.results import Result
from weights_tools.files import write_text

LIKELY = 0.05       # a p-value below it is called unlikely by chance


@dataclass(frozen=True)
class Difference:
    """What one benchmark says of two runs. first, second: scores of the shared questions; None: it cannot be told."""
    benchmark: str
    card: str
    name: str                                   # dataset and settings
    questions: int                              # rows that both were asked and judged
    only_one_asked: int                         # rows left out, for the other run was not asked them
    other_text: tuple                           # indices left out, whose question is not the same in both
    first: float | None
    second: float | None
    difference: float | None                    # second - first
    interval: tuple[float, float] | None        # of the difference, 95 %, by bootstrap over pairs
    units: int                                  # what is right or wrong together: circular groups, figures, or rows
    only_first: int                             # units better in the first run
    only_second: int
    p: float                                    # McNemar's
    changed: tuple                              # indices of rows with another verdict
    reworded: int                               # rows with another answer and the same verdict
    pair: tuple[Result, Result] = field(repr=False, compare=False)      # the shared rows
    draws: torch.Tensor | None = field(repr=False, compare=False)


def compare(run1: str | Path, run2: str | Path) -> list[Difference]:
    """Compare two finished runs by their --out folders, each benchmark that both have.

    Where each run asked a benchmark in one setting, these are compared, though they may differ. Raises InputError where
    a folder holds no run, or the two share no question.
    """
    (first, _), (second, _) = results.read(run1), results.read(run2)
    found = [paired(one, other) for one, other in _pairs(first, second)]
    if not any(one.questions for one in found):
        asked = lambda run: ", ".join(one.name for one in run) or "nothing"
        raise InputError(f"{run1} and {run2} share no question: the one was asked {asked(first)}, the other "
                         f"{asked(second)}; run both with the same --benchmark")
    return found


def _pairs(first: Sequence[Result], second: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Match results by file and setting, or by file where each run has it once."""
    found = []
    for one in first:
        mine = [a for a in first if a.dataset == one.dataset]
        others = [b for b in second if b.dataset == one.dataset]
        same = [b for b in others if b.setting == one.setting]
        if same or len(mine) == len(others) == 1:
            found.append((one, (same or others)[0]))
    return found


def paired(one: Result, other: Result) -> Difference:
    """Compare two results of one file, on the rows that both were asked and that both verdicts are about."""
    places = {str(row.index): i for i, row in enumerate(other.rows)}
    both = [(i, places[str(row.index)]) for i, row in enumerate(one.rows) if str(row.index) in places]
    other_text = [one.rows[i].index for i, j in both if one.rows[i].fields != other.rows[j].fields]
    shared = [(i, j) for i, j in both if one.rows[i].fields == other.rows[j].fields
              and None not in (one.verdicts[i].right, other.verdicts[j].right)]
    first = _part(one, [i for i, _ in shared])
    second = _part(other, [j for _, j in shared])
    units = score.units(one.benchmark, first.rows)
    better = [_compare_unit(first, second, unit) for unit in units]
    only_first = sum(x > 0 for x in better)
    only_second = sum(x < 0 for x in better)
    numbers = dict(first=None, second=None, difference=None, interval=None, draws=None)
    if units:
        numbers = _numbers(first, second)
    rows = list(zip(first.rows, first.answers, second.answers, first.verdicts, second.verdicts))
    settings = one.setting if one.setting == other.setting else f"{one.setting} against {other.setting}"
    return Difference(
        one.benchmark.name, one.benchmark.card, f"{one.dataset}, {settings}", len(shared),
        len(one.rows) + len(other.rows) - 2 * len(both), tuple(other_text), units=len(units), only_first=only_first,
        only_second=only_second, p=intervals.mcnemar(only_first, only_second),
        changed=tuple(row.index for row, _, _, v, w in rows if v.right != w.right),
        reworded=sum(a.prediction != b.prediction and v.right == w.right for _, a, b, v, w in rows),
        pair=(first, second), **numbers)


def _part(result: Result, rows: Sequence[int]) -> Result:
    """Take some rows of a result, with the numbers they give alone."""
    pick = lambda of: [of[i] for i in rows]
    part = replace(result, rows=pick(result.rows), answers=pick(result.answers), verdicts=pick(result.verdicts))
    return replace(part, numbers=score.numbers(result.benchmark, part.rows, part.verdicts))


def _compare_unit(first: Result, second: Result, unit: Sequence[int]) -> float:
    """Tell which run does better in what is right or wrong together: above 0 the first, below 0 the second."""
    worst = lambda result: min(result.verdicts[i].right for i in unit)
    return worst(first) - worst(second)


def _numbers(first: Result, second: Result) -> dict:
    """Compute both scores, their difference and its interval."""
    of_first, of_second = intervals.draws(first.pieces, second.pieces, name=first.name)
    draws = of_second - of_first
    low, high = intervals.middle(draws)
    if torch.equal(first.pieces, second.pieces):
        # Nothing changed in so many pieces; the next one may.
        high = 100 * (1 - (intervals.OUTSIDE / 2) ** (1 / len(first.pieces)))
        low = -high
    return {"first": first.score, "second": second.score, "difference": second.score - first.score,
            "interval": (low, high), "draws": draws}


def average(found: Sequence[Difference]) -> dict | None:
    """Compute the mean difference of eight benchmarks and its interval; None where there are fewer."""
    told = {one.benchmark: one for one in reversed(found) if one.draws is not None}
    if len(told) != len(COLUMNS):
        return None
    mean = lambda values: sum(values) / len(told)
    return {"first": mean(one.first for one in told.values()), "second": mean(one.second for one in told.values()),
            "difference": mean(one.difference for one in told.values()),
            "interval": intervals.middle(torch.stack([one.draws for one in told.values()]).mean(0))}


# ---- what is said ---------------------------------------------------------------------------------------------------

HEAD = ["benchmark", "difference", "first", "second", "only first right", "only second right", "p", "rows",
        "verdicts changed", "other words only"]


def cells(found: Sequence[Difference]) -> list[list[str]]:
    """Fill the cells of the table, the head first."""
    signed = lambda value, ends: f"{value:+.1f} [{ends[0]:+.1f}, {ends[1]:+.1f}]"
    lines = [HEAD]
    for one in found:
        told = (["unknown"] * 3 if one.first is None else
                [signed(one.difference, one.interval), f"{one.first:.1f}", f"{one.second:.1f}"])
        of = "" if one.units == one.questions else f" of {one.units:,}"
        lines.append([one.name, *told, f"{one.only_first:,}{of}", f"{one.only_second:,}{of}",
                      f"{one.p:.2g}" if one.p < 0.1 else f"{one.p:.2f}", f"{one.questions:,}",
                      f"{len(one.changed):,}", f"{one.reworded:,}"])
    mean = average(found)
    if mean:
        lines.append(["mean of eight", signed(mean["difference"], mean["interval"]), f"{mean['first']:.1f}",
                      f"{mean['second']:.1f}", *[""] * (len(HEAD) - 4)])
    return lines


def notes(found: Sequence[Difference], settings1: dict, settings2: dict) -> list[str]:
    """Say how to read the table, in what the runs differ, and what was left out."""
    names = [name for name in {**settings1, **settings2} if settings1.get(name) != settings2.get(name)]
    said = [f"{name}: {settings1.get(name)} in the first run, {settings2.get(name)} in the second." for name in names]
    said.append("Difference: second minus first, with its 95 % interval (bootstrap over pairs). p: how likely so "
                "uneven a split of the changed ones is if both runs are equally good (McNemar's exact test). Other "
                "words only: the answer changed and is judged as before.")
    if any(one.units < one.questions for one in found):
        said.append("Rows that are right or wrong together (a question with its options in every order, all questions "
                    "of a figure) count as one where only one run is right.")
    if len(found) > 1:
        said.append(f"{len(found)} tests: that some p is below {LIKELY} happens in "
                    f"{100 * (1 - (1 - LIKELY) ** len(found)):.0f} of 100 cases though nothing changed.")
    few = [one.name for one in found if 0 < len(one.pair[0].pieces) < FEW]
    if few:
        mean = ", and that of the mean is too narrow" if average(found) else ""
        said.append(f"Fewer than {FEW} independent questions, or groups of them, in {'; '.join(few)}: there the "
                    f"interval is rough{mean}.")
    for one in found:
        if one.only_one_asked:
            said.append(f"{one.name}: {one.only_one_asked:,} rows were asked in one run only and are left out.")
        if one.other_text:
            said.append(f"{one.name}: {len(one.other_text):,} rows do not say the same in both runs' files and are "
                        f"left out ({clip(', '.join(map(str, one.other_text)))}).")
    return said


def table(found: Sequence[Difference]) -> str:
    """Write the table as Markdown."""
    head, *lines = cells(found)
    return markdown_table([head, *([plain(name), *rest] for name, *rest in lines)])


def write(out: Path, run1: str | Path, run2: str | Path) -> str:
    """Compare two runs and write OUT/compare.md, compare.json and compare.html; return what compare.md says."""
    found = compare(run1, run2)
    settings1 = results.read(run1)[1]
    settings2 = results.read(run2)[1]
    said = notes(found, settings1, settings2)
    title = f"{run1} and {run2}"
    text = f"# {plain(title)}\n\n{table(found)}\n{''.join(f'- {plain(one)}' + chr(10) for one in said)}"
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "compare.md", text)
    write_page(out / "compare.html", title, found, said, settings1)
    write_text(out / "compare.json", json.dumps({
        "first": settings1, "second": settings2, "average": average(found), "notes": said,
        "differences": [_as_json(one) for one in found]}, indent=1) + "\n")
    return text


def _as_json(one: Difference) -> dict:
    kept = replace(one, pair=(), draws=None)
    return {name: value for name, value in asdict(kept).items() if name not in ("pair", "draws")}


# ---- the page -------------------------------------------------------------------------------------------------------

def write_page(path: Path, title: str, found: Sequence[Difference], said: Sequence[str], settings: dict):
    """Write the page of what changed: both answers of each question whose verdict is another one."""
    items = []
    for one in found:
        most = page.MOST // len(found)
        items += _items(one, page.evenly(one.changed, min(most, len(one.changed))), settings)
    head = (f"{page.table(cells(found))}{page.sentences(said)}<p class=faint>On this page: {len(items):,} of "
            f"{sum(len(one.changed) for one in found):,} questions whose verdict changed.</p>")
    page.write(path, title, head, items)


def _items(one: Difference, indices: Sequence[int | str], settings: dict) -> list[page.Item]:
    """Put both answers to each of these questions beside each other."""
    first, second = one.pair
    chosen = {str(index) for index in indices}
    pictures = _pictures(first, chosen, settings)
    items = []
    for i, row in enumerate(first.rows):
        if str(row.index) in chosen:
            of = [(result.answers[i], result.verdicts[i]) for result in one.pair]
            better, worse = ("first", "second") if of[0][1].right > of[1][1].right else ("second", "first")
            only = {of[0][1].right, of[1][1].right} == {0, 1}
            says = f"only the {better} is right" if only else f"the {better} is better"
            items.append(page.Item(one.name, replace(row, pictures=pictures.get(str(row.index), row.pictures)), (says,),
                                   tuple((f"{name} run", *pair) for name, pair in zip(("First", "Second"), of))))
    return items


def _pictures(result: Result, indices: set[str], settings: dict) -> dict[str, Callable[[], list]]:
    """Find the pictures of some rows in the TSV file, where it still is at its place."""
    path = Path(str(settings["data"])) / f"{result.dataset}.tsv"
    if not indices or not is_there(path):
        return {}
    return {str(row.index): row.pictures for row in tsv.read(path, result.benchmark)
            if isinstance(row, Row) and str(row.index) in indices}
