"""Find, read, check and load the released files. Nothing in a checkpoint is ever executed.

    folder or hub id -> config.json -> MiniVL on `meta` -> names, shapes and dtypes checked against the files' headers
    -> memory-mapped tensors, one by one to dtype and device -> load_state_dict(strict=True, assign=True)

Accepts model.safetensors, sharded safetensors, and the pickled pytorch_model*.bin of the AWQ repositories (opened with
weights_only=True). *.pth (calibration statistics) and *.py files are never opened.
"""
from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import pickletools
import re
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from minivl import fast
from minivl.config import Config, read_json
from minivl.limits import InputError, offline
from minivl.model import MiniVL

SMALL_FILES = ["config.json", "generation_config.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json"]
WEIGHT_FILES = ["model.safetensors.index.json", "model.safetensors",
                "pytorch_model.bin.index.json", "pytorch_model.bin"]      # in this order; the first that exists is read
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
SHIPPED = {"nano": Path(__file__).parent / "nano" / "float16", "nano-awq": Path(__file__).parent / "nano" / "awq"}
MAX_HEADER = 16_000_000     # bytes; the released ones stay below 1 MB, and Python's JSON needs 25 times as much memory
PICKLED = re.compile(r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)")


def load(path_or_id, *, revision: str | None = None, device=None, dtype=None, precision: str | None = None) -> MiniVL:
    """A released checkpoint as a model in eval mode.

    path_or_id: local folder, or hub id such as "OpenGVLab/InternVL2_5-4B-MPO-AWQ" (downloaded, with `revision`).
    device: default "cpu". dtype: torch dtype or its name; default float32 on the CPU, elsewhere float16 for AWQ and
    bfloat16 otherwise. AWQ words and scales stay as released whatever the dtype.
    precision: None: modules as released, to be read, verified and changed. "exact" or "fast": see minivl.fast.
    """
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < (2, 6):
        raise InputError(f"torch {torch.__version__} is too old: before 2.6 a pickle could run code even with "
                         "weights_only=True; install torch 2.6 or later")
    folder = find(path_or_id, revision=revision)
    config = Config.load(folder)
    device = _device(device)
    dtype = _dtype(dtype, device, config)
    if precision not in (None, "exact", "fast"):
        raise InputError(f"precision {precision!r} is not one of exact, fast, None")
    with _on_meta():
        model = MiniVL(config)
    tensors = open_weights(folder)
    _check(model, tensors, folder)
    half = precision is not None and (device.type, dtype) == ("cpu", torch.float32) and fast.keeps_half(model)
    if half and fast.has_compiler() and fast.relays(model):
        fast.warm(config.quantization_config.group_size // 8, config.llm_config.hidden_size,
                  tensors["language_model.lm_head.weight"].dtype, precision == "fast" and fast.products()[1])
    state = {}
    for name in tqdm(model.state_dict(), desc="loading", unit="tensor", delay=2, leave=False, disable=None):
        tensor = tensors[name].read()
        if tensor.is_floating_point():
            _refuse_non_finite(name, tensor, "the file is damaged; download it again")
            keep = name.endswith(".scales")     # rounding a scale would change 128 weights at once
            keep |= half and name.endswith(("embed_tokens.weight", "lm_head.weight"))
            moved = tensor.to(device, tensor.dtype if keep else dtype)
            if torch.finfo(moved.dtype).max < torch.finfo(tensor.dtype).max:
                _refuse_non_finite(name, moved, f"its values exceed {moved.dtype}; load with dtype='bfloat16' or 'float32'")
        else:
            moved = tensor.to(device)
        state[name] = moved
    model.load_state_dict(state, strict=True, assign=True)
    del state, tensor, moved        # the model alone holds them now: what `prepare` replaces leaves the memory
    model.img_context_token_id, model.eos_token_ids = _token_ids(folder, config)
    return (fast.prepare(model, precision) if precision else model).eval()


_RESET = torch.nn.Embedding.reset_parameters


@contextmanager
def _on_meta():
    """Modules without memory. nn.Embedding's random numbers are left out: on `meta` torch imports half its compiler for them, 1 s."""
    torch.nn.Embedding.reset_parameters = lambda self: None
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.nn.Embedding.reset_parameters = _RESET


def find(path_or_id, *, revision: str | None = None) -> Path:
    """A local folder as it is; a hub id as the folder of its downloaded files (JSON, tokenizer, weights; no code).

    "nano" and "nano-awq" are the small trained model inside the package, unless there is a folder of this name.
    """
    if not isinstance(path_or_id, (str, os.PathLike)):
        raise InputError(f"a checkpoint cannot be a {type(path_or_id).__name__}; give a folder, nano, nano-awq or a hub id "
                         "like OpenGVLab/InternVL2_5-4B-MPO-AWQ")
    text = os.path.expanduser(os.fspath(path_or_id))
    if text in SHIPPED and not os.path.isdir(text):
        if not SHIPPED[text].is_dir():
            raise InputError(f"{text} is not trained in this copy of minivl; name a folder or hub id, or train it: "
                             "python -m weights_tools.nano.train RUN --quick, then use the folder it prints")
        text = str(SHIPPED[text])
    if os.path.isdir(text):
        if revision is not None:
            raise InputError(f"{text} is a local folder, it has no revision {revision!r}; leave `revision` out")
        return Path(text)
    if os.path.exists(text):
        raise InputError(f"{text} is a file; give the folder that holds config.json and the weights")
    # A typo in a local path must not become a request: `build/tyni` beside a folder `build` is no hub id.
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) or os.path.isdir(text.split("/")[0]):
        raise InputError(f"{text} does not exist; give a folder with config.json and weights, or a hub id like "
                         "OpenGVLab/InternVL2_5-4B-MPO-AWQ")
    return _download(text, revision)


def choose_files(names) -> list[str]:
    """Of all file names of a repository, those that `load` reads; shards by their pattern, the index is not read yet."""
    names = set(names)
    first = next((w for w in WEIGHT_FILES if w in names), None)
    if first is None:
        raise InputError(f"no weights among the {len(names)} files; expected one of {', '.join(WEIGHT_FILES)}")
    shard = re.compile(r"model-\d+-of-\d+\.safetensors" if "safetensors" in first else r"pytorch_model-\d+-of-\d+\.bin")
    shards = [n for n in names if shard.fullmatch(n)] if first.endswith("index.json") else []
    return [n for n in SMALL_FILES if n in names] + [first] + sorted(shards)


def _download(hub_id: str, revision: str | None) -> Path:
    import huggingface_hub
    if not offline():
        try:
            with hub_errors(hub_id, revision):
                files = huggingface_hub.HfApi().list_repo_files(hub_id, revision=revision)
                return Path(huggingface_hub.snapshot_download(hub_id, revision=revision,
                                                              allow_patterns=choose_files(files)))
        except InputError as problem:
            cached = _cached(hub_id, revision)
            if cached is None:
                raise
            warnings.warn(f"{problem}. Using the cached copy; HF_HUB_OFFLINE=1 does so without asking", stacklevel=4)
            return cached
    cached = _cached(hub_id, revision)
    if cached is None:
        raise InputError(f"{_at(hub_id, revision)} is not in the local cache (nor a local folder) and offline mode is set; "
                         "unset HF_HUB_OFFLINE once to download it, or give a local folder")
    return cached


def _cached(hub_id: str, revision: str | None) -> Path | None:
    """The downloaded files, without asking the hub."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        # The client calls a snapshot incomplete because README and code, which we never fetch, are not there. Use what
        # is; a missing shard is still named when the weights are opened.
        path = getattr(error, "snapshot_path", None)
        return None if path is None else Path(path)


@contextmanager
def hub_errors(hub_id: str, revision: str | None):
    """What the hub client raises inside, as an InputError that says what to do."""
    from huggingface_hub import errors
    at = _at(hub_id, revision)
    try:
        yield
    except (InputError, TypeError, AttributeError, NameError):     # the last three: our mistakes, not the network's
        raise
    except errors.GatedRepoError:
        raise InputError(f"{at} is gated on the hub; accept its terms there and log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{hub_id} has no revision {revision!r} on the hub; try `main` or a commit id") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"there is no {hub_id} on the hub (and no local folder of that name), or it is private and "
                         "you are not logged in") from None
    except errors.LocalEntryNotFoundError:
        raise InputError(f"the hub cannot be reached and {at} is not in the local cache; check the network and run "
                         "again, finished files are kept") from None
    except Exception as error:      # the hub client passes on whatever its HTTP library raises
        reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise InputError(f"could not read {at} from the hub ({reason}), and there is no local folder of that name; check "
                         "the network and run again, finished files are kept") from None


def _at(hub_id: str, revision: str | None) -> str:
    return hub_id + (f" at revision {revision}" if revision else "")


def _device(device) -> torch.device:
    try:
        device = torch.device("cpu" if device is None else device)
        torch.empty(0, device=device).cpu()         # fails on `meta` too
        return device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):       # unknown name, or not on this machine
        raise InputError(f"device {str(device)!r} cannot be used here; give cpu, or cuda, cuda:1, mps where torch has "
                         "them") from None


def _dtype(dtype, device: torch.device, config: Config) -> torch.dtype:
    if dtype is None:
        if device.type == "cpu":
            return torch.float32        # the contract: greedy tokens in float32 on the CPU
        return torch.float16 if config.quantization_config else torch.bfloat16
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    dtype = known.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in known.values():
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(known)}")
    return dtype


# ---- what the files hold, read from their headers -------------------------------------------------------------------

@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight file: known by its header, read (memory-mapped, not copied) on demand."""
    file: Path
    shape: tuple
    dtype: torch.dtype
    read: object        # () -> Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def open_weights(folder) -> dict[str, StoredTensor]:
    """name -> StoredTensor for all weights of a folder; every file is checked to be whole first."""
    folder = Path(folder)
    first = next((w for w in WEIGHT_FILES if (folder / w).is_file()), None)
    if first is None:
        raise InputError(f"{folder} has no weights; expected one of {', '.join(WEIGHT_FILES)}. "
                         "Is the download complete?")
    open_file = _open_safetensors if "safetensors" in first else _open_pickle
    if not first.endswith(".index.json"):
        return open_file(folder / first)
    weight_map = read_json(folder / first).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{first} in {folder} has no weight_map of tensor names to file names; download it again")
    tensors, files = {}, sorted(set(weight_map.values()))
    for file in files:
        if Path(file).name != file or file.startswith("."):
            raise InputError(f"{first} points outside its folder: {file!r}; do not use this checkpoint")
        if len(file) > 200 or not (folder / file).is_file():
            raise InputError(f"{folder} lacks the shard {file} that {first} names; download it again")
    for file in files:
        for name, tensor in open_file(folder / file).items():
            if weight_map.get(name) != file:
                raise InputError(f"{file} holds {name}, which {first} places in {weight_map.get(name, 'no file')}; the "
                                 "shards do not belong together")
            tensors[name] = tensor
    lost = [f"{name} (in {file})" for name, file in weight_map.items() if name not in tensors]
    if lost:
        raise InputError(f"{first} names tensors that the shards lack: {', '.join(lost)}; download them again")
    return tensors


def safetensors_header(path, size: int | None = None, data: bytes | None = None) -> tuple[dict, dict, int]:
    """Header of a safetensors file, fully checked: ({name: (dtype, shape, begin, end)}, metadata, first data byte).

    Layout: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps. `size` and `data`:
    for a remote file, its total size and its first bytes.
    """
    path = Path(path)
    size = path.stat().st_size if size is None else size
    bad = f"{path.name} is not a whole safetensors file: "
    if data is None:
        with open(path, "rb") as f:
            data = f.read(8)
            length = int.from_bytes(data, "little")
            data += f.read(length) if length <= min(MAX_HEADER, size) else b""
    length = int.from_bytes(data[:8], "little")
    if size < 8 or length > MAX_HEADER or 8 + length > size:
        raise InputError(f"{bad}its first 8 bytes announce a header of {length} bytes, the file has {size}; "
                         "download it again")
    try:
        header = json.loads(data[8:8 + length], object_pairs_hook=_without_repetition)
        metadata = header.pop("__metadata__", {})
        entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
        whole = all(isinstance(n, int) and n >= 0 for _, shape, *ends in entries.values() for n in (*shape, *ends))
        whole &= all(isinstance(dtype, str) for dtype, *_ in entries.values())
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise InputError(f"{bad}its header is corrupt; download it again") from None
    if not whole or not isinstance(metadata, dict):
        raise InputError(f"{bad}its header is corrupt; download it again")
    end, last = 0, "the header"
    for name, (dtype, shape, begin, stop) in sorted(entries.items(), key=lambda e: e[1][2:]):
        if dtype not in DTYPES:
            raise InputError(f"{path.name}: {name} has dtype {dtype}; known are {', '.join(DTYPES)}")
        bytes_needed = math.prod(shape) * DTYPES[dtype].itemsize
        if begin != end or stop - begin != bytes_needed:
            raise InputError(f"{bad}{name} ({dtype} {list(shape)}, {bytes_needed} bytes) is said to lie at "
                             f"{begin}..{stop}, but {last} ends at {end}; the header was altered or damaged, "
                             "download it again")
        if 8 + length + stop > size:
            raise InputError(f"{bad}it ends at byte {size}, inside {name}, which needs bytes up to "
                             f"{8 + length + stop}; the file was cut short, download it again")
        end, last = stop, name
    if 8 + length + end != size:
        raise InputError(f"{bad}{size - 8 - length - end} bytes follow its last tensor {last}; the file was padded or "
                         "is another one, download it again")
    return entries, metadata, 8 + length


def _without_repetition(pairs: list) -> dict:
    """A JSON object that names something twice could mean another tensor to the next reader."""
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError
    return dict(pairs)


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    entries, metadata, start = safetensors_header(path)
    _verify_sha256(path, entries, metadata, start)
    try:
        safe_open(path, framework="pt")
    except (SafetensorError, OSError):
        raise InputError(f"{path.name} is refused by the safetensors library; download it again") from None

    return {name: StoredTensor(path, shape, DTYPES[dtype], partial(_map, path, start + begin, shape, DTYPES[dtype]))
            for name, (dtype, shape, begin, _) in entries.items()}


def _verify_sha256(path: Path, entries: dict, metadata: dict, start: int):
    """Files written by weights_tools carry a digest of each tensor; released files do not (the hub has the file's)."""
    if "sha256" not in metadata:
        return
    try:
        digests = dict(json.loads(metadata["sha256"]))
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{path.name}: its list of sha256 digests is corrupt; make or download it again") from None
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
        def digest(entry):
            with view[start + entry[2]:start + entry[3]] as part:
                return hashlib.sha256(part).hexdigest()

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, found in zip(entries, pool.map(digest, entries.values())):
                if found != digests.get(name):
                    raise InputError(f"{path.name}: {name} does not match its sha256 digest; the file was altered or "
                                     "damaged, make or download it again")


def _open_pickle(path: Path) -> dict[str, StoredTensor]:
    """pytorch_model.bin: a zip of one pickle and a record per tensor. Only tensors are unpickled, nothing is called."""
    damaged = f"{path.name} is not a whole PyTorch file (a zip of tensors); download it again"
    records = _check_zip(path, damaged)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:       # pickle, zip and runtime errors, with pages of advice to switch the check off
        raise InputError(damaged) from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor)
                                              for k, v in state.items()):
        raise InputError(f"{path.name} does not hold a dict of names and tensors; download it again")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or not tensor.is_contiguous():
            raise InputError(f"{path.name}: {name} is not a plain contiguous tensor; download it again")
    # torch takes a storage's size from the pickle and maps that many bytes, beyond the end of its record if need be.
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()}
    if sum(storages.values()) != records:
        raise InputError(f"{path.name}: its tensors claim {sum(storages.values())} bytes, its records hold {records}; the "
                         "file was altered or damaged, download it again")
    _verify_crc(path, list(state))
    # torch maps the file as one piece, which stays in memory as long as any tensor of it. So each is mapped again when it is read.
    base = min((start for start, size in storages.items() if size), default=0) - _first_record(path)
    return {name: StoredTensor(path, tuple(t.shape), t.dtype, partial(_map, path, t.data_ptr() - base, t.shape, t.dtype))
            for name, t in state.items()}


def _map(path: Path, at: int, shape, dtype) -> torch.Tensor:
    """A tensor that lies at byte `at` of a file. Only the pages that are looked at come into memory."""
    end = at + math.prod(shape) * dtype.itemsize
    if end <= at:       # empty: it lies nowhere
        return torch.empty(shape, dtype=dtype)
    return torch.empty(0, dtype=dtype).set_(torch.UntypedStorage.from_file(str(path), False, end)[at:end], 0, shape)


def _first_record(path: Path) -> int:
    """Where the first tensor record's bytes begin: after its local header, whose length is in it."""
    with zipfile.ZipFile(path) as archive:
        header = min((r.header_offset for r in archive.infolist() if r.file_size and re.search(r"/data/\d+$", r.filename)), default=0)
    with open(path, "rb") as f:
        f.seek(header + 26)
        name, extra = (int.from_bytes(f.read(2), "little") for _ in range(2))
    return header + 30 + name + extra


def _check_zip(path: Path, damaged: str) -> int:
    """Bytes of all tensor records; refuses what torch.save never writes, before torch reads the file.

    That is: compressed or repeated records (a small file could fill the memory), and a pickle that names anything but
    dicts, storages and tensors, or builds towers of tuples out of one another (hashing such a key never ends).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if len({r.filename for r in records}) != len(records) or any(
                    r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records):
                raise InputError(f"{path.name} has compressed or repeated records, torch writes none such; do not use this "
                                 "checkpoint")
            pickles = [r for r in records if r.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > MAX_HEADER:
                raise InputError(damaged)
            tuples, previous = set(), ""
            for op, argument, _ in pickletools.genops(archive.read(pickles[0])):
                called = argument if op.name in ("GLOBAL", "INST") else op.name
                if op.name in ("GLOBAL", "INST", "STACK_GLOBAL", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4") \
                        and not (op.name == "GLOBAL" and PICKLED.fullmatch(argument)):
                    raise InputError(f"{path.name} holds more than tensors (its pickle asks for {called!r}); refused, "
                                     "nothing of it was run. Do not use this checkpoint")
                if previous.endswith(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")) and "PUT" in op.name:
                    tuples.add(argument)
                if op.name == "DUP" or "GET" in op.name and argument in tuples:
                    raise InputError(damaged)
                previous = op.name
            return sum(r.file_size for r in records if re.search(r"/data/\d+$", r.filename))
    except InputError:
        raise
    except Exception:       # zipfile and pickletools raise many things for damaged files
        raise InputError(damaged) from None


def _verify_crc(path: Path, names: list[str]):
    """The zip keeps a CRC-32 of each record, which torch's memory-mapped reader does not look at."""
    with zipfile.ZipFile(path) as archive:
        def checksum(record):
            crc = 0
            try:
                with archive.open(record) as f:
                    f._expected_crc = None      # the zipfile module would raise without saying which tensor
                    while chunk := f.read(1 << 24):
                        crc = zlib.crc32(chunk, crc)
                return crc
            except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError):
                return None

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for record, crc in zip(archive.infolist(), pool.map(checksum, archive.infolist())):
                if crc != record.CRC:
                    number = re.fullmatch(r".*/data/(\d+)", record.filename)    # records are numbered in the dict's order
                    name = names[int(number[1])] if number and int(number[1]) < len(names) else record.filename
                    raise InputError(f"{path.name}: {name} does not match its checksum; the file was altered or damaged, "
                                     "download it again")


# ---- against the model ----------------------------------------------------------------------------------------------

def _check(model: MiniVL, tensors: dict[str, StoredTensor], folder: Path):
    """One error that names every missing, unexpected and misshapen tensor."""
    wanted = model.state_dict()
    problems = [f"missing: {n} {list(wanted[n].shape)}" for n in wanted if n not in tensors]
    problems += [f"unexpected: {n} {list(t.shape)}" for n, t in tensors.items() if n not in wanted]
    for name in wanted.keys() & tensors.keys():
        want, found = wanted[name], tensors[name]
        if tuple(want.shape) != found.shape:
            problems.append(f"shape: {name} is {list(found.shape)} in the file, {list(want.shape)} in the model")
        elif want.is_floating_point() != found.dtype.is_floating_point or found.dtype not in DTYPES.values() or (
                not want.is_floating_point() and want.dtype != found.dtype):
            problems.append(f"dtype: {name} is {found.dtype} in the file, the model takes "
                            f"{'a float' if want.is_floating_point() else want.dtype}")
    if problems:
        hint = ""
        if any(".qweight" in p for p in problems):
            hint = (" config.json and weights disagree about AWQ: compare quantization_config with the tensors."
                    if model.config.quantization_config else
                    " The weights are AWQ but config.json has no quantization_config.")
        raise InputError(f"the weights in {folder} do not fit its config.json, {len(problems)} problems:\n  "
                         + "\n  ".join(sorted(problems)) + ("\n" + hint.strip() if hint else ""))


def _refuse_non_finite(name: str, tensor: torch.Tensor, why: str):
    if tensor.numel() == 0:
        return
    low, high = (float(v) for v in torch.aminmax(tensor.detach()))      # NaN passes through aminmax; no temporary copy
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{name} holds NaN or infinity ({low}..{high}); {why}")


def _token_ids(folder: Path, config: Config):
    """(id of <IMG_CONTEXT> or None, ids that end an answer), from the small files of the checkpoint."""
    added, vocabulary = {}, config.llm_config.vocab_size
    if (folder / "added_tokens.json").is_file():
        added = read_json(folder / "added_tokens.json")
    elif (folder / "tokenizer.json").is_file():
        listed = read_json(folder / "tokenizer.json").get("added_tokens")
        added = {str(t.get("content")): t.get("id") for t in listed if isinstance(t, dict)} if isinstance(listed, list) else {}
    added = {token: i for token, i in added.items() if isinstance(i, int)}
    largest = max(added.values(), default=0)
    if largest >= vocabulary:
        raise InputError(f"the tokenizer has ids up to {largest}, the model's vocab_size is {vocabulary}; tokenizer "
                         "and weights are of different models")
    # The released generation_config.json lists <|im_end|>, <|im_start|> and <|endoftext|>; the original's chat() stops
    # at <|im_end|> alone. The union is safe: none of them can be part of an answer.
    eos = {added["<|im_end|>"]} if "<|im_end|>" in added else set()
    sources = [read_json(folder / "config.json")["llm_config"]]
    if (folder / "generation_config.json").is_file():
        sources.append(read_json(folder / "generation_config.json"))
    for source in sources:
        ids = source.get("eos_token_id")
        eos.update(i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int) and 0 <= i < vocabulary)
    return added.get("<IMG_CONTEXT>"), tuple(sorted(eos))
