"""Kill a tool at its file operations, one after the other, and run it again: kills.py FOLDER TOOL:STEP ...

Each run is a fork of this process. It is ended before its k-th operation (open for writing, make, rename, remove), or
in the middle of its k-th write, for k = 1, 1 + STEP, ... What is left must not look whole, and the same call again must
end with the same files, byte by byte. Prints {TOOL: {"operations": n, "killed": n, "wrong": [[k, what], ...]}} as JSON.
"""
import builtins
import hashlib
import http.server
import io
import json
import os
import sys
import threading
from pathlib import Path

KILLED = 77
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Operations:
    """Counts what this process does to files below a folder, and ends it at number `last`, without a goodbye."""

    def __init__(self, folder, last=None):
        self.folder, self.last, self.count, self.lock = str(folder), last, 0, threading.Lock()
        self.open, owner = io.open, self

        class File(io.FileIO):
            def write(self, data):
                data = memoryview(data).cast("B")
                owner.one(lambda: super(File, self).write(data[:len(data) // 2]))
                return super().write(data)

        self.File = File
        io.open = builtins.open = self.opened
        sys.addaudithook(self.hook)

    def one(self, half=lambda: None):
        with self.lock:
            self.count += 1
            if self.count == self.last:
                half()
                os._exit(KILLED)

    def below(self, path, place=-1):
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        path = os.fsdecode(path)
        if place != -1 and not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/self/fd/{place}"), path)
        return os.path.abspath(path).startswith(self.folder)

    def hook(self, event, args):
        if event == "open":
            if args[2] & CHANGES and self.below(args[0]):
                self.one()
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"):
            place = next((a for a in args[1:] if isinstance(a, int) and event != "os.truncate"), -1)
            if event == "os.mkdir":
                place = args[2]
            if self.below(args[0], place):
                self.one()

    def opened(self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *more, **others):
        if not set(mode) & set("wax+") or not self.below(file):
            return self.open(file, mode, buffering, encoding, errors, newline, *more, **others)
        raw = self.File(file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)


def forked(work) -> tuple[int, str]:
    """Exit code and last words of a fork that does some work."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(receive)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(send, 2)
            said = work()
            os.write(send, str(said or "").encode())
            code = 0
        except BaseException as error:
            os.write(send, f"{type(error).__name__}: {error}".encode()[:900])
        finally:
            os._exit(code)
    os.close(send)
    with os.fdopen(receive, errors="replace") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def files_of(folder) -> dict:
    """Name -> sha256 of what a tool made; not the log, which tells of seconds, nor the hub client's own notes."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != "log.jsonl" and ".cache" not in p.relative_to(folder).parts}


# ---- the tools: each a function of (folder, number of the run) ------------------------------------------------------

def synthesize(scratch, form="safetensors"):
    from weights_tools.synthesize import synthesize
    return lambda folder, run: synthesize(folder, "tiny", awq=True, format=form, shard_gb=0.0003, seed=3)


def quantize(scratch):
    from weights_tools.quantize.__main__ import main
    from weights_tools.synthesize import synthesize
    source = synthesize(scratch / "float", "tiny", seed=3)
    (scratch / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 9)
    return lambda folder, run: main([str(source), str(folder), "--method", "awq", "--text", str(scratch / "text.txt")])


def download(scratch):
    from stand_in_hub import LocalHub

    from weights_tools.synthesize import synthesize
    source = synthesize(scratch / "repository", "tiny", awq=True, shard_gb=0.0003, seed=3)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (LocalHub,), {"folder": source}))
    if not os.fork():       # dies with its parent, whose end of the pipe it waits for
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.close(ALIVE[1])
        os.read(ALIVE[0], 1)
        os._exit(0)
    os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0", NO_PROXY="127.0.0.1",
                      HF_HOME=str(scratch / "home"), HF_HUB_DISABLE_XET="1")
    from weights_tools.download import download
    return lambda folder, run: download("Org/name", to=folder)


def training(scratch):
    """Two small stages; what was measured in the first run is measured otherwise in the second."""
    import torch

    from weights_tools.files import save_checkpoint
    from weights_tools.train.loop import Loop
    from weights_tools.train.step import take_step

    def train(folder, run):
        loop = Loop(folder, "recipe", save_every=2, watch_every=2)
        rate = loop.keep("rate", lambda: 0.1 / run)
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 1)
        for stage in (1, 2):
            made = folder / f"stage-{stage}"
            if not (made / "model.safetensors").exists():
                optimiser = torch.optim.AdamW(model.parameters(), lr=rate)

                def step(number, x, model=model, optimiser=optimiser):
                    return take_step([model(x).pow(2).mean()], [optimiser], 1.0), len(x)

                loop.run(stage, f"stage {stage}", 5, step=step, watch=dict, parts={"model": model},
                         optimisers=[optimiser], batches=lambda first: (
                             torch.randn(4, 6, generator=torch.Generator().manual_seed(n)) for n in range(first, 5)))
                save_checkpoint(model.state_dict(), made, overwrite=True, small={"config.json": b"{}"})
                loop.finish()
            from minivl.files.formats import open_weights
            model.load_state_dict({name: tensor.read() for name, tensor in open_weights(made).items()})
        loop.finish()
    return train


def nano(scratch):
    from weights_tools.nano import recipe, train
    recipe.tokenizer_files()        # once for all forks
    stages = (recipe.Stage("one", 2, 4e-3, {"shapes": 1}, wide=0.0, batch=2, warmup=1),
              recipe.Stage("two", 2, 4e-3, {"texts": 1}, wide=0.0, batch=2, warmup=1))

    def run_it(folder, run):
        train.half_is_faster = lambda device: run == 1
        train.train(folder, stages, save_every=1, watch_every=1, watch_n=4)
    return run_it


TOOLS = {"synthesize": synthesize, "synthesize-bin": lambda scratch: synthesize(scratch, "bin"), "quantize": quantize,
         "download": download, "training": training, "nano": nano}
STAGED = ("training", "nano")


def looks_whole(folder) -> bool:
    from minivl.config import Config
    from minivl.files.formats import open_weights
    from minivl.limits import InputError
    try:
        return bool(Config.load(folder) and open_weights(folder))
    except InputError:
        return False


def tried(tool, scratch, step) -> dict:
    """Kill one tool at every `step`-th of its operations."""
    scratch.mkdir()
    work = TOOLS[tool](scratch)
    whole = {}
    counted = []
    for run in (1, 2) if tool in STAGED else (1,):

        def all_of_it(run=run):
            operations = Operations(scratch / f"whole-{run}")
            work(scratch / f"whole-{run}", run)
            return f"\n{operations.count}"
        code, said = forked(all_of_it)
        assert code == 0, said
        counted.append(int(said.split("\n")[-1]))
        whole[run] = files_of(scratch / f"whole-{run}")
    assert len(whole) == 1 or whole[1] != whole[2]
    wrong = []
    killed = 0
    for k in range(1, counted[0] + 1, step):
        folder = scratch / f"killed-{k}"

        def until(k=k, folder=folder):
            Operations(folder, k)
            work(folder, 1)
        code, said = forked(until)
        killed += code == KILLED
        if code not in (0, KILLED):
            wrong.append([k, f"ended with {code}: {said[-300:]}"])
        for made in [folder] if tool not in STAGED else sorted(folder.glob("stage-*")):
            said = forked(lambda made=made: looks_whole(made))[1] if tool != "training" else str(
                (made / "model.safetensors").exists())
            there = {n: d for n, d in files_of(made).items() if not n.startswith(".incomplete-")}
            wanted = files_of(scratch / "whole-1" / made.relative_to(folder))
            if said.endswith("True") and any(there.get(name) != digest for name, digest in wanted.items()):
                wrong.append([k, f"{made.name} looks whole but is not"])
        chosen = 1 if (folder / "choices.json").exists() else 2
        code, said = forked(lambda folder=folder: work(folder, 2))
        if code:
            wrong.append([k, f"again: {code}: {said[-300:]}"])
        elif files_of(folder) != whole[chosen if tool in STAGED else 1]:
            wrong.append([k, "other files"])
        elif list(folder.rglob(".incomplete-*")) or (folder / "state.pt").exists():
            wrong.append([k, "something is left"])
    return {"operations": counted[0], "killed": killed, "wrong": wrong}


def main(folder, *asked):
    import torch
    torch.set_num_threads(1)        # a fork with more would hang
    pairs = [pair.split(":") for pair in asked]
    print(json.dumps({tool: tried(tool, Path(folder).resolve() / tool, int(step)) for tool, step in pairs}))


if __name__ == "__main__":
    ALIVE = os.pipe()
    main(*sys.argv[1:])
