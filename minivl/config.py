"""Read the released config.json into frozen dataclasses: field names are the released keys, only fields that are read.

A field that selects behaviour and holds an unknown value raises; so does a missing one, because the defaults of
the original config classes describe another model (InternViT-6B, ps_version v1) than the file at hand.
Source: InternVL configuration_internvl_chat.py, configuration_intern_vit.py @2410d1d.
"""
from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

from minivl.limits import InputError

MAX_TEXT = 64 * 2 ** 20     # bytes of a JSON or text file; the largest released one, tokenizer.json, has 11 MB


@dataclass(frozen=True)
class VisionConfig:
    """Describe the vision tower, InternViT: `vision_config`."""
    hidden_size: int                # C
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    patch_size: int                 # pixels
    image_size: int                 # pixels; the grid of position_embedding is (image_size / patch_size)^2
    layer_norm_eps: float
    hidden_act: str                 # "gelu", which is the exact erf form
    norm_type: str                  # "layer_norm" (300M) | "rms_norm" (6B)
    qkv_bias: bool                  # 300M true, 6B false
    qk_normalization: bool          # 300M false, 6B true

    @classmethod
    def from_json(cls, data: dict) -> VisionConfig:
        """Read the parsed `vision_config`. Raises InputError for missing keys and values that minivl does not know."""
        config = _build(cls, data, "vision_config")
        _choose("vision_config.hidden_act", config.hidden_act, ["gelu"])
        _choose("vision_config.norm_type", config.norm_type, ["layer_norm", "rms_norm"])
        _divides("vision_config", hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads)
        _divides("vision_config", image_size=config.image_size, patch_size=config.patch_size)
        return config


@dataclass(frozen=True)
class LLMConfig:
    """Describe the Qwen2 decoder: `llm_config`.

    `tie_word_embeddings` is not read: the whole family stores an untied head.
    """
    architectures: tuple
    vocab_size: int                 # V
    hidden_size: int                # D
    intermediate_size: int          # F
    num_hidden_layers: int
    num_attention_heads: int        # H
    num_key_value_heads: int        # K
    hidden_act: str                 # "silu"
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int    # tokens

    @classmethod
    def from_json(cls, data: dict) -> LLMConfig:
        """Read the parsed `llm_config`. Raises InputError for missing keys and values that minivl does not know."""
        named = data.get("architectures")
        kind = named[0] if isinstance(named, list) and named else named
        if kind == "InternLM2ForCausalLM":
            raise InputError("llm_config.architectures is InternLM2ForCausalLM (the 2B, 8B and 26B models), which "
                             "minivl cannot run yet; the Qwen2 sizes 1B, 4B, 38B and 78B work")
        _choose("llm_config.architectures[0]", kind, ["Qwen2ForCausalLM"])
        config = _build(cls, data, "llm_config")
        _choose("llm_config.hidden_act", config.hidden_act, ["silu"])
        _choose("llm_config.rope_scaling", data.get("rope_scaling"), [None])
        _choose("llm_config.use_sliding_window", data.get("use_sliding_window", False), [False])
        _divides("llm_config", hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads)
        _divides("llm_config", num_attention_heads=config.num_attention_heads,
                 num_key_value_heads=config.num_key_value_heads)
        if config.hidden_size // config.num_attention_heads % 2:
            raise InputError(f"llm_config: head dim {config.hidden_size} / {config.num_attention_heads} is odd, RoPE "
                             "rotates pairs; correct hidden_size or num_attention_heads")
        return config


@dataclass(frozen=True)
class QuantizationConfig:
    """Describe AWQ int4, always of the decoder's linears: `quantization_config`, wherever in the file it stands."""
    bits: int
    group_size: int                 # g, input features that share a scale and a zero point
    version: str                    # "gemm": the packing drawn in awq.py
    zero_point: bool

    @classmethod
    def from_json(cls, data: dict) -> QuantizationConfig:
        """Read the parsed `quantization_config`. Raises InputError for anything but the released int4 format."""
        _choose("quantization_config.quant_method", data.get("quant_method"), ["awq"])
        config = _build(cls, data, "quantization_config")
        _choose("quantization_config.bits", config.bits, [4])
        _choose("quantization_config.version", config.version.lower(), ["gemm"])
        _choose("quantization_config.zero_point", config.zero_point, [True])
        if config.group_size < 1:
            raise InputError(f"quantization_config.group_size is {config.group_size}, it must be 1 or more; the "
                             "released files have 128")
        listed = data.get("modules_to_not_convert") or []
        kept = [name for name in (listed if isinstance(listed, list) else [listed])
                if not any(part in str(name) for part in ("vision", "mlp1", "lm_head", "embed", "norm"))]
        if kept:   # the vision tower and the head are never int4 in this family; anything else would be a new format
            raise InputError(f"quantization_config.modules_to_not_convert keeps {kept} in float; minivl expects every "
                             "linear of every decoder layer in int4, as the released AWQ files have it")
        return config


@dataclass(frozen=True)
class Config:
    """Describe the whole model: the top level of config.json."""
    vision_config: VisionConfig
    llm_config: LLMConfig
    quantization_config: QuantizationConfig | None
    force_image_size: int           # pixels, side of a tile
    downsample_ratio: float         # pixel unshuffle: 0.5 = 2x2 patches become one visual token
    min_dynamic_patch: int          # fewest and most tiles of a picture, thumbnail not counted
    max_dynamic_patch: int
    use_thumbnail: bool
    dynamic_image_size: bool
    template: str                   # "internvl2_5"
    ps_version: str                 # "v2"
    select_layer: int               # -1: features are the last layer's output
    pad2square: bool
    system_message: str | None = None   # absent in released files; replaces the template's system text

    @property
    def num_image_token(self) -> int:
        """Count the visual tokens of one tile: (448 / 14)^2 * 0.5^2 = 256."""
        return int((self.force_image_size // self.vision_config.patch_size) ** 2 * self.downsample_ratio ** 2)

    @classmethod
    def from_json(cls, data: dict) -> Config:
        """Read the parsed config.json. Raises InputError for what minivl does not know."""
        for part in ("vision_config", "llm_config"):
            if not isinstance(data.get(part), dict):
                raise InputError(f"config.json has no {part}; it must be the config of an InternVL chat model "
                                 f"(found model_type {data.get('model_type')!r})")
        quantization = _find_quantization(data)
        config = _build(cls, data, "config.json",
                       vision_config=VisionConfig.from_json(data["vision_config"]),
                       llm_config=LLMConfig.from_json(data["llm_config"]),
                       quantization_config=quantization and QuantizationConfig.from_json(quantization))
        _choose("template", config.template, ["internvl2_5"])
        _choose("ps_version", config.ps_version, ["v2"])
        _choose("select_layer", config.select_layer, [-1])
        _choose("pad2square", config.pad2square, [False])
        _choose("downsample_ratio", config.downsample_ratio, [0.5])
        for key in ("use_backbone_lora", "use_llm_lora"):
            _choose(key, data.get(key, 0), [0])
        _divides("config.json", force_image_size=config.force_image_size, patch_size=config.vision_config.patch_size)
        if config.force_image_size // config.vision_config.patch_size % 2:
            raise InputError(f"force_image_size {config.force_image_size} / patch_size "
                             f"{config.vision_config.patch_size} is an odd number of patches; pixel unshuffle "
                             "needs an even one")
        if config.quantization_config:
            group = config.quantization_config.group_size
            llm = config.llm_config
            _divides("config.json", hidden_size=llm.hidden_size, group_size=group)
            _divides("config.json", intermediate_size=llm.intermediate_size, group_size=group)
        if not 1 <= config.min_dynamic_patch <= config.max_dynamic_patch:
            raise InputError(f"min_dynamic_patch {config.min_dynamic_patch} and max_dynamic_patch "
                             f"{config.max_dynamic_patch} must satisfy 1 <= min <= max")
        return config

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Config:
        """Read config.json of a checkpoint folder."""
        return cls.from_json(read_json(Path(folder) / "config.json"))


def read_text(path: Path) -> str:
    """Read a text file of the checkpoint. Raises an InputError that names the file."""
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}; is the download complete?")
    if path.stat().st_size > MAX_TEXT:
        raise InputError(f"{path.name} in {path.parent} has {path.stat().st_size} bytes, at most {MAX_TEXT} are read; "
                         "it is not the released file, download it again")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path.name} in {path.parent} is not UTF-8 text; download it again") from None


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
        raise InputError(f"{path.name} in {path.parent} is not valid JSON{where}; download it again") from None


def _find_quantization(data: object) -> dict | None:
    """Find the first dict with a `quant_method`: LMDeploy writes it into llm_config, other tools at the top level."""
    children = data.values() if isinstance(data, dict) else data if isinstance(data, list) else []
    if isinstance(data, dict) and "quant_method" in data:
        return data
    return next(filter(None, map(_find_quantization, children)), None)


def _build(cls: type, data: dict, where: str, **ready: object):
    """Build `cls` from the keys of `data`, and report every wrong or missing key at once."""
    values = dict(ready)
    problems = []
    for field in fields(cls):
        if field.name in ready:
            continue
        if field.name not in data:
            if field.default is None:
                continue
            problems.append(f"{field.name} is missing")
            continue
        value = data[field.name]
        kind = str(field.type).split(" ")[0]
        good = {"int": isinstance(value, int) and not isinstance(value, bool),
                "float": isinstance(value, (int, float)) and not isinstance(value, bool),
                "bool": isinstance(value, bool), "str": isinstance(value, str) or value == field.default,
                "tuple": isinstance(value, list)}[kind]
        if not good:
            problems.append(f"{field.name} is {value!r}, it must be of type {kind}")
        elif kind == "int" and abs(value) > (1000 if "layers" in field.name else 2 ** 24) or kind == "float" and not (
                abs(value) < 2 ** 100):
            problems.append(f"{field.name} is {str(value)[:30]}, no model has such a number")
        elif kind in ("int", "float") and field.name not in ("select_layer", "group_size") and value <= 0:
            problems.append(f"{field.name} is {value!r}, it must be positive")
        values[field.name] = tuple(value) if kind == "tuple" and good else value
        if kind == "float" and good and not problems:
            values[field.name] = float(value)
    if problems:
        raise InputError(f"{where}: " + "; ".join(problems) + ". Compare with the released config.json")
    return cls(**values)


def _choose(name: str, value: object, known: list) -> None:
    """Refuse a value that is none of the known ones."""
    if value not in known:
        raise InputError(f"{name} is {value!r}; minivl knows {' and '.join(map(repr, known))}. A value it does not "
                         "know would change what the model computes")


def _divides(where: str, **pair: int) -> None:
    """Refuse a pair big=..., small=... whose second number does not divide the first."""
    (big, x), (small, y) = pair.items()
    if x % y:
        raise InputError(f"{where}: {small} {y} does not divide {big} {x}; correct config.json")
