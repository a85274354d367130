"""download: only what minivl reads, checked against the hub's sums, and errors in words."""
import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import logits
from stand_in_hub import Hub, LocalHub, repository

from minivl.limits import InputError
from weights_tools import download, files, inspect

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    """form -> the stand-in hub with that checkpoint."""
    return lambda form: Hub(repository(made(form), tmp_path / "repository"), monkeypatch)


@pytest.mark.parametrize("form", ["awq-shards", "awq-bin"])
def test_download(form, hub, made, tmp_path, capsys):
    played = hub(form)
    folder = download.download("Org/name", revision="v1", to=tmp_path / "to")
    assert set(os.listdir(folder)) == set(os.listdir(made(form))) - {"preprocessor_config.json"}     # no code, no .pth
    assert {arguments.get("revision") for name, arguments in played.calls if name != "HfApi"} == {"v1"}
    out = capsys.readouterr().out
    for path in files.weight_files(folder):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert path.suffix == ".json" or f"{digest}  {path.name}  as on the hub\n" in out
    assert out.endswith(f"give this folder to minivl\n{folder}\n") and f"destination: {tmp_path / 'to'} (--to)" in out
    assert torch.equal(logits(folder), logits(made(form)))
    download.download("Org/name", revision="v1", to=tmp_path / "to")        # a second time
    out = capsys.readouterr().out
    assert out.count("(already there)") == len(os.listdir(folder)) and "to fetch: 0.000 GB" in out


def test_dry_run_only_lists(hub, tmp_path, capsys):
    played = hub("awq-shards")
    assert download.main(["Org/name", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert not [name for name, _ in played.calls if name == "snapshot_download"]
    total = sum(p.stat().st_size for p in played.folder.iterdir()
                if p.suffix not in (".py", ".pth", ".md") and p.name != "preprocessor_config.json")
    assert f"10 files {' ' * 33}{total:>7,} bytes" in out and "the hub's cache" in out and ".pth" not in out
    assert sorted(re.findall(r"\n  (model\S*) +([\d,]+) bytes", out)) == [
        (p.name, f"{p.stat().st_size:,}") for p in files.weight_files(played.folder)]


def test_download_refusals(hub, made, tmp_path, monkeypatch):
    played = hub("awq-shards")
    played.snapshot_download = lambda **_: pytest.fail("must not download")
    with monkeypatch.context() as m:
        m.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=300_000))
        with pytest.raises(InputError, match=r"Org/name needs 0.001 GB more, .* has 0.000 GB free; .*--to"):
            download.download("Org/name", to=tmp_path / "far" / "away")
    with pytest.raises(InputError, match=r"holds other weights \(model.safetensors, 1 files\)"):
        download.download("Org/name", to=made("awq"))
    with monkeypatch.context() as m:
        m.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
            download.download("Org/name")
    for path in files.weight_files(played.folder):
        path.unlink()
    with pytest.raises(InputError, match="no weights among the"):
        download.download("Org/name")


def test_download_that_differs_from_the_hub(hub, tmp_path):
    played = hub("awq-bin")
    honest, cut = played.snapshot_download, 0

    def damaged(**arguments):
        path = Path(honest(**arguments)) / "pytorch_model.bin"
        if not path.exists():       # the weights come last
            return str(path.parent)
        data = bytearray(path.read_bytes())
        data[5000] ^= 1
        path.write_bytes(data[:len(data) - cut])
        return str(path.parent)
    played.snapshot_download = damaged
    digest = hashlib.sha256((played.folder / "pytorch_model.bin").read_bytes()).hexdigest()
    with pytest.raises(InputError, match=f"pytorch_model.bin has sha256 .*, on the hub it is {digest}; .*delete"):
        download.download("Org/name", to=tmp_path / "to")
    cut = 9
    size = (played.folder / "pytorch_model.bin").stat().st_size
    with pytest.raises(InputError, match=f"has {size - 9} bytes in .*, on the hub {size}"):
        download.download("Org/name", to=tmp_path / "to2")


@pytest.mark.parametrize("name, message", [
    ("RepositoryNotFoundError", "there is no Org/name on the hub .*private"),
    ("GatedRepoError", "is gated .*hf auth login"),
    ("RevisionNotFoundError", "no revision 'v1'"), ("LocalEntryNotFoundError", "cannot be reached"),
    ("ConnectionError", r"\(ConnectionError: no route\).*; check the network")])
@pytest.mark.parametrize("tool", [download.download, inspect.inspect])
def test_hub_errors_become_words(name, message, tool, hub):
    played = hub("awq")
    kind = getattr(huggingface_hub.errors, name, ConnectionError)
    # The real constructors of the others want an HTTP response.
    error = kind("no route") if kind is ConnectionError else kind.__new__(kind)

    def fail(**_):
        raise error
    played.model_info = fail
    with pytest.raises(InputError, match=message):
        tool("Org/name", revision="v1")


@pytest.mark.slow
def test_real_client_against_a_local_hub(made, tmp_path):
    """The installed huggingface_hub itself, on real requests; in a process of its own, for this one is offline."""
    repository = tmp_path / "repository"
    repository.mkdir()
    for path in made("awq-shards").iterdir():
        (repository / path.name).write_bytes(path.read_bytes())
    (repository / "inputs_stats.pth").write_text("not for us")
    handler = type("Handler", (LocalHub,), {"folder": repository})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = ("import sys; from weights_tools import run, download, inspect\n"
                "assert run(lambda: inspect.main(['Org/name', '--summary'])) == 0\n"
                "assert run(lambda: download.main(['Org/name'])) == 0\n"
                "sys.exit(run(lambda: download.main(['Org/other'])))")
        env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
               "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=env, capture_output=True,
                              text=True, timeout=120, check=False)
        server.shutdown()
    code = "import minivl; minivl.load('Org/name'); print('loaded')"
    again = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT,
                           env={**env, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=60, check=False)
    assert again.stdout == "loaded\n", again.stderr      # offline, though README and code were never fetched
    assert done.returncode == 2, done.stderr
    assert "error: there is no Org/other on the hub" in done.stderr and "Traceback" not in done.stderr
    assert "fits config.json" in done.stdout and done.stdout.count("as on the hub") == 4
    folder = Path(done.stdout.splitlines()[-1])
    assert folder.is_relative_to(tmp_path / "home") and not (folder / "inputs_stats.pth").exists()
    assert torch.equal(logits(folder), logits(made("awq")))


def test_the_shipped_models_need_no_download():
    for name in ("nano", "nano-awq"):
        with pytest.raises(InputError, match=f"{name} is inside the package, .*nothing to download"):
            download.download(name)
