"""All in which a run differs from the card's own, in sentences: nothing here changes a number, it says what it means.

Sources: VLMEvalKit @00e0cf87 for what it does, the model card for what it says, which is little.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from minivl.limits import clip
from weights_tools.evaluate import prompts
from weights_tools.evaluate.benchmarks import BENCHMARKS, Verdict
from weights_tools.evaluate.prompts import is_of_mpo, model_name
from weights_tools.evaluate.results import Result

# Kind of a benchmark -> who judges there what no rule can tell: the defaults of VLMEvalKit's run.py.
JUDGES = {"mcq": "gpt-3.5-turbo-0125", "yes_no": "gpt-3.5-turbo-0125", "math": "gpt-4o-mini-2024-07-18",
          "vet": "gpt-4-1106-preview"}
FEW = 30        # pieces, below which an interval is rough
NAMED = 5       # of what went wrong, each by its index


def of_run(results: Sequence[Result], settings: dict) -> list[str]:
    """List what holds of the whole run."""
    if not any(result.benchmark.name in BENCHMARKS for result in results):
        return ["The card has no number of these benchmarks.", *_of_settings(settings), *_of_mean(results)]
    return ["The card does not say which of its numbers were made with reasoning before the answer (USE_COT=1).",
            *_of_settings(settings), *_of_mean(results)]


def _of_mean(results: Sequence[Result]) -> list[str]:
    """Say where the interval of the mean of all eight is too narrow."""
    few = []
    for setting in dict.fromkeys(result.setting for result in results):
        of = [result for result in results if result.setting == setting]
        if len({result.benchmark.name for result in of}) == len(BENCHMARKS) and None not in [one.score for one in of]:
            few += [result.name for result in of if len(result.pieces) < FEW]
    return [f"The interval of the mean is too narrow, for fewer than {FEW} questions, or groups of them, are "
            f"independent in {', '.join(few)}."] if few else []


def _of_settings(settings: dict) -> list[str]:
    found = []
    name = model_name(settings["checkpoint"])
    if settings.get("int4", "awq" in name.lower()):
        found.append(f"{name} is in int4 (AWQ); the numbers of the card are of the model in its own precision.")
    if settings.get("lora") is not None:
        found.append(f"With what --lora {settings['lora']} has learned, which the model of the card has not.")
    if settings["dtype"] != "bfloat16":
        found.append(f"It was computed in {settings['dtype'] or 'a precision not known'}; VLMEvalKit computes in "
                     "bfloat16.")
    if settings["precision"] != "exact":
        found.append(f"--precision {settings['precision']} may round where the exact path does not.")
    if settings["mpo_prompt"] != is_of_mpo(name):
        given = "with" if settings["mpo_prompt"] else "without"
        found.append(f"It was asked {given} the prompt of MPO, which does not go with the name {name}.")
    if settings["limit_tiles"] is not None and settings["limit_tiles"] < max(prompts.TILES):
        found.append(f"Most tiles of a picture: {settings['limit_tiles']}; VLMEvalKit allows 24 for OCRBench, 12 for "
                     "MMMU and 6 for the others.")
    if settings["max_new_tokens"] != 4096:
        found.append(f"Answers had at most {settings['max_new_tokens']} tokens; VLMEvalKit allows 4096.")
    if settings["n"] is not None:
        found.append(f"A first look: {settings['n']} questions of each benchmark, of HallusionBench about so many, in "
                     f"whole sets, chosen with seed {settings['seed']}.")
    if settings["scorers"] != "2024":
        found.append(f"Scored with the rules of --scorers {settings['scorers']}; the card is older: those of 2024 are "
                     "its.")
    return found


def of_result(result: Result, settings: dict) -> list[str]:
    """List what holds of one benchmark."""
    return [*_file(result, settings["n"] is None), *_unclear(result, settings), *_lost(result), *_interval(result),
            *result.differences]


def _file(result: Result, whole: bool) -> list[str]:
    """Say which file it was, where the card's is another one, or not known."""
    found = []
    released = result.benchmark.questions if result.dataset == result.benchmark.datasets[0] else None
    if whole and released and len(result.rows) != released:
        found.append(f"{len(result.rows):,} questions were asked; of the released file it is {released:,}.")
    if result.benchmark.name == "MMBench_V11":
        found.append(f"Asked was {result.dataset}; the card's number is of the test questions, whose answers are not "
                     "public, and whether only of the English ones is not known.")
    untold = [one for one in result.verdicts if one.right is None]
    strange = [one for one in untold if one.note]
    if strange:
        named = "; ".join(f"{clip(one.index, 60)}: {clip(one.note)}" for one in strange[:NAMED])
        found.append(f"True answers that could not be read, so that their questions are in no number: "
                     f"{len(strange):,} ({named}{_more(strange)}).")
    missing = len(untold) - len(strange)
    if missing and not _needs_judge(result):
        found.append("Questions to which the file holds no true answer, so that they are in no number: "
                     f"{missing:,}.")
    return found


def _needs_judge(result: Result) -> bool:
    """Tell whether nothing can be right or wrong there without a judge."""
    return result.benchmark.kind == "vet" and not result.benchmark.ruled


def _unclear(result: Result, settings: dict) -> list[str]:
    """Say how many answers no rule could read, and who read them."""
    by = Counter(one.by for one, answer in zip(result.verdicts, result.answers) if answer.refused is None)
    theirs = JUDGES.get(result.benchmark.kind) if result.benchmark.name in BENCHMARKS else None
    total = len(result.verdicts)
    found = []
    if by["judge"]:
        found.append(f"Judged by {settings['judge_model'] or 'a model'} with our own instruction: {by['judge']:,} of "
                     f"{total:,} answers{f'; VLMEvalKit asks {theirs} with its own' if theirs else ''}.")
    if _needs_judge(result) and not settings["judge"]:
        found.append("No rule can tell how right an answer is, and no judge was given (--judge): there is no number"
                     f"{f'; VLMEvalKit asks {theirs}' if theirs else ''}.")
        return found
    nobody = unread(result)
    if nobody:
        why = "no judge was given (--judge)"
        if settings["judge"]:
            named = "; ".join(f"{clip(one.index, 60)}: {clip(one.note)}" for one in nobody[:NAMED])
            why = f"the judge gave no verdict either ({named}{_more(nobody)})"
        chance = ", and where that fails draws an option by chance" if result.benchmark.kind == "mcq" else ""
        asks = f"; VLMEvalKit asks {theirs}{chance}" if theirs else ""
        found.append(f"Answers that no rule could read, which count as wrong: {len(nobody):,} of {total:,}; "
                     f"{why}{asks}.")
    return found


def unread(result: Result) -> list[Verdict]:
    """List the verdicts on answers that neither a rule nor the judge could read, and that count as wrong."""
    return [one for one, answer in zip(result.verdicts, result.answers)
            if one.by == "nobody" and one.right is not None and answer.refused is None]


def _lost(result: Result) -> list[str]:
    """Name what was not asked, could not be read, or was cut."""
    found = []
    refused = [one for one in result.answers if one.refused is not None]
    if refused:
        named = "; ".join(f"{clip(one.index, 60)}: {clip(one.refused)}" for one in refused[:NAMED])
        found.append(f"Questions that could not be asked, which count as wrong: {len(refused):,} ({named}"
                     f"{_more(refused)}).")
    if result.broken:
        named = "; ".join(f"line {one.line}: {clip(one.why)}" for one in result.broken[:NAMED])
        counted = ""
        if result.score is not None:
            rows = len(result.rows)
            counted = f", as wrong ones would make it about {result.score * rows / (rows + len(result.broken)):.1f}"
        found.append(f"Broken rows of the file, which are not in the number{counted}: {len(result.broken):,} ({named}"
                     f"{_more(result.broken)}).")
    cut = sum(one.finish_reason == "length" for one in result.answers)
    if cut:
        found.append(f"Answers that the token limit cut before they ended: {cut:,}.")
    return found


def _more(found: list) -> str:
    return f"; and {len(found) - NAMED:,} more" if len(found) > NAMED else ""


def _interval(result: Result) -> list[str]:
    """Say where an interval is too narrow."""
    if result.score is None:
        return []
    found = []
    pieces = len(result.pieces)
    if pieces < FEW:
        of = "question, or group of them, is" if pieces == 1 else "questions, or groups of them, are"
        found.append(f"Only {pieces} {of} independent: the interval is rough.")
    if result.benchmark.name == "AI2D":
        found.append("AI2D asks several questions of one diagram; the interval takes them as independent, so the true "
                     "one is somewhat wider.")
    return found
