"""config.json as released, re-saved by newer tools or fine-tuned: what it means is read, or refused by name."""
import json
import shutil
import time

import pytest
import torch
from checkpoints import edit, logits, refused

import minivl
from minivl import InputError
from weights_tools.synthesize import config_json, synthesize


def test_quantization_block_anywhere(copy):
    want = logits(copy)

    def to_top(config):
        config["quantization_config"] = config["llm_config"].pop("quantization_config")
    edit(copy, to_top)
    assert torch.equal(logits(copy), want)

    def deeper(config):
        config["extra"] = [{"inside": config.pop("quantization_config")}]
    edit(copy, deeper)
    assert torch.equal(logits(copy), want)


@pytest.mark.parametrize("path, value, message", [
    ("template", "internlm2-chat", "template is 'internlm2-chat'; minivl knows 'internvl2_5'"),
    ("ps_version", "v1", "ps_version is 'v1'"), ("select_layer", -2, "select_layer is -2"),
    ("pad2square", True, "pad2square is True"),
    ("downsample_ratio", 0.25, "downsample_ratio is 0.25"), ("use_llm_lora", 8, "use_llm_lora is 8"),
    ("force_image_size", 57, "patch_size 14 does not divide force_image_size 57"),
    ("force_image_size", 42, "odd number of patches"),
    ("max_dynamic_patch", 0, "max_dynamic_patch is 0, it must be positive"),
    ("downsample_ratio", 10 ** 400, "no model has such"), ("min_dynamic_patch", 13, "must satisfy 1 <= min <= max"),
    ("use_thumbnail", "yes", "use_thumbnail is 'yes', it must be of type bool"),
    ("ps_version", None, "ps_version is None"),
    ("vision_config", None, "has no vision_config"),
    ("vision_config.norm_type", "group_norm", "norm_type is 'group_norm'"),
    ("vision_config.hidden_act", "gelu_new", "hidden_act is 'gelu_new'"),
    ("vision_config.num_attention_heads", 5, "does not divide"),
    ("llm_config.hidden_act", "gelu", "hidden_act is 'gelu'"),
    ("llm_config.use_sliding_window", True, "use_sliding_window is True"),
    ("llm_config.rope_scaling", {"type": "yarn"}, "rope_scaling is"),
    ("llm_config.num_key_value_heads", 3, "3 does not divide"),
    ("llm_config.architectures", ["FalconForCausalLM"], "'FalconForCausalLM'; minivl knows 'Qwen2ForCausalLM'"),
    ("llm_config.architectures", ["InternLM3ForCausalLM"], "InternVL3-9B.*cannot run"),
    ("llm_config.architectures", ["Qwen3ForCausalLM"], r"Qwen3ForCausalLM \(InternVL3.5\), which minivl cannot run"),
    ("llm_config.architectures", None, "architectures.*None; minivl knows"),
    ("llm_config.head_dim", 64, "head_dim is 64"),
    ("llm_config.layer_types", ["sliding_attention"] * 2, "layer_types is"),
    ("architectures", ["InternVLRewardModel"], "architectures is ..InternVLRewardModel.., not ..InternVLChatModel.."),
    ("use_backbone_lora", 16, "use_backbone_lora is 16, not 0: .*LoRA adapters.*merge them first"),
    ("llm_config.architectures", {"a": 1}, "minivl knows 'Qwen2ForCausalLM'"),
    ("llm_config.architectures", 5, "minivl knows"),
    ("llm_config.quantization_config.modules_to_not_convert", 5, "keeps .*in float"),
    ("llm_config.hidden_size", 10 ** 9, "no model has such"),
    ("llm_config.num_hidden_layers", 10 ** 6, "no model has such"),
    ("llm_config.rms_norm_eps", float("nan"), "no model has such"),
    ("llm_config.rope_theta", float("inf"), "no model has such"),
    ("llm_config.vocab_size", "600", "vocab_size is '600', it must be of type int"),
    ("llm_config.rope_theta", 0, "must be positive"),
    ("llm_config.quantization_config.bits", 8, "bits is 8"),
    ("llm_config.quantization_config.version", "gemv", "version is 'gemv'"),
    ("llm_config.quantization_config.quant_method", "gptq", "quant_method is 'gptq'; minivl knows 'awq'. Take the "
     "float checkpoint .* weights_tools.quantize makes one"),
    ("llm_config.quantization_config.zero_point", False, "zero_point is False"),
    ("llm_config.quantization_config.group_size", -1, "group_size is -1"),
    ("llm_config.quantization_config.group_size", 100, "group_size 100 does not divide hidden_size 128"),
    ("llm_config.quantization_config.modules_to_not_convert", ["model.layers.0"], "keeps .*in float")])
def test_unknown_config_values(copy, path, value, message):
    def change(config):
        *parents, last = path.split(".")
        for key in parents:
            config = config[key]
        config[last] = value
    edit(copy, change)
    with pytest.raises((InputError, ValueError), match=message):
        minivl.load(copy)


# ---- sizes together -------------------------------------------------------------------------------------------------

def changed(config, **sizes):
    """A parsed config.json with sizes of its parts changed: vision_image_size=448, llm_vocab_size=5, max_dynamic..."""
    data = json.loads(json.dumps(config))
    for key, value in sizes.items():
        part, _, name = key.partition("_")
        (data[f"{part}_config"] if part in ("vision", "llm") else data).update(
            {name if part in ("vision", "llm") else key: value})
    return data


@pytest.mark.parametrize("sizes, message", [
    ({"vision_image_size": 2 ** 24, "vision_patch_size": 1}, "281474976710656 patches of a tile.*limit is 16384"),
    ({"vision_image_size": 130 * 14, "force_image_size": 56}, "16900 patches of a tile"),
    ({"force_image_size": 39_200}, "7840000 patches of a tile"),
    ({"force_image_size": 2 ** 20, "vision_image_size": 2 ** 20, "vision_patch_size": 2 ** 19}, "tile's activations"),
    ({"vision_hidden_size": 2 ** 22, "vision_intermediate_size": 2 ** 24}, "bytes of one tile's activations.*limit"),
    ({"vision_num_hidden_layers": 1000, "llm_num_hidden_layers": 1000}, "num_hidden_layers is 1000, no model has"),
    ({"llm_num_hidden_layers": 257}, "num_hidden_layers is 257, no model has"),
    ({"llm_hidden_size": 2 ** 20, "llm_num_attention_heads": 2 ** 10}, "parameters where the limit is 10000000000"),
    ({"llm_vocab_size": 2 ** 24, "llm_hidden_size": 2 ** 16}, "parameters where the limit"),
    ({"llm_intermediate_size": 2 ** 24, "llm_hidden_size": 2 ** 15}, "parameters where the limit"),
    ({"vision_patch_size": 2 ** 14, "vision_image_size": 2 ** 15, "force_image_size": 2 ** 15,
      "vision_hidden_size": 2 ** 14}, "bytes of one tile"),
    ({"vision_num_channels": 4}, "num_channels is 4; minivl knows 3"),
    ({"max_dynamic_patch": 2 ** 20}, "tiles of a picture"),
    ({"llm_max_position_embeddings": 2 ** 24}, "positions"), ({"llm_max_position_embeddings": 3}, "visual tokens")])
def test_sizes_that_together_are_too_many(copy, sizes, message):
    """Each possible by itself. The decoder of `copy` is AWQ, so these are read without its group sizes."""
    edit(copy, lambda c: (c.update(changed(c, **sizes)), c["llm_config"].pop("quantization_config")))
    start = time.process_time()
    assert len(refused(copy, message)) < 1000
    assert time.process_time() - start < 2


@pytest.mark.parametrize("size", ["1B", "4B", "38B", "78B"])
def test_every_released_size_has_room(size):
    """Twice the tile's side, twice each width and twice the layers are read too."""
    config = config_json(size)
    assert minivl.config.Config.from_json(config).num_image_token == 256
    minivl.config.Config.from_json(changed(config, force_image_size=896, vision_image_size=896))
    vision, llm = config["vision_config"], config["llm_config"]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers")
    minivl.config.Config.from_json(changed(
        config, **{f"vision_{key}": 2 * vision[key] for key in sizes},
        **{f"llm_{key}": 2 * llm[key] for key in (*sizes, "vocab_size", "max_position_embeddings")}))


def deep(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("path", [
    "template", "architectures", "model_type", "ps_version", "use_llm_lora", "downsample_ratio", "force_image_size",
    "vision_config.hidden_act", "vision_config.num_channels", "llm_config.architectures", "llm_config.rope_scaling",
    "llm_config.rope_theta", "llm_config.layer_types", "llm_config.head_dim", "llm_config.use_sliding_window",
    "llm_config.quantization_config.modules_to_not_convert", "llm_config.quantization_config.bits"])
@pytest.mark.parametrize("value", [
    "x" * 10 ** 5, ["y"] * 10 ** 4, {str(i): i for i in range(10 ** 4)}, deep(800), 10 ** 4000, {"type": deep(800)}],
    ids=["text", "list", "dict", "deep", "int", "deep type"])
def test_a_long_value_makes_no_long_message(copy, path, value):
    def change(config):
        *parents, last = path.split(".")
        for key in parents:
            config = config[key]
        config[last] = value
    edit(copy, change)
    with pytest.raises(InputError) as error:
        minivl.config.Config.load(copy)
    assert len(str(error.value)) < 1000


def test_many_keys(copy):
    edit(copy, lambda c: c["llm_config"].update({f"key{i}": i for i in range(20_000)}))
    start = time.process_time()
    refused(copy, "llm_config has 200.. keys, the limit is 1000")
    assert time.process_time() - start < 2


# ---- keys that are left out -----------------------------------------------------------------------------------------

def change_at(path, change):
    """Edit the dict that holds the last key of a dotted path: change(dict, key)."""
    def edit_it(config):
        *parents, last = path.split(".")
        for key in parents:
            config = config[key]
        change(config, last)
    return edit_it


@pytest.mark.parametrize("path", [
    "vision_config.num_channels", "vision_config.patch_size", "vision_config.hidden_act",
    "vision_config.layer_norm_eps", "llm_config.hidden_act", "llm_config.rms_norm_eps",
    "llm_config.max_position_embeddings", "downsample_ratio", "select_layer", "pad2square", "min_dynamic_patch",
    "force_image_size", "llm_config.rope_scaling", "llm_config.use_sliding_window",
    *(f"llm_config.quantization_config.{key}" for key in ("bits", "version", "zero_point", "group_size"))])
def test_a_key_that_equals_the_class_default_may_be_left_out(copy, path):
    want = minivl.config.Config.load(copy)
    edit(copy, change_at(path, lambda config, key: config.pop(key, None)))
    got = minivl.config.Config.load(copy)
    if path.endswith("group_size"):
        assert got.quantization_config.group_size == 128
    else:
        assert got == want


@pytest.mark.parametrize("path, shown", [
    ("vision_config.norm_type", "'rms_norm', does not fit vision_model.encoder.layers.0.norm1.bias"),
    ("vision_config.qkv_bias", "False, does not fit vision_model.encoder.layers.0.attn.qkv.bias"),
    ("vision_config.qk_normalization", "True, does not fit vision_model.encoder.layers.0.attn.q_norm.weight"),
    ("vision_config.num_hidden_layers", r"48, does not fit vision_model.encoder.layers.\d+.norm1.weight"),
    ("vision_config.intermediate_size", "12800, does not fit vision_model.encoder.layers.0.mlp.fc1.bias"),
    ("vision_config.image_size", "224, does not fit vision_model.embeddings.position_embedding"),
    ("llm_config.vocab_size", "151936, does not fit language_model.model.embed_tokens.weight"),
    ("llm_config.intermediate_size", "22016, does not fit language_model.model.layers.0.mlp.gate_proj.scales"),
    ("llm_config.num_hidden_layers", r"32, does not fit language_model.model.layers.\d+.input_layernorm.weight")])
def test_a_default_that_the_tensors_contradict_is_named(copy, path, shown):
    edit(copy, change_at(path, lambda config, key: config.pop(key)))
    message = refused(copy, f"config.json leaves out {'.'.join(path.split('.')[-2:])}; its default in the original "
                            f"class, {shown}: write the model's own value")
    assert message.count("config.json leaves out") == 1


def test_a_default_group_size_that_the_tensors_contradict_is_named(tmp_path):
    folder = synthesize(tmp_path / "groups", "tiny", awq=True, group_size=64)
    edit(folder, lambda c: c["llm_config"]["quantization_config"].pop("group_size"))
    refused(folder, "leaves out quantization_config.group_size; .* class, 128, does not fit .*scales: write")


@pytest.mark.parametrize("path, message", [
    ("ps_version", "ps_version .left out, so the original class's default. is 'v1'; minivl knows 'v2'"),
    ("template", "template is missing"), ("llm_config.architectures", "minivl knows 'Qwen2ForCausalLM'"),
    ("vision_config.num_attention_heads", "num_attention_heads 25 does not divide .*num_attention_heads is left out"),
    ("llm_config.num_key_value_heads", "num_key_value_heads 32 does not divide .*num_key_value_heads is left out")])
def test_a_default_of_another_model_is_refused(copy, path, message):
    edit(copy, change_at(path, lambda config, key: config.pop(key)))
    refused(copy, message)


def test_null_where_the_original_takes_it(copy):
    want = logits(copy)
    edit(copy, lambda c: (c.update(force_image_size=None), c["llm_config"].update(use_sliding_window=None)))
    assert torch.equal(logits(copy), want)
    data = json.loads((copy / "config.json").read_text())
    data["llm_config"]["num_key_value_heads"] = None
    got = minivl.config.Config.from_json(data).llm_config
    assert got.num_key_value_heads == got.num_attention_heads


# ---- RoPE -----------------------------------------------------------------------------------------------------------

THETA = 1000000.0
V5 = {"rope_type": "default", "rope_theta": THETA}


@pytest.mark.parametrize("llm", [
    {"rope_theta": THETA}, {"rope_parameters": V5}, {"rope_parameters": {"rope_theta": THETA}},
    {"rope_parameters": V5, "rope_theta": THETA},
    {"rope_parameters": V5, "rope_theta": 10000.0},         # transformers 4 wrote its default beside
    {"rope_parameters": V5, "rope_theta": None}, {"rope_parameters": V5, "rope_scaling": V5},
    {"rope_parameters": {}, "rope_theta": THETA}, {"rope_parameters": None, "rope_theta": THETA},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": THETA},
    {"rope_parameters": {**V5, "partial_rotary_factor": 1.0}},
    {"rope_parameters": {**V5, "rope_type": "dynamic", "factor": 2.0}}, {"rope_scaling": V5},
    {"rope_theta": THETA, "rope_scaling": {"rope_type": "default"}},
    {"rope_theta": THETA, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_theta": THETA, "rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}},
    {"rope_theta": THETA, "rope_scaling": {"type": "linear", "factor": 1.0}}], ids=str)
def test_rope_as_every_version_writes_it(copy, llm):
    want = logits(copy)

    def change(config):
        for key in ("rope_theta", "rope_scaling", "rope_parameters"):
            config["llm_config"].pop(key, None)
        config["llm_config"].update(llm)
    edit(copy, change)
    assert minivl.config.Config.load(copy).llm_config.rope_theta == THETA
    assert torch.equal(logits(copy), want)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("block", [
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, {"type": "linear", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0}, {"rope_type": "longrope"},
    {"rope_type": "default", "mrope_section": [1, 2]},
    {"type": "mrope", "mrope_section": [16, 24, 24]}, {"type": "dynamic", "rope_type": "yarn", "factor": 2.0},
    {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 100}, {"type": "dynamic", "alpha": 1000.0},
    {"type": "dynamic", "factor": float("nan")}, {"type": 5}, {"full_attention": V5}, "dynamic", ["linear"],
    {"rope_theta": THETA, "partial_rotary_factor": 0.5}], ids=str)
def test_rope_that_would_change_the_computation_is_refused(copy, key, block):
    edit(copy, lambda c: c["llm_config"].update({key: block}))
    refused(copy, f"llm_config.{key} is .*plain RoPE")


@pytest.mark.parametrize("llm", [
    {"rope_parameters": {"rope_theta": 500000.0}, "rope_theta": THETA},
    {"rope_parameters": V5, "rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}])
def test_rope_bases_that_disagree_are_refused(copy, llm):
    edit(copy, lambda c: c["llm_config"].update(llm))
    refused(copy, "llm_config has .*rope_theta 1000000.0.* and .*rope_theta .*; keep the one"
            if "rope_scaling" in llm else "rope_parameters.rope_theta 500000.0 and rope_theta 1000000.0; keep the one")


def test_a_whole_config_of_transformers_5(copy):
    """What transformers 5.23 makes of llm_config: to_dict() of its Qwen2Config."""
    def change(config):
        llm = config["llm_config"]
        for key in ("rope_scaling", "torch_dtype", "sliding_window"):
            llm.pop(key, None)
        llm.update(dtype="float16", rope_parameters={"rope_theta": llm.pop("rope_theta"), "rope_type": "default"},
                   layer_types=["full_attention"] * llm["num_hidden_layers"], sliding_window=None, pruned_heads={},
                   label2id=None, id2label={"0": "LABEL_0"}, transformers_version="5.23.0")
        config["dtype"] = config.pop("torch_dtype", "float16")
    want = logits(copy)
    edit(copy, change)
    assert torch.equal(logits(copy), want)


# ---- quantization ---------------------------------------------------------------------------------------------------

def test_quantization_in_the_words_of_autoawq(copy):
    want = logits(copy)

    def change(config):
        old = config["llm_config"].pop("quantization_config")
        config["quantization_config"] = {"zero_point": True, "q_group_size": old["group_size"], "w_bit": old["bits"],
                                         "version": "GEMM", "modules_to_not_convert": None}
    edit(copy, change)
    assert torch.equal(logits(copy), want)
    edit(copy, lambda c: c["quantization_config"].update(format="gemm", version="GEMM", bits=4, quant_method="awq"))
    assert torch.equal(logits(copy), want)


def test_two_equal_quantization_blocks_are_one(copy):
    def change(config):
        block = config["llm_config"]["quantization_config"]
        config["quantization_config"] = {**block, "version": "GEMM", "modules_to_not_convert": ["vision_model"]}
        deep = block = {}
        for _ in range(900):        # a note of somebody's, as deep as JSON can be read
            block["x"] = block = {}
        config["notes"] = deep
    want = logits(copy)
    edit(copy, change)
    assert torch.equal(logits(copy), want)


@pytest.mark.parametrize("block, message", [
    ({"quant_method": "awq", "bits": 4, "w_bit": 8}, "bits 4 and w_bit 8"), ({"w_bit": 3}, "bits is 3"),
    ({"quant_method": "awq", "version": "gemm", "format": "gemv"}, "version 'gemm' and format 'gemv'"),
    ({"quant_method": "awq", "format": "llm-awq"}, "version is 'llm-awq'"),
    ({"load_in_4bit": True}, "quant_method is None; minivl knows 'awq'"),
    ({"quant_method": "awq", "group_size": 64}, "quantization blocks that differ.*group_size=64")])
def test_quantization_that_is_not_this_one(copy, block, message):
    def change(config):
        if "differ" in message:
            config["quantization_config"] = block
        else:
            config["llm_config"]["quantization_config"] = block
    edit(copy, change)
    refused(copy, message)


# ---- other models ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("data, message", [
    ({"model_type": "internvl", "architectures": ["InternVLForConditionalGeneration"], "text_config": {},
      "vision_config": {}}, "'internvl', the form of InternVL that transformers converts .-hf.*take the same model"),
    ({"architectures": ["InternVLForConditionalGeneration"], "vision_config": {}}, "-hf on the hub"),
    ({"model_type": "qwen2_5_vl", "vision_config": {}}, "'qwen2_5_vl', a model of another family.*use transformers"),
    ({"model_type": "llava", "text_config": {}, "vision_config": {}}, "'llava', a model of another family"),
    ({"model_type": "qwen2", "hidden_size": 8}, "'qwen2', a Qwen2 language model without a vision tower"),
    ({"model_type": "NVLM_D", "vision_config": {}, "llm_config": {}}, "'NVLM_D', a model of another family"),
    ({"model_type": "intern_vit_6b"}, "vision tower without a language model"), ({"model_type": []}, "another family"),
    ({"model_type": "internvl_chat"}, "has no vision_config"), ({}, "has no vision_config.*model_type None")])
def test_other_models_are_named(tmp_path, data, message):
    (tmp_path / "config.json").write_text(json.dumps(data))
    refused(tmp_path, message)


# ---- keys that say nothing ------------------------------------------------------------------------------------------

def test_tying_and_the_cache_are_not_read(copy):
    want = logits(copy)
    edit(copy, lambda c: c["llm_config"].update(tie_word_embeddings=True, use_cache=False, num_beams=1, do_sample=True))
    assert torch.equal(logits(copy), want)


def test_system_message_of_the_config(tiny, tmp_path):
    folder = tmp_path / "system"
    shutil.copytree(tiny, folder)
    edit(folder, lambda c: c.update(system_message="Be kind."))
    pipe = minivl.pipeline(folder)
    assert "Be kind." in pipe.tokenizer.decode(pipe.turn("hello").ids)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "added_tokens.json", "vocab.json"])
def test_small_files_must_be_objects(tiny, tmp_path, name):
    folder = tmp_path / "list"
    shutil.copytree(tiny, folder)
    (folder / name).write_text("[1, 2]")
    with pytest.raises(InputError, match=f"{name} in .* holds a list, not an object"):
        minivl.pipeline(folder)


def test_small_files_have_a_size(tiny, tmp_path):
    folder = tmp_path / "large"
    shutil.copytree(tiny, folder)
    for name in ("merges.txt", "added_tokens.json", "config.json"):
        with open(folder / name, "r+b") as f:
            f.truncate(10 ** 10)    # sparse
        with pytest.raises(InputError, match=f"{name} .* 1000000\\d+ bytes"):
            minivl.pipeline(folder)
        copied = (tiny / name).read_bytes()
        (folder / name).write_bytes(copied)


def test_a_number_of_many_digits(copy):
    (copy / "generation_config.json").write_text('{"eos_token_id": ' + "9" * 5000 + "}")
    refused(copy, "generation_config.json .* is not valid JSON")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "vocab.json", "merges.txt",
                                  "added_tokens.json"])
def test_a_byte_order_mark_is_no_part_of_the_text(tiny, tmp_path, name):
    folder = tmp_path / "mark"
    shutil.copytree(tiny, folder)
    want = minivl.Tokenizer.load(folder).encode("Was ist das? 是什么"), logits(folder)
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    got = minivl.Tokenizer.load(folder).encode("Was ist das? 是什么"), logits(folder)
    assert got[0] == want[0] and torch.equal(got[1], want[1])


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "vocab.json", "merges.txt",
                                  "added_tokens.json"])
@pytest.mark.parametrize("content, message", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2776833\n",
     "is a git-lfs pointer of .* bytes, not the file it stands for; run `git lfs pull`"),
    ("{}".encode("utf-16"), "is not UTF-8 text; save it as UTF-8")])
def test_text_that_is_not_the_file(tiny, tmp_path, name, content, message):
    folder = tmp_path / "other"
    shutil.copytree(tiny, folder)
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} in .* {message}"):
        minivl.pipeline(folder)
