"""Each idea file against a slow spec on random input: explicit softmax, loops, complex numbers."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from minivl import internlm2, qwen2, vit
from minivl.cache import KVCache
from minivl.pixel_unshuffle import PixelUnshuffle, pixel_unshuffle
from minivl.projector import projector


def test_pixel_unshuffle_order_by_loop():
    N, h, w, C = 2, 6, 4, 3
    x = torch.randn(N, h, w, C)
    want = torch.zeros(N, h // 2, w // 2, 4 * C)
    for row in range(h // 2):
        for column in range(w // 2):
            want[:, row, column] = torch.cat([x[:, 2 * row, 2 * column], x[:, 2 * row, 2 * column + 1],
                                              x[:, 2 * row + 1, 2 * column], x[:, 2 * row + 1, 2 * column + 1]], dim=-1)
    assert torch.equal(pixel_unshuffle(x), want)
    digits = torch.tensor([[[[1.], [2.]], [[3.], [4.]]]])       # the docstring's example
    assert pixel_unshuffle(digits).flatten().tolist() == [1, 2, 3, 4]


def test_pixel_unshuffle_is_not_torchs_and_not_v1():
    x = torch.randn(1, 4, 4, 3)
    torchs = F.pixel_unshuffle(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    assert torchs.shape == (1, 2, 2, 12) and not torch.allclose(torchs, pixel_unshuffle(x))
    assert torch.equal(torchs.unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2), pixel_unshuffle(x))
    assert not torch.equal(pixel_unshuffle(x).transpose(1, 2), pixel_unshuffle(x))      # v1 has the transposed grid


def test_pixel_unshuffle_refuses():
    with pytest.raises(ValueError, match="even sides, got 3x4"):
        pixel_unshuffle(torch.zeros(1, 3, 4, 2))
    with pytest.raises(ValueError, match="17 patches do not form a square"):
        PixelUnshuffle()(torch.zeros(1, 17, 2))


def softmax_attention(q, k, v, mask=None):
    """One query at a time: scores, softmax, weighted sum.

    q [H, T, E], k and v [K, S, E]; query head h uses kv head h // G.
    """
    H, T, E = q.shape
    out = torch.zeros(H, T, E, dtype=q.dtype)
    for h in range(H):
        kv = h // (H // k.shape[0])
        for t in range(T):
            scores = torch.stack([q[h, t] @ k[kv, s] / math.sqrt(E) for s in range(k.shape[1])])
            if mask is not None:
                scores = scores.masked_fill(~mask[t], -math.inf)
            out[h, t] = (scores.softmax(0)[:, None] * v[kv]).sum(0)
    return out


@pytest.mark.parametrize("decoder", [qwen2, internlm2])
@pytest.mark.parametrize("mask_kind", ["causal", "step", "chunk"])
def test_decoder_attention_is_explicit_softmax_with_shared_kv_heads(mask_kind, decoder):
    H, K, E, S = 6, 2, 4, 7
    T = {"causal": S, "step": 1, "chunk": 3}[mask_kind]
    q, k, v = torch.randn(1, H, T, E), torch.randn(1, K, S, E), torch.randn(1, K, S, E)
    visible = torch.tensor([[s <= S - T + t for s in range(S)] for t in range(T)])
    mask = decoder.attention_mask(T, S, None, "cpu")
    assert (mask is None) == (mask_kind != "chunk")
    assert torch.allclose(decoder.Attend()(q, k, v, mask)[0], softmax_attention(q[0], k[0], v[0], visible), atol=1e-6)


def test_vision_attention_sees_everything():
    q, k, v = (torch.randn(1, 3, 5, 4) for _ in range(3))
    assert torch.allclose(vit.Attend()(q, k, v)[0], softmax_attention(q[0], k[0], v[0]), atol=1e-6)


@pytest.mark.parametrize("decoder", [qwen2, internlm2])
def test_mask_with_padding_by_loop(decoder):
    padding, T, S = torch.tensor([0, 2, 4]), 3, 5
    mask = decoder.attention_mask(T, S, padding, "cpu")
    assert mask.shape == (3, 1, T, S)
    for b in range(3):
        for t in range(T):
            for s in range(S):
                query = S - T + t
                assert mask[b, 0, t, s] == ((s <= query and s >= padding[b]) or s == query)
    example = decoder.attention_mask(2, 4, torch.tensor([1]), "cpu")      # the docstring's example
    assert example[0, 0].int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]]


ROPE = {qwen2: (), internlm2: (2.0, 32)}       # what its tables take beside positions, E and theta


@pytest.mark.parametrize("decoder", ROPE)
def test_rope_is_rotation_of_complex_numbers(decoder):
    """Pair (i, i + E/2) as x + iy, times e^(i * position * theta^(-2i/E))."""
    B, H, T, E, theta = 2, 3, 5, 8, 10000.0
    x, positions = torch.randn(B, H, T, E), torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    cos, sin = decoder.rope_tables(positions, E, theta, *ROPE[decoder])
    got = decoder.rotate(x, cos, sin)
    frequency = theta ** (-2 * torch.arange(E // 2, dtype=torch.float64) / E)
    turned = torch.complex(x[..., :E // 2].double(), x[..., E // 2:].double()) * torch.exp(
        1j * positions[:, None, :, None].double() * frequency)
    assert torch.allclose(got.double(), torch.cat([turned.real, turned.imag], -1), atol=1e-6)
    assert torch.allclose(got.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.equal(got[0, :, 0], x[0, :, 0])                        # position 0 does not turn


def test_rope_scores_depend_on_distance_only():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(m, n):
        tables = [qwen2.rope_tables(torch.tensor([[p]]), 16, 1e6) for p in (m, n)]
        return float((qwen2.rotate(q, *tables[0]) * qwen2.rotate(k, *tables[1])).sum())
    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 8)) > 1e-3


@pytest.mark.parametrize("kind", [qwen2.Qwen2ForCausalLM, internlm2.InternLM2ForCausalLM])
def test_rope_survives_a_cast_of_the_module(kind):
    """Frequencies are no buffer: casting the module must not round them."""
    config = SimpleNamespace(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, rope_theta=1e6, vocab_size=5,
                             num_hidden_layers=1, intermediate_size=12, rms_norm_eps=1e-6, bias=False,
                             rope_scaling=None)
    model = kind(config).half()
    assert not list(model.buffers()) and model.model.theta == 1e6


@pytest.mark.parametrize("norm", [vit.RMSNorm, qwen2.RMSNorm, internlm2.RMSNorm])
def test_rms_norm_and_its_cast_order(norm):
    layer = norm(6, 1e-6)
    layer.weight.data = torch.rand(6) + 0.5
    x = torch.randn(2, 6) * 3
    want = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight
    assert torch.allclose(layer(x), want, atol=1e-6)
    half, big = layer.half(), (torch.randn(500, 6) * 300).half()        # squares overflow float16: the island is needed
    x32 = big.float()
    normalised = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.isfinite(half(big)).all()
    assert torch.equal(half(big), half.weight * normalised.half())                      # cast, then weight
    assert not torch.equal(half(big), (half.weight.float() * normalised).half())        # the other order differs


def test_swiglu_and_projector_by_hand():
    config = SimpleNamespace(hidden_size=6, intermediate_size=10)
    mlp, x = qwen2.MLP(config, torch.nn.Linear), torch.randn(2, 3, 6)
    gate = x @ mlp.gate_proj.weight.T
    want = (gate * torch.sigmoid(gate) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    assert torch.allclose(mlp(x), want, atol=1e-6)
    p, y = projector(3, 5), torch.randn(2, 4, 12)
    h = F.layer_norm(y, (12,), p[0].weight, p[0].bias, 1e-5) @ p[1].weight.T + p[1].bias
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))                     # exact GELU
    assert torch.allclose(p(y), h @ p[3].weight.T + p[3].bias, atol=1e-6)
    tiny = y * 1e-3         # here the eps under the root counts: 1e-5, not the tower's 1e-6
    h = F.layer_norm(tiny, (12,), p[0].weight, p[0].bias, 1e-5) @ p[1].weight.T + p[1].bias
    assert torch.allclose(p[1](p[0](tiny)), h, atol=1e-6)
    assert [n for n, _ in p.named_parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]


def vision_config(**change):
    return SimpleNamespace(**{**dict(hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
                                     num_channels=3, patch_size=2, image_size=8, layer_norm_eps=1e-6, hidden_act="gelu",
                                     norm_type="layer_norm", qkv_bias=True, qk_normalization=False), **change})


def initialised(module):
    for p in module.parameters():
        p.data = torch.randn_like(p) * 0.3
    return module


def test_patches_are_cut_row_by_row():
    e = initialised(vit.Embeddings(vision_config()))
    x = torch.randn(2, 3, 8, 8)
    out = e(x)
    assert out.shape == (2, 17, 12)
    for row in range(4):
        for column in range(4):
            patch = x[:, :, 2 * row:2 * row + 2, 2 * column:2 * column + 2]
            want = torch.einsum("nchw,dchw->nd", patch, e.patch_embedding.weight) + e.patch_embedding.bias
            index = 1 + 4 * row + column
            assert torch.allclose(out[:, index], want + e.position_embedding[0, index], atol=1e-5)
    assert torch.allclose(out[:, 0], (e.class_embedding + e.position_embedding[:, :1])[0].expand(2, -1))


def test_positions_are_stretched_only_for_another_tile_size():
    e = initialised(vit.Embeddings(vision_config()))
    assert e.position_embedding_for(4, 4) is e.position_embedding
    grid = e.position_embedding[:, 1:].reshape(1, 4, 4, 12).permute(0, 3, 1, 2)
    same = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)
    assert torch.allclose(same, grid, atol=1e-6)        # so leaving it out at the trained size changes nothing
    assert e(torch.randn(1, 3, 12, 8)).shape == (1, 1 + 6 * 4, 12)


def test_layer_scale_qk_norm_and_no_final_norm():
    for change in ({}, {"norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True}):
        model, x = initialised(vit.InternVisionModel(vision_config(**change))), torch.randn(2, 3, 8, 8)
        layer, h = model.encoder.layers[0], torch.randn(2, 17, 12)
        middle = h + layer.ls1 * layer.attn(layer.norm1(h))
        assert torch.allclose(layer(h), middle + layer.ls2 * layer.mlp(layer.norm2(middle)))
        out = model.embeddings(x)
        for block in model.encoder.layers:
            out = block(out)
        assert torch.equal(model(x), out)
        q, k, v = (layer.attn.qkv.weight[12 * i:12 * i + 12] for i in range(3))      # a block each, not per head
        if change:
            q_in = layer.attn.q_norm(h @ q.T)           # over all heads at once
            k_in, v_in = layer.attn.k_norm(h @ k.T), h @ v.T
            heads = [t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (q_in, k_in, v_in)]
            want = layer.attn.proj(vit.Attend()(*heads).transpose(1, 2).flatten(2))
            assert torch.allclose(layer.attn(h), want, atol=1e-5)


def test_cache_grows_truncates_and_refuses(monkeypatch):
    monkeypatch.setattr(KVCache, "BLOCK", 2)      # so that it grows several times here
    cache = KVCache()
    keys, values = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    for start, end in ((0, 3), (3, 4), (4, 9)):
        k, v = cache.append(0, keys[:, :, start:end], values[:, :, start:end])
        cache.length = end
        assert torch.equal(k, keys[:, :, :end]) and torch.equal(v, values[:, :, :end])
    cache.truncate(5)
    k, _ = cache.append(0, keys[:, :, 7:8], values[:, :, 7:8])
    assert torch.equal(k, torch.cat([keys[:, :, :5], keys[:, :, 7:8]], 2))
    with pytest.raises(ValueError, match="cannot cut the cache to 6 tokens, it holds 5"):
        cache.truncate(6)
