"""What quantisation did: a float checkpoint and its twins, run beside each other one decoder layer at a time.

    held-out prompts -> parent's layer -> what its linears are given and put out    beside the twin's linears
                                       -> residual stream                           beside the twin's layer alone,
                                                                                    and the twin's own stream
    last layer       -> norm, head -> log probabilities of the next token           beside the twin's

Errors are relative and 2-norms: |twin's - parent's| / |parent's|. In memory are the weights of one layer of the parent
and of one twin, float32; the residual streams lie in files that are mapped into memory.

Smoothing moves factors between norms and linears, and these are no errors. They are moved back first (`moved`): each
linear of the twin is compared as if it stood in the parent's place, so an error is its own and not what came before it.

D width, I inputs and O outputs of a linear, N tokens of all prompts, n of one, V vocabulary.
"""
from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from minivl.awq import AWQLinear, dequantize
from minivl.files.find import find
from minivl.limits import InputError, first_of
from weights_tools.files import told
from weights_tools.quantize.stream import Stream, mapped, numbers_stay_finite, write_embedded

SCORED = 512            # tokens whose scores are compared, evenly spread over the text of all prompts
TOKENS = 64             # of these at a time
WORDS = 8192            # of the vocabulary at a time
ANOTHER = 0.5           # relative error of a linear's weights; int4 leaves 0.05 to 0.2, another model's are off by 1.4
DRAWN = 128             # most points of a drawing of channels
OUTLIERS = 5            # channels that are named


@dataclass
class Linear:
    """What quantisation did to one linear."""
    layer: int
    name: str
    weight: float           # error of its weights
    output: float           # error of its outputs on the parent's own inputs
    largest: torch.Tensor   # float32[I], the largest |input| of each channel, in the parent
    lost: torch.Tensor      # float32[I], the error of the outputs that each channel's weights alone would leave

    @property
    def at(self) -> str:
        """Say where it is."""
        return f"layers.{self.layer}.{self.name}"

    def outliers(self) -> list[dict]:
        """List the channels with the largest inputs: number, largest |input|, part of the squared error."""
        part = self.lost.square() / self.lost.square().sum().clamp(min=1e-30)
        found = self.largest.topk(min(OUTLIERS, len(self.largest))).indices.tolist()
        return [{"channel": j, "largest": float(self.largest[j]), "part": float(part[j])} for j in found]

    def drawn(self) -> dict[str, list[float]]:
        """List channels for a drawing, at most DRAWN: of neighbours the largest input, and their errors together."""
        size = -(-len(self.largest) // DRAWN)
        parts = [list(range(0, len(self.largest), size)), self.largest.split(size), self.lost.split(size)]
        return {"channel": parts[0], "largest": [float(x.max()) for x in parts[1]],
                "lost": [float(x.norm()) for x in parts[2]]}


@dataclass
class Growth:
    """The error in the residual stream after one layer, the mean over tokens of |twin's - parent's| / |parent's|."""
    layer: int
    alone: float            # the twin's layer on the parent's own stream
    own: float              # on the twin's own stream, with the errors of all layers before


@dataclass
class Twin:
    """Everything about one twin."""
    folder: str
    bytes: int              # of its weight files
    group_size: int | None  # None: it is a float checkpoint
    start: float = 0.0      # error of what the first layer reads
    linears: list[Linear] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    kl: float = 0.0         # mean KL(parent || twin) of the next token, in nats
    kl_99: float = 0.0      # which 99 % of the tokens stay below
    same: float = 0.0       # share of tokens after which both find the same next one most likely

    def worst(self, most: int = 10) -> list[Linear]:
        """List the linears whose outputs are hurt most."""
        return sorted(self.linears, key=lambda linear: -linear.output)[:most]


@dataclass
class Report:
    """Everything that was measured."""
    parent: str
    bytes: int              # of the parent's weight files
    prompts: int
    tokens: int
    scored: int             # tokens whose scores were compared
    twins: list[Twin]

    def json(self) -> dict:
        """Return all of it for programs."""
        return {**asdict(self, dict_factory=_plain), "twins": [_twin_json(twin) for twin in self.twins]}


def _plain(items: list[tuple]) -> dict:
    return {key: value for key, value in items if not isinstance(value, torch.Tensor) and key != "twins"}


def _twin_json(twin: Twin) -> dict:
    return {**asdict(twin, dict_factory=_plain), "most hurt": [
        {"layer": linear.layer, "name": linear.name, "outliers": linear.outliers(), **linear.drawn(),
         "groups": [float(group.norm()) for group in linear.lost.split(twin.group_size or len(linear.lost))]}
        for linear in twin.worst()]}


# ---- what smoothing moved -------------------------------------------------------------------------------------------

def weight_of(linear: nn.Module) -> torch.Tensor:
    """Return the weight that a linear computes with, float32[O, I]."""
    if isinstance(linear, AWQLinear):
        return dequantize(linear.qweight, linear.qzeros, linear.scales).T
    return linear.weight.detach().float()


def moved(layer: nn.Module, twin: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Find what smoothing moved in a layer of a twin: the factors of its linears' inputs [I] and of their outputs [O].

    {name: factor}, those that have any. Twin's linear(x * input factor) / output factor is to be compared with the
    parent's linear(x). Behind a norm the factors are exact: its weights are in both files, and what rounding a norm did
    is an error of the linears that read it. Of up_proj and down_proj only the product is kept: the factor of an output
    of up_proj is that by which the parent's row of weights comes nearest to the twin's. So an error that is a factor on
    a whole row of up_proj looks like one of down_proj. A twin smoothed between v_proj and o_proj, which nothing here
    and no release does, would look hurt there.
    """
    inputs = {}
    outputs = {}
    for before, readers in layer.FEEDS:
        source = layer.get_submodule(before)
        other = twin.get_submodule(before)
        if before in layer.linears:
            factor = _multiples(weight_of(source), weight_of(other) * inputs.get(before, 1.0))
            outputs[before] = factor
        else:
            factor = torch.where(source.weight == 0, 1.0, other.weight / source.weight).detach().float()
        inputs.update(dict.fromkeys(readers, factor))
    return inputs, outputs


def _multiples(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Find by which factor each row of float[O, I] comes nearest to its other row: [O]; 1 where by none above 0."""
    factor = (rows * others).sum(1) / rows.square().sum(1)
    return torch.where(factor > 0, factor, 1.0)     # also for 0 / 0


class Watched:
    """A linear of the parent and its twin's, watched while the parent's layer runs."""

    def __init__(self, linear: nn.Module, twin: nn.Module, into: torch.Tensor | None, out: torch.Tensor | None):
        self.linear = linear
        self.twin = twin
        self.into = 1.0 if into is None else into
        self.out = 1.0 if out is None else out
        weight = weight_of(linear)
        lost = weight_of(twin) * self.into / (1.0 if out is None else out[:, None]) - weight
        self.columns = lost.norm(dim=0)                                                 # (I)
        self.weight = float(self.columns.double().norm() / weight.norm(dim=0).double().norm().clamp(min=1e-30))
        self.largest = torch.zeros(weight.shape[1])
        self.squares = torch.zeros(weight.shape[1], dtype=torch.float64)                # of the inputs, sum
        self.wrong = 0.0
        self.right = 0.0

    def see(self, module: nn.Module, args: tuple, y: torch.Tensor):
        """Take note of the parent's inputs float32[1, n, I] and outputs float32[1, n, O]: a forward hook."""
        x = args[0]
        self.largest = torch.maximum(self.largest, x.abs().amax((0, 1)))
        self.squares += x.square().sum((0, 1), dtype=torch.float64)
        self.wrong += float((self.twin(x * self.into) / self.out - y).square().sum(dtype=torch.float64))
        bias = 0.0 if self.linear.bias is None else self.linear.bias    # which would hide the error of the product
        self.right += float((y - bias).square().sum(dtype=torch.float64))

    def found(self, layer: int, name: str) -> Linear:
        """Sum up."""
        size = max(self.right, 1e-30) ** 0.5
        lost = self.columns * (self.squares.sqrt() / size).float()
        return Linear(layer, name, self.weight, self.wrong ** 0.5 / size, self.largest, lost)


# ---- the run --------------------------------------------------------------------------------------------------------

def measure(parent: str | os.PathLike, twins: list[str | os.PathLike], prompts: Callable[[], Iterable]) -> Report:
    """Measure what quantisation did to each twin of a float checkpoint: folders, hub ids or short names.

    prompts() -> (ids, tiles) of each.
    """
    whole = Stream(find(parent))
    streams = [Stream(find(twin)) for twin in twins]
    refuse_unfit(whole, streams)
    found = [Twin(str(name), weight_bytes(stream), _group_size(stream)) for name, stream in zip(twins, streams)]
    ids = []
    with tempfile.TemporaryDirectory() as work, told(work, "nothing is left there"), torch.no_grad():
        work = Path(work)
        lengths = write_embedded(whole, _noted(prompts(), ids), work / "0-0")
        for k, stream in enumerate(streams, start=1):
            write_embedded(stream, prompts(), work / f"{k}-0")
        N = sum(lengths)
        size = whole.model.config.llm_config.hidden_size
        for k, twin in enumerate(found, start=1):
            twin.start = float(apart(mapped(work / f"{k}-0", N, size), mapped(work / "0-0", N, size)).mean())
        _compare_layers(whole, streams, work, lengths, found)
        tokens = _scored(ids, whole.model.img_context_token_id)
        last = [mapped(work / f"{k}-{len(whole.layers) % 2}", N, size)[tokens] for k in range(len(twins) + 1)]
        for stream, twin, x in zip(streams, found, last[1:]):
            _compare_scores(whole, stream, last[0], x, twin)
    return Report(str(parent), weight_bytes(whole), len(lengths), N, len(tokens), found)


def _compare_layers(whole: Stream, streams: list[Stream], work: Path, lengths: list[int], found: list[Twin]):
    """Run all layers of the parent and of the twins, and note what they do. Afterwards no file is mapped any more."""
    N = sum(lengths)
    size = whole.model.config.llm_config.hidden_size
    with tqdm(total=len(whole.layers) * len(streams) * N, desc="comparing", disable=None,
              bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}") as bar:
        for i, layer in enumerate(whole.layers):
            bar.set_postfix_str(f" layer {i + 1} of {len(whole.layers)}")
            with whole.filled(layer):
                for k, (stream, twin) in enumerate(zip(streams, found), start=1):
                    files = [mapped(work / f"{m}-{turn % 2}", N, size) for m in (0, k) for turn in (i, i + 1)]
                    with stream.filled(stream.layers[i]):
                        _compare_layer(whole, stream, i, [file.split(lengths) for file in files], twin, bar)


def _noted(prompts: Iterable, ids: list[int]) -> Iterator:
    for prompt in prompts:
        ids.extend(prompt[0])
        yield prompt


def _scored(ids: list[int], image: int | None) -> torch.Tensor:
    """Choose the tokens whose scores are compared, of all: no visual ones, whose next token nobody asks for."""
    words = torch.tensor([at for at, id in enumerate(ids) if id != image])
    return words[torch.linspace(0, len(words) - 1, min(len(words), SCORED)).round().long()]


def _compare_layer(parent: Stream, stream: Stream, i: int, streams: list[tuple], twin: Twin, bar: tqdm):
    """Run one layer of the parent and of a twin on all prompts, and note what its linears and the layer do.

    streams: the parent's residual stream before and after, the twin's own before and after, float32[n, D] of each
    prompt; what is after is written.
    """
    layer, other = parent.layers[i], stream.layers[i]
    inputs, outputs = moved(layer, other)
    watched = {name: Watched(linear, other.get_submodule(name), inputs.get(name), outputs.get(name))
               for name, linear in layer.linears.items()}
    alone = own = 0.0
    with ExitStack() as stack:
        for name, linear in layer.linears.items():
            stack.callback(linear.register_forward_hook(watched[name].see).remove)
        stack.enter_context(numbers_stay_finite(parent, i))
        stack.enter_context(numbers_stay_finite(stream, i))
        for x, y, own_x, own_y in zip(*streams):
            y.copy_(parent.through(i, x))
            own_y.copy_(stream.through(i, own_x))
            alone += float(apart(stream.through(i, x), y).sum())
            own += float(apart(own_y, y).sum())
            bar.update(len(x))
    tokens = sum(map(len, streams[0]))
    twin.growth.append(Growth(i, alone / tokens, own / tokens))
    twin.linears += [one.found(i, name) for name, one in watched.items()]


def _compare_scores(parent: Stream, stream: Stream, x: torch.Tensor, own_x: torch.Tensor, twin: Twin):
    """Compare what the parent and a twin make of the last layer's outputs float32[n, D], each its own."""
    kl = []
    same = []
    with parent.filled(parent.model.language_model.norm), stream.filled(stream.model.language_model.norm):
        for a, b in zip(x.split(TOKENS), own_x.split(TOKENS)):
            p = scores(parent, a)
            q = scores(stream, b)
            kl.append((p.exp() * (p - q)).sum(-1).clamp(min=0))     # clamp: rounding
            same.append(p.argmax(-1) == q.argmax(-1))
    kl = torch.cat(kl)
    twin.kl = float(kl.mean())
    twin.kl_99 = float(kl.quantile(0.99))
    twin.same = float(torch.cat(same).double().mean())


def scores(stream: Stream, x: torch.Tensor) -> torch.Tensor:
    """Compute log probabilities of the next token, float64[n, V], of the last layer's outputs float32[n, D].

    The norm must be filled; the head, the largest matrix of all, is read in parts.
    """
    language = stream.model.language_model
    x = language.norm(x)
    head = stream.stored[f"{stream.names[language.head]}.weight"].read()                # mapped, (V, D)
    return torch.cat([x @ rows.float().T for rows in head.split(WORDS)], -1).double().log_softmax(-1)


def apart(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Compute the relative error of each token, float[n], of float[n, D]."""
    return (x - like).norm(dim=-1) / like.norm(dim=-1).clamp(min=1e-30)


def weight_bytes(stream: Stream) -> int:
    """Count the bytes of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in {stored.file for stored in stream.stored.values()})


def _group_size(stream: Stream) -> int | None:
    block = stream.model.config.quantization_config
    return block.group_size if block else None


# ---- what cannot be compared ----------------------------------------------------------------------------------------

def refuse_unfit(parent: Stream, twins: list[Stream]):
    """Refuse a parent that is quantised, and twins that are of another model."""
    if _group_size(parent) is not None:
        raise InputError(f"{parent.folder} is quantised already; give the float checkpoint that the others were made "
                         "from first")
    for stream in twins:
        different = _different(parent.model.config, stream.model.config)
        if different:
            raise InputError(f"{stream.folder} was not made from {parent.folder}: "
                             f"{first_of(different, ', ', 4)}; give checkpoints of the same model")
        layer, other = parent.layers[0], stream.layers[0]
        with parent.filled(layer), stream.filled(other):
            inputs, outputs = moved(layer, other)
            errors = [Watched(linear, other.get_submodule(name), inputs.get(name), outputs.get(name)).weight
                      for name, linear in layer.linears.items()]
        if min(errors) > ANOTHER:
            raise InputError(f"{stream.folder} was not made from {parent.folder}: all weights of its first layer are "
                             f"others (relative error {min(errors):.2g} to {max(errors):.2g}, int4 leaves some 0.1); "
                             "give the checkpoint that it was made from")


def _different(config, other) -> list[str]:
    """List how the shapes and settings of two models differ."""
    found = [] if type(config.llm_config) is type(other.llm_config) else [
        f"decoder {other.llm_config.architectures[0]}, not {config.llm_config.architectures[0]}"]
    for part in ("llm_config", "vision_config"):
        mine, theirs = asdict(getattr(config, part)), asdict(getattr(other, part))
        found += [f"{part}.{key} {theirs[key]}, not {value}" for key, value in mine.items()
                  if key in theirs and theirs[key] != value and key != "architectures"]
    return found
