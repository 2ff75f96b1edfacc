"""Probes: what tables are worth, races within a budget, and what ``auto`` makes of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from embtables import Plan
from embtables._util.lock import locked
from embtables.cli.app import run
from embtables.datasets import PreparedDataset, Synthetic, prepare_synthetic
from embtables.methods import method_label
from embtables.plan.probe import Probe
from embtables.sizes.memory import format_bytes
from embtables.sweeps import probing, racing
from embtables.sweeps.racing import Round, Runner, in_a_race, race
from embtables.training import Trainer, load_config
from embtables.training.export import load_served
from embtables.training.metrics import auc

METHODS = [{"kind": "banded", "precision": "int8"}, "hash", {"kind": "low_rank", "precision": "int4"}]
FLAGS = ["training.epochs=4", "training.batch_size=512", "tables.embedding_dim=4", "training.patience=9"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    config = Synthetic(rows=6000, cardinalities=(300, 80, 20), num_dense=2, shares=(0.6, 0.2, 0.2))
    return prepare_synthetic(tmp_path_factory.mktemp("data") / "toy", config)


@pytest.fixture(scope="module")
def probed(data: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Probe, Path, list[float]]:
    folder = tmp_path_factory.mktemp("probe")
    ticks: list[float] = []
    planned = probing.course(data, load_config(overrides=FLAGS), ["30%", "5%"], folder, METHODS)
    found = probing.probe(planned, ticks.append)
    assert sum(ticks) >= planned.epochs - 1e-9  # more where two were close
    return found, folder, ticks


def test_what_is_found(probed: tuple[Probe, Path, list[float]], data: PreparedDataset) -> None:
    found, folder, _ = probed
    assert set(found.tables) == set(data.feature_names) and found.model == "dlrm" and found.monitor == "auc"
    full_bytes = 4 * 4 * sum(data.num_embeddings.values())
    assert [race.budget_bytes for race in found.races] == [full_bytes * 3 // 10, full_bytes // 20]
    for each in found.races:
        banded, *others = METHODS
        assert sorted(str(e.method) for e in each.entrants if "banded" not in str(e.method)) == sorted(map(str, others))
        # It knows what tables are worth, as the plan of a training of it says.
        (entrant,) = (e for e in each.entrants if "banded" in str(e.method))
        assert entrant.method == {**banded, "worth": found.worth_of(list(found.tables))}
        assert method_label(entrant.method) == "banded(precision=int8,worth=…)"
    plans = [json.loads(path.read_text()) for path in folder.glob("banded*/plan.json")]
    methods = [group["method"] for plan in plans for group in plan["groups"]]
    assert len(plans) >= 2 and all(method["worth"] == found.worth_of(list(found.tables)) for method in methods)
    for each in found.races:
        epochs = [e.epochs for e in each.entrants]
        assert epochs == sorted(epochs, reverse=True) and max(epochs) == pytest.approx(4 * 8 / 54, rel=0.1)
        for e in (e for e in each.entrants if e.epochs == max(epochs)):
            kind = e.method if isinstance(e.method, str) else str(e.method["kind"])
            budget = "30pct" if each is found.races[0] else "5pct"
            ends = [leads_to(folder / path.name) for path in folder.glob(f"{kind}*-{budget}-s*")]
            assert len(ends) == e.seeds
            assert e.loss == pytest.approx(leads_to(folder / full_tables(found)) - sum(ends) / len(ends))
    again = Probe.model_validate(json.loads(json.dumps(found.model_dump(mode="json"))))
    assert again == found
    # Each training is in a folder of its own, and paused.
    assert len([path for path in folder.iterdir() if path.is_dir()]) >= 7
    assert not list(folder.glob("*/metrics.json"))


def test_a_probe_goes_on_and_finds_the_same(
    probed: tuple[Probe, Path, list[float]], data: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, folder, _ = probed
    steps = []
    counted = racing.Trainer.run_until

    def interrupted(self: Trainer, epochs: float) -> Any:
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(epochs)
        return counted(self, epochs)

    config = load_config(overrides=FLAGS)
    monkeypatch.setattr(racing.Trainer, "run_until", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probing.probe(probing.course(data, config, ["30%", "5%"], tmp_path, METHODS))
    monkeypatch.setattr(racing.Trainer, "run_until", counted)
    assert probing.probe(probing.course(data, config, ["30%", "5%"], tmp_path, METHODS)) == found
    # What is there already is not trained again.
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*/checkpoint/last.pt")}
    assert probing.probe(probing.course(data, config, ["30%", "5%"], folder, METHODS)) == found
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.glob("*/checkpoint/last.pt")}


def test_worth_is_what_is_lost_where_all_ids_have_the_mean_vector(
    probed: tuple[Probe, Path, list[float]], data: PreparedDataset
) -> None:
    found, folder, _ = probed
    (best,) = (folder / full_tables(found) / "checkpoint").glob("best-*")
    batch = next(data.batches("valid", 10_000))
    with torch.no_grad():
        whole = auc(batch.labels.numpy(), load_served(best)(batch).numpy())
        assert whole == pytest.approx(found.reference, abs=1e-6)
        for name in [name for name, how in found.how.items() if how == "ablation"]:
            model = load_served(best)
            rows = model.embeddings.store.slab(name)
            counts = data.frequencies[name].astype(float)
            mean = np.average(rows.numpy().astype(float)[: len(counts)], axis=0, weights=counts)
            rows[:] = torch.from_numpy(mean).float()
            lost = whole - auc(batch.labels.numpy(), model(batch).numpy())
            assert found.tables[name] == pytest.approx(lost, abs=2e-4), name


def leads_to(run: Path) -> float:
    """Where eight evaluations lead half as long again, by the best so far after four, six and eight of them."""
    curve = pd.read_csv(run / "validation.csv")["valid_auc"]
    four, six, eight = (curve[:n].max() for n in (4, 6, 8))
    factor = min(1, (eight - six) / (six - four)) if six > four else 0
    return float(eight + (eight - six) * (factor + factor**2))


def full_tables(found: Probe, seed: int = 0) -> str:
    """The folder of their training."""
    return f"full-s{seed}-regularization={found.regularization:g}"


def test_worth_of_the_biggest_tables_is_what_is_lost_where_a_model_is_trained_without(
    probed: tuple[Probe, Path, list[float]], data: PreparedDataset
) -> None:
    found, folder, _ = probed
    big = sorted(data.num_embeddings, key=lambda name: -data.num_embeddings[name])[:2]
    assert found.how == {name: "retraining" if name in big else "ablation" for name in data.feature_names}
    whole = pd.read_csv(folder / full_tables(found) / "validation.csv")["valid_auc"][:3].max()
    for name in big:
        (out,) = folder.glob(f"*{name}*drop_feature*-regularization={found.regularization:g}")
        lines = Plan.from_dict(json.loads((out / "plan.json").read_text())).lines()
        assert [line["table"] for line in lines if line["method"] == "drop_feature"] == [name]
        curve = pd.read_csv(out / "validation.csv")["valid_auc"]
        assert len(curve) == 3 and found.tables[name] == pytest.approx(whole - curve.max(), abs=1e-12)


def test_full_tables_choose_how_strong_regularization_is(
    probed: tuple[Probe, Path, list[float]], data: PreparedDataset, tmp_path: Path
) -> None:
    found, folder, _ = probed
    tried = {
        strength: pd.read_csv(folder / f"full-s0-regularization={strength:g}" / "validation.csv")["valid_auc"]
        for strength in probing.REGULARIZATIONS
    }
    assert found.regularization == max(tried, key=lambda strength: tried[strength][:4].max())
    assert sorted(map(len, tried.values())) == [4, 4, 8]
    assert not [path for path in folder.iterdir() if not path.name.endswith(tuple(f"={s:g}" for s in tried))]
    others = {path.name for path in folder.iterdir() if not path.name.startswith("full-s0")}
    assert {name.rpartition("=")[2] for name in others} == {f"{found.regularization:g}"}
    for fields, wanted in [
        (["tables.regularization=0.2"], [0.2]),  # what is given is not put in question
        (["tables.fused=false", "tables.optimizer=adam", "tables.l2=1e-5"], [0.0]),
        ([], list(probing.REGULARIZATIONS)),
    ]:
        planned = probing.course(data, load_config(overrides=[*FLAGS, *fields]), ["30%"], tmp_path, METHODS)
        assert [reference.config.tables.regularization for reference in planned.references] == wanted
    planned = probing.course(data, load_config(overrides=FLAGS), ["30%"], tmp_path, METHODS, [0.5, 0.0])
    assert [reference.config.tables.regularization for reference in planned.references] == [0.5, 0.0]


def test_a_probe_takes_no_more_than_a_full_training(data: PreparedDataset, tmp_path: Path) -> None:
    planned = probing.course(data, load_config(overrides=["training.epochs=24"]), ["60%"], tmp_path)
    assert planned.trainings == 3 + 2 + 6 and 0.99 * 24 < planned.epochs <= 24
    assert racing.ROUNDS[-1].keep == 1 and racing.trained(2) == 2 * 8 and racing.trained(1) == 8


class Made(Runner):
    """A runner whose scores are given, by seed."""

    def __init__(self, name: str, *curves: list[float], size: int = 1) -> None:
        super().__init__(name, "", load_config(overrides=["training.evaluations_per_epoch=1"]), None, Path())  # type: ignore[arg-type]
        self.given, self.inference_bytes, self.calls = curves, size, []

    def run(self, evaluations: int, seed: int = 0) -> float:
        before = len(self.curves.get(seed, []))
        self.calls.append((evaluations, seed))
        self.curves[seed] = [{"valid_auc": v, "epoch": i + 1} for i, v in enumerate(self.given[seed][:evaluations])]
        return evaluations - before

    def lookup_us(self) -> float:
        return 3.0 if self.spec == "hash" else 2.0


def test_who_drops_out_when() -> None:
    full = Made("full", [0.6, 0.7, 0.8, 0.9])
    full.run(4)
    early, late = Made("hash", [0.6, 0.65, 0.66, 0.66]), Made("robe", [0.55, 0.66, 0.7, 0.75])
    poor, worse = Made("low_rank", [0.52, 0.6, 0.6, 0.6]), Made("unified", [0.51, 0.9, 0.9, 0.9])
    ticks: list[float] = []
    terms = [Round(1, 3), Round(2, 2), Round(4, 1)]
    found = race([worse, late, poor, early], full, 100, ticks.append, terms)
    assert [entrant.method for entrant in found.entrants] == ["robe", "hash", "low_rank", "unified"]
    assert [entrant.epochs for entrant in found.entrants] == [4, 4, 2, 1]
    assert [entrant.loss for entrant in found.entrants] == pytest.approx([0.15, 0.24, 0.1, 0.09])
    assert found.entrants[0].error == pytest.approx(abs(0.15 - 0.04) / 2)
    assert sum(ticks) == 4 * 1 + 3 * 1 + 2 * 2 == racing.trained(4, terms)
    assert worse.calls == [(1, 0)] and early.calls == [(1, 0), (2, 0), (4, 0)]


def test_a_promise_is_where_a_curve_leads_if_its_gains_shrink_as_they_did() -> None:
    # Two evaluations gained 0.08, then 0.04: half as long again after eight are two more times two.
    curve = [0.5, 0.55, 0.58, 0.60, 0.64, 0.68, 0.70, 0.72]
    runner = Made("hash", curve)
    runner.run(8)
    assert runner.promise(8) == pytest.approx(0.72 + 0.04 * 0.5 + 0.04 * 0.25)
    assert runner.promise(4) == 0.60  # too few to tell
    assert runner.promise(7) == pytest.approx(0.70 + 0.06 * (0.06 / 0.06) + 0.06)  # gains do not grow
    rising, falling = Made("robe", [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.52]), Made("robe", [*curve[:6], 0.6, 0.6])
    for each in (rising, falling):
        each.run(8)
    assert rising.promise(8) == 0.52  # one jump is no trend
    assert falling.promise(8) == 0.68  # the best so far stays the best
    # One that is behind and rises faster wins.
    full, slow = Made("full", curve), Made("hash", [0.5, 0.60, 0.66, 0.70, 0.715, 0.725, 0.73, 0.733])
    fast = Made("unified", [0.5, 0.50, 0.52, 0.54, 0.58, 0.62, 0.68, 0.725])
    full.run(8)
    found = race([slow, fast], full, 100, lambda epochs: None, [Round(8, 1)])
    assert [entrant.method for entrant in found.entrants] == ["unified", "hash"]
    assert found.entrants[0].loss == pytest.approx(full.promise(8) - fast.promise(8))


def test_who_is_as_good_as_the_last_that_goes_on_goes_on_too() -> None:
    full = Made("full", [0.9, 0.9, 0.9])
    full.run(3)
    runners = [
        Made("hash", [0.7, 0.70, 0.70]),
        Made("robe", [0.6992, 0.75, 0.75]),
        Made("unified", [0.6988, 0.8, 0.8]),  # as far behind the second one as it may be
        Made("low_rank", [0.697, 0.85, 0.85]),
    ]
    found = race(runners, full, 100, lambda epochs: None, [Round(1, 2), Round(2, 2), Round(3, 1)])
    assert [entrant.method for entrant in found.entrants] == ["unified", "robe", "hash", "low_rank"]
    assert [entrant.epochs for entrant in found.entrants] == [3, 3, 2, 1]


@pytest.mark.parametrize(
    "first, second, sizes, winner",
    [
        ([[0.700], [0.7000]], [[0.6980], [0.6970]], (2, 1), "hash"),  # apart by more than their error
        ([[0.700], [0.6900]], [[0.6990], [0.6905]], (2, 1), "robe"),  # a tie: fewer bytes
        ([[0.700], [0.6900]], [[0.6990], [0.6905]], (1, 2), "hash"),
        ([[0.700], [0.6980]], [[0.6990], [0.6980]], (1, 1), "robe"),  # a tie, of the same bytes: faster lookups
        ([[0.700], [0.6980]], [[0.6990], [0.6980]], (99, 100), "robe"),
        ([[0.700], [0.6990]], [[0.6990], [0.7100]], (1, 9), "robe"),  # a better mean by more than a tie allows
        ([[0.700], [0.6800]], [[0.6990], [0.6780]], (2, 1), "hash"),  # and so is this one, whatever its error
        ([[0.710]], [[0.700]], (2, 1), "hash"),  # far apart: no second seed
    ],
)
def test_a_tie_goes_to_fewer_bytes(
    first: list[list[float]], second: list[list[float]], sizes: tuple[int, int], winner: str
) -> None:
    full = Made("full", [0.8])
    full.run(1)
    runners = [Made("hash", *first, size=sizes[0]), Made("robe", *second, size=sizes[1])]
    found = race(runners, full, 100, lambda epochs: None, [Round(1, 1)])
    expected = "robe" if winner == "robe" else "hash"
    assert found.entrants[0].method == expected
    assert {entrant.seeds for entrant in found.entrants} == {len(first)}


def test_what_is_trained_in_a_race(data: PreparedDataset) -> None:
    config = load_config(
        overrides=["training.batch_size=2048", "training.quantize_from=1", "training.plateau_factor=0.5"]
    )
    quick = in_a_race(config, data).training
    assert (quick.batch_size, quick.patience, quick.quantize_from, quick.plateau_factor) == (512, None, None, None)
    assert in_a_race(load_config(overrides=["training.batch_size=2"]), data).training.batch_size == 1
    # No two evaluations are of one step: of 3,600 rows there are 29 steps of 128, and 54 evaluations would be due.
    short = in_a_race(load_config(overrides=["training.batch_size=512", "training.epochs=1"]), data)
    assert short.training.evaluations_per_epoch == -(-data.num_rows("train") // 128)


@pytest.mark.parametrize("text", ["hash,auto", '{item_id: full, "*": auto}', '{"*": {kind: auto}}'])
def test_auto_takes_no_part_in_a_race(text: str) -> None:
    with pytest.raises(ValueError, match="^auto chooses by what a probe finds, and takes no part in it"):
        racing.entered(text)


def test_all_methods_may_race() -> None:
    found = racing.entered("all")
    assert found[: len(racing.FAMILIES)] == list(racing.FAMILIES)
    kinds = [spec["kind"] for spec in found if isinstance(spec, dict)]
    assert len(kinds) == len(set(kinds)) == len(found) and {"hash", "pruned", "frequency_cutoff"} < set(kinds)


def test_big_tables_whose_names_are_alike_in_files(data: PreparedDataset, tmp_path: Path) -> None:
    runners = [
        Runner({name: "drop_feature", "*": "full"}, "", load_config(), data, tmp_path) for name in ("ad-id", "ad_id")
    ]
    assert runners[0].path() != runners[1].path()


def test_two_probes_at_once_say_so(data: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embtables._util.lock._PATIENCE_SECONDS", 0.1)
    planned = probing.course(data, load_config(overrides=FLAGS), ["30%"], tmp_path, ["hash"])
    with locked(tmp_path), pytest.raises(ValueError, match="is in use by process"):
        probing.probe(planned)


def test_where_a_race_reaches_the_end_of_the_training_its_best_models_are_there(
    data: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["training.epochs=2", "training.batch_size=16000", "training.keep_checkpoint=false"]
    config = load_config(overrides=[*flags, "tables.embedding_dim=4", "tables.regularization=0.1"])
    assert in_a_race(config, data).training.evaluations_per_epoch == 1
    planned = probing.course(data, config, ["30%"], tmp_path, ["hash", "robe"])
    found = probing.probe(planned)
    assert list(tmp_path.glob("full-s0*/metrics.json")) and set(found.tables) == set(data.feature_names)
    # What is said of epochs is what was trained.
    assert found.reference_epochs == 2 and {e.epochs for race in found.races for e in race.entrants} == {2}
    # How long lookups take is measured once, so that a tie is decided the same way again.
    runner = planned.runners["30%"][0]
    runner.run(1)
    lookup = runner.lookup_us()
    monkeypatch.setattr(racing, "lookup_latency_us", lambda tables, batch: 2 * lookup)
    assert runner.lookup_us() == lookup > 0


def test_the_command(data: PreparedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = tmp_path / "toy"
    shutil.copytree(data.path, prepared)
    budget = 4 * 4 * sum(data.num_embeddings.values()) * 3 // 10
    common = [option for flag in FLAGS for option in ("--set", flag)]
    command = [
        "probe",
        str(prepared),
        "--budgets",
        "30%,0.2%",
        "--methods",
        "hash,{kind: robe, precision: int4}",
        *common,
    ]
    assert run([*command, "--dry-run"]) == 0
    told = capsys.readouterr().err
    # Full tables have 3 · 4 evaluations and 4 more, two big tables 2 · 3, the races 2 · 8 and 8.
    assert f"8 short trainings, {46 / 54 * 4:.3g} epochs in all; a full training has up to 4" in told
    assert "do not fit into 0.2%: hash" in told and not (prepared / "probe.json").exists()
    assert run([*command, "--quiet"]) == 0
    written = capsys.readouterr()
    assert re.search("^about [0-9]+ seconds here, .*: 8 trainings$", written.err, re.MULTILINE)
    told = written.out
    assert "tables.regularization: " in told and ", by ablation" in told and ", by retraining" in told
    assert "what tables are worth (auc lost without them)" in told and f"within 30%, {budget:,} bytes" in told
    found = Probe.load(prepared)
    assert found.races[0].budget_bytes == budget
    assert run(["plan", str(prepared), "--method", "auto", "--budget", "30%", "--embedding-dim", "4"]) == 0
    told = capsys.readouterr().out
    assert f"first of 2 in the probe's race within {format_bytes(budget)}" in told
    out = tmp_path / "run"
    assert (
        run(["train", str(prepared), "--method", "auto", "--budget", "30%", "--quiet", "--out", str(out), *common]) == 0
    )
    told = capsys.readouterr().err
    assert "auto: " in told and "  expected: " in told
    assert f"Note: the probe was made with tables.regularization={found.regularization:g}, and this training" in told
    groups = json.loads((out / "plan.json").read_text())["groups"]
    first = found.races[0].entrants[0].method
    assert groups[0]["method"]["kind"] == (first if isinstance(first, str) else first["kind"])
    capsys.readouterr()
    other = ["train", str(prepared), "--method", "auto", "--budget", "30%", "--model", "mlp", "--out", str(out) + "2"]
    assert run([*other, *common]) == 2
    assert "was made with model dlrm, not mlp" in capsys.readouterr().err
    (prepared / "probe.json").write_text("{}")
    assert run(["plan", str(prepared), "--method", "auto", "--budget", "30%"]) == 2
    assert "is no probe, or a damaged one: data: Field required" in capsys.readouterr().err
