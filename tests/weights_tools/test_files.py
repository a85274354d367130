"""files: what is written is what is read back, whole or not at all."""
import hashlib
import json
import os
import pickletools
import re
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import same, stored
from safetensors import safe_open

from minivl.limits import InputError
from weights_tools import files


def odd_tensors():
    base = torch.randn(6, 5)
    return {"f32": base, "transposed": base.t(), "view": base[2:4], "twin": base.view(-1), "f16": torch.randn(3).half(),
            "bf16": torch.randn(2, 2, 2).bfloat16(), "i32": torch.tensor([[-2**31, 2**31 - 1]], dtype=torch.int32),
            "bool": torch.tensor([True, False, True]), "empty": torch.empty(0, 4), "scalar": torch.tensor(2.5),
            "parameter": torch.nn.Parameter(torch.randn(4))}


def test_safetensors_round_trip(tmp_path):
    tensors = odd_tensors()
    path = files.save_safetensors(tensors, tmp_path / "x.safetensors", {"note": "mine"})
    with safe_open(path, framework="pt") as f:
        metadata = f.metadata()
        assert set(f.keys()) == set(tensors)
        found = {name: f.get_tensor(name) for name in tensors}
    assert same(found, {name: tensor.detach() for name, tensor in tensors.items()})
    assert (metadata["format"], metadata["note"]) == ("pt", "mine")
    plain = bytes(tensors["transposed"].contiguous().view(torch.uint8).flatten().tolist())    # bytes by another way
    digests = json.loads(metadata["sha256 of dtype, shape and bytes"])
    assert digests["transposed"] == hashlib.sha256(b"F32 [5, 6] " + plain).hexdigest()
    assert digests.keys() == tensors.keys()
    (tmp_path / "touched").touch()
    assert path.stat().st_mode == (tmp_path / "touched").stat().st_mode         # not for the owner alone
    assert sorted(os.listdir(tmp_path)) == ["touched", "x.safetensors"]


@pytest.mark.parametrize("tensor", [torch.empty(3, device="meta"), torch.eye(3).to_sparse(), torch.tensor(1j)],
                         ids=["meta", "sparse", "complex"])
def test_tensor_that_cannot_be_stored(tensor, tmp_path):
    with pytest.raises(InputError, match="odd .* cannot be stored"):
        files.save_safetensors({"odd": tensor}, tmp_path / "x.safetensors")
    assert not os.listdir(tmp_path)


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = files.save_safetensors({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    before = path.read_bytes()
    monkeypatch.setattr(files, "raw_bytes", lambda tensor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.save_safetensors({"x": torch.zeros(2)}, path)
    assert os.listdir(tmp_path) == ["x.safetensors"] and path.read_bytes() == before


def test_plan_shards():
    def plan(sizes, most):
        return [len(shard) for shard in files.plan_shards({str(i): n for i, n in enumerate(sizes)}, most)]

    assert plan([3, 3, 2, 5, 1], 6) == [2, 1, 2]        # the docstring's example
    assert plan([7, 1, 7, 7, 1], 6) == [1, 1, 1, 1, 1]  # larger than a shard: alone
    assert plan([1, 2, 3], 100) == [3]
    with pytest.raises(InputError, match="0 bytes"):
        plan([1], 0)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_checkpoint_in_shards(format, tmp_path):
    tensors = {f"layer.{i}": torch.randn(10, i + 1) for i in range(8)}
    written = files.save_checkpoint(tensors, tmp_path / "out", format=format, shard_bytes=800)
    stem = files.STEM[format]
    assert [p.name for p in written] == [f"{stem}-0000{k}-of-00003.{format}" for k in (1, 2, 3)] + [
        f"{stem}.{format}.index.json"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(p.name for p in written)
    index = json.loads(written[-1].read_text())
    assert index["metadata"] == {"total_size": sum(40 * (i + 1) for i in range(8))}
    for path in written[:-1]:
        names = [name for name, file in index["weight_map"].items() if file == path.name]
        assert 0 < sum(tensors[name].nbytes for name in names) <= 800
    assert same(stored(tmp_path / "out"), tensors)


def test_bin_holds_plain_tensors_only(tmp_path):
    tensors = odd_tensors()
    [path] = files.save_checkpoint(tensors, tmp_path, format="bin")
    assert same(stored(tmp_path), {name: tensor.detach() for name, tensor in tensors.items()})
    with zipfile.ZipFile(path) as archive:
        [pickled] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        strings = [arg for op, arg, _ in pickletools.genops(archive.read(pickled)) if op.name == "GLOBAL"]
        sizes = [info.file_size for info in archive.infolist() if re.search(r"/data/\d+$", info.filename)]
    assert {s.split(" ")[0] for s in strings} <= {"collections", "torch", "torch._utils"}
    assert {s.split(" ")[1] for s in strings if s.startswith("torch._utils")} == {"_rebuild_tensor_v2"}
    # a view of 2 rows is 40 bytes and not the 120 it was cut from, and nobody shares: one record each
    assert sorted(sizes) == sorted(tensor.nbytes for tensor in tensors.values())


def test_weights_are_not_overwritten_unasked(tmp_path):
    first, second = {"a": torch.randn(50), "b": torch.randn(50)}, {"c": torch.randn(7)}
    files.save_checkpoint(first, tmp_path, format="bin", shard_bytes=200)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="already holds weights .*--overwrite"):
        files.save_checkpoint(second, tmp_path)
    assert same(stored(tmp_path), first)

    def make(name):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        files.save_checkpoint(second, tmp_path, make=make, overwrite=True)
    assert same(stored(tmp_path), first)            # complete until the new one is

    files.save_checkpoint(second, tmp_path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "notes.txt"]       # no shard, index or .bin left
    assert same(stored(tmp_path), second)


@pytest.mark.slow
def test_one_shard_in_memory_at_a_time(tmp_path):
    import gc
    import weakref
    alive, most = weakref.WeakSet(), []
    specs = {f"t{i}": torch.empty(100, device="meta") for i in range(12)}

    def make(name):
        gc.collect()
        alive.add(tensor := torch.full((100,), float(name[1:])))
        most.append(len(alive))
        return tensor
    files.save_checkpoint(specs, tmp_path, make=make, shard_bytes=1200)
    assert max(most) <= 4           # three make a shard; one more while the loop variable still holds the last
    with pytest.raises(ValueError, match="announced"):
        files.save_checkpoint(specs, tmp_path, make=lambda name: torch.ones(99), overwrite=True)


def test_disk_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000))
    with pytest.raises(InputError, match="0.002 GB, .* has 0.000 GB free"):
        files.save_checkpoint({"a": torch.empty(500_000)}, tmp_path)
    with pytest.raises(InputError, match="format 'pt' is not one of safetensors, bin"):
        files.save_checkpoint({}, tmp_path, format="pt")
