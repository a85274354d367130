"""Which modules of a model become faster, and how: by device, precision, size, and whether they are as shipped."""
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import nn

from minivl import fast, vit
from minivl.awq import AWQLinear
from minivl.fast import graphs, layers, machine
from minivl.fast.edits import INT4, changed, definitions_of, tell
from minivl.fast.machine import huge, onednn


def is_large(model: nn.Module) -> bool:
    """Say whether a model (also on `meta`) is worth the seconds that measuring and compiling take."""
    return sum(t.numel() for t in [*model.parameters(), *model.buffers()]) >= fast.LARGE


def int4_linears(model: nn.Module) -> list[AWQLinear]:
    """List the AWQLinears of a model."""
    return [m for m in model.modules() if type(m) is AWQLinear]


def keeps_half(model: nn.Module) -> bool:
    """Say whether embeddings and head stay in half precision as released: in a large AWQ model."""
    return is_large(model) and bool(int4_linears(model))


def relays(model: nn.Module) -> bool:
    """Say whether a model's int4 fits the compiled loops: whole words in a group, and two groups or more."""
    linears = int4_linears(model)
    return bool(linears) and all(m.qweight.shape[0] // len(m.scales) % 8 == 0 and len(m.scales) > 1 for m in linears)


def exactly(modules: Iterable[nn.Module], kind: type) -> list:
    """List the modules of a class itself, not of a subclass: that may compute something else."""
    return [m for m in modules if type(m) is kind]


def as_shipped(definitions: Iterable[tuple], slow: list[str]) -> bool:
    """Say whether all definitions are the shipped ones, and add the names of those that are not to `slow`."""
    names = changed(definitions)
    slow += names
    return not names


def become(module: nn.Module, faster: type, slow: list[str]) -> bool:
    """Make a module the faster version of its class if all that this hides is as shipped, and say whether it was.

    If not, `slow` gets the names of what was changed. Hooks of the module stay: they hang on the object, which stays.
    """
    if not as_shipped(definitions_of(faster), slow):
        return False
    module.__class__ = faster
    return True


def become_each(decoder: nn.Module, faster: dict[type, type], slow: list[str]) -> None:
    """Make every module of a decoder whose class itself is listed the faster one."""
    for module in decoder.modules():
        if type(module) in faster:
            become(module, faster[type(module)], slow)


def prepare(model: nn.Module, precision: str) -> nn.Module:
    """Make modules of a MiniVL faster, in place. Returns the model.

    "exact": what the model computes, up to the order of additions.
    "fast": rounded to bfloat16 where that is faster here.
    Small models on the CPU keep their modules, except that "fast" takes torch's int4 product. What a reader has changed
    stays as it is, and one warning names it.
    """
    slow = []
    if model.device.type == "cuda":
        if precision == "fast":
            prepare_for_gpu(model, slow)
    elif model.device.type == "cpu":
        prepare_for_cpu(model, precision, slow)
    elif precision == "fast":
        warnings.warn(f"precision='fast' was never tried on {model.device.type}; the modules stay as released",
                      stacklevel=3)
    tell(slow)
    machine.forget_scratch()
    return model


def prepare_for_cpu(model: nn.Module, precision: str, slow: list[str]) -> None:
    """Replace what is faster on a CPU: a large float32 model's linears, attention and int4; with "fast" any int4."""
    large = is_large(model)
    if large and model.dtype == torch.float32:
        rounded = precision == "fast" and machine.products()[1]
        prepare_linears(model, rounded, slow)
        if machine.products()[0] is onednn:
            for layer in exactly(model.vision_model.encoder.layers, vit.Layer):
                for module in exactly([layer.attn.attend], vit.Attend):
                    become(module, layers.HeadByHead, slow)
                for module in exactly([layer.mlp], vit.MLP):
                    become(module, layers.GeluInside, slow)
        machine.glibc("malloc_trim", 0)     # the old weights leave memory before the int4 comes
        if machine.has_compiler() and relays(model):
            prepare_int4(model, lambda *linears: layers.Words(*linears, rounded=rounded), slow)
            become_each(model.language_model, layers.NORMS, slow)
        become_each(model.language_model, layers.ATTENDS, slow)
    if precision == "fast":
        int4_by_themselves(model, layers.OpWords, slow)
    if large:
        machine.keep_memory()       # only now: memory freed while weights are replaced should go back


def prepare_for_gpu(model: nn.Module, slow: list[str]) -> None:
    """Replace int4 by torch's own product, norms by one call, and the steps of the decoder by recorded ones."""
    prepare_int4(model, layers.OpWords, slow)
    become_each(model.language_model, layers.NORMS, slow)
    if type(model.language_model) in graphs.RECORDED:
        become(model.language_model, graphs.RECORDED[type(model.language_model)], slow)


def prepare_linears(model: nn.Module, rounded: bool, slow: list[str]) -> None:
    """Cut the weights of float32 linears for the faster product; a head and an embedding kept as released stay so."""
    for linear in exactly(model.modules(), nn.Linear):
        if linear.weight.dtype == torch.float32:
            if as_shipped(definitions_of(layers.Linear), slow):
                layers.Linear.of(linear, rounded)
        else:                                       # the head, kept as released
            linear.__class__ = layers.HalfLinear
            if machine.has_compiler():
                linear.weight.data = huge(linear.weight.shape, linear.weight.dtype).copy_(linear.weight)
    embedding = model.language_model.embeddings
    if embedding.weight.dtype != torch.float32:
        embedding.__class__ = layers.HalfEmbedding


def prepare_int4(model: nn.Module, make_store: Callable, slow: list[str]) -> None:
    """Put the int4 of each decoder layer into stores: q, k and v together, gate and up together, all others alone."""
    for layer in model.language_model.layers:
        for module in layer.children():
            if type(module) in layers.SIDE_BY_SIDE:
                faster, names = layers.SIDE_BY_SIDE[type(module)]
                side_by_side(module, [getattr(module, name) for name in names], faster, make_store, slow)
    int4_by_themselves(model, make_store, slow)


def side_by_side(module: nn.Module, linears: list, faster: type, make_store: Callable, slow: list[str]) -> None:
    """Put int4 linears that read the same input into one store, if their module can become the faster one."""
    if len(exactly(linears, AWQLinear)) == len(linears) and become(module, faster, slow):
        module.side_by_side = layers.pack(make_store(*linears), linears)


def int4_by_themselves(model: nn.Module, make_store: Callable, slow: list[str]) -> None:
    """Put each AWQLinear that is left into a store of its own."""
    if not as_shipped(INT4, slow):
        return
    for linear in int4_linears(model.language_model):
        store = layers.pack(make_store(linear), [linear])
        linear.add_module("words", store)
