"""InternLM2 decoder: vectors of a prompt -> scores of the next token. The 2B, 8B and 26B models have it.

B prompts, T tokens of this call, S tokens seen so far (cache + T), V vocabulary, D width, F FFN width,
H query heads, K kv heads, G = H / K query heads per kv head, E head dim (D = H * E).
Beside qwen2.py: other names, q, k and v from one product, no biases, and RoPE slower beyond the trained length.
Source: InternVL internvl/model/internlm2/modeling_internlm2.py @2410d1d; InternLM2 arXiv:2403.17297, RoPE
arXiv:2104.09864, GQA arXiv:2305.13245, SwiGLU arXiv:2002.05202; dynamic NTK: modeling_internlm2.py:216-243.
"""
import torch
import torch.nn.functional as F
from torch import nn


def rope_tables(positions: torch.Tensor, head_dim: int, theta: float, factor: float,
                trained: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cos and sin of the angles (radians) of positions int[B, T], each float32[B, 1, T, E].

    Positions count from 0, pair i turns by position * base^(-2i/E). Up to `trained` tokens the base is theta. With L,
    the last position + 1, beyond them it is theta * (factor * L / trained - factor + 1)^(E / (E - 2)): "dynamic NTK",
    which slows the slow pairs down and leaves the fast ones nearly alone. It grows with each token; keys in the cache
    stay as they were turned when they came, so a prompt read in pieces differs from one read at once. Both are as in
    the original, where a long prompt also changes the short ones after it; here it leaves nothing behind.
    """
    length = positions[:, -1:, None, None].float() + 1                                  # (B, 1, 1, 1)
    stretch = (factor * length / trained - factor + 1).clamp(min=1)
    base = theta * stretch ** (head_dim / (head_dim - 2))
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)   # (E/2)
    angle = positions[:, None, :, None].float() / base ** (pair / head_dim)             # (B, 1, T, E/2)
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
    """float[B, T, D] -> float[B, T, D]. `wqkv` gives q, k and v, one kv head after the other with its query heads.

    With H = 6 and K = 2, so G = 3, its outputs are, E numbers each:   q0 q1 q2 k0 v0   q3 q4 q5 k1 v1
    """

    def __init__(self, config, layer, linear):
        super().__init__()
        D, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.layer = layer
        self.kv_heads = K
        self.head_dim = D // H
        self.wqkv = linear(D, (H + 2 * K) * self.head_dim, bias=config.bias)
        self.attend = Attend()
        self.wo = linear(D, D, bias=config.bias)

    def qkv(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Project float[B, T, D] to q float[B, H, T, E], k and v float[B, K, T, E], not rotated yet."""
        x = self.wqkv(x).unflatten(-1, (self.kv_heads, -1, self.head_dim))              # (B, T, K, G + 2, E)
        q = x[..., :-2, :].flatten(2, 3)                                                # (B, T, H, E)
        k, v = x[..., -2, :], x[..., -1, :]                                             # 2 x (B, T, K, E)
        return [part.transpose(1, 2) for part in (q, k, v)]

    def forward(self, x, cos, sin, mask, cache):
        q, k, v = self.qkv(x)                                               # (B, H, T, E), 2 x (B, K, T, E)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                           # 2 x (B, K, S, E)
        x = self.attend(q, k, v, mask)                                      # (B, H, T, E)
        return self.wo(x.transpose(1, 2).flatten(2))                        # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1(x)) * w3(x)), float[B, T, D] -> same shape. w1 is Qwen2's gate, w3 its up, w2 its down."""

    def __init__(self, config, linear):
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.w1 = linear(D, width, bias=False)
        self.w3 = linear(D, width, bias=False)
        self.w2 = linear(width, D, bias=False)

    def gate_up(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project float[B, T, D] to gate and up, each float[B, T, F]."""
        return self.w1(x), self.w3(x)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply silu(gate) and up: float[B, T, D] -> float[B, T, F]."""
        gate, up = self.gate_up(x)                                          # 2 x (B, T, F)
        return F.silu(gate) * up

    def forward(self, x):
        return self.w2(self.gated(x))                                       # (B, T, D)


class Layer(nn.Module):
    """One decoder block: x + attention(norm(x)), then x + feed_forward(norm(x)).

    What stands outside a decoder finds its parts by these three, whatever the released names are: `attend` (the module
    that sees q, k, v), `linears` (name -> module, in the order they run) and `FEEDS` (what a linear's inputs come
    from).
    """
    FEEDS = (("attention_norm", ("attention.wqkv",)),
             ("ffn_norm", ("feed_forward.w1", "feed_forward.w3")),
             ("feed_forward.w3", ("feed_forward.w2",)))

    def __init__(self, config, layer, linear):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer, linear)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config, linear)

    @property
    def attend(self) -> nn.Module:
        """Return the module that is given q, k, v and the mask."""
        return self.attention.attend

    @property
    def linears(self) -> dict[str, nn.Module]:
        """List the linears that AWQ stores as int4: {"attention.wqkv": module, ...}."""
        names = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
        return {name: self.get_submodule(name) for name in names}

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class InternLM2Model(nn.Module):
    """inputs_embeds float[B, T, D] -> normalised hidden states float[B, T, D]."""

    def __init__(self, config, linear):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.theta = config.rope_theta
        self.factor = config.rope_scaling["factor"] if config.rope_scaling else 1.0
        self.trained = config.max_position_embeddings if config.rope_scaling else float("inf")
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
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
        tables = rope_tables(position, self.head_dim, self.theta, self.factor, self.trained)
        cos, sin = (t.to(x.dtype) for t in tables)                                      # 2 x (B or 1, 1, T, E)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        return self.norm(x)


class InternLM2ForCausalLM(nn.Module):
    """Decoder and head. `linear(in, out, bias=)` builds the five linears of a layer: nn.Linear, or AWQ's.

    What stands outside goes through `body` (vectors -> normalised hidden states), `embeddings`, `layers`, `norm`,
    `head` and `scores`: every decoder has these, under whatever names its files use.
    """

    def __init__(self, config, linear=nn.Linear):
        super().__init__()
        self.model = InternLM2Model(config, linear)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)      # untied in the whole family

    # Properties, not attributes: a module assigned to a second attribute would be registered, and saved, twice.
    body = property(lambda self: self.model)
    embeddings = property(lambda self: self.model.tok_embeddings)
    layers = property(lambda self: self.model.layers)
    norm = property(lambda self: self.model.norm)
    head = property(lambda self: self.output)

    def scores(self, inputs_embeds: torch.Tensor, cache=None, padding: torch.Tensor | None = None,
               last: int = 1) -> torch.Tensor:
        """Score float[B, T, D]: logits float32[B, last, V], of the last positions only."""
        return self.head(self.body(inputs_embeds, cache, padding)[:, -last:]).float()

    def forward(self, inputs_embeds: torch.Tensor, cache=None, padding: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits float32[B, T, V] of float[B, T, D]."""
        return self.output(self.model(inputs_embeds, cache, padding)).float()
