"""Models with histories from a prepared log to what is served: trained, chosen, written, read back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embtables.cli.app import run as main
from embtables.datasets import PreparedDataset
from embtables.training import Trainer, load_config, load_served


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A prepared log of 120 users who click some of 60 items each, with histories of up to ten items."""
    folder = tmp_path_factory.mktemp("log")
    generator = np.random.default_rng(0)
    rows = ["user,item,time"]
    for user in range(120):
        items = generator.permutation(60)[: generator.integers(4, 30)]
        rows += [f"{user},{item},{1000 * user + i}" for i, item in enumerate(items)]
    (folder / "log.csv").write_text("\n".join(rows) + "\n")
    flags = ["--history", "10", "--negative-window", "all", "--split", "random", "--min-count", "1"]
    assert main(["prepare", "interactions", str(folder / "log.csv"), str(folder / "data"), *flags]) == 0
    return PreparedDataset(folder / "data")


@pytest.mark.parametrize("model", ["din", "mlp"])
def test_from_a_log_to_served_logits(log, tmp_path, model):
    assert log.histories == {"history": "item_id"}
    small = ["training.batch_size=256", "training.epochs=1", "tables.embedding_dim=8", "tables.method=hash"]
    config = load_config(overrides=[*small, "tables.budget=60%", f"model.name={model}"])
    result = Trainer(config, log, tmp_path / "run").run()
    assert 0 < result["test_logloss"] < 2
    served = load_served(tmp_path / "run" / "served")
    (batch,) = log.batches("test", log.num_rows("test"))
    assert batch.lists["history"].values.numel() > len(batch.labels)
    with torch.no_grad():
        logits = served(batch)
    # Running statistics of Dice are served too: without them the logits were others.
    torch.testing.assert_close(
        logits, torch.from_numpy(np.load(tmp_path / "run" / "test_scores.npy")), rtol=1e-4, atol=1e-5
    )
