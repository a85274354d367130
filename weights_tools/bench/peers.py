"""Other people's engines for weights_tools.bench, each with the methods of ours.Ours. Runs in a Python that has them.

llama.cpp gets a GGUF file of random Q4_0 numbers with the decoder's shapes: 4-bit numbers in groups of 32, the head in
Q6_K as its own quantiser leaves it. It has no vision tower here, and what it writes means nothing.

transformers gets the checkpoint's own int4 words, with the layers that gptqmodel chooses for this machine, everything
else in bfloat16 as those layers want it, and a vision tower of its own in float32.
"""
from __future__ import annotations

import getpass
import json
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from weights_tools.bench.timing import CONTEXT, median_step

ROOM = 2048             # tokens that there is room for


def start(engine: str, checkpoint):
    """Start the engine of this name, ready to be asked."""
    if engine == "llama.cpp":
        return LlamaCpp(gguf_file(checkpoint))
    if engine == "transformers":
        return Transformers(Path(checkpoint))
    raise ValueError(f"no engine called {engine}")


def gguf_file(checkpoint) -> Path:
    """Write random numbers in these shapes once, into the system's folder for temporary files, and return the path."""
    config = json.loads((Path(checkpoint) / "config.json").read_text())["llm_config"]
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv, layers = kv_size(config), config["num_hidden_layers"]
    path = Path(tempfile.gettempdir()) / f"minivl-bench-{getpass.getuser()}" / f"q4_0-{layers}x{D}x{F}x{kv}x{V}.gguf"
    if path.exists():
        return path
    path.parent.mkdir(mode=0o700, exist_ok=True)
    print(f"writing random numbers in llama.cpp's format to {path}", file=sys.stderr)
    part = path.with_suffix(".partial")
    writer = gguf_writer(part, config)
    data = add_tensors(writer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    for make in data:
        file.write(bytes(-file.tell() % writer.data_alignment))
        file.write(make())
    file.close()
    part.rename(path)
    return path


def kv_size(config: dict) -> int:
    """Work out how many numbers the keys of a token are, in all heads together."""
    return config["hidden_size"] // config["num_attention_heads"] * config["num_key_value_heads"]


def gguf_writer(path: Path, config: dict):
    """Open a GGUF file and describe the decoder in it."""
    import gguf
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(ROOM)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    return writer


def add_tensors(writer, config: dict) -> list[Callable[[], bytes]]:
    """Announce every tensor of the decoder; return what makes the bytes of each, in the order of the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    D, F, V, kv = config["hidden_size"], config["intermediate_size"], config["vocab_size"], kv_size(config)
    data = []

    def quantized(name, rows, columns, kind=GGMLQuantizationType.Q4_0):
        block, size = GGML_QUANT_SIZES[kind]
        nbytes = rows * columns // block * size
        at = 0 if kind == GGMLQuantizationType.Q4_0 else size - 2       # where a block has its scale
        writer.add_tensor_info(name, [rows, columns], None, nbytes, raw_dtype=kind)
        data.append(lambda: random_blocks(nbytes // size, size, at, 0.06 / columns ** 0.5))

    def plain(name, n, value):
        writer.add_tensor_info(name, [n], None, 4 * n, raw_dtype=GGMLQuantizationType.F32)
        data.append(lambda: struct.pack("<f", value) * n)

    quantized("token_embd.weight", V, D)
    quantized("output.weight", V, D, GGMLQuantizationType.Q6_K)
    plain("output_norm.weight", D, 1)
    for i in range(config["num_hidden_layers"]):
        for name, rows, columns in (("attn_q", D, D), ("attn_k", kv, D), ("attn_v", kv, D), ("attn_output", D, D),
                                    ("ffn_gate", F, D), ("ffn_up", F, D), ("ffn_down", D, F)):
            quantized(f"blk.{i}.{name}.weight", rows, columns)
        for name, n, value in (("attn_norm.weight", D, 1), ("ffn_norm.weight", D, 1), ("attn_q.bias", D, 0),
                               ("attn_k.bias", kv, 0), ("attn_v.bias", kv, 0)):
            plain(f"blk.{i}.{name}", n, value)
    return data


def random_blocks(blocks: int, size: int, at: int, scale: float) -> bytes:
    """Draw random numbers in ggml's blocks of `size` bytes, each with its float16 scale at byte `at`."""
    out = bytearray(os.urandom(blocks * size))
    for k, byte in enumerate(struct.pack("<e", scale)):
        out[at + k::size] = bytes([byte]) * blocks
    return bytes(out)


class LlamaCpp:
    """Run llama.cpp through llama-cpp-python."""

    def __init__(self, path: Path):
        import llama_cpp
        threads = len(os.sched_getaffinity(0))
        self.api = llama_cpp
        self.llm = llama_cpp.Llama(str(path), n_ctx=ROOM, n_batch=512, n_threads=threads, n_threads_batch=threads,
                                   verbose=False)

    def prompt(self, tokens: int) -> float:
        """Read a prompt."""
        self.llm.reset()
        start = time.perf_counter()
        self.llm.eval([1 + i % 500 for i in range(tokens)])
        return time.perf_counter() - start

    def batch(self, n: int, tokens: int) -> float:
        """Add a token to a prompt: the median step. No more than one prompt at a time."""
        if n != 1:
            raise NotImplementedError
        self.prompt(CONTEXT)
        return median_step(lambda _: self.llm.eval([1]), None, tokens)


class Transformers:
    """Run transformers' Qwen2 on gptqmodel's AWQ layers, and its InternVL tower and projector with random weights."""

    def __init__(self, folder: Path):
        import torch
        from transformers import DynamicCache, InternVLModel, Qwen2ForCausalLM

        from weights_tools.verify.reference import Weights, hf_config
        config = json.loads((folder / "config.json").read_text())
        self.torch, self.cache, self.size = torch, DynamicCache, config["force_image_size"]
        prefix, read = "language_model.", Weights(folder).read
        text = hf_config(config).text_config
        text.quantization_config = dict(config["llm_config"]["quantization_config"])
        self.model = Qwen2ForCausalLM.from_pretrained(
            None, config=text, dtype=torch.bfloat16,
            state_dict={name.removeprefix(prefix): get() for name, get in read.items() if name.startswith(prefix)})
        small = {**config["llm_config"], "num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 8}
        self.tower = InternVLModel(hf_config({**config, "llm_config": small})).eval()

    def tiles(self, n: int) -> float:
        """Look at n tiles of noise."""
        x = self.torch.randn(n, 3, self.size, self.size)
        start = time.perf_counter()
        with self.torch.inference_mode():
            self.tower.get_image_features(x)
        return time.perf_counter() - start

    def prompt(self, tokens: int) -> float:
        """Read a prompt."""
        start = time.perf_counter()
        self._step(self._ids(1, tokens), self.cache())
        return time.perf_counter() - start

    def batch(self, n: int, tokens: int) -> float:
        """Add a token to each of n prompts: the median step."""
        cache = self.cache()
        return median_step(lambda best: self._step(best, cache), self._step(self._ids(n, CONTEXT), cache), tokens)

    def _ids(self, batch, tokens):
        return self.torch.arange(batch * tokens).view(batch, tokens) % min(1000, self.model.config.vocab_size)

    def _step(self, ids, cache):
        with self.torch.inference_mode():
            return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
