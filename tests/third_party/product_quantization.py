"""Rows put together from codebooks by codes that are kept for each id: as another package would write it."""

from __future__ import annotations

from typing import ClassVar

import torch

from embtables.extend import (
    Code,
    Coded,
    Entry,
    Extra,
    Floor,
    Form,
    Group,
    Initializer,
    Layout,
    Method,
    Ranks,
    Recipe,
    Store,
    TableEntry,
    chunk_widths,
)


class ProductQuantization(Method):
    """e(x) = [C₁[c₁(x)], …, C_k[c_k(x)]], or with ``inner`` that vector of so many scalars times a matrix.

    Args:
        num_parts: k codebooks, of ``codewords`` rows each.
        code_dtype: of the codes ``[n, k]``.
        inner: scalars of all parts, which a projection takes to the table's dimension; ``None``: as many as that has.
        remap: type of a buffer that says which id's codes an id has; ``None``: its own.
    """

    kind: ClassVar[str] = "product_quantization"
    needs_budget: ClassVar[bool] = False
    num_parts: int = 4
    codewords: int = 200
    code_dtype: str = "uint8"
    inner: int | None = None
    remap: str | None = None

    def floor(self, group: Group) -> Floor:
        return Floor(self._layout(group).serving.num_bytes, "codes and codebooks")

    def fit(self, group: Group, limit: int) -> Layout:
        return self._layout(group)

    def _layout(self, group: Group) -> Layout:
        slabs, codes, extras = [], [], {}
        for table in group.tables:
            rows, dim = table.rows, table.embedding_dim
            assert rows is not None
            for j, width in enumerate(chunk_widths(self.inner or dim, self.num_parts)):
                slabs.append(group.slab(f"{table.name}/{j}", self.codewords, width))
            codes.append(Code(f"{table.name}/codes", (rows, self.num_parts), self.code_dtype, "codes"))
            if self.remap is not None:
                codes.append(Code(f"{table.name}/remap", (rows,), self.remap, "index"))
            if self.inner is not None:
                extras[dim] = Extra(f"{group.name}/widen_{dim}", (self.inner, dim))
        entries = {table.name: Entry("quantized") for table in group.tables}
        return Layout.of(entries, Form(tuple(slabs), tuple(extras.values()), tuple(codes)))

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        name, dim = entry.table.name, entry.table.embedding_dim
        parts = tuple(Coded(f"{name}/{j}", f"{name}/codes", j) for j in range(self.num_parts))
        ranks = None if self.remap is None else Ranks(f"{name}/remap")
        return Recipe("concat", parts, ranks, None if self.inner is None else f"{group.name}/widen_{dim}")

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        super().initialize(layout, group, store, init)
        for code in layout.training.codes:
            generator, found = init.generator(code.name), store.code(code.name)
            if code.kind == "codes":
                found.copy_(torch.randint(self.codewords, code.shape, generator=generator))
            else:
                found.copy_(torch.randperm(code.shape[0], generator=generator))
        for extra in layout.training.extras:
            store.extra(extra.name).normal_(std=extra.shape[0] ** -0.5, generator=init.generator(extra.name))
