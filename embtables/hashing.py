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
    """A signed 64-bit seed, made of ``hash_seed`` and of each part of ``key``, and of nothing else.

    ``key`` names what the seed is for, such as the table, the number of the lookup, and the purpose.
    """
    text = "\x1f".join(str(part) for part in (hash_seed, *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """Hashes int64 ``x``, of any shape, to int64, so that each input bit changes each output bit about half the time.

    It is the finalizer of splitmix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
    """
    x = x + _INCREMENT
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


def to_range(hashed: Tensor, size: Tensor) -> Tensor:
    """Maps int64 hashes, of any shape, to addresses from 0 to ``size`` − 1.

    ``size`` is an int64 tensor that broadcasts to them, with values from 1 to 2**61. Below 2**32 the result is
    ``floor(u * size / 2**62)`` for the hash's upper 62 bits ``u``, in two exact steps of 31 bits; above it is
    ``u mod size``, whose bias is below 2**-21 for every size up to 2**41.
    """
    high, low = _shift_right(hashed, 33), _shift_right(hashed, 2) & _LOW_31
    scaled = (high * size + ((low * size) >> 31)) >> 31
    return torch.where(size < _BIG, scaled, _shift_right(hashed, 2) % size)


def hash_ids(ids: Tensor, seed: Tensor, size: Tensor) -> Tensor:
    """The address of each id, an int64 from 0 to ``size`` − 1.

    ``ids`` are int64 and of any shape; ``seed`` and ``size`` are int64 tensors that broadcast to it.
    """
    return to_range(mix(ids ^ seed), size)


def turn_for(hash_seed: int, *key: str | int, lookup: int) -> int:
    """By how much of a circle a lookup turns each further block of ids (``balanced_ids``): a signed 64-bit fraction.

    It is that of a random seed, and a golden section of the circle more for each lookup. Two ids that meet in one
    lookup meet in the next one too if the multiples of the golden section that belong to their blocks coincide there,
    and no number's multiples stay apart for longer: of up to m²/6 ids with m rows no two meet in both lookups.
    """
    return _signed((seed_for(hash_seed, *key, "turn") + lookup * _INCREMENT) % 2**64)


def balanced_ids(
    ids: Tensor, start: Tensor, turn: Tensor, size: Tensor, in_turn: Tensor, scalars: Tensor | int = 1
) -> Tensor:
    """The row of each id, or the first of its ``scalars`` consecutive rows: an int64 from 0 to ``size`` − 1.

    Ids lie side by side around a circle of ``size`` rows, ``in_turn`` of them in one turn: ⌊size/scalars⌋. Id x, in
    place p of turn k, x = k·in_turn + p, has row (s(k) + p·scalars) mod size, where s(k) is the number of rows by which
    turn k is displaced: start + k·turn, a fraction of the circle in the upper 32 bits of an int64, times size. So every
    turn has each row once, but for fewer than ``scalars`` rows in which no id fits any more; ids of one turn never
    meet, and which ids of two turns meet is as random as ``turn``. From 2**31 rows on s(k) is (start + k·turn) mod
    size, without the lowest two bits.

    ``ids`` are int64 from 0 on and of any shape; the others are int64 tensors that broadcast to it.
    """
    number = torch.div(ids, in_turn, rounding_mode="floor")
    fraction = number * turn + start
    of_few, of_many = (_shift_right(fraction, 32) * size) >> 32, _shift_right(fraction, 2) % size
    row = (ids - number * in_turn) * scalars + torch.where(size < 2**31, of_few, of_many)
    return torch.where(row < size, row, row - size)


def hash_signs(ids: Tensor, seed: Tensor) -> Tensor:
    """A sign for each id, float32 1 or −1: one bit of a hash. Its seed must be another than that of the addresses."""
    return ((mix(ids ^ seed) >> 62 & 1) * 2 - 1).to(torch.float32)
