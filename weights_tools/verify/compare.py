"""minivl against a recorded trace: inputs, then every stage, then the tokens.

    trace (safetensors) + checkpoint -> rows: stage, shape, relative error, where, what it looks like -> Report
"""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path

import torch
from tqdm import tqdm

import minivl
from minivl import MiniVL, Tokenizer
from minivl.cache import KVCache
from minivl.config import Config
from minivl.files.find import find
from minivl.limits import InputError
from minivl.prompt import encode, render
from minivl.tracing import hook, indices, kind, relative_error, stages
from weights_tools.verify import inputs
from weights_tools.verify.recording import Recording, picks, weights_digest

INPUTS = ("prompt", "tiles", "pixel_values", "input_ids", "stop tokens")
# Relative error |a - b| / |b| of a stage that still is agreement, by the dtype of the computation.
TOLERANCE = {"float32": (2e-5, "orders of summation differ by about 1e-6; of the planted mistakes that float32 shows, "
                               "the smallest (tanh for erf in GELU) makes 3e-5 at its first layer"),
             "bfloat16": (6e-2, "8 bits: each rounding is up to 4e-3, and dozens of layers add theirs"),
             "float16": (1e-2, "11 bits: each rounding is up to 5e-4, and dozens of layers add theirs")}
# The same where every stage gets the reference's own input: nothing adds up, and the kernels are the same.
LOCAL = {"float32": (2e-5, TOLERANCE["float32"][1]),
         "bfloat16": (1e-3, "stages are equal bit for bit where one machine computes both; another processor flips a "
                            "rounding here and there"),
         "float16": (2e-4, "as in bfloat16, but int4 layers multiply in another order: 1.3e-4")}
# Times the tolerance: most of one token, where a few large activations would outweigh it in the whole.
ONE_TOKEN = 20


# ---- the report -----------------------------------------------------------------------------------------------------

@dataclass
class Row:
    """One line: an input or a stage."""
    stage: str
    shape: list
    error: float | None = None          # relative, |a - b| / |b|; None where that means nothing
    largest: float | None = None        # max |a - b|
    at: list | None = None              # where
    cosine: float | None = None
    agrees: bool = True
    note: str = ""                      # what it looks like, if it does not agree


@dataclass
class Report:
    """Everything that was compared. `first` is the first stage beyond tolerance, None if all agree."""
    checkpoint: str
    trace: str
    reference: dict
    dtype: str
    tolerance: float
    reason: str                         # of the tolerance
    rows: list = field(default_factory=list)
    skipped: list = field(default_factory=list)     # what was not compared, and why
    logits: dict | None = None          # top5, kl, rank at the end of the prompt
    tokens: list = field(default_factory=list)      # of the answer: reference, minivl, margin
    maps: dict = field(default_factory=dict)        # stage -> error per patch and tile, for the page

    @property
    def first(self) -> Row | None:
        """The first row that does not agree."""
        return next((row for row in self.rows if not row.agrees), None)

    @property
    def parted(self) -> int | None:
        """The number of the first token that differs, None if all agree."""
        return next((i for i, t in enumerate(self.tokens) if t["reference"] != t["minivl"]), None)

    @property
    def agrees(self) -> bool:
        """Whether every row and every token agrees."""
        return self.first is None and self.parted is None

    def json(self) -> dict:
        """Give everything but the maps as plain values; None stands for a number that is not finite."""
        def finite(x):
            if isinstance(x, dict):
                return {k: finite(v) for k, v in x.items()}
            if isinstance(x, list):
                return [finite(v) for v in x]
            return None if isinstance(x, float) and not math.isfinite(x) else x
        values = finite({k: v for k, v in asdict(self).items() if k != "maps"})
        return {**values, "first": self.first and self.first.stage, "parted": self.parted, "agrees": self.agrees}


# ---- what a difference looks like -----------------------------------------------------------------------------------

HINTS = {   # first stage that differs -> where to look
    "prompt": "minivl/prompt.py: template, system message, newlines, where the picture stands",
    "tiles": "minivl/tiling.py choose_grid: the rule for the grid, the tie rule, the thumbnail",
    "pixel_values": "minivl/tiling.py: order of the tiles, resampling filter, mean and spread; the picture's mode",
    "input_ids": "minivl/tokenizer.py, or the number of placeholders per tile",
    "stop tokens": "minivl/files/load.py _token_ids",
    "vit.embeddings": "minivl/vit.py Embeddings: patch convolution, CLS first, position embedding",
    "vit.layers": "minivl/vit.py Layer: norm and its eps, order of q, k, v, scale, GELU, LayerScale",
    "pixel_unshuffle": "minivl/model.py (CLS dropped?) and minivl/pixel_unshuffle.py: (dy, dx, c), ps_version",
    "projector": "minivl/projector.py: LayerNorm eps 1e-5, GELU between the two linears",
    "inputs_embeds": "minivl/model.py embed: which rows the visual tokens take, in which order",
    "llm.layers": "minivl/qwen2.py (InternLM2: internlm2.py): RoPE, biases of q, k, v or the order in wqkv, grouping "
                  "of heads, mask, SwiGLU; with int4 minivl/awq.py",
    "llm.norm": "RMSNorm in minivl/qwen2.py or internlm2.py, or the last decoder layer, which some traces do not hold",
    "logits": "the head, lm_head or output: is it that of this checkpoint, untied?",
    "greedy_scores": "what differs between a prompt and a single token: the cache and its positions, minivl/qwen2.py "
                     "or internlm2.py",
}


def hint(stage: str) -> str:
    """Name the places to look at when a stage is the first that differs."""
    return HINTS.get(stage) or HINTS.get(kind(stage)[0], "")


def look(a, b) -> str:
    """Say in a few words what the difference of two tensors of one shape looks like.

    Dimensions: tile or batch, token, channel.
    """
    a = a.double()
    b = b.double()
    if not torch.isfinite(a).all():
        return f"{int((~torch.isfinite(a)).sum())} values are not finite"
    if torch.allclose(a.flatten().sort().values, b.flatten().sort().values, rtol=1e-4, atol=1e-6):
        return "the same numbers in another order"
    remarks = []
    difference = a - b
    scale = float((a * b).sum() / (b * b).sum().clamp(min=1e-300))
    if abs(scale - 1) > 1e-3 and relative_error(a, scale * b) < 0.1 * relative_error(a, b):
        remarks.append(f"everything is {scale:.4g} times the reference")
    if a.ndim == 3:
        for axis, what in ((0, "tile"), (1, "token"), (2, "channel")):
            others = [d for d in range(3) if d != axis]
            per = difference.pow(2).sum(others).sqrt() / b.pow(2).sum(others).sqrt().clamp(min=1e-12)
            wrong = (per > 0.05 * per.max()).nonzero().flatten().tolist()
            if len(per) > 1 and 0 < len(wrong) < len(per):
                shown = ", ".join(map(str, wrong[:6])) + (", ..." if len(wrong) > 6 else "")
                remarks.append(f"{len(wrong)} of {len(per)} {what}s differ: {shown}")
            if what == "token" and len(per) > 8 and per[0] < 0.02 * per.max():
                half = len(per) // 2
                later = float(per[half:].mean() / per[1:half].mean().clamp(min=1e-12))
                grows = ", the error grows with the position" if later > 1.3 else ""
                remarks.append("the first token agrees" + grows)
    return "; ".join(remarks)


def compare(checkpoint: str | Path, recording: Recording, *, pictures: list | None = None, stages: list | None = None,
            dtype: str | None = None, model: MiniVL | None = None, tolerance: float | None = None,
            local: bool = False) -> Report:
    """Run minivl on a trace's input. `pictures`: the files it was recorded with, to compare the inputs too.

    `stages`: patterns; only these are compared, the rest of the model runs as far as it must. `local`: after every
    stage the reference's result is passed on in place of minivl's, so that errors do not add up: in half precision only
    this tells a mistake from rounding. Raises InputError where the trace is of other weights, other pictures or another
    dtype.
    """
    folder = find(checkpoint)
    check_recording(recording, folder, dtype, local)
    wanted = [s for s in recording.stages if not stages or any(fnmatchcase(s, p) for p in stages)]
    if not wanted:
        raise InputError(f"no stage of the trace matches {', '.join(stages)}; it has {', '.join(recording.stages)}")
    dtype = recording.dtype
    if model is None:
        model = minivl.load(folder, dtype=dtype)
    if model.img_context_token_id is None:
        model.img_context_token_id = recording.facts.get("image_token_id")
    usual, reason = (LOCAL if local else TOLERANCE)[dtype]
    reference = {key: recording.facts.get(key) for key in ("reference", "versions", "dtype")}
    report = Report(str(checkpoint), str(recording.path), reference, dtype, usual if tolerance is None else tolerance,
                    reason)
    pixels = compare_inputs(report, model, folder, recording, pictures)
    if pixels is not NOTHING:
        limits = summed_limits(report, model, recording, wanted, pixels) if local and tolerance is None else {}
        run(report, model, recording, wanted, pixels, limits, local, part=bool(stages))
    if report.first:        # later stages inherit its error
        report.first.note = "; ".join(filter(None, (report.first.note, "look at " + hint(report.first.stage))))
    return report


def check_recording(recording: Recording, folder: Path, dtype: str | None, local: bool):
    """Refuse a trace that says nothing about this checkpoint, or not what is asked."""
    if dtype not in (None, recording.dtype):
        raise InputError(f"{recording.path} was recorded in {recording.dtype}, not in {dtype}; record again in {dtype}")
    if local and any(recording.sliced(stage) for stage in recording.stages):
        raise InputError(f"{recording.path} is shrunk; only the stages of a whole trace can be passed on")
    if "weights" not in recording.facts:
        return
    mine = weights_digest(folder)
    theirs = recording.facts["weights"]
    if mine != theirs:
        raise InputError(f"{recording.path} was recorded from other weights (sha256 {theirs[:12]}, {folder} has "
                         f"{mine[:12]}); record again with --record")


# ---- the model ------------------------------------------------------------------------------------------------------

class Enough(Exception):
    """All stages that were asked for are compared, the rest of the model need not run."""


@torch.no_grad()
def run(report: Report, model: MiniVL, recording: Recording, wanted: list, pixels, limits: dict, local: bool,
        part: bool):
    """Run the model on the trace's ids: a row for each stage as it passes by; the answer too unless `part` or `local`.

    `limits`: stage -> its tolerance, where that is not the report's.
    """
    greedy = recording["greedy"].tolist() if "greedy" in recording.names else []
    if greedy and (part or local):
        why = "only stages of the prompt were asked for" if part else "--local"
        report.skipped.append(f"the answer ({why})")
        greedy = []
    missing = set(wanted)
    bar = tqdm(total=len(wanted), desc="comparing", unit="stage", disable=None)

    def check(name, got):
        if name in missing:
            missing.discard(name)
            report.rows.append(compare_stage(report, recording, name, got, limits.get(name)))
            bar.update()
        if not missing and not greedy:
            raise Enough

    hooked = [stage for stage in wanted if stage != "logits"] or ["llm.norm"]
    with minivl.trace(model, *hooked) as t, bar:
        t.record = check
        # registered after the trace's own hooks, which therefore see minivl's result
        handles = pass_on(model, recording) if local else []
        try:
            logits, cache = read_prompt(model, recording, pixels)
            if "logits" in wanted:
                if not recording.sliced("logits"):
                    compare_logits(report, recording, logits)
                check("logits", logits[None])
            t.record = lambda name, got: None
            answer(report, model, recording, greedy, logits, cache)
        except Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
    report.rows += [Row(name, recording.shape(name), agrees=False, note="minivl did not compute this stage")
                    for name in wanted if name in missing]


def read_prompt(model: MiniVL, recording: Recording, pixels) -> tuple:
    """Run the prompt: (logits float32[T or fewer, V] of the positions whose logits the trace has, the filled cache)."""
    visual = None if pixels is None else model.visual_tokens(pixels)
    cache = KVCache()
    x = model.language_model.body(model.embed(recording["input_ids"], visual), cache)[0]      # (T, D)
    # Logits of all positions of a long prompt would be 2 GB: only those that the trace has.
    logits = model.language_model.head(x[recording.facts.get("logits_from", 0):]).float()
    return logits, cache


def answer(report: Report, model: MiniVL, recording: Recording, greedy: list, logits, cache: KVCache):
    """Compare the answer by teacher forcing: the reference's tokens before each. The first comes with the prompt."""
    scores = []
    for n, token in enumerate(greedy):
        best = logits[-1].topk(2)
        report.tokens.append({"reference": token, "minivl": int(best.indices[0]),
                              "margin": float(best.values[0] - best.values[1])})
        scores.append(logits[-1, token])
        if n + 1 < len(greedy):
            logits = model.language_model(model.embed(torch.tensor([[token]])), cache)[0]
    if scores and "greedy_scores" in recording.names:       # one token after the other, with the cache
        report.rows.append(compare_stage(report, recording, "greedy_scores", torch.stack(scores)))


def pass_on(model: MiniVL, recording: Recording) -> list:
    """Replace what a stage gives by what the reference's stage gave; the handles of the hooks that do it."""
    def theirs(name, which):
        def use(mine):
            if which == "in" and mine.shape[1] == 1:    # a token of the answer, of which the trace has no stages
                return None
            return recording[name].to(mine.dtype)
        return use
    return [hook(module, which, theirs(name, which)) for name, module, which in stages(model)
            if name in recording.names and name != "logits"]


def summed_limits(report: Report, model: MiniVL, recording: Recording, wanted: list, pixels) -> dict:
    """Find the stages that `local` cannot compare alone, since the trace lacks the stage before: name -> tolerance.

    The roundings of all stages since the last that was passed on add up in them, as everywhere without `local`.
    """
    order = [name for name, _, which in stages(model) if which in ("in", "out")]
    if pixels is None:
        order = order[order.index("inputs_embeds"):]
    before = dict(zip(order[1:], order))
    loose = TOLERANCE[report.dtype][0]
    limits = {name: loose for name in wanted if name in before and before[name] not in recording.names}
    if limits and loose > report.tolerance:
        report.skipped.append(f"{', '.join(limits)} alone (the trace lacks the stage before, so that roundings add up: "
                              f"the tolerance is {loose:.0e})")
    return limits


# ---- the inputs -----------------------------------------------------------------------------------------------------

NOTHING = object()      # in place of pixels: the model cannot be run


def compare_inputs(report: Report, model: MiniVL, folder: Path, recording: Recording, pictures: list | None):
    """Add rows for prompt, tiles, pixels and ids where the trace tells how it made them; the pixels to go on with."""
    facts = recording.facts
    if facts.get("messages") is None:       # ids and pixels were given to the reference
        if recording.sliced("pixel_values"):
            raise InputError(f"{recording.path} is shrunk and tells no picture; nothing can be run")
        report.skipped.append("prompt, tiles and ids (the trace does not tell how they were made)")
        return recording["pixel_values"] if "pixel_values" in recording.names else None
    images = open_pictures(recording, pictures)
    if pictures is None:
        counts = facts["tiles"]
        pixels = recording["pixel_values"] if "pixel_values" in recording.names else None
        if facts["pictures"]:
            report.skipped.append("tiles and pixels (no pictures were given)")
    else:
        counts, pixels = compare_pixels(report, model.config, recording, pictures, images)
    tokenizer = minivl.Tokenizer.load(folder)
    report.rows.append(prompt_row(model.config, tokenizer, facts, counts, pictures))
    report.rows.append(ids_row(model.config, tokenizer, recording, counts))
    if "stop" in facts:
        report.rows.append(stop_row(model, tokenizer, facts["stop"]))
    report.rows.sort(key=lambda row: INPUTS.index(row.stage))
    return pixels


def open_pictures(recording: Recording, pictures: list | None) -> list:
    """Open the pictures, or refuse those that the trace was not recorded with."""
    recorded = recording.facts["pictures"]
    if pictures is None:
        if recorded and recording.sliced("pixel_values"):
            raise InputError(f"{recording.path} is shrunk: give the {len(recorded)} pictures it was recorded with")
        return []
    images = [minivl.load_image(picture) for picture in pictures]
    hashes = [sha256(f"{image.size}".encode() + image.tobytes()).hexdigest() for image in images]
    if hashes != recorded:
        raise InputError(f"{recording.path} was recorded with other pictures (sha256 of the pixels "
                         f"{[h[:12] for h in recorded]}, these have {[h[:12] for h in hashes]}); give those, or record "
                         "again")
    return images


def compare_pixels(report: Report, config: Config, recording: Recording, pictures: list, images: list) -> tuple:
    """Cut the pictures and add the rows for tiles and pixels: (tiles of each, the pixels to go on with)."""
    facts = recording.facts
    tiles = [inputs.cut(image, config, facts["max_num"]) for image in images]
    counts = [len(t) for t in tiles]
    agrees = counts == facts["tiles"]
    note = "" if agrees else f"the reference cut {facts['tiles']}"
    report.rows.append(Row("tiles", counts, agrees=agrees, note=note))
    if not images:
        return counts, None
    pixels = minivl.tiling.to_pixel_values([tile for picture in tiles for tile in picture])
    shrunk = recording.sliced("pixel_values")
    if list(pixels.shape) == recording.shape("pixel_values"):
        row = compare_stage(report, recording, "pixel_values", pixels, limit=1e-5)
        row.agrees = row.agrees and row.largest < 1e-3      # one step of 255 in one pixel is 0.017
        report.rows.append(row)
    elif shrunk and not agrees:
        report.skipped.append("all stages (the tiles are others, and the trace is shrunk: there are no pixels to go on "
                              "with)")
        return counts, NOTHING
    elif shrunk:
        raise InputError(f"the picture gives pixel_values {list(pixels.shape)}, the trace has "
                         f"{recording.shape('pixel_values')}, and being shrunk cannot stand in for them")
    last = report.rows[-1]
    if last.agrees or shrunk:
        return counts, pixels
    theirs = recording["pixel_values"]      # the model is compared on the reference's pixels
    if len(pictures) == 1:
        known = inputs.known_opening(pictures[0], theirs, config, facts["max_num"])
        last.note = "; ".join(filter(None, (last.note, known)))
    return counts, theirs


def prompt_row(config: Config, tokenizer: Tokenizer, facts: dict, counts: list, pictures: list | None) -> Row:
    """Compare the rendered prompt, without its placeholders."""
    messages = facts["messages"]
    theirs = facts["prompt"]
    text = render(messages, counts, config.system_message, tokens_per_tile=config.num_image_token)
    text = text.replace("<IMG_CONTEXT>", "")
    if text == theirs:
        return Row("prompt", [len(text)])
    i = inputs.parting(text, theirs)
    note = f"from character {i}: {text[i:i + 30]!r}, the reference has {theirs[i:i + 30]!r}"
    if pictures is not None and len(messages) == 1:
        question = messages[0]["content"].replace("<image>\n", "")
        known = inputs.known(theirs, inputs.engines(config, tokenizer, pictures, question))
        note = "; ".join(filter(None, (note, known)))
    return Row("prompt", [len(text)], agrees=False, note=note)


def ids_row(config: Config, tokenizer: Tokenizer, recording: Recording, counts: list) -> Row:
    """Compare the token ids of the prompt."""
    ids = encode(tokenizer, recording.facts["messages"], counts, config.system_message,
                 tokens_per_tile=config.num_image_token)
    theirs = recording["input_ids"][0].tolist()
    if ids == theirs:
        return Row("input_ids", [len(ids)])
    i = inputs.parting(ids, theirs)
    return Row("input_ids", [len(ids)], agrees=False,
               note=f"{len(ids)} and {len(theirs)} ids, from number {i}: {ids[i:i + 5]}, the reference has "
                    f"{theirs[i:i + 5]}")


def stop_row(model: MiniVL, tokenizer: Tokenizer, stop: int) -> Row:
    """Compare the tokens that end an answer: the reference's must be one, and no other that an answer can hold."""
    ends = "<|im_end|>", "<|im_start|>", "<|endoftext|>", "</s>"      # the last two: of Qwen2, of InternLM2
    harmless = {tokenizer.backend.token_to_id(token) for token in ends} - {None}
    stops = model.eos_token_ids
    if stop in stops and set(stops) <= harmless:
        return Row("stop tokens", [len(stops)])
    return Row("stop tokens", [len(stops)], agrees=False,
               note=f"{sorted(stops)}, the reference stops at {stop}; harmless beside it are {sorted(harmless)}")


# ---- one stage ------------------------------------------------------------------------------------------------------

def compare_stage(report: Report, recording: Recording, name: str, got, limit: float | None = None) -> Row:
    """Compare one stage with the trace, and keep a map of the error of vision stages."""
    shape = recording.shape(name)
    limit = report.tolerance if limit is None else limit
    got = got.detach().float().cpu()
    if list(got.shape) != shape:
        return Row(name, list(got.shape), agrees=False, note=f"the reference has shape {shape}")
    want = recording[name].float()
    sliced = recording.sliced(name)
    index = picks(got.numel()) if sliced else None
    a = got.flatten()[index] if sliced else got
    error = relative_error(a, want)
    difference = (a - want).abs().nan_to_num(nan=float("inf"))
    flat = int(difference.argmax())
    flat = int(index[flat]) if sliced else flat
    at = indices(flat, got.shape)
    cosine = float(torch.nn.functional.cosine_similarity(a.double().flatten(), want.double().flatten(), dim=0))
    row = Row(name, shape, error, float(difference.max()), at, cosine, agrees=bool(error <= limit))     # NaN does not
    if sliced:
        return row
    if got.ndim == 3 and row.agrees:
        per_token = (a - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-12)
        if not per_token.max() <= ONE_TOKEN * limit:
            row.agrees = False
            row.note = f"one token differs by {per_token.max():.1e}, too little in the whole to show"
    if not row.agrees:
        row.note = "; ".join(filter(None, (row.note, look(a, want))))
    if name.startswith("vit."):
        patches = (a - want)[:, 1:].norm(dim=-1) / want[:, 1:].norm(dim=-1).clamp(min=1e-12)
        report.maps[name] = patches
    return row


def compare_logits(report: Report, recording: Recording, logits):
    """Put the five best tokens at the end of the prompt side by side, with KL and the rank of the reference's token."""
    a = logits[-1].double().log_softmax(-1)
    b = recording["logits"][0][-1].double().log_softmax(-1)
    best = int(b.argmax())
    report.logits = {"top5": [{"reference": [int(i), float(b[i])], "minivl": [int(j), float(a[j])]}
                              for i, j in zip(b.topk(5).indices, a.topk(5).indices)],
                     "kl": max(0.0, float((b.exp() * (b - a)).sum())), "rank": int((a > a[best]).sum()) + 1}
