"""From a raw log to a recommendation by one command."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pandas as pd
import polars as pl
import pytest
import torch

from embtables.cli.app import run
from embtables.datasets import PreparedDataset
from embtables.plan.probe import Entrant, Probe, Race
from embtables.sweeps import recommending
from embtables.sweeps.summary import summarize
from embtables.training import Predictor, load_config
from embtables.training.export import load_served
from embtables.training.metrics import auc

COMMON = [
    "--set",
    "training.epochs=1",
    "--set",
    "training.batch_size=256",
    "--set",
    "tables.embedding_dim=4",
    "--set",
    "tables.learning_rate=0.05",
    "--regularizations",
    "0.03,0.1,1000",
    "--quiet",
]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every other item is liked, and every third user likes more than others do."""
    generator = random.Random(0)
    rows = ["user_id,item_id,timestamp,label"]
    for time in range(5000):
        user, item = generator.randrange(200), int(generator.paretovariate(0.7)) % 150
        liked = generator.random() < (0.6 if item % 2 else 0.2) + 0.2 * (user % 3 == 0)
        rows.append(f"u{user},i{item},{60 * time},{int(liked)}")
    path = tmp_path_factory.mktemp("log") / "clicks.csv"
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module")
def recommended(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recommended") / "out"
    assert run(["recommend", str(log), "--budget", "20%", "--out", str(out), *COMMON]) == 0
    return out


def test_what_is_recommended_is_the_best_on_validation_and_is_served(recommended: Path) -> None:
    rows = pd.read_csv(recommended / "sweep" / "results.csv", dtype={"budget": str})
    full_bytes = int(rows["full_bytes"].iloc[0])
    fitting = rows[(rows["status"] == "ok") & (rows["inference_bytes"] <= full_bytes // 5)]
    best = fitting.sort_values("valid_auc").iloc[-1]
    data = PreparedDataset(recommended / "data")
    batch = next(data.batches("test", 10_000))
    served = load_served(recommended / "served" / "20pct")
    with torch.no_grad():
        assert auc(batch.labels.numpy(), served(batch).numpy()) == pytest.approx(best["test_auc"], abs=1e-6)
    bundled = Predictor.load(recommended / "bundles" / "20pct")
    raw = pl.DataFrame({"user_id": ["u1", "nobody"], "item_id": ["i3", "i4"], "history": [["i1"], []]})
    scores = bundled.predict(raw)
    assert len(set(scores.tolist())) == 2 and 0 < scores.min() <= scores.max() < 1
    found = Probe.load(recommended / "probe.json")
    labels = {row for row in rows["method"]}
    assert {"full", "full(precision=int8)", "frequency_cutoff(precision=int4)"} < labels and len(labels) == 5
    assert len(found.races[0].entrants) == 6
    # Each method has the better one of two strengths of regularization, that of the probe and the next stronger one.
    tuning = pd.read_csv(recommended / "sweep" / "tuning.csv")
    tried = [0.03, 0.1] if found.regularization == 0.03 else [0.1, 1000]
    assert set(tuning["tuned"]) == {f"tables.regularization={strength:g}" for strength in tried}
    assert recommending.strengths_after(found, [0.1, 0.03, 1000], thorough=False) == tried
    assert recommending.strengths_after(found, [0.1, 0.03, 1000], thorough=True) == [0.03, 0.1, 1000]
    assert (tuning.groupby("method")["chosen"].sum() == 1).all()


def test_the_same_command_says_the_same_and_trains_nothing(
    recommended: Path, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in recommended.rglob("metrics.json")}
    assert run(["recommend", str(log), "--budget", "20%", "--out", str(recommended), *COMMON]) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in recommended.rglob("metrics.json")}
    told = capsys.readouterr().out
    assert "Within 20% take " in told and "Next on validation (AUC 0." in told and "--seeds 3 does" in told
    assert f"Served tables and model: {recommended / 'served' / '20pct'}" in told
    # Another question in the same folder is refused before anything is trained.
    before = (recommended / "probe.json").read_bytes()
    for options in (["--budget", "10%"], ["--budget", "20%", "--seeds", "2"]):
        assert run(["recommend", str(log), *options, "--out", str(recommended), *COMMON]) == 2
        assert "was made with other " in capsys.readouterr().err
    assert (recommended / "probe.json").read_bytes() == before
    # What is served is what is recommended, whatever lay there.
    table = recommended / "served" / "20pct" / "tables.safetensors"
    vocabularies = recommended / "bundles" / "20pct" / "vocabularies.safetensors"
    served, known = table.read_bytes(), vocabularies.read_bytes()
    for file in (table, vocabularies):
        file.write_bytes(b"another")
    assert run(["recommend", str(log), "--budget", "20%", "--out", str(recommended), *COMMON]) == 0
    assert table.read_bytes() == served and vocabularies.read_bytes() == known


def test_costs_are_said_before(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["recommend", str(log), "--budget", "20%,5%", "--out", str(tmp_path / "out"), *COMMON]
    assert run([*command, "--dry-run"]) == 0
    told = capsys.readouterr().err
    assert "17 short trainings, 1.59 epochs in all; a full training has up to 1" in told
    assert "then 14 trainings, up to 14 epochs in all" in told
    assert not (tmp_path / "out" / "sweep").exists() and not (tmp_path / "out" / "probe").exists()
    assert run(["recommend", str(tmp_path / "none.csv"), "--budget", "1%", "--out", str(tmp_path / "x")]) == 2
    assert "none.csv" in capsys.readouterr().err


def test_a_baseline_that_is_better_is_recommended(recommended: Path) -> None:
    summary = summarize(recommended / "sweep", resamples=20)
    full_bytes = summary.full.inference_bytes or 0 if summary.full else 0
    for point in summary.points:
        point.rows = point.rows.assign(valid_auc=0.9 if point.method.startswith("frequency_cutoff") else 0.6)
    taken = recommending.recommendation(summary, "20%", full_bytes // 5)
    assert taken.point.method == "frequency_cutoff(precision=int4)" and taken.runner_up is not None
    assert not any("says anything" in line for line in taken.words())
    useless = taken.full.rows.assign(test_normalized_entropy=1.01)
    words = dataclasses.replace(taken, full=dataclasses.replace(taken.full, rows=useless)).words()
    assert any("no better than the click rate" in line for line in words)
    # Full tables in int4 fit into more.
    for point in summary.points:
        point.rows = point.rows.assign(valid_auc=0.9 if point.method == "full(precision=int4)" else 0.6)
    assert recommending.recommendation(summary, "90%", full_bytes * 9 // 10).point.method == "full(precision=int4)"
    with pytest.raises(ValueError, match="^nothing that fits into 1B has been trained"):
        recommending.recommendation(summary, "1B", 1)


def test_thorough_trains_runners_up_and_baselines(recommended: Path) -> None:
    entrants = tuple(
        Entrant(method=m, loss=0, error=0, valid=0.6, epochs=1) for m in ("hash", "unified", "robe", "low_rank")
    )
    found = Probe.load(recommended / "probe.json").model_copy(
        update={"races": (Race(budget_bytes=100, entrants=entrants),)}
    )
    config, data = load_config(), recommended / "data"
    one = recommending.sweep_for(data, found, config, ["1%"], 1, [0.03], thorough=False)
    assert list(one.methods)[:2] == ["full", "hash"] and "unified" not in one.methods
    assert not one.tune and one.train.tables.regularization == 0.03
    thorough = recommending.sweep_for(data, found, config, ["1%"], 3, [0.03, 0.1], thorough=True)
    assert thorough.tune == {"tables.regularization": [0.03, 0.1]}
    assert {"hash", "unified", "drop_feature", "fewer_dimensions", "frequency_cutoff"} < set(thorough.methods)
    assert "robe" not in thorough.methods and thorough.seeds == 3


def test_quick_trains_on_a_million_examples_at_most(recommended: Path) -> None:
    data = PreparedDataset(recommended / "data")
    rows = data.num_rows("train")
    assert recommending.quickly(load_config(), data).training.epochs == load_config().training.epochs
    long = load_config(overrides=["training.epochs=5000"])
    assert recommending.quickly(long, data).training.epochs * rows == pytest.approx(1e6, rel=1e-3)


def test_how_many_trainings_follow_a_probe_at_most(recommended: Path) -> None:
    found, data = Probe.load(recommended / "probe.json"), recommended / "data"
    specs = ["hash", "unified", "robe", "compositional"]
    for thorough, seeds, strengths in [(False, 1, [0.03]), (False, 2, [0.03, 0.1]), (True, 3, [0.03, 0.1, 0.3])]:
        races = tuple(
            Race(
                budget_bytes=size,
                entrants=tuple(Entrant(method=m, loss=0, error=0, valid=0.6, epochs=1) for m in methods),
            )
            for size, methods in [(100, specs[:2]), (10, specs[2:])]
        )
        probe = found.model_copy(update={"races": races})
        sweep = recommending.sweep_for(data, probe, load_config(), ["9%", "1%"], seeds, strengths, thorough=thorough)
        # Full tables of all precisions are one training.
        places = {(method, budget) for _, method, budget in sweep.points if not method.startswith("full")} | {"full"}
        assert recommending.most_trainings(2, seeds, len(strengths), thorough=thorough) == len(places) * (
            len(strengths) + seeds - 1
        )


def test_what_each_training_has_of_its_own_is_refused_before_the_probe(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["recommend", str(log), "--budget", "20%", "--out", str(tmp_path / "out"), "--dry-run"]
    assert run([*command, "--set", "tables.method=hash"]) == 2
    assert "tables.method" in capsys.readouterr().err
    assert run([*command, "--preset", "bars"]) == 0  # whose seed is of no account
    no_time = tmp_path / "no_time.csv"
    no_time.write_text("user_id,item_id,label\nu,i,1\n")
    assert run(["recommend", str(no_time), "--budget", "20%", "--out", str(tmp_path / "other")]) == 2
    assert "options are those of `embtables prepare interactions`" in capsys.readouterr().err


def test_quick_and_thorough_exclude_each_other(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["recommend", str(log), "--budget", "1%", "--out", str(tmp_path / "out")]
    assert run([*command, "--quick", "--thorough"]) == 2
    assert "--quick and --thorough exclude each other" in capsys.readouterr().err
    assert run([*command, "--regularizations", "0.1,-1"]) == 2
    assert "--regularizations are numbers from 0 on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "sweep").exists()
