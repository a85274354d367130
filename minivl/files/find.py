"""Find the files of a checkpoint: in a local folder, inside the package, or by a hub id, which downloads them.

*.pth (calibration statistics) and *.py files are neither downloaded nor opened.
"""
from __future__ import annotations

import errno
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minivl.family import VARIANTS, hint
from minivl.limits import InputError, first_of, in_words, offline, reading

SMALL_FILES = ["config.json", "generation_config.json", "vocab.json", "merges.txt", "added_tokens.json",
               "tokenizer.json", "tokenizer_config.json", "tokenizer.model"]
STEMS = {"safetensors": "model", "bin": "pytorch_model"}    # format, which is the suffix too -> name before the suffix
ADAPTER = re.compile(r"adapter_(config\.json|model.*\.(safetensors|bin))")      # as PEFT names its files
# Files beside the weights, by the programs that write them: Trainer's state, LMDeploy's statistics.
ASIDE = re.compile(r"training_args|optimizer|scheduler|scaler|rng_state|random_states|.*stats\b|\.", re.IGNORECASE)
FOREIGN = (".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".engine", ".mlmodel", ".tflite")
NAMES = ("nano, nano-awq, a short name like 4b-mpo-awq (python -m minivl models lists them) or a hub id like "
         "OpenGVLab/InternVL2_5-4B-MPO-AWQ")
HUB_SECONDS = 10            # to wait for the hub's list of files
PACKAGE = Path(__file__).parents[1]
EXPECTED = "model.safetensors or pytorch_model.bin, whole or in shards (model-00001-of-00002.safetensors)"
SHIPPED = {"nano": PACKAGE / "nano" / "float16", "nano-awq": PACKAGE / "nano" / "awq"}


def find(path_or_id: str | os.PathLike, *, revision: str | None = None) -> Path:
    """Find the folder of a checkpoint; for a hub id download its files first (JSON, tokenizer, weights; no code).

    Unless there is a folder of this name, "nano" and "nano-awq" are the small trained model inside the package, and
    "4b-mpo-awq" and the like (minivl/family.py) stand for the hub ids of the released models.
    """
    if not isinstance(path_or_id, (str, os.PathLike)):
        raise InputError(f"a checkpoint cannot be a {type(path_or_id).__name__}; give a folder, {NAMES}")
    text = os.path.expanduser(os.fspath(path_or_id))
    if text in SHIPPED and not os.path.isdir(text):
        if not SHIPPED[text].is_dir():
            raise InputError(f"{text} is not trained in this copy of minivl; name a folder or hub id, or train it: "
                             "python -m weights_tools.nano.train RUN --quick, then use the folder it prints")
        text = str(SHIPPED[text])
    if os.path.isdir(text):
        if revision is not None:
            raise InputError(f"{text} is a local folder, it has no revision {revision!r}; leave `revision` out")
        with reading(text):
            _refuse_adapter(text, os.listdir(text))
        return Path(text)
    if os.path.exists(text):
        raise InputError(f"{text} is a file; give the folder that holds config.json and the weights")
    return _download(hub_id_of(text, local=True), revision)


def hub_id_of(name: str, local: bool = False) -> str:
    """Spell out the hub id that a short name of the family stands for; a hub id stays. Refuses what is neither.

    `local`: it may have been meant as a local path, which is not there.
    """
    if name.lower() in VARIANTS:
        return VARIANTS[name.lower()].hub_id
    # A typo in a local path must not become a request: `build/tyni` beside a folder `build` is no hub id.
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) or local and os.path.isdir(name.split("/")[0]):
        folder = "a folder with config.json and weights, " if local else ""
        raise InputError(f"{name} {'does not exist' if local else 'is no name on the hub'}; "
                         f"{hint(name, tuple(SHIPPED)) or f'give {folder}{NAMES}'}")
    return name


def choose_files(names: Iterable[str]) -> list[str]:
    """Choose from all file names of a repository those that `load` reads: safetensors if there are any, else .bin."""
    names = set(names)
    _refuse_adapter("the repository", names)
    for suffix, stem in STEMS.items():
        whole = f"{stem}.{suffix}"
        weights = [n for n in names if n == whole or shard_of(n, suffix)]
        if weights:
            return [n for n in [*SMALL_FILES, f"{whole}.index.json"] if n in names] + sorted(weights)
    raise InputError(f"no weights among the {len(names)} files; expected {EXPECTED}"
                     + (f"; {other}" if (other := other_weights(sorted(names))) else ""))


def other_weights(names: Iterable[str]) -> str:
    """Say which of the files look like weights under other names or in other formats, and what to do; "": none."""
    names = [name for name in names if not ASIDE.match(name)]
    for suffixes, to in (((".safetensors",), "model.safetensors"),
                         ((".bin", ".pt", ".pth", ".ckpt"), "pytorch_model.bin")):
        found = [name for name in names if name.lower().endswith(suffixes)]
        if len(found) == 1:
            return f"{found[0]} is there: if it holds the whole model, rename it to {to}"
        if found:
            return (f"{first_of(found, ', ', 3)} are there: rename the one that holds the whole model to {to}, or "
                    f"shards of one model to {to.replace('.', f'-00001-of-{len(found):05}.')} and so on")
    found = [name for name in names if name.lower().endswith(FOREIGN)]
    return (f"{first_of(found, ', ', 3)} is there, in a format of other programs, which minivl does not read; take the "
            "model's release in safetensors" if found else "")


def shard_of(name: str, suffix: str) -> tuple[int, int] | None:
    """Read k and n from a shard's name: model-00002-of-00003.safetensors -> (2, 3); None: not such a name."""
    found = re.fullmatch(rf"{STEMS[suffix]}-(\d{{1,9}})-of-(\d{{1,9}})\.{suffix}", name)
    return (int(found[1]), int(found[2])) if found else None


def _refuse_adapter(where: str, names: Iterable[str]):
    """Refuse a LoRA adapter, alone or beside weights, which without it would be another model than the one meant."""
    adapters = sorted(n for n in names if ADAPTER.fullmatch(n))
    if adapters:
        raise InputError(f"{where} holds a LoRA adapter ({first_of(adapters, ', ')}), which minivl does not apply; "
                         "merge it first (in PEFT: merge_and_unload(), then save_pretrained), or delete these files to "
                         "use the weights without it")


def _download(hub_id: str, revision: str | None) -> Path:
    if not offline():
        try:
            with hub_errors(hub_id, revision):
                files = [file.rfilename for file in hub_info(hub_id, revision).siblings or []]
                return fetch(hub_id, revision, choose_files(files))
        except InputError as problem:
            found = cached(hub_id, revision)
            if found is None:
                raise
            warnings.warn(f"{problem}. Using the cached copy; HF_HUB_OFFLINE=1 does so without asking", stacklevel=4)
            return found
    found = cached(hub_id, revision)
    if found is None:
        raise InputError(f"{_at(hub_id, revision)} is not in the local cache (nor a local folder) and offline mode is "
                         "set; unset HF_HUB_OFFLINE once to download it, or give a local folder")
    return found


def fetch(hub_id: str, revision: str | None, names: list[str], to: str | os.PathLike | None = None) -> Path:
    """Fetch files into the hub's cache, or the folder `to`: weights last, so that what was cut short does not load."""
    import huggingface_hub
    weights = [name for name in names if name.endswith(tuple(STEMS))]
    for wanted in ([name for name in names if name not in weights], weights):
        # By the name of the revision, not its commit: only so the cache learns what `main` is, for offline use later.
        folder = huggingface_hub.snapshot_download(hub_id, revision=revision, local_dir=to, allow_patterns=wanted)
    return Path(folder)


def hub_info(hub_id: str, revision: str | None, files_metadata: bool = False):
    """Ask the hub once what a repository holds. (The client's list_repo_files tries six times, half a minute.)"""
    import huggingface_hub
    return huggingface_hub.HfApi().model_info(hub_id, revision=revision, files_metadata=files_metadata,
                                              timeout=HUB_SECONDS)


def cached(hub_id: str, revision: str | None) -> Path | None:
    """Find the files downloaded earlier, all or some, without asking the hub. None: there are none."""
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
def hub_errors(hub_id: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub client raises inside into an InputError that says what to do."""
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
        refused = _refused_by_the_disk(error)
        if refused:
            what = f"{at} cannot be stored" + (f" in {refused.filename}" if refused.filename else "")
            raise InputError(str(in_words(refused, what, "finished files are kept"))) from None
        reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise InputError(f"could not read {at} from the hub ({reason}), and there is no local folder of that name; "
                         "check the network and run again, finished files are kept") from None


def _refused_by_the_disk(error: Exception) -> OSError | None:
    """Find the error of a file in what the hub client raises: HTTP libraries derive theirs from OSError too."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in full):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))      # as Rust spells it, in which parts of the client are
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number and int(number[1]) in full else None


def _at(hub_id: str, revision: str | None) -> str:
    return hub_id + (f" at revision {revision}" if revision else "")
