"""Memory that changes behind a lookup: weights, state and codes that move, arguments that are written over."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from core_cases import TRAINED_PROJECTIONS, shuffled_counts
from torch import Tensor

from embtables import Embedding, EmbeddingBag, EmbeddingTables, TableConfig, ops, plan

NATIVE = pytest.mark.skipif(ops.instructions() is None, reason="the native library was not built")
TABLES = [
    TableConfig("item", 300, 8, ["item", "cart"], padding_idx=2),
    TableConfig("city", 40, 8, on_out_of_range="oov", pooling="mean"),
]
METHODS: list[Any] = [
    "full",
    "hash",
    "mixed_dimension",
    TRAINED_PROJECTIONS,
    "frequency_cutoff",
    "banded",
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


@NATIVE
@pytest.mark.parametrize("optimizer", [None, "sparse", "sgd"])
@pytest.mark.parametrize("as_view", [False, True])
def test_a_change_that_a_gradient_would_not_survive_is_refused(as_view: bool, optimizer: str | None) -> None:
    """The gradient of a product depends on its factors."""
    tables = make("compositional", optimizer)
    ids = torch.tensor([[5, 6, 7]])
    out = Embedding.of(tables, "item")(ids) if as_view else tables(ids)
    weight = next(t for name, t in tables.state_dict(keep_vars=True).items() if "weight" in name)
    with torch.no_grad():
        weight.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace|changed between a lookup and its backward"):
        out.sum().backward()


@NATIVE
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_weight_that_became_one_row_many_times_is_not_read_beyond_it(optimizer: str | None) -> None:
    tables = make("compositional", optimizer)
    out = tables(torch.tensor([[5, 6, 7]]))
    weight = next(t for name, t in tables.state_dict(keep_vars=True).items() if "weight" in name)
    weight.data = torch.ones(1, 1).expand(weight.shape)
    with pytest.raises(RuntimeError, match="call backward first"):
        out.sum().backward()


@pytest.mark.parametrize("method", ["hash", TRAINED_PROJECTIONS], ids=str)
def test_no_update_is_lost_on_weights_that_were_replaced(method: Any) -> None:
    """PyTorch's update holds the weights that were looked up."""
    tables = make(method, "sgd")
    with ops.using("reference"):
        out = tables(torch.tensor([[5, 6, 7]]))
        tables.load_state_dict({name: t.clone() for name, t in tables.state_dict().items()}, assign=True)
        with pytest.raises(RuntimeError, match="replaced .* call backward first"):
            out.sum().backward()
        out = tables(torch.tensor([[5, 6, 7]]))
        tables.to(torch.bfloat16)
        with pytest.raises(RuntimeError, match="cast to another type"):
            out.sum().backward()
        before = tables.to_dense("item")
        tables(torch.tensor([[5, 6, 7]])).sum().backward()
        assert not torch.equal(tables.to_dense("item"), before)


def refill(*tensors: Tensor) -> None:
    """As a loader does that reuses its memory: autograd sees nothing of it."""
    for tensor in tensors:
        far = torch.linspace(-(10**6), 10**6, tensor.numel()).to(tensor.dtype)
        tensor.numpy()[:] = far.view(tensor.shape).numpy()


@pytest.mark.parametrize("ids_type", [torch.int64, torch.int32])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_arguments_may_be_refilled_before_backward(method: Any, optimizer: str | None, ids_type: torch.dtype) -> None:
    """By a loader that reuses its buffers; the gradient is that of what was looked up."""
    refilled = make(method, optimizer)
    untouched = copy.deepcopy(refilled)
    for seed in range(2):
        ids, offsets, weights = bags(seed)
        given = ids.to(ids_type, copy=True), offsets.to(ids_type, copy=True), weights.clone()
        out, expected = refilled(*given), untouched(ids, offsets, weights)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
        refill(*given)
        out.backward(grad)
        expected.backward(grad)
        assert all(torch.equal(a, b) for a, b in zip(states(refilled), states(untouched)))
        columns = ids[:60].view(20, 3)
        given_columns = columns.to(ids_type, copy=True)
        out, expected = refilled(given_columns), untouched(columns)
        refill(given_columns)
        (out.square().sum() + refilled(columns).sum()).backward()
        (expected.square().sum() + untouched(columns).sum()).backward()
        assert all(torch.equal(a, b) for a, b in zip(states(refilled), states(untouched)))


@pytest.mark.parametrize("optimizer", ["sgd", None])
def test_arguments_of_a_view_may_be_refilled_before_backward(optimizer: str | None) -> None:
    tables = make("hash", optimizer)
    twin = copy.deepcopy(tables)
    ids, offsets = torch.arange(40), torch.arange(0, 40, 4)
    view, expected = EmbeddingBag.of(tables, "item"), EmbeddingBag.of(twin, "item")
    out = view(ids, offsets)
    given = ids.clone(), offsets.clone()
    refill(ids, offsets)
    out.sum().backward()
    expected(*given).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(states(tables), states(twin)))


@pytest.mark.slow
@NATIVE
def test_arguments_of_a_compiled_lookup_may_be_refilled_before_backward() -> None:
    tables = make({"kind": "multi_hash", "signs": True}, "adagrad")
    twin = copy.deepcopy(tables)
    compiled = torch.compile(tables, backend="aot_eager", fullgraph=True)
    columns = bags(0)[0][:60].view(20, 3)
    given = columns.clone()
    out = compiled(given)
    refill(given)
    out.sum().backward()
    twin(columns).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(states(tables), states(twin)))


@NATIVE
@pytest.mark.parametrize("as_view", [False, True])
def test_tensors_that_were_replaced_are_not_kept(as_view: bool) -> None:
    """Lookups remember what they read last; tables that moved away must leave no second copy of themselves behind."""
    tables = make("full", "adagrad")
    look_up = Embedding.of(tables, "item") if as_view else tables
    look_up(torch.tensor([[1]]) if as_view else torch.tensor([[1, 2, 3]]))
    tables(*bags(0))
    loaded = {name: tensor.clone() for name, tensor in tables.state_dict().items()}
    left = [weakref.ref(tensor) for name, tensor in tables.named_buffers() if name in loaded]
    tables.load_state_dict(loaded, assign=True)
    gc.collect()
    assert left and not any(ref() is not None for ref in left)
    loaded.clear()
    left = [weakref.ref(tensor) for tensor in tensors(tables)]
    tables.to("meta")
    gc.collect()
    assert not [ref() for ref in left if ref() is not None and ref().device.type != "meta"]


@NATIVE
@pytest.mark.parametrize("damage", ["state", "hyper of another length", "hyper of another type", "weight", "code"])
def test_what_no_longer_fits_is_not_given_to_native_code(damage: str) -> None:
    """It would read or write beyond an end: PyTorch gets it instead, or backward refuses."""
    tables = make("hot_cold" if damage == "code" else "full", "adagrad")
    store, given = tables.store, bags(0)
    out = tables(*given)
    name = store.weight_names[0]
    if damage == "state":
        store.state_of(name)[0].data = torch.zeros(2, 8)
    elif damage == "hyper of another length":
        store.hyper.data = torch.zeros(0, dtype=torch.float64)
    elif damage == "hyper of another type":
        store.hyper.data = store.hyper.float()
    elif damage == "weight":
        store.tensor(name).untyped_storage().resize_(0)
    else:
        code = store.key(store.code_names()[0])
        store._buffers[code] = store.tensor(code).to("meta")
    with pytest.raises(RuntimeError, match="cast to another type, resized or moved"):
        out.sum().backward()
