"""Read config.json into frozen dataclasses, as released, re-saved or fine-tuned: fields are the released keys.

Every key of the original classes is decided on here. A key that changes what is computed is a field, and an unknown
value of it raises; or it stands in REFUSED, with the values that change nothing; or in WITHOUT_EFFECT, with the reason.
A missing key has the original class's default, as in the original: `save_pretrained` leaves out what equals it. Those
defaults describe InternViT-6B and Qwen2-7B; where they do not fit the tensors, `load` says so.
Source: InternVL configuration_internvl_chat.py, configuration_intern_vit.py @2410d1d; transformers 4.37.2 to 5.23.0,
configuration_utils.py, configuration_qwen2.py, modeling_rope_utils.py, quantization_config.py.
"""
from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from minivl.limits import InputError, clip, first_of, is_there, reading

# Bytes of a JSON or text file; the largest released one, tokenizer.json, has 11 MB. Python makes 34 of each, at worst.
MAX_TEXT = 24 * 2 ** 20
# What a model may need. The largest released, the 78B: 7.8e10 parameters, 80 layers, 32768 positions; its tower's tile:
# 1024 patches, 172 MB of activations. Each bound leaves room for ten times that, but 3 times the layers.
MOST_PARAMETERS = 10 ** 12
MOST_LAYERS = 256           # of the tower, and of the decoder; building one takes milliseconds
MOST_POSITIONS = 2 ** 22
MOST_PATCHES = 2 ** 14      # of a tile
MOST_TILE_BYTES = 2 * 2 ** 30
MOST_TILES = 1000           # of a picture
MOST_KEYS = 1000            # of a part of config.json; the original classes have some hundred
LFS = "version https://git-lfs.github.com/spec/"    # how the pointer begins that git leaves without its lfs extension


@dataclass(frozen=True)
class VisionConfig:
    """Describe the vision tower, InternViT: `vision_config`."""
    hidden_size: int = 3200         # C
    intermediate_size: int = 12800
    num_hidden_layers: int = 48
    num_attention_heads: int = 25
    num_channels: int = 3
    patch_size: int = 14            # pixels
    image_size: int = 224           # pixels; the grid of position_embedding is (image_size / patch_size)^2
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"        # which is the exact erf form
    norm_type: str = "rms_norm"     # "layer_norm" (300M) | "rms_norm" (6B)
    qkv_bias: bool = False          # 300M true, 6B false
    qk_normalization: bool = True   # 300M false, 6B true

    @classmethod
    def from_json(cls, data: dict) -> VisionConfig:
        """Read the parsed `vision_config`. Raises InputError for values that minivl does not know."""
        _refuse_keys(cls, data, "vision_config")
        config = _build(cls, data, "vision_config")
        _choose("vision_config.hidden_act", config.hidden_act, ["gelu"])
        _choose("vision_config.norm_type", config.norm_type, ["layer_norm", "rms_norm"])
        _divides("vision_config", data, hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads)
        _divides("vision_config", data, image_size=config.image_size, patch_size=config.patch_size)
        _choose("vision_config.num_channels", config.num_channels, [3])
        return config


@dataclass(frozen=True)
class LLMConfig:
    """Describe the Qwen2 decoder: `llm_config`. For an InternLM2 decoder see InternLM2Config.

    `tie_word_embeddings` is not read: the original sets it to false, the whole family stores an untied head.
    """
    architectures: tuple
    vocab_size: int = 151936        # V
    hidden_size: int = 4096         # D
    intermediate_size: int = 22016  # F
    num_hidden_layers: int = 32
    num_attention_heads: int = 32   # H
    num_key_value_heads: int = 32   # K
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0     # 1e6 in every released file
    max_position_embeddings: int = 32768    # tokens

    @classmethod
    def from_json(cls, data: dict) -> LLMConfig:
        """Read the parsed `llm_config`. Raises InputError for values that minivl does not know."""
        named = data.get("architectures")
        kind = named[0] if isinstance(named, list) and named else named
        if isinstance(kind, str) and kind in OTHER_DECODERS:
            raise InputError(f"llm_config.architectures is {kind} ({OTHER_DECODERS[kind]}), which minivl cannot "
                             "run; the seven sizes of InternVL2.5, 1B to 78B, work")
        _choose("llm_config.architectures[0]", kind, [*DECODERS])
        cls = DECODERS[kind]
        _refuse_keys(cls, data, "llm_config")
        positions = data.get("max_position_embeddings", cls.max_position_embeddings)
        theta, scaling = _rope(data, positions, cls.rope_theta)
        data = {**data, "rope_theta": theta, "rope_scaling": scaling}
        if data.get("num_key_value_heads", 0) is None:      # every head has keys of its own
            data["num_key_value_heads"] = data.get("num_attention_heads", cls.num_attention_heads)
        config = _build(cls, data, "llm_config")
        _choose("llm_config.hidden_act", config.hidden_act, ["silu"])
        _divides("llm_config", data, hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads)
        _divides("llm_config", data, num_attention_heads=config.num_attention_heads,
                 num_key_value_heads=config.num_key_value_heads)
        head_dim = config.hidden_size // config.num_attention_heads
        _choose("llm_config.head_dim", data.get("head_dim"), [None, head_dim])
        if head_dim % 2:
            raise InputError(f"llm_config: head dim {config.hidden_size} / {config.num_attention_heads} is odd, RoPE "
                             "rotates pairs; correct hidden_size or num_attention_heads")
        layers = data.get("layer_types")
        if layers is not None and layers != ["full_attention"] * config.num_hidden_layers:
            raise InputError(f"llm_config.layer_types is {_shown(layers)}; minivl knows {config.num_hidden_layers} "
                             "times 'full_attention', every token attending to all before it")
        return config


@dataclass(frozen=True)
class InternLM2Config(LLMConfig):
    """Describe the InternLM2 decoder: what Qwen2's has, with the defaults of its own class, and two more."""
    vocab_size: int = 103168
    intermediate_size: int = 11008
    max_position_embeddings: int = 2048     # 32768 in the released files: beyond it, rope_scaling acts
    bias: bool = True               # of wqkv and wo; false in the released files
    rope_scaling: dict | None = None    # {"type": "dynamic", "factor": 2.0}, 2.5 in the 26B; None: plain RoPE


DECODERS = {"Qwen2ForCausalLM": LLMConfig, "InternLM2ForCausalLM": InternLM2Config}    # architectures[0] -> its config


@dataclass(frozen=True)
class QuantizationConfig:
    """Describe AWQ int4, always of the decoder's linears: `quantization_config`, wherever in the file it stands."""
    bits: int = 4
    group_size: int = 128           # g, input features that share a scale and a zero point
    version: str = "gemm"           # the packing drawn in awq.py
    zero_point: bool = True

    @classmethod
    def from_json(cls, data: dict) -> QuantizationConfig:
        """Read the parsed `quantization_config`. Raises InputError for anything but the released int4 format."""
        data = dict(data)
        for key, other in (("bits", "w_bit"), ("group_size", "q_group_size"), ("version", "format")):   # AutoAWQ's
            if other in data and str(data.setdefault(key, data[other])).lower() != str(data[other]).lower():
                raise InputError(f"quantization_config has {key} {_shown(data[key])} and {other} "
                                 f"{_shown(data[other])}, two names of one thing; keep the one that fits the tensors")
        if isinstance(data.get("version"), str):
            data["version"] = data["version"].lower()       # AutoAWQ writes GEMM
        method = data.get("quant_method", "awq" if "w_bit" in data else None)
        if method != "awq":
            raise InputError(f"quantization_config.quant_method is {method!r}; minivl knows 'awq'. Take the float "
                             "checkpoint it was made from, or its AWQ version; python -m weights_tools.quantize makes "
                             "one")
        _refuse_keys(cls, data, "quantization_config")
        config = _build(cls, data, "quantization_config")
        _choose("quantization_config.bits", config.bits, [4])
        _choose("quantization_config.version", config.version, ["gemm"])
        _choose("quantization_config.zero_point", config.zero_point, [True])
        if config.group_size < 1:
            raise InputError(f"quantization_config.group_size is {config.group_size}, it must be 1 or more; the "
                             "released files have 128")
        listed = data.get("modules_to_not_convert") or []
        kept = [name for name in (listed if isinstance(listed, list) else [listed])
                if not any(part in str(name) for part in ("vision", "mlp1", "lm_head", "embed", "norm"))]
        if kept:   # the vision tower and the head are never int4 in this family; anything else would be a new format
            raise InputError(f"quantization_config.modules_to_not_convert keeps {_shown(kept)} in float; minivl "
                             "expects every linear of every decoder layer in int4, as the released AWQ files have it")
        return config


@dataclass(frozen=True)
class Config:
    """Describe the whole model: the top level of config.json."""
    vision_config: VisionConfig
    llm_config: LLMConfig
    quantization_config: QuantizationConfig | None
    force_image_size: int           # pixels, side of a tile; left out: vision_config.image_size
    template: str                   # "internvl2_5"
    downsample_ratio: float = 0.5   # pixel unshuffle: 2x2 patches become one visual token
    min_dynamic_patch: int = 1      # fewest and most tiles of a picture, thumbnail not counted
    max_dynamic_patch: int = 6      # 12 in the released files
    use_thumbnail: bool = False     # true in the released files, like the next
    dynamic_image_size: bool = False
    ps_version: str = "v1"          # "v2"; v1 is another model
    select_layer: int = -1          # features are the last layer's output
    pad2square: bool = False
    system_message: str | None = None   # absent in released files; replaces the template's system text

    @property
    def num_image_token(self) -> int:
        """Count the visual tokens of one tile: (448 / 14)^2 * 0.5^2 = 256."""
        return int((self.force_image_size // self.vision_config.patch_size) ** 2 * self.downsample_ratio ** 2)

    @classmethod
    def from_json(cls, data: dict) -> Config:
        """Read the parsed config.json. Raises InputError for what minivl does not know."""
        _refuse_other_models(data)
        _refuse_keys(cls, data, "config.json")
        vision = VisionConfig.from_json(data["vision_config"])
        llm = LLMConfig.from_json(data["llm_config"])
        quantized = [QuantizationConfig.from_json(block) for block in _quantization_blocks(data)]
        if any(other != quantized[0] for other in quantized):
            raise InputError("config.json has quantization blocks that differ: "
                             f"{first_of([str(block) for block in quantized], ' and ')}; "
                             "keep the one that fits the tensors")
        side = data.get("force_image_size")
        config = _build(cls, {**data, "force_image_size": vision.image_size if side is None else side}, "config.json",
                        vision_config=vision, llm_config=llm,
                        quantization_config=quantized[0] if quantized else None)
        _choose("template", config.template, ["internvl2_5"])
        _choose("ps_version" + ("" if "ps_version" in data else " (left out, so the original class's default)"),
                config.ps_version, ["v2"])
        _choose("select_layer", config.select_layer, [-1])
        _choose("pad2square", config.pad2square, [False])
        _choose("downsample_ratio", config.downsample_ratio, [0.5])
        _divides("config.json", {**data["vision_config"], "force_image_size": 0},
                 force_image_size=config.force_image_size, patch_size=config.vision_config.patch_size)
        if config.force_image_size // config.vision_config.patch_size % 2:
            raise InputError(f"force_image_size {config.force_image_size} / patch_size "
                             f"{config.vision_config.patch_size} is an odd number of patches; pixel unshuffle "
                             "needs an even one")
        if config.quantization_config:
            group = config.quantization_config.group_size
            given = {**data["llm_config"], "group_size": group}
            _divides("config.json", given, hidden_size=llm.hidden_size, group_size=group)
            _divides("config.json", given, intermediate_size=llm.intermediate_size, group_size=group)
        if not 1 <= config.min_dynamic_patch <= config.max_dynamic_patch:
            raise InputError(f"min_dynamic_patch {config.min_dynamic_patch} and max_dynamic_patch "
                             f"{config.max_dynamic_patch} must satisfy 1 <= min <= max")
        _bound(config)
        return config

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Config:
        """Read config.json of a checkpoint folder."""
        data = read_json(Path(folder) / "config.json")
        try:
            return cls.from_json(data)
        except RecursionError:
            raise InputError(f"config.json in {folder} holds a value so deep in lists or objects that it cannot be "
                             "compared; take it out") from None


# ---- models that are not this one -----------------------------------------------------------------------------------

OTHER_DECODERS = {
    "InternLM3ForCausalLM": "InternVL3-9B",
    "Qwen3ForCausalLM": "InternVL3.5", "Qwen3MoeForCausalLM": "InternVL3.5", "GptOssForCausalLM": "InternVL3.5",
    "LlamaForCausalLM": "InternVL 1 and InternVL2-40B", "Phi3ForCausalLM": "InternVL 1.5 and InternVL2-4B"}
OTHER_MODELS = {        # model_type: what it is; the next step
    "internvl": ("the form of InternVL that transformers converts (-hf on the hub), whose tensors have other names",
                 "convert it back with python -m weights_tools.convert FOLDER OUT, or take the same model without -hf "
                 "in its name"),
    "qwen2": ("a Qwen2 language model without a vision tower", "give the whole InternVL2.5 model it belongs to"),
    "internlm2": ("an InternLM2 language model without a vision tower", "give the whole InternVL2.5 model"),
    "intern_vit_6b": ("an InternViT vision tower without a language model", "give the whole InternVL2.5 model")}
OTHER_FAMILY = ("a model of another family", "minivl runs InternVL2.5 and InternVL3 with Qwen2; use transformers here")


def _refuse_other_models(data: dict) -> None:
    """Say what a config.json describes that is not that of an InternVL chat model."""
    kind = data.get("model_type")
    if "InternVLForConditionalGeneration" in str(data.get("architectures")):
        kind = "internvl"
    if kind not in (None, "internvl_chat"):
        what, step = OTHER_MODELS.get(kind, OTHER_FAMILY) if isinstance(kind, str) else OTHER_FAMILY
        raise InputError(f"config.json has the model_type {_shown(kind)}, {what}, not 'internvl_chat'; {step}")
    for part in ("vision_config", "llm_config"):
        if not isinstance(data.get(part), dict):
            raise InputError(f"config.json has no {part}; it must be the config of an InternVL chat model "
                             f"(found model_type {_shown(kind)})")


# ---- every other key of the original classes ------------------------------------------------------------------------
# tests/test_config_keys.py lists the keys of the classes and fails for one that nobody decided on. A key that stands
# nowhere here is nobody's, a note of who made the checkpoint, and ignored as in the original; but one that looks like a
# field which is missing is misspelt, and would silently leave that field at its default.

ALSO_READ = {       # not kept as fields
    "config.json": "model_type quantization_config vision_config llm_config",
    "llm_config": "quantization_config rope_parameters rope_scaling head_dim layer_types "
                  "eos_token_id",       # by minivl.load
    "quantization_config": "quant_method w_bit q_group_size format modules_to_not_convert"}

LORA = "the weights hold LoRA adapters beside the model; merge them first with InternVL's tools/merge_lora.py"
CHOOSES = ("generate() of the original chooses other tokens by it; take it out of config.json and, where "
           "minivl.GenerationConfig has it, give it there")
REFUSED = {     # key: (the values that change nothing, what any other one means)
    "every part": {
        "pruned_heads": (({}, None), "heads are cut out of the attention, which minivl does not do"),
        "per_layer_config": (({}, None), "layers differ in shape, which minivl does not do"),
        "is_encoder_decoder": ((False, None), "minivl has a decoder only"),
        "add_cross_attention": ((False, None), "minivl has no cross-attention"),
        "transformers_weights": ((None,), "it names another weight file; rename that file and take the key out")},
    "config.json": {
        "architectures": ((["InternVLChatModel"], None), "another class computes something else with these tensors"),
        "use_llm_lora": ((0, None), LORA), "use_backbone_lora": ((0, None), LORA),
        "image_fold": ((None,), "the pictures are cut as in InternVL 1.2, which minivl does not do")},
    "llm_config": {
        "use_sliding_window": ((False, None), "a token would not see all before it; minivl has no such window"),
        "is_causal": ((True,), "a token would see those after it (transformers 5 takes null for false); minivl's "
                      "decoder has a causal mask"),
        "rope_pos_id_version": (("default", None), "visual tokens have positions of their own (V2PE), not in minivl"),
        "partial_rotary_factor": ((1, None), "RoPE turns a part of each head only; minivl turns all of it"),
        "min_length": ((0, None), CHOOSES), "min_new_tokens": ((0, None), CHOOSES),
        "num_beams": ((1, None), CHOOSES), "num_beam_groups": ((1, None), CHOOSES),
        "repetition_penalty": ((1, None), CHOOSES), "encoder_repetition_penalty": ((1, None), CHOOSES),
        "no_repeat_ngram_size": ((0, None), CHOOSES), "encoder_no_repeat_ngram_size": ((0, None), CHOOSES),
        "bad_words_ids": ((None, []), CHOOSES), "sequence_bias": ((None, {}), CHOOSES),
        "suppress_tokens": ((None, []), CHOOSES), "begin_suppress_tokens": ((None, []), CHOOSES),
        "forced_bos_token_id": ((None,), CHOOSES), "forced_eos_token_id": ((None,), CHOOSES),
        "forced_decoder_ids": ((None,), CHOOSES), "exponential_decay_length_penalty": ((None,), CHOOSES),
        "guidance_scale": ((1, None), CHOOSES), "penalty_alpha": ((0, None), CHOOSES)},
    "quantization_config": {
        "backend": (("auto", "autoawq", "legacy_awq", "gemm", "gemm_triton", "gemm_torch", "torch_awq", "marlin",
                     "exllama_v1", "exllama_v2", "machete", None), "llm-awq packs the words in another order"),
        "lm_head": ((False, None), "the head is int4 too; in the released files it is float"),
        "modules_in_block_to_quantize": ((None,), "some linears are float; minivl expects all of a layer in int4")}}

WITHOUT_EFFECT = {      # why: keys
    "names, notes and versions":
        "_name_or_path name_or_path _commit_hash transformers_version auto_map model_type architectures "
        "tokenizer_class prefix finetuning_task task_specific_params problem_type id2label label2id num_labels "
        "xla_device hidden_size",      # of the top level: a copy of llm_config's
    "the head's tensor is stored, and read":
        "tie_word_embeddings",
    "the loader chooses the dtype":
        "torch_dtype dtype use_bfloat16 fp16 bf16",
    "training only":
        "attention_dropout dropout drop_path_rate initializer_range initializer_factor gradient_checkpointing "
        "tf_legacy_loss",
    "which kernel computes the same, in which pieces, on which devices":
        "use_flash_attn attn_implementation _attn_implementation _attn_implementation_autoset "
        "_attn_implementation_internal experts_implementation _experts_implementation "
        "_experts_implementation_internal chunk_size_feed_forward torchscript base_model_tp_plan base_model_pp_plan "
        "base_model_ep_plan base_model_fsdp_plan",
    "the form of what the original returns":
        "return_dict output_hidden_states output_attentions output_scores return_dict_in_generate "
        "tie_last_hidden_states",
    "the cache changes nothing but the time":
        "use_cache cache_implementation",
    "only of models with an encoder":
        "is_decoder cross_attention_hidden_size tie_encoder_decoder decoder_start_token_id",
    "the template writes these tokens":
        "bos_token_id pad_token_id sep_token_id eos_token_id",     # llm_config's eos_token_id is read
    "only where use_sliding_window is true":
        "sliding_window max_window_layers",
    "only beside rope_pos_id_version":
        "rope_pos_id_stride",
    "minivl.GenerationConfig has these, or only sampling and beams use them":
        "max_length max_new_tokens num_return_sequences do_sample temperature top_k top_p min_p typical_p "
        "epsilon_cutoff eta_cutoff early_stopping length_penalty diversity_penalty remove_invalid_values "
        "renormalize_logits num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold "
        "assistant_lookbehind target_lookbehind",
    "how the weights were quantized, and which kernel multiplies":
        "do_fuse modules_to_fuse fuse_max_seq_len exllama_config tokenizer dataset damp_percent desc_act "
        "act_group_aware sym true_sequential meta model_seqlen block_name_to_quantize "
        "module_name_preceding_first_block batch_size max_input_length cache_block_outputs checkpoint_format"}


def _refuse_keys(cls: type, data: dict, where: str) -> None:
    """Refuse a key of REFUSED that changes what is computed, and a misspelt key of `cls`."""
    if len(data) > MOST_KEYS:
        raise InputError(f"{where} has {len(data)} keys, the limit is {MOST_KEYS}; it is not a released config.json, "
                         "download it again")
    for key, (neutral, why) in {**REFUSED["every part"], **REFUSED.get(where, {})}.items():
        if key in data and data[key] not in neutral:
            raise InputError(f"{where}: {key} is {_shown(data[key])}, not {neutral[0]!r}: {why}")
    missing = [field.name for field in fields(cls) if field.name not in data]
    for key in sorted(key for key in data.keys() - known_keys(where) if len(key) < 100):
        for meant in difflib.get_close_matches(key.lower(), missing, 1, 0.85):
            raise InputError(f"{where} has {key!r} but no {meant!r}; rename it if it is misspelt, else give both")


def known_keys(where: str) -> set[str]:
    """List the keys of a part ("config.json", "vision_config", ...) that are read, refused or without effect."""
    elsewhere = " ".join([*WITHOUT_EFFECT.values(), *(" ".join(part) for part in REFUSED.values())])
    return {field.name for field in fields(PARTS[where])} | set((elsewhere + " " + ALSO_READ.get(where, "")).split())


def left_out(data: dict) -> dict[str, object]:
    """List the keys that a parsed config.json leaves out, as "vision_config.norm_type", with the defaults taken."""
    llm = data["llm_config"]
    classes = {**PARTS, "llm_config": DECODERS[llm["architectures"][0]]}
    parts = [("config.json", data), ("vision_config", data["vision_config"]), ("llm_config", llm),
             *(("quantization_config", block) for block in _quantization_blocks(data))]
    return {f"{part}.{field.name}": field.default for part, given in parts for field in fields(classes[part])
            if field.name not in given and field.default not in (MISSING, None)}


PARTS = {"config.json": Config, "vision_config": VisionConfig, "llm_config": InternLM2Config,     # has all of both
         "quantization_config": QuantizationConfig}


# ---- files ----------------------------------------------------------------------------------------------------------

def renamed(path: Path) -> str:
    """Say which file lies there in place of a missing one, as an editor, a browser or a copy names it; "": none."""
    stem, suffix = re.escape(path.stem), re.escape(path.suffix)
    names = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
    near = re.compile(rf"{stem}(?:[ _.-]*\(\d+\)|[ _-]+copy)?{suffix}(?:\.txt|\.json)?|{stem}", re.IGNORECASE)
    found = next((name for name in names if near.fullmatch(name) and name != path.name), None)
    return f"{found} is there: if it is meant, rename it to {path.name}" if found else ""


def read_text(path: Path) -> str:
    """Read a text file of the checkpoint. Raises an InputError that names the file."""
    if not is_there(path):
        raise InputError(f"{path.parent} has no {path.name}; {renamed(path) or 'is the download complete?'}")
    if path.stat().st_size > MAX_TEXT:
        raise InputError(f"{path.name} in {path.parent} has {path.stat().st_size} bytes, at most {MAX_TEXT} are read; "
                         "it is not the released file, download it again")
    try:
        with reading(path):
            text = path.read_text(encoding="utf-8-sig")     # an editor of Windows puts a byte order mark in front
    except UnicodeDecodeError:
        raise InputError(f"{path.name} in {path.parent} is not UTF-8 text; save it as UTF-8 or download it "
                         "again") from None
    if text.startswith(LFS):
        raise InputError(f"{path.name} in {path.parent} is a git-lfs pointer of {len(text)} bytes, not the file it "
                         "stands for; run `git lfs pull` in that folder, or download the file")
    return text


def read_json(path: Path) -> dict:
    """Read a JSON object of the checkpoint. Raises an InputError that names the file."""
    text = read_text(path)
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise InputError(f"{path.name} in {path.parent} holds a {type(data).__name__}, not an object; is it the "
                             "right file?")
        return data
    except (InputError, KeyboardInterrupt):
        raise
    except (ValueError, RecursionError) as error:       # ValueError: also a number of more than 4300 digits
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{path.name} in {path.parent} is not valid JSON{where}; correct it there, or download "
                         "it again") from None


def _rope(data: dict, positions: int, default: float) -> tuple[float, dict | None]:
    """Find RoPE's base in `llm_config`, and the scaling beyond `positions`. Refuses one that acts before them.

    transformers 5 writes rope_parameters, with rope_theta inside; before, rope_theta stood beside rope_scaling.
    """
    found, dynamic = {}, None
    for key in ("rope_parameters", "rope_scaling"):
        block = data.get(key) or {}
        if not isinstance(block, dict) or not _scales_nothing(block, positions):
            raise InputError(f"llm_config.{key} is {_shown(block)}; minivl computes plain RoPE and takes none, the "
                             f"type 'default', and 'dynamic', which changes nothing up to {positions} tokens. Another "
                             "scaling would change what the model computes")
        if "dynamic" in (block.get("type"), block.get("rope_type")):
            dynamic = {"type": "dynamic", "factor": float(block["factor"])}
        if block.get("rope_theta") is not None:
            found[f"{key}.rope_theta"] = block["rope_theta"]
    beside = data.get("rope_theta")
    # A version that does not know rope_parameters keeps them when it saves again, and writes its default beside them.
    if beside is not None and not (found and beside == default):
        found["rope_theta"] = beside
    first = next(iter(found.values()), default)
    if any(theta != first for theta in found.values()):
        raise InputError("llm_config has " + " and ".join(f"{key} {_shown(theta)}" for key, theta in found.items())
                         + "; keep the one the model was trained with, 1000000.0 in the released files")
    return first, dynamic


def _scales_nothing(block: dict, positions: int) -> bool:
    """Tell whether a rope_scaling leaves plain RoPE as it is, up to `positions` tokens."""
    kinds = {str(block[key]) for key in ("rope_type", "type") if block.get(key) is not None} or {"default"}
    rest = {key: value for key, value in block.items() if key not in ("rope_type", "type", "rope_theta")
            and not (value is None or key == "partial_rotary_factor" and value == 1)}
    factor = rest.pop("factor", None)
    if kinds == {"dynamic"}:        # dynamic NTK: the base grows with what is beyond max_position_embeddings
        rest = {key: value for key, value in rest.items()
                if key != "original_max_position_embeddings" or value != positions}
        return not rest and isinstance(factor, (int, float)) and factor >= 1
    return not rest and (kinds == {"default"} and factor is None or kinds == {"linear"} and factor == 1)


def _quantization_blocks(data: dict) -> list[dict]:
    """Find what describes quantized weights: LMDeploy writes it into llm_config, other tools at the top level."""
    found, todo = [], [("", data)]
    while todo:
        key, part = todo.pop()
        if isinstance(part, dict) and part and (key == "quantization_config" or "quant_method" in part):
            found.append(part)
        elif isinstance(part, dict):
            todo += part.items()
        elif isinstance(part, list):
            todo += (("", child) for child in part)
    return found


def _build(cls: type, data: dict, where: str, **ready: object):
    """Build `cls` from the keys of `data`, and report every wrong or missing key at once."""
    values = dict(ready)
    problems = []
    for field in fields(cls):
        if field.name in ready:
            continue
        if field.name not in data:
            if field.default is MISSING:
                problems.append(f"{field.name} is missing")
            continue
        value = data[field.name]
        kind = str(field.type).split(" ")[0]
        good = {"int": isinstance(value, int) and not isinstance(value, bool),
                "float": isinstance(value, (int, float)) and not isinstance(value, bool),
                "bool": isinstance(value, bool), "str": isinstance(value, str) or value == field.default,
                "tuple": isinstance(value, list), "dict": value is None or isinstance(value, dict)}[kind]
        if not good:
            problems.append(f"{field.name} is {_shown(value)}, it must be of type {kind}")
        elif kind == "int" and abs(value) > (MOST_LAYERS if "layers" in field.name else 2 ** 24) or (
                kind == "float" and not abs(value) < 2 ** 100):
            problems.append(f"{field.name} is {_shown(value)}, no model has such a number")
        elif kind in ("int", "float") and field.name not in ("select_layer", "group_size") and value <= 0:
            problems.append(f"{field.name} is {value!r}, it must be positive")
        values[field.name] = tuple(value) if kind == "tuple" and good else value
        if kind == "float" and good and not problems:
            values[field.name] = float(value)
    if problems:
        raise InputError(f"{where}: " + first_of(problems, "; ") + ". Compare with the released config.json")
    return cls(**values)


def _shown(value: object) -> str:
    """Show a value of a file in a message: its beginning, where it is long or deep."""
    if isinstance(value, int) and value.bit_length() > 200:     # Python refuses to write a very long number
        return f"a number of {value.bit_length()} bits"
    try:
        return clip(repr(value), 80)
    except RecursionError:
        return f"a deep {type(value).__name__}"


def _bound(config: Config) -> None:
    """Refuse a model whose sizes, each possible by itself, are together more than any machine has."""
    vision, llm = config.vision_config, config.llm_config
    C, D, F = vision.hidden_size, llm.hidden_size, vision.intermediate_size
    side = config.force_image_size // vision.patch_size
    patches = max(side, vision.image_size // vision.patch_size) ** 2
    _most("patches of a tile, (image_size or force_image_size / patch_size)^2", patches, MOST_PATCHES)
    # A layer keeps its input, the normed one, q, k, v and the attended; then its MLP's width before and after gelu.
    tile = 4 * (3 * config.force_image_size ** 2 + (side ** 2 + 1) * (6 * C + 2 * F))
    _most("bytes of one tile's activations", tile, MOST_TILE_BYTES)
    _most("visual tokens of one tile, beside max_position_embeddings,", config.num_image_token,
          llm.max_position_embeddings)
    _most("positions, max_position_embeddings,", llm.max_position_embeddings, MOST_POSITIONS)
    _most("tiles of a picture, max_dynamic_patch,", config.max_dynamic_patch, MOST_TILES)
    kv = D // llm.num_attention_heads * llm.num_key_value_heads
    parameters = (C * (3 * vision.patch_size ** 2 + patches) + vision.num_hidden_layers * C * (4 * C + 2 * F)
                  + 4 * C * D + D * D + 2 * llm.vocab_size * D
                  + llm.num_hidden_layers * D * (2 * D + 2 * kv + 3 * llm.intermediate_size))
    _most("parameters", parameters, MOST_PARAMETERS)


def _most(what: str, found: int, most: int) -> None:
    """Refuse a number above `most`."""
    if found > most:
        raise InputError(f"config.json describes a model of {found} {what} where the limit is {most}; correct its "
                         "sizes, compare with the released config.json")


def _choose(name: str, value: object, known: list) -> None:
    """Refuse a value that is none of the known ones."""
    if value not in known:
        raise InputError(f"{name} is {_shown(value)}; minivl knows {' and '.join(map(repr, known))}. A value it does "
                         "not know would change what the model computes")


def _divides(where: str, data: dict, **pair: int) -> None:
    """Refuse a pair big=..., small=... whose second number does not divide the first. `data`: the keys given."""
    (big, x), (small, y) = pair.items()
    if x % y:
        guessed = " and ".join(key for key in pair if key not in data)
        raise InputError(f"{where}: {small} {y} does not divide {big} {x}; "
                         + (f"{guessed} is left out, so it is the original class's default; write the model's own"
                            if guessed else "correct config.json"))
