"""Blocks of one circular array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from embtables.hashing import hash_ids, hash_signs
from embtables.layout import Entry, Group, Layout
from embtables.methods.base import Block, Floor, Method, TableEntry, shared_layout
from embtables.ops.program import Piece, Recipe
from embtables.optimizers import FusedOptimizer, RowWiseAdagrad
from embtables.store import Part, Store


class Robe(Method):
    """ROBE: every vector is cut into blocks of Z scalars, each read from a hashed place of one circular array.

    e_{cZ+o}(x) = g_c(x)·A[(h_c(x) + o) mod M], A of M scalars for all tables, h_c hashed with a seed of its own for
    every table and block. M is exact to the scalar. Scalars have no rows, so row-wise optimiser state has no meaning
    here. Tables that cost next to nothing are kept apart, in full.

    Args:
        block_size: Z. Larger blocks mean fewer cache misses and less variance; 1 is HashedNets.
        signs: whether a block has a random sign g.

    Desai et al., "Random Offset Block Embedding (ROBE)", MLSys 2022.
    """

    kind: ClassVar[str] = "robe"
    block_size: int = Field(default=8, ge=1)
    signs: bool = False

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        if isinstance(optimizer, RowWiseAdagrad):
            raise ValueError(
                "method robe shares single scalars, so there are no rows for the optimizer rowwise_adagrad: "
                'use optimizer="adagrad", "adam", "sgd" or None'
            )

    def floor(self, group: Group) -> Floor:
        return Floor(4 * self.block_size, "one block of the array")

    def fit(self, group: Group, limit: int) -> Layout:
        size = self.block_size
        return shared_layout(group, limit, 1, size, lambda t: Entry("blocks", {"blocks": -(-t.embedding_dim // size)}))

    def block(self, entries: Sequence[TableEntry], group: Group, store: Store) -> Block:
        return _RobeBlock(entries, group, store, self)


class _RobeBlock(Block):
    seed: Tensor
    sign_seed: Tensor
    size: Tensor
    offset: Tensor

    def __init__(self, entries: Sequence[TableEntry], group: Group, store: Store, method: Robe) -> None:
        super().__init__(entries, store)
        self.signs = method.signs
        self.block_size = method.block_size
        self.start = store.start(group.name)
        blocks = -(-self.embedding_dim // method.block_size)
        self.constant("size", store.slab(group.name).shape[0])
        self.constant("offset", list(range(method.block_size)))
        self.seeds("seed", entries, group, "row", blocks)
        self.seeds("sign_seed", entries, group, "sign", blocks)

    def address(self, ids: Tensor, feature: Tensor) -> list[Part]:
        starts = hash_ids(ids.unsqueeze(-1), self.seed[feature], self.size)
        scalars = (starts.unsqueeze(-1) + self.offset) % self.size
        return [Part(1, self.start + scalars.flatten(-2)[..., : self.embedding_dim])]

    def combine(self, values: list[Tensor], ids: Tensor, feature: Tensor) -> Tensor:
        vectors = values[0].squeeze(-1)
        if not self.signs:
            return vectors
        return vectors * self._signs(ids, feature)

    def recipes(self) -> list[Recipe]:
        z, size = self.block_size, int(self.size)
        return [
            Recipe(
                "concat",
                [
                    Piece(
                        1,
                        self.start,
                        "block",
                        seed,
                        size,
                        scalars=min(z, self.embedding_dim - c * z),
                        column=c * z,
                        sign_seed=sign_seed if self.signs else None,
                    )
                    for c, (seed, sign_seed) in enumerate(zip(seeds, sign_seeds))
                ],
            )
            for seeds, sign_seeds in zip(self.seed.tolist(), self.sign_seed.tolist())
        ]

    def _signs(self, ids: Tensor, feature: Tensor) -> Tensor:
        signs = hash_signs(ids.unsqueeze(-1), self.sign_seed[feature])
        return signs.repeat_interleave(self.block_size, dim=-1)[..., : self.embedding_dim]

    def signature(self, ids: Tensor, feature: Tensor) -> Tensor:
        rows = self.address(ids, feature)[0].rows
        first_of_block = rows[..., :: self.block_size]
        if not self.signs:
            return first_of_block
        return torch.cat([first_of_block, self._signs(ids, feature)[..., :: self.block_size].long()], dim=-1)
