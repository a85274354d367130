"""What a run of benchmarks says: a table beside the card's, and all that differs from the setting of the card."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weights_tools.evaluate.benchmarks import Answer, Benchmark, Broken, Row, Verdict

# What `settings` must say, each as in run.json. Others may stand there too and are shown.
SETTINGS = (
    "checkpoint",       # the folder or id that was given; its last part names the row of the card
    "digest",           # of the checkpoint
    "precision",        # "exact" or "fast"
    "dtype",            # "float32", "bfloat16" ..
    "device",
    "mpo_prompt",       # bool: what `auto` became
    "limit_tiles",      # int, or None: as VLMEvalKit
    "max_new_tokens",
    "n",                # int: so many questions of each; None: all
    "seed",             # of the choice of questions
    "judge",            # URL or None
    "judge_model",      # str or None
    "scorers",          # "2024" or "head"
    "data",             # the folder of TSV files: the pictures of a comparison come from there
)


@dataclass(frozen=True)
class Result:
    """One file of questions, asked in one setting and scored: an answer and a verdict for each row, in their order."""
    benchmark: Benchmark
    dataset: str                    # name of the file without .tsv
    setting: str                    # "default" or "cot"
    rows: Sequence[Row]
    answers: Sequence[Answer]
    verdicts: Sequence[Verdict]
    numbers: dict[str, float]       # score.numbers
    differences: Sequence[str]      # sentences that only the run knows: md5, rows without picture, other split ..
    broken: Sequence[Broken] = ()   # rows that could not be read, so that they have no answer


def write(out: Path, results: Sequence[Result], settings: dict):
    """Write OUT/report.json, report.md, report.html, and OUT/judged/DATASET.SETTING.jsonl, which `compare` reads."""
    raise NotImplementedError
