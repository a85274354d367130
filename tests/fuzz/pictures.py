"""Altered pictures."""
from fuzz import bytes, seeds


def cases(seed, n):
    """Alter any byte, half of the time near the header."""
    return bytes.cases(seed, n, seeds.pictures())
