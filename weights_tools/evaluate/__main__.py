"""Measure a model on the benchmarks of the card's table: python -m weights_tools.evaluate CHECKPOINT --out RUN

    --data holds VLMEvalKit's files, MMStar.tsv and so on; RUN gets answers, report.md, report.json and report.html

Questions, pictures and tiles are those of VLMEvalKit at the card's time, and so are the scorers. Killed or stopped, the
same command goes on. With all answers there it only scores them anew: with other --scorers, or a --judge.
The judge's key is taken from MINIVL_JUDGE_KEY or OPENAI_API_KEY. On several devices of a machine:

    torchrun --nproc-per-node 8 -m weights_tools.evaluate CHECKPOINT --out RUN --device cuda

Did a change hurt? python -m weights_tools.evaluate --compare RUN1 RUN2 --out FOLDER
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from minivl import InputError, Pipeline, options
from minivl.config import Config
from minivl.files.find import find
from minivl.limits import Limits, is_there
from minivl.terminal import say
from weights_tools import run
from weights_tools.evaluate import answers, compare, report, score
from weights_tools.evaluate.benchmarks import BENCHMARKS, Answer, Broken, Row
from weights_tools.evaluate.differences import unread as unread_in
from weights_tools.evaluate.judge import Cached, Judge
from weights_tools.evaluate.shares import Asker, helpers, useful, world
from weights_tools.evaluate.tasks import Task, is_mpo, plan
from weights_tools.files import held, write_text

# ---- what came of it ------------------------------------------------------------------------------------------------

def scored(task: Task, given: Sequence[Answer], version: str, judge) -> report.Result:
    """Score the answers of a task."""
    pairs = [(row, answer) for row, answer in zip(task.rows, given) if isinstance(row, Row)]
    rows, given = [row for row, _ in pairs], [answer for _, answer in pairs]
    verdicts = score.verdicts(task.benchmark, rows, [answer.prediction for answer in given], version=version,
                              judge=judge)
    return report.Result(task.benchmark, task.how.dataset, task.how.setting, rows, given, verdicts,
                         score.numbers(task.benchmark, rows, verdicts), differences(task),
                         [row for row in task.rows if isinstance(row, Broken)])


def differences(task: Task) -> list[str]:
    """Say what only the reader of the file and who asks know: where it is not the released one, what is left out."""
    table, found = task.table, []
    if table.released is False:
        found.append(f"{table.path.name} is none of the released files (md5 {table.md5}).")
    if table.dropped:
        found.append(f"Rows without a picture, which were left out, as VLMEvalKit does: {table.dropped:,}.")
    if task.benchmark.split:
        found.append(f"Only questions of the split {task.benchmark.split} were asked, which make the number.")
    if task.same:
        found.append("Its questions are those of the default setting, to the letter: the answers are taken from there.")
    return found


def settings_of(args: argparse.Namespace, digest: str, pipe: Pipeline | None) -> dict:
    """Collect what run.json says. The dtype of answers that were there already is the one it said before."""
    file = Path(args.out) / "run.json"
    dtype = str(pipe.model.dtype).removeprefix("torch.") if pipe else None
    if pipe is None and is_there(file):
        try:
            dtype = json.loads(file.read_text("utf-8"))["dtype"]
        except (ValueError, LookupError, TypeError):
            dtype = None
    names = ("checkpoint", "lora", "precision", "device", "limit_tiles", "max_new_tokens", "batch", "n", "seed",
             "setting", "judge", "judge_model", "scorers", "data")
    given = {name: getattr(args, name) for name in names}
    int4 = Config.load(find(args.checkpoint)).quantization_config is not None
    return {**given, "digest": digest, "dtype": dtype, "int4": int4, "mpo_prompt": is_mpo(args)}


def measure(args: argparse.Namespace) -> int:
    """Answer, score and report."""
    share, shares = world(args)
    out = Path(args.out)
    judge = judge_of(args)
    if share:
        return Asker(args, share, shares).all(plan(args))
    with ExitStack() as stack:
        stack.enter_context(held(out))
        tasks = plan(args)
        how = "with" if is_mpo(args) else "without"
        rows = sum(len(task.rows) for task in tasks if task.same is None)
        say(f"{rows:,} rows to ask, {how} the prompt of MPO models (--mpo-prompt {args.mpo_prompt})")
        if args.workers > 1:
            args.workers = shares = useful(tasks, args.workers)
        started = stack.enter_context(helpers(args))
        asker = Asker(args, share, shares, started)
        asker.all(tasks)
        settings = settings_of(args, tasks[0].job["checkpoint"], asker.pipe)
        write_text(out / "run.json", json.dumps(settings, indent=1) + "\n")
        results = []
        for task in tasks:
            given = answers.put_in_order(task.path, task.job, task.lines, task.same)
            # Each its own: it gives what was said to the first call of a prompt to the first call of the next task too.
            kept = judge and Cached(judge, out / "judge.jsonl")
            results.append(scored(task, given, args.scorers, kept))
        report.write(out, results, settings)
    print(report.table(results, settings))
    lost = sum(answer.refused is not None for one in results for answer in one.answers)
    broken = sum(len(one.broken) for one in results)
    if lost or broken:
        print(f"Questions not asked, which count as wrong: {lost:,}. Broken rows: {broken:,}. report.md says why, "
              "report.json names all.")
    unread = [verdict for one in results for verdict in (unread_in(one) if judge else ())]
    if unread:
        print(f"Answers on which the judge gave no verdict, which count as wrong: {len(unread):,}. The last: "
              f"{unread[-1].note}")
    print(f"{out / 'report.md'} lists what differs from the card's setting; {out / 'report.html'} shows each question")
    return 0


def judge_of(args: argparse.Namespace) -> Judge | None:
    """Make the judge, if one is given."""
    key = os.environ.get("MINIVL_JUDGE_KEY") or os.environ.get("OPENAI_API_KEY")
    return Judge(args.judge, key, args.judge_model) if args.judge else None


# ---- the command ----------------------------------------------------------------------------------------------------

def arguments(argv: list | None = None) -> argparse.Namespace:
    """Read the command line, and refuse what would have no effect."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.evaluate", description=__doc__,
                                     formatter_class=options.Help)
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CHECKPOINT", help="folder, hub id or short name")
    add("--benchmark", nargs="+", metavar="NAME", default=[],
        help=f"default all that there are files of: {', '.join(BENCHMARKS)}; or the name of a file without .tsv")
    place = os.environ.get("LMUData") or "~/LMUData"      # noqa: SIM112  the variable's name in VLMEvalKit
    add("--data", metavar="FOLDER", default=place, type=os.path.expanduser,
        help="of the TSV files (default where VLMEvalKit puts them, %(default)s)")
    add("--out", metavar="RUN", required=True, help="folder to write")
    add("-n", type=int, help="questions of each benchmark, from all its categories, for a first look (default all); of "
        "HallusionBench about so many, in whole sets")
    add("--seed", type=int, default=0, help="of the choice of these (default %(default)s)")
    add("--setting", choices=[*answers.SETTINGS, "both"], default="default",
        help="cot: reasoning before the answer, as VLMEvalKit with USE_COT=1 (default: as without)")
    add("--mpo-prompt", choices=["auto", "yes", "no"], default="auto",
        help="MPO models are asked otherwise (default auto: by MPO in the checkpoint's name)")
    add("--limit-tiles", type=int, metavar="N", help="most tiles of a picture (default as VLMEvalKit, 6 to 24)")
    add("--max-new-tokens", type=int, default=4096, metavar="N", help="of an answer (default %(default)s)")
    add("--batch", type=int, default=8, metavar="N", help="answers written together (default %(default)s)")
    add("--workers", type=int, default=1, metavar="N",
        help="processes, each with the whole model in memory (default %(default)s)")
    add("--judge", metavar="URL", help="of an OpenAI-compatible service that decides where the rules find nothing")
    add("--judge-model", metavar="NAME", help="what the service is asked for")
    add("--scorers", choices=score.VERSIONS, default=score.VERSIONS[0],
        help="VLMEvalKit's of the card's time or of today (default %(default)s)")
    add("--lora", metavar="FILE", help="what python -m weights_tools.lora learned on the checkpoint")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--precision", choices=["exact", "fast"], default="exact",
        help="default %(default)s; fast may round to bfloat16")
    add("--compare", nargs=2, metavar=("RUN1", "RUN2"), help="two runs, question by question")
    args = parser.parse_args(argv)
    check(args, options.given(parser, argv))
    return args


def check(args: argparse.Namespace, given: dict[str, str]):
    """Refuse what is missing, has no effect or cannot be."""
    if args.compare:
        options.refuse(given, set(given) - {"compare", "out"}, "with --compare, which reads what was answered already")
    elif args.checkpoint is None:
        raise InputError("no checkpoint is given; write CHECKPOINT --out RUN, or --compare RUN1 RUN2 --out FOLDER")
    if args.n is None:
        options.refuse(given, ["seed"], "without -n, which chooses questions")
    if not args.judge:
        options.refuse(given, ["judge_model"], "without --judge, the URL of its service")
    for name in ("n", "limit_tiles", "batch", "workers", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"{'-n' if name == 'n' else options.option(name)} is {value}; it must be 1 or more")
    if args.max_new_tokens > Limits().new_tokens:
        raise InputError(f"--max-new-tokens is {args.max_new_tokens}, the limit is {Limits().new_tokens}; ask for "
                         "fewer")
    judge_of(args)


def main(argv: list | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    if args.compare:
        with held(Path(args.out)):
            print(compare.write(Path(args.out), *args.compare))
        return 0
    return measure(args)


if __name__ == "__main__":
    sys.exit(run(main))
