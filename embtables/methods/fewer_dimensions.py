"""The simplest baseline: full tables of fewer dimensions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from math import sqrt
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from embtables.lookup.recipe import Recipe, Row, concat
from embtables.lookup.store import Store
from embtables.methods.base import Floor, Initializer, Method, TableEntry, full_entry
from embtables.methods.projecting import narrow_rows, orthogonal_rows, principal_rows, projection_name, projection_of
from embtables.sizes.layout import Counts, Entry, Form, Group, Layout, Slab


class FewerDimensions(Method):
    """e(x) = [E[x], 0, …, 0], with E of shape ``[n, d]`` and one d for all tables: the largest that fits.

    In a dot product, or in the first layer of a network, vectors that end in zeros equal vectors of d dimensions. What
    is left of the budget gives single tables one column more, those with most lookups per byte first, or the smallest
    first where not all tables have counts. A table that has ``embedding_dim`` columns is stored in full.

    A baseline: a method that does no better at the same budget is not worth its trouble.

    Args:
        projection: whether e(x) = E[x]·P instead, with one trained P of shape ``[d, D]`` for all tables that have d of
            D columns.
    """

    kind: ClassVar[str] = "fewer_dimensions"
    projection: bool = False

    def floor(self, group: Group) -> Floor:
        return Floor(self._path(group).least[0], "one scalar per id" + (" and a projection" if self.projection else ""))

    def fit(self, group: Group, limit: int) -> Layout:
        widths = self._path(group).widths(limit)
        entries: dict[str, Entry] = {}
        slabs: list[Slab] = []
        for table, width in zip(group.tables, widths):
            if width == table.embedding_dim:
                entries[table.name], slab = full_entry(group, table)
            else:
                assert table.rows is not None
                entries[table.name] = Entry("projected" if self.projection else "narrow", {"width": width})
                slab = group.slab(table.name, table.rows, width)
            slabs.append(slab)
        shapes = {(w, t.embedding_dim) for t, w in zip(group.tables, widths) if w < t.embedding_dim}
        extras = tuple(projection_of(group, *shape) for shape in sorted(shapes)) if self.projection else ()
        return Layout.of(entries, Form(tuple(slabs), extras))

    def _path(self, group: Group) -> _Path:
        return group.once(f"path of {self!r}", lambda: self._walk(group))

    def _walk(self, group: Group) -> _Path:
        """From one column per table to all columns of all tables, one column more with each step."""
        dims, order = [table.embedding_dim for table in group.tables], _by_worth(group)
        used: dict[tuple[int, int], int] = {}

        def projection_bytes(width: int, dim: int, more: int) -> int:
            """What a table that begins (1) or ends (−1) to have so many of its columns changes."""
            if not self.projection or width == dim:
                return 0
            before = used.get((width, dim), 0)
            used[width, dim] = before + more
            return more * projection_of(group, width, dim).num_bytes if 0 in (before, before + more) else 0

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
        return _Path(len(dims), np.array(widened, dtype=np.int64), least)

    # ---- the module ----------------------------------------------------------------------------------------------

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        row, width, dim = Row(entry.table.name), entry.entry.values["width"], entry.table.embedding_dim
        if entry.entry.variant == "projected":
            return concat(row, projection=projection_name(group, width, dim))
        return concat(row, zeros=dim - width)

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        for table in group.tables:
            entry, std = layout.entries[table.name], init.std_of(table.name)
            if entry.variant == "narrow":
                # Vectors are as long as those of other methods, zeros and all.
                std *= sqrt(table.embedding_dim / entry.values["width"])
            init.uniform_(store.slab(table.name), table.name, std)
        for extra in layout.training.extras:
            store.extra(extra.name).copy_(orthogonal_rows(extra.shape, init.generator(extra.name)))

    def keep(self, layout: Layout, group: Group, store: Store, weights: Mapping[str, Tensor]) -> list[str]:
        """Tables in full, and with ``projection`` the principal components of those that share one."""
        kept = super().keep(layout, group, store, weights)
        counts = dict(zip((table.name for table in group.tables), group.counts))
        counted = all(own is not None for own in counts.values())
        for extra in layout.training.extras:
            names = [name for name in weights if extra.name == self._projection_of(layout, group, name)]
            if not names:
                continue
            projection = principal_rows(((weights[n], counts[n] if counted else None) for n in names), extra.shape[0])
            store.extra(extra.name).copy_(projection)
            for name in names:
                store.slab(name)[: len(weights[name])] = narrow_rows(weights[name], projection)
            kept += names
        return kept

    @staticmethod
    def _projection_of(layout: Layout, group: Group, name: str) -> str | None:
        entry, table = layout.entries[name], next(t for t in group.tables if t.name == name)
        return (
            projection_name(group, entry.values["width"], table.embedding_dim) if entry.variant == "projected" else None
        )


class _Path(NamedTuple):
    """Which table has a column more with each step, and the least bytes after so many steps or more."""

    num_tables: int
    widened: Counts
    least: list[int]

    def widths(self, limit: int) -> list[int]:
        """The columns of the tables after the most steps that fit."""
        number = bisect_right(self.least, limit) - 1
        widths: list[int] = (1 + np.bincount(self.widened[:number], minlength=self.num_tables)).tolist()
        return widths


def _by_worth(group: Group) -> list[int]:
    """The numbers of the tables, that with most lookups per row first; without all counts that with fewest rows."""
    rows = group.num_rows.tolist()
    lookups = [int(counts.sum()) for counts in group.counts if counts is not None]
    worth = [n / m for n, m in zip(lookups, rows)] if len(lookups) == len(rows) else [1 / m for m in rows]
    return sorted(range(len(rows)), key=lambda t: -worth[t])
