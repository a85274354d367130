"""Pickled weights: mapped tensor by tensor; what could run code or is damaged is refused before anything is run."""
import pickle
import zipfile

import torch
from checkpoints import raw, refused

import minivl
from minivl.files.formats import open_weights


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


def test_the_old_format_of_torch_is_named_and_its_line_converts_it(copy):
    path, tensors = as_bin(copy)
    for protocol in (4, 3, 2):
        torch.save(tensors, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
        text = refused(copy, "pytorch_model.bin in .* is in the old format of torch.save .*; convert it once: python")
    code = text.split('python -c "')[1].rstrip('"')
    exec(code, {})
    assert all(torch.equal(t, tensors[n]) for n, t in raw(copy).items())
    minivl.load(copy)


def test_views_with_other_strides_are_read_right(copy):
    """Transposed, permuted, strided and repeated views of a record: what they show, row by row."""
    path, tensors = as_bin(copy)
    whole = torch.arange(60.0)
    views = {"plain": whole, "transposed": whole.view(6, 10).T, "column": whole.view(6, 10)[:, 3], "row": whole[7:9],
             "permuted": whole.view(3, 4, 5).permute(2, 0, 1), "steps": whole[1::7], "repeated": whole[:3].expand(4, 3),
             "own": torch.randn(4, 5).T, "half": torch.randn(8, 6).half()[2:, 1:4], "empty": torch.empty(0, 3).T}
    torch.save(views, path)
    for name, stored in open_weights(copy).items():
        assert torch.equal(stored.read(), views[name]) and stored.read().is_contiguous(), name
        assert (stored.shape, stored.nbytes) == (views[name].shape, views[name].numel() * views[name].element_size())
    torch.save({n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in tensors.items()}, path)
    assert all(torch.equal(t, tensors[n]) for n, t in raw(copy).items())
    assert all(p.is_contiguous() for p in minivl.load(copy).state_dict().values())
