"""The hashing trick: fewer rows than ids."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from embtables.config import TableConfig
from embtables.lookup.recipe import Recipe, concat
from embtables.methods.addressing import SharingMethod
from embtables.methods.base import Floor, TableEntry, full_entry
from embtables.optimizers import FusedOptimizer
from embtables.sizes.budget import allocate, collision_weights
from embtables.sizes.layout import Entry, Form, Group, Layout, Slab


class Hash(SharingMethod):
    """The hashing trick, e(x) = E[h(x)], with E of shape ``[m, embedding_dim]`` and h(x) one of the rows 0 … m−1.

    A table has its own m; one whose m reaches its number of ids is kept in full. Over a vocabulary h is balanced: it
    gives each m ids that follow one another every row once (``addressing``). Without a vocabulary any 64-bit id will
    do, and h is a seeded hash.

    Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009.
    """

    kind: ClassVar[str] = "hash"

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        pass

    def floor(self, group: Group) -> Floor:
        return Floor(int(group.rows_bytes(1).sum()), "one row per table")

    def fit(self, group: Group, limit: int) -> Layout:
        lower = np.ones(len(group.tables), dtype=np.int64)
        rows = allocate(collision_weights(group), lower, group.num_rows, group.rows_bytes, limit)
        pairs = [self._entry(group, table, int(m)) for table, m in zip(group.tables, rows)]
        entries = {table.name: entry for table, (entry, _) in zip(group.tables, pairs)}
        return Layout.of(entries, Form(slabs=tuple(slab for _, slab in pairs)))

    def _entry(self, group: Group, table: TableConfig, rows: int) -> tuple[Entry, Slab]:
        if table.rows is not None and rows >= table.rows:
            return full_entry(group, table)
        return self.shared_entry("hashed", table, rows=rows), group.slab(table.name, rows, table.embedding_dim)

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        return concat(self.row(entry, group, entry.table.name, 0))
