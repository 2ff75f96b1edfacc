"""Complementary partitions: a few small tables whose rows, combined, give every id a code of its own."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import lcm, prod, sqrt
from operator import mul
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from embtables.config import TableConfig
from embtables.formats import RowFormat
from embtables.lookup.recipe import Combination, Digit, Recipe
from embtables.lookup.store import Store
from embtables.methods.base import Floor, Initializer, Method, TableEntry, chunk_widths, full_entry
from embtables.sizes.budget import allocate, collision_weights
from embtables.sizes.layout import FULL, Counts, Entry, Form, Group, Layout, Slab

Radices = Literal["quotient_remainder", "chinese_remainder"]
MAX_PARTITIONS = 8
# Spread of the factors that start near 1, so that ids which share the largest factor are not equal at the start.
_NOISE = 0.01


class Compositional(Method):
    """e(x) = W₀[x₀] ∘ … ∘ W_{k−1}[x_{k−1}], where the digits (x₀, …, x_{k−1}) are different for every id x.

    Args:
        num_partitions: k, from 2 to 8; by default the fewest that fit, table by table.
        operation: ``"mult"`` and ``"add"`` combine k rows of D, ``"concat"`` joins k rows of about D/k.
        radices: ``"quotient_remainder"`` takes the digits of x in the mixed radix (m, c, …, c), whose product reaches
            the number of ids: x mod m, and digits of the quotient. c, the number of ids that can share a row of the
            largest partition, is the smallest that fits, and m takes the rows that are left.
            ``"chinese_remainder"`` takes x modulo m, m − 1, …, m − k + 1, for the largest m that fits. These codes are
            unique, since the least common multiple of the radices reaches the number of ids. All partitions have the
            same rows but for one or a few, and in each of them every row belongs to as many ids as any other, or one
            fewer. By default the latter for ``"concat"``, where unequal partitions could not use the budget, and the
            former otherwise, where the most frequent ids gain from as many rows of their own as there can be.

    Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation Systems",
    KDD 2020.
    """

    kind: ClassVar[str] = "compositional"
    num_partitions: int | None = Field(default=None, ge=2, le=MAX_PARTITIONS)
    operation: Literal["mult", "add", "concat"] = "mult"
    radices: Radices | None = None

    # ---- sizes ---------------------------------------------------------------------------------------------------

    def floor(self, group: Group) -> Floor:
        num_bytes = sum(self._least_bytes(group, t) for t in group.tables)
        most = self.num_partitions or MAX_PARTITIONS
        partitions = f"{most} partitions" if self.num_partitions else f"at most {most} partitions"
        return Floor(num_bytes, f"the smallest tables whose combinations number every id, with {partitions}")

    def fit(self, group: Group, limit: int) -> Layout:
        # Sizes are counted in rows; in scalars for "concat", whose partitions differ in width.
        scalars = np.ones_like(group.dims) if self.operation == "concat" else group.dims
        unit, in_row = -(-group.format.row_bits(scalars) // 8), group.dims // scalars
        least = np.array([self._least_bytes(group, t) for t in group.tables], dtype=np.int64)
        full = group.rows_bytes(group.num_rows)

        def bytes_of(sizes: Counts) -> Counts:
            return np.clip(sizes * unit, least, full)

        sizes = allocate(collision_weights(group) * in_row, least // unit, -(-full // unit), bytes_of, limit)
        entries: dict[str, Entry] = {}
        slabs: list[Slab] = []
        for table, num_bytes in zip(group.tables, bytes_of(sizes)):
            radices = self._solve(group, table, int(num_bytes))
            if radices is None:
                entries[table.name], slab = full_entry(group, table)
                slabs.append(slab)
                continue
            entries[table.name] = Entry(f"{self.operation} of {len(radices)}", {"rows": list(radices)})
            widths = self.widths(table.embedding_dim, len(radices))
            slabs += [group.slab(f"{table.name}/{j}", m, width) for j, (m, width) in enumerate(zip(radices, widths))]
        return Layout.of(entries, Form(slabs=tuple(slabs)))

    def _is_chinese(self) -> bool:
        default: Radices = "chinese_remainder" if self.operation == "concat" else "quotient_remainder"
        return (self.radices or default) == "chinese_remainder"

    def widths(self, dim: int, k: int) -> tuple[int, ...]:
        """Scalars a row of each partition."""
        return tuple(chunk_widths(dim, k)) if self.operation == "concat" else (dim,) * k

    def _choices(self, table: TableConfig) -> list[tuple[int, ...]]:
        """The width of every partition, for each number of partitions that may be tried, the fewest first."""
        ks = [self.num_partitions] if self.num_partitions else range(2, MAX_PARTITIONS + 1)
        choices = (self.widths(table.embedding_dim, k) for k in ks)
        return [widths for widths in choices if min(widths) > 0]

    def _least_bytes(self, group: Group, table: TableConfig) -> int:
        full = group.table_bytes(table)
        assert table.rows is not None and full is not None
        least = least_consecutive_bytes if self._is_chinese() else least_bytes
        sizes = [least(table.rows, widths, group.format) for widths in self._choices(table)]
        return min([full, *sizes])

    def _solve(self, group: Group, table: TableConfig, num_bytes: int) -> tuple[int, ...] | None:
        """Rows of each partition within ``num_bytes``; ``None``: keep the table whole."""
        full = group.table_bytes(table)
        assert table.rows is not None and full is not None
        if num_bytes >= full:
            return None
        solve = largest_consecutive if self._is_chinese() else fewest_collisions
        found = (solve(table.rows, widths, num_bytes, group.format) for widths in self._choices(table))
        return next(radices for radices in found if radices is not None)

    # ---- the module ----------------------------------------------------------------------------------------------

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        combine: dict[str, Combination] = {"mult": "product", "add": "sum", "concat": "concat"}
        rows: list[int] = entry.entry.values["rows"]
        divisors = [1] * len(rows) if self._is_chinese() else list(accumulate([1, *rows[:-1]], mul))
        digits = (Digit(f"{entry.table.name}/{j}", divisor) for j, divisor in enumerate(divisors))
        return Recipe(combine[self.operation], tuple(digits))

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        for table in group.tables:
            entry = layout.entries[table.name]
            if entry.variant == FULL:
                init.uniform_(store.slab(table.name), table.name, init.std_of(table.name))
                continue
            rows: list[int] = entry.values["rows"]
            # With "mult" the largest partition carries the spread, the others start near 1: a product of k factors
            # with mean 0 would leave each factor with next to no gradient.
            scale = {
                "mult": (1 + _NOISE**2) ** (-(len(rows) - 1) / 2),
                "add": 1 / sqrt(len(rows)),
                "concat": 1.0,
            }[self.operation]
            for j in range(len(rows)):
                name = f"{table.name}/{j}"
                if self.operation == "mult" and j != rows.index(max(rows)):
                    init.uniform_(store.slab(name), name, _NOISE, mean=1.0)
                else:
                    init.uniform_(store.slab(name), name, init.std_of(table.name) * scale)


# ---- the arithmetic of sizes, in integers throughout -----------------------------------------------------------------


def largest_consecutive(n: int, widths: Sequence[int], limit: int, rows_in: RowFormat) -> tuple[int, ...] | None:
    """Rows m, m − 1, …, m − k + 1 of k partitions for n ids, with the largest m within ``limit`` bytes.

    ``None`` if there are none whose least common multiple reaches n.
    """
    k = len(widths)

    def num_bytes(m: int) -> int:
        return sum(rows_in.slab_bytes(m - j, width) for j, width in enumerate(widths))

    # The least that can do, and one beyond the largest that fits; no more rows than ids are of use.
    least = _least_consecutive(n, k)
    m = bisect_right(range(max(n, least) + 1), limit, lo=least, key=num_bytes) - 1
    while m >= least and lcm(*_consecutive(m, k)) < n:
        m -= 1
    return _consecutive(m, k) if m >= least else None


def least_consecutive_bytes(n: int, widths: Sequence[int], rows_in: RowFormat) -> int:
    """The least bytes of any consecutive partitions for n ids, exactly."""
    rows = _consecutive(_least_consecutive(n, len(widths)), len(widths))
    return sum(map(rows_in.slab_bytes, rows, widths))


@lru_cache(maxsize=4096)
def _least_consecutive(n: int, k: int) -> int:
    # Of rows below n^(1/k) even the product is less than n. A partition of one row is none.
    m = max(k + 1, int(n ** (1 / k)) - 1)
    while lcm(*_consecutive(m, k)) < n:
        m += 1
    return m


def _consecutive(m: int, k: int) -> tuple[int, ...]:
    return tuple(range(m, m - k, -1))


def fewest_collisions(n: int, widths: Sequence[int], limit: int, rows_in: RowFormat) -> tuple[int, ...] | None:
    """Rows (m, c, …, c) of each partition for n ids within ``limit`` bytes; ``None`` if none fits.

    c is the smallest for which they fit; then the largest partition grows into what is left.
    """
    # No slab has fewer bits a row than one of very many rows, but for the last digits.
    k, many = len(widths), 2**40
    first, *rest = (8 * rows_in.slab_bytes(many, width) / many * (1 - 1e-9) for width in widths)
    others = sum(rest)

    def possible(c: int) -> bool:
        # Necessary: the others have c rows each, so the largest has at least n / c^(k−1).
        return bool((8 * limit - others * c) * c ** (k - 1) >= first * n)

    # The left side rises up to its real peak and falls beyond, so what is possible is one interval of c.
    peak = max(2, int((k - 1) * 8 * limit / (others * k)))
    c = 2 + bisect_left(range(2, peak + 1), True, key=possible)
    while possible(c):
        small = [c] * (k - 1)
        largest = rows_in.rows_within(limit - sum(map(rows_in.slab_bytes, small, widths[1:])), widths[0])
        if largest >= -(-n // prod(small)):
            return (min(largest, n), *small)
        c += 1
    return None


@lru_cache(maxsize=4096)
def least_bytes(n: int, widths: tuple[int, ...], rows_in: RowFormat) -> int:
    """The least bytes of any partitions (m, c, …, c) for n ids, exactly."""
    # Any start will do; this one is next to the minimum of the real function.
    k = len(widths)
    c = max(2, round(((k - 1) * widths[0] * n / sum(widths[1:])) ** (1 / k)))
    rows: tuple[int, ...] | None = (-(-n // c ** (k - 1)), *[c] * (k - 1))
    while rows is not None:
        size = sum(map(rows_in.slab_bytes, rows, widths))
        rows = fewest_collisions(n, widths, size - 1, rows_in)
    return size
