"""Two processes, each with a part of nano, learn what one learns."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import stored
from PIL import Image

from weights_tools.mpo import curves, train

ROOT = Path(__file__).parents[2]
# Stopped after two steps, and run again; each with half of a layer, which is computed again on the way back.
TWICE = """
import sys
from functools import partial
from minivl import fast
from weights_tools.mpo import train
load = train.loaded
def loaded(*where):
    model = load(*where)
    weight = model.language_model.layers[0].mlp.up_proj.weight
    assert 2 * weight.to_local().numel() == weight.numel()
    return model
train.loaded, fast.LARGE = loaded, 0
whole, stop = train.train, train.distributed.stop
train.train, train.distributed.stop = partial(whole, stop_at=2), lambda: None
train.main(sys.argv[1:])
train.train = whole
train.distributed.start, train.distributed.stop = lambda device: device, stop
train.main(sys.argv[1:])
"""
OPTIONS = ["--steps", "3", "--batch", "4", "--lr", "1e-4", "--dtype", "float32"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path):
    """Five pairs, with a picture of one tile or of three, and without: (pairs, rows to keep).

    Chosen answers of one length: L_g is a mean over the tokens of what a process has at once.
    """
    rows = []
    for i, colour in enumerate(("red", "blue", "green", "black", "white")):
        Image.new("RGB", (224 if i == 3 else 112, 112), colour).save(tmp_path / f"{i}.png")
        rows.append({**({"image": f"{i}.png"} if i != 2 else {}), "question": "What is it?",
                     "chosen": f"It is {colour}.", "rejected": "The number of shapes is one." if i % 2 else "No."})
    keep = [{"image": "0.png", "question": "How many shapes are there?", "answer": "There are no shapes."},
            {"question": "Hello", "answer": "Hello! I can look at pictures of shapes."}]
    return write(tmp_path / "pairs.jsonl", rows), write(tmp_path / "keep.jsonl", keep)


def together(code, *argv):
    """Run some code in two processes, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_PORT": port,
           "MASTER_ADDR": "127.0.0.1"}
    running = [subprocess.Popen([sys.executable, "-c", code, *argv], stderr=subprocess.PIPE,
                                stdout=subprocess.PIPE, text=True, cwd=ROOT,
                                env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    try:
        return [(*one.communicate(timeout=100), one.returncode) for one in running]
    finally:
        for one in running:
            one.kill()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(data, tmp_path):
    pairs, keep = data
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    train.main(["nano", pairs, one, *OPTIONS, "--micro", "2", "--keep", keep])
    for out, err, code in reversed(together(TWICE, "nano", pairs, two, *OPTIONS, "--micro", "1", "--keep", keep)):
        assert code == 0, out + err
    lines = list(zip(curves.read_log(one), curves.read_log(two)))
    assert len(lines) == 3
    for alone, shared in lines:
        for name in ("loss", "preference", "quality", "generation", "chosen", "rejected", "margin", "delta", "kept"):
            assert shared[name] == pytest.approx(alone[name], abs=1e-5), name
    assert lines[-1][0]["margin"] > lines[0][0]["margin"] + 0.1
    weights, others, before = stored(one), stored(two), stored(ROOT / "minivl/nano/float16")
    # Adam divides a gradient by its own size: one that is near zero may take its step the other way.
    moved = sum(float((weights[name].float() - before[name].float()).abs().sum()) for name in weights)
    apart = sum(float((weights[name].float() - others[name].float()).abs().sum()) for name in weights)
    assert apart < 0.001 * moved, apart / moved
    assert sorted(path.name for path in Path(two).iterdir()) == sorted(path.name for path in Path(one).iterdir())
