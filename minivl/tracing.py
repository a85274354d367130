"""Record every intermediate tensor by name, through forward hooks: the model's own code stays clean.

    with trace(model) as t:
        model(input_ids, pixel_values)
    t["vit.layers.3"]                   # float[N, 1+P, C]

Stages: vit.embeddings, vit.layers.i, pixel_unshuffle, projector, inputs_embeds, llm.layers.i, llm.norm, logits.
Asked for by name also: vit.layers.i.q/.k/.v and llm.layers.i.q/.k/.v, as attention sees them (after RoPE, with the
keys of the cache): `trace(model, "llm.layers.*.q", "llm.layers.*.k")`.
"""
from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

from minivl.limits import InputError

# The kinds of stages in the order of the computation. A layer's name ends in its number.
KINDS = ("vit.embeddings", "vit.layers", "pixel_unshuffle", "projector", "inputs_embeds", "llm.layers", "llm.norm",
         "logits")


def kind(name: str) -> tuple:
    """Split the name of a stage: "llm.layers.3" -> ("llm.layers", 3), "llm.norm" -> ("llm.norm", None)."""
    stem, _, last = name.rpartition(".")
    return (stem, int(last)) if last.isdigit() else (name, None)


def place(name: str) -> tuple | None:
    """Find the place of a stage in the computation, a key to sort by; None for a name that is no stage.

    For names without a model, such as those in a file. q, k and v have no place of their own.
    """
    stem, number = kind(name)
    if stem not in KINDS or stem.endswith(".layers") != (number is not None):      # only layers are counted
        return None
    return KINDS.index(stem), number or 0


def stages(model: nn.Module) -> list:
    """List the stages of a model in the order of the computation: [(name, module, which), ...].

    `which` of the module's tensors a stage is: "out", its result; "in", its first argument; or "q", "k", "v", the
    arguments of an `attend`. Whoever hooks a stage, names one or compares one asks here.
    """
    vision, language = model.vision_model, model.language_model
    found = [("vit.embeddings", vision.embeddings, "out")]
    for i, layer in enumerate(vision.encoder.layers):
        found += [(f"vit.layers.{i}.{which}", layer.attn.attend, which) for which in "qkv"]
        found.append((f"vit.layers.{i}", layer, "out"))
    found.append(("pixel_unshuffle", model.pixel_unshuffle, "out"))
    found.append(("projector", model.mlp1, "out"))
    found.append(("inputs_embeds", language.body, "in"))
    for i, layer in enumerate(language.layers):
        found += [(f"llm.layers.{i}.{which}", layer.attend, which) for which in "qkv"]
        found.append((f"llm.layers.{i}", layer, "out"))
    found.append(("llm.norm", language.norm, "out"))
    found.append(("logits", language.head, "out"))
    return found


def hook(module: nn.Module, which: str, use: Callable):
    """Call `use(tensor)` whenever the module computes: a handle to remove the hook with.

    `which` as in `stages`. What `use` returns, unless it is None, takes the tensor's place.
    """
    if which == "out":
        return module.register_forward_hook(lambda _, args, out: use(out))
    at = {"in": 0, "q": 0, "k": 1, "v": 2}[which]

    def before(_, args):
        new = use(args[at])
        return None if new is None else (*args[:at], new, *args[at + 1:])
    return module.register_forward_pre_hook(before)


class Trace(dict):
    """name -> the tensor of the latest call; `history[name]` -> those of all calls (each decode step is one)."""

    def __init__(self):
        super().__init__()
        self.history = {}

    def record(self, name: str, tensor):
        """Keep the tensor of one call; the hooks call this."""
        self[name] = tensor
        self.history.setdefault(name, []).append(tensor)

    def __missing__(self, name):
        raise KeyError(f"no stage {name!r} was recorded; recorded are: "
                       f"{', '.join(self) or 'none, run the model first'}")


class trace:
    """Record the stages that `patterns` choose (`*` allowed; default: all but q, k, v) for the length of a `with`.

    Tensors are kept as computed, detached, on `device` if given. All stages of the 4B on 13 tiles are about 4.5 GB in
    float32, so choose. A pipeline runs each prompt's tiles 13 at a time: with more, the stages of the tower come in
    several calls.
    """

    def __init__(self, model: nn.Module, *patterns: str, device=None):
        self.model = model
        self.patterns = patterns
        self.device = device

    def __enter__(self) -> Trace:
        known = stages(self.model)
        unmatched = [p for p in self.patterns if not any(fnmatchcase(name, p) for name, *_ in known)]
        if unmatched:
            raise InputError(f"no stage matches {unmatched}; stages are {', '.join(name for name, *_ in known)}")
        result = Trace()

        def keep(name, tensor):
            tensor = tensor.detach()
            # clone: a view of the KV cache would change under the reader's eyes
            result.record(name, tensor.to(self.device) if self.device else tensor.clone())

        self.handles = [hook(module, which, lambda tensor, name=name: keep(name, tensor))
                        for name, module, which in known if self.chosen(name, which)]
        return result

    def chosen(self, name: str, which: str) -> bool:
        """Tell whether a stage is recorded."""
        if self.patterns:
            return any(fnmatchcase(name, pattern) for pattern in self.patterns)
        return which in ("in", "out")

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


def first_mismatch(got: dict, want: dict, tolerance: float = 1e-5) -> str | None:
    """Compare the stages of `want` in their order: None if all agree, else a sentence about the first that does not.

    Agreement is a relative error |got - want| / |want| (2-norms over the whole tensor) of at most `tolerance`.
    """
    for name, b in want.items():
        if name not in got:
            return f"{name}: not computed"
        a = got[name].detach().float().cpu()
        b = b.float().cpu()
        if a.shape != b.shape:
            return f"{name}: shape {tuple(a.shape)}, want {tuple(b.shape)}"
        error = relative_error(a, b)
        if not error <= tolerance:      # also catches NaN
            difference = (a - b).abs().nan_to_num(nan=float("inf"))
            at = tuple(indices(int(difference.argmax()), difference.shape))
            return (f"{name}: relative error {error:.2e} > {tolerance:.0e}; largest difference at {list(at)}: "
                    f"{a[at]:.6g}, want {b[at]:.6g}")
    return None


def indices(flat: int, shape) -> list[int]:
    """Find the indices of an element, one for each dimension, from its number in the flattened tensor."""
    # torch.unravel_index would do, but imports sympy at its first call: 0.5 s.
    found = []
    for size in reversed(shape):
        flat, i = divmod(flat, size)
        found.insert(0, i)
    return found


def relative_error(a, b) -> float:
    """Measure |a - b| / |b|, 2-norms over the whole tensors, computed in float64."""
    a = a.double()
    b = b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))
