"""Memory that changes behind a lookup: weights, state and codes that move, arguments that are written over."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from core_cases import shuffled_counts
from torch import Tensor

from embtables import EmbeddingTables, TableConfig, ops, plan

NATIVE = pytest.mark.skipif(ops.instructions() is None, reason="the native library was not built")
TABLES = [
    TableConfig("item", 300, 8, ["item", "cart"], padding_idx=2),
    TableConfig("city", 40, 8, on_out_of_range="oov", pooling="mean"),
]
METHODS: list[Any] = [
    "full",
    "hash",
    "mixed_dimension",
    "frequency_cutoff",
    "compositional",
    {"kind": "multi_hash", "signs": True},
    {"kind": "robe", "signs": True},
]
OPTIMIZERS = [None, "sparse", "adagrad", "adam"]


def make(method: Any, optimizer: str | None) -> EmbeddingTables:
    budget = None if method == "full" else "40%"
    counts = {c.name: shuffled_counts(c.num_embeddings or 0) for c in TABLES}
    rule = None if optimizer == "sparse" else optimizer
    solved = plan(TABLES, method, budget, counts, rule)
    return EmbeddingTables(solved, std=0.5, sparse=optimizer == "sparse")


def bags(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flat ids of 3 features × 50 bags, their offsets, and weights."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (150,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(0, 40, (int(lengths.sum()),), generator=generator)
    return ids, offsets, torch.rand(len(ids), generator=generator)


def tensors(tables: EmbeddingTables) -> Iterator[Tensor]:
    """Everything that lookups read and updates write, learning rate and constants included."""
    yield from tables.parameters()
    yield from tables.buffers()


def states(tables: EmbeddingTables) -> list[Tensor]:
    gradients = [p.grad.to_dense() for p in tables.parameters() if p.grad is not None]
    return [*tables.state_dict().values(), *tables.optimizer_state_dict().values(), *gradients]


@NATIVE
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_tensors_may_move_at_any_time(method: Any, optimizer: str | None) -> None:
    """To another place before backward and back again before the next lookup, while others use the memory between."""
    moving = make(method, optimizer)
    staying = copy.deepcopy(moving)
    for seed in range(3):
        ids, offsets, weights = bags(seed)
        out = moving(ids, offsets, weights)
        expected = staying(ids, offsets, weights)
        assert torch.equal(out, expected)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
        here = [tensor.data for tensor in tensors(moving)]
        elsewhere = [tensor.clone() for tensor in here]
        for tensor, other, left in zip(tensors(moving), elsewhere, here):
            tensor.data = other
            left.fill_(1)
        out.backward(grad)
        expected.backward(grad)
        assert all(torch.equal(a, b) for a, b in zip(states(moving), states(staying)))
        for tensor, other, left in zip(tensors(moving), elsewhere, here):
            tensor.data = left.copy_(other)
            other.fill_(1)


@NATIVE
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_weight_that_became_smaller_is_not_read_beyond_its_end(optimizer: str | None) -> None:
    tables = make("full", optimizer)
    ids, offsets, weights = bags(0)
    out = tables(ids, offsets, weights)
    weight = next(t for name, t in tables.state_dict(keep_vars=True).items() if "weight" in name)
    weight.data = weight.data[:3].clone()
    with pytest.raises(RuntimeError, match="resized"):
        out.sum().backward()
    with pytest.raises(IndexError):
        tables(ids, offsets, weights)
