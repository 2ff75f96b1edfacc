"""Averages of the weights of a model with tables, by ``torch.optim.swa_utils``."""

from __future__ import annotations

import pytest
import torch
from core_cases import all_methods, method_id, random_ids
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from embtables import EmbeddingTables, TableConfig, ops, plan
from embtables.methods import Method

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
