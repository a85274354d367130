"""What a run of benchmarks says: a table beside the card's, and all that differs from the setting of the card.

    results, settings -> report.md (the table), report.json (for programs), report.html (each question), judged/*.jsonl

Source of the card's numbers: the model card of OpenGVLab/InternVL2_5-4B-MPO-AWQ, its last table; all are of models in
their own precision, none of int4.
"""
from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from minivl.family import VARIANTS
from weights_tools.evaluate import differences, intervals, page
from weights_tools.evaluate import results as files
from weights_tools.evaluate.benchmarks import BENCHMARKS
from weights_tools.evaluate.prompts import is_of_mpo, model_name
from weights_tools.evaluate.results import SETTINGS, Result
from weights_tools.files import write_text

COLUMNS = tuple(one.card for one in BENCHMARKS.values())
# Model -> its mean, then a number for each of COLUMNS. The mean of the 8B is not that of its numbers, which is 68.1.
CARD = {
    "InternVL2-5-1B": (54.9, 66.5, 51.3, 41.2, 47.1, 39.4, 69.0, 77.4, 47.2),
    "InternVL2-5-1B-MPO": (56.4, 67.2, 49.7, 40.8, 53.0, 40.0, 69.4, 83.6, 47.2),
    "InternVL2-5-2B": (59.9, 70.9, 54.3, 43.2, 51.1, 42.3, 74.9, 80.2, 62.6),
    "InternVL2-5-2B-MPO": (62.0, 71.6, 55.0, 45.0, 56.4, 43.0, 75.3, 84.2, 65.4),
    "InternVL2-5-4B": (65.1, 78.2, 58.7, 51.8, 60.8, 46.6, 81.4, 82.0, 61.5),
    "InternVL2-5-4B-MPO": (67.6, 78.6, 60.2, 51.6, 65.3, 47.8, 82.0, 88.0, 67.1),
    "InternVL2-5-8B": (68.9, 82.5, 63.2, 56.2, 64.5, 49.0, 84.6, 82.1, 62.8),
    "InternVL2-5-8B-MPO": (70.4, 82.4, 65.7, 54.9, 68.9, 51.4, 84.5, 88.3, 66.9),
    "InternVL2-5-26B": (71.6, 84.6, 66.5, 60.7, 68.0, 55.8, 86.2, 85.4, 65.4),
    "InternVL2-5-26B-MPO": (72.7, 84.2, 67.2, 57.7, 72.8, 55.3, 86.2, 91.2, 67.1),
    "InternVL2-5-38B": (73.5, 85.4, 68.5, 64.6, 72.4, 57.9, 87.6, 84.1, 67.2),
    "InternVL2-5-38B-MPO": (75.5, 85.6, 69.8, 64.1, 73.8, 61.5, 88.1, 88.5, 72.5),
    "InternVL2-5-78B": (75.2, 87.5, 69.5, 70.0, 70.6, 57.4, 89.1, 85.3, 71.8),
    "InternVL2-5-78B-MPO": (76.6, 87.3, 73.1, 68.3, 73.8, 58.7, 89.3, 91.2, 71.4),
}


def card_rows(checkpoint: str) -> tuple[str, ...]:
    """Name the rows of the card for a checkpoint: its own, and that of the model that MPO was done to; () for others.

    Known are the released names, with what was added (-AWQ, -lora), and minivl's short names, 4b-mpo-awq.
    """
    name = model_name(checkpoint).lower()
    found = re.match(r"internvl2[_.-]5-(\d+b)(?![a-z0-9])(.*)", name)
    size, rest = found.groups() if found else name.partition("-")[::2] if name in VARIANTS else ("", "")
    plain = f"InternVL2-5-{size.upper()}"
    if plain not in CARD:
        return ()
    return (f"{plain}-MPO", plain) if is_of_mpo(rest) else (plain,)


# ---- the table ------------------------------------------------------------------------------------------------------

def table(results: Sequence[Result], settings: dict) -> str:
    """Write Markdown: a row for each setting of this run with 95 % intervals, then the card's own of this model."""
    return markdown_table(cells(results, settings))


def cells(results: Sequence[Result], settings: dict) -> list[list[str]]:
    """Fill the cells of the table, the head first."""
    asked = dict.fromkeys(result.column for result in results)
    of_card = [one for one in COLUMNS if one in asked]
    columns = [*of_card, *(one for one in asked if one not in of_card)]
    lines = [["", "Avg.", *columns]]
    for setting in dict.fromkeys(result.setting for result in results):
        of_setting = [result for result in results if result.setting == setting]
        found = {result.column: result for result in reversed(of_setting)}
        mean = average(of_setting)
        lines.append([f"this run, {setting}", cell(mean["score"], mean["interval"]) if mean else "",
                      *(cell(found[one].score, found[one].interval) if one in found else "" for one in columns)])
    for name in card_rows(settings["checkpoint"]) if of_card else ():
        mean, *numbers = CARD[name]
        of = dict(zip(COLUMNS, numbers))
        lines.append([f"card, {name}", f"{mean:.1f}" if len(of_card) == len(COLUMNS) else "",
                      *(f"{of[one]:.1f}" if one in of else "" for one in columns)])
    return lines


def average(results: Sequence[Result]) -> dict | None:
    """Compute the mean score of eight benchmarks and its interval; None where there are fewer, or one has no score."""
    found = {result.benchmark.name: result for result in reversed(results)}
    if len(found) != len(COLUMNS) or any(one.score is None for one in found.values()):
        return None
    return {"score": sum(result.score for result in found.values()) / len(found),
            "interval": intervals.middle(torch.stack([result.draws for result in found.values()]).mean(0))}


def cell(score: float | None, interval: tuple[float, float] | None) -> str:
    """Write a score and its interval."""
    return "unknown" if score is None else f"{score:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table, the first line its head."""
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body]) + "\n"


def plain(text: object) -> str:
    """Write a stranger's text into Markdown so that it is shown as it is: in one line, without marks, links or HTML."""
    shown = "".join(letter if letter.isprintable() else " " for letter in str(text))
    return re.sub(r"[\\`*\[\]<>|~&#$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", shown)


# ---- what is written ------------------------------------------------------------------------------------------------

def write(out: Path, results: Sequence[Result], settings: dict):
    """Write OUT/report.json, report.md, report.html, and OUT/judged/DATASET.SETTING.jsonl, which `compare` reads."""
    missing = [name for name in SETTINGS if name not in settings]
    if missing:
        raise ValueError(f"settings lacks {', '.join(missing)}")
    for result in results:
        files.check(result)
    for result in results:
        files.write(out, result)
    write_text(out / "report.md", markdown(results, settings))
    page.write_report(out / "report.html", results, settings, cells(results, settings))
    write_text(out / "report.json", json.dumps(as_json(results, settings), indent=1) + "\n")


def markdown(results: Sequence[Result], settings: dict) -> str:
    """Write the report as Markdown: the table, what differs, the parts of each number, the settings."""
    of_run = "".join(f"- {plain(one)}\n" for one in differences.of_run(results, settings))
    sections = "".join(_section(result, settings) for result in results)
    about = "".join(f"| {plain(name)} | {plain(value)} |\n" for name, value in settings.items())
    return (f"# {plain(settings['checkpoint'])}\n\n{table(results, settings)}\n"
            "In brackets: the 95 % interval, by bootstrap over independent questions.\n\n"
            f"## What differs from the card's setting\n\n{of_run}\n{sections}"
            f"## Settings\n\n| | |\n|---|---|\n{about}")


def _section(result: Result, settings: dict) -> str:
    """Write what there is to say of one benchmark."""
    said = "".join(f"- {plain(one)}\n" for one in differences.of_result(result, settings))
    parts = "".join(f"| {plain(name)} | {value:.1f} |\n" for name, value in result.numbers.items())
    return (f"## {plain(result.dataset)}, {plain(result.setting)}\n\n{len(result.rows):,} rows, "
            f"{_seconds(result)}.\n\n{said}\n| part | |\n|---|---|\n{parts}\n")


def _seconds(result: Result) -> str:
    """Say how long it took, where it was asked."""
    asked = [one for one in result.answers if one.refused is None]
    if not asked:
        return "none asked"
    return (f"{sum(one.seconds for one in asked) / len(asked):.2f} seconds and "
            f"{sum(one.tokens for one in asked) / len(asked):.1f} tokens an answer")


def as_json(results: Sequence[Result], settings: dict) -> dict:
    """Give all numbers for programs."""
    rows = card_rows(settings["checkpoint"])
    return {
        "settings": settings,
        "differences": differences.of_run(results, settings),
        "average": {setting: average([one for one in results if one.setting == setting])
                    for setting in dict.fromkeys(one.setting for one in results)},
        "card": {name: dict(zip(("Avg.", *COLUMNS), CARD[name])) for name in rows},
        "results": [{
            "name": one.name, "benchmark": one.benchmark.name, "dataset": one.dataset, "setting": one.setting,
            "score": one.score, "interval": one.interval, "numbers": one.numbers, "rows": len(one.rows),
            "pieces": len(one.pieces), "judged_by": Counter(verdict.by for verdict in one.verdicts),
            "refused": [answer.index for answer in one.answers if answer.refused is not None],
            "broken": [row.line for row in one.broken],
            "cut": sum(answer.finish_reason == "length" for answer in one.answers),
            "seconds": sum(answer.seconds for answer in one.answers),
            "tokens": sum(answer.tokens for answer in one.answers),
            "differences": differences.of_result(one, settings)} for one in results]}
