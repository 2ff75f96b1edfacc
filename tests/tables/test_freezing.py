"""``requires_grad_(False)``: frozen tables stay as they are, whoever updates them and whatever looks them up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_cases import random_ids
from torch import Tensor, nn

from embtables import Embedding, EmbeddingBag, EmbeddingTables, TableConfig, compress_, ops, plan
from embtables.methods import kinds
from embtables.optimizers import SGD, FusedOptimizer

BACKENDS = ["native", "reference"] if ops.backend() == "native" else ["reference"]
OPTIMIZERS = ["sgd", "rowwise_adagrad", "adagrad", "adam", None]
IDS = torch.tensor([1, 2, 2, 7])


class _Plain(SGD):
    """SGD without a native form."""

    kind = "plain_of_freezing"


def make(method: str = "full", optimizer: str | FusedOptimizer | None = "adam", **more: Any) -> EmbeddingTables:
    configs = [TableConfig("item", 100, 8, ["item", "history"]), TableConfig("user", 60, 8)]
    counts = {config.name: range(config.num_embeddings or 0, 0, -1) for config in configs}
    return EmbeddingTables(plan(configs, method, None if method == "full" else "60%", counts, optimizer), **more)


def everything(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all that training could change: weights, state, step counts and stages."""
    tables = next(m for m in module.modules() if isinstance(m, EmbeddingTables))
    found = {**module.state_dict(), **tables.optimizer_state_dict()}
    return {name: tensor.clone() for name, tensor in found.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(module: nn.Module, look_up: Callable[[], Tensor]) -> bool:
    """A step; returns whether the output required a gradient."""
    parameters = list(module.parameters())
    module.zero_grad()
    output = look_up()
    # Something else is there to be trained.
    (output.sum() * torch.ones((), requires_grad=True)).backward()
    if any(parameter.grad is not None for parameter in parameters):
        torch.optim.SGD(parameters, lr=0.1).step()
    return output.requires_grad


def check(module: nn.Module, freeze: nn.Module, look_up: Callable[[], Tensor]) -> None:
    """Freezing stops a lookup from training, and ``True`` makes it train again."""
    before = everything(module)
    assert freeze.requires_grad_(False) is freeze
    assert not train(module, look_up) and same(everything(module), before)
    freeze.requires_grad_(True)
    assert train(module, look_up) and not same(everything(module), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, _Plain(0.1)], ids=str)
def test_tables(optimizer: str | FusedOptimizer | None, backend: str) -> None:
    with ops.using(backend):
        tables = make(optimizer=optimizer)
        ids = random_ids(tables, 4)
        check(tables, tables, lambda: tables(ids))
        check(tables, tables, lambda: tables(ids, pooling=None))
        check(tables, tables, lambda: tables.lookup(ids)["history"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", ["sgd", None])
@pytest.mark.parametrize("method", [kind for kind in kinds() if kind != "drop_feature"])
def test_every_method(method: str, optimizer: str | None, backend: str) -> None:
    with ops.using(backend):
        tables = make(method, optimizer)
        ids = random_ids(tables, 4)
        tables.regularize(0.1)
        check(tables, tables, lambda: tables(ids))


@pytest.mark.parametrize("optimizer", ["adam", None])
def test_stages_and_steps_wait(optimizer: str | None) -> None:
    tables = make({"kind": "pruned", "warmup_steps": 0, "prune_steps": 2}, optimizer)  # type: ignore[arg-type]
    ids = random_ids(tables, 4)
    tables(ids)
    (stage,) = tables.stages
    assert int(stage.state()["steps"]) == 1
    tables.requires_grad_(False)
    tables(ids)
    assert int(stage.state()["steps"]) == 1
    tables.requires_grad_(True)(ids)
    assert int(stage.state()["steps"]) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_embedding(optimizer: str | None, backend: str) -> None:
    with ops.using(backend):
        table = Embedding(9, 4, optimizer=optimizer)
        check(table, table, lambda: table(IDS))
        check(table, table.tables, lambda: table(IDS))


def test_bags_and_compressed_modules() -> None:
    bags = EmbeddingBag.of(make(), "user")
    check(bags, bags, lambda: bags(IDS, torch.tensor([0, 2])))
    model = nn.ModuleDict({"item": nn.Embedding(100, 8), "user": nn.EmbeddingBag(60, 8, mode="sum")})
    compress_(model, "hash", budget="50%", optimizer="adagrad")
    check(model, model["item"], lambda: model["item"](IDS))
    check(model, model["user"], lambda: model["user"](IDS.view(2, 2)))


@pytest.mark.parametrize("optimizer", ["adam", None])
def test_collections(optimizer: str | None) -> None:
    pytest.importorskip("torchrec")
    from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
    from torchrec_cases import jagged

    from embtables.torchrec import EmbeddingBagCollection, EmbeddingCollection

    given = jagged({"item": 100, "user": 60}, 3, seed=1)
    shapes = [("item", 100), ("user", 60)]
    pooled = EmbeddingBagCollection(
        [EmbeddingBagConfig(name=n, num_embeddings=rows, embedding_dim=4, feature_names=[n]) for n, rows in shapes],
        optimizer=optimizer,
    )
    check(pooled, pooled, lambda: pooled(given).values())
    some = EmbeddingBagCollection.of(pooled.tables, features=["user"])
    check(pooled, some, lambda: some(given).values())
    each = EmbeddingCollection(
        [EmbeddingConfig(name=n, num_embeddings=rows, embedding_dim=4, feature_names=[n]) for n, rows in shapes],
        optimizer=optimizer,
    )
    check(each, each, lambda: each(given)["item"].values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_freezes_its_own_lookups_alone(backend: str) -> None:
    with ops.using(backend):
        tables = make("unified")
        item, user = Embedding.of(tables, "item"), Embedding.of(tables, "user")
        item.requires_grad_(False)
        before = everything(tables)
        assert not train(item, lambda: item(IDS)) and same(everything(tables), before)
        assert train(user, lambda: user(IDS)) and not same(everything(tables), before)
        check(tables, tables, lambda: user(IDS))
        # What is said to the tables holds for all views, and what was said to a view still holds for it.
        before = everything(tables)
        assert not train(item, lambda: item(IDS)) and same(everything(tables), before)
        tables.requires_grad_(False)
        item.requires_grad_(True)
        assert train(item, lambda: item(IDS))


def test_shared_parameters_are_frozen_for_all_views() -> None:
    tables = make("unified", None)
    item, user = Embedding.of(tables, "item"), Embedding.of(tables, "user")
    item.requires_grad_(False)
    assert not user(IDS).requires_grad
    user.requires_grad_(True)
    assert user(IDS).requires_grad and item(IDS).requires_grad


def test_a_model_is_frozen_by_apply() -> None:
    """As the documentation says: ``requires_grad_`` of a parent sees parameters, and fused tables have none."""
    model = nn.ModuleDict({"table": Embedding(9, 4, optimizer="sgd"), "head": nn.Linear(4, 1)})
    assert len(list(model.parameters())) == 2
    before = everything(model)
    model.requires_grad_(False)
    assert model["table"](IDS).requires_grad
    model.apply(lambda module: module.requires_grad_(False))
    assert not train(model, lambda: model["head"](model["table"](IDS))) and same(everything(model), before)
    # The usual next step: one part of a frozen model is tuned.
    model["table"].requires_grad_(True)
    assert train(model, lambda: model["head"](model["table"](IDS))) and not same(everything(model), before)


def test_copies_stay_frozen() -> None:
    table = Embedding(9, 4, optimizer="sgd").requires_grad_(False)
    assert not copy.deepcopy(table)(IDS).requires_grad
    tables = make().requires_grad_(False)
    assert not copy.deepcopy(tables)(random_ids(tables, 2)).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_lookups_are_compiled_anew(backend: str) -> None:
    with ops.using(backend):
        tables = make(optimizer="adagrad")
        ids = random_ids(tables, 4)
        compiled = torch.compile(tables, backend="aot_eager", fullgraph=True)
        assert train(tables, lambda: compiled(ids))
        check(tables, tables, lambda: compiled(ids))
