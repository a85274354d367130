"""Notice a process that forked off after torch had computed with several threads: its threads did not come along."""
from __future__ import annotations

import os

import torch

from minivl.limits import InputError

_computed_in = None         # the process that first computed here with several threads


def check_process() -> None:
    """Refuse to compute in a forked child, which would wait for ever for the threads of its parent.

    With one thread it may: nothing is shared out. Source: GCC bug 58378, the pool of libgomp does not survive a fork.
    """
    global _computed_in
    threads = torch.get_num_threads()
    if threads == 1:
        return
    _computed_in = _computed_in or os.getpid()
    if _computed_in != os.getpid():
        raise InputError(f"process {os.getpid()} was forked from {_computed_in} after torch had computed there with "
                         f"{threads} threads, it would hang; start it with multiprocessing.get_context('spawn'), or "
                         "call torch.set_num_threads(1) in it first")
