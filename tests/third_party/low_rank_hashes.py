"""Hashed rows of a low rank, combined and then widened by a matrix: as another package would write it."""

from __future__ import annotations

from typing import ClassVar, Literal

from embtables.extend import (
    CircularBlock,
    Entry,
    Extra,
    Floor,
    Form,
    Group,
    Hashed,
    Initializer,
    Layout,
    Method,
    Recipe,
    Store,
    TableEntry,
    seed_for,
)


class LowRankHashes(Method):
    """e(x) = (Σ ±E[h_j(x)])·W, with E of shape ``[rows, rank]`` and one W for all tables of a dimension.

    Args:
        combine: of the k rows of an id; ``"concat"`` joins k rows of ``rank`` scalars.
        num_hashes: k.
        signs: whether rows have random signs (sum and mean).
        circular: ``"concat"`` of blocks of a circular array instead of rows.
        widened: whether there is a W; without it zeros follow the values.
        narrowed: whether a matrix for all tables makes 3 scalars of the combination first, which W then widens.
    """

    kind: ClassVar[str] = "low_rank_hashes"
    needs_budget: ClassVar[bool] = False
    combine: Literal["sum", "mean", "product", "concat"] = "sum"
    num_hashes: int = 3
    rank: int = 5
    rows: int = 90
    signs: bool = False
    circular: bool = False
    widened: bool = True
    narrowed: bool = False

    def floor(self, group: Group) -> Floor:
        return Floor(self.fit(group, 0).serving.num_bytes, "rows and matrices")

    def fit(self, group: Group, limit: int) -> Layout:
        width = 1 if self.circular else self.rank
        slabs = tuple(group.slab(table.name, self.rows, width) for table in group.tables)
        dims = dict.fromkeys(table.embedding_dim for table in group.tables) if self.widened else {}
        inner = 3 if self.narrowed else self._inner()
        extras = tuple(Extra(f"{group.name}/widen_{dim}", (inner, dim)) for dim in dims)
        if self.narrowed:
            extras += (Extra(f"{group.name}/narrow", (self._inner(), 3)),)
        return Layout.of({table.name: Entry("low rank") for table in group.tables}, Form(slabs, extras))

    def _inner(self) -> int:
        return self.rank * (self.num_hashes if self.combine == "concat" else 1)

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        name, dim = entry.table.name, entry.table.embedding_dim
        addresses: list[Hashed | CircularBlock] = []
        for j in range(self.num_hashes):
            seed = seed_for(group.hash_seed, name, "row", j)
            sign_seed = seed_for(group.hash_seed, name, "sign", j) if self.signs else None
            if self.circular:
                addresses.append(CircularBlock(name, seed, self.rank, sign_seed))
            else:
                addresses.append(Hashed(name, seed, sign_seed))
        if not self.widened:
            return Recipe(self.combine, tuple(addresses), zeros=dim - self._inner())
        inner = f"{group.name}/narrow" if self.narrowed else None
        return Recipe(self.combine, tuple(addresses), projection=f"{group.name}/widen_{dim}", inner=inner)

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        super().initialize(layout, group, store, init)
        for extra in layout.training.extras:
            store.extra(extra.name).normal_(std=extra.shape[0] ** -0.5, generator=init.generator(extra.name))
