"""What a run trains, chooses, measures and serves."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from core_cases import in_turn
from torch import nn

import embtables
from benchmarks import machine
from embtables import EmbeddingTables
from embtables._util.files import unsealed
from embtables.cli.app import run as main
from embtables.datasets import PreparedDataset, Synthetic, prepare_synthetic
from embtables.methods import kinds
from embtables.training import Trainer, load_config, load_served, metrics
from embtables.training.environment import environment
from embtables.training.nan_guard import NonFiniteError
from embtables.training.planning import plan_tables


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config = Synthetic(rows=8000, cardinalities=(300, 40), num_dense=2, unseen=0.05, shares=(0.6, 0.2, 0.2))
    return prepare_synthetic(tmp_path_factory.mktemp("data") / "toy", config)


def config_of(*overrides, **fields):
    small = ["training.batch_size=512", "training.epochs=2", "tables.embedding_dim=4"]
    return load_config(overrides=[*small, *overrides])


def split_of(data, split):
    (batch,) = data.batches(split, data.num_rows(split))
    return batch


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run of a compressed method, and its folder."""
    out = tmp_path_factory.mktemp("runs") / "hash"
    result = Trainer(config_of("tables.method=hash", "tables.budget=40%"), data, out).run()
    return result, out


# ---- what a run leaves -----------------------------------------------------------------------------------------------


def test_the_files_of_a_run(run):
    result, out = run
    for name in ("config.yaml", "environment.json", "plan.json", "test_scores.npy", "metrics.json"):
        assert (out / name).is_file()
    assert unsealed(json.loads((out / "metrics.json").read_text())) == result
    assert list((out / "tensorboard").glob("events.*"))
    noted = json.loads((out / "environment.json").read_text())
    assert noted["embtables"] == embtables.__version__ and noted["torch"] == torch.__version__
    assert noted["threads"] >= 1
    assert str(out) not in (out / "environment.json").read_text()


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cpu", "2.13.0+cu130"])
def test_torch_is_noted_as_the_module_calls_itself(monkeypatch, version):
    """The public wheel is 2.13.0 by its metadata and 2.13.0+cu130 by the module; CPU-only builds say +cpu in both."""
    monkeypatch.setattr(torch, "__version__", version)
    assert environment(torch.device("cpu"), 1)["torch"] == machine.describe()["torch"] == version


def test_metrics_are_those_of_the_served_files(run, data):
    result, out = run
    model = load_served(out / "served")
    test, valid = split_of(data, "test"), split_of(data, "valid")
    with torch.no_grad():
        logits = model(test).numpy()
        valid_logits = model(valid).numpy()
    np.testing.assert_array_equal(np.load(out / "test_scores.npy"), logits)
    labels = test.labels.numpy()
    assert result["test_auc"] == metrics.auc(labels, logits)
    assert result["valid_auc"] == metrics.auc(valid.labels.numpy(), valid_logits)
    assert result["test_logloss"] == pytest.approx(
        nn.functional.binary_cross_entropy_with_logits(torch.from_numpy(logits).double(), test.labels.double()).item()
    )
    unseen = (test.ids[:, 0] == 1).numpy()
    assert unseen.sum() > 20
    # The seed of the slices is the larger feature; id 1 has no training rows.
    counts = data.frequencies["feature_0"]
    no_training = counts[test.ids[:, 0].numpy()] == 0
    assert result["test_auc_unseen"] == metrics.auc(labels[unseen | no_training], logits[unseen | no_training])
    assert result["test_gauc_mean"] is None  # there are no groups


def test_bytes_are_those_of_the_plan_and_the_file(run, data):
    result, out = run
    plan = plan_tables(config_of("tables.method=hash", "tables.budget=40%"), data)
    assert json.loads((out / "plan.json").read_text()) == json.loads(json.dumps(plan.to_dict()))
    assert result["inference_bytes"] == plan.inference_bytes <= 0.4 * result["full_bytes"]
    assert result["full_bytes"] == 4 * 4 * sum(data.num_embeddings.values())
    assert result["training_bytes"] == plan.training_bytes
    assert result["ratio"] == result["inference_bytes"] / result["full_bytes"]
    tables = EmbeddingTables.load(out / "served" / "tables.safetensors")
    assert sum(tensor.nbytes for _, tensor, _ in tables.store.tensors()) == result["inference_bytes"]
    shares = {name: tables.collision_share(name) for name in data.num_embeddings}
    rows = data.num_embeddings
    assert result["collision_share"] == pytest.approx(sum(rows[n] * shares[n] for n in rows) / sum(rows.values()))
    assert 0.1 < result["collision_share"] < 1


def test_the_row_says_what_it_is(run):
    result, _ = run
    assert (result["dataset"], result["model"], result["method"], result["budget"]) == ("toy", "dlrm", "hash", "40%")
    assert result["status"] == "ok" and result["seed"] == 0 and result["epochs"] <= 2
    for name in ("examples_per_second", "train_seconds", "peak_rss_bytes", "lookup_latency_us"):
        assert result[name] > 0


def test_tensorboard_curves(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result, out = run
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"valid/auc", "valid/logloss", "bytes/inference", "bytes/training", "test/auc"} <= tags
    assert {"rms/feature_0", "rms/feature_1"} <= tags
    assert max(e.value for e in events.Scalars("valid/auc")) == pytest.approx(result["valid_auc"], abs=1e-6)


def test_tensorboard_loss_speed_and_rates(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of("training.log_every=3", "training.epochs=1", "tables.learning_rate=0.07")
    Trainer(config, data, tmp_path / "run").run()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [3, 6, 9]
    assert events.Scalars("learning_rate/tables")[0].value == pytest.approx(0.07)
    assert events.Scalars("learning_rate/dense")[0].value == pytest.approx(config.dense.learning_rate)
    assert events.Scalars("train/examples_per_second")[0].value > 0


# ---- the discipline --------------------------------------------------------------------------------------------------


def test_the_test_split_is_read_once_and_last(data, tmp_path, monkeypatch):
    asked = []
    batches = PreparedDataset.batches
    monkeypatch.setattr(
        PreparedDataset, "batches", lambda self, split, *a, **k: asked.append(split) or batches(self, split, *a, **k)
    )
    Trainer(config_of(), data, tmp_path / "run").run()
    assert asked.count("test") == 1
    assert asked.index("test") > max(i for i, split in enumerate(asked) if split == "train")


def test_early_stop_keeps_the_best(data, tmp_path):
    """A learning rate that overfits in a few epochs: the run stops by itself, and serves an earlier state."""
    overrides = ["training.epochs=40", "training.patience=2", "tables.learning_rate=0.3", "dense.learning_rate=0.02"]
    result = Trainer(config_of(*overrides), data, tmp_path / "run").run()
    assert result["epochs"] == result["best_epoch"] + 2 < 40
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    aucs = [e.value for e in events.Scalars("valid/auc")]
    assert len(aucs) == result["epochs"]
    assert np.argmax(aucs) + 1 == result["best_epoch"]
    assert result["valid_auc"] == pytest.approx(max(aucs), abs=1e-6)
    # As many epochs as the best took, and no more, give the same model.
    overrides[0] = f"training.epochs={result['best_epoch']}"
    again = Trainer(config_of(*overrides), data, tmp_path / "again").run()
    scores = [np.load(tmp_path / name / "test_scores.npy") for name in ("run", "again")]
    np.testing.assert_array_equal(*scores)
    assert again["test_auc"] == result["test_auc"]


def test_patience_null_trains_to_the_end(data, tmp_path):
    overrides = ["training.epochs=6", "training.patience=null", "tables.learning_rate=0.5", "dense.learning_rate=0.02"]
    result = Trainer(config_of(*overrides), data, tmp_path / "run").run()
    assert result["epochs"] == 6 > result["best_epoch"]


def test_early_stop_waits_for_a_method_that_is_under_way(data, tmp_path, monkeypatch):
    from embtables.methods.pruned import PruningStage

    overrides = ["tables.method=pruned", "tables.budget=20%", "tables.learning_rate=0.3", "dense.learning_rate=0.02"]
    config = config_of(*overrides, "training.epochs=12", "training.patience=1")
    seen = []

    def done(stage):
        seen.append(int(stage.steps))
        return seen[-1] >= 70

    monkeypatch.setattr(PruningStage, "done", done)
    result = Trainer(config, data, tmp_path / "run").run()
    assert len(seen) > 1 and seen[0] < 70 <= seen[-1]
    assert result["steps"] == seen[-1]


@pytest.mark.parametrize(("kind", "model"), in_turn(kinds(), ["dlrm", "mlp"], 1))
def test_every_method_trains_and_serves(kind, model, data, tmp_path):
    config = config_of(f"tables.method={kind}", "tables.budget=100%", f"model.name={model}", "training.epochs=1")
    if kind != "full":
        config.tables.budget = "30%"
    result = Trainer(config, data, tmp_path / "run").run()
    assert (
        result["status"] == "ok" and result["inference_bytes"] <= (1 if kind == "full" else 0.3) * result["full_bytes"]
    )
    labels, logits = split_of(data, "test").labels.numpy(), np.load(tmp_path / "run" / "test_scores.npy")
    assert result["test_auc"] == metrics.auc(labels, logits)


def test_evaluations_within_an_epoch(data, tmp_path):
    result = Trainer(
        config_of("training.epochs=1", "training.evaluations_per_epoch=4", "training.patience=null"),
        data,
        tmp_path / "run",
    ).run()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    steps = math.ceil(data.num_rows("train") / 512)
    assert [e.step for e in events.Scalars("valid/auc")] == [math.ceil(steps * i / 4) for i in (1, 2, 3, 4)]
    assert result["steps"] == steps


def test_equal_seeds_equal_runs_and_others_differ(data, tmp_path):
    def scores(name, seed):
        config = config_of(f"training.seed={seed}", "tables.method=hash", "tables.budget=40%", "training.epochs=1")
        Trainer(config, data, tmp_path / name).run()
        return np.load(tmp_path / name / "test_scores.npy"), json.loads((tmp_path / name / "plan.json").read_text())

    torch.manual_seed(1)
    one, plan_one = scores("one", 5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    same, _ = scores("same", 5)
    other, plan_other = scores("other", 6)
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert (plan_one["hash_seed"], plan_other["hash_seed"]) == (5, 6)
    assert torch.equal(before, torch.get_rng_state())


# ---- optimizers ------------------------------------------------------------------------------------------------------


def test_fused_and_torch_optimizers_agree(data, tmp_path):
    """The same rule, inside backward and outside: SGD has no state, so the two are equal up to rounding."""
    result = {}
    for name, more in [
        ("fused", []),
        ("dense gradients", ["tables.fused=false"]),
        ("sparse gradients", ["tables.fused=false", "tables.sparse_gradients=true"]),
    ]:
        config = config_of("tables.optimizer=sgd", "tables.learning_rate=0.5", "training.epochs=1", *more)
        Trainer(config, data, tmp_path / name).run()
        result[name] = np.load(tmp_path / name / "test_scores.npy")
    np.testing.assert_allclose(result["fused"], result["dense gradients"], atol=1e-4)
    np.testing.assert_allclose(result["fused"], result["sparse gradients"], atol=1e-4)


def test_learning_rates_reach_tables_and_dense_part(data, tmp_path):
    """With a rate next to nothing a part stays where it was initialized."""

    def change(name, *overrides):
        config = config_of("tables.optimizer=sgd", "training.epochs=1", *overrides)
        Trainer(config, data, tmp_path / name).run()
        return torch.load(tmp_path / name / "checkpoint" / "last.pt", weights_only=True)["state"]["model"]

    plan = plan_tables(config_of("tables.optimizer=sgd"), data)
    initial = EmbeddingTables(plan, seed=0).state_dict()
    still = change("tables still", "tables.learning_rate=1e-30", "dense.learning_rate=0.01")
    moved = change("tables moved", "tables.learning_rate=1.0", "dense.learning_rate=1e-30")
    assert torch.equal(still["embeddings.store.weight_4"], initial["store.weight_4"])
    assert not torch.equal(moved["embeddings.store.weight_4"], initial["store.weight_4"])
    assert not torch.equal(still["output.weight"], moved["output.weight"])


# ---- what cannot be trained ------------------------------------------------------------------------------------------


def test_infeasible_budget_and_its_floor(data, tmp_path):
    result = Trainer(config_of("tables.method=hash", "tables.budget=7"), data, tmp_path / "run").run()
    assert result["status"] == "infeasible"
    assert unsealed(json.loads((tmp_path / "run" / "metrics.json").read_text())) == result
    assert not (tmp_path / "run" / "served").exists()
    floor = result["floor_bytes"]
    assert str(floor) in result["message"].replace(",", "")
    ok = Trainer(config_of("tables.method=hash", f"tables.budget={floor}"), data, tmp_path / "floor").run()
    assert ok["status"] == "ok" and ok["inference_bytes"] <= floor


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tables.method=hsah", "unknown method 'hsah'"),
        ("tables.method=hash", "method hash needs a budget"),
        ("tables.method={kind: hash, colour: 1}", "method hash has no field 'colour'"),
        ("model.name=dlmr", "model 'dlmr' is unknown"),
        ("model.hyperparameters.units=[3]", "no hyperparameter 'units'"),
        ("tables.budget=lots", "lots"),
    ],
)
def test_wrong_configurations_leave_nothing_behind(override, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        Trainer(config_of(override), data, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


class WrongShape(nn.Module):
    def __init__(self, embeddings, num_dense_features):
        super().__init__()
        self.embeddings = embeddings
        self.layer = nn.Linear(sum(embeddings.embedding_dims), 1)

    def forward(self, batch):
        return self.layer(self.embeddings(batch.ids))


class Pair(WrongShape):
    def forward(self, batch):
        return super().forward(batch).squeeze(1), None


class Rounded(WrongShape):
    def forward(self, batch):
        return super().forward(batch).squeeze(1).long()


class SquareRoot(WrongShape):
    """Finite logits whose gradient at zero is not."""

    def forward(self, batch):
        return (super().forward(batch).squeeze(1) * 0).sqrt()


class SquareRootOfWeight(WrongShape):
    """The tables stay out of it: only a dense weight has the bad gradient."""

    def forward(self, batch):
        return super().forward(batch).squeeze(1) + (self.layer.weight.sum() * 0).sqrt()


def test_a_model_must_return_one_logit_a_row(data, tmp_path):
    with pytest.raises(ValueError, match=r"WrongShape must return one logit a row, shape \(512,\), not \(512, 1\)"):
        Trainer(config_of(f"model.name={__name__}:WrongShape"), data, tmp_path / "run").run()


@pytest.mark.parametrize(("model", "found"), [("Pair", "tuple"), ("Rounded", "torch.int64")])
def test_a_model_must_return_floating_point_logits(data, tmp_path, model, found):
    with pytest.raises(ValueError, match=rf"{model} must return a tensor of floating-point logits, not {found}"):
        Trainer(config_of(f"model.name={__name__}:{model}"), data, tmp_path / "run").run()


def test_a_loss_that_is_not_finite_names_step_and_tensor(data, tmp_path):
    config = config_of("tables.optimizer=sgd", "tables.learning_rate=1e38", "training.epochs=3")
    with pytest.raises(NonFiniteError, match=r"^step \d+: the (loss|gradient) .*'?.*learning_rate"):
        Trainer(config, data, tmp_path / "run").run()
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("fused", ["true", "false"])
def test_gradients_that_are_not_finite(fused, data, tmp_path):
    tables = f"tables.fused={fused}"
    with pytest.raises(NonFiniteError, match="^step 1: the gradient of the vectors of 'feature_0' is NaN; lower"):
        Trainer(config_of(tables, f"model.name={__name__}:SquareRoot"), data, tmp_path / "run").run()
    with pytest.raises(NonFiniteError, match="^step 1: the gradient of 'layer.weight' is NaN; lower"):
        Trainer(config_of(tables, f"model.name={__name__}:SquareRootOfWeight"), data, tmp_path / "other").run()


def test_a_dense_feature_that_is_not_finite(data, tmp_path, monkeypatch):
    batches = PreparedDataset.batches

    def spoiled(self, split, *args, **kwargs):
        for number, batch in enumerate(batches(self, split, *args, **kwargs)):
            if split == "train" and number == 2:
                batch.dense[7, 1] = math.inf
            yield batch

    monkeypatch.setattr(PreparedDataset, "batches", spoiled)
    with pytest.raises(NonFiniteError, match="^step 3: the loss is nan because dense feature 'dense_1' is infinite$"):
        Trainer(config_of(), data, tmp_path / "run").run()


def test_what_one_class_leaves_undefined_chooses_nothing_and_is_printed_as_such(tmp_path, capsys):
    config = Synthetic(rows=1000, cardinalities=(5, 4), bias=30.0)
    data = prepare_synthetic(tmp_path / "data", config)
    with pytest.raises(ValueError, match="split 'valid' holds one class only"):
        Trainer(config_of(), data, tmp_path / "run").run()
    flags = ["--epochs", "1", "--monitor", "logloss", "--model", "mlp", "--quiet"]
    assert main(["train", str(data.path), *flags, "--out", str(tmp_path / "other")]) == 0
    printed = capsys.readouterr().out
    assert "test AUC undefined" in printed and "validation AUC undefined (epoch 1)" in printed
    found = json.loads((tmp_path / "other" / "metrics.json").read_text())
    assert found["valid_auc"] is None and found["test_normalized_entropy"] is None and 0 < found["test_logloss"] < 1
    settings = ["--set", "training.monitor=logloss", "--set", "training.epochs=1", "--model", "mlp", "--seeds", "1"]
    sweep = ["sweep", str(data.path), "--methods", "hash", "--budgets", "50%", *settings, "--no-baselines"]
    assert main([*sweep, "--out", str(tmp_path / "sweep")]) == 0
    assert "test AUC undefined" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "sweep")]) == 0
    assert "| hash " in (tmp_path / "sweep" / "report.md").read_text()


# ---- serving and export ----------------------------------------------------------------------------------------------


class Mine(nn.Module):
    """A user's model, with a buffer that training moves."""

    def __init__(self, embeddings, num_dense_features, *, width=3):
        super().__init__()
        self.embeddings = embeddings
        self.norm = nn.BatchNorm1d(sum(embeddings.embedding_dims) + num_dense_features)
        self.hidden = nn.Linear(self.norm.num_features, width)
        self.output = nn.Linear(width, 1)

    def forward(self, batch):
        inputs = torch.cat([self.embeddings(batch.ids), batch.dense], dim=1)
        return self.output(self.hidden(self.norm(inputs)).relu()).squeeze(1)


def test_a_model_of_ones_own(data, tmp_path):
    config = config_of(f"model.name={__name__}:Mine", "model.hyperparameters.width=5")
    Trainer(config, data, tmp_path / "run").run()
    served = tmp_path / "run" / "served"
    with pytest.raises(ValueError, match="loading runs no other code: give its class"):
        load_served(served)
    assert isinstance(load_served(served, allow_import=True), Mine)
    model = load_served(served, model=Mine)
    assert isinstance(model, Mine) and model.hidden.out_features == 5
    with torch.no_grad():
        logits = model(split_of(data, "test")).numpy()
    np.testing.assert_array_equal(logits, np.load(tmp_path / "run" / "test_scores.npy"))


def test_serving_draws_no_random_numbers(run):
    before = torch.get_rng_state()
    load_served(run[1] / "served")
    assert torch.equal(before, torch.get_rng_state())


def test_damaged_served_files_are_named(run, tmp_path, capsys):
    _, out = run
    target = tmp_path / "copy"
    assert main(["export", str(out), str(target)]) == 0
    for name in ("tables.safetensors", "model.safetensors"):
        whole = (target / name).read_bytes()
        (target / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{name} does not match its checksum"):
            load_served(target)
        (target / name).unlink()
        with pytest.raises(ValueError, match=f"{name} is missing"):
            load_served(target)
        (target / name).write_bytes(whole)
    load_served(target)
    description = json.loads((target / "model.json").read_text())
    for content, message in [
        ({**unsealed(description), "model": "mlp"}, r"model\.safetensors does not fit model 'mlp'"),
        ({**description, "model": "mlp"}, r"model\.json is damaged: its entries do not match their checksum"),
        ({**description, "version": 9}, "has version 9"),
        ({k: v for k, v in description.items() if k != "hyperparameters"}, "field 'hyperparameters' is missing"),
        ([], "does not describe a served model"),
    ]:
        (target / "model.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load_served(target)
    with pytest.raises(ValueError, match="model.json is missing"):
        load_served(tmp_path)


def test_export(run, data, tmp_path, capsys):
    _, out = run
    target = tmp_path / "models" / "one"
    assert main(["export", str(out), str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["model.json", "model.safetensors", "tables.safetensors"]
    assert main(["export", str(out), str(target)]) == 0
    assert "already" in capsys.readouterr().out
    Trainer(config_of("training.epochs=1"), data, tmp_path / "full").run()
    assert main(["export", str(tmp_path / "full"), str(target)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (target / "tables.safetensors").read_bytes() == (out / "served" / "tables.safetensors").read_bytes()
    assert main(["export", str(tmp_path / "full"), str(target), "--overwrite"]) == 0
    (target / "notes.txt").touch()
    assert main(["export", str(out), str(target), "--overwrite"]) == 2
    assert "holds more than an export" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "x")]) == 2
    assert "is not a finished run" in capsys.readouterr().err
    before = (tmp_path / "full" / "served" / "tables.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "full" / "served")
    for place in ("full/served", "full/served/sub", "full/new", "full", "link", "link/sub", "models/../full/served"):
        assert main(["export", str(out), str(tmp_path / place), "--overwrite"]) == 2
        assert f"is in the run {tmp_path / 'full'}" in capsys.readouterr().err
    assert (tmp_path / "full" / "served" / "tables.safetensors").read_bytes() == before
    # It is the folder that counts, not where its files are.
    shutil.move(tmp_path / "full" / "served" / "tables.safetensors", tmp_path / "elsewhere")
    (tmp_path / "full" / "served" / "tables.safetensors").symlink_to(tmp_path / "elsewhere")
    assert main(["export", str(out), str(tmp_path / "full" / "served"), "--overwrite"]) == 2
    assert "is in the run" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "full" / "served")
    shutil.copytree(out / "served", tmp_path / "full" / "served")
    assert main(["export", str(tmp_path / "full"), str(tmp_path / "x")]) == 2
    assert "served holds other tables than" in capsys.readouterr().err and not (tmp_path / "x").exists()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("limit", [1_000, 5_000, 10_000, 60_000])
def test_a_disk_that_cannot_take_more(limit, data, tmp_path):
    """Plan, tables, model or checkpoint cannot be written: an OSError, nothing half-written; later it goes on."""
    config = config_of("training.epochs=1", "model.hyperparameters.top_units=[128]")
    for split in ("train", "valid", "test"):
        next(data.batches(split, 10))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            Trainer(config, data, tmp_path / "run").run()
        except BaseException as error:
            os.write(writing, f"{type(error).__mro__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    message = os.read(reading, 10_000).decode()
    os.close(reading)
    assert "OSError" in message
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert Trainer(config, data, tmp_path / "run").run()["status"] == "ok"


# ---- the command -----------------------------------------------------------------------------------------------------


def test_train_command(data, tmp_path, capsys):
    flags = ["--method", "hash", "--budget", "40%", "--batch-size", "512", "--epochs", "1", "--quiet"]
    arguments = ["train", str(data.path), *flags, "--set", "tables.embedding_dim=4", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert f"{result['test_auc']:.4f}" in printed and f"{result['inference_bytes']:,}" in printed
    direct = config_of("tables.method=hash", "tables.budget=40%", "training.epochs=1")
    expected = Trainer(direct, data, tmp_path / "direct").run()
    assert result["test_auc"] == expected["test_auc"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "hash", "--budget", "7"], "7"),
        (["--method", "hash", "--budget", "0"], "0"),
        (["--set", "training.epoch=1"], "training.epoch is not a field of the configuration; did you mean"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--optimizer", "lamb"], "tables.optimizer"),
        (["--model", "nowhere:Model"], "cannot import 'nowhere'"),
    ],
)
def test_train_command_says_what_is_wrong(arguments, message, data, tmp_path, capsys):
    assert main(["train", str(data.path), "--out", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and "Traceback" not in error


def test_train_help(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--evaluations-per-epoch" in text and "embtables train data/demo" in text


def test_training_imports_nothing_heavy_before_it_must():
    heavy = ("tensorboard", "matplotlib", "pandas")
    code = f"import sys, embtables.training; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ---- does it learn? --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "interactions"), [("dlrm", 0.5), ("mlp", 0.0)])
def test_full_tables_reach_what_is_attainable(model, interactions, tmp_path):
    config = Synthetic(rows=150_000, cardinalities=(400, 100), interaction_std=interactions, num_dense=1, seed=1)
    data = prepare_synthetic(tmp_path / "data", config)
    result = Trainer(load_config(flags={"model.name": model, "training.epochs": 6}), data, tmp_path / "run").run()
    attainable = data.manifest["bayes_auc"] - 0.5
    assert result["test_auc"] - 0.5 >= 0.95 * attainable
    assert result["test_auc"] - 0.5 <= 1.03 * attainable
