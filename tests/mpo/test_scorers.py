"""Right or wrong: the original's rules value by value, the corrected ones beside them."""
import json

import pytest
from conftest import shared

from minivl import InputError
from weights_tools.mpo.scorers import CORRECTED, SCORERS, is_right, normalise, scorers_of


def test_the_original_s_results():
    """Those that need math-verify or sympy are left out: of a list, both names, of single ones, the row."""
    rows = json.loads((shared("golden/mmpr") / "check_answer.json").read_text("utf-8"))["rows"]
    compared = 0
    for prediction, truth, scorers, result in rows:
        if set(scorers) <= SCORERS.keys():
            assert is_right(prediction, truth, scorers) == bool(result), (prediction, truth, scorers)
            assert is_right(prediction, truth, scorers, rules="head") == bool(result)
            compared += 1
    assert compared == 15 * 6


def test_the_original_s_normal_forms():
    for text, want in json.loads((shared("golden/mmpr") / "normalise.json").read_text("utf-8")):
        assert normalise(text) == want


def test_the_original_s_scorers_of_files():
    for name, want in json.loads((shared("golden/mmpr") / "modes.json").read_text("utf-8")).items():
        assert list(scorers_of(name)) == [one for one in want if one in SCORERS], name


def test_scorers_by_name():
    assert scorers_of("my_chartqa_geometry.jsonl") == ("relaxed_accuracy",)
    assert scorers_of("Geometry.jsonl") == scorers_of("sroie.jsonl") == ("vqa_score", "mc_score", "math_score")


@pytest.mark.parametrize("text, want", [
    ("1,000 Boats!", "1000 boats"), ("two-way", "2 way"), ("- a b", "b"), ("3.5.", "3.5"), ("None", "0"),
    ("yall'll", "y'all'll"), ("y'alld've", "y'all'd've"), ("somebody'd", "somebodyd"), ("he's", "he 's"),
    ("hes", "he's"), ("a/b c/ d", "ab c d"), ("twas", "'twas"), ("", ""),
    (". " * 40, " ".join("." * 8))])      # the original takes 32 full stops out
def test_normalise(text, want):
    assert normalise(text) == want


# prediction, truth, scorer, as the original has it, corrected
CASES = [
    ("3.9", "3", "mc_score", True, False), ("3. boats", "3", "mc_score", True, True),
    ("3.", "3", "mc_score", True, True), ("U.S.", "U", "mc_score", True, False),
    ("B. two", "b", "mc_score", True, True), ("B.two", "b", "mc_score", True, True),
    ("(c) red", "C", "mc_score", True, True), ("D) granite", "D", "mc_score", False, False),
    ("(?) red", "?", "mc_score", True, False), ("red", "Red ", "mc_score", True, True),
    ("2019", "2020", "math_score", True, False), ("12 cm", "12cm", "math_score", True, True),
    ("0.0", "0", "math_score", False, True), ("3.141", "3.1416", "math_score", True, True),
    ("3.13", "3.1416", "math_score", False, False), ("45°", "45 degrees", "math_score", True, True),
    ("nan", "3", "math_score", False, False), ("inf", "-inf", "math_score", False, False),
    ("qqqq", "Blue Heron Ltd", "anls", True, False), ("Blue Heron Lt", "Blue Heron Ltd", "anls", False, True),
    ("blue  heron ltd", "Blue Heron Ltd", "anls", False, True), ("", "x", "anls", True, False),
    ("axxxxxxxxx", "abcdefghij", "anls", False, False), ("\\angle 45", "45", "math_score", True, True),
    ("40", "42", "relaxed_accuracy", True, True), ("39", "42", "relaxed_accuracy", False, False),
    ("2015", "2016", "relaxed_accuracy", False, False), ("40%", "42", "relaxed_accuracy", True, True),
    ("the", "a", "vqa_score", False, False), ("ten", "10", "vqa_score", True, True)]


@pytest.mark.parametrize("prediction, truth, scorer, exact, corrected", CASES)
def test_original_and_corrected(prediction, truth, scorer, exact, corrected):
    assert is_right(prediction, truth, [scorer]) is exact
    assert is_right(prediction, truth, [scorer], rules="head") is exact
    assert is_right(prediction, truth, [scorer], rules="corrected") is corrected


def test_only_three_are_corrected():
    assert {name for name in SCORERS if SCORERS[name] is not CORRECTED[name]} == {"mc_score", "math_score", "anls"}


def test_equal_needs_no_scorer():
    assert is_right("A", "a", []) and not is_right("A", "b", [])


def test_what_is_not_known():
    with pytest.raises(InputError, match="no scorer 'math_verify_score'.*vqa_score.*computer algebra"):
        is_right("1", "1", ["vqa_score", "math_verify_score"])
    with pytest.raises(InputError, match="no rules 'today'; there are dec2024, head, corrected"):
        is_right("1", "1", rules="today")
