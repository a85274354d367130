"""A decoder of another family needs no change outside its own file: everything else goes through the seam.

Here stands one with InternLM2's released names and its fused q, k, v. It takes the place of Qwen2 in a MiniVL and must
then load, save, trace, generate, answer, be compared, and compute what the original code computed.
"""
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, tensors_of
from torch import nn
from tqdm import tqdm

import minivl
from minivl.awq import AWQLinear
from minivl.cache import KVCache
from minivl.config import Config
from minivl.files.formats import open_weights
from minivl.qwen2 import RMSNorm, attention_mask, rope_tables, rotate
from minivl.tracing import place, stages
from weights_tools import inspect
from weights_tools.files import save_checkpoint, save_safetensors
from weights_tools.synthesize import synthesize
from weights_tools.verify import compare
from weights_tools.verify.recording import Recording

TIGER = GOLDEN / "tiger.jpeg"


# ---- the decoder, as its own file would have it ---------------------------------------------------------------------

class Attend(nn.Module):
    """q float[B, H, T, E], k and v float[B, K, S, E] -> float[B, H, T, E], softmax written out."""

    def forward(self, q, k, v, mask):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)                            # (B, H, S, E)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        if mask is None:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        scores = q @ k.mT / q.shape[-1] ** 0.5                                          # (B, H, T, S)
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


class Attention(nn.Module):
    """float[B, T, D] -> same shape. `wqkv` gives for each kv head its G query heads, its key, its value."""

    def __init__(self, config, number, linear):
        super().__init__()
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.number = number
        self.kv_heads = K
        self.head_dim = config.hidden_size // H
        self.wqkv = linear(config.hidden_size, (H + 2 * K) * self.head_dim, bias=False)
        self.attend = Attend()
        self.wo = linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, cache):
        x = self.wqkv(x).unflatten(-1, (self.kv_heads, -1, self.head_dim))              # (B, T, K, G + 2, E)
        q = x[..., :-2, :].flatten(2, 3).transpose(1, 2)                                # (B, H, T, E)
        k, v = (x[..., i, :].transpose(1, 2) for i in (-2, -1))                         # 2 x (B, K, T, E)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.number, k, v)
        return self.wo(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))           # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1(x)) * w3(x)), float[B, T, D] -> same shape."""

    def __init__(self, config, linear):
        super().__init__()
        self.w1 = linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    FEEDS = (("attention_norm", ("attention.wqkv",)),
             ("ffn_norm", ("feed_forward.w1", "feed_forward.w3")),
             ("feed_forward.w3", ("feed_forward.w2",)))

    def __init__(self, config, number, linear):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, number, linear)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config, linear)

    attend = property(lambda self: self.attention.attend)

    @property
    def linears(self):
        names = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
        return {name: self.get_submodule(name) for name in names}

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class InternLM2Model(nn.Module):
    """inputs_embeds float[B, T, D] -> normalised hidden states float[B, T, D]."""

    def __init__(self, config, linear):
        super().__init__()
        self.head_dim, self.theta = config.hidden_size // config.num_attention_heads, config.rope_theta
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i, linear) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, inputs_embeds, cache=None, padding=None):
        T, start = inputs_embeds.shape[1], cache.length if cache is not None else 0
        position = torch.arange(start, start + T)[None]
        if padding is not None:
            position = (position - padding[:, None]).clamp(min=0)
        cos, sin = (t.to(inputs_embeds.dtype) for t in rope_tables(position, self.head_dim, self.theta))
        mask = attention_mask(T, start + T, padding, inputs_embeds.device)
        x = inputs_embeds
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length = start + T
        return self.norm(x)


class InternLM2ForCausalLM(nn.Module):
    def __init__(self, config, linear=nn.Linear):
        super().__init__()
        self.model = InternLM2Model(config, linear)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    body = property(lambda self: self.model)
    embeddings = property(lambda self: self.model.tok_embeddings)
    layers = property(lambda self: self.model.layers)
    norm = property(lambda self: self.model.norm)
    head = property(lambda self: self.output)

    def scores(self, inputs_embeds, cache=None, padding=None, last=1):
        return self.head(self.body(inputs_embeds, cache, padding)[:, -last:]).float()

    def forward(self, inputs_embeds, cache=None, padding=None):
        return self.output(self.model(inputs_embeds, cache, padding)).float()


# ---- what must work with it -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module", autouse=True)
def in_place_of_qwen2():
    """Every MiniVL of this file has this decoder: the one line by which model.py chooses one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minivl.model.Qwen2ForCausalLM", InternLM2ForCausalLM)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory, in_place_of_qwen2):
    """Tiny checkpoints with the stand-in's names: {"plain": folder, "awq": folder}."""
    folder = tmp_path_factory.mktemp("internlm2")
    return {kind: synthesize(folder / kind, "tiny", awq=kind == "awq") for kind in ("plain", "awq")}


@pytest.fixture(scope="module")
def golden(in_place_of_qwen2):
    """(folder, model) of the recorded InternLM2 checkpoint; what the original code computed lies beside it."""
    folder = GOLDEN / "vit6b-internlm2"
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"] |= {"architectures": ["Qwen2ForCausalLM"], "rope_scaling": None}   # it acts on long texts
    model = minivl.MiniVL(Config.from_json(config))
    model.load_state_dict({name: tensor.read().float() for name, tensor in open_weights(folder).items()})
    model.img_context_token_id = json.loads((folder / "case.json").read_text())["image_token_id"]
    return folder, model.eval()


def test_every_stage_is_that_of_the_original_code(golden):
    folder, model = golden
    want = tensors_of(folder / "expected.safetensors")
    with torch.no_grad(), minivl.trace(model) as t:
        model(want["input_ids"], want["pixel_values"])
    recorded = {name: tensor for name, tensor in want.items() if place(name)}
    assert len(recorded) == 11 and minivl.first_mismatch(t, recorded) is None


def test_compare_agrees_and_names_the_stage_of_a_mistake(golden):
    folder, model = golden
    recording = Recording.open(folder / "expected.safetensors")
    for local in (False, True):
        assert compare.compare(folder, recording, model=model, local=local).agrees
        gain = model.language_model.layers[1].ffn_norm.weight
        gain.data *= 1.5
        try:
            found = compare.compare(folder, recording, model=model, local=local)
        finally:
            gain.data /= 1.5
        assert found.first.stage == "llm.layers.1"
        assert not local or [row.stage for row in found.rows if not row.agrees] == ["llm.layers.1"]
    result = compare.compare(folder, recording, model=model)
    assert len(result.tokens) == 12 and result.parted is None


@pytest.mark.parametrize("kind", ["plain", "awq"])
def test_names_load_and_save(kind, folders, tmp_path):
    model = minivl.load(folders[kind])
    names = {name for name in model.state_dict() if name.startswith("language_model.")}
    stored = "qweight" if kind == "awq" else "weight"
    assert {f"language_model.model.layers.2.{name}.{stored}" for name in (
        "attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")} <= names
    assert {"language_model.model.tok_embeddings.weight", "language_model.output.weight"} <= names
    for path in folders[kind].iterdir():
        if "safetensors" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    save_checkpoint(model.state_dict(), tmp_path)
    again = minivl.load(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    report = inspect.inspect(folders[kind])
    assert not any(report.problems.values())
    sums = inspect.totals(report.tensors)
    assert sums["embeddings"]["weights"] == 600 * 128 and sums["norm and head"]["weights"] == 128 + 600 * 128


def test_trace_has_every_stage(folders):
    model = minivl.load(folders["awq"])
    ids = torch.randint(0, 500, (2, 9))
    with torch.no_grad(), minivl.trace(model, "llm.*", "inputs_embeds", "logits") as t:
        logits = model(ids)
    assert set(t) == {name for name, *_ in stages(model) if name.split(".")[0] in ("llm", "inputs_embeds", "logits")}
    assert torch.equal(t["logits"], logits) and torch.equal(t["inputs_embeds"], model.embed(ids))
    for i in range(3):
        shapes = {which: tuple(t[f"llm.layers.{i}.{which}"].shape) for which in "qkv"}
        assert shapes == {"q": (2, 4, 9, 32), "k": (2, 2, 9, 32), "v": (2, 2, 9, 32)}
        assert t[f"llm.layers.{i}"].shape == (2, 9, 128)


def test_generate_with_cache_and_in_batches(folders):
    model = minivl.load(folders["plain"])
    prompts = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15, 16]]
    written = minivl.generate(model, prompts, max_new_tokens=6, ignore_eos=True)
    for prompt, answer in zip(prompts, written):
        assert answer == minivl.generate(model, [prompt], max_new_tokens=6, ignore_eos=True)[0]
        assert answer == minivl.generate(model, [prompt], max_new_tokens=6, ignore_eos=True,
                                         config=minivl.GenerationConfig(lookup=3))[0]
        ids = list(prompt)
        with torch.no_grad():       # without the cache
            for _ in range(6):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert answer == ids[len(prompt):]
    with torch.no_grad():
        x = model.embed(torch.tensor([prompts[2]]))
        cache = KVCache()
        pieces = torch.cat([model.language_model(part, cache) for part in x.split([3, 1, 3], 1)], 1)
        torch.testing.assert_close(pieces, model.language_model(x))


def test_pipeline_answers_with_its_progress_bar(folders, monkeypatch):
    ticks = []
    monkeypatch.setattr(tqdm, "update", lambda self, n=1: ticks.append(n))
    pipe = minivl.pipeline(folders["awq"])
    ticks.clear()
    image = minivl.load_image(TIGER)
    config = minivl.GenerationConfig(max_new_tokens=5, ignore_eos=True)
    alone = pipe(("What is this?", minivl.Picture(image, max_num=1)), config)
    assert len(alone.token_ids) == 5
    assert len(ticks) >= 3 + 3      # the tower's layers and the decoder's
    both = pipe([("What is this?", minivl.Picture(image, max_num=1)), "Hello"], config)
    assert both[0].token_ids == alone.token_ids
    session = pipe.chat(("What is this?", minivl.Picture(image, max_num=1)), gen_config=config)
    assert session.response.token_ids == alone.token_ids
    assert len(pipe.chat("And?", session=session, gen_config=config).response.token_ids) == 5


def test_a_recording_of_the_tiny_one_is_compared_with_its_tokens(folders, tmp_path):
    """Also what verify records of itself: ids of a prompt without a picture, and no trace of the tower."""
    model = minivl.load(folders["plain"])
    ids = torch.randint(0, 500, (1, 12))
    with torch.no_grad(), minivl.trace(model) as t:
        model(ids)
    greedy = minivl.generate(model, ids, max_new_tokens=3, ignore_eos=True)[0]
    path = save_safetensors({**t, "input_ids": ids, "greedy": greedy.clone()}, tmp_path / "t.safetensors")
    for local in (False, True):
        result = compare.compare(folders["plain"], Recording.open(path), model=model, local=local)
        assert result.agrees and [row.stage for row in result.rows] == [
            "inputs_embeds", *(f"llm.layers.{i}" for i in range(3)), "llm.norm", "logits"]


def test_a_layer_tells_its_linears_and_who_feeds_them(folders):
    for kind, of in (("plain", nn.Linear), ("awq", AWQLinear)):
        model = minivl.load(folders[kind])
        for layer in model.language_model.layers:
            assert {id(m) for m in layer.modules() if isinstance(m, of)} == {id(m) for m in layer.linears.values()}
            fed = [name for _, readers in layer.FEEDS for name in readers]
            assert set(fed) <= set(layer.linears) and len(fed) == len(set(fed))
            assert all(layer.get_submodule(before) for before, _ in layer.FEEDS)
