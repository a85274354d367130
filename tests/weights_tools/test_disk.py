"""What the operating system refuses comes as one sentence, with the path and what is left; nothing half looks whole."""
import builtins
import errno
import io
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minivl
import weights_tools
from minivl.config import Config
from minivl.files.find import hub_errors
from minivl.files.formats import open_weights
from minivl.limits import InputError
from weights_tools import files
from weights_tools.train.loop import Loop

ROOT = Path(__file__).parents[2]


def refusing(monkeypatch, name, code=errno.EACCES):
    """Every look at a file or folder of this name is refused, as for a user without permission."""
    def wrap(real):
        def call(path, *args, **more):
            if isinstance(path, (str, os.PathLike)) and Path(path).name == name:
                raise OSError(code, os.strerror(code), str(path))
            return real(path, *args, **more)
        return call
    for module, function in ((io, "open"), (builtins, "open"), (os, "listdir")):
        monkeypatch.setattr(module, function, wrap(getattr(module, function)))


NAMES = ["config.json", "vocab.json", "merges.txt", "added_tokens.json", "model.safetensors", "pytorch_model.bin",
         "generation_config.json"]


def read(folder):
    """Read every file of a checkpoint."""
    return minivl.load(folder), minivl.Tokenizer.load(folder)


@pytest.fixture
def checkpoint(made, tmp_path):
    def copy(name):
        form = "plain-bin" if name == "pytorch_model.bin" else "plain"
        return Path(shutil.copytree(made(form), tmp_path / "checkpoint"))
    return copy


@pytest.mark.parametrize("name", NAMES)
def test_unreadable_files(name, checkpoint, monkeypatch):
    folder = checkpoint(name)
    refusing(monkeypatch, name)
    with pytest.raises(InputError, match=rf"{name} cannot be read \(permission denied\); check the permissions$"):
        read(folder)


def test_an_unreadable_folder(checkpoint, monkeypatch):
    folder = checkpoint("")
    refusing(monkeypatch, "checkpoint")
    for reader in (minivl.load, open_weights):
        with pytest.raises(InputError, match=r"checkpoint cannot be read \(permission denied\)"):
            reader(folder)


@pytest.mark.parametrize("kind", ["device", "pipe", "socket", "folder", "loop"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file(name, kind, checkpoint):
    folder = checkpoint(name)
    path = folder / name
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "socket":
            here = os.open(folder, os.O_RDONLY)         # the names of sockets are short
            server.bind(f"/proc/self/fd/{here}/{name}")
            os.close(here)
        else:
            {"device": lambda: path.symlink_to("/dev/zero"), "pipe": lambda: os.mkfifo(path),
             "folder": path.mkdir, "loop": lambda: path.symlink_to(path)}[kind]()
        says = "cannot be read .*levels of symbolic links" if kind == "loop" else f"is a .*{kind}.*, no file"
        with pytest.raises(InputError, match=f"{name} {says}"):
            read(folder)


def limited(code, megabytes=0.05):
    """Run code in a process whose files end at a size, as on a full disk; its exit code and stderr."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 1e6),) * 2)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", "import signal\n"
                           "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nimport sys\nfrom weights_tools import run\n"
                           + code], cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    return done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("writing ")]


def test_a_full_disk(made, tmp_path):
    """Whatever the tool and the format: exit code 2, one sentence with the path, and what is left."""
    source = made("plain")
    old = shutil.copytree(made("awq"), tmp_path / "old")
    before = {p.name: p.read_bytes() for p in old.iterdir()}
    code, said = limited(f"""
from weights_tools import synthesize
from weights_tools.quantize import __main__ as quantize
import torch
from weights_tools.files import save_torch, write_text
calls = [lambda: synthesize.main([r'{tmp_path}/a']), lambda: synthesize.main([r'{tmp_path}/b', '--format', 'bin']),
         lambda: quantize.main([r'{source}', r'{tmp_path}/c', '--method', 'rtn']),
         lambda: quantize.main([r'{source}', r'{old}', '--method', 'rtn', '--overwrite']),
         lambda: save_torch({{'x': torch.zeros(100000)}}, r'{tmp_path}/state.pt'),
         lambda: write_text(r'{tmp_path}/report.html', 'x' * 10**6)]
print([run(call) for call in calls])
sys.exit(any(run(lambda: 2 if call is None else 0) for call in calls))
""")
    assert code == 0 and len(said) == 6, said
    assert all(line.startswith("error: ") and "(file too large)" in line for line in said), said
    layer = ".quantizing/layer-00000.safetensors"
    for line, name in zip(said, ("a", "b", f"c/{layer}", f"old/{layer}", "state.pt", "report.html")):
        assert f"{tmp_path}/{name} cannot be written" in line, line
        assert "left there" in line
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != old]


def test_outputs_to_devices_and_pipes(tmp_path, capsys):
    with pytest.raises(OSError, match=r"/dev/full cannot be written \(no space left on device\); .*; free some space"):
        files.write_text("/dev/full", "x" * 100)
    assert weights_tools.run(lambda: files.write_text("/dev/full", "x")) == 2
    assert re.fullmatch(r"error: /dev/full cannot be written \(no space .*\n", capsys.readouterr().err)
    files.write_text("/dev/null", "x")
    assert not Path("/dev/null").is_file()
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE) as reader:
        files.write_text(tmp_path / "pipe", "through")
        assert reader.stdout.read() == b"through"
    for path in (tmp_path, tmp_path / "none" / "x.json"):
        with pytest.raises(OSError, match=rf"{tmp_path}.* cannot be written \(.*\); .*; check the path"):
            files.write_text(path, "x")


@pytest.mark.parametrize("error, says", [
    (OSError(errno.ENOSPC, "No space left on device"), r"cannot be stored \(no space .*finished files .*free some"),
    (PermissionError(errno.EACCES, "Permission denied", "/hub/x"), r"stored in /hub/x \(permission denied\);"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), r"stored \(no space left on device\)"),
    (ConnectionError("no route"), "could not read .*check the network"),
    (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "could not read .*check the network")])
def test_the_disk_of_a_download(error, says):
    with pytest.raises(InputError, match=says), hub_errors("Org/name", None):
        raise error


def test_errors_that_nobody_put_into_words(capsys):
    def fail():
        raise PermissionError(errno.EACCES, "Permission denied", "/x/y")
    assert weights_tools.run(fail) == 2
    assert capsys.readouterr().err == ("error: /x/y cannot be read or written (permission denied); check the "
                                       "permissions\n")


def test_a_training_says_what_is_left(tmp_path, monkeypatch):
    loop = Loop(tmp_path, "a", save_every=1)
    model = torch.nn.Linear(2, 1)

    def run():
        return loop.run(1, "s", 3, batches=lambda first: range(first, 3), step=lambda n, b: (0.0, 1), watch=dict,
                        parts={"model": model}, optimisers=[])
    run()
    before = (tmp_path / "state.pt").read_bytes()
    monkeypatch.setattr(files, "_torch_save", lambda data, file: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(OSError, match=r"state.pt cannot be written \(no space .*before is left as it was; free some"):
        run()
    assert (tmp_path / "state.pt").read_bytes() == before and not list(tmp_path.glob(".*"))
    (tmp_path / "state.pt").write_bytes(before[:1000])
    with pytest.raises(InputError, match=r"state.pt is not a whole state of a training; delete it"):
        Loop(tmp_path, "a")


def test_only_the_dead_are_cleared_away(tmp_path):
    dead = tmp_path / ".incomplete-0a1b2c3d"
    dead.mkdir()
    (dead / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".incomplete-notes").mkdir()        # not one of ours
    code = ("import sys, pathlib\nfrom weights_tools import files\n"
            "with files.unfinished(pathlib.Path(sys.argv[1]), '') as new:\n"
            "    print(new, flush=True)\n    sys.stdin.read()")
    hold = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], cwd=ROOT, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    alive = Path(hold.stdout.readline().strip())
    assert alive.is_dir() and not dead.exists()
    files.write_text(tmp_path / "x", "x")
    assert alive.is_dir()
    hold.kill()
    hold.communicate()
    files.write_text(tmp_path / "x", "x")
    assert sorted(os.listdir(tmp_path)) == [".incomplete-notes", "x"]


def test_what_a_killed_run_moved_is_nobodys_but_what_came_after_is(tmp_path):
    tensors = {str(n): torch.full((50,), float(n)) for n in range(3)}
    with pytest.MonkeyPatch.context() as patch:
        moves = []
        real = os.replace
        patch.setattr(files.os, "replace", lambda a, b: moves.append(b) or (real(a, b) if len(moves) < 3 else 1 / 0))
        with pytest.raises(ZeroDivisionError):
            files.save_checkpoint(tensors, tmp_path, shard_bytes=200)
    assert len(files.weight_files(tmp_path)) == 2
    with pytest.raises(InputError, match="lacks the shard"):
        open_weights(tmp_path)
    kept = (tmp_path / "model-00003-of-00003.safetensors").read_bytes()
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(kept)      # somebody else's, as its time tells
    with pytest.raises(InputError, match="already holds weights"):
        files.check_free_of_weights(tmp_path, False)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    files.save_checkpoint(tensors, tmp_path, shard_bytes=200)
    assert len(open_weights(tmp_path)) == 3 and not list(tmp_path.glob(".*"))


def test_new_small_files_never_stand_beside_old_weights(made, tmp_path, monkeypatch):
    """Stopped after any number of moves and removals, the folder is the old one, the new one, or does not load."""
    new, old = made("awq"), {p.name: p.read_bytes() for p in made("plain-shards").iterdir()}
    whole = {p.name: p.read_bytes() for p in new.iterdir()}
    tensors = {name: stored.read() for name, stored in open_weights(new).items()}
    index = {item for item in old.items() if item[0].endswith(".index.json")}     # the names of shards say as much
    small = {name: content for name, content in whole.items() if not name.startswith("model")}
    for last in range(30):
        folder = Path(shutil.copytree(made("plain-shards"), tmp_path / str(last)))
        count = iter(range(last))

        def unless_stopped(real, count=count):
            def call(*args, **more):
                if next(count, None) is None:
                    raise KeyboardInterrupt
                return real(*args, **more)
            return call
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", unless_stopped(os.replace))
            patch.setattr(files.Path, "unlink", unless_stopped(Path.unlink))
            try:
                files.save_checkpoint(tensors, folder, overwrite=True, small=small)
                break
            except KeyboardInterrupt:
                pass
        try:
            assert Config.load(folder) and open_weights(folder)
        except InputError:
            continue
        found = {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}
        assert found.items() | index >= old.items() or found.items() >= whole.items(), last
    assert last > 10 and all((folder / name).read_bytes() == content for name, content in whole.items())


def test_equal_tensors_make_equal_files(tmp_path):
    tensors = {"b": torch.arange(3.0), "a": torch.arange(5).bool(), "c": torch.arange(2, dtype=torch.int64)}
    metadata = {key: key for key in "zyxwvutsrq"}
    paths = [files.save_safetensors(dict(order), tmp_path / f"{n}.safetensors", dict(about)) for n, (order, about) in
             enumerate(((tensors.items(), metadata.items()), (reversed(tensors.items()), reversed(metadata.items()))))]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    for bad, about in (({"__metadata__": torch.ones(1)}, {}), ({"x": torch.ones(1)}, {"n": 1})):
        with pytest.raises(InputError, match="__metadata__, and metadata are strings"):
            files.save_safetensors(bad, tmp_path / "bad.safetensors", about)
    assert len(os.listdir(tmp_path)) == 2
