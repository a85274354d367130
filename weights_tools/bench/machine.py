"""What the machine can do, and what the model asks of it: the two sides of a limit."""
from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import torch.nn.functional as F

from minivl import fast
from minivl.config import Config


def machine() -> dict:
    """Measure GB read a second (float32 summed) and GFLOP a second; in float32 the better of torch's two products."""
    big = torch.ones(2 ** 27)
    n = 2048
    x, w = torch.randn(512, n), torch.randn(n, n)
    halves = x.bfloat16(), w.bfloat16()
    reading, floating, half = fast.fastest(
        big.sum, lambda: fast.products()[0](x, w), lambda: F.linear(*halves), repeats=5)
    name = next((line.split(":")[1].strip() for line in lines_of("/proc/cpuinfo") if line.startswith("model name")),
                platform.processor())
    return {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "GB/s": big.nbytes / reading / 1e9, "GFLOP/s float32": 2 * 512 * n * n / floating / 1e9,
            "GFLOP/s bfloat16": 2 * 512 * n * n / half / 1e9}


def lines_of(path: str | os.PathLike) -> list[str]:
    """Read the lines of a file, none where it is not."""
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def work_of(config: Config) -> dict[str, float]:
    """Count what the model asks for: GFLOP of a tile and of a prompt token, GB read for a new token.

    A multiply-add is two operations.
    """
    v, llm = config.vision_config, config.llm_config
    P, C = (config.force_image_size // v.patch_size) ** 2, v.hidden_size
    layer = 4 * C * C + 2 * C * v.intermediate_size
    tower = (P + 1) * (v.num_hidden_layers * (layer + 2 * (P + 1) * C)) + P * 3 * v.patch_size ** 2 * C
    D, F = llm.hidden_size, llm.intermediate_size
    kv = 2 * D * llm.num_key_value_heads // llm.num_attention_heads
    body = llm.num_hidden_layers * (2 * D * D + D * kv + 3 * D * F)
    tower += P // 4 * (4 * C * D + D * D)
    bits = 4 if config.quantization_config else 16
    return {"GFLOP/tile": 2 * tower / 1e9, "GFLOP/token": 2 * body / 1e9,
            "GB/token": (body * bits / 8 + 2 * D * llm.vocab_size) / 1e9}
