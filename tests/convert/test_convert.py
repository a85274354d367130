"""convert: the same numbers under other names, there and back; what transformers itself makes of the result."""
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import GOLDEN, same, shared, stored, tensors_of
from PIL import Image
from safetensors import safe_open

import minivl
from minivl import InputError, Tokenizer
from minivl.config import Config
from minivl.files.find import SHIPPED
from minivl.preprocess import tile_for
from minivl.prompt import encode, render
from minivl.tiling import to_pixel_values
from weights_tools import synthesize as s
from weights_tools.convert import __main__ as c
from weights_tools.convert.configs import original_config
from weights_tools.convert.names import as_on_the_hub, cut, hf_names, join
from weights_tools.convert.processor import hf_files
from weights_tools.dequantize import dequantize
from weights_tools.files import save_checkpoint, save_safetensors

ROOT = Path(__file__).parents[2]
TIGER = GOLDEN / "tiger.jpeg"
TEXTS = ["", "Hello, who are you?", " two  spaces\n\n\nand lines ", "12 345 <img>x</img> <|im_end|> 是什么🙂 e\u0301"]


def change(folder, part, **values):
    """Set or (with ...) take out keys of a part of config.json; part None: of the top level."""
    config = json.loads((folder / "config.json").read_text())
    of = config if part is None else config[part]
    of.update(values)
    for key in [key for key, value in values.items() if value is ...]:
        del of[key]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Checkpoints of the original layout: name -> folder. The last has the 6B's tower."""
    root = tmp_path_factory.mktemp("originals")
    made = {"nano": SHIPPED["nano"], "tiny": s.synthesize(root / "tiny", "tiny", shard_gb=0.0003),
            "internlm2": s.synthesize(root / "internlm2", "tiny-internlm2", format="bin")}
    wide = {"norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(s.SIZES, "tiny-internlm2", ({**s.TOWER_TINY, **wide}, s.SIZES["tiny-internlm2"][1]))
        made["6B"] = s.synthesize(root / "6B", "tiny-internlm2", dtype="float16")
    change(made["6B"], None, system_message="Be brief.", max_dynamic_patch=4, force_image_size=84)
    return made


@pytest.fixture(scope="module")
def converted(originals, tmp_path_factory):
    """The same in the -hf layout, and the dequantised twin of nano."""
    root = tmp_path_factory.mktemp("converted")
    made = {name: c.convert(folder, root / name) for name, folder in originals.items()}
    return {**made, "nano-awq": c.convert("nano-awq", root / "nano-awq", "float32")}


# ---- names and numbers ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["nano", "tiny", "internlm2", "6B"])
def test_there_and_back_is_the_same(name, originals, converted, tmp_path):
    back = c.convert(converted[name], tmp_path / "back")
    assert same(stored(originals[name]), stored(back))
    assert Config.load(back) == Config.load(originals[name])
    ours, theirs = Tokenizer.load(originals[name]), Tokenizer.load(back)
    assert (ours.added, ours.special_ids, ours.vocab_size) == (theirs.added, theirs.special_ids, theirs.vocab_size)
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    models = [minivl.load(folder) for folder in (originals[name], back)]
    assert models[0].eos_token_ids == models[1].eos_token_ids
    text = (back / "config.json").read_text()
    assert text == s.json_text(json.loads(text))        # the released order of keys


def test_names_of_both_layouts():
    """As the hub's -hf repositories and the original spell them."""
    for ours, theirs in {
            "vision_model.embeddings.class_embedding": "vision_tower.embeddings.cls_token",
            "vision_model.embeddings.position_embedding": "vision_tower.embeddings.position_embeddings",
            "vision_model.embeddings.patch_embedding.bias": "vision_tower.embeddings.patch_embeddings.projection.bias",
            "vision_model.encoder.layers.3.ls2": "vision_tower.encoder.layer.3.lambda_2",
            "vision_model.encoder.layers.3.norm1.bias": "vision_tower.encoder.layer.3.layernorm_before.bias",
            "vision_model.encoder.layers.3.mlp.fc2.bias": "vision_tower.encoder.layer.3.mlp.fc2.bias",
            "vision_model.encoder.layers.3.attn.k_norm.weight": "vision_tower.encoder.layer.3.attention.k_norm.weight",
            "mlp1.3.weight": "multi_modal_projector.linear_2.weight",
            "language_model.model.layers.0.mlp.up_proj.weight": "language_model.model.layers.0.mlp.up_proj.weight",
            "language_model.lm_head.weight": "language_model.lm_head.weight",
            "language_model.output.weight": "language_model.lm_head.weight",
            "language_model.model.norm.weight": "language_model.model.norm.weight",
            "language_model.model.layers.0.ffn_norm.weight":
                "language_model.model.layers.0.post_attention_layernorm.weight",
            "language_model.model.layers.0.feed_forward.w3.weight": "language_model.model.layers.0.mlp.up_proj.weight",
            }.items():
        assert hf_names(ours) == [theirs]
    assert hf_names("vision_model.encoder.layers.11.attn.qkv.bias") == [
        f"vision_tower.encoder.layer.11.attention.{part}_proj.bias" for part in "qkv"]
    assert hf_names("language_model.model.layers.0.attention.wqkv.weight") == [
        f"language_model.model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    for module, hub in {"model.vision_tower.a": "vision_tower.a", "lm_head.weight": "language_model.lm_head.weight",
                        "model.language_model.layers.0.b": "language_model.model.layers.0.b",
                        "model.multi_modal_projector.c": "multi_modal_projector.c"}.items():
        assert as_on_the_hub(module) == hub == as_on_the_hub(hub)


@pytest.mark.parametrize("heads, kv", [(4, 2), (6, 1), (3, 3), (8, 4)])
def test_rows_of_wqkv(heads, kv):
    """Against the slow way: row by row, each kv head has its query heads, its key, its value."""
    E = 4
    llm = Config.from_json(s.config_json("tiny-internlm2")).llm_config
    llm = type(llm)(**{**vars(llm), "num_attention_heads": heads, "num_key_value_heads": kv, "hidden_size": heads * E})
    rows = {"q": [], "k": [], "v": []}
    place = 0
    for _ in range(kv):
        for part in ["q"] * (heads // kv) + ["k", "v"]:
            rows[part] += range(place, place + E)
            place += E
    for shape in ((place, 5), (place,)):
        fused = torch.randn(shape)
        parts = cut(fused, "x.attention.wqkv.weight", llm)
        for part, which in zip(parts, "qkv"):
            assert torch.equal(part, fused[rows[which]])
        assert torch.equal(join(parts, "x.attention.wqkv.weight", llm), fused)


def test_other_spellings_of_the_same_checkpoint(originals, converted, tmp_path):
    """As transformers 5 saves: names of its modules, rope_parameters, no processor files; as 4.52 did: fewer keys."""
    folder = tmp_path / "hf"
    shutil.copytree(converted["tiny"], folder, ignore=shutil.ignore_patterns("model*", "*processor*"))
    tensors = {}
    for name, tensor in stored(converted["tiny"]).items():
        name = name.replace("language_model.model.", "language_model.")
        prefix = "" if "lm_head" in name else "model."
        tensors[prefix + name.replace("language_model.lm_head", "lm_head")] = tensor
    assert "lm_head.weight" in tensors and "model.language_model.norm.weight" in tensors
    save_checkpoint(tensors, folder)
    change(folder, "text_config", rope_theta=..., rope_scaling=..., hidden_act=..., rms_norm_eps=...,
           rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, layer_types=["full_attention"] * 3, head_dim=32)
    change(folder, "vision_config", image_size=56, patch_size=14, hidden_act=..., norm_type=..., use_mask_token=...)
    change(folder, None, template=..., use_thumbnail=..., ps_version=..., max_dynamic_patch=..., downsample_ratio=...,
           force_image_size=..., torch_dtype=..., dtype="float32")
    back = c.convert(folder, tmp_path / "back")
    assert same(stored(back), stored(originals["tiny"]))
    assert Config.load(back) == Config.load(originals["tiny"])
    llm = json.loads((back / "config.json").read_text())["llm_config"]
    assert llm["rope_theta"] == 1e6 and not {"rope_parameters", "layer_types", "head_dim"} & llm.keys()


def test_scaling_of_rope_is_kept(originals, converted, tmp_path):
    text = json.loads((converted["internlm2"] / "config.json").read_text())["text_config"]
    assert text["rope_scaling"] == {"rope_type": "dynamic", "factor": 2.0} and text["rope_theta"] == 1e6
    back = c.convert(converted["internlm2"], tmp_path / "back")
    llm = json.loads((back / "config.json").read_text())["llm_config"]
    # The original's own check takes exactly these two keys: configuration_internlm2.py @2410d1d.
    assert llm["rope_scaling"] == {"type": "dynamic", "factor": 2.0}


def test_tiles_of_the_processor_s_file():
    """Where config.json does not say it: from the image processor's file, else as released."""
    data = {"text_config": {"model_type": "qwen2"}, "vision_config": {"image_size": [448, 448]}}
    said = original_config(data, {"size": {"height": 448, "width": 448}, "min_patches": 2, "max_patches": 6}, "float16")
    assert [said[key] for key in ("min_dynamic_patch", "max_dynamic_patch", "use_thumbnail")] == [2, 6, True]
    released = original_config(data, {}, "float16")
    assert [released[key] for key in ("max_dynamic_patch", "force_image_size", "template", "ps_version")] == [
        12, 448, "internvl2_5", "v2"]


def test_int4_made_float_on_the_way(tmp_path):
    source = s.synthesize(tmp_path / "awq", "tiny-internlm2", awq=True, config_quirk="top")
    at_once = c.convert(source, tmp_path / "hf", "bfloat16")
    in_steps = c.convert(dequantize(source, tmp_path / "float", "bfloat16"), tmp_path / "stepwise")
    assert same(stored(at_once), stored(in_steps))
    assert (at_once / "config.json").read_text() == (in_steps / "config.json").read_text()


# ---- the tokenizer, without transformers ----------------------------------------------------------------------------

INTERNLM2 = GOLDEN / "internlm2-tokenizer"


@pytest.mark.parametrize("folder, strings", [
    (SHIPPED["nano"], None), (INTERNLM2, INTERNLM2 / "strings.json"),
    (INTERNLM2 / "dummy-prefix", INTERNLM2 / "strings.json"),
    pytest.param("qwen2_tokenizer", "golden/tokenizer_strings.json", marks=pytest.mark.slow)],
    ids=["nano", "internlm2", "dummy-prefix", "qwen2"])
def test_tokenizer_json_gives_the_same_ids(folder, strings):
    folder = shared(folder) if isinstance(folder, str) else folder
    image_token_id, files = hf_files(folder, Config.load(SHIPPED["nano"]))
    ours, theirs = Tokenizer.load(folder), tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert image_token_id == ours.added["<IMG_CONTEXT>"]
    texts = list(TEXTS)
    if strings:
        listed = json.loads((shared(strings) if isinstance(strings, str) else strings).read_text("utf-8"))
        texts += [item["text"] if isinstance(item, dict) else item[0] for item in listed]
    assert all(theirs.encode(text).ids == [*ours.begin, *ours.encode(text)] for text in texts
               if "[UNUSED_TOKEN_" not in text)
    if folder == INTERNLM2:     # the one known difference
        text = "[UNUSED_TOKEN_145]"
        assert ours.encode(text) == [ours.added["<|im_start|>"]] and len(theirs.encode(text).ids) > 2


# ---- transformers itself --------------------------------------------------------------------------------------------

CONVERSATION = [{"role": "user", "content": "<image>\nWhat is this?"}]


@pytest.fixture(scope="module")
def answers(converted, originals, tmp_path_factory):
    """name -> (what transformers computes, says of it; what minivl computes), all in one run of its environment."""
    if not (ROOT / ".reference" / "ready").exists():
        pytest.skip("no reference environment, see `make reference`")
    root = tmp_path_factory.mktemp("transformers")
    picture, inputs, ours = Image.open(TIGER).convert("RGB"), {}, {}
    for name in converted:
        source = originals.get(name, SHIPPED["nano-awq"])
        model, tokenizer = minivl.load(source), Tokenizer.load(source)
        pixels = to_pixel_values(tile_for(model.config, picture))
        ids = torch.tensor([encode(tokenizer, CONVERSATION, [len(pixels)], model.config.system_message,
                                   tokens_per_tile=model.config.num_image_token)])
        inputs |= {f"{name}.input_ids": ids, f"{name}.pixel_values": pixels}
        with torch.no_grad():
            ours[name] = {"model": model, "tokenizer": tokenizer, "pixels": pixels, "logits": model(ids, pixels)}
    asked = {"texts": TEXTS, "picture": str(TIGER), "conversation": [{"role": "user", "content": [
        {"type": "image"}, {"type": "text", "text": "What is this?"}]}]}
    save_safetensors(inputs, root / "inputs.safetensors", {"asked": json.dumps(asked)})
    python = ROOT / ".reference" / "bin" / "python"
    run = subprocess.run([python, Path(__file__).with_name("as_transformers.py"), root / "inputs.safetensors",
                          root / "outputs.safetensors", *converted.values()], capture_output=True, text=True,
                         timeout=300, env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    theirs = tensors_of(root / "outputs.safetensors")
    with safe_open(root / "outputs.safetensors", "pt") as file:
        said = json.loads(file.metadata()["said"])
    return {name: (theirs, said[name], ours[name]) for name in converted}


each = pytest.mark.parametrize("name", ["nano", "nano-awq", "tiny", "internlm2", "6B"])


@each
@pytest.mark.slow
def test_transformers_loads_every_tensor_and_computes_the_same(name, answers):
    theirs, said, ours = answers[name]
    assert {key: names for key, names in said["loaded"].items() if names} == {}
    decoder = "LlamaModel" if name in ("internlm2", "6B") else "Qwen2Model"
    assert said["classes"][:2] == ["InternVLForConditionalGeneration", decoder]
    want = ours["logits"]
    assert theirs[f"{name}.logits"].shape == want.shape
    assert (theirs[f"{name}.logits"] - want).abs().max() < 1e-5 * want.abs().max()


@each
@pytest.mark.slow
def test_transformers_reads_the_same_inputs(name, answers):
    theirs, said, ours = answers[name]
    tokenizer, config = ours["tokenizer"], ours["model"].config
    assert said["ids"] == [[*tokenizer.begin, *tokenizer.encode(text)] for text in TEXTS]
    assert said["named"][:4] == ["<img>", "<IMG_CONTEXT>", "</img>", "<|im_end|>"]
    prompt = render(CONVERSATION, [1], config.system_message, tokens_per_tile=1)
    assert said["prompt"] == prompt.replace("<img><IMG_CONTEXT></img>", "<IMG_CONTEXT>")
    assert tokenizer.added["<|im_end|>"] in (said["stops"] if isinstance(said["stops"], list) else [said["stops"]])
    assert "GotOcr2ImageProcessor" in said["classes"][2]
    assert torch.allclose(theirs[f"{name}.tiles"], ours["pixels"], atol=1e-5)


@each
@pytest.mark.slow
def test_what_transformers_saves_again_is_read(name, answers, converted, originals, tmp_path):
    if name not in originals:
        pytest.skip("has no original in float")
    folder = converted[name].with_name(name + "-again")
    if name in ("internlm2", "6B"):
        with pytest.raises(InputError, match="has no tokenizer.model, .* copy it there from the original release"):
            c.convert(folder, tmp_path / "back")
        shutil.copy(originals[name] / "tokenizer.model", folder)
    back = c.convert(folder, tmp_path / "back")
    assert same({n: t.float() for n, t in stored(originals[name]).items()}, stored(back))
    assert Config.load(back) == Config.load(originals[name])
    assert Tokenizer.load(back).added == answers[name][2]["tokenizer"].added


# ---- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("part, values, message", [
    ("text_config", {"model_type": "qwen3"}, "model_type is 'qwen3'; .* Qwen2 .qwen2. and InternLM2 .llama."),
    ("text_config", {"mlp_bias": True}, "mlp_bias of text_config is 'True'; the original layout knows only False"),
    ("text_config", {"head_dim": 64}, "head_dim is 64"),
    ("text_config", {"use_sliding_window": True}, "use_sliding_window is True"),
    ("text_config", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is .*yarn"),
    ("text_config", {"vocab_size": 601}, r"problems:\n *shape: language_model.lm_head.weight is \[600, 128\] in the"),
    ("text_config", {"num_hidden_layers": 4}, "missing: language_model.model.layers.3.input_layernorm.weight"),
    ("text_config", {"num_hidden_layers": 2}, "unexpected: language_model.model.layers.2.input_layernorm.weight"),
    ("vision_config", {"use_mean_pooling": False}, "use_mean_pooling of vision_config"),
    ("vision_config", {"image_size": [56, 112]}, r"image_size is '\[56, 112\]'; the original has square tiles"),
    ("vision_config", {"use_qk_norm": True}, "missing: vision_tower.encoder.layer.0.attention.k_norm.weight"),
    (None, {"vision_feature_layer": -2}, "vision_feature_layer of config.json is '-2'"),
    (None, {"vision_feature_layer": [-1]}, None),
    (None, {"quantization_config": {"quant_method": "bitsandbytes"}}, "config.json has a quantization_config; only "),
    (None, {"text_config": ...}, "config.json has no text_config")])
def test_an_hf_checkpoint_that_the_original_has_no_words_for(part, values, message, converted, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(converted["tiny"], folder)
    change(folder, part, **values)
    if message is None:
        assert c.convert(folder, tmp_path / "out")
        return
    with pytest.raises(InputError, match=message):
        c.main([str(folder), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_is_refused_leaves_nothing(originals, converted, made, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="is an AWQ checkpoint, .* add --dequantize float16"):
        c.main([str(made("awq")), str(out)])
    with pytest.raises(InputError, match="is a float checkpoint, .* use it as it is"):
        c.main([str(originals["tiny"]), str(out), "--dequantize", "float16"])
    with pytest.raises(InputError, match="has the -hf layout, .* leave --dequantize out"):
        c.main([str(converted["tiny"]), str(out), "--dequantize", "float16"])
    copy = tmp_path / "copy"
    shutil.copytree(originals["tiny"], copy)
    for inside in (copy, copy / "out"):
        with pytest.raises(InputError, match="choose a folder elsewhere"):
            c.main([str(copy), str(inside)])
    change(copy, "vision_config", layer_norm_eps=1e-5)      # means nothing to transformers' q_norm and k_norm
    assert c.convert(copy, tmp_path / "eps")
    shutil.copytree(originals["6B"], tmp_path / "6B")
    change(tmp_path / "6B", "vision_config", layer_norm_eps=1e-5)
    with pytest.raises(InputError, match="layer_norm_eps is 1e-05, transformers' InternVL normalises q and k with"):
        c.main([str(tmp_path / "6B"), str(out)])
    (copy / "added_tokens.json").unlink()
    with pytest.raises(InputError, match="lists no added tokens"):
        c.main([str(copy), str(out)])
    save_checkpoint({"x": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(InputError, match="neither the names of the original layout .*, the first is x; give"):
        c.main([str(tmp_path / "other"), str(out)])
    assert not out.exists()


def test_minivl_says_how_to_read_it(converted, originals, tmp_path):
    with pytest.raises(InputError, match="python -m weights_tools.convert FOLDER OUT"):
        minivl.load(converted["tiny"])
    shutil.copytree(converted["tiny"], tmp_path / "mixed")
    shutil.copy(originals["tiny"] / "config.json", tmp_path / "mixed")
    with pytest.raises(InputError, match="names of transformers' own classes .* python -m weights_tools.convert"):
        minivl.load(tmp_path / "mixed")


def test_a_thumbnail_cannot_be_left_out(originals, tmp_path):
    shutil.copytree(originals["tiny"], tmp_path / "copy")
    change(tmp_path / "copy", None, use_thumbnail=False)
    with pytest.warns(UserWarning, match="use_thumbnail false; transformers' image processor adds a thumbnail"):
        c.convert(tmp_path / "copy", tmp_path / "hf")
    assert Config.load(c.convert(tmp_path / "hf", tmp_path / "back")) == Config.load(tmp_path / "copy")


def test_the_command(originals, tmp_path, capsys):
    out = tmp_path / "out"
    assert c.main(["nano-awq", str(out), "--dequantize", "bfloat16"]) == 0
    assert re.search(r"out: -hf layout, 169 tensors, 0\.009 GB", capsys.readouterr().out)
    assert {t.dtype for t in stored(out).values()} == {torch.bfloat16}
    with pytest.raises(InputError, match="already holds weights"):
        c.main(["nano", str(out)])
    assert c.main(["nano", str(out), "--overwrite"]) == 0
    assert c.main([str(out), str(tmp_path / "back")]) == 0
    assert "back: original layout, 145 tensors" in capsys.readouterr().out
