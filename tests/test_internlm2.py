"""The InternLM2 decoder: what the original code computed, and all that knows Qwen2 through the seam both share."""
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, tensors_of
from torch import nn
from tqdm import tqdm

import minivl
from minivl import fast, internlm2, prompt, qwen2, tiling
from minivl.awq import AWQLinear, dequantize
from minivl.cache import KVCache
from minivl.fast import edits
from minivl.tracing import place, stages
from weights_tools import inspect
from weights_tools.files import save_checkpoint, save_safetensors
from weights_tools.synthesize import synthesize
from weights_tools.verify import compare
from weights_tools.verify.recording import Recording

TIGER = GOLDEN / "tiger.jpeg"
FOLDER = GOLDEN / "vit6b-internlm2"


# ---- what the original code computed --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny checkpoints: {"plain": folder, "awq": folder}."""
    folder = tmp_path_factory.mktemp("internlm2")
    return {kind: synthesize(folder / kind, "tiny-internlm2", awq=kind == "awq") for kind in ("plain", "awq")}


@pytest.fixture(scope="module")
def golden():
    """(folder, model) of the recorded InternLM2 checkpoint; what the original code computed lies beside it."""
    model = minivl.load(FOLDER)
    model.img_context_token_id = json.loads((FOLDER / "case.json").read_text())["image_token_id"]
    return FOLDER, model


def test_every_stage_is_that_of_the_original_code(golden):
    folder, model = golden
    want = tensors_of(folder / "expected.safetensors")
    with torch.no_grad(), minivl.trace(model) as t:
        model(want["input_ids"], want["pixel_values"])
    recorded = {name: tensor for name, tensor in want.items() if place(name)}
    assert len(recorded) == 11 and minivl.first_mismatch(t, recorded, 1e-5) is None


def test_greedy_tokens_are_those_of_the_original_code_with_the_cache(golden):
    folder, model = golden
    want = tensors_of(folder / "expected.safetensors")
    for lookup in (0, 4):
        got = minivl.generate(model, want["input_ids"], want["pixel_values"], max_new_tokens=12, ignore_eos=True,
                              config=minivl.GenerationConfig(lookup=lookup))
        assert got[0].tolist() == want["greedy"].tolist()


def test_full_forward_is_prefill_and_steps_is_chunks(golden):
    folder, model = golden
    want = tensors_of(folder / "expected.safetensors")
    with torch.no_grad():
        x = model.embed(want["input_ids"], model.visual_tokens(want["pixel_values"]))
        T = x.shape[1]
        for cuts in ([T - 3, 1, 1, 1], [7, 11, T - 18]):
            cache = KVCache()
            got = {"logits": torch.cat([model.language_model(part, cache) for part in x.split(cuts, dim=1)], 1)}
            assert minivl.first_mismatch(got, {"logits": want["logits"]}, 1e-5) is None


def obvious(attention, x, cos, sin, K):
    """Attention written out for one head at a time, from rows of wqkv cut by the rule of its drawing."""
    E = attention.head_dim
    H = attention.wo.weight.shape[1] // E
    groups = attention.wqkv.weight.view(K, H // K + 2, E, -1)           # (K, G + 2, E, D)
    heads = []
    for h in range(H):
        group = groups[h // (H // K)]
        q, k, v = (x @ group[i].T for i in (h % (H // K), -2, -1))      # 3 x (T, E)
        q, k = (torch.cat([t[:, :E // 2] * cos - t[:, E // 2:] * sin, t[:, E // 2:] * cos + t[:, :E // 2] * sin], 1)
                for t in (q, k))
        scores = (q @ k.T / E ** 0.5).masked_fill(torch.ones(len(x), len(x)).triu(1) > 0, float("-inf"))
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, 1) @ attention.wo.weight.T


@pytest.mark.parametrize("H, K, E", [(6, 2, 8), (4, 4, 6), (5, 1, 4)])
def test_wqkv_holds_one_kv_head_after_the_other(H, K, E):
    config = minivl.config.InternLM2Config(("InternLM2ForCausalLM",), hidden_size=H * E, num_attention_heads=H,
                                           num_key_value_heads=K, bias=False)
    attention = internlm2.Attention(config, 0, nn.Linear)
    x = torch.randn(1, 7, H * E)
    cos, sin = internlm2.rope_tables(torch.arange(7)[None], E, 1e4, 1.0, 100)
    with torch.no_grad():
        got = attention(x, cos, sin, None, None)[0]
        want = obvious(attention, x[0], cos[0, 0, :, :E // 2], sin[0, 0, :, :E // 2], K)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_same_weights_in_the_other_layout_compute_the_same():
    """Qwen2 without biases, its q, k, v rows rewritten into wqkv: the same numbers from the other decoder."""
    sizes = dict(vocab_size=50, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
                 num_key_value_heads=2, rope_theta=1e6)
    one = qwen2.Qwen2ForCausalLM(minivl.config.LLMConfig(("Qwen2ForCausalLM",), **sizes))
    other = internlm2.InternLM2ForCausalLM(minivl.config.InternLM2Config(
        ("InternLM2ForCausalLM",), **sizes, bias=False, max_position_embeddings=64,
        rope_scaling={"type": "dynamic", "factor": 2.0}))
    for tensor in one.parameters():
        tensor.data = torch.randn_like(tensor) * 0.3
    state = {name: t.data for name, t in one.state_dict().items()}
    rewritten = {"model.tok_embeddings.weight": state["model.embed_tokens.weight"],
                 "model.norm.weight": state["model.norm.weight"], "output.weight": state["lm_head.weight"]}
    for i, layer in enumerate(one.layers):
        before, after = f"model.layers.{i}.", f"model.layers.{i}."
        for part in ("q", "k", "v"):
            layer.self_attn.get_submodule(f"{part}_proj").bias.data.zero_()
        q, k, v = (state[f"{before}self_attn.{part}_proj.weight"].view(2, -1, 8, 48) for part in "qkv")
        rewritten |= {f"{after}attention.wqkv.weight": torch.cat([q, k, v], 1).view(-1, 48),
                      f"{after}attention.wo.weight": state[f"{before}self_attn.o_proj.weight"],
                      f"{after}attention_norm.weight": state[f"{before}input_layernorm.weight"],
                      f"{after}ffn_norm.weight": state[f"{before}post_attention_layernorm.weight"]}
        for new, old in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            rewritten[f"{after}feed_forward.{new}.weight"] = state[f"{before}mlp.{old}_proj.weight"]
    other.load_state_dict(rewritten, strict=True)
    x = torch.randn(2, 30, 48)
    with torch.no_grad():
        torch.testing.assert_close(other(x), one(x))
        padding = torch.tensor([0, 7])
        torch.testing.assert_close(other(x, KVCache(), padding), one(x, KVCache(), padding))


def test_awq_is_its_dequantised_twin(folders):
    model, twin = minivl.load(folders["awq"]), minivl.load(folders["plain"])
    state = model.state_dict()
    for name in twin.state_dict():
        stem = name.removesuffix(".weight")
        words = [f"{stem}.{part}" for part in ("qweight", "qzeros", "scales")]
        if words[0] in state:
            state[name] = dequantize(*(state.pop(word) for word in words)).T
    twin.load_state_dict(state, strict=True)
    ids = torch.randint(0, 500, (2, 9))
    with torch.no_grad():
        assert minivl.relative_error(model(ids), twin(ids)) < 1e-5


# ---- positions beyond the trained ones ------------------------------------------------------------------------------

def angles(position: int, length: int, E=16, theta=1e4, factor=2.0, trained=32):
    """The formula with Python's numbers (float64): modeling_internlm2.py:216-243."""
    base = theta * (factor * length / trained - (factor - 1)) ** (E / (E - 2)) if length > trained else theta
    return torch.tensor([position * base ** (-2 * i / E) for i in range(E // 2)])


def tables(positions):
    cos, sin = internlm2.rope_tables(torch.tensor(positions), 16, 1e4, 2.0, 32)
    return torch.atan2(sin, cos)[:, 0, :, :8]                           # (B, T, E/2), in -pi..pi


def turned(angle):
    return torch.atan2(angle.sin(), angle.cos())


def test_the_base_grows_beyond_the_trained_length():
    for length in (1, 31, 32, 33, 40, 64, 300):
        got = tables([list(range(length))])[0]
        want = torch.stack([turned(angles(p, length)) for p in range(length)])
        assert float((got - want).abs().max()) < 2e-4, length
    assert not torch.allclose(tables([list(range(33))])[0, 5], turned(angles(5, 32)), atol=1e-3)


def test_each_row_of_a_batch_has_its_own_length():
    short, long = [0] * 10 + list(range(30)), list(range(40))
    both = tables([short, long])
    torch.testing.assert_close(both[0, 10:], tables([list(range(30))])[0])
    torch.testing.assert_close(both[1], tables([long])[0])


def small(trained, factor=2.0, scaling=True):
    torch.manual_seed(0)
    model = internlm2.InternLM2ForCausalLM(minivl.config.InternLM2Config(
        ("InternLM2ForCausalLM",), vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bias=False, max_position_embeddings=trained,
        rope_scaling={"type": "dynamic", "factor": factor} if scaling else None))
    for tensor in model.parameters():
        tensor.data = torch.randn_like(tensor) * 0.3
    return model


def test_keys_in_the_cache_stay_as_they_were_turned():
    """As in the original: beyond the limit a prompt in pieces differs from a whole one; a step turns only itself."""
    model, x = small(trained=16), torch.randn(1, 24, 32)
    with torch.no_grad():
        whole, cache = model(x), KVCache()
        first = model(x[:, :20], cache)
        keys = [layer[0][:, :, :20].clone() for layer in cache.layers.values()]
        rest = torch.cat([model(x[:, t:t + 1], cache) for t in range(20, 24)], 1)
        assert all(torch.equal(before, layer[0][:, :, :20]) for before, layer in zip(keys, cache.layers.values()))
        torch.testing.assert_close(first, model(x[:, :20]))
        assert minivl.relative_error(rest, whole[:, 20:]) > 1e-3
        # within the limit there is no difference, and nothing is left of the long prompt
        plain = small(trained=16, scaling=False)
        torch.testing.assert_close(model(x[:, :16]), plain(x[:, :16]))
        assert minivl.relative_error(model(x), plain(x)) > 1e-3


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_both_precisions(tmp_path, monkeypatch, precision):
    """As large models are prepared: by the same few seams, and an edit of a definition counts."""
    monkeypatch.setattr(fast, "LARGE", 0)
    folder = synthesize(tmp_path / "awq", "tiny-internlm2", awq=True, group_size=32)
    ids = torch.randint(0, 500, (1, 300))
    with torch.no_grad():
        want = minivl.load(folder)(ids)
        model = minivl.load(folder, precision=precision)
        assert minivl.relative_error(model(ids), want) < (1e-5 if precision == "exact" else 0.03)
        assert minivl.relative_error(model(ids[:, :5]), want[:, :5]) < (1e-5 if precision == "exact" else 0.03)
        if fast.has_compiler():
            assert {type(m).__name__ for m in model.language_model.modules()} >= {
                "FastMLP", "FastNorm", "PromptByHead", "Int4", "Words"}
            monkeypatch.setattr(edits, "_told", set())      # what it has warned of is not said again
            monkeypatch.setattr(internlm2.FeedForward, "gated", lambda self, x: F.relu(self.gate_up(x)[0]))
            with pytest.warns(UserWarning, match="FeedForward.gated is not as shipped"):
                changed = model(ids)
            assert minivl.relative_error(changed, want) > 0.05


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
    for one, answer in zip(prompts, written):
        assert answer == minivl.generate(model, [one], max_new_tokens=6, ignore_eos=True)[0]
        assert answer == minivl.generate(model, [one], max_new_tokens=6, ignore_eos=True,
                                         config=minivl.GenerationConfig(lookup=3))[0]
        ids = list(one)
        with torch.no_grad():       # without the cache
            for _ in range(6):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert answer == ids[len(one):]
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


def encoded(pipe, message, tiles, after=None):
    return prompt.encode(pipe.tokenizer, [(message, None)], [len(t) for t in tiles],
                         tokens_per_tile=pipe.model.config.num_image_token, after=after)


def by_full_forwards(pipe, ids, tiles, n):
    """Run the whole conversation for every token: no cache, no session."""
    assert ids.count(1) == 1 and ids[0] == 1                # <s> once, at the start
    model, written = pipe.model, []
    with torch.no_grad():
        visual = model.visual_tokens(tiling.to_pixel_values([t for some in tiles for t in some])) if tiles else None
        while len(written) < n:
            scores = model.language_model(model.embed(torch.tensor([ids + written]), visual))[0, -1]
            scores[list(model.unused_ids)] = float("-inf")
            written.append(int(scores.argmax()))
    return written


@pytest.mark.parametrize("kind", ["plain", "awq"])
def test_chat_batch_session_and_stream_are_the_full_forward(folders, kind):
    pipe = minivl.pipeline(folders[kind])
    config = minivl.GenerationConfig(max_new_tokens=6, ignore_eos=True)
    image = minivl.load_image(TIGER)
    picture = minivl.Picture(image, max_num=2)
    tiles = [tiling.tile(image, max_num=2, tile_size=56)]
    ids = encoded(pipe, "<image>\nWhat is this?", tiles)
    first = by_full_forwards(pipe, ids, tiles, 6)
    alone = pipe(("What is this?", picture), config)
    assert alone.token_ids == first
    assert "".join(pipe.stream(("What is this?", picture), config)) == alone.text
    hello = by_full_forwards(pipe, encoded(pipe, "Hello there, you", []), [], 6)
    both = pipe([("What is this?", picture), "Hello there, you"], config)
    assert [answer.token_ids for answer in both] == [first, hello]
    session = pipe.chat(("What is this?", picture), gen_config=config)
    assert session.response.token_ids == first
    session = pipe.chat("And where?", session=session, gen_config=config)
    ids += first + encoded(pipe, "And where?", [], after=first)
    assert session.response.token_ids == by_full_forwards(pipe, ids, tiles, 6)
