"""Safetensors files that are cut, padded, altered or not what they say are refused, with a name and a next step."""
import hashlib
import json
import resource
import shutil

import pytest
import torch
from checkpoints import raw, refused

from minivl import InputError
from minivl.files.formats import open_weights, safetensors_header
from weights_tools.files import save_safetensors
from weights_tools.inspect import inspect


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
    ((2).to_bytes(8, "little") + b"[]", "its header is corrupt"),
    ((2).to_bytes(8, "little") + b"{\xff", "its header is corrupt"),
    ((9).to_bytes(8, "little") + b'{"a": [1]}'[:9], "its header is corrupt")])
def test_corrupt_safetensors_headers(copy, data, message):
    (copy / "model.safetensors").write_bytes(data)
    refused(copy, message)


def test_deeply_nested_header(copy):
    text = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (copy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    refused(copy, "its header is corrupt")


def test_a_header_that_names_a_tensor_twice(copy):
    path = copy / "model.safetensors"
    data = path.read_bytes()
    text = data[8:8 + int.from_bytes(data[:8], "little")].rstrip()
    name = last_tensor(path)[0]
    entry = json.dumps({name: json.loads(text)[name]})[1:-1].encode()
    text = text[:-1] + b"," + entry + b"}"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little"):])
    refused(copy, "its header is corrupt")


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("change", [
    *({"data_offsets": value} for value in (
        [0], [0, 4, 8], [], None, 4, "04", {"0": 0, "4": 4}, [0, "4"], [0, None], [0.0, 4.0], [False, 4], [-4, 0],
        [4, 0], [0, 2**63], [0, 2**64 + 4], [0, 10**400], [[0], [4]])),
    *({"shape": value} for value in (
        None, 1, "1", {}, {"1": 1}, [1.0], [True], ["1"], [[1]], [-1], [-1, -1], [2**63], [10**400], [1] * 33,
        [0, 2**62, 2**62], [2**32, 2**32, 0])),
    *({"dtype": value} for value in (None, 3, [], {}, ["F32"], "f32", "F4", "", "x" * 100_000)),
    {"extra": 1}, {"name": "a"}], ids=lambda change: str(change)[:60])
def test_every_wrong_value_of_an_entry(tmp_path, change):
    headed(tmp_path, json.dumps({"a": {**ENTRY, **change}}))
    with pytest.raises(InputError) as error:
        open_weights(tmp_path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("header", [
    "", " ", "null", "3", "[]", '"a"', "{", "{}x", "\0", "NaN", '{"a": NaN}', '{"a": ENTRY, "a": ENTRY}', '{"a": {}}',
    '{"a": ENTRY, "b": null}', '{"a": [1]}', '{"a": ENTRY,}', '{"a": {"x": NaN, "dtype": "F32"}}', "\ufeff{}",
    '{"a": {"dtype": "F32", "shape": [1], "shape": [1], "data_offsets": [0, 4]}}', '{"\\ud800": ENTRY}',
    '{"' + "x" * 501 + '": ENTRY}', '{"a": ENTRY, "__metadata__": null}', '{"a": ENTRY, "__metadata__": {"x": 1}}',
    '{"a": ENTRY, "__metadata__": []}', '{"a": ENTRY, "__metadata__": {"x": NaN}}', '{"a": ' + DEEP + "}",
    '{"a": ENTRY, "__metadata__": ' + DEEP + "}", '{"a": ENTRY, "__metadata__": {"x": Infinity}}',
    '{"a": ENTRY, "__metadata__": {"format": "pt", "format": "pt"}}', '{"a": {"dtype": ' + "9" * 5000 + "}}",
    '{"a": ENTRY, "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}',
    '{"a": ENTRY, "__metadata__": {"sha256": "[1]"}}', '{"a": ENTRY, "__metadata__": {"sha256": "{}"}}',
    '{"a": ENTRY, "__metadata__": {"sha256 of dtype, shape and bytes": "' + DEEP + '"}}'],
    ids=lambda header: header[:60])
def test_every_other_wrong_header(tmp_path, header):
    for text in (header.replace("ENTRY", json.dumps(ENTRY)).encode(), header.encode("utf-16-le")):
        headed(tmp_path, text)
        with pytest.raises(InputError) as error:
            open_weights(tmp_path)
        assert len(str(error.value)) < 1000


def headed(folder, text, length=None):
    """Write a file of one float32 with this header, said to have this length."""
    text = text.encode() if isinstance(text, str) else text
    length = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text + b"\0" * 4)


def test_a_header_that_lies_about_its_length(tmp_path):
    text = json.dumps({"a": ENTRY})
    for length in (0, 1, len(text) - 1, len(text) + 1, len(text) + 4, len(text) + 5, 2**31, 2**63, 2**64 - 1):
        headed(tmp_path, text, length)
        with pytest.raises(InputError, match=r"not a whole safetensors file"):
            open_weights(tmp_path)
    headed(tmp_path, text)
    assert open_weights(tmp_path)["a"].read().tolist() == [0]


def reheaded(path, change):
    """Write the file again with its header passed through `change`."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])


def test_digests_see_dtype_and_shape(tmp_path):
    """A file whose header alone was altered; and one of an older version, whose digests see the bytes only."""
    path = save_safetensors({"a": torch.ones(4, 6).half(), "b": torch.arange(3)}, tmp_path / "model.safetensors")
    whole = path.read_bytes()
    for change in (lambda h: h["a"].update(dtype="BF16"), lambda h: h["a"].update(dtype="I16"),
                   lambda h: h["a"].update(shape=[6, 4]), lambda h: h["a"].update(shape=[24]),
                   lambda h: h["a"].update(shape=[4, 6, 1])):
        path.write_bytes(whole)
        reheaded(path, change)
        with pytest.raises(InputError, match="a does not match its sha256 digest"):
            open_weights(tmp_path)
    path.write_bytes(whole)
    entries, _, start = safetensors_header(path)
    old = {name: hashlib.sha256(whole[start + begin:start + end]).hexdigest()
           for name, (*_, begin, end) in entries.items()}
    reheaded(path, lambda h: h.update(__metadata__={"format": "pt", "sha256": json.dumps(old)}))
    assert open_weights(tmp_path)["a"].read().sum() == 24
    assert "digests in model.safetensors are of an older version: they cover the bytes" in inspect(tmp_path).note
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="a does not match its sha256 digest"):
        open_weights(tmp_path)


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


def test_address_space_is_not_needed(copy):
    """Nothing here allocates by what a header claims: a file that announces a huge tensor is refused at once."""
    path = copy / "model.safetensors"
    text = json.dumps({"a": {"dtype": "F32", "shape": [2 ** 40], "data_offsets": [0, 2 ** 42]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(copy, "cut short")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


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
    written({**good, "more.weight": "model-00001-of-00001.safetensors"},
            r"names 1 tensors that the shards lack: more.weight \(in")
    written({n: f for n, f in good.items() if n != names[3]}, f"holds {names[3]}, which .* places in no file")
    written([1], "has no weight_map")
    index.write_text("{")
    refused(copy, "not valid JSON at line 1")
