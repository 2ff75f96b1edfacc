"""A run that is killed, at whatever moment and however often, ends as if it had not been."""

from __future__ import annotations

import json
import os
import random
import signal
import sys

import numpy as np
import pytest
import torch

from embtables._util.files import unsealed
from embtables._util.lock import locked
from embtables.datasets import Synthetic, prepare_synthetic
from embtables.datasets.interaction_log import LogOptions
from embtables.datasets.readers.interactions import Interactions, prepare_interactions
from embtables.methods import kinds
from embtables.training import Trainer, load_config, loop

# Python calls of a life: starting takes about 150,000 (most of them read YAML), a step with its checkpoint 35,000.
CALLS = 350_000

TIMES = {"examples_per_second", "train_seconds", "compile_seconds", "peak_rss_bytes", "lookup_latency_us"}


def read_whole(data):
    """So that the forked processes below need none of the threads that a fork loses."""
    for split in ("train", "valid", "test"):
        next(data.batches(split, 10))
    assert data.frequencies
    return data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config = Synthetic(rows=2400, cardinalities=(60, 40), num_dense=2, shares=(0.6, 0.2, 0.2))
    return read_whole(prepare_synthetic(tmp_path_factory.mktemp("data") / "toy", config))


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """With groups and histories, of which the latest three items are read."""
    folder = tmp_path_factory.mktemp("log")
    generator = random.Random(0)
    clicks = [f"{generator.randrange(50)},{generator.randrange(40)},{60 * time}" for time in range(1200)]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *clicks]))
    prepared = prepare_interactions(folder / "log.csv", folder / "data", Interactions(log=LogOptions(history=6)))
    return read_whole(prepared.select((), 3))


def config_of(*overrides):
    return load_config(
        overrides=[
            "training.batch_size=400",
            "training.epochs=3",
            "training.evaluations_per_epoch=2",
            "training.patience=3",
            "training.checkpoint_seconds=0",
            "training.log_every=2",
            "tables.embedding_dim=4",
            "model.hyperparameters.dropout=0.3",
            *overrides,
        ]
    )


def contents(out):
    """Everything that a run leaves and that must not depend on interruptions."""
    metrics = {k: v for k, v in unsealed(json.loads((out / "metrics.json").read_text())).items() if k not in TIMES}
    state = torch.load(out / "checkpoint" / "last.pt", weights_only=True)
    for name in ("train_seconds", "compile_seconds", "examples", "peak_rss_bytes"):
        del state["state"]["progress"][name]
    names = ["test_scores.npy", "plan.json", "config.yaml", "validation.csv", "validation.svg"]
    names += ["served/tables.safetensors", "served/model.safetensors"]
    return metrics, state, {name: (out / name).read_bytes() for name in [*names, "served/model.json"]}


def assert_same(one, other, where="state"):
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), where
    else:
        assert one == other, where


def run_and_die(config, data, out, calls):
    """Train in a process that kills itself at its ``calls``-th Python call; the exit code, negative when killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            left = calls

            def count(frame, event, argument):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.setprofile(count)
            Trainer(config, data, out).run()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


VARIANTS = {
    "fused adam": ["tables.optimizer=adam", "tables.learning_rate=0.01"],
    "fused rowwise, hash, in 16 bits": [
        *("tables.optimizer=rowwise_adagrad", "tables.method=hash", "tables.budget=30%"),
        "tables.training_precision=bf16",
    ],
    "torch adagrad": ["tables.fused=false", "tables.optimizer=adagrad", "model.name=mlp"],
    "sparse adam": ["tables.fused=false", "tables.optimizer=adam", "tables.sparse_gradients=true"],
}
if "pruned" in kinds():
    VARIANTS["pruned"] = ["tables.method=pruned", "tables.budget=30%", "tables.optimizer=adagrad"]


EVERYTHING = [
    *("model.name=din", "model.hyperparameters.batch_norm=true", "data.max_history=3"),
    *("tables.regularization=0.1", "tables.method=hash", "tables.budget=60%", "tables.learning_rate=0.05"),
    *("training.monitor=gauc_weighted", "training.plateau_factor=0.3", "training.clip_norm=0.1"),
    *("training.autocast=bf16", "training.evaluations_per_epoch=1.5"),
    *("training.average=0.5", "tables.precision=int4", "training.quantize_from=1.2"),
    "tables.training_precision=bf16",
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("variant", [*VARIANTS, "everything"])
def test_killed_at_any_moment(variant, data, log, tmp_path):
    config = config_of(*VARIANTS.get(variant, EVERYTHING))
    data = log if variant == "everything" else data
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert Trainer(config, data, whole).run()["status"] == "ok"
    generator = random.Random(variant)
    most = int(1.8 * CALLS) if variant == "everything" else CALLS  # its epochs are longer
    deaths = 0
    while (code := run_and_die(config, data, killed, generator.randint(1, most))) != 0:
        assert code == -signal.SIGKILL
        deaths += 1
        assert not (killed / "metrics.json").exists() or json.loads((killed / "metrics.json").read_text())
        assert deaths < 200
    assert deaths >= 3
    for one, other in zip(contents(whole), contents(killed)):
        assert_same(one, other)
    assert not list(killed.rglob("*.tmp"))


def test_resume_reads_the_checkpoint(data, tmp_path, monkeypatch):
    """The test above is worth something only if an interrupted run does go on where it was."""
    config = config_of()
    steps = []
    step = loop.Run._step

    def counted(self, batch, watch):
        if len(steps) == 5:
            raise KeyboardInterrupt
        steps.append(self.progress.step)
        return step(self, batch, watch)

    monkeypatch.setattr(loop.Run, "_step", counted)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, data, tmp_path / "run").run()
    assert steps == list(range(5))
    steps[:] = [-1]
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, data, tmp_path / "run").run()
    assert steps == [-1, *range(5, 9)]


@pytest.mark.parametrize("variant", ["fused adam", "everything"])
def test_a_run_that_pauses_ends_as_one_that_does_not(variant, data, log, tmp_path):
    config = config_of(*VARIANTS.get(variant, EVERYTHING))
    data = log if variant == "everything" else data
    whole, paused = tmp_path / "whole", tmp_path / "paused"
    Trainer(config, data, whole).run()
    steps = {}
    for until in (0.1, 1, 1, 2.2):  # twice the same: the second time nothing is done
        assert Trainer(config, data, paused).run_until(until) is None
        assert not (paused / "metrics.json").exists()
        steps[until] = int((paused / "validation.csv").read_text().splitlines()[-1].split(",")[0])
    first, epoch = steps[0.1], steps[1]
    assert 0 < first < epoch < steps[2.2]
    finished = Trainer(config, data, paused).run_until(99)
    assert finished is not None and finished == Trainer(config, data, paused).run()
    for one, other in zip(contents(whole), contents(paused)):
        assert_same(one, other)


def test_a_pause_that_was_missed_is_made_up_for(data, tmp_path, monkeypatch):
    """A run that is killed between a pause and the evaluation before it is evaluated when it goes on."""
    config = config_of()  # four steps per epoch, an evaluation after every other one
    out = tmp_path / "run"
    assert Trainer(config, data, out).run_until(0.4) is None
    step = loop.Run._step

    def stopped(self, batch, watch):
        if self.progress.step == 3:
            raise KeyboardInterrupt
        return step(self, batch, watch)

    monkeypatch.setattr(loop.Run, "_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, data, out).run_until(0.7)
    monkeypatch.undo()
    assert len((out / "validation.csv").read_text().splitlines()) == 2
    assert Trainer(config, data, out).run_until(0.7) is None
    assert len((out / "validation.csv").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="^epochs must be a number above 0, not nan"):
        Trainer(config, data, out).run_until(float("nan"))


def test_a_finished_run_is_not_run_again(data, tmp_path, monkeypatch):
    config = config_of("training.epochs=1")
    first = Trainer(config, data, tmp_path / "run").run()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert Trainer(config, data, tmp_path / "run").run() == first
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_two_processes_do_not_train_into_one_folder(data, tmp_path):
    config, run = config_of("training.epochs=1"), tmp_path / "run"
    run.mkdir()
    with locked(run), pytest.raises(ValueError, match=rf"run is in use by process {os.getpid()}: wait for it"):
        Trainer(config, data, run).run()
    assert [path.name for path in run.iterdir()] == []
    assert Trainer(config, data, run).run()["status"] == "ok"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_damaged_metrics_are_named(data, tmp_path, content):
    config = config_of("training.epochs=1")
    Trainer(config, data, tmp_path / "run").run()
    (tmp_path / "run" / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.json is damaged: delete it to go on from the checkpoint"):
        Trainer(config, data, tmp_path / "run").run()


def test_checkpoint_may_be_dropped_at_the_end(data, tmp_path):
    Trainer(config_of("training.epochs=1", "training.keep_checkpoint=false"), data, tmp_path / "run").run()
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert (tmp_path / "run" / "served" / "model.json").exists()


def interrupted(config, data, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_finish", lambda self, events: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Trainer(config, data, out).run()


def test_another_run_is_refused(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    interrupted(config_of("tables.method=hash", "tables.budget=50%"), data, out, monkeypatch)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for overrides, message in [
        (["tables.method=hash", "tables.budget=40%"], r"tables\.budget was '50%' and is now '40%'; give another --out"),
        (["tables.method=hash", "tables.budget=50%", "training.seed=1"], r"training\.seed was 0 and is now 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Trainer(config_of(*overrides), data, out).run()
    other = prepare_synthetic(tmp_path / "other", Synthetic(rows=900, cardinalities=(60, 40), num_dense=2, seed=3))
    with pytest.raises(ValueError, match="belongs to another run: data was"):
        Trainer(config_of("tables.method=hash", "tables.budget=50%"), other, out).run()
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_plan_is_refused(data, tmp_path, monkeypatch):
    """Brought in from elsewhere, under the configuration of this run."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    interrupted(config_of("tables.method=hash", "tables.budget=50%"), data, ours, monkeypatch)
    interrupted(config_of("tables.method=hash", "tables.budget=30%"), data, theirs, monkeypatch)
    os.replace(theirs / "checkpoint" / "last.pt", ours / "checkpoint" / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt belongs to another run: tables\.budget was '30%' and is now '50%'"):
        Trainer(config_of("tables.method=hash", "tables.budget=50%"), data, ours).run()


def test_a_damaged_checkpoint_is_named(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    interrupted(config_of("training.epochs=1"), data, out, monkeypatch)
    path = out / "checkpoint" / "last.pt"
    whole = path.read_bytes()
    (out / "environment.json").write_text("{}")  # of another machine
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"last\.pt is damaged .*: delete it to start again"):
            Trainer(config_of("training.epochs=1"), data, out).run()
        assert (out / "environment.json").read_text() == "{}"


def test_other_folders_are_refused(data, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(ValueError, match="is not a run"):
        Trainer(config_of(), data, tmp_path / "photos").run()
    with pytest.raises(ValueError, match="is a file"):
        Trainer(config_of(), data, tmp_path / "photos" / "cat.jpg").run()
