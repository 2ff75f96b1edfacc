"""One table in the shapes of torch.nn, against torch.nn itself and against the tables underneath."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from core_cases import TRAINED_PROJECTIONS
from torch import Tensor, nn

from embtables import (
    SGD,
    Adam,
    Embedding,
    EmbeddingBag,
    EmbeddingTables,
    InfeasibleBudget,
    RowWiseAdagrad,
    TableConfig,
    compress_,
    ops,
    plan,
)
from embtables.methods import Pruned
from embtables.training.metrics import auc

IDS = torch.tensor([[[1, 2, 0], [99, 2, 7]]])
BACKENDS = ["reference", *(["native"] if ops.instructions() else [])]
METHODS = {
    "full": None,
    "hash": 0.2,
    "compositional": 0.4,
    "unified": 0.3,
    "robe": 0.3,
    "multi_hash": 0.3,
    "pruned": 0.5,
}


def joint(
    method: str = "unified", budget: float | None = 0.3, optimizer: object = None, **more: object
) -> EmbeddingTables:
    tables = [TableConfig("item", 100, 8, padding_idx=0), TableConfig("user", 50, 8), TableConfig("city", 7, 8)]
    return EmbeddingTables(plan(tables, method, budget, optimizer=optimizer), seed=3, **more)  # type: ignore[arg-type]


def full_like(stock: nn.Embedding | nn.EmbeddingBag, **more: object) -> Embedding:
    ours = Embedding(stock.num_embeddings, stock.embedding_dim, stock.padding_idx, **more)  # type: ignore[arg-type]
    with torch.no_grad():
        ours.weight.copy_(stock.weight)
    return ours


# ---- as those of torch.nn are made -----------------------------------------------------------------------------------


def test_each_starts_with_vectors_of_its_own_which_torch_seeds() -> None:
    def vectors() -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return Embedding(50, 4).to_dense(), Embedding(50, 4, method="hash", budget=0.5).to_dense()

    first, second = vectors(), vectors()
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(Embedding(50, 4).to_dense(), Embedding(50, 4).to_dense())
    assert torch.equal(Embedding(50, 4, seed=1).to_dense(), Embedding(50, 4, seed=1).to_dense())


def test_the_default_scale_is_one_from_which_products_learn() -> None:
    for dim in (4, 64):
        table = Embedding(20_000, dim, method="hash", budget=0.3)
        assert float(table.to_dense().square().mean().sqrt()) == pytest.approx(1 / dim, rel=0.02)
    assert float(Embedding(20_000, 4, std=1.0).to_dense().std()) == pytest.approx(1, rel=0.02)
    assert torch.equal(Embedding(9, 4, init_fn=lambda w: w.fill_(2)).to_dense(), torch.full((9, 4), 2.0))


def test_a_plain_factorization_model_learns_by_default_or_the_report_says_why_not(shared_data: Path) -> None:
    """MovieLens-100K, a random tenth held out. ``nn.Embedding`` at the best of four scales is what is to be reached."""
    ratings = pl.read_csv(shared_data / "ml-100k" / "ml-100k.inter", separator="\t")
    users, items, scores = (torch.from_numpy(ratings[:, i].to_numpy().astype("int64")) for i in range(3))
    labels, order = (scores >= 4).float(), torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
    held_out, train = order[: len(order) // 10], order[len(order) // 10 :]
    num_users, num_items = int(users.max()) + 1, int(items.max()) + 1

    class Factors(nn.Module):
        def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
            super().__init__()
            self.user, self.item = make(num_users, 16), make(num_items, 16)
            self.user_bias, self.item_bias = (
                nn.Embedding.from_pretrained(torch.zeros(n, 1), False) for n in (num_users, num_items)
            )

        def forward(self, user: Tensor, item: Tensor) -> Tensor:
            biases = self.user_bias(user) + self.item_bias(item)
            return (self.user(user) * self.item(item)).sum(1) + biases.squeeze(1)

    def auc_of(model: nn.Module) -> float:
        optimizer, best = torch.optim.Adam(model.parameters(), 0.01), 0.0
        for epoch in range(4):
            shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))
            for rows in train[shuffled].split(1024):
                optimizer.zero_grad()
                logits = model(users[rows], items[rows])
                nn.functional.binary_cross_entropy_with_logits(logits, labels[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                best = max(best, auc(labels[held_out].numpy(), model(users[held_out], items[held_out]).numpy()))
        return best

    def plain(std: float) -> Callable[[int, int], nn.Module]:
        return lambda n, dim: nn.Embedding.from_pretrained(torch.randn(n, dim) * std, False)

    torch.manual_seed(0)
    reached = max(auc_of(Factors(plain(std))) for std in (1.0, 0.25, 0.1, 0.01))
    assert auc_of(Factors(Embedding)) > reached - 0.01
    # From the scale that torch gives it a table does not get there, compressed ones neither, and this is said.
    compressed = []
    for std in (None, 1 / 16):
        told = compress_(model := Factors(nn.Embedding), {"user": "hash", "item": "hash"}, "50%", std=std)
        assert "1, from where models that multiply vectors hardly learn; give std=0.062: user, item" in str(told)
        compressed.append(auc_of(model))
    assert compressed[0] < reached - 0.01 and compressed[1] > compressed[0] + 0.01
    assert not compress_(Factors(plain(0.1)), {"user": "hash", "item": "hash"}, "50%").untrained


@pytest.mark.parametrize("freeze", [True, False])
def test_from_pretrained_as_of_torch(freeze: bool) -> None:
    vectors, ids = torch.randn(9, 4), torch.tensor([[3, 3, 8], [0, 1, 0]])
    for ours, theirs in (
        (Embedding.from_pretrained(vectors, freeze), nn.Embedding.from_pretrained(vectors, freeze)),
        (
            EmbeddingBag.from_pretrained(vectors, freeze, mode="sum"),
            nn.EmbeddingBag.from_pretrained(vectors, freeze, mode="sum"),
        ),
    ):
        torch.testing.assert_close(ours(ids), theirs(ids))
        assert ours(ids).requires_grad == theirs(ids).requires_grad == (not freeze)
    with pytest.raises(ValueError, match=r"embeddings must be a tensor \[num_embeddings, D\], not \[4\]"):
        Embedding.from_pretrained(vectors[0])
    with pytest.raises(ValueError, match="method hash cannot take trained vectors as they are: use the method 'full'"):
        Embedding.from_pretrained(vectors, method="hash", budget=0.5)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_are_made_as_those_of_torch(mode: str) -> None:
    ours = EmbeddingBag(9, 4, mode=mode, include_last_offset=True, seed=1)  # type: ignore[arg-type]
    theirs = nn.EmbeddingBag(9, 4, mode=mode, include_last_offset=True)
    assert EmbeddingBag(9, 4).mode == nn.EmbeddingBag(9, 4).mode
    theirs.load_state_dict({"weight": ours.to_dense()})
    ids, offsets = torch.tensor([3, 3, 8, 0]), torch.tensor([0, 1, 1, 4])
    torch.testing.assert_close(ours(ids, offsets), theirs(ids, offsets))
    with pytest.raises(ValueError, match="mode must be one of sum, mean, not 'max'"):
        EmbeddingBag(9, 4, mode="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode must be one of sum, mean, not 'max'"):
        EmbeddingBag.of(ours.tables, "embedding", "max")  # type: ignore[arg-type]


@pytest.mark.parametrize("assign", [True, False])
def test_a_weight_that_torch_saved_is_loaded(assign: bool) -> None:
    theirs = nn.Sequential(nn.Embedding(9, 4), nn.EmbeddingBag(9, 4))
    ours = nn.Sequential(Embedding(9, 4, on_out_of_range="oov"), EmbeddingBag(9, 4))
    ours.load_state_dict(theirs.state_dict(), assign=assign)
    for own, other in zip(ours, theirs):
        assert torch.equal(own.to_dense()[:9], other.weight)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.weight: \[8, 4\], not \[9, 4\]"):
        ours.load_state_dict(nn.Sequential(nn.Embedding(8, 4), nn.EmbeddingBag(9, 4)).state_dict())
    with pytest.raises(
        RuntimeError, match="weight: table 'embedding' is not stored in full and in fp32, so it cannot take a weight"
    ):
        Embedding(9, 4, method="hash", budget=0.5).load_state_dict(nn.Embedding(9, 4).state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_a_traced_lookup_refuses_ids_out_of_range(method: str) -> None:
    table = Embedding(100, 8, method=method, budget=METHODS[method]).eval()
    with torch.no_grad():
        traced = torch.jit.trace(table, torch.tensor([3, 99]))
    assert torch.equal(traced(torch.tensor([5, 98, 0])), table(torch.tensor([5, 98, 0])))
    for wrong in (100, -1):
        with pytest.raises((IndexError, RuntimeError), match="index 1 is out of bounds"):
            traced(torch.tensor([5, wrong]))


# ---- Embedding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_shapes_and_vectors_are_those_of_to_dense(method: str, dtype: torch.dtype) -> None:
    table = Embedding(100, 8, padding_idx=0, method=method, budget=METHODS[method], seed=1)
    dense = table.to_dense()
    assert dense.shape == (100, 8) and not dense[0].any() and dense[1:].any(1).all()
    for ids in (IDS, IDS[0, 0], torch.tensor(5), torch.empty(2, 0)):
        ids = ids.to(dtype)
        assert torch.equal(table(ids), dense[ids.long()]) and torch.equal(table(input=ids), table(ids))
    assert table(torch.tensor(5, dtype=dtype)).shape == (8,)


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
@pytest.mark.parametrize("sparse", [False, True])
def test_full_trains_as_torch(padding_idx: int | None, sparse: bool) -> None:
    torch.manual_seed(0)
    stock = nn.Embedding(100, 8, padding_idx, sparse=sparse)
    ours = full_like(stock, sparse=sparse)
    assert ours.padding_idx == stock.padding_idx and ours.sparse is sparse
    pairs = [(m, torch.optim.SGD(m.parameters(), lr=0.3)) for m in (stock, ours)]
    for step in range(3):
        ids = torch.randint(100, (4, 6), generator=torch.Generator().manual_seed(step))
        for module, optimizer in pairs:
            optimizer.zero_grad()
            module(ids).pow(2).sum().backward()
            optimizer.step()
    assert next(ours.parameters()).grad.is_sparse is sparse  # type: ignore[union-attr]
    torch.testing.assert_close(ours.weight, stock.weight)


def test_weight_is_the_parameter_that_trains() -> None:
    table = Embedding(100, 8)
    assert [p is table.weight for p in table.parameters()] == [True]
    nn.init.constant_(table.weight, 2.0)
    assert (table(IDS) == 2).all()
    table.weight.data.mul_(2)
    assert (table(IDS) == 4).all()
    assert table.weight.requires_grad and isinstance(table.weight, nn.Parameter)


def test_weight_of_a_part_of_a_parameter() -> None:
    tables = joint("full", None)
    views = {name: Embedding.of(tables, name) for name in ("item", "user", "city")}
    for name, view in views.items():
        assert torch.equal(view.weight, tables.to_dense(name))
        with torch.no_grad():
            view.weight[1] = 5.0
        assert (tables.to_dense(name)[1] == 5).all()
    # Another use of the weight, such as scoring all items, trains the table.
    views["user"].weight.sum().backward()
    (weight,) = tables.parameters()
    grad = weight.grad
    assert grad is not None and (grad.sum(1) != 0).sum() == 50
    assert not views["item"].weight[0].any()


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (lambda: Embedding(100, 8, method="hash", budget=0.1), "not stored in full.*to_dense"),
        (lambda: Embedding(100, 8, optimizer="sgd"), "fused optimizer.*to_dense"),
        (lambda: Embedding.of(joint(), "item"), "not stored in full"),
    ],
)
def test_weight_is_absent_where_it_would_not_be_honest(table: object, reason: str) -> None:
    module = table()  # type: ignore[operator]
    assert not hasattr(module, "weight")
    with pytest.raises(AttributeError, match=reason):
        _ = module.weight
    with pytest.raises(AttributeError, match="would not be used"):
        module.weight = nn.Parameter(torch.zeros(100, 8))
    assert "weight" not in dict(module.named_parameters(recurse=False))


def test_bad_input() -> None:
    table = Embedding(100, 8, method="hash", budget=0.1, name="item")
    with pytest.raises(IndexError, match="holds id 100, but table 'item' has the ids 0 … 99"):
        table(torch.tensor([3, 100]))
    with pytest.raises(IndexError, match="-1"):
        table(torch.tensor([-1]))
    for bad in (torch.tensor([1.0]), torch.tensor([True]), [1, 2]):
        with pytest.raises(TypeError, match="table 'item' must be an int32 or int64 tensor"):
            table(bad)  # type: ignore[arg-type]
    with pytest.raises(InfeasibleBudget):
        Embedding(100, 8, method="hash", budget=31)
    with pytest.raises(ValueError, match="padding_idx 100"):
        Embedding(100, 8, 100)
    with pytest.raises(ValueError, match="padding_idx -101"):
        Embedding(100, 8, -101)
    with pytest.raises(ValueError, match="there is no table 'x'; the tables: item, user, city"):
        Embedding.of(joint(), "x")


def test_raw_ids_and_oov() -> None:
    raw = Embedding(None, 8, method="hash", budget=3200)
    assert raw(torch.tensor([-(2**62), 2**62])).shape == (2, 8)
    folded = Embedding(100, 8, on_out_of_range="oov")
    assert torch.equal(folded(torch.tensor([500])), folded(torch.tensor([-3])))
    assert folded.weight.shape == (101, 8)


def test_initial_scale() -> None:
    for method in ("full", "hash", "compositional"):
        for std in (None, 0.01):
            table = Embedding(20_000, 8, method=method, budget=None if method == "full" else 0.5, std=std)
            assert float(table.to_dense().std()) == pytest.approx(std or 1 / 8, rel=0.05)


# ---- several views of the same tables --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", [None, SGD(lr=0.1)])
def test_views_train_as_one_lookup_of_all(method: str, optimizer: SGD | None) -> None:
    """Each table through a view of its own against all in one call of the tables."""
    torch.manual_seed(0)
    one, apart = (joint(method, METHODS[method], optimizer) for _ in range(2))
    views = [Embedding.of(apart, name) for name in ("item", "user", "city")]
    outer = [torch.optim.SGD(t.parameters(), lr=0.1) if optimizer is None else None for t in (one, apart)]
    for _ in range(4):
        ids = torch.stack([torch.randint(n, (16,)) for n in (100, 50, 7)], 1)
        losses = (one(ids), torch.cat([view(ids[:, i]) for i, view in enumerate(views)], 1))
        torch.testing.assert_close(*losses)
        for loss, optim in zip(losses, outer):
            loss.pow(2).sum().backward()
            if optim is not None:
                optim.step()
                optim.zero_grad()
    for name in ("item", "user", "city"):
        torch.testing.assert_close(one.to_dense(name), apart.to_dense(name))


def test_views_make_one_dense_gradient() -> None:
    """Lookups of shared storage hand on sparse gradients, which become dense once, and are then dropped."""
    tables = joint()
    views = [Embedding.of(tables, name) for name in ("item", "user", "city")]
    (weight,) = tables.parameters()
    made = []
    vectors = [view(torch.tensor([1, 2, 3])) for view in views]
    (alias,) = tables._view_steps.aliases.values()
    alias.register_hook(lambda g: made.append((g.is_sparse, g._nnz())))
    sum(v.sum() for v in vectors).backward()  # type: ignore[union-attr]
    # 3 ids of 3 tables, each of at most two rows of the shared storage
    assert len(made) == 1 and made[0][0] and 3 < made[0][1] <= 18
    assert weight.grad is not None and not weight.grad.is_sparse and weight.grad.sum() == 3 * 3 * 8
    assert not tables._view_steps.aliases


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_are_freed_after_a_lookup_train(backend: str) -> None:
    """What was looked up while frozen has no backward, after which it would be forgotten."""
    tables = EmbeddingTables(plan([TableConfig("item", 100, 8), TableConfig("word", 50, 16)], "full", optimizer=None))
    item = Embedding.of(tables, "item")
    weight = next(p for p in tables.parameters() if p.shape[1] == 8)
    with ops.using(backend):
        weight.requires_grad_(False)
        assert not item(torch.tensor([1, 2])).requires_grad
        weight.requires_grad_()
        item(torch.tensor([3, 4])).sum().backward()
        assert weight.grad is not None and weight.grad.sum() == 2 * 8
        item(torch.tensor([5]))
        weight.requires_grad_(False)
        assert not item(torch.tensor([1, 2])).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["full", "hash", "unified"])
def test_transforms_of_a_model_of_views(method: str, backend: str) -> None:
    """Gradients are those of backward, and the derivative along the weights is twice what is quadratic in them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = joint(method, METHODS[method])
            self.item, self.user = Embedding.of(self.tables, "item"), EmbeddingBag.of(self.tables, "user")

        def forward(self, ids: Tensor) -> Tensor:
            return (self.item(ids[:, 0]) * self.user(ids[:, 1:])).sum()

    model, ids = Model(), torch.tensor([[1, 2, 2], [7, 49, 0], [0, 3, 4]])
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (ids,))

    with ops.using(backend):
        model(ids).backward()
        # PyTorch leaves other weights in modules that a model holds several times.
        expected = {name: weight.grad for name, weight in model.named_parameters()}
        torch.testing.assert_close(torch.func.grad(loss)(weights), expected)
        value, along = torch.func.jvp(loss, (weights,), (weights,))
        torch.testing.assert_close(along, 2 * value)
        each = torch.func.vmap(loss)({name: torch.stack([w, 2 * w]) for name, w in weights.items()})
        torch.testing.assert_close(each, torch.stack([value, 4 * value]))


def test_pruning_counts_steps_not_lookups() -> None:
    schedule = Pruned(warmup_steps=3, prune_steps=1, interval=1)
    tables = [TableConfig("item", 100, 8), TableConfig("user", 50, 8)]
    shared = EmbeddingTables(plan(tables, schedule, 0.5, optimizer=None))
    views = [Embedding.of(shared, t.name) for t in tables]
    zeros = []
    for _ in range(6):
        sum(view(torch.tensor([1, 2])).sum() for view in (*views, views[0])).backward()  # type: ignore[union-attr]
        zeros.append(int((shared.to_dense("item") == 0).sum()))
    one = EmbeddingTables(plan(tables, schedule, 0.5, optimizer=None))
    expected = []
    for _ in range(6):
        one(torch.tensor([[1, 1], [2, 2]])).sum().backward()
        expected.append(int((one.to_dense("item") == 0).sum()))
    assert zeros == expected and zeros[0] == 0 and zeros[-1] > 0


def test_fused_adam_counts_steps_not_lookups() -> None:
    tables = joint(optimizer=Adam(lr=0.1))
    views = [Embedding.of(tables, name) for name in ("item", "user", "city")]
    for _ in range(3):
        sum(view(torch.tensor([1])).sum() for view in views).backward()  # type: ignore[union-attr]
    assert int(tables.store._step) == 3


@pytest.mark.parametrize("fused", [RowWiseAdagrad(lr=0.1), Adam(lr=0.1)])
def test_a_table_looked_up_twice_with_a_fused_optimizer(fused: RowWiseAdagrad | Adam) -> None:
    """Two updates, each of its own gradient: disjoint ids end where one call would leave them."""
    once, twice = (Embedding(100, 8, optimizer=fused, std=1.0, seed=0) for _ in range(2))
    once(torch.arange(10)).pow(2).sum().backward()
    (twice(torch.arange(5)).pow(2).sum() + twice(torch.arange(5, 10)).pow(2).sum()).backward()
    torch.testing.assert_close(once.to_dense(), twice.to_dense())
    # A projection that both calls use is updated by the one's backward before the other's needs it.
    projected = Embedding(100, 8, method=TRAINED_PROJECTIONS, budget=0.6, optimizer=fused)
    before = projected.to_dense()
    (projected(torch.arange(5)).pow(2).sum() + projected(torch.arange(5, 10)).pow(2).sum()).backward()
    assert (projected.to_dense() != before).any() and projected.to_dense().isfinite().all()


@pytest.mark.parametrize("method", ["unified", "mixed_dimension"])
def test_the_mode_of_a_view_is_that_of_its_lookups(method: str) -> None:
    """Whether they update, are regularized and count as steps, whatever the modes of others that share the tables."""
    tables = joint(method, 0.6, Adam(lr=0.1))
    tables.regularize(0.5)
    model = nn.ModuleDict({name: Embedding.of(tables, name) for name in ("item", "user", "city")})
    ids = torch.tensor([1, 2, 3])

    def trains(name: str) -> bool:
        before, steps = tables.to_dense(name), int(tables.store._step)
        vectors = model[name](ids)
        if vectors.requires_grad:
            (0 * vectors.sum()).backward()
        counted = int(tables.store._step) - steps
        assert vectors.requires_grad is bool(counted) is not torch.equal(before, tables.to_dense(name))
        return bool(counted)

    model["user"].eval()
    assert [trains(name) for name in model] == [True, False, True]
    model.eval()
    model["city"].train()
    assert [trains(name) for name in model] == [False, False, True]
    tables.eval()
    assert trains("city")
    model.eval()
    assert [trains(name) for name in model] == [False] * 3 and not tables(ids.expand(2, 3)).requires_grad
    model.train()
    assert [trains(name) for name in model] == [True] * 3 and tables(ids.expand(2, 3)).requires_grad


def test_regularization_reaches_views() -> None:
    tables = joint("full", None)
    tables.regularize(0.5)
    view = Embedding.of(tables, "user")
    (view(torch.tensor([3, 3])) * 0).sum().backward()
    (weight,) = tables.parameters()
    expected = torch.zeros(50, 8)
    expected[3] = 0.5 * tables.to_dense("user")[3]
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[100:150], expected)


# ---- EmbeddingBag ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("include_last_offset", [False, True])
def test_bags_as_torch(mode: str, padding_idx: int | None, include_last_offset: bool) -> None:
    torch.manual_seed(0)
    stock = nn.EmbeddingBag(100, 8, mode=mode, padding_idx=padding_idx, include_last_offset=include_last_offset)
    config = TableConfig("t", 100, 8, padding_idx=padding_idx)
    tables = EmbeddingTables(plan([config, TableConfig("u", 9, 8)], "full", optimizer=None))
    tables.store.slab("t").copy_(stock.weight.detach())
    ours = EmbeddingBag.of(tables, "t", mode, include_last_offset)  # type: ignore[arg-type]
    flat = torch.tensor([1, 0, 7, 0, 0, 99, 7, 7])
    offsets = torch.tensor([0, 3, 3, 5, 8] if include_last_offset else [0, 3, 3, 5])
    weights = torch.rand(8) if mode == "sum" else None
    square = None if weights is None else weights.view(4, 2)
    for arguments in ((flat, offsets), (flat, offsets, weights), (flat.view(4, 2), None, square), (flat.view(2, 4),)):
        for ids in (arguments[0], arguments[0].int()):
            cast = [
                ids,
                *(a.to(ids.dtype) if a is not None and not a.is_floating_point() else a for a in arguments[1:]),
            ]
            torch.testing.assert_close(ours(*cast), stock(*cast))
    for module in (stock, ours):
        module(flat, offsets, weights).pow(2).sum().backward()
    (parameter,) = tables.parameters()
    torch.testing.assert_close(parameter.grad[:100], stock.weight.grad)  # type: ignore[index]


@pytest.mark.parametrize(
    ("how", "optimizer", "l2"),
    [
        ("eager", "adam", 0.0),
        ("eager", "adam", 0.3),
        ("eager", SGD(l2=0.3), 0.0),
        ("eager", None, 0.3),
        ("compiled", "adam", 0.3),
        ("compiled", SGD(l2=0.3), 0.0),
    ],
)
def test_ids_behind_the_last_bag_move_nothing(how: str, optimizer: SGD | str | None, l2: float) -> None:
    """Nor do they count as occurrences: all is as if they had not been given, although they are checked."""
    config = TableConfig("item", 300, 16, padding_idx=2, pooling="mean")
    without = EmbeddingTables(plan([config], "hash", "50%", optimizer=optimizer))
    without.regularize(l2, {"item": range(1, 301)})
    given = copy.deepcopy(without)
    bags, behind = (EmbeddingBag.of(tables, "item", include_last_offset=True) for tables in (without, given))
    look_up = behind if how == "eager" else torch.compile(behind, backend="aot_eager")
    dense = [torch.optim.SGD(tables.parameters(), 0.1) for tables in (without, given) if optimizer is None]
    # The first step gives Adam momentum, by which a row that has no gradient would move in the others.
    for ids, offsets in (
        (torch.arange(12), torch.tensor([0, 3, 3, 12])),
        (torch.arange(12).flip(0), torch.tensor([0, 3, 3, 6])),
        (torch.tensor([5, 5, 7, 9, 9, 5]), torch.tensor([0, 1, 3, 3])),
    ):
        outputs = bags(ids[: offsets[-1]], offsets), look_up(ids, offsets)
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().sum().backward()
        for step in dense:
            step.step()
            step.zero_grad()
    torch.testing.assert_close(given.state_dict(), without.state_dict())
    with pytest.raises(IndexError, match="feature 'item' holds id 300"):
        look_up(torch.tensor([1, 2, 300]), torch.tensor([0, 1, 1, 2]))


def test_bad_bags() -> None:
    tables = EmbeddingTables(plan([TableConfig("t", 100, 8, pooling="mean")], "hash", 0.1, optimizer=None))
    bag = EmbeddingBag.of(tables, "t")
    assert bag.mode == "mean" and "mode='mean'" in repr(bag)
    ids = torch.tensor([1, 2, 3])
    for arguments, reason in (
        ((ids,), "flat with 1-D offsets"),
        ((ids.view(1, 3), torch.tensor([0])), "offsets must be None"),
        ((ids, torch.tensor([1, 2])), "rise from 0"),
        ((ids, torch.tensor([0, 2, 1])), "rise from 0"),
        ((ids, torch.tensor([0, 4])), "at most the number of ids, 3"),
        ((ids, torch.tensor([0]), torch.ones(3)), "per_sample_weights are for mode 'sum'"),
    ):
        with pytest.raises(ValueError, match=reason):
            bag(*arguments)
    with pytest.raises(TypeError, match="offsets must be int32 or int64, not torch.float32"):
        bag(ids, torch.tensor([0, 2.7]))
    summed = EmbeddingBag.of(tables, "t", "sum")
    with pytest.raises(ValueError, match=r"per_sample_weights have shape \(2,\), but ids \(3,\)"):
        summed(ids, torch.tensor([0]), torch.ones(2))


# ---- copies, files, devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_files(method: str) -> None:
    table = Embedding(100, 8, 0, method=method, budget=METHODS[method])
    table(IDS).sum().backward()
    other = Embedding(100, 8, 0, method=method, budget=METHODS[method], seed=9)
    assert not torch.equal(table(IDS), other(IDS))
    file = io.BytesIO()
    torch.save(table.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (other, copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert torch.equal(twin(IDS), table(IDS))
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert not torch.equal(twin(IDS), table(IDS))


def test_copies_of_views_share_as_the_originals_do() -> None:
    tables = joint()
    model = nn.ModuleDict({name: Embedding.of(tables, name) for name in ("item", "user")})
    model["item"](torch.tensor([1]))  # leaves an alias of the weight behind
    twin = copy.deepcopy(model)
    assert twin["item"].tables is twin["user"].tables is not tables
    assert len(list(model.parameters())) == len(list(twin.parameters())) == 1
    assert torch.equal(twin["item"](IDS), model["item"](IDS))


def test_another_plan_is_not_loaded() -> None:
    state = Embedding(100, 8, method="hash", budget=0.2).state_dict()
    with pytest.raises(ValueError, match="another plan"):
        Embedding(100, 8, method="hash", budget=0.2, hash_seed=1).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_dtypes(method: str, dtype: torch.dtype) -> None:
    table = Embedding(100, 8, 0, method=method, budget=METHODS[method])
    before = table(IDS)
    found = table.to(dtype)(IDS)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), before, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_meta_device(method: str) -> None:
    table = Embedding(100, 8, 0, method=method, budget=METHODS[method], device="meta", seed=4)
    assert all(p.is_meta for p in table.parameters())
    table.to_empty(device="cpu")
    table.reset_parameters()
    assert torch.equal(table(IDS), Embedding(100, 8, 0, method=method, budget=METHODS[method], seed=4)(IDS))


def test_served_form() -> None:
    table = Embedding(100, 8, method="pruned", budget=0.3)
    table.tables.finalize()
    assert table(IDS).shape == (*IDS.shape, 8) and not hasattr(table, "weight")
    assert torch.equal(table(IDS), table.to_dense()[IDS])


def test_compiles() -> None:
    table = Embedding(100, 8, method="hash", budget=0.3)
    compiled = torch.compile(table, backend="eager")

    def gradient(module: object) -> Tensor:
        table.zero_grad()
        module(IDS).pow(2).sum().backward()  # type: ignore[operator]
        return next(table.parameters()).grad  # type: ignore[return-value]

    torch.testing.assert_close(gradient(compiled), gradient(table))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_views_of_half_precision_add_up(dtype: torch.dtype, backend: str) -> None:
    """PyTorch cannot add up sparse gradients of these types, as those of several views would be."""
    with ops.using(backend):
        tables = joint().to(dtype)
        ids = {name: torch.tensor([1, 2, 3, 2]) for name in ("item", "user", "city")}
        sum(Embedding.of(tables, name)(values).sum() for name, values in ids.items()).backward()  # type: ignore[union-attr]
        (found,) = (weight.grad for weight in tables.parameters())
        twin = joint()
        twin(torch.stack([*ids.values()], 1)).sum().backward()
        (expected,) = (weight.grad for weight in twin.parameters())
        assert found is not None and expected is not None and found.dtype == dtype
        assert torch.equal(found.float(), expected)  # small integers, exact in any type
