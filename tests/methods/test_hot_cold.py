"""Hot ids and cold ones: which they are, how many, in how many bytes, and what is kept of trained tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import COLD, falling_counts, shuffled_counts
from scalar import rank_of

from embtables import EmbeddingTables, Plan, TableConfig, plan
from embtables.methods import HotCold, from_config
from embtables.methods.hot_cold import _lookups
from embtables.sizes.layout import FULL, Group

TABLES = [
    TableConfig("user", 900, 8, padding_idx=4),
    TableConfig("item", 500, 4, on_out_of_range="oov"),
    TableConfig("city", 12, 8),
]
COUNTS = {"user": falling_counts(900), "item": shuffled_counts(500), "city": 500 * falling_counts(12)}


def solve(budget: Any = "20%", *, precision: str | None = None, **fields: Any) -> Plan:
    return plan(TABLES, {"kind": "hot_cold", **fields}, budget, COUNTS, "adagrad", precision=precision)


def values(solved: Plan) -> dict[str, dict[str, Any]]:
    """What the entries of the tables say that are not in full."""
    entries = solved.groups[0].layout.entries
    return {name: dict(entry.values) for name, entry in entries.items() if entry.variant != FULL}


def by_rank(name: str) -> list[int]:
    """The ids of a table in the order of their ranks."""
    counts = [*COUNTS[name].tolist(), *[0] * (name == "item")]
    ranks = [rank_of(x, counts if name == "item" else None) for x in range(len(counts))]
    return sorted(range(len(counts)), key=ranks.__getitem__)


# ---- which and how many ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hot", [0.2, 0.55, 1.0])
def test_hot_ids_are_those_with_most_occurrences_per_byte_of_all_tables(hot: float) -> None:
    solved = solve("30%", hot=hot)
    found = values(solved)
    # The prepared order has two reserved ids in front, which count as the most frequent one.
    user = [max(COUNTS["user"])] * 2 + COUNTS["user"][2:].tolist()
    city = [max(COUNTS["city"])] * 2 + COUNTS["city"][2:].tolist()
    worth = [(c / 8, "user") for c in user[:-1]] + [(c / 8, "city") for c in city[:-1]]
    worth += [(c / 4, "item") for c in sorted(COUNTS["item"].tolist(), reverse=True)]
    worth.sort(key=lambda pair: -pair[0])
    number = sum(entry["hot_rows"] for entry in found.values()) + (11 if "city" not in found else 0)
    names = [name for _, name in worth[:number]]
    # Ids of equal worth may come in any order.
    last = sum(value == worth[number - 1][0] for value, _ in worth)
    for name, entry in found.items():
        assert abs(entry["hot_rows"] - names.count(name)) <= last
    tables = EmbeddingTables(solved, std=0.5)
    for name, entry in found.items():
        own = by_rank(name)[: entry["hot_rows"]]
        rows = tables.to_dense(name)[own]
        expected = tables.store.slab(f"{name}/hot")[: len(own)].clone()
        if name == "user" and 4 in own:
            expected[own.index(4)] = 0
        assert torch.equal(rows, expected)


@pytest.mark.parametrize("cold", ["hash", "unified", "robe"])
@pytest.mark.parametrize("hot", [0.0, 0.1, 0.37, 0.8])
def test_a_share_that_is_given_is_met_to_the_row(hot: float, cold: str) -> None:
    counts = {"a": falling_counts(20_000), "b": falling_counts(10_000)}
    tables = [TableConfig("a", 20_000, 8), TableConfig("b", 10_000, 8)]
    solved = plan(tables, {"kind": "hot_cold", "hot": hot, "cold": cold}, 200_000, counts, "adagrad")
    hot_bytes = 32 * sum(entry["hot_rows"] for entry in values(solved).values())
    assert hot * 200_000 - 32 < hot_bytes <= hot * 200_000
    assert 200_000 - 2 * 32 < solved.inference_bytes <= 200_000


# ---- how many, solved ------------------------------------------------------------------------------------------------


def explained(counts: list[int], row_of: list[int], shrinkage: float) -> float:
    """Σ_b N_b·S_b²/(S_b + κ/N_b) over rows b, S_b = Σ_{x in b} (c_x/N_b)²: one row after another."""
    total = 0.0
    for b in set(row_of):
        own = [c for c, row in zip(counts, row_of) if row == b and c]
        lookups = sum(own)
        if lookups:
            s = sum((c / lookups) ** 2 for c in own)
            total += lookups * s**2 / (s + shrinkage / lookups)
    return total


@pytest.mark.parametrize("hot", [0, 30, 290])
@pytest.mark.parametrize("rows", [1, 7, 60])
def test_the_objective_is_what_random_rows_explain_on_average(hot: int, rows: int) -> None:
    counts = (2000 // np.arange(1, 301)).astype(np.int64)
    counts[1] = counts[0]  # ids 0 and 1 are reserved, and count as the most frequent one
    group = Group("g", (TableConfig("t", 300, 4),), (counts,), 0)
    found = _lookups(group)[0].explained(hot, rows, 20.0)
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(60):
        row_of = [*range(hot), *(hot + generator.integers(rows, size=300 - hot)).tolist()]
        drawn.append(explained(counts.tolist(), row_of, 20.0))
    # A row has not the mean number of others beside each id, but more or fewer.
    assert found == pytest.approx(np.mean(drawn), rel=0.1)
    if rows == 1:
        assert found == pytest.approx(drawn[0], rel=1e-9)


def worth_of(solved: Plan, shrinkage: float) -> float:
    """The objective of a plan whose cold ids are hashed, one id at a time."""
    total = 0.0
    entries = solved.groups[0].layout.entries
    for table in TABLES:
        counts = [*COUNTS[table.name].tolist(), *[0] * (table.name == "item")]
        if table.name != "item":
            counts[:2] = [max(counts)] * 2
        counts.sort(reverse=True)
        entry = entries[table.name]
        in_full = entry.variant.endswith("full")
        h = len(counts) if entry.variant == FULL else entry.values["hot_rows"]
        cold = [float(c) for c in counts[h:]]
        t, q = sum(cold), sum(c * c for c in cold)
        for c in counts[:h]:
            total += c * c / (c + shrinkage) if c else 0
        for c in cold:
            m = float("inf") if in_full else entry.values["rows"]
            n = c + (t - c) / m
            if c:
                a = (c * c + (q - c * c) / m) / n
                total += c * c / n * a / (a + shrinkage)
    return total


@pytest.mark.parametrize("shrinkage", [3.0, 100.0])
@pytest.mark.parametrize("precision", ["int2", "fp16"])
def test_the_solved_division_is_the_best_of_those_that_are_tried(precision: str, shrinkage: float) -> None:
    """The budgets that the docstring names, at which each division of what is added is planned by its share."""
    cold = {"kind": "hash", "precision": precision}
    method = HotCold(cold=cold, shrinkage=shrinkage)
    group = Group("hot_cold", tuple(TABLES), tuple(_counts(t) for t in TABLES), 0)
    ranks = 4 * 501
    path = method._path(group)
    assert path[0][0] == method.floor(group).num_bytes
    divided = 0
    for (low, first), (high, chosen) in zip(path, path[1:]):
        assert high == 2 * low
        if high >= group.full_bytes:
            break
        worths = {}
        for part in range(9):
            share = 1 - (first + low * part // 8) / (high - ranks)
            other = solve(high, cold=cold, shrinkage=shrinkage, hot=min(1.0, max(0.0, share)))
            worths[first + low * part // 8] = worth_of(other, shrinkage)
        best = max(worths.values())
        # Shares are rounded, by which a row of one table may become one of another.
        assert worths[chosen] == pytest.approx(best, rel=2e-3)
        assert worth_of(solve(high, cold=cold, shrinkage=shrinkage), shrinkage) == pytest.approx(best, rel=2e-3)
        divided += first < chosen < first + low
    assert divided > 0 or precision == "fp16"


def _counts(table: TableConfig) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.append(COUNTS[table.name], 0) if table.name == "item" else COUNTS[table.name]


@pytest.mark.parametrize("budget", ["5%", "20%", "60%"])
def test_rows_of_one_price_go_to_the_most_frequent_ids(budget: str) -> None:
    """So that with cold ids in hashed rows, or in one, the tables are those of a cut-off by frequency."""
    counts = {"a": falling_counts(4000), "b": falling_counts(300)}
    tables = [TableConfig("a", 4000, 8), TableConfig("b", 300, 8)]
    cut_off = plan(tables, "frequency_cutoff", budget, counts).groups[0].layout.entries
    for cold in ("hash", "frequency_cutoff"):
        found = values(plan(tables, {"kind": "hot_cold", "cold": cold}, budget, counts))
        assert found and all(entry["hot_rows"] == cut_off[name].values["own_rows"] for name, entry in found.items())


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_hot_rows_cold_rows_and_ranks() -> None:
    solved = solve("40%", hot=0.5)
    found, rows = values(solved), {"user": 8, "item": 4, "city": 8}
    expected = 2 * 501 if "item" in found else 0
    for name, dim in rows.items():
        size = {"user": 900, "item": 501, "city": 12}[name]
        expected += 4 * dim * (found[name]["hot_rows"] + found[name]["rows"] if name in found else size)
    assert solved.inference_bytes == expected
    assert solved.bytes_by_kind()["index"] == 2 * 501


def test_small_tables_are_in_full_and_then_have_no_ranks() -> None:
    counts = {"large": shuffled_counts(3000), "small": 100 * shuffled_counts(20)}
    tables = [TableConfig("large", 3000, 8), TableConfig("small", 20, 8)]
    solved = plan(tables, {"kind": "hot_cold", "hot": 0.5}, "30%", counts)
    assert solved.groups[0].layout.entries["small"].variant == FULL
    assert solved.bytes_by_kind()["index"] == 2 * 3000
    dense = EmbeddingTables(solved, std=0.5).to_dense("large")
    first = int(np.argmax(counts["large"]))
    assert not any(torch.equal(dense[first], dense[x]) for x in range(3000) if x != first)


@pytest.mark.parametrize("cold", COLD)
def test_hot_and_cold_rows_have_precisions_of_their_own(cold: str, tmp_path: Path) -> None:
    solved = solve("25%", cold={"kind": cold, "precision": "int2"}, hot=0.7, precision="int8")
    formats = {slab.name: slab.format for slab in solved.groups[0].layout.serving.slabs}
    hot = {name for name in formats if name.endswith("/hot")}
    full = {name for name, entry in solved.groups[0].layout.entries.items() if entry.variant == FULL}
    assert hot and all(formats[name] == "int8" for name in hot | full)
    assert all(formats[name] == "int2" for name in set(formats) - hot - full)
    tables = EmbeddingTables(solved, std=0.5)
    tables.save(tmp_path / "tables")
    again = EmbeddingTables.load(tmp_path / "tables")
    ids = torch.tensor([[0, 0, 0], [899, 500, 11], [17, 250, 3]])
    assert torch.equal(again(ids), tables.finalize()(ids))
    assert again.memory().inference_bytes == solved.inference_bytes


# ---- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cold", COLD)
def test_hot_rows_of_trained_tables_are_taken_over(cold: str) -> None:
    solved = solve("35%", cold=cold, hot=0.6)
    tables, g = EmbeddingTables(solved, std=0.5), solved.groups[0]
    generator = torch.Generator().manual_seed(0)
    weights = {t.name: torch.randn(t.num_embeddings or 0, t.embedding_dim, generator=generator) for t in TABLES}
    with torch.no_grad():
        kept = g.method.keep(g.layout, g.group, tables.store, weights)
    assert kept
    for table in TABLES:
        dense, entry = tables.to_dense(table.name), g.layout.entries[table.name]
        hot = (
            range(table.num_embeddings or 0)
            if entry.variant == FULL
            else by_rank(table.name)[: entry.values["hot_rows"]]
        )
        assert (table.name in kept) == bool(len(hot))
        for x in set(hot) - {table.padding_idx}:
            assert torch.equal(dense[x], weights[table.name][x])


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cold": "hot_cold"}, "field 'cold': the cold ids of hot_cold cannot be looked up by hot_cold once more"),
        ({"cold": "pruned"}, "field 'cold': method pruned says more than a recipe can"),
        ({"cold": "nope"}, "field 'cold': unknown method 'nope'"),
        ({"cold": {"kind": "hash", "rows": 3}}, "field 'cold': method hash has no field 'rows'"),
        ({"cold": "mixed_dimension"}, "its cold method mixed_dimension has ranges of ranks of its own"),
        (
            {"cold": {"kind": "low_rank", "inner_dim": 8}},
            "method hot_cold: its cold method low_rank trains another form",
        ),
        ({"hot": 1.5}, "method hot_cold, field 'hot'.*less than or equal to 1, not 1.5"),
        ({"hot": float("nan")}, "method hot_cold, field 'hot'"),
        ({"shrinkage": 0}, "method hot_cold, field 'shrinkage'.*greater than 0"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve("20%", **fields)


def test_a_cold_method_refuses_what_it_always_does() -> None:
    with pytest.raises(ValueError, match="robe shares single scalars"):
        plan(TABLES, {"kind": "hot_cold", "cold": "robe"}, "20%", COUNTS, "rowwise_adagrad")


def test_it_is_plain_data_with_its_cold_method_in_it() -> None:
    method = HotCold(cold={"kind": "unified", "width": 2, "precision": "int4"}, hot=0.25)
    data = method.to_dict()
    assert data["cold"] == {"kind": "unified", "width": 2, "precision": "int4"}
    assert from_config(data) == method and HotCold() == from_config("hot_cold")
