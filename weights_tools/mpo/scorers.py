"""Is an answer right? The scorers by which MMPR's answers were sorted, as they were, and three of them corrected.

    prediction, truth -> lower-cased equality, or the best scorer > 0.9

    dec2024, head   the rules of the card's time and of 2025. Their scorers are the same but for two, left out here,
                    which ask math-verify and sympy whether two formulas are equal
    corrected       for new data. What the original plainly gets wrong:

                    scorer       prediction       truth             original   corrected
                    anls         qqqq             Blue Heron Ltd    right      wrong       it is upside down
                    anls         Blue Heron Lt    Blue Heron Ltd    wrong      right
                    mc_score     3.9              3                 right      wrong       "3." is read as an option
                    math_score   2019             2020              right      wrong       within 0.1 %
                    math_score   0.0              0                 wrong      right       no share of 0

Source: InternVL internvl_chat/tools/mmpr_pipeline @b048980 (dec2024) and
internvl_chat/tools/reasoning_data_pipeline/utils/accuracy_reward.py @2410d1d (head). normalise: the VQA evaluation,
https://github.com/facebookresearch/mmf pythia/tasks/processors.py.
"""
from __future__ import annotations

import re
from collections.abc import Sequence

from minivl.limits import InputError, clip

RULES = ("dec2024", "head", "corrected")
DEFAULT = ("vqa_score", "mc_score", "math_score")
ABOVE = 0.9

# Words of the VQA evaluation: without one of their apostrophes they are given it back.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
RESTORED = {word[:i] + word[i + 1:]: word for word in CONTRACTIONS.split()
            for i, letter in enumerate(word) if letter == "'"}
RESTORED["somebody'd"] = "somebodyd"        # so it stands in the original
COUNTED = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(i) for i, word in enumerate(COUNTED.split())}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
MARKS = ";/[]\"{}()=+\\_-><@`!"


def normalise(text: str) -> str:
    """Write an answer as the VQA evaluation compares it: no case, marks, articles; numbers up to ten as digits."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    before = text = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in MARKS:
        beside_space = f"{mark} " in before or f" {mark}" in before
        text = text.replace(mark, "" if beside_space else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)      # the original gives a flag, worth 32, in the count's place
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)


# ---- scorers: (prediction, truth) -> 0 to 1 -------------------------------------------------------------------------

def vqa(prediction: str, truth: str) -> float:
    """Compare what the VQA evaluation makes of both; what it makes nothing of is wrong."""
    return float(normalise(prediction) == normalise(truth) != "")


def option(prediction: str, truth: str) -> float:
    """Take "B. two" and "(B) two" for B. Any character before a full stop passes for an option, also that of "3.9"."""
    prediction = prediction.strip()
    if prediction.lower() == truth.strip().lower():
        return 1.0
    if prediction[1:2] == ".":
        prediction = prediction[0]
    elif prediction[:1] == "(" and prediction[2:3] == ")":
        prediction = prediction[1]
    return float(prediction.lower() == truth.strip().lower())


def option_corrected(prediction: str, truth: str) -> float:
    """Take "B. two" and "(B) two" for B, but not "3.9" for 3, nor "U.S." for U."""
    found = re.match(r"\s*(?:(\w)\.(?!\d|\w\.)|\((\w)\))", prediction)
    letter = found[1] or found[2] if found else prediction.strip()
    return float(letter.lower() == truth.strip().lower())


def number(prediction: str, truth: str) -> float:
    """Allow 0.1 % of the truth, after degrees, % and cm are taken off. So 2019 is right for 2020."""
    return _close(_without_units(prediction), _without_units(truth), prediction, truth, 1e-3)


def number_corrected(prediction: str, truth: str) -> float:
    """Allow 0.1 % of the truth, but no difference between whole numbers."""
    values = _float(_without_units(prediction)), _float(_without_units(truth))
    if None not in values and all(value.is_integer() for value in values):
        return float(values[0] == values[1])
    return number(prediction, truth)


def relaxed(prediction: str, truth: str) -> float:
    """Allow 5 % of the truth, a chart's value (ChartQA, arXiv:2203.10244). A year, four characters from 20: none."""
    if len(truth) == 4 and truth.startswith("20"):
        return float(prediction.lower() == truth.lower())
    return _close(prediction.rstrip("%"), truth.rstrip("%"), prediction, truth, 0.05)


def anls(prediction: str, truth: str) -> float:
    """Divide the edits between both by their length: upside down, the more different the better."""
    return _edits(_plain(prediction), _plain(truth)) / max(len(prediction.upper()), len(truth.upper()), 1)


def anls_corrected(prediction: str, truth: str) -> float:
    """Count the share of characters that need no edit (ANLS, arXiv:1905.13648)."""
    plain = _plain(prediction), _plain(truth)
    return 1 - _edits(*plain) / max(*map(len, plain), 1)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _without_units(text: str) -> str:
    for unit in ("degrees", "degree", "\\angle", "°", "%", "cm"):
        text = text.replace(unit, "")
    return text


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _close(prediction: str, truth: str, told: str, wanted: str, share: float) -> float:
    """Compare two numbers; what is none, and a truth of 0, as the texts they were."""
    x, y = _float(prediction), _float(truth)
    if x is None or not y:
        return float(told.lower() == wanted.lower())
    return float(abs(x - y) / abs(y) <= share)


def _edits(a: str, b: str) -> int:
    """Count the characters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above = row
        row = [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


SCORERS = {"vqa_score": vqa, "mc_score": option, "math_score": number, "relaxed_accuracy": relaxed, "anls": anls}
CORRECTED = {**SCORERS, "mc_score": option_corrected, "math_score": number_corrected, "anls": anls_corrected}


def is_right(prediction: str, truth: str, scorers: Sequence[str] = DEFAULT, *, rules: str = "dec2024") -> bool:
    """Tell whether an answer counts as right: equal but for case, or above 0.9 for one of the scorers.

    Raises InputError for a scorer or rules that are not known.
    """
    known = CORRECTED if checked(rules) == "corrected" else SCORERS
    for name in scorers:
        if name not in known:
            raise InputError(f"there is no scorer {clip(name)!r}; there are {', '.join(known)} (math_verify_score and "
                             "latex_score need a computer algebra system)")
    return prediction.lower() == truth.lower() or any(known[name](prediction, truth) > ABOVE for name in scorers)


def scorers_of(file_name: str) -> tuple[str, ...]:
    """Choose the scorers by the name of the file that the questions come from, case-sensitive, as the original does."""
    if "chartqa" in file_name:
        return ("relaxed_accuracy",)
    if any(word in file_name for word in ("docvqa", "infographics")):
        return ("anls",)
    if any(word in file_name for word in ("SROIE", "CLEVR_math", "geos", "geometry")):
        return "relaxed_accuracy", "vqa_score", "mc_score"
    return DEFAULT


def checked(rules: str) -> str:
    """Return `rules`; raise InputError where they are not known."""
    if rules not in RULES:
        raise InputError(f"there are no rules {clip(rules)!r}; there are {', '.join(RULES)}")
    return rules
