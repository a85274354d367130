"""How many threads torch shares an operation out to: one for small work, and for large work what is faster just now.

The threads of an operation wait for the last of them, and they wait spinning. If another program takes the processor of
one, the others spin until it is back: some milliseconds, at each of a token's thousand operations. Beside one busy
program nano on two threads of two cores ran at a quarter of its speed, beside four at a tenth or less; one thread is as
fast alone, and loses no more than its share of the processor (weights_tools/bench/README.md).

    with at_most(1): ...            what torch computes inside is done by this thread alone
    pace(model)                     one thread or more, for the prompts and the tokens of a model

`torch.set_num_threads` would also decide for threads that begin to use torch meanwhile. So `at_most` asks the OpenMP
library that torch works with, whose setting belongs to the thread that calls it; where that cannot be found (Windows),
nothing is changed.
"""
from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import nn

from minivl.fast.replace import is_large

SLOWER = 1.3            # a step that takes so many times as long as the latest ones took: something else wants to run
WAIT = 16               # steps with fewer threads before more are tried; twice as many each time that it was no use,
MOST = 256              # up to so many; and steps with all threads before fewer are tried


@lru_cache
def openmp() -> ctypes.CDLL | None:
    """Find the OpenMP library that torch is linked with, as a symbol of torch's own: no second one is loaded."""
    try:
        library = ctypes.CDLL(torch._C.__file__)
        return library if hasattr(library, "omp_set_num_threads") else None
    except OSError:
        return None


@contextmanager
def at_most(n: int) -> Iterator[None]:
    """Let torch use at most n threads for what this thread asks of it inside. Other threads keep their number."""
    before = torch.get_num_threads()        # asked first: torch sets a thread up at its first question
    library = openmp()
    if n >= before or library is None:
        yield
        return
    mkl = getattr(library, "MKL_Set_Num_Threads_Local", None)       # which has a number of its own, 0: as OpenMP
    library.omp_set_num_threads(n)
    own = mkl(n) if mkl else None
    try:
        yield
    finally:
        library.omp_set_num_threads(before)
        if mkl:
            mkl(own)


class Pace:
    """Choose the threads of steps that cost about the same: all, half of them, ... or one, whichever is faster.

    All are tried soon after the start, when steps become slow, and from time to time: rarely while all are in use, more
    often while fewer are.
    most: threads for all but steps. measured: whether steps may take fewer.
    """

    def __init__(self, most: int, measured: bool):
        self.most = most
        self.choices = [most]       # from most to 1
        while measured and self.choices[-1] > 1:
            self.choices.append(self.choices[-1] // 2)
        self.chosen = self.now = most       # by the last trial, and for the next step
        self.left = 2               # steps until the next trial; soon at first, when nothing is known
        self.wait = WAIT
        self.shape = None           # of the latest step
        self.latest = []            # seconds of the latest steps, at most eight
        self.tried = {}             # during a trial: threads -> seconds of one or two steps
        self.lock = threading.Lock()

    @contextmanager
    def step(self, shape: tuple) -> Iterator[None]:
        """Compute one of many like steps inside, e.g. the next token of some prompts. shape: of its input."""
        threads = self.now
        start = time.perf_counter()
        with at_most(threads):
            yield
        if len(self.choices) > 1:
            with self.lock:         # two threads may use one model
                self.took(time.perf_counter() - start, threads, shape)

    def took(self, seconds: float, threads: int, shape: tuple) -> None:
        """Learn from a step: the seconds it took with so many threads. It may begin or end a trial."""
        if shape != self.shape:     # another number of prompts, or of guessed tokens: not to be compared
            self.shape, self.latest, self.tried, self.now = shape, [], {}, self.chosen
        elif threads != self.now:   # another thread's step changed it meanwhile
            return
        elif self.tried:
            self.tried.setdefault(threads, []).append(seconds)
            self.go_on()
        else:
            self.left -= 1
            usual = min(self.latest, default=seconds)
            self.latest = [*self.latest[-7:], seconds]
            slow = threads > 1 and min(self.latest[-2:]) > SLOWER * usual
            if len(self.latest) > 1 and (slow or self.left <= 0):
                self.tried = {threads: self.latest[-2:]}
                self.go_on()

    def go_on(self) -> None:
        """Go on with a trial: two steps of each choice, but one of a hopeless choice; then take the fastest."""
        mean = {n: sum(times) / len(times) for n, times in self.tried.items()}
        fastest = min(mean, key=mean.get)
        for n in self.choices:
            if n not in mean or len(self.tried[n]) == 1 and mean[n] < 2 * mean[fastest]:
                self.now = n
                return
        if mean[fastest] < 0.95 * mean[self.chosen]:
            self.chosen, self.wait = fastest, WAIT
        else:
            self.wait = min(2 * self.wait, MOST)
        self.left = self.wait if self.chosen < self.most else MOST
        self.now, self.latest, self.tried = self.chosen, self.tried[self.chosen], {}


_paces = WeakKeyDictionary()      # model -> ((threads, device) it was made for, Pace)


def pace(model: nn.Module) -> Pace:
    """Get what chooses the threads of a model: one for a small model on the CPU; a large one's steps are measured."""
    threads, device = asked = torch.get_num_threads(), model.device.type
    made_for, known = _paces.get(model, (None, None))
    if made_for != asked:       # new, moved, or the reader has changed the number of threads
        small = device == "cpu" and not is_large(model)
        known = Pace(1 if small else threads, measured=device == "cpu")
        _paces[model] = asked, known
    return known


def threads_that_help(work, repeats: int = 3) -> int:
    """Run some work alternately with one thread and with all -> how many to use: all if they are faster as things are.

    Sums, not the best of each: a moment without other programs must not decide for hours with them.
    """
    most = torch.get_num_threads()
    seconds = {1: 0.0, most: 0.0}
    for i in range(repeats + 1):
        for n in seconds:
            start = time.perf_counter()
            with at_most(n):
                work()
            if i:                   # the first of each warms up
                seconds[n] += time.perf_counter() - start
    return min(seconds, key=seconds.get)
