"""The lookup under torch.compile and torch.export: the operators live under torch.library."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from embtables import EmbeddingTables, TableConfig, plan

TABLES = [
    TableConfig("user", 5000, 16),
    TableConfig("item", 300, 16, on_out_of_range="oov"),
]
METHODS = ["full", "hash", "multi_hash", "unified", "robe"]


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> None:
    """Each case compiles the same code for other tables, of which torch allows eight."""
    torch._dynamo.reset()


def make(method: str, optimizer: str | None) -> EmbeddingTables:
    return EmbeddingTables(plan(TABLES, method, None if method == "full" else "10%", optimizer=optimizer))


@pytest.mark.parametrize(("method", "l2"), [*((m, 0.0) for m in METHODS), ("hash", 0.3)])
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


@pytest.mark.parametrize("how", ["compiled", "exported"])
def test_a_graph_refuses_ids_out_of_range(how: str) -> None:
    tables = make("hash", None).eval()
    ids = torch.randint(300, (32, 2))
    graph: Any
    if how == "compiled":
        graph = torch.compile(tables, fullgraph=True, backend="aot_eager")
    else:
        graph = torch.export.export(tables, (ids,)).module()
    ids[3, 1] = 300
    assert torch.equal(graph(ids), tables(ids))
    ids[5, 0] = -2
    # What is exported runs where this package is not, with PyTorch's own check, which cannot show an id.
    error, message = (
        (IndexError, "feature 'user' holds id -2, but table 'user' has the ids 0 … 4999")
        if how == "compiled"
        else (RuntimeError, "an id is out of range; the ids of the features: 'user' 0 … 4999")
    )
    with pytest.raises(error, match=message):
        graph(ids)


@pytest.mark.parametrize("pending", ["compositional", "multi_hash"])
@pytest.mark.parametrize("l2", [0.0, 0.3])  # the operator of whole lookups, and that of rows
def test_compiled_steps_while_another_lookup_waits_for_its_backward(pending: str, l2: float) -> None:
    """Of a product of rows, which has to know of all updates; compiling has no memory at which it could see them."""
    waiting = make(pending, "sgd")
    twin = copy.deepcopy(waiting)
    ids = torch.randint(300, (32, 2), generator=torch.Generator().manual_seed(0))
    output, expected = (tables(ids).square().sum() for tables in (waiting, twin))
    tables = make("hash", "adagrad")
    tables.regularize(l2, {table.name: range(table.num_embeddings or 0) for table in TABLES})
    start = tables.to_dense("user")
    torch.compile(tables, fullgraph=True, backend="aot_eager")(ids).square().sum().backward()
    assert not torch.equal(tables.to_dense("user"), start)
    for loss in (output, expected):
        loss.backward()
    for (name, weight), (_, other) in zip(waiting.store.named_slabs(), twin.store.named_slabs()):
        assert torch.equal(weight, other), name


@pytest.mark.parametrize("optimizer", [None, "adagrad"])
def test_outputs_by_themselves_compile_too(optimizer: str | None) -> None:
    tables = make("hash", optimizer)
    twin = copy.deepcopy(tables)
    compiled = torch.compile(twin.lookup, fullgraph=True, backend="aot_eager")
    ids = torch.randint(300, (32, 2))
    result, expected = compiled(ids, pooling={"item": None}), tables.lookup(ids, pooling={"item": None})
    assert list(result) == ["user", "item"]
    for name in result:
        assert torch.equal(result[name], expected[name])
    for outputs in (result, expected):
        outputs["item"].square().sum().backward()
    for (name, weight), (_, other) in zip(tables.store.named_slabs(), twin.store.named_slabs()):
        assert torch.equal(weight, other), name
    for p, q in zip(tables.parameters(), twin.parameters()):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)
