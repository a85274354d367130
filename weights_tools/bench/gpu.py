"""Prove and measure everything on a GPU in one go (make gpu): python -m weights_tools.bench --device cuda

    proof       the recorded stages of the original code in three dtypes; nano's answers in every form, beside the
                CPU's, and through the service; precision="fast" with its recorded steps, and that an edit made between
                two prompts counts there; some steps of preference training; what a full device says
    speed       a random AWQ checkpoint of full size, made on the spot: loading, memory, tiles, a prompt, new tokens at
                four batch sizes, each beside its floor
    peers       the same beside transformers' own InternVL, in bfloat16, where it is installed

Needs nothing that the machine must fetch. `--device cpu --size tiny` runs the same code where there is no GPU.
Half precision may be twice as far from the recorded float32 as the CPU's own half precision is, at each stage.
"""
from __future__ import annotations

import gc
import json
import platform
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

import minivl
from minivl import GenerationConfig, qwen2
from minivl.limits import InputError
from minivl.serve.scheduler import Scheduler
from weights_tools.bench.machine import work_of
from weights_tools.bench.ours import Ours
from weights_tools.files import write_text

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
HALF_SLACK = 2.0            # times the CPU's own error in the same dtype
DTYPES = ("float32", "float16", "bfloat16")
BATCHES = (1, 4, 16, 64)
PROMPT = 1792               # tokens of a picture of 7 tiles
WARM = 0.3                  # seconds


class Report:
    """Collect rows for the table: printed at once and written after each, so that a run cut short keeps them."""

    def __init__(self, out: Path | None):
        self.out = out
        self.rows = []
        self.started = time.perf_counter()

    def add(self, what: str, found, *, limit=None, unit: str = "", good: bool | None = None):
        """Note one row.

        `limit` is what may be reached at best, or must be kept; `good` None marks a number that proves nothing.
        """
        row = {"what": what, "found": found, "limit": limit, "unit": unit, "good": good}
        self.rows.append(row)
        print(f"[{time.perf_counter() - self.started:6.1f} s] {line(row)}", flush=True)
        if self.out:
            write_text(self.out, json.dumps(self.rows, indent=1) + "\n")

    def part(self, work: Callable, *args):
        """Run a part; one that fails is a row, and the others go on."""
        try:
            with torch.inference_mode():
                work(self, *args)
        except Exception as error:          # whatever a new machine comes up with
            traceback.print_exc()
            self.add(work.__name__, f"{type(error).__name__}: {str(error)[:200]}", good=False)

    @property
    def failed(self) -> list[dict]:
        """List the rows that are wrong."""
        return [row for row in self.rows if row["good"] is False]


def number(value) -> str:
    """Write a number with four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def line(row: dict) -> str:
    """Write a row as text."""
    limit = "" if row["limit"] is None else f"   (limit {number(row['limit'])})"
    mark = {True: "ok", False: "WRONG", None: ""}[row["good"]]
    return f"{row['what']:<58} {number(row['found'])} {row['unit']}{limit} {mark}".rstrip()


def table(report: Report) -> str:
    """Write all rows as a Markdown table."""
    rows = [f"| {r['what']} | {number(r['found'])} {r['unit']} | {'' if r['limit'] is None else number(r['limit'])} | "
            f"{ {True: 'ok', False: 'WRONG', None: ''}[r['good']]} |" for r in report.rows]
    return "\n".join(["| | found | limit | |", "|---|---|---|---|", *rows])


# ---- proof ----------------------------------------------------------------------------------------------------------

def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}        # noqa: SIM118  no dict


def golden_model(folder: Path, device: str, dtype: str, precision: str = "exact") -> minivl.MiniVL:
    """Load the model of a golden case."""
    model = minivl.load(folder, device=device, dtype=dtype, precision=precision)
    model.img_context_token_id = json.loads((folder / "case.json").read_text())["image_token_id"]
    return model


def greedy_of(model: minivl.MiniVL, want: dict) -> list[int]:
    """Write 12 tokens."""
    ids, pixels = want["input_ids"], want["pixel_values"]
    return minivl.generate(model, ids, pixels, max_new_tokens=12, ignore_eos=True)[0].tolist()


def stages_of(folder: Path, device: str, dtype: str, want: dict) -> tuple[dict, list[int]]:
    """Run a golden case: ({stage: tensor}, greedy tokens)."""
    model = golden_model(folder, device, dtype)
    with minivl.trace(model, device="cpu") as t:
        model(want["input_ids"], want["pixel_values"])
    return {name: tensor.float() for name, tensor in t.items() if name in want}, greedy_of(model, want)


def golden(report: Report, device: str, case: str):
    """Compare every stage with the recorded one, in each dtype."""
    folder = GOLDEN / case
    want = tensors_of(folder / "expected.safetensors")
    for dtype in DTYPES:
        got, tokens = stages_of(folder, device, dtype, want)
        if dtype == "float32":
            limits = dict.fromkeys(got, 1e-4)
        else:
            own, _ = stages_of(folder, "cpu", dtype, want)
            limits = {name: HALF_SLACK * minivl.relative_error(own[name], want[name]) for name in got}
        errors = {name: minivl.relative_error(got[name], want[name]) for name in got}
        worst = max(errors, key=lambda name: errors[name] / limits[name])
        report.add(f"{case}, {dtype}: {len(errors)} stages, worst {worst}", errors[worst], limit=limits[worst],
                   good=all(errors[name] <= limits[name] for name in errors))
        if dtype == "float32":
            same_tokens(report, f"{case}: 12 greedy tokens", tokens, want)
            if case != "qwen2-awq":         # its int4 is rounded by "fast"
                tokens = greedy_of(golden_model(folder, device, dtype, "fast"), want)
                same_tokens(report, f"{case}, fast: 12 greedy tokens", tokens, want)


def same_tokens(report: Report, what: str, tokens: list[int], want: dict):
    """Note whether greedy tokens are the recorded ones."""
    same = tokens == want["greedy"].tolist()
    report.add(what, "the same" if same else "others", good=same)


def forms(pipe: minivl.Pipeline) -> list[str]:
    """Ask nano in every form there is: alone, in a batch, as a stream, in a session, sampled, with prompt lookup."""
    from minivl.demo import SAMPLES
    image = minivl.load_image(SAMPLES / "shapes.png")
    words = minivl.load_image(SAMPLES / "words.png")
    answers = [pipe(("describe this image", image)).text]
    answers += [r.text for r in pipe([("describe this image", image), "Hello", ("What is the number?", words)])]
    answers.append("".join(pipe.stream(("What colour is the heart?", image))))
    session = pipe.chat(("What colour is the heart?", image))
    answers.append(pipe.chat("Where is it?", session=session).response.text)
    for seed in (1, 2):
        config = GenerationConfig(do_sample=True, random_seed=seed, temperature=1.0)
        answers.append(pipe(("describe this image", image), config).text)
    answers.append(pipe(("describe this image", image), GenerationConfig(lookup=4)).text)
    return answers


def pipe_of(model: str, device: str, dtype: str, precision: str = "exact") -> minivl.Pipeline:
    """Open nano on a device."""
    config = minivl.EngineConfig(device=device, dtype=dtype, precision=precision, max_batch_size=25)
    return minivl.pipeline(model, config)


def answers(report: Report, device: str, model: str):
    """Check that the device writes in float32 what the CPU writes, in every form, recorded steps included."""
    expected = forms(pipe_of(model, "cpu", "float32"))
    for precision in ("exact", "fast"):
        if precision == "fast" and model != "nano":     # its int4 is rounded: see `questions`
            continue
        got = forms(pipe_of(model, device, "float32", precision))
        same = sum(a == b for a, b in zip(got, expected))
        report.add(f"{model}, float32, {precision}: forms of answers as on the CPU", same, limit=len(expected),
                   good=same == len(expected))


def questions(report: Report, device: str, model: str, count: int):
    """Ask held-out questions, ten of each of nano's tasks (or fewer), and compare the share that is answered right."""
    from weights_tools.nano import evaluate
    tasks = list(evaluate.TARGETS)[:count]
    each = -(-count // len(tasks))

    def ask(device, dtype, precision="exact"):
        pipe = pipe_of(model, device, dtype, precision)
        found = [pair for task in tasks for pair in evaluate.measure(pipe, task, each)[1]]
        right = sum(evaluate.is_right(item.turns[-1], answer) for item, answer in found) / len(found)
        return right, [answer for _, answer in found]

    share, expected = ask("cpu", "float32")
    report.add(f"{model}: {len(expected)} questions on the CPU, right", 100 * share, unit="%")
    for dtype, precision in (("float32", "exact"), ("float16", "exact"), ("bfloat16", "fast")):
        right, got = ask(device, dtype, precision)
        same = sum(a == b for a, b in zip(got, expected))
        # In half precision a close choice may turn; 3 points are six questions of two hundred.
        good = same == len(expected) if dtype == "float32" else right >= share - 0.03
        report.add(f"{model}, {dtype}, {precision}: right, and {same} answers as on the CPU", 100 * right,
                   limit=100 * share, unit="%", good=good)


def edits(report: Report, device: str):
    """Check that an edit between two prompts counts where steps are recorded, and is gone when it is taken back."""
    pipe = pipe_of("nano", device, "float32", "fast")

    def text():
        return pipe("Hello, what can you do?").text

    before = text()
    shipped = qwen2.MLP.gated
    try:
        qwen2.MLP.gated = lambda self, x: F.relu(self.gate_up(x)[0])
        during = text()
    finally:
        qwen2.MLP.gated = shipped
    report.add("an edit of qwen2.MLP between two prompts", "counts" if during != before else "IS HIDDEN",
               good=during != before and text() == before)
    recorded = type(pipe.model.language_model).__name__
    report.add("decoder of nano with precision fast", recorded, good=recorded == "Recorded" or device == "cpu")


def service(report: Report, device: str):
    """Check that the service, which writes the answers to many requests together, writes what the CPU writes alone."""
    from minivl.demo import SAMPLES
    prompts = [(question, minivl.load_image(SAMPLES / f"{name}.png")) for name, question in (
        ("shapes", "describe this image"), ("words", "What is the number?"), ("count", "How many rings are there?"),
        ("shapes", "What colour is the heart?"), ("shapes", "describe this image"))] + ["Hello"]
    configs = [GenerationConfig(max_new_tokens=40, **({"do_sample": True, "random_seed": i} if i % 2 else {}))
               for i in range(len(prompts))]
    alone = pipe_of("nano", "cpu", "float32")
    expected = [alone(prompt, config).text for prompt, config in zip(prompts, configs)]
    for precision in ("exact", "fast"):
        scheduler = Scheduler(pipe_of("nano", device, "float32", precision), places=4)
        jobs = []
        for prompt, config in zip(prompts, configs):        # each joins while the others are being written
            jobs.append(scheduler.job(scheduler.pipe.turn(prompt, config), lambda *_: None))
            scheduler.submit(jobs[-1])
            scheduler.round()
        while scheduler.busy():
            scheduler.round()
        got = [job.error or job.answer.response().text for job in jobs]
        same = sum(a == b for a, b in zip(got, expected))
        report.add(f"service, nano, float32, {precision}: answers as on the CPU alone", same, limit=len(expected),
                   good=same == len(expected))


def learning(report: Report, device: str):
    """Compare what some steps of preference training log, all weights in float32, with the CPU; then try a LoRA."""
    from minivl.demo import SAMPLES
    from minivl.files.find import find
    from weights_tools.mpo import train
    from weights_tools.mpo.batch import Pairs
    from weights_tools.mpo.mmpr import read_datasets
    from weights_tools.mpo.steps import Plan
    rows = [{"image": "shapes.png", "question": "What colour is the heart?", "chosen": "Red.", "rejected": "Green."},
            {"image": "count.png", "question": "How many rings are there?", "chosen": "3", "rejected": "Two or so"},
            {"question": "Hello", "chosen": "Hello!", "rejected": "No."}]

    def logged(out: Path, checkpoint: str, device: str, plan: Plan) -> list[float]:
        # Not in inference mode, which `part` is in: what is loaded there cannot learn.
        with torch.inference_mode(False):
            train.train(find(checkpoint), Pairs(read_datasets(out.parent / "pairs.jsonl", SAMPLES)), out, plan,
                        device=device)
        return [json.loads(text)["loss"] for text in (out / "log.jsonl").read_text().splitlines()]

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        plan = Plan(lr=1e-4, batch=2, micro=2, steps=4, dtype="float32")
        here = logged(folder / "here", "nano", device, plan)
        there = logged(folder / "there", "nano", "cpu", plan)
        worst = max(abs(a - b) / abs(b) for a, b in zip(here, there))
        report.add(f"{plan.steps} steps of MPO on nano, float32: losses, relative error", worst, limit=1e-3,
                   good=len(here) == len(there) == plan.steps and worst <= 1e-3)
        plan = Plan(lr=1e-3, batch=3, micro=1, steps=8, lora=4)
        found = logged(folder / "lora", "nano-awq", device, plan)
        report.add("MPO of a LoRA on nano-awq: loss of the first and the last step",
                   f"{found[0]:.3f}, {found[-1]:.3f}", good=found[-1] < found[0])


def full(report: Report, device: str):
    """Check that a full device is told in one sentence, and that the next answer comes nevertheless."""
    if device == "cpu":
        return
    pipe = pipe_of("nano", device, "float32")
    before = pipe("Hello").text
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2 ** 23) / total)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            pipe(["Hello " * 400] * 25)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = str(told[0].message) if told else "nothing, all fitted"
    report.add("a full device", said, good="no memory left on cuda" in said and pipe("Hello").text == before)


# ---- speed ----------------------------------------------------------------------------------------------------------

def usual(work: Callable[[], float], device: str, repeats: int = 5) -> float:
    """Run a function that returns its seconds: the median of some, or of all within WARM.

    Before that it runs twice and for WARM: a GPU that was idle, while weights were loaded, needs time to be fast again.
    """
    enough = 0 if device == "cpu" else WARM

    def several(least: int) -> list[float]:
        end = time.perf_counter() + enough
        seconds = [work() for _ in range(least)]
        while time.perf_counter() < end:
            seconds.append(work())
        return seconds

    several(2)
    return statistics.median(several(repeats))


def timed(work: Callable, device: str, repeats: int = 5) -> float:
    """Time a function: see `usual`."""
    def wait():
        if device != "cpu":
            torch.cuda.synchronize()

    def seconds():
        wait()
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start

    return usual(seconds, device, repeats)


def copying(device: str) -> float:
    """Measure TB read and written a second; what it copies is freed when it returns."""
    x = torch.randn(2 ** 30 if device != "cpu" else 2 ** 24, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return 2 * x.nbytes / timed(lambda: y.copy_(x), device) / 1e12


def multiplying(device: str) -> float:
    """Measure TFLOP a second in bfloat16."""
    n = 8192 if device != "cpu" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n ** 3 / timed(lambda: a @ b, device) / 1e12


def floors(report: Report, device: str) -> dict[str, float]:
    """Measure what the device does at best: {"TB/s": read and written, "TFLOP/s": in bfloat16}."""
    memory = copying(device)
    rate = multiplying(device)
    report.add("memory, read and written", memory, unit="TB/s")
    report.add("bfloat16 product", rate, unit="TFLOP/s")
    return {"TB/s": memory, "TFLOP/s": rate}


def speed(report: Report, device: str, size: str, floor: dict, engines=("fast",)):
    """Measure a random AWQ checkpoint: loading, memory, tiles, a prompt and new tokens, each beside its floor."""
    from weights_tools.synthesize import synthesize
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        checkpoint = synthesize(Path(folder) / size, size, awq=True, tokenizer=False)
        report.add(f"{size}-AWQ: made at random in", time.perf_counter() - start, unit="s")
        for engine in engines:
            measure(report, device, checkpoint, engine, floor)
        memory(report, device, checkpoint)


def measure(report: Report, device: str, checkpoint: Path, engine: str, floor: dict):
    """Measure one precision; the engine "released" is the modules as released."""
    cuda = device != "cpu"
    gc.collect()            # what ran before is gone, its memory too
    held = torch.cuda.memory_allocated() if cuda else 0
    start = time.perf_counter()
    ours = Ours(checkpoint, None if engine == "released" else engine, device, "bfloat16")
    ours.wait()
    report.add(f"{engine}: load", time.perf_counter() - start, unit="s")
    if cuda:
        report.add(f"{engine}: weights on the device", (torch.cuda.memory_allocated() - held) / 1e9, unit="GB")
    work = work_of(ours.model.config)
    for n in (1, 7, 13):
        ms = 1e3 * usual(lambda n=n: ours.tiles(n), device)
        report.add(f"{engine}: {n} tile{'s' * (n > 1)}", ms, limit=n * work["GFLOP/tile"] / floor["TFLOP/s"], unit="ms")
    tokens = PROMPT if cuda else 64
    ms = 1e3 * usual(lambda: ours.prompt(tokens), device)
    report.add(f"{engine}: a prompt of {tokens}", ms, limit=tokens * work["GFLOP/token"] / floor["TFLOP/s"], unit="ms")
    for batch in BATCHES if cuda else (1, 4):
        seconds = ours.batch(batch, 32 if engine == "fast" else 3)
        best = max(work["GB/token"] / floor["TB/s"] / 1e3, batch * work["GFLOP/token"] / floor["TFLOP/s"] / 1e3)
        report.add(f"{engine}: new tokens, {batch} prompt{'s' * (batch > 1)}", batch / seconds, limit=batch / best,
                   unit="tok/s")
    if engine == "fast":
        whole_answer(report, ours, cuda)


def about_a_picture(model: minivl.MiniVL, tiles: int) -> tuple[list[list[int]], torch.Tensor]:
    """Make a prompt about noise: its ids, and its tiles float[N, 3, R, R]. Also gives the model a placeholder."""
    c = model.config
    model.img_context_token_id = c.llm_config.vocab_size - 7
    ids = [1] * 40 + [model.img_context_token_id] * (tiles * c.num_image_token) + [2] * 20
    return [ids], torch.randn(tiles, 3, c.force_image_size, c.force_image_size)


def whole_answer(report: Report, ours: Ours, cuda: bool):
    """Measure an answer about a picture of 7 tiles: its first token, and the tokens after it."""
    model = ours.model
    tiles = 7 if cuda else 1
    ids, pixels = about_a_picture(model, tiles)
    for name, config in (("greedy", GenerationConfig()), ("sampled", GenerationConfig(do_sample=True, random_seed=0))):
        seconds = {}
        for new in (1, 65) if cuda else (1, 5):
            seconds[new] = timed(lambda new=new, config=config: minivl.generate(
                model, ids, pixels, max_new_tokens=new, ignore_eos=True, config=config), "cuda" if cuda else "cpu", 3)
        (few, first), (many, whole) = seconds.items()
        if name == "greedy":
            report.add(f"fast: picture of {tiles} tiles, until the first token", 1e3 * first, unit="ms")
        rate = (many - few) / (whole - first)
        report.add(f"fast: generate, {name}, new tokens after the picture", rate, unit="tok/s")


def memory(report: Report, device: str, checkpoint: Path):
    """Measure what an answer about a picture takes of a device, weights included, in a process that does only that."""
    gc.collect()
    free = torch.cuda.mem_get_info()[0] if device != "cpu" else 0
    with get_context("spawn").Pool(1) as process:
        tiles, tensors, left = process.apply(answer_alone, (device, checkpoint))
    report.add(f"fast: most memory for a picture of {tiles} tiles alone: tensors", tensors / 1e9, limit=6.0, unit="GB",
               good=tensors < 6e9)
    report.add("fast: the same, all that the process took of the device", (free - left) / 1e9, limit=6.0, unit="GB")


def answer_alone(device: str, checkpoint: Path) -> tuple[int, int, int]:
    """Answer about a picture, in a new process: (tiles, most bytes of tensors, bytes that the device has left)."""
    cuda = device != "cpu"
    model = minivl.load(checkpoint, device=device, dtype="bfloat16", precision="fast")
    tiles, new = (7, 32) if cuda else (1, 2)
    minivl.generate(model, *about_a_picture(model, tiles), max_new_tokens=new, ignore_eos=True)
    return (tiles, torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[0]) if cuda else (tiles, 0, 0)


def peers(report: Report, device: str, size: str):
    """Measure transformers' InternVL as it comes, with random weights of this size in bfloat16 (not int4)."""
    try:
        from transformers import DynamicCache, InternVLForConditionalGeneration
    except ImportError:
        report.add("transformers", "not installed")
        return
    from weights_tools.synthesize import config_json
    from weights_tools.verify.reference import hf_config
    config = config_json(size)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = InternVLForConditionalGeneration(hf_config(config)).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    side, text = config["force_image_size"], model.model.language_model
    for n in (1, 7, 13):
        x = torch.randn(n, 3, side, side, device=device, dtype=torch.bfloat16)
        ms = 1e3 * timed(lambda x=x: model.model.get_image_features(x), device)
        report.add(f"transformers, bfloat16: {n} tile{'s' * (n > 1)}", ms, unit="ms")

    def step(ids, cache):
        hidden = text(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        return model.lm_head(hidden[:, -1:]).argmax(-1)

    ids = torch.ones(1, PROMPT if device != "cpu" else 64, dtype=torch.int64, device=device)
    ms = 1e3 * timed(lambda: step(ids, DynamicCache()), device)
    report.add(f"transformers, bfloat16: a prompt of {ids.shape[1]}", ms, unit="ms")
    for batch in BATCHES if device != "cpu" else (1,):
        cache = DynamicCache()
        last = step(torch.ones(batch, 64, dtype=torch.int64, device=device), cache)
        seconds = timed(lambda last=last, cache=cache: step(last, cache), device, 20)
        report.add(f"transformers, bfloat16: new tokens, {batch} prompt{'s' * (batch > 1)}", batch / seconds,
                   unit="tok/s")


# ---- all ------------------------------------------------------------------------------------------------------------

def run(device: str = "cuda", size: str = "4B", count: int = 200, out: str | Path | None = None,
        parts=("proof", "speed", "peers")) -> Report:
    """Run the parts and print the table; `count` questions for nano, the results as JSON in the file `out`."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"torch {torch.__version__} finds no CUDA device here; "
                         "--device cpu --size tiny runs the same script without one")
    out = out and Path(out)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report = Report(out)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or device
    report.add("device", name)
    report.add("torch, Python", f"{torch.__version__}, {platform.python_version()}")
    if "proof" in parts:
        for case in ("qwen2", "qwen2-awq", "vit6b-internlm2"):
            report.part(golden, device, case)
        report.part(edits, device)
        report.part(service, device)
        report.part(learning, device)
        report.part(full, device)
        for model in ("nano", "nano-awq"):
            report.part(answers, device, model)
            report.part(questions, device, model, count)
    if "speed" in parts:
        with torch.inference_mode():
            floor = floors(report, device)
        report.part(speed, device, size, floor, ("fast", "released"))
    if "peers" in parts:
        report.part(peers, device, size)
    print("\n" + table(report))
    if report.failed:
        print(f"\n{len(report.failed)} of {len(report.rows)} rows are WRONG", file=sys.stderr)
    return report


if __name__ == "__main__":
    sys.exit("the bench of a GPU is: python -m weights_tools.bench --device cuda")
