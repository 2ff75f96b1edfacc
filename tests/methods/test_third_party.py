"""Methods of other packages: found by their entry points, planned, trained, saved and served without an edit here."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from core_cases import counted_bytes, random_ids
from third_party_cases import FOLDER, install

import embtables.methods as methods
from embtables import EmbeddingTables, InfeasibleBudget, Plan, TableConfig, plan
from embtables.tables.reading import block_of

CLASSES = {"tensor_train": "TensorTrain", "deep_hash": "DeepHash", "promoted_rows": "PromotedRows"}
KINDS = pytest.mark.parametrize("kind", CLASSES)
TABLES = [
    TableConfig("user", 3000, 8, padding_idx=0),
    TableConfig("item", 2000, 8, feature_names=["item", "history"], pooling="mean"),
]


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An environment in which another package has registered its three methods."""
    folder = tmp_path / "site-packages"
    install(folder, "outsider", {kind: f"{kind}:{name}" for kind, name in CLASSES.items()})
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(folder))
    methods._third_party.cache_clear()
    yield folder
    methods._third_party.cache_clear()
    for kind in CLASSES:
        sys.modules.pop(kind, None)


def make(kind: Any, budget: Any = "20%", **options: Any) -> EmbeddingTables:
    return EmbeddingTables(plan(TABLES, kind, budget, **options))


def test_entry_points_are_listed_and_configured_by_their_kind() -> None:
    assert methods.kinds()[-3:] == sorted(CLASSES)
    assert methods.from_config("tensor_train").to_dict() == {"kind": "tensor_train", "max_rank": 64}
    assert methods.from_config({"kind": "promoted_rows", "hot_rows": 5}).to_dict()["hot_rows"] == 5
    with pytest.raises(ValueError, match="method deep_hash has no field 'depth'; its fields: num_hashes, precision"):
        methods.from_config({"kind": "deep_hash", "depth": 3})
    with pytest.raises(ValueError, match="unknown method 'dhe'.*deep_hash"):
        methods.from_config("dhe")


@KINDS
def test_planned_to_the_byte(kind: str) -> None:
    before = 0
    for share in (0.05, 0.1, 0.2, 0.5):
        budget = int(share * 5000 * 32)
        try:
            solved = plan(TABLES, kind, budget)
        except InfeasibleBudget as error:
            assert error.floor_bytes > budget
            solved = plan(TABLES, kind, error.floor_bytes)
            with pytest.raises(InfeasibleBudget):
                plan(TABLES, kind, error.floor_bytes - 1)
            budget = error.floor_bytes
        assert before <= solved.inference_bytes <= budget
        before = solved.inference_bytes
        tables = EmbeddingTables(solved)
        state = [t for name, t in tables.store.optimizer_state().items() if name != "hyper"]
        assert counted_bytes(tables) + sum(t.numel() * t.element_size() for t in state) == solved.training_bytes
        assert counted_bytes(tables.finalize()) == solved.inference_bytes
        assert Plan.from_dict(solved.to_dict()) == solved


@KINDS
def test_initial_spread(kind: str) -> None:
    tables = EmbeddingTables(plan(TABLES, kind, "50%"), std=0.4)
    for name in ("user", "item"):
        outputs = tables.to_dense(name)[1:]
        outputs = outputs[(outputs != 0).any(1)]
        assert float(outputs.std()) == pytest.approx(0.4, rel=0.12)
        # Behind a relu the few biased hidden units shift each coordinate of every output alike.
        assert abs(float(outputs.mean())) < (0.3 if kind == "deep_hash" else 0.06)


@KINDS
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam", None])
def test_trained_until_the_loss_falls_saved_loaded_and_served(kind: str, optimizer: str | None, tmp_path: Path) -> None:
    tables = make(kind, "30%", optimizer=optimizer)
    assert (list(tables.parameters()) == []) == (optimizer is not None)
    if optimizer:
        tables.set_learning_rate(0.03)
    free = torch.optim.Adam(tables.parameters(), lr=0.01) if optimizer is None else None
    ids = random_ids(tables, 40, seed=1)
    ids[:, 0].clamp_(min=1)
    target = torch.randn(40, 24, generator=torch.Generator().manual_seed(2)) * 0.1
    losses = []
    for _ in range(60):
        loss = (tables(ids) - target).square().mean()
        losses.append(float(loss.detach()))
        if free:
            free.zero_grad()
        loss.backward()
        if free:
            free.step()
    assert losses[-1] < 0.6 * losses[0]
    trained = tables(ids).detach()
    tables.save(tmp_path / "t.safetensors")
    loaded = EmbeddingTables.load(tmp_path / "t.safetensors")
    tables.eval()
    assert torch.equal(loaded(ids), tables(ids).detach())
    torch.testing.assert_close(loaded(ids), trained, rtol=0.3, atol=0.05)
    assert counted_bytes(loaded) == loaded.plan.inference_bytes == tables.plan.inference_bytes
    assert torch.equal(tables.finalize()(ids), loaded(ids))
    dense = loaded.to_dense("item")
    assert torch.equal(dense[ids[:, 1]], loaded(ids)[:, 8:16])


@KINDS
def test_bags_padding_copies_and_resume(kind: str) -> None:
    tables = make(kind, "30%", optimizer="adagrad")
    values, offsets = torch.tensor([0, 5, 7, 7, 9, 11]), torch.tensor([0, 2, 2, 3, 5, 5, 6])
    tables.eval()
    pooled = tables(values, offsets)
    user, item = tables.to_dense("user"), tables.to_dense("item")
    nothing = torch.zeros(8)
    expected = [torch.cat([user[5], item[7], nothing]), torch.cat([nothing, (item[7] + item[9]) / 2, item[11]])]
    torch.testing.assert_close(pooled, torch.stack(expected))
    tables.train()
    for i in range(10):
        tables(random_ids(tables, 30, seed=i % 3)).square().sum().backward()
    other = copy.deepcopy(tables)
    resumed = EmbeddingTables(tables.plan, seed=8)
    resumed.load_state_dict(tables.state_dict())
    resumed.load_optimizer_state_dict(tables.optimizer_state_dict())
    for each in (tables, other, resumed):
        for i in range(10):
            each(random_ids(tables, 30, seed=i % 3)).square().sum().backward()
    for name in ("user", "item"):
        assert torch.equal(tables.to_dense(name), other.to_dense(name))
        assert torch.equal(tables.to_dense(name), resumed.to_dense(name))


@KINDS
def test_beside_other_methods_under_one_budget(kind: str) -> None:
    solved = plan([*TABLES, TableConfig("city", 50, 4)], {"city": "full", "*": kind}, "30%")
    assert solved.inference_bytes <= 0.3 * (5000 * 32 + 800)
    tables = EmbeddingTables(solved)
    ids = random_ids(tables, 9)
    tables(ids).sum().backward()
    assert torch.equal(tables(ids)[:, 24:], tables.to_dense("city")[ids[:, 3]])


def test_a_hot_id_moves_to_a_row_of_its_own_without_a_jump() -> None:
    tables = make({"kind": "promoted_rows", "hot_rows": 32, "threshold": 5}, "10%", optimizer="adagrad")
    tables.set_learning_rate(0.0)
    owners = tables.store.code("promoted_rows/owners")
    hot = torch.tensor([[17, 23, 23]])
    before = tables(hot).detach().clone()
    for _ in range(8):
        tables(hot).sum().backward()
    assert int((owners != 0).sum()) == 2
    # It starts from what it had, weights and optimizer state alike …
    assert torch.equal(tables(hot).detach(), before)
    lookups, number = block_of(tables.lookups.blocks, "user")
    feature = lookups.lookup[number]
    row = int(lookups.block.address(torch.tensor([17]), feature)[0].rows)
    # Eight gradients of ones, most of them counted while the row was still a shared one.
    assert row < 32 and tables.store.slab_state("promoted_rows/rows")[0][row].tolist() == [8.0] * 8
    # … and then has it to itself.
    tables.set_learning_rate(0.1)
    shared = tables.to_dense("user")
    tables(hot).sum().backward()
    changed = (tables.to_dense("user") != shared).any(1).nonzero().flatten().tolist()
    assert changed == [17]
    served = tables.serve()
    assert torch.equal(served(hot), tables.eval()(hot))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("tensor_train:shape", "entry point 'bad' of embtables.methods is tensor_train:shape, which is not a Method"),
        ("embtables.methods.hash:Hash", "entry point 'bad' of embtables.methods names its method 'hash', which exists"),
    ],
)
def test_a_bad_entry_point_is_named(site: Path, value: str, message: str) -> None:
    install(site, "broken", {"bad": value})
    methods._third_party.cache_clear()
    with pytest.raises(ValueError, match=message):
        methods.kinds()
