"""What a run reads, how gradients and learning rates are handled, what chooses the model: against loops by hand."""

from __future__ import annotations

import copy
import json
import math
import random
import xml.etree.ElementTree as ElementTree

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from torch import nn
from training_cases import assert_weights, config_of, curve_of, weights_of

from embtables import EmbeddingTables
from embtables.cli.app import run as main
from embtables.datasets import PreparedDataset, Synthetic, prepare_synthetic
from embtables.datasets.interaction_log import LogOptions
from embtables.datasets.negatives import Negatives
from embtables.datasets.readers.interactions import Interactions, prepare_interactions
from embtables.models import MLP, build_model
from embtables.models.blocks import bags
from embtables.training import Trainer, load_config, load_served, metrics, outcome
from embtables.training.evaluation import score, slice_feature, to_device
from embtables.training.learning_curve import draw_curve, overfitting, remarks
from embtables.training.lookup_hooks import intercept
from embtables.training.nan_guard import NonFiniteError, Watch
from embtables.training.optimization import clip_gradients
from embtables.training.planning import plan_tables, selected


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    config = Synthetic(rows=4000, cardinalities=(200, 40), num_dense=2, shares=(0.6, 0.2, 0.2))
    return prepare_synthetic(tmp_path_factory.mktemp("data") / "toy", config)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Users, items, devices and histories, in groups by user; users click around an item of their own."""
    folder = tmp_path_factory.mktemp("log")
    generator = random.Random(0)
    taste = {user: generator.randrange(60) for user in range(80)}
    rows = [generator.randrange(80) for _ in range(3000)]
    frame = pl.DataFrame(
        {
            "user_id": rows,
            "item_id": [(taste[user] + int(generator.gauss(0, 4))) % 60 for user in rows],
            "timestamp": [1_600_000_000 + 60 * i for i in range(len(rows))],
            "device": [generator.choice(["phone", "tablet"]) for _ in rows],
        }
    )
    frame.write_csv(folder / "log.csv")
    options = Interactions(context=("device",), negatives=Negatives(1, "uniform"), log=LogOptions(history=8))
    return prepare_interactions(folder / "log.csv", folder / "data", options)


# ---- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["din", "mlp"])
def test_lists_train_serve_and_are_described(model, log, tmp_path):
    out = tmp_path / "run"
    config = config_of(f"model.name={model}", "data.max_history=3", "training.epochs=1")
    result = Trainer(config, log, out).run()
    assert result["status"] == "ok" and result["lookup_latency_us"] > 0
    described = json.loads((out / "served" / "model.json").read_text())
    assert described["feature_names"] == ["user_id", "item_id", "device"]
    assert described["histories"] == {"history": "item_id"} and described["list_features"] == []
    assert described["max_history"] == 3
    data = log.select((), 3)
    (batch,) = data.batches("test", data.num_rows("test"))
    assert batch.lists["history"].offsets.diff().max() == 3
    with torch.no_grad():
        logits = load_served(out / "served")(batch).numpy()
    np.testing.assert_allclose(logits, np.load(out / "test_scores.npy"), rtol=1e-4, atol=1e-6)
    assert result["test_gauc_weighted"] == pytest.approx(
        metrics.gauc_weighted(batch.labels.numpy(), np.load(out / "test_scores.npy"), batch.groups.numpy())
    )


def test_histories_help_and_their_length_is_part_of_the_run(log, tmp_path):
    config = config_of("model.name=din", "model.hyperparameters.pooling=mean", "training.epochs=6")
    auc = {}
    for name, more in [
        ("with", []),
        ("without", ["data.leave_out=[history, user_id]"]),
        ("one", ["data.max_history=1"]),
    ]:
        resolved = config_of(
            "model.name=din",
            "model.hyperparameters.pooling=mean",
            "training.epochs=6",
            "tables.learning_rate=0.05",
            *more,
        )
        auc[name] = Trainer(resolved, log, tmp_path / name).run()["test_auc"]
    assert auc["without"] < 0.6 < auc["with"] - 0.05
    assert len(set(auc.values())) == 3
    with pytest.raises(ValueError, match=r"data\.max_history was 1 and is now None"):
        Trainer(config, log, tmp_path / "one").run()


def test_lists_move_with_their_batch(log):
    (batch,) = list(log.batches("valid", log.num_rows("valid")))
    moved = to_device(batch, torch.device("meta"))
    tensors = [moved.labels, moved.dense, moved.ids, *moved.lists["history"]]
    assert {tensor.device.type for tensor in tensors} == {"meta"} and moved.groups is batch.groups


# ---- data ------------------------------------------------------------------------------------------------------------


def test_what_is_left_out_has_no_table(log, tmp_path, capsys):
    config = config_of("data.leave_out=[user_id]")
    assert [table.name for table in plan_tables(config, selected(config, log)).tables] == ["item_id", "device"]
    Trainer(config, log, tmp_path / "run").run()
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert [table["name"] for table in plan["tables"]] == ["item_id", "device"]
    assert main(["plan", str(log.path), "--method", "full", "--leave-out", "user_id,device", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [table["name"] for table in printed["tables"]] == ["item_id"]
    assert printed["tables"][0]["feature_names"] == ["item_id", "history"]


def test_an_unknown_name_is_a_sentence_and_leaves_nothing(log, tmp_path, capsys):
    flags = ["--leave-out", "histroy", "--out", str(tmp_path / "run")]
    assert main(["train", str(log.path), *flags]) == 2
    assert "has no feature 'histroy'; it has user_id, item_id, device, history" in " ".join(
        capsys.readouterr().err.split()
    )
    assert main(["train", str(log.path), "--leave-out", "history,,", "--out", str(tmp_path / "run")]) == 2
    assert "empty name" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_flags_reach_the_configuration(log, tmp_path):
    flags = ["--leave-out", "device, user_id", "--max-history", "2", "--monitor", "gauc_mean"]
    flags += ["--evaluations-per-epoch", "0.5", "--epochs", "2", "--batch-size", "1000", "--quiet"]
    assert main(["train", str(log.path), "--model", "mlp", *flags, "--out", str(tmp_path / "run")]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["data"] == {"leave_out": ["device", "user_id"], "max_history": 2}
    assert config["training"]["monitor"] == "gauc_mean"
    assert len(curve_of(tmp_path / "run")) == 1


def test_groups_are_measured_without_their_feature_and_slices_are_not(log, tmp_path):
    assert log.group_feature == "user_id"
    result = Trainer(config_of("data.leave_out=[user_id]"), log, tmp_path / "user").run()
    assert result["test_gauc_weighted"] is not None and result["test_auc_head"] is not None
    sliced = log.slice_feature
    assert slice_feature(log) == sliced == "item_id"
    result = Trainer(config_of(f"data.leave_out=[{sliced}]"), log, tmp_path / "item").run()
    assert result["test_auc_head"] is None and result["test_auc"] is not None


# ---- gradients -------------------------------------------------------------------------------------------------------


class Looking(nn.Module):
    """Looks up by ``lookup`` and spoils the gradient of one output."""

    def __init__(self, embeddings, num_dense_features):
        super().__init__()
        self.embeddings = embeddings
        self.layer = nn.Linear(4, 1)

    def forward(self, batch):
        ids, offsets = bags(batch, self.embeddings.feature_names)
        vectors = self.embeddings.lookup(ids, offsets)
        return self.layer(vectors["item_id"]).squeeze(1) + (vectors["history"].sum(1) * 0).sqrt()


def test_gradients_of_single_outputs_are_watched(log, tmp_path):
    with pytest.raises(NonFiniteError, match="^step 1: the gradient of the vectors of 'history' is NaN; lower"):
        Trainer(config_of(f"model.name={__name__}:Looking"), log, tmp_path / "run").run()


def test_the_watch_ends_with_the_training(toy):
    tables = EmbeddingTables(plan_tables(config_of(), toy))
    watch = Watch(nn.Module(), tables, [])
    assert "forward" in vars(tables)
    watch.close()
    assert not {"forward", "lookup"} & set(vars(tables))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("most", [1e-3, 1e6])
def test_clipping_is_torchs(sparse, most):
    torch.manual_seed(0)
    tables, layer = nn.Embedding(20, 4, sparse=sparse), nn.Linear(4, 1)
    dense, other = copy.deepcopy(tables), copy.deepcopy(layer)
    dense.sparse = False
    ids = torch.tensor([3, 3, 5, 0])
    layer(tables(ids)).square().sum().backward()
    other(dense(ids)).square().sum().backward()
    unused = nn.Parameter(torch.ones(3))
    clip_gradients([*tables.parameters(), *layer.parameters(), unused], most)
    nn.utils.clip_grad_norm_([*dense.parameters(), *other.parameters()], most)
    gradient = tables.weight.grad.to_dense() if sparse else tables.weight.grad
    torch.testing.assert_close(gradient, dense.weight.grad, rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.weight.grad, other.weight.grad, rtol=1e-5, atol=0)
    assert unused.grad is None


def by_hand(config, data, *, clip=None, l2=0.0, start=lambda model: None, of_rest_l2=lambda name: 0.0):
    """The training of an MLP over tables that are ordinary parameters, written out with torch alone."""
    training = config.training
    torch.manual_seed(training.seed)
    tables = EmbeddingTables(plan_tables(config, data), seed=training.seed, std=config.tables.init_std)
    model = MLP(tables, len(data.dense_features), **config.model.hyperparameters)
    start(model)
    of_tables = list(tables.parameters())
    decays = {p: of_rest_l2(n) for n, p in model.named_parameters() if not n.startswith("embeddings.")}
    of_rest = [p for n, p in model.named_parameters() if not n.startswith("embeddings.")]
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.dense.optimizer](
        [
            {"params": of_tables, "lr": config.tables.learning_rate},
            {"params": of_rest, "lr": config.dense.learning_rate},
        ]
    )
    for epoch in range(training.epochs):
        for batch in data.batches("train", training.batch_size, seed=training.seed, epoch=epoch):
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(model(batch), batch.labels)
            loss = loss + sum(decay / 2 * p.square().sum() for p, decay in decays.items())
            (loss + l2 / 2 * sum(p.square().sum() for p in of_tables)).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return model.state_dict()


def test_weight_decay_by_name_and_initialization_by_name_are_those_of_a_loop_by_hand(toy, tmp_path):
    overrides = ["model.name=mlp", "tables.fused=false", "tables.learning_rate=1.0", "dense.learning_rate=1.0"]
    overrides += ["tables.optimizer=sgd", "dense.optimizer=sgd", "model.initialization=xavier_normal"]
    config = config_of(*overrides, "dense.weight_decay={output.*: 0, hidden*.weight: 0.1, '*': 0.02}")
    Trainer(config, toy, tmp_path / "run").run()

    def xavier(model):
        """Glorot & Bengio: a variance of 2 / (inputs + outputs)."""
        for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
            numbers = torch.empty_like(layer.weight).normal_(0, (2 / sum(layer.weight.shape)) ** 0.5)
            layer.weight.data.copy_(numbers)
            layer.bias.data.zero_()

    def decay(name):
        return 0.0 if name.startswith("output.") else 0.1 if name.endswith(".weight") else 0.02

    wanted = by_hand(config, toy, start=xavier, of_rest_l2=decay)
    assert_weights(weights_of(tmp_path / "run"), wanted, rtol=1e-4, atol=1e-6)
    for other in (by_hand(config, toy, of_rest_l2=decay), by_hand(config, toy, start=xavier)):
        assert not torch.allclose(other["hidden.layers.0.weight"], wanted["hidden.layers.0.weight"], atol=1e-3)


def test_unknown_names_of_parameters_and_initializations_are_refused(toy, tmp_path):
    config = config_of("model.name=mlp", "dense.weight_decay={crosses.*: 0.1}")
    with pytest.raises(ValueError, match=r"^dense.weight_decay: no parameter is named as 'crosses.\*'; there is h"):
        Trainer(config, toy, tmp_path / "run").run()
    with pytest.raises(ValueError, match="^model.initialization: choose one of xavier_normal, .*, not 'xavier'$"):
        config_of("model.initialization=xavier")
    for wrong in ("-1", "{a: -1}", "{a: word}", "word"):
        with pytest.raises(ValueError, match="^dense.weight_decay: "):
            config_of(f"dense.weight_decay={wrong}")


def test_a_clipped_run_is_that_of_a_loop_by_hand(toy, tmp_path):
    overrides = ["model.name=mlp", "tables.fused=false", "tables.learning_rate=1.0", "dense.learning_rate=1.0"]
    overrides += ["tables.optimizer=sgd", "dense.optimizer=sgd"]
    config = config_of(*overrides, "training.clip_norm=0.02")
    Trainer(config, toy, tmp_path / "run").run()
    wanted = by_hand(config, toy, clip=0.02)
    assert_weights(weights_of(tmp_path / "run"), wanted, rtol=1e-4, atol=1e-6)
    Trainer(config_of(*overrides), toy, tmp_path / "free").run()
    assert not torch.allclose(weights_of(tmp_path / "free")["output.weight"], wanted["output.weight"], atol=1e-2)


def test_fused_tables_are_not_clipped(toy, tmp_path):
    still = ["tables.optimizer=sgd", "tables.learning_rate=0.5", "dense.optimizer=sgd", "dense.learning_rate=1e-30"]
    for name, more in [("free", []), ("clipped", ["training.clip_norm=1e-6"])]:
        Trainer(config_of(*still, *more), toy, tmp_path / name).run()
    free, clipped = weights_of(tmp_path / "free"), weights_of(tmp_path / "clipped")
    assert torch.equal(free["embeddings.store.weight_4"], clipped["embeddings.store.weight_4"])


def test_regularization_reaches_the_tables_with_the_frequencies(toy, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(EmbeddingTables, "regularize", lambda self, l2, counts: asked.append((l2, counts)))
    Trainer(config_of("training.epochs=1"), toy, tmp_path / "none").run()
    assert asked == []
    Trainer(config_of("training.epochs=1", "tables.regularization=0.25"), toy, tmp_path / "some").run()
    ((l2, counts),) = asked
    assert l2 == 0.25 and counts is toy.frequencies


# ---- learning rates and the monitor ----------------------------------------------------------------------------------


def prescribed(monkeypatch, *rows):
    """Validation as written down: (auc, gauc_weighted, gauc_mean, logloss) of each evaluation."""
    values = iter(rows)
    seen = []

    def next_row(scored):
        row = next(values, None) or seen[-1]  # the end scores the best model once more
        seen.append(row)
        return dict(zip(("auc", "gauc_weighted", "gauc_mean", "logloss"), row))

    monkeypatch.setattr(outcome, "main_metrics", next_row)


@pytest.mark.parametrize(("fused", "optimizer"), [("true", "adam"), ("false", "adagrad")])
def test_the_plateau_schedule(fused, optimizer, log, tmp_path, monkeypatch):
    prescribed(monkeypatch, *[(auc, 0.5, 0.5, 0.6) for auc in (0.6, 0.6, 0.7, 0.65, 0.69, 0.1, 0.2, 0.3)])
    config = config_of(
        *("training.epochs=8", "training.plateau_factor=0.1", "training.min_learning_rate=1e-4"),
        *(f"tables.fused={fused}", f"tables.optimizer={optimizer}", "tables.learning_rate=0.05"),
        "dense.learning_rate=1e-5",
    )
    Trainer(config, log, tmp_path / "run").run()
    curve = curve_of(tmp_path / "run")
    # The rates with which the steps before each evaluation were made: an equal AUC is no better one.
    wanted = [0.05, 0.05, 0.005, 0.005, 5e-4, 1e-4, 1e-4, 1e-4]
    assert [row["learning_rate_tables"] for row in curve] == pytest.approx(wanted, rel=1e-12)
    assert {row["learning_rate_dense"] for row in curve} == {1e-5}  # below the least already
    kept = torch.load(tmp_path / "run" / "checkpoint" / "last.pt", weights_only=True)["state"]
    state = kept["optimization"]
    if fused == "true":
        (rate,) = [value for name, value in kept["model"].items() if name.endswith("optimizer_state.learning_rate")]
        assert float(rate) == pytest.approx(1e-4)
    else:
        assert state["tables"]["param_groups"][0]["lr"] == pytest.approx(1e-4)
    assert state["dense"]["param_groups"][0]["lr"] == 1e-5


@pytest.mark.parametrize(
    ("monitor", "best", "stop"), [("auc", 1, 3), ("gauc_weighted", 2, 4), ("gauc_mean", 3, 5), ("logloss", 4, 6)]
)
def test_the_monitor_chooses_and_stops(monitor, best, stop, log, tmp_path, monkeypatch):
    rows = [(0.9, 0.5, 0.5, 0.9), (0.8, 0.7, 0.6, 0.8), (0.7, 0.6, 0.7, 0.7), (0.6, 0.5, 0.6, 0.5)]
    prescribed(monkeypatch, *rows, *[(0.5, 0.4, 0.4, 0.6)] * 4)
    config = config_of("training.epochs=8", f"training.monitor={monitor}", "training.patience=2")
    result = Trainer(config, log, tmp_path / "run").run()
    assert (result["best_epoch"], result["epochs"]) == (best, stop)
    assert (tmp_path / "run" / "served" / "model.json").exists()


def test_a_monitor_that_does_not_exist_is_said_before_anything_happens(toy, tmp_path):
    with pytest.raises(ValueError, match="training.monitor is gauc_mean, but .* has no groups: monitor auc or logloss"):
        Trainer(config_of("training.monitor=gauc_mean"), toy, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="^training.monitor: .*'logloss', not 'f1'$"):
        config_of("training.monitor=f1")


# ---- bfloat16 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "mixed_dimension", "compositional"])
def test_autocast_leaves_the_tables_alone(method, log):
    config = config_of(f"tables.method={method}", "tables.budget=60%" if method != "full" else "tables.budget=null")
    tables = EmbeddingTables(plan_tables(config, log))
    model = build_model("din", tables, 0, {})
    (batch,) = list(log.batches("valid", log.num_rows("valid")))
    ids, offsets = bags(batch, tables.feature_names)
    exact, logits = tables(ids, offsets), model.eval()(batch)
    seen = []
    undo = intercept(tables, seen.append)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch)
        assert torch.equal(tables(ids, offsets), exact)
        assert model.output(torch.zeros(1, model.output.in_features)).dtype == torch.bfloat16
    undo()
    assert [v.dtype for v in seen[0].values()] == [torch.float32] * 4
    assert not torch.equal(rounded.float(), logits)
    torch.testing.assert_close(rounded.float(), logits, rtol=0.05, atol=0.02)


def test_autocast_trains_the_dense_part_in_bfloat16_and_the_rest_not(log, tmp_path, monkeypatch):
    types = []
    loss = nn.functional.binary_cross_entropy_with_logits
    forward = nn.Linear.forward

    def linear(self, inputs):
        output = forward(self, inputs)
        types.append((self.training, str(output.dtype)))
        return output

    monkeypatch.setattr(nn.Linear, "forward", linear)
    monkeypatch.setattr(
        nn.functional,
        "binary_cross_entropy_with_logits",
        lambda x, y: types.append(("loss", str(x.dtype))) or loss(x, y),
    )
    options = ["model.name=din", "training.epochs=3", "tables.learning_rate=0.05"]
    half = Trainer(config_of(*options, "training.autocast=bf16"), log, tmp_path / "half").run()
    assert set(types) == {(True, "torch.bfloat16"), (False, "torch.float32"), ("loss", "torch.float32")}
    whole = Trainer(config_of(*options), log, tmp_path / "whole").run()
    assert half["test_auc"] == pytest.approx(whole["test_auc"], abs=0.03) and half["test_auc"] != whole["test_auc"]


# ---- the curve -------------------------------------------------------------------------------------------------------


def test_the_validation_curve(log, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = []
    settle = Watch.settle

    def recorded(self):
        found = settle(self)
        losses.extend(found)
        return found

    monkeypatch.setattr(Watch, "settle", recorded)
    config = config_of("training.evaluations_per_epoch=2", "training.epochs=2", "tables.learning_rate=0.02")
    result = Trainer(config, log, tmp_path / "run").run()
    curve = curve_of(tmp_path / "run")
    per_epoch = math.ceil(log.num_rows("train") / 400)
    steps = [math.ceil(per_epoch / 2), per_epoch, per_epoch + math.ceil(per_epoch / 2), 2 * per_epoch]
    assert [row["step"] for row in curve] == steps
    assert [row["epoch"] for row in curve] == [round(s / per_epoch, 4) for s in steps]
    for before, row in zip([0, *steps], curve):
        part = losses[before : int(row["step"])]
        mean = sum(loss * size for loss, size in part) / sum(size for _, size in part)
        assert row["train_loss"] == pytest.approx(mean, rel=1e-9)
    best = max(curve, key=lambda row: row["valid_auc"])
    for name in ("valid_auc", "valid_logloss", "valid_gauc_weighted", "valid_gauc_mean"):
        assert best[name] == pytest.approx(result[name], rel=1e-9)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("auc", "logloss", "gauc_weighted", "gauc_mean"):
        found = [event.value for event in events.Scalars(f"valid/{name}")]
        assert found == pytest.approx([row[f"valid_{name}"] for row in curve], rel=1e-6)


@pytest.mark.parametrize(
    ("number", "epochs", "wanted"),
    [(0.5, 3, [20, 30]), (1.5, 2, [7, 14, 20]), (30, 1, range(1, 11)), (1, 0.5, [5]), (2, 1.25, [5, 10, 13])],
)
def test_evaluations_at_fractions_of_an_epoch(number, epochs, wanted, log, tmp_path):
    size = math.ceil(log.num_rows("train") / 10)
    overrides = [f"training.batch_size={size}", f"training.evaluations_per_epoch={number}", f"training.epochs={epochs}"]
    Trainer(config_of(*overrides, "model.name=mlp"), log, tmp_path / "run").run()
    assert [row["step"] for row in curve_of(tmp_path / "run")] == list(wanted)


def rows_of(aucs, losses, epochs):
    return [
        {
            "step": int(10 * epoch),
            "epoch": epoch,
            "train_loss": loss,
            "valid_auc": auc,
            "valid_logloss": 1 - auc,
            "valid_gauc_weighted": None,
            "valid_gauc_mean": None,
        }
        for auc, loss, epoch in zip(aucs, losses, epochs)
    ]


def test_over_fitting_in_words():
    rows = rows_of([0.70, 0.7412, 0.72, 0.7203], [0.6, 0.5, 0.4, 0.3], [0.5, 1, 1.5, 2])
    sentence = overfitting(rows, "auc")
    assert sentence.startswith(
        "validation AUC was best at epoch 1 (0.7412) and fell to 0.7203 by epoch 2, while the training loss fell from "
        "0.5000 to 0.3000: one-epoch over-fitting; the model of epoch 1 is kept. Try tables.regularization"
    )
    assert "log loss was best at epoch 1 (0.2588) and rose to 0.2797" in overfitting(rows, "logloss")
    assert "one-epoch" not in overfitting(rows_of([0.5, 0.7, 0.6], [3, 2, 1], [1, 2, 3]), "auc")
    assert "evaluations_per_epoch" in overfitting(rows_of([0.7, 0.6], [2, 1], [1, 2]), "auc")
    assert overfitting(rows_of([0.6, 0.7], [2, 1], [1, 2]), "auc") is None
    assert overfitting(rows_of([0.7, 0.6], [1, 2], [1, 2]), "auc") is None  # diverges, which is something else
    assert overfitting(rows_of([0.7001, 0.7], [2, 1], [1, 2]), "auc") is None


def test_a_run_that_learned_nothing_is_told():
    flat = rows_of([0.5, 0.5021, 0.4996], [0.7, 0.69, 0.69], [1, 2, 3])
    (sentence,) = remarks(flat, "auc", out_of_patience=True)
    assert sentence == (
        "validation AUC never left 0.5 (0.4996 to 0.5021): the model has learned nothing. Try a higher tables.init_std "
        "or other learning rates."
    )
    assert remarks(rows_of([0.5, 0.51], [0.7, 0.6], [1, 2]), "auc", out_of_patience=True) == []
    assert remarks(rows_of([0.5, 0.45], [0.7, 0.6], [1, 2]), "auc", out_of_patience=True) == []


@pytest.mark.parametrize("field", ["tables.regularization", "tables.l2", "dense.weight_decay"])
def test_what_kept_it_from_learning_is_named_where_it_is_set(field, toy, tmp_path, monkeypatch):
    others = {"tables.regularization", "tables.l2", "dense.weight_decay"} - {field}
    measure = outcome.main_metrics
    monkeypatch.setattr(outcome, "main_metrics", lambda scored: {**measure(scored), "auc": 0.5})
    (sentence,) = Trainer(config_of("model.name=fm", f"{field}=0.5"), toy, tmp_path / "run").run()["remarks"]
    assert f"a higher tables.init_std, a lower {field} or other learning rates" in sentence
    assert not any(other in sentence for other in others)


def test_rare_ids_that_still_improve_at_an_early_stop_are_told():
    rows = [
        {**row, "valid_auc_tail": tail}
        for row, tail in zip(rows_of([0.70, 0.74, 0.72], [0.6, 0.5, 0.4], [1, 2, 3]), [0.5, 0.52, 0.55])
    ]
    (sentence,) = remarks(rows, "auc", out_of_patience=True)
    assert "training stopped for want of a better AUC" in sentence
    assert "of rare ids still rose, from 0.5200 at epoch 2 to 0.5500 at epoch 3" in sentence
    assert remarks(rows, "auc", out_of_patience=False) == []
    rows[-1]["valid_auc_tail"] = None
    assert remarks(rows, "auc", out_of_patience=True) == []


def test_remarks_are_printed_and_the_preset_learns(log, tmp_path, monkeypatch, capsys):
    flags = ["--preset", "bars", "--epochs", "2", "--quiet", "--batch-size", "200", "--set", "training.patience=null"]

    def told(rows, monitor, out_of_patience, decays):
        return [f"{len(rows)}, {out_of_patience}, {decays}"]

    monkeypatch.setattr(outcome, "remarks", told)
    assert main(["train", str(log.path), *flags, "--out", str(tmp_path / "run")]) == 0
    assert "Note: 2, False, []\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["remarks"] == ["2, False, []"]
    assert max(row["valid_auc"] for row in curve_of(tmp_path / "run")) > 0.55


def test_the_tail_is_in_the_curve(log, tmp_path):
    Trainer(config_of("model.name=mlp", "training.epochs=1"), log, tmp_path / "run").run()
    model = load_served(tmp_path / "run" / "served")
    scored = score(model, log, "valid", 4096, torch.device("cpu"))
    counts = log.frequencies[slice_feature(log)]
    area = metrics.slice_auc(scored.labels, scored.logits, scored.slice_ids, counts)["tail"]
    assert curve_of(tmp_path / "run")[-1]["valid_auc_tail"] == pytest.approx(area, rel=1e-6)


def test_over_fitting_is_said_at_the_end_of_train(toy, tmp_path, capsys):
    flags = ["--epochs", "12", "--batch-size", "200", "--learning-rate", "0.3", "--patience", "5", "--quiet"]
    assert main(["train", str(toy.path), *flags, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "Note: validation AUC was best at epoch" in printed and "over-fitting" in printed
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["overfitting"] in printed


def test_the_figure_of_the_curve(tmp_path):
    rows = rows_of([0.70, 0.74, 0.72], [0.6, 0.5, 0.4], [1, 2, 3])
    draw_curve(rows, 2, tmp_path / "one.svg")
    draw_curve(rows, 2, tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    text = "".join(ElementTree.parse(tmp_path / "one.svg").getroot().itertext())
    assert "log loss" in text and "AUC" in text and "gauc_mean" not in text


# ---- presets ---------------------------------------------------------------------------------------------------------


def test_the_bars_preset_and_what_overrides_it(tmp_path):
    config = load_config(preset="bars", flags={"model.name": "mlp"})
    assert config.model.hyperparameters == {"units": [400, 400, 400], "batch_norm": True}
    tables, training = config.tables, config.training
    assert (tables.embedding_dim, tables.init_std, tables.fused, tables.optimizer) == (10, 1e-4, False, "adam")
    assert (training.batch_size, training.epochs, training.patience, training.seed) == (4096, 100, 2, 2021)
    assert (training.clip_norm, training.plateau_factor, training.min_learning_rate) == (10, 0.1, 1e-6)
    assert tables.learning_rate == config.dense.learning_rate == 1e-3
    dlrm = load_config(preset="bars").model.hyperparameters
    assert dlrm["top_units"] == [400, 400, 400] and "units" not in dlrm
    path = tmp_path / "run.yaml"
    path.write_text("training: {batch_size: 64, epochs: 3}\nmodel: {name: mlp, hyperparameters: {dropout: 0.1}}\n")
    config = load_config(
        path, preset="bars", flags={"training.epochs": 4}, overrides=["model.hyperparameters.units=[8]"]
    )
    assert (config.training.batch_size, config.training.epochs, config.training.seed) == (64, 4, 2021)
    assert config.model.hyperparameters == {"units": [8], "dropout": 0.1, "batch_norm": True}
    with pytest.raises(ValueError, match="^preset 'brs' is unknown: there is bars$"):
        load_config(preset="brs")
    with pytest.raises(ValueError, match="model 'dlmr' is unknown"):
        load_config(preset="bars", flags={"model.name": "dlmr"})


def test_weight_decay_of_the_preset_is_l2_of_whole_tables(toy, tmp_path):
    """FuxiCTR adds λ/2·‖W‖² of every table to the loss; Adam's weight decay has the same gradient."""
    more = [
        "model.name=mlp",
        "training.batch_size=400",
        "training.epochs=2",
        "tables.l2=0.01",
        "training.clip_norm=null",
    ]
    # Without normalization: a bias before it has no gradient but rounding errors, which Adam makes large.
    mlp = ["model.hyperparameters.units=[16]", "model.hyperparameters.batch_norm=false"]
    config = load_config(preset="bars", overrides=[*more, *mlp])
    Trainer(config, toy, tmp_path / "run").run()
    wanted = by_hand(config, toy, l2=0.01)
    assert_weights(weights_of(tmp_path / "run"), wanted, rtol=1e-3, atol=2e-5)
    assert not torch.allclose(
        by_hand(config, toy)["embeddings.store.weight_10"], wanted["embeddings.store.weight_10"], atol=1e-3
    )


def test_a_preset_is_recorded_resolved(toy, tmp_path):
    flags = ["--preset", "bars", "--model", "mlp", "--epochs", "1", "--quiet"]
    assert main(["train", str(toy.path), *flags, "--out", str(tmp_path / "run")]) == 0
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["training"]["clip_norm"] == 10 and recorded["training"]["epochs"] == 1
    assert recorded["model"]["hyperparameters"] == {"units": [400, 400, 400], "batch_norm": True}


def test_presets_stand_in_the_help(capsys):
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "bars: the defaults of FuxiCTR" in text and "--leave-out" in text and "fused tables" in text


def test_a_selection_that_the_configuration_does_not_know_is_refused(log, tmp_path):
    """Its run's folder would not tell what was read."""
    config = config_of("model.name=mlp", "training.epochs=1", "data.leave_out=[history]")
    Trainer(config, PreparedDataset(log.path, leave_out=["history"]), tmp_path / "one")
    for selection in ({"leave_out": ["history", "user_id"]}, {"max_history": 3}):
        with pytest.raises(ValueError, match="was opened with leave_out=.*: open it whole and set data.leave_out"):
            Trainer(config, PreparedDataset(log.path, **selection), tmp_path / "two")
    assert not (tmp_path / "two").exists()
