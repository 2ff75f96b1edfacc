"""The ranks of ids that are not numbered by frequency."""

from __future__ import annotations

import numpy as np
import pytest
from core_cases import shuffled_counts
from scalar import rank_of

from embtables import EmbeddingTables, TableConfig, plan


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
