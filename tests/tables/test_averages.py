"""Averages of the weights of a model with tables, by ``torch.optim.swa_utils``."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from core_cases import all_methods, in_turn, method_id, random_ids, shares_scalars
from native_cases import BACKENDS
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from embtables import (
    SGD,
    Adagrad,
    Adam,
    EmbeddingTables,
    Plan,
    RowWiseAdagrad,
    TableConfig,
    ops,
    plan,
)
from embtables.methods import Method
from embtables.optimizers import FusedOptimizer, averaged, optimizer_from_config

CONFIGS = [TableConfig("user", 300, 8, padding_idx=0), TableConfig("item", 90, 8, on_out_of_range="hash")]
COUNTS = {"user": torch.arange(300, 0, -1).numpy(), "item": torch.randperm(90).numpy() + 1}


@pytest.mark.parametrize("average", ["equal", "exponential"])
@pytest.mark.parametrize("optimizer", ["adam", None])
@pytest.mark.parametrize("method", all_methods(), ids=method_id)
def test_averages_keep_the_addresses(method: Method, optimizer: str | None, average: str) -> None:
    """Weights against means in float64 of what the tables hold after each step; addresses stay bit for bit."""
    solved = plan(CONFIGS, method, None if method.kind == "full" else "60%", COUNTS, optimizer)
    tables = EmbeddingTables(solved)
    model = nn.Sequential(tables, nn.Linear(16, 1))
    exponential = get_ema_multi_avg_fn(0.75)
    averaged = AveragedModel(model, use_buffers=True, multi_avg_fn=exponential if average == "exponential" else None)
    dense = torch.optim.SGD(model.parameters(), 0.1) if optimizer is None else None
    expected: dict[str, Tensor] = {}
    for step in range(4):
        loss = model(random_ids(tables, 32, seed=step)).square().sum()
        if loss.requires_grad:
            loss.backward()
        if dense is not None:
            dense.step()
            dense.zero_grad()
        averaged.update_parameters(model)
        for name, slab in tables.store.named_slabs():
            now = slab.detach().double()
            old = expected.get(name, now)
            expected[name] = 0.75 * old + 0.25 * now if average == "exponential" else old + (now - old) / (step + 1)
    mean = averaged.module[0]
    for name, slab in mean.store.named_slabs():
        torch.testing.assert_close(slab.detach().double(), expected[name], rtol=1e-5, atol=1e-6)
    # The same values under the addresses of the plan are the same vectors, natively and in PyTorch.
    fresh = EmbeddingTables(solved)
    fresh.load_state_dict(mean.state_dict())
    ids = random_ids(tables, 64, seed=9)
    for implementation in ("native", "reference") if ops.instructions() else ("reference",):
        with ops.using(implementation):
            assert torch.equal(mean.eval()(ids), fresh.eval()(ids))


RULES = [SGD(lr=0.1), RowWiseAdagrad(lr=0.1), Adagrad(lr=0.1, clip_row_norm=0.5), Adam(lr=0.01, l2=0.1)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("method", "rule"),
    [(m, r) for m, r in in_turn(all_methods(), RULES, 2) if not shares_scalars(m) or not r.is_row_wise()],
    ids=lambda each: method_id(each) if isinstance(each, Method) else each.kind,
)
def test_running_means_of_touched_rows_are_those_of_all_weights(
    method: Method, rule: FusedOptimizer, backend: str
) -> None:
    """Against means in float64 of everything that the tables hold after each step; training itself is as without."""
    horizon = 3.0 if rule.kind in ("sgd", "adam") else 1000.0
    budget = None if method.kind == "full" else "60%"
    tables = EmbeddingTables(plan(CONFIGS, method, budget, COUNTS, averaged(rule, horizon)), std=0.1)
    plain = EmbeddingTables(plan(CONFIGS, method, budget, COUNTS, rule), std=0.1)
    means = {name: tensor.double().clone() for name, tensor in tables.store.stored().items()}
    with ops.using(backend):
        for step in range(1, 13):
            ids = random_ids(tables, 16, seed=step)
            for each in (tables, plain):
                loss = each(ids).square().sum()
                if loss.requires_grad:
                    loss.backward()
            kept = min(step, horizon) / (min(step, horizon) + 1)
            for name, tensor in tables.store.stored().items():
                means[name] = kept * means[name] + (1 - kept) * tensor.double()
    expected = EmbeddingTables(plain.plan)
    for name, tensor in expected.store.stored().items():
        tensor.copy_(means[name])
        assert torch.equal(tables.store.tensor(name), plain.store.tensor(name))
    found = tables.averaged()
    assert found.served and found is not tables and not tables.served
    for config in CONFIGS:
        dense = expected.serve().to_dense(config.name)
        torch.testing.assert_close(found.to_dense(config.name), dense, rtol=1e-5, atol=1e-6)
    again = EmbeddingTables(tables.plan)
    again.load_state_dict(tables.state_dict())
    for name, tensor in found.store.stored().items():
        assert torch.equal(again.averaged().store.tensor(name), tensor)
    assert tables.plan.training_bytes == tables.memory().training_bytes


def test_averaged_rules_are_configured_by_their_kind() -> None:
    rule = optimizer_from_config({"kind": "averaged_adam", "lr": 0.003, "horizon": 500})
    assert rule == averaged(Adam(lr=0.003), 500) == averaged({"kind": "adam", "lr": 0.003}, 500)
    assert averaged("sgd", horizon=3) == averaged(SGD(), 3)
    for wrong, message in ((None, "a running mean needs a fused optimizer"), ("adan", "unknown optimizer 'adan'")):
        with pytest.raises(ValueError, match=message):
            averaged(wrong, 3)  # type: ignore[arg-type]
    assert rule is not None and optimizer_from_config(rule.to_dict()) == rule == pickle.loads(pickle.dumps(rule))
    solved = plan(CONFIGS, "hash", "60%", COUNTS, rule)
    assert Plan.from_dict(json.loads(json.dumps(solved.to_dict()))) == solved
    with pytest.raises(ValueError, match="averaged_adam keeps a running mean already"):
        averaged(rule, 5)
    with pytest.raises(ValueError, match="averaged_adam keeps a running mean already"):
        optimizer_from_config("averaged_averaged_adam")
    with pytest.raises(ValueError, match="horizon must be a non-negative number, not -1"):
        averaged(Adam(), -1)
    for horizon in (0, 0.5, 2.5):
        with pytest.raises(ValueError, match="averaged_adam: horizon must be a whole number of steps from 1 on, not"):
            averaged(Adam(), horizon)  # type: ignore[arg-type]
    half = EmbeddingTables(solved).to(torch.bfloat16)
    with pytest.raises(ValueError, match="the running mean of weights is not kept in half precision"):
        half(random_ids(half, 8)).sum().backward()
    for tables in (EmbeddingTables(plan(CONFIGS, "hash", "60%")), EmbeddingTables(solved).averaged()):
        with pytest.raises(ValueError, match="keep no running mean of their weights: plan with optimizer="):
            tables.averaged()
