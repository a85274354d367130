"""InternViT: one tile -> one vector per patch. Both kinds: 300M (LayerNorm) and 6B (RMSNorm, QK-norm).

N tiles, R tile side in pixels, P patches of a tile, C vision width, H heads, E head dim (C = H * E).
The sequence is 1 + P long: CLS comes first. Pre-norm blocks with a learned gain (layer scale) on each branch; no
norm after the last layer.
Source: InternVL modeling_intern_vit.py @2410d1d (lines at each class); ViT arXiv:2010.11929, layer scale
arXiv:2103.17239.
"""
import torch
import torch.nn.functional as F
from torch import nn


class Embeddings(nn.Module):
    """Patches, CLS and positions: float[N, 3, R, R] -> float[N, 1+P, C]. Source: :127-173."""

    def __init__(self, config):
        super().__init__()
        side = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + side ** 2, config.hidden_size))

    def forward(self, pixel_values):
        x = self.patch_embedding(pixel_values)                                  # (N, C, rows, columns)
        position = self.position_embedding_for(*x.shape[-2:]).to(x.dtype)       # (1, 1+P, C)
        x = x.flatten(2).transpose(1, 2)                                        # (N, P, C), row by row
        x = torch.cat([self.class_embedding.expand(len(x), -1, -1), x], dim=1)  # (N, 1+P, C)
        return x + position

    def position_embedding_for(self, rows: int, columns: int) -> torch.Tensor:
        """Fit the position embedding to a grid of patches: float[1, 1+P, C].

        It is stretched (bicubic, in float32) only for a tile size other than the trained one.
        """
        P, C = self.position_embedding.shape[1] - 1, self.position_embedding.shape[2]
        side = round(P ** 0.5)
        if (rows, columns) == (side, side):
            return self.position_embedding
        grid = self.position_embedding[:, 1:].float().reshape(1, side, side, C).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)    # (1, C, rows, columns)
        grid = grid.flatten(2).transpose(1, 2).to(self.position_embedding.dtype)                # (1, P, C)
        return torch.cat([self.position_embedding[:, :1], grid], dim=1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the 6B's norm: mean and root in float32, cast back *before* the weight. Source: :99-110."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attend(nn.Module):
    """Every patch looks at every patch: q, k, v float[N, H, 1+P, E] -> same shape.

    A module so that `trace` sees q, k, v.
    """

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)      # softmax(q k^T / sqrt(E)) v, no mask


class Attention(nn.Module):
    """float[N, 1+P, C] -> same shape. Source: :176-248."""

    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(C, 3 * C, bias=config.qkv_bias)
        self.qk_normalization = config.qk_normalization
        if config.qk_normalization:     # over all heads at once, not per head
            self.q_norm = RMSNorm(C, config.layer_norm_eps)
            self.k_norm = RMSNorm(C, config.layer_norm_eps)
        self.attend = Attend()
        self.proj = nn.Linear(C, C)     # has a bias in both kinds, also where qkv has none

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)              # 3 x (N, 1+P, C): a block of q, one of k, one of v
        if self.qk_normalization:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))    # (N, H, 1+P, E)
        x = self.attend(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))      # (N, 1+P, C)


class MLP(nn.Module):
    """float[N, 1+P, C] -> same shape. Source: :251-263."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def widened(self, x: torch.Tensor) -> torch.Tensor:
        """Widen float[N, 1+P, C] to float[N, 1+P, intermediate_size]."""
        return F.gelu(self.fc1(x))                          # exact (erf) GELU

    def forward(self, x):
        return self.fc2(self.widened(x))                    # (N, 1+P, C)


class Layer(nn.Module):
    """One encoder block: x + ls1 * attn(norm1(x)), then x + ls2 * mlp(norm2(x)). Source: :266-294."""

    def __init__(self, config):
        super().__init__()
        norm = {"layer_norm": nn.LayerNorm, "rms_norm": RMSNorm}[config.norm_type]
        self.norm1 = norm(config.hidden_size, config.layer_norm_eps)
        self.attn = Attention(config)
        self.ls1 = nn.Parameter(torch.empty(config.hidden_size))
        self.norm2 = norm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.ls2 = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x):
        x = x + self.ls1 * self.attn(self.norm1(x))
        return x + self.ls2 * self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Only the released name `encoder.layers`; InternVisionModel runs the layers."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class InternVisionModel(nn.Module):
    """The tower: normalised float[N, 3, R, R] -> float[N, 1+P, C]. `config` has the fields of `vision_config`."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(pixel_values)                   # (N, 1+P, C)
        for layer in self.encoder.layers:
            x = layer(x)
        return x
