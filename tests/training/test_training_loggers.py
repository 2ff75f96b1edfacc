"""Where a run is logged: TensorBoard's HParams, MLflow, Weights & Biases, and the logger of another package."""

from __future__ import annotations

import json
import random
import struct
import sys
import warnings

import numpy as np
import pytest
import torch
from third_party_cases import install
from training_cases import assert_weights, config_of, curve_of, weights_of

from embtables import __version__
from embtables._util.files import sha256, unsealed
from embtables.cli.app import run as main
from embtables.datasets import PreparedDataset
from embtables.training import RunLogger, Trainer, load_config, loop
from embtables.training.logs import write_hparams


def small(*overrides):
    """Eight steps an epoch, of which every second is logged."""
    return config_of("training.log_every=2", "tables.method=hash", "tables.budget=40%", *overrides)


FULL = ("tables.method=full", "tables.budget=null")


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """A run that is logged nowhere."""
    out = tmp_path_factory.mktemp("plain") / "run"
    return Trainer(small(), PreparedDataset(data), out).run(), out


def hparams_of(folder):
    """Parameters and results of every HParams entry in the events of a folder, and how many of its files have one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder))
    events.Reload()
    content = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    given = {
        name: getattr(value, value.WhichOneof("kind")) for name, value in content.session_start_info.hparams.items()
    }
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"] if name.startswith("result/")}
    return given, scalars, sum(b"session_start_info" in path.read_bytes() for path in folder.glob("events.*"))


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def test_a_run_has_one_hparams_entry(plain):
    result, out = plain
    given, scalars, files = hparams_of(out / "tensorboard")
    wanted = {"dataset": "tiny", "model": "dlrm", "method": "hash", "budget": "40%", "seed": 0, "learning_rate": 0.01}
    wanted |= {"tables.precision": "fp32", "tables.optimizer": "adam", "tables.regularization": 0, "tables.l2": 0}
    wanted |= {"dense.optimizer": "adam", "dense.learning_rate": 0.001, "training.batch_size": 400}
    wanted |= {"training.epochs": 2, "tables.embedding_dim": 4}
    assert wanted.items() <= given.items()
    assert "training.average" not in given  # it is null
    for name in ("test_auc", "test_logloss", "valid_auc", "inference_bytes", "train_seconds"):
        (event,) = scalars[f"result/{name}"]
        assert event.value == pytest.approx(result[name], rel=1e-6)
    assert files == 1 and "result/seed" not in scalars and "result/learning_rate" not in scalars


def test_an_end_that_is_repeated_leaves_one_hparams_entry(data, tmp_path):
    out = tmp_path / "run"
    Trainer(small(), PreparedDataset(data), out).run()
    (out / "metrics.json").unlink()  # as one that was killed before it wrote it
    result = Trainer(small(), PreparedDataset(data), out).run()
    _, scalars, files = hparams_of(out / "tensorboard")
    assert files == 1 and len(scalars["result/test_auc"]) == 1
    assert scalars["result/test_auc"][0].value == pytest.approx(result["test_auc"], rel=1e-6)


def test_every_served_form_has_its_hparams_entry(data, tmp_path):
    beside = {tmp_path / "int4": small(*FULL, "tables.precision=int4")}
    Trainer(small(*FULL), PreparedDataset(data), tmp_path / "fp32", also=beside).run()
    for name in ("fp32", "int4"):
        given, scalars, _ = hparams_of(tmp_path / name / "tensorboard")
        measured = json.loads((tmp_path / name / "metrics.json").read_text())
        assert given["tables.precision"] == name
        assert scalars["result/test_logloss"][0].value == pytest.approx(measured["test_logloss"], rel=1e-6)


def test_hparams_of_any_values(tmp_path):
    given = {"method": {"kind": "hash"}, "decay": None, "fused": True, "units": [64, 32], "rate": 0.5, "text": "täg"}
    write_hparams(tmp_path, given, {"auc": 0.75, "rate": 1, "status": "ok", "flag": True, "gauc": None})
    found, scalars, _ = hparams_of(tmp_path)
    assert found == {"method": "{'kind': 'hash'}", "fused": True, "units": "[64, 32]", "rate": 0.5, "text": "täg"}
    assert {name: event.value for name, (event,) in scalars.items()} == {"result/auc": 0.75}


# ---- any logger, as that of another package --------------------------------------------------------------------------


class Notes(RunLogger):
    """Keeps what it is told, and draws random numbers."""

    kind = "notes"
    runs: list[dict] = []
    fails_at: str | None = None

    def start(self, run, known_as):
        self.note = {"run": run, "known_as": known_as, "metrics": [], "end": None}
        self.runs.append(self.note)
        self._call("start")
        return known_as or f"note-{len(self.runs)}"

    def metrics(self, step, values):
        self._call("metrics")
        self.note["metrics"].append((step, dict(values)))

    def end(self, finished, files):
        self._call("end")
        self.note["end"] = finished, {file.name: file.read_bytes() for file in files}

    def _call(self, name):
        torch.rand(3), np.random.rand(3), random.random()
        if self.fails_at == name:
            raise ConnectionError(f"the server\nis down at {name}")


@pytest.fixture
def notes(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    install(site, "notes", {"notes": f"{__name__}:Notes"}, "embtables.loggers")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(Notes, "runs", [])
    monkeypatch.setattr(Notes, "fails_at", None)
    return Notes


def history(*notes):
    """[(name, step, value)] of everything that was logged, in its order."""
    return [(name, step, value) for note in notes for step, values in note["metrics"] for name, value in values.items()]


def of_results(history):
    return [entry for entry in history if entry[0] != "train/examples_per_second"]


def test_what_a_logger_is_told(notes, data, plain, tmp_path):
    config = small("training.log_to=notes", "model.hyperparameters.dropout=0.3")
    out = tmp_path / "run"
    result = Trainer(config, PreparedDataset(data), out).run()
    (note,) = notes.runs
    run = note["run"]
    assert run.name == "run" and note["known_as"] is None
    assert run.parameters == {"dataset": "tiny"} | {k: v for k, v in config.flat().items() if k != "training.log_to"}
    assert run.tags == {"embtables.version": __version__, "embtables.data_sha256": sha256(data / "manifest.json")}
    told = history(note)
    assert len({(name, step) for name, step, _ in told}) == len(told)
    curve = curve_of(out)
    for column in ("valid_auc", "valid_logloss"):
        name = column.replace("_", "/")
        assert [(step, value) for n, step, value in told if n == name] == [(row["step"], row[column]) for row in curve]
    assert [(step, value) for name, step, value in told if name == "epoch"] == [(r["step"], r["epoch"]) for r in curve]
    last = int(curve[-1]["step"])
    assert [step for name, step, _ in told if name == "train/loss"] == list(range(2, last + 1, 2))
    final = {name: value for name, step, value in told if step == last}
    assert final["test/auc"] == result["test_auc"] and final["test/logloss"] == result["test_logloss"]
    assert final["bytes/inference"] == result["inference_bytes"] and final["bytes/full"] == result["full_bytes"]
    finished, files = note["end"]
    assert finished
    for name in ("config.yaml", "environment.json", "plan.json", "validation.csv", "metrics.json"):
        assert files[name] == (out / name).read_bytes()
    # A finished run is not logged again.
    Trainer(config, PreparedDataset(data), out).run()
    assert len(notes.runs) == 1


def assert_same_run(one, other):
    for name in ("test_scores.npy", "validation.csv", "served/tables.safetensors", "served/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert_weights(weights_of(one), weights_of(other), rtol=0, atol=0)


def test_logging_changes_no_result(notes, data, tmp_path):
    dropout = "model.hyperparameters.dropout=0.3"  # draws random numbers in every step
    Trainer(small(dropout), PreparedDataset(data), tmp_path / "plain").run()
    Trainer(small(dropout, "training.log_to=notes"), PreparedDataset(data), tmp_path / "logged").run()
    assert_same_run(tmp_path / "plain", tmp_path / "logged")


def test_a_resumed_run_goes_on_and_logs_each_step_once(notes, data, tmp_path, monkeypatch):
    config = small("training.log_to=notes", "training.checkpoint_seconds=1000")
    Trainer(config, PreparedDataset(data), tmp_path / "whole").run()
    step = loop.Run._step

    def interrupted(self, batch, watch):
        if self.progress.step == 13 and len(notes.runs) == 2:
            raise KeyboardInterrupt
        step(self, batch, watch)

    monkeypatch.setattr(loop.Run, "_step", interrupted)
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, PreparedDataset(data), out).run()
    Trainer(config, PreparedDataset(data), out).run()
    whole, first, second = notes.runs
    assert first["end"] == (False, {}) and second["known_as"] == "note-2" and second["end"][0]
    steps = [step for step, _ in first["metrics"]], [step for step, _ in second["metrics"]]
    # The checkpoint is of step 6, the evaluation; steps 8 to 12 were logged before the end.
    assert max(steps[0]) == 12 and min(steps[1]) > max(steps[0])
    assert of_results(history(first, second)) == of_results(history(whole))


def test_a_run_that_waits_goes_on_with_the_same_one(notes, data, tmp_path):
    config = small("training.log_to=notes")
    trainer = Trainer(config, PreparedDataset(data), tmp_path / "run")
    assert trainer.run_until(1) is None
    trainer.run()
    first, second = notes.runs
    assert first["end"] == (False, {}) and second["known_as"] == "note-1" and second["end"][0]


def test_every_served_form_is_logged(notes, data, tmp_path):
    beside = {tmp_path / "int4": small(*FULL, "tables.precision=int4", "training.log_to=notes")}
    Trainer(small(*FULL, "training.log_to=notes"), PreparedDataset(data), tmp_path / "fp32", also=beside).run()
    own, other = sorted(notes.runs, key=lambda note: note["run"].name)
    assert (own["run"].name, other["run"].name) == ("fp32", "int4")
    measured = json.loads((tmp_path / "int4" / "metrics.json").read_text())
    told = dict(entry[::2] for entry in history(other))
    assert told["test/auc"] == measured["test_auc"] and told["bytes/inference"] == measured["inference_bytes"]
    assert unsealed(json.loads(other["end"][1]["metrics.json"])) == unsealed(measured)


@pytest.mark.parametrize("moment", ["start", "metrics", "end"])
def test_a_logger_that_fails_is_one_warning(notes, data, plain, tmp_path, moment):
    notes.fails_at = moment
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(small("training.log_to=notes"), PreparedDataset(data), tmp_path / "run").run()
    said = [str(each.message) for each in caught if "notes" in str(each.message)]
    assert said == [f"notes hears no more of this run, which goes on: the server is down at {moment}"]
    assert_same_run(plain[1], tmp_path / "run")


@pytest.mark.parametrize("text", ["", "[]", '{"run": 3, "steps": {}}', '{"run": "x", "steps": {"a": "b"}}', "\udcff"])
def test_a_damaged_note_of_a_logger_is_one_warning(notes, data, tmp_path, text):
    out = tmp_path / "run"
    trainer = Trainer(small("training.log_to=notes"), PreparedDataset(data), out)
    assert trainer.run_until(1) is None
    (out / "logger-notes.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match=r"logger-notes.json is damaged: delete it to have the run logged as another"):
        assert trainer.run()["status"] == "ok"
    assert len(notes.runs) == 1


def test_the_field_takes_words(notes):
    def named(text):
        return load_config(overrides=[f"training.log_to={text}"]).training.log_to

    assert named("notes") == ["notes"] and named("[wandb, mlflow, wandb]") == ["wandb", "mlflow"] and named("[]") == []
    with pytest.raises(ValueError, match=r"training.log_to: choose of mlflow, wandb, notes, not 'comet'"):
        named("comet")


@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_a_package_that_is_missing_is_said_before_training(data, tmp_path, monkeypatch, capsys, kind):
    real = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == kind else real(name, *rest))
    out = tmp_path / "run"
    assert main(["train", str(data), "--log-to", kind, "--out", str(out)]) == 2
    said = f"Error: training.log_to: {kind} needs the package {kind}, which is not installed: "
    assert capsys.readouterr().err.strip() == f"{said}pip install 'embtables[{kind}]'"
    assert not out.exists()


# ---- MLflow ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    found = pytest.importorskip("mlflow", reason="mlflow is not installed; pip install 'embtables[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tables")
    monkeypatch.chdir(tmp_path)
    return found


def test_mlflow_has_the_run_once_although_it_was_stopped(mlflow, data, plain, tmp_path):
    config = small("training.log_to=mlflow")
    out = tmp_path / "run"
    assert Trainer(config, PreparedDataset(data), out).run_until(1) is None
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tables").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "KILLED" and run.data.params["training.log_every"] == "2"
    # Fields that may change with a resume do not end the logging, as MLflow takes a parameter once.
    changed = small("training.log_to=mlflow", "training.checkpoint_seconds=5")
    result = Trainer(changed, PreparedDataset(data), out).run()
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED" and run.info.run_name == "run" and mlflow.active_run() is None
    wanted = {"dataset": "tiny", "tables.method": "hash", "tables.budget": "40%", "training.batch_size": "400"}
    assert wanted.items() <= run.data.params.items()
    assert run.data.tags["embtables.version"] == __version__
    assert run.data.tags["embtables.data_sha256"] == sha256(data / "manifest.json")
    assert run.data.metrics["test/auc"] == result["test_auc"]
    assert run.data.metrics["bytes/inference"] == result["inference_bytes"]
    steps = [each.step for each in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == list(range(2, int(curve_of(out)[-1]["step"]) + 1, 2))
    history = client.get_metric_history(run.info.run_id, "valid/auc")
    assert [(each.step, each.value) for each in history] == [(row["step"], row["valid_auc"]) for row in curve_of(out)]
    names = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert names == {"config.yaml", "environment.json", "plan.json", "validation.csv", "metrics.json"}
    assert_same_run(plain[1], out)


def test_mlflow_takes_a_run_inside_that_of_the_caller(mlflow, data, tmp_path):
    with mlflow.start_run() as outer:
        Trainer(small("training.log_to=mlflow", "training.epochs=1"), PreparedDataset(data), tmp_path / "run").run()
        assert mlflow.active_run().info.run_id == outer.info.run_id
    (inner,) = [
        run
        for run in mlflow.MlflowClient().search_runs([outer.info.experiment_id])
        if run.info.run_id != outer.info.run_id
    ]
    assert inner.data.tags["mlflow.parentRunId"] == outer.info.run_id and inner.info.status == "FINISHED"


# ---- Weights & Biases ------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    found = pytest.importorskip("wandb", reason="wandb is not installed; pip install 'embtables[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "tables")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-folders"))
    (tmp_path / "wandb-folders").mkdir()
    return found


def records(file):
    """The records in a file that W&B writes offline, which is a log of LevelDB's behind seven bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no header is cut at the end of a block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(record)
            record = b""


def rows_of(found):
    """The rows of the history: [(step, {name: value})]."""
    for each in found:
        if each.WhichOneof("record_type") == "history":
            values = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in each.history.item}
            yield each.history.step.num, values


def test_wandb_has_the_run_once_although_it_was_stopped(wandb, data, plain, tmp_path):
    config = small("training.log_to=wandb")
    out = tmp_path / "run"
    assert Trainer(config, PreparedDataset(data), out).run_until(1) is None
    result = Trainer(config, PreparedDataset(data), out).run()
    assert_same_run(plain[1], out)
    files = sorted((tmp_path / "wandb-folders").rglob("*.wandb"))
    first, second = (list(records(file)) for file in files)
    known_as = json.loads((out / "logger-wandb.json").read_text())["run"]
    for found in (first, second):
        (run,) = [each.run for each in found if each.WhichOneof("record_type") == "run"]
        assert (run.run_id, run.project, run.display_name) == (known_as, "tables", "run")
    rows = [*rows_of(first), *rows_of(second)]
    steps = [step for step, _ in rows]
    assert steps == sorted(set(steps))
    losses = [step for step, values in rows if "train/loss" in values]
    assert losses == list(range(2, int(curve_of(out)[-1]["step"]) + 1, 2))
    assert [(step, values["valid/auc"]) for step, values in rows if "valid/auc" in values] == [
        (row["step"], row["valid_auc"]) for row in curve_of(out)
    ]
    assert rows[-1][1]["test/auc"] == result["test_auc"] and rows[-1][1]["bytes/inference"] == result["inference_bytes"]
    given = {item.key: json.loads(item.value_json) for each in second for item in each.config.update}
    given |= {item.key: json.loads(item.value_json) for each in second for item in each.run.config.update}
    wanted = {"dataset": "tiny", "tables.budget": "40%", "embtables.version": __version__}
    assert (wanted | {"embtables.data_sha256": sha256(data / "manifest.json")}).items() <= given.items()
    exits = [each.exit.exit_code for found in (first, second) for each in found if each.HasField("exit")]
    assert exits == [1, 0]
    (artifact,) = [
        each.artifact for each in second if each.WhichOneof("record_type") == "artifact" and each.artifact.type == "run"
    ]
    names = {entry.path for entry in artifact.manifest.contents}
    assert names == {"config.yaml", "environment.json", "plan.json", "validation.csv", "metrics.json"}
