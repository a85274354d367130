"""Qwen2 decoder: vectors of a prompt -> scores of the next token.

B prompts, T tokens of this call, S tokens seen so far (cache + T), V vocabulary, D width, F FFN width,
H query heads, K kv heads, G = H / K query heads per kv head, E head dim (D = H * E).
Source: transformers 4.37.2 models/qwen2/modeling_qwen2.py; Qwen2 arXiv:2407.10671, RoPE arXiv:2104.09864,
GQA arXiv:2305.13245, SwiGLU arXiv:2002.05202.
"""
import torch
import torch.nn.functional as F
from torch import nn


def rope_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cos and sin of the angles (radians) of positions int[B, T], each float32[B, 1, T, E].

    Positions count from 0. Pair i turns by position * theta^(-2i/E). Built in float32 at every call and never stored
    in the module: a buffer would be rounded when the module is cast to half precision, and a rounded frequency drifts
    with the position.
    """
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)   # (E/2)
    angle = positions[:, None, :, None].float() / theta ** (pair / head_dim)            # (B, 1, T, E/2)
    angle = torch.cat([angle, angle], dim=-1)                                           # (B, 1, T, E)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of float[B, H, T, E] by their angles, same shape.

    RoPE, split-half: element i pairs with i + E/2, not with i + 1.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attention_mask(T: int, S: int, padding: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Mark who sees whom: bool[B or 1, 1, T, S], True = visible; None where plain causal attention says the same.

    The T queries are the last T of S positions. Query t sees key s if s is not later. `padding` int[B] counts the
    padding tokens at the start of each row, which nobody sees but themselves (a row of the softmax must not be empty).
    Example T=2, S=4, padding 1:   0 1 1 0
                                   0 1 1 1
    """
    if padding is None and T in (1, S):
        return None
    query = torch.arange(S - T, S, device=device)[:, None]                              # (T, 1)
    key = torch.arange(S, device=device)                                                # (S)
    mask = (key <= query)[None]                                                         # (1, T, S)
    if padding is not None:
        mask = mask & (key >= padding[:, None, None]) | (key == query)                  # (B, T, S)
    return mask[:, None]


class RMSNorm(nn.Module):
    """x / rms(x) * weight. The mean and root are a float32 island; the cast back comes *before* the weight."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attend(nn.Module):
    """q float[B, H, T, E], k and v float[B, K, S, E] -> float[B, H, T, E]. A module so that `trace` sees q, k, v.

    Query head h reads kv head h // G. `mask` None: plain causal.
    """

    def forward(self, q, k, v, mask):
        causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


class Attention(nn.Module):
    """float[B, T, D] -> float[B, T, D]."""

    def __init__(self, config, layer, linear):
        super().__init__()
        D, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.layer = layer
        self.head_dim = D // H
        self.q_proj = linear(D, D, bias=True)
        self.k_proj = linear(D, K * self.head_dim, bias=True)
        self.v_proj = linear(D, K * self.head_dim, bias=True)
        self.attend = Attend()
        self.o_proj = linear(D, D, bias=False)

    def qkv(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Project float[B, T, D] to q float[B, H, T, E], k and v float[B, K, T, E], not rotated yet."""
        return [p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                for p in (self.q_proj, self.k_proj, self.v_proj)]

    def rotated(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor,
                sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate q and k, each token by its position."""
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def forward(self, x, cos, sin, mask, cache):
        q, k, v = self.qkv(x)                                               # (B, H, T, E), 2 x (B, K, T, E)
        q, k = self.rotated(q, k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                           # 2 x (B, K, S, E)
        x = self.attend(q, k, v, mask)                                      # (B, H, T, E)
        return self.o_proj(x.transpose(1, 2).flatten(2))                    # (B, T, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), float[B, T, D] -> same shape."""

    def __init__(self, config, linear):
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(D, width, bias=False)
        self.up_proj = linear(D, width, bias=False)
        self.down_proj = linear(width, D, bias=False)

    def gate_up(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project float[B, T, D] to gate and up, each float[B, T, F]."""
        return self.gate_proj(x), self.up_proj(x)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply silu(gate) and up: float[B, T, D] -> float[B, T, F]."""
        gate, up = self.gate_up(x)                                          # 2 x (B, T, F)
        return F.silu(gate) * up

    def forward(self, x):
        return self.down_proj(self.gated(x))                                # (B, T, D)


class Layer(nn.Module):
    """One decoder block: x + attention(norm(x)), then x + mlp(norm(x)).

    What stands outside a decoder finds its parts by these three, whatever the released names are: `attend` (the module
    that sees q, k, v), `linears` (name -> module, in the order they run) and `FEEDS` (what a linear's inputs come
    from).
    """
    # A factor on the outputs of the first can be taken back in the others. v_proj -> o_proj is not listed: with shared
    # kv heads one output of v_proj meets several inputs of o_proj.
    FEEDS = (("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
             ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
             ("mlp.up_proj", ("mlp.down_proj",)))

    def __init__(self, config, layer, linear):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, linear)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, linear)

    @property
    def attend(self) -> nn.Module:
        """Return the module that is given q, k, v and the mask."""
        return self.self_attn.attend

    @property
    def linears(self) -> dict[str, nn.Module]:
        """List the linears that AWQ stores as int4: {"self_attn.q_proj": module, ...}."""
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                 "mlp.up_proj", "mlp.down_proj")
        return {name: self.get_submodule(name) for name in names}

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2Model(nn.Module):
    """inputs_embeds float[B, T, D] -> normalised hidden states float[B, T, D]."""

    def __init__(self, config, linear):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.theta = config.rope_theta
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i, linear) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, inputs_embeds: torch.Tensor, cache=None, padding: torch.Tensor | None = None) -> torch.Tensor:
        """Run float[B, T, D], after what the cache holds, through all layers and the norm.

        `padding` int[B]: how many tokens at the start of each row are padding (counted from the first call on).
        """
        T = inputs_embeds.shape[1]
        start = cache.length if cache is not None else 0
        position = torch.arange(start, start + T, device=inputs_embeds.device)[None]    # (1, T)
        if padding is not None:
            position = (position - padding[:, None]).clamp(min=0)                       # (B, T), 0: first real token
        mask = attention_mask(T, start + T, padding, inputs_embeds.device)
        x = self.through(inputs_embeds, position, mask, cache)                          # (B, T, D)
        if cache is not None:
            cache.length = start + T
        return x

    def through(self, x: torch.Tensor, position: torch.Tensor, mask: torch.Tensor | None, cache) -> torch.Tensor:
        """Run all layers and the norm on float[B, T, D] whose positions int[B or 1, T] and mask are known."""
        cos, sin = (t.to(x.dtype) for t in rope_tables(position, self.head_dim, self.theta))    # (B or 1, 1, T, E)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        return self.norm(x)


class Qwen2ForCausalLM(nn.Module):
    """Decoder and head. `linear(in, out, bias=)` builds the seven linears of a layer: nn.Linear, or AWQ's.

    What stands outside goes through `body` (vectors -> normalised hidden states), `embeddings`, `layers`, `norm`,
    `head` and `scores`: every decoder has these, under whatever names its files use.
    """

    def __init__(self, config, linear=nn.Linear):
        super().__init__()
        self.model = Qwen2Model(config, linear)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)     # untied in the whole family

    # Properties, not attributes: a module assigned to a second attribute would be registered, and saved, twice.
    body = property(lambda self: self.model)
    embeddings = property(lambda self: self.model.embed_tokens)
    layers = property(lambda self: self.model.layers)
    norm = property(lambda self: self.model.norm)
    head = property(lambda self: self.lm_head)

    def scores(self, inputs_embeds: torch.Tensor, cache=None, padding: torch.Tensor | None = None,
               last: int = 1) -> torch.Tensor:
        """Score float[B, T, D]: logits float32[B, last, V], of the last positions only."""
        return self.head(self.body(inputs_embeds, cache, padding)[:, -last:]).float()

    def forward(self, inputs_embeds: torch.Tensor, cache=None, padding: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits float32[B, T, V] of float[B, T, D]."""
        return self.lm_head(self.model(inputs_embeds, cache, padding)).float()
