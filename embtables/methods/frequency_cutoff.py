"""A baseline: rare ids share a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from embtables.layout import Entry, Form, Group, Layout, Slab
from embtables.methods.base import Block, Floor, TableEntry, full_layout
from embtables.ops.program import Piece, Recipe
from embtables.optimizers import FusedOptimizer
from embtables.ranking import RankedMethod, counts_by_rank, rank_code, rank_code_name, remapped
from embtables.store import Part, Store


class FrequencyCutoff(RankedMethod):
    """The most frequent ids have rows of their own, all others of a table share one: e(x) = E[min(rank(x), r)].

    What every feature pipeline's minimum count does, here with one threshold of occurrences per byte for all tables,
    such that the budget is used up. It needs ``frequencies``.
    """

    kind: ClassVar[str] = "frequency_cutoff"

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        super().check(group, optimizer)
        for table, counts in zip(group.tables, group.counts):
            if counts is None:
                raise ValueError(
                    f"table '{table.name}': method frequency_cutoff needs to know how often ids occur: "
                    "give plan(..., frequencies={table: counts})"
                )

    def floor(self, group: Group) -> Floor:
        remap = sum(code.num_bytes for code in rank_code(group))
        least = int(4 * group.dims.sum()) + remap
        why = "one shared row a table" + (" and the ranks of ids that are not numbered by frequency" if remap else "")
        return Floor(min(least, group.full_bytes), why)

    def fit(self, group: Group, limit: int) -> Layout:
        if limit >= group.full_bytes:
            return full_layout(group)
        code = rank_code(group)
        own = self._own_rows(group, limit - int(4 * group.dims.sum()) - sum(c.num_bytes for c in code))
        starts = remapped(group)
        entries, slabs = {}, []
        for table, rows in zip(group.tables, own):
            slabs.append(Slab(table.name, int(rows) + 1, table.embedding_dim))
            values = {"own_rows": int(rows)}
            if table.name in starts:
                entries[table.name] = Entry("cut_off_by_rank", values | {"ranks_from": starts[table.name]})
            else:
                entries[table.name] = Entry("cut_off", values)
        return Layout.of(entries, Form(slabs=tuple(slabs), codes=code))

    @staticmethod
    def _own_rows(group: Group, limit: int) -> np.ndarray[Any, Any]:
        """Rows of its own for each table: the ids with most occurrences per byte, over all tables."""
        # The last id of each table would be alone in the shared row, so it never needs one of its own.
        counts = [counts_by_rank(c)[:-1] for c in group.counts if c is not None]
        table = np.repeat(np.arange(len(counts)), [len(c) for c in counts])
        row_bytes = 4 * group.dims[table]
        order = np.argsort(-(np.concatenate(counts) / row_bytes), kind="stable")
        fitting = int(np.searchsorted(np.cumsum(row_bytes[order]), limit, side="right"))
        return np.bincount(table[order[:fitting]], minlength=len(counts))

    def block(self, entries: Sequence[TableEntry], group: Group, store: Store) -> Block:
        return _CutoffBlock(entries, group, store)


class _CutoffBlock(Block):
    base: Tensor
    own_rows: Tensor
    ranks_from: Tensor

    def __init__(self, entries: Sequence[TableEntry], group: Group, store: Store) -> None:
        super().__init__(entries, store)
        self.rank_code = rank_code_name(group) if "ranks_from" in entries[0].entry.values else None
        self.constant("base", [store.start(e.table.name) for e in entries])
        self.constant("own_rows", [e.entry.values["own_rows"] for e in entries])
        self.constant("ranks_from", [e.entry.values.get("ranks_from", 0) for e in entries])

    def address(self, ids: Tensor, feature: Tensor) -> list[Part]:
        if self.rank_code is not None:
            ids = self.store.code(self.rank_code)[self.ranks_from[feature] + ids].long()
        return [Part(self.embedding_dim, self.base[feature] + torch.minimum(ids, self.own_rows[feature]))]

    def combine(self, values: list[Tensor], ids: Tensor, feature: Tensor) -> Tensor:
        return values[0]

    def recipes(self) -> list[Recipe]:
        rows = zip(self.base.tolist(), self.own_rows.tolist(), self.ranks_from.tolist())
        return [
            Recipe(
                "concat",
                [Piece(self.embedding_dim, base, "cut", own_rows)],
                None if self.rank_code is None else (self.rank_code, ranks_from),
            )
            for base, own_rows, ranks_from in rows
        ]
