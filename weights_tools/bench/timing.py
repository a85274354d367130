"""How a step is timed, the same for every engine."""
from __future__ import annotations

import statistics
import time
from typing import Callable

CONTEXT = 64            # tokens that are there when decoding starts


def median_step(step, last, tokens: int) -> float:
    """Seconds of one of `tokens` steps, each given what the step before returned."""
    seconds = []
    for _ in range(tokens):
        start = time.perf_counter()
        last = step(last)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
