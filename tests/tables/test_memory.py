"""The print-out of ``memory()``: which operators run, and what dense gradients cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from embtables import Embedding, EmbeddingTables, TableConfig, compress_, ops, plan
from embtables.sizes.memory import Memory

CONFIGS = [TableConfig("user", 30_000, 16), TableConfig("item", 10_000, 16)]
FULL = 40_000 * 16 * 4


def tables_of(method: str = "full", optimizer: Any = None, sparse: bool = False) -> EmbeddingTables:
    budget = None if method == "full" else "10%"
    return EmbeddingTables(plan(CONFIGS, method, budget, optimizer=optimizer), sparse=sparse)


def test_dense_gradients_are_told_with_the_bytes_that_they_move() -> None:
    memory = tables_of().memory()
    assert memory.dense_gradient_bytes == FULL == 2_560_000
    first, second = str(memory).split("\n")
    assert "constants" in first
    assert second.startswith("optimizer=None: each step fills a gradient of 2.56 MB, and torch.optim passes over it")
    assert "(SGD moves 10.2 MB, Adam 20.5 MB)" in second
    assert 'optimizer="rowwise_adagrad"' in second and "sparse=True with SparseAdam or Adagrad" in second
    assert tables_of("hash").memory().dense_gradient_bytes == tables_of("hash").memory().by_kind["weights"]


@pytest.mark.parametrize(("optimizer", "sparse"), [("adam", False), (None, True)])
def test_what_makes_no_dense_gradient_says_nothing(optimizer: Any, sparse: bool) -> None:
    assert tables_of(optimizer=optimizer, sparse=sparse).memory().dense_gradient_bytes == 0
    assert "\n" not in str(tables_of(optimizer=optimizer, sparse=sparse).memory())


def test_served_tables_train_nothing() -> None:
    served = tables_of("pruned").finalize()
    assert served.memory().dense_gradient_bytes == 0 and "optimizer=None" not in str(served.memory())


class Whole(TorchDispatchMode):
    """Bytes that operators on whole weights, gradients and moments read and write."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.bytes = numel, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if "fused_adam" in name:
            weights, gradients, first, second = args[:4]
            self.bytes += sum(4 * t.numel() for t in (*weights, *gradients, *first, *second))  # read
            self.bytes += sum(4 * t.numel() for t in (*weights, *first, *second))  # written
        elif "new_zeros" in name or "zeros" in name:
            self.bytes += 4 * result.numel() if result.numel() == self.numel else 0
        return result


def test_adam_moves_what_the_line_says() -> None:
    tables = tables_of()
    optimizer = torch.optim.Adam(tables.parameters(), fused=True)
    ids = torch.randint(10_000, (8, 2))
    for _ in range(2):
        optimizer.zero_grad()
        with Whole(40_000 * 16) as whole:
            tables(ids).sum().backward()
            optimizer.step()
    assert whole.bytes == 8 * tables.memory().dense_gradient_bytes


def test_the_operators_in_use_are_told() -> None:
    memory = tables_of().memory()
    assert memory.ops == ops.backend() and f"; ops {ops.backend()}" in str(memory)
    assert Memory(1, 2, None, {"weights": 1}, 0).dense_gradient_bytes == 0


def test_one_line_users_choose_too() -> None:
    """``Embedding`` and ``compress_`` pass on a fused optimizer and sparse gradients."""
    assert "optimizer=None" in str(Embedding(1000, 8).tables.memory())
    assert "optimizer=None" not in str(Embedding(1000, 8, sparse=True).tables.memory())
    assert "optimizer=None" not in str(Embedding(1000, 8, optimizer="adam").tables.memory())
    for options, dense in [({}, True), ({"sparse": True}, False), ({"optimizer": "rowwise_adagrad"}, False)]:
        model = torch.nn.ModuleDict({"item": torch.nn.Embedding(1000, 8)})
        compress_(model, "hash", "50%", **options)  # type: ignore[arg-type]
        assert bool(model["item"].tables.memory().dense_gradient_bytes) == dense  # type: ignore[union-attr, operator]
