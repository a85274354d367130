"""inspect: every tensor, who takes it, the sums, and what does not fit; of files here and on the hub."""
import json
import re
import shutil

import pytest
import torch
from conftest import shared, stored
from stand_in_hub import Hub, repository

import minivl
from minivl.files.formats import open_weights, safetensors_header
from minivl.limits import InputError
from weights_tools import files, inspect
from weights_tools.synthesize import config_json, meta_tensors


def run_inspect(capsys, *arguments) -> tuple[int, str]:
    code = inspect.main([str(a) for a in arguments])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("form", ["plain", "plain-bin-shards", "awq-shards", "awq-bin"])
def test_inspect_counts_the_same_weights_in_every_form(form, made, capsys):
    code, out = run_inspect(capsys, made(form), "--json")
    report = json.loads(out)
    assert code == 0 and report["fits"] is True and not any(report["problems"].values()) and report["note"] is None
    tensors = {t["name"]: t for t in report["tensors"]}
    assert list(tensors) == list(meta_tensors(config_json("tiny", awq="awq" in form)))      # in the model's order
    total = report["totals"]["total"]
    assert total["weights"] == 787_200
    assert total["bytes"] == sum(t.nbytes for t in open_weights(made(form)).values())
    assert total["stored"] == sum(t.numel() for t in stored(made(form)).values())
    parts = {part: row for part, row in report["totals"].items() if part != "total"}
    assert list(parts) == ["vision_model", "mlp1", "embeddings", "decoder layers", "norm and head"]
    assert all(sum(row[key] for row in parts.values()) == total[key] for key in total)
    weight = "language_model.model.layers.2.mlp.down_proj." + ("qweight" if "awq" in form else "weight")
    assert tensors[weight] == {
        "name": weight, "dtype": "int32" if "awq" in form else "bfloat16", "bytes": 16384 if "awq" in form else 65536,
        "shape": [256, 16] if "awq" in form else [128, 256], "stored": 4096 if "awq" in form else 32768,
        "weights": 32768, "module": "AWQLinear" if "awq" in form else "Linear", "part": "decoder layers",
        "file": open_weights(made(form))[weight].file.name}
    for name, module in [("vision_model.encoder.layers.0.ls1", "Layer"), ("mlp1.0.weight", "LayerNorm"),
                         ("vision_model.embeddings.position_embedding", "Embeddings"), ("mlp1.3.bias", "Linear"),
                         ("vision_model.embeddings.patch_embedding.weight", "Conv2d"),
                         ("language_model.model.norm.weight", "RMSNorm"),
                         ("language_model.model.embed_tokens.weight", "Embedding")]:
        assert tensors[name]["module"] == module


def test_inspect_text(made, capsys):
    code, out = run_inspect(capsys, made("awq"))
    assert code == 0 and out.rstrip().endswith("fits config.json")
    [row] = [line for line in out.splitlines() if "language_model.model.layers.0.mlp.up_proj.qzeros" in line]
    assert re.split("  +", row)[1:] == ["int32", "[1, 32]", "128", "AWQLinear", "model.safetensors"]
    assert re.search(r"\ntotal +133 +404,016 +787,200 +442,368 +919,488\n", out)
    short = run_inspect(capsys, made("awq"), "--summary")[1]
    assert out.endswith(short) and "qzeros" not in short
    some = run_inspect(capsys, made("awq"), "--filter", "*.layers.0.*qzeros")[1]
    assert some.count(".qzeros") == 7 and "7 tensors that match, of 133" in some
    with pytest.raises(InputError, match="none of the 133 tensors matches 'nothing'"):
        inspect.main([str(made("awq")), "--filter", "nothing"])


def test_inspect_reads_no_tensor(made, tmp_path):
    """Only the header of a safetensors file: damaged values do not matter to it."""
    for path in made("awq").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "model.safetensors"
    start = safetensors_header(path)[2]
    path.write_bytes(path.read_bytes()[:start] + bytes(path.stat().st_size - start))
    assert inspect.inspect(tmp_path).problems == inspect.inspect(made("awq")).problems


def test_inspect_names_what_does_not_fit(made, tmp_path, capsys):
    tensors = stored(made("awq"))
    at = "language_model.model.layers.1.self_attn."
    del tensors[at + "q_proj.bias"]
    tensors["surplus"] = torch.ones(2)
    tensors[at + "o_proj.scales"] = tensors[at + "o_proj.scales"][:, :64]
    tensors[at + "v_proj.qzeros"] = tensors[at + "v_proj.qzeros"].to(torch.int64)
    tensors[at + "k_proj.bias"] = tensors[at + "k_proj.bias"].float()        # no problem: converted at load
    files.save_checkpoint(tensors, tmp_path)
    (tmp_path / "config.json").write_bytes((made("awq") / "config.json").read_bytes())
    code, out = run_inspect(capsys, tmp_path, "--summary", "--json")
    assert code == 1 and json.loads(out)["fits"] is False
    assert json.loads(out)["problems"] == {
        "missing": [at + "q_proj.bias [128]"], "unexpected": ["surplus [2] in model.safetensors"],
        "misshapen": [at + "o_proj.scales is [1, 64] in model.safetensors, [1, 128] in the model"],
        "dtype": [at + "v_proj.qzeros is torch.int64 in model.safetensors, the model takes torch.int32"]}
    code, out = run_inspect(capsys, tmp_path)
    assert code == 1 and out.rstrip().endswith("does not fit config.json: 4 problems")
    assert f"missing: {at}q_proj.bias [128]\n" in out and re.search(r"\nsurplus +float32 +\[2\] +8 +- ", out)
    with pytest.raises(InputError, match="4 problems"):         # and the loader sees the same
        minivl.load(tmp_path)


def test_inspect_names_a_default_that_does_not_fit(made, tmp_path, capsys):
    for path in made("awq").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vision_config"]["norm_type"], config["vision_config"]["image_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out = run_inspect(capsys, tmp_path, "--summary")
    assert code == 1
    assert "note: config.json leaves out vision_config.image_size; its default in the original class, 224" in out
    assert "config.json leaves out vision_config.norm_type; its default in the original class, 'rms_norm', does" in out


def test_inspect_missing_shard_and_stale_shard(made, tmp_path, capsys):
    for path in made("awq-shards").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "model-00002-of-00004.safetensors"
    (tmp_path / "model-00002-of-00009.safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(InputError, match=r"model-00002-of-00009.safetensors .* that .*index.json does not name"):
        inspect.inspect(tmp_path)
    (tmp_path / "model-00002-of-00009.safetensors").unlink()
    assert run_inspect(capsys, tmp_path, "--summary")[0] == 0
    shard.unlink()
    code, out = run_inspect(capsys, tmp_path, "--summary")
    assert code == 1 and "missing: language_model." in out


def test_inspect_single_file(made, tmp_path, capsys):
    shard = made("awq-shards") / "model-00003-of-00004.safetensors"
    code, out = run_inspect(capsys, shard)
    assert code == 0 and "tensors of other files are not missed" in out and "AWQLinear" in out
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(shard.read_bytes())
    report = inspect.inspect(alone)
    assert report.problems is None and "no config.json" in report.note
    assert {t.module for t in report.tensors} == {None} and len(report.tensors) == len(safetensors_header(shard)[0])
    with pytest.raises(InputError, match="not a .safetensors file"):
        inspect.inspect(made("awq") / "config.json")


def test_inspect_of_an_internlm2_decoder(capsys):
    code, out = run_inspect(capsys, shared("golden/vit6b-internlm2"))
    assert code == 0 and "fits config.json" in out
    assert re.search(r"attention\.wqkv\.weight +float16 +\[256, 128\] +65,536 +Linear ", out)
    assert re.search(r"\nembeddings +1 .*\ndecoder layers +21 .*\nnorm and head +2 ", out)


def test_inspect_lists_what_minivl_cannot_run(tmp_path, capsys):
    source = shared("golden/vit6b-internlm2")
    shutil.copytree(source, tmp_path / "x")
    config = (tmp_path / "x" / "config.json").read_text()
    (tmp_path / "x" / "config.json").write_text(config.replace("InternLM2ForCausalLM", "InternLM3ForCausalLM"))
    code, out = run_inspect(capsys, tmp_path / "x")
    assert code == 0 and "nothing compared: llm_config.architectures is InternLM3ForCausalLM" in out
    assert re.search(r"attention\.wqkv\.weight +float16 +\[256, 128\] +65,536 +- ", out)


@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    """form -> the stand-in hub with that checkpoint."""
    return lambda form: Hub(repository(made(form), tmp_path / "repository"), monkeypatch)


def test_inspect_of_the_hub_fetches_no_weights(hub, made, capsys):
    played = hub("awq-shards")
    code, out = run_inspect(capsys, "Org/name", "--revision", "refs/pr/1", "--json")
    local = json.loads(run_inspect(capsys, made("awq-shards"), "--json")[1])
    assert code == 0 and {**json.loads(out), "source": ""} == {**local, "source": ""}
    assert {arguments.get("revision") for name, arguments in played.calls if name != "HfApi"} == {"refs/pr/1"}
    assert [arguments["filename"] for name, arguments in played.calls if name == "hf_hub_download"] == ["config.json"]


def test_inspect_of_a_remote_pickle(hub):
    hub("awq-bin")
    with pytest.raises(InputError, match=r"pickled .bin files.*weights_tools.download.*refs/pr/1"):
        inspect.inspect("Org/name")
    with pytest.raises(InputError, match="./Org does not exist"):
        inspect.inspect("./Org")


@pytest.mark.parametrize("name, tensors", [("nano", 145), ("nano-awq", 201)])
def test_inspect_of_the_shipped_models(name, tensors, capsys):
    assert inspect.main([name, "--summary", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["of"] == tensors
    with pytest.raises(InputError, match="no revision 'main'; leave"):
        inspect.main([name, "--revision", "main"])


def test_inspect_asks_the_hub_for_no_path(made, tmp_path, monkeypatch):
    """A typo in a local path is no repository; a revision of a file is none either."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: 1 / 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    for typo in ("build/tyni", "./x", "~/nothing", "nana"):
        with pytest.raises(InputError, match=f"{typo} does not exist; .*nano"):
            inspect.main([typo])
    file = next(made("awq").glob("*.safetensors"))
    with pytest.raises(InputError, match="is a local file, it has no revision"):
        inspect.main([str(file), "--revision", "main"])
