"""The released config.json: unknown and missing values are refused, wherever they stand."""
import shutil

import pytest
import torch
from checkpoints import edit, logits, refused
from conftest import GOLDEN

import minivl
from minivl import InputError


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
    ("llm_config.architectures", ["LlamaForCausalLM"], "'LlamaForCausalLM'; minivl knows 'Qwen2ForCausalLM'"),
    ("llm_config.architectures", ["InternLM2ForCausalLM"], "2B, 8B and 26B models.*cannot run yet"),
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
    ("llm_config.quantization_config.quant_method", "gptq", "quant_method is 'gptq'; minivl knows 'awq'"),
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


@pytest.mark.parametrize("path", ["vision_config.norm_type", "vision_config.qkv_bias", "ps_version",
                                  "llm_config.rope_theta"])
def test_missing_config_values_are_not_guessed(copy, path):
    def change(config):
        *parents, last = path.split(".")
        for key in parents:
            config = config[key]
        del config[last]
    edit(copy, change)
    refused(copy, f"{path.split('.')[-1]} is missing")


def test_unknown_keys_are_ignored_and_tying_is_not_read(copy):
    want = logits(copy)
    edit(copy, lambda c: c["llm_config"].update(tie_word_embeddings=True, use_cache=False, num_beams=4))
    assert torch.equal(logits(copy), want)


def test_system_message_of_the_config(tiny, tmp_path):
    folder = tmp_path / "system"
    shutil.copytree(tiny, folder)
    edit(folder, lambda c: c.update(system_message="Be kind."))
    pipe = minivl.pipeline(folder)
    assert "Be kind." in pipe.tokenizer.decode(pipe.turn("hello").ids)


def test_internlm2_config_says_so():
    with pytest.raises(InputError, match="cannot run yet"):
        minivl.load(GOLDEN / "vit6b-internlm2")


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
        with pytest.raises(InputError, match=f"{name} .* has 10000000000 bytes, at most"):
            minivl.pipeline(folder)
        copied = (tiny / name).read_bytes()
        (folder / name).write_bytes(copied)


def test_a_number_of_many_digits(copy):
    (copy / "generation_config.json").write_text('{"eos_token_id": ' + "9" * 5000 + "}")
    refused(copy, "generation_config.json .* is not valid JSON")
