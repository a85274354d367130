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
import itertools
import textwrap
import tokenize
import warnings
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType

from torch import nn

from minivl import awq, cache, internlm2, qwen2, vit

# sha256 of each hidden definition as shipped, the first 16 digits.
SHIPPED = {
    "awq.AWQLinear.forward": "3aad7bef81338ec3",
    "awq.matmul": "5d16a9e262995b77",
    "awq.dequantize": "32a7684808fbc3e3",
    "awq.unpack": "e8a6a4420f265c19",
    "awq.PACK_ORDER": "954cd3739830663f",
    "qwen2.Attention.qkv": "051ad38e2d6c518d",
    "qwen2.Attention.rotated": "4d097a68d653e6ab",
    "qwen2.rotate": "198971a076741804",
    "qwen2.MLP.gate_up": "befceb8a6d0d8c34",
    "qwen2.MLP.gated": "32e6ee2a3b710034",
    "qwen2.MLP.forward": "88b047e200b1bfd8",
    "qwen2.RMSNorm.forward": "6543ad51824b31bd",
    "qwen2.Attend.forward": "da954c8878513483",
    "qwen2.Qwen2ForCausalLM.scores": "df4579b2a1cc4301",
    "qwen2.Qwen2Model.forward": "edf7b0c9951d74f1",
    "qwen2.attention_mask": "380d95cbe19f3ef2",
    "internlm2.FeedForward.gate_up": "0e3d19d4e3d5918f",
    "internlm2.FeedForward.gated": "32e6ee2a3b710034",
    "internlm2.FeedForward.forward": "3223770c9fe66315",
    "internlm2.RMSNorm.forward": "6543ad51824b31bd",
    "internlm2.Attend.forward": "da954c8878513483",
    "internlm2.InternLM2ForCausalLM.scores": "df4579b2a1cc4301",
    "internlm2.InternLM2Model.forward": "edf7b0c9951d74f1",
    "internlm2.attention_mask": "380d95cbe19f3ef2",
    "cache.KVCache.append": "d1102d110f3171b8",
    "vit.Attend.forward": "30583e0ef6d49842",
    "vit.MLP.widened": "55bce7a34b54fc5d",
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
    depth = itertools.accumulate((t.string in "([{") - (t.string in ")]}") for t in tokens)
    # Outside brackets: annotations of arguments have colons too.
    body = next(i for i, (t, inside) in enumerate(zip(tokens, depth)) if t.string == ":" and not inside)
    if tokens[body + 1].type == tokenize.STRING:
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
        once(f"{', '.join(new)} {'is' if len(new) == 1 else 'are'} not as shipped: what was changed runs as written, "
             "without its faster version")


def once(message: str) -> None:
    """Warn, unless it was said before in this process: a model has hundreds of modules of a kind."""
    if message not in _told:
        _told.add(message)
        warnings.warn(message, stacklevel=5)


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
          (qwen2, "attention_mask"), (internlm2.FeedForward, "gate_up"), (internlm2.FeedForward, "gated"),
          (internlm2.FeedForward, "forward"), (internlm2.RMSNorm, "forward"), (internlm2.Attend, "forward"),
          (internlm2.InternLM2ForCausalLM, "scores"), (internlm2.InternLM2Model, "forward"),
          (internlm2, "attention_mask"), (cache.KVCache, "append"), (vit.Attend, "forward"), (vit.MLP, "widened"),
          (vit.MLP, "forward"))
