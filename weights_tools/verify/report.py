"""The result of a comparison for people: a table in the terminal, one HTML page with pictures and nothing to fetch.

    Report -> text(report), html(report)
"""
from __future__ import annotations

import base64
import html as escape_html
import io
import math
from collections.abc import Callable

import torch
from PIL import Image

from minivl import show
from weights_tools.verify.compare import Report


def number(x: float | None, digits: int = 2) -> str:
    """Write a number with so many digits; nothing for None."""
    return "" if x is None else "0" if x == 0 else f"{x:.{digits - 1}e}"


def from_one(cosine: float | None) -> str:
    """Write how far a cosine is from 1."""
    return "" if cosine is None else number(max(0.0, 1 - cosine) if cosine == cosine else cosine)


def verdict(report: Report) -> str:
    """Say the result in one sentence."""
    reference = report.reference.get("reference") or "the trace"
    if report.agrees:
        errors = [row.error for row in report.rows if row.error is not None]
        tokens = f", all {len(report.tokens)} tokens are the same" if report.tokens else ""
        return f"agrees with {reference}: largest relative error {number(max(errors))} of {len(errors)} stages{tokens}"
    if report.first:
        return f"differs from {reference}, first at {report.first.stage}: {report.first.note}"
    t = report.tokens[report.parted]
    return (f"every stage agrees, token {report.parted + 1} of the answer differs: {t['minivl']}, the reference has "
            f"{t['reference']}; the two best scores were {t['margin']:.2g} apart")


def text(report: Report, words: Callable[[int], str] = str) -> str:
    """Write the table for a terminal. `words`: token id -> how it reads."""
    lines = [f"{'stage':<18}{'shape':<22}{'rel. error':>11}{'max |a-b|':>11}  {'at':<18}{'1 - cosine':>11}"]
    for row in report.rows:
        mark = " " if row.agrees else "<" if row is not report.first else "<== first difference"
        shape = "x".join(map(str, row.shape))
        lines.append(f"{row.stage:<18}{shape:<22}{number(row.error):>11}{number(row.largest):>11}  "
                     f"{str(row.at or ''):<18}{from_one(row.cosine):>11} {mark}")
    lines.append(f"tolerance {report.tolerance:.0e} in {report.dtype}: {report.reason}")
    if report.logits:
        lines += ["", f"end of the prompt: KL {number(report.logits['kl'])}, the reference's token has rank "
                      f"{report.logits['rank']}",
                  f"    {'reference':<34}minivl"]
        for pair in report.logits["top5"]:
            cells = [f"{words(i)!r:<22.22} {p:8.4f}" for i, p in (pair["reference"], pair["minivl"])]
            lines.append(f"    {cells[0]:<34}{cells[1]}")
    if report.tokens:
        same = report.parted if report.parted is not None else len(report.tokens)
        least = min(token["margin"] for token in report.tokens[:same + 1])
        lines += ["", f"greedy answer: {same} of {len(report.tokens)} tokens agree; smallest margin between the two "
                      f"best scores {least:.3g}"]
    lines += [f"not compared: {what}" for what in report.skipped]
    return "\n".join([*lines, "", verdict(report)])


# ---- the page -------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .15rem .6rem; border-bottom: 1px solid #8884; }
th, td:not(:last-child) { white-space: nowrap; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
tr.bad td { font-weight: 600; background: #d4303020; }
.verdict { padding: .6rem 1rem; border-left: .4rem solid; }
.ok { border-color: #2a8a4a; } .no { border-color: #d43030; }
.wide { overflow-x: auto; }
img.map { image-rendering: pixelated; width: 9rem; margin: .2rem; border: 1px solid #8888; } figure { margin: 1rem 0; }
code { font-size: .92em; } p, h1, td:last-child { overflow-wrap: anywhere; } td:last-child { min-width: 8rem; }
"""


def curve(report: Report) -> str:
    """Draw the relative error of each stage beside the tolerance, as SVG. A cross marks a stage that does not agree."""
    rows = [row for row in report.rows if row.error is not None]
    if not rows:
        return ""
    # what is not finite is drawn at 10, far beyond any tolerance; what is 0 at 1e-9, as the axis is logarithmic
    errors = list(enumerate(max(row.error if math.isfinite(row.error) else 10.0, 1e-9) for row in rows))
    limit = max(report.tolerance, 1e-9)
    return str(show.curve(
        {"error": errors, "tolerance": [(0, limit), (len(rows) - 1, limit)]}, log=True, y="relative error",
        ticks=[row.stage for row in rows], crosses=[at for at, row in zip(errors, rows) if not row.agrees],
        width=960, height=320))


def picture(error, top: float) -> str:
    """Draw one tile's error per patch float[P] as a data URL: white is none, dark is `top`."""
    side = round(error.numel() ** 0.5)
    grey = (255 - 235 * (error / top).clamp(0, 1)).round().to(torch.uint8)
    image = Image.frombytes("L", (side, side), bytes(grey.tolist()))
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def html(report: Report, words: Callable[[int], str] = str) -> str:
    """Write one self-contained page. `words`: token id -> how it reads."""
    body = heading(report) + table(report) + maps(report) + first_token(report, words) + answer(report, words)
    return ("<!doctype html><html lang='en'><head><meta charset='utf-8'><title>verify</title>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<style>{STYLE}</style></head><body>{body}</body></html>")


def wide(content: str) -> str:
    """Let something that may be wider than the page scroll by itself, its words as large as elsewhere."""
    return f'<div class="wide" tabindex="0">{content}</div>'


def cell(x: object) -> str:
    """Write something as it may stand in HTML."""
    return escape_html.escape(str(x))


def heading(report: Report) -> str:
    """Write what was compared with what, and the verdict."""
    reference = report.reference
    versions = ", ".join(f"{k} {v}" for k, v in (reference.get("versions") or {}).items()) or "versions unknown"
    skipped = "".join(f"<p>Not compared: {cell(what)}.</p>" for what in report.skipped)
    return (f"<h1>minivl against {cell(reference.get('reference') or 'a trace')}</h1>"
            f'<p class="verdict {"ok" if report.agrees else "no"}">{cell(verdict(report))}</p>{skipped}'
            f"<p>Checkpoint <code>{cell(report.checkpoint)}</code>, trace <code>{cell(report.trace)}</code>, "
            f"computed in {report.dtype}, reference in {cell(reference.get('dtype') or 'float32')} "
            f"({cell(versions)}).</p>")


def table(report: Report) -> str:
    """Draw the error of each stage and list the rows."""
    rows = []
    for row in report.rows:
        end = "agrees" if row.agrees else "differs" + (f": {cell(row.note)}" if row.note else "")
        rows.append(f'<tr class="{"" if row.agrees else "bad"}"><td><code>{row.stage}</code></td>'
                    f'<td>{"x".join(map(str, row.shape))}</td><td class="n">{number(row.error)}</td>'
                    f'<td class="n">{number(row.largest)}</td><td>{cell(row.at or "")}</td>'
                    f'<td class="n">{from_one(row.cosine)}</td><td>{end}</td></tr>')
    return ("<h2>Error of each stage</h2><p>Relative error |a - b| / |b| over the whole tensor. The dashed line is the "
            f"tolerance: {cell(report.reason)}. A cross is a stage beyond it.</p>{wide(curve(report))}"
            + wide('<table><tr><th>stage</th><th>shape</th><th class="n">relative error</th>'
                   '<th class="n">max |a - b|</th><th>at</th><th class="n">1 - cosine</th><th></th></tr>'
                   f'{"".join(rows)}</table>'))


def maps(report: Report) -> str:
    """Draw the error of each patch: of the first stage that differs, or of the last that was compared."""
    if not report.maps:
        return ""
    first = report.first.stage if report.first and report.first.stage in report.maps else None
    name = first or list(report.maps)[-1]
    errors = report.maps[name]
    top = float(errors.max()) or 1.0
    tiles = "".join(f'<img class="map" alt="tile {i}" title="tile {i}" src="{picture(error, top)}">'
                    for i, error in enumerate(errors))
    return (f"<h2>Where on the tiles</h2><figure><figcaption><code>{name}</code>: relative error of each patch, one "
            f"square each; white is 0, black {number(top)}. Tiles in order, the thumbnail last."
            f"{'' if first else ' (All agree: this is rounding.)'}</figcaption>{tiles}</figure>")


def first_token(report: Report, words: Callable[[int], str]) -> str:
    """Put the five best tokens at the end of the prompt side by side."""
    if not report.logits:
        return ""

    def half(token, score):
        return f"<td><code>{cell(repr(words(token)))}</code></td><td class='n'>{score:.4f}</td>"
    rows = "".join(f"<tr>{half(*pair['reference'])}{half(*pair['minivl'])}</tr>" for pair in report.logits["top5"])
    return (f"<h2>The first token of the answer</h2><p>KL {number(report.logits['kl'])}; the reference's token has "
            f"rank {report.logits['rank']}.</p>"
            + wide("<table><tr><th>reference</th><th class='n'>log p</th><th>minivl</th><th class='n'>log p</th></tr>"
                   f"{rows}</table>"))


def answer(report: Report, words: Callable[[int], str]) -> str:
    """List the tokens of the answer."""
    if not report.tokens:
        return ""
    rows = []
    for i, token in enumerate(report.tokens, start=1):
        theirs, mine = token["reference"], token["minivl"]
        rows.append(f"<tr class=\"{'' if theirs == mine else 'bad'}\"><td class='n'>{i}</td>"
                    f"<td><code>{cell(repr(words(theirs)))}</code></td><td><code>{cell(repr(words(mine)))}</code></td>"
                    f"<td class='n'>{token['margin']:.3g}</td></tr>")
    return ("<h2>The answer, token by token</h2><p>Each after the reference's tokens before it. The margin is the "
            "distance of the two best scores: where it is smaller than the rounding, either token is right.</p>"
            + wide("<table><tr><th class='n'></th><th>reference</th><th>minivl</th><th class='n'>margin</th></tr>"
                   f"{''.join(rows)}</table>"))
