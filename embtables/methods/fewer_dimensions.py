"""The simplest baseline: full tables of fewer dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import ClassVar

from torch import Tensor

from embtables.lookup.recipe import Recipe, Row, concat
from embtables.lookup.store import Store
from embtables.methods.base import Floor, Initializer, TableEntry, full_entry
from embtables.methods.projecting import (
    Narrowed,
    ProjectingMethod,
    fit_projections,
    initialize_projections,
    projection_name,
    projection_of,
)
from embtables.methods.widths import WidthPath, width_path
from embtables.sizes.layout import Entry, Form, Group, Layout, Slab


class FewerDimensions(ProjectingMethod):
    """e(x) = [E[x], 0, …, 0], with E of shape ``[n, d]`` and one d for all tables: the largest that fits.

    In a dot product, or in the first layer of a network, vectors that end in zeros equal vectors of d dimensions. What
    is left of the budget gives single tables one column more, those with most lookups per byte first, or the smallest
    first where not all tables have counts. A table that has ``embedding_dim`` columns is stored in full.

    A baseline: a method that does no better at the same budget is not worth its trouble.

    Args:
        projection: whether e(x) = E[x]·P instead, with one P of shape ``[d, D]`` for all tables that have d of D
            columns. It has random orthogonal rows, or is fitted to trained tables by ``compress_``, and stays as it is.
        train_projection: whether P, where there is one, is trained along with the rows.
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
        used = sorted(shapes) if self.projection else []
        extras = tuple(projection_of(group, *shape, trained=self.train_projection) for shape in used)
        return Layout.of(entries, Form(tuple(slabs), extras))

    def _path(self, group: Group) -> WidthPath:
        return width_path(group, projected=self.projection)

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
        initialize_projections(layout, store, init)

    def keep(self, layout: Layout, group: Group, store: Store, weights: Mapping[str, Tensor]) -> list[str]:
        """Tables in full, and with ``projection`` the principal components of those that share one."""
        kept = super().keep(layout, group, store, weights)
        narrow: dict[str, list[Narrowed]] = {}
        counted = all(counts is not None for counts in group.counts)
        for table, counts in zip(group.tables, group.counts):
            entry, weight = TableEntry(table, layout.entries[table.name]), weights.get(table.name)
            if weight is None or entry.entry.variant != "projected":
                continue
            projection = projection_name(group, entry.entry.values["width"], table.embedding_dim)
            part = Narrowed(store.slab(table.name), slice(len(weight)), weight, counts if counted else None)
            narrow.setdefault(projection, []).append(part)
            kept.append(table.name)
        fit_projections(store, narrow)
        return kept
