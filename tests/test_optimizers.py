"""The fused optimizers against references written out in float64, and what a fused module may and may not do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from core_cases import TRAINED_PROJECTIONS, all_methods, falling_counts, method_id, random_ids, shuffled_counts
from torch import Tensor

from embtables import SGD, Adagrad, Adam, EmbeddingTables, RowWiseAdagrad, TableConfig, plan
from embtables.lookup.inputs import Input
from embtables.methods import Method
from embtables.ops import coalesce
from embtables.optimizers import FusedOptimizer
from embtables.tables.reading import block_of
from embtables.training import load_config

pytestmark = pytest.mark.core

Array = npt.NDArray[np.float64]
CONFIGS: list[FusedOptimizer] = [
    SGD(lr=0.1),
    SGD(lr=0.1, l2=0.05),
    RowWiseAdagrad(lr=0.1, eps=1e-6),
    RowWiseAdagrad(lr=0.1, eps=1e-6, l2=0.05),
    Adagrad(lr=0.1, eps=1e-6),
    Adagrad(lr=0.1, eps=1e-6, l2=0.05),
    Adam(lr=0.02, beta1=0.8, beta2=0.95, eps=1e-6),
    Adam(lr=0.02, l2=0.05),
    SGD(lr=0.1, l2=0.05, clip_row_norm=1.5),
    RowWiseAdagrad(lr=0.1, eps=1e-6, clip_row_norm=1.5),
    Adam(lr=0.02, eps=1e-6, clip_row_norm=1.5),
]


class Reference:
    """One parameter ``[rows, width]`` and its state in float64, updated row by row in Python."""

    def __init__(self, weight: Tensor, config: FusedOptimizer) -> None:
        self.w: Array = weight.double().numpy().copy()
        self.config = config
        self.s = np.zeros(len(self.w)) if config.kind == "rowwise_adagrad" else np.zeros_like(self.w)
        self.m, self.steps = np.zeros_like(self.w), 0

    def step(self, touched: list[int], gradient: Array) -> None:
        """``gradient``: one line for each of ``touched``, which may repeat."""
        c: Any = self.config
        self.steps += 1
        for row in dict.fromkeys(touched):
            g = sum((g for r, g in zip(touched, gradient) if r == row), np.zeros(self.w.shape[1]))
            if c.clip_row_norm:
                g = g * min(1.0, c.clip_row_norm / max(1e-30, np.linalg.norm(g)))
            g = g + c.l2 * self.w[row]
            if c.kind == "sgd":
                self.w[row] -= c.lr * g
            elif c.kind == "rowwise_adagrad":
                self.s[row] += (g**2).mean()
                self.w[row] -= c.lr * g / (np.sqrt(self.s[row]) + c.eps)
            elif c.kind == "adagrad":
                self.s[row] += g**2
                self.w[row] -= c.lr * g / (np.sqrt(self.s[row]) + c.eps)
            else:
                self.m[row] = c.beta1 * self.m[row] + (1 - c.beta1) * g
                self.s[row] = c.beta2 * self.s[row] + (1 - c.beta2) * g**2
                m, s = self.m[row] / (1 - c.beta1**self.steps), self.s[row] / (1 - c.beta2**self.steps)
                self.w[row] -= c.lr * m / (np.sqrt(s) + c.eps)


def ids_with_duplicates(steps: int, batch: int, rows: int, features: int = 1) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        # Squares of uniform numbers: small ids come many times in a batch, large ones in few batches.
        yield (torch.rand(batch, features, generator=generator) ** 2 * rows).long()


def config_id(config: FusedOptimizer) -> str:
    return config.kind + ("-l2" if config.l2 else "") + ("-clip" if config.clip_row_norm else "")


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_fifty_steps_with_duplicates_equal_the_reference(config: FusedOptimizer) -> None:
    tables = EmbeddingTables(plan([TableConfig("t", 40, 6)], "full", optimizer=config), std=0.5)
    reference = Reference(tables.to_dense("t"), config)
    generator = torch.Generator().manual_seed(1)
    for ids in ids_with_duplicates(50, 16, 40):
        gradient = torch.randn(16, 6, generator=generator)
        tables(ids).backward(gradient)
        reference.step(ids.flatten().tolist(), gradient.double().numpy())
    assert len(set(ids.flatten().tolist())) < 16
    np.testing.assert_allclose(tables.to_dense("t").numpy(), reference.w, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_k_lookups_of_one_slab_are_one_update(config: FusedOptimizer) -> None:
    solved = plan([TableConfig("t", 100, 4)], {"kind": "multi_hash", "num_hashes": 3}, 7 * 16, optimizer=config)
    tables = EmbeddingTables(solved, std=0.5)
    lookups, number = block_of(tables.lookups.blocks, "t")
    feature = lookups.lookup[number]
    reference = Reference(tables.store.slab("t"), config)
    generator = torch.Generator().manual_seed(1)
    for ids in ids_with_duplicates(50, 8, 100):
        gradient = torch.randn(8, 4, generator=generator)
        rows = lookups.block.address(ids.flatten(), feature.expand(8))[0].rows
        tables(ids).backward(gradient)
        # A sum hands its gradient to each of the three rows.
        reference.step(rows.flatten().tolist(), gradient.double().repeat_interleave(3, 0).numpy())
    np.testing.assert_allclose(tables.store.slab("t").numpy(), reference.w, rtol=5e-5, atol=5e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_extras_are_updated_densely_and_once_by_the_same_rule(config: FusedOptimizer) -> None:
    # One table's ids are ranked and the other's not, so that two blocks use the same projections.
    counts = {"a": falling_counts(300), "b": shuffled_counts(200)}
    tables_ = [TableConfig("a", 300, 8), TableConfig("b", 200, 8)]
    solved = plan(tables_, TRAINED_PROJECTIONS | {"first_block": 20}, "30%", counts, config)
    assert len({e.variant for e in solved.groups[0].layout.entries.values()}) == 2
    fused = EmbeddingTables(solved, std=0.5)
    free = EmbeddingTables(plan(tables_, solved.groups[0].method, "30%", counts, optimizer=None), std=0.5)
    references = {n: Reference(w, config) for n, w, is_code in fused.store.tensors() if not is_code}
    assert sum("projection" in name for name in references) > 1
    for ids in ids_with_duplicates(50, 8, 200, features=2):
        # Gradients by autograd at the same weights, updates written out.
        for (_, target, _), (_, source, _) in zip(free.store.tensors(), fused.store.tensors()):
            target.data.copy_(source)
        free.zero_grad()
        free(ids).square().sum().backward()
        touched: dict[str, list[int]] = {}
        for block in free.lookups.blocks:
            p = block.pick(Input(ids))
            for part in block.block.address(p.ids, p.feature):
                touched.setdefault(f"weight_{part.width}", []).extend(part.rows.flatten().tolist())
        fused(ids).square().sum().backward()
        for name, weight, is_code in free.store.tensors():
            if not is_code:
                grad = weight.grad if weight.grad is not None else torch.zeros_like(weight)
                rows = sorted(set(touched.get(name, []))) if name.startswith("weight_") else range(len(weight))
                references[name].step(list(rows), grad[list(rows)].double().numpy())

    for name, weight, is_code in fused.store.tensors():
        if not is_code:
            np.testing.assert_allclose(weight.numpy(), references[name].w, rtol=2e-3, atol=2e-5, err_msg=name)


def test_duplicates_are_summed_in_input_order() -> None:
    # In fp32 (1e8 + 1) − 1e8 = 0, and 1e8 − 1e8 + 1 = 1: the order shows.
    index = torch.tensor([3, 1, 3, 3, 1])
    gradient = torch.tensor([[1e8], [2.0], [1.0], [-1e8], [5.0]])
    rows, sums = coalesce(index, gradient)
    assert rows.tolist() == [1, 3] and sums.flatten().tolist() == [7.0, 0.0]
    rows, sums = coalesce(torch.tensor([3, 3, 3]), torch.tensor([[1e8], [-1e8], [1.0]]))
    assert sums.item() == 1.0


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam"])
def test_equals_torch_optim_where_every_row_is_touched(kind: str) -> None:
    configs: dict[str, tuple[FusedOptimizer, Callable[..., torch.optim.Optimizer]]] = {
        "sgd": (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        "adagrad": (Adagrad(lr=0.1, eps=1e-8), lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-8)),
        "adam": (Adam(lr=0.1), lambda p: torch.optim.Adam(p, lr=0.1)),
    }
    config, make = configs[kind]
    fused = EmbeddingTables(plan([TableConfig("t", 12, 4)], "full", optimizer=config), std=1.0)
    free = EmbeddingTables(plan([TableConfig("t", 12, 4)], "full", optimizer=None), std=1.0)
    optimizer = make(free.parameters())
    ids = torch.arange(12).unsqueeze(1)
    for _ in range(20):
        optimizer.zero_grad()
        for tables in (fused, free):
            (tables(ids) - 1).pow(2).sum().backward()
        optimizer.step()
    torch.testing.assert_close(fused.to_dense("t"), free.to_dense("t"), rtol=1e-5, atol=1e-6)


# ---- what a fused module does and refuses ----------------------------------------------------------------------------

NAMES = ["sgd", "rowwise_adagrad", "adagrad", "adam"]


def small(optimizer: Any, method: Any = "full", rows: int = 50) -> EmbeddingTables:
    tables = [TableConfig("a", rows, 4), TableConfig("b", 30, 4)]
    counts = {t.name: shuffled_counts(t.num_embeddings or 0) for t in tables}
    return EmbeddingTables(plan(tables, method, None if method == "full" else "60%", counts, optimizer))


def train(tables: EmbeddingTables, steps: int, seed: int = 0) -> None:
    for i in range(steps):
        (tables(random_ids(tables, 8, seed=seed + i)) - 0.1).square().sum().backward()


@pytest.mark.parametrize("optimizer", NAMES)
def test_only_touched_rows_and_their_state_change(optimizer: str) -> None:
    tables = small(optimizer)
    train(tables, 3)
    before = {n: t.clone() for n, t in [*tables.store.state_dict().items(), *tables.optimizer_state_dict().items()]}
    ids = torch.tensor([[3, 7], [3, 9]])
    tables(ids).sum().backward()
    after = dict([*tables.store.state_dict().items(), *tables.optimizer_state_dict().items()])
    start = tables.store.start("b")
    touched = [3, start + 7, start + 9]
    for name in before:
        if name in ("hyper", "_hyper", "step", "_step") or before[name].ndim < 2:
            continue
        changed = (before[name] != after[name]).any(1).nonzero().flatten().tolist()
        assert changed == touched, name
        kept = [r for r in range(len(before[name])) if r not in touched]
        assert torch.equal(before[name][kept], after[name][kept])


@pytest.mark.parametrize("optimizer", NAMES)
def test_rows_move_and_are_reset_with_their_state(optimizer: str) -> None:
    tables = small(optimizer)
    train(tables, 5)
    views = [tables.store.slab("b"), *tables.store.slab_state("b")]
    assert len(views) == {"sgd": 1, "rowwise_adagrad": 2, "adagrad": 2, "adam": 3}[optimizer]
    before = [v.clone() for v in views]
    other = tables.to_dense("a")
    # Sources are read before targets are written.
    tables.store.move("b", torch.tensor([4, 7]), torch.tensor([7, 9]))
    tables.store.reset("b", torch.tensor([0, 29]))
    for old, new in zip(before, views):
        assert torch.equal(new[[4, 7, 9]], old[[4, 4, 7]])
        assert not new[[0, 29]].any()
        kept = [r for r in range(30) if r not in (0, 7, 9, 29)]
        assert torch.equal(new[kept], old[kept])
    assert torch.equal(tables.to_dense("a"), other)


@pytest.mark.parametrize("method", all_methods(), ids=method_id)
def test_parameters_are_what_is_not_fused(method: Method) -> None:
    assert list(small("sgd", method if method.kind != "full" else "full").parameters()) == []
    free = small(None, method if method.kind != "full" else "full")
    total = sum(p.numel() * 4 for p in free.parameters())
    assert total == sum(t.numel() * 4 for _, t, is_code in free.store.tensors() if not is_code)
    with pytest.raises(ValueError, match="no fused optimizer"):
        free.set_learning_rate(0.1)


@pytest.mark.parametrize("optimizer", NAMES)
def test_the_command_line_has_the_defaults_of_the_library(optimizer: str) -> None:
    default = plan([TableConfig("a", 9, 4)], "full", optimizer=optimizer).optimizer
    assert default is not None
    assert load_config(overrides=[f"tables.optimizer={optimizer}"]).tables.learning_rate == default.lr


@pytest.mark.parametrize("optimizer", NAMES)
def test_learning_rate_can_be_scheduled(optimizer: str) -> None:
    tables, other = small(optimizer), small({"kind": optimizer, "lr": 0.37})
    tables.set_learning_rate(0.0)
    weights = tables.to_dense("a").clone()
    train(tables, 2)
    assert torch.equal(tables.to_dense("a"), weights)
    (tables,) = (small(optimizer),)
    tables.set_learning_rate(0.37)
    train(tables, 3)
    train(other, 3)
    assert torch.equal(tables.to_dense("a"), other.to_dense("a"))
    tables.set_learning_rate(np.float32(0.5))
    for bad in (-1.0, float("nan"), float("inf"), True, "0.1", None, [0.1]):
        with pytest.raises(ValueError, match="learning rate"):
            tables.set_learning_rate(bad)


@pytest.mark.parametrize("method", all_methods(), ids=method_id)
@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_resuming_from_state_dicts_continues_bit_for_bit(method: Method, optimizer: str) -> None:
    method = method.for_training(12)
    through = small(optimizer, method if method.kind != "full" else "full")
    train(through, 6)
    through.set_learning_rate(0.02)
    weights = {k: v.clone() for k, v in through.state_dict().items()}
    state = through.optimizer_state_dict()
    train(through, 6, seed=6)
    resumed = EmbeddingTables(through.plan, seed=99)
    resumed.load_state_dict(weights)
    resumed.load_optimizer_state_dict(state)
    train(resumed, 6, seed=6)
    for (name, one, _), (_, other, _) in zip(through.store.tensors(), resumed.store.tensors()):
        assert torch.equal(one, other), name
    for name, tensor in through.optimizer_state_dict().items():
        assert torch.equal(tensor, resumed.optimizer_state_dict()[name]), name


def test_optimizer_state_is_a_copy_and_another_one_is_refused_whole() -> None:
    tables = small("adagrad")
    train(tables, 2)
    state = tables.optimizer_state_dict()
    kept = {k: v.clone() for k, v in state.items()}
    train(tables, 1)
    assert all(torch.equal(state[k], kept[k]) for k in kept)
    with pytest.raises(ValueError, match="optimizer state is of another plan or optimizer"):
        tables.load_optimizer_state_dict(small("adam").optimizer_state_dict())
    before = tables.optimizer_state_dict()
    with pytest.raises(ValueError, match=r"optimizer state '.*' has shape \(81, 4\), these tables need \(80, 4\)"):
        tables.load_optimizer_state_dict(small("adagrad", rows=51).optimizer_state_dict())
    assert all(torch.equal(before[k], v) for k, v in tables.optimizer_state_dict().items())


def test_weights_of_another_plan_are_refused() -> None:
    tables = small("sgd", "hash")
    other = EmbeddingTables(plan(tables.plan.tables, "hash", "60%", optimizer="sgd", hash_seed=1))
    weights = tables.to_dense("a").clone()
    with pytest.raises(ValueError, match="another plan"):
        tables.load_state_dict(other.state_dict())
    assert torch.equal(tables.to_dense("a"), weights)
    # Budget and optimizer do not change what a row means.
    small("adam", "hash").load_state_dict(small("sgd", "hash").state_dict())


@pytest.mark.parametrize("optimizer", NAMES)
def test_two_forwards_before_one_backward(optimizer: str) -> None:
    tables = small(optimizer)
    first, second = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 5], [6, 4]])
    (tables(first).sum() + tables(second).sum()).backward()
    changed = (tables.to_dense("a") != small(optimizer).to_dense("a")).any(1).nonzero().flatten().tolist()
    assert changed == [1, 3, 6]
    if optimizer == "sgd":
        # Row 1 came in both, and a constant gradient adds up.
        difference = small(optimizer).to_dense("a") - tables.to_dense("a")
        torch.testing.assert_close(difference[1], 2 * difference[3])


def test_neither_evaluation_nor_no_grad_nor_a_forward_alone_updates() -> None:
    tables = small("adam")
    train(tables, 1)
    before = [t.clone() for t in [*tables.store.state_dict().values(), *tables.optimizer_state_dict().values()]]
    ids = random_ids(tables, 8)
    tables.eval()
    assert not tables(ids).requires_grad
    tables.train()
    with torch.no_grad():
        tables(ids)
    with torch.inference_mode():
        tables(ids)
    after = [*tables.store.state_dict().values(), *tables.optimizer_state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    tables.train()
    weight = tables.to_dense("a").clone()
    tables(ids)
    assert torch.equal(tables.to_dense("a"), weight)


def test_gradients_reach_the_per_sample_weights_of_fused_tables() -> None:
    tables = small("sgd")
    ids, offsets = torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3])
    factors = torch.tensor([0.5, 2.0, 1.0], requires_grad=True)
    expected = torch.stack([*tables.to_dense("a")[[1, 2]], tables.to_dense("b")[3]]).sum(1)
    tables(ids, offsets, factors).sum().backward()
    torch.testing.assert_close(factors.grad, expected)


def test_fp16_autocast_and_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tables, ids = small("sgd"), torch.zeros(1, 2, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(RuntimeError, match="fp16.*optimizer=None"):
        tables(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tables(ids).sum().backward()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="2 processes.*optimizer=None"):
        tables(ids)
    with torch.no_grad():
        tables(ids)
    small(None)(ids).sum().backward()
    with pytest.raises(ValueError, match="sparse gradients need.*optimizer=None"):
        EmbeddingTables(tables.plan, sparse=True)


def test_a_deep_copy_trains_on_its_own() -> None:
    tables = small("adagrad", "hash")
    train(tables, 2)
    other = copy.deepcopy(tables)
    weight = tables.to_dense("a").clone()
    train(other, 2)
    assert torch.equal(tables.to_dense("a"), weight) and not torch.equal(other.to_dense("a"), weight)
    train(tables, 2)
    assert torch.equal(tables.to_dense("a"), other.to_dense("a"))


@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_reset_starts_anew(optimizer: str | None) -> None:
    tables = small(optimizer, "hash")
    if optimizer:
        train(tables, 3)
        tables.set_learning_rate(0.5)
    tables.reset_parameters()
    fresh = small(optimizer, "hash")
    assert torch.equal(tables.to_dense("a"), fresh.to_dense("a"))
    for name, tensor in fresh.optimizer_state_dict().items():
        assert torch.equal(tensor, tables.optimizer_state_dict()[name]), name


def test_served_tables_are_not_initialized_anew() -> None:
    tables = small("adam", "pruned").finalize()
    with pytest.raises(ValueError, match="cannot be initialized"):
        tables.reset_parameters()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_casting_the_tables_leaves_the_hyper_parameters_alone(dtype: torch.dtype) -> None:
    tables, other = small("adam", "hash"), small("adam", "hash").to(dtype)
    train(tables, 3)
    train(other, 3)
    # In bfloat16 0.999 would be 1, and the second moment 0 / 0.
    assert other.to_dense("a").dtype == dtype
    assert torch.allclose(other.to_dense("a").float(), tables.to_dense("a"), rtol=0.02, atol=1e-4)
    assert torch.equal(other.optimizer_state_dict()["hyper"], tables.optimizer_state_dict()["hyper"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(lr=-1), "SGD.lr"),
        (lambda: SGD(lr=True), "SGD.lr"),
        (lambda: SGD(lr=float("nan")), "SGD.lr"),
        (lambda: Adagrad(l2=-0.1), "Adagrad.l2"),
        (lambda: RowWiseAdagrad(eps="x"), "RowWiseAdagrad.eps"),  # type: ignore[arg-type]
        (lambda: Adam(beta1=1.0), "Adam.beta1 must be below 1"),
        (lambda: Adam(beta2=1.5), "Adam.beta2 must be below 1"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], FusedOptimizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
