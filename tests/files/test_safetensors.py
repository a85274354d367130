"""Safetensors files that are cut, padded, altered or not what they say are refused, with a name and a next step."""
import json
import resource
import shutil

import pytest
from checkpoints import raw, refused

from minivl.files.formats import safetensors_header


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
