"""minivl against a recorded trace: inputs, then every stage, then the tokens.

    trace (safetensors) + checkpoint -> rows: stage, shape, relative error, where, what it looks like -> Report

A trace holds whole stages, or, where it was shrunk for the repository, a few hundred values of each (`picks`).
"""
from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

import minivl
from minivl.checkpoint import find, open_weights
from minivl.limits import InputError
from minivl.prompt import encode, render
from minivl.cache import KVCache
from minivl.qwen2 import rope_tables
from minivl.tracing import relative_error
from weights_tools.files import raw_bytes, save_safetensors
from weights_tools.verify import inputs

PARTS = ("vit", "pixel_unshuffle", "projector", "inputs_embeds", "llm", "logits")
INPUTS = ("prompt", "tiles", "pixel_values", "input_ids", "stop tokens")
# Relative error |a - b| / |b| of a stage that still is agreement, by the dtype of the computation.
TOLERANCE = {"float32": (2e-5, "orders of summation differ by about 1e-6; of the planted mistakes that float32 shows, the smallest "
                               "(tanh for erf in GELU) makes 3e-5 at its first layer"),
             "bfloat16": (6e-2, "8 bits: each rounding is up to 4e-3, and dozens of layers add theirs"),
             "float16": (1e-2, "11 bits: each rounding is up to 5e-4, and dozens of layers add theirs")}
# The same where every stage gets the reference's own input: nothing adds up, and the kernels are the same.
LOCAL = {"float32": (2e-5, TOLERANCE["float32"][1]),
         "bfloat16": (1e-3, "stages are equal bit for bit where one machine computes both; another processor flips a rounding here and "
                            "there"),
         "float16": (2e-4, "as in bfloat16, but int4 layers multiply in another order: 1.3e-4")}
ONE_TOKEN = 20      # times the tolerance: most of one token, where a few large activations would outweigh it in the whole
SLICE = 509     # values kept of a stage in a shrunk trace: a prime, so that the picks meet every row and channel


# ---- traces ---------------------------------------------------------------------------------------------------------

@dataclass
class Trace:
    """A recorded run: tensors by stage, read when asked for, and the facts about it."""
    path: Path
    facts: dict
    names: list

    @classmethod
    def open(cls, path) -> Trace:
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path} is no file; record a trace first (--record {path})")
        try:
            with safe_open(path, "pt") as file:
                names, metadata = list(file.keys()), file.metadata() or {}
        except Exception as error:
            raise InputError(f"{path} is no safetensors file ({error}); a trace is written by --record") from None
        facts = json.loads(metadata.get("trace", "{}"))
        trace = cls(path, facts, names)
        if "input_ids" not in names or not trace.stages:
            raise InputError(f"{path} holds {', '.join(names[:5]) or 'nothing'}; a trace has input_ids and stages such as "
                             "llm.norm, see the names in minivl/tracing.py")
        return trace

    def __getitem__(self, name) -> torch.Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)

    @property
    def stages(self) -> list:
        """In the order of the computation."""
        return sorted((n for n in self.names if n.split(".")[0] in PARTS), key=_order)

    def shape(self, name) -> list:
        if name in self.facts.get("slices", {}):
            return self.facts["slices"][name]
        with safe_open(self.path, "pt") as file:
            return file.get_slice(name).get_shape()


def _order(stage: str) -> tuple:
    part, *rest = stage.split(".")
    number = rest[-1] if rest else "0"
    return PARTS.index(part), int(number) if number.isdigit() else (-1 if number == "embeddings" else 10**6)


def picks(numel: int) -> torch.Tensor:
    """Indices int64[<= SLICE] into a flattened tensor: spread evenly, the same for everybody."""
    return torch.arange(min(SLICE, numel)) * numel // min(SLICE, numel)


def shrink(trace: Trace, path, whole=()) -> Path:
    """The trace with SLICE values of each stage: kilobytes, for a repository. `whole`: patterns of what is kept as it is."""
    tensors, shapes = {}, {}
    for name in trace.names:
        tensor = trace[name]
        if any(fnmatchcase(name, p) for p in ("input_ids", "greedy*", *whole)) or tensor.numel() <= SLICE:
            tensors[name] = tensor
        else:
            shapes[name] = list(tensor.shape)
            tensors[name] = tensor.flatten()[picks(tensor.numel())].clone()
    return save_safetensors(tensors, path, {"trace": json.dumps({**trace.facts, "slices": shapes})})


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
    def first(self):
        return next((row for row in self.rows if not row.agrees), None)

    @property
    def parted(self):
        """Number of the first token that differs, None if all agree."""
        return next((i for i, t in enumerate(self.tokens) if t["reference"] != t["minivl"]), None)

    @property
    def agrees(self) -> bool:
        return self.first is None and self.parted is None

    def json(self) -> dict:
        """For programs: what is not finite is None."""
        def finite(x):
            if isinstance(x, dict):
                return {k: finite(v) for k, v in x.items()}
            if isinstance(x, list):
                return [finite(v) for v in x]
            return None if isinstance(x, float) and not math.isfinite(x) else x
        return {**finite({k: v for k, v in asdict(self).items() if k != "maps"}), "first": self.first and self.first.stage,
                "parted": self.parted, "agrees": self.agrees}


# ---- comparing ------------------------------------------------------------------------------------------------------

HINTS = {   # first stage that differs -> where to look
    "prompt": "minivl/prompt.py: template, system message, newlines, where the picture stands",
    "tiles": "minivl/tiling.py choose_grid: the rule for the grid, the tie rule, the thumbnail",
    "pixel_values": "minivl/tiling.py: order of the tiles, resampling filter, mean and spread; the picture's mode",
    "input_ids": "minivl/tokenizer.py, or the number of placeholders per tile",
    "stop tokens": "minivl/checkpoint.py _token_ids",
    "vit.embeddings": "minivl/vit.py Embeddings: patch convolution, CLS first, position embedding",
    "vit.layers": "minivl/vit.py Layer: norm and its eps, order of q, k, v, scale, GELU, LayerScale",
    "pixel_unshuffle": "minivl/model.py (CLS dropped?) and minivl/pixel_unshuffle.py: (dy, dx, c), ps_version",
    "projector": "minivl/projector.py: LayerNorm eps 1e-5, GELU between the two linears",
    "inputs_embeds": "minivl/model.py embed: which rows the visual tokens take, in which order",
    "llm.layers": "minivl/qwen2.py: RoPE, biases of q, k, v, grouping of heads, mask, SwiGLU; with int4 minivl/awq.py",
    "llm.norm": "minivl/qwen2.py RMSNorm, or the last decoder layer, which some traces do not hold",
    "logits": "lm_head: is it that of this checkpoint, untied?",
    "greedy_scores": "what differs between a prompt and a single token: the cache and its positions, minivl/qwen2.py",
}


def hint(stage: str) -> str:
    return HINTS.get(stage) or HINTS.get(stage.rsplit(".", 1)[0], "")


def look(a, b) -> str:
    """What the difference of two tensors of one shape looks like, in a few words. Dimensions: tile or batch, token, channel."""
    a, b = a.double(), b.double()
    if not torch.isfinite(a).all():
        return f"{int((~torch.isfinite(a)).sum())} values are not finite"
    if torch.allclose(a.flatten().sort().values, b.flatten().sort().values, rtol=1e-4, atol=1e-6):
        return "the same numbers in another order"
    remarks, difference = [], a - b
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
                remarks.append("the first token agrees" + (", the error grows with the position" if later > 1.3 else ""))
    return "; ".join(remarks)


def compare(checkpoint, trace: Trace, *, pictures=None, stages=None, dtype: str | None = None, model=None,
            tolerance: float | None = None, local: bool = False) -> Report:
    """Run minivl on a trace's input. `pictures`: the files it was recorded with, to compare the inputs too.

    `stages`: patterns; only these are compared, the rest of the model runs as far as it must. `local`: after every stage the
    reference's result is passed on in place of minivl's, so that errors do not add up: in half precision only this tells a
    mistake from rounding. Raises InputError where the trace is of other weights, other pictures or another dtype.
    """
    folder, recorded = find(checkpoint), trace.facts.get("dtype", "float32")
    if dtype not in (None, recorded):
        raise InputError(f"{trace.path} was recorded in {recorded}, not in {dtype}; record again in {dtype}")
    dtype = recorded
    if local and set(trace.stages) & set(trace.facts.get("slices", {})):
        raise InputError(f"{trace.path} is shrunk; only the stages of a whole trace can be passed on")
    wanted = [s for s in trace.stages if not stages or any(fnmatchcase(s, p) for p in stages)]
    if not wanted:
        raise InputError(f"no stage of the trace matches {', '.join(stages)}; it has {', '.join(trace.stages)}")
    if "weights" in trace.facts:
        mine = weights_digest(folder)
        if mine != trace.facts["weights"]:
            raise InputError(f"{trace.path} was recorded from other weights (sha256 {trace.facts['weights'][:12]}, "
                             f"{folder} has {mine[:12]}); record again with --record")
    if model is None:
        model = minivl.load(folder, dtype=dtype)
    if model.img_context_token_id is None:
        model.img_context_token_id = trace.facts.get("image_token_id")
    limits = LOCAL if local else TOLERANCE
    report = Report(str(checkpoint), str(trace.path), {k: trace.facts.get(k) for k in ("reference", "versions", "dtype")}, dtype,
                    limits[dtype][0] if tolerance is None else tolerance, limits[dtype][1])
    pixels = compare_inputs(report, model, folder, trace, pictures)
    if pixels is not NOTHING:
        run(report, model, trace, wanted, pixels, local, bool(stages))
    if report.first:        # later stages inherit its error
        report.first.note = "; ".join(filter(None, (report.first.note, "look at " + hint(report.first.stage))))
    return report


@torch.no_grad()
def run(report: Report, model, trace: Trace, wanted: list, pixels, local: bool, part: bool):
    """The model on the trace's ids, a row for each stage as it passes by; then the answer, unless only a part is wanted."""
    ids, missing, names = trace["input_ids"], set(wanted), set(trace.stages)
    # The answer by teacher forcing: the reference's tokens before each. Its first token comes with the prompt.
    greedy = trace["greedy"].tolist() if "greedy" in trace.names and not part and not local else []
    if "greedy" in trace.names and not greedy:
        report.skipped.append("the answer (only stages of the prompt were asked for)" if part else "the answer (--local)")

    def check(name, got):
        if name in missing:
            missing.discard(name)
            report.rows.append(compare_stage(report, trace, name, got))
            bar.update()
        if not missing and not greedy:
            raise Enough

    handles, hooked = [], [s for s in wanted if s != "logits"]
    bar = tqdm(total=len(wanted), desc="comparing", unit="stage", disable=None)
    with minivl.trace(model, *(hooked or ["llm.norm"])) as t, bar:
        t.record = check
        if local:       # registered after the trace's own hooks, which therefore see minivl's result
            handles = pass_on(model, trace, names)
        try:
            visual, cache = None if pixels is None else model.visual_tokens(pixels), KVCache()
            x = model.language_model.model(model.embed(ids, visual), cache)[0]                    # (T, D)
            # Logits of all positions of a long prompt would be 2 GB: only those that the trace has.
            logits = model.language_model.lm_head(x[trace.facts.get("logits_from", 0):]).float()
            if "logits" in wanted:
                if "logits" not in trace.facts.get("slices", {}):
                    compare_logits(report, trace, logits)
                check("logits", logits[None])
            t.record = lambda name, got: None
            scores = []
            for n, token in enumerate(greedy):
                best = logits[-1].topk(2)
                report.tokens.append({"reference": token, "minivl": int(best.indices[0]),
                                      "margin": float(best.values[0] - best.values[1])})
                scores.append(logits[-1, token])
                if n + 1 < len(greedy):
                    logits = model.language_model(model.embed(torch.tensor([[token]])), cache)[0]
            if scores and "greedy_scores" in trace.names:       # one token after the other, with the cache
                report.rows.append(compare_stage(report, trace, "greedy_scores", torch.stack(scores)))
        except Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
    report.rows += [Row(name, trace.shape(name), agrees=False, note="minivl did not compute this stage") for name in wanted if name in missing]


def pass_on(model, trace: Trace, names: set) -> list:
    """Hooks that replace what a stage gives by what the reference's stage gave; their handles."""
    vision, language = model.vision_model, model.language_model
    outputs = {"vit.embeddings": vision.embeddings, **{f"vit.layers.{i}": m for i, m in enumerate(vision.encoder.layers)},
               "pixel_unshuffle": model.pixel_unshuffle, "projector": model.mlp1,
               **{f"llm.layers.{i}": m for i, m in enumerate(language.model.layers)}, "llm.norm": language.model.norm}
    handles = [module.register_forward_hook(lambda _, args, out, name=name: trace[name].to(out.dtype))
               for name, module in outputs.items() if name in names]
    if "inputs_embeds" in names:
        handles.append(language.model.register_forward_pre_hook(
            lambda _, args: (trace["inputs_embeds"].to(args[0].dtype), *args[1:]) if args[0].shape[1] > 1 else None))
    return handles


def weights_digest(folder: Path) -> str:
    """sha256 over all tensors by name, as the reference computes it: of the numbers, not of the files they are in."""
    total, tensors = sha256(), open_weights(folder)
    for name in sorted(tensors):
        tensor = tensors[name].read().contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(raw_bytes(tensor))
    return total.hexdigest()


NOTHING = object()      # in place of pixels: the model cannot be run


class Enough(Exception):
    """All stages that were asked for are compared, the rest of the model need not run."""


def compare_inputs(report: Report, model, folder: Path, trace: Trace, pictures):
    """Rows for prompt, tiles, pixels and ids where the trace tells how it made them; the pixel_values to go on with."""
    facts, config = trace.facts, model.config
    shrunk = "pixel_values" in facts.get("slices", {})
    want = trace["pixel_values"] if "pixel_values" in trace.names else None
    if facts.get("messages") is None:       # ids and pixels were given to the reference
        if shrunk:
            raise InputError(f"{trace.path} is shrunk and tells no picture; nothing can be run")
        report.skipped.append("prompt, tiles and ids (the trace does not tell how they were made)")
        return want
    images = [minivl.load_image(p) for p in pictures or []]
    hashes = [sha256(f"{im.size}".encode() + im.tobytes()).hexdigest() for im in images]
    if pictures is None and facts["pictures"] and shrunk:
        raise InputError(f"{trace.path} is shrunk: give the {len(facts['pictures'])} pictures it was recorded with")
    if pictures is not None and hashes != facts["pictures"]:
        raise InputError(f"{trace.path} was recorded with other pictures (sha256 of the pixels {[h[:12] for h in facts['pictures']]}, "
                         f"these have {[h[:12] for h in hashes]}); give those, or record again")
    tokenizer = minivl.Tokenizer.load(folder)
    messages, per_tile = facts["messages"], config.num_image_token
    counts, pixels = facts["tiles"], want
    if pictures is None and facts["pictures"]:
        report.skipped.append("tiles and pixels (no pictures were given)")
    if pictures is not None:
        tiles = [inputs.cut(im, config, facts["max_num"]) for im in images]
        counts = [len(t) for t in tiles]
        agrees = counts == facts["tiles"]
        report.rows.append(Row("tiles", counts, agrees=agrees, note="" if agrees else f"the reference cut {facts['tiles']}"))
        pixels = minivl.tiling.to_pixel_values([t for picture in tiles for t in picture]) if images else None
        if pixels is not None:
            if list(pixels.shape) == trace.shape("pixel_values"):
                row = compare_stage(report, trace, "pixel_values", pixels, limit=1e-5)
                row.agrees = row.agrees and row.largest < 1e-3      # one step of 255 in one pixel is 0.017
                report.rows.append(row)
            elif shrunk and not agrees:
                report.skipped.append("all stages (the tiles are others, and the trace is shrunk: there are no pixels to go on with)")
                pixels = NOTHING
            elif shrunk:
                raise InputError(f"the picture gives pixel_values {list(pixels.shape)}, the trace has {trace.shape('pixel_values')}, and "
                                 "being shrunk cannot stand in for them")
            if not report.rows[-1].agrees and not shrunk:
                if len(pictures) == 1:
                    row = report.rows[-1]
                    row.note = "; ".join(filter(None, (row.note, inputs.known_opening(pictures[0], want, config, facts["max_num"]))))
                pixels = want       # the model is compared on the reference's pixels
    system = config.system_message
    text = render(messages, counts, system, tokens_per_tile=per_tile).replace("<IMG_CONTEXT>", "")
    where = next((i for i, (a, b) in enumerate(zip(text, facts["prompt"])) if a != b), min(len(text), len(facts["prompt"])))
    agrees, note = text == facts["prompt"], ""
    if not agrees:
        note = f"from character {where}: {text[where:where + 30]!r}, the reference has {facts['prompt'][where:where + 30]!r}"
        if pictures is not None and len(messages) == 1:
            question = messages[0]["content"].replace("<image>\n", "")
            note += "; " + inputs.known(facts["prompt"], inputs.engines(config, tokenizer, pictures, question))
    report.rows.append(Row("prompt", [len(text)], agrees=agrees, note=note.removesuffix("; ")))
    ids, theirs = encode(tokenizer, messages, counts, system, tokens_per_tile=per_tile), trace["input_ids"][0].tolist()
    where = next((i for i, (a, b) in enumerate(zip(ids, theirs)) if a != b), min(len(ids), len(theirs)))
    report.rows.append(Row("input_ids", [len(ids)], agrees=ids == theirs, note="" if ids == theirs else
                           f"{len(ids)} and {len(theirs)} ids, from number {where}: {ids[where:where + 5]}, the reference has "
                           f"{theirs[where:where + 5]}"))
    if "stop" in facts:
        known = {tokenizer.id(token) for token in ("<|im_end|>", "<|im_start|>", "<|endoftext|>")}      # none can be part of an answer
        agrees = facts["stop"] in model.eos_token_ids and set(model.eos_token_ids) <= known
        report.rows.append(Row("stop tokens", [len(model.eos_token_ids)], agrees=agrees, note="" if agrees else
                               f"{sorted(model.eos_token_ids)}, the reference stops at {facts['stop']}; harmless beside it are {sorted(known)}"))
    report.rows.sort(key=lambda row: INPUTS.index(row.stage))
    return pixels


def compare_stage(report: Report, trace: Trace, name: str, got, limit=None) -> Row:
    """One stage against the trace; keeps a map of the error of vision stages."""
    shape, limit = trace.shape(name), report.tolerance if limit is None else limit
    got = got.detach().float().cpu()
    if list(got.shape) != shape:
        return Row(name, list(got.shape), agrees=False, note=f"the reference has shape {shape}")
    want = trace[name].float()
    sliced = name in trace.facts.get("slices", {})
    index = picks(got.numel()) if sliced else None
    a = got.flatten()[index] if sliced else got
    error, difference = relative_error(a, want), (a - want).abs().nan_to_num(nan=float("inf"))
    flat = int(difference.argmax())
    flat = int(index[flat]) if sliced else flat
    at = [int(i) for i in torch.unravel_index(torch.tensor(flat), got.shape)]
    cosine = float(torch.nn.functional.cosine_similarity(a.double().flatten(), want.double().flatten(), dim=0))
    row = Row(name, shape, error, float(difference.max()), at, cosine, agrees=bool(error <= limit))     # NaN does not agree
    if not sliced and got.ndim == 3 and row.agrees:
        per_token = (a - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-12)
        if not per_token.max() <= ONE_TOKEN * limit:
            row.agrees, row.note = False, f"one token differs by {per_token.max():.1e}, too little in the whole to show"
    if not row.agrees and not sliced:
        row.note = "; ".join(filter(None, (row.note, look(a, want))))
    if name.startswith("vit.") and not sliced:
        report.maps[name] = (a - want)[:, 1:].pow(2).sum(-1).sqrt() / want[:, 1:].pow(2).sum(-1).sqrt().clamp(min=1e-12)
    return row


def compare_logits(report: Report, trace: Trace, logits):
    """Top 5 side by side, KL and the rank of the reference's token, at the end of the prompt."""
    a, b = (x[-1].double().log_softmax(-1) for x in (logits, trace["logits"][0]))
    best = int(b.argmax())
    report.logits = {"top5": [{"reference": [int(i), float(b[i])], "minivl": [int(j), float(a[j])]}
                              for i, j in zip(b.topk(5).indices, a.topk(5).indices)],
                     "kl": max(0.0, float((b.exp() * (b - a)).sum())), "rank": int((a > a[best]).sum()) + 1}
