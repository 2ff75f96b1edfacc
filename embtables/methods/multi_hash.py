"""Several hashes per id, their rows combined."""

from __future__ import annotations

from functools import partial
from math import sqrt
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from embtables.config import TableConfig
from embtables.lookup.recipe import Recipe, concat
from embtables.lookup.store import Store
from embtables.methods.addressing import SharingMethod
from embtables.methods.base import Floor, Initializer, TableEntry, chunk_widths, full_entry
from embtables.optimizers import FusedOptimizer
from embtables.sizes.budget import allocate, collision_weights
from embtables.sizes.layout import FULL, Counts, Entry, Form, Group, Layout, Slab


class MultiHash(SharingMethod):
    """k hashes per id: e(x) = Σ_j s_j(x)·E[h_j(x)], their mean, or the concatenation of k rows of width D/k.

    Sum and mean look k times into one table ``[m, D]``; concatenation has k tables ``[m, D/k]``. Two ids have the same
    vector only if all k rows agree. Hashes of ids without a vocabulary do so about once in m^k/k! pairs, or m^k. Over
    a vocabulary the h_j are balanced (``addressing``): each of them gives m ids that follow one another every row once,
    and of up to m²/6 ids no two agree in all h_j; their rows may be the same ones in another order, which a sum and a
    mean cannot tell apart.

    Args:
        num_hashes: k.
        operation: ``"sum"``, ``"mean"`` or ``"concat"``.
        signs: whether each lookup has a random sign, as in a count sketch (sum and mean). What other ids put into a row
            then cancels on average, and so does what all ids have in common: models without biases lose by it.

    Serrà & Karatzoglou, "Getting Deep Recommenders Fit", RecSys 2017; with signs Charikar et al., "Finding Frequent
    Items in Data Streams", 2002.
    """

    kind: ClassVar[str] = "multi_hash"
    num_hashes: int = Field(default=2, ge=2, le=16)
    operation: Literal["sum", "mean", "concat"] = "sum"
    signs: bool = False

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        if self.signs and self.operation == "concat":
            raise ValueError("method multi_hash, field 'signs': a concatenation has no use for signs")
        for table in group.tables:
            if self.operation == "concat" and table.embedding_dim < self.num_hashes:
                raise ValueError(
                    f"table '{table.name}': multi_hash concatenates {self.num_hashes} rows, "
                    f"but embedding_dim is {table.embedding_dim}"
                )

    def floor(self, group: Group) -> Floor:
        return Floor(int(self._bytes(group, np.ones_like(group.dims)).sum()), "one row per table")

    def fit(self, group: Group, limit: int) -> Layout:
        lower = np.ones(len(group.tables), dtype=np.int64)
        rows = allocate(collision_weights(group), lower, group.num_rows, partial(self._bytes, group), limit)
        pairs = [self._entry(group, table, int(m)) for table, m in zip(group.tables, rows)]
        entries = {table.name: entry for table, (entry, _) in zip(group.tables, pairs)}
        return Layout.of(entries, Form(slabs=tuple(slab for _, slabs in pairs for slab in slabs)))

    def _entry(self, group: Group, table: TableConfig, rows: int) -> tuple[Entry, list[Slab]]:
        slabs = [group.slab(table.name, rows, table.embedding_dim)]
        if self.operation == "concat":
            widths = chunk_widths(table.embedding_dim, self.num_hashes)
            slabs = [group.slab(f"{table.name}/{j}", rows, w) for j, w in enumerate(widths)]
        full_bytes = group.table_bytes(table)
        as_many = table.rows is not None and rows >= table.rows
        if full_bytes is not None and (as_many or sum(slab.num_bytes for slab in slabs) >= full_bytes):
            entry, slab = full_entry(group, table)
            return entry, [slab]
        return self.shared_entry("hashed", table, rows=rows), slabs

    def _bytes(self, group: Group, rows: Counts) -> Counts:
        """Bytes of each table with so many hashed rows, kept in full where it has as many ids or that costs no more."""
        if self.operation != "concat":
            return group.rows_bytes(rows)
        widths = np.array([chunk_widths(t.embedding_dim, self.num_hashes) for t in group.tables], dtype=np.int64)
        chunks: Counts = group.format.slab_bytes(rows[:, np.newaxis], widths).sum(axis=1)
        full = group.rows_bytes(group.num_rows)
        return np.where(rows >= group.num_rows, full, np.minimum(chunks, full))

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        name, numbers = entry.table.name, range(self.num_hashes)
        if self.operation == "concat":
            return concat(*(self.row(entry, group, f"{name}/{j}", j) for j in numbers))
        return Recipe(self.operation, tuple(self.row(entry, group, name, j, self.signs) for j in numbers))

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        # A sum of k rows has k times a row's variance, a mean 1/k of it.
        scale = {"sum": 1 / sqrt(self.num_hashes), "mean": sqrt(self.num_hashes), "concat": 1.0}[self.operation]
        full = {name for name, entry in layout.entries.items() if entry.variant == FULL}
        for slab in layout.training.slabs:
            std = init.std_of(slab.name) * (1.0 if slab.name in full else scale)
            init.uniform_(store.slab(slab.name), slab.name, std)
