"""A baseline: rare ids share a row."""

from __future__ import annotations

from typing import ClassVar

from embtables.lookup.recipe import Capped, Recipe, concat
from embtables.methods.base import Floor, TableEntry, full_layout
from embtables.methods.ranking import (
    ByWorth,
    RankedMethod,
    check_counted,
    rank_bytes,
    rank_code,
    ranked_entry,
    ranks_of,
    remapped,
)
from embtables.optimizers import FusedOptimizer
from embtables.sizes.layout import Form, Group, Layout


class FrequencyCutoff(RankedMethod):
    """The most frequent ids have rows of their own, all others of a table share one: e(x) = E[min(rank(x), r)].

    What every feature pipeline's minimum count does, here with one threshold of occurrences per byte for all tables,
    such that the budget is used up. It needs ``frequencies``.
    """

    kind: ClassVar[str] = "frequency_cutoff"

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        super().check(group, optimizer)
        check_counted(group, self.kind)

    def floor(self, group: Group) -> Floor:
        remap = rank_bytes(group)
        least = int(group.rows_bytes(1).sum()) + remap
        why = "one shared row per table" + (" and the ranks of ids that are not numbered by frequency" if remap else "")
        return Floor(min(least, group.full_bytes), why)

    def fit(self, group: Group, limit: int) -> Layout:
        if limit >= group.full_bytes:
            return full_layout(group)
        code = rank_code(group)
        left = limit - sum(c.num_bytes for c in code)
        own = ByWorth.of(group).most(left, lambda rows: group.rows_bytes(rows + 1))
        starts = remapped(group)
        entries, slabs = {}, []
        for table, rows in zip(group.tables, own):
            slabs.append(group.slab(table.name, int(rows) + 1, table.embedding_dim))
            entries[table.name] = ranked_entry("cut_off", {"own_rows": int(rows)}, starts.get(table.name))
        return Layout.of(entries, Form(slabs=tuple(slabs), codes=code))

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        return concat(Capped(entry.table.name), ranks=ranks_of(entry, group))
