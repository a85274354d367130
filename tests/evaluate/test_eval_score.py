"""Scorers: what VLMEvalKit's own functions gave, string by string; and invented cases that need no data."""
import json
import math

import pytest
from conftest import shared

from minivl import InputError
from weights_tools.evaluate import score
from weights_tools.evaluate.benchmarks import BENCHMARKS, Benchmark, Row, Verdict
from weights_tools.evaluate.judge import JudgeError
from weights_tools.evaluate.score import infer_option, numbers, ocrbench_hit, units, verdicts, yes_no

KITE = {"A": "a red kite", "B": "a blue boat", "C": "a green hill", "D": "a white bird"}
each_version = pytest.mark.parametrize("version, key", [("2024", "expected_dec2024"), ("head", "expected_head")])


def golden(name):
    return json.loads((shared("golden/evaluate") / f"{name}.json").read_text("utf-8"))


def expected(case, key):
    return case[key] if key in case else case["expected"]


def rows_of(items):
    """Rows as the reader of TSV files gives them, and the predictions."""
    rows = []
    for line, item in enumerate(items, start=2):
        fields = {name: None if value is None else str(value) for name, value in item.items()
                  if name not in ("index", "prediction", "score", "res", "log")}
        rows.append(Row(item["index"], fields, list, line))
    return rows, [item["prediction"] for item in items]


def row(index=0, **fields):
    return Row(index, fields, list, 2)


def one(name, prediction, judge=None, version="2024", **fields):
    """The verdict of a single row."""
    return verdicts(BENCHMARKS[name], [row(**fields)], [prediction], judge=judge, version=version)[0]


def scored(name, items, **options):
    """The verdicts and the numbers of a benchmark."""
    rows, predictions = rows_of(items)
    found = verdicts(BENCHMARKS[name], rows, predictions, **options)
    return found, numbers(BENCHMARKS[name], rows, found)


# ---- beside VLMEvalKit ----------------------------------------------------------------------------------------------

@each_version
def test_options_as_the_original(version, key):
    for case in golden("mcq_infer"):
        answer, choices, want = case["prediction"], case["choices"], expected(case, key)
        before = dict(choices)
        assert score.by_letter(str(answer), choices, version) == want["option"], case
        assert score.by_text(str(answer), choices, version) == want["text"], case
        assert infer_option(answer, choices, version) == want["infer"], case
        assert choices == before


@each_version
def test_yes_no_as_the_original(version, key):
    for case in golden("yes_no_extract"):
        assert yes_no(case["text"], version) == expected(case, key), case
    for case in golden("process_punctuation"):
        assert score.without_marks(case["text"], version) == expected(case, key), case


@each_version
def test_multiple_choice_as_the_original(version, key):
    for table in golden("mcq_vanilla"):
        name = {"MMStar": "MMStar", "MMMU_DEV_VAL": "MMMU"}[table["dataset"]]
        want = expected(table, key)
        found, values = scored(name, table["rows"], version=version)
        assert {str(verdict.index): verdict.right for verdict in found} == want["hits"]
        for verdict in found:
            assert (verdict.by == "nobody") == ("Failed in Prefetch" in want["logs"][str(verdict.index)])
        split = BENCHMARKS[name].split or "none"
        accuracy = next(line for line in want["acc"] if line["split"] == split)
        for part, value in accuracy.items():
            if part != "split":
                assert values["score" if part == "Overall" else part] == 100 * value, (name, part)
        assert len(values) == len(accuracy) - 1


@pytest.mark.parametrize("version", ["2024", "head"])
def test_circular_as_the_original(version):
    """Also beside what the original calls vanilla: the rows one by one."""
    short = {"coarse_perception": "CP", "logic_reasoning": "LR"}
    for table in golden("mmbench"):
        want = table["expected"]
        rows, _ = rows_of(table["rows"])
        found, _ = scored("MMBench_V11", table["rows"], version=version)
        hits = {str(rows[unit[0]].index): all(found[i].right for i in unit)
                for unit in units(BENCHMARKS["MMBench_V11"], rows)}
        assert hits == want["circular_hits"]
        assert {str(verdict.index): verdict.right for verdict in found} == want["vanilla_all_hits"]
        for line, alone in zip(want["circular"], want["vanilla_all"]):
            _, values = scored("MMBench_V11", [x for x in table["rows"] if x["split"] == line["split"]])
            assert values.pop("score") == pytest.approx(100 * line["Overall"], rel=1e-14)
            assert values.pop("vanilla") == pytest.approx(100 * alone["Overall"], rel=1e-14)
            there = {short.get(part, part): value for part, value in values.items()}
            assert there == pytest.approx({part: 100 * value for part, value in line.items()
                                           if part not in ("split", "Overall") and value != "nan"}, rel=1e-14)


@pytest.mark.parametrize("version", ["2024", "head"])
def test_hallusionbench_as_the_original(version):
    for table in golden("hallusionbench"):
        found, values = scored("HallusionBench", table["rows"], version=version)
        for verdict, want in zip(found, table["expected"]["rows"], strict=True):
            assert verdict.index == want["index"]
            assert (verdict.extracted or "Unknown") == want["extracted"]
            assert bool(verdict.right) == want["score"]
        compared = 1
        for line in table["expected"]["scores"]:
            before = "" if line["split"] == "Overall" else f"{line['split']} "
            for name in ("aAcc", "fAcc", "qAcc"):
                assert values[before + name] == pytest.approx(line[name], rel=1e-14)
                compared += 1
        assert compared == len(values)
        assert values["score"] == pytest.approx(sum(values[name] for name in ("aAcc", "fAcc", "qAcc")) / 3)


def test_ocrbench_as_the_original():
    for table in golden("ocrbench"):
        found, values = scored("OCRBench", table["rows"])
        want = table["expected"]
        assert [verdict.right for verdict in found] == want["hits"]
        for item, hit in zip(table["rows"], want["hits"]):
            assert ocrbench_hit(item["category"], score.list_in(item["answer"]), item["prediction"]) == hit, item
        size = {"Text Recognition": 0, "score": len(found)}
        for item in table["rows"]:
            name = "Text Recognition" if item["category"] in score.RECOGNITION else item["category"]
            size[name] = size.get(name, 0) + 1
        points = {name: values[name] * size[name] / 100 for name in size}
        points["Final Score"] = points.pop("score")
        assert points["Final Score"] / 10 == pytest.approx(want["scores"].pop("Final Score Norm"))
        assert points == pytest.approx(want["scores"])


@pytest.mark.parametrize("version", ["2024", "head"])
def test_mathvista_as_the_original(version):
    for case in golden("mathvista"):
        found = score.math_prefetch(case["line"], case["line"]["prediction"], version)
        want = case["expected"]["prefetch"]
        assert str(found) == str(want), case
        assert type(found) is type(want) or found in (math.inf, -math.inf) or found != found, case
    for case in golden("mathvista_post_check"):
        assert score.math_hit(case["line"], case["line"]["res"], version) == case["expected"], case
    for table in golden("mathvista_scores"):
        rows, _ = rows_of(table["rows"])
        found = [Verdict(item["index"], item["res"], float(score.math_hit(item, item["res"])), "rule")
                 for item in table["rows"]]
        values = numbers(BENCHMARKS["MathVista"], rows, found)
        want = {line["Task&Skill"]: line["acc"] for line in table["expected"]}
        assert {"Overall": values.pop("score"), **values} == pytest.approx(want, rel=1e-14)


def test_mmvet_as_the_original():
    for table in golden("mmvet_scores"):
        rows, _ = rows_of(table["rows"])
        found = [Verdict(item["index"], None, item["score"], "judge") for item in table["rows"]]
        values = numbers(BENCHMARKS["MMVet"], rows, found)
        want = {line["Category"]: line["acc"]
                for line in table["expected"]["by_combination"] + table["expected"]["by_capability"]}
        assert {"Overall": values.pop("score"), **values} == pytest.approx(want, rel=1e-14)


# ---- without the data -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, then, today", [
    ("C", "C", "C"), ("(C).", "C", "C"), ("**B** a blue boat", "B", "B"), ("Z", "Z", "Z"), ("c", False, False),
    ("A man flies a kite in the park", "A", False), ("A, B", False, False), ("A or A", "A", "A"),
    ("A, B or Z", False, False), ("A or Z", "A", "A"),
    ("B, since there is water all around it", "B", False), ("I see a blue boat", "B", "B"),
    ("one two three B five six seven", "B", "B"), ("one two B four five six seven", "B", False),
    ("The answer is B, for it is on the water and has a sail", "B", "B"),
    ("The correct answer is **d**, for nothing else there has wings and flies", False, "D"),
    ("The answer is clearly on the left, far away, and it is not easy to see it", False, "C"),
    ("a red kite over a blue boat", False, False), ("Sorry, but Cannot determine the answer: A", "Z", "Z"),
    ("Failed to obtain answer via API. A", False, False),
    ("On the water, quite far from the land, there is a blue boat with a sail; it is going to the harbour.", "B",
     False)])
def test_options(answer, then, today):
    """Sources of these: the rules as they are described; a regular expression takes the first letter of "clearly"."""
    assert infer_option(answer, KITE) == infer_option(answer, KITE, "2024") == then
    assert infer_option(answer, KITE, "head") == today


def test_options_of_numbers_and_of_parts_of_words():
    assert infer_option("yesterday", {"A": "Yes", "B": "No"}) == "A"
    assert infer_option(2.5, {"A": 2.5, "B": 3}) == "A"
    assert infer_option("It says B", {}) is False
    assert infer_option("anything", {}, "head") is False
    assert infer_option("E", {"E": "x"}) == "E"


@pytest.mark.parametrize("text, then, today", [
    ("Yes.", "Yes", "Yes"), ("NO", "No", "No"), ("yes, not no", "Unknown", "Unknown"), ("", "Unknown", "Unknown"),
    ("(No) way", "No", "No"), ("yes/no", "Unknown", "Unknown"), ("a/no", "No", "No"), ("no. 7.", "No", "No"),
    ("1,5 a/no", "Unknown", "Unknown"), ("figure 3.no", "Unknown", "Unknown"), ("in 3. no", "No", "No"),
    ("nothing", "Unknown", "Unknown"), ("yes 2. ", "Yes", "Yes"), ("2 .no", "No", "No")])
def test_yes_no(text, then, today):
    assert yes_no(text) == then
    assert yes_no(text, "head") == today


def test_a_stop_after_a_digit():
    assert score.without_marks("1. a 2.5 b.") == "1 a 2.5 b"
    assert score.without_marks("1. a 2.5 b.", "head") == "1. a 2.5 b"
    assert score.without_marks("a " + "." * 40) == "a " + "." * 8


@pytest.mark.parametrize("category, answers, prediction, hit", [
    ("Regular Text Recognition", ["7"], "17", True), ("Scene Text-centric VQA", ["Main St"], "on main\nst.", True),
    ("Scene Text-centric VQA", ["a  b"], "a b", False), ("anything", [""], "x", True), ("anything", [], "x", False),
    ("Handwritten Mathematical Expression Recognition", ["x ^ 2"], " x^\n2 + 1", True),
    ("Handwritten Mathematical Expression Recognition", ["X"], "x", False), ("Doc-oriented VQA", ["no", 5], "5", True)])
def test_reading(category, answers, prediction, hit):
    assert ocrbench_hit(category, answers, prediction) is hit


def math_row(kind, answer, **more):
    return {"question_type": "free_form", "answer_type": kind, "answer": answer, **more}


def test_mathvista():
    assert one("MathVista", "7", **math_row("integer", "7")) == Verdict(0, "7", 1.0, "rule")
    assert one("MathVista", "It is 7", **math_row("integer", "7")) == Verdict(0, None, 0.0, "nobody")
    assert one("MathVista", "red", **math_row("text", "red")) == Verdict(0, None, 0.0, "nobody")
    assert one("MathVista", "0", **math_row("integer", "0")).right == 1
    assert one("MathVista", "8", **math_row("integer", "0")).right == 0
    choice = {"question_type": "multi_choice", "choices": "['top', 'low']", "answer": "top", "answer_option": "A"}
    assert one("MathVista", "(A) top", **choice) == Verdict(0, "A", 1.0, "rule")
    assert one("MathVista", "it is low", **choice) == Verdict(0, "B", 0.0, "rule")
    broken = one("MathVista", "A", **{**choice, "choices": "[top"})
    assert broken.right is None and "no list" in broken.note
    assert one("MathVista", "A", **{**choice, "answer_option": None}).right is None


def test_mmmu_open_questions():
    """A choice between the truth and "Other Answers"; a whole sentence that has the truth in it is right."""
    assert one("MMMU", "It is the stem.", answer="stem") == Verdict(0, "A", 1.0, "rule")
    assert one("MMMU", "the leaf", answer="stem") == Verdict(0, None, 0.0, "nobody")
    assert one("MMMU", "the leaf, so other answers", answer="stem").extracted == "B"
    assert one("MMMU", "C", **KITE, answer="C").right == 1


def test_only_the_split_makes_the_number():
    rows = [row("dev_1", **KITE, answer="A", split="dev"), row("validation_1", **KITE, answer="A", split="validation")]
    found = verdicts(BENCHMARKS["MMMU"], rows, ["A", "B"])
    assert [verdict.right for verdict in found] == [1, 0]
    assert numbers(BENCHMARKS["MMMU"], rows, found) == {"score": 0}
    assert units(BENCHMARKS["MMMU"], rows) == [[1]]
    assert numbers(BENCHMARKS["MMMU"], rows[:1], found[:1]) == {}


def test_circular():
    bench = BENCHMARKS["MMBench_V11"]
    turned = {"A": "a blue boat", "B": "a red kite"}
    both = {"A": "a red kite", "B": "a blue boat"}
    about = {"category": "thing", "l2-category": "perception"}
    rows = [row(5, **both, answer="A", **about), row(6, **both, answer="B", **about),
            row(1000006, **turned, answer="A", **about), row(1000005, **turned, answer="B", **about)]
    assert units(bench, rows) == [[0, 3], [1, 2]]
    found = verdicts(bench, rows, ["A", "B", "A", "A"])
    assert [verdict.right for verdict in found] == [1, 1, 1, 0]
    assert numbers(bench, rows, found) == {"score": 50, "vanilla": 75, "perception": 50, "thing": 50}
    assert len(units(bench, [row(i, answer="A") for i in (7, 100007, 1100007)])) == 2
    named_by_group = [row(i, g_index="9", **both, answer="A") for i in (9, 1000010)]
    assert units(bench, named_by_group) == [[0, 1]]


def test_hallusionbench_figures_and_questions():
    rows = [row(f"h_VS_map_{place}", answer="Yes", category="VS", **{"l2-category": "map"})
            for place in ("0_1_0", "0_1_1", "0_2_0", "0_2_1")]
    bench = BENCHMARKS["HallusionBench"]
    assert units(bench, rows) == [[0, 1], [2, 3]]
    found = verdicts(bench, rows, ["yes", "yes", "no", "yes"])
    values = numbers(bench, rows, found)
    assert list(values)[:4] == ["score", "aAcc", "fAcc", "qAcc"]
    assert [values[name] for name in ("aAcc", "fAcc", "qAcc")] == [75, 50, 50]
    alone = verdicts(bench, [row(3, answer="No")], ["no"])[0]
    assert alone.right == 1 and "stands alone" in alone.note


def test_what_cannot_be_told_counts_nowhere():
    assert one("MMBench_V11", "A", **KITE) == Verdict(0, "A", None, "rule")
    assert one("HallusionBench", "yes", index="a_b_c_0_0_0").right is None
    assert one("OCRBench", "x", category="y").right is None
    broken = one("OCRBench", "x", category="y", answer="['x'")
    assert broken.right is None and "no Python list" in broken.note
    rows = [row(0, answer="['x'", category="y"), row(1, answer="['x']", category="y")]
    found = verdicts(BENCHMARKS["OCRBench"], rows, ["x", "x"])
    assert numbers(BENCHMARKS["OCRBench"], rows, found) == {"score": 100, "y": 100}
    assert one("MMVet", "x", answer="x") == Verdict(0, None, None, "nobody")
    assert numbers(BENCHMARKS["MMVet"], [row()], [one("MMVet", "x", answer="x")]) == {}


@pytest.mark.parametrize("name, fields", [
    ("MMStar", {**KITE, "answer": "A"}), ("MMMU", {"answer": "stem"}), ("OCRBench", {"answer": "['']"}),
    ("MathVista", math_row("integer", "1")), ("HallusionBench", {"answer": "No", "index": "a_b_c_0_0_0"})])
def test_what_was_not_asked_is_wrong(name, fields):
    verdict = one(name, None, **fields)
    assert verdict.right == 0 and verdict.by == "nobody" and verdict.note == "it was not asked"
    assert one(name, None, **{**fields, "answer": None}).right in ((0,) if name == "MMMU" else (None,))


def test_what_was_not_asked_needs_no_judge():
    calls = []
    judge = lambda prompt, temperature: calls.append(prompt) or "1"
    assert one("MMVet", None, judge=judge, answer="x").right == 0
    assert one("MMVet", None, answer="x").right is None
    assert not calls


def test_an_answer_passes_through_a_spreadsheet():
    """There "None" is no value, and read as nan."""
    assert one("OCRBench", "None", answer="['none']", category="x").right == 0
    assert one("OCRBench", "None of it", answer="['none']", category="x").right == 1
    assert one("MMStar", "n/a", A="banana", B="an", answer="B").right == 1
    assert one("MMStar", "", A="banana", B="an", answer="B").right == 1


def test_vet_by_rule():
    assert score.named("red<AND>star", "red, star") == 1
    assert score.named("red <AND> star", "A hundred, RED") == 0.5
    assert score.named("big star<OR>large star<AND>left", "a large star, on the right") == 0.5
    assert score.named("at the top red star<AND>LAMP", 'It says "lamp", and there is a RED star at the top.') == 1
    assert score.named("red star <AND> blue ring", "A red star and a green ring") == 0.5
    assert score.named("big star<OR>large star<AND>left", "a large star on the right") == 0
    assert score.named("big star<OR>large star<AND>left", "a large star") == 0.5
    assert score.named("star", "stars") == 0
    assert score.named("star", "a star, a ring\nand a cross.") == pytest.approx(1 / 3)      # who invents says more
    assert score.named("star<AND>star", "a star") == 0.5
    assert score.named("star", "") == 0
    bench = Benchmark("NanoMMVet", "MMVet", ("NanoMMVet",), "vet", ("answer",), ruled=True)
    rows = [row(0, answer="red<AND>star", category="rec"), row(1, answer="left", category="rec,spat")]
    found = verdicts(bench, rows, ["a red, a kite", "the left"])
    assert found == [Verdict(0, "0.50", 0.5, "rule"), Verdict(1, "1.00", 1.0, "rule")]
    # "rec" alone counts twice in rec, as in the original
    assert numbers(bench, rows, found) == pytest.approx(
        {"score": 75, "rec": 200 / 3, "spat": 100, "rec_spat": 100})


def test_shares():
    assert score.share_in(" 0.5\n") == 0.5 and score.share_in("1") == 1
    assert {score.share_in(text) for text in ("nan", "1.1", "-0.1", "0.5.", "half", "")} == {None}


def test_what_is_refused():
    with pytest.raises(InputError, match=r"there are no scorers '2025'; there are 2024, head"):
        verdicts(BENCHMARKS["MMStar"], [], [], version="2025")
    with pytest.raises(InputError, match="1 rows and 0 predictions"):
        verdicts(BENCHMARKS["MMStar"], [row()], [])


def test_a_failing_judge_loses_nothing():
    """Each row has a verdict in its place; those that rules decide do not need the judge."""
    def judge(prompt, temperature):
        raise JudgeError("cannot be reached")
    rows = [row(i, **KITE, answer="A", question="q") for i in range(3)]
    found = verdicts(BENCHMARKS["MMStar"], rows, ["A", "hm", "B"], judge=judge)
    assert [(verdict.index, verdict.right, verdict.by) for verdict in found] == [
        (0, 1, "rule"), (1, 0, "nobody"), (2, 0, "rule")]
    assert found[1].note == "the judge cannot be reached (3x)"
