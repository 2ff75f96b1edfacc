"""One storage for all features."""

from __future__ import annotations

import warnings
from math import gcd
from typing import ClassVar

from pydantic import Field

from embtables.lookup.recipe import Recipe, concat
from embtables.methods.addressing import SharingMethod
from embtables.methods.base import Floor, TableEntry, shared_layout
from embtables.optimizers import FusedOptimizer
from embtables.sizes.layout import Group, Layout


class Unified(SharingMethod):
    """Unified embedding (feature multiplexing): all tables share one storage E of shape ``[M, width]``.

    e_t(x) = [E[h_{t,1}(x)]; …; E[h_{t,c}(x)]] with c = embedding_dim / width lookups, each with rows h_{t,j}(x) of its
    own. For tables with a vocabulary these are balanced within the table (``addressing``): M of its ids that follow one
    another have every row once in each lookup. Between tables they meet at random. Tables that cost next to nothing are
    kept apart, in full, since their few ids would be hot rows for everybody else.

    Args:
        width: of the rows, a divisor of every ``embedding_dim``. By default half of their greatest common divisor
            (two lookups for tables of one dimension), or all of it where that is odd.

    Coleman et al., "Unified Embedding: Battle-Tested Feature Representations for Web-Scale ML Systems", NeurIPS 2023.
    """

    kind: ClassVar[str] = "unified"
    width: int | None = Field(default=None, ge=1)

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        width = self._width(group)
        if self.width is None and all(table.embedding_dim == width > 1 for table in group.tables):
            warnings.warn(
                f"method unified looks up a single row for each id of embedding_dim {width}, which is odd, so that ids "
                "which collide share their whole vector: take an even embedding_dim, or give a width that divides it",
                stacklevel=2,
            )
        for table in group.tables:
            if table.embedding_dim % width:
                raise ValueError(
                    f"table '{table.name}': embedding_dim {table.embedding_dim} is no multiple of "
                    f"the width {width} of method unified"
                )

    def _width(self, group: Group) -> int:
        if self.width is not None:
            return self.width
        common = gcd(*(table.embedding_dim for table in group.tables))
        return common // 2 if common % 2 == 0 else common

    def floor(self, group: Group) -> Floor:
        return Floor(group.format.slab_bytes(1, self._width(group)), "one row of the shared storage")

    def fit(self, group: Group, limit: int) -> Layout:
        width = self._width(group)
        return shared_layout(
            group, limit, width, 1, lambda t: self.shared_entry("multiplexed", t, lookups=t.embedding_dim // width)
        )

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        return concat(*(self.row(entry, group, group.name, j) for j in range(entry.entry.values["lookups"])))
