"""The lookup under torch.compile, whole: the operators live under torch.library. Exports have a file of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from core_cases import TRAINED_PROJECTIONS, Graphs, shuffled_counts
from torch import Tensor

from embtables import EmbeddingTables, TableConfig, ops, plan
from embtables.faces.embedding import EmbeddingBag

TABLES = [
    TableConfig("user", 5000, 16),
    TableConfig("item", 300, 16, on_out_of_range="oov"),
]
METHODS = ["full", "hash", "multi_hash", "unified", "robe"]


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


def test_a_graph_refuses_ids_out_of_range() -> None:
    tables = make("hash", None).eval()
    ids = torch.randint(300, (32, 2))
    graph = torch.compile(tables, fullgraph=True, backend="aot_eager")
    ids[3, 1] = 300
    assert torch.equal(graph(ids), tables(ids))
    ids[5, 0] = -2
    with pytest.raises(IndexError, match="feature 'user' holds id -2, but table 'user' has the ids 0 … 4999"):
        graph(ids)


@pytest.mark.skipif(ops.backend() != "native", reason="needs the native library")
@pytest.mark.parametrize("precision", ["bf16", "int4", "binary2/7"])
def test_graphs_look_packed_rows_up_natively(precision: str) -> None:
    tables = EmbeddingTables(plan(TABLES, "hash", "10%", precision=precision)).finalize()
    graphs = Graphs()
    compiled = torch.compile(tables, fullgraph=True, backend=graphs)
    for seed in range(2):
        ids = torch.randint(300, (32, 2), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(compiled(ids), tables(ids))
    called = [name for operators in graphs.operators for name in operators]
    assert {name for name in called if name.startswith("embtables")} == {"embtables.look_up.default"}


@pytest.mark.parametrize("pending", ["compositional", "multi_hash"])
@pytest.mark.parametrize("by_rows", [False, True], ids=["whole", "rows"])  # the operator of whole lookups, and of rows
def test_compiled_steps_while_another_lookup_waits_for_its_backward(pending: str, by_rows: bool) -> None:
    """Of a product of rows, which has to know of all updates; compiling has no memory at which it could see them."""
    waiting = make(pending, "sgd")
    twin = copy.deepcopy(waiting)
    ids = torch.randint(300, (32, 2), generator=torch.Generator().manual_seed(0))
    output, expected = (tables(ids).square().sum() for tables in (waiting, twin))
    tables = make("hash", "adagrad")
    start = tables.to_dense("user")
    given = (ids.t().reshape(-1), torch.arange(65), None, None) if by_rows else (ids,)  # bags that are not pooled
    graphs = Graphs("aot_eager")
    torch.compile(tables, fullgraph=True, backend=graphs)(*given).square().sum().backward()
    by_rows = by_rows or ops.backend() != "native"
    assert f"embtables.{'lookup' if by_rows else 'look_up'}.default" in graphs.operators[0]
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


# Pruned goes through its whole schedule in the four steps of these tests.
PRUNED = {"kind": "pruned", "warmup_steps": 1, "prune_steps": 2, "interval": 1}
BAGS = [
    TableConfig("user", 500, 16, padding_idx=3),
    TableConfig("item", 300, 16, ["item", "history"], pooling="mean", on_out_of_range="oov"),
    TableConfig("tag", 200, 8, on_out_of_range="hash", padding_idx=7),
]


def bags_of(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, (4 * batch,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.randint(200, (int(offsets[-1]),), generator=generator), offsets


def assert_steps_agree(tables: EmbeddingTables, backend: str, inputs: list[tuple[Tensor, ...]]) -> None:
    """Compiled steps and eager ones, from the same weights, leave the same weights but for the last bits."""
    twin = copy.deepcopy(tables)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    start = tables.to_dense(tables.plan.tables[0].name)
    optimizers = [torch.optim.SGD(t.parameters(), 0.1) for t in (tables, twin) if list(t.parameters())]
    for given in inputs:
        outputs = tables(*given), compiled(*given)
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.equal(tables.to_dense(tables.plan.tables[0].name), start)
    torch.testing.assert_close(twin.state_dict(), tables.state_dict())


@pytest.mark.parametrize(
    ("method", "optimizer", "l2"),
    [
        ("full", "adam", 0.0),
        (TRAINED_PROJECTIONS, None, 0.3),
        ("mixed_dimension", "adam", 0.3),
        (PRUNED, "adam", 0.3),
        ("matryoshka", "adam", 0.3),
    ],
)
def test_bags_train_in_whole_graphs(method: Any, optimizer: str | None, l2: float) -> None:
    counts = {table.name: shuffled_counts(table.num_embeddings or 0) for table in BAGS}
    budget = None if method == "full" else "60%"
    tables = EmbeddingTables(plan(BAGS, method, budget, frequencies=counts, optimizer=optimizer))
    tables.regularize(l2)
    assert_steps_agree(tables, "aot_eager", [bags_of(6, seed) for seed in range(4)])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "optimizer"), [("mixed_dimension", None), (PRUNED, "adagrad")])
def test_the_default_backend_trains_in_whole_graphs(method: Any, optimizer: str | None) -> None:
    table = TableConfig("u", 100, 8)
    counts = {"u": shuffled_counts(100)}
    tables = EmbeddingTables(plan([table], method, "60%", frequencies=counts, optimizer=optimizer))
    generator = torch.Generator().manual_seed(0)
    assert_steps_agree(tables, "inductor", [(torch.randint(100, (8, 1), generator=generator),) for _ in range(4)])


@pytest.mark.parametrize("optimizer", [None, "adagrad"])
def test_blocks_that_native_code_takes_beside_others(optimizer: str | None) -> None:
    tables = EmbeddingTables(plan(TABLES, {"user": "hash", "item": "pruned"}, "50%", optimizer=optimizer)).eval()
    tables.finalize()
    compiled = torch.compile(tables, fullgraph=True, backend="aot_eager")
    ids = torch.randint(300, (32, 2), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(compiled(ids), tables(ids))
    ids[3, 0] = 5000
    with pytest.raises(IndexError, match="feature 'user' holds id 5000"):
        compiled(ids)


@pytest.mark.parametrize("optimizer", [None, "adagrad"])
def test_a_view_trains_in_a_whole_graph_with_ids_behind_its_last_bag(optimizer: str | None) -> None:
    tables = EmbeddingTables(plan([TableConfig("item", 300, 16, padding_idx=2)], "hash", "50%", optimizer=optimizer))
    twin = copy.deepcopy(tables)
    view, other = (EmbeddingBag.of(t, "item", mode="mean", include_last_offset=True) for t in (tables, twin))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    ids, offsets = torch.arange(12), torch.tensor([0, 3, 3, 9])
    outputs = view(ids, offsets), compiled(ids, offsets)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(twin.state_dict(), tables.state_dict())
    for p, q in zip(tables.parameters(), twin.parameters()):
        assert p.grad is not None and p.grad.any()
        torch.testing.assert_close(p.grad, q.grad)


def other_tensors(tables: EmbeddingTables, other: EmbeddingTables) -> None:
    """Other memory behind the same parameters and buffers."""
    new = other.state_dict()
    for name, tensor in tables.state_dict(keep_vars=True).items():
        tensor.data = new[name].clone()


def other_state(tables: EmbeddingTables, other: EmbeddingTables) -> None:
    tables.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)


def other_type(tables: EmbeddingTables, other: EmbeddingTables) -> None:
    tables.to(torch.bfloat16)


@pytest.mark.parametrize("optimizer", [None, "adagrad"])
@pytest.mark.parametrize("change", [other_tensors, other_state, other_type])
def test_tables_may_change_under_their_graph(change: Any, optimizer: str | None) -> None:
    solved = plan(TABLES, "hash", "10%", optimizer=optimizer)
    tables, other = EmbeddingTables(solved, seed=1), EmbeddingTables(solved, seed=2)
    twin = copy.deepcopy(tables)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    ids = torch.randint(300, (32, 2), generator=torch.Generator().manual_seed(0))
    compiled(ids), tables(ids)
    for each in (tables, twin):
        change(each, other)
    before = twin(ids).detach()
    for _ in range(2):
        outputs = tables(ids), compiled(ids)
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
        for output in outputs:
            output.float().square().sum().backward()
    if optimizer is not None:
        assert not torch.equal(twin(ids), before)
    for p, q in zip(tables.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
