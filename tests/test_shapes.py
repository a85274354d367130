"""Shapes are part of the code: every module at sizes that are pairwise different, so that no swap can hide."""
import ast
from pathlib import Path

import pytest
import torch

import minivl
from minivl.cache import KVCache
from minivl.config import Config
from minivl.tracing import kind, place, stages

# B 2, N 3, S 28, P 16, L 4, C 12 (3 heads of 4), D 40 (5 heads of 8, 1 kv head), F 56, V 71; T 13
CONFIG = {
    "force_image_size": 28, "downsample_ratio": 0.5, "min_dynamic_patch": 1, "max_dynamic_patch": 6,
    "use_thumbnail": True, "dynamic_image_size": True, "template": "internvl2_5", "ps_version": "v2",
    "select_layer": -1, "pad2square": False,
    "vision_config": {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
                      "num_channels": 3, "patch_size": 7, "image_size": 28, "layer_norm_eps": 1e-6,
                      "hidden_act": "gelu", "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False},
    "llm_config": {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 71, "hidden_size": 40, "intermediate_size": 56,
                   "num_hidden_layers": 2, "num_attention_heads": 5, "num_key_value_heads": 1, "hidden_act": "silu",
                   "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 99}}
KINDS = {"300M": {}, "6B": {"norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True}}
DECODERS = {"Qwen2ForCausalLM": {}, "InternLM2ForCausalLM": {"bias": False,
                                                             "rope_scaling": {"type": "dynamic", "factor": 2.0}}}
QUANTIZATION = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}


def build(kind="300M", awq=False, decoder="Qwen2ForCausalLM"):
    config = {**CONFIG, "vision_config": {**CONFIG["vision_config"], **KINDS[kind]},
              "llm_config": {**CONFIG["llm_config"], "architectures": [decoder], **DECODERS[decoder]}}
    if awq:
        config["llm_config"] = {**config["llm_config"], "quantization_config": QUANTIZATION}
    model = minivl.MiniVL(Config.from_json(config))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(std=0.2)
        else:
            tensor.random_()
    model.img_context_token_id, model.eos_token_ids = 70, (69,)
    return model.eval()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("awq", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_stages_have_the_documented_shapes(kind, awq, decoder):
    model = build(kind, awq, decoder)
    B, N, S, P, L, C, D, H, K, E, V, T = 2, 3, 28, 16, 4, 12, 40, 5, 1, 8, 71, 13
    input_ids = torch.randint(0, 69, (B, T))
    input_ids[0, 2:10] = input_ids[1, 1:5] = 70
    with minivl.trace(model, "*") as t:
        logits = model(input_ids, torch.randn(N, 3, S, S))
    want = {"vit.embeddings": (N, 1 + P, C), "vit.layers.1": (N, 1 + P, C), "pixel_unshuffle": (N, L, 4 * C),
            "vit.layers.0.q": (N, 3, 1 + P, 4), "vit.layers.1.v": (N, 3, 1 + P, 4), "projector": (N, L, D),
            "inputs_embeds": (B, T, D), "llm.layers.0": (B, T, D), "llm.layers.1.q": (B, H, T, E),
            "llm.layers.1.k": (B, K, T, E), "llm.norm": (B, T, D), "logits": (B, T, V)}
    assert {name: tuple(t[name].shape) for name in want} == want
    assert tuple(logits.shape) == (B, T, V) and logits.dtype == torch.float32
    # visual tokens stand over the placeholders, in order, across the prompts
    assert torch.equal(t["inputs_embeds"][input_ids == 70], t["projector"].flatten(0, 1))


@pytest.mark.parametrize("decoder", DECODERS)
def test_one_forward_serves_training(decoder):
    model = build(decoder=decoder)
    input_ids = torch.randint(0, 69, (1, 9))
    input_ids[0, 2:6] = 70
    model(input_ids, torch.randn(1, 3, 28, 28)).log_softmax(-1)[0, :, 3].sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("decoder", DECODERS)
def test_half_precision_stays_in_its_dtype(decoder):
    model = build(decoder=decoder).bfloat16()
    input_ids = torch.randint(0, 69, (1, 9))
    input_ids[0, 2:6] = 70
    with torch.no_grad(), minivl.trace(model) as t:
        assert model(input_ids, torch.randn(1, 3, 28, 28)).dtype == torch.float32
    assert {x.dtype for x in t.values()} == {torch.bfloat16}


def test_trace_keeps_every_call_and_refuses_unknown_stages():
    model = build()
    with minivl.trace(model, "llm.layers.*", "llm.layers.0.k") as t:
        minivl.generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=4, ignore_eos=True)
    assert [x.shape[1] for x in t.history["llm.layers.1"]] == [3, 1, 1, 1]
    assert [x.shape[2] for x in t.history["llm.layers.0.k"]] == [3, 4, 5, 6]        # with the cache
    assert torch.equal(t.history["llm.layers.0.k"][0], t.history["llm.layers.0.k"][3][:, :, :3])
    with pytest.raises(KeyError, match="no stage 'logits' was recorded"):
        t["logits"]
    with pytest.raises(ValueError, match=r"no stage matches \['llm.layer.0'\]"):
        with minivl.trace(model, "llm.layer.0"):
            pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("decoder", DECODERS)
def test_stages_come_in_the_order_of_the_computation(decoder):
    """`stages` asks the model, `place` knows only names: both tell the order that happens."""
    model = build(decoder=decoder)
    ids = torch.randint(0, 69, (1, 9))
    ids[0, 2:6] = 70
    with torch.no_grad(), minivl.trace(model, "*") as t:
        model(ids, torch.randn(1, 3, 28, 28))
    names = [name for name, *_ in stages(model)]
    assert list(t) == names
    whole = [name for name, _, which in stages(model) if which in ("in", "out")]
    assert sorted(reversed(whole), key=place) == whole
    others = ("vit.layers.0.q", "vit.layers", "llm.norm.3", "pixel_values", "greedy")
    assert [place(name) for name in others] == [None] * 5
    assert kind("llm.layers.12") == ("llm.layers", 12) and kind("llm.norm") == ("llm.norm", None)


def test_a_recorded_tensor_does_not_change_afterwards():
    """The keys are a view of the cache, which later tokens overwrite; the trace keeps a copy."""
    model, cache = build(), KVCache()
    with torch.no_grad(), minivl.trace(model, "llm.layers.0.k") as t:
        model.language_model(model.embed(torch.tensor([[1, 2, 3]])), cache)
        kept = t["llm.layers.0.k"].clone()
        cache.truncate(1)
        model.language_model(model.embed(torch.tensor([[7, 8]])), cache)
    assert torch.equal(t.history["llm.layers.0.k"][0], kept)
    assert not torch.equal(t["llm.layers.0.k"], kept)


def test_model_refuses_what_does_not_fit():
    model = build()
    ids = torch.tensor([[1, 70, 70, 3]])
    with pytest.raises(minivl.InputError, match="2 <IMG_CONTEXT> placeholders but 1 tiles x 4 give 4 visual tokens"):
        model(ids, torch.zeros(1, 3, 28, 28))
    with pytest.raises(minivl.InputError, match=r"shape \(1, 3, 14, 28\), the model takes \[tiles, 3, 28, 28\]"):
        model(ids, torch.zeros(1, 3, 14, 28))
    with pytest.raises(minivl.InputError, match="span 1..71, the vocabulary has ids 0..70"):
        model(torch.tensor([[1, 71]]))
    with pytest.raises(minivl.InputError, match=r"input_ids have shape \(1, 0\)"):
        model(torch.zeros(1, 0, dtype=torch.long))
    model.img_context_token_id = None
    with pytest.raises(minivl.InputError, match="set model.img_context_token_id"):
        model(ids, torch.zeros(1, 3, 28, 28))


IDEAS = ["tiling", "vit", "pixel_unshuffle", "projector", "qwen2", "internlm2", "awq", "lora"]


@pytest.mark.parametrize("name", IDEAS)
def test_idea_files_stand_alone(name):
    """They import torch (and Pillow for tiling), nothing else and never each other: copy one out and use it."""
    path = Path(minivl.__file__).parent / f"{name}.py"
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or ".").split(".")[0])
    assert found <= {"torch", "PIL"} if name == "tiling" else found <= {"torch"}
