"""config.json in both layouts: what transformers' classes call each field, and what they have no field for.

Fields that only the original knows (template, max_dynamic_patch, ...) stand in the -hf file too: transformers keeps
keys it does not know, and writes them again when it saves. On the way back a key that is missing has the default of
transformers' class; one that would compute something else than the original can is refused.
Source: convert_internvl_weights_to_hf.py @015d3b27; configuration_internvl.py, configuration_qwen2.py,
configuration_llama.py of transformers 5.23.0 (rope_theta and rope_scaling: of 4.52.4, which 5.23.0 reads too).
"""
from minivl.config import Config, InternLM2Config
from minivl.limits import InputError

CLASS = "InternVLForConditionalGeneration"
VISION = {      # field of the original -> of InternVLVisionConfig
    "hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads", "num_channels": "num_channels", "patch_size": "patch_size",
    "image_size": "image_size", "layer_norm_eps": "layer_norm_eps", "hidden_act": "hidden_act",
    "norm_type": "norm_type", "qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm"}
TEXT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_theta", "max_position_embeddings")
# Both forms of RoPE's numbers, and what would be another attention: minivl.config compares them and refuses.
CHECKED = ("rope_scaling", "rope_parameters", "head_dim", "layer_types", "use_sliding_window", "partial_rotary_factor",
           "is_causal")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Fields of the original without one in transformers' classes; None: absent in the released files.
ONLY_OURS = {"force_image_size": None, "template": "internvl2_5", "min_dynamic_patch": 1, "max_dynamic_patch": 12,
             "use_thumbnail": True, "dynamic_image_size": True, "ps_version": "v2", "pad2square": False,
             "system_message": None}
VISION_DEFAULTS = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                   "num_channels": 3, "patch_size": 14, "image_size": 448, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
                   "norm_type": "layer_norm", "attention_bias": False, "use_qk_norm": False}
TEXT_DEFAULTS = {
    "qwen2": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6,
              "max_position_embeddings": 32768},
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "rms_norm_eps": 1e-6,
              "max_position_embeddings": 2048}}
DECODERS = {"qwen2": ("qwen2", "Qwen2ForCausalLM"), "llama": ("internlm2", "InternLM2ForCausalLM")}
# What the original has no choice about: field -> the values that mean it, where it is given at all.
FIXED = {
    "config.json": {"vision_feature_layer": (-1, [-1]), "vision_feature_select_strategy": ("default",),
                    "projector_hidden_act": ("gelu",)},
    "vision_config": {"use_mask_token": (False,), "use_absolute_position_embeddings": (True,),
                      "use_mean_pooling": (True,)},
    "text_config": {"mlp_bias": (False, None)}}


def hf_config(config: Config, data: dict, image_token_id: int, dtype: str) -> dict:
    """Make config.json of the -hf layout. data: the original's, parsed; config: the same, read.

    dtype: of the tensors, "bfloat16".
    """
    vision, llm = config.vision_config, config.llm_config
    if vision.qk_normalization and vision.layer_norm_eps != 1e-6:
        raise InputError(f"vision_config.layer_norm_eps is {vision.layer_norm_eps}, transformers' InternVL normalises "
                         "q and k with 1e-06 whatever config.json says; it would compute something else")
    kind = "llama" if isinstance(llm, InternLM2Config) else "qwen2"
    text = {field: getattr(llm, field) for field in TEXT}
    text |= {key: data["llm_config"][key] for key in TOKEN_IDS if key in data["llm_config"]}
    text |= {"architectures": ["LlamaForCausalLM" if kind == "llama" else "Qwen2ForCausalLM"], "model_type": kind,
             "rope_scaling": _dynamic(data["llm_config"]), "tie_word_embeddings": False, "torch_dtype": dtype}
    text |= ({"attention_bias": llm.bias, "mlp_bias": False} if kind == "llama" else {"use_sliding_window": False})
    ours = {key: getattr(config, key) for key in ONLY_OURS if getattr(config, key) is not None}
    return {
        "architectures": [CLASS], "model_type": "internvl", "downsample_ratio": config.downsample_ratio,
        "image_seq_length": config.num_image_token, "image_token_id": image_token_id, "projector_hidden_act": "gelu",
        "tie_word_embeddings": False, "torch_dtype": dtype, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default", "text_config": text, **ours,
        "vision_config": {
            "architectures": ["InternVLVisionModel"], "model_type": "internvl_vision", "torch_dtype": dtype,
            "use_absolute_position_embeddings": True, "use_mask_token": False, "use_mean_pooling": True,
            **{theirs: getattr(vision, field) for field, theirs in VISION.items()},
            "image_size": [vision.image_size] * 2, "patch_size": [vision.patch_size] * 2}}


def original_config(data: dict, processor: dict, dtype: str) -> dict:
    """Make the original's config.json. data: that of the -hf layout, processor: its image processor's, both parsed.

    What is not said of the tiles is as in the released files. minivl.config.Config reads the result.
    """
    for part in ("text_config", "vision_config"):
        if not isinstance(data.get(part), dict):
            raise InputError(f"config.json has no {part}, which that of an -hf checkpoint has; take the config.json "
                             "that belongs to these weights")
    text, vision = data["text_config"], data["vision_config"]
    kind = text.get("model_type", "qwen2")
    if kind not in DECODERS:
        raise InputError(f"text_config.model_type is {str(kind)[:40]!r}; the original layout that minivl reads has "
                         "Qwen2 (qwen2) and InternLM2 (llama) as language models")
    for where, part in (("config.json", data), ("vision_config", vision), ("text_config", text)):
        _refuse_other_values(where, part)
    text, vision = TEXT_DEFAULTS[kind] | text, VISION_DEFAULTS | vision
    for key in ("image_size", "patch_size"):
        vision[key] = _side(f"vision_config.{key}", vision[key])
    model_type, architecture = DECODERS[kind]
    llm = {key: text[key] for key in (*TEXT, *CHECKED, *TOKEN_IDS) if key in text}
    llm |= {"architectures": [architecture], "model_type": model_type, "tie_word_embeddings": False,
            "torch_dtype": dtype, "use_cache": True}
    if kind == "llama":
        llm["bias"] = text.get("attention_bias", False)
    size = processor.get("size")
    ours = ONLY_OURS | {
        "force_image_size": vision["image_size"] if size is None else _side("the processor's size", size),
        **{key: processor[given] for key, given in (("min_dynamic_patch", "min_patches"),
                                                    ("max_dynamic_patch", "max_patches")) if given in processor}}
    ours |= {key: data[key] for key in ONLY_OURS if key in data}
    made = {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "select_layer": -1,
        "downsample_ratio": data.get("downsample_ratio", 0.5), "tie_word_embeddings": False, "torch_dtype": dtype,
        "use_backbone_lora": 0, "use_llm_lora": 0, **{key: value for key, value in ours.items() if value is not None},
        "llm_config": llm,
        "vision_config": {
            "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b",      # of both towers
            "torch_dtype": dtype, **{field: vision[theirs] for field, theirs in VISION.items()}}}
    read = Config.from_json(made).llm_config        # refuses what it does not know
    for key in CHECKED:
        llm.pop(key, None)
    scaling = _dynamic(text)
    llm |= {**{field: getattr(read, field) for field in TEXT},
            "rope_scaling": scaling and {"type": scaling["rope_type"], "factor": scaling["factor"]}}
    return made


def _dynamic(llm: dict) -> dict | None:
    """Find the scaling of RoPE beyond max_position_embeddings, the only one that minivl.config lets pass."""
    for key in ("rope_scaling", "rope_parameters"):
        block = llm.get(key) or {}
        if "dynamic" in (block.get("type"), block.get("rope_type")):
            return {"rope_type": "dynamic", "factor": float(block["factor"])}
    return None


def _refuse_other_values(where: str, part: dict):
    """Refuse what the original has no field for, where it is not what the original does."""
    for key, neutral in FIXED[where].items():
        if key in part and part[key] not in neutral:
            raise InputError(f"{key} of {where} is {str(part[key])[:80]!r}; the original layout knows only "
                             f"{neutral[0]!r}, so this model cannot be written in it")
    if isinstance(part.get("quantization_config"), dict):
        raise InputError(f"{where} has a quantization_config; only float weights have the same numbers in both "
                         "layouts, take the float checkpoint")


def _side(what: str, value) -> int:
    """Read the side of a square, as transformers writes it: 448, [448, 448], {"height": 448, "width": 448}."""
    sides = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if len(set(map(str, sides))) != 1 or type(sides[0]) is not int:
        raise InputError(f"{what} is {str(value)[:80]!r}; the original has square tiles and patches, give one whole "
                         "number of pixels")
    return sides[0]
