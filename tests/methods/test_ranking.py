"""The ranks of ids that are not numbered by frequency."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from core_cases import shuffled_counts
from scalar import rank_of

from embtables import EmbeddingTables, TableConfig, plan
from embtables.formats import row_format
from embtables.methods.ranking import ByWorth
from embtables.sizes.layout import Group


@pytest.mark.parametrize(("ids", "dtype"), [(255, "uint8"), (256, "uint8"), (257, "int16"), (2**15 + 1, "int32")])
@pytest.mark.parametrize("method", ["frequency_cutoff", "mixed_dimension", "banded"])
def test_ranks_take_as_many_bytes_as_the_largest_table_needs(method: str, ids: int, dtype: str) -> None:
    tables = [TableConfig("small", 90, 16), TableConfig("large", ids - 1, 16, on_out_of_range="oov")]
    counts = {t.name: shuffled_counts(t.num_embeddings or 0) for t in tables}
    solved = plan(tables, method, "60%", counts)
    (code,) = solved.groups[0].layout.serving.codes
    assert (code.dtype, code.shape) == (dtype, (90 + ids,))
    assert solved.bytes_by_kind()["index"] == (90 + ids) * np.dtype(dtype).itemsize
    ranks = EmbeddingTables(solved).store.code(code.name).tolist()
    own = counts["large"].tolist() + [0]
    assert ranks[90 + ids - 1] == ids - 1
    assert [ranks[90 + x] for x in range(0, ids, ids // 9)] == [rank_of(x, own) for x in range(0, ids, ids // 9)]


@pytest.mark.parametrize("precision", ["fp32", "int4", "binary"])
def test_ids_by_worth_are_those_of_one_sorted_list(precision: str) -> None:
    generator = np.random.default_rng(4)
    tables = [
        TableConfig(name, rows, dim) for name, rows, dim in (("a", 90, 16), ("b", 1, 4), ("c", 40, 3), ("d", 2, 8))
    ]
    counts = [np.sort(generator.integers(0, 12, t.num_embeddings))[::-1] for t in tables]
    counts[2] = generator.permutation(counts[2])  # whose ids are no ranks
    group = Group("g", tuple(tables), tuple(counts), 0, row_format(precision))
    bits = group.format.mean_bits(group.dims)
    by_hand = []
    for t, own in enumerate(counts):
        ranked = sorted(own.tolist(), reverse=True)
        ranked[:2] = [max(ranked)] * len(ranked[:2])  # as prepared data reserve them
        by_hand += [(-n / bits[t], t) for n in ranked[:-1]]
    order = [t for _, t in sorted(by_hand)]
    found = ByWorth.of(group)
    for number in range(len(order) + 1):
        assert found.first(number).tolist() == [order[:number].count(t) for t in range(len(tables))]
    for limit in range(0, int(group.rows_bytes(group.num_rows).sum()), 7):
        most = found.most(limit, group.rows_bytes)
        assert group.rows_bytes(most).sum() <= limit or not most.any()
        assert most.sum() == len(order) or group.rows_bytes(found.first(int(most.sum()) + 1)).sum() > limit


@pytest.mark.parametrize("method", ["frequency_cutoff", "hot_cold", "banded"])
def test_planning_takes_little_memory_beside_the_counts(method: str) -> None:
    counts = {"a": np.sort(np.random.default_rng(0).zipf(1.5, 10**6).clip(max=10**4))[::-1].copy()}
    tables = [TableConfig("a", 10**6, 16)]
    tracemalloc.start()
    plan(tables, method, "5%", counts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * counts["a"].nbytes
