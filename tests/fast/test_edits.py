"""What a reader changed counts: an edit of any class of the idea files, before or after a model was made fast, is
honoured or refused."""
import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import minivl
from minivl import awq, fast, internlm2, qwen2, vit
from minivl.awq import AWQLinear
from minivl.cache import KVCache
from minivl.fast import compiled, edits, layers, machine

pytestmark = pytest.mark.filterwarnings("ignore:.*not as shipped", "ignore:.*was looked at")
T = 300         # tokens: more than QUERIES and FEW, so that every faster version of a prompt is taken


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Just large enough for all that is done for a large one: groups of 32, two and more of them. Decoder -> folder."""
    from weights_tools.synthesize import synthesize
    folder = tmp_path_factory.mktemp("edits")
    return {decoder: synthesize(folder / size, size, awq=True, group_size=32)
            for decoder, size in (("qwen2", "tiny"), ("internlm2", "tiny-internlm2"))}


@pytest.fixture(scope="module")
def checkpoint(checkpoints):
    return checkpoints["qwen2"]


def decoder_of(what: str) -> str:
    """The decoder in which a definition is at work."""
    return "internlm2" if what.startswith("internlm2") else "qwen2"


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Every model is, and oneDNN's product is the faster, as where all of fast/ is in use."""
    monkeypatch.setattr(fast, "LARGE", 0)
    monkeypatch.setattr(machine, "products", lambda: (machine.onednn, True))
    monkeypatch.setattr(machine, "has_compiler", lambda: True)
    monkeypatch.setattr(fast, "has_compiler", lambda: True)
    monkeypatch.setattr(fast, "warm", lambda *sizes: None)
    # The loops as they are: that the compiled ones compute the same has a test of its own.
    monkeypatch.setattr(compiled, "loop", lambda function, *fixed: lambda arguments: function(*arguments))
    monkeypatch.setattr(edits, "_told", set())


def prompt(model):
    ids = torch.randint(0, 500, (1, T), generator=torch.Generator().manual_seed(0))
    ids[0, 3:7] = model.img_context_token_id
    return ids, torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def scores(model):
    """Logits of a prompt's last token and of two tokens after it, one by one."""
    ids, pixels = prompt(model)
    language, cache = model.language_model, KVCache()
    found = [language.scores(model.embed(ids, model.visual_tokens(pixels)), cache)]
    found += [language.scores(language.embeddings(torch.tensor([[token]])), cache) for token in (5, 9)]
    return torch.cat(found, dim=1)


# ---- the edits ------------------------------------------------------------------------------------------------------

def rolled(function):
    return lambda self, *args, **how: function(self, *args, **how).roll(1, -1)


def first(model):
    return model.language_model.layers[0]


# (class of an idea file, one of its modules in a model)
CLASSES = {
    "qwen2.Attend": (qwen2.Attend, lambda m: first(m).self_attn.attend),
    "qwen2.Attention": (qwen2.Attention, lambda m: first(m).self_attn),
    "qwen2.MLP": (qwen2.MLP, lambda m: first(m).mlp),
    "qwen2.RMSNorm": (qwen2.RMSNorm, lambda m: m.language_model.norm),
    "qwen2.Layer": (qwen2.Layer, first),
    "qwen2.Qwen2Model": (qwen2.Qwen2Model, lambda m: m.language_model.model),
    "internlm2.Attend": (internlm2.Attend, lambda m: first(m).attention.attend),
    "internlm2.Attention": (internlm2.Attention, lambda m: first(m).attention),
    "internlm2.FeedForward": (internlm2.FeedForward, lambda m: first(m).feed_forward),
    "internlm2.RMSNorm": (internlm2.RMSNorm, lambda m: m.language_model.norm),
    "internlm2.Layer": (internlm2.Layer, first),
    "internlm2.InternLM2Model": (internlm2.InternLM2Model, lambda m: m.language_model.model),
    "vit.Embeddings": (vit.Embeddings, lambda m: m.vision_model.embeddings),
    "vit.Attend": (vit.Attend, lambda m: m.vision_model.encoder.layers[0].attn.attend),
    "vit.Attention": (vit.Attention, lambda m: m.vision_model.encoder.layers[0].attn),
    "vit.MLP": (vit.MLP, lambda m: m.vision_model.encoder.layers[0].mlp),
    "vit.Layer": (vit.Layer, lambda m: m.vision_model.encoder.layers[0]),
    "vit.InternVisionModel": (vit.InternVisionModel, lambda m: m.vision_model),
    "pixel_unshuffle.PixelUnshuffle": (minivl.pixel_unshuffle.PixelUnshuffle, lambda m: m.pixel_unshuffle),
    "awq.AWQLinear": (AWQLinear, lambda m: first(m).mlp.gate_proj),
}
METHODS = {     # the seams, and functions of the modules
    "qwen2.Attention.qkv": (qwen2.Attention, "qkv", lambda f: lambda self, x: f(self, 0.5 * x)),
    "qwen2.Attention.rotated": (qwen2.Attention, "rotated",
                                lambda f: lambda self, q, k, c, s: f(self, k.repeat(1, 2, 1, 1), k, c, s)),
    "qwen2.MLP.gate_up": (qwen2.MLP, "gate_up", lambda f: lambda self, x: f(self, x)[::-1]),
    "qwen2.MLP.gated": (qwen2.MLP, "gated", lambda f: lambda self, x: F.relu(self.gate_up(x)[0])),
    "qwen2.rotate": (qwen2, "rotate", lambda f: lambda x, cos, sin: f(x, cos, -sin)),
    "qwen2.rope_tables": (qwen2, "rope_tables", lambda f: lambda p, e, theta: f(p, e, 3 * theta)),
    "qwen2.attention_mask": (qwen2, "attention_mask",
                             lambda f: lambda T, S, p, d: torch.ones(1, 1, T, S, dtype=torch.bool)),
    "internlm2.Attention.qkv": (internlm2.Attention, "qkv", lambda f: lambda self, x: f(self, 0.5 * x)),
    "internlm2.FeedForward.gate_up": (internlm2.FeedForward, "gate_up", lambda f: lambda self, x: f(self, x)[::-1]),
    "internlm2.FeedForward.gated": (internlm2.FeedForward, "gated",
                                    lambda f: lambda self, x: F.relu(self.gate_up(x)[0])),
    "internlm2.rotate": (internlm2, "rotate", lambda f: lambda x, cos, sin: f(x, cos, -sin)),
    "internlm2.rope_tables": (internlm2, "rope_tables", lambda f: lambda p, e, theta, *n: f(p, e, 3 * theta, *n)),
    "internlm2.attention_mask": (internlm2, "attention_mask",
                                 lambda f: lambda T, S, p, d: torch.ones(1, 1, T, S, dtype=torch.bool)),
    "vit.MLP.widened": (vit.MLP, "widened", lambda f: lambda self, x: F.relu(self.fc1(x))),
    "awq.unpack": (awq, "unpack", lambda f: lambda packed: f(packed) ^ 1),
    "awq.dequantize": (awq, "dequantize", lambda f: lambda q, z, s, dtype=torch.float32: 1.5 * f(q, z, s, dtype)),
    "awq.matmul": (awq, "matmul", lambda f: lambda *args: 0.5 * f(*args)),
    "awq.PACK_ORDER": (awq, "PACK_ORDER", lambda order: order[::-1]),
}


def changes(before, after) -> bool:
    return not minivl.relative_error(after, before) < 1e-3


def counts(model, before):
    """The result is another, or an error says why not."""
    try:
        return changes(before, scores(model))
    except minivl.InputError as error:
        return "precision=None" in str(error)


@pytest.fixture(scope="module")
def plains(checkpoints):
    return {decoder: scores(minivl.load(folder)) for decoder, folder in checkpoints.items()}


FASTER = {      # those of one decoder, and what they stand for
    "qwen2": ({layers.FastAttention, layers.FastMLP, layers.NORMS[qwen2.RMSNorm], layers.ATTENDS[qwen2.Attend]},
              {qwen2.Attention, qwen2.MLP, qwen2.RMSNorm, qwen2.Attend}),
    "internlm2": ({layers.FastFeedForward, layers.NORMS[internlm2.RMSNorm], layers.ATTENDS[internlm2.Attend]},
                  {internlm2.FeedForward, internlm2.RMSNorm, internlm2.Attend})}


@pytest.mark.parametrize("decoder", FASTER)
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_without_an_edit_nothing_changes(checkpoints, plains, precision, decoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = scores(model := minivl.load(checkpoints[decoder], precision=precision))
    assert minivl.relative_error(got, plains[decoder]) < (2e-5 if precision == "exact" else 0.05)
    used = {type(m) for m in model.modules()}
    faster, definitions = FASTER[decoder]
    assert used >= {*faster, layers.Int4, layers.Words, layers.Linear, layers.HalfLinear, layers.HalfEmbedding,
                    layers.HeadByHead, layers.GeluInside}
    assert not used & {*definitions, AWQLinear}


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", CLASSES)
def test_an_edit_of_a_class(checkpoints, plains, monkeypatch, what, when, precision):
    checkpoint, plain = checkpoints[decoder_of(what)], plains[decoder_of(what)]
    kind, _ = CLASSES[what]
    if when == "after":
        model = minivl.load(checkpoint, precision=precision)
        assert not changes(plain, scores(model)) or precision == "fast"
        plain = scores(model)
    monkeypatch.setattr(kind, "forward", rolled(kind.forward))
    if when == "before":
        model = minivl.load(checkpoint, precision=precision)
    assert counts(model, plain)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", METHODS)
def test_an_edit_of_a_seam_or_a_function(checkpoints, plains, monkeypatch, what, when, precision):
    checkpoint, plain = checkpoints[decoder_of(what)], plains[decoder_of(what)]
    owner, name, edit = METHODS[what]
    if when == "after":
        model = minivl.load(checkpoint, precision=precision)
        plain = scores(model)
    monkeypatch.setattr(owner, name, edit(getattr(owner, name)))
    if when == "before":
        model = minivl.load(checkpoint, precision=precision)
    assert counts(model, plain)


REPLACED = ("qwen2.Attend", "qwen2.Attention", "qwen2.MLP", "qwen2.RMSNorm", "internlm2.Attend",
            "internlm2.FeedForward", "internlm2.RMSNorm", "vit.Attend", "vit.MLP", "awq.AWQLinear")


@pytest.mark.parametrize("how", ["forward", "hook", "pre-hook", "subclass"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", REPLACED)
def test_an_edit_of_one_module(checkpoints, what, when, how):
    _, find = CLASSES[what]
    checkpoint = checkpoints[decoder_of(what)]
    model = minivl.load(checkpoint, precision="exact" if when == "after" else None)
    plain = scores(model)
    module = find(model)
    if how == "forward":
        old = module.forward
        module.forward = lambda *args: old(*args).roll(1, -1)
    elif how == "hook":
        module.register_forward_hook(lambda m, args, out: out.roll(1, -1))
    elif how == "pre-hook":
        module.register_forward_pre_hook(lambda m, args: (args[0].roll(1, -1), *args[1:]))
    else:
        kind = type(module)
        module.__class__ = type("Edited", (kind,), {"forward": rolled(kind.forward)})
    if when == "before":
        model = fast.prepare(model, "exact")
    assert counts(model, plain)


@pytest.mark.parametrize("decoder", FASTER)
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_edits_of_weights(checkpoints, precision, decoder):
    """Looking at a weight by its released name gives it back, and what is done to it then counts."""
    checkpoint = checkpoints[decoder]
    float_model = minivl.load(checkpoint)
    for name in (*first(float_model).linears, first(float_model).FEEDS[0][0]):
        model = minivl.load(checkpoint, precision=precision)
        before = scores(model)
        module = first(model).get_submodule(name)
        released = first(float_model).get_submodule(name).state_dict()
        for part, value in released.items():
            assert torch.equal(getattr(module, part), value), (name, part)
        again = scores(model)
        assert minivl.relative_error(again, before) < (1e-5 if precision == "exact" else 0.05)
        for part in ("scales", "weight"):
            if hasattr(module, part):
                getattr(module, part).data.mul_(1.5)
        assert changes(again, scores(model)), name
    model = minivl.load(checkpoint, precision=precision)
    before = scores(model)
    model.vision_model.encoder.layers[1].mlp.fc2.weight.data.mul_(1.5)
    assert changes(before, scores(model))
    model = minivl.load(checkpoint, precision=precision)
    before = scores(model)
    model.language_model.head.weight.data.mul_(1.5)
    assert changes(before, scores(model))


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_module_put_in_by_a_reader(checkpoint, precision):
    """A layer of their own instead of q_proj, before and after, and an attend of their own."""
    class Low(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.A = torch.nn.Parameter(torch.ones(128, 2) / 8)
            self.B = torch.nn.Parameter(torch.ones(2, 128) / 8)

        def forward(self, x):
            return self.base(x) + x @ self.A @ self.B

    class Uniform(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return v.mean(2, keepdim=True).repeat(1, q.shape[1] // v.shape[1], q.shape[2], 1)

    for when in ("before", "after"):
        for edit in (lambda m: setattr(first(m).self_attn, "q_proj", Low(first(m).self_attn.q_proj)),
                     lambda m: setattr(first(m).self_attn, "attend", Uniform())):
            model = minivl.load(checkpoint, precision=precision if when == "after" else None)
            before = scores(model)
            edit(model)
            if when == "before":
                model = fast.prepare(model, precision)
            assert counts(model, before)


def test_what_a_prepared_model_refuses(checkpoint, tmp_path):
    from weights_tools.files import save_checkpoint
    model = minivl.load(checkpoint, precision="exact")
    for part in (model, model.language_model, first(model).mlp):
        with pytest.raises(minivl.InputError, match="cannot be saved; load the model with precision=None"):
            part.state_dict()
    with pytest.raises(minivl.InputError, match="cannot be saved"):
        save_checkpoint(model.state_dict(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(minivl.InputError, match="cannot be copied"):
        copy.deepcopy(model)
    with pytest.raises(minivl.InputError, match="takes no other weights"):
        model.load_state_dict(minivl.load(checkpoint).state_dict())
    with pytest.raises(minivl.InputError, match="no gradients; load the model with precision=None"):
        ids, pixels = prompt(model)
        model(ids, pixels)


def test_the_warning_names_what_stays_slow(checkpoint, monkeypatch):
    monkeypatch.setattr(qwen2.RMSNorm, "forward", rolled(qwen2.RMSNorm.forward))
    monkeypatch.setattr(qwen2.MLP, "gate_up", METHODS["qwen2.MLP.gate_up"][2](qwen2.MLP.gate_up))
    with pytest.warns(UserWarning, match="qwen2.MLP.gate_up, qwen2.RMSNorm.forward are not as shipped") as found:
        model = minivl.load(checkpoint, precision="exact")
    assert len(found) == 1
    assert type(first(model).mlp) is qwen2.MLP and type(first(model).self_attn) is layers.FastAttention


def test_a_docstring_is_no_edit_whatever_the_signature():
    def with_one():
        def definition(x: int, y: int = {"a": 1}["a"]) -> int:
            """Add: the body begins behind the last colon."""
            return x + y
        return definition

    def without():
        def definition(x: int,
                       y: int = {"a": 1}["a"]) -> int:
            return x + y
        return definition

    def another():
        def definition(x: int, y: int = {"a": 1}["a"]) -> int:
            return x - y
        return definition

    assert edits.digest(with_one()) == edits.digest(without()) != edits.digest(another())


def test_a_comment_is_no_edit(tmp_path):
    """The text of a definition counts, without its comments, docstring and spaces."""
    def definition(x):
        """Double x."""
        return x * 2        # twice

    def same(x):
        return x * 2

    def other(x):
        return x * 3

    names = [edits.digest(f).replace("", "") for f in (definition, same, other)]
    assert len(set(names)) == 3         # the name is part of it
    source = Path(qwen2.__file__).read_text("utf-8")
    for old, new, shipped in (("x32 = x.float()\n", "x32 = x.float()      # looks closer\n", True),
                              ("x32 = x.float()\n", "x32 = x.float() * 1.01\n", False)):
        package = tmp_path / str(shipped)
        copied = package / "minivl"
        import shutil
        shutil.copytree(Path(minivl.__file__).parent, copied, ignore=shutil.ignore_patterns("nano", "__pycache__"))
        (copied / "qwen2.py").write_text(source.replace(old, new), "utf-8")
        code = ("from minivl import qwen2; from minivl.fast.edits import is_shipped; "
                "print(is_shipped(qwen2.RMSNorm, 'forward'))")
        said = subprocess.run([sys.executable, "-c", code], cwd=package, capture_output=True, text=True)
        assert said.stdout.strip() == str(shipped), said.stderr


def test_the_table_is_that_of_these_sources():
    """If this fails after a change of a definition: does what stands for it in fast/ still compute the same? Then print
    the table anew with `python -m minivl.fast`."""
    assert {edits.name_of(*pair): edits.digest(getattr(*pair)) for pair in edits.HIDDEN} == edits.SHIPPED
    hidden = {pair for kind in vars(layers).values() if isinstance(kind, type) for pair in edits.definitions_of(kind)}
    from minivl.fast import graphs
    for kind in (*graphs.RECORDED.values(), *layers.NORMS.values(), *layers.ATTENDS.values()):
        hidden |= set(edits.definitions_of(kind))
    assert hidden == {*edits.HIDDEN, *edits.TORCHS_OWN}




def test_hundreds_of_modules_are_one_warning(checkpoint, monkeypatch):
    """An edit of AWQLinear brings every layer's words back: said once."""
    model = minivl.load(checkpoint, precision="exact")
    monkeypatch.setattr(AWQLinear, "forward", rolled(AWQLinear.forward))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        scores(model)
        scores(model)
    assert sum("was looked at" in str(w.message) for w in said) == 1
    assert sum("not as shipped" in str(w.message) for w in said) == 1
