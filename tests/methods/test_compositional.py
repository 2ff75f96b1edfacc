"""Compositional tables: sizes against brute force, codes against Python integers, vectors against scalar loops."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import gcd, prod, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embtables import EmbeddingTables, InfeasibleBudget, TableConfig, plan
from embtables.formats import RowFormat, row_format
from embtables.methods.compositional import (
    Compositional,
    fewest_collisions,
    largest_consecutive,
    least_bytes,
    least_consecutive_bytes,
)

RADICES = ("quotient_remainder", "chinese_remainder")
OPERATIONS = ("mult", "add", "concat")
BYTES = RowFormat("bytes", "uint8")  # sizes in scalars are sizes in bytes


def least_cost(n: int, c: int, widths: tuple[int, ...]) -> int:
    """The fewest scalars of partitions of (m, c, …, c) rows."""
    small = [c] * (len(widths) - 1)
    return sum(m * w for m, w in zip([-(-n // prod(small)), *small], widths))


def consecutive_cost(m: int, widths: tuple[int, ...]) -> int:
    return sum((m - j) * w for j, w in enumerate(widths))


def all_codes_differ(n: int, rows: Sequence[int]) -> bool:
    return len({tuple(x % m for m in rows) for x in range(n)}) == n


ALL_WIDTHS = pytest.mark.parametrize("widths", [(1, 1), (1, 1, 1), (3, 2), (2, 2, 1, 1), (1,) * 5, (1,) * 8])


@ALL_WIDTHS
def test_mixed_radices_are_the_first_that_fit_by_brute_force(widths: tuple[int, ...]) -> None:
    for n in (2, 3, 7, 10, 37, 64, 100, 211, 1000):
        costs = {c: least_cost(n, c, widths) for c in range(2, n + 2)}
        assert least_bytes(n, widths, BYTES) == min(costs.values())
        for limit in range(1, n * sum(widths), 1 + n // 40):
            rows = fewest_collisions(n, widths, limit, BYTES)
            fitting = [c for c, cost in costs.items() if cost <= limit]
            if not fitting:
                assert rows is None
                continue
            assert rows is not None
            assert rows[1:] == (fitting[0],) * (len(widths) - 1)
            assert sum(m * w for m, w in zip(rows, widths)) <= limit
            assert prod(rows) >= n
            if rows[0] < n:
                assert sum(m * w for m, w in zip(rows, widths)) > limit - widths[0]


@ALL_WIDTHS
def test_consecutive_radices_are_the_largest_that_fit_by_brute_force(widths: tuple[int, ...]) -> None:
    k = len(widths)
    for n in (2, 3, 7, 10, 37, 64, 100, 211, 1000):
        # A partition has at least two rows, and more rows than ids are of no use.
        unique = [m for m in range(k + 1, n + k + 30) if all_codes_differ(n, range(m, m - k, -1))]
        assert least_consecutive_bytes(n, widths, BYTES) == consecutive_cost(unique[0], widths)
        before = 0
        for limit in range(1, n * sum(widths), 1 + n // 40):
            rows = largest_consecutive(n, widths, limit, BYTES)
            fitting = [m for m in unique if consecutive_cost(m, widths) <= limit and m <= max(n, unique[0])]
            if not fitting:
                assert rows is None
                continue
            assert rows == tuple(range(fitting[-1], fitting[-1] - k, -1))
            assert fitting[-1] >= before
            before = fitting[-1]


def test_partitions_of_packed_rows_are_found_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one by one, however many ids there are: where bits fit and scales do not is an interval as long as √n."""
    calls, within = [0], RowFormat.rows_within

    def counted(self: RowFormat, limit: int, width: int) -> int:
        calls[0] += 1
        return within(self, limit, width)

    monkeypatch.setattr(RowFormat, "rows_within", counted)
    least_bytes.cache_clear()
    for n in (10**9 + 7, 10**12 + 39, 2**40):
        least = least_bytes(n, (16, 16), row_format("int4"))
        assert fewest_collisions(n, (16, 16), least, row_format("int4")) is not None
        assert fewest_collisions(n, (16, 16), least - 1, row_format("int4")) is None
    assert calls[0] < 10_000


def test_the_square_root_is_the_least_for_two_partitions() -> None:
    for n in (10**6, 2**24 + 1, 2**31, 10**10 + 7, 2**40, 2**40 + 1):
        around = range(max(2, int(sqrt(n)) - 3000), int(sqrt(n)) + 3000)
        assert least_bytes(n, (1, 1), BYTES) == min(c + -(-n // c) for c in around)
        # m and m − 1 have no common factor.
        assert least_consecutive_bytes(n, (1, 1), BYTES) == min(2 * m - 1 for m in around if m * (m - 1) >= n)


# ---- plans -----------------------------------------------------------------------------------------------------------

table_sizes = st.one_of(st.integers(1, 50), st.integers(51, 3000), st.integers(3001, 30_000))
groups = st.lists(st.tuples(table_sizes, st.integers(1, 9)), min_size=1, max_size=5)
methods = st.builds(
    Compositional,
    num_partitions=st.one_of(st.none(), st.integers(2, 8)),
    operation=st.sampled_from(OPERATIONS),
    radices=st.sampled_from(RADICES),
)


def configs(sizes: list[tuple[int, int]]) -> list[TableConfig]:
    return [TableConfig(f"t{i}", n, d) for i, (n, d) in enumerate(sizes)]


def own_bytes(tables: EmbeddingTables) -> int:
    tensors = [*tables.parameters(), *(b for name, b in tables.store.named_buffers() if "state" not in name)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


@settings(max_examples=150)
@given(groups, methods, st.floats(0.001, 1.0), st.booleans())
def test_plan_is_exact_or_names_its_floor(
    sizes: list[tuple[int, int]], method: Compositional, share: float, counted: bool
) -> None:
    tables = configs(sizes)
    full = sum(4 * n * d for n, d in sizes)
    counts = {t.name: np.arange(t.num_embeddings)[::-1] ** 2 for t in tables} if counted else None
    budget = max(1, int(share * full))
    try:
        solved = plan(tables, method, budget, counts, optimizer=None)
    except InfeasibleBudget as error:
        assert error.floor_bytes > budget
        solved = plan(tables, method, error.floor_bytes, counts, optimizer=None)
        assert solved.inference_bytes <= error.floor_bytes
        with pytest.raises(InfeasibleBudget):
            plan(tables, method, error.floor_bytes - 1, counts, optimizer=None)
        budget = error.floor_bytes
    assert solved.inference_bytes <= budget
    built = EmbeddingTables(solved)
    assert own_bytes(built) == solved.inference_bytes == built.memory().inference_bytes
    for table in tables:
        assert built.collision_share(table.name) == 0.0


@settings(max_examples=100)
@given(groups, methods, st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4))
def test_a_larger_budget_shrinks_no_table(
    sizes: list[tuple[int, int]], method: Compositional, shares: list[float]
) -> None:
    tables = configs(sizes)
    full = sum(4 * n * d for n, d in sizes)
    before = dict.fromkeys([t.name for t in tables], 0)
    feasible = False
    near = [int(share * full) + 1 for share in shares]
    for budget in sorted({b + more for b in near for more in (0, 1, 4, 7)}):
        try:
            lines = plan(tables, method, budget).lines()
        except InfeasibleBudget:
            assert not feasible
            continue
        feasible = True
        after = {line["table"]: line["inference_bytes"] for line in lines}
        assert all(after[name] >= before[name] for name in before)
        before = after
    assert plan(tables, method, full).inference_bytes == full


MOSTLY_USED = [(r, o) for r, o in product(RADICES, OPERATIONS) if (r, o) != ("quotient_remainder", "concat")]


@pytest.mark.parametrize(("radices", "operation"), MOSTLY_USED)
@pytest.mark.parametrize("share", [0.8, 0.5, 0.1, 0.03, 0.01])
def test_large_tables_use_their_budget(radices: str, operation: str, share: float) -> None:
    tables = [TableConfig("a", 100_000, 16), TableConfig("b", 1_000_000, 16), TableConfig("c", 300_000, 32)]
    solved = plan(tables, {"kind": "compositional", "radices": radices, "operation": operation}, share)
    assert solved.full_bytes is not None
    assert 0.95 * share * solved.full_bytes <= solved.inference_bytes <= share * solved.full_bytes


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("k", [None, 2, 4])
def test_partitions_share_the_budget_evenly_and_grow_with_it(operation: str, k: int | None) -> None:
    table = [TableConfig("a", 50_000, 16)]
    method = {
        "kind": "compositional",
        "operation": operation,
        "num_partitions": k,
        "radices": None if operation == "concat" else "chinese_remainder",
    }
    before = [0] * (k or 2)
    for share in np.geomspace(0.01, 0.95, 60):
        solved = plan(table, method, float(share))
        rows = solved.groups[0].layout.entries["a"].values["rows"]
        assert len(rows) == (k or 2)
        assert max(rows) - min(rows) == len(rows) - 1
        assert all(now >= then for now, then in zip(rows, before))
        # What is left would not do for a row more of each partition.
        widest = 16 if operation == "concat" else 16 * len(rows)
        assert solved.budget_bytes is not None and solved.budget_bytes - solved.inference_bytes < 4 * widest
        loads = [np.bincount(np.arange(50_000) % m, minlength=m) for m in rows]
        assert all(load.max() - load.min() <= 1 for load in loads)
        before = rows


def test_the_fewest_partitions_that_fit() -> None:
    table = [TableConfig("a", 10**6, 8)]

    def stored(rows: int, **fields: object) -> list[int]:
        entry = plan(table, {"kind": "compositional", **fields}, 32 * rows).groups[0].layout.entries["a"]
        return list(entry.values["rows"])

    assert [stored(n) for n in (2000, 500_002)] == [[1000, 1000], [500_000, 2]]
    assert [len(stored(n)) for n in (1999, 300, 299)] == [3, 3, 4]
    chinese = "chinese_remainder"
    assert stored(2001, radices=chinese) == [1001, 1000] and len(stored(2000, radices=chinese)) == 3
    # 101 · 100 · 99 codes are too few, and 102 and 100 have a factor in common.
    assert stored(306, radices=chinese) == [103, 102, 101] and len(stored(305, radices=chinese)) == 4
    assert stored(500_002, radices=chinese) == [250_001, 250_000]


def test_tables_too_small_to_gain_stay_full() -> None:
    solved = plan([TableConfig("tiny", 4, 8), TableConfig("large", 10**5, 8)], Compositional(num_partitions=4), "1%")
    assert solved.groups[0].layout.entries["tiny"].variant == "full"
    assert solved.groups[0].layout.entries["large"].variant == "mult of 4"


@pytest.mark.parametrize(
    "fields", [{"num_partitions": 1}, {"num_partitions": 9}, {"operation": "min"}, {"radices": "x"}]
)
def test_bad_fields_are_named(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"compositional, field '{next(iter(fields))}'"):
        Compositional(**fields)


# ---- codes -----------------------------------------------------------------------------------------------------------


def addresses(tables: EmbeddingTables, ids: list[int]) -> list[list[int]]:
    """Digits of each id, in the order of the partitions."""
    lookups = tables.lookups.blocks[0]
    found = torch.tensor(ids)
    parts = lookups.block.address(found, torch.zeros_like(found))
    rows = torch.cat([part.rows for part in parts], dim=-1)
    name = lookups.tables[0].name
    starts = [tables.store.start(f"{name}/{j}") for j in range(rows.shape[-1])]
    return (rows - torch.tensor(starts)).tolist()


def decode(digits: list[int], rows: list[int], radices: str) -> int:
    """The id that has these digits, in Python's integers."""
    if radices == "quotient_remainder":
        x = 0
        for digit, m in zip(reversed(digits), reversed(rows)):
            x = x * m + digit
        return x
    x, step = 0, 1
    for digit, m in zip(digits, rows):
        # The numbers with the digits so far are `step` apart, and one of the next m / g has this digit as well.
        g = gcd(step, m)
        x += step * ((digit - x) // g * pow(step // g, -1, m // g) % (m // g))
        step *= m // g
    return x


@pytest.mark.parametrize("radices", RADICES)
@pytest.mark.parametrize("k", [2, 3, 5, 8])
@pytest.mark.parametrize("n", [2**24 + 1000, 10**8, 2**31 + 1000, 2**40])
def test_every_code_beyond_2_24_leads_back_to_its_id(radices: str, k: int, n: int) -> None:
    method = Compositional(num_partitions=k, radices=radices)  # type: ignore[arg-type]
    tables = [TableConfig("a", n, 1)]
    floor = method.floor(plan(tables, method, 4 * 10**8).groups[0].group).num_bytes
    built = EmbeddingTables(plan(tables, method, int(1.3 * floor)), device="meta")
    built = EmbeddingTables(built.plan, device="cpu") if built.plan.inference_bytes < 10**8 else built
    rows = built.plan.groups[0].layout.entries["a"].values["rows"]
    edges = [2**24, 2**31, 10**8, n - 1, *rows, *(prod(rows[:i]) for i in range(1, k))]
    ids = sorted({x for edge in edges for x in range(edge - 50, edge + 50) if 0 <= x < n})
    ids += np.random.default_rng(0).integers(0, n, 2000).tolist()
    for x, digits in zip(ids, addresses(built, ids)):
        assert all(0 <= digit < m for digit, m in zip(digits, rows))
        assert decode(digits, rows, radices) == x


# ---- vectors ---------------------------------------------------------------------------------------------------------


def scalar_vector(tables: EmbeddingTables, name: str, x: int, method: Compositional) -> list[float]:
    """e(x), one scalar after the other."""
    group = tables.plan.groups[0]
    entry = group.layout.entries[name]
    if entry.variant == "full":
        return tables.store.slab(name)[x].tolist()
    rows, divisor, picked = entry.values["rows"], 1, []
    for j, m in enumerate(rows):
        picked.append(tables.store.slab(f"{name}/{j}")[x // divisor % m].tolist())
        divisor *= m if method.radices == "quotient_remainder" else 1
    if method.operation == "concat":
        return [value for row in picked for value in row]
    result = picked[0]
    for row in picked[1:]:
        result = [a * b if method.operation == "mult" else a + b for a, b in zip(result, row)]
    return result


CASES = [
    Compositional(num_partitions=k, operation=o, radices=r) for k, o, r in product((None, 2, 3), OPERATIONS, RADICES)
]  # type: ignore[arg-type]


@pytest.mark.parametrize("method", CASES, ids=str)
def test_ids_are_combined_first_and_pooled_after(method: Compositional) -> None:
    configs = [
        TableConfig("a", 500, 5, feature_names=["a1", "a2"]),
        TableConfig("b", 3, 5, pooling="mean"),
        TableConfig("c", 2000, 5, pooling="mean", on_out_of_range="oov", padding_idx=7),
        TableConfig("d", 90, 4),
    ]
    tables = EmbeddingTables(plan(configs, method, 0.3), std=0.7)
    generator = np.random.default_rng(1)
    lengths = generator.integers(0, 5, 5 * 4)
    sizes = [500, 500, 3, 2000, 90]
    values = np.concatenate([generator.integers(0, sizes[i // 4], length) for i, length in enumerate(lengths)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    weights = generator.normal(size=len(values)).astype(np.float32)
    values[offsets[12]] = 7 if lengths[12] else values[offsets[12]]
    values[offsets[13] : offsets[14]] = 5_000_000  # out of range, so the oov row
    found = tables(torch.tensor(values), torch.tensor(offsets), torch.tensor(weights))
    names, dims = ["a", "a", "b", "c", "d"], [5, 5, 5, 5, 4]
    expected = np.zeros((4, sum(dims)))
    for f, b in product(range(5), range(4)):
        start, stop = offsets[4 * f + b], offsets[4 * f + b + 1]
        kept = [i for i in range(start, stop) if not (names[f] == "c" and values[i] == 7)]
        total = np.zeros(dims[f])
        for i in kept:
            x = 2000 if names[f] == "c" and values[i] >= 2000 else int(values[i])
            total += weights[i] * np.array(scalar_vector(tables, names[f], x, method))
        expected[b, sum(dims[:f]) : sum(dims[: f + 1])] = total / (max(1, len(kept)) if names[f] in "bc" else 1)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    for name in "ad":
        dense = tables.to_dense(name)
        ids = torch.arange(dense.shape[0])
        assert torch.equal(dense[17], tables.to_dense(name, slice(17, 18))[0])
        expected_rows = [scalar_vector(tables, name, int(x), method) for x in ids[::7]]
        torch.testing.assert_close(dense[::7], torch.tensor(expected_rows))


@pytest.mark.parametrize("method", CASES[:6], ids=str)
def test_gradients_are_finite_differences(method: Compositional) -> None:
    configs = [TableConfig("a", 40, 3), TableConfig("b", 300, 3, pooling="mean")]
    tables = EmbeddingTables(plan(configs, method, 0.5, optimizer=None), std=0.5).double()
    ids = torch.tensor([1, 39, 1, 7, 250, 250, 3, 299])
    offsets = torch.tensor([0, 3, 4, 6, 8])
    out_weights = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss() -> torch.Tensor:
        return (tables(ids, offsets).sin() * out_weights).sum()

    loss().backward()
    step = 1e-6
    for parameter in tables.parameters():
        flat, grad = parameter.detach().view(-1), parameter.grad
        assert grad is not None and grad.abs().max() > 0
        for i in range(flat.numel()):
            value = flat[i].item()
            flat[i] = value + step
            up = loss().item()
            flat[i] = value - step
            down = loss().item()
            flat[i] = value
            assert abs((up - down) / (2 * step) - grad.view(-1)[i].item()) < 1e-6


@pytest.mark.parametrize("method", CASES, ids=str)
def test_outputs_start_with_the_standard_deviation_of_the_model(method: Compositional) -> None:
    configs = [TableConfig("a", 200_000, 16), TableConfig("b", 50, 16)]
    tables = EmbeddingTables(plan(configs, method, "20%"), std=0.02)
    assert tables.plan.groups[0].layout.entries["b"].variant == "full"
    rows = tables.plan.groups[0].layout.entries["a"].values["rows"]
    ids = torch.randint(200_000, (10_000, 1), generator=torch.Generator().manual_seed(3))
    found = tables(torch.cat([ids, ids % 50], dim=1)).detach()
    # With "mult" the small partitions only add noise near 1; in a sum or a concatenation their few rows show.
    scalars = max(rows) * 16 if method.operation == "mult" else min(rows) * tables.store.slab("a/1").shape[1]
    for columns, independent in ((slice(0, 16), scalars), (slice(16, 32), 50 * 16)):
        tolerance = max(0.05, 4 / sqrt(2 * independent))
        assert abs(found[:, columns].square().mean().sqrt().item() / 0.02 - 1) < tolerance
        assert abs(found[:, columns].mean().item()) < 4 * 0.02 / sqrt(independent)
