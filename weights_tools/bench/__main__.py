"""How fast, and how near to what the machine can do: python -m weights_tools.bench CHECKPOINT

    the machine: how many bytes a second it reads, how many multiplications a second it does
    -> every engine in a process of its own, asked in turns, so that a busy moment hurts all -> best and median of rounds

    python -m weights_tools.synthesize build/4B --size 4B --awq --tokenizer FOLDER      random weights of full size
    python -m weights_tools.bench build/4B --precision exact fast lean --against llama.cpp

exact and fast are minivl with that precision; lean and op are the same two on a machine without a compiler (int4 by its
definition; torch's own int4 product); released is minivl with the modules as released. llama.cpp runs a random Q4_0 file
of the same shapes, transformers the same int4 words through gptqmodel, where they are installed (the extra `peers`);
--peers-python names a Python that has them.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from minivl.limits import InputError
from weights_tools import run
from weights_tools.bench.ours import OURS
from weights_tools.bench.workers import JOBS, accuracy, bench, serve

PEERS = ("llama.cpp", "transformers")


def table(report: dict) -> str:
    """Markdown: jobs by engines, best of the rounds, in brackets the share of what the machine could do."""
    m, w, engines = report["machine"], report["work"], report["engines"]
    limits = {"tile": w["GFLOP/tile"] / m["GFLOP/s float32"], "decode 1": m["GB/s"] / w["GB/token"]}
    limits.update({job: m["GFLOP/s float32"] / w["GFLOP/token"] for job in JOBS if job.startswith("prefill")})
    lines = [f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}: reads {m['GB/s']:.0f} GB/s, {m['GFLOP/s float32']:.0f} GFLOP/s in "
             f"float32, {m['GFLOP/s bfloat16']:.0f} in bfloat16. The model: {w['GFLOP/tile']:.0f} GFLOP for a tile, "
             f"{w['GFLOP/token']:.2f} for a prompt token, {w['GB/token']:.2f} GB for a new token.", "",
             "| | float32 limit | " + " | ".join(engines) + " |", "|---|---|" + "---|" * len(engines)]

    def cell(entry, job):
        if job not in entry:
            return ""
        value, limit = entry[job]["best"], limits.get(job)
        share = "" if not limit else f" ({value / limit:.2f}x)"
        return f"{value:.2f}{share}"

    for job, (_, unit) in JOBS.items():
        if any(job in e for e in engines.values()):
            limit = f"{limits[job]:.2f}" if job in limits else ""
            lines.append(f"| {job}, {unit} | {limit} | " + " | ".join(cell(e, job) for e in engines.values()) + " |")
    for key, name in (("load", "load, s"), ("first token", "load to first token, s")):
        lines.append(f"| {name} | | " + " | ".join(f"{e[key]:.1f}" for e in engines.values()) + " |")
    for key, name in (("peak", "peak memory, GB, file pages included"), ("own", "own memory, GB")):
        lines.append(f"| {name} | | " + " | ".join(f"{e['memory'].get(key, 0):.2f}" for e in engines.values()) + " |")
    parts = [e["profile"] for e in engines.values() if e.get("profile")]
    for kind in parts[0] if parts else ():
        lines.append(f"| of a step: {kind}, % | | " + " | ".join(
            f"{100 * e['profile'][kind]:.0f}" if e.get("profile") else "" for e in engines.values()) + " |")
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights_tools.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="a folder or hub id")
    parser.add_argument("--device", metavar="cuda", help="prove and measure everything on a GPU in one go, see gpu.py; needs no "
                        "checkpoint, makes a random one")
    parser.add_argument("--size", default="4B", help="with --device: of the random checkpoint (default %(default)s)")
    parser.add_argument("--questions", type=int, default=200, help="with --device: asked of nano (default %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=("proof", "speed", "peers"), default=["proof", "speed", "peers"],
                        help="with --device: default all")
    parser.add_argument("--precision", nargs="+", choices=list(OURS), default=["exact", "fast"], help="default exact fast")
    parser.add_argument("--against", nargs="+", choices=PEERS, default=[], help="other people's engines, in the same rounds")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS), metavar="JOB", help=f"of {', '.join(JOBS)}")
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="decoded in each round (default %(default)s)")
    parser.add_argument("--peers-python", default=sys.executable, metavar="PYTHON", help="default this one")
    parser.add_argument("--accuracy", action="store_true", help="no speed: how far the scores of each --precision are from those of the first")
    parser.add_argument("--json", metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device:
        from weights_tools.bench import gpu
        report = gpu.run(args.device, args.size, args.questions, args.json and Path(args.json).parent, args.parts)
        return 1 if report.failed else 0
    if args.checkpoint is None:
        raise InputError("name a checkpoint folder or hub id, or --device cuda for all of it on a GPU")
    if args.serve:
        serve(args.serve, args.checkpoint, args.tokens)
        return 0
    if args.rounds < 1 or args.tokens < 1:
        raise InputError(f"{args.rounds} rounds of {args.tokens} tokens measure nothing; give 1 or more of each")
    if args.accuracy:
        from minivl.files.find import find
        if len(args.precision) < 2:
            raise InputError("--accuracy compares; give two or more of --precision, the first is the measure")
        found = accuracy(find(args.checkpoint), args.precision)
        print(f"| against {args.precision[0]} | relative error of the logits | mean KL | largest KL | same best token |\n|---|---|---|---|---|")
        for engine, e in found.items():
            print(f"| {engine} | {e['logits']:.1e} | {e['KL']:.1e} | {e['largest KL']:.1e} | {100 * e['same best']:.0f} % |")
        return 0
    report = bench(args.checkpoint, [*args.precision, *args.against], python=args.peers_python, rounds=args.rounds, tokens=args.tokens, jobs=args.jobs)
    print(table(report))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
