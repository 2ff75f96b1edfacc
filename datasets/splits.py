"""Which rows train, which validate, which test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SPLITS = ("train", "valid", "test")
DEFAULT_SHARES = (0.8, 0.1, 0.1)


def row_uniforms(rows: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) per row, by a seeded hash (splitmix64) of the row number alone."""
    with np.errstate(over="ignore"):
        z = rows.astype(np.uint64) + np.uint64(1)
        z = z * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % 2**64) * np.uint64(0xD1342543DE82EF95)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def check_shares(shares: Sequence[float]) -> tuple[float, float, float]:
    """Train, valid and test shares, each positive and adding up to 1."""
    if len(shares) != 3 or any(not share > 0 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(
            f"shares {tuple(shares)}: three positive numbers that add up to 1 are needed, e.g. 0.8,0.1,0.1"
        )
    return float(shares[0]), float(shares[1]), float(shares[2])


def random_split(rows: np.ndarray, seed: int, shares: Sequence[float] = DEFAULT_SHARES) -> np.ndarray:
    """Split code (index into SPLITS, int8) of each row number."""
    train, valid, _ = check_shares(shares)
    return np.digitize(row_uniforms(rows, seed), [train, train + valid]).astype(np.int8)


def time_split(times: np.ndarray, shares: Sequence[float] = DEFAULT_SHARES) -> np.ndarray:
    """The earliest rows train, the latest test; rows of one instant stay together."""
    train, valid, _ = check_shares(shares)
    if len(times) == 0:
        return np.zeros(0, np.int8)
    ordered = np.sort(times)
    cuts = [ordered[int(len(times) * train)], ordered[min(int(len(times) * (train + valid)), len(times) - 1)]]
    return np.digitize(times, cuts).astype(np.int8)


def leave_last_out(users: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The last row of each user tests, the one before validates, all others train, as do users with fewer than 3 rows.

    Rows of one user and instant are taken in the order in which they stand.
    """
    order = np.lexsort((times, users))
    ordered = users[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(order) else np.zeros(0, np.int64)
    counts = np.diff(np.r_[starts, len(order)])
    ends = starts[counts >= 3] + counts[counts >= 3]
    split = np.zeros(len(order), np.int8)
    split[order[ends - 1]] = 2
    split[order[ends - 2]] = 1
    return split
