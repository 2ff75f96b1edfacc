"""Several hashes an id, their rows combined."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import sqrt
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from embtables.budget import allocate, collision_weights
from embtables.config import TableConfig
from embtables.hashing import hash_ids, hash_signs
from embtables.layout import FULL, Entry, Form, Group, Layout, Slab
from embtables.methods.base import Block, Floor, Initializer, Method, TableEntry, chunk_widths, full_entry
from embtables.ops.program import Piece, Recipe
from embtables.optimizers import FusedOptimizer
from embtables.store import Part, Store


class MultiHash(Method):
    """k hashes an id: e(x) = Σ_j s_j(x)·E[h_j(x)], their mean, or the concatenation of k rows of width D/k.

    Sum and mean look k times into one table ``[m, D]``; concatenation has k tables ``[m, D/k]``. Two ids have the same
    vector only if all k rows agree, about once in m^k/k! pairs, or m^k.

    Args:
        num_hashes: k.
        operation: ``"sum"``, ``"mean"`` or ``"concat"``.
        signs: whether each lookup has a random sign, as in a count sketch (sum and mean).

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
        return Floor(int(4 * group.dims.sum()), "one row a table")

    def fit(self, group: Group, limit: int) -> Layout:
        lower = np.ones(len(group.tables), dtype=np.int64)
        rows = allocate(collision_weights(group), lower, group.num_rows, 4 * group.dims, limit)
        pairs = [self._entry(table, int(m)) for table, m in zip(group.tables, rows)]
        entries = {table.name: entry for table, (entry, _) in zip(group.tables, pairs)}
        return Layout.of(entries, Form(slabs=tuple(slab for _, slabs in pairs for slab in slabs)))

    def _entry(self, table: TableConfig, rows: int) -> tuple[Entry, list[Slab]]:
        if table.rows is not None and rows >= table.rows:
            entry, slab = full_entry(table)
            return entry, [slab]
        if self.operation != "concat":
            return Entry("hashed", {"rows": rows}), [Slab(table.name, rows, table.embedding_dim)]
        widths = chunk_widths(table.embedding_dim, self.num_hashes)
        return Entry("hashed", {"rows": rows}), [Slab(f"{table.name}/{j}", rows, w) for j, w in enumerate(widths)]

    def block(self, entries: Sequence[TableEntry], group: Group, store: Store) -> Block:
        return (_ConcatBlock if self.operation == "concat" else _SumBlock)(entries, group, store, self)

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        # A sum of k rows has k times a row's variance, a mean 1/k of it.
        scale = {"sum": 1 / sqrt(self.num_hashes), "mean": sqrt(self.num_hashes), "concat": 1.0}[self.operation]
        full = {name for name, entry in layout.entries.items() if entry.variant == FULL}
        for slab in layout.training.slabs:
            std = init.std if slab.name in full else init.std * scale
            init.uniform_(store.slab(slab.name), slab.name, std)


class _SumBlock(Block):
    base: Tensor
    size: Tensor
    seed: Tensor
    sign_seed: Tensor

    def __init__(self, entries: Sequence[TableEntry], group: Group, store: Store, method: MultiHash) -> None:
        super().__init__(entries, store)
        self.method = method
        self.constant("base", [[store.start(e.table.name)] for e in entries])
        self.constant("size", [[e.entry.values["rows"]] for e in entries])
        self.seeds("seed", entries, group, "row", method.num_hashes)
        self.seeds("sign_seed", entries, group, "sign", method.num_hashes)

    def address(self, ids: Tensor, feature: Tensor) -> list[Part]:
        hashed = hash_ids(ids.unsqueeze(-1), self.seed[feature], self.size[feature])
        return [Part(self.embedding_dim, self.base[feature] + hashed)]

    def combine(self, values: list[Tensor], ids: Tensor, feature: Tensor) -> Tensor:
        rows = values[0]
        if self.method.signs:
            rows = rows * hash_signs(ids.unsqueeze(-1), self.sign_seed[feature]).unsqueeze(-1)
        return rows.sum(-2) if self.method.operation == "sum" else rows.mean(-2)

    def recipes(self) -> list[Recipe]:
        constants = zip(self.base.tolist(), self.size.tolist(), self.seed.tolist(), self.sign_seed.tolist())
        signs = self.method.signs
        return [
            Recipe(
                self.method.operation,
                [
                    Piece(self.embedding_dim, base, "hash", seed, size, sign_seed=sign_seed if signs else None)
                    for seed, sign_seed in zip(seeds, sign_seeds)
                ],
            )
            for (base,), (size,), seeds, sign_seeds in constants
        ]

    def signature(self, ids: Tensor, feature: Tensor) -> Tensor:
        rows = self.address(ids, feature)[0].rows
        if self.method.signs:
            rows = rows * 2 + (hash_signs(ids.unsqueeze(-1), self.sign_seed[feature]) > 0)
        # The order of the lookups does not matter to a sum.
        return rows.sort(-1).values


class _ConcatBlock(Block):
    base: Tensor
    size: Tensor
    seed: Tensor

    def __init__(self, entries: Sequence[TableEntry], group: Group, store: Store, method: MultiHash) -> None:
        super().__init__(entries, store)
        self.widths = chunk_widths(self.embedding_dim, method.num_hashes)
        chunks = range(method.num_hashes)
        self.constant("base", [[store.start(f"{e.table.name}/{j}") for j in chunks] for e in entries])
        self.constant("size", [[e.entry.values["rows"]] for e in entries])
        self.seeds("seed", entries, group, "row", method.num_hashes)

    def address(self, ids: Tensor, feature: Tensor) -> list[Part]:
        rows = self.base[feature] + hash_ids(ids.unsqueeze(-1), self.seed[feature], self.size[feature])
        return [Part(width, rows[..., j]) for j, width in enumerate(self.widths)]

    def combine(self, values: list[Tensor], ids: Tensor, feature: Tensor) -> Tensor:
        return torch.cat(values, dim=-1)

    def recipes(self) -> list[Recipe]:
        columns = [0, *accumulate(self.widths)]
        return [
            Recipe(
                "concat",
                [
                    Piece(width, base, "hash", seed, size, column=column)
                    for width, column, base, seed in zip(self.widths, columns, bases, seeds)
                ],
            )
            for bases, (size,), seeds in zip(self.base.tolist(), self.size.tolist(), self.seed.tolist())
        ]
