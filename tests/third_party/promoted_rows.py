"""Hot ids get rows of their own while training runs, cold ones share hashed rows: as another package would write it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from embtables.hashing import hash_ids, mix, seed_for
from embtables.lookup.block import Block, Extras, Part
from embtables.lookup.engine import Touched
from embtables.lookup.store import Store
from embtables.methods.base import Floor, Initializer, Method, Stage, TableEntry
from embtables.optimizers import FusedOptimizer
from embtables.sizes.layout import Code, Entry, Form, Group, Layout


class PromotedRows(Method):
    """Rows 0 … h−1 belong to one hot key each (a key is a hash of table and id), the others are shared by hash.

    A key that a sketch has counted ``threshold`` times asks for the hot row it hashes to, and gets it when that is free
    or its owner has been counted less. It starts from what it had: weights and optimizer state of its shared row.
    """

    kind: ClassVar[str] = "promoted_rows"
    hot_rows: int = Field(default=64, ge=1)
    threshold: int = Field(default=8, ge=1)

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        if len({table.embedding_dim for table in group.tables}) > 1:
            raise ValueError(
                "method promoted_rows needs tables of one embedding_dim; give others a pattern of their own"
            )

    def floor(self, group: Group) -> Floor:
        rows = group.format.slab_bytes(self.hot_rows + 1, group.tables[0].embedding_dim)
        return Floor(8 * self.hot_rows + rows, "the hot rows and one shared row")

    def fit(self, group: Group, limit: int) -> Layout:
        dim = group.tables[0].embedding_dim
        rows = group.format.rows_within(limit - 8 * self.hot_rows, dim)
        slabs = (group.slab(f"{group.name}/rows", rows, dim),)
        owners = Code(f"{group.name}/owners", (self.hot_rows,), "int64", "index")
        # What only training needs is not served.
        sketch = Code(f"{group.name}/sketch", (16 * self.hot_rows,), "int32", "index")
        candidates = Code(f"{group.name}/candidates", (self.hot_rows,), "int64", "index")
        entries = {table.name: Entry("hot and cold", {"cold": rows - self.hot_rows}) for table in group.tables}
        return Layout(entries, Form(slabs, codes=(owners, sketch, candidates)), Form(slabs, codes=(owners,)))

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        super().initialize(layout, group, store, init)
        store.reset(f"{group.name}/rows", torch.arange(self.hot_rows))

    def block(self, entries: Sequence[TableEntry], group: Group, store: Store) -> Block:
        return PromotedRowsBlock(entries, group, store, self)

    def stage(self, layout: Layout, group: Group, store: Store) -> Stage:
        return Promotion(self, group, store)


def places(keys: Tensor, size: int, purpose: str, hash_seed: int) -> Tensor:
    return hash_ids(keys, torch.tensor(seed_for(hash_seed, "promoted_rows", purpose)), torch.tensor(size))


class PromotedRowsBlock(Block):
    seed: Tensor

    def __init__(self, entries: Sequence[TableEntry], group: Group, store: Store, method: PromotedRows) -> None:
        super().__init__(store, entries[0].table.embedding_dim)
        self.method, self.name, self.hash_seed = method, group.name, group.hash_seed
        self.start = store.start(f"{group.name}/rows")
        self.cold: int = entries[0].entry.values["cold"]
        self.constant("seed", [seed_for(group.hash_seed, e.table.name, "key") for e in entries])

    def address(self, ids: Tensor, feature: Tensor) -> list[Part]:
        keys = mix(ids ^ self.seed[feature])
        slots = places(keys, self.method.hot_rows, "slot", self.hash_seed)
        hot = self.store.code(f"{self.name}/owners")[slots] == keys
        cold = self.method.hot_rows + places(keys, self.cold, "row", self.hash_seed)
        return [Part(self.embedding_dim, self.start + torch.where(hot, slots, cold))]

    def combine(self, values: list[Tensor], ids: Tensor, feature: Tensor, extras: Extras) -> Tensor:
        return values[0]


class Promotion(Stage):
    """Counts the ids of each step, and gives hot rows to the candidates that the step before named."""

    def __init__(self, method: PromotedRows, group: Group, store: Store) -> None:
        super().__init__()
        self.method, self.name, self.hash_seed, self._store = method, group.name, group.hash_seed, [store]
        self.tables = [table.name for table in group.tables]

    def state(self) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def step(self, touched: Touched) -> None:
        self._promote()
        for table in self.tables:
            self._count(mix(touched.ids(table) ^ seed_for(self.hash_seed, table, "key")))

    def _count(self, keys: Tensor) -> None:
        sketch, candidates = (self._store[0].code(f"{self.name}/{n}") for n in ("sketch", "candidates"))
        cells = places(keys, len(sketch), "sketch", self.hash_seed)
        sketch.index_add_(0, cells, torch.ones_like(cells, dtype=torch.int32))
        often = sketch[cells] >= self.method.threshold
        slots = places(keys[often], self.method.hot_rows, "slot", self.hash_seed)
        candidates[slots] = keys[often]

    def _promote(self) -> None:
        store, slab = self._store[0], f"{self.name}/rows"
        owners, sketch, candidates = (store.code(f"{self.name}/{n}") for n in ("owners", "sketch", "candidates"))
        counted = [sketch[places(keys, len(sketch), "sketch", self.hash_seed)] for keys in (owners, candidates)]
        free = owners == 0
        won = ((candidates != 0) & (candidates != owners) & (free | (counted[1] > counted[0]))).nonzero().squeeze(1)
        if won.numel():
            cold_rows = store.slab(slab).shape[0] - self.method.hot_rows
            shared = self.method.hot_rows + places(candidates[won], cold_rows, "row", self.hash_seed)
            store.move(slab, shared, won)
            owners[won] = candidates[won]
        candidates.zero_()
