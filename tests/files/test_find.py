"""Folders, names and hub ids: what is found, what is fetched, and what an error says."""
import shutil

import pytest
import torch
from conftest import GOLDEN

import minivl
from minivl import InputError
from minivl.files.find import choose_files, find


def test_folders_and_names(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="has no config.json; is the download complete?"):
        minivl.load(tmp_path)
    (tmp_path / "config.json").write_text((GOLDEN / "qwen2-awq" / "config.json").read_text())
    with pytest.raises(InputError, match="has no weights; expected model.safetensors or"):
        minivl.load(tmp_path)
    with pytest.raises(InputError, match="is a file; give the folder"):
        minivl.load(tmp_path / "config.json")
    with pytest.raises(InputError, match="does not exist; give a folder"):
        minivl.load(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(InputError, match="does not exist; give a folder"):      # a typo is not asked of the hub
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


@pytest.mark.parametrize("name", ["config.json.txt", "Config.json", "CONFIG.JSON", "config (1).json", "config",
                                  "config.JSON", "config copy.json", "config.json.json", "config(2).json.txt"])
def test_a_small_file_under_a_near_name_is_named(copy, name):
    (copy / "config.json").rename(copy / name)
    with pytest.raises(InputError) as error:
        minivl.load(copy)
    assert str(error.value) == f"{copy} has no config.json; {name} is there: if it is meant, rename it to config.json"


@pytest.mark.parametrize("name", ["tokenizer.json.txt", "Tokenizer.json", "vocab (1).json", "Merges.txt",
                                  "merges.txt.txt", "tokenizer.model.txt", "tokenizer (1).model"])
def test_a_tokenizer_under_a_near_name_is_named(tmp_path, name):
    (tmp_path / name).write_text("{}")
    (tmp_path / "added_tokens.json").write_text("{}")
    with pytest.raises(InputError, match="nor tokenizer.model; .* is there: if it is meant, rename it to [a-z]+[.]"):
        minivl.Tokenizer.load(tmp_path)


def alone(folder):
    """The weights, without the golden data beside them."""
    for path in folder.glob("*.safetensors"):
        if path.name != "model.safetensors":
            path.unlink()
    return folder / "model.safetensors"


@pytest.mark.parametrize("name, to", [
    ("model.fp16.safetensors", "model.safetensors"), ("consolidated.safetensors", "model.safetensors"),
    ("pytorch_model.safetensors", "model.safetensors"), ("Model.SAFETENSORS", "model.safetensors"),
    ("model.pt", "pytorch_model.bin"), ("consolidated.00.pth", "pytorch_model.bin"), ("last.ckpt", "pytorch_model.bin"),
    ("model.bin", "pytorch_model.bin")])
def test_weights_under_another_name_are_named(copy, name, to):
    alone(copy).rename(copy / name)
    for aside in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "inputs_stats.pth", "._model.bin"):
        (copy / aside).write_bytes(b"")
    said = f"; {name} is there: if it holds the whole model, rename it to {to}"
    with pytest.raises(InputError, match="has no weights; expected") as error:
        minivl.load(copy)
    assert str(error.value).endswith(said)
    with pytest.raises(InputError, match="no weights among the 2 files") as error:
        choose_files(["config.json", name])
    assert str(error.value).endswith(said)
    (copy / name).unlink()
    with pytest.raises(InputError, match="has no weights; expected .*[.] Is the download complete?"):
        minivl.load(copy)


def test_several_other_weights_and_other_programs_formats(copy):
    alone(copy).rename(copy / "consolidated-1.safetensors")
    (copy / "consolidated-2.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="consolidated-1.safetensors, consolidated-2.safetensors are there: .*"
                       "model-00001-of-00002.safetensors and so on"):
        minivl.load(copy)
    for name in ("model.gguf", "Model-Q4_K_M.GGUF", "model.onnx"):
        with pytest.raises(InputError, match=f"{name} is there, in a format of other programs"):
            choose_files(["config.json", "onnx/README.md", name])


def test_a_shard_under_a_near_name_is_named(made, tmp_path):
    folder = shutil.copytree(made("plain-shards"), tmp_path / "shards")
    shard = min(folder.glob("model-*.safetensors"))
    shard.rename(folder / f"{shard.stem} (1).safetensors")
    with pytest.raises(InputError, match=rf"lacks the shard {shard.name} .* \(1\).safetensors is there: .*, rename it"):
        minivl.load(folder)


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
    ("RepositoryNotFoundError", "there is no some/model on the hub"),
    ("RevisionNotFoundError", "has no revision 'v2' on the hub"),
    ("GatedRepoError", "is gated on the hub"),
    (ConnectionError, r"could not read some/model .* from the hub \(ConnectionError\)")])
def test_hub_errors_are_ours(monkeypatch, kind, message):
    import huggingface_hub
    from huggingface_hub import errors
    kind = getattr(errors, kind) if isinstance(kind, str) else kind

    def fail(self, *args, **options):
        raise kind.__new__(kind)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
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


@pytest.mark.parametrize("how", ["find", "download", "inspect"])
def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch, how, caplog):
    """The real client against a port where nobody listens: one try, and nothing is said before our sentence."""
    import socket
    import time

    import huggingface_hub

    from weights_tools import download, inspect
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s to try again"))
    ask = {"find": find, "download": download.download, "inspect": inspect.inspect}[how]
    with pytest.raises(InputError, match=r"could not read some/model from the hub \(.*refused.*check the network"):
        ask("some/model")
    assert not caplog.records
