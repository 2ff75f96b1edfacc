"""Deep hash embeddings as another package would write them (Kang et al., KDD 2021): no rows at all, only an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from embtables.hashing import mix, seed_for, to_range
from embtables.lookup.block import Block, Extras, Part
from embtables.lookup.store import Store
from embtables.methods.base import Floor, Initializer, Method, TableEntry
from embtables.optimizers import FusedOptimizer
from embtables.sizes.layout import Entry, Extra, Form, Group, Layout


class DeepHash(Method):
    """e(x) = W₂·relu(W₁·u(x) + b₁) + b₂, with u(x) in [−1, 1]^k from k hashes; one network for all tables."""

    kind: ClassVar[str] = "deep_hash"
    num_hashes: int = Field(default=64, ge=1)

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        if len({table.embedding_dim for table in group.tables}) > 1:
            raise ValueError("method deep_hash needs tables of one embedding_dim; give others a pattern of their own")

    def floor(self, group: Group) -> Floor:
        return Floor(self._form(group, 1).num_bytes, "a hidden layer of one unit")

    def fit(self, group: Group, limit: int) -> Layout:
        one = self._form(group, 1).num_bytes
        hidden = 1 + (limit - one) // (self._form(group, 2).num_bytes - one)
        return Layout.of(
            {t.name: Entry("network", {"hidden": hidden}) for t in group.tables}, self._form(group, hidden)
        )

    def _form(self, group: Group, hidden: int) -> Form:
        dim, name = group.tables[0].embedding_dim, group.name
        shapes = {"w1": (self.num_hashes, hidden), "b1": (hidden,), "w2": (hidden, dim), "b2": (dim,)}
        return Form(extras=tuple(Extra(f"{name}/{key}", shape) for key, shape in shapes.items()))

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        # Inputs have variance 1/3, relu halves the second moment.
        stds = {"w1": sqrt(3 / self.num_hashes), "b1": 0.0, "b2": 0.0}
        for extra in layout.training.extras:
            std = stds.get(extra.name.split("/")[-1], init.std * sqrt(2 / extra.shape[0]))
            init.uniform_(store.extra(extra.name), extra.name, std)

    def block(self, entries: Sequence[TableEntry], group: Group, store: Store) -> Block:
        return DeepHashBlock(entries, group, store, self.num_hashes)


class DeepHashBlock(Block):
    seed: Tensor

    def __init__(self, entries: Sequence[TableEntry], group: Group, store: Store, num_hashes: int) -> None:
        super().__init__(store, entries[0].table.embedding_dim)
        self.name = group.name
        seeds = [[seed_for(group.hash_seed, e.table.name, "code", j) for j in range(num_hashes)] for e in entries]
        self.constant("seed", seeds)
        self.constant("size", 2**24)

    size: Tensor

    def address(self, ids: Tensor, feature: Tensor) -> list[Part]:
        return []

    def signature(self, ids: Tensor, feature: Tensor) -> Tensor:
        return mix(ids.unsqueeze(-1) ^ self.seed[feature][..., :1])

    def combine(self, values: list[Tensor], ids: Tensor, feature: Tensor, extras: Extras) -> Tensor:
        hashed = to_range(mix(ids.unsqueeze(-1) ^ self.seed[feature]), self.size)
        code = hashed.to(torch.float32) / 2**23 - 1
        w1, b1, w2, b2 = (extras(f"{self.name}/{key}") for key in ("w1", "b1", "w2", "b2"))
        return torch.relu(code @ w1 + b1) @ w2 + b2
