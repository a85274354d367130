"""Agreement with the original code, stage by stage, on its own recorded tensors."""
import json

import pytest
import torch
from conftest import GOLDEN, shared
from safetensors import safe_open

import minivl
from minivl.cache import KVCache
from minivl.config import VisionConfig
from minivl.pixel_unshuffle import PixelUnshuffle
from minivl.projector import projector
from minivl.tracing import first_mismatch
from minivl.vit import InternVisionModel

TOLERANCE = 1e-5        # relative, see golden/README.md
CASES = ["qwen2-awq", "qwen2"]


def case_folder(case):
    return GOLDEN / case if (GOLDEN / case).exists() else shared(f"golden/{case}")


def read(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}        # noqa: SIM118  no dict


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(model, expected tensors, facts of the case)"""
    folder = case_folder(request.param)
    facts = json.loads((folder / "case.json").read_text())
    model = minivl.load(folder)
    model.img_context_token_id = facts["image_token_id"]
    return model, read(folder / "expected.safetensors"), facts


def test_pixel_values_are_bit_equal(case):
    model, want, facts = case
    image = minivl.load_image(GOLDEN / facts["image"])
    tiles = minivl.tiling.tile(image, max_num=facts["max_num"], tile_size=model.config.force_image_size)
    assert len(tiles) == facts["num_tiles"]
    assert torch.equal(minivl.tiling.to_pixel_values(tiles), want["pixel_values"])


def test_every_stage(case):
    model, want, _ = case
    with torch.no_grad(), minivl.trace(model) as t:
        logits = model(want["input_ids"], want["pixel_values"])
    stages = {name: b for name, b in want.items() if name not in ("pixel_values", "input_ids", "greedy")}
    assert len(stages) == 11
    assert first_mismatch(t, stages, TOLERANCE) is None, first_mismatch(t, stages, TOLERANCE)
    assert logits.dtype == torch.float32 and torch.equal(logits, t["logits"])


def test_greedy_tokens_with_the_cache(case):
    model, want, _ = case
    got = minivl.generate(model, want["input_ids"], want["pixel_values"], max_new_tokens=12, ignore_eos=True)
    assert got[0].tolist() == want["greedy"].tolist()


def test_full_forward_is_prefill_and_steps_is_chunks(case, monkeypatch):
    monkeypatch.setattr(KVCache, "BLOCK", 8)            # the cache grows on the way
    model, want, _ = case
    with torch.no_grad():
        x = model.embed(want["input_ids"], model.visual_tokens(want["pixel_values"]))
        T = x.shape[1]
        for cuts in ([T], [T - 3, 1, 1, 1], [1] * T, [7, 11, T - 18], [T - 9, 9]):
            cache, logits = KVCache(), []
            for part in x.split(cuts, dim=1):
                logits.append(model.language_model(part, cache))
            assert cache.length == T
            got = {"logits": torch.cat(logits, 1)}
            assert first_mismatch(got, {"logits": want["logits"]}, TOLERANCE) is None, cuts


def test_vision_tower_of_the_6b_kind():
    folder = GOLDEN / "vit6b-internlm2"
    config, want = json.loads((folder / "config.json").read_text()), read(folder / "expected.safetensors")
    weights = {k: v.float() for k, v in read(folder / "model.safetensors").items()}
    vision = InternVisionModel(VisionConfig.from_json(config["vision_config"]))
    vision.load_state_dict({k[len("vision_model."):]: v for k, v in weights.items() if k.startswith("vision_model.")})
    mlp1 = projector(config["vision_config"]["hidden_size"], config["llm_config"]["hidden_size"])
    mlp1.load_state_dict({k[len("mlp1."):]: v for k, v in weights.items() if k.startswith("mlp1.")})
    with torch.no_grad():
        got = {"vit.embeddings": vision.embeddings(want["pixel_values"])}
        x = got["vit.embeddings"]
        for i, layer in enumerate(vision.encoder.layers):
            x = got[f"vit.layers.{i}"] = layer(x)
        assert torch.equal(x, vision(want["pixel_values"]))
        got["pixel_unshuffle"] = PixelUnshuffle()(x[:, 1:])
        got["projector"] = mlp1(got["pixel_unshuffle"])
    stages = {name: want[name] for name in got}
    assert first_mismatch(got, stages, TOLERANCE) is None, first_mismatch(got, stages, TOLERANCE)


def test_the_report_names_the_first_stage_that_differs(case):
    """A check that cannot fail proves nothing: a mistake in layer 1 must be reported there, not later."""
    model, want, _ = case
    layer = model.vision_model.encoder.layers[1]
    stages = {n: b for n, b in want.items() if n not in ("pixel_values", "input_ids", "greedy")}
    original = layer.ls1
    layer.ls1 = torch.nn.Parameter(original * 1.001)
    try:
        with torch.no_grad(), minivl.trace(model) as t:
            model(want["input_ids"], want["pixel_values"])
    finally:
        layer.ls1 = original
    order = sorted(stages, key=lambda name: list(t).index(name))
    assert order[:4] == ["vit.embeddings", "vit.layers.0", "vit.layers.1", "vit.layers.2"]
    report = first_mismatch(t, {name: stages[name] for name in order}, TOLERANCE)
    assert report.startswith("vit.layers.1: relative error")
