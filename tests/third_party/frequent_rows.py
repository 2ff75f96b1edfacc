"""Rows of their own for the first ids, and something else for the rest: as another package would write it."""

from __future__ import annotations

from typing import ClassVar

import torch

from embtables.extend import (
    Address,
    Capped,
    CircularBlock,
    Code,
    Coded,
    Digit,
    Entry,
    Extra,
    Floor,
    Form,
    Group,
    Hashed,
    Initializer,
    Layout,
    Method,
    Range,
    Ranks,
    Recipe,
    Row,
    Store,
    TableEntry,
    chunk_widths,
    seed_for,
)


class FrequentRows(Method):
    """e(x) = E[x] for the first ids, with ``narrow`` F[x]·W for the next ones, and for all others what ``rest`` says.

    Args:
        rest: ``"capped"``: one row, ``"hashed"``; ``"row"``: of its own, narrow and widened; ``"sum"`` of three hashed
            rows, ``"mean"`` of two with signs, ``"product"`` of digits; ``"concat"`` of hashed parts; ``"codes"``;
            ``"blocks"`` of a circular array with signs; ``"projected"``: a sum of narrow rows, widened; ``"nothing"``.
        first: ids that have rows of their own, but no more than a third of a table.
        narrow: whether the next so many have narrow ones.
        remap: type of a buffer that says which rank an id has; ``None``: its own.
    """

    kind: ClassVar[str] = "frequent_rows"
    needs_budget: ClassVar[bool] = False
    rest: str = "hashed"
    first: int = 700
    narrow: bool = False
    remap: str | None = None

    def floor(self, group: Group) -> Floor:
        return Floor(self.fit(group, 0).serving.num_bytes, "all of it")

    def held(self, rows: int) -> int:
        """The ids of a table of so many that the rest does not have."""
        return min(self.first, rows // 3) * (2 if self.narrow else 1)

    def fit(self, group: Group, limit: int) -> Layout:
        slabs, codes = [], []
        for table in group.tables:
            name, dim, rows = table.name, table.embedding_dim, table.rows
            assert rows is not None
            slabs.append(group.slab(f"{name}/first", min(self.first, rows // 3), dim))
            if self.narrow:
                slabs.append(group.slab(f"{name}/narrow", min(self.first, rows // 3), 4))
            if self.rest == "blocks":
                slabs.append(group.slab(f"{name}/rest", 90, 1))
            elif self.rest == "row":
                slabs.append(group.slab(f"{name}/rest", rows - self.held(rows), 3))
            elif self.rest in ("concat", "codes"):
                slabs += [group.slab(f"{name}/rest{j}", 11, width) for j, width in enumerate(chunk_widths(dim, 3))]
            elif self.rest == "product":
                slabs += [group.slab(f"{name}/rest{j}", 11, dim) for j in range(3)]
            elif self.rest != "nothing":
                width = 3 if self.rest == "projected" else dim
                slabs.append(group.slab(f"{name}/rest", 1 if self.rest == "capped" else 30, width))
            if self.rest == "codes":
                codes.append(Code(f"{name}/codes", (rows - self.held(rows), 3), "uint8", "codes"))
            if self.remap is not None:
                codes.append(Code(f"{name}/remap", (rows,), self.remap, "index"))
        dims = dict.fromkeys(table.embedding_dim for table in group.tables)
        extras = [Extra(f"{group.name}/widen_4_{dim}", (4, dim)) for dim in dims if self.narrow]
        if self.rest in ("projected", "row"):
            extras += [Extra(f"{group.name}/widen_3_{dim}", (3, dim)) for dim in dims]
        entries = {table.name: Entry("frequent rows") for table in group.tables}
        return Layout.of(entries, Form(tuple(slabs), tuple(extras), tuple(codes)))

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        name, dim = entry.table.name, entry.table.embedding_dim
        ranges = [Range(f"{name}/first")]
        if self.narrow:
            ranges.append(Range(f"{name}/narrow", f"{group.name}/widen_4_{dim}"))
        ranks = None if self.remap is None else Ranks(f"{name}/remap")
        return Recipe("alternatives", tuple(ranges), ranks, rest=self._rest(name, dim, group))

    def _rest(self, name: str, dim: int, group: Group) -> Recipe:
        rest, widen = f"{name}/rest", f"{group.name}/widen_3_{dim}"

        def seed(j: int) -> int:
            return seed_for(group.hash_seed, name, "row", j)

        def sign(j: int) -> int:
            return seed_for(group.hash_seed, name, "sign", j)

        hashed: list[Address]
        if self.rest == "capped":
            return Recipe("concat", (Capped(rest),))
        if self.rest == "row":
            return Recipe("concat", (Row(rest),), projection=widen)
        if self.rest == "mean":
            return Recipe("mean", tuple(Hashed(rest, seed(j), sign(j)) for j in range(2)))
        if self.rest == "product":
            return Recipe("product", tuple(Digit(f"{rest}{j}", 11**j) for j in range(3)))
        if self.rest == "concat":
            return Recipe("concat", tuple(Hashed(f"{rest}{j}", seed(j)) for j in range(3)))
        if self.rest == "codes":
            return Recipe("concat", tuple(Coded(f"{rest}{j}", f"{name}/codes", j) for j in range(3)))
        if self.rest == "blocks":
            widths = chunk_widths(dim, -(-dim // 5))
            return Recipe("concat", tuple(CircularBlock(rest, seed(j), w, sign(j)) for j, w in enumerate(widths)))
        if self.rest == "nothing":
            return Recipe("sum", ())
        hashed = [Hashed(rest, seed(j)) for j in range({"hashed": 1, "projected": 2}.get(self.rest, 3))]
        if self.rest == "hashed":
            return Recipe("concat", tuple(hashed))
        return Recipe("sum", tuple(hashed), projection=widen if self.rest == "projected" else None)

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        super().initialize(layout, group, store, init)
        for code in layout.training.codes:
            generator, found = init.generator(code.name), store.code(code.name)
            if code.kind == "codes":
                found.copy_(torch.randint(11, code.shape, generator=generator))
            else:
                found.copy_(torch.randperm(code.shape[0], generator=generator))
        for extra in layout.training.extras:
            store.extra(extra.name).normal_(std=extra.shape[0] ** -0.5, generator=init.generator(extra.name))
