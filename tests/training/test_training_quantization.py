"""Runs whose last part computes with rows as they are served."""

from __future__ import annotations

import pytest
from training_cases import config_of, curve_of

from embtables import EmbeddingTables
from embtables.datasets import Synthetic, prepare_synthetic
from embtables.sweeps.planning import plan_points
from embtables.training import Trainer, loop, outcome
from embtables.training.planning import plan_tables


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config = Synthetic(rows=3000, cardinalities=(60, 40), num_dense=2, shares=(0.6, 0.2, 0.2))
    return prepare_synthetic(tmp_path_factory.mktemp("data") / "toy", config)  # five steps of 400 per epoch


@pytest.fixture
def rounded(monkeypatch):
    """Whether rows were rounded, for each step that was taken."""
    steps, step = [], loop.Run._step

    def watched(self, batch, watch):
        steps.append(self.tables.store.rounding is not None)
        return step(self, batch, watch)

    monkeypatch.setattr(loop.Run, "_step", watched)
    return steps


@pytest.fixture
def worse_and_worse(monkeypatch):
    """Validation metrics that fall from one evaluation to the next."""
    left, measure = iter(range(90, 0, -1)), outcome.main_metrics
    monkeypatch.setattr(outcome, "main_metrics", lambda scored: {**measure(scored), "auc": next(left) / 100})


@pytest.mark.parametrize(("begin", "steps"), [(0, 0), (0.5, 2), (1, 5), (1.3, 6)])
def test_rows_are_rounded_from_the_epoch_on_that_is_said(begin, steps, data, tmp_path, rounded):
    config = config_of("tables.precision=int2", f"training.quantize_from={begin}")
    assert Trainer(config, data, tmp_path / "run").run()["status"] == "ok"
    assert rounded == [step >= steps for step in range(10)]


def test_what_was_best_before_does_not_count(data, tmp_path, worse_and_worse):
    shared = ["tables.precision=binary", "training.epochs=4", "training.evaluations_per_epoch=2"]
    result = Trainer(config_of(*shared, "training.quantize_from=1.5"), data, tmp_path / "run").run()
    curve = curve_of(tmp_path / "run")
    assert [row["step"] for row in curve] == [3, 5, 8, 10, 13, 15, 18, 20]
    # Step 7 is the last one of unrounded rows.
    assert result["best_epoch"] == 8 / 5
    assert {row["learning_rate_tables"] for row in curve} == {0.01}
    without = Trainer(config_of(*shared), data, tmp_path / "without").run()
    assert without["best_epoch"] == 3 / 5


@pytest.mark.parametrize(("begin", "last"), [(2, 18), (0, 8)])
def test_patience_waits_until_rows_are_rounded(begin, last, data, tmp_path, worse_and_worse):
    """Two evaluations after the first one that counts it is out: of those at the steps 3, 5, 8, 10, 13, 15, 18 …"""
    shared = ["tables.precision=int4", "training.epochs=4", "training.evaluations_per_epoch=2", "training.patience=2"]
    result = Trainer(config_of(*shared, f"training.quantize_from={begin}"), data, tmp_path / "run").run()
    assert result["steps"] == last


def test_rows_that_are_trained_in_16_bits_are_served_in_another_precision(data, tmp_path):
    options = ["tables.training_precision=bf16", "tables.optimizer=rowwise_adagrad", "training.epochs=1"]
    config, packed = config_of(*options), config_of(*options, "tables.precision=int8")
    result = Trainer(config, data, tmp_path / "run", also={tmp_path / "int8": packed}).run()
    rows = sum(table.rows for table in plan_tables(config, data).tables)
    assert result["status"] == "ok" and result["training_bytes"] == rows * (2 * 4 + 4) + 8
    assert result["inference_bytes"] == rows * 4 * 4
    served = EmbeddingTables.load(tmp_path / "int8" / "served" / "tables.safetensors")
    assert rows * 4 < served.memory().inference_bytes == plan_tables(packed, data).inference_bytes < rows * 5


def test_in_fp32_there_is_nothing_to_round(data, tmp_path, rounded):
    results = []
    for name, options in (("with", ["training.quantize_from=1"]), ("without", [])):
        results.append(Trainer(config_of(*options), data, tmp_path / name).run())
    assert not any(rounded)
    assert results[0]["test_auc"] == results[1]["test_auc"] and results[0]["best_epoch"] == results[1]["best_epoch"]


def test_what_cannot_be_rounded_is_refused_before_anything_is_trained(data, tmp_path):
    options = ["tables.method=pruned", "tables.budget=10%", "tables.precision=int4", "tables.optimizer=adagrad"]
    config = config_of(*options, "training.quantize_from=1")
    with pytest.raises(ValueError, match="method pruned serves something else than the rows that it trains"):
        Trainer(config, data, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()
    method = {"pruned": {"kind": "pruned", "precision": "int4"}}
    with pytest.raises(ValueError, match="pruned at 10%: method pruned serves something else"):
        plan_points(data, config, method, [("pruned", "10%")])
    with pytest.raises(ValueError, match=r"training\.quantize_from is 2, but training\.epochs is 2: give less"):
        config_of("training.quantize_from=2")
