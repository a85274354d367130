"""Pickled weights: mapped tensor by tensor; what could run code or is damaged is refused before anything is run."""
import base64
import collections
import io
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib

import pytest
import torch
from checkpoints import raw, refused
from fuzz.bin import PARTS, deflated, numbered, split, tower, unzipped, zipped

import minivl
from minivl import InputError
from minivl.files.formats import open_weights
from minivl.files.pickles import read_places


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
    refused(copy, "a is a tensor made by _rebuild_sparse_tensor, which is unknown")
    torch.save({**tensors, "mlp1.1.bias": torch.nn.Parameter(tensors["mlp1.1.bias"])}, path)
    minivl.load(copy)


def saved(thing, path=None):
    """What torch.save writes, as bytes; into `path` too."""
    torch.save(thing, buffer := io.BytesIO())
    if path:
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def with_pickle(data, pickle):
    """The file with another data.pkl, its zip as torch writes it."""
    return zipped([(name, pickle if name == "data.pkl" else bytes) for name, bytes in unzipped(data)])


def opened(folder, data):
    """What open_weights reads of pytorch_model.bin; None: it is refused."""
    (folder / "pytorch_model.bin").write_bytes(data)
    try:
        return {name: tensor.read() for name, tensor in open_weights(folder).items()}
    except InputError:
        return None


def agree(found, data):
    """Compare with torch's own reader."""
    right = torch.load(io.BytesIO(data), weights_only=True)
    return list(found) == list(right) and all(torch.equal(found[name], t) and found[name].dtype == t.dtype
                                              for name, t in right.items())


def sizes(count):
    return {f"t{i}": torch.full((i % 3,), i) for i in range(count)}


def test_what_scripts_save_is_read(tmp_path):
    """State dicts, with the notes of their modules, of 0 to 1001 tensors (pickle writes dicts in pieces of 1000)."""
    net = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(2, 3).bfloat16())
    net.load_state_dict(net.state_dict(), assign=True)
    again = net.state_dict()
    net.load_state_dict(again)      # notes how it was loaded, in again._metadata
    tied = torch.randn(3)
    for thing in (net.state_dict(), again, net.state_dict(keep_vars=True), dict(net.state_dict()),
                  {"a": tied, "b": tied, "c": torch.nn.Parameter(tied)}, {"one": torch.tensor(True)},
                  {"\u6a21.\U0001f405": torch.randn(2, 2, 2, 2, 2)[1:, :, 1], "": torch.arange(5, dtype=torch.int16)},
                  *({"i" * (k % 99) + f"{k}": torch.tensor([k], dtype=torch.uint8)} for k in (1, 255)),
                  collections.OrderedDict(), *map(sizes, (1, 2, 1000, 1001)),
                  *(collections.OrderedDict(sizes(n)) for n in (1, 2, 1000, 1001))):
        data = saved(thing)
        assert agree(opened(tmp_path, data), data)
    big = torch.nn.Module()
    for k in range(1001):           # a thousand notes
        big.add_module(f"m{k}", torch.nn.Identity())
    big.register_buffer("x", tied)
    data = saved(big.state_dict())
    assert agree(opened(tmp_path, data), data)


def test_a_file_as_torch_1_6_wrote_it(tmp_path):
    """Records named by addresses, and fewer notes; compared with files of that version when this was written."""
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 2).half(), "c": torch.empty(0)}
    records = dict(unzipped(saved(tensors)))
    pickle = b"".join(b"X\x0e\0\0\x009474342456571" + op[5:] if op in (b"X\1\0\0\x00%d" % k for k in range(3)) else op
                      for op in split(records["data.pkl"]))
    data = zipped([("data.pkl", pickle), *((f"data/9474342456571{k}", records[f"data/{k}"]) for k in range(3)),
                   ("version", b"3\n")])
    assert data.count(b"archive/") == 10 and agree(opened(tmp_path, data), data)


def test_zips_are_written_here_as_torch_writes_them():
    """So that what the tests below alter is the one thing that differs."""
    data = saved({"a": torch.randn(3), "empty": torch.empty(0)})
    assert zipped(unzipped(data)) == data


def test_every_field_of_the_zip_must_be_what_torch_writes(tmp_path):
    data = saved({"a": torch.randn(3), "empty": torch.empty(0), "b": torch.randn(2)})
    records = unzipped(data)
    tried = 0
    for part, layout in PARTS.items():
        numbers = [i for i, (_, bytes) in enumerate(records) if bytes or part != "after"]
        for number in numbers if part in ("local", "after", "line") else [0]:
            for field in range(1, len(layout.unpack(bytes(layout.size)))):
                for value in (1, 2**64 - 1) if number < 4 else (1,):
                    altered = zipped(records, {(part, number, field): value})
                    assert altered == data or opened(tmp_path, altered) is None, (part, number, field)
                    tried += altered != data
    assert tried > 300


def test_records_and_pieces_that_torch_does_not_write(tmp_path):
    data = saved({"a": torch.randn(3), "b": torch.randn(2)})
    records = unzipped(data)
    where = [name for name, _ in records].index("data/1")
    half = zipped(records[:where])
    for altered in (
            data + b"\0", data + data, data + data[-98:], data + data[-22:], b"\0" + data, data[:-1], data[98:],
            data[-98:], data.replace(b"archive/data/1", b"folders/data/1"), data.replace(b"ZZZZ", b"ZZZY", 1),
            zipped([*records, ("data/2", b"more")]), zipped([*records, ("data/1", records[where][1])]),
            zipped([*records, ("code/x.py", b"")]), zipped([*records, (".note", b"x" * 5000)]), zipped(records[1:]),
            zipped([*records, ("data.pkl", b"other")]), zipped(records[:where] + records[where + 1:]),
            zipped([(n, b"big" if n == "byteorder" else d) for n, d in records]), deflated(records), half + data,
            zipped([(n, d + b"\0" * 4 if n == "data/1" else d) for n, d in records]),
            zipped([(n, d[:-4] if n == "data/1" else d) for n, d in records])):
        assert opened(tmp_path, altered) is None
    assert opened(tmp_path, zipped([*records, (".new_note", b"1")])).keys() == {"a", "b"}     # of a later torch


def test_every_opcode_must_stand_where_torch_writes_it(tmp_path):
    """Each is left out, written twice, and exchanged for others: refused, or torch reads the same tensors."""
    net = torch.nn.Linear(2, 3)
    data = saved(collections.OrderedDict(net.state_dict(keep_vars=True), w=torch.randn(2, 3).t()))
    operations = split(dict(unzipped(data))["data.pkl"])
    others = [[op] for op in (b"0", b"2", b")", b"}", b"]", b"N", b"(", b"h\0", b"K\1", b"\x88", b"\x81",
                                b"\x93", b"\x94")]
    read = 0
    for i, operation in enumerate(operations):
        for piece in ([], [operation] * 2, others[i % len(others)], [others[i // 2 % len(others)][0], operation]):
            altered = operations[:i] + piece + operations[i + 1:]
            altered = with_pickle(data, b"".join(altered if i % 3 == 0 else numbered(altered)))
            found = opened(tmp_path, altered)
            assert found is None or agree(found, altered), (i, piece)
            read += found is not None
    assert read < 20


@pytest.mark.parametrize("thing, message", [
    ({"weights": {"a": torch.ones(1)}}, r"does not hold a dict of names and tensors \(weights is no tensor\)"),
    ({"epoch": 3, "a": torch.ones(1)}, r"\(epoch is no tensor\); save the model's state_dict\(\) alone"),
    ({1: torch.ones(1)}, "a key is a number"), ({"a": [torch.ones(1)]}, "a is no tensor"),
    ([torch.ones(1)], "it holds one object, or a list"), (torch.ones(1), "it holds one object, or a list"),
    ({"a": torch.ones(1, dtype=torch.complex64)}, "a is in a ComplexFloatStorage; known are DoubleStorage"),
    ({"a": torch.ones(1, dtype=torch.uint16)}, "a is a tensor of dtype uint16, which is unknown here"),
    ({"b": torch.ones(1), "a": torch.ones(1, dtype=torch.float8_e4m3fn)},
     "a is a tensor of dtype float8_e4m3fn, .*bfloat16"),
    ({"a": torch.nn.Parameter(torch.ones(1).to(torch.float8_e5m2))}, "a is a tensor of dtype float8_e5m2, which"),
    ({"a": torch.eye(2).to_sparse()}, "a is a tensor made by _rebuild_sparse_tensor, which is unknown"),
    ({"a": torch.ones(2, dtype=torch.complex64).conj().imag}, "does not write what is at"),
    ({"a": torch.ones(1).expand(2**40)}, "a .* does not lie in its record of 1 torch.float32"),
    ({"a" * 501: torch.ones(1)}, "has a name of 501 bytes"), (torch.nn.Linear(1, 1), "holds more than tensors")])
def test_other_things_that_torch_saves_are_named(tmp_path, thing, message):
    saved(thing, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=message) as error:
        open_weights(tmp_path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict"])
@pytest.mark.parametrize("before", [{}, {"epoch": 3, "version": "2.1"}, {"optimizer": {"state": {}}}, {"loops": [1]}])
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_what_training_programs_save_is_named_and_its_line_unwraps_it(tmp_path, key, before, kind):
    saved({**before, key: kind(a=torch.ones(2)), "args": None}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=f"in an inner dict, '{key}'; save that alone once: ") as error:
        open_weights(tmp_path)
    code = re.fullmatch(r'.*python -c "(.*)"', str(error.value))[1]
    exec(code, {})
    assert torch.equal(open_weights(tmp_path)["a"].read(), torch.ones(2))


def test_other_protocols_are_named(tmp_path):
    for protocol in (3, 4, 5):
        torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
        with pytest.raises(InputError, match=f"protocol 0{protocol}, torch.save writes 2; save it again"):
            open_weights(tmp_path)


# What torch 2.13 wrote around a tensor of 4.4 GB of zeros, two tensors before and two behind it.
BEFORE, BEHIND = (zlib.decompress(base64.b85decode(text)) for text in (
    "c-p0t+iuf95QfKb?F7?8X+vl^wj5IqIT1hzK`MhRBqI@wgreM7j<bm^+_>Xxinu_ER3)g0*WiwOUH~ES4%~6Y6|caqH>6Z;BPb)UEw5(&|C`lp"
    ")s&|IQYqLK(~yCN-_AE3>g3j628KQd^<B|Vyg|s;Bv#;{<kB#5y`0^ne$dtIh%|bB(6lM(bi>HrC~26;W@|~7++~?go1iR8G$RNd`dn;kI28*P"
    "P^ro6>#p}uH5H1<XC|1+08^$kz(ZTE8wLS!sULQ_+S8~>BGP>1yHrDM#lpiBr!AbRC71#!;1Q2md$K2_i+I#iO`tf-CBc-3c+8YdX^3-M9<QFK"
    "n6~hE?9WaCGopM%``8IuW7re1VhI;K^_>DQmN%K~B9k5c4Dck!JtcHcQ#@ng*_y%+tVKzL=XNMR2|Mkv@=~mP6PFollHz&JnjGK-u6I%BU7~o|"
    "!Ygqi!R(GE%eW$%ygF|3nrQO6D84~4XJNjVtD4Ew@a>1CFRYBO>b_Gk4|n6K$hE>~&7t-NiMs6k4gJ<0!|@kU<kp{le%s{0eC=<YfqTMwG&{Bv"
    "`0dUb=}<$zb1?UM{dSoHR9@i^J|~HZ05k9~257vdB;?~}=#_)|{*J(>G$5Q|aR2+F%3Rcm3>xU;TbVBy`h))j5UTwOd#$pEt^O*fdH?yVmu8#k"
    "F%9fVQ{JX28hYWMX(n~Lu&rH^U>4w`u1bGo7&^c&>XRtG",
    "c-jl_X6Ja+RVT-=#)*xQ0SKUUfHyM>0|N&K0|ww?a9~KvOxI6IEJ@TiW@O-CxUm7E$IZ!rA&Nu*GnElaGeK!)D9r+;S)nu=lnwy8TU&EoxdoJO"
    "0T&0kn*po4JrM3T0l9m^Mwq)TNOm_2;0`Bl263=`WvNBQnfZAj3mG=SEM$jSXv_uj$;El;p-gBYfZJp#20gIJdSI^<rxs-<=44hSmH=&u&rAVX"
    "6a}|Pj)2b$3`|W8Ee#AUOpT2Uj7=>K%q`3fjEoE{OihgpEsQNK%*`y#%`FT-uKf9tM_B{v1`W6?8Nm*QxwEZ(slqX!)ga7+;c{5`>lI|@pzGZJ"
    "{!TL^G$jb5=n`Xs=+sNgFUn0UiHC+Lx&ij(g)f<)0VsxIz(kk<#U=SgiRr2F!0<}X%T3KIK{un-_OT=zG@0?Dm?6XrF(aw6BsIS%CAA1$YtNCB"
    "86rSh1f158!8B%s&-D#p`mm=_WT3)=q|XrDK2Wax4+UIcTVbF9S)UOjg8&0&?nX5WmXj>NZa|JVkm=ZSJAQxQGy^5)p}PZ?517FD2b&pKaud2C"
    "uw<$M&MMdpA)IjnyxG`vpt|Ikb&)bPDt#T6TQ|e?v4h38Lii9dRyK$pZm@cgD;O96j#2Cy"))


def test_a_file_of_more_than_4_gb(tmp_path):
    path = tmp_path / "big.bin"
    with open(path, "wb") as f:
        f.write(BEFORE)
        f.seek(4_400_000_000, os.SEEK_CUR)
        f.write(BEHIND)
    if path.stat().st_blocks * 512 > 10**9:
        pytest.skip("this disk keeps holes as zeros")
    places = read_places(path, verify=False)
    assert [(name, place.at, place.shape) for name, place in places.items()] == [
        ("a", 1024, (5,)), ("e0", 1152, (0, 3)), ("big", 1216, (2_200_000_000,)), ("after", 4_400_001_344, (7,)),
        ("e", 4_400_001_536, (0, 3))]
    with open(path, "r+b") as f:
        f.seek(1216 + 4_400_000_000 + 8)
        f.write(b"\1")
    with pytest.raises(InputError, match="its record b'big/data/2' has not the headers"):
        read_places(path, verify=False)


def two_zips(first, second):
    """Read by torch as `first`, by Python's zipfile as `second`: the locator of the one names the other's directory."""
    at = len(first) - 98
    second = second[:-42] + struct.pack("<4sIQI", b"PK\6\7", 0, at, 1) + struct.pack(
        "<4sHHHHIIH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    return first + second


def test_a_file_with_two_directories_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    harmless, other = saved({"a": torch.zeros(9)}), saved({"a": torch.ones(9)})
    path.write_bytes(two_zips(other, harmless))
    with zipfile.ZipFile(path) as archive:      # the two readers do differ
        assert archive.read("archive/data/0") == b"\0" * 36
    assert torch.load(path, weights_only=True)["a"].sum() == 9
    assert opened(tmp_path, path.read_bytes()) is None


LOADED = """
import resource, sys
import minivl
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in sys.argv[1:]:
    try:
        minivl.load(folder)
    except minivl.InputError as error:
        print("InputError", error)
print("kB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_pickles_that_never_end_crash_or_fill_the_memory(copy, tmp_path):
    """Each hung, crashed or took gigabytes: in a process of its own."""
    path, _ = as_bin(copy)
    whole = path.read_bytes()
    deep = b")" + b"\x85" * 200_000
    pickles = {"tower put twice": b"\x80\2}(" + b"".join(tower("put twice")) + b"K\1u.",
               "proto between": b"\x80\2}(" + b"".join(tower("proto between")) + b"K\1u.",
               "nested tuples as a key": b"\x80\2}" + deep + b"K\1s.",
               "OrderedDict of them": b"\x80\2ccollections\nOrderedDict\n(" + deep + b"K\1t\x85\x85R.",
               "OrderedDict of pairs": b"\x80\2ccollections\nOrderedDict\n]((" + deep + b"K\1te\x85R.",
               "parameters of parameters": b"\x80\2}q\0X\1\0\0\0aq\1ctorch._utils\n_rebuild_parameter\nq\2"
                                           + b"h\2" * 10**6,
               "notes in notes": b"\x80\2ccollections\nOrderedDict\nq\0)Rq\1" + b"".join(
                   numbered([b"}", b"q\2", b"X\1\0\0\0a", b"q\3"] * 10**5))}
    files = {name: with_pickle(whole, pickle) for name, pickle in pickles.items()}
    zeros = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = zeros.compress(bytes(2**20)) + zeros.flush(zlib.Z_FULL_FLUSH)       # may be repeated
    block = block * 1812 + zeros.flush()
    large = zipped([("data.pkl", block), ("version", b"3\n")],
                   {("local", 0, 3): 8, ("line", 0, 4): 8, ("line", 0, 9): 1812 * 2**20})
    files.update({"deflated": large, "deflated, harmless to zipfile": two_zips(large, whole)})
    folders = []
    for name, data in files.items():
        folders.append(tmp_path / name)
        shutil.copytree(copy, folders[-1])
        (folders[-1] / "pytorch_model.bin").write_bytes(data)
    done = subprocess.run([sys.executable, "-c", LOADED, *folders], capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(files) + 1, done.stdout + done.stderr[-2000:]
    assert int(lines[-1].split()[1]) < 500_000


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
