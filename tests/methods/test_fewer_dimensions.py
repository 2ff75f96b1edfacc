"""Fewer dimensions: which columns there are, what follows them, and what a projection keeps of trained tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embtables import EmbeddingTables, InfeasibleBudget, TableConfig, plan
from embtables.methods.projecting import narrow_rows, principal_rows
from embtables.sizes.layout import Group

PROJECTED = {"kind": "fewer_dimensions", "projection": True}
TABLES = [TableConfig("large", 1000, 16), TableConfig("small", 100, 16), TableConfig("thin", 300, 4)]


def widths(method: Any, budget: int, counts: dict[str, Any] | None = None) -> list[int]:
    """Columns of the tables."""
    slabs = {slab.name: slab.width for slab in plan(TABLES, method, budget, counts).groups[0].layout.serving.slabs}
    return [slabs[table.name] for table in TABLES]


def test_all_tables_have_the_largest_dimension_that_fits_and_no_more_than_their_own() -> None:
    # Rows of all tables times their columns, up to 4 and beyond, and then those of the last one.
    for dim in (1, 2, 3, 4):
        assert widths("fewer_dimensions", 4 * dim * 1400) == [dim] * 3
    for dim in (5, 9, 15):
        assert widths("fewer_dimensions", 4 * (dim * 1100 + 4 * 300)) == [dim, dim, 4]
    full = 4 * (16 * 1100 + 4 * 300)
    assert widths("fewer_dimensions", full) == [16, 16, 4]
    variants = {entry.variant for entry in plan(TABLES, "fewer_dimensions", full).groups[0].layout.entries.values()}
    assert variants == {"full"}
    with pytest.raises(InfeasibleBudget) as error:
        plan(TABLES, "fewer_dimensions", 4 * 1400 - 1)
    assert error.value.floor_bytes == 4 * 1400


def test_what_is_left_goes_to_small_tables_or_to_those_with_most_lookups_a_byte() -> None:
    two = 4 * 2 * 1400
    assert widths("fewer_dimensions", two + 399) == [2, 2, 2]
    assert widths("fewer_dimensions", two + 400) == [2, 3, 2]
    assert widths("fewer_dimensions", two + 400 + 1200) == [2, 3, 3]
    # 20, 1 and 2 lookups for each id.
    counts = {table.name: np.full(table.num_embeddings, n) for table, n in zip(TABLES, (20, 1, 2))}
    assert widths("fewer_dimensions", two + 3999, counts) == [2, 2, 2]
    assert widths("fewer_dimensions", two + 4000, counts) == [3, 2, 2]
    assert widths("fewer_dimensions", two + 4000 + 1200, counts) == [3, 2, 3]


def test_the_budget_is_used_where_tables_are_many() -> None:
    tables = [TableConfig(f"t{i}", 1000 + 37 * i, 32) for i in range(40)]
    full = sum(4 * 32 * (1000 + 37 * i) for i in range(40))
    for share in np.linspace(0.05, 1, 60):
        budget = int(share * full)
        for method in ("fewer_dimensions", PROJECTED):
            # Projections of two widths, a table's column, and no more.
            assert plan(tables, method, budget).inference_bytes > budget - 4 * 2443 - 2 * 4 * 32 * 32


def test_projections_are_shared_by_tables_of_a_dimension_and_counted() -> None:
    # 2 columns for all of them: a projection to 16 for two tables, one to 4 for the third.
    for budget, expected in ((4 * 2 * 1400 + 4 * (2 * 16 + 2 * 4), [2, 2, 2]), (4 * 2 * 1400 + 159, [1, 2, 2])):
        solved = plan(TABLES, PROJECTED, budget)
        form = solved.groups[0].layout.serving
        assert [slab.width for slab in form.slabs] == expected
        shapes = {(width, 4 if number == 2 else 16) for number, width in enumerate(expected)}
        assert {extra.shape for extra in form.extras} == shapes
        rows = sum(n * w for n, w in zip((1000, 100, 300), expected))
        assert solved.inference_bytes == 4 * (rows + sum(w * d for w, d in shapes)) <= budget
    # The table of 4 columns needs no projection any more.
    solved = plan(TABLES, PROJECTED, 4 * (5 * 1100 + 4 * 300 + 5 * 16))
    assert [extra.shape for extra in solved.groups[0].layout.serving.extras] == [(5, 16)]
    assert solved.groups[0].layout.entries["thin"].variant == "full"


def test_vectors_are_the_columns_and_then_zeros() -> None:
    tables = EmbeddingTables(plan(TABLES, "fewer_dimensions", 4 * (5 * 1100 + 4 * 300), optimizer="sgd"), std=0.5)
    ids = torch.tensor([[3, 7, 0], [999, 99, 299], [3, 7, 1]])
    vectors = tables(ids)
    for column, name, dim, width in ((0, "large", 16, 5), (16, "small", 16, 5), (32, "thin", 4, 4)):
        rows = tables.store.slab(name)[ids[:, TABLES.index(next(t for t in TABLES if t.name == name))]]
        assert torch.equal(vectors[:, column : column + width], rows)
        assert not vectors[:, column + width : column + dim].any()
    # What comes back to the zeros trains nothing.
    before = tables.store.slab("large").clone()
    (vectors * torch.cat([torch.zeros(5), torch.ones(31)])).sum().backward()
    assert torch.equal(tables.store.slab("large"), before)


# ---- trained tables --------------------------------------------------------------------------------------------------


def spectrum(rows: int, dim: int, seed: int) -> Tensor:
    """Rows whose columns matter less and less, in a basis of their own."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    return torch.randn(rows, dim, generator=generator) * 0.7 ** torch.arange(dim) @ basis + 0.3


@pytest.mark.parametrize("counted", [False, True])
def test_projections_keep_of_trained_tables_what_a_singular_value_decomposition_does(counted: bool) -> None:
    solved = plan(TABLES, PROJECTED, 4 * 3 * 1400 + 4 * (3 * 16 + 3 * 4))
    tables, layout, method = EmbeddingTables(solved), solved.groups[0].layout, solved.groups[0].method
    weights = {"large": spectrum(1000, 16, 0), "small": spectrum(100, 16, 1), "thin": spectrum(300, 4, 2)}
    rng = np.random.default_rng(0)
    counts = tuple(rng.integers(0, 50, len(weight)) if counted else None for weight in weights.values())
    group = Group("fewer_dimensions", tuple(TABLES), counts, 0)
    assert set(method.keep(layout, group, tables.store, weights)) == set(weights)
    for names in (("large", "small"), ("thin",)):
        own = np.concatenate([weights[name].double().numpy() for name in names])
        factors = [np.ones(len(weights[n])) if c is None else c + 1 for n, c in zip(weights, counts) if n in names]
        root = np.sqrt(np.concatenate(factors))[:, None]
        left, values, right = np.linalg.svd(root * own, full_matrices=False)
        expected = (left[:, :3] * values[:3]) @ right[:3] / root
        found = torch.cat([tables.to_dense(name) for name in names])
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_tables_in_full_are_kept_as_they_are_and_zeros_keep_nothing() -> None:
    solved = plan(TABLES, "fewer_dimensions", 4 * (5 * 1100 + 4 * 300))
    tables, g = EmbeddingTables(solved), solved.groups[0]
    weights = {t.name: torch.randn(t.num_embeddings or 0, t.embedding_dim) for t in TABLES}
    assert g.method.keep(g.layout, g.group, tables.store, weights) == ["thin"]
    assert torch.equal(tables.to_dense("thin"), weights["thin"])


def test_as_many_rows_as_dimensions_keep_everything() -> None:
    weight = spectrum(50, 6, 3)
    projection = principal_rows([(weight, None)], 6)
    torch.testing.assert_close(projection @ projection.t(), torch.eye(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(narrow_rows(weight, projection) @ projection, weight, rtol=1e-5, atol=1e-6)
