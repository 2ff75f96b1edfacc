"""The baseline that every compressed table has to beat: no table at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from embtables.layout import Entry, Form, Group, Layout
from embtables.methods.base import Block, Floor, Method, TableEntry, full_entry
from embtables.ops.program import Recipe
from embtables.optimizers import FusedOptimizer
from embtables.store import Part, Store


class DropFeature(Method):
    """Tables are kept in full, the smallest first, as far as the budget goes; the others are dropped and give zeros.

    A baseline: a method that does no better at the same budget has learned nothing from the features it compresses.
    Without a budget every table is dropped.
    """

    kind: ClassVar[str] = "drop_feature"
    needs_budget: ClassVar[bool] = False

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        pass

    def floor(self, group: Group) -> Floor:
        return Floor(0, "nothing: every table is dropped")

    def fit(self, group: Group, limit: int) -> Layout:
        entries = {table.name: Entry("dropped") for table in group.tables}
        slabs, left = [], limit
        for table in sorted(group.tables, key=lambda t: t.full_bytes or 2**62):
            if table.full_bytes is None or table.full_bytes > left:
                break
            left -= table.full_bytes
            entries[table.name], slab = full_entry(table)
            slabs.append(slab)
        return Layout.of(entries, Form(slabs=tuple(slabs)))

    def block(self, entries: Sequence[TableEntry], group: Group, store: Store) -> Block:
        return _DroppedBlock(entries, store)


class _DroppedBlock(Block):
    def __init__(self, entries: Sequence[TableEntry], store: Store) -> None:
        super().__init__(entries, store)
        self.num_lookups = len(entries)

    def address(self, ids: Tensor, feature: Tensor) -> list[Part]:
        return []

    def combine(self, values: list[Tensor], ids: Tensor, feature: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self.embedding_dim, device=ids.device)

    def recipes(self) -> list[Recipe]:
        return [Recipe("sum", [])] * self.num_lookups

    def signature(self, ids: Tensor, feature: Tensor) -> Tensor:
        return torch.zeros_like(ids).unsqueeze(-1)
