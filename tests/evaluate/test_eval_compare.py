"""Two runs beside each other, and how sure numbers are: tests against slow definitions and against simulated truths."""
import itertools
import json
import random
import re
import sys
import time
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import torch
from made import write as write_files
from runs import SETTINGS, answer, eight, result

from minivl import InputError
from weights_tools.evaluate import compare, intervals, report, results, score
from weights_tools.evaluate.benchmarks import BENCHMARKS

# ---- McNemar --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changed", range(13))
def test_mcnemar_by_counting_all_cases(changed):
    """Each changed question went one way or the other by the throw of a coin: count how many throws are as uneven."""
    uneven = [abs(changed - 2 * sum(throw)) for throw in itertools.product((0, 1), repeat=changed)]
    for first in range(changed + 1):
        share = sum(one >= abs(changed - 2 * first) for one in uneven) / len(uneven)
        assert intervals.mcnemar(first, changed - first) == pytest.approx(share, abs=1e-12)


def test_mcnemar_of_many():
    assert intervals.mcnemar(0, 0) == intervals.mcnemar(3000, 3000) == 1
    assert intervals.mcnemar(2000, 1000) == intervals.mcnemar(1000, 2000) < 1e-70
    assert 0.04 < intervals.mcnemar(10, 21) < 0.08


# ---- intervals ------------------------------------------------------------------------------------------------------

def rows_of(right):
    """Pieces of one question each."""
    return torch.stack([torch.as_tensor(right, dtype=torch.float64), torch.ones(len(right), dtype=torch.float64)],
                       1)[:, None]


def covered(truth, draw, runs, seed=0):
    """How often the interval of a simulated run holds the true score."""
    chance = random.Random(seed)
    hits = 0
    for _ in range(runs):
        pieces = draw(chance)
        (drawn,) = intervals.draws(pieces, number=500, name=str(chance.random()))
        low, high = intervals.interval(drawn, len(pieces))
        hits += low <= truth <= high
    return hits / runs


@pytest.mark.parametrize("n, share, least, most", [(100, 0.7, 0.92, 0.98), (50, 0.9, 0.92, 0.98), (50, 0.95, 0.96, 1)])
def test_coverage_of_questions(n, share, least, most):
    draw = lambda chance: rows_of([chance.random() < share for _ in range(n)])
    assert least <= covered(100 * share, draw, 300) <= most


def test_coverage_where_rows_hang_together():
    """Sets of 6 rows, of which some models know all and some none: drawn row by row 95 % would be far less."""
    def draw(chance):
        return torch.tensor([[[float(sum(chance.random() < known for _ in range(6))), 6.0]]
                             for known in (chance.choice((0.2, 0.9)) for _ in range(40))], dtype=torch.float64)

    def row_by_row(chance):
        return rows_of([i < right for (right, of), in draw(chance).tolist() for i in range(int(of))])
    assert 0.91 <= covered(55, draw, 200) <= 0.985
    assert covered(55, row_by_row, 100) < 0.8


def test_where_nothing_varies():
    for n, room in ((1, 97.5), (10, 30.85), (100, 3.62)):
        for right, wanted in ((1.0, (100 - room, 100)), (0.0, (0, room))):
            pieces = rows_of([right] * n)
            assert intervals.interval(*intervals.draws(pieces), n) == pytest.approx(wanted, abs=0.01)
    assert intervals.interval(*intervals.draws(rows_of([0.4])), 1) == (0, 100)


def test_draws_are_the_slow_definition():
    """The spread of drawn scores is that of scores computed anew from rows that were drawn."""
    of = result("HallusionBench", 60, share=0.6)
    (drawn,) = intervals.draws(of.pieces, name="a")
    pieces = intervals.apart(of.benchmark, of.rows)
    chance = random.Random(0)
    slow = []
    for _ in range(400):
        rows = []
        verdicts = []
        for k in range(len(pieces)):
            for i in chance.choice(pieces):         # a set drawn twice is two sets
                parts = str(of.rows[i].index).split("_")
                parts[3] = f"{parts[3]}-{k}"
                rows.append(replace(of.rows[i], index="_".join(parts)))
                verdicts.append(of.verdicts[i])
        slow.append(score.numbers(of.benchmark, rows, verdicts)["score"])
    slow = torch.tensor(slow, dtype=torch.float64)
    assert drawn.mean().item() == pytest.approx(slow.mean().item(), abs=1.5)
    assert drawn.std().item() == pytest.approx(slow.std().item(), rel=0.12)


def test_draws_are_seeded_and_fast():
    pieces = rows_of([i % 3 > 0 for i in range(3000)])
    start = time.perf_counter()
    (drawn,) = intervals.draws(pieces, name="a")
    assert time.perf_counter() - start < 5 and len(drawn) == 2000
    again, other = intervals.draws(pieces, name="a")[0], intervals.draws(pieces, name="b")[0]
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)


# ---- two runs -------------------------------------------------------------------------------------------------------

def run(folder, of, **settings):
    report.write(folder, of, {**SETTINGS, **settings})
    return folder


def test_a_run_and_itself(tmp_path):
    run(tmp_path, eight(n=20))
    for one in compare.compare(tmp_path, tmp_path):
        assert one.first == one.second and one.difference == 0 and one.p == 1 and not one.changed and not one.reworded
        assert one.interval[0] == -one.interval[1] < 0


@pytest.mark.parametrize("name", BENCHMARKS)
def test_counts_are_those_of_a_slow_loop(tmp_path, name):
    first = result(name, 40, share=0.6, seed=1)
    second = result(name, 40, share=0.8, seed=2)
    (one,) = compare.compare(run(tmp_path / "1", [first]), run(tmp_path / "2", [second]))
    assert (one.first, one.second) == (first.score, second.score) and one.difference == second.score - first.score
    assert one.interval[0] <= one.difference <= one.interval[1]
    right = lambda of, unit: min(of.verdicts[i].right for i in unit)
    units = score.units(first.benchmark, first.rows)
    assert one.units == len(units)
    assert one.only_first == sum(right(first, unit) > right(second, unit) for unit in units)
    assert one.only_second == sum(right(first, unit) < right(second, unit) for unit in units)
    changed = [row.index for row, a, b in zip(first.rows, first.verdicts, second.verdicts) if a.right != b.right]
    assert list(one.changed) == changed and changed


def test_the_paired_interval_covers_and_is_narrower():
    """Two models agree on most questions: the difference is 2 points, seen much sharper than each score."""
    chance = random.Random(3)
    hits = 0
    wide = []
    for k in range(200):
        both = [chance.random() for _ in range(250)]
        pair = [rows_of([x < 0.70 for x in both]), rows_of([x < 0.68 or 0.7 < x < 0.74 for x in both])]
        first, second = intervals.draws(*pair, number=500, name=str(k))
        low, high = intervals.middle(second - first)
        hits += low <= 2 <= high
        wide.append((high - low) / (intervals.middle(first)[1] - intervals.middle(first)[0]))
    assert 0.91 <= hits / 200 <= 0.985 and sum(wide) / 200 < 0.6


def said_of(found):
    return " ".join(compare.notes(found, SETTINGS, SETTINGS))


def test_shared_questions_only(tmp_path):
    whole = result("AI2D", 40, seed=1)
    other = result("AI2D", 40, seed=2)
    part = [i for i in range(40) if i % 2]
    some = lambda of, rows: compare._part(of, rows)
    texts = some(other, part)
    texts.rows[3] = replace(texts.rows[3], fields={**texts.rows[3].fields, "question": "Which one?"})
    run(tmp_path / "1", [whole])
    run(tmp_path / "2", [texts], n=20)
    (one,) = compare.compare(tmp_path / "1", tmp_path / "2")
    kept = [i for i in part if i != part[3]]
    assert (one.questions, one.only_one_asked, one.other_text) == (19, 20, (part[3],))
    assert one.first == some(whole, kept).score and one.second == some(other, kept).score
    assert "Fewer than 30 independent questions, or groups of them, in AI2D_TEST, default:" in said_of([one])
    assert "Fewer" not in said_of([compare.paired(whole, other)])
    said = " ".join(compare.notes([one], *(results.read(tmp_path / x)[1] for x in "12")))
    assert "20 rows were asked in one run only" in said and f"left out ({part[3]})" in said
    assert "n: None in the first run, 20 in the second" in said


def test_settings_against_each_other(tmp_path):
    run(tmp_path / "1", [result("MMStar", seed=1), result("MMVet"), result("AI2D"), result("AI2D", setting="cot")])
    run(tmp_path / "2", [result("MMStar", seed=2, setting="cot"), result("AI2D", setting="cot"), result("OCRBench")])
    assert [one.name for one in compare.compare(tmp_path / "1", tmp_path / "2")] == [
        "MMStar, default against cot", "AI2D_TEST, cot"]
    run(tmp_path / "3", [result("OCRBench")])
    with pytest.raises(InputError, match="share no question: .* MMStar.default, .* other OCRBench.default; run both"):
        compare.compare(tmp_path / "1", tmp_path / "3")
    with pytest.raises(InputError, match="holds no report.json"):
        compare.compare(tmp_path / "1", tmp_path)


def test_only_a_mean_is_called_too_narrow(tmp_path):
    of = [run(tmp_path / str(seed), [result("AI2D", 8, seed=seed)]) for seed in (1, 2)]
    (said,) = [one for one in compare.notes(compare.compare(*of), SETTINGS, SETTINGS) if one.startswith("Fewer than")]
    assert said.endswith("in AI2D_TEST, default: there the interval is rough.")
    of = [run(tmp_path / str(seed), eight(n=4, seed=seed)) for seed in (3, 4)]
    (said,) = [one for one in compare.notes(compare.compare(*of), SETTINGS, SETTINGS) if one.startswith("Fewer than")]
    assert said.endswith("there the interval is rough, and that of the mean is too narrow.")


def test_what_cannot_be_told_is_left_out(tmp_path):
    of = result("MMVet")
    untold = replace(of, verdicts=[replace(one, right=None, by="nobody") for one in of.verdicts], numbers={})
    run(tmp_path / "1", [of, result("AI2D", seed=1)])
    run(tmp_path / "2", [untold, result("AI2D", seed=2)])
    vet, _ = compare.compare(tmp_path / "1", tmp_path / "2")
    assert vet.first is None and vet.questions == 0
    assert "| MMVet, default | unknown | unknown | unknown | 0 | 0 | 1.00 | 0 | 0 | 0 |" in compare.table([vet])


def test_written(tmp_path):
    run(tmp_path / "1", eight(n=20, seed=1, share=0.6))
    run(tmp_path / "2", eight(n=20, seed=2, share=0.9), precision="fast")
    text = compare.write(tmp_path / "out", tmp_path / "1", tmp_path / "2")
    assert text == (tmp_path / "out" / "compare.md").read_text("utf-8")
    found = compare.compare(tmp_path / "1", tmp_path / "2")
    told = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [one["difference"] for one in told["differences"]] == [one.difference for one in found]
    assert told["average"]["difference"] == pytest.approx(sum(one.difference for one in found) / 8)
    assert "precision: exact in the first run, fast in the second" in text and "| mean of eight |" in text
    assert "8 tests: that some p is below 0.05 happens in 34 of 100 cases" in text
    page = (tmp_path / "out" / "compare.html").read_text("utf-8")
    changed = sum(len(one.changed) for one in found)
    assert page.count("<article") == changed > 20 and page.count("First run: ") == changed
    assert f"{changed} of {changed} questions whose verdict changed" in page and "only the second is right" in page


def test_pictures_come_from_the_files(tmp_path):
    paths = write_files(tmp_path / "data", ["OCRBench", "MMBench_V11"])
    for k in (1, 2):
        run(tmp_path / str(k), [result(name, seed=k) for name in paths], data=str(tmp_path / "data"))
    compare.write(tmp_path / "out", tmp_path / "1", tmp_path / "2")
    text = (tmp_path / "out" / "compare.html").read_text("utf-8")
    changed = sum(len(one.changed) for one in compare.compare(tmp_path / "1", tmp_path / "2"))
    assert text.count("<img src=\"data:image/jpeg") == text.count("<article") == changed
    paths["OCRBench"].unlink()
    compare.write(tmp_path / "out", tmp_path / "1", tmp_path / "2")
    assert "the TSV file, which is not at its place" in unescape((tmp_path / "out" / "compare.html").read_text("utf-8"))


def test_hostile_texts(tmp_path):
    attack = "<script>alert(1)</script>|\n# x"
    def hostile(turn):
        def change(rows, answers):
            for i, row in enumerate(rows):
                fields = {**row.fields, "category": attack, "question": attack, "D": attack, "answer": "A"}
                rows[i] = replace(row, fields=fields)
                answers[i] = answer(rows[i], attack if i % 2 == turn else "A")
        return result("AI2D", change=change)
    first = hostile(0)
    second = hostile(1)
    run(tmp_path / "1", [first], checkpoint=attack)
    run(tmp_path / "2", [second], judge_model=attack)
    text = compare.write(tmp_path / "out", tmp_path / "1", tmp_path / "2")
    page = (tmp_path / "out" / "compare.html").read_text("utf-8")
    assert "<script>alert" not in page and page.count("&lt;script&gt;alert(1)") > 20
    assert not re.search(r"(?<!\\)<script|^# x", text, re.M)


@pytest.mark.slow
@pytest.mark.parametrize("width, dark", [(1100, True), (360, False)])
def test_look(tmp_path, width, dark):
    sys.path.append(str(Path(__file__).parents[1] / "serve"))       # as pytest does for the tests there
    from browser import browser
    run(tmp_path / "1", eight(n=9, seed=1))
    run(tmp_path / "2", eight(n=9, seed=2))
    compare.write(tmp_path / "out", tmp_path / "1", tmp_path / "2")
    with browser(tmp_path / "browser") as tab:
        tab.look(width, 900, dark)
        tab.open((tmp_path / "out" / "compare.html").as_uri())
        assert tab.js("document.documentElement.scrollWidth") == width and not tab.errors
        columns = tab.js("getComputedStyle(document.querySelector('.both')).gridTemplateColumns.split(' ').length")
        assert columns == (2 if width > 800 else 1)
