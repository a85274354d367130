"""What a run has found, and the files that hold it: a line for each question, so that runs can be compared later.

    Result -> OUT/judged/DATASET.SETTING.jsonl: the file and its numbers, then a row, its answer and its verdict a line
"""
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from minivl.limits import InputError, clip, is_there, reading
from weights_tools.evaluate import intervals
from weights_tools.evaluate.benchmarks import BENCHMARKS, Answer, Benchmark, Broken, Row, Verdict
from weights_tools.files import new_file

# What the settings of a run must say. Others may stand there too; the report shows all.
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

    @property
    def name(self) -> str:
        """Name it in a list and in files."""
        return f"{self.dataset}.{self.setting}"

    @property
    def column(self) -> str:
        """Name the column of the table: the card's, or the benchmark's own name where the card has none of it."""
        return self.benchmark.card if self.benchmark.name in BENCHMARKS else self.benchmark.name

    @cached_property
    def pieces(self) -> torch.Tensor:
        """Compute what each piece adds to the score: intervals.sums."""
        return intervals.sums(self.benchmark, self.rows, self.verdicts)

    @cached_property
    def draws(self) -> torch.Tensor:
        """Draw the scores of as many pieces again and again: float64[draws]."""
        return intervals.draws(self.pieces, name=self.name)[0]

    @property
    def score(self) -> float | None:
        """Give the number of the card, 0..100; None where it cannot be told."""
        return self.numbers.get("score")

    @property
    def interval(self) -> tuple[float, float] | None:
        """Give the 95 % interval of the score."""
        return None if self.score is None else intervals.interval(self.draws, len(self.pieces))


def check(result: Result):
    """Raise ValueError where rows, answers and verdicts are not of the same questions in the same order."""
    of = [[one.index for one in part] for part in (result.rows, result.answers, result.verdicts)]
    if not of[0] == of[1] == of[2]:
        raise ValueError(f"{result.name}: {len(of[0])} rows, {len(of[1])} answers and {len(of[2])} verdicts must be of "
                         "the same questions in one order")


# ---- files ----------------------------------------------------------------------------------------------------------

def path_of(out: Path, name: str) -> Path:
    """Name the file of a result."""
    return out / "judged" / f"{name}.jsonl"


def write(out: Path, result: Result):
    """Write a result into its file, whole or not at all; pictures stay in the TSV file."""
    path = path_of(out, result.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"benchmark": asdict(result.benchmark), "dataset": result.dataset, "setting": result.setting,
            "numbers": result.numbers, "differences": list(result.differences),
            "broken": [asdict(one) for one in result.broken]}
    with new_file(path) as file:
        file.write(json.dumps(head).encode() + b"\n")
        for row, answer, verdict in zip(result.rows, result.answers, result.verdicts):
            line = {"line": row.line, "fields": row.fields, "answer": asdict(answer), "verdict": asdict(verdict)}
            file.write(json.dumps(line).encode() + b"\n")


def read(out: str | Path) -> tuple[list[Result], dict]:
    """Read (results, settings) of a run from its folder; the pictures of the rows are not there.

    Raises InputError where the folder holds no finished run.
    """
    out = Path(out)
    report = out / "report.json"
    if not is_there(report):
        raise InputError(f"{out} holds no report.json; give the --out folder of a run of python -m "
                         "weights_tools.evaluate that has ended")
    try:
        with reading(report):
            written = json.loads(report.read_bytes())
        settings = {name: written["settings"][name] for name in (*SETTINGS, *written["settings"])}
        found = [(_read(path_of(out, one["name"])), one["numbers"]) for one in written["results"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise _strange(report, error) from None
    for result, numbers in found:
        if result.numbers != numbers:
            raise InputError(f"{path_of(out, result.name)} is of a later scoring than {report}, which was not "
                             "finished; run the evaluation again, which only scores what is answered")
    return [result for result, _ in found], settings


def _read(path: Path) -> Result:
    """Read one result."""
    try:
        with reading(path), open(path, "rb") as file:
            head, *lines = map(json.loads, file)
        answers = [Answer(**{**line["answer"], "tiles": tuple(line["answer"]["tiles"])}) for line in lines]
        rows = [Row(answer.index, line["fields"], partial(_elsewhere, path), line["line"])
                for answer, line in zip(answers, lines)]
        result = Result(_benchmark(head["benchmark"]), head["dataset"], head["setting"], rows, answers,
                        [Verdict(**line["verdict"]) for line in lines], head["numbers"], head["differences"],
                        tuple(Broken(**one) for one in head["broken"]))
        check(result)
        return result
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise _strange(path, error) from None


def _strange(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is not what a run writes ({clip(repr(error))}); run the evaluation again, which only "
                      "scores what is answered")


def _benchmark(stored: dict) -> Benchmark:
    """Make a Benchmark of what JSON keeps of it: its tuples are lists there."""
    return Benchmark(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})


def _elsewhere(path: Path) -> list:
    """Refuse to give pictures, which stand in no file of a run."""
    raise InputError(f"the pictures are not in {path.name}, but in the TSV file, which is not at its place any more")


def categories(row: Row) -> Iterator[str]:
    """Yield what a row is counted under, from its columns."""
    for column in ("category", "l2-category"):
        if row.fields.get(column):
            yield row.fields[column]
