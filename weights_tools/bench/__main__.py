"""Measure how fast minivl is, beside what the machine could do: python -m weights_tools.bench CHECKPOINT

    the machine: how many bytes a second it reads, how many multiplications a second it does
    -> every engine in a process of its own, asked in turns, so that a busy moment hurts all
    -> best and median of the rounds

    python -m weights_tools.synthesize build/4B --size 4B --awq --tokenizer FOLDER      random weights of full size
    python -m weights_tools.bench build/4B --precision exact fast lean --against llama.cpp

exact and fast are minivl with that precision; lean and op are the same two on a machine without a compiler (int4 by its
definition; torch's own int4 product); released is minivl with the modules as released.

llama.cpp runs a random Q4_0 file of the same shapes, transformers the same int4 words through gptqmodel, where they are
installed (the extra `peers`); --peers-python names a Python that has them.
"""
from __future__ import annotations

import argparse
import json
import sys

from minivl import options
from minivl.files.find import find
from minivl.limits import InputError
from weights_tools import run
from weights_tools.bench.ours import OURS
from weights_tools.bench.workers import JOBS, accuracy, bench, serve
from weights_tools.files import write_text

PARTS = ("proof", "speed", "peers")
PEERS = ("llama.cpp", "transformers")


# ---- the results as tables ------------------------------------------------------------------------------------------

def headline(machine: dict, work: dict) -> str:
    """Say what the machine can do and what the model asks of it."""
    return (f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}: "
            f"reads {machine['GB/s']:.0f} GB/s, {machine['GFLOP/s float32']:.0f} GFLOP/s in float32, "
            f"{machine['GFLOP/s bfloat16']:.0f} in bfloat16. "
            f"The model: {work['GFLOP/tile']:.0f} GFLOP for a tile, {work['GFLOP/token']:.2f} for a prompt token, "
            f"{work['GB/token']:.2f} GB for a new token.")


def limits_of(machine: dict, work: dict) -> dict[str, float]:
    """Work out what the machine allows at best in float32: {job: seconds a tile or tokens a second}."""
    limits = {job: machine["GFLOP/s float32"] / work["GFLOP/token"] for job in JOBS if job.startswith("prefill")}
    limits["tile"] = work["GFLOP/tile"] / machine["GFLOP/s float32"]
    limits["decode 1"] = machine["GB/s"] / work["GB/token"]
    return limits


def job_rows(engines: dict, limits: dict) -> list[str]:
    """Write a row for each job that was asked: best of the rounds, in brackets as a multiple of the limit."""
    def cell(entry, job):
        if job not in entry:
            return ""
        value = entry[job]["best"]
        return f"{value:.2f} ({value / limits[job]:.2f}x)" if job in limits else f"{value:.2f}"

    rows = []
    for job, (_, unit) in JOBS.items():
        if any(job in e for e in engines.values()):
            limit = f"{limits[job]:.2f}" if job in limits else ""
            rows.append(f"| {job}, {unit} | {limit} | " + " | ".join(cell(e, job) for e in engines.values()) + " |")
    return rows


def other_rows(engines: dict) -> list[str]:
    """Write the rows that have no limit: loading, memory, and what a step is spent on."""
    rows = {}           # name -> a cell for each engine
    for key, name in (("load", "load, s"), ("first token", "load to first token, s")):
        rows[name] = [f"{e[key]:.1f}" for e in engines.values()]
    for key, name in (("peak", "peak memory, GB, file pages included"), ("own", "own memory, GB")):
        rows[name] = [f"{e['memory'].get(key, 0):.2f}" for e in engines.values()]
    profiles = [e.get("profile") for e in engines.values()]
    for kind in next(filter(None, profiles), ()):
        rows[f"of a step: {kind}, %"] = [f"{100 * profile[kind]:.0f}" if profile else "" for profile in profiles]
    return [f"| {name} | | " + " | ".join(cells) + " |" for name, cells in rows.items()]


def table(report: dict) -> str:
    """Write a report of `bench` as Markdown: jobs by engines, beside what the machine could do."""
    machine, work, engines = report["machine"], report["work"], report["engines"]
    header = ["| | float32 limit | " + " | ".join(engines) + " |", "|---|---|" + "---|" * len(engines)]
    rows = job_rows(engines, limits_of(machine, work)) + other_rows(engines)
    return "\n".join([headline(machine, work), "", *header, *rows])


def accuracy_table(found: dict, measure: str) -> str:
    """Write what `accuracy` found as Markdown; `measure` is the engine that the others are compared with."""
    rows = [f"| {engine} | {e['logits']:.1e} | {e['KL']:.1e} | {e['largest KL']:.1e} | {100 * e['same best']:.0f} % |"
            for engine, e in found.items()]
    header = f"| against {measure} | relative error of the logits | mean KL | largest KL | same best token |"
    return "\n".join([header, "|---|---|---|---|---|", *rows])


# ---- the command line -----------------------------------------------------------------------------------------------

def parser_of_options() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.bench", description=__doc__,
                                     formatter_class=options.Help)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", nargs="?", help="a folder, hub id or short name such as 4b-mpo-awq")
    add("--device", metavar="cuda", help="prove and measure everything on a GPU in one go, see gpu.py; needs no "
        "checkpoint, makes a random one")
    add("--size", default="4B", help="with --device: of the random checkpoint (default %(default)s)")
    add("--questions", type=int, default=200, help="with --device: asked of nano (default %(default)s)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="with --device: default all")
    add("--precision", nargs="+", choices=list(OURS), default=["exact", "fast"], help="default exact fast")
    add("--against", nargs="+", choices=PEERS, default=[], help="other people's engines, in the same rounds")
    add("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS), metavar="JOB", help=f"of {', '.join(JOBS)}")
    add("--rounds", type=int, default=3, help="after one that warms up (default %(default)s)")
    add("--tokens", type=int, default=16, help="decoded in each round (default %(default)s)")
    add("--peers-python", default=sys.executable, metavar="PYTHON", help="default this one")
    add("--accuracy", action="store_true", help="no speed: how far the scores of each --precision are from the first's")
    add("--json", metavar="FILE", help="write all numbers to this file")
    add("--serve", help=argparse.SUPPRESS)
    return parser


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and refuse what would have no effect."""
    parser = parser_of_options()
    args = parser.parse_args(argv)
    found = options.given(parser, argv)
    if args.device:
        options.refuse(found, found.keys() - {"device", "size", "questions", "parts", "json"},
                       "with --device, which has a model and rounds of its own")
        if "proof" not in args.parts:
            options.refuse(found, ("questions",), "without the part proof")
        if not {"speed", "peers"} & set(args.parts):
            options.refuse(found, ("size",), "without the part speed or peers")
        return args
    options.refuse(found, ("size", "questions", "parts"), "without --device")
    if args.checkpoint is None:
        raise InputError("name a checkpoint folder or hub id, or --device cuda for all of it on a GPU")
    if args.serve:
        options.refuse(found, found.keys() - {"checkpoint", "serve", "tokens"}, "with --serve")
        return args
    if args.accuracy:
        options.refuse(found, ("against", "jobs", "rounds", "tokens", "peers_python"),
                       "with --accuracy, which measures no speed")
        if len(args.precision) < 2:
            raise InputError("--accuracy compares; give two or more of --precision, the first is the measure")
    if not args.against:
        options.refuse(found, ("peers_python",), "without --against")
    if args.rounds < 1 or args.tokens < 1:
        raise InputError(f"{args.rounds} rounds of {args.tokens} tokens measure nothing; give 1 or more of each")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = arguments(argv)
    if args.device:
        from weights_tools.bench import gpu
        report = gpu.run(args.device, args.size, args.questions, args.json, args.parts)
        return 1 if report.failed else 0
    if args.serve:
        serve(args.serve, args.checkpoint, args.tokens)
        return 0
    if args.accuracy:
        report = accuracy(find(args.checkpoint), args.precision)
        print(accuracy_table(report, args.precision[0]))
        if args.json:
            write_text(args.json, json.dumps(report, indent=1) + "\n")
        return 0
    report = bench(args.checkpoint, [*args.precision, *args.against], python=args.peers_python, rounds=args.rounds,
                   tokens=args.tokens, jobs=args.jobs)
    print(table(report))
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
