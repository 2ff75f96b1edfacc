"""Complementary partitions: a few small tables whose rows, combined, give every id a code of its own."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import gcd, prod, sqrt
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
# The greedy coprime moduli from c on stay below c + this, for every c that a table of up to 2**40 rows can need.
_COPRIME_SPREAD = {1: 0, 2: 1}
_MOST_COPRIME_SPREAD = 48


class Compositional(Method):
    """e(x) = W₀[x₀] ∘ … ∘ W_{k−1}[x_{k−1}], where the digits (x₀, …, x_{k−1}) are different for every id x.

    ``operation``: ``"mult"`` and ``"add"`` combine k rows of D, ``"concat"`` joins k rows of about D/k.
    ``radices``: ``"quotient_remainder"`` takes the digits of x in the mixed radix (m, c, …, c): x₀ = x mod m, and the
    others are digits of the quotient; ``"chinese_remainder"`` takes x modulo pairwise coprime numbers. Either code is
    unique since the product of the radices reaches the number of ids.
    ``num_partitions``: k, from 2 to 8; by default the fewest that fit, table by table. Per table c, the number of ids
    that can share a row of the largest partition, is the smallest that fits, and m takes the rows that are left.

    Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation Systems",
    KDD 2020.
    """

    kind: ClassVar[str] = "compositional"
    num_partitions: int | None = Field(default=None, ge=2, le=MAX_PARTITIONS)
    operation: Literal["mult", "add", "concat"] = "mult"
    radices: Radices = "quotient_remainder"

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
        sizes = [least_bytes(table.rows, widths, self.radices, group.format) for widths in self._choices(table)]
        return min([full, *sizes])

    def _solve(self, group: Group, table: TableConfig, num_bytes: int) -> tuple[int, ...] | None:
        """Rows of each partition within ``num_bytes``; ``None``: keep the table whole."""
        full = group.table_bytes(table)
        assert table.rows is not None and full is not None
        if num_bytes >= full:
            return None
        found = (
            fewest_collisions(table.rows, widths, self.radices, num_bytes, group.format)
            for widths in self._choices(table)
        )
        return next(radices for radices in found if radices is not None)

    # ---- the module ----------------------------------------------------------------------------------------------

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        combine: dict[str, Combination] = {"mult": "product", "add": "sum", "concat": "concat"}
        rows: list[int] = entry.entry.values["rows"]
        by_quotient = self.radices == "quotient_remainder"
        divisors = list(accumulate([1, *rows[:-1]], mul)) if by_quotient else [1] * len(rows)
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


def fewest_collisions(
    n: int, widths: Sequence[int], radices: Radices, limit: int, rows_in: RowFormat
) -> tuple[int, ...] | None:
    """Rows of each partition for n ids within ``limit`` bytes, the largest first; ``None`` if none fits.

    c is the smallest for which they fit; then the largest partition grows into what is left.
    """
    # In bits, as far as they go: what rows share comes on top.
    k, first, *rest = len(widths), *(rows_in.row_bits(width) for width in widths)
    others = sum(rest)
    spread = 0 if radices == "quotient_remainder" else _COPRIME_SPREAD.get(k - 1, _MOST_COPRIME_SPREAD)

    def possible(c: int) -> bool:
        # Necessary: the others have c … c + spread rows each, so the largest has at least n / (c + spread)^(k−1).
        return bool((8 * limit - others * c) * (c + spread) ** (k - 1) >= first * n)

    # The left side rises up to its real peak and falls beyond, so what is possible is one interval of c.
    peak = max(2, ((k - 1) * 8 * limit - others * spread) // (others * k))
    c = 2 + bisect_left(range(2, peak + 1), True, key=possible)
    while possible(c):
        small = _small_radices(c, k - 1, radices)
        largest = rows_in.rows_within(limit - sum(map(rows_in.slab_bytes, small, widths[1:])), widths[0])
        if largest >= _least_radix(n, small, radices):
            largest = min(largest, n)
            while radices == "chinese_remainder" and gcd(largest, prod(small)) > 1:
                largest -= 1
            return (largest, *small)
        c += 1
    return None


@lru_cache(maxsize=4096)
def least_bytes(n: int, widths: tuple[int, ...], radices: Radices, rows_in: RowFormat) -> int:
    """The least bytes of any partitions for n ids, exactly."""
    # Any start will do; this one is next to the minimum of the real function.
    k = len(widths)
    start = max(2, round(((k - 1) * widths[0] * n / sum(widths[1:])) ** (1 / k)))
    small = _small_radices(start, k - 1, radices)
    rows: tuple[int, ...] | None = (_least_radix(n, small, radices), *small)
    while rows is not None:
        size = sum(map(rows_in.slab_bytes, rows, widths))
        rows = fewest_collisions(n, widths, radices, size - 1, rows_in)
    return size


def _small_radices(c: int, count: int, radices: Radices) -> list[int]:
    if radices == "quotient_remainder":
        return [c] * count
    found = [c]
    while len(found) < count:
        found.append(_coprime_from(found[-1] + 1, prod(found)))
    return found


def _least_radix(n: int, small: list[int], radices: Radices) -> int:
    """The fewest rows of the largest partition, given the others."""
    quotient = -(-n // prod(small))
    return quotient if radices == "quotient_remainder" else _coprime_from(quotient, prod(small))


def _coprime_from(m: int, product: int) -> int:
    while gcd(m, product) > 1:
        m += 1
    return m
