"""Tables as products of two factors: a narrow row per id, and a basis per table."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from embtables.config import MAX_DIM
from embtables.formats import FP32
from embtables.lookup.recipe import Recipe, Row, concat
from embtables.lookup.store import Store
from embtables.methods.base import Floor, Initializer, TableEntry, full_entry
from embtables.methods.projecting import ProjectingMethod, narrow_rows, orthogonal_rows, principal_rows
from embtables.sizes.budget import allocate, raised
from embtables.sizes.layout import Counts, Entry, Extra, Form, Group, Layout, Slab


class LowRank(ProjectingMethod):
    """e(x) = U[x]·V, with U of shape ``[n, r]`` and a basis V of shape ``[r, D]`` for each table.

    V has random orthogonal rows, or those that ``compress_`` fits to a trained table, and stays as it is.

    The ranks r are solved for the budget: in equal ratio to full tables, or where all tables have counts in proportion
    to √(lookups / bytes of a rank). A table whose factors would take as much as itself is stored in full.

    With ``inner_dim`` k a table is trained wider than it is served, e(x) = E[x]·W·V with E of shape ``[n, k]`` and W of
    shape ``[k, r]``, and U = E·W is what is served: the same vectors at the bytes of rank r. More factors change the
    way that training takes. Tables whose r reaches k are trained as they are served.

    Args:
        inner_dim: k; ``None``: tables are trained as they are served. W is trained in any case.
        train_projection: whether V is trained along with U, as in the papers.

    Lan et al., "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations", ICLR 2020 (factorized
    embeddings). Trained wider: Deng et al., "Enhancing Cross-Category Learning in Recommendation Systems with
    Multi-Layer Embedding Training" (MLET), ACML 2023.
    """

    kind: ClassVar[str] = "low_rank"
    inner_dim: int | None = Field(default=None, ge=1, le=MAX_DIM)

    # ---- sizes ---------------------------------------------------------------------------------------------------

    def floor(self, group: Group) -> Floor:
        return Floor(int(_bytes_of(group, np.ones_like(group.dims)).sum()), "factors of rank 1")

    def fit(self, group: Group, limit: int) -> Layout:
        full_from = _full_from(group)
        ranks = allocate(
            _weights(group), np.ones_like(group.dims), full_from, lambda ranks: _bytes_of(group, ranks), limit
        )
        entries: dict[str, Entry] = {}
        trained: list[Slab] = []
        served: list[Slab] = []
        folds: list[Extra] = []
        bases: list[Extra] = []
        for table, rank, stop in zip(group.tables, ranks.tolist(), full_from.tolist()):
            if rank >= stop:
                entries[table.name], slab = full_entry(group, table)
                trained.append(slab)
                served.append(slab)
                continue
            name, width = table.name, max(rank, self.inner_dim or 0)
            assert table.rows is not None
            trained.append(group.slab(f"{name}/rows", table.rows, width))
            served.append(group.slab(f"{name}/rows", table.rows, rank))
            bases.append(Extra(f"{name}/basis", (rank, table.embedding_dim), self.train_projection))
            entries[name] = Entry("factors", {"rank": rank})
            if width > rank:
                folds.append(Extra(f"{name}/fold", (width, rank)))
                entries[name] = Entry("folded", {"rank": rank, "inner_dim": width})
        training = Form(tuple(trained), (*folds, *bases)).in_format(FP32.name)
        return Layout(entries, training, Form(tuple(served), tuple(bases)))

    # ---- the module ----------------------------------------------------------------------------------------------

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        served = self.served_recipe(entry, group)
        return replace(served, inner=f"{entry.table.name}/fold") if entry.entry.variant == "folded" else served

    def served_recipe(self, entry: TableEntry, group: Group) -> Recipe:
        return concat(Row(f"{entry.table.name}/rows"), projection=f"{entry.table.name}/basis")

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        super().initialize(layout, group, store, init)
        for extra in layout.training.extras:
            generator = init.generator(extra.name)
            if extra.name.endswith("/fold"):
                # Orthogonal columns of length 1: rows have their standard deviation behind it too.
                width, rank = extra.shape
                store.extra(extra.name).copy_(orthogonal_rows((rank, width), generator).t() * sqrt(rank / width))
            else:
                store.extra(extra.name).copy_(orthogonal_rows(extra.shape, generator))

    def keep(self, layout: Layout, group: Group, store: Store, weights: Mapping[str, Tensor]) -> list[str]:
        """All of them: of each the best approximation of its rank, where counts are known by the traffic of its ids."""
        kept = super().keep(layout, group, store, weights)
        for table, counts in zip(group.tables, group.counts):
            entry = layout.entries[table.name]
            if table.name in kept or table.name not in weights:
                continue
            weight = weights[table.name]
            basis = principal_rows([(weight, counts)], entry.values["rank"])
            rows = narrow_rows(weight, basis)
            if entry.variant == "folded":
                rows = rows @ store.extra(f"{table.name}/fold").t()
            store.extra(f"{table.name}/basis").copy_(basis)
            store.slab(f"{table.name}/rows")[: len(rows)] = rows
        return list(weights)

    def serve(self, layout: Layout, group: Group, trained: Store, served: Store) -> None:
        for slab in layout.serving.slabs:
            rows = trained.slab(slab.name)
            name = slab.name.removesuffix("/rows")
            if layout.entries[name].variant == "folded":
                fold = trained.extra(f"{name}/fold").detach()
                rows = rows.to(fold.dtype) @ fold
            served.write_slab(slab.name, rows)
        for extra in layout.serving.extras:
            served.extra(extra.name).copy_(trained.extra(extra.name).detach())


def _rank_bytes(group: Group, ranks: Counts) -> Counts:
    """Bytes ``[T]`` of the factors of each table."""
    return group.format.slab_bytes(group.num_rows, ranks) + FP32.slab_bytes(ranks, group.dims)


def _full_from(group: Group) -> Counts:
    """The least rank of each table whose factors take no less than the full table: at most its D and its rows."""

    def least(number: int) -> int:
        rows, dim = int(group.num_rows[number]), int(group.dims[number])
        full = group.format.slab_bytes(rows, dim)
        ranks = range(1, dim + 1)
        return 1 + bisect_left(
            ranks, full, key=lambda rank: group.format.slab_bytes(rows, rank) + FP32.slab_bytes(rank, dim)
        )

    found: Counts = group.once(
        "full from", lambda: np.array([least(number) for number in range(len(group.tables))], dtype=np.int64)
    )
    return found


def _bytes_of(group: Group, ranks: Counts) -> Counts:
    """Bytes of each table with factors of a rank, or in full."""
    full_from, full = _full_from(group), group.rows_bytes(group.num_rows)
    return np.where(ranks >= full_from, full, _rank_bytes(group, ranks))


def _weights(group: Group) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The proportion of the ranks: without counts the same share of every full table, and of small ones a little more.

    With counts: were the loss of a table its lookups over its rank, the sum of T/r over the tables, whose ranks cost b
    bytes each, would be least where r is in proportion to √(T/b).
    """
    one = _rank_bytes(group, np.ones_like(group.dims)).astype(np.float64)
    counts = [counts for counts in group.counts if counts is not None]
    if len(counts) == len(group.tables):
        return np.sqrt(np.array([float(c.sum()) + 1 for c in counts]) / one)
    full = group.rows_bytes(group.num_rows).astype(np.float64)
    return raised(full) / one
