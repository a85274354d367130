"""LoRA: what a frozen linear lacks for a new task, learned as a product of two thin matrices beside it.

I in features, O out features, r rank (8, say, where I and O are thousands)

    y = base(x) + alpha / r * (x A^T) B^T           A float[r, I], B float[O, r], x float[..., I], y float[..., O]

Only A and B learn: r (I + O) numbers instead of I O. The base stays as released, float or int4; gradients pass through
it to x. B begins at zero, so at first nothing changes. alpha / r keeps what is learned at about one size when another r
is tried. Multiplied out, the correction is a matrix of rank r, which can be added to the weight: `LoRA.correction`.
Source: arXiv:2106.09685 section 4.1.
"""
import torch
from torch import nn


class LoRA(nn.Module):
    """A linear (nn.Linear or AWQLinear) and a learned correction of rank r: float[..., I] -> float[..., O]."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, **kind):
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **kind))
        nn.init.normal_(self.lora_A, std=base.in_features ** -0.5)      # x A^T is then about as large as x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.lora_A.T @ self.lora_B.T)

    def correction(self) -> torch.Tensor:
        """Multiply out what was learned: float[O, I], to be added to an nn.Linear's weight."""
        return self.scale * (self.lora_B @ self.lora_A)


def linears(model: nn.Module) -> list[str]:
    """List the names of a MiniVL's decoder linears as released: "language_model.model.layers.0.self_attn.q_proj"."""
    names = {module: name for name, module in model.named_modules()}
    return [names[linear] for layer in model.language_model.layers for linear in layer.linears.values()]


def add(model: nn.Module, names: list[str], rank: int, alpha: float) -> None:
    """Put a LoRA in the place of each linear of a MiniVL that is named, with random A, in the model's dtype."""
    for name in names:
        base = model.get_submodule(name)
        if isinstance(base, LoRA):
            raise ValueError(f"{name} has a LoRA already; load the model again without it")
        parent, _, last = name.rpartition(".")
        lora = LoRA(base, rank, alpha, device=model.device, dtype=model.dtype)
        setattr(model.get_submodule(parent), last, lora)


def learned(model: nn.Module) -> dict[str, nn.Parameter]:
    """List what learns, by the released name of its linear: {"language_model...q_proj.lora_A": A, ...}."""
    return {f"{name}.{part}": getattr(module, part) for name, module in model.named_modules()
            if isinstance(module, LoRA) for part in ("lora_A", "lora_B")}
