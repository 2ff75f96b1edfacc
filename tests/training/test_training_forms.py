"""One training that is served in several forms: each is what a training of its own would have left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from core_cases import random_ids
from training_cases import config_of

from embtables import EmbeddingTables, TableConfig, plan
from embtables._util.files import unsealed
from embtables.cli.app import run as main
from embtables.datasets import Synthetic, prepare_synthetic
from embtables.optimizers import averaged, optimizer_from_config
from embtables.training import Trainer, loop, outcome

OF_THE_TRAINING = {"examples_per_second", "train_seconds", "compile_seconds", "peak_rss_bytes", "lookup_latency_us"}
PRECISIONS = ("int4", "binary")
SHORT = (
    "training.epochs=6",
    "training.evaluations_per_epoch=2",
    "training.patience=2",
    "training.checkpoint_seconds=0",
)
KINDS = {
    "plain": ("tables.learning_rate=0.1", *SHORT),
    "averaged": ("tables.learning_rate=0.1", "training.average=0.4", "model.name=mlp", *SHORT),
    "unfused": ("tables.fused=false", "tables.learning_rate=0.05", "model.hyperparameters.dropout=0.3", *SHORT),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config = Synthetic(rows=3000, cardinalities=(60, 40), num_dense=2, shares=(0.6, 0.2, 0.2))
    return prepare_synthetic(tmp_path_factory.mktemp("data") / "toy", config)


def left(out: Path) -> dict[str, object]:
    """What a run leaves, but for what only the training took."""
    metrics = unsealed(json.loads((out / "metrics.json").read_text()))
    names = ["test_scores.npy", "plan.json", "config.yaml", "validation.csv", "validation.svg"]
    names += ["served/tables.safetensors", "served/model.safetensors", "served/model.json"]
    files: dict[str, object] = {name: (out / name).read_bytes() for name in names}
    return files | {name: v for name, v in metrics.items() if name not in {*OF_THE_TRAINING, "trained_with"}}


def alone(kind, data, out):
    """The same runs one by one; how many steps each took."""
    steps = set()
    for precision in ("fp32", *PRECISIONS):
        config = config_of(*KINDS[kind], f"tables.precision={precision}")
        steps.add(Trainer(config, data, out / precision).run()["steps"])
    return steps


def together(kind, data, out):
    also = {out / p: config_of(*KINDS[kind], f"tables.precision={p}") for p in PRECISIONS}
    return Trainer(config_of(*KINDS[kind]), data, out / "fp32", also=also).run()


def assert_alike(one: Path, other: Path) -> None:
    for precision in ("fp32", *PRECISIONS):
        assert left(one / precision) == left(other / precision), precision


@pytest.mark.parametrize("kind", KINDS)
def test_each_form_is_what_a_training_of_its_own_leaves(kind, data, tmp_path):
    steps = alone(kind, data, tmp_path / "alone")
    assert kind != "plain" or len(steps) > 1  # patience ends one form sooner than another
    result = together(kind, data, tmp_path / "together")
    assert_alike(tmp_path / "alone", tmp_path / "together")
    assert "trained_with" not in result
    metrics = json.loads((tmp_path / "together" / "int4" / "metrics.json").read_text())
    assert metrics["trained_with"] == "fp32" and metrics["train_seconds"] == result["train_seconds"]
    # Whichever of them trains.
    also = {tmp_path / "fp32": config_of(*KINDS[kind])}
    Trainer(config_of(*KINDS[kind], "tables.precision=int4"), data, tmp_path / "int4", also=also).run()
    assert left(tmp_path / "fp32") == left(tmp_path / "alone" / "fp32")


def test_one_that_is_stopped_goes_on_with_the_same(data, tmp_path, monkeypatch):
    """After each of some steps, and at the end between the numbers of one form and those of the next."""
    step, finish, left_over = loop.Run._step, outcome.Outcome.finish, iter([0, 3, 1, 7, 100])
    alone("plain", data, tmp_path / "alone")
    calls = [next(left_over)]

    def interrupted(self, batch, watch):
        if calls[0] == 0:
            raise KeyboardInterrupt
        calls[0] -= 1
        return step(self, batch, watch)

    def stopped(self, *arguments):
        if self.out.name in halts:
            halts.remove(self.out.name)
            raise KeyboardInterrupt
        return finish(self, *arguments)

    halts = ["int4", "binary", "fp32"]
    monkeypatch.setattr(loop.Run, "_step", interrupted)
    monkeypatch.setattr(outcome.Outcome, "finish", stopped)
    stops = 0
    out = tmp_path / "together"
    while not (out / "fp32" / "metrics.json").exists():
        try:
            together("plain", data, out)
        except KeyboardInterrupt:
            stops += 1
            calls[0] = next(left_over, 100)
    assert stops == 7
    assert_alike(tmp_path / "alone", out)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["tables.precision=int4", "training.batch_size=100"], "int4 would be another training: what is served beside"),
        (["tables.precision=int4", "tables.regularization=0.1"], "int4 would be another training"),
        (["tables.precision=int4", "tables.method=hash", "tables.budget=10%"], "int4 would be another training"),
    ],
)
def test_another_training_is_refused(changed, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        Trainer(config_of(), data, tmp_path / "fp32", also={tmp_path / "int4": config_of(*changed)}).run()
    assert list(tmp_path.iterdir()) == []


def test_two_budgets_may_make_the_same_tables(data, tmp_path):
    """As those of a sweep do at which the same tables are dropped."""
    one, other = (config_of("tables.method=drop_feature", f"tables.budget={b}", *SHORT) for b in ("30%", "20%"))
    Trainer(one, data, tmp_path / "one", also={tmp_path / "other": other}).run()
    for name in ("test_scores.npy", "validation.csv", "served/model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert json.loads((tmp_path / "other" / "metrics.json").read_text())["trained_with"] == "one"


@pytest.mark.parametrize("option", ["training.quantize_from=1", "training.plateau_factor=0.5"])
def test_a_training_that_depends_on_its_form_has_one(option, data, tmp_path):
    also = {tmp_path / "int4": config_of("tables.precision=int4", option)}
    with pytest.raises(ValueError, match="lets the training depend on how the tables are served"):
        Trainer(config_of(option), data, tmp_path / "fp32", also=also).run()


def test_what_comes_too_late_is_refused(data, tmp_path):
    config = config_of("training.epochs=1")
    first = Trainer(config, data, tmp_path / "fp32").run()
    also = {tmp_path / "int4": config_of("training.epochs=1", "tables.precision=int4")}
    with pytest.raises(ValueError, match="fp32 is finished, and .*int4 is not, so that this takes a training of its"):
        Trainer(config, data, tmp_path / "fp32", also=also).run()
    Trainer(also[tmp_path / "int4"], data, tmp_path / "int4").run()
    assert Trainer(config, data, tmp_path / "fp32", also=also).run() == first


def test_what_no_tables_fit_says_so_each_time(data, tmp_path):
    infeasible = config_of("tables.method=hash", "tables.budget=1")
    also = {tmp_path / "int4": config_of("tables.method=hash", "tables.budget=1", "tables.precision=int4")}
    first, second = (Trainer(infeasible, data, tmp_path / "fp32", also=also).run() for _ in range(2))
    assert first == second and first["status"] == "infeasible" and "floor is" in first["message"]


def test_a_method_that_trains_the_same_for_every_budget_is_served_at_each(data, tmp_path):
    forms = {"half": ("50%", "fp32"), "eighth": ("12.5%", "int8")}
    same = ("tables.method=matryoshka", "tables.embedding_dim=8", "tables.learning_rate=0.1")
    configs = {n: config_of(*same, f"tables.budget={b}", f"tables.precision={p}") for n, (b, p) in forms.items()}
    also = {tmp_path / "together" / name: config for name, config in configs.items()}
    Trainer(config_of(*same, "tables.budget=100%"), data, tmp_path / "together" / "all", also=also).run()
    for name, config in configs.items():
        assert "trained_with" not in Trainer(config, data, tmp_path / "alone" / name).run()
        assert left(tmp_path / "together" / name) == left(tmp_path / "alone" / name), name
        metrics = json.loads((tmp_path / "together" / name / "metrics.json").read_text())
        assert metrics["trained_with"] == "all" and metrics["ratio"] <= float(forms[name][0][:-1]) / 100


def test_folders_of_one_name_are_refused(data, tmp_path):
    also = {tmp_path / "a" / "run": config_of("tables.precision=int4")}
    with pytest.raises(ValueError, match="the folders of one training need names of their own, not run, run"):
        Trainer(config_of(), data, tmp_path / "run", also=also).run()


def test_a_folder_within_another_is_refused(data, tmp_path):
    """A run replaces parts of its own folder, and with them what another run has there."""
    one, int4 = config_of(), config_of("tables.precision=int4")
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    for out, also, told in (
        ("link/a", {"real/a/served": int4}, "real/a/served is in .*link/a, the folder of another"),
        ("real/../b", {"link/../b/x": int4}, "is in .*b, the folder of another"),
        ("link/a", {"real/a": int4}, "real/a is in .*link/a, the folder of another"),
        ("a", {"a/served": int4}, "a/served is in .*a, the folder of another run of the same training"),
        ("b/run", {"b": int4}, "b/run is in .*b, the folder of another"),
        ("c", {"d": int4, "d/checkpoint": int4}, "d/checkpoint is in .*d, the folder of another"),
    ):
        with pytest.raises(ValueError, match=told):
            Trainer(one, data, tmp_path / out, also={tmp_path / k: v for k, v in also.items()}).run()
    assert sorted(tmp_path.rglob("*")) == [link, real]


def test_the_command(data, tmp_path, capsys):
    command = ["train", str(data.path), "--out", str(tmp_path / "fp32"), "--epochs", "1", "--quiet"]
    assert main([*command, "--also", f"{tmp_path / 'int8'}: {{precision: int8}}"]) == 0
    fp32, int8 = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("fp32", "int8"))
    assert int8["inference_bytes"] < fp32["inference_bytes"] / 2
    for texts, message in (
        (["int8"], "--also 'int8' is not of the form FOLDER: {FIELD: VALUE}, such as 'runs/int8: {precision: int8}'"),
        (["a: {precison: int8}"], "tables.precison is not a"),
        (["a: {precision: int8}", "a: {precision: int4}"], "--also 'a' is given twice"),
    ):
        assert main([*command[:3], str(tmp_path / "other"), *(f"--also={text}" for text in texts)]) != 0
        assert message in capsys.readouterr().err


# ---- the tables ------------------------------------------------------------------------------------------------------

TABLES = [TableConfig("item", 300, 8), TableConfig("user", 200, 16)]


def test_tables_are_served_by_another_plan_of_the_same_training():
    optimizer = averaged(optimizer_from_config("adam"), 3)
    plans = {p: plan(TABLES, "full", optimizer=optimizer, precision=p) for p in ("fp32", "int4", "binary/64")}
    for own in plans.values():
        tables = EmbeddingTables(own, std=0.5)
        twins = {name: EmbeddingTables(other, std=0.5) for name, other in plans.items()}
        ids = random_ids(tables, 50)
        for each in (tables, *twins.values()):
            for seed in range(2):
                each(random_ids(each, 50, seed)).square().sum().backward()
        for name, other in plans.items():
            with torch.no_grad():
                assert torch.equal(tables.serve(other)(ids), twins[name].serve()(ids))
                assert torch.equal(tables.averaged(other)(ids), twins[name].averaged()(ids))
            assert tables.serve(other).memory().inference_bytes == other.inference_bytes
            assert (tables.serve(other) is tables) == (own is other is plans["fp32"])


def test_plans_that_train_otherwise_are_refused():
    tables = EmbeddingTables(plan(TABLES, "hash", "10%"))
    for other in (
        plan(TABLES, "hash", "10%", precision="int8"),  # more rows
        plan(TABLES, "hash", "10%", hash_seed=1),
        plan(TABLES, "hash", tables.plan.inference_bytes, optimizer="sgd", precision="int8"),
        plan(TABLES[:1], "hash", "10%"),
    ):
        with pytest.raises(ValueError, match="the tables of that plan train otherwise"):
            tables.serve(other)
    served = EmbeddingTables(plan(TABLES, "full", precision="int8")).finalize()
    assert served.serve(plan(TABLES, "full", precision="int8")) is served
    with pytest.raises(ValueError, match="served tables stay in the form that they have"):
        served.serve(plan(TABLES, "full"))
