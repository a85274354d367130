"""Every key of the original config classes is decided on: read, refused unless neutral, or without effect."""
import json
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from checkpoints import edit, logits, refused

from minivl import config as c

# The parameters of each class's __init__ and what it sets besides. Sources: OpenGVLab/InternVL @2410d1d,
# configuration_internvl_chat.py, configuration_intern_vit.py, configuration_internlm2.py; transformers 4.37.2, 4.57.1
# and 5.23.0, configuration_utils.py, configuration_qwen2.py, quantization_config.py.
BASE = {
    "4.37": "return_dict output_hidden_states output_attentions torchscript torch_dtype use_bfloat16 tf_legacy_loss "
            "pruned_heads tie_word_embeddings chunk_size_feed_forward is_encoder_decoder is_decoder "
            "cross_attention_hidden_size add_cross_attention tie_encoder_decoder architectures finetuning_task "
            "id2label label2id num_labels tokenizer_class prefix bos_token_id pad_token_id eos_token_id sep_token_id "
            "decoder_start_token_id task_specific_params problem_type xla_device _name_or_path name_or_path "
            "_commit_hash attn_implementation _attn_implementation_internal transformers_version "
            "gradient_checkpointing auto_map model_type",
    "4.57": "dtype _attn_implementation _attn_implementation_autoset base_model_tp_plan base_model_pp_plan "
            "base_model_ep_plan",
    "5.23": "per_layer_config tie_last_hidden_states experts_implementation _experts_implementation "
            "_experts_implementation_internal base_model_fsdp_plan transformers_weights",
    "generation": "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
                  "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
                  "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
                  "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
                  "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens use_cache epsilon_cutoff "
                  "eta_cutoff encoder_repetition_penalty num_assistant_tokens num_assistant_tokens_schedule "
                  "assistant_confidence_threshold assistant_lookbehind target_lookbehind"}
CLASSES = {
    "InternVLChatConfig": ("config.json", "vision_config llm_config use_backbone_lora use_llm_lora pad2square "
                           "select_layer force_image_size downsample_ratio template dynamic_image_size use_thumbnail "
                           "ps_version min_dynamic_patch max_dynamic_patch hidden_size system_message image_fold fp16 "
                           "bf16 quantization_config"),
    "InternVisionConfig": ("vision_config", "num_channels patch_size image_size qkv_bias hidden_size "
                           "num_attention_heads intermediate_size qk_normalization num_hidden_layers use_flash_attn "
                           "hidden_act norm_type layer_norm_eps dropout drop_path_rate attention_dropout "
                           "initializer_range initializer_factor"),
    "Qwen2Config": ("llm_config", "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
                    "num_key_value_heads hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache "
                    "is_causal "     # no parameter: transformers 5 reads it in masking_utils.py
                    "tie_word_embeddings rope_theta rope_scaling rope_parameters use_sliding_window sliding_window "
                    "max_window_layers layer_types attention_dropout head_dim partial_rotary_factor "
                    "quantization_config"),
    "InternLM2Config": ("llm_config", "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
                        "num_key_value_heads hidden_act max_position_embeddings initializer_range rms_norm_eps "
                        "use_cache bias rope_theta rope_scaling attn_implementation rope_pos_id_version "
                        "rope_pos_id_stride"),
    "AwqConfig": ("quantization_config", "quant_method bits group_size w_bit q_group_size "
                  "zero_point version format backend do_fuse modules_to_fuse modules_to_not_convert fuse_max_seq_len "
                  "exllama_config tokenizer dataset damp_percent desc_act act_group_aware sym true_sequential meta "
                  "model_seqlen block_name_to_quantize module_name_preceding_first_block batch_size pad_token_id "
                  "max_input_length cache_block_outputs modules_in_block_to_quantize checkpoint_format lm_head")}


def decided(part: str) -> dict[str, str]:
    """key -> what is done with it in a part of config.json."""
    # generate() is the decoder's, so the keys that only llm_config's reader looks at say nothing elsewhere
    done = {key: "no effect here" for key in c.REFUSED["llm_config"]} if part != "quantization_config" else {}
    done |= {key: why for why, keys in c.WITHOUT_EFFECT.items() for key in keys.split()}
    done |= {key: "refused" for key in {**c.REFUSED["every part"], **c.REFUSED.get(part, {})}}
    done |= {key: "read" for key in c.ALSO_READ.get(part, "").split()}
    return done | {field.name: "read" for field in fields(c.PARTS[part])}


@pytest.mark.parametrize("name", CLASSES)
def test_every_key_is_decided_on(name):
    part, own = CLASSES[name]
    keys = set(own.split()) | (set(" ".join(BASE.values()).split()) if name != "AwqConfig" else set())
    assert not keys - decided(part).keys()
    assert c.known_keys(part) >= decided(part).keys()


def test_what_changes_the_computation_is_not_without_effect():
    """No key may stand in two tables of one part."""
    without = [key for keys in c.WITHOUT_EFFECT.values() for key in keys.split()]
    assert len(without) == len(set(without))
    for part, cls in c.PARTS.items():
        refused_here = {**c.REFUSED["every part"], **c.REFUSED[part]} if part in c.REFUSED else c.REFUSED["every part"]
        read = {field.name for field in fields(cls)} | set(c.ALSO_READ.get(part, "").split())
        assert not read & refused_here.keys()
        assert read & set(without) <= {"hidden_size", "model_type", "eos_token_id", "architectures"}   # elsewhere
        assert refused_here.keys() & set(without) <= {"architectures"}
    for key in ("rope_parameters", "use_sliding_window", "head_dim", "num_beams", "use_llm_lora"):
        assert key not in without


@pytest.mark.parametrize("name", ["InternVisionConfig", "Qwen2Config"])
def test_defaults_of_the_classes(name):
    """FACTS of configuration_intern_vit.py:64-84 and configuration_qwen2.py, where a wrong one would not be seen."""
    want = {"InternVisionConfig": {"num_channels": 3, "patch_size": 14, "image_size": 224, "qkv_bias": False,
                                   "hidden_size": 3200, "num_attention_heads": 25, "intermediate_size": 12800,
                                   "qk_normalization": True, "num_hidden_layers": 48, "hidden_act": "gelu",
                                   "norm_type": "rms_norm", "layer_norm_eps": 1e-6},
            "Qwen2Config": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016,
                            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
                            "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
                            "rope_theta": 10000.0}}[name]
    data = {"architectures": ["Qwen2ForCausalLM"]} if name == "Qwen2Config" else {}
    got = c.PARTS[CLASSES[name][0]].from_json(data)
    assert {key: getattr(got, key) for key in want} == want
    assert {field.name for field in fields(got)} - {"architectures"} == want.keys()


REFERENCE = Path(__file__).parents[1] / ".reference"


@pytest.mark.slow
@pytest.mark.skipif(not (REFERENCE / "ready").exists(), reason="no reference environment, see `make reference`")
def test_keys_of_the_installed_transformers():
    """The lists above are of versions gone by; a newer one of the reference environment may write more."""
    code = ("import json; from transformers import AwqConfig, Qwen2Config, GenerationConfig\n"
            "extra = {'rope_scaling': {'rope_type': 'dynamic', 'factor': 2.0}, 'attn_implementation': 'eager'}\n"
            "print(json.dumps([list(Qwen2Config(**extra).to_dict()), list(AwqConfig().to_dict()),\n"
            "                  list(GenerationConfig._get_default_generation_params())]))")
    done = subprocess.run([REFERENCE / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    llm, awq, generation = json.loads(done.stdout.splitlines()[-1])
    assert not set(llm + generation) - decided("llm_config").keys()
    assert not set(awq) - decided("quantization_config").keys()


REFUSED = [(part, key, values[0][0]) for part, keys in c.REFUSED.items() for key, values in keys.items()]


@pytest.mark.parametrize("part, key, neutral", REFUSED)
def test_refused_keys_are_taken_with_the_value_that_changes_nothing(copy, part, key, neutral):
    want = c.Config.load(copy)
    for value, good in ((neutral, True), ("something else", False)):
        for where in [part] if part != "every part" else ["config.json", "vision_config", "llm_config"]:
            data = json.loads((copy / "config.json").read_text())
            target = {"config.json": data, "quantization_config": data["llm_config"]["quantization_config"]}.get(
                where) or data[where]
            target[key] = value
            if good:
                assert c.Config.from_json(data) == want
            else:
                with pytest.raises(c.InputError, match=f"{where}: {key} is 'something else', not .*: "):
                    c.Config.from_json(data)


@pytest.mark.parametrize("part, key", [("config.json", "my_notes"), ("vision_config", "augmentation"),
                                       ("llm_config", "wandb_run"), ("llm_config", "num_experts")])
def test_keys_of_nobody_are_ignored(copy, part, key):
    def change(config):
        (config if part == "config.json" else config[part])[key] = {"anything": [1]}
    want = logits(copy)
    edit(copy, change)
    assert logits(copy).equal(want)


@pytest.mark.parametrize("part, key, wrong", [
    ("config.json", "max_dynamic_patch", "max_dynamic_patchs"), ("config.json", "use_thumbnail", "use-thumbnail"),
    ("config.json", "force_image_size", "Force_Image_Size"), ("vision_config", "norm_type", "norm_typ"),
    ("llm_config", "rope_theta", "rope_tetha"), ("llm_config", "rms_norm_eps", "rms_norm_epsilon"),
    ("quantization_config", "group_size", "groupsize")])
def test_misspelt_keys_are_named(copy, part, key, wrong):
    def change(config):
        target = {"config.json": config, "quantization_config": config["llm_config"]["quantization_config"]}.get(
            part) or config[part]
        target[wrong] = target.pop(key)
    edit(copy, change)
    refused(copy, f"{part} has {wrong!r} but no {key!r}")
