"""Altered pytorch_model.bin."""
from fuzz import bytes, seeds


def cases(seed, n):
    """Alter any byte, half of the time in the pickle, which comes first."""
    return bytes.cases(seed, n, [seeds.bin()], 20_000)
