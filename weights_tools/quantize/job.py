"""The whole checkpoint, one decoder layer at a time: read, run, made int4, written. It can be stopped at any moment.

    OUT/.quantizing/job.json            what is made of what; another job is refused there
    OUT/.quantizing/activations-0, -1   what the next layer reads, and where it writes: by turns, mapped into memory
    OUT/.quantizing/layer-00017.safetensors     a finished layer, whole or not there
    OUT/model-00001-of-00002.safetensors ...    at the end, all at once

The same call goes on after the last finished layer and ends with the same bytes: a layer's inputs are not written over
before the layer is finished.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mode

import torch
from tqdm import tqdm

from minivl.config import read_json
from minivl.fast.threads import threads_that_help
from minivl.files.formats import open_safetensors, safetensors_header
from minivl.limits import InputError, is_there, reading, sentence
from weights_tools.files import (
    check_apart,
    check_free_of_weights,
    held,
    save_checkpoint,
    save_safetensors,
    small_files,
    told,
    write_text,
)
from weights_tools.quantize.inputs import ROWS, Inputs, watched
from weights_tools.quantize.layer import PARTS, Recipe, in_half, quantize_layer, warn_of_hurt
from weights_tools.quantize.rounding import check_size
from weights_tools.quantize.stream import Stream, mapped, pass_layer, write_embedded
from weights_tools.synthesize import json_text, quantization_block

WORK = ".quantizing"
STATISTICS = ("absmax", "absmean")


def quantize_folder(source: Path, out: str | os.PathLike, recipe: Recipe, *,
                    prompts: Callable[[], Iterable] | None = None, calibrated_on: str = "",
                    statistics: list[dict] | None = None, save_stats: str | os.PathLike | None = None,
                    overwrite: bool = False, metadata: dict | None = None) -> Path:
    """Make an AWQ checkpoint of a float one, in the released layout; return its folder. Goes on where it was stopped.

    prompts() -> (ids, tiles) of each, for recipes that need inputs; calibrated_on: a name or sha256 of them, by which a
    stopped job is known. statistics: in place of prompts, see `inputs.read_statistics`. save_stats: file to write the
    statistics to. metadata: into the header of the files.
    """
    out = Path(out)
    check_apart(source, out)
    stream = Stream(source, recipe.dtype)
    _refuse_unfit(stream, recipe)
    if recipe.needs_prompts and prompts is None or recipe.needs_inputs and prompts is None and statistics is None:
        raise InputError(f"the method {recipe} must see what a layer is given; give prompts to calibrate on"
                         + ("" if recipe.needs_prompts else " or statistics"))
    job = {"source": _fingerprint(stream), "recipe": {key: str(value) for key, value in asdict(recipe).items()},
           "calibrated on": calibrated_on if recipe.needs_inputs or save_stats else ""}
    work = out / WORK
    resumed = _check_place(out, work, job, overwrite)
    wanted = statistics is None and (recipe.needs_inputs or save_stats is not None)
    with _left_clean(out, work), told(out, ""), held(work):
        _begin(stream, work, job)
        with _threads(job):
            _check_space(stream, recipe, out)
            lengths = _calibrate(stream, work, prompts) if wanted else []
            _check_space(stream, recipe, out, sum(lengths))
            _all_layers(stream, work, recipe, lengths, statistics)
        if save_stats is not None:
            _save_statistics(stream, work, Path(save_stats))
        _assemble(stream, work, out, recipe, overwrite or resumed, metadata)
        shutil.rmtree(work)
    return out


# ---- before the work ------------------------------------------------------------------------------------------------

def _refuse_unfit(stream: Stream, recipe: Recipe):
    """Refuse what cannot be made int4, before the work, which may take hours."""
    if stream.model.config.quantization_config:
        raise InputError(f"{stream.folder} is quantised already; give the float checkpoint it was made from")
    check_sizes(stream.model, recipe.group_size)


def check_sizes(model, group_size: int):
    """Refuse a model with a linear that cannot be packed in groups of this size."""
    linears = {name: module for layer in model.language_model.layers for name, module in layer.linears.items()}
    common = math.gcd(*(module.in_features for module in linears.values()))
    for name, module in linears.items():
        check_size(name, module.in_features, module.out_features, group_size, f"; {common} divides all of this model")


def _fingerprint(stream: Stream) -> str:
    """Compute a sha256 of names, shapes, dtypes, files and their sizes and times: another one is another checkpoint."""
    lines = [f"{name} {t.shape} {t.dtype} {t.file.name}" for name, t in sorted(stream.stored.items())]
    for file in sorted({t.file for t in stream.stored.values()}):
        about = file.stat()
        lines.append(f"{file.name} {about.st_size} {about.st_mtime_ns}")
    lines.append((stream.folder / "config.json").read_text("utf-8"))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check_place(out: Path, work: Path, job: dict, overwrite: bool) -> bool:
    """Refuse an OUT with weights, or with an unfinished job of another kind; tell whether this job was begun there."""
    begun = is_there(work / "job.json")
    if begun and {key: read_json(work / "job.json").get(key) for key in job} != job:
        raise InputError(f"{out} holds an unfinished job with other options or of another checkpoint; repeat those, "
                         f"delete {work}, or choose another folder")
    if not begun:
        check_free_of_weights(out, overwrite)
    return begun


@contextmanager
def _left_clean(out: Path, work: Path) -> Iterator[None]:
    """Leave nothing where the input was bad: that job will not be repeated. Keep layers that took long to make."""
    made = not out.exists()
    try:
        yield
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and is_there(_layer_file(work, 0)):
            raise OSError(f"{sentence(error)}; the layers that are finished stay in {work}: the same command goes on "
                          "after them, or delete that folder") from None
        shutil.rmtree(work, ignore_errors=True)
        if made and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        raise


def _begin(stream: Stream, work: Path, job: dict):
    """Note what is made of what, and with how many threads: those that help a layer, as things are."""
    if is_there(work / "job.json"):
        job["threads"] = read_json(work / "job.json")["threads"]
        return
    x = torch.randn(512, stream.model.config.llm_config.hidden_size, dtype=stream.dtype)
    with stream.filled(stream.layers[0]), torch.no_grad():
        job["threads"] = threads_that_help(partial(stream.through, 0, x))
    write_text(work / "job.json", json.dumps(job, indent=1) + "\n")


@contextmanager
def _threads(job: dict) -> Iterator[None]:
    """Compute with as many threads as the job was begun with: others would add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(job["threads"])
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_space(stream: Stream, recipe: Recipe, out: Path, tokens: int = 0):
    """Refuse a disk that cannot hold what is still to be written."""
    work = out / WORK
    result = sum(t.nbytes for t in announced(stream, recipe).values())
    inside = tuple(f"{stream.names[layer]}." for layer in stream.layers)
    layers = sum(t.nbytes for name, t in announced(stream, recipe).items() if name.startswith(inside))
    activations = 2 * 4 * tokens * stream.model.config.llm_config.hidden_size
    there = sum(file.stat().st_blocks * 512 for file in work.iterdir())
    needed = result + layers + activations - there
    free = shutil.disk_usage(out).free
    if needed > free:
        raise InputError(f"the result takes {result / 1e9:.3f} GB and the work before it "
                         f"{(layers + activations) / 1e9:.3f} GB, {out} has {free / 1e9:.3f} GB free; free some space, "
                         "choose another disk, or calibrate on fewer tokens")


# ---- the work -------------------------------------------------------------------------------------------------------

def _calibrate(stream: Stream, work: Path, prompts: Callable[[], Iterable]) -> list[int]:
    """Write what the decoder reads of all prompts to activations-0, once; return the tokens of each prompt."""
    told_lengths = work / "lengths.json"
    if is_there(told_lengths):
        return read_json(told_lengths)["lengths"]
    lengths = write_embedded(stream, prompts(), work / "activations-0")
    write_text(told_lengths, json.dumps({"lengths": lengths}) + "\n")
    return lengths


def _all_layers(stream: Stream, work: Path, recipe: Recipe, lengths: list[int], statistics: list[dict] | None):
    """Make every layer that is not there yet."""
    done = 0
    while is_there(_layer_file(work, done)):
        done += 1
    count = len(stream.layers)
    tokens = max(1, sum(lengths))
    with tqdm(total=count * tokens, initial=done * tokens, desc="quantising", disable=None,
              bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}") as bar:
        for i in range(done, count):
            bar.set_postfix_str(f" layer {i + 1} of {count}")
            seen = _inputs(stream, work, i, recipe, lengths, bar) if lengths else _told(statistics, i)
            _make_layer(stream, work, i, recipe, seen)
            if not lengths:
                bar.update()


def _inputs(stream: Stream, work: Path, i: int, recipe: Recipe, lengths: list[int], bar: tqdm) -> dict[str, Inputs]:
    """Run a layer on all prompts, noting what its linears are given."""
    width = stream.model.config.llm_config.hidden_size
    before, after = (mapped(work / f"activations-{k % 2}", sum(lengths), width) for k in (i, i + 1))
    every = kept_of(lengths) if recipe.method == "awq" else None
    layer = stream.layers[i]
    with stream.filled(layer), watched(layer, recipe.group_size if recipe.clip else None, every) as seen:
        pass_layer(stream, i, before, after, lengths, bar)
    return seen


def kept_of(lengths: list[int]) -> int:
    """Choose of how many tokens one is kept for the search: about ROWS of all.

    It shares no factor with the usual length of a prompt: else the first tokens of many, whose inputs may be a thousand
    times as large as all others, would be kept too often.
    """
    every = max(1, sum(lengths) // ROWS)
    while math.gcd(every, mode(lengths)) > 1:
        every += 1
    return every


def _told(statistics: list[dict] | None, i: int) -> dict[str, Inputs] | None:
    return statistics and {name: Inputs(absmax=one["absmax"]) for name, one in statistics[i].items()}


def _make_layer(stream: Stream, work: Path, i: int, recipe: Recipe, seen: dict[str, Inputs] | None):
    """Quantise a layer and write it, with what was seen and what rounding hurt."""
    layer = stream.layers[i]
    where = f"{stream.names[layer]}."
    tensors = {name: stream.stored[where + name].read() for name in layer.state_dict()}
    made, off = quantize_layer(tensors, list(layer.linears), layer.FEEDS, recipe, seen, where)
    if seen is not None:
        for name, one in seen.items():
            made[f"{name}:absmax"] = one.absmax.clone()
            if one.count:
                made[f"{name}:absmean"] = one.absmean
    named = {where + name: found for name, found in off.items()}
    save_safetensors(made, _layer_file(work, i), {"off": json.dumps(named)})


def _layer_file(work: Path, i: int) -> Path:
    return work / f"layer-{i:05d}.safetensors"


# ---- after the work -------------------------------------------------------------------------------------------------

def _save_statistics(stream: Stream, work: Path, path: Path):
    """Write the statistics of all layers to one file, which `inputs.read_statistics` reads."""
    found = {}
    for i in range(len(stream.layers)):
        for name, stored in open_safetensors(_layer_file(work, i)).items():
            if ":" in name:
                found[f"layers.{i}.{name.replace(':', '.')}"] = stored.read().clone()
    if not found:
        raise InputError("no statistics were taken, so none can be saved")
    save_safetensors(found, path)


def announced(stream: Stream, recipe: Recipe) -> dict[str, torch.Tensor]:
    """List the tensors of the result on `meta`: int4 in place of the decoder's linears, the rest half precision."""
    linears = {f"{stream.names[layer]}.{name}": module for layer in stream.layers
               for name, module in layer.linears.items()}
    found = {}
    for name, tensor in stream.model.state_dict().items():
        module = linears.get(name.removesuffix(".weight"))
        if module is None or not name.endswith(".weight"):
            found[name] = torch.empty(tensor.shape, dtype=recipe.stored, device="meta")
            continue
        I, O, g = module.in_features, module.out_features, recipe.group_size
        shapes = {"qweight": (I, O // 8), "qzeros": (I // g, O // 8), "scales": (I // g, O)}
        for part in PARTS:
            dtype = recipe.stored if part == "scales" else torch.int32
            found[f"{name.removesuffix('weight')}{part}"] = torch.empty(shapes[part], dtype=dtype, device="meta")
    return found


def _assemble(stream: Stream, work: Path, out: Path, recipe: Recipe, overwrite: bool, metadata: dict | None):
    """Write the released layout from the finished layers and what stays float."""
    made = {}
    off = {}
    for i, layer in enumerate(stream.layers):
        path = _layer_file(work, i)
        with reading(path):
            opened = open_safetensors(path)
        made.update({f"{stream.names[layer]}.{name}": stored for name, stored in opened.items() if ":" not in name})
        off.update(_off(path))

    def make(name):
        return made[name].read() if name in made else in_half(name, stream.stored[name].read(), recipe.stored)

    save_checkpoint(announced(stream, recipe), out, make=make, overwrite=overwrite, metadata=metadata,
                    small=beside(stream.folder, recipe))
    warn_of_hurt(off, recipe.method)


def _off(path: Path) -> dict[str, tuple]:
    return {name: tuple(found) for name, found in json.loads(safetensors_header(path)[1]["off"]).items()}


def beside(source: Path, recipe: Recipe) -> dict[str, bytes]:
    """Write config.json of the result, and copy what else lies beside the weights of the float checkpoint."""
    config = read_json(source / "config.json")
    config["llm_config"]["quantization_config"] = quantization_block(recipe.group_size)
    for part in (config, config["llm_config"], config["vision_config"]):
        part.pop("dtype", None)     # transformers 5's name, which would win
        part["torch_dtype"] = str(recipe.stored)[6:]
    return {**small_files(source), "config.json": json_text(config).encode("utf-8")}
