"""Mixed dimensions: widths follow the power law, and the budget is used up."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
import torch
from core_cases import falling_counts, shuffled_counts

from embtables import InfeasibleBudget, TableConfig, compress_, plan
from embtables.methods import MixedDimension

TABLES = [TableConfig("a", 3_000, 12), TableConfig("b", 500, 12), TableConfig("c", 200, 5)]
COUNTS = {"a": falling_counts(3_000), "b": 7 * falling_counts(500), "c": falling_counts(200)}
# No projection takes as many bytes as a scalar for each id of a block, so that every step makes the group larger.
FIRST, GROWTH = 150, 3


def blocks(counts: np.ndarray) -> list[tuple[int, float]]:
    """Ids and mean share of lookups of each block of a table, written out once more."""
    found, start, size = [], 0, FIRST
    while start < len(counts):
        own = [int(n) for n in counts[start : start + size]]
        found.append((len(own), (sum(own) + 1) / len(own) / (sum(counts) + 1)))
        start, size = start + size, size * GROWTH
    return found


def nearest(dim: int, width: float) -> int:
    """Of 1 … D the nearest to a width, on a logarithmic scale."""
    return min(range(1, dim + 1), key=lambda w: abs(np.log(w / width)))


@pytest.mark.parametrize(
    ("alpha", "scale"), [(0.03, 1.0), (0.11, 1.0), (0.37, 1.0), (0.83, 1.0), (1.0, 0.71), (1.0, 0.2)]
)
def test_widths_follow_the_power_law(alpha: float, scale: float) -> None:
    found = {name: blocks(counts) for name, counts in COUNTS.items()}
    top = max(p for own in found.values() for _, p in own)
    expected, narrow, num_bytes = {}, set(), 0
    for table in TABLES:
        dim = table.embedding_dim
        rows = [(n, nearest(dim, scale * dim * (p / top) ** alpha)) for n, p in found[table.name]]
        expected[table.name] = [(sum(n for n, _ in run), width) for width, run in groupby(rows, lambda row: row[1])]
        narrow |= {(width, dim) for _, width in rows if width < dim}
        num_bytes += sum(4 * n * width for n, width in rows)
    num_bytes += sum(4 * width * dim for width, dim in narrow)
    method = MixedDimension(first_block=FIRST, block_growth=GROWTH)
    for spare in (0, 3):  # bytes, too few for one scalar
        layout = plan(TABLES, method, num_bytes + spare, COUNTS).groups[0].layout
        for table in TABLES:
            values = layout.entries[table.name].values
            rows = values["rows"] if isinstance(values["rows"], list) else [values["rows"]]
            assert list(zip(rows, values.get("widths", [table.embedding_dim]))) == expected[table.name]


def test_ids_that_prepared_data_reserve_count_as_often_as_they_occur() -> None:
    counts = np.array([0, 0, 1_000_000, *[1] * 997])
    (_, _, share), *_ = MixedDimension(first_block=64)._blocks(1000, counts)
    assert share == pytest.approx((1_000_000 + 61 + 1) / 64 / (1_000_997 + 1))
    # Blocks of them alone are as popular as the next one, which is none the less for it.
    shares = [share for _, _, share in MixedDimension(first_block=1, block_growth=2)._blocks(1000, counts)]
    assert shares[:2] == pytest.approx([(1_000_000 + 1) / 2 / (1_000_997 + 1)] * 2)
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4", "binary", "int8/slab"])
@pytest.mark.parametrize("ranked", [None, True, False], ids=["no counts", "ranked", "unranked"])
def test_uses_the_budget(ranked: bool | None, precision: str) -> None:
    tables = [TableConfig("large", 120_000, 16), TableConfig("small", 900, 8)]
    make = falling_counts if ranked else shuffled_counts
    counts = None if ranked is None else {t.name: make(t.num_embeddings or 0) for t in tables}
    full = plan(tables, "full", precision=precision).inference_bytes
    try:
        plan(tables, "mixed_dimension", 1, counts, precision=precision)
    except InfeasibleBudget as error:
        floor = error.floor_bytes
    for budget in np.geomspace(1.01 * floor, full, 25).astype(int).tolist():
        solved = plan(tables, "mixed_dimension", budget, counts, precision=precision)
        assert 0.95 * budget <= solved.inference_bytes <= budget


def test_of_the_block_that_becomes_narrower_the_first_ids_keep_their_width() -> None:
    table = TableConfig("a", 1_000, 8)
    # All at width 3 and its projection, and the fourth scalar of 250 ids with the projection for width 4.
    solved = plan([table], "mixed_dimension", 4 * (3 * 1_000 + 3 * 8 + 4 * 8 + 250) + 3)
    assert solved.groups[0].layout.entries["a"].values == {"rows": [250, 750], "widths": [4, 3]}
    assert solved.inference_bytes == 4 * (3 * 1_000 + 3 * 8 + 4 * 8 + 250)


@pytest.mark.parametrize("ranked", [True, False])
def test_takes_over_what_a_trained_table_learned(ranked: bool) -> None:
    """Rows of width D are the trained vectors, narrower ones the best that a matrix can say, id by count."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Embedding(n, 6) for name, n in (("a", 300), ("b", 80))})
    with torch.no_grad():
        for module in model.values():
            module.weight.mul_(torch.tensor([1.0, 3, 0.5, 2, 0.1, 1]))
    before = {name: module.weight.detach().clone() for name, module in model.items()}
    make = falling_counts if ranked else shuffled_counts
    counts = {name: make(len(weight)) for name, weight in before.items()}
    report = compress_(model, MixedDimension(first_block=20), 6_000 if ranked else 6_000 + 2 * 380, frequencies=counts)
    assert report.kept == ["a", "b"] and report.anew == []
    layout = report.plan.groups[0].layout
    of_width: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
    for name, weight in before.items():
        order = np.argsort(-counts[name], kind="stable") if not ranked else np.arange(len(weight))
        found, start = model[name](torch.arange(len(weight))).detach(), 0
        for rows, width in zip(layout.entries[name].values["rows"], layout.entries[name].values["widths"]):
            ids = order[start : start + rows]
            of_width.setdefault(width, []).append((weight[ids], found[ids], torch.from_numpy(counts[name][ids] + 1)))
            start += rows
    assert len(of_width) >= 3 and 6 in of_width
    for width, pairs in of_width.items():
        wanted, held, shares = (torch.cat(column).double() for column in zip(*pairs))
        _, _, axes = torch.linalg.svd(wanted * shares.sqrt().unsqueeze(1), full_matrices=False)
        torch.testing.assert_close(held, wanted @ axes[:width].t() @ axes[:width], atol=1e-5, rtol=1e-4)
