"""What signs do to what all ids have in common."""

from __future__ import annotations

import pytest
import torch

from embtables import EmbeddingTables, TableConfig, plan


@pytest.mark.parametrize("operation", ["sum", "mean"])
@pytest.mark.parametrize("num_hashes", [2, 3])
def test_signs_cancel_what_all_ids_have_in_common(operation: str, num_hashes: int) -> None:
    """With every row at 1, an id is a sum of k ones, or of k signs: their mean over n ids has a deviation of √(k/n)."""
    num_embeddings = 20_000
    for signs in (False, True):
        method = {"kind": "multi_hash", "operation": operation, "num_hashes": num_hashes, "signs": signs}
        tables = EmbeddingTables(plan([TableConfig("item", num_embeddings, 4)], method, "10%"))
        for name, _ in tables.store.named_slabs():
            tables.store.slab(name).data.fill_(1.0)
        factor = num_hashes if operation == "mean" else 1
        sums = tables.to_dense("item")[:, 0].double() * factor
        if not signs:
            torch.testing.assert_close(sums, torch.full_like(sums, num_hashes), rtol=1e-6, atol=0)
            continue
        assert set(sums.round().tolist()) == set(range(-num_hashes, num_hashes + 1, 2))
        assert abs(float(sums.mean())) < 5 * (num_hashes / num_embeddings) ** 0.5
