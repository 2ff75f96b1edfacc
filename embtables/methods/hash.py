"""The hashing trick: ids share rows at random."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from embtables.config import TableConfig
from embtables.hashing import seed_for
from embtables.lookup.recipe import Hashed, Recipe, concat
from embtables.methods.base import Floor, Method, TableEntry, full_entry
from embtables.optimizers import FusedOptimizer
from embtables.sizes.budget import allocate, collision_weights
from embtables.sizes.layout import Entry, Form, Group, Layout, Slab


class Hash(Method):
    """The hashing trick, e(x) = E[h(x)], with E of shape ``[m, embedding_dim]`` and a seeded 64-bit hash h to 0 … m−1.

    A table has its own m; one whose m reaches its number of ids is kept in full. Any 64-bit id will do, so no
    vocabulary is needed. Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009.
    """

    kind: ClassVar[str] = "hash"

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        pass

    def floor(self, group: Group) -> Floor:
        return Floor(int(group.rows_bytes(1).sum()), "one row per table")

    def fit(self, group: Group, limit: int) -> Layout:
        lower = np.ones(len(group.tables), dtype=np.int64)
        rows = allocate(collision_weights(group), lower, group.num_rows, group.rows_bytes, limit)
        pairs = [_entry(group, table, int(m)) for table, m in zip(group.tables, rows)]
        entries = {table.name: entry for table, (entry, _) in zip(group.tables, pairs)}
        return Layout.of(entries, Form(slabs=tuple(slab for _, slab in pairs)))

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        name = entry.table.name
        return concat(Hashed(name, seed_for(group.hash_seed, name, "row", 0)))


def _entry(group: Group, table: TableConfig, rows: int) -> tuple[Entry, Slab]:
    if table.rows is not None and rows >= table.rows:
        return full_entry(group, table)
    return Entry("hashed", {"rows": rows}), group.slab(table.name, rows, table.embedding_dim)
