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
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minivl.limits import InputError
from weights_tools import run

OURS, PEERS = {"exact": "exact", "fast": "fast", "lean": "exact", "op": "fast", "released": None}, ("llama.cpp", "transformers")
UNCOMPILED = ("lean", "op")     # as on a machine without a C++ compiler
JOBS = {    # name -> (what is asked, unit); seconds become `count / seconds` of the unit, or stay seconds
    "tile": ({"tiles": 1}, "s/tile"), "prefill 128": ({"prompt": 128}, "tok/s"), "prefill 512": ({"prompt": 512}, "tok/s"),
    "prefill 1792": ({"prompt": 1792}, "tok/s"), "decode 1": ({"batch": 1}, "tok/s"), "decode 4": ({"batch": 4}, "tok/s")}
CONTEXT = 64            # tokens that are there when decoding starts


# ---- the machine ----------------------------------------------------------------------------------------------------

def machine() -> dict:
    """Bytes read a second (float32 summed), and float32 and bfloat16 products a second, the better of torch's two."""
    import torch

    from minivl import fast
    big, n = torch.ones(2 ** 27), 2048
    x, w = torch.randn(512, n), torch.randn(n, n)
    halves = x.bfloat16(), w.bfloat16()
    reading, floating, half = fast.fastest(big.sum, lambda: fast.products()[0](x, w), lambda: torch.nn.functional.linear(*halves), repeats=5)
    name = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
                platform.processor())
    return {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "GB/s": big.nbytes / reading / 1e9, "GFLOP/s float32": 2 * 512 * n * n / floating / 1e9,
            "GFLOP/s bfloat16": 2 * 512 * n * n / half / 1e9}


def _lines(path) -> list:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def work_of(config) -> dict:
    """What the model asks for: multiply-adds of a tile and of a prompt token (two operations each), bytes read for a new token."""
    v, llm = config.vision_config, config.llm_config
    P, C = (config.force_image_size // v.patch_size) ** 2, v.hidden_size
    layer = 4 * C * C + 2 * C * v.intermediate_size
    tower = (P + 1) * (v.num_hidden_layers * (layer + 2 * (P + 1) * C)) + P * 3 * v.patch_size ** 2 * C
    D, F = llm.hidden_size, llm.intermediate_size
    kv = 2 * D * llm.num_key_value_heads // llm.num_attention_heads
    body = llm.num_hidden_layers * (2 * D * D + D * kv + 3 * D * F)
    tower += P // 4 * (4 * C * D + D * D)
    bits = 4 if config.quantization_config else 16
    return {"GFLOP/tile": 2 * tower / 1e9, "GFLOP/token": 2 * body / 1e9,
            "GB/token": (body * bits / 8 + 2 * D * llm.vocab_size) / 1e9}


# ---- one engine -----------------------------------------------------------------------------------------------------

def median_step(step, last, tokens: int) -> float:
    """Seconds of one of `tokens` steps, each given what the step before returned."""
    seconds = []
    for _ in range(tokens):
        start = time.perf_counter()
        last = step(last)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


class Ours:
    """minivl. Each method does one job and returns its seconds."""

    def __init__(self, checkpoint, precision):
        import torch

        import minivl
        self.torch, self.model = torch, minivl.load(checkpoint, precision=precision)
        self.language = self.model.language_model

    def embed(self, batch, tokens):
        ids = self.torch.arange(batch * tokens).view(batch, tokens) % min(1000, self.model.config.llm_config.vocab_size)
        return self.language.model.embed_tokens(ids)

    def step(self, x, cache):
        return self.language.lm_head(self.language.model(x, cache)[:, -1])

    def tiles(self, n):
        R = self.model.config.force_image_size
        x = self.torch.randn(n, 3, R, R)
        start = time.perf_counter()
        self.model.visual_tokens(x)
        return time.perf_counter() - start

    def prompt(self, tokens):
        from minivl.cache import KVCache
        x = self.embed(1, tokens)
        start = time.perf_counter()
        self.step(x, KVCache())
        return time.perf_counter() - start

    def batch(self, n, tokens):
        """Seconds of one step that adds a token to each of n prompts: the median."""
        from minivl.cache import KVCache
        cache = KVCache()
        return median_step(lambda logits: self.step(self.language.model.embed_tokens(logits.argmax(-1)[:, None]), cache),
                           self.step(self.embed(n, CONTEXT), cache), tokens)

    def scores(self, path):
        """Into a file: log probabilities [68, V] of the last 64 tokens of a prompt with a tile, and of four more, one by one."""
        from minivl.cache import KVCache
        torch, c, cache = self.torch, self.model.config, KVCache()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, min(c.llm_config.vocab_size, 1000), (1, 260), generator=generator)
        pixels = torch.randn(1, 3, c.force_image_size, c.force_image_size, generator=generator)
        x = torch.cat([self.model.visual_tokens(pixels).flatten(0, 1)[None], self.language.model.embed_tokens(ids)], dim=1)
        hidden = self.language.model(x[:, :-4], cache)[:, -64:]
        found = [self.language.lm_head(hidden)[0]] + [self.language.lm_head(self.language.model(x[:, t:t + 1], cache))[0]
                                                      for t in range(x.shape[1] - 4, x.shape[1])]
        torch.save(torch.cat(found).float().log_softmax(-1), path)
        return 0.0

    def profile(self, tokens):
        """Share of a step by what it is in: {int4 products: ..., head: ..., attention: ..., the rest: ...}.

        The rest is what is missing to a step without hooks: looking takes time too. Each the fastest of three runs.
        """
        from minivl import fast
        from minivl.awq import AWQLinear
        from minivl.cache import KVCache

        def seconds():
            cache, x = KVCache(), self.embed(1, 1)
            start = time.perf_counter()
            for _ in range(tokens // 3 + 1):
                self.step(x, cache)
            return time.perf_counter() - start

        total = min(seconds() for _ in range(3))
        spent, hooks = {"int4": 0.0, "head": 0.0, "attention": 0.0}, []
        for name, module in self.language.named_modules():
            kind = ("int4" if isinstance(module, (AWQLinear, fast.PackedLinear, fast.OpLinear)) else "head" if name == "lm_head" else
                    "attention" if name.endswith("attend") else None)
            if kind:
                def before(module, inputs):
                    module.started = time.perf_counter()

                def after(module, inputs, output, kind=kind):
                    spent[kind] += time.perf_counter() - module.started

                hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        looks = []
        for _ in range(3):
            spent.update(dict.fromkeys(spent, 0.0))
            seconds()
            looks.append(dict(spent))
        for hook in hooks:
            hook.remove()
        spent = min(looks, key=lambda look: sum(look.values()))
        return {kind: share / total for kind, share in {**spent, "the rest": total - sum(spent.values())}.items()}


def serve(engine: str, checkpoint: str, tokens: int):
    """The loop of a worker process: a line of JSON in, a line out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)           # whatever a library prints goes to stderr
    start = time.perf_counter()
    if engine in OURS:
        import torch
        it = Ours(checkpoint, OURS[engine])
        torch.set_grad_enabled(False)
    else:
        from weights_tools import bench_peers
        it = bench_peers.start(engine, checkpoint)
    loaded = time.perf_counter() - start
    it.prompt(2), it.batch(1, 1)
    ready = time.perf_counter() - start

    def say(message):
        print(json.dumps(message), file=answers, flush=True)

    say({"load": loaded, "first token": ready})
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if "scores" in job:
                say(it.scores(job["scores"]))
            elif "tiles" in job:
                say(it.tiles(job["tiles"]))
            elif "prompt" in job:
                say(it.prompt(job["prompt"]))
            elif "batch" in job:
                say(it.batch(job["batch"], tokens))
            elif "profile" in job:
                say(it.profile(tokens))
            else:
                say(peak())
        except (AttributeError, NotImplementedError):       # this engine has no such part
            say(None)


def peak() -> dict:
    """GB: most memory of the process so far, file pages included, and what is its own now."""
    status = dict(line.split(":", 1) for line in _lines("/proc/self/status") if ":" in line)
    return {key: int(status[field].split()[0]) * 1024 / 1e9 for key, field in (("peak", "VmHWM"), ("own", "RssAnon"))
            if field in status}


class Worker:
    """An engine in its own process."""

    def __init__(self, engine, checkpoint, python, tokens):
        self.engine = engine
        root = str(Path(__file__).resolve().parents[1])
        self.process = subprocess.Popen(
            [python, "-W", "ignore", "-m", "weights_tools.bench", str(checkpoint), "--serve", engine, "--tokens", str(tokens)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root, **({"MINIVL_COMPILE": "0"} if engine in UNCOMPILED else {})})
        self.started = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            self.end()
            raise InputError(f"{self.engine} ended with code {self.process.returncode}; its last words are above. For other "
                             "people's engines install the extra `peers`, or name a Python that has them with --peers-python")
        return json.loads(line)

    def ask(self, **job):
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return self.read()

    def end(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


# ---- all together ---------------------------------------------------------------------------------------------------

def bench(checkpoint, engines, *, python=sys.executable, rounds: int = 3, tokens: int = 16, jobs=tuple(JOBS)) -> dict:
    """{"machine", "work", "engines": {engine: {job: {"best", "median", "unit"}, "load", ...}}}."""
    from minivl.files.find import find
    from minivl.config import Config
    folder = find(checkpoint)
    report = {"checkpoint": str(checkpoint), "machine": machine(), "work": work_of(Config.load(folder)), "engines": {}}
    workers = []
    try:
        for engine in engines:
            print(f"{engine}: loading", file=sys.stderr)
            workers.append(Worker(engine, folder, sys.executable if engine in OURS else python, tokens))
        seconds = {(w.engine, job): [] for w in workers for job in jobs}
        for i in range(rounds + 1):         # the first round warms up
            for job in jobs:
                for worker in workers:
                    print(f"round {i} of {rounds}: {job}, {worker.engine}   ", end="\r", file=sys.stderr)
                    found = worker.ask(**JOBS[job][0])
                    if found is not None and (i or rounds == 0):
                        seconds[worker.engine, job].append(found)
        for worker in workers:
            entry = dict(worker.started)
            for job in jobs:
                found, (asked, unit) = seconds[worker.engine, job], JOBS[job]
                if found:
                    count = asked.get("prompt") or asked.get("batch")
                    values = [count / s if count else s for s in found]
                    entry[job] = {"best": (max if count else min)(values), "median": statistics.median(values), "unit": unit}
            if worker.engine in OURS:
                entry["profile"] = worker.ask(profile=True)
            entry["memory"] = worker.ask()
            report["engines"][worker.engine] = entry
    finally:
        for worker in workers:
            worker.end()
    print(" " * 60, end="\r", file=sys.stderr)
    return report


def accuracy(checkpoint, engines, tokens: int = 1) -> dict:
    """{engine: {"logits", "KL", "same best", "largest KL"}} against the first of the engines, over 68 tokens of one prompt."""
    import torch
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in engines:              # one after the other: each needs the memory of a model
            print(f"{engine}: loading", file=sys.stderr)
            worker = Worker(engine, checkpoint, sys.executable, tokens)
            try:
                worker.ask(scores=str(Path(folder) / engine))
            finally:
                worker.end()
            found[engine] = torch.load(Path(folder) / engine, weights_only=True)
    right = found[engines[0]]

    def centred(x):         # log probabilities and scores differ by a constant for each token
        return x - x.mean(-1, keepdim=True)

    report = {}
    for engine in engines[1:]:
        other = found[engine]
        kl = (right.exp() * (right - other)).sum(-1)                                    # (68)
        report[engine] = {"logits": float((centred(other) - centred(right)).norm() / centred(right).norm()), "KL": float(kl.mean()),
                          "largest KL": float(kl.max()), "same best": float((right.argmax(-1) == other.argmax(-1)).float().mean())}
    return report


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
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder or hub id")
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
