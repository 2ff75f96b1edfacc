"""A tensor-train method as another package would write it (Yin et al., "TT-Rec", MLSys 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from embtables import TableConfig
from embtables.lookup.block import Block, Extras, Part
from embtables.lookup.store import Store
from embtables.methods.base import Floor, Initializer, Method, TableEntry, full_entry
from embtables.sizes.layout import FULL, Entry, Form, Group, Layout


class TensorTrain(Method):
    """E[x] = G₁[x₁]·G₂[x₂]·G₃[x₃], the digits of x in a mixed radix; all tables have the rank that fits."""

    kind: ClassVar[str] = "tensor_train"
    max_rank: int = Field(default=64, ge=1)

    def floor(self, group: Group) -> Floor:
        return Floor(self._bytes(group, 1), "cores of rank 1")

    def fit(self, group: Group, limit: int) -> Layout:
        rank = 1
        while rank < self.max_rank and self._bytes(group, rank + 1) <= limit:
            rank += 1
        entries, slabs = {}, []
        for table in group.tables:
            rows, widths = shape(table, rank)
            cores = [group.slab(f"{table.name}/core{j}", n, w) for j, (n, w) in enumerate(zip(rows, widths))]
            entries[table.name], full = full_entry(group, table)
            if sum(core.num_bytes for core in cores) >= full.num_bytes:
                slabs.append(full)
                continue
            # Tables of one rank are looked up together.
            entries[table.name] = Entry(f"rank {rank}", {"rows": rows, "rank": rank})
            slabs += cores
        return Layout.of(entries, Form(slabs=tuple(slabs)))

    @staticmethod
    def _bytes(group: Group, rank: int) -> int:
        shapes = [shape(table, rank) for table in group.tables]
        sizes = [sum(map(group.format.slab_bytes, rows, widths)) for rows, widths in shapes]
        return sum(min(size, group.table_bytes(t) or 0) for size, t in zip(sizes, group.tables))

    def block(self, entries: Sequence[TableEntry], group: Group, store: Store) -> Block:
        return TensorTrainBlock(entries, store)

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        for slab in layout.training.slabs:
            entry = layout.entries[slab.name.split("/")[0]]
            rank = 1 if entry.variant == FULL else entry.values["rank"]
            # A product of three factors, summed over rank², with the model's variance (each core's is s²).
            std = init.std if entry.variant == FULL else (init.std**2 / rank**2) ** (1 / 6)
            init.uniform_(store.slab(slab.name), slab.name, std)


def shape(table: TableConfig, rank: int) -> tuple[list[int], list[int]]:
    """Rows and widths of the three cores."""
    assert table.rows is not None
    first = ceil(table.rows ** (1 / 3))
    second = ceil((table.rows / first) ** 0.5)
    rows = [-(-table.rows // (first * second)), second, first]
    d = factors(table.embedding_dim)
    return rows, [d[0] * rank, rank * d[1] * rank, rank * d[2]]


def factors(dim: int) -> list[int]:
    """Three factors of ``dim``, as equal as a greedy choice makes them."""
    one = max(f for f in range(1, round(dim ** (1 / 3)) + 1) if dim % f == 0)
    two = max(f for f in range(1, round((dim // one) ** 0.5) + 1) if dim // one % f == 0)
    return [one, two, dim // one // two]


class TensorTrainBlock(Block):
    base: Tensor
    radix: Tensor

    def __init__(self, entries: Sequence[TableEntry], store: Store) -> None:
        super().__init__(store, entries[0].table.embedding_dim)
        self.rank: int = entries[0].entry.values["rank"]
        self.widths = shape(entries[0].table, self.rank)[1]
        self.factors = factors(self.embedding_dim)
        self.constant("base", [[store.start(f"{e.table.name}/core{j}") for j in range(3)] for e in entries])
        self.constant("radix", [e.entry.values["rows"] for e in entries])

    def address(self, ids: Tensor, feature: Tensor) -> list[Part]:
        radix, base = self.radix[feature], self.base[feature]
        last = ids % radix[..., 2]
        quotient = ids // radix[..., 2]
        digits = [quotient // radix[..., 1], quotient % radix[..., 1], last]
        return [Part(width, base[..., j] + digit) for j, (width, digit) in enumerate(zip(self.widths, digits))]

    def combine(self, values: list[Tensor], ids: Tensor, feature: Tensor, extras: Extras) -> Tensor:
        lead, r, (a, b, c) = ids.shape, self.rank, self.factors
        left = values[0].reshape(-1, a, r)
        middle = values[1].reshape(-1, r, b * r)
        right = values[2].reshape(-1, r, c)
        product = torch.bmm(torch.bmm(left, middle).view(-1, a * b, r), right)
        return product.reshape(*lead, self.embedding_dim)
