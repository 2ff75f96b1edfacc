"""Seeded 64-bit hashes: the same address in every process, on every device, in every version.

Everything is int64 arithmetic that wraps, which torch defines alike on all devices: logical shifts are written as an
arithmetic shift and a mask, and a hash is mapped to ``[0, size)`` by the high part of a product (Lemire 2019), never by
``%`` of sequential ids and never through floating point.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


# The constants of splitmix64 (Steele, Lea & Flood 2014; mixer by D. Stafford).
_INCREMENT = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))
_LOW_31 = 2**31 - 1
_BIG = 2**32


def seed_for(hash_seed: int, *key: str | int) -> int:
    """A signed 64-bit seed that depends on every part of ``key`` (table name, lookup, purpose) and on nothing else."""
    text = "\x1f".join(str(part) for part in (hash_seed, *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """splitmix64 of int64 ``x`` (any shape): every input bit changes every output bit with probability about 1/2."""
    x = x + _INCREMENT
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


def to_range(hashed: Tensor, size: Tensor) -> Tensor:
    """Maps 64-bit hashes to ``[0, size)``; ``size`` is an int64 tensor that broadcasts, each 1 … 2**61.

    Below 2**32 the result is ``floor(u * size / 2**62)`` for the hash's upper 62 bits ``u``, in two exact steps of 31
    bits; above, ``u mod size``, whose bias is below 2**-21 for every size up to 2**41.
    """
    high, low = _shift_right(hashed, 33), _shift_right(hashed, 2) & _LOW_31
    scaled = (high * size + ((low * size) >> 31)) >> 31
    return torch.where(size < _BIG, scaled, _shift_right(hashed, 2) % size)


def hash_ids(ids: Tensor, seed: Tensor, size: Tensor) -> Tensor:
    """The address of each id: int64 ``ids`` of any shape, ``seed`` and ``size`` that broadcast."""
    return to_range(mix(ids ^ seed), size)


def hash_signs(ids: Tensor, seed: Tensor) -> Tensor:
    """±1 (float32) for each id, from one bit of a hash with a seed of its own."""
    return ((mix(ids ^ seed) >> 62 & 1) * 2 - 1).to(torch.float32)
