"""Where it hurts, for people: tables in the terminal, one HTML page with pictures and nothing to fetch.

    Report -> text(report), html(report)
"""
from __future__ import annotations

import statistics
from pathlib import Path

import torch

from minivl import show
from weights_tools.quantize.hurts.measure import OUTLIERS, Linear, Report, Twin
from weights_tools.verify.report import STYLE, cell, wide

CARD = 300              # pixels of a drawing's width: fits a phone
FLOOR = 1e-3            # of the largest value: the foot of a logarithmic axis, on which 0 has no place
BEFORE = "before the first layer"


def names(report: Report) -> list[str]:
    """Name the twins: by their folders, as far as those differ."""
    short = [Path(twin.folder).name for twin in report.twins]
    return short if len(set(short)) == len(short) else [twin.folder for twin in report.twins]


def number(x: float) -> str:
    """Write an error with three digits."""
    return f"{x:.3g}"


def share(x: float) -> str:
    """Write a share as per cent."""
    return f"{100 * x:.1f} %"


def megabytes(x: int) -> str:
    """Write bytes as megabytes."""
    return f"{x / 1e6:.2f} MB" if x < 1e9 else f"{x / 1e6:.0f} MB"


def shown_on(report: Report) -> str:
    """Say what was compared on."""
    return (f"{report.tokens} tokens of {report.prompts} prompts; the next token's probabilities after {report.scored} "
            "text tokens of these, evenly spread")


def outliers(linear: Linear) -> str:
    """Say which channels of a linear stick out, and how much of the error is theirs."""
    median = float(linear.largest.median())
    first = linear.outliers()[0]
    rest = sum(one["part"] for one in linear.outliers())
    return (f"channel {first['channel']} reaches {first['largest']:.3g}, the median channel {median:.3g}; the "
            f"{len(linear.outliers())} largest hold {share(rest)} of the error")


# ---- the terminal ---------------------------------------------------------------------------------------------------

def text(report: Report) -> str:
    """Write the tables for a terminal: the twins, the most hurt linears of each, a line for each layer."""
    called = names(report)
    column = max(16, *map(len, called)) + 2
    lines = [f"{report.parent}: {megabytes(report.bytes)}, compared on {shown_on(report)}", "",
             f"{'':<{column}}{'size':>12}{'mean KL':>11}{'99 % KL':>11}{'same token':>12}{'last layer':>12}"]
    for name, twin in zip(called, report.twins):
        lines.append(f"{name:<{column}}{megabytes(twin.bytes):>12}{number(twin.kl):>11}{number(twin.kl_99):>11}"
                     f"{share(twin.same):>12}{number(twin.growth[-1].own):>12}")
    for name, twin in zip(called, report.twins):
        lines += ["", f"{name}: the linears hurt most", *most_hurt_rows(twin)]
    lines += ["output, weight: relative errors; channel: that with the largest input, its input, the median channel's;",
              f"{OUTLIERS} hold: the part of the squared error in the {OUTLIERS} channels with the largest inputs"]
    lines += ["", "residual stream, relative error of a token: this layer alone, and all so far",
              f"{'':<{len(BEFORE) + 2}}" + "".join(f"{name:>{column + 4}}" for name in called),
              f"{BEFORE:<{len(BEFORE) + 2}}" + "".join(f"{number(twin.start):>{column + 4}}" for twin in report.twins)]
    for i in range(len(report.twins[0].growth)):
        pairs = [f"{number(twin.growth[i].alone):>9}{number(twin.growth[i].own):>9}" for twin in report.twins]
        lines.append(f"{f'layer {i}':<{len(BEFORE) + 2}}" + "".join(f"{pair:>{column + 4}}" for pair in pairs))
    return "\n".join(lines)


def most_hurt_rows(twin: Twin) -> list[str]:
    """Write the table of the linears that are hurt most."""
    width = max(len(linear.at) for linear in twin.worst())
    rows = [f"{'':<{width}}{'output':>9}{'weight':>9}{'channel':>9}{'input':>9}{'median':>9}{f'{OUTLIERS} hold':>9}"]
    for linear in twin.worst():
        first = linear.outliers()[0]
        rows.append(f"{linear.at:<{width}}{number(linear.output):>9}{number(linear.weight):>9}{first['channel']:>9}"
                    f"{first['largest']:>9.3g}{float(linear.largest.median()):>9.3g}"
                    f"{share(sum(one['part'] for one in linear.outliers())):>9}")
    return rows


# ---- the page -------------------------------------------------------------------------------------------------------

MORE_STYLE = """
.cards { display: flex; flex-wrap: wrap; gap: 1rem; } .cards > * { max-width: 100%; }
figure { margin: 0; width: 300px; } figcaption { margin-bottom: .3rem; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; } .wide svg { max-width: none; }
summary { cursor: pointer; padding: .4rem 0; }
"""


def html(report: Report) -> str:
    """Write one self-contained page."""
    called = names(report)
    marks = [chr(ord("A") + k % 26) for k in range(len(called))] if len(called) > 1 else ["error"]
    if len(called) > 1:
        called = [f"{mark} {name}" for mark, name in zip(marks, called)]
    body = heading(report, called) + growth(report, marks) + every_linear(report, called)
    body += "<h2>Hurt most</h2>" + "".join(most_hurt(name, twin) for name, twin in zip(called, report.twins))
    return ("<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Where it hurts</title>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<style>{STYLE}{MORE_STYLE}</style></head><body>{body}</body></html>")


def row(cells: list[str], tag: str = "td") -> str:
    """Write a row of a table; all but its first cell are numbers."""
    return f"<tr><{tag}>{cells[0]}</{tag}>" + "".join(f'<{tag} class="n">{c}</{tag}>' for c in cells[1:]) + "</tr>"


def heading(report: Report, called: list[str]) -> str:
    """Write what was compared, and the sums."""
    rows = [row([cell(Path(report.parent).name), megabytes(report.bytes), "", "", "", "", ""])]
    for name, twin in zip(called, report.twins):
        rows.append(row([cell(name), megabytes(twin.bytes),
                         share(twin.bytes / report.bytes), number(twin.kl), number(twin.kl_99), share(twin.same),
                         number(twin.growth[-1].own)]))
    head = row(["", "weight files", "of the parent's", "mean KL", "99 % KL", "same token", "last layer"], "th")
    return (f"<h1>Where it hurts</h1><p>{cell(', '.join(called))} beside <code>{cell(report.parent)}</code>, on "
            f"{cell(shown_on(report))}.</p>{wide(f'<table>{head}{chr(10).join(rows)}</table>')}"
            "<p>KL: of the next token's probabilities, parent to twin, in nats: the mean, and what 99 % of the tokens "
            "stay below. Same token: how often both find the same next token most likely. Last layer: relative error "
            "of the residual stream after it. All errors are |twin's - parent's| / |parent's|; what smoothing only "
            "moved is no error.</p>")


def growth(report: Report, marks: list[str]) -> str:
    """Draw the error in the residual stream from layer to layer."""
    alone = {mark: [one.alone for one in twin.growth] for mark, twin in zip(marks, report.twins)}
    own = {mark: [one.own for one in twin.growth] for mark, twin in zip(marks, report.twins)}
    drawn = []
    for title, lines in (("one layer alone", alone), ("all layers so far", own)):
        foot = FLOOR * max(map(max, lines.values())) or 1e-9
        lines = {mark: [max(value, foot) for value in line] for mark, line in lines.items()}
        drawn.append(str(show.curve(lines, log=True, x="layer", title=title, width=CARD, height=220)))
    start = ", ".join(number(twin.start) for twin in report.twins)
    return ("<h2>Residual stream</h2><p>Relative error of a token's vector after each layer, mean over all tokens: "
            "with only this layer quantised, on the parent's own stream; and each model on its own stream. Less than "
            f"{FLOOR:g} of the largest is drawn there. Before the first layer it is {start}.</p>"
            f'<div class="cards">{"".join(drawn)}</div>')


def every_linear(report: Report, called: list[str]) -> str:
    """Draw the output error of every linear, one square each, and list them."""
    kinds = list(dict.fromkeys(linear.name for linear in report.twins[0].linears))
    layers = len(report.twins[0].growth)
    top = max(linear.output for twin in report.twins for linear in twin.linears) or 1.0
    maps = []
    for name, twin in zip(called, report.twins):
        values = torch.tensor([linear.output for linear in twin.linears]).view(layers, -1).T
        drawing = show.heat(values, "", "layer", title=name, row_names=[kind.split(".")[-1] for kind in kinds], top=top)
        maps.append(wide(str(drawing)))
    head = row(["linear", *(f"{cell(name)}: {what}" for name in called for what in ("output", "weight"))], "th")
    rows = [row([f"<code>{cell(same[0].at)}</code>", *(number(value) for one in same for value in (
        one.output, one.weight))]) for same in zip(*(twin.linears for twin in report.twins))]
    listed = f"<table>{head}{''.join(rows)}</table>"
    return ("<h2>Every linear</h2><p>Relative error of what a linear puts out when it is given the parent's own "
            "inputs: its own error, without those before it.</p>"
            f"<div class='cards'>{''.join(maps)}</div>"
            f"<details><summary>All {len(rows)} in numbers, weights too</summary>{wide(listed)}</details>")


def most_hurt(name: str, twin: Twin) -> str:
    """Draw the channels of the linears whose outputs are hurt most."""
    cards = "".join(f"<figure>{channels(linear, twin.group_size)}</figure>" for linear in twin.worst())
    return (f"<details open><summary><b>{cell(name)}</b></summary><p>Of each input channel, from the left to the "
            "right: the largest input in the parent, and the error of the outputs that rounding this channel's weights "
            "would leave alone (the squares add up). Crosses: the channels with the largest inputs.</p>"
            f"<div class='cards'>{cards}</div></details>")


def channels(linear: Linear, group_size: int | None) -> str:
    """Draw the channels of one linear: what they are given, and what error they leave."""
    drawn = linear.drawn()
    size = -(-len(linear.largest) // len(drawn["channel"]))
    found = {one["channel"] // size for one in linear.outliers()}
    said = []
    for key, title in (("largest", "largest input"), ("lost", "error left")):
        values = drawn[key]
        if key == "largest":        # a logarithmic axis; what is never given anything stands at its foot
            foot = min((v for v in values if v > 0), default=1.0)
            values = [max(v, foot) for v in values]
        line = list(zip(drawn["channel"], values))
        said.append(show.curve({"": line}, log=key == "largest", title=title, x="channel", width=CARD, height=170,
                               crosses=[line[at] for at in sorted(found)]))
    return (f"<figcaption><b><code>{cell(linear.at)}</code></b><br>error of outputs {number(linear.output)}, of "
            f"weights {number(linear.weight)}; {cell(outliers(linear))}.{cell(group(linear, group_size))}</figcaption>"
            f"{said[0]}{said[1]}")


def group(linear: Linear, group_size: int | None) -> str:
    """Say which group of channels, which share scales, holds most of the error, and how it is beside the others."""
    if group_size is None or group_size == len(linear.lost):
        return ""
    errors = [float(part.norm()) for part in linear.lost.split(group_size)]
    worst = max(range(len(errors)), key=lambda i: errors[i])
    return (f" The worst of its {len(errors)} groups, channels {worst * group_size} to {(worst + 1) * group_size - 1}, "
            f"leaves {errors[worst]:.2g}, the median one {statistics.median(errors):.2g}.")
