"""Every released form loads and gives the same numbers; every damaged one is refused with a name and a next step."""
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import GOLDEN

import minivl
from minivl import InputError
from minivl.config import Config
from minivl.files.find import choose_files, find
from minivl.files.formats import open_weights, safetensors_header
from weights_tools.files import save_safetensors

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def logits(folder, **options):
    with torch.no_grad():
        return minivl.load(folder, **options)(IDS)


def raw(path):
    """name -> tensor, copied, so that the file may be rewritten."""
    return {name: t.read().clone() for name, t in open_weights(path).items()}


def write(folder, tensors, name="model.safetensors"):
    save_safetensors(tensors, folder / name)


@pytest.fixture
def copy(tmp_path):
    """A writable copy of the golden AWQ checkpoint, which carries no digests (as released files do not)."""
    folder = tmp_path / "copy"
    shutil.copytree(GOLDEN / "qwen2-awq", folder)
    return folder


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# ---- forms ----

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


def test_pickled_tensors_are_mapped_one_by_one(tmp_path):
    """Views of one storage, at offsets, an empty one; each comes with its own bytes alone."""
    whole = torch.arange(60.0)
    tensors = {"empty": torch.empty(0, 3), "b": whole[10:40].view(5, 6), "a": whole, "half": torch.randn(7).half(),
               "words": torch.randint(-2**31, 2**31, (4, 9)).int(), "scalar": torch.tensor(2.5)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    found = open_weights(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = found[name].read()
        assert torch.equal(read, tensor) and read.dtype == tensor.dtype, name
        assert read.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


def test_statistics_and_code_are_never_opened(copy):
    (copy / "inputs_stats.pth").write_bytes(b"not a pickle")
    (copy / "modeling_internvl_chat.py").write_text("raise SystemExit('executed')")
    (copy / "pytorch_model.bin").write_bytes(b"safetensors come first")
    minivl.load(copy)


def test_quantization_block_anywhere(copy):
    want = logits(copy)

    def to_top(config):
        config["quantization_config"] = config["llm_config"].pop("quantization_config")
    edit(copy, to_top)
    assert torch.equal(logits(copy), want)

    def deeper(config):
        config["extra"] = [{"inside": config.pop("quantization_config")}]
    edit(copy, deeper)
    assert torch.equal(logits(copy), want)


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


# ---- memory ----

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
    """As stored (float16) the weights stay in the mapped file; another dtype is one copy of them. 10 % and 8 MiB slack."""
    config = json.loads((GOLDEN / "qwen2-awq" / "config.json").read_text())
    del config["llm_config"]["quantization_config"]
    config["llm_config"].update(hidden_size=1024, intermediate_size=4096, vocab_size=9000, num_hidden_layers=4)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in minivl.MiniVL(Config.from_json(config)).state_dict().items()}
    write(tmp_path, {n: torch.full(s, 0.01, dtype=torch.float16) for n, s in shapes.items()})
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY, str(GOLDEN / "qwen2-awq"), str(tmp_path), dtype],
                         capture_output=True, text=True, check=True).stdout
    peak, weights, largest = map(int, out.split())
    assert weights > 130e6
    assert peak <= copies * weights * 1.1 + largest + 8 * 2 ** 20, (peak, weights, largest)


# ---- refusals: the files ----

def refused(folder, message):
    with pytest.raises(InputError, match=message) as error:
        minivl.load(folder)
    assert " at 0x" not in str(error.value)
    return str(error.value)


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
    with pytest.raises(InputError, match="mlp1.1.weight .* its values exceed torch.float16; load with dtype='bfloat16'"):
        minivl.load(copy, dtype="float16")


def last_tensor(path):
    entries, _, start = safetensors_header(path)
    name = max(entries, key=lambda n: entries[n][3])
    return name, start + entries[name][2]


def test_cut_padded_and_altered_safetensors(copy):
    path = copy / "model.safetensors"
    data, (name, begin) = path.read_bytes(), last_tensor(path)
    path.write_bytes(data[:begin + 5])
    refused(copy, f"ends at byte {begin + 5}, inside {name}, .* cut short")
    path.write_bytes(data + b"\0" * 16)
    refused(copy, f"16 bytes follow its last tensor {name}")
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    for change, message in (
            (lambda h: h[name].update(shape=[1, *h[name]["shape"], 2]), f"{name} .* the header was altered"),
            (lambda h: h[name].update(data_offsets=[0, 8]), "the header was altered"),
            (lambda h: h[name].update(dtype="F7"), f"{name} has dtype F7"),
            (lambda h: h[name].update(shape=[-1]), "its header is corrupt"),
            (lambda h: h[name].pop("dtype"), "its header is corrupt"),
            (lambda h: h.update(x=3), "its header is corrupt")):
        altered = json.loads(json.dumps(header))
        change(altered)
        text = json.dumps(altered).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little"):])
        refused(copy, message)


@pytest.mark.parametrize("data, message", [
    (b"", "announce a header of 0 bytes, the file has 0"), (b"\x01", "the file has 1"),
    (b"\xff" * 8 + b"{}", "announce a header of 18446744073709551615 bytes"),
    ((50).to_bytes(8, "little") + b"{}", "announce a header of 50 bytes, the file has 10"),
    ((2).to_bytes(8, "little") + b"[]", "its header is corrupt"), ((2).to_bytes(8, "little") + b"{\xff", "its header is corrupt"),
    ((9).to_bytes(8, "little") + b'{"a": [1]}'[:9], "its header is corrupt")])
def test_corrupt_safetensors_headers(copy, data, message):
    (copy / "model.safetensors").write_bytes(data)
    refused(copy, message)


def test_deeply_nested_header(copy):
    text = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (copy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    refused(copy, "its header is corrupt")


def test_a_flipped_bit_is_found_by_digest(tiny, tmp_path):
    """Files of weights_tools carry a sha256 of each tensor."""
    folder = tmp_path / "flipped"
    shutil.copytree(tiny, folder)
    path = folder / "model.safetensors"
    entries, _, start = safetensors_header(path)
    name = next(n for n in entries if n.endswith("qweight"))
    data = bytearray(path.read_bytes())
    data[start + entries[name][2] + 7] ^= 1
    path.write_bytes(data)
    refused(folder, f"{name} does not match its sha256 digest")


# ---- refusals: pickles ----

def as_bin(folder):
    tensors = raw(folder)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin", tensors


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


def test_a_pickle_that_runs_code_is_refused_unrun(copy):
    path, tensors = as_bin(copy)
    witness = copy / "executed"
    torch.save({**tensors, "x": Evil(str(witness))}, path)
    refused(copy, "holds more than tensors .* nothing of it was run")
    path.write_bytes(pickle.dumps(Evil(str(witness))))
    refused(copy, "pytorch_model.bin is not a whole PyTorch file")      # a bare pickle, not a zip
    assert not witness.exists()
    # the same pickle does run when unpickled freely: the test can fail
    pickle.loads(path.read_bytes()).close()
    assert witness.exists()


def test_cut_altered_and_strange_pickles(copy):
    path, tensors = as_bin(copy)
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])
    refused(copy, "pytorch_model.bin is not a whole PyTorch file")
    path.write_bytes(b"hello")
    refused(copy, "pytorch_model.bin is not a whole PyTorch file")
    for name in ("mlp1.1.weight", "language_model.model.layers.2.mlp.up_proj.qweight"):
        part = tensors[name].flatten()[:64].contiguous()
        needle = bytes(part.view(torch.uint8).tolist())
        assert data.count(needle) == 1
        altered = bytearray(data)
        altered[data.index(needle) + 9] ^= 4
        path.write_bytes(altered)
        refused(copy, f"{name} does not match its checksum")
    torch.save([1, 2], path)
    refused(copy, "does not hold a dict of names and tensors")
    torch.save({"a": torch.zeros(3).to_sparse()}, path)
    refused(copy, "holds more than tensors .*_rebuild_sparse_tensor")
    torch.save({"a": torch.zeros(3, 4).T}, path)
    refused(copy, "a is not a plain contiguous tensor")
    torch.save({**tensors, "mlp1.1.bias": torch.nn.Parameter(tensors["mlp1.1.bias"])}, path)
    minivl.load(copy)


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The zip written again with each record's bytes passed through `change(name, bytes)`."""
    with zipfile.ZipFile(path) as archive:
        records = [(r.filename, change(r.filename, archive.read(r))) for r in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records:
            archive.writestr(name, data)


def test_zips_that_torch_never_writes(copy):
    path, tensors = as_bin(copy)
    whole = path.read_bytes()
    rewritten(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    refused(copy, "has compressed or repeated records")
    path.write_bytes(whole)     # a record shorter than its tensor: torch would read on into the next one
    rewritten(path, lambda name, data: data[:-2] if name.endswith("/data/5") else data)
    refused(copy, "its tensors claim .* bytes, its records hold|is not a whole PyTorch file")
    # a tower of tuples, each twice the one below: as a dict key its hash would take 2^60 steps
    tower = b"\x80\x02}(" + b"K\x01K\x02\x86q\x00" + b"".join(
        (b"h" + bytes([i])) * 2 + b"\x86q" + bytes([i + 1]) for i in range(60)) + b"K\x01u."
    path.write_bytes(whole)
    rewritten(path, lambda name, data: tower if name.endswith("data.pkl") else data)
    refused(copy, "is not a whole PyTorch file")


# ---- refusals: index and folder ----

def test_bad_index(copy):
    tensors = raw(copy)
    names = sorted(tensors)
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    index = copy / "model.safetensors.index.json"

    def written(weight_map, message):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(copy, message)
    good = {n: "model-00001-of-00001.safetensors" for n in names}
    written({**good, names[3]: "../elsewhere.safetensors"}, "points outside its folder: '../elsewhere.safetensors'")
    written({**good, names[3]: "/etc/passwd"}, "points outside its folder")
    written({**good, names[3]: "model-00002-of-00002.safetensors"}, "lacks the shard model-00002-of-00002.safetensors")
    written({**good, "more.weight": "model-00001-of-00001.safetensors"}, r"names tensors that the shards lack: more.weight \(in")
    written({n: f for n, f in good.items() if n != names[3]}, f"holds {names[3]}, which .* places in no file")
    written([1], "has no weight_map")
    index.write_text("{")
    refused(copy, "not valid JSON at line 1")


def test_folders_and_names(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="has no config.json; is the download complete?"):
        minivl.load(tmp_path)
    (tmp_path / "config.json").write_text((GOLDEN / "qwen2-awq" / "config.json").read_text())
    with pytest.raises(InputError, match="has no weights; expected one of model.safetensors.index.json"):
        minivl.load(tmp_path)
    with pytest.raises(InputError, match="is a file; give the folder"):
        minivl.load(tmp_path / "config.json")
    with pytest.raises(InputError, match="does not exist; give a folder"):
        minivl.load(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(InputError, match="does not exist; give a folder"):      # a typo in a path is not asked of the hub
        minivl.load(f"{tmp_path.name}/typo")
    with pytest.raises(InputError, match="is a local folder, it has no revision 'v1'"):
        minivl.load(tmp_path, revision="v1")
    with pytest.raises(InputError, match="is not in the local cache .* offline mode is set"):
        minivl.load("OpenGVLab/InternVL2_5-4B-MPO-AWQ")
    with pytest.raises(InputError, match="dtype 'int8' is not one of float32, float16, bfloat16"):
        minivl.load(GOLDEN / "qwen2-awq", dtype="int8")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    with pytest.raises(InputError, match="torch 2.5.1.cu121 is too old"):
        minivl.load(GOLDEN / "qwen2-awq")


# ---- hub ----

def test_which_files_are_fetched():
    small = ["config.json", "generation_config.json", "vocab.json", "merges.txt", "added_tokens.json"]
    other = ["modeling_internvl_chat.py", "inputs_stats.pth", "README.md", "conversation.py", ".gitattributes"]
    bins = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]
    tensors = [n.replace("pytorch_model", "model").replace("bin", "safetensors") for n in bins]
    assert set(choose_files(small + other + bins)) == {*small, *bins}
    assert set(choose_files(small + other + bins + tensors)) == {*small, *tensors}
    with pytest.raises(InputError, match="no weights among the 5 files"):
        choose_files(small)


@pytest.mark.parametrize("kind, message", [
    ("RepositoryNotFoundError", "there is no some/model on the hub"), ("RevisionNotFoundError", "has no revision 'v2' on the hub"),
    ("GatedRepoError", "is gated on the hub"), (ConnectionError, r"could not read some/model .* from the hub \(ConnectionError\)")])
def test_hub_errors_are_ours(monkeypatch, kind, message):
    import huggingface_hub
    from huggingface_hub import errors
    kind = getattr(errors, kind) if isinstance(kind, str) else kind

    def fail(self, *args, **options):
        raise kind.__new__(kind)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    with pytest.raises(InputError, match=message):
        find("some/model", revision="v2")


def test_offline_asks_nobody(monkeypatch):
    import socket

    def called(*args, **options):
        raise AssertionError("the network was asked")
    monkeypatch.setattr(socket, "getaddrinfo", called)
    monkeypatch.setattr(socket.socket, "connect", called)
    with pytest.raises(InputError, match="offline mode is set"):
        minivl.load("some/model")
    with pytest.raises(InputError, match="(?i)offline"):
        minivl.load_image("https://example.com/a.png")


# ---- config ----

@pytest.mark.parametrize("path, value, message", [
    ("template", "internlm2-chat", "template is 'internlm2-chat'; minivl knows 'internvl2_5'"),
    ("ps_version", "v1", "ps_version is 'v1'"), ("select_layer", -2, "select_layer is -2"), ("pad2square", True, "pad2square is True"),
    ("downsample_ratio", 0.25, "downsample_ratio is 0.25"), ("use_llm_lora", 8, "use_llm_lora is 8"),
    ("force_image_size", 57, "patch_size 14 does not divide force_image_size 57"), ("force_image_size", 42, "odd number of patches"),
    ("max_dynamic_patch", 0, "max_dynamic_patch is 0, it must be positive"), ("downsample_ratio", 10 ** 400, "no model has such"), ("min_dynamic_patch", 13, "must satisfy 1 <= min <= max"),
    ("use_thumbnail", "yes", "use_thumbnail is 'yes', it must be of type bool"), ("ps_version", None, "ps_version is None"),
    ("vision_config", None, "has no vision_config"), ("vision_config.norm_type", "group_norm", "norm_type is 'group_norm'"),
    ("vision_config.hidden_act", "gelu_new", "hidden_act is 'gelu_new'"), ("vision_config.num_attention_heads", 5, "does not divide"),
    ("llm_config.hidden_act", "gelu", "hidden_act is 'gelu'"), ("llm_config.use_sliding_window", True, "use_sliding_window is True"),
    ("llm_config.rope_scaling", {"type": "yarn"}, "rope_scaling is"), ("llm_config.num_key_value_heads", 3, "3 does not divide"),
    ("llm_config.architectures", ["LlamaForCausalLM"], "'LlamaForCausalLM'; minivl knows 'Qwen2ForCausalLM'"),
    ("llm_config.architectures", ["InternLM2ForCausalLM"], "2B, 8B and 26B models.*cannot run yet"),
    ("llm_config.architectures", {"a": 1}, "minivl knows 'Qwen2ForCausalLM'"), ("llm_config.architectures", 5, "minivl knows"),
    ("llm_config.quantization_config.modules_to_not_convert", 5, "keeps .*in float"),
    ("llm_config.hidden_size", 10 ** 9, "no model has such"), ("llm_config.num_hidden_layers", 10 ** 6, "no model has such"),
    ("llm_config.rms_norm_eps", float("nan"), "no model has such"), ("llm_config.rope_theta", float("inf"), "no model has such"),
    ("llm_config.vocab_size", "600", "vocab_size is '600', it must be of type int"), ("llm_config.rope_theta", 0, "must be positive"),
    ("llm_config.quantization_config.bits", 8, "bits is 8"), ("llm_config.quantization_config.version", "gemv", "version is 'gemv'"),
    ("llm_config.quantization_config.quant_method", "gptq", "quant_method is 'gptq'; minivl knows 'awq'"),
    ("llm_config.quantization_config.zero_point", False, "zero_point is False"),
    ("llm_config.quantization_config.group_size", -1, "group_size is -1"), ("llm_config.quantization_config.group_size", 100, "group_size 100 does not divide hidden_size 128"),
    ("llm_config.quantization_config.modules_to_not_convert", ["model.layers.0"], "keeps .*in float")])
def test_unknown_config_values(copy, path, value, message):
    def change(config):
        *parents, last = path.split(".")
        for key in parents:
            config = config[key]
        config[last] = value
    edit(copy, change)
    with pytest.raises((InputError, ValueError), match=message):
        minivl.load(copy)


@pytest.mark.parametrize("path", ["vision_config.norm_type", "vision_config.qkv_bias", "ps_version", "llm_config.rope_theta"])
def test_missing_config_values_are_not_guessed(copy, path):
    def change(config):
        *parents, last = path.split(".")
        for key in parents:
            config = config[key]
        del config[last]
    edit(copy, change)
    refused(copy, f"{path.split('.')[-1]} is missing")


def test_unknown_keys_are_ignored_and_tying_is_not_read(copy):
    want = logits(copy)
    edit(copy, lambda c: c["llm_config"].update(tie_word_embeddings=True, use_cache=False, num_beams=4))
    assert torch.equal(logits(copy), want)


def test_system_message_of_the_config(tiny, tmp_path):
    folder = tmp_path / "system"
    shutil.copytree(tiny, folder)
    edit(folder, lambda c: c.update(system_message="Be kind."))
    pipe = minivl.pipeline(folder)
    assert "Be kind." in pipe.tokenizer.decode(pipe.turn("hello").ids)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "added_tokens.json", "vocab.json"])
def test_small_files_must_be_objects(tiny, tmp_path, name):
    folder = tmp_path / "list"
    shutil.copytree(tiny, folder)
    (folder / name).write_text("[1, 2]")
    with pytest.raises(InputError, match=f"{name} in .* holds a list, not an object"):
        minivl.pipeline(folder)


def test_small_files_have_a_size(tiny, tmp_path):
    folder = tmp_path / "large"
    shutil.copytree(tiny, folder)
    for name in ("merges.txt", "added_tokens.json", "config.json"):
        with open(folder / name, "r+b") as f:
            f.truncate(10 ** 10)    # sparse
        with pytest.raises(InputError, match=f"{name} .* has 10000000000 bytes, at most"):
            minivl.pipeline(folder)
        copied = (tiny / name).read_bytes()
        (folder / name).write_bytes(copied)


def test_a_number_of_many_digits(copy):
    (copy / "generation_config.json").write_text('{"eos_token_id": ' + "9" * 5000 + "}")
    refused(copy, "generation_config.json .* is not valid JSON")


def test_a_header_that_names_a_tensor_twice(copy):
    path = copy / "model.safetensors"
    data = path.read_bytes()
    text = data[8:8 + int.from_bytes(data[:8], "little")].rstrip()
    name = last_tensor(path)[0]
    entry = json.dumps({name: json.loads(text)[name]})[1:-1].encode()
    text = text[:-1] + b"," + entry + b"}"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little"):])
    refused(copy, "its header is corrupt")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 7.5, "meta"])
def test_devices_that_are_not_there(device):
    with pytest.raises(InputError, match="device .* cannot be used here; give cpu, or cuda"):
        minivl.load(GOLDEN / "qwen2-awq", device=device)


def test_internlm2_config_says_so():
    with pytest.raises(InputError, match="cannot run yet"):
        minivl.load(GOLDEN / "vit6b-internlm2")


def test_address_space_is_not_needed(copy):
    """Nothing here allocates by what a header claims: a file that announces a huge tensor is refused at once."""
    path = copy / "model.safetensors"
    text = json.dumps({"a": {"dtype": "F32", "shape": [2 ** 40], "data_offsets": [0, 2 ** 42]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(copy, "cut short")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


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
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(copy)], capture_output=True, text=True, check=True).stdout
    assert out == "False\n"
