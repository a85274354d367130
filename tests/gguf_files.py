"""A writer of GGUF files, and a tiny language model in one, for tests of what reads them."""
import struct

import torch

KINDS = {int: 10, float: 6, bool: 7, str: 8, list: 9}
TYPES = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 8}
E, HEADS, KV_HEADS, F, LAYERS = 8, 4, 2, 64, 2
D = E * HEADS
WORDS = ["<|start|>", *map(chr, range(0x21, 0x7F)), "\u0120", "\u010a", "th", "the"]
MERGES = ["t h", "th e"]
FACTS = {"general.architecture": "llama", "llama.embedding_length": D, "llama.feed_forward_length": F,
         "llama.block_count": LAYERS, "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV_HEADS,
         "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0,
         "llama.vocab_size": len(WORDS), "llama.context_length": 512, "llama.rope.dimension_count": E,
         "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": WORDS,
         "tokenizer.ggml.token_type": [3, *[1] * (len(WORDS) - 1)], "tokenizer.ggml.merges": MERGES}


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value(given, kind=None):
    kind = KINDS[type(given)] if kind is None else kind
    if kind == 8:
        return text(given)
    if kind == 9:
        inner = KINDS[type(given[0])] if given else 8
        return struct.pack("<IQ", inner, len(given)) + b"".join(value(one, inner) for one in given)
    return struct.pack("<" + {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
                              12: "d"}[kind], given)


def fact(key, given, kind=None):
    return text(key) + struct.pack("<I", KINDS[type(given)] if kind is None else kind) + value(given, kind)


def gguf(facts, tensors, alignment=32, version=3, begin=None):
    """The bytes of a file. facts: key -> value; tensors: name -> (type, shape, bytes)."""
    infos, data = b"", b""
    for name, (kind, shape, stored) in tensors.items():
        infos += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), TYPES.get(kind, kind),
                                          len(data) if begin is None else begin)
        data += stored + bytes(-len(stored) % alignment)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(facts))
    head += b"".join(fact(key, given) for key, given in facts.items()) + infos
    return head + bytes(-len(head) % alignment) + data


def raw(tensor):
    """The bytes of a tensor."""
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())


def llama(facts=(), change=lambda tensors: None):
    """A tiny model: (the bytes of its file, its tensors float32, as the file names them)."""
    sizes = {"token_embd": (len(WORDS), D), "output_norm": (D,)}
    for i in range(LAYERS):
        sizes |= {f"blk.{i}.{name}": shape for name, shape in {
            "attn_norm": (D,), "attn_q": (D, D), "attn_k": (KV_HEADS * E, D), "attn_v": (KV_HEADS * E, D),
            "attn_output": (D, D), "ffn_norm": (D,), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}.items()}
    generator = torch.Generator().manual_seed(0)
    values = {f"{name}.weight": torch.randn(shape, generator=generator) / 4 for name, shape in sizes.items()}
    tensors = {name: ("F32", tuple(one.shape), raw(one)) for name, one in values.items()}
    change(tensors)
    return gguf({**FACTS, **dict(facts)}, tensors), values
