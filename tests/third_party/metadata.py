"""Ids described by what is known of them, such as genres and words of a title: as another package would write it."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from embtables.extend import (
    Code,
    Entry,
    Extra,
    Floor,
    Form,
    Group,
    Initializer,
    Layout,
    Listed,
    Method,
    Recipe,
    Store,
    TableEntry,
)


class Metadata(Method):
    """e(x) = Σ A[a] over the attributes a of x, or their mean, or with ``inner`` that vector times a matrix.

    Id x has ``x mod (longest + 1)`` attributes, so that some ids have none.

    Args:
        combine: of the attributes of an id.
        longest: the most that an id has.
        num_attributes: rows of A, for each table.
        inner: width of A, which a projection takes to the table's dimension; ``None``: as many as that has.
        offset_dtype, value_dtype: of where lists begin, and of what they hold.
    """

    kind: ClassVar[str] = "metadata"
    needs_budget: ClassVar[bool] = False
    combine: Literal["sum", "mean"] = "mean"
    longest: int = 3
    num_attributes: int = 100
    inner: int | None = None
    offset_dtype: str = "int32"
    value_dtype: str = "uint8"

    def floor(self, group: Group) -> Floor:
        return Floor(self.fit(group, 0).serving.num_bytes, "attributes and lists")

    def fit(self, group: Group, limit: int) -> Layout:
        slabs, codes, extras = [], [], {}
        for table in group.tables:
            rows, dim = table.rows, table.embedding_dim
            assert rows is not None
            slabs.append(group.slab(f"{table.name}/attributes", self.num_attributes, self.inner or dim))
            total = int(self._lengths(rows).sum())
            codes.append(Code(f"{table.name}/offsets", (rows + 1,), self.offset_dtype, "index"))
            codes.append(Code(f"{table.name}/values", (total,), self.value_dtype, "codes"))
            if self.inner is not None:
                extras[dim] = Extra(f"{group.name}/widen_{dim}", (self.inner, dim))
        entries = {table.name: Entry("described") for table in group.tables}
        return Layout.of(entries, Form(tuple(slabs), tuple(extras.values()), tuple(codes)))

    def _lengths(self, rows: int) -> torch.Tensor:
        return torch.arange(rows) % (self.longest + 1)

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        name, dim = entry.table.name, entry.table.embedding_dim
        listed = Listed(f"{name}/attributes", f"{name}/offsets", f"{name}/values", self.longest)
        return Recipe(self.combine, (listed,), projection=None if self.inner is None else f"{group.name}/widen_{dim}")

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        super().initialize(layout, group, store, init)
        for code in layout.training.codes:
            found = store.code(code.name)
            if code.kind == "index":
                found[1:] = self._lengths(code.shape[0] - 1).cumsum(0)
            else:
                found.copy_(torch.randint(self.num_attributes, code.shape, generator=init.generator(code.name)))
        for extra in layout.training.extras:
            store.extra(extra.name).normal_(std=extra.shape[0] ** -0.5, generator=init.generator(extra.name))
