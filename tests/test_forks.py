"""A child that forked off after torch's threads were started says so, instead of waiting for them for ever."""
import os
import subprocess
import sys

import pytest

ASK = """
import os, sys, signal, warnings
import torch
import minivl

warnings.simplefilter("ignore")
torch.set_num_threads(2)
config = minivl.GenerationConfig(max_new_tokens=3)
pipe = minivl.pipeline(sys.argv[1])
session = pipe.chat("hello", gen_config=config)
big = torch.randn(300, 300) @ torch.randn(300, 300)     # the pool of threads is there
stream = pipe.stream("go on", config, pipe.session())
next(stream, None)
tasks = {
    "pipeline": lambda: pipe("hello", config), "session": lambda: pipe.chat("more", session, config),
    "stream": lambda: list(stream), "generate": lambda: minivl.generate(pipe.model, [[1, 2]], max_new_tokens=2),
    "model": lambda: pipe.model(torch.tensor([[1, 2]])), "load": lambda: minivl.load(sys.argv[1]),
    "tiles": lambda: pipe.model.visual_tokens(torch.zeros(1, 3, 56, 56)), "one thread": lambda: pipe("hello", config)}
for name, task in tasks.items():
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            torch.set_num_threads(1 if name == "one thread" else 2)
            task()
            print(name, "answered", flush=True)
        except minivl.InputError as error:
            print(name, "refused:", error, flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name, "hung")
print("parent", "answered" if pipe("hello", config).text is not None else "")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_children(made):
    done = subprocess.run([sys.executable, "-c", ASK, str(made("plain"))], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    *refused, one, parent = done.stdout.splitlines()
    assert len(refused) == 7 and one == "one thread answered" and parent == "parent answered", done.stdout
    for line in refused:
        assert " refused: process " in line and "with 2 threads, it would hang" in line and "'spawn'" in line, line
