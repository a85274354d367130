"""From answers to pairs, against the original's results on invented answers, and what must hold anyway."""
import json
from collections import Counter

import pytest
from conftest import shared

from minivl import InputError
from weights_tools.mpo.mmpr import Rows, check_answer, write_rows
from weights_tools.mpo.pairs import combine, contained, fix_answer, judge, main, pairs, parse, truncate
from weights_tools.mpo.prompts import LETTER, PROMPTS, prompt, without_picture
from weights_tools.mpo.scorers import SCORERS, scorers_of

KINDS = {"positive": "right", "negative": "wrong", "format_negative": "unread"}


def golden(name):
    return json.loads((shared("golden/mmpr") / name).read_text("utf-8"))


def kind(judged):
    (found,) = [name for name in ("right", "wrong", "unread") if getattr(judged, name)]
    return found


def of(judged):
    ((row,),) = getattr(judged, kind(judged)).values()
    return row


# ---- the original's results -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("rules, name", [("dec2024", "expected_dec2024"), ("head", "expected")])
def test_responses(rules, name):
    rows = golden("responses.json")
    for row in rows:
        want = row[name]
        version = row["prompt_version"] if rules == "head" else "en"      # the older rules know one way to parse
        parsed = want["parsed"] and (want["parsed"]["rationale"], want["parsed"]["answer"])
        assert parse(row["response"], version) == parsed
        scorers = scorers_of(row["dataset"])
        assert list(scorers) == [one for one in want["mode"] if one in SCORERS]
        asks = want.get("question_asks_for_option_letter")
        row = {**row, "prompt_version": version, "question": row["question"] + (f"\n{LETTER}" if asks else "")}
        judged = judge([row], scorers=scorers, rules=rules)
        fixed = judge([row], scorers=scorers, rules=rules, fix=True)
        if rules == "head" and want["parsed"] and set(want["mode"]) - SCORERS.keys():      # less what math-verify says
            right = max(result for one, result in want["scores"].items() if one in SCORERS)
            assert (kind(judged) == "right") == bool(right)
            if "latex_score" not in want["mode"]:
                assert right == want["correct_without_math_verify"]
        else:
            assert kind(judged) == KINDS[want["bucket"]]
            assert kind(fixed) == KINDS[want["bucket_with_answer_fix"]]
        if "fixed_response" in want:
            assert of(fixed)["response"] == want["fixed_response"]
            assert of(fixed)["answer_pred"] == want.get("answer_after_fix", parsed[1])
    assert len(rows) == 20


def sampled(name):
    return [json.loads(line) for line in (shared("golden/mmpr/sampled") / name).read_text("utf-8").splitlines()]


def in_order(rows):
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


def same_pairs(got, want):
    assert in_order(got) == in_order(want or [])


def test_pairs_of_head():
    runs = golden("pairs.json")
    for run in runs:
        rows = sampled(run["file"])
        fix = run["flags"].get("answer_fix", False)
        limit = run["flags"].get("num_pairs_per_key", 15)
        scorers = scorers_of(run["file"])
        judged = judge(rows, scorers=scorers, fix=fix, rules="head")
        found = combine(judged, limit=limit, rules="head")
        same_pairs(found[0].rows, run["correctness_pairs"])
        same_pairs(found[1].rows, run["format_pairs"])
        assert pairs(rows, limit=limit, scorers=scorers, fix=fix, rules="head") == found[0].rows
        if not fix:
            assert pairs(rows, limit=limit, scorers=scorers) == found[0].rows       # dec2024: only the fix differs
        assert [row for rows in judged.right.values() for row in rows] == run["pos_items"]
        same_pairs(judged.unsolved(), run["neg_items"])
        answers, *kinds = run["counts"]
        for name, want in (("right", "num_pos_samples"), ("wrong", "num_neg_samples"),
                           ("unread", "num_format_neg_samples")):
            assert sum(map(len, getattr(judged, name).values())) == answers[want]
        assert len(judged.right.keys() - judged.wrong.keys()) == answers["all_correct"]
        assert len(judged.unsolved()) == answers["all_incorrect"]
        for one, want in zip(found, kinds):
            assert (one.drawn, one.questions) == (want["num_pairs"], want["in_both"])
            assert one.possible == want.get("max_possible_pairs", 0)
            assert one.contained == want.get("entail_skip", 0)
    assert len(runs) == 6


def test_pairs_of_dec2024():
    runs = golden("pairs_dec2024.json")
    for run in runs:
        rows = [row for row in sampled(run["file"]) if row.get("image") and isinstance(row["answer"], str)]
        assert len(rows) == run["rows_used"]
        found = combine(judge(rows, scorers=scorers_of(run["file"]), fix=run["flags"].get("answer_fix", False)))
        same_pairs(found[0].rows, run["correctness_pairs"])
        same_pairs(found[1].rows, run["format_pairs"])
    assert len(runs) == 4


def test_prompts():
    for row in golden("prompts.json"):
        got = prompt(row["question"], row["prompt_version"], picture=row["image"] is not None, rules="head")
        assert got == row["stored_question"]


def test_prefixes():
    for text, ratio, want in golden("truncate.json")["rows"]:
        assert truncate(text, ratio) == want


# ---- without the golden data ----------------------------------------------------------------------------------------

R = "Look.\n\nCount.\n\n"


@pytest.mark.parametrize("response, version, want", [
    (f"{R}Final answer: 7", "en", ("Look.\n\nCount.", "7")), (f"{R}Final Answer:  7 ", "en", ("Look.\n\nCount.", "7")),
    (f"{R}答案: 7", "en", ("Look.\n\nCount.", "7")), (f"{R}Final answer: 7", "zh", ("Look.\n\nCount.", "7")),
    (f"{R}final answer: 7", "en", None), ("Look.\nFinal answer: 7", "en", None),
    (f"{R}Final answer: 7\nSo.", "en", None), ("\n\nFinal answer: 7", "en", None),
    (f"{R}Final answer: 5\nNo.\nFinal answer: 7", "en", ("Look.\n\nCount.\n\nFinal answer: 5\nNo.", "7")),
    (f"{R}Final answer: 5\nFinal answer: 6\nFinal answer: 7", "en", None),
    (f"{R}Final answer:", "en", ("Look.\n\nCount.", "")),
    ("Let me count: \\boxed{1} or \\boxed{\\frac{1}{2}}.", "en_v2", (None, "\\frac{1}{2}")),
    ("Let me count: \\boxed{\\frac{1}{2}.", "zh_v2", (None, "Let me count: \\boxed{\\frac{1}{2}.")),
    ("Let me count them all: \\boxed{}", "en_v2", (None, "")), ("Twelve of \\boxed{12}", "en_v2", None),
    ("Twelve of \\boxed{12}.", "en_v2", (None, "12")),
    ("<think>There are two rows of six.</think>\n\\boxed{12}", "en_r1", (None, "12")),
    ("<think>There are two rows of six: \\boxed{12}</think>\n12", "en_r1", None),
    ("<think>Two rows.</think>\n\\boxed{12}", "zh_r1", None),
    ("<think>There are two rows of six.</think></think>\n\\boxed{12}", "zh_r1", None)])
def test_parse(response, version, want):
    assert parse(response, version) == want


def test_versions():
    assert {len(version) > 2 for version in PROMPTS} == {True, False}
    for call in (parse, prompt):
        with pytest.raises(InputError, match="no prompt version 'de'; there are en, zh, en_v2"):
            call("x", "de")


def test_prompt():
    assert prompt("<image>\nHow many?") == prompt("How many?")
    assert prompt("How many?").startswith("<image>\nYour task is") and prompt("How many?").count("<image>") == 1
    assert prompt("How many <image>?").startswith("<image>\n") and prompt("How many <image>?").endswith("How many ?")
    assert prompt("<image> or <image>?").endswith("\n\n<image> or <image>?")
    assert prompt("1 {question} 2", picture=False).endswith("\n\n1 {question} 2")
    boxed = "x?\nPlease answer the question and put the final answer within \\boxed{}."
    assert prompt(boxed, picture=False).endswith(boxed)
    assert prompt(boxed, picture=False, rules="head").endswith("\n\nx?")
    assert without_picture("<image>\nWhat is this?") == "What is this?"


def test_truncate():
    assert truncate("a b\nc  d", 0.5) == "a b\nc" and truncate("a b c") == "a"
    with pytest.raises(InputError, match="1.5; it must be in 0..1"):
        truncate("a", 1.5)


@pytest.mark.parametrize("prediction, truth, letter, want", [
    ("B. two", "B", True, "B"), ("(b)", "B", True, "B"), ("B", "b", True, "b"), ("two", "B", True, "two"),
    ("Both", "B", True, "Both"), ("", "B", True, ""), ("17", "7", False, "7"), ("30594 km", "30,594", False, "30,594"),
    ("six", "7", False, "six"), ("**7**", "7", False, "7")])
def test_fix(prediction, truth, letter, want):
    response = f"{R}Final answer: "
    assert fix_answer(response + prediction, prediction, truth, letter=letter) == response + want


def test_fix_what_the_original_fails_at():
    assert fix_answer("\n\nSo. Final answer: 7 m", "7 m", "7") is None      # stripped, it has one line
    assert fix_answer(f"{R}Final answer:", "", "") is None


def rows(answer, *responses, question="q", **more):
    return [{"question": question, "answer": answer, "response": text, **more} for text in responses]


def ending(*answers):
    return [f"{R}Final answer: {answer}" for answer in answers]


def chosen_and_rejected(found):
    return [(row["chosen"].rpartition(": ")[2], row["rejected"].rpartition(": ")[2]) for row in found]


def test_rules_of_the_fix():
    """17 for 7: head keeps it wrong and writes 7, dec2024 makes it right, corrected leaves it alone."""
    wrong = rows("7", *ending("17"))
    assert kind(judge(wrong, fix=True)) == "right" and kind(judge(wrong, fix=True, rules="head")) == "wrong"
    assert of(judge(wrong, fix=True, rules="head"))["response"].endswith(": 7")
    corrected = judge(wrong, fix=True, rules="corrected")
    assert kind(corrected) == "wrong" and of(corrected)["response"].endswith(": 17")
    right = rows("B", *ending("B. two"))
    assert of(judge(right, fix=True, rules="corrected"))["response"].endswith(": B")
    assert of(judge(right, fix=True))["response"].endswith(": B")
    asked = [{**row, "question": f"q\n{LETTER}"} for row in rows("B", *ending("**B**"))]      # dec2024 looks at this
    assert kind(judge(asked)) == "wrong" and kind(judge(asked, fix=True)) == "right"


def test_rules_of_containment():
    assert contained("7", "17") and not contained("7", "17", "corrected")
    assert contained("red", "Dark red.") and contained("red", "Dark red.", "corrected")
    question = rows("no", *ending("no", "yes"), "just no")
    assert combine(judge(question))[1].rows == []          # "None" contains "no"
    assert chosen_and_rejected(combine(judge(question, rules="corrected"), rules="corrected")[1].rows) == [
        ("no", "just no")]
    assert len(combine(judge(rows("0", *ending("0"), "just 0"), rules="corrected"), rules="corrected")[1].rows) == 1
    assert pairs(rows("7", *ending("7", "17"))) == []
    assert chosen_and_rejected(pairs(rows("7", *ending("7", "17")), rules="corrected")) == [("7", "17")]


def test_limits(monkeypatch):
    many = rows("7", *(f"{text} " for text in ending(*["7"] * 6)), *ending(*"123456"))
    many = [{**row, "response": f"{i} {row['response']}"} for i, row in enumerate(many)]
    assert len(pairs(many)) == 15 and len(pairs(many, limit=40)) == 36 and len(pairs(many, limit=4)) == 4
    assert pairs(many) == pairs(iter(many)) != pairs(many, seed=1)
    monkeypatch.setattr("weights_tools.mpo.pairs.MANY_ROWS", 11)
    assert len(pairs(many)) == 3 and len(pairs(many, limit=2)) == 2
    monkeypatch.setattr("weights_tools.mpo.pairs.MOST_ROWS", 7)
    assert len(pairs(many)) == 6 and judge(many).rows == 7
    with pytest.raises(InputError, match="0 pairs a question are none"):
        pairs(many, limit=0)


def test_what_a_pair_keeps():
    both = [*rows(7, *ending("7"), meta={"a": 1}, image=["x.png", "y.png"]),
            *rows(7, *ending("8"), image=["x.png", "y.png"])]
    assert pairs([*both, *both]) == [{"image": ["x.png", "y.png"], "question": "q", "chosen": ending("7")[0],
                                      "rejected": ending("8")[0], "answer_gt": "7", "chosen_meta": {"a": 1}}]
    assert "image" not in pairs(rows("7", *ending("7", "8"), image=""))[0]
    assert pairs([*rows("7", *ending("7"), image="x.png"), *rows("7", *ending("8"), image="y.png")]) == []


def test_answers_that_lack_something():
    with pytest.raises(InputError, match="answer 2 has no answer, response; it must be one that was sampled"):
        pairs([*rows("7", "x"), {"question": "q"}])


def test_rows_given_are_left_alone():
    given = rows("B", *ending("B. two", "C"))
    before = json.dumps(given)
    assert Counter(map(str, pairs(given, fix=True))) and json.dumps(given) == before


# ---- the command ----------------------------------------------------------------------------------------------------

def made(folder, *argv):
    """What the command writes: {file name without the stem: what each pair's answers end in}."""
    assert main([str(folder / "mine.jsonl"), str(folder / "out"), *argv]) == 0
    return {path.name.removeprefix("mine_pairs_vqa_"): chosen_and_rejected(Rows(path))
            for path in sorted((folder / "out").glob("*"))}


def test_command(tmp_path, capsys):
    answers = [*rows(3, *ending("3", "3.9"), "3"), *rows("x", *ending("y"))]
    write_rows(tmp_path / "mine.jsonl", answers, check_answer)
    assert made(tmp_path) == {"correctness_rules.jsonl": [("3", "3.9")], "format_rules.jsonl": [("3", "3")]}
    out = capsys.readouterr().out
    assert "4 answers to 2 questions: 1 right, 2 wrong, 1 unread (by vqa_score, mc_score, math_score; corrected" in out
    assert "1 questions never right" in out and "dec2024 rules judge 1 otherwise:\n  '3.9' for '3': wrong here\n" in out
    assert "1 pairs of 1 possible, 0 contained; 1 questions" in out
    assert made(tmp_path, "--rules", "dec2024", "--limit", "1") == {"format_rules.jsonl": [("3.9", "3")]}
    out = capsys.readouterr().out
    assert "2 right, 1 wrong, 1 unread" in out and "otherwise" not in out
    assert "correctness_rules.jsonl: not written: 0 pairs of 0 possible" in out


def test_a_wrong_answer_fixed_to_the_words_of_a_right_one(tmp_path, capsys):
    write_rows(tmp_path / "mine.jsonl", rows("7", *ending("7.", "17", "8")), check_answer)
    assert len(pairs(rows("7", *ending("7.", "17", "8")), fix=True, rules="head")) == 2
    assert made(tmp_path, "--rules", "head", "--fix") == {"correctness_rules.jsonl": [("7", "8")]}
    assert "1 without a difference left out" in capsys.readouterr().out


def test_command_names_file_and_line(tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps(rows("7", "x")[0]) + '\n{"question": "q", "answer": 7}\n')
    with pytest.raises(InputError, match=r"mine\.jsonl, line 2: the row has no response"):
        made(tmp_path)
    write_rows(tmp_path / "mine.jsonl", rows("7", *ending("7", "8")), check_answer)
    with pytest.raises(InputError, match="-2 pairs a question are none"):
        made(tmp_path, "--limit", "-2")
