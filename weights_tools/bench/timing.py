"""How a step is timed, the same for every engine."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable

CONTEXT = 64            # tokens that are there when decoding starts


def median_step(step: Callable, last, tokens: int) -> float:
    """Time `tokens` steps, each given what the step before returned: seconds of the median step."""
    seconds = []
    for _ in range(tokens):
        start = time.perf_counter()
        last = step(last)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
