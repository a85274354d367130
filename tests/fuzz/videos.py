"""Altered videos and animations."""
import random

from fuzz import bytes, seeds


def cases(seed, n):
    """Alter any byte, half of the time near the header."""
    rng = random.Random(seed)
    files = seeds.videos()
    for k in range(n):
        suffix, data = rng.choice(files)
        for name, altered in bytes.cases(seed * n + k, 1, [data, rng.choice(files)[1]], 600):
            yield f"{name}.{suffix}", altered
