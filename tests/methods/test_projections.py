"""Projections of narrow rows: which of them are trained, and what those cost that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_cases import falling_counts, random_ids
from native_cases import BACKENDS
from torch import Tensor, nn

from embtables import Embedding, EmbeddingTables, Plan, TableConfig, compress_, ops, plan
from embtables.sizes.layout import Extra

TABLES = [TableConfig("user", 400, 16, ["user", "friend"]), TableConfig("item", 150, 16)]
COUNTS = {table.name: falling_counts(table.num_embeddings or 0) for table in TABLES}
METHODS: list[dict[str, Any]] = [
    {"kind": "mixed_dimension"},
    {"kind": "banded", "widths": [3, 5], "precisions": [], "decay": 3.0},
    {"kind": "fewer_dimensions", "projection": True},
    {"kind": "low_rank"},
]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method["kind"])
each_optimizer = pytest.mark.parametrize("optimizer", [None, "sgd", "adam"])


def solved(method: dict[str, Any], optimizer: str | None) -> Plan:
    return plan(TABLES, method, "40%", COUNTS, optimizer)


def projections(tables: EmbeddingTables) -> dict[str, Tensor]:
    found = {extra.name: tables.store.extra(extra.name) for extra in tables.plan.groups[0].layout.training.extras}
    assert found
    return found


def step(tables: EmbeddingTables, seed: int) -> None:
    """One training step, by the fused optimizer or by SGD."""
    out = tables(random_ids(tables, 60, seed))
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    (out - target).square().sum().backward()
    if tables.plan.optimizer is None:
        torch.optim.SGD(tables.parameters(), lr=0.01).step()
        tables.zero_grad()


@pytest.mark.parametrize("backend", BACKENDS)
@each_optimizer
@each_method
def test_projections_move_only_where_that_is_asked_for(
    method: dict[str, Any], optimizer: str | None, backend: str
) -> None:
    for trains in (False, True):
        tables = EmbeddingTables(solved(method | {"train_projection": trains}, optimizer), std=0.5)
        before = {name: tensor.clone() for name, tensor in projections(tables).items()}
        rows = {name: slab.clone() for name, slab in tables.store.named_slabs()}
        with ops.using(backend):
            for seed in range(3):
                step(tables, seed)
        moved = {name for name, tensor in projections(tables).items() if not torch.equal(tensor, before[name])}
        assert moved == (set(before) if trains else set())
        assert all(not torch.equal(slab, rows[name]) for name, slab in tables.store.named_slabs())


@each_optimizer
@each_method
def test_a_projection_that_stays_has_neither_gradient_nor_state(method: dict[str, Any], optimizer: str | None) -> None:
    stays, moves = (solved(method | {"train_projection": trains}, optimizer) for trains in (False, True))
    (shapes,) = ([extra.shape for extra in g.layout.training.extras] for g in moves.groups)
    assert stays.inference_bytes == moves.inference_bytes
    # A gradient of its size, or Adam's two moments, and nothing with SGD.
    less = sum({None: 4, "sgd": 0, "adam": 8}[optimizer] * width * dim for width, dim in shapes)
    assert stays.training_bytes == moves.training_bytes - less
    tables = EmbeddingTables(stays)
    assert tables.memory().training_bytes == stays.training_bytes
    kept = {id(tensor) for tensor in projections(tables).values()}
    assert kept.isdisjoint(map(id, tables.parameters())) and kept <= set(map(id, tables.buffers()))


@pytest.mark.parametrize("backend", BACKENDS)
@each_method
def test_gradients_go_through_the_projection(method: dict[str, Any], backend: str) -> None:
    """Vectors are linear in the rows, so that a gradient tells what any step changes, to the last digit."""
    tables = EmbeddingTables(solved(method, None), std=0.5)
    ids = random_ids(tables, 50)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(50, 48, generator=generator)
    with ops.using(backend):
        before = tables(ids)
        before.backward(gradient)
        expected = 0.0
        with torch.no_grad():
            for parameter in tables.parameters():
                assert parameter.grad is not None
                moved = torch.randn(parameter.shape, generator=generator)
                parameter.add_(moved)
                expected += float((parameter.grad.double() * moved.double()).sum())
            found = float(((tables(ids).double() - before.double()) * gradient.double()).sum())
    assert abs(expected) > 1 and found == pytest.approx(expected, rel=1e-4)


def test_a_lookup_notices_a_projection_that_changes_before_its_gradient() -> None:
    for optimizer in (None, "sgd"):
        tables = EmbeddingTables(solved({"kind": "mixed_dimension"}, optimizer), std=0.5)
        out = tables(random_ids(tables, 8))
        next(iter(projections(tables).values())).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation|changed between a lookup and its"):
            out.sum().backward()


def test_two_lookups_before_a_backward_do_not_need_what_the_rows_were() -> None:
    """Of a projection that stays, gradients do not depend on rows: nothing is copied, and both updates are made."""
    once, twice = (EmbeddingTables(solved({"kind": "mixed_dimension"}, "sgd"), std=0.5) for _ in range(2))
    first, second = random_ids(once, 20, 0), random_ids(once, 20, 1)
    once(torch.cat([first, second])).sum().backward()
    (twice(first).sum() + twice(second).sum()).backward()
    for table in TABLES:
        torch.testing.assert_close(once.to_dense(table.name), twice.to_dense(table.name))


def test_what_compress_fits_stays_as_it_was_fitted() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.item = nn.Embedding(300, 16)

        def forward(self, ids: Tensor) -> Tensor:
            vectors: Tensor = self.item(ids)
            return vectors

    model = Model()
    compress_(model, {"kind": "fewer_dimensions", "projection": True}, "30%")
    (tables,) = (m.tables for m in model.modules() if isinstance(m, Embedding))
    before = {name: tensor.clone() for name, tensor in projections(tables).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = model.item.to_dense()
    model(torch.arange(300)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in projections(tables).items())
    assert not torch.equal(model.item.to_dense(), rows)


def test_plans_say_so_and_older_ones_have_trained_projections() -> None:
    stays, moves = (solved({"kind": "low_rank", "train_projection": trains}, "adam") for trains in (False, True))
    assert Plan.from_dict(stays.to_dict()) == stays and Plan.from_dict(moves.to_dict()) == moves
    extras = [plan_.to_dict()["groups"][0]["layout"]["training"]["extras"] for plan_ in (stays, moves)]
    assert all(extra["trained"] is False for extra in extras[0]) and not any("trained" in extra for extra in extras[1])
    assert Extra("p", (2, 4)).trained
    with pytest.raises(ValueError, match="'p' is trained or not, True or False, not 1"):
        Extra("p", (2, 4), 1).check()  # type: ignore[arg-type]
