"""A few hundred altered files of every kind end as they should, and the harness tells when one does not."""
import resource
import sys
import time

import pytest

from fuzz import __main__ as runner
from fuzz import bytes, seeds, targets, worker
from minivl import InputError

pytestmark = pytest.mark.filterwarnings("ignore")       # Pillow's, about formats that are going to go
FEW = {"safetensors": 300, "bin": 200, "json": 150, "sentencepiece": 100, "pictures": 300, "videos": 100}


@pytest.fixture
def modules(monkeypatch):
    """The folder above this one, for the workers."""
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))


@pytest.mark.slow
def test_altered_files_are_refused_or_loaded_whole(modules):
    results = runner.run(FEW, seed=1, workers=1)
    assert not [(kind, name, outcome, text[-300:]) for _, kind, name, outcome, text in results.failures]
    assert {kind: sum(counts.values()) for kind, counts in results.counts.items()} == FEW
    assert all(counts["InputError"] for counts in results.counts.values())
    assert all(results.counts[kind]["loaded whole"] for kind in ("safetensors", "json", "sentencepiece", "pictures"))


@pytest.mark.parametrize("kind", runner.ALL)
def test_the_seed_files_themselves_load(kind, tmp_path):
    files = {"safetensors": [("x", seeds.safetensors()), ("x", seeds.released())], "bin": [("bytes", seeds.bin())],
             "json": list(seeds.json_files().items()),
             "sentencepiece": [("x", data) for data in seeds.sentencepiece()],
             "pictures": [("x", data) for data in seeds.pictures()],
             "videos": [(f"x.{suffix}", data) for suffix, data in seeds.videos()]}[kind]
    folder = tmp_path / "case"
    folder.mkdir()
    for name, data in files:
        getattr(targets, kind)(name, data, folder)


@pytest.mark.parametrize("kind", runner.ALL)
def test_cases_depend_on_the_seed_alone(kind):
    def some(seed):
        return [(name, data) for _, _, name, data in worker.cases({kind: 20}, seed)]
    assert some(3) == some(3) != some(4)
    assert len(some(3)) == 20 and all(isinstance(name, str) for name, _ in some(3))


def test_bytes_alter():
    files = [b"hello " * 100, b"0123456789" * 50]
    assert sum(data not in files for _, data in bytes.cases(0, 200, files)) > 180
    list(bytes.cases(0, 200, [b"x"]))        # cut to nothing and altered again: still no error


def wrong_answers(data):
    """Do what no reader should: the outcome that must be counted."""
    if data == b"exception":
        raise OSError(28, "No space left on device")
    if data == b"base":
        raise BaseException("a panic")
    if data == b"input":
        raise InputError("no")
    if data == b"long":
        raise InputError("no" * 5000)
    if data == b"wrong":
        raise targets.Wrong("other values")
    if data == b"memory":
        bytearray(b"x") * 1_200_000_000
    if data == b"slow":
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass


def test_every_outcome_is_told(monkeypatch, tmp_path):
    """In this process: exceptions, memory, time."""
    monkeypatch.setattr(targets, "pictures", lambda name, data, folder: wrong_answers(data))
    monkeypatch.setattr(worker, "CPU_SECONDS", 0.2)
    before = resource.getrlimit(resource.RLIMIT_CPU)
    try:
        for data, outcome in ((b"fine", "loaded whole"), (b"input", "InputError"), (b"exception", "other"),
                              (b"base", "other"), (b"long", "other"), (b"wrong", "other"), (b"slow", "hang"),
                              (b"memory", "over 1 GB")):
            assert worker.measured("pictures", "x", data, tmp_path, worker.peak_memory())[0] == outcome, data
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, before)


PLANTED = """
import ctypes, json, sys, time, types
sys.modules["minivl"] = types.SimpleNamespace(InputError=ValueError)        # and no torch: it starts at once
sys.modules["fuzz.planted"] = sys.modules["fuzz.targets"] = here = types.ModuleType("fuzz.targets")
here.cases = lambda seed, n: ((f"case {k}", b"%d" % k) for k in range(n))
def planted(name, data, folder):
    if data == b"3":
        ctypes.string_at(0)
    while data == b"5":
        pass
    if data == b"6":
        time.sleep(99)
    if data == b"8":
        raise SystemExit(0)
here.planted = planted
import fuzz
fuzz.targets = here
from fuzz import worker
worker.KILL_SECONDS = 1
worker.main(**json.loads(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_crash_a_hang_and_silence_cost_one_case_each(modules, monkeypatch):
    """In workers: a segmentation fault, an endless loop, a wait for ever, an exit."""
    monkeypatch.setattr(runner, "START", ["-c", PLANTED])
    monkeypatch.setattr(runner, "SILENCE", 4)
    results = runner.run({"planted": 10}, workers=1)
    assert results.counts["planted"] == {"loaded whole": 6, "crash": 2, "hang": 2}
    assert [(place, outcome) for place, *_, outcome, _ in results.failures] == [
        (3, "crash"), (5, "hang"), (6, "hang"), (8, "crash")]
    assert "Segmentation fault" in results.failures[0][-1]
