"""Every intermediate tensor by name, through forward hooks: the model's own code stays clean.

    with trace(model) as t:
        model(input_ids, pixel_values)
    t["vit.layers.3"]                   # float[N, 1+P, C]

Stages: vit.embeddings, vit.layers.i, pixel_unshuffle, projector, inputs_embeds, llm.layers.i, llm.norm, logits.
Asked for by name also: vit.layers.i.q/.k/.v and llm.layers.i.q/.k/.v, as attention sees them (after RoPE, with the
keys of the cache): `trace(model, "llm.layers.*.q", "llm.layers.*.k")`.
"""
from fnmatch import fnmatchcase

import torch

from minivl.limits import InputError


class Trace(dict):
    """name -> the tensor of the latest call; `history[name]` -> those of all calls (each decode step is one)."""

    def __init__(self):
        super().__init__()
        self.history = {}

    def record(self, name, tensor):
        """Called by the hooks."""
        self[name] = tensor
        self.history.setdefault(name, []).append(tensor)

    def __missing__(self, name):
        raise KeyError(f"no stage {name!r} was recorded; recorded are: "
                       f"{', '.join(self) or 'none, run the model first'}")


class trace:
    """Context manager. `patterns` choose stages (`*` allowed), default all but q, k, v. Kept as computed, detached,
    on `device` if given. All stages of the 4B on 13 tiles are about 4.5 GB in float32, so choose. A pipeline runs each
    prompt's tiles 13 at a time: with more, the stages of the tower come in several calls.
    """

    def __init__(self, model, *patterns, device=None):
        self.model, self.patterns, self.device = model, patterns, device

    def __enter__(self) -> Trace:
        result, self.handles, known = Trace(), [], []

        def keep(name):
            known.append(name)
            if self.patterns:
                return any(fnmatchcase(name, pattern) for pattern in self.patterns)
            return not name.endswith((".q", ".k", ".v"))

        def save(name, tensor):
            tensor = tensor.detach()
            # clone: a view of the KV cache would change under the reader's eyes
            result.record(name, tensor.to(self.device) if self.device else tensor.clone())

        def output(module, name):
            if keep(name):
                self.handles.append(module.register_forward_hook(lambda _, args, out: save(name, out)))

        def inputs(module, names):
            for i, name in enumerate(names):
                if keep(name):
                    self.handles.append(module.register_forward_pre_hook(lambda _, args, i=i, n=name: save(n, args[i])))

        vision, language = self.model.vision_model, self.model.language_model
        output(vision.embeddings, "vit.embeddings")
        for i, layer in enumerate(vision.encoder.layers):
            inputs(layer.attn.attend, [f"vit.layers.{i}.{t}" for t in "qkv"])
            output(layer, f"vit.layers.{i}")
        output(self.model.pixel_unshuffle, "pixel_unshuffle")
        output(self.model.mlp1, "projector")
        inputs(language.model, ["inputs_embeds"])
        for i, layer in enumerate(language.model.layers):
            inputs(layer.self_attn.attend, [f"llm.layers.{i}.{t}" for t in "qkv"])
            output(layer, f"llm.layers.{i}")
        output(language.model.norm, "llm.norm")
        output(language.lm_head, "logits")
        unmatched = [p for p in self.patterns if not any(fnmatchcase(name, p) for name in known)]
        if unmatched:
            self.__exit__()
            raise InputError(f"no stage matches {unmatched}; stages are {', '.join(known)}")
        return result

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


def first_mismatch(got: dict, want: dict, tolerance: float = 1e-5):
    """None if every stage of `want` agrees, else a sentence about the first that does not, in the order of `want`.

    Agreement is a relative error |got - want| / |want| (2-norms over the whole tensor) of at most `tolerance`.
    """
    for name, b in want.items():
        if name not in got:
            return f"{name}: not computed"
        a, b = got[name].detach().float().cpu(), b.float().cpu()
        if a.shape != b.shape:
            return f"{name}: shape {tuple(a.shape)}, want {tuple(b.shape)}"
        error = relative_error(a, b)
        if not error <= tolerance:      # also catches NaN
            difference = (a - b).abs().nan_to_num(nan=float("inf"))
            at = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
            return (f"{name}: relative error {error:.2e} > {tolerance:.0e}; largest difference at {list(at)}: "
                    f"{a[at]:.6g}, want {b[at]:.6g}")
    return None


def relative_error(a, b) -> float:
    """|a - b| / |b|, 2-norms over the whole tensors, computed in float64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))
