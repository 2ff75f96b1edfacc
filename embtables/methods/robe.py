"""Blocks of one circular array."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from embtables.config import TableConfig
from embtables.lookup.recipe import Recipe, concat
from embtables.methods.addressing import SharingMethod
from embtables.methods.base import Floor, TableEntry, shared_layout
from embtables.optimizers import FusedOptimizer
from embtables.sizes.layout import Entry, Group, Layout


class Robe(SharingMethod):
    """ROBE: every vector is cut into blocks of Z scalars, each read from some place of one circular array.

    e_{cZ+o}(x) = g_c(x)·A[(h_c(x) + o) mod M], A of M scalars for all tables, h_c with seeds of its own for every table
    and block. For tables with a vocabulary h_c is balanced (``addressing``): ⌊M/Z⌋ ids that follow one another lie side
    by side around the array, and so do as many again from another place on. Without a vocabulary h_c is a hash. M is
    exact to the scalar. Scalars have no rows, so row-wise optimizer state has no meaning here. Tables that cost next to
    nothing are kept apart, in full.

    Args:
        block_size: Z. Larger blocks mean fewer cache misses and less variance; 1 is HashedNets.
        signs: whether a block has a random sign g.

    Desai et al., "Random Offset Block Embedding (ROBE)", MLSys 2022.
    """

    kind: ClassVar[str] = "robe"
    block_size: int = Field(default=8, ge=1)
    signs: bool = False

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        if optimizer is not None and optimizer.is_row_wise():
            raise ValueError(
                f"method robe shares single scalars, so there are no rows for the optimizer {optimizer.kind}: "
                'use optimizer="adagrad", "adam", "sgd" or None'
            )

    def floor(self, group: Group) -> Floor:
        least = group.format.slab_bytes(self._longest_block(group), 1)
        return Floor(min(least, self.ceiling(group) or least), "one block of the array")

    def fit(self, group: Group, limit: int) -> Layout:
        def entry(table: TableConfig) -> Entry:
            return self.shared_entry("blocks", table, blocks=-(-table.embedding_dim // self.block_size))

        return shared_layout(group, limit, 1, self._longest_block(group), entry)

    def _longest_block(self, group: Group) -> int:
        return min(self.block_size, int(group.dims.max()))

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        dim, size = entry.table.embedding_dim, self.block_size
        sizes = (min(size, dim - c * size) for c in range(entry.entry.values["blocks"]))
        return concat(*(self.scalars(entry, group, group.name, c, n, self.signs) for c, n in enumerate(sizes)))
