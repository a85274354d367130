"""What is asked, answered and judged: the benchmarks, and what passes between the files of this folder.

    tsv (rows) -> prompts (text, tiles) -> answers (an Answer each) -> score (a Verdict each, then numbers) -> report

Source: VLMEvalKit @00e0cf87 (December 2024, the commit that added InternVL2.5-MPO): names, columns, scoring, tiles.
Numbers of questions: the benchmarks' papers, MMStar arXiv:2403.20330, MMMU 2311.16502, MathVista 2310.02255, OCRBench
2305.07895, MM-Vet 2308.02490; VLMEvalKit's issue 1037 (HallusionBench with pictures) and tables (AI2D).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from minivl.limits import InputError, clip


@dataclass(frozen=True)
class Benchmark:
    """One column of the card's table: which files it can come in, and how it is asked and scored."""
    name: str                       # what --benchmark takes
    card: str                       # the column of the card's table
    datasets: tuple[str, ...]       # VLMEvalKit's names of its files, NAME.tsv; the first that a folder has is taken
    kind: Literal["mcq", "yes_no", "ocr", "math", "vet"]
    columns: tuple[str, ...]        # must be there, beside index, image (or image_path) and question
    circular: bool = False          # a question is right when it is right with its options in every order
    split: str | None = None        # only rows of this split make the number, where the file has several
    ruled: bool = False             # kind "vet" without a judge: score.named compares with the truth
    questions: int | None = None    # that the number is made of, in the first of `datasets`; None: not known here


OPTIONS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXY")    # letters that can be columns of options; Z means "none of them"

# What pandas takes for a missing value: of a cell (None then), and of a prediction, which VLMEvalKit reads as "nan".
MISSING = frozenset(("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
                     "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"))

BENCHMARKS = {b.name: b for b in (
    Benchmark("MMBench_V11", "MMBench v1.1",
              ("MMBench_DEV_EN_V11", "MMBench_TEST_EN_V11", "MMBench_TEST_CN_V11", "MMBench_DEV_CN_V11"), "mcq",
              ("A", "B", "category", "l2-category", "split"), circular=True),
    Benchmark("MMStar", "MMStar", ("MMStar",), "mcq", ("A", "B", "answer", "category", "l2-category"),
              questions=1500),
    Benchmark("MMMU", "MMMU", ("MMMU_DEV_VAL",), "mcq", ("A", "answer", "category", "l2-category", "split"),
              split="validation", questions=900),
    Benchmark("MathVista", "MathVista", ("MathVista_MINI",), "math",
              ("answer", "question_type", "answer_type", "choices", "answer_option", "task", "skills"),
              questions=1000),
    Benchmark("HallusionBench", "HallusionBench", ("HallusionBench",), "yes_no", ("answer", "category", "l2-category"),
              questions=951),
    Benchmark("AI2D", "AI2D", ("AI2D_TEST",), "mcq", ("A", "B", "answer"), questions=3088),
    Benchmark("OCRBench", "OCRBench", ("OCRBench",), "ocr", ("answer", "category"), questions=1000),
    Benchmark("MMVet", "MMVet", ("MMVet",), "vet", ("answer", "category"), questions=218),
)}
# Nano's own, each asked and scored as the one after which it is named: weights_tools.nano.eight writes their files.
NANO = {name: replace(benchmark, name=name, datasets=(name,), ruled=benchmark.kind == "vet")
        for benchmark in BENCHMARKS.values() for name in (f"Nano{benchmark.name}",)}


def of(dataset: str) -> Benchmark:
    """Find the benchmark that a file NAME.tsv belongs to, by its name. Raises InputError."""
    known = {name: benchmark for benchmark in (BENCHMARKS | NANO).values() for name in benchmark.datasets}
    if dataset not in known:
        raise InputError(f"{clip(dataset)!r} is none of the datasets known here: {', '.join(known)}; give the file one "
                         "of these names")
    return known[dataset]


@dataclass(frozen=True)
class Row:
    """One question of a file."""
    index: int | str
    fields: dict[str, str | None]       # the other columns but the pictures, as pandas reads them: None is missing
    pictures: Callable[[], list]        # -> PIL images in order; raises InputError, which names file and index
    line: int                           # of the file, the header is 1


@dataclass(frozen=True)
class Broken:
    """A row that cannot be asked, and the sentence that says why. It is in no number, and named in the report."""
    index: int | str | None
    line: int
    why: str


@dataclass(frozen=True)
class Answer:
    """One line of a file of answers."""
    index: int | str
    question: str               # what the model was asked, with its <image> marks
    prediction: str | None      # what it said, after the MPO prompt's post-processing; None: it was not asked
    said: str | None            # all that it said, where post-processing took a part of it; else None
    tiles: tuple[int, ...]      # of each picture
    tokens: int
    seconds: float
    finish_reason: str | None   # "stop", "length"
    refused: str | None = None  # why it was not asked
    line: int = 0               # of the row, which knows it by this: an index may be missing or be there twice


@dataclass(frozen=True)
class Verdict:
    """What a scorer makes of an answer."""
    index: int | str
    extracted: str | None       # the option, "Yes", number .. that was found in the answer; None: nothing
    right: float | None         # 0 or 1; MMVet: 0 to 1; None: it cannot be told (no truth in the file, or no judge)
    by: Literal["rule", "judge", "nobody"]      # nobody: the rules found nothing and there is no judge, or it failed
    note: str = ""              # for the report, one sentence; what a judge said
