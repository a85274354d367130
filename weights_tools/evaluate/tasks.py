"""Lay out what is asked: the files of questions that there are, which of their rows, in which settings."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from minivl import InputError
from minivl.files.adapters import FILE
from minivl.files.find import find
from minivl.limits import is_there
from weights_tools.evaluate import answers, prompts, tsv
from weights_tools.evaluate.answers import How
from weights_tools.evaluate.benchmarks import BENCHMARKS, NANO, Benchmark, Broken, Row, of
from weights_tools.mpo.begun import digest_of_checkpoint, digest_of_file


@dataclass(frozen=True)
class Task:
    """A file of questions to be asked in one setting."""
    benchmark: Benchmark
    table: tsv.Table
    rows: Sequence[Row | Broken]
    how: How
    path: Path                      # of its answers
    job: dict                       # what decides them
    same: Path | None = None        # answers to the very same questions, of another setting

    @property
    def name(self) -> str:
        return f"{self.how.dataset}, {self.how.setting}"

    @cached_property
    def lines(self) -> list[int]:
        return [row.line for row in self.rows]

    def is_answered(self) -> bool:
        """Tell whether all rows have answers. Raises InputError where there are answers of another work."""
        return self.same is not None or set(self.lines) <= answers.known(self.path, self.job).keys()


def files(data: Path, names: Sequence[str]) -> list[tuple[Benchmark, Path]]:
    """Find the files of benchmarks, or of datasets by their own names; without names all that a folder has."""
    found = []
    known = BENCHMARKS | NANO
    for name in dict.fromkeys(names) or known:
        benchmark = known.get(name) or of(name)
        paths = [data / f"{one}.tsv" for one in (benchmark.datasets if name in known else [name])]
        there = next((path for path in paths if is_there(path)), None)
        if there is None and names:
            raise InputError(f"{data} has no {' or '.join(path.name for path in paths)}, the questions of {name}; put "
                             "it there, or name its folder with --data")
        if there and there not in [path for _, path in found]:
            found.append((benchmark, there))
    if not found:
        first = ", ".join(f"{benchmark.datasets[0]}.tsv" for benchmark in BENCHMARKS.values())
        raise InputError(f"{data} has none of the files {first}; name their folder with --data")
    return found


def plan(args: argparse.Namespace) -> list[Task]:
    """Read the files and lay out what is asked."""
    mpo = is_mpo(args)
    lora = args.lora and Path(args.lora)
    fixed = {"checkpoint": digest_of_checkpoint(find(args.checkpoint)),
             "lora": lora and digest_of_file(lora / FILE if lora.is_dir() else lora),
             "--mpo-prompt": "yes" if mpo else "no", "--limit-tiles": args.limit_tiles, "--precision": args.precision,
             "--max-new-tokens": args.max_new_tokens, "--batch": args.batch, "-n": args.n,
             "--seed": args.seed if args.n else None, "--device": args.device}
    tasks = []
    for benchmark, path in files(Path(args.data), args.benchmark):
        table = tsv.read(path, benchmark)
        rows = chosen(table, args.n, args.seed)
        for setting in answers.SETTINGS if args.setting == "both" else (args.setting,):
            how = How(path.stem, setting, mpo, args.limit_tiles, args.batch, args.max_new_tokens)
            place = answers.place(args.out, path.stem, setting)
            before = tasks[-1] if args.setting == "both" and setting == "cot" else None
            same = before.path if before and same_questions(rows, before.how, how) else None
            tasks.append(Task(benchmark, table, rows, how, place, {**fixed, "questions": table.md5}, same))
    return tasks


def chosen(table: tsv.Table, n: int | None, seed: int) -> list[Row | Broken]:
    """Pick the rows to ask: n questions, or all; of the benchmark's split alone. Raises InputError if it has none."""
    split = table.benchmark.split
    rows = list(table if n is None else table.pick(table.sample(n, seed)))
    rows = [row for row in rows if isinstance(row, Broken) or split is None or row.fields["split"] == split]
    if not any(isinstance(row, Row) for row in rows):
        raise InputError(f"{table.path} has no question that makes the number of {table.benchmark.name}"
                         f"{f', of the split {split}' if split else ''}; take the file as released")
    return rows


def same_questions(rows: Sequence[Row | Broken], a: How, b: How) -> bool:
    """Tell whether two settings ask each row the same."""
    asked = lambda row, how: (prompts.build(row.fields, how.dataset, images=1, mpo_prompt=how.mpo,
                                            cot=how.setting == "cot"),
                              prompts.uses_mpo(how.dataset, how.mpo, how.setting == "cot"))
    return all(asked(row, a) == asked(row, b) for row in rows if isinstance(row, Row))


def is_mpo(args: argparse.Namespace) -> bool:
    """Tell whether the model is asked as one of MPO."""
    if args.mpo_prompt == "auto":
        return prompts.is_of_mpo(prompts.model_name(args.checkpoint))
    return args.mpo_prompt == "yes"
