"""LoRA files: the same answer on every path, and every file that does not fit refused by name."""
import json

import pytest
import torch
from conftest import logits, stored, tensors_of

from minivl import EngineConfig, GenerationConfig, InputError, load, lora, pipeline
from minivl.__main__ import main
from minivl.files.adapters import read_adapter
from minivl.files.find import SHIPPED
from minivl.files.formats import open_weights, safetensors_header
from weights_tools.files import save_checkpoint, save_safetensors
from weights_tools.lora import about_lora
from weights_tools.synthesize import synthesize


def random_lora(folder, path, rank=3, alpha=6.0, only=(), size=0.3):
    """A LoRA file whose B is not zero: it changes what the model says."""
    model = load(folder)
    about = about_lora(folder, model, rank, alpha)
    generator = torch.Generator().manual_seed(1)
    names = [name for name in lora.linears(model) if not only or name.endswith(only)]
    lora.add(model, names, rank, alpha)
    tensors = {name: size * torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5
               for name, p in lora.learned(model).items()}
    return save_safetensors(tensors, path, about)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny checkpoints of both decoders, int4 and float."""
    folder = tmp_path_factory.mktemp("folders")
    return {f"{size} {awq}": synthesize(folder / f"{size}-{awq}", size, awq=awq)
            for size in ("tiny", "tiny-internlm2") for awq in (True, False)}


each_kind = pytest.mark.parametrize("kind", ["tiny True", "tiny False", "tiny-internlm2 True", "tiny-internlm2 False"])


@each_kind
def test_it_is_the_weight_with_b_times_a_added(folders, kind, tmp_path):
    """Against the obvious: every weight dequantised, the correction added, float linears."""
    file = random_lora(folders[kind], tmp_path / "a.safetensors")
    model = load(folders[kind], lora=file)
    parts = tensors_of(file)
    layer = model.language_model.layers[1]
    for name, linear in layer.linears.items():
        assert type(linear) is lora.LoRA
        weight = linear.base(torch.eye(linear.base.in_features)).T.detach()
        bias = getattr(linear.base, "bias", None)
        weight = weight if bias is None else weight - bias[:, None]
        stem = f"language_model.model.layers.1.{name}"
        weight = weight + 6.0 / 3 * parts[f"{stem}.lora_B"] @ parts[f"{stem}.lora_A"]
        x = torch.randn(2, 5, linear.base.in_features)
        want = x @ weight.T + (0 if bias is None else bias)
        assert torch.allclose(linear(x), want, atol=1e-4, rtol=1e-4), name
        assert torch.allclose(linear.correction() + 0, weight - (weight - linear.correction()), atol=1e-6)


@each_kind
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("large", [False, True])
def test_prepared_models_honour_it(folders, kind, precision, large, tmp_path, monkeypatch):
    """The paths of small and of large models; before `prepare` (by load) and, where only some linears have it, too."""
    if large:
        monkeypatch.setattr("minivl.fast.LARGE", 0)
    tolerance = 1e-4 if precision == "exact" else 5e-2
    for only in ((), ("q_proj", "down_proj", "wqkv", "w1")):
        file = random_lora(folders[kind], tmp_path / f"{len(only)}.safetensors", only=only)
        want = logits(folders[kind], lora=file)
        without = logits(folders[kind])
        got = logits(folders[kind], lora=file, precision=precision)
        change = float((want - without).norm() / want.norm())
        error = float((got - want).norm() / want.norm())
        assert change > 0.1 and error < min(tolerance, change / 4), (only, change, error)


def test_a_lora_put_on_after_prepare_counts_too(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("minivl.fast.LARGE", 0)
    file = random_lora(tiny, tmp_path / "a.safetensors")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        want = load(tiny, lora=file)(ids)
        model = load(tiny, precision="exact")
        lora.add(model, lora.linears(model), 3, 6.0)
        for name, p in lora.learned(model).items():
            p.copy_(tensors_of(file)[name])
        got = model(ids)
    assert float((got - want).norm() / want.norm()) < 1e-4


def test_the_pipeline_and_the_command_take_it(tmp_path, capsys):
    random_lora(SHIPPED["nano-awq"], tmp_path / "lora.safetensors", size=2.0)
    short = GenerationConfig(max_new_tokens=9)
    plain, learned = (pipeline("nano-awq", EngineConfig(lora=path))("Who are you?", short).text
                      for path in (None, tmp_path))
    assert learned != plain
    assert main(["chat", "-m", "nano-awq", "--lora", str(tmp_path), "-p", "Who are you?", "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr().out.split() == learned.split()
    with pytest.raises(InputError, match=r"EngineConfig.lora is 3; it must be the path"):
        EngineConfig(lora=3)


def test_a_second_one_is_refused(tmp_path):
    model = load("nano-awq", lora=random_lora(SHIPPED["nano-awq"], tmp_path / "a.safetensors"))
    name = "language_model.model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match="has a LoRA already"):
        lora.add(model, [name], 2, 2)


# ---- files that do not fit ------------------------------------------------------------------------------------------

Q = "language_model.model.layers.0.self_attn.q_proj.lora_"
HURT = {        # what is done to the tensors and metadata -> what the error says
    "unknown name": (lambda t, m: t.update({"language_model.model.layers.9.self_attn.q_proj.lora_A": t[Q + "A"]}),
                     "layers.9.self_attn.q_proj.lora_A is of no linear of this decoder"),
    "no B": (lambda t, m: t.pop(Q + "B"), "lora_A is there without .*lora_B"),
    "no A": (lambda t, m: t.pop(Q + "A"), "lora_B is there without .*lora_A"),
    "nothing": (lambda t, m: t.clear(), "no tensor"),
    "shape": (lambda t, m: t.update({Q + "A": t[Q + "A"][:, 1:]}), r"lora_A is \[3, \d+\], with rank 3 .* takes \[3, "),
    "rank": (lambda t, m: m.update(rank="4"), "with rank 4 this model takes"),
    "rank 0": (lambda t, m: m.update(rank="0"), "has rank 0"),
    "alpha": (lambda t, m: m.update(alpha="nan"), "alpha nan"),
    "no rank": (lambda t, m: m.pop("rank"), "does not say in its metadata rank.*merge_and_unload"),
    "a word": (lambda t, m: m.update(alpha="large"), "does not say in its metadata"),
    "integers": (lambda t, m: t.update({Q + "A": t[Q + "A"].int()}), "torch.int32, no float"),
    "NaN": (lambda t, m: t[Q + "B"].fill_(float("nan")), "lora_B holds .* NaN or infinite"),
    "other model": (lambda t, m: m.update(vectors="0" * 64), "learned on another checkpoint, 'awq'"),
}


@pytest.mark.parametrize("what", HURT)
def test_a_file_that_does_not_fit_is_refused(what, tiny, tmp_path):
    file = random_lora(tiny, tmp_path / "a.safetensors")
    change, says = HURT[what]
    tensors = {name: t.clone() for name, t in tensors_of(file).items()}
    about = safetensors_header(file)[1]
    about = {key: about[key] for key in ("rank", "alpha", "base", "vectors")}
    change(tensors, about)
    save_safetensors(tensors, file, about)
    with pytest.raises(InputError, match=says):
        load(tiny, lora=file)


def test_its_float_twin_and_another_size_are_refused(tmp_path, folders):
    """Smoothing moves factors between norms and weights: the same shapes, and yet not the same inputs."""
    file = random_lora(SHIPPED["nano-awq"], tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="learned on another checkpoint, 'awq'.*also if this is its float"):
        load("nano", lora=file)
    with pytest.raises(InputError, match="does not fit this model, 56 problems"):
        load(folders["tiny-internlm2 True"], lora=file)


def test_what_is_no_file_or_no_safetensors_is_refused(tmp_path, tiny):
    for path, says in ((tmp_path / "none", "there is no LoRA file"), (tmp_path, "there is no LoRA file .*/lora.saf")):
        with pytest.raises(InputError, match=says):
            load(tiny, lora=path)
    for data in (b"", b"PK\3\4" + bytes(99), json.dumps({"rank": 3}).encode() * 9):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(InputError, match="is not a whole safetensors file"):
            load(tiny, lora=tmp_path / "a")


def test_every_cut_and_many_flips_are_refused_or_give_the_same(tmp_path, tiny):
    file = random_lora(tiny, tmp_path / "a.safetensors", only=("q_proj",))
    data = file.read_bytes()
    model, weights = load(tiny), open_weights(tiny)
    good = read_adapter(file, model, weights)
    for i in range(0, len(data), len(data) // 60):
        for bad in (data[:i], data[:i] + bytes([data[i] ^ 0x41]) + data[i + 1:]):
            file.write_bytes(bad)
            try:
                found = read_adapter(file, model, weights)
            except InputError:
                continue
            assert found.tensors.keys() == good.tensors.keys()      # a flip inside the name of the base, say
            assert all(torch.equal(found.tensors[name], good.tensors[name]) for name in good.tensors)
            assert (found.rank, found.alpha) == (good.rank, good.alpha)


def test_half_precision_that_cannot_hold_it_is_refused(tmp_path, tiny):
    file = random_lora(tiny, tmp_path / "a.safetensors", size=1e7)
    with pytest.raises(InputError, match=r"of the LoRA exceeds torch.float16; load with dtype='bfloat16'"):
        load(tiny, dtype="float16", lora=file)
    load(tiny, dtype="bfloat16", lora=file)


def test_the_dtype_of_the_files_norms_does_not_matter(tmp_path, tiny):
    """A checkpoint written again in another float dtype that holds the same norms is the same checkpoint."""
    file = random_lora(tiny, tmp_path / "a.safetensors")
    again = synthesize(tmp_path / "again", "tiny", awq=True)
    tensors = {name: t.float() if t.ndim == 1 and t.is_floating_point() else t for name, t in stored(again).items()}
    save_checkpoint(tensors, again, overwrite=True)
    load(again, lora=file)
