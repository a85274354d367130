"""Load on the service: python -m weights_tools.bench.serve [MODEL] [--clients N ...] [--seconds S] [--requests N]

Starts `python -m minivl serve` and lets N clients ask at once, each again as soon as it has its answer, as a stream.
No two requests have the same picture: of what the service keeps only the beginning of the prompt helps. Some answers
are compared with those that the pipeline gives alone. First the pipeline itself, in batches, without a service.
--requests N: afterwards, what memory the service has after a tenth of N short requests and after all of them.
"""
from __future__ import annotations

import argparse
import base64
import http.client
import io
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from minivl import EngineConfig, GenerationConfig, Pipeline, options, pipeline
from minivl.demo import SAMPLES
from minivl.limits import InputError
from weights_tools import run

QUESTIONS = (("describe this image", "shapes.png"), ("What is written here?", "words.png"),
             ("How many shapes are there?", "count.png"), ("describe this image", "wide.png"))
CHECKED = 100           # answers compared with the pipeline's own
TOKENS = 64             # of an answer, at most


def question(i: int) -> tuple[str, Image.Image]:
    """Make the i-th question: its picture has one pixel that no other has."""
    text, name = QUESTIONS[i % len(QUESTIONS)]
    picture = Image.open(SAMPLES / name).convert("RGB")
    picture.putpixel((0, 0), (i % 256, i // 256 % 256, i // 65536 % 256))
    return text, picture


def body_of(i: int, tokens: int = TOKENS) -> bytes:
    """Write the request of the i-th question."""
    text, picture = question(i)
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)         # the clients share the processors with the service
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return json.dumps({"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": tokens,
                       "stream": True, "stream_options": {"include_usage": True}}).encode()


def alone(pipe: Pipeline, seconds: float, size: int) -> float:
    """Let the pipeline answer in batches -> tokens a second."""
    config = GenerationConfig(max_new_tokens=TOKENS)
    numbers = itertools.count(10 ** 6)
    start = time.perf_counter()
    tokens = 0
    while time.perf_counter() < start + seconds:
        responses = pipe([question(next(numbers)) for _ in range(size)], config)
        tokens += sum(response.generate_token_len for response in responses)
    return tokens / (time.perf_counter() - start)


@contextmanager
def service(args: argparse.Namespace):
    """Run the service -> (its process, its port)."""
    command = [sys.executable, "-W", "ignore", "-m", "minivl", "serve", args.model, "--server-port", "0",
               "--max-batch-size", str(args.max_batch_size), "--max-requests", "1000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, ThreadPoolExecutor(1) as reader:
        try:
            line = process.stderr.readline()
            found = re.search(r" answers at http://127.0.0.1:(\d+)/", line)
            if not found:
                raise InputError(f"the service did not start: {line.strip()}; try python -m minivl serve {args.model}")
            reader.submit(process.stderr.read)          # or a full pipe would stop it
            yield process, int(found[1])
        finally:
            process.terminate()


def ask(port: int, body: bytes) -> tuple[str, int, list[float]]:
    """Ask once -> (the answer, its tokens, the seconds at which pieces of it came)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    pieces, times, tokens = [], [], 0
    for line in response:
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            for choice in chunk["choices"]:
                if choice["delta"].get("content"):
                    pieces.append(choice["delta"]["content"])
                    times.append(time.perf_counter() - start)
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    connection.close()
    if response.status != 200:
        raise InputError(f"the service answered with status {response.status}; see its log")
    return "".join(pieces), tokens, times


def load(port: int, clients: int, seconds: float, numbers) -> tuple[dict, list]:
    """Let some clients ask for some seconds -> (what was measured, [(number, answer), ...])."""
    end = time.perf_counter() + seconds

    def client(_):
        mine = []
        while time.perf_counter() < end:
            number = next(numbers)
            mine.append((number, *ask(port, body_of(number))))
        return mine
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        got = [one for mine in threads.map(client, range(clients)) for one in mine]
    took = time.perf_counter() - start
    first = [times[0] for *_, times in got if times]
    between = [b - a for *_, times in got for a, b in itertools.pairwise(times)]
    measured = {"answers": len(got), "tokens/s": sum(tokens for _, _, tokens, _ in got) / took}
    for name, values in (("first", first), ("next", between)):
        cuts = statistics.quantiles(values, n=20) if len(values) > 1 else values * 20
        measured |= {f"{name} p50": 1000 * statistics.median(values), f"{name} p95": 1000 * cuts[18]}
    return measured, [(number, text) for number, text, *_ in got]


def memory(process: subprocess.Popen) -> float:
    """Read how much memory a process has, in MB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.bench.serve", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("model", nargs="?", default="nano", help="as in minivl serve; default nano")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="default 1 8 32")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="of each load; default 60")
    parser.add_argument("--requests", type=int, default=0, metavar="N", help="for memory; default 0: not measured")
    parser.add_argument("--max-batch-size", type=int, default=8, metavar="N", help="default 8")
    args = parser.parse_args(argv)
    if min(args.clients) < 1 or args.seconds <= 0 or args.requests < 0:
        raise InputError("--clients and --seconds must be above 0 and --requests not below")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code: 1 if an answer is another than alone."""
    args = arguments(argv)
    pipe = pipeline(args.model, EngineConfig(plain_text=True, max_batch_size=args.max_batch_size))
    alone(pipe, args.seconds / 10, args.max_batch_size)
    print(f"the pipeline in batches of {args.max_batch_size}: "
          f"{alone(pipe, args.seconds, args.max_batch_size):.1f} tokens/s")
    numbers = itertools.count()
    answers = []
    with service(args) as (process, port):
        load(port, 2, args.seconds / 10, numbers)
        print("clients  answers  tokens/s  ms to the first: p50   p95  between: p50   p95")
        for clients in args.clients:
            m, got = load(port, clients, args.seconds, numbers)
            answers += got
            print(f"{clients:7}  {m['answers']:7}  {m['tokens/s']:8.1f}  {m['first p50']:20.0f} {m['first p95']:5.0f}"
                  f"  {m['next p50']:12.1f} {m['next p95']:5.1f}", flush=True)
        asked = 0
        for part in sorted({args.requests // 10, args.requests} - {0}):
            with ThreadPoolExecutor(8) as threads:
                todo = [body_of(next(numbers), 2) for _ in range(part - asked)]
                list(tqdm(threads.map(lambda body: ask(port, body), todo), total=len(todo), leave=False, disable=None))
            asked = part
            print(f"memory after {part} more requests: {memory(process):.0f} MB")
    some = random.Random(0).sample(answers, min(CHECKED, len(answers)))
    wrong = [number for number, text in tqdm(some, leave=False, disable=None)
             if pipe(question(number), GenerationConfig(max_new_tokens=TOKENS)).text != text]
    print(f"{len(answers)} answers; of {len(some)} compared with the pipeline's, {len(wrong)} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run(main))
