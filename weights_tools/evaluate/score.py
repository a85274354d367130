"""Is an answer right? The rules of VLMEvalKit, text in, verdict out; and the numbers that a table shows.

    prediction, row -> verdicts (one each: what was found in the answer, right or wrong, by whom) -> numbers

    version "2024"      the card's time: use it to compare with the card
    version "head"      August 2026: a letter counts only near the end, long answers are not searched for an option

                                        answer to A. a red kite, B. a blue boat     2024    head
                                        A man flies a kite in the park              A       nothing
                                        B, since there is water all around it       B       nothing
                                        The answer is B, as far as I can see it     B       B

Where the rules find nothing a judge is asked (judge.py). Without one nobody is: that counts as wrong, for MMVet as
unknown, since it has no rules.
Source: VLMEvalKit @00e0cf87 (2024-12-26) and @e8e78f05 (2026-08): vlmeval/utils/matching_util.py, vlmeval/dataset/utils
multiple_choice.py, yorn.py, mathvista.py, mmvet.py, vlmeval/dataset/image_vqa.py (OCRBench).
"""
from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase

from tqdm import tqdm

from minivl.limits import InputError, clip
from weights_tools.evaluate import judge as judging
from weights_tools.evaluate.benchmarks import MISSING, OPTIONS, Benchmark, Row, Verdict

VERSIONS = ("2024", "head")
NO_ANSWER = "Failed to obtain answer via API"       # what VLMEvalKit writes for an answer when a service failed
REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")
APART = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# Only "head": no word needs to end after the letter, so "the answer is a dog" is A, and "answer is blue" B.
DECLARED = re.compile(r"answer\s+is\s+\**([a-d])", re.IGNORECASE)

Judge = Callable[[str, float], str]


# ---- multiple choice ------------------------------------------------------------------------------------------------

def infer_option(answer: str, choices: Mapping[str, object], version: str = "2024") -> str | bool:
    """Find the option that an answer means: its letter, "Z" for none of them (a refusal), or False: not found.

    First a letter that stands alone, then the text of an option. Source: matching_util.py, can_infer.
    """
    answer = str(answer)
    return by_letter(answer, choices, version) or by_text(answer, choices, version)


def by_letter(answer: str, choices: Mapping[str, object], version: str = "2024") -> str | bool:
    """Find the one letter of an option that stands as a word of its own, a capital; in "2024" also the article A."""
    if NO_ANSWER in answer:
        return False
    if any(refusal in answer for refusal in REFUSALS):
        return "Z"
    words = answer.translate(APART).split()
    letters = [letter for letter in choices if letter in words]
    if len(letters) == 1 and (version == "2024" or words.index(letters[0]) > len(words) - 5):
        return letters[0]
    if not letters and "Z" in words:
        return "Z"
    declared = DECLARED.search(answer) if version == "head" else None
    return declared[1].upper() if declared and declared[1].upper() in choices else False


def by_text(answer: str, choices: Mapping[str, object], version: str = "2024") -> str | bool:
    """Find the one option whose text is a part of the answer, also inside a word: "yesterday" says Yes."""
    texts = {letter: str(text).lower() for letter, text in choices.items()}
    if version == "head" and len(answer.lower()) > 2 * sum(len(str(text)) for text in choices.values()):
        return False
    found = [letter for letter, text in texts.items() if text in answer.lower()]
    return found[0] if len(found) == 1 else False


def _mcq(benchmark: Benchmark, row: Row, prediction: str, version: str, judge: Judge | None) -> Verdict:
    choices, truth = _choices(benchmark, row.fields)
    found, by, note = infer_option(prediction, choices, version), "rule", ""
    if not found and judge:
        prompt = judging.option_prompt(row.fields.get("question") or "", choices, prediction)
        by = "judge"
        # Three times the same question; the original leaves the temperature to the service.
        found, note = judging.ask(judge, prompt, lambda said: infer_option(said, choices, version) or None, 3, warmer=0)
    right = None if truth is None else float(found == truth)
    return Verdict(row.index, found or None, right, by if found else "nobody", note)


def _choices(benchmark: Benchmark, fields: Mapping[str, str | None]) -> tuple[dict[str, str], str | None]:
    """Collect the options that are there, and the letter of the right one.

    MMMU's open questions become a choice between the truth and "Other Answers".
    """
    choices = {letter: fields[letter] for letter in OPTIONS if fields.get(letter) is not None}
    truth = fields.get("answer")
    if "MMMU" in benchmark.name:
        if "A" not in choices:
            choices = {"A": truth, **choices, "B": "Other Answers"}
            choices = {letter: text for letter, text in choices.items() if text is not None}
        truth = truth if truth in set(ascii_uppercase) else "A"
    return choices, truth


# ---- yes or no ------------------------------------------------------------------------------------------------------

MARKS = ';/[]"{}()=+\\_-><@`,?!'
DIGITS_APART = re.compile(r"\d,\d")
# A digit before the stop was to be kept, but the pattern asked for "<=" and a digit; today's does what was meant.
STOPS = {"2024": re.compile(r"\.(?!\d)"), "head": re.compile(r"(?<!\d)\.(?!\d)")}


def yes_no(text: str, version: str = "2024") -> str:
    """Find "Yes" or "No" in an answer, as words; both or none of them: "Unknown". Source: yorn.py, YOrN_Extraction."""
    words = without_marks(text.lower(), version).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def without_marks(text: str, version: str = "2024") -> str:
    """Take the marks out of a text, as the VQA evaluation does. Each goes, or becomes a space where none is beside it.

    Source: vlmeval/dataset/utils/vqa_eval.py, process_punctuation.
    """
    all_go = DIGITS_APART.search(text)
    table = {ord(mark): "" if all_go or f"{mark} " in text or f" {mark}" in text else " " for mark in MARKS}
    return STOPS[version].sub("", text.translate(table), count=32)      # a flag, worth 32, stands where the count goes


def _yes_no(benchmark: Benchmark, row: Row, prediction: str, version: str, judge: Judge | None) -> Verdict:
    read = lambda said: None if (word := yes_no(said, version)) == "Unknown" else word
    found, by, note = read(prediction), "rule", ""
    if found is None and judge:
        by = "judge"
        found, note = judging.ask(judge, judging.yes_no_prompt(row.fields.get("question") or "", prediction), read, 5)
    truth = row.fields.get("answer")
    right = None if truth is None else float(found == truth)
    if len(str(row.index).split("_")) < 6:
        note = f"{note}; its index names no set, figure and question: it stands alone".removeprefix("; ")
    return Verdict(row.index, found, right, by if found else "nobody", note)


def place(row: Row) -> tuple:
    """Give category, set, figure and question of a row of HallusionBench; Overall ignores `category`, VD and VS."""
    parts = str(row.index).split("_")
    return (row.fields.get("l2-category"), *(parts[3:6] if len(parts) > 5 else [row.index] * 3))


# ---- reading --------------------------------------------------------------------------------------------------------

FORMULAS = "Handwritten Mathematical Expression Recognition"
RECOGNITION = ("Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition",
               "Handwriting Recognition", "Digit String Recognition", "Non-Semantic Text Recognition")


def ocrbench_hit(category: str, answers: Sequence[str], prediction: str) -> bool:
    """Tell whether an answer is a part of the prediction, so that "17" has a "7", and an empty one is always there.

    Case counts in formulas, where blanks and lines do not; elsewhere not. Source: image_vqa.py, OCRBench.evaluate.
    """
    return _read(category, answers, prediction) is not None


def _read(category: str, answers: Sequence[str], prediction: str) -> str | None:
    if category == FORMULAS:
        plain = lambda text: str(text).strip().replace("\n", " ").replace(" ", "")
    else:
        plain = lambda text: str(text).lower().strip().replace("\n", " ")
    return next((str(answer) for answer in answers if plain(answer) in plain(prediction)), None)


def _ocr(benchmark: Benchmark, row: Row, prediction: str, version: str, judge: Judge | None) -> Verdict:
    truth = row.fields.get("answer")
    answers = list_in(truth)
    if answers is None:
        note = "" if truth is None else f"its answer {clip(truth, 60)!r} is no Python list"
        return Verdict(row.index, None, None, "nobody", note)
    found = _read(row.fields.get("category") or "", answers, prediction)
    return Verdict(row.index, found, float(found is not None), "rule")


def list_in(text: str | None) -> list | None:
    """Read a Python list or tuple from a text; None where it is none."""
    try:
        value = ast.literal_eval(text or "")
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
    return list(value) if isinstance(value, (list, tuple)) else None


# ---- MathVista ------------------------------------------------------------------------------------------------------

def math_read(fields: Mapping[str, str | None], response: object, version: str = "2024") -> tuple[object, object]:
    """Read a response as MathVista does: (what it says, what it should say), which are equal where it is right.

    Whole numbers and decimals as Python reads them: "1_0" is 10. Texts and lists are never compared; they say "None".
    Source: mathvista.py, post_check.
    """
    truth = fields["answer"]
    if fields["question_type"] == "multi_choice":
        choices = dict(zip(ascii_uppercase, list_in(fields["choices"]) or []))
        return infer_option(response, choices, version), fields["answer_option"]
    kind = {"integer": int, "float": float}.get(fields["answer_type"])
    if kind is None:
        return "None", str(truth)
    said = None
    try:
        said = kind(response)
        return said, kind(truth)
    except (ValueError, OverflowError):
        return said, truth


def math_prefetch(fields: Mapping[str, str | None], prediction: object, version: str = "2024") -> object:
    """Find an answer without a judge, or False. Any option that is found is final, of numbers only the right one."""
    said, truth = math_read(fields, prediction, version)
    return said if fields["question_type"] == "multi_choice" or said == truth else False


def math_hit(fields: Mapping[str, str | None], result: object, version: str = "2024") -> bool:
    """Tell whether what was found, by rule or judge, is the truth."""
    said, truth = math_read(fields, result, version)
    return said == truth


def _math(benchmark: Benchmark, row: Row, prediction: str, version: str, judge: Judge | None) -> Verdict:
    names = ("question_type", "answer_type", "choices", "answer_option")
    fields = {**dict.fromkeys(names), **row.fields, "answer": _or_nan(row.fields.get("answer"))}
    multiple = fields["question_type"] == "multi_choice"
    if (fields["answer_option"] if multiple else row.fields.get("answer")) is None:
        return Verdict(row.index, None, None, "nobody")
    if multiple and list_in(fields["choices"]) is None:
        return Verdict(row.index, None, None, "nobody", f"its choices {clip(fields['choices'], 60)!r} are no list")
    found = math_prefetch(fields, prediction, version)
    # A right 0 is false for Python: the original asks the judge about it. Without one it is right.
    if found or found is not False and not judge:
        return Verdict(row.index, str(found), float(math_hit(fields, found, version)), "rule")
    if not judge:
        return Verdict(row.index, None, 0.0, "nobody")
    said, note = judging.ask(judge, judging.math_prompt(row.fields.get("question") or "", prediction), str, 5)
    if said is None:
        return Verdict(row.index, None, 0.0, "nobody", note)
    return Verdict(row.index, clip(said), float(math_hit(fields, said, version)), "judge", note)


# ---- MMVet ----------------------------------------------------------------------------------------------------------

STATEMENTS = re.compile(r"[,;.\n]|\b[Aa]nd\b")
FILLERS = frozenset(("a", "an", "the", "there", "is", "are", "i", "see", "it", "says", "in", "on", "at"))


def named(truth: str, prediction: str) -> float:
    """Give the share of the things in a truth, joined by <AND>, that a prediction names; of <OR>, one is enough.

    Our own rule, for truths that are short statements: "at the top large red star". The prediction is cut at commas,
    stops and "and"; a statement of it is right that has the same words, in any order, articles and the like aside.
    Where it makes more statements than there are things, the share is of those: who names everything is not right.
    """
    words = lambda text: sorted(word for word in re.findall(r"[^\W_]+", text.lower()) if word not in FILLERS)
    things = [[words(one) for one in thing.split("<OR>")] for thing in truth.split("<AND>")]
    said = [found for statement in STATEMENTS.split(prediction) if (found := words(statement))]
    most = max(len(things), len(said))
    right = 0
    for thing in things:
        match = next((one for one in said if one in thing), None)
        if match:
            said.remove(match)
            right += 1
    return right / most


def _vet(benchmark: Benchmark, row: Row, prediction: str, version: str, judge: Judge | None) -> Verdict:
    truth = row.fields.get("answer")
    if truth is None or not (judge or benchmark.ruled):
        return Verdict(row.index, None, None, "nobody")
    if benchmark.ruled:
        share = named(truth, prediction)
        return Verdict(row.index, f"{share:.2f}", share, "rule")
    prompt = judging.vet_prompt(row.fields.get("question") or "", truth, prediction)
    share, note = judging.ask(judge, prompt, share_in, 5)
    if share is None:
        return Verdict(row.index, None, 0.0, "nobody", note)
    return Verdict(row.index, note, share, "judge", note)


def share_in(said: str) -> float | None:
    """Read what a judge says of an MMVet answer: a number from 0 to 1, and nothing else.

    The original lets "nan" pass, which would make the whole score nan: here it is asked again.
    """
    try:
        share = float(said)
    except ValueError:
        return None
    return share if 0 <= share <= 1 else None


# ---- verdicts -------------------------------------------------------------------------------------------------------

KINDS = {"mcq": _mcq, "yes_no": _yes_no, "ocr": _ocr, "math": _math, "vet": _vet}


def verdicts(benchmark: Benchmark, rows: Sequence[Row], predictions: Sequence[str | None], *, version: str = "2024",
             judge: Judge | None = None) -> list[Verdict]:
    """Judge each prediction by its row, in their order; None, which was not asked, is wrong.

    Of circular benchmarks too a verdict is about the row alone; `units` says which belong together. judge(prompt,
    temperature) -> text, or JudgeError; it is asked only where the rules find nothing. Raises InputError for an unknown
    version, and where rows and predictions are not as many.
    """
    if version not in VERSIONS:
        raise InputError(f"there are no scorers {clip(version)!r}; there are {', '.join(VERSIONS)}")
    if len(rows) != len(predictions):
        raise InputError(f"there are {len(rows)} rows and {len(predictions)} predictions; give one for each row")
    score = KINDS[benchmark.kind]
    made = []
    for row, prediction in tqdm(zip(rows, predictions), total=len(rows), desc="judging", unit="answer",
                                disable=None if judge else True):
        if prediction is None:
            # What a scorer makes of an empty answer shows whether it could have told.
            known = score(benchmark, row, "", version, judge and _nobody).right is not None
            made.append(Verdict(row.index, None, 0.0 if known else None, "nobody", "it was not asked"))
        else:
            made.append(score(benchmark, row, _or_nan(prediction), version, judge))
    return made


def _nobody(prompt: str, temperature: float) -> str:
    raise judging.JudgeError("there is nobody to ask")


def _or_nan(text: str | None) -> str:
    """Write as VLMEvalKit reads an answer from its spreadsheet: nothing, "None", "n/a" .. have become nan."""
    return "nan" if text is None or text in MISSING else text


# ---- numbers --------------------------------------------------------------------------------------------------------

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def units(benchmark: Benchmark, rows: Sequence[Row]) -> list[list[int]]:
    """Group the numbers of the rows that make the score by what is right or wrong together, as they come.

    Circular: the turns of a question, whose indices differ by millions. HallusionBench: the questions of a figure. Else
    each row alone. Rows of another split than the benchmark's are in no unit.
    """
    together = defaultdict(list)
    for i, row in enumerate(rows):
        if benchmark.split is None or row.fields.get("split") == benchmark.split:
            if benchmark.circular:
                key = row.fields.get("g_index") or (row.index % 10**6 if isinstance(row.index, int) else row.index)
                together[str(key)].append(i)
            else:
                together[place(row)[:3] if benchmark.kind == "yes_no" else i].append(i)
    return list(together.values())


def numbers(benchmark: Benchmark, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Compute what a table shows, in 0..100: "score", the card's number, then its parts.

    Verdicts that cannot tell (right is None) count nowhere, and a part without any row is left out: without a truth, or
    MMVet without a judge, nothing is left. Parts: circular benchmarks "vanilla", each row alone; l2-category and
    category; HallusionBench aAcc, fAcc, qAcc of all and of each; OCRBench's five; MathVista's tasks and skills; MMVet's
    capabilities and their combinations.
    """
    known = lambda unit: [i for i in unit if verdicts[i].right is not None]
    groups = [group for unit in units(benchmark, rows) if (group := known(unit))]
    if not groups:
        return {}
    parts = {"mcq": _mcq_parts, "yes_no": _yes_no_parts, "ocr": _ocr_parts, "math": _math_parts, "vet": _vet_parts}
    right = [verdict.right or 0.0 for verdict in verdicts]
    return parts[benchmark.kind](benchmark, rows, right, groups)


def _percent(values: Sequence[float]) -> float:
    return sum(values) / len(values) * 100


def _by(pairs: Sequence[tuple[str | None, float]]) -> dict[str, float]:
    """Average (name, value) by name, in their alphabetical order."""
    values = defaultdict(list)
    for name, value in pairs:
        if name is not None:
            values[name].append(value)
    return {name: _percent(values[name]) for name in sorted(values)}


def _mcq_parts(benchmark: Benchmark, rows: Sequence[Row], right: list[float], groups: list[list[int]]) -> dict:
    hits = [float(all(right[i] for i in group)) for group in groups]
    numbers = {"score": _percent(hits)}
    if benchmark.circular:
        numbers["vanilla"] = _percent([right[i] for group in groups for i in group])
    # Both in one dict, as in the original: of a name in both, the category's number is shown.
    for column in ("l2-category", "category"):
        numbers |= _by([(rows[group[0]].fields.get(column), hit) for group, hit in zip(groups, hits)])
    return numbers


def _yes_no_parts(benchmark: Benchmark, rows: Sequence[Row], right: list[float], groups: list[list[int]]) -> dict:
    every = [i for group in groups for i in group]
    numbers = {"score": 0.0, **_accuracies(rows, right, every)}
    numbers["score"] = sum(numbers[name] for name in ("aAcc", "fAcc", "qAcc")) / 3
    for column in ("category", "l2-category"):
        for name in sorted({rows[i].fields.get(column) for i in every} - {None}):
            of_it = [i for i in every if rows[i].fields.get(column) == name]
            numbers |= {f"{name} {key}": value for key, value in _accuracies(rows, right, of_it).items()}
    return numbers


def _accuracies(rows: Sequence[Row], right: list[float], some: list[int]) -> dict[str, float]:
    """Compute the shares of right rows, of figures with all rows right, and of questions right at all their figures."""
    figures = defaultdict(list)
    questions = defaultdict(list)
    for i in some:
        category, number, figure, question = place(rows[i])
        figures[category, number, figure].append(right[i])
        questions[category, number, question].append(right[i])
    return {"aAcc": _percent([right[i] for i in some]), "fAcc": _percent([float(all(x)) for x in figures.values()]),
            "qAcc": _percent([float(all(x)) for x in questions.values()])}


def _ocr_parts(benchmark: Benchmark, rows: Sequence[Row], right: list[float], groups: list[list[int]]) -> dict:
    """The score is the original's Final Score Norm where all 1,000 questions were asked, 10 points being 1."""
    hits = [(rows[i].fields.get("category"), right[i]) for group in groups for i in group]
    together = _by([("Text Recognition" if name in RECOGNITION else name, hit) for name, hit in hits])
    first = {"score": _percent([hit for _, hit in hits])}
    if "Text Recognition" in together:
        first["Text Recognition"] = together.pop("Text Recognition")
    return {**first, **together, **_by([hit for hit in hits if hit[0] in RECOGNITION])}


def _math_parts(benchmark: Benchmark, rows: Sequence[Row], right: list[float], groups: list[list[int]]) -> dict:
    every = [i for group in groups for i in group]
    skills = [(str(skill), right[i]) for i in every if (text := rows[i].fields.get("skills")) is not None
              for skill in list_in(text) or [text]]
    return {"score": _percent([right[i] for i in every]),
            **_by([(rows[i].fields.get("task"), right[i]) for i in every]), **_by(skills)}


def _vet_parts(benchmark: Benchmark, rows: Sequence[Row], right: list[float], groups: list[list[int]]) -> dict:
    every = [(rows[i].fields.get("category"), right[i]) for group in groups for i in group]
    numbers = {"score": _percent([share for _, share in every])}
    pairs = [(name, share) for category, share in every if category is not None
             for name in (*(word for word in CAPABILITIES if word in category), category.replace(",", "_"))]
    # As in the original, what needs one capability alone counts twice in it: once as the combination of that name.
    found = _by(pairs)
    return {**numbers, **{name: found.pop(name) for name in CAPABILITIES if name in found}, **found}
