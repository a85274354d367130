"""Every released form loads and gives the same numbers; what does not fit the model is named."""
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checkpoints import IDS, edit, logits, raw, refused, write
from conftest import GOLDEN

import minivl
from minivl import InputError
from minivl.config import Config
from weights_tools.inspect import inspect


def test_all_forms_give_the_same_logits(copy):
    want, tensors = logits(copy), raw(copy)
    names = sorted(tensors)
    halves = names[:len(names) // 2], names[len(names) // 2:]

    def fresh():
        for path in copy.glob("*model*"):
            path.unlink()
    fresh()
    torch.save(tensors, copy / "pytorch_model.bin")
    assert torch.equal(logits(copy), want)
    for kind, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        fresh()
        files = [f"{kind}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
        for file, half in zip(files, halves):
            part = {n: tensors[n] for n in half}
            write(copy, part, file) if suffix == "safetensors" else torch.save(part, copy / file)
        index = {"metadata": {}, "weight_map": {n: f for f, half in zip(files, halves) for n in half}}
        (copy / f"{kind}.{suffix}.index.json").write_text(json.dumps(index))
        assert torch.equal(logits(copy), want), suffix


def test_statistics_and_code_are_never_opened(copy):
    (copy / "inputs_stats.pth").write_bytes(b"not a pickle")
    (copy / "modeling_internvl_chat.py").write_text("raise SystemExit('executed')")
    (copy / "training_args.bin").write_bytes(b"not a pickle")
    minivl.load(copy)


def test_bfloat16_scales(copy):
    tensors = raw(copy)
    changed = {n: t.bfloat16() if n.endswith(".scales") else t for n, t in tensors.items()}
    write(copy, changed)
    model = minivl.load(copy)
    layer = model.language_model.model.layers[0].mlp.up_proj
    assert layer.scales.dtype == torch.bfloat16
    write(copy, {n: changed[n].float() if n.endswith(".scales") else t for n, t in tensors.items()})
    with torch.no_grad():
        assert torch.equal(model(IDS), logits(copy))     # used as they are, upcast, not rounded again


@pytest.mark.parametrize("dtype, tolerance", [("float16", 5e-3), ("bfloat16", 4e-2), (torch.float32, 0)])
def test_dtypes(copy, dtype, tolerance):
    want, model = logits(copy), minivl.load(copy, dtype=dtype)
    floats = {t.dtype for n, t in model.state_dict().items() if t.is_floating_point() and not n.endswith("scales")}
    assert floats == {getattr(torch, dtype) if isinstance(dtype, str) else dtype}
    assert model.language_model.model.layers[0].self_attn.q_proj.qweight.dtype == torch.int32
    got = model(IDS).detach()
    assert got.dtype == torch.float32 and (got - want).norm() / want.norm() <= tolerance


def test_defaults():
    model = minivl.load(GOLDEN / "qwen2-awq")
    assert model.dtype == torch.float32 and model.device.type == "cpu" and not model.training
    assert model.eos_token_ids == (599,) and model.img_context_token_id is None
    assert {p.requires_grad for p in model.parameters()} == {True}


@pytest.mark.parametrize("listed, strange", [
    (True, "True"), ([True], "True"), ([599, False], "False"), ([1, True], "True"), ("599", "'599'"), (599.0, "599.0"),
    ({"a": 599}, "a dict"), ([[599]], "a list"), (10 ** 6, "1000000"), (600, "600"), (-1, "-1"),
    ([599, 599.0, "7"], "599.0, '7'"), ([*range(600, 700)], "600, 601, 602, ... and 97 more")])
def test_what_is_no_id_stops_nothing_and_is_told(copy, listed, strange):
    """For Python true is the number 1: an answer would end at that token."""
    edit(copy, lambda config: config["llm_config"].update(eos_token_id=listed))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    with pytest.warns(UserWarning) as told:
        assert set(minivl.load(copy).eos_token_ids) <= {1, 599}
    assert [str(warning.message).partition(", which is no token id")[0] for warning in told] == [
        f"llm_config.eos_token_id in config.json of {copy} holds {strange}",
        f"eos_token_id in generation_config.json of {copy} holds {strange}"]


@pytest.mark.parametrize("listed", [None, [], [599, 599], 0, [599, None]])
def test_ids_and_none_are_not_told(copy, listed):
    edit(copy, lambda config: config["llm_config"].update(eos_token_id=listed))
    assert set(minivl.load(copy).eos_token_ids) <= {0, 599}


def test_token_ids_come_from_the_files(tiny, tmp_path):
    model, tokenizer = minivl.load(tiny), minivl.Tokenizer.load(tiny)
    assert model.img_context_token_id == tokenizer.id("<IMG_CONTEXT>")
    assert set(model.eos_token_ids) == {tokenizer.id(t) for t in ("<|im_end|>", "<|im_start|>", "<|endoftext|>")}
    folder = tmp_path / "json"
    shutil.copytree(tiny, folder)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (folder / name).unlink()
    again = minivl.load(folder)
    assert (again.img_context_token_id, again.eos_token_ids) == (model.img_context_token_id, model.eos_token_ids)
    want = minivl.pipeline(tiny)("hello", minivl.GenerationConfig(max_new_tokens=5)).token_ids
    assert minivl.pipeline(folder)("hello", minivl.GenerationConfig(max_new_tokens=5)).token_ids == want


MEMORY = """
import sys, minivl
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
minivl.load(sys.argv[1])                        # a tiny one first: torch's own buffers are not the loader's
before, peak = anonymous(), 0
import threading, time
def watch():
    global peak
    while True:
        peak = max(peak, anonymous()); time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
model = minivl.load(sys.argv[2], dtype=sys.argv[3])
time.sleep(0.01)
weights = sum(t.nbytes for t in model.state_dict().values())
largest = max(t.nbytes for t in model.state_dict().values())
print(peak - before, weights, largest)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
@pytest.mark.parametrize("dtype, copies", [("float32", 1), ("float16", 0)])
def test_peak_memory_is_the_weights_once_and_one_tensor(tmp_path, dtype, copies):
    """As stored (float16) the weights stay in the mapped file; another dtype is one copy. 10 % and 8 MiB slack."""
    config = json.loads((GOLDEN / "qwen2-awq" / "config.json").read_text())
    del config["llm_config"]["quantization_config"]
    config["llm_config"].update(hidden_size=1024, intermediate_size=4096, vocab_size=9000, num_hidden_layers=4)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in minivl.MiniVL(Config.from_json(config)).state_dict().items()}
    write(tmp_path, {n: torch.full(s, 0.01, dtype=torch.float16) for n, s in shapes.items()})
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, str(GOLDEN / "qwen2-awq"), str(tmp_path), dtype]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, weights, largest = map(int, out.split())
    assert weights > 130e6
    assert peak <= copies * weights * 1.1 + largest + 8 * 2 ** 20, (peak, weights, largest)


def test_missing_extra_and_misshapen_tensors_are_all_named(copy):
    tensors = raw(copy)
    del tensors["mlp1.3.bias"], tensors["vision_model.encoder.layers.1.ls2"]
    tensors["extra.weight"] = torch.zeros(3, 5)
    tensors["mlp1.1.bias"] = torch.zeros(127).half()
    tensors["language_model.model.norm.weight"] = torch.zeros(128, dtype=torch.int32)
    write(copy, tensors)
    text = refused(copy, "5 problems")
    for part in ("missing: mlp1.3.bias [128]", "missing: vision_model.encoder.layers.1.ls2 [64]",
                 "unexpected: extra.weight [3, 5]", "shape: mlp1.1.bias is [127] in the file, [128] in the model",
                 "dtype: language_model.model.norm.weight is torch.int32 in the file, the model takes a float"):
        assert part in text


def frequencies(theta=1e6, size=32):
    return theta ** (-torch.arange(0, size, 2).double() / size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tables_that_the_model_computes_are_dropped(copy, dtype):
    """Old versions of transformers saved them."""
    want, tensors = logits(copy), raw(copy)
    size = tensors["language_model.model.layers.0.self_attn.q_proj.bias"].numel() // Config.load(
        copy).llm_config.num_attention_heads
    table = frequencies(Config.load(copy).llm_config.rope_theta, size).to(dtype)
    tables = {f"language_model.model.{at}rotary_emb.inv_freq": table.clone()
              for at in ("", "layers.0.self_attn.", "layers.1.self_attn.")}
    tables["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    write(copy, tensors | tables)
    assert torch.equal(logits(copy), want) and not any(inspect(copy).problems.values())
    for name in tables:
        for other in (tables[name] * 2, tables[name].flatten()[1:].clone(), frequencies(1e4, size).to(dtype)):
            write(copy, tensors | {name: other})
            said = "does not count 0, 1, 2" if name.endswith("ids") else "rope_theta 1e.06, which config.json gives"
            assert name in refused(copy, said)
            assert [line.split()[0] for line in inspect(copy).problems["unexpected"]] == [name]
    write(copy, tensors | {"mlp1.rotary_emb.inv_freq": table})
    refused(copy, "unexpected: mlp1.rotary_emb.inv_freq")


def test_tables_in_a_pickle(copy):
    want, tensors = logits(copy), raw(copy)
    (copy / "model.safetensors").unlink()
    name = "vision_model.embeddings.position_ids"
    for ids, problems in ((torch.arange(5), 0), (torch.ones(5), 1)):
        torch.save(tensors | {name: ids}, copy / "pytorch_model.bin")
        assert len(inspect(copy).problems["unexpected"]) == problems
        if not problems:
            assert torch.equal(logits(copy), want)
    refused(copy, f"unexpected: {name}")


@pytest.mark.parametrize("rows", [632, 500])
def test_embedding_resized_and_an_old_vocab_size(copy, rows):
    tensors = raw(copy)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = tensors[f"language_model.{name}"]
        tensors[f"language_model.{name}"] = torch.cat([old, old])[:rows].clone()
    write(copy, tensors)
    hint = rf"vocab_size 600, the embedding or head has {rows} rows: .* correct vocab_size in config.json"
    refused(copy, f"2 problems(.|\n)*{hint}")
    assert "correct vocab_size" in inspect(copy).note
    tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"][:480].clone()
    write(copy, tensors)
    assert "correct vocab_size" not in refused(copy, "2 problems")      # whose number would it be?


def test_config_and_weights_disagree_about_awq(copy):
    edit(copy, lambda c: c["llm_config"].pop("quantization_config"))
    refused(copy, "The weights are AWQ but config.json has no quantization_config")


def test_wrong_vocabulary_size(copy, tiny, tmp_path):
    edit(copy, lambda c: c["llm_config"].update(vocab_size=700))
    refused(copy, r"lm_head.weight is \[600, 128\] in the file, \[700, 128\] in the model")
    folder = tmp_path / "tokens"
    shutil.copytree(tiny, folder)
    added = json.loads((folder / "added_tokens.json").read_text())
    (folder / "added_tokens.json").write_text(json.dumps({**added, "<more>": 5000}))
    refused(folder, r"the tokenizer has ids up to 5000, the model's vocab_size is \d+")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights(copy, value):
    tensors = raw(copy)
    tensors["vision_model.encoder.layers.2.mlp.fc1.weight"][3, 4] = value
    write(copy, tensors)
    refused(copy, "vision_model.encoder.layers.2.mlp.fc1.weight holds NaN or infinity")


def test_values_beyond_float16(copy):
    tensors = {n: t.bfloat16() if n == "mlp1.1.weight" else t for n, t in raw(copy).items()}
    tensors["mlp1.1.weight"][0, 0] = 1e6
    write(copy, tensors)
    minivl.load(copy)
    message = "mlp1.1.weight .* its values exceed torch.float16; load with dtype='bfloat16'"
    with pytest.raises(InputError, match=message):
        minivl.load(copy, dtype="float16")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 7.5, "meta"])
def test_devices_that_are_not_there(device):
    with pytest.raises(InputError, match="device .* cannot be used here; give cpu, or cuda"):
        minivl.load(GOLDEN / "qwen2-awq", device=device)


def test_loading_changes_nothing_for_other_threads(copy, monkeypatch):
    """The model is made without random numbers; what another thread makes meanwhile has them."""
    made = []

    def build(config):
        with ThreadPoolExecutor(1) as other:
            made.append(other.submit(torch.nn.Embedding, 300, 40).result())
        return minivl.MiniVL(config)
    monkeypatch.setattr(minivl.files.load, "MiniVL", build)
    minivl.load(copy)
    weight = made[0].weight.detach()
    assert weight.device.type == "cpu" and abs(float(weight.std()) - 1) < 0.05 and abs(float(weight.mean())) < 0.05


def test_loading_does_not_import_the_compiler(copy):
    """A second of every start: torch needs it for random numbers on `meta`."""
    code = "import sys, minivl; minivl.load(sys.argv[1]); print('torch._inductor' in sys.modules)"
    command = [sys.executable, "-W", "ignore", "-c", code, str(copy)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
