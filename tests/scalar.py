"""Every method's lookup once more: one id at a time, with Python's integers and floats, from the published formulas.

Nothing here is taken from the package but what a plan says about sizes; it is what tests compare with.
"""

from __future__ import annotations

import hashlib

MASK = 2**64 - 1


def mix64(x: int) -> int:
    """splitmix64's output for the state before ``x``."""
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def bucket(hashed: int, size: int) -> int:
    """The upper 62 bits as a fraction of ``size``; above 2**32 modulo."""
    upper = hashed >> 2
    return upper * size >> 62 if size < 2**32 else upper % size


def seed_of(hash_seed: int, *key: str | int) -> int:
    text = "\x1f".join(map(str, (hash_seed, *key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def sign_of(x: int, seed: int) -> float:
    return 1.0 if mix64((x ^ seed) & MASK) >> 62 & 1 else -1.0


def hash_address(x: int, hash_seed: int, table: str, lookup: int, size: int) -> int:
    return bucket(mix64((x ^ seed_of(hash_seed, table, "row", lookup)) & MASK), size)
