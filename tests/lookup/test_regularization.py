"""Mini-batch-aware L2: its gradient against the one of a loss term written out in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from core_cases import Graphs, all_methods, method_id, trained_methods
from native_cases import NATIVE
from torch import Tensor

from embtables import SGD, EmbeddingTables, TableConfig, ops, plan
from embtables.lookup import engine
from embtables.lookup.features import BlockLookup
from embtables.lookup.store import Store
from embtables.methods import Method, from_config

L2 = 0.3
# Target and history share a table; "brand" and "maker" hold the same numbers, which mean something else in each.
TABLES = [
    TableConfig("item", 60, 4, ["item", "history"], pooling="mean", padding_idx=0),
    TableConfig("brand", 40, 4, on_out_of_range="oov"),
    TableConfig("maker", 50, 6),
]
COUNTS = {"item": np.arange(60) * 2, "brand": np.arange(40)[::-1] // 3, "maker": np.full(50, 7)}
IDS = {
    "item": [[5], [7], [5], [9]],
    "history": [[5, 7, 7, 0, 11], [], [7], [0, 0]],
    "brand": [[5], [39], [44], [5]],
    "maker": [[5], [7], [7], [5]],
}
# The same with one id for each feature, which native code looks up where it sees the vectors of single ids.
MATRIX = {
    "item": [[5], [7], [5], [9]],
    "history": [[7], [5], [0], [5]],
    "brand": [[5], [39], [44], [5]],
    "maker": [[5], [7], [7], [5]],
}
SINGLE = torch.tensor(list(MATRIX.values())).squeeze(2).t()
FLAT = torch.tensor([i for rows in IDS.values() for row in rows for i in row])
OFFSETS = torch.tensor([0, *np.cumsum([len(row) for rows in IDS.values() for row in rows])])


def build(method: Any, optimizer: Any = None, **options: Any) -> EmbeddingTables:
    budget = "60%" if method != "full" and (isinstance(method, str) or method.needs_budget) else None
    solved = plan(TABLES, method, budget, frequencies=COUNTS, optimizer=optimizer)
    return EmbeddingTables(solved, std=0.5, **options)


def backward(tables: EmbeddingTables, ids: dict[str, list[list[int]]] = IDS) -> None:
    """A loss that depends on all outputs, and whose own gradient is zero."""
    if ids is IDS:
        result = tables.lookup(FLAT, OFFSETS, pooling={"history": None})
        (0 * torch.cat([v.flatten() for v in result.values()]).sum()).backward()
    else:
        (0 * tables(SINGLE).sum()).backward()


class Owned(NamedTuple):
    """A row: the ids of each table that have it, as often as they do, and how much of it their vectors show."""

    ids: dict[str, list[int]]
    shown: float


def owned_rows(tables: EmbeddingTables, adds: bool) -> dict[str, list[Owned]]:
    """The rows of each weight; an id has one whose vector is another where the row is.

    ``adds``: whether a vector that has a row twice shows twice as much of a change.
    """
    found: dict[str, list[Owned]] = {}
    with torch.no_grad():
        before = {t.name: tables.to_dense(t.name) for t in tables.plan.tables}
        for name, weight in storage(tables).items():
            if not name.startswith("weight"):
                continue
            found[name] = []
            for row in weight.data:
                was = row.clone()
                row += 0.5
                moved = {table: (tables.to_dense(table) - v).abs().amax(1) for table, v in before.items()}
                row.copy_(was)
                changes = torch.cat([m[m > 0] for m in moved.values()])
                least = float(changes.min()) if len(changes) else 1.0
                times = {t: (m / least).round().long() if adds else (m > 0).long() for t, m in moved.items()}
                ids = {t: torch.arange(len(n)).repeat_interleave(n).tolist() for t, n in times.items()}
                found[name].append(Owned(ids, least / 0.5 if adds else 1.0))
        return found


def term(vectors: dict[str, Tensor], counts: dict[str, Any] | None, ids: dict[str, list[list[int]]] = IDS) -> Tensor:
    """½·λ·Σ ‖w_j‖²/n_j over the distinct ids of each table, one after another."""
    total = torch.zeros((), dtype=torch.float64)
    for table, features in (("item", ("item", "history")), ("brand", ("brand",)), ("maker", ("maker",))):
        used = {i for f in features for row in ids[f] for i in row} - ({0} if table == "item" else set())
        for id_ in used:
            row = min(id_, 40) if table == "brand" else id_
            n = max(1, float(counts[table][row])) if counts is not None and row < len(counts[table]) else 1
            total = total + 0.5 * L2 * vectors[table][row].square().sum() / n
    return total


def storage(tables: EmbeddingTables) -> dict[str, Tensor]:
    return {name: tensor for name, tensor, is_code in tables.store.tensors() if not is_code}


# ---- the gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [None, COUNTS], ids=["plain", "by_frequency"])
def test_gradient_of_full_tables_is_the_terms(counts: dict[str, Any] | None) -> None:
    tables = build("full")
    tables.regularize(L2, counts)
    backward(tables)
    dense = {t.name: tables.to_dense(t.name).double().requires_grad_() for t in TABLES}
    term(dense, counts).backward()
    for config in TABLES:
        expected = dense[config.name].grad
        start, n = tables.store.start(config.name), len(dense[config.name])
        grad = getattr(tables.store, f"weight_{config.embedding_dim}").grad[start : start + n]
        assert expected is not None and expected.any()
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-7)


def test_what_stores_nothing_has_nothing_to_regularize() -> None:
    tables = build(from_config("drop_feature"))  # without a budget, which could keep some tables
    tables.regularize(L2, COUNTS)
    assert not any(v.requires_grad for v in tables.lookup(FLAT, OFFSETS).values())


def has_signs(method: Any) -> bool:
    """With them an id may have a row twice and show nothing of it."""
    return any(getattr(each, "signs", False) for each in (method, getattr(method, "cold", None)))


@pytest.mark.parametrize("ids", [IDS, MATRIX], ids=["bags", "matrix"])
@pytest.mark.parametrize("method", [m for m in trained_methods() if not has_signs(m)], ids=method_id)
def test_each_row_of_any_storage_is_pulled_by_how_often_all_look_it_up(
    method: Method, ids: dict[str, list[list[int]]]
) -> None:
    tables = build(method)
    for stage in tables.stages:
        stage.shows = {}  # whole rows are regularized, whatever lookups show of them
    tables.regularize(L2, COUNTS)
    backward(tables, ids)
    counts = COUNTS | {"brand": [*COUNTS["brand"], 0]}
    looked_up = {
        table: {min(i, 40) if table == "brand" else i for f in features for row in ids[f] for i in row}
        - ({0} if table == "item" else set())
        for table, features in (("item", ("item", "history")), ("brand", ("brand",)), ("maker", ("maker",)))
    }
    dims = {t.name: t.embedding_dim for t in TABLES}
    pulled = 0
    projects = method.kind in ("low_rank", "mixed_dimension") or getattr(method, "projection", False)
    for name, rows in owned_rows(tables, adds=method.kind == "multi_hash").items():
        weight = storage(tables)[name]
        expected = torch.zeros(weight.shape, dtype=torch.float64)
        for row, (ids_of, shown) in enumerate(rows):
            if any(looked_up[table] & set(owners) for table, owners in ids_of.items()):
                lookups = max(1, sum(counts[table][i] for table, owners in ids_of.items() for i in owners))
                dim = next(dims[table] for table, owners in ids_of.items() if owners)
                scale = dim / weight.shape[1] if projects else shown**2
                expected[row] = L2 * scale / lookups * weight.data[row].double()
                pulled += 1
        grad = torch.zeros_like(expected) if weight.grad is None else weight.grad.to_dense().double()
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)
    assert pulled or method.kind == "drop_feature"
    for name, weight in storage(tables).items():  # projections, which all ids have in common, are not pulled
        assert name.startswith("weight") or weight.grad is None or not weight.grad.any()


def test_rows_of_a_product_by_hand() -> None:
    config = TableConfig("a", 100, 3, ["x", "y"])
    tables = EmbeddingTables(plan([config], "compositional", "40%", optimizer=None), std=0.5)
    counts = np.arange(100) % 5
    tables.regularize(L2, {"a": counts})
    (0 * tables(torch.tensor([[3, 14], [14, 3], [27, 3]])).sum()).backward()
    parts = [tables.store.slab(f"a/{j}").detach().double() for j in (0, 1)]
    radix = len(parts[0])
    (weight,) = tables.parameters()
    assert weight.grad is not None
    for j, (part, of) in enumerate(zip(parts, (lambda i: i % radix, lambda i: i // radix))):
        expected = torch.zeros_like(part)
        for row in {of(i) for i in (3, 14, 27)}:
            expected[row] = L2 / max(1, sum(n for i, n in enumerate(counts) if of(i) == row)) * part[row]
        start = tables.store.start(f"a/{j}")
        torch.testing.assert_close(weight.grad[start : start + len(part)].double(), expected, rtol=1e-5, atol=1e-7)


def test_kinds_of_rows_that_a_table_is_without() -> None:
    configs = [TableConfig("a", 20, 4), TableConfig("b", 40, 4)]
    counts = {"a": np.array([1_000] * 5 + [0] * 15), "b": np.full(40, 3)}
    tables = EmbeddingTables(plan(configs, {"kind": "banded", "precisions": ["binary/1"]}, 150, counts, None))
    bands = {name: entry.values for name, entry in tables.plan.groups[0].layout.entries.items()}
    assert [values["precisions"] for values in bands.values()] == [["fp32"], ["binary/1"]]
    tables.regularize(L2, counts)
    (strengths,) = tables.store.strengths()
    with_rows = bands["b"]["rows"][0]
    assert with_rows < 40  # and the others have none
    expected = [L2 / 1_000] * 5 + [L2] * (bands["a"]["rows"][0] - 5) + [L2 / 3] * with_rows
    assert sorted(strengths.tolist()) == pytest.approx(sorted(expected))


def test_it_comes_on_top_of_the_loss_and_of_pooling() -> None:
    tables, twin = build("full", seed=1), build("full", seed=1)
    tables.regularize(L2, COUNTS)
    directions = torch.randn(4, sum(tables.embedding_dims))
    for each in (tables, twin):
        (each(FLAT, OFFSETS) * directions).sum().backward()
    extra = build("full", seed=1)
    extra.regularize(L2, COUNTS)
    backward(extra)
    for p, q, r in zip(tables.parameters(), twin.parameters(), extra.parameters()):
        assert p.grad is not None and q.grad is not None and r.grad is not None
        torch.testing.assert_close(p.grad, q.grad + r.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(tables(FLAT, OFFSETS), twin(FLAT, OFFSETS))


def test_ids_of_64_bits_in_several_tables() -> None:
    configs = [TableConfig("a", None, 4, ["x", "y"]), TableConfig("b", None, 4)]
    tables = EmbeddingTables(plan(configs, "hash", 40_000, optimizer=None), std=0.5)
    tables.regularize(L2)
    huge, low = 2**63 - 1, -(2**63)
    ids = torch.tensor([[huge, low, huge], [low, huge, 5], [5, 5, huge]])
    (0 * tables(ids).sum()).backward()
    matrix = torch.zeros_like(next(tables.parameters()), dtype=torch.float64)
    vectors = tables.lookup(ids)
    for table, feature in (("a", "x"), ("b", "b")):
        for row, id_ in enumerate(ids[:, 2 * (table == "b")].unique().tolist()):
            place = ids[:, 2 * (table == "b")].tolist().index(id_)
            vector = vectors[feature][place].detach()
            matches = (tables.store.slab(table) == vector).all(1).nonzero()
            assert len(matches) == 1, row
            matrix[tables.store.start(table) + int(matches)] += L2 * vector.double()
    (weight,) = tables.parameters()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.double(), matrix, rtol=1e-5, atol=1e-7)


# ---- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adagrad", "adam"])
@pytest.mark.parametrize("method", ["full", "compositional"])
def test_a_fused_optimizer_makes_the_same_step_as_one_of_torch(kind: str, method: str) -> None:
    """Equal gradients, so equal steps; row-wise Adagrad has no counterpart, and is checked by the size of its step."""
    configs = [TableConfig("a", 200, 4, ["x", "y"])]
    budget = None if method == "full" else "40%"
    fused = EmbeddingTables(plan(configs, method, budget, optimizer={"kind": kind, "lr": 0.1}), seed=2)
    plain = EmbeddingTables(plan(configs, method, budget, optimizer=None), seed=2)
    before = fused.store.slab("a" if method == "full" else "a/0").clone()
    eps = getattr(fused.plan.optimizer, "eps", 0.0)
    make: Any = {
        "sgd": torch.optim.SGD,
        "adagrad": lambda p, lr: torch.optim.Adagrad(p, lr, eps=eps),
        "rowwise_adagrad": lambda p, lr: torch.optim.Adagrad(p, lr, eps=eps),
        "adam": lambda p, lr: torch.optim.Adam(p, lr, eps=eps),
    }[kind]
    optimizer = make(plain.parameters(), lr=0.1)
    ids = torch.tensor([[3, 14], [14, 3], [27, 150]])
    for tables in (fused, plain):
        tables.regularize(0.5, {"a": np.arange(200) % 4})
        tables(ids).pow(3).sum().backward()
    optimizer.step()
    after = [t.store.slab("a" if method == "full" else "a/0") for t in (fused, plain)]
    if kind == "rowwise_adagrad":
        grad = next(plain.parameters()).grad
        assert grad is not None
        rows = grad[: len(before)]
        expected = before - 0.1 * rows / (rows.square().mean(1, keepdim=True).sqrt() + eps)
        torch.testing.assert_close(after[0], expected, rtol=1e-4, atol=1e-6)
    else:
        assert not torch.equal(after[0], before)
        torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-5)


def test_sparse_gradients_get_it_too() -> None:
    dense, sparse = build("full", seed=4), build("full", seed=4, sparse=True)
    for tables in (dense, sparse):
        tables.regularize(L2, COUNTS)
        backward(tables)
    for p, q in zip(dense.parameters(), sparse.parameters()):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad.to_dense())


def test_padding_and_ids_that_were_not_looked_up_stay() -> None:
    tables = build("full", SGD(lr=1.0))
    tables.regularize(L2)
    before = {t.name: tables.store.slab(t.name).clone() for t in TABLES}
    backward(tables)
    moved = {t.name: (tables.store.slab(t.name) != before[t.name]).any(1).nonzero().squeeze(1).tolist() for t in TABLES}
    assert moved == {"item": [5, 7, 9, 11], "brand": [5, 39, 40], "maker": [5, 7]}


@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_an_empty_matrix_is_left_alone(optimizer: str | None) -> None:
    tables = build("full", optimizer)
    tables.regularize(L2, COUNTS)
    before = {name: weight.detach().clone() for name, weight in storage(tables).items()}
    found = tables(torch.empty(0, 4, dtype=torch.int64))
    assert found.shape == (0, 18)
    found.sum().backward()
    assert all(torch.equal(weight, before[name]) for name, weight in storage(tables).items())


@NATIVE
def test_weights_that_are_learned_go_through_native_code_too() -> None:
    """They come behind the vectors of single ids."""
    gradients = {}
    for backend in ("native", "reference"):
        with ops.using(backend):
            tables = build("compositional", "adam", seed=2)
            tables.regularize(L2, COUNTS)
            weights = torch.linspace(0.5, 2, 16).view(4, 4).requires_grad_()
            tables(SINGLE, per_sample_weights=weights).pow(3).sum().backward()
            gradients[backend] = [weights.grad, *storage(tables).values()]
    for ours, expected in zip(gradients["native"], gradients["reference"]):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@NATIVE
def test_matrices_of_several_sizes_compile_once_more_at_most() -> None:
    configs = [TableConfig("a", 60, 4), TableConfig("b", 40, 6)]
    tables, twin = (EmbeddingTables(plan(configs, "full", None, optimizer="adam"), seed=1) for _ in range(2))
    graphs = Graphs("aot_eager")
    compiled = torch.compile(tables, fullgraph=True, backend=graphs)
    for each in (tables, twin):
        each.regularize(L2)
    for size in (3, 5, 8, 2):
        ids = torch.randint(40, (size, 2), generator=torch.Generator().manual_seed(size))
        for each in (compiled, twin):
            each(ids).pow(3).sum().backward()
    assert len(graphs.operators) <= 2
    for ours, expected in zip(storage(tables).values(), storage(twin).values()):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_examples", [0, 2])
@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_a_batch_without_ids_is_left_alone(num_examples: int, optimizer: str | None) -> None:
    tables = build("full", optimizer)
    tables.regularize(L2, COUNTS)
    before = {name: weight.detach().clone() for name, weight in storage(tables).items()}
    nothing = torch.zeros(4 * num_examples + 1, dtype=torch.int64)
    found = tables.lookup(torch.empty(0, dtype=torch.int64), nothing, pooling={"history": None})
    torch.cat([v.flatten() for v in found.values()]).sum().backward()
    assert all(torch.equal(weight, before[name]) for name, weight in storage(tables).items())
    assert not any(p.grad.any() for p in tables.parameters() if p.grad is not None)


@NATIVE
@pytest.mark.parametrize("in_pytorch", [None, "maker"], ids=["native", "mixed"])
@pytest.mark.parametrize("bags", [False, True], ids=["matrix", "bags"])
@pytest.mark.parametrize("form", ["side by side", "weighted", "one by one", "in input order"])
@pytest.mark.parametrize("optimizer", [None, "adagrad", "adam"])
def test_native_lookups_are_regularized_as_in_pytorch(
    optimizer: str | None, form: str, bags: bool, in_pytorch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def left_to_pytorch(block: BlockLookup, store: Store) -> bool:
        return native(block, store) and all(config.name != in_pytorch for config in block.tables)

    native = engine._is_native
    monkeypatch.setattr(engine, "_is_native", left_to_pytorch)
    configs = [replace(config, embedding_dim=4) for config in TABLES] if form == "in input order" else TABLES
    methods = {"item": "compositional", "maker": "hash", "*": "full"}
    solved = plan(configs, methods, "60%", frequencies=COUNTS, optimizer=optimizer)
    given = (FLAT, OFFSETS) if bags else (SINGLE, None)
    weights = torch.linspace(0.5, 2, given[0].numel()).view(given[0].shape) if form == "weighted" else None
    looked_up_in_pytorch: list[list[int]] = []
    look_up = engine.Lookup._in_plain_pytorch

    def noted(self: engine.Lookup, ids: Any, step: Any) -> Any:
        looked_up_in_pytorch.append(list(ids))
        return look_up(self, ids, step)

    monkeypatch.setattr(engine.Lookup, "_in_plain_pytorch", noted)
    left = {}
    for backend in ("native", "reference"):
        with ops.using(backend):
            tables = EmbeddingTables(solved, seed=3)
            tables.regularize(L2, COUNTS)
            assert tables.lookups.ops == (
                "reference" if backend == "reference" else "mixed" if in_pytorch else "native"
            )
            for _ in range(3):
                if form == "one by one":
                    found = list(tables.lookup(*given, pooling={"history": None, "maker": "mean"}).values())
                else:
                    found = [tables(*given, weights, pooling=None if form == "in input order" else "mean")]
                torch.cat([v.flatten() for v in found]).pow(3).sum().backward()
            left[backend] = [*storage(tables).values(), *(p.grad for p in tables.parameters() if p.grad is not None)]
        each_step = len(tables.lookups.blocks) if backend == "reference" else 1 if in_pytorch else 0
        assert [len(which) for which in looked_up_in_pytorch] == [each_step] * 3 * (each_step > 0)
        looked_up_in_pytorch.clear()
    for ours, expected in zip(left["native"], left["reference"]):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


# ---- when it acts, and what it leaves behind -------------------------------------------------------------------------


def test_only_in_training_and_until_it_is_switched_off() -> None:
    tables = build("full", SGD(lr=1.0))
    tables.regularize(L2, COUNTS)
    before = [w.clone() for w in storage(tables).values()]

    def moved() -> bool:
        return not all(torch.equal(w, b) for w, b in zip(storage(tables).values(), before))

    with torch.no_grad():
        assert not tables(FLAT, OFFSETS).requires_grad
    tables.eval()
    assert not tables(FLAT, OFFSETS).requires_grad
    plain = build("full")
    plain.regularize(L2, COUNTS)
    plain.eval()
    backward(plain)
    assert not any(p.grad.any() for p in plain.parameters() if p.grad is not None)
    tables.train()
    tables.regularize(0)
    backward(tables)
    assert not moved()
    tables.regularize(L2)
    backward(tables)
    assert moved()
    pruned = build("pruned", "sgd")
    pruned.regularize(L2, COUNTS)
    pruned.finalize()
    assert not pruned(FLAT, OFFSETS).requires_grad and "regularization" not in pruned.memory().by_kind
    with pytest.raises(ValueError, match="served tables are not trained"):
        pruned.regularize(L2)


@pytest.mark.parametrize("method", ["full", "hot_cold", "banded"])
def test_it_is_in_no_state_dict_or_buffer_and_survives_copies_and_a_new_start(method: str) -> None:
    tables = build(method, SGD(lr=1.0), seed=6)
    plain, buffers = tables.state_dict(), [name for name, _ in tables.named_buffers()]
    tables.regularize(L2, COUNTS)
    assert list(tables.state_dict()) == list(plain)
    assert [name for name, _ in tables.named_buffers()] == buffers
    meta = EmbeddingTables(tables.plan, seed=6, std=0.5, device="meta")
    with pytest.raises(ValueError, match="meta device do not know yet which ids share rows: regularize.. after to_emp"):
        meta.regularize(L2, COUNTS)
    meta.to_empty(device="cpu")
    meta.reset_parameters()
    meta.regularize(L2, COUNTS)
    copied, again, away = (copy.deepcopy(tables) for _ in range(3))
    again.reset_parameters()
    away.to("meta").load_state_dict({name: tensor.clone() for name, tensor in plain.items()}, assign=True)
    for each in (tables, meta, copied, again, away):
        backward(each)
        for weight, expected in zip(storage(each).values(), storage(tables).values()):
            assert torch.equal(weight, expected)


@pytest.mark.parametrize("method", ["hash", "compositional", "unified"])
def test_padding_is_no_lookup_of_the_rows_that_others_have(method: str) -> None:
    counts = {"item": np.full(40, 2)}
    often = {"item": np.where(np.arange(40) == 7, 10_000, counts["item"])}
    found = []
    for padding, given in ((7, often), (7, counts), (None, often)):
        table = TableConfig("item", 40, 4, padding_idx=padding)
        tables = EmbeddingTables(plan([table], method, "50%", frequencies=counts, optimizer=None))
        tables.regularize(L2, given)
        found.append(torch.cat(tables.store.strengths()))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_rows_that_are_moved_take_along_how_strongly_they_are_pulled() -> None:
    tables = build("full", SGD(lr=1.0))
    tables.regularize(L2, COUNTS)
    store, start = tables.store, tables.store.start("item")
    store.move("item", torch.tensor([50]), torch.tensor([3]))
    strength = store.strength(store.weight_of("item"))
    assert strength is not None
    assert strength[start + 3] == strength[start + 50] == pytest.approx(L2 / 100)


@pytest.mark.parametrize("method", ["full", "compositional"])
def test_functions_of_the_weights_have_the_same_gradient(method: str) -> None:
    tables = build(method)
    tables.regularize(L2, COUNTS)
    (0 * tables(SINGLE).sum()).backward()
    parameters = dict(tables.named_parameters())
    found = torch.func.grad(lambda p: 0 * torch.func.functional_call(tables, p, SINGLE).sum())(parameters)
    assert any(p.grad is not None and p.grad.any() for p in parameters.values())
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_counts_beyond_half_precision(dtype: torch.dtype) -> None:
    tables = EmbeddingTables(plan([TableConfig("item", 3, 4)], "full", optimizer=None), std=0.5)
    tables.regularize(100.0, {"item": [1, 100_001, 400_000]})
    tables.to(dtype)
    (0 * tables(torch.tensor([[1], [2]])).sum()).backward()
    (weight,) = tables.parameters()
    assert weight.grad is not None
    expected = weight.detach().float() * torch.tensor([[0.0], [100 / 100_001], [100 / 400_000]])
    torch.testing.assert_close(weight.grad.float(), expected, rtol=0.01, atol=1e-6)


def test_bytes_of_the_strengths() -> None:
    tables = build("hash", SGD())
    before = tables.memory()
    for frequencies in (COUNTS, None):
        tables.regularize(L2, frequencies)
        after = tables.memory()
        rows = sum(len(weight) for weight in storage(tables).values())
        assert after.by_kind["regularization"] == 4 * rows
        assert after.training_bytes == before.training_bytes + 4 * rows
        assert after.inference_bytes == before.inference_bytes == tables.plan.inference_bytes
    tables.regularize(0, COUNTS)
    assert tables.memory() == before


@pytest.mark.parametrize(
    ("l2", "frequencies", "message"),
    [
        (-0.1, None, "l2 must be a non-negative number, not -0.1"),
        (float("nan"), None, "l2 must be a non-negative number, not nan"),
        ("0.1", None, "l2 must be a non-negative number, not '0.1'"),
        (float("inf"), None, "not inf"),
        (True, None, "not True"),
        (0.1, {"shop": [1]}, "frequencies name 'shop', which is not a table"),
        (0.1, {"item": [1, 2]}, "frequencies of table 'item' hold 2 counts, but it has 60 ids"),
        (0.1, {"item": COUNTS["item"], "maker": COUNTS["maker"]}, "frequencies lack table 'brand'"),
    ],
)
def test_what_is_refused(l2: float, frequencies: Any, message: str) -> None:
    tables = build("full", SGD(lr=1.0))
    tables.regularize(0.5)
    before = tables.store.strengths()
    with pytest.raises(ValueError, match=message):
        tables.regularize(l2, frequencies)
    assert before and all(now is then for now, then in zip(tables.store.strengths(), before, strict=True))


# ---- bfloat16 around the tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", all_methods(), ids=method_id)
@pytest.mark.parametrize("optimizer", [None, "adagrad"])
def test_autocast_does_not_reach_the_tables(method: Method, optimizer: str | None) -> None:
    """Vectors, and what backward makes of them, are those without autocast, bit for bit."""
    tables, twin = build(method, optimizer, seed=8), build(method, optimizer, seed=8)
    dense: list[Tensor] = []
    for each, enabled in ((tables, True), (twin, False)):
        each.regularize(L2, COUNTS)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            result = each.lookup(FLAT, OFFSETS, pooling={"history": None})
            pooled = each(FLAT, OFFSETS, torch.ones(len(FLAT)))
            assert pooled.dtype == torch.float32 and all(v.dtype == torch.float32 for v in result.values())
            dense.append(each.to_dense("item"))
            assert torch.is_autocast_enabled("cpu") == enabled
        if result["history"].requires_grad:
            (result["history"].pow(2).sum() + result["maker"].sum()).backward()
    for weight, expected in zip(storage(tables).values(), storage(twin).values()):
        assert torch.equal(weight, expected)
        if weight.grad is not None:
            assert expected.grad is not None and torch.equal(weight.grad, expected.grad)
    assert torch.equal(tables(FLAT, OFFSETS), twin(FLAT, OFFSETS)) and torch.equal(*dense)
