"""The released family: seven sizes of InternVL2.5, each plain and MPO, five of them in int4 too; their short names.

Sources: the model card and InternVL's documentation for the names; for the shapes MindSpeed-MM, examples/internvl2.5,
PaddleMIX, and the decoders' own config.json.
"""
from __future__ import annotations

import difflib
from dataclasses import dataclass

# What differs between the sizes, in the words of config.json: vision_config and llm_config.
TOWERS = {
    "300M": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
             "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False, "image_size": 448},
    "6B": {"hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 45, "num_attention_heads": 25,
           "norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True, "image_size": 448}}


def qwen2(name: str, hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int,
          vocab_size: int = 151674) -> dict:
    """Describe a Qwen2 decoder: what its llm_config says that others' do not."""
    return {"_name_or_path": name, "hidden_size": hidden_size, "intermediate_size": intermediate_size,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "vocab_size": vocab_size, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def internlm2(name: str, hidden_size: int, intermediate_size: int, layers: int, heads: int, theta: float = 1e6,
              factor: float = 2.0, kv_heads: int = 8, vocab_size: int = 92553) -> dict:
    """Describe an InternLM2 decoder: what its llm_config says that others' do not."""
    return {"_name_or_path": name, "hidden_size": hidden_size, "intermediate_size": intermediate_size,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "vocab_size": vocab_size, "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2",
            "rope_theta": theta, "rope_scaling": {"factor": factor, "type": "dynamic"}, "bias": False,
            "rms_norm_eps": 1e-05, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


SIZES = {   # tower, llm_config
    "1B": ("300M", qwen2("Qwen/Qwen2.5-0.5B-Instruct", 896, 4864, 24, 14, 2)),
    "2B": ("300M", internlm2("internlm/internlm2_5-1_8b-chat", 2048, 8192, 24, 16)),
    "4B": ("300M", qwen2("Qwen/Qwen2.5-3B-Instruct", 2048, 11008, 36, 16, 2)),
    "8B": ("300M", internlm2("internlm/internlm2_5-7b-chat", 4096, 14336, 32, 32)),
    "26B": ("6B", internlm2("internlm/internlm2_5-20b-chat", 6144, 16384, 48, 48, theta=5e7, factor=2.5)),
    "38B": ("6B", qwen2("Qwen/Qwen2.5-32B-Instruct", 5120, 27648, 64, 40, 8)),
    "78B": ("6B", qwen2("Qwen/Qwen2.5-72B-Instruct", 8192, 29568, 80, 64, 8))}
IN_INT4 = ("4B", "8B", "26B", "38B", "78B")     # released as -AWQ, plain and MPO


@dataclass(frozen=True)
class Variant:
    """One released model."""
    size: str
    mpo: bool       # tuned by Mixed Preference Optimization
    awq: bool       # the decoder's linears in int4

    @property
    def name(self) -> str:
        """Give the short name: 4b-mpo-awq."""
        return self.size.lower() + "-mpo" * self.mpo + "-awq" * self.awq

    @property
    def hub_id(self) -> str:
        """Give the repository on the hub: OpenGVLab/InternVL2_5-4B-MPO-AWQ."""
        return f"OpenGVLab/InternVL2_5-{self.size}" + "-MPO" * self.mpo + "-AWQ" * self.awq


VARIANTS = {one.name: one for size in SIZES for awq in (False, True) if not awq or size in IN_INT4
            for one in (Variant(size, False, awq), Variant(size, True, awq))}


def hint(name: str, others: tuple = ()) -> str:
    """Say what may be meant by a name that is none: the nearest short name, or of `others`; "" if none is near."""
    if "/" in name:         # a path, whose last part says nothing of the whole
        return ""
    name = name.lower()
    size, *rest = name.removeprefix("internvl2_5-").split("-")
    if size.upper() in SIZES and size.upper() not in IN_INT4 and rest in (["awq"], ["mpo", "awq"]):
        return (f"the {size.upper()} is not released in int4, only {', '.join(IN_INT4[:-1])} and {IN_INT4[-1]} are; "
                f"take {'-'.join([size, *rest[:-1]])}, or make one of it with python -m weights_tools.quantize")
    spelled = {**{name: name for name in (*VARIANTS, *others)},
               **{one.hub_id.rpartition("/")[2].lower(): one.name for one in VARIANTS.values()}}
    near = difflib.get_close_matches(name, spelled, 1)
    return f"is {spelled[near[0]]} meant?" if near else ""
