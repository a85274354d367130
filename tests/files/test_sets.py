"""Which weights of a folder are meant: one model in any form is read, two are refused, and a stand-in is named."""
import json
import warnings

import pytest
import torch
from checkpoints import IDS, logits, raw, refused, write

import minivl
from minivl.files.find import choose_files
from minivl.files.formats import open_weights
from minivl.files.sets import sets_of
from minivl.limits import InputError, first_of

STEM = {"safetensors": "model", "bin": "pytorch_model"}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9180840\n"


def save(folder, tensors, suffix="safetensors", shards=0, index=True, prefix=""):
    """Write weights in one file, or in shards with an index; give the names of the files."""
    single = f"{STEM[suffix]}.{suffix}"
    names = [f"{STEM[suffix]}-{k:05d}-of-{shards:05d}.{suffix}" for k in range(1, shards + 1)] or [single]
    parts = [dict(list(tensors.items())[k::len(names)]) for k in range(len(names))]
    for name, part in zip(names, parts):
        write(folder, part, name) if suffix == "safetensors" else torch.save(part, folder / name)
    if shards and index:
        weight_map = {n: prefix + name for name, part in zip(names, parts) for n in part}
        (folder / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        names.append(f"{single}.index.json")
    return names


@pytest.fixture
def tensors(copy):
    """The tensors of `copy`, whose weight file is gone: each test writes its own."""
    found = raw(copy)
    (copy / "model.safetensors").unlink()
    return found


def trained(tensors, name="mlp1.3.weight"):
    """Another model: one tensor has other values."""
    return {**tensors, name: tensors[name] * 1.01}


SAVES = {"one file": {}, "shards": {"shards": 3}, "shards alone": {"shards": 3, "index": False},
         ".bin": {"suffix": "bin"}, ".bin shards": {"suffix": "bin", "shards": 2},
         ".bin shards alone": {"suffix": "bin", "shards": 2, "index": False}}


@pytest.mark.parametrize("first, second", [
    ("one file", "shards"), ("one file", "shards alone"), ("one file", ".bin"), ("one file", ".bin shards"),
    ("shards", ".bin"), ("shards", ".bin shards"), ("shards alone", ".bin shards alone"), (".bin", ".bin shards")])
def test_two_models_in_a_folder_are_refused_and_one_in_two_forms_is_read(copy, tensors, first, second):
    files = [save(copy, tensors, **SAVES[first]), save(copy, tensors, **SAVES[second])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = {n: t.read() for n, t in open_weights(copy).items()}
    assert all(torch.equal(read[n], t) for n, t in tensors.items()) and read.keys() == tensors.keys()
    files[1] = save(copy, trained(tensors), **SAVES[second])
    text = refused(copy, "holds two models, .*: mlp1.3.weight has other values; delete what you do not mean")
    for names in files:         # both are named, by the file that stands for each
        assert (names[-1] if names[-1].endswith("json") else names[0]) in text


@pytest.mark.parametrize("change, message", [
    (lambda t: {n: v for n, v in t.items() if n != "mlp1.1.bias"}, "mlp1.1.bias is only in one of them"),
    (lambda t: {**t, "mlp1.1.bias": t["mlp1.1.bias"].float()}, "mlp1.1.bias is torch.float16 .*, and torch.float32"),
    (lambda t: {**t, "mlp1.1.bias": t["mlp1.1.bias"][:9].clone()}, r"mlp1.1.bias is .* \[128\], and .* \[9\]")])
def test_models_that_differ_in_names_shapes_or_dtypes(copy, tensors, change, message):
    save(copy, tensors)
    save(copy, change(tensors), "bin")
    refused(copy, message)


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_difference_at_either_end_of_a_large_tensor_is_seen(copy, tensors, where):
    name = "language_model.model.embed_tokens.weight"           # as when the rows of new tokens are trained
    assert tensors[name].nbytes > 3 * 4096
    save(copy, tensors)
    other = tensors[name].clone()
    other[{"first": 0, "last": -1}[where], -1] += 1
    save(copy, {**tensors, name: other}, shards=2)
    refused(copy, f"{name} has other values")


def test_a_second_set_that_is_damaged_is_named(copy, tensors):
    save(copy, tensors)
    (copy / "pytorch_model.bin").write_bytes(b"half a download")
    refused(copy, r"two models, model.safetensors and pytorch_model.bin: they cannot be compared .pytorch_model")


def test_shards_that_an_index_does_not_name(copy, tensors):
    save(copy, tensors, shards=3)
    write(copy, {"x": torch.zeros(2)}, "model-00005-of-00005.safetensors")
    refused(copy, r"holds model-00005-of-00005.safetensors \(1 files\) that model.safetensors.index.json does not name")


def test_an_index_beside_the_single_file_that_it_names(copy, tensors):
    save(copy, tensors)
    weight_map = dict.fromkeys(tensors, "model.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert open_weights(copy).keys() == tensors.keys()


def test_an_index_without_its_files(copy, tensors):
    """Left by a save in one file over shards (told), or by a download of one format (not worth a word)."""
    shards = save(copy, trained(tensors), shards=3)
    for name in shards[:-1]:
        (copy / name).unlink()
    refused(copy, "lacks the shard model-00001-of-00003.safetensors that model.safetensors.index.json names")
    save(copy, tensors)
    with pytest.warns(UserWarning, match="holds model.safetensors.index.json, but none of the files .* is read"):
        assert torch.equal(open_weights(copy)["mlp1.3.weight"].read(), tensors["mlp1.3.weight"])
    (copy / shards[-1]).unlink()
    for name in save(copy, tensors, "bin", shards=2)[:-1]:
        (copy / name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_weights(copy).keys() == tensors.keys()


@pytest.mark.parametrize("suffix", STEM)
def test_an_index_with_a_prefix_and_shards_without_an_index(copy, tensors, suffix):
    names = save(copy, tensors, suffix, shards=3, prefix="./")
    want = logits(copy)
    (copy / names[-1]).unlink()
    assert torch.equal(logits(copy), want)
    second = (copy / names[1]).read_bytes()
    (copy / names[1]).unlink()
    refused(copy, f"holds 2 of 3 shards .*{names[0]}, {names[2]}.* and no .*index.json; download it again")
    (copy / names[1]).write_bytes(second)
    (copy / names[1].replace("00003", "00004")).write_bytes(second)
    refused(copy, "holds shards of several models, of 3 and of 4 files, and no .*index.json")
    (copy / names[1].replace("00003", "00004")).unlink()
    (copy / names[2]).write_bytes(second)       # the same tensors twice
    refused(copy, f"is in {names[1]} and in {names[2]}; the shards do not belong together")


def test_a_number_of_shards_costs_nothing(copy, tensors):
    write(copy, tensors, "model-00001-of-999999999.safetensors")
    refused(copy, "holds 1 of 999999999 shards")


def test_a_file_without_metadata(copy, tensors):
    save(copy, tensors)
    want = logits(copy)
    data = (copy / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    assert header.pop("__metadata__")
    text = json.dumps(header).encode()
    (copy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])
    assert torch.equal(logits(copy), want)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00001.safetensors"])
def test_a_pointer_or_a_web_page_in_place_of_weights(copy, tensors, name):
    (copy / name).write_text(POINTER)
    refused(copy, f"{name} in .* is a git-lfs pointer, a text of {len(POINTER)} bytes .*; run `git lfs pull`")
    (copy / name).write_text("\n<!DOCTYPE html><html><title>model</title></html>")
    refused(copy, f"{name} in .* is a web page, not the weights")


def test_a_pointer_beside_whole_weights_is_no_second_model(copy, tensors):
    """As after `git lfs pull --include '*.safetensors'`."""
    for name in save(copy, tensors, "bin", shards=2)[:-1]:
        (copy / name).write_text(POINTER)
    save(copy, tensors, shards=2)
    assert open_weights(copy).keys() == tensors.keys()
    (copy / "model-00002-of-00002.safetensors").write_text(POINTER)
    refused(copy, "model-00002-of-00002.safetensors in .* is a git-lfs pointer")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "adapter_model.bin",
                                  "adapter_model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_named(copy, name, alone):
    (copy / name).write_text("{}")
    if alone:
        (copy / "config.json").unlink()
        (copy / "model.safetensors").unlink()
    text = refused(copy, "holds a LoRA adapter .*, which minivl does not apply; merge it first .*merge_and_unload")
    assert name in text and "\n" not in text
    with pytest.raises(InputError, match="holds a LoRA adapter"):
        choose_files([name, "config.json", "model.safetensors"])
    with pytest.raises(InputError, match="holds a LoRA adapter"):
        minivl.pipeline(copy)


def test_what_is_fetched_of_a_repository():
    small = ["config.json", "vocab.json"]
    index, single = "model.safetensors.index.json", "model.safetensors"
    shards = [f"model-{k:05d}-of-00002.safetensors" for k in (1, 2)]
    bins = ["pytorch_model.bin", "pytorch_model.bin.index.json"]
    for there, chosen in [([single, index, *bins], [single, index]), ([*shards, *bins], shards),
                          ([*shards, index, single], [*shards, index, single]), ([index, *bins], bins)]:
        assert sorted(choose_files([*small, "README.md", *there])) == sorted([*small, *chosen])


# ---- tensors of another kind of checkpoint --------------------------------------------------------------------------

@pytest.mark.parametrize("rename", [
    lambda n: n.replace("language_model.", "language_model.base_model.model."),
    lambda n: "base_model.model." + n,
    lambda n: n.replace(".weight", ".lora_A.default.weight") if "mlp1" in n else n,
    lambda n: n.replace(".qweight", ".lora_B.weight"),
    lambda n: n.replace("embed_tokens.weight", "embed_tokens.lora_embedding_A"),
    lambda n: n.replace("_proj.qweight", "_proj.base_layer.qweight"),
    lambda n: n.replace("mlp1.", "mlp1.modules_to_save.default.")])
def test_an_unmerged_lora_is_one_sentence(copy, tensors, rename):
    save(copy, {rename(n): t for n, t in tensors.items()})
    text = refused(copy, "are a LoRA checkpoint .* merge it first: PEFT's merge_and_unload")
    assert "\n" not in text and len(text) < 400 and "problems" not in text


@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_of_transformers_own_classes(copy, tensors, prefix):
    def rename(name):
        return prefix + name.replace("vision_model.", "vision_tower.").replace("mlp1.", "multi_modal_projector.")
    save(copy, {rename(n): t for n, t in tensors.items()})
    text = refused(copy, "have the names of transformers' own classes .* take the original release, the repository "
                         "without -hf")
    assert "\n" not in text


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_names_that_a_wrapper_put_a_prefix_before(copy, tensors, prefix):
    """The line that the message prints mends it."""
    save(copy, tensors)
    want = logits(copy)
    save(copy, {prefix + n: t for n, t in tensors.items()})
    text = refused(copy, f"all begin with '{prefix}', which a wrapper such as torch.compile")
    assert "\n" not in text and "problems" not in text
    exec(text.split('python -c "')[1].rstrip('"'), {})
    assert logits(copy).equal(want)


def test_a_tied_head_that_was_left_out(copy, tensors):
    """The original class never ties; the line that the message prints mends it."""
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    del tensors[head]
    save(copy, tensors)
    text = refused(copy, f"lack {head}, which was tied to the embedding and not saved")
    assert "\n" not in text
    exec(text.split('python -c "')[1].rstrip('"'), {})
    assert torch.equal(raw(copy)[head], tensors[embedding])
    with torch.no_grad():
        assert minivl.load(copy)(IDS).isfinite().all()


def test_long_lists_are_cut_and_counted(copy, tensors):
    assert first_of(list("abc"), ", ", 3) == "a, b, c" and first_of(list("abcd"), ", ", 3) == "a, b, c, ... and 1 more"
    save(copy, {n + ".old" if "layers" in n else n: t for n, t in tensors.items()})
    text = refused(copy, "problems:")
    count = int(text.split(" problems")[0].split()[-1])
    assert count > 100 and len(text.splitlines()) <= 23 and f"... and {count - 20} more" in text
    save(copy, tensors, shards=2)
    (copy / "model.safetensors").unlink()
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"].update({f"more.{i}": "model-00001-of-00002.safetensors" for i in range(300)})
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(refused(copy, "names 300 tensors that the shards lack: .*, ... and 280 more; download")) < 2500


def test_sets_are_listed_in_transformers_order(copy, tensors):
    save(copy, tensors)
    save(copy, tensors, shards=2)
    assert [one.name for one in sets_of(copy, "safetensors")] == ["model.safetensors", "model.safetensors.index.json"]
    assert sets_of(copy, "bin") == []


def test_an_index_with_a_long_file_name_says_so_in_short(tmp_path):
    for name in ("x" * 100_000, "../" + "x" * 100_000, "y" * 201):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(InputError, match="model.safetensors.index.json") as error:
            sets_of(tmp_path, "safetensors")
        assert len(str(error.value)) < 600
    assert len(first_of(["z" * 10 ** 6] * 100)) < 6000
