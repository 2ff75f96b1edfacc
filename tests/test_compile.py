"""The lookup under torch.compile and torch.export: the operators live under torch.library."""

from __future__ import annotations

import copy

import pytest
import torch

from embtables import EmbeddingTables, TableConfig, plan

# Ids out of range go to the oov row: raising for them depends on the data, which a whole graph cannot.
TABLES = [
    TableConfig("user", 5000, 16, on_out_of_range="oov"),
    TableConfig("item", 300, 16, on_out_of_range="oov"),
]
METHODS = ["full", "hash", "multi_hash", "unified", "robe"]


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> None:
    """Each case compiles the same code for other tables, of which torch allows eight."""
    torch._dynamo.reset()


def make(method: str, optimizer: str | None) -> EmbeddingTables:
    return EmbeddingTables(plan(TABLES, method, None if method == "full" else "10%", optimizer=optimizer))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_compiled_steps_leave_the_same_weights_as_eager_ones(method: str, l2: float) -> None:
    tables = make(method, "adagrad")
    tables.regularize(l2, {table.name: range(table.num_embeddings or 0) for table in TABLES})
    twin = copy.deepcopy(tables)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    start = tables.to_dense("user")
    for _ in range(3):
        ids = torch.randint(300, (32, 2), generator=generator)
        outputs = tables(ids), compiled(ids)
        assert torch.equal(*outputs)
        for output in outputs:
            output.square().sum().backward()
    assert not torch.equal(tables.to_dense("user"), start)
    for (name, weight), (_, other) in zip(tables.store.named_slabs(), twin.store.named_slabs()):
        assert torch.equal(weight, other), name


@pytest.mark.parametrize("method", METHODS)
def test_exported_lookup_equals_the_module(method: str) -> None:
    tables = make(method, None).eval()
    ids = torch.randint(300, (32, 2))
    program = torch.export.export(tables, (ids,))
    assert torch.equal(program.module()(ids), tables(ids))
