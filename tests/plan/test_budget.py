"""Reading budgets, and splitting them between tables."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embtables import InfeasibleBudget, TableConfig, plan
from embtables.sizes.budget import allocate, collision_weights, parse_budget, split
from embtables.sizes.layout import Group

pytestmark = pytest.mark.core

FULL = 1_000_003


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1, 1),
        (67_108_864, 67_108_864),
        (10**15, 10**15),
        (0.1, 100_000),
        (1.0, FULL),
        ("0.1", 100_000),
        (".5", 500_001),
        ("10%", 100_000),
        ("100%", FULL),
        ("12.5 %", 125_000),
        ("0.1%", 1_000),
        ("123", 123),
        ("1_000", 1_000),
        ("77B", 77),
        ("64kB", 64_000),
        ("64KB", 64_000),
        ("64KiB", 65_536),
        ("64MB", 64_000_000),
        (" 64 MB ", 64_000_000),
        ("64MiB", 67_108_864),
        ("1.5GB", 1_500_000_000),
        ("1.5GiB", 1_610_612_736),
        ("2TB", 2_000_000_000_000),
        ("64mb", 64_000_000),
        ("64mib", 67_108_864),
        ("1e6", 1_000_000),
        ("2.5e3 kB", 2_500_000),
        (np.int64(4), 4),
        (np.float64(0.1), 100_000),
        (np.float32(0.5), 500_001),
    ],
)
def test_forms_of_a_budget(budget: Any, expected: int) -> None:
    assert parse_budget(budget, FULL) == expected


BAD = [0, -1, -5_000, 0.0, -0.1, 1.5, float("nan"), float("inf"), True, False, None, [1], b"1", np.True_]
BAD += [
    "",
    "abc",
    "0",
    "0%",
    "101%",
    "-5MB",
    "5 MB MB",
    "1.5",
    "1_",
    "_1",
    "1__0",
    "5XB",
    "%",
    "nan",
    "1e",
    "64M B",
    "1e6%",
]


@pytest.mark.parametrize("budget", BAD, ids=repr)
def test_anything_else_is_refused_by_name(budget: Any) -> None:
    with pytest.raises(ValueError, match="budget") as caught:
        parse_budget(budget, FULL)
    shown = repr(float(budget)) if budget == "1.5" else repr(budget)
    assert shown in str(caught.value) and not isinstance(caught.value, InfeasibleBudget)


def test_a_share_of_unknown_tables_is_refused() -> None:
    for budget in (0.5, "10%"):
        with pytest.raises(ValueError, match="unknown while a table has no num_embeddings"):
            parse_budget(budget, None)
    assert parse_budget("5kB", None) == 5_000


def test_a_share_that_rounds_to_nothing_is_infeasible_not_unreadable() -> None:
    with pytest.raises(InfeasibleBudget) as caught:
        plan([TableConfig("t", 10, 4)], "hash", 0.001)
    assert caught.value.floor_bytes == 16


def test_infeasible_budget_says_floor_reason_and_remedy_and_can_be_sent_to_another_process() -> None:
    with pytest.raises(InfeasibleBudget) as caught:
        plan([TableConfig("a", 1000, 8), TableConfig("b", 1000, 4)], "hash", 47)
    error = caught.value
    assert error.floor_bytes == 48 and "47" in str(error) and "48" in str(error) and "hash" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.floor_bytes, again.why) == (
        InfeasibleBudget,
        str(error),
        48,
        error.why,
    )


sizes = st.lists(
    st.tuples(st.floats(1e-6, 1e6), st.integers(0, 3), st.integers(0, 10**6), st.integers(1, 300)),
    min_size=1,
    max_size=8,
)


@given(sizes, st.integers(0, 10**8), st.integers(0, 10**4))
@settings(max_examples=500)
def test_allocation_fits_wastes_less_than_a_row_and_grows_with_the_limit(
    tables: list[tuple[float, int, int, int]], spare: int, more: int
) -> None:
    weights = np.array([w for w, *_ in tables])
    lower = np.array([low for _, low, _, _ in tables])
    upper = lower + np.array([extra for _, _, extra, _ in tables])
    unit = np.array([u for *_, u in tables])
    least = int((lower * unit).sum())
    rows = allocate(weights, lower, upper, lambda rows: rows * unit, least + spare)
    used = int((rows * unit).sum())
    assert ((lower <= rows) & (rows <= upper)).all() and used <= least + spare
    growing = rows < upper
    if growing.any():
        assert least + spare - used < unit[growing].max()
    assert (allocate(weights, lower, upper, lambda rows: rows * unit, least + spare + more) >= rows).all()
    # Tables between their bounds are in proportion to their weights: one λ, up to a row of rounding, serves them all.
    free = growing & (rows > lower)
    if free.any():
        assert (rows / weights)[free].max() <= ((rows + 1) / weights)[free].min() * (1 + 1e-9) + 1e-9


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 10**6)), min_size=2, max_size=5), st.integers(0, 10**7))
def test_a_split_fits_and_respects_floors_and_ceilings(groups: list[tuple[int, int]], spare: int) -> None:
    floors, ceilings = [f for f, _ in groups], [f + extra for f, extra in groups]
    limit = sum(floors) + spare
    shares = split(limit, floors, ceilings)
    assert all(f <= s <= c for f, s, c in zip(floors, shares, ceilings))
    assert sum(shares) == min(limit, sum(ceilings))


def test_collision_weights_minimize_the_expected_collisions() -> None:
    counts = [np.array([90, 5, 5] + [0] * 97), np.full(100, 10), np.arange(100)]
    tables = tuple(TableConfig(f"t{i}", 100, d) for i, d in enumerate((4, 8, 16)))
    weights = collision_weights(Group("g", tables, tuple(c.astype(np.int64) for c in counts), 0))

    def collisions(rows: np.ndarray) -> float:
        """Σ over tables of lookups · chance that two lookups of different ids meet in one of m rows."""
        total = 0.0
        for c, m in zip(counts, rows):
            p = c / c.sum()
            total += c.sum() * (1 - float((p**2).sum())) / m
        return total

    dims = np.array([4, 8, 16])
    best = weights * 1000 / (weights * dims).sum()
    for i in range(3):
        for j in range(3):
            if i != j:
                # Moving scalars from one table to another makes it worse.
                moved = best.copy()
                moved[i] += 1 / dims[i]
                moved[j] -= 1 / dims[j]
                assert collisions(moved) > collisions(best)


@pytest.mark.parametrize("percent", range(1, 101))
def test_a_share_of_round_numbers_is_exact(percent: int) -> None:
    assert parse_budget(f"{percent}%", 100) == percent
    assert parse_budget(percent / 100, 1_000_000) == percent * 10_000
