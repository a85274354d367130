"""int4: the packing vectors, and the fast functions against loops a beginner believes."""
import pytest
import torch

from minivl.awq import AWQLinear, dequantize, matmul, pack, unpack


def signed(word):
    return word - 2 ** 32 if word >= 2 ** 31 else word


@pytest.mark.parametrize("columns, word", [
    ([0, 1, 2, 3, 4, 5, 6, 7], 1966171168),             # 0x75316420
    ([8, 9, 10, 11, 12, 13, 14, 15], -38146904),        # 0xFDB9ECA8: the sign bit is set
    ([15] * 8, -1),
    ([0, 1, 0, 0, 0, 0, 0, 0], 65536),
    ([0, 0, 0, 0, 0, 0, 0, 1], 268435456)])
def test_vectors(columns, word):
    assert pack(torch.tensor([columns])).tolist() == [[word]]
    assert unpack(torch.tensor([[word]], dtype=torch.int32)).tolist() == [columns]


def slow_unpack(word):
    """One word as Python integers: column j sits at shift 0, 16, 4, 20, 8, 24, 12, 28."""
    return [(word % 2 ** 32) // 2 ** shift % 16 for shift in (0, 16, 4, 20, 8, 24, 12, 28)]


def random_linear(I=48, O=40, g=16, dtype=torch.float16):
    qweight = torch.randint(-2 ** 31, 2 ** 31, (I, O // 8), dtype=torch.int64).to(torch.int32)
    qzeros = torch.randint(-2 ** 31, 2 ** 31, (I // g, O // 8), dtype=torch.int64).to(torch.int32)
    return qweight, qzeros, (torch.rand(I // g, O) * 0.02 + 0.001).to(dtype)


def test_unpack_against_the_slow_spec_and_back():
    qweight, _, _ = random_linear()
    assert (qweight < 0).any() and (qweight >= 0).any()
    numbers = unpack(qweight)
    assert numbers.dtype == torch.uint8 and numbers.shape == (48, 40)
    assert numbers.tolist() == [[n for word in row for n in slow_unpack(word)] for row in qweight.tolist()]
    assert torch.equal(pack(numbers), qweight)


@pytest.mark.parametrize("I, O, g", [(48, 40, 16), (128, 8, 128), (64, 24, 32), (6, 16, 1), (10, 8, 5)])
def test_dequantize_against_the_slow_spec(I, O, g):
    qweight, qzeros, scales = random_linear(I, O, g)
    q, z = unpack(qweight).tolist(), unpack(qzeros).tolist()
    want = [[(q[i][o] - z[i // g][o]) * float(scales[i // g, o]) for o in range(O)] for i in range(I)]
    assert torch.equal(dequantize(qweight, qzeros, scales), torch.tensor(want))


@pytest.mark.parametrize("zero", [0, 15])
def test_zero_points_at_the_ends(zero):
    """No +1: with z = 15 the weights are all negative or 0, with z = 0 positive or 0."""
    qweight, _, scales = random_linear()
    W = dequantize(qweight, pack(torch.full((3, 40), zero)), scales)
    assert torch.equal(W, (unpack(qweight).float() - zero) * scales.float().repeat_interleave(16, 0))


def test_float16_dequantization_is_the_float16_product_bit_by_bit():
    qweight, qzeros, scales = random_linear(640, 320, 64)
    half = (unpack(qweight).half() - unpack(qzeros).half().repeat_interleave(64, 0)) * scales.repeat_interleave(64, 0)
    assert torch.equal(dequantize(qweight, qzeros, scales, torch.float16), half)


def test_bfloat16_rounds_once():
    qweight, qzeros, scales = random_linear()
    W = dequantize(qweight, qzeros, scales)
    assert torch.equal(dequantize(qweight, qzeros, scales, torch.bfloat16), W.bfloat16())
    rounded_first = dequantize(qweight, qzeros, scales.bfloat16()).bfloat16()
    assert not torch.equal(rounded_first, W.bfloat16())     # what is avoided does make a difference


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matmul_and_layer(bias, dtype):
    qweight, qzeros, scales = random_linear()
    b = torch.randn(40, dtype=dtype) if bias else None
    x = torch.randn(3, 5, 48, dtype=dtype)
    W = dequantize(qweight, qzeros, scales, dtype)
    want = torch.nn.functional.linear(x, W.T, b)
    got = matmul(x, qweight, qzeros, scales, b)
    assert got.dtype == dtype and got.shape == (3, 5, 40)
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2e-2, 1e-2)
    assert torch.allclose(got, want, rtol=rtol, atol=atol)
    layer = AWQLinear(48, 40, bias=bias, group_size=16)
    layer.load_state_dict({"qweight": qweight, "qzeros": qzeros, "scales": scales, **({"bias": b} if bias else {})},
                          strict=True, assign=True)
    assert torch.equal(layer(x), got)


def test_gradients_reach_the_input():
    qweight, qzeros, scales = random_linear()
    x = torch.randn(2, 48, requires_grad=True)
    matmul(x, qweight, qzeros, scales).sum().backward()
    assert torch.allclose(x.grad, dequantize(qweight, qzeros, scales).sum(1).expand(2, -1), atol=1e-5)


def test_bad_input():
    qweight, qzeros, scales = random_linear()
    with pytest.raises(ValueError, match="dtype torch.int64, the released format is int32"):
        unpack(qweight.long())
    with pytest.raises(ValueError, match=r"got \(3, 5\) and \(2, 40\)"):
        dequantize(qweight, qzeros, scales[:2])
    with pytest.raises(ValueError, match="numbers span 0..16"):
        pack(torch.tensor([[0, 16, 0, 0, 0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="9 columns cannot be packed"):
        pack(torch.zeros(1, 9))
    with pytest.raises(ValueError, match="group size 128 must divide"):
        AWQLinear(100, 8)
