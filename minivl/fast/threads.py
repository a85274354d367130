"""How many threads torch shares an operation out to: one for small work, and for large work what is faster just now.

The threads of an operation wait for the last of them, and they wait spinning. If another program takes the processor of
one, the others spin until it is back: some milliseconds, at each of a token's thousand operations. Beside one busy
program nano on two threads of two cores ran at a quarter of its speed, beside four at a tenth or less; one thread is as
fast alone, and loses no more than its share of the processor (weights_tools/bench/README.md).

    with at_most(1): ...                            what torch computes inside is done by this thread alone
    with pace(model, "tokens").step(x.shape): ...   one thread or more, as is faster for a token
    with pace(model, "prompt").each(layers): ...    the same for each layer while a long prompt goes through them

`torch.set_num_threads` would also decide for threads that begin to use torch meanwhile. So `at_most` asks the OpenMP
library that torch works with, whose setting belongs to the thread that calls it; where that cannot be found (Windows),
nothing is changed.
"""
from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import nn

from minivl.fast.replace import is_large

SLOWER = 1.3            # two steps that take so many times as long as the latest ones took: something else wants to run
MUCH_SLOWER = 3         # the same, of one step
HOPELESS = 1.5          # a number of threads with which a step takes so many times as long is not tried twice
LOSS = 0.01             # the part of the time that trials of fewer threads than all may cost
LOSS_BESIDE = 0.1       # the same for trials of more threads, while fewer are in use
MOST = 256              # steps after which the next trial comes, whatever the last one cost


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

    Fewer are tried after the first two steps, when steps become slow, and from time to time; more, from time to time.
    most: the threads there are. measured: whether fewer may be taken. clock: gives the time, in seconds.
    """

    def __init__(self, most: int, measured: bool, clock: Callable[[], float] = time.perf_counter):
        self.most = most
        self.choices = [most]       # from most to 1
        while measured and self.choices[-1] > 1:
            self.choices.append(self.choices[-1] // 2)
        self.chosen = self.now = most       # by the last trial, and for the next step
        self.clock = clock
        self.next = clock()         # when the next trial may come; soon at first, when nothing is known
        self.shape = None           # of the latest step
        self.latest = []            # seconds of the latest steps, at most eight
        self.tried = {}             # during a trial: threads -> seconds of one or two steps
        self.lock = threading.Lock()

    @contextmanager
    def step(self, shape: tuple) -> Iterator[None]:
        """Compute one of many like steps inside, e.g. the next token of some prompts. shape: of its input."""
        threads = self.now
        start = self.clock()
        with at_most(threads):
            yield
        if len(self.choices) > 1:
            with self.lock:         # two threads may use one model
                self.took(self.clock() - start, threads, shape)

    @contextmanager
    def each(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Take the call of each of some like modules inside as a step, e.g. of a model's layers, one after the other.

        Only the calls of the thread that asks: another one, which uses the model too, has steps of its own.
        """
        asks = threading.get_ident()
        modules = list(modules)
        running = ExitStack()

        def begin(module, inputs):
            if threading.get_ident() == asks:
                running.enter_context(self.step(inputs[0].shape))

        def end(module, inputs, output):
            if threading.get_ident() == asks:
                running.close()
                if module is modules[-1]:       # what follows, such as the head, by what was learned
                    running.enter_context(at_most(self.chosen))

        hooks = []
        try:
            with at_most(self.most), running:
                if len(self.choices) > 1:
                    hooks = [hook for module in modules for hook in
                             (module.register_forward_pre_hook(begin), module.register_forward_hook(end))]
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def took(self, seconds: float, threads: int, shape: tuple) -> None:
        """Learn from a step: the seconds it took with so many threads. It may begin or end a trial."""
        if shape != self.shape:     # another number of prompts, or of guessed tokens: not to be compared
            self.shape, self.latest, self.tried, self.now = shape, [], {}, self.chosen
        if threads != self.now:     # another thread's step changed it meanwhile
            return
        if self.tried:
            self.tried.setdefault(threads, []).append(seconds)
            self.go_on()
            return
        usual = min(self.latest, default=seconds)
        self.latest = [*self.latest[-7:], seconds]
        slow = threads > 1 and (seconds > MUCH_SLOWER * usual or min(self.latest[-2:]) > SLOWER * usual)
        if len(self.latest) > 1 and (slow or self.clock() >= self.next):
            self.tried = {threads: self.latest[-2:]}
            self.go_on()

    def go_on(self) -> None:
        """Go on with a trial, one or two steps of each choice down to a hopeless one; then take the fastest.

        The slower of two steps counts: beside other programs many threads are fast as a rule, and now and then wait
        for ten times as long.
        """
        worst = {n: max(times) for n, times in self.tried.items()}
        fastest = min(worst, key=worst.get)
        for n in self.choices:
            if n not in worst or len(self.tried[n]) == 1 and worst[n] < HOPELESS * worst[fastest]:
                self.now = n
                return
            if n < fastest and worst[n] >= HOPELESS * worst[fastest]:
                break               # still fewer would be still slower
        if worst[fastest] < 0.95 * worst[self.chosen]:
            self.chosen = fastest
        step = worst[self.chosen]
        lost = sum(max(0, seconds - step) for times in self.tried.values() for seconds in times)
        self.next = self.clock() + min(lost / (LOSS if self.chosen == self.most else LOSS_BESIDE), MOST * step)
        self.now, self.latest, self.tried = self.chosen, self.tried[self.chosen], {}


_paces = WeakKeyDictionary()      # model -> {what: ((threads, device) it was made for, Pace)}


def pace(model: nn.Module, what: str) -> Pace:
    """Get what chooses a model's threads for "tiles", "prompt" or "tokens": one if it is small, else by measuring.

    Each has its own: tokens wait for memory, and gain less from many threads than prompts. On a GPU all are taken.
    """
    threads, device = asked = torch.get_num_threads(), model.device.type
    paces = _paces.setdefault(model, {})
    made_for, known = paces.get(what, (None, None))
    if made_for != asked:       # new, moved, or the reader has changed the number of threads
        small = device == "cpu" and not is_large(model)
        known = Pace(1 if small else threads, measured=device == "cpu")
        paces[what] = asked, known
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
