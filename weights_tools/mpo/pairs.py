"""From sampled answers to pairs, one preferred, by MMPR's rules: which are right, which are wrong, who goes with whom.

    python -m weights_tools.mpo.pairs ANSWERS.jsonl OUT     two files of pairs, right x wrong and right x unread

    question -> prompts.prompt: reason, then "Final answer: .." -> N answers, sampled
    answer -> parse -> right, wrong, or unread (no such line) -> right x wrong and right x unread

    Dropout-NTP, for questions without a known answer: a chosen answer is cut at half of its words (`truncate`) and
    finished without the picture (`prompts.without_picture`): prefix + continuation is the rejected one

`rules`: dec2024, the card's time; head, of 2025; corrected, for new data: see scorers, and `fix_answer` and `contained`
here. The two first differ in `fix` alone.
Source: InternVL internvl_chat/tools/mmpr_pipeline @b048980; internvl_chat/tools/reasoning_data_pipeline @2410d1d.
"""
from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path

from minivl import options
from minivl.limits import InputError, first_of
from weights_tools import run
from weights_tools.mpo.mmpr import Rows, check_answer, write_rows
from weights_tools.mpo.prompts import ASKED, LETTER, known_version
from weights_tools.mpo.scorers import DEFAULT, RULES, checked, is_right, normalise, scorers_of

LETTERS = tuple("ABCDEFGHIJKLMN")
MOST_ROWS = 1_000_000       # of one file, the others are not looked at
MANY_ROWS = 500_000         # beyond so many, FEW pairs for a question
FEW = 3


# ---- text in, text out ----------------------------------------------------------------------------------------------

def parse(response: str, version: str = "en") -> tuple[str | None, str] | None:
    """Split an answer into its reasoning and what it ends in, or None where it does not have the form asked for.

    en, zh: the text after the last "Final answer:", one line, with reasoning before it; its language is not looked at.
    en_v2, zh_v2, en_r1, zh_r1: the last box, \\boxed{...}; no reasoning is returned. asked: the text after the last
    "Final answer:", or without one all of it. Raises InputError for others.
    """
    if known_version(version).endswith("_v2"):
        box = _boxed(response)
        return (None, response if box is None else box) if len(response) > 20 else None
    if version.endswith("_r1"):
        before, _, rest = response.partition("<think>")
        thought, end, after = rest.partition("</think>")
        well_formed = end and "<think>" not in rest and "</think>" not in before + after and len(thought.strip()) > 20
        answer = _boxed(after) if well_formed else None
        return None if answer is None else (None, answer)
    trigger = next((words for words in ("Final answer:", "Final Answer:") if words in response), "答案:")
    reasoning, _, answer = (part.strip() for part in response.rpartition(trigger))
    if version == ASKED:
        return reasoning or None, answer
    if response.count(trigger) > 2 or response.count("\n") < 2 or not reasoning or "\n" in answer:
        return None
    return reasoning, answer


def _boxed(text: str) -> str | None:
    """Return what stands in the last \\boxed{...}; None without one, or where its braces do not close."""
    _, found, rest = text.rpartition("\\boxed{")
    depth = 1 if found else 0
    for i, letter in enumerate(rest if found else ""):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[:i]
    return None


def truncate(text: str, ratio: float = 0.5) -> str:
    """Return the first `ratio` of a text's words: what stands between single spaces, so a line break stays inside one.

    A text without spaces, as in Chinese, is one word: nothing is left of it.
    """
    if not 0 <= ratio <= 1:
        raise InputError(f"the share of words to keep is {ratio}; it must be in 0..1")
    words = text.split(" ")
    return " ".join(words[:int(len(words) * ratio)]).strip()


def fix_answer(response: str, prediction: str, truth: str, *, letter: bool = False) -> str | None:
    """Write the truth in place of a prediction that contains it: "Final answer: B. two" becomes "Final answer: B".

    letter: the truth is an option, so the prediction is its letter. None: the original fails, no line is left before
    the answer. Contained is contained: 17 becomes 7, and None becomes no. So `corrected` rules fix right answers alone.
    """
    found = prediction.lower()
    wanted = truth.lower()
    if letter:
        found = _letter(prediction)
        wanted = truth.upper()
        if found is None:
            return response
    plain = lambda text: text.strip(".").replace(",", "")
    if wanted in found or plain(wanted) in plain(found):
        if not prediction:
            return None
        before, _, after = response.rpartition(prediction)
        response = f"{before}{truth}{after}".strip().strip("*").strip()
    lines, newline, last = response.rpartition("\n")
    if "**Final" in last:
        response = f"{lines}\n{last.replace('**Final', 'Final')}".strip()
    return response if newline else None


def _letter(prediction: str) -> str | None:
    """Read "b", "B) two", "(B) two", "**B**" as B."""
    prediction = prediction.strip().strip("*").strip().upper()
    if len(prediction) == 1:
        return prediction
    if prediction[:1] and prediction[0] in LETTERS and not prediction[1].isalpha():
        return prediction[0]
    if prediction[:1] == "(" and prediction[2:3] == ")" and prediction[1] in LETTERS:
        return prediction[1]
    return None


# ---- answers in, pairs out ------------------------------------------------------------------------------------------

@dataclass
class Judged:
    """Answers by question, (image, question, truth) as texts -> rows with their "answer_pred"."""
    right: dict[tuple, list[dict]] = field(default_factory=dict)
    wrong: dict[tuple, list[dict]] = field(default_factory=dict)
    unread: dict[tuple, list[dict]] = field(default_factory=dict)
    rows: int = 0

    def unsolved(self) -> list[dict]:
        """List the questions with wrong answers and no right one, as questions."""
        found = [rows[0] for key, rows in self.wrong.items() if key not in self.right]
        return [{**_image(row), "question": row["question"], "answer": str(row["answer"])} for row in found]


@dataclass
class Pairs:
    """Pairs of one kind, and how they came about."""
    rows: list[dict]            # MMPR's: image?, question, chosen, rejected, answer_gt, chosen_meta?, rejected_meta?
    questions: int = 0          # that have answers of both kinds
    possible: int = 0           # right x wrong answers of these
    contained: int = 0          # of the possible ones: the right answer is part of the wrong one, so perhaps not wrong
    drawn: int = 0              # before the same pair was taken once


def judge(rows: Iterable[dict], *, scorers: Sequence[str] = DEFAULT, fix: bool = False,
          rules: str = "dec2024") -> Judged:
    """Sort sampled answers, each {question, answer, response, image?, prompt_version?, meta?}, into right and wrong.

    question: the whole prompt; answer: the truth. fix: see `fix_answer`. Raises InputError for a row that lacks
    something. Without an image the original of dec2024 stopped; here that is a question without a picture.
    """
    judged = Judged()
    for row in islice(rows, MOST_ROWS):
        judged.rows += 1
        lacks = [name for name in ("question", "answer", "response") if name not in row]
        if lacks:
            raise InputError(f"answer {judged.rows} has no {', '.join(lacks)}; it must be one that was sampled, with "
                             "question, answer and response")
        kind, row = _judge(row, scorers, fix, checked(rules))
        key = str(row.get("image") or ""), row["question"], str(row["answer"])
        getattr(judged, kind).setdefault(key, []).append(row)
    return judged


def _judge(row: dict, scorers: Sequence[str], fix: bool, rules: str) -> tuple[str, dict]:
    """Tell what kind of answer a row is, and return it with what was read of it, perhaps fixed."""
    version = row.get("prompt_version", "en")
    truth = str(row["answer"])
    unread = "unread", {**row, "answer_pred": "None"}
    parsed = parse(row["response"], version)
    if parsed is None:
        return unread
    prediction = parsed[1]
    right = is_right(prediction, truth, scorers, rules=rules)
    if fix and version in ("en", "zh") and (right or rules != "corrected"):
        letter = truth.upper() in LETTERS and (rules != "dec2024" or LETTER in row["question"])
        response = fix_answer(row["response"], prediction, truth, letter=letter)
        fixed = parse(response, version) if response is not None else None
        if fixed is None:
            return unread
        row = {**row, "response": response}
        if rules == "dec2024":      # judges what it has written itself
            prediction = fixed[1]
            right = is_right(prediction, truth, scorers, rules=rules)
    return "right" if right else "wrong", {**row, "answer_pred": prediction}


def contained(right: str, wrong: str, rules: str = "dec2024") -> bool:
    """Tell whether a right answer is part of a wrong one, which then may not be wrong: "red" in "dark red".

    The original compares letters, so 7 is part of 17; `corrected` compares words.
    """
    if checked(rules) == "corrected":
        return f" {normalise(right)} " in f" {normalise(wrong)} "
    return right.lower() in wrong.lower()


def combine(judged: Judged, *, limit: int = 15, seed: int = 0, rules: str = "dec2024") -> tuple[Pairs, Pairs]:
    """Pair right answers with wrong ones, and with unread ones: at most `limit` of each a question, drawn from `seed`.

    The same pairs as the original's with random.seed(seed), in the order drawn. An unread answer counts as "None",
    which contains "no", "one" and "E": these get no such pairs but by `corrected` rules.
    """
    if limit < 1:
        raise InputError(f"{limit} pairs a question are none; let it be 1 or more")
    limit = min(limit, FEW) if judged.rows > MANY_ROWS else limit
    draw = random.Random(seed)
    part_of = lambda right, wrong: contained(right["answer_pred"], wrong["answer_pred"], rules)
    with_wrong = _combine(judged.right, judged.wrong, part_of, limit, draw)
    never = lambda right, unread: False
    return with_wrong, _combine(judged.right, judged.unread, never if rules == "corrected" else part_of, limit, draw)


def _combine(right: dict, wrong: dict, part_of, limit: int, draw: random.Random) -> Pairs:
    found = Pairs([])
    distinct = {}
    for key in right:
        if key not in wrong:
            continue
        both = list(product(right[key], wrong[key]))
        apart = [pair for pair in both if not part_of(*pair)]
        chosen = draw.sample(apart, min(limit, len(apart)))
        found.questions += 1
        found.possible += len(both)
        found.contained += len(both) - len(apart)
        found.drawn += len(chosen)
        for good, bad in chosen:
            distinct[key, good["response"], bad["response"]] = _pair(good, bad)
    found.rows = list(distinct.values())
    return found


def _pair(good: dict, bad: dict) -> dict:
    metas = {name: row["meta"] for name, row in (("chosen_meta", good), ("rejected_meta", bad)) if "meta" in row}
    return {**_image(good), "question": good["question"], "chosen": good["response"], "rejected": bad["response"],
            "answer_gt": str(good["answer"]), **metas}


def _image(row: dict) -> dict:
    return {"image": row["image"]} if row.get("image") else {}


def pairs(rows: Iterable[dict], *, limit: int = 15, seed: int = 0, scorers: Sequence[str] = DEFAULT, fix: bool = False,
          rules: str = "dec2024") -> list[dict]:
    """Make MMPR's rows of sampled ones: right answers above wrong ones. See `judge` and `combine`, which give more."""
    return combine(judge(rows, scorers=scorers, fix=fix, rules=rules), limit=limit, seed=seed, rules=rules)[0].rows


# ---- the command ----------------------------------------------------------------------------------------------------

def told(judged: Judged, scorers: Sequence[str], rules: str) -> str:
    """Say how many answers are of which kind, and which the card's rules judge otherwise."""
    kinds = {"right": judged.right, "wrong": judged.wrong, "unread": judged.unread}
    counts = ", ".join(f"{sum(map(len, found.values())):,} {kind}" for kind, found in kinds.items())
    lines = [f"{judged.rows:,} answers to {len({key for found in kinds.values() for key in found}):,} questions: "
             f"{counts} (by {', '.join(scorers)}; {rules} rules); {len(judged.unsolved()):,} questions never right"]
    otherwise = []
    for kind in ("right", "wrong") if rules == "corrected" else ():
        for (_, _, truth), rows in kinds[kind].items():
            otherwise += [f"{row['answer_pred']!r} for {truth!r}: {kind} here" for row in rows
                          if is_right(row["answer_pred"], truth, scorers) != (kind == "right")]
    if otherwise:
        lines.append(f"dec2024 rules judge {len(otherwise):,} otherwise:\n  {first_of(otherwise)}")
    return "\n".join(lines)


def write(found: Pairs, path: Path) -> str:
    """Write pairs to a file, as the original none if there are none; say how they came about."""
    # By head's rules a wrong answer may be fixed to the very words of a right one.
    rows = [row for row in found.rows if row["chosen"] != row["rejected"]]
    if rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, rows)
    else:
        path.unlink(missing_ok=True)
    same = f", {len(found.rows) - len(rows)} without a difference left out" if len(rows) < len(found.rows) else ""
    return (f"{path if rows else path.name + ': not written'}: {len(rows):,} pairs of {found.possible:,} possible, "
            f"{found.contained:,} contained{same}; {found.questions:,} questions")


def arguments(argv: list | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.mpo.pairs", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("answers", metavar="ANSWERS.jsonl", help="sampled answers, each {question, answer (the known "
                        "one), response, image?, prompt_version?}; the file's name chooses the scorers")
    parser.add_argument("out", metavar="OUT", help="folder for the pairs")
    parser.add_argument("--rules", choices=RULES, default="corrected", help="default %(default)s")
    parser.add_argument("--fix", action="store_true", help="write the known answer in place of one that contains it")
    parser.add_argument("--limit", type=int, default=15, help="pairs of each kind a question (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which of them, where there are more (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    path = Path(args.answers)
    scorers = scorers_of(path.name)
    judged = judge(Rows(path, check_answer), scorers=scorers, fix=args.fix, rules=args.rules)
    with_wrong, with_unread = combine(judged, limit=args.limit, seed=args.seed, rules=args.rules)
    print(told(judged, scorers, args.rules))
    print(write(with_wrong, Path(args.out) / f"{path.stem}_pairs_vqa_correctness_rules.jsonl"))
    print(write(with_unread, Path(args.out) / f"{path.stem}_pairs_vqa_format_rules.jsonl"))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
