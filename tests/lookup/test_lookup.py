"""``EmbeddingTables.lookup``: every output against loops over single ids, and the gradients of chosen outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from core_cases import all_methods, draws, falling_counts, method_id, trained_methods
from torch import Tensor

from embtables import SGD, EmbeddingTables, TableConfig, ops, plan
from embtables.methods import Method

pytestmark = pytest.mark.core

# A table that target and history share, one feature in two tables, two dimensions, padding, an oov row.
TABLES = [
    TableConfig("item", 400, 8, ["item", "history", "cart"], pooling="mean", padding_idx=0),
    TableConfig("user", 300, 4, ["user"]),
    TableConfig("brand", 90, 8, ["brand", "item"], on_out_of_range="oov"),
    TableConfig("tag", 200, 4, ["tags"], pooling="mean"),
]
SIZES = {"item": 90, "history": 400, "cart": 400, "user": 300, "brand": 95, "tags": 200}
METHODS = pytest.mark.parametrize("method", all_methods(), ids=method_id)


def build(method: Any = "full", tables: list[TableConfig] = TABLES, **options: Any) -> EmbeddingTables:
    counts = {t.name: falling_counts(t.num_embeddings or 1) for t in tables}
    budget = "40%" if not isinstance(method, str) and method.needs_budget else None
    solved = plan(tables, method, budget, frequencies=counts, optimizer=options.pop("optimizer", None))
    return EmbeddingTables(solved, **options)


def bags(batch: int, seed: int, empty: tuple[str, ...] = ()) -> tuple[Tensor, Tensor, dict[str, list[list[int]]]]:
    """Flat ids, offsets, and the same as lists; ``item`` and ``user`` hold one id in every bag."""
    random = np.random.default_rng(seed)
    lists: dict[str, list[list[int]]] = {}
    for feature, size in SIZES.items():
        most = 0 if feature in empty else 5
        counts = np.ones(batch, int) if feature in ("item", "user") else random.integers(0, most + 1, batch)
        lists[feature] = [random.integers(0, size, n).tolist() for n in counts]
        if feature in ("history", "cart") and batch > 2 and most:
            lists[feature][1:3] = [[0, 7, 0, 7], [0, 0]]
    flat = [i for rows in lists.values() for row in rows for i in row]
    lengths = [len(row) for rows in lists.values() for row in rows]
    return torch.tensor(flat, dtype=torch.int64), torch.tensor([0, *np.cumsum(lengths)]), lists


def expected_outputs(
    tables: EmbeddingTables,
    lists: dict[str, list[list[int]]],
    unpooled: set[str],
    weights: Tensor | None = None,
    override: dict[str, str] | None = None,
) -> dict[str, Tensor]:
    """A loop over tables, features, bags and ids, in float64."""
    assert list(lists) == tables.feature_names
    starts = dict(zip(lists, np.cumsum([0, *(sum(map(len, rows)) for rows in lists.values())])))
    outputs = {}
    names = iter(tables.output_names)
    for config in tables.plan.tables:
        dense = tables.to_dense(config.name).double()
        for feature in config.feature_names:
            place = int(starts[feature])
            vectors, pooled = [], []
            for row in lists[feature]:
                bag = torch.zeros(config.embedding_dim, dtype=torch.float64)
                counted = 0
                for id_ in row:
                    known = min(id_, config.num_embeddings or 0)
                    factor = 1.0 if weights is None else float(weights[place])
                    vector = factor * dense[known]
                    place += 1
                    vectors.append(vector)
                    bag = bag + vector
                    counted += id_ != config.padding_idx
                mode = (override or {}).get(feature, config.pooling)
                pooled.append(bag / max(1, counted) if mode == "mean" else bag)
            chosen = vectors if feature in unpooled else pooled
            outputs[next(names)] = (
                torch.stack(chosen) if chosen else torch.zeros(0, config.embedding_dim, dtype=torch.float64)
            )
    return outputs


def assert_equal(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(result) == list(expected)
    for name, output in result.items():
        assert output.dtype == torch.float32
        torch.testing.assert_close(output.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


# ---- values ----------------------------------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("unpooled", [(), ("history",), ("history", "tags", "user"), tuple(SIZES)])
def test_outputs_equal_loops(method: Method, weighted: bool, unpooled: tuple[str, ...]) -> None:
    tables = build(method).train(not draws(method))
    ids, offsets, lists = bags(6, seed=1)
    weights = torch.randn(ids.numel()) if weighted else None
    result = tables.lookup(ids, offsets, weights, pooling=dict.fromkeys(unpooled))
    assert_equal(result, expected_outputs(tables, lists, set(unpooled), weights))
    if not unpooled:
        torch.testing.assert_close(torch.cat(list(result.values()), 1), tables(ids, offsets, weights))


@METHODS
def test_a_matrix_of_ids_needs_no_offsets(method: Method) -> None:
    tables = build(method).train(not draws(method))
    sizes = torch.tensor(list(SIZES.values()))
    ids = torch.randint(2**40, (7, len(sizes))) % sizes
    weights = torch.rand(7, len(sizes))
    lists = {feature: [[i] for i in column] for feature, column in zip(SIZES, ids.t().tolist())}
    for given in (None, weights):
        flat = None if given is None else given.t().reshape(-1)
        for pooling in (None, {"history": None}, "sum"):
            result = tables.lookup(ids, None, given, pooling=pooling)
            assert_equal(result, expected_outputs(tables, lists, set(SIZES), flat))
    assert_equal(tables.lookup(ids.int()), expected_outputs(tables, lists, set()))


def test_every_way_to_say_the_pooling() -> None:
    tables = build()
    ids, offsets, lists = bags(5, seed=2)
    assert_equal(tables.lookup(ids, offsets, pooling=None), expected_outputs(tables, lists, set(SIZES)))
    sums = dict.fromkeys(SIZES, "sum")
    assert_equal(tables.lookup(ids, offsets, pooling="sum"), expected_outputs(tables, lists, set(), override=sums))
    mixed = {"history": None, "cart": "sum", "tags": "mean"}
    expected = expected_outputs(tables, lists, {"history"}, override={"cart": "sum"})
    assert_equal(tables.lookup(ids, offsets.int(), pooling=mixed), expected)


def test_as_many_ids_as_bags_are_not_bags_of_one() -> None:
    tables = EmbeddingTables(plan([TableConfig("a", 9, 2), TableConfig("b", 9, 2)], "full"))
    a, b = tables.to_dense("a"), tables.to_dense("b")
    result = tables.lookup(torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2, 2, 3, 4]))
    assert torch.equal(result["a"], torch.stack([a[1] + a[2], torch.zeros(2)]))
    assert torch.equal(result["b"], b[3:5])


def test_names_and_shapes() -> None:
    tables = build()
    ids, offsets, lists = bags(4, seed=3)
    result = tables.lookup(ids, offsets, pooling={"history": None})
    assert list(result) == tables.output_names
    assert tables.output_names == ["item@item", "history", "cart", "user", "brand", "item@brand", "tags"]
    length = sum(map(len, lists["history"]))
    assert {name: tuple(output.shape) for name, output in result.items()} == {
        "item@item": (4, 8), "history": (length, 8), "cart": (4, 8), "user": (4, 4), "brand": (4, 8),
        "item@brand": (4, 8), "tags": (4, 4),
    }  # fmt: skip


@pytest.mark.parametrize("optimizer", [None, "adagrad"])
def test_empty_lists_and_empty_batches(optimizer: str | None) -> None:
    tables = build(optimizer=optimizer)
    pooling = {"history": None, "cart": None}
    ids, offsets, lists = bags(4, seed=4, empty=("history", "tags"))
    result = tables.lookup(ids, offsets, pooling=pooling)
    assert_equal(result, expected_outputs(tables, lists, set(pooling)))
    assert result["history"].shape == (0, 8) and torch.equal(result["tags"], torch.zeros(4, 4))
    torch.cat([v.flatten() for v in result.values()]).sum().backward()
    nothing = torch.zeros(0, dtype=torch.int64)
    for offsets in (torch.zeros(1, dtype=torch.int64), torch.zeros(6 * 3 + 1, dtype=torch.int64)):
        batch = (offsets.numel() - 1) // 6
        result = tables.lookup(nothing, offsets, pooling=pooling)
        for name, output, dim in zip(result, result.values(), tables.embedding_dims):
            assert output.shape == (0 if name in pooling else batch, dim) and not output.any()
        torch.cat([v.flatten() for v in result.values()]).sum().backward()
    result = tables.lookup(torch.zeros(0, 6, dtype=torch.int64))
    assert [tuple(v.shape) for v in result.values()] == [(0, dim) for dim in tables.embedding_dims]


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", trained_methods(), ids=method_id)
@pytest.mark.parametrize("used", [("history",), ("item@item", "tags"), ("item@brand", "cart", "history")])
def test_gradients_of_the_outputs_that_are_used(method: Method, used: tuple[str, ...]) -> None:
    """Against autograd through one lookup of a matrix for each id; the gradient of everything else is zero."""
    ids, offsets, lists = bags(5, seed=5)
    tables, other = (build(method, seed=3).train(not draws(method)) for _ in range(2))
    result = tables.lookup(ids, offsets, pooling={"history": None})
    directions = {name: torch.randn(result[name].shape) for name in used}
    loss = sum((result[name] * directions[name]).sum() for name in used)
    assert isinstance(loss, Tensor)
    loss.backward()
    total = torch.zeros(())
    for name in used:
        feature = name.split("@")[0]
        column, place = tables.feature_names.index(feature), 0
        config = next(t for t in TABLES if feature in t.feature_names and name in (feature, f"{feature}@{t.name}"))
        for example, row in enumerate(lists[feature]):
            counted = sum(i != config.padding_idx for i in row)
            for id_ in row:
                line = torch.zeros(1, 6, dtype=torch.int64)
                line[0, column] = id_
                vector = other.lookup(line)[name][0]
                if feature == "history":
                    total = total + (vector * directions[name][place]).sum()
                else:
                    share = max(1, counted) if config.pooling == "mean" else 1
                    total = total + (vector * directions[name][example]).sum() / share
                place += 1
    total.backward()
    for mine, theirs in zip(tables.parameters(), other.parameters()):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (mine, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_one_fused_update_for_target_and_history() -> None:
    """With Adagrad two updates of an id would differ from one by the sum of its gradients."""
    config = TableConfig("item", 50, 3, ["item", "history"])
    tables = EmbeddingTables(plan([config], "full", optimizer="adagrad"))
    before = tables.to_dense("item").double()
    ids, offsets = torch.tensor([7, 8, 7, 9, 7]), torch.tensor([0, 1, 2, 4, 5])
    result = tables.lookup(ids, offsets, pooling={"history": None})
    directions = torch.randn(5, 3)
    ((result["item"] * directions[:2]).sum() + (result["history"] * directions[2:]).sum()).backward()
    grad = torch.zeros(50, 3, dtype=torch.float64).index_add_(0, ids, directions.double())
    optimizer = tables.plan.optimizer.to_dict() if tables.plan.optimizer else {}
    expected = before - optimizer["lr"] * grad / (grad.abs() + optimizer["eps"])
    torch.testing.assert_close(tables.to_dense("item").double(), expected, rtol=1e-5, atol=1e-6)


def test_an_output_that_is_not_used_moves_nothing() -> None:
    tables = build(optimizer=SGD(lr=0.5))
    before = {t.name: tables.to_dense(t.name) for t in TABLES}
    ids, offsets, _ = bags(5, seed=6)
    tables.lookup(ids, offsets, pooling={"history": None})["tags"].sum().backward()
    for name, weight in before.items():
        assert torch.equal(weight, tables.to_dense(name)) == (name != "tag")


def test_weights_get_the_gradient_of_their_vectors() -> None:
    tables = build()
    ids, offsets, lists = bags(5, seed=7)
    weights = torch.rand(ids.numel(), requires_grad=True)
    result = tables.lookup(ids, offsets, weights, pooling={"history": None})
    (result["history"].sum() + result["brand"].sum()).backward()
    assert weights.grad is not None
    expected = []
    for feature, rows in lists.items():
        table = {"history": "item", "brand": "brand"}.get(feature)
        for id_ in (i for row in rows for i in row):
            expected.append(
                0.0 if table is None else float(tables.to_dense(table)[min(id_, 90 if table == "brand" else 400)].sum())
            )
    torch.testing.assert_close(weights.grad, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(ops.instructions() is None, reason="no native code")
def test_tables_that_come_to_the_cpu_are_looked_up_natively() -> None:
    tables = EmbeddingTables(plan(TABLES, "full"), device="meta")
    assert tables.lookups.ops == "reference"
    tables.store.to_empty(device="cpu")  # as a move from a GPU, which builds nothing anew
    assert tables.lookups.ops == "native"


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    tables = build()
    ids, offsets, _ = bags(3, seed=8)
    with pytest.raises(ValueError, match="pooling names the feature 'shop', which no table has"):
        tables.lookup(ids, offsets, pooling={"shop": None})
    with pytest.raises(ValueError, match="pooling must be 'sum', 'mean' or None, not 'max'"):
        tables.lookup(ids, offsets, pooling={"history": "max"})
    with pytest.raises(ValueError, match="pooling is None for 'history'.*call lookup"):
        tables(ids, offsets, pooling={"history": None})
    with pytest.raises(ValueError, match="offsets must rise from 0"):
        tables.lookup(ids[:-1], offsets)
    for wrong in (-5, 10**13):  # where the second feature begins
        fallen = offsets.clone()
        fallen[3] = wrong
        with pytest.raises(ValueError, match="offsets must rise from 0 .* and fall in between"):
            tables.lookup(ids, fallen, pooling=None)
    ids[-1] = 200
    with pytest.raises(IndexError, match="feature 'tags' holds id 200, but table 'tag' has the ids 0 … 199"):
        tables.lookup(ids, offsets, pooling={"tags": None})
