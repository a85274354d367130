"""What each tensor is called in both layouts, and how q, k and v lie in one tensor here and in three there.

    original                                        -hf
    vision_model.encoder.layers.0.norm1.weight      vision_tower.encoder.layer.0.layernorm_before.weight
    vision_model.encoder.layers.0.attn.qkv.weight   ...0.attention.{q,k,v}_proj.weight: thirds of the rows
    mlp1.1.weight                                   multi_modal_projector.linear_1.weight
    language_model.model.layers.0.attention.wqkv.weight  (InternLM2, there Llama)
                                                    ...0.self_attn.{q,k,v}_proj.weight: cut by heads

H heads, K of them with keys and values, G = H / K, E numbers each. wqkv has for each of the K first the E rows of its G
query heads, then those of its key, then of its value. A Qwen2 decoder has the same names in both.
Source: transformers convert_internvl_weights_to_hf.py @015d3b27 and modeling_internvl.py, conversion_mapping.py of
5.23.0; InternVL modeling_internlm2.py:311-365 @2410d1d.
"""
import re

import torch

from minivl.config import LLMConfig

# A piece of the original name -> what stands for it in -hf, replaced in this order. {} becomes q, k and v.
PIECES = (
    ("vision_model.embeddings.class_embedding", "vision_tower.embeddings.cls_token"),
    ("vision_model.embeddings.position_embedding", "vision_tower.embeddings.position_embeddings"),
    ("vision_model.embeddings.patch_embedding.", "vision_tower.embeddings.patch_embeddings.projection."),
    ("vision_model.encoder.layers.", "vision_tower.encoder.layer."),
    (".attn.qkv.", ".attention.{}_proj."), (".attn.proj.", ".attention.projection_layer."),
    (".attn.q_norm.", ".attention.q_norm."), (".attn.k_norm.", ".attention.k_norm."),
    (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."), (".ls1", ".lambda_1"), (".ls2", ".lambda_2"),
    ("mlp1.0.", "multi_modal_projector.layer_norm."), ("mlp1.1.", "multi_modal_projector.linear_1."),
    ("mlp1.3.", "multi_modal_projector.linear_2."),
    # InternLM2's alone
    ("language_model.model.tok_embeddings.", "language_model.model.embed_tokens."),
    ("language_model.output.", "language_model.lm_head."), (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."), (".attention.wqkv.", ".self_attn.{}_proj."),
    (".attention.wo.", ".self_attn.o_proj."), (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."), (".feed_forward.w2.", ".mlp.down_proj."))


def hf_names(name: str) -> list[str]:
    """Translate the name of an original tensor: one name, or the three of q, k and v."""
    for ours, theirs in PIECES:
        name = name.replace(ours, theirs)
    return [name.format(part) for part in "qkv"] if "{}" in name else [name]


def as_on_the_hub(name: str) -> str:
    """Give a tensor of an -hf checkpoint the name it has on the hub; transformers can also save its modules' own."""
    name = re.sub(r"^model\.(vision_tower|multi_modal_projector)\.", r"\1.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.",
                  re.sub(r"^model\.language_model\.", "language_model.model.", name))


def cut(fused: torch.Tensor, name: str, llm: LLMConfig) -> list[torch.Tensor]:
    """Cut a tensor with q, k and v, [rows, ...] by its original name, into the three."""
    if ".wqkv." not in name:
        return list(fused.chunk(3))
    K = llm.num_key_value_heads
    groups = fused.unflatten(0, (K, llm.num_attention_heads // K + 2, -1))          # (K, G + 2, E, ...)
    return [part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])]


def join(parts: list[torch.Tensor], name: str, llm: LLMConfig) -> torch.Tensor:
    """Put q, k and v together again: the inverse of `cut`."""
    if ".wqkv." not in name:
        return torch.cat(parts)
    K = llm.num_key_value_heads
    E = len(parts[1]) // K
    return torch.cat([part.unflatten(0, (K, -1, E)) for part in parts], 1).flatten(0, 2)
