"""The hub, played by objects that take only calls the installed client takes, and by a server for the client itself."""
import hashlib
import http.server
import inspect as signatures
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub

from minivl.files.formats import safetensors_header

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def repository(checkpoint, folder) -> Path:
    """A repository: a checkpoint's files, and what else lies in a real one."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ("modeling_internvl_chat.py", "inputs_stats.pth", "README.md"):
        (folder / name).write_text("not for us")
    return folder


class Hub:
    """Stands for HfApi and the download functions: repository "Org/name" is a local folder."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.calls = Path(folder), []
        for name in ("HfApi", "hf_hub_download", "snapshot_download", "try_to_load_from_cache"):
            monkeypatch.setattr(huggingface_hub, name, self.checked(getattr(huggingface_hub, name)))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def checked(self, real):
        """Our method of that name, after the real function's signature has taken the arguments."""
        def call(*args, **kwargs):
            bound = signatures.signature(real).bind(*args, **kwargs)
            self.calls.append((real.__name__, dict(bound.arguments)))
            return getattr(self, real.__name__)(**bound.arguments)
        return call

    def HfApi(self):
        api = huggingface_hub.hf_api.HfApi()
        return SimpleNamespace(**{name: self.checked(getattr(api, name)) for name in (
            "model_info", "parse_safetensors_file_metadata")})

    def model_info(self, repo_id, revision=None, files_metadata=False, timeout=None):
        if not files_metadata:      # the hub leaves sizes and digests out
            names = sorted(os.listdir(self.folder))
            return SimpleNamespace(siblings=[huggingface_hub.hf_api.RepoSibling(name) for name in names], sha=COMMIT)
        siblings = []
        for path in sorted(self.folder.iterdir()):
            size = path.stat().st_size
            lfs = (huggingface_hub.hf_api.BlobLfsInfo(size=size, pointer_size=134, sha256=hashlib.sha256(
                path.read_bytes()).hexdigest()) if path.suffix in (".bin", ".safetensors", ".pth") else None)
            siblings.append(huggingface_hub.hf_api.RepoSibling(path.name, size=size, lfs=lfs))
        return SimpleNamespace(siblings=siblings, sha=COMMIT)

    def parse_safetensors_file_metadata(self, repo_id, filename, revision=None):
        entries = safetensors_header(self.folder / filename)[0]
        return SimpleNamespace(tensors={name: huggingface_hub.utils.TensorInfo(dtype, list(shape), (begin, end))
                                        for name, (dtype, shape, begin, end) in entries.items()})

    def hf_hub_download(self, repo_id, filename, revision=None):
        assert not filename.endswith((".safetensors", ".bin")), "inspect must not fetch weights"
        return str(self.folder / filename)

    def try_to_load_from_cache(self, repo_id, filename, revision=None):
        assert revision == COMMIT       # and answers None: nothing is there

    def snapshot_download(self, repo_id, revision=None, local_dir=None, allow_patterns=None):
        target = Path(local_dir or self.folder.parent / "cache")
        target.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            (target / name).write_bytes((self.folder / name).read_bytes())
        return str(target)


class LocalHub(http.server.BaseHTTPRequestHandler):
    """The few requests of the real client that a download makes, answered from `folder` as repository Org/name."""
    folder: Path

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.split("?")[0]
        content = {p.name: p.read_bytes() for p in self.folder.iterdir()}
        sha256 = {n: hashlib.sha256(c).hexdigest() for n, c in content.items() if n.endswith((".safetensors", ".pth"))}
        blob = {n: hashlib.sha1(b"blob %d\0" % len(c) + c).hexdigest() for n, c in content.items()}
        resolve = re.fullmatch(r"/Org/name/resolve/(?:main|[0-9a-f]{40})/(.+)", path)
        if re.fullmatch(r"/api/models/Org/name(/revision/(main|[0-9a-f]{40}))?", path):
            siblings = [{"rfilename": n, "size": len(c), "blobId": blob[n], **({"lfs": {
                "sha256": sha256[n], "size": len(c), "pointerSize": 134}} if n in sha256 else {})}
                for n, c in content.items()]
            self.answer(200, json.dumps({"id": "Org/name", "sha": COMMIT, "tags": [], "siblings": siblings}).encode())
        elif re.fullmatch(r"/api/models/Org/name/tree/(main|[0-9a-f]{40})", path):
            self.answer(200, json.dumps([{"type": "file", "path": n, "size": len(c), "oid": blob[n], **({"lfs": {
                "oid": sha256[n], "size": len(c), "pointerSize": 134}} if n in sha256 else {})}
                for n, c in content.items()]).encode())
        elif resolve and resolve[1] in content:
            data, name = content[resolve[1]], resolve[1]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256.get(name, blob[name])}"', "Accept-Ranges": "bytes"}
            if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                self.answer(206, data[first:last + 1], headers)
            else:
                self.answer(200, data, headers)
        elif path.startswith("/api/models/"):
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def answer(self, code, body, headers=None):
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
