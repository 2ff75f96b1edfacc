"""Bands: what the rows of an id are worth, and that the budget goes where it is worth most."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from core_cases import counted_bytes, falling_counts, shuffled_counts
from native_cases import BACKENDS

from embtables import SGD, EmbeddingTables, Plan, TableConfig, compress_, ops, plan
from embtables.formats import FORMATS, FP32, RowFormat, row_format
from embtables.methods import Banded
from embtables.methods.banded import Choice, choices

Counts = npt.NDArray[np.int64]


def kinds_of(method: Banded, rows_in: RowFormat, dim: int) -> list[Choice]:
    assert method.widths is not None
    return choices(rows_in, [row_format(each) for each in method.precisions], dim, method.widths, method.decay)


def bands(solved: Plan, name: str) -> list[tuple[int, int, str]]:
    """(rows, width, precision) of each band of a table that is not stored in full."""
    values = solved.groups[0].layout.entries[name].values
    return list(zip(values["rows"], values["widths"], values["precisions"]))


def kind_of_each(solved: Plan, table: TableConfig, top: str = "fp32") -> list[tuple[int, str] | None]:
    """Width and precision of each rank of a table; ``None`` where it has no row."""
    n, entry = int(table.rows or 0), solved.groups[0].layout.entries[table.name]
    if entry.variant == "full":
        return [(table.embedding_dim, top)] * n
    own: list[tuple[int, str] | None] = [(w, p) for rows, w, p in bands(solved, table.name) for _ in range(rows)]
    return own + [None] * (n - len(own))


# ---- what a row keeps ------------------------------------------------------------------------------------------------


def kept(method: Banded, precision: str, width: int) -> float:
    """What a full-width row of this precision keeps, of one that keeps everything."""
    return {c.level.format.name: c.kept for c in kinds_of(method, FP32, width)}[precision]


def test_what_is_kept_is_what_rounding_leaves_of_gaussian_rows() -> None:
    # Max, "Quantizing for minimum distortion", IRE Trans. IT 6, 1960: equally spaced levels, one and two bits.
    whole = Banded(widths=())
    assert kept(whole, "binary", 64) == pytest.approx(2 / np.pi, rel=0.02)
    assert kept(whole, "int2", 64) == pytest.approx(1 - 0.1188, rel=0.02)
    rows = np.random.default_rng(5).standard_normal((4_000, 64))
    for precision, steps in (("int4", 7), ("int8", 127)):
        scale = np.abs(rows).max(axis=1, keepdims=True) / steps
        error = float(np.square(np.round(rows / scale) * scale - rows).sum() / np.square(rows).sum())
        assert 1 - kept(whole, precision, 64) == pytest.approx(error, rel=0.05)
    assert kept(whole, "fp32", 64) == 1


def test_of_kinds_of_rows_those_are_chosen_that_no_mixture_of_others_beats() -> None:
    for top, dim in product(("fp32", "int8", "int4/slab"), (1, 2, 5, 16, 40)):
        method = Banded(precisions=tuple(FORMATS), widths=(1, 2, 3, 8, 20))
        found = kinds_of(method, row_format(top), dim)
        assert found[0].bits == found[0].kept == 0
        assert (found[-1].level.width, found[-1].level.format.name) == (dim, top)
        slopes = [(b.kept - a.kept) / (b.bits - a.bits) for a, b in zip(found, found[1:])]
        assert slopes == sorted(slopes, reverse=True) and slopes[-1] > 0
        # No other kind lies above the line through the two next to it.
        bits, keeps = np.array([c.bits for c in found]), np.array([c.kept for c in found])
        for precision, width in product(FORMATS, {w for w in (1, 2, 3, 8, 20, dim) if w <= dim}):
            alone = Banded(precisions=(precision,), widths=(width,) if width < dim else ())
            for choice in kinds_of(alone, row_format(top), dim)[1:-1]:
                assert choice.kept <= np.interp(choice.bits, bits, keeps) * (1 + 1e-9)


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.5])
def test_a_narrow_row_keeps_its_part_of_the_variance(decay: float) -> None:
    method = Banded(precisions=(), widths=(1, 2, 4), decay=decay)
    found = {c.level.width: c.kept for c in kinds_of(method, FP32, 8)}
    whole = sum(j**-decay for j in range(1, 9))
    expected = {w: sum(j**-decay for j in range(1, w + 1)) / whole for w in (1, 2, 4, 8)}
    # Where all directions count alike, a narrow row is as good as a part of the wide ones: there are no others then.
    assert found == pytest.approx({8: 1.0} if decay == 0 else expected)


def test_by_default_rows_have_quarters_of_the_dimension_where_projections_are_little() -> None:
    def widths_of(rows: int, dim: int, precision: str | None = None) -> set[int]:
        tables, counts = [TableConfig("a", rows, dim)], {"a": falling_counts(rows)}
        budgets = (8 * dim * dim + rows * dim // part for part in (2, 5))
        solved = [plan(tables, "banded", budget, counts, precision=precision) for budget in budgets]
        return {width for each in solved for _, width, _ in bands(each, "a")}

    for precision in (None, "int8"):  # of full tables it is in any case fp32 that counts
        assert widths_of(10_000, 16, precision) == {4, 8, 12, 16}
    assert widths_of(50_000, 10) == {2, 5, 7, 10}
    assert widths_of(10_000, 3) == {1, 2, 3}
    assert widths_of(10_000, 1) == {1}
    # 4 · 16 · (4 + 8 + 12) bytes of projections are 1/200 of 4,800 rows of 64 bytes.
    assert widths_of(4_800, 16) == {4, 8, 12, 16} and widths_of(4_799, 16) == {16}


def level_counts(rows: int) -> Counts:
    """3,500 ids that occur equally often, and no others: in 4 columns of 4 bits they take 7,110 bytes."""
    return np.where(np.arange(rows) < 3_500, 50, 0)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("rows", "make"),
    [(4_800, falling_counts), (30_000, falling_counts), (4_800, shuffled_counts), (4_800, level_counts)],
)
def test_by_default_small_budgets_have_whole_rows_and_are_used(
    rows: int, make: Callable[[int], Counts], precision: str
) -> None:
    """Projections of 1,536 bytes are worth it from five times as much on. Of the widest, 768 bytes, all can be left."""
    tables = [TableConfig("a", rows, 16), TableConfig("b", 40, 3)]
    counts = {t.name: make(t.num_embeddings or 0) for t in tables}
    ranks = 2 * (rows + 40) if make is shuffled_counts else 0
    used = []
    for budget in sorted({*np.geomspace(100, 40_000, 60).astype(int).tolist(), *range(7_500, 9_300, 40), 7_679, 7_680}):
        solved = plan(tables, "banded", ranks + budget, counts, precision=precision)
        used.append(solved.inference_bytes - ranks)
        assert budget - used[-1] <= (64 if budget < 7_680 else 768 + 64)
        if budget < 7_680 or budget > 7_680 + 768:
            like = Banded(widths=() if budget < 7_680 else (4, 8, 12))
            expected = plan(tables, like, ranks + budget, counts, precision=precision)
            assert solved.groups[0].layout == expected.groups[0].layout
    assert used == sorted(used)


# ---- the division of the budget --------------------------------------------------------------------------------------

# Rows of their own scales, so that the bytes of a table are the sum of those of its rows.
PRECISIONS = ("int8/1", "int4/1", "binary/1")


def worth(count: int, prior_count: float, share: float) -> float:
    return count * count / (count + prior_count) * share if count else 0.0


@pytest.mark.parametrize(
    ("precisions", "prior_count"), [(PRECISIONS, 0.0), (PRECISIONS, 100.0), (("int4/1",), 5.0), ((), 5.0)]
)
def test_no_other_division_of_the_same_bytes_is_worth_more(precisions: tuple[str, ...], prior_count: float) -> None:
    """All divisions of all budgets, one by one."""
    tables = [TableConfig("a", 3, 8), TableConfig("b", 3, 16)]
    counts = {"a": np.array([90, 90, 30]), "b": np.array([200, 200, 5])}
    method = Banded(precisions=precisions, widths=(), prior_count=prior_count)
    kinds = {t.name: kinds_of(method, FP32, t.embedding_dim) for t in tables}
    ids = [(t.name, int(n)) for t in tables for n in counts[t.name]]
    best: dict[int, float] = {}
    for chosen in product(*([(c.kept, int(c.bits) // 8) for c in kinds[name]] for name, _ in ids)):
        num_bytes = sum(own for _, own in chosen)
        total = sum(worth(n, prior_count, share) for (_, n), (share, _) in zip(ids, chosen))
        best[num_bytes] = max(best.get(num_bytes, 0.0), total)
    unused = []
    for budget in range(1, max(best) + 10):
        solved = plan(tables, method, budget, counts)
        found = 0.0
        for table in tables:
            share = {(c.level.width, c.level.format.name): c.kept for c in kinds[table.name]}
            for n, kind in zip(counts[table.name], kind_of_each(solved, table)):
                found += worth(int(n), prior_count, share[kind]) if kind else 0.0
        attainable = max(value for num_bytes, value in best.items() if num_bytes <= solved.inference_bytes)
        assert found == pytest.approx(attainable, rel=1e-12)
        unused.append(budget - solved.inference_bytes)
    assert max(unused[:-10]) < 64  # less than the largest row


@pytest.mark.parametrize("widths", [(), (2, 4)])
@pytest.mark.parametrize("ranked", [True, False])
def test_a_larger_budget_moves_no_id_down(ranked: bool, widths: tuple[int, ...]) -> None:
    tables = [TableConfig("a", 300, 8), TableConfig("b", 120, 16, on_out_of_range="oov"), TableConfig("c", 40, 8)]
    make = falling_counts if ranked else shuffled_counts
    counts = {t.name: make(t.num_embeddings or 0) for t in tables}
    method = Banded(widths=widths, prior_count=10)
    order: dict[str, dict[Any, int]] = {}
    for t in tables:
        kinds = kinds_of(method, FP32, t.embedding_dim)[1:]
        order[t.name] = {None: 0} | {(c.level.width, c.level.format.name): i for i, c in enumerate(kinds, 1)}
    least = {t.name: np.zeros(t.rows or 0, dtype=np.int64) for t in tables}
    for budget in range(2_000, 20_000, 89):
        solved = plan(tables, method, budget, counts)
        for t in tables:
            now = np.array([order[t.name][kind] for kind in kind_of_each(solved, t)])
            assert (now >= least[t.name]).all() and (np.diff(now) <= 0).all()
            least[t.name] = now
    assert solved.inference_bytes == solved.full_bytes


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4", "binary", "int8/slab"])
@pytest.mark.parametrize("widths", [(), (1, 4, 8)])
def test_uses_the_budget(precision: str, widths: tuple[int, ...]) -> None:
    tables = [TableConfig("large", 150_000, 16), TableConfig("other", 100_000, 10), TableConfig("small", 900, 8)]
    counts = {t.name: falling_counts(t.num_embeddings or 0) for t in tables}
    full = plan(tables, "full", precision=precision).inference_bytes
    # A projection, which is only paid for as a whole, is little at any of these budgets.
    for budget in np.geomspace(full / (100 if widths else 2_000), full, 25).astype(int).tolist():
        solved = plan(tables, Banded(widths=widths), budget, counts, precision=precision)
        assert 0.95 * budget <= solved.inference_bytes <= budget


def test_with_one_precision_it_is_the_cut_off() -> None:
    tables = [TableConfig("a", 3_000, 8), TableConfig("b", 500, 16)]
    counts = {"a": np.arange(3_000, 0, -1), "b": 20 * np.arange(500, 0, -1) + 1}
    for budget in (4_000, 13_000, 40_000, 100_000):
        cut_off = plan(tables, "frequency_cutoff", budget, counts)
        # Without the rows that rare ids share there.
        banded = plan(tables, Banded(precisions=(), widths=(), prior_count=0), budget - 4 * (8 + 16), counts)
        for name in counts:
            rows = cut_off.groups[0].layout.entries[name].values["own_rows"]
            assert bands(banded, name) == ([(rows, 8 if name == "a" else 16, "fp32")] if rows else [])


def test_precision_is_that_of_the_most_frequent_ids() -> None:
    tables = [TableConfig("a", 5_000, 16)]
    counts = {"a": falling_counts(5_000)}
    for precision, lower in (("fp32", {"int8", "int4", "binary"}), ("int8", {"int4", "binary"}), ("binary", set())):
        found = set()
        for budget in ("0.2%", "1%", "2.5%", "5%", "20%"):
            method = Banded(precisions=("int8", "int4", "binary"), widths=())
            solved = plan(tables, method, budget, counts, precision=precision)
            own = [slab.format for slab in solved.groups[0].layout.serving.slabs]
            assert own == sorted(own, key=lambda name: -row_format(name).slab_bytes(64, 16))
            found |= set(own)
        assert found == {precision} | lower


# ---- the module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(), (3,)])
@pytest.mark.parametrize("ranked", [True, False])
def test_takes_over_what_a_trained_table_learned(ranked: bool, widths: tuple[int, ...]) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Embedding(400, 6)})
    before = model["a"].weight.detach().clone()
    counts = {"a": falling_counts(400) if ranked else shuffled_counts(400)}
    method = Banded(precisions=("int8",), widths=widths)
    report = compress_(model, method, 900 + (0 if ranked else 2 * 401), frequencies=counts, on_out_of_range="oov")
    assert report.kept == ["a"]
    order = np.arange(400) if ranked else np.argsort(-counts["a"], kind="stable")
    found = model["a"](torch.arange(400)).detach()
    start = 0
    for rows, width, _ in bands(report.plan, "a"):
        own = order[start : start + rows]
        assert torch.equal(found[own], before[own]) == (width == 6)
        start += rows
    assert 0 < start < 400 and {width for _, width, _ in bands(report.plan, "a")} == {6, *widths}
    rest = torch.from_numpy(order[start:].copy())
    assert not found[rest].any()


@pytest.mark.parametrize("trained", [True, False])
def test_a_table_without_any_row_is_not_said_to_be_kept(trained: bool) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Embedding(100, 4), "b": torch.nn.Embedding(50, 4)})
    counts = {"a": falling_counts(100), "b": np.zeros(50, dtype=np.int64)}
    report = compress_(model, "banded", 60, frequencies=counts, trained=trained)
    assert bands(report.plan, "a") and not bands(report.plan, "b")
    assert (report.kept, report.anew) == (["a"], ["b"])


def test_each_band_is_served_in_its_precision() -> None:
    table = TableConfig("a", 2_000, 16)
    solved = plan([table], "banded", "6%", {"a": falling_counts(2_000)})
    assert {p for _, _, p in bands(solved, "a")} >= {"int8", "int4", "int2", "binary"}
    tables = EmbeddingTables(solved, std=0.3)
    trained = tables.to_dense("a").detach()
    tables.finalize()
    assert counted_bytes(tables) == solved.inference_bytes
    served, start = tables.to_dense("a"), 0
    for rows, _, precision in bands(solved, "a"):
        own = trained[start : start + rows]
        packed = EmbeddingTables(plan([TableConfig("t", rows, 16)], "full", precision=precision))
        packed.store.slab("t").copy_(own)
        packed.finalize()
        assert torch.equal(served[start : start + rows], packed.to_dense("t"))
        start += rows
    assert 0 < start < 2_000 and not trained[start:].any() and not served[start:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranked", [True, False])
def test_ids_without_a_row_have_zeros_and_no_updates(ranked: bool, backend: str) -> None:
    tables = [TableConfig("a", 50, 8, pooling="mean"), TableConfig("b", 31, 8)]
    # No row at all in one table; in the other rows for all ids, but not of one kind.
    counts = {"a": np.zeros(50, dtype=np.int64), "b": (falling_counts if ranked else shuffled_counts)(31) + 1}
    solved = plan(tables, Banded(precisions=("int8",), prior_count=0), 500, counts, SGD(1.0))
    assert bands(solved, "a") == [] and sum(rows for rows, _, _ in bands(solved, "b")) == 31
    assert len(bands(solved, "b")) == 2
    with ops.using(backend):
        built = EmbeddingTables(solved, std=0.1)
        before = built.to_dense("b").clone()
        ids = torch.tensor([[3, 29], [49, 0], [3, 30]])
        vectors = built(ids)
        assert not vectors[:, :8].any() and torch.equal(vectors[:, 8:], before[[29, 0, 30]])
        vectors.sum().backward()
        assert not built.to_dense("a").any()
        moved = (before - built.to_dense("b")).abs().sum(dim=1).nonzero().flatten()
        assert moved.tolist() == [0, 29, 30]
        assert not built.finalize().to_dense("a").any()
