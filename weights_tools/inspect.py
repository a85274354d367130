"""Every tensor of a checkpoint: name, dtype, shape, bytes, file, and the module of minivl that takes it. Then the sums.

Reads headers only: of a folder, of one .safetensors file, or of a repository on the hub without fetching its weights.
(A pickled .bin has no header: it cannot be read from afar, and in a folder its checksums are verified on the way.)

    stored    numbers as they lie in the file; an int4 word is one number
    weights   what the model was trained with: eight for each int4 word, none for the scales and zero points around them

Exit code 0: names, shapes and dtypes fit config.json, or there is nothing to compare. 1: they do not. 2: not readable.
"""
from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import huggingface_hub
import torch
from safetensors import safe_open
from tqdm import tqdm

from minivl import options
from minivl.config import Config, read_json
from minivl.files.find import SHIPPED, choose_files, find, hub_errors, hub_id_of, hub_info
from minivl.files.formats import DIGESTS, DTYPES, OLD_DIGESTS, choose_set, open_weights, safetensors_header
from minivl.files.load import TABLE, wrong_defaults, wrong_tables
from minivl.limits import InputError, first_of, offline
from minivl.model import MiniVL
from weights_tools import run

PARTS = {   # part -> how its tensors' names begin; InternLM2 decoders have other names for embeddings and head
    "vision_model": ("vision_model.",),
    "mlp1": ("mlp1.",),
    "embeddings": ("language_model.model.embed_tokens.", "language_model.model.tok_embeddings."),
    "decoder layers": ("language_model.model.layers.",),
    "norm and head": ("language_model.model.norm.", "language_model.lm_head.", "language_model.output."),
    "other": ("",),
}


@dataclass(frozen=True)
class Tensor:
    """One line of the listing."""
    name: str
    dtype: str          # "float16", "int32", ...
    shape: tuple
    bytes: int
    file: str
    module: str | None  # class of the module that takes it; None: no module of this model does, or the model is unknown

    @property
    def stored(self) -> int:
        """Numbers as they lie in the file."""
        return math.prod(self.shape)

    @property
    def weights(self) -> int:
        """Numbers the model was trained with, see the module's docstring."""
        if self.name.endswith((".qzeros", ".scales")):
            return 0
        return self.stored * (8 if self.name.endswith(".qweight") else 1)

    @property
    def part(self) -> str:
        """The part of the model it belongs to, a key of PARTS."""
        return next(part for part, starts in PARTS.items() if self.name.startswith(starts))


@dataclass(frozen=True)
class Report:
    """What `inspect` found; `problems` has the keys missing, unexpected, misshapen, dtype."""
    source: str
    tensors: list[Tensor]
    problems: dict[str, list[str]] | None       # None: not compared, and `note` says why
    note: str | None = None


def inspect(path_or_id: str | Path, *, revision: str | None = None) -> Report:
    """Read the headers of a folder, a .safetensors file or a model on the hub and compare them with config.json."""
    path = Path(os.path.expanduser(path_or_id))
    if path.is_file():
        if revision is not None:
            raise InputError(f"{path} is a local file, it has no revision {revision!r}; leave --revision out")
        if path.suffix != ".safetensors":
            raise InputError(f"{path} is not a .safetensors file; give that, or the folder of a checkpoint")
        folder = path.parent
        tensors = _headers(folder, [path.name])
        old = _old_digests(folder, [path.name])
        config, whole = folder / "config.json", False
    elif path.is_dir() or offline() or os.fspath(path_or_id) in SHIPPED:
        folder = find(path_or_id, revision=revision)
        files = [file for file in choose_set(folder).files if (folder / file).is_file()]    # one that lacks is reported
        tensors = _headers(folder, files) if all(file.endswith(".safetensors") for file in files) else {
            name: (t.dtype, t.shape, t.file.name) for name, t in open_weights(folder).items()}
        old = _old_digests(folder, files)
        config, whole = folder / "config.json", True
    else:
        tensors, config = _remote(hub_id_of(os.fspath(path_or_id), local=True), revision)
        whole = True
        folder = old = None
    model, note = None, "no config.json beside it: no module column, nothing compared"
    if config.is_file():
        try:
            with torch.device("meta"):
                model, note = MiniVL(Config.from_json(read_json(config))), None
        except InputError as error:
            note = f"no module column, nothing compared: {error}"
    wanted = model.state_dict() if model else {}

    def module(name):
        return type(model.get_submodule(name.rpartition(".")[0])).__name__ if name in wanted else None

    rows = [Tensor(name, str(dtype).removeprefix("torch."), tuple(shape), math.prod(shape) * dtype.itemsize, file,
                   module(name)) for name, (dtype, shape, file) in tensors.items()]
    order = {name: i for i, name in enumerate(wanted)}      # that of the model: a file sorts by dtype
    rows.sort(key=lambda row: order.get(row.name, len(order)))
    if model and not whole:
        note = "one file of a checkpoint: tensors of other files are not missed"
    if not model:
        return Report(os.fspath(path_or_id), rows, None, f"{note}. {old}" if old else note)
    problems = compare(wanted, tensors, whole)
    if folder:      # afar, names and shapes are all there is
        problems["unexpected"] += wrong_tables(_tables(folder, tensors), model.config)
    told = [f"{'shape' if kind == 'misshapen' else kind}: {line}" for kind, lines in problems.items() for line in lines]
    if wrong := wrong_defaults(told, read_json(config)):
        note = " ".join(([f"{note}."] if note else []) + wrong)
    return Report(os.fspath(path_or_id), rows, problems, f"{note}. {old}" if note and old else note or old)


def compare(wanted: dict[str, torch.Tensor], tensors: dict[str, tuple], whole: bool = True) -> dict[str, list[str]]:
    """List what minivl.load would refuse. `wanted`: the model's tensors, `tensors`: name -> (dtype, shape, file)."""
    both = [name for name in wanted if name in tensors]
    return {
        "missing": [f"{n} {list(wanted[n].shape)}" for n in wanted if n not in tensors and whole],
        "unexpected": [f"{n} {list(shape)} in {file}" for n, (_, shape, file) in tensors.items()
                       if n not in wanted and not TABLE.fullmatch(n)],
        "misshapen": [f"{n} is {list(tensors[n][1])} in {tensors[n][2]}, {list(wanted[n].shape)} in the model"
                      for n in both if tuple(tensors[n][1]) != tuple(wanted[n].shape)],
        # Any float is taken for any other: the loader converts. Words of int4 must be what they are.
        "dtype": [f"{n} is {tensors[n][0]} in {tensors[n][2]}, the model takes {wanted[n].dtype}" for n in both
                  if tensors[n][0] != wanted[n].dtype
                  and not (tensors[n][0].is_floating_point and wanted[n].is_floating_point())],
    }


def _headers(folder: Path, files: list[str]) -> dict[str, tuple]:
    """Read the headers of safetensors files, and no tensor: name -> (dtype, shape, file)."""
    tensors = {}
    for file in files:
        for name, (dtype, shape, *_) in safetensors_header(folder / file)[0].items():
            _add(tensors, name, dtype, shape, file)
    return tensors


def _tables(folder: Path, tensors: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """Read the few small tensors whose values decide whether they fit: those that minivl.files.load.TABLE names."""
    found = {}
    for name in filter(TABLE.fullmatch, tensors):
        file = tensors[name][2]
        if file.endswith(".safetensors"):
            with safe_open(folder / file, "pt") as opened:
                found[name] = opened.get_tensor(name)
        else:
            found[name] = open_weights(folder)[name].read()
    return found


def _old_digests(folder: Path, files: list[str]) -> str | None:
    """Say so where a file's digests are of the kind that does not see another dtype of the same size."""
    kinds = {file: safetensors_header(folder / file)[1].keys() for file in files if file.endswith(".safetensors")}
    old = [file for file, kind in kinds.items() if OLD_DIGESTS in kind and DIGESTS not in kind]
    return (f"the sha256 digests in {old[0]} are of an older version: they cover the bytes, not dtype and shape"
            if old else None)


def _remote(hub_id: str, revision: str | None) -> tuple[dict[str, tuple], Path]:
    """Read the same from a repository on the hub, by range requests; and fetch its config.json, which is small."""
    with hub_errors(hub_id, revision):
        api = huggingface_hub.HfApi()
        names = [file.rfilename for file in hub_info(hub_id, revision).siblings or []]
        shards = [name for name in choose_files(names) if name.endswith(".safetensors")]
        if not shards:
            raise InputError(f"{hub_id} holds its weights as pickled .bin files, whose list of tensors cannot be read "
                             "remotely; run `python -m weights_tools.download` first, or try --revision refs/pr/1, "
                             "which often holds a safetensors form")
        tensors = {}
        for file in tqdm(shards, desc="headers", unit="file", disable=None):
            for name, info in api.parse_safetensors_file_metadata(hub_id, file, revision=revision).tensors.items():
                _add(tensors, name, info.dtype, info.shape, file)
        config = (huggingface_hub.hf_hub_download(hub_id, "config.json", revision=revision)
                  if "config.json" in names else "")
    return tensors, Path(config)


def _add(tensors: dict, name: str, dtype: str, shape, file: str):
    if name in tensors:
        raise InputError(f"{name} is in {tensors[name][2]} and in {file}; the files are of different checkpoints, "
                         "delete those that the index does not name")
    if dtype not in DTYPES:
        raise InputError(f"{file}: {name} has dtype {dtype}; known are {', '.join(DTYPES)}")
    tensors[name] = DTYPES[dtype], tuple(shape), file


# ---- output ---------------------------------------------------------------------------------------------------------

def totals(tensors: list[Tensor]) -> dict[str, dict[str, int]]:
    """Sum up per part and in total: tensors, stored, weights, of these int4, and bytes."""
    groups = {part: [t for t in tensors if t.part == part] for part in PARTS}
    return {part: {"tensors": len(group),
                   "stored": sum(t.stored for t in group),
                   "weights": sum(t.weights for t in group),
                   "int4": sum(t.weights for t in group if t.name.endswith(".qweight")),
                   "bytes": sum(t.bytes for t in group)}
            for part, group in {**groups, "total": tensors}.items() if group or part != "other"}


def as_json(report: Report, shown: list[Tensor], summary: bool) -> str:
    """Write the report for programs. `summary`: without the tensors."""
    data = {"source": report.source, "note": report.note, "fits": _fits(report), "problems": report.problems,
            "shown": len(shown), "of": len(report.tensors), "totals": totals(shown)}
    if not summary:
        data["tensors"] = [{**asdict(t), "stored": t.stored, "weights": t.weights, "part": t.part} for t in shown]
    return json.dumps(data, indent=1)


def as_text(report: Report, shown: list[Tensor], summary: bool) -> str:
    """Write the report as tables. `summary`: without the tensors."""
    lines = []
    if not summary:
        rows = [(t.name, t.dtype, str(list(t.shape)), f"{t.bytes:,}", t.module or "-", t.file) for t in shown]
        lines += _table([("tensor", "dtype", "shape", "bytes", "taken by", "file"), *rows], right=(3,)) + [""]
    sums = [(part, *(f"{n:,}" for n in row.values())) for part, row in totals(shown).items()]
    lines += _table([("part", "tensors", "stored", "weights", "of these int4", "bytes"), *sums], right=range(1, 6))
    lines.append("stored: numbers in the files. weights: eight for each int4 word, none for scales and zero points.")
    if len(shown) < len(report.tensors):
        lines.append(f"sums are of the {len(shown)} tensors that match, of {len(report.tensors)}")
    if report.note:
        lines.append(f"note: {report.note}")
    if report.problems is not None:
        for kind, names in report.problems.items():
            lines += [f"{kind}: " + first_of(names, f"\n{kind}: ")] if names else []
        wrong = sum(map(len, report.problems.values()))
        lines.append(f"does not fit config.json: {wrong} problems" if wrong else "fits config.json")
    return "\n".join(lines)


def _fits(report: Report) -> bool | None:
    return None if report.problems is None else not any(report.problems.values())


def _table(rows, right=()) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:{'>' if i in right else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
            for row in rows]


def arguments(argv: list | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.inspect", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("source", metavar="PATH_OR_HUB_ID",
                        help="folder, .safetensors file, hub id, or a name: nano, nano-awq, 4b-mpo-awq")
    parser.add_argument("--revision", metavar="R", help="of a hub id: branch, tag or commit (default main)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--filter", metavar="GLOB", help="only tensors whose name matches, such as '*.layers.0.*'")
    parser.add_argument("--summary", action="store_true", help="only the sums, not every tensor")
    return parser.parse_args(argv)


def main(argv: list | None = None) -> int:
    """Run the command; its exit code."""
    args = arguments(argv)
    report = inspect(args.source, revision=args.revision)
    shown = [t for t in report.tensors if args.filter is None or fnmatch.fnmatchcase(t.name, args.filter)]
    if not shown:
        raise InputError(f"none of the {len(report.tensors)} tensors matches {args.filter!r}; try '*.layers.0.*'")
    print((as_json if args.json else as_text)(report, shown, args.summary))
    return 1 if _fits(report) is False else 0


if __name__ == "__main__":
    sys.exit(run(main))
