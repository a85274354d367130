"""Altered model.safetensors."""
from fuzz import bytes, seeds


def cases(seed, n):
    """Alter any byte, half of the time in the header."""
    return bytes.cases(seed, n, [seeds.safetensors(), seeds.released()], 25_000)
