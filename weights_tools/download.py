"""Fetch a checkpoint from the Hugging Face hub: only what minivl reads (JSON, tokenizer, weights), no code, no *.pth.

    list with sizes -> enough disk? -> download, resuming an earlier run -> sha256 of each file compared with the hub's

The last line names the folder to give to minivl. `--dry-run` stops after the list.
"""
from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from tqdm import tqdm

from minivl import options
from minivl.files.find import SHIPPED, choose_files, fetch, hub_errors, hub_id_of, hub_info
from minivl.limits import InputError, is_there, offline, reading
from weights_tools import run
from weights_tools.files import WEIGHT_FILE, weight_files


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch."""
    name: str
    size: int               # bytes
    sha256: str | None      # the hub knows it of large (LFS) files only
    here: bool              # already complete at the destination


def download(hub_id: str, *, revision: str | None = None, to: str | Path | None = None,
             dry_run: bool = False) -> Path | None:
    """Fetch the files that minivl reads into the hub's cache, or into the folder `to`; prints what it does.

    `hub_id`: or a short name such as 4b-mpo-awq, even where a folder has this name.
    Returns the folder to load, None after a dry run. A file whose sha256 is not the hub's is an InputError.
    """
    if hub_id in SHIPPED:
        raise InputError(f"{hub_id} is inside the package, {SHIPPED[hub_id]}; there is nothing to download")
    hub_id = hub_id_of(hub_id)
    if offline():
        raise InputError(f"HF_HUB_OFFLINE is set, so nothing can be downloaded; unset it to fetch {hub_id}, or load a "
                         "local folder")
    files = remote_files(hub_id, revision, to)
    place = Path(huggingface_hub.constants.HF_HUB_CACHE if to is None else to)
    _list(files, place, "the hub's cache" if to is None else "--to")
    _refuse_mixture(files, to)
    missing = sum(f.size for f in files if not f.here)
    with reading(place):
        free = shutil.disk_usage(_existing(place)).free
    if missing > free:
        raise InputError(f"{hub_id} needs {missing / 1e9:.3f} GB more, {place} has {free / 1e9:.3f} GB free; free some "
                         "space or give a folder on another disk with --to")
    print(f"to fetch: {missing / 1e9:.3f} GB; free there: {free / 1e9:.3f} GB", flush=True)
    if dry_run:
        return None
    with hub_errors(hub_id, revision):
        folder = fetch(hub_id, revision, [f.name for f in files], to)
    verify(folder, files)
    print(f"ready: give this folder to minivl\n{folder}")
    return folder


def remote_files(hub_id: str, revision: str | None = None, to: str | Path | None = None) -> list[RemoteFile]:
    """List what `download` would fetch. `to`: where to look for files that are there already; None: the hub's cache."""
    with hub_errors(hub_id, revision):
        info = hub_info(hub_id, revision, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}

    def here(sibling):
        path = (huggingface_hub.try_to_load_from_cache(hub_id, sibling.rfilename, revision=info.sha) if to is None
                else Path(to) / sibling.rfilename)
        # The cache answers None, or an object of its own for "known not to exist".
        return isinstance(path, (str, Path)) and Path(path).is_file() and Path(path).stat().st_size == sibling.size

    return [RemoteFile(name, siblings[name].size or 0, siblings[name].lfs and siblings[name].lfs.sha256,
                       here(siblings[name])) for name in choose_files(siblings)]


def verify(folder: Path, files: list[RemoteFile]):
    """Check that every file is there in full and has the sha256 of the hub where it knows one; prints the digests."""
    print("sha256")
    for file in files:
        path = Path(folder) / file.name
        size = path.stat().st_size if is_there(path) else 0
        if size != file.size:
            raise InputError(f"{file.name} has {size} bytes in {folder}, on the hub {file.size}; run again")
        if file.sha256 is None:
            if WEIGHT_FILE.fullmatch(file.name) and not file.name.endswith(".json"):
                print(f"  {sha256(path)}  {file.name}  (the hub has none to compare with)")
            continue
        found = sha256(path)
        if found != file.sha256:
            raise InputError(f"{file.name} has sha256 {found}, on the hub it is {file.sha256}; the file is damaged or "
                             f"was changed: delete {path.resolve()} and run again")
        print(f"  {found}  {file.name}  as on the hub")


def sha256(path: str | Path) -> str:
    """Compute the hex digest of a file of any size."""
    digest = hashlib.sha256()
    with reading(path), open(path, "rb") as f, tqdm(total=os.path.getsize(path), unit="B", unit_scale=True, leave=False,
                                     desc=f"sha256 {Path(path).name}", disable=None) as bar:
        while chunk := f.read(1 << 24):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _list(files: list[RemoteFile], place: Path, what: str):
    width = max(len(f.name) for f in files)
    for file in files:
        print(f"  {file.name:{width}}  {file.size:>15,} bytes{'  (already there)' if file.here else ''}")
    total = sum(f.size for f in files)
    print(f"  {f'{len(files)} files':{width}}  {total:>15,} bytes = {total / 1e9:.3f} GB")
    print(f"destination: {place} ({what})")


def _refuse_mixture(files: list[RemoteFile], to):
    """Refuse a folder that holds another checkpoint's weights too: it would load those, or none."""
    strange = [p.name for p in weight_files(to) if p.name not in {f.name for f in files}] if to is not None else []
    if strange:
        raise InputError(f"{to} holds other weights ({strange[0]}, {len(strange)} files), which would mix with the "
                         "download; give an empty folder")


def _existing(path: Path) -> Path:
    """Find the nearest folder that exists, the path itself or above it, on whose disk it will lie."""
    path = path.absolute()
    return next(p for p in [path, *path.parents] if p.exists())


def arguments(argv: list | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.download", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("hub_id", metavar="HUB_ID",
                        help="for example OpenGVLab/InternVL2_5-4B-MPO-AWQ, or short 4b-mpo-awq (3.3 GB)")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit (default main); refs/pr/1 often holds a "
                                                        "safetensors form of an -AWQ checkpoint")
    parser.add_argument("--to", metavar="FOLDER", help="a folder of your own instead of the hub's cache")
    parser.add_argument("--dry-run", action="store_true", help="only list the files and the space they need")
    return parser.parse_args(argv)


def main(argv: list | None = None) -> int:
    """Run the command; its exit code."""
    download(**vars(arguments(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
