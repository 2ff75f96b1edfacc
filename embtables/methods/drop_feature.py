"""The baseline that every compressed table has to beat: no table at all."""

from __future__ import annotations

from typing import ClassVar

from embtables.lookup.recipe import Recipe
from embtables.methods.base import Floor, Method, TableEntry, full_entry
from embtables.optimizers import FusedOptimizer
from embtables.sizes.layout import Entry, Form, Group, Layout


class DropFeature(Method):
    """Tables are kept in full, the smallest first, as far as the budget goes; the others are dropped and give zeros.

    A baseline: a method that does no better at the same budget has learned nothing from the features it compresses.
    Without a budget every table is dropped.

    Args:
        keep_small: whether any table is kept; with ``False`` all are dropped under every budget, and leave it to other
            methods: ``{"zip_code": {"kind": "drop_feature", "keep_small": False}, "*": "hash"}``.
    """

    kind: ClassVar[str] = "drop_feature"
    needs_budget: ClassVar[bool] = False
    later_fields: ClassVar[tuple[str, ...]] = (*Method.later_fields, "keep_small")
    keep_small: bool = True

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        pass

    def floor(self, group: Group) -> Floor:
        return Floor(0, "nothing: every table is dropped")

    def ceiling(self, group: Group) -> int | None:
        return super().ceiling(group) if self.keep_small else 0

    def fit(self, group: Group, limit: int) -> Layout:
        entries = {table.name: Entry("dropped") for table in group.tables}
        slabs, left = [], limit if self.keep_small else 0
        for table in sorted(group.tables, key=lambda t: group.table_bytes(t) or 2**62):
            num_bytes = group.table_bytes(table)
            if num_bytes is None or num_bytes > left:
                break
            left -= num_bytes
            entries[table.name], slab = full_entry(group, table)
            slabs.append(slab)
        return Layout.of(entries, Form(slabs=tuple(slabs)))

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        return Recipe("sum", ())
