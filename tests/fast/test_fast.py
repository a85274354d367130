"""minivl/fast against the definitions: the layout, each loop, compiled and not, each layer, and a whole model."""
import copy
import os
import random
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import minivl
from minivl import fast, qwen2, vit
from minivl.awq import AWQLinear, dequantize, pack
from minivl.cache import KVCache
from minivl.fast import compiled, edits, layers, loops, machine


def awq_linear(I, O, group, *, bias=True, seed=0, words=None, zeros=None):
    """Random, negative words included; `words` and `zeros`: the same number everywhere."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape, value):
        return torch.full(shape, value, dtype=torch.int32) if value is not None else torch.randint(
            0, 16, shape, generator=generator, dtype=torch.int32)

    linear = AWQLinear(I, O, bias=bias, group_size=group)
    linear.qweight, linear.qzeros = pack(numbers(I, O, value=words)), pack(numbers(I // group, O, value=zeros))
    linear.scales = (0.01 * torch.rand(I // group, O, generator=generator) + 0.001).half()
    if bias:
        linear.bias = torch.randn(O, generator=generator)
    return linear


def definition(linear, x):
    """In float64, word by word as the format says."""
    W = dequantize(linear.qweight, linear.qzeros, linear.scales, torch.float64)
    y = x.double() @ W
    return y if linear.bias is None else y + linear.bias


SIZES = [(32, 8, 32), (96, 40, 32), (128, 8, 128), (384, 24, 128), (320, 56, 64), (256, 16, 256), (2560, 8, 128)]


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(compiled, "loop", lambda function, *fixed: lambda arguments: function(*arguments))
    monkeypatch.setattr(machine, "has_compiler", lambda: True)
    monkeypatch.setattr(fast, "warm", lambda *sizes: None)


@pytest.mark.parametrize("I, O, group", SIZES)
def test_layout_holds_every_number_where_it_says(uncompiled, I, O, group):
    linear = awq_linear(I, O, group)
    words = loops.packed_words(linear.qweight, I // group, compiled.loop)
    J = group // 8
    assert words.shape == (O, I // group, J) and words.dtype == torch.int32
    q = minivl.awq.unpack(linear.qweight)
    rng = random.Random(0)
    for _ in range(100):
        o, a, j, n = rng.randrange(O), rng.randrange(I // group), rng.randrange(J), rng.randrange(8)
        assert int(words[o, a, j]) >> 4 * n & 0xF == q[a * group + J * n + j, o]


@pytest.mark.parametrize("I, O, group", SIZES)
@pytest.mark.parametrize("words, zeros", [(None, None), (15, 0), (15, 15), (0, 15), (0, 0), (None, 0), (None, 15)])
def test_products_are_the_definition(uncompiled, I, O, group, words, zeros):
    linear = awq_linear(I, O, group, words=words, zeros=zeros, bias=words is None)
    packed = layers.Words(linear)
    assert len(packed.words) == 1 or I * 4 > layers.NEAR
    for rows in (1, 2, 3, 4, 5, 9, layers.FEW, layers.FEW + 1):
        x = torch.randn(rows, I)
        expected = definition(linear, x)
        for y in (packed(x), packed(x[None])[0]):
            assert y.dtype == torch.float32
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=3e-6 * float(x.abs().sum(1).max()) * 0.15)


def test_dequantised_weights_are_equal_bit_by_bit(uncompiled):
    linear = awq_linear(384, 24, 128)
    packed = layers.Words(linear)
    out = torch.empty(24, 3, 8, 16)
    loops.dequantize(packed.words[0].view(torch.float32), packed.scales[0], packed.zeros[0], loops.SHIFTS, out)
    assert torch.equal(out.view(24, 384).T, dequantize(linear.qweight, linear.qzeros, linear.scales))


def test_layers_with_many_inputs_are_cut_into_parts(uncompiled):
    linear = awq_linear(86 * 128, 8, 128)       # the 4B's down_proj has this many
    packed = layers.Words(linear)
    assert packed.words.shape == (2, 8, 43, 16)
    for rows in (1, 4, 70):
        x = torch.randn(rows, 86 * 128)
        torch.testing.assert_close(packed(x).double(), definition(linear, x), rtol=1e-5, atol=2e-4)


def test_linears_side_by_side(uncompiled):
    linears = [awq_linear(256, O, 64, seed=O) for O in (16, 8, 40)]
    x = torch.randn(3, 256)
    expected = torch.cat([definition(m, x) for m in linears], dim=1)
    torch.testing.assert_close(layers.Words(*linears)(x).double(), expected, rtol=1e-5, atol=1e-4)


def test_rows_of_numbers():
    for I, O in ((32, 8), (200, 24), (384, 40)):
        linear = awq_linear(I, O, I)
        assert torch.equal(loops.rows_of_numbers(linear.qweight), minivl.awq.unpack(linear.qweight).T.int())


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_torchs_own_int4_product(group):
    """It rounds scales, zeros and x to bfloat16, 8 bits."""
    linear = awq_linear(512, 32, group)
    x = torch.randn(2, 3, 512)
    y = layers.OpWords(linear)(x)
    assert y.shape == (2, 3, 32) and y.dtype == torch.float32
    assert minivl.relative_error(y, definition(linear, x).float()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_unpacks_many_rows_words_on_a_gpu_is_the_definition(dtype):
    """Bit by bit; it is compiled there, here it runs as it is."""
    for I, O, group in SIZES:
        linear = awq_linear(I, O, group)
        got = layers.spread(linear.qweight, linear.qzeros, linear.scales, dtype)
        assert torch.equal(got, dequantize(linear.qweight, linear.qzeros, linear.scales, dtype))


@pytest.mark.parametrize("sizes", [(32,), (16, 48)])
def test_the_ops_own_layout_can_be_read_back(sizes):
    linears = [awq_linear(512, O, 128, seed=O, bias=len(sizes) > 1) for O in sizes]
    linears[0].qzeros[:2] = pack(torch.tensor([[0] * 8, [15] * 8], dtype=torch.int32))
    kept = [dict(m.named_buffers()) for m in linears]
    store = layers.OpWords(*linears)
    for at, tensors in enumerate(kept):
        assert store.released(at).keys() == tensors.keys()
        for name, tensor in store.released(at).items():
            assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype, name


def test_a_prompts_attention_head_by_head(monkeypatch):
    attend, plain = layers.ATTENDS[qwen2.Attend](), qwen2.Attend()
    B, H, K, E = 2, 6, 3, 5
    for T in (1, layers.QUERIES - 1, layers.QUERIES, 2 * layers.QUERIES + 7):
        q, k, v = torch.randn(B, T, H, E).transpose(1, 2), torch.randn(B, K, T, E), torch.randn(B, K, T, E)
        for product in (F.linear, machine.onednn):
            monkeypatch.setattr(machine, "products", lambda product=product: (product, False))
            expected = plain(q.double(), k.double(), v.double(), None)
            torch.testing.assert_close(attend(q, k, v, None).double(), expected, rtol=1e-4, atol=1e-5)
    mask = torch.rand(B, 1, T, T) < 0.5
    mask |= torch.eye(T, dtype=torch.bool)
    assert torch.equal(attend(q, k, v, mask), plain(q, k, v, mask))


def test_attention_head_by_head(monkeypatch):
    q, k, v = (torch.randn(2, 3, 7, 5) for _ in range(3))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    for product in (F.linear, machine.onednn):
        monkeypatch.setattr(machine, "products", lambda product=product: (product, False))
        for strided in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
            torch.testing.assert_close(layers.HeadByHead()(strided, k, v).double(), expected, rtol=1e-5, atol=1e-6)


def test_gelu_inside_the_product():
    mlp = vit.MLP(types.SimpleNamespace(hidden_size=24, intermediate_size=40))
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        expected = mlp.double()(x.double())
        mlp.float().__class__ = layers.GeluInside
        layers.Linear.of(mlp.fc1)
        layers.Linear.of(mlp.fc2)
        torch.testing.assert_close(mlp(x).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_linears_whose_weight_is_cut_once(monkeypatch, bias):
    linear = torch.nn.Linear(33, 21, bias=bias)
    for product, rounded, tolerance in ((F.linear, False, 1e-6), (machine.onednn, False, 1e-6),
                                        (machine.onednn, True, 1e-2)):
        monkeypatch.setattr(machine, "products", lambda product=product: (product, False))
        monkeypatch.setattr(edits, "_told", set())
        cut = layers.Linear.of(copy.deepcopy(linear), rounded)
        for shape in ((33,), (1, 33), (2, 3, 33), (2, layers.PIECE + 3, 33)):
            x = torch.randn(shape)
            with torch.no_grad():
                y, expected = cut(x), linear(x)
            assert y.dtype == torch.float32 and y.shape == expected.shape
            assert minivl.relative_error(y, expected) < tolerance
        with pytest.raises(minivl.InputError, match="no gradients"):
            cut(torch.randn(2, 33, requires_grad=True))
        with pytest.raises(minivl.InputError, match="cannot be saved"):
            cut.state_dict()
        with pytest.warns(UserWarning, match="looked at"):
            weight = cut.weight.detach()
        assert minivl.relative_error(weight, linear.weight.detach()) < tolerance and weight.shape == (21, 33)
        assert type(cut) is torch.nn.Linear and cut.state_dict().keys() == linear.state_dict().keys()


def test_pieces():
    for shape, sizes in (((5,), [1]), ((3, 5), [3]), ((2, 1025, 5), [1025, 1025]), ((0, 5), [0]), ((1535, 5), [1535]),
                         ((1537, 5), [769, 768])):
        found = layers.pieces(torch.randn(shape))
        assert [len(rows) for rows in found] == sizes and all(len(rows) <= 2 * layers.PIECE for rows in found)


def test_scratch_is_kept_for_each_thread_and_written_in_every_mode():
    with torch.inference_mode():
        first = machine.scratch(10, torch.float32, 7)
    first.zero_()
    assert machine.scratch(6, torch.float32, 7).data_ptr() == first.data_ptr()
    assert machine.scratch(6, torch.float32, 8).data_ptr() != first.data_ptr()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(machine.scratch, 10, torch.float32, 7).result()
    assert other.data_ptr() != first.data_ptr() and len(machine.scratch(11, torch.float32, 7)) == 11


def test_a_long_prompt_through_the_mlp(uncompiled):
    """In pieces, in one memory: rows of one piece must not show in another's."""
    linears = [awq_linear(32, 40, 32, bias=False),
               awq_linear(32, 40, 32, bias=False, seed=1),
               awq_linear(40, 32, 40, bias=False, seed=2)]
    mlp = qwen2.MLP(types.SimpleNamespace(hidden_size=32, intermediate_size=40), lambda I, O, bias: linears[0])
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = linears
    quick = copy.deepcopy(mlp)
    quick.__class__ = layers.FastMLP
    quick.side_by_side = layers.pack(layers.Words(quick.gate_proj, quick.up_proj), [quick.gate_proj, quick.up_proj])
    quick.down_proj.words = layers.pack(layers.Words(quick.down_proj), [quick.down_proj])
    for shape in ((1, 1, 32), (3, layers.FEW, 32), (2, layers.PIECE + 9, 32), (1, layers.FEW + 1, 32)):
        x = torch.randn(shape)
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                assert minivl.relative_error(quick(x), mlp(x)) < 1e-5


def test_both_float32_products(monkeypatch):
    x, w, b = torch.randn(5, 7, 33), torch.randn(21, 33), torch.randn(21)
    for bias in (b, None):
        expected = F.linear(x.double(), w.double(), None if bias is None else bias.double())
        for product in (F.linear, machine.onednn):
            torch.testing.assert_close(product(x, w, bias).double(), expected, rtol=1e-5, atol=1e-5)
    assert machine.products()[0] in (F.linear, machine.onednn)


def test_head_and_embedding_in_half_precision(uncompiled):
    for dtype in (torch.float16, torch.bfloat16):
        head = torch.nn.Linear(48, 70, bias=False)
        head.weight.data = head.weight.data.to(dtype)
        head.__class__ = layers.HalfLinear
        for rows in (1, 3, 4, 9):
            x = torch.randn(2, rows, 48)
            for part in (x, x[:1]):
                expected = part.double() @ head.weight.double().T
                torch.testing.assert_close(head(part).double(), expected, rtol=1e-5, atol=1e-5)
    table = torch.nn.Embedding(9, 5)
    table.weight.data = table.weight.data.half()
    table.__class__ = layers.HalfEmbedding
    assert torch.equal(table(torch.tensor([[3, 8]])), table.weight[[3, 8]][None].float())


def test_huge_memory():
    for shape in ((3, 5), (0, 4), (2**20 + 1,)):
        x = machine.huge(shape, torch.float16)
        assert x.shape == torch.Size(shape) and x.dtype == torch.float16
        x.fill_(1.5)
        assert float(x.sum(dtype=torch.float64)) == 1.5 * x.numel()


@pytest.fixture
def every_model_is_large(monkeypatch, uncompiled):
    monkeypatch.setattr(fast, "LARGE", 0)
    # not compiled, they may have a single group
    monkeypatch.setattr("minivl.fast.replace.relays", lambda model: True)


@torch.no_grad()
def logits(model, ids, pixel_values):
    """Prefill, then token by token: [logits, ...]."""
    cache, language = KVCache(), model.language_model
    out = [language(model.embed(ids, model.visual_tokens(pixel_values)), cache)]
    for token in (5, 9, 11):
        out.append(language(language.model.embed_tokens(torch.tensor([[token]])), cache))
    return torch.cat(out, dim=1)


def test_a_whole_model(tiny, every_model_is_large):
    plain, exact, rounded = minivl.load(tiny), minivl.load(tiny, precision="exact"), minivl.load(tiny, precision="fast")
    assert isinstance(exact.language_model.layers[0].mlp.side_by_side, layers.Words)
    assert exact.language_model.lm_head.weight.dtype == torch.float16
    T = 3 + 4
    ids = torch.tensor([[3, 4, *[plain.img_context_token_id] * 4, 7]])
    pixel_values = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    expected, got = (logits(m, ids, pixel_values) for m in (plain, exact))
    assert expected.shape[1] == T + 3
    assert minivl.relative_error(got, expected) < 2e-5
    assert minivl.relative_error(logits(rounded, ids, pixel_values), expected) < 0.1


def test_generated_tokens_are_the_same(tiny, every_model_is_large):
    ids = [[3, 4, 9], [8, 1, 2, 77, 5, 6]]
    plain, exact = (minivl.generate(minivl.load(tiny, precision=precision), ids, max_new_tokens=12, ignore_eos=True)
                    for precision in (None, "exact"))
    assert plain == exact


def test_small_models_stay_as_they_are(tiny):
    plain, exact, rounded = minivl.load(tiny), minivl.load(tiny, precision="exact"), minivl.load(tiny, precision="fast")
    assert exact.state_dict().keys() == plain.state_dict().keys()
    assert any(isinstance(m, layers.OpWords) for m in rounded.modules())
    with pytest.raises(minivl.InputError, match="not one of exact, fast"):
        minivl.load(tiny, precision="best")


def test_half_precision_is_left_alone(tiny, every_model_is_large):
    model = minivl.load(tiny, dtype="bfloat16", precision="exact")
    assert any(isinstance(m, AWQLinear) for m in model.modules())


@pytest.mark.slow
@pytest.mark.skipif(not fast.has_compiler(), reason="no C++ compiler")
def test_compiled_loops_are_the_functions():
    """One compilation serves all shapes, with gradients on, off and in inference mode."""
    sizes = ((256, 24, 128), (384, 8, 128), (2560, 40, 128), (22016, 8, 128))
    linears = [awq_linear(*size, seed=i) for i, size in enumerate(sizes)]
    for linear, mode in zip(linears, (torch.enable_grad, torch.no_grad, torch.inference_mode, torch.enable_grad)):
        packed = layers.Words(linear)
        for rows in (1, 3, 4, 6, 66):
            with mode():
                x = torch.randn(rows, linear.qweight.shape[0])
                torch.testing.assert_close(packed(x).double(), definition(linear, x), rtol=1e-5, atol=4e-4)
    for rows in (1, 66):            # another group size, another compilation
        linear = awq_linear(96, 16, 32)
        x = torch.randn(96, rows).T     # not contiguous
        torch.testing.assert_close(layers.Words(linear)(x).double(), definition(linear, x), rtol=1e-5, atol=2e-4)
    rounded = layers.Words(linears[0], rounded=True)
    x = torch.randn(70, 256)
    assert 1e-4 < minivl.relative_error(rounded(x), definition(linears[0], x).float()) < 2e-2
    head = torch.nn.Linear(64, 333, bias=False)
    head.weight.data = head.weight.data.half()
    head.__class__ = layers.HalfLinear
    for rows in (1, 2, 4):
        x = torch.randn(1, rows, 64)
        with torch.no_grad():
            torch.testing.assert_close(head(x).double(), x.double() @ head.weight.double().T, rtol=1e-5, atol=1e-5)
    head(x).sum().backward()                # by the definition: the gradient is not lost
    torch.testing.assert_close(head.weight.grad[0].float(), x[0].sum(0), rtol=1e-2, atol=1e-2)
    files = [compiled.loop_file(function, *fixed) for function, fixed in compiled._loops]
    assert len({*files}) == len(files) == 10 and all(path.exists() for path in files)
    key = loops.half_rows, (4, 64, torch.float16)
    files[list(compiled._loops).index(key)].write_bytes(b"cut")         # a full disk, say
    del compiled._loops[key]
    with torch.no_grad():
        x = x[:2, :64]
        torch.testing.assert_close(head(x).double(), x.double() @ head.weight.double().T, rtol=1e-5, atol=1e-5)


def test_a_broken_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "_loops", {})
    monkeypatch.setattr(compiled, "build", lambda *what: 1 / 0)
    compiled.cache_folder.cache_clear()
    with pytest.raises(minivl.InputError, match="could not make a loop of few_rows.*MINIVL_COMPILE=0"):
        compiled.loop(loops.few_rows, 1, 16)
    assert compiled.cache_folder() == tmp_path / "minivl"
    compiled.cache_folder.cache_clear()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files")
def test_loops_are_kept_only_where_nobody_else_writes(monkeypatch, tmp_path):
    """What lies in the cache is run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for mode, kept in ((0o700, True), (0o770, False), (0o707, False)):
        (tmp_path / "minivl").mkdir(exist_ok=True)
        (tmp_path / "minivl").chmod(mode)
        compiled.cache_folder.cache_clear()
        folder = compiled.cache_folder()
        assert (folder == tmp_path / "minivl") == kept and folder.is_dir() and not folder.stat().st_mode & 0o022
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiled.cache_folder.cache_clear()
    assert compiled.cache_folder().is_dir()
    compiled.cache_folder.cache_clear()


def test_what_compiled_int4_refuses(uncompiled):
    packed = layers.Words(awq_linear(64, 8, 32))
    with pytest.raises(minivl.InputError, match="no gradients"):
        packed(torch.randn(2, 64, requires_grad=True))
    with torch.no_grad():
        packed(torch.randn(2, 64, requires_grad=True))
    with pytest.raises(minivl.InputError, match="float32 on the CPU, not for torch.float16 on cpu"):
        packed.half()(torch.randn(2, 64))


def test_without_a_compiler_the_definition_serves(tiny, every_model_is_large, monkeypatch):
    monkeypatch.setattr(machine, "has_compiler", lambda: False)
    monkeypatch.setattr(fast, "has_compiler", lambda: False)
    exact = minivl.load(tiny, precision="exact")
    assert any(isinstance(m, AWQLinear) for m in exact.modules())
    assert exact.language_model.lm_head.weight.dtype == torch.float16
    a, b = (minivl.generate(m, [[3, 4, 9]], max_new_tokens=8, ignore_eos=True) for m in (exact, minivl.load(tiny)))
    assert a == b
