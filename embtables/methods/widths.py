"""How many columns each table of a group has where they are to be as many in all of them as fit."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from embtables.formats import FP32
from embtables.sizes.layout import Counts, Group


class WidthPath(NamedTuple):
    """Which table has a column more with each step, and the least bytes after so many steps or more."""

    num_tables: int
    widened: Counts
    least: list[int]

    def widths(self, limit: int) -> list[int]:
        """The columns of the tables after the most steps that fit."""
        number = bisect_right(self.least, limit) - 1
        widths: list[int] = (1 + np.bincount(self.widened[:number], minlength=self.num_tables)).tolist()
        return widths


def width_path(group: Group, *, projected: bool = False) -> WidthPath:
    """From one column per table to all columns of all tables, one column more with each step.

    Args:
        group: the tables.
        projected: whether tables of fewer columns than their own share a projection for each pair of the two.
    """
    return group.once(f"width path, {projected=}", lambda: _walk(group, projected=projected))


def _walk(group: Group, *, projected: bool) -> WidthPath:
    dims, order = [table.embedding_dim for table in group.tables], _by_worth(group)
    used: dict[tuple[int, int], int] = {}

    def projection_bytes(width: int, dim: int, more: int) -> int:
        """What a table that begins (1) or ends (−1) to have so many of its columns changes."""
        if not projected or width == dim:
            return 0
        before = used.get((width, dim), 0)
        used[width, dim] = before + more
        return more * FP32.slab_bytes(width, dim) if 0 in (before, before + more) else 0

    rows = group.num_rows.tolist()
    size = group.format.slab_bytes
    widened = [t for width in range(1, max(dims)) for t in order if dims[t] > width]
    widths = [1] * len(dims)
    num_bytes = [sum(size(n, 1) for n in rows) + sum(projection_bytes(1, dim, 1) for dim in dims)]
    for t in widened:
        width, dim = widths[t], dims[t]
        more = size(rows[t], width + 1) - size(rows[t], width)
        more += projection_bytes(width + 1, dim, 1) + projection_bytes(width, dim, -1)
        num_bytes.append(num_bytes[-1] + more)
        widths[t] += 1
    # A step may cost less than the one before, where a projection is no longer needed.
    least = list(accumulate(reversed(num_bytes), min))[::-1]
    return WidthPath(len(dims), np.array(widened, dtype=np.int64), least)


def _by_worth(group: Group) -> list[int]:
    """The numbers of the tables, that with most lookups per row first; without all counts that with fewest rows."""
    rows = group.num_rows.tolist()
    lookups = [int(counts.sum()) for counts in group.counts if counts is not None]
    worth = [n / m for n, m in zip(lookups, rows)] if len(lookups) == len(rows) else [1 / m for m in rows]
    return sorted(range(len(rows)), key=lambda t: -worth[t])
