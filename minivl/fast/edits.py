"""A reader's changes count: a faster version stands in only for the definition it was written for.

Each faster method names the definitions it hides. Whenever it runs, each must be the shipped one, by the text of its
source (comments and docstrings aside). If one is not, because somebody edited the file or replaced the function in a
running Python, the definition runs instead, and a warning says what is slow now.

    python -m minivl.fast           prints SHIPPED anew: after a change to a definition *and* to what stands in for it
"""
from __future__ import annotations

import functools
import hashlib
import inspect
import io
import textwrap
import tokenize
import warnings
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType

from torch import nn

from minivl import awq, cache, qwen2, vit

# sha256 of each hidden definition as shipped, the first 16 digits.
SHIPPED = {
    "awq.AWQLinear.forward": "7db77430fdcb05b4",
    "awq.matmul": "310cc75a3a2e54fe",
    "awq.dequantize": "3e4a8570343f464b",
    "awq.unpack": "4a3cc1e79b771463",
    "awq.PACK_ORDER": "954cd3739830663f",
    "qwen2.Attention.qkv": "11c3f8b91c301f74",
    "qwen2.Attention.rotated": "a597df3205de8be0",
    "qwen2.rotate": "5be82668c2c2d0bf",
    "qwen2.MLP.gate_up": "931318ebab1cd701",
    "qwen2.MLP.gated": "133717e25fa73a28",
    "qwen2.MLP.forward": "88b047e200b1bfd8",
    "qwen2.RMSNorm.forward": "6543ad51824b31bd",
    "qwen2.Attend.forward": "da954c8878513483",
    "qwen2.Qwen2ForCausalLM.scores": "9f455a2cab9329b3",
    "qwen2.Qwen2Model.forward": "d478ee61047de3cc",
    "qwen2.attention_mask": "090a130b1033266d",
    "cache.KVCache.append": "786f38e7b9016308",
    "vit.Attend.forward": "30583e0ef6d49842",
    "vit.MLP.widened": "bbc5674433294c5e",
    "vit.MLP.forward": "11909da4dcb66da2",
}
TORCHS_OWN = {(nn.Linear, "forward"): nn.Linear.forward, (nn.Embedding, "forward"): nn.Embedding.forward}


def name_of(owner: type | ModuleType, name: str) -> str:
    """Name a definition: "qwen2.Attention.qkv"."""
    module = owner.__name__ if inspect.ismodule(owner) else f"{owner.__module__}.{owner.__qualname__}"
    return f"{module.removeprefix('minivl.')}.{name}"


def digest(value: object) -> str:
    """Hash a function by its source without comments, docstring and spaces; anything else by its repr."""
    if not isinstance(value, FunctionType):
        return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
    code = inspect.unwrap(value).__code__     # not getsource of the function itself: a decorator could point elsewhere
    source = textwrap.dedent(inspect.getsource(code))
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in layout]
    doc = inspect.getdoc(value) is not None
    body = next(i for i, t in enumerate(tokens) if t.string == ":" and t.line.rstrip().endswith(":"))
    if doc and tokens[body + 1].type == tokenize.STRING:
        del tokens[body + 1]
    return hashlib.sha256("".join("".join(t.string.split()) for t in tokens).encode()).hexdigest()[:16]


_verdicts = {}          # (owner, name, what stands there now) -> whether that is the shipped one


def is_shipped(owner: type | ModuleType, name: str) -> bool:
    """Say whether `owner` (a class or a module) still has the definition that was shipped."""
    value = getattr(owner, name)
    key = owner, name, value
    if key not in _verdicts:
        try:
            _verdicts[key] = (value is TORCHS_OWN[owner, name] if (owner, name) in TORCHS_OWN else
                              digest(value) == SHIPPED.get(name_of(owner, name)))
        except (OSError, TypeError, SyntaxError, tokenize.TokenError, StopIteration):
            # no source: it was typed at a prompt, say
            _verdicts[key] = False
    return _verdicts[key]


_told = set()


def changed(definitions: Iterable[tuple]) -> list[str]:
    """Name those of [(owner, name), ...] that are not as shipped."""
    return [name_of(owner, name) for owner, name in definitions if not is_shipped(owner, name)]


def tell(names: Iterable[str]) -> None:
    """Warn, once for each definition, that it runs as it is written now."""
    new = sorted(set(names) - _told)
    if new:
        _told.update(new)
        warnings.warn(f"{', '.join(new)} {'is' if len(new) == 1 else 'are'} not as shipped: "
                      "what was changed runs as written, without its faster version", stacklevel=4)


def stands_for(*definitions: tuple) -> Callable:
    """Decorate a faster version of the first of `definitions`, each (owner, name), that hides the others too.

    It runs as long as all of them are the shipped ones; otherwise the first definition runs, as it is now.
    """
    owner, name = definitions[0]

    def decorate(faster: Callable) -> Callable:
        @functools.wraps(faster)
        def run(self, *args):
            for where, what in definitions:
                # A look at the verdicts decides nearly always. The rest: not judged yet, or not shipped.
                if not _verdicts.get((where, what, getattr(where, what))) and not is_shipped(where, what):
                    tell(changed(definitions))
                    return getattr(owner, name)(self, *args)
            return faster(self, *args)
        run.definitions = definitions
        return run
    return decorate


def definitions_of(faster_class: type) -> list[tuple]:
    """List what the methods of a faster class hide: [(owner, name), ...]."""
    return [pair for method in vars(faster_class).values() for pair in getattr(method, "definitions", ())]


def untouched(module: nn.Module) -> bool:
    """Say whether a module need not be called: no hook would miss it, and no `forward` of its own hides its class's."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


INT4 = ((awq.AWQLinear, "forward"), (awq, "matmul"), (awq, "dequantize"), (awq, "unpack"), (awq, "PACK_ORDER"))
HIDDEN = (*INT4, (qwen2.Attention, "qkv"), (qwen2.Attention, "rotated"), (qwen2, "rotate"),
          (qwen2.MLP, "gate_up"), (qwen2.MLP, "gated"), (qwen2.MLP, "forward"), (qwen2.RMSNorm, "forward"),
          (qwen2.Attend, "forward"), (qwen2.Qwen2ForCausalLM, "scores"), (qwen2.Qwen2Model, "forward"),
          (qwen2, "attention_mask"), (cache.KVCache, "append"), (vit.Attend, "forward"), (vit.MLP, "widened"),
          (vit.MLP, "forward"))
