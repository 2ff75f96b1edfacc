"""``accumulate``: several backward passes that make the one update of a batch of all their examples."""

from __future__ import annotations

import copy
import io
from contextlib import ExitStack
from itertools import product
from typing import Any

import pytest
import torch
from core_cases import all_methods, falling_counts, in_turn, method_id, random_ids, shares_scalars
from torch import Tensor, nn

from embtables import SGD, Adagrad, Adam, Embedding, EmbeddingTables, RowWiseAdagrad, TableConfig, ops, plan
from embtables.methods import Method
from embtables.optimizers import FusedOptimizer
from embtables.sizes.budget import InfeasibleBudget

BACKENDS = ["native", "reference"] if ops.backend() == "native" else ["reference"]


class _Plain(SGD):
    """SGD without a native form."""

    kind = "plain"


OPTIMIZERS: list[FusedOptimizer] = [
    SGD(0.01, l2=0.01),
    SGD(0.1, clip_row_norm=0.5),
    RowWiseAdagrad(0.1),
    Adagrad(0.1),
    Adam(0.1),
    _Plain(0.01),
]


def make(method: Method | str, optimizer: FusedOptimizer | None) -> EmbeddingTables:
    configs = [TableConfig("item", 60, 8, ["item", "history"], padding_idx=0), TableConfig("user", 40, 8)]
    counts = {config.name: falling_counts(config.num_embeddings or 0) for config in configs}
    try:
        solved = plan(configs, method, None if method == "full" else "40%", counts, optimizer)
    except InfeasibleBudget as error:
        solved = plan(configs, method, error.floor_bytes, counts, optimizer)
    return EmbeddingTables(solved, std=0.3)


def examples(tables: EmbeddingTables, batch: int = 24) -> tuple[Tensor, Tensor]:
    """Ids, many of them several times, and what each component of their vectors counts in the loss.

    These are small integers, whose sums do not depend on their order.
    """
    ids = random_ids(tables, batch) % 20
    generator = torch.Generator().manual_seed(1)
    return ids, torch.randint(1, 9, (batch, sum(tables.embedding_dims)), generator=generator).float() / 4


def loss(tables: Any, ids: Tensor, weight: Tensor) -> Tensor:
    return (tables(ids) * weight).sum()


def everything(tables: EmbeddingTables) -> dict[str, Tensor]:
    """Copies of weights, optimizer state, step counts and stages."""
    found = {**tables.state_dict(), **tables.optimizer_state_dict()}
    return {name: tensor.clone() for name, tensor in found.items()}


def assert_same(one: EmbeddingTables, other: EmbeddingTables) -> None:
    # Sums of 100 terms in fp32, in two orders: each is within 100 · 2⁻²⁴ of the exact one.
    torch.testing.assert_close(everything(one), everything(other), atol=1e-6, rtol=1.2e-5)


def unchanged(tables: EmbeddingTables, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in everything(tables).items())


def twins(method: Method | str, optimizer: FusedOptimizer | None) -> tuple[EmbeddingTables, EmbeddingTables]:
    """Two equal tables that have made a step, so that no state is zero."""
    one = make(method, optimizer)
    loss(one, *examples(one)).backward()
    return one, copy.deepcopy(one)


# Rules of rows do not go with single scalars.
EACH = [
    pytest.param(method, optimizer, backend, id=f"{method_id(method)}-{optimizer}-{backend}")
    for method, (optimizer, backend) in in_turn(all_methods(), list(product(OPTIMIZERS, BACKENDS)), 5)
    if not (shares_scalars(method) and optimizer.kind == "rowwise_adagrad")
]


@pytest.mark.parametrize("method, optimizer, backend", EACH)
def test_chunks_make_the_update_of_one_batch(method: Method, optimizer: FusedOptimizer, backend: str) -> None:
    with ops.using(backend):
        one, chunked = twins(method, optimizer)
        ids, weight = examples(one)
        for _ in range(2):  # the second block begins where the first one ended
            loss(one, ids, weight).backward()
            before = everything(chunked)
            with chunked.accumulate():
                for part, its_weight in zip(ids.split(7), weight.split(7)):
                    loss(chunked, part, its_weight).backward()
                weights = [name for name in before if "weight_" in name or "state_" in name]
                assert all(torch.equal(everything(chunked)[name], before[name]) for name in weights)
            assert_same(one, chunked)


@pytest.mark.parametrize("method", ["hash", "compositional"])
def test_it_is_not_several_updates(method: str) -> None:
    """What the block is there for: without it the same chunks lead elsewhere."""
    one, chunked = twins(method, Adagrad(0.1))
    ids, weight = examples(one)
    loss(one, ids, weight).backward()
    for part, its_weight in zip(ids.split(7), weight.split(7)):
        loss(chunked, part, its_weight).backward()
    with pytest.raises(AssertionError):
        assert_same(one, chunked)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lookups_of_several_kinds_and_views(backend: str) -> None:
    with ops.using(backend):
        one, several = twins("compositional", Adam(0.1))
        ids, _ = examples(one)
        bags = torch.arange(0, ids.numel() + 1)

        def losses(tables: EmbeddingTables) -> list[Any]:
            item, user = Embedding.of(tables, "item"), Embedding.of(tables, "user")
            found = tables.lookup(ids.t().reshape(-1), bags, pooling={"history": None})
            return [item(ids[:, 0]).square().sum(), user(ids[:, 1]).sum(), sum(map(Tensor.sum, found.values()))]

        with several.accumulate():
            for each in losses(several):
                each.backward()
        assert int(several.optimizer_state_dict()["step"]) == 2
        expected = _by_hand(one, losses)
        torch.testing.assert_close(several.state_dict()["store.weight_8"], expected, atol=1e-6, rtol=1e-6)


def _by_hand(tables: EmbeddingTables, losses: Any) -> Tensor:
    """The weight after one update by the sum of all gradients, which autograd takes of ordinary parameters."""
    plain = make("compositional", None)
    plain.load_state_dict(tables.state_dict())
    sum(losses(plain)).backward()
    gradient = plain.store.weight(8).grad
    assert gradient is not None
    rows = gradient.any(1).nonzero().squeeze(1)
    weight, state = tables.store.weight(8).clone(), [s.clone() for s in tables.store.state_of("weight_8")]
    ops.update_rows(weight, state, rows, gradient[rows], tables.store.hyper, "adam", torch.tensor(2))
    return weight


def test_mean_gradients_are_the_callers_choice() -> None:
    one, chunked = twins("hash", RowWiseAdagrad(0.1))
    ids, weight = examples(one, 20)
    (loss(one, ids, weight) / 20).backward()
    with chunked.accumulate():
        for part, its_weight in zip(ids.split(5), weight.split(5)):
            (loss(chunked, part, its_weight) / 20).backward()
    assert_same(one, chunked)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exception_leaves_all_as_it_was(backend: str) -> None:
    with ops.using(backend):
        tables, _ = twins("compositional", Adam(0.1))
        ids, weight = examples(tables)
        before = everything(tables)
        with pytest.raises(KeyboardInterrupt), tables.accumulate():
            loss(tables, ids, weight).backward()
            raise KeyboardInterrupt
        assert unchanged(tables, before)
        with pytest.raises(IndexError, match="feature 'item' holds id"), tables.accumulate():
            loss(tables, ids, weight).backward()
            tables(ids + 60)
        assert unchanged(tables, before)
        # Bad ids in the first lookup, and the block goes on.
        one = copy.deepcopy(tables)
        with tables.accumulate():
            with pytest.raises(IndexError):
                tables(ids + 60)
            loss(tables, ids, weight).backward()
        loss(one, ids, weight).backward()
        assert_same(one, tables)


def test_nested_blocks_make_one_update() -> None:
    one, chunked = twins("hash", Adam(0.1))
    ids, weight = examples(one)
    loss(one, ids, weight).backward()
    before = everything(chunked)
    with chunked.accumulate():
        with chunked.accumulate():
            loss(chunked, ids[:9], weight[:9]).backward()
        with pytest.raises(ZeroDivisionError), chunked.accumulate():
            loss(chunked, ids, weight).backward()
            raise ZeroDivisionError
        assert torch.equal(everything(chunked)["store.weight_8"], before["store.weight_8"])
        loss(chunked, ids[9:], weight[9:]).backward()
    assert_same(one, chunked)


def test_an_inner_block_that_fails_takes_its_step_back() -> None:
    tables, _ = twins("hash", Adam(0.1))
    before = everything(tables)
    with tables.accumulate():
        with pytest.raises(ZeroDivisionError), tables.accumulate():
            loss(tables, *examples(tables)).backward()
            raise ZeroDivisionError
    assert unchanged(tables, before)


def test_empty_blocks_change_nothing() -> None:
    tables, _ = twins("hash", Adam(0.1))
    before = everything(tables)
    with tables.accumulate():
        pass
    with tables.accumulate(), torch.no_grad():
        tables(examples(tables)[0])
    with tables.accumulate():
        tables.eval()(examples(tables)[0])
    assert unchanged(tables, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_after_the_block_is_refused(backend: str) -> None:
    with ops.using(backend):
        tables, _ = twins("hash", SGD(0.1))
        before = everything(tables)
        with tables.accumulate():
            late = loss(tables, *examples(tables))
        with pytest.raises(RuntimeError, match="comes after the end of its block"):
            late.backward()
        assert unchanged(tables, before)


@pytest.mark.parametrize("optimizer", [Adam(0.1), None], ids=str)
def test_a_block_is_one_step_of_pruning(optimizer: FusedOptimizer | None) -> None:
    tables = make("pruned", optimizer)
    ids, weight = examples(tables)
    (stage,) = tables.stages
    with tables.accumulate():
        for part, its_weight in zip(ids.split(7), weight.split(7)):
            loss(tables, part, its_weight).backward()
    assert int(stage.state()["steps"]) == 1
    loss(tables, ids, weight).backward()
    assert int(stage.state()["steps"]) == 2


def test_ordinary_parameters_add_up_as_ever() -> None:
    one, chunked = twins("hash", None)
    ids, weight = examples(one)
    one.zero_grad()
    chunked.zero_grad()
    loss(one, ids, weight).backward()
    with chunked.accumulate():
        for part, its_weight in zip(ids.split(7), weight.split(7)):
            loss(chunked, part, its_weight).backward()
    for expected, found in zip(one.parameters(), chunked.parameters()):
        torch.testing.assert_close(expected.grad, found.grad)


def test_frozen_tables_do_not_accumulate() -> None:
    tables, _ = twins("hash", Adam(0.1))
    before = everything(tables)
    tables.requires_grad_(False)
    with tables.accumulate():
        assert not loss(tables, *examples(tables)).requires_grad
    assert unchanged(tables, before)


def test_copies_made_within_a_block_are_outside_it() -> None:
    tables, _ = twins("hash", SGD(0.1))
    file = io.BytesIO()
    with tables.accumulate():
        copied = copy.deepcopy(tables)
        torch.save(tables, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        before = everything(other)
        loss(other, *examples(other)).backward()
        assert not unchanged(other, before)


def test_all_tables_of_a_model() -> None:
    """The snippet of the documentation, for models that hold several."""
    model = nn.ModuleDict({name: Embedding(9, 4, optimizer="adagrad", seed=i) for i, name in enumerate("ab")})
    one = copy.deepcopy(model)
    ids = torch.tensor([1, 2, 2, 3])
    for name in "ab":
        one[name](ids).square().sum().backward()
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, EmbeddingTables):
                stack.enter_context(module.accumulate())
        for part in ids.split(2):
            sum(model[name](part).square().sum() for name in "ab").backward()  # type: ignore[union-attr]
    for name in "ab":
        assert_same(one[name].tables, model[name].tables)


def test_a_lookup_before_the_block_may_have_its_backward_after_it() -> None:
    """The gradient of a product depends on the rows that were read, which the block's update changes."""
    updated = {}
    for backend in BACKENDS:
        with ops.using(backend):
            tables, _ = twins("compositional", SGD(0.1))
            ids, weight = examples(tables)
            early = loss(tables, ids, weight)
            with tables.accumulate():
                loss(tables, ids, weight).backward()
            early.backward()
            updated[backend] = tables.store.weight(8)
    for values in updated.values():
        torch.testing.assert_close(values, updated["reference"], atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "backend"), zip(["hash", "compositional"], BACKENDS))
def test_compiled_lookups_accumulate_too(method: str, backend: str) -> None:
    with ops.using(backend):
        one, chunked = twins(method, Adagrad(0.1))
        ids, weight = examples(one)
        compiled = torch.compile(chunked, backend="aot_eager")
        loss(one, ids[:8], weight[:8]).backward()
        loss(compiled, ids[:8], weight[:8]).backward()  # what was compiled outside of a block must not be used in it
        loss(one, ids, weight).backward()
        with chunked.accumulate():
            for part, its_weight in zip(ids.split(8), weight.split(8)):
                loss(compiled, part, its_weight).backward()
        assert_same(one, chunked)


def test_one_graph_for_all_is_refused() -> None:
    tables, _ = twins("hash", Adagrad(0.1))
    compiled = torch.compile(tables, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="which no graph can hold"), tables.accumulate():
        compiled(examples(tables)[0])
