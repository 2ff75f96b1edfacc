"""Stages hear the gradients of rows: those that autograd gives parameters, before anything is updated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_cases import falling_counts, random_ids
from native_cases import jagged
from torch import Tensor

from embtables import EmbeddingBag, EmbeddingTables, TableConfig, optimizers, plan
from embtables.extend import FusedOptimizer, Stage, Store

TABLES = [TableConfig("item", 300, 8, ["item", "history"], padding_idx=2), TableConfig("user", 200, 8)]
METHODS = pytest.mark.parametrize("method", ["full", "hash", "compositional", "mixed_dimension", "robe", "pruned"])


class Listener(Stage):
    """Adds up what it hears, and looks at the weights meanwhile."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._held = (store,)
        self.listens_to = tuple(name for name, _ in store.named_slabs())
        self.sums = {name: torch.zeros_like(slab) for name, slab in store.named_slabs()}
        self.seen: list[tuple[str, Tensor]] = []
        self.steps = 0

    def step(self, touched: Any) -> None:
        self.steps += 1

    def hear(self, slab: str, rows: Tensor, grad: Tensor) -> None:
        assert torch.equal(rows, rows.unique())
        self.sums[slab][rows] += grad
        self.seen.append((slab, self._held[0].slab(slab).clone()))


def make(method: str, optimizer: Any) -> EmbeddingTables:
    counts = {table.name: falling_counts(table.num_embeddings or 0) for table in TABLES}
    return EmbeddingTables(plan(TABLES, method, None if method == "full" else "60%", counts, optimizer), std=0.5)


def listening(method: str, optimizer: Any) -> tuple[EmbeddingTables, Listener]:
    tables = make(method, optimizer)
    listener = Listener(tables.store)
    tables.stages.append(listener)
    return tables, listener


def gradients(tables: EmbeddingTables) -> dict[str, Tensor]:
    """Of each slab, as autograd left them."""
    found = {}
    for name, slab in tables.store.named_slabs():
        start, width = tables.store.start(name), tables.store.width(name)
        gradient = tables.store.weight(width).grad
        found[name] = torch.zeros_like(slab) if gradient is None else gradient[start : start + slab.shape[0]]
    return found


@METHODS
@pytest.mark.parametrize("optimizer", [None, "sgd", "adagrad"])
@pytest.mark.parametrize("bags", [False, True], ids=["ids", "bags"])
def test_what_is_heard_is_the_gradient_before_the_update(method: str, optimizer: Any, bags: bool) -> None:
    tables, listener = listening(method, optimizer)
    twin = make(method, None)
    before = {name: slab.clone() for name, slab in tables.store.named_slabs()}
    given = jagged(tables, 40, 0) if bags else (random_ids(tables, 40),)
    for each in (tables, twin):
        each(*given).square().sum().backward()
    expected = gradients(twin)
    assert any(gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(listener.sums[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert listener.steps == 1
    assert all(torch.equal(weights, before[name]) for name, weights in listener.seen)
    assert optimizer is None or any(not torch.equal(slab, before[name]) for name, slab in tables.store.named_slabs())


@pytest.mark.parametrize("method", ["hash", "compositional"])
def test_listening_leaves_the_same_weights(method: str) -> None:
    (tables, _), twin = listening(method, "adagrad"), make(method, "adagrad")
    for seed in range(3):
        for each in (tables, twin):
            each(random_ids(each, 30, seed)).square().sum().backward()
    for (name, slab), (_, other) in zip(tables.store.named_slabs(), twin.store.named_slabs()):
        torch.testing.assert_close(slab, other, rtol=1e-5, atol=1e-6, msg=name)


def test_each_lookup_of_a_step_and_of_a_block_is_heard() -> None:
    tables, listener = listening("hash", "sgd")
    twin = make("hash", None)
    ids = random_ids(tables, 20)
    with tables.accumulate():
        for part in ids.split(10):
            tables(part).square().sum().backward()
    twin(ids).square().sum().backward()
    assert listener.steps == 1
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(listener.sums[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_views_are_heard() -> None:
    tables, listener = listening("hash", "sgd")
    twin = make("hash", None)
    for each in (tables, twin):
        EmbeddingBag.of(each, "user", mode="sum")(torch.tensor([[1, 2], [2, 3]])).square().sum().backward()
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(listener.sums[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_nothing_is_heard_where_nothing_trains() -> None:
    tables, listener = listening("hash", "sgd")
    tables.eval()(random_ids(tables, 5))
    with torch.no_grad():
        tables.train()(random_ids(tables, 5))
    assert not listener.seen and not listener.steps


def test_compiled_lookups_run_uncompiled_or_are_refused() -> None:
    tables, listener = listening("hash", "sgd")
    ids = random_ids(tables, 5)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a stage that listens to gradients"):
        torch.compile(tables, backend="aot_eager", fullgraph=True)(ids)
    torch._dynamo.reset()
    torch.compile(tables, backend="aot_eager")(ids).sum().backward()
    assert listener.seen


def test_a_row_wise_rule_of_another_package_has_no_rows_in_robe() -> None:
    class Mine(FusedOptimizer):
        kind = "row_wise_of_mine"

        @classmethod
        def state_widths(cls, width: int) -> tuple[int, ...]:
            return (width, 1)

    with pytest.raises(ValueError, match="no rows for the optimizer row_wise_of_mine"):
        make("robe", Mine(0.1))
    assert [kind for kind in ("sgd", "adagrad", "adam") if optimizers.rule_of(kind).is_row_wise()] == []
