"""`python -m minivl models`: the numbers of all sizes, what fits, what lies in the hub's cache; no network."""
import json
import shutil
import socket

import pytest
import torch

from minivl import InputError, MiniVL
from minivl import __main__ as cli
from minivl.choose import Weights, as_text, downloaded, family, fits, weights
from minivl.config import Config
from minivl.fast.replace import keeps_half
from minivl.files.find import find
from weights_tools.synthesize import config_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "models--OpenGVLab--InternVL2_5-4B-MPO-AWQ"
# Parameters, tensors, GB in bfloat16; tensors and GB in int4, which 1B and 2B were not released in.
RELEASED = {
    "1B": (938_193_024, 637, 1.876, 973, 1.347), "2B": (2_205_754_368, 517, 4.412, 757, 2.176),
    "4B": (3_712_637_952, 781, 7.425, 1285, 3.318), "8B": (8_075_365_376, 573, 16.151, 893, 5.818),
    "26B": (25_514_186_112, 934, 51.028, 1414, 23.309), "38B": (38_388_164_992, 1366, 76.776, 2262, 30.577),
    "78B": (78_408_318_336, 1558, 156.817, 2678, 52.869)}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def no_network(monkeypatch):
    def called(*args, **options):
        raise AssertionError("the network was asked")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(socket, "getaddrinfo", called)
    monkeypatch.setattr(socket.socket, "connect", called)


@pytest.mark.parametrize("size", RELEASED)
def test_parameters_tensors_and_bytes(size):
    parameters, tensors, gb, tensors_awq, gb_awq = RELEASED[size]
    plain, awq = weights(size), weights(size, awq=True)
    assert plain.parameters == awq.parameters == parameters
    assert (plain.tensors, awq.tensors) == (tensors, tensors_awq)
    assert plain.half == 2 * parameters and plain.float32 == 4 * parameters
    assert (f"{plain.half / 1e9:.3f}", f"{awq.half / 1e9:.3f}") == (f"{gb:.3f}", f"{gb_awq:.3f}")


@pytest.mark.parametrize("size, awq", [("1B", False), ("2B", True), ("4B", True)])
def test_one_layer_of_each_stands_for_all(size, awq):
    """Against the sums over a model built whole."""
    with torch.device("meta"):
        model = MiniVL(Config.from_json(config_json(size, awq=awq)))
        state = model.state_dict()
        assert keeps_half(model) == awq     # what the sums take for granted of every released int4 model
    ends = (".qweight", ".qzeros", ".scales", *([".embed_tokens.weight", ".lm_head.weight", ".tok_embeddings.weight",
                                                 "model.output.weight"] if awq else []))
    kept = [t.nbytes if not t.is_floating_point() else 2 * t.numel() for n, t in state.items() if n.endswith(ends)]
    floats = [t.numel() for n, t in state.items() if not n.endswith(ends)]
    found = weights(size, awq)
    assert found.tensors == len(state)
    assert (found.half, found.float32) == (sum(kept) + 2 * sum(floats), sum(kept) + 4 * sum(floats))
    assert found.largest == max([4 * n for n in floats] + kept)


def test_a_size_that_is_none():
    with pytest.raises(InputError, match="size '3B' is not one of 1B, 2B, 4B, 8B, 26B, 38B, 78B"):
        weights("3B")


@pytest.mark.parametrize("free, what", [(11_000, "float32"), (10_999, "half"), (5_500, "half"), (5_499, "no"),
                                        (0, "no"), (None, None)])
def test_what_fits(free, what):
    assert fits(Weights(parameters=2500, tensors=9, half=5_000, float32=10_000, largest=1_000), free) == what


def snapshot(cache, folder=None, leave_out=()):
    """The hub's cache with a repository of this folder's files."""
    files = cache / REPOSITORY / "snapshots" / COMMIT
    files.mkdir(parents=True)
    (cache / REPOSITORY / "refs").mkdir()
    (cache / REPOSITORY / "refs" / "main").write_text(COMMIT)
    for path in folder.iterdir() if folder else ():
        if path.name not in leave_out:
            shutil.copy(path, files / path.name)
    return files


@pytest.mark.parametrize("form", ["awq", "awq-shards", "awq-bin"])
def test_downloaded(form, made, cache, no_network):
    hub_id = "OpenGVLab/InternVL2_5-4B-MPO-AWQ"
    assert downloaded(hub_id) == "no"
    files = snapshot(cache, made(form))
    assert downloaded(hub_id) == "whole"
    rows = {row["name"]: row["downloaded"] for row in family()["models"]}
    assert rows.pop("4b-mpo-awq") == "whole" and set(rows.values()) == {"no"}
    weight_files = sorted(path for path in files.iterdir() if path.suffix in (".safetensors", ".bin"))
    weight_files[-1].unlink()
    assert downloaded(hub_id) == "partial"
    for path in files.iterdir():        # only config.json, as the tool that lists tensors afar leaves it
        if path.name != "config.json":
            path.unlink()
    assert downloaded(hub_id) == "partial"


def test_a_download_that_only_began(cache):
    snapshot(cache)
    assert downloaded("OpenGVLab/InternVL2_5-4B-MPO-AWQ") == "partial"
    (cache / REPOSITORY / "refs" / "main").unlink()         # another revision than the one that the name means
    assert downloaded("OpenGVLab/InternVL2_5-4B-MPO-AWQ") == "no"


def test_what_is_downloaded_is_found_by_its_short_name(made, cache):
    files = snapshot(cache, made("awq"))
    assert find("4b-mpo-awq") == find("4B-MPO-AWQ") == files


def test_the_table(cache, no_network, capsys, monkeypatch):
    monkeypatch.setattr("minivl.choose.free_memory", lambda: 10_000_000_000)
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    rows = [" ".join(line.split()) for line in out.splitlines() if "300M" in line or " 6B " in line]
    assert len(rows) == 24 and rows[0] == "1b Qwen2.5-0.5B 300M 0.94 1.88 3.75 yes no"
    assert "2b-mpo internlm2_5-1_8b 300M 2.21 4.41 8.82 yes no" in rows
    assert "4b Qwen2.5-3B 300M 3.71 7.43 14.85 half no" in rows
    assert "8b-mpo-awq internlm2_5-7b 300M 8.08 5.82 6.49 yes no" in rows
    assert rows[-1] == "78b-mpo-awq Qwen2.5-72B 6B 78.41 52.87 64.29 no no"
    assert out.startswith("Free memory: 10.0 GB; no GPU.")


def test_the_table_with_a_gpu_or_without_numbers(cache, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80_000_000_000, 85_000_000_000))
    monkeypatch.setattr("minivl.choose.free_memory", lambda: None)
    out = as_text(family())
    assert max(map(len, out.splitlines())) <= 80
    rows = {line.split()[0]: line.split()[-3:] for line in out.splitlines() if "300M" in line or " 6B " in line}
    assert out.startswith("Free memory: unknown; on the GPU 80.0 GB.")
    assert rows["26b"] == ["?", "yes", "no"] and rows["38b"] == ["?", "yes", "no"] and rows["78b"] == ["?", "no", "no"]
    assert rows["78b-awq"] == ["?", "yes", "no"]


def test_json_holds_all_of_it(cache, capsys):
    assert cli.main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["free_bytes"] > 0 and found["free_gpu_bytes"] is None or torch.cuda.is_available()
    rows = {row["name"]: row for row in found["models"]}
    row = rows["26b-awq"]
    assert row == {**row, "hub_id": "OpenGVLab/InternVL2_5-26B-AWQ", "decoder": "internlm/internlm2_5-20b-chat",
                   "tower": "OpenGVLab/InternViT-6B-448px-V2_5", "parameters": 25_514_186_112,
                   "download_bytes": 23_309_003_520, "half_bytes": 23_309_003_520, "float32_bytes": 34_616_047_104,
                   "downloaded": "no"}


def test_the_hubs_client_is_not_asked_of_what_is_not_there(cache, monkeypatch):
    """Its search costs a second of imports."""
    monkeypatch.setattr("minivl.choose.cached", lambda *asked: 1 / 0)
    assert {row["downloaded"] for row in family()["models"]} == {"no"}
    snapshot(cache)
    with pytest.raises(ZeroDivisionError):
        family()
