"""Whatever happens to a file: one sentence that names it, or it means what it meant.

``make fuzz`` draws many more inputs than the tests do: INPUTS of each file.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import fuzzing
import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console

from embtables import EmbeddingTables, Plan, TableConfig, plan
from embtables.cli.app import run as main
from embtables.cli.app import sentence
from embtables.datasets import PreparedDataset
from embtables.models import build_model
from embtables.sweeps.config import describe
from embtables.sweeps.planning import cell_config
from embtables.sweeps.summary import summarize
from embtables.sweeps.sweep import run_sweep
from embtables.training import Predictor, Trainer, load_config, load_served, save_bundle
from embtables.training.loop import Run
from embtables.training.planning import plan_tables

INPUTS = int(os.environ.get("EMBTABLES_FUZZ_INPUTS", "12"))
SECONDS = 20
"""More than any of these files takes on a busy machine."""

Meaning = Any
Reader = Callable[[Path], Meaning]


def tables_file(folder: Path, method: Any, budget: str | None, counts: bool = False) -> Path:
    tables = [TableConfig("a", 60, 8), TableConfig("b", 30, 4, ["b", "c"]), TableConfig("d", 90, 8)]
    ids = {table.name: np.arange(table.num_embeddings or 0)[::-1] % 7 for table in tables}
    built = EmbeddingTables(plan(tables, method, budget, ids if counts else None, optimizer=None), seed=1)
    path = folder / "t.safetensors"
    built.save(path)
    return path


def read_tables(path: Path) -> Meaning:
    """What every id of the tables gives, and the tables themselves."""
    tables = EmbeddingTables.load(path, verify=True)
    listed = [table.name for table in tables.plan.tables if table.num_embeddings is not None]
    dense = {name: tables.to_dense(name).numpy().tobytes() for name in listed}
    return [table.to_dict() for table in tables.plan.tables], dense


def read_data(path: Path) -> Meaning:
    data = PreparedDataset(path.parent)
    data.verify()
    frequencies = {name: counts.tobytes() for name, counts in data.frequencies.items()}
    batches = [batch for split in ("train", "valid", "test") for batch in data.batches(split, 500)]
    read = [
        (batch.ids.numpy().tobytes(), batch.labels.numpy().tobytes(), batch.dense.numpy().tobytes())
        for batch in batches
    ]
    return data.name, data.feature_names, data.dense_features, data.histories, frequencies, read


def read_served(path: Path) -> Meaning:
    model = load_served(path.parent)
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items() if "extra_state" not in name}


def read_bundle(folder: Path) -> Meaning:
    """The columns that rows need, and the scores of some."""
    predictor = Predictor.load(folder)
    rows = pl.DataFrame({name: range(500) for name in predictor.columns})
    return predictor.columns, predictor.predict(rows).tobytes()


def read_config(path: Path) -> Meaning:
    return load_config(path).flat()


def read_sweep(folder: Path) -> Meaning:
    summary = summarize(folder, resamples=20)
    points = [
        (point.variant, point.method, point.budget, point.num_ok, point.message, point.mean("test_auc"))
        + tuple(map(asdict, point.differences))
        for point in summary.points
    ]
    return summary.title, repr(points), summary.num_expected, summary.learning_rates


# ---- the files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two methods, whose cells are real runs."""
    folder = tmp_path_factory.mktemp("fuzz")
    train = load_config(flags={"training.epochs": 1, "tables.embedding_dim": 4, "model.name": "mlp"})
    train.model.hyperparameters["units"] = [8]
    config = describe(data, {"full": "full", "hash": "hash"}, ["50%"], 1, train)
    for cell in config.cells([0]):
        own = cell_config(train, config.methods[cell.method], cell.budget, cell.seed)
        Trainer(own, PreparedDataset(data), folder / "runs" / cell.name).run()
    run_sweep(
        config,
        folder / "sweep",
        console=Console(quiet=True),
        command=lambda _, cell, run: ["/bin/cp", "-r", str(folder / "runs" / cell.name), str(run)],
    )
    summarize(folder / "sweep", resamples=20)
    return folder / "sweep"


class Checkpoint:
    """Resumes a run, up to its first step."""

    def __init__(self, run: Path, data: Path) -> None:
        content = torch.load(run / "checkpoint" / "last.pt", weights_only=True)
        self.identity = {name: value for name, value in content["identity"].items() if name != "plan"}
        self.config = load_config(fields={n: v for n, v in self.identity.items() if n != "data"})
        self.data = PreparedDataset(data)
        self.plan = plan_tables(self.config, self.data)

    def __call__(self, path: Path) -> Meaning:
        tables = EmbeddingTables(self.plan)
        settings = self.config.model
        model = build_model(settings.name, tables, len(self.data.dense_features), settings.hyperparameters)
        run = Run(self.config, self.data, path.parent.parent, self.identity, tables, model)
        state = torch.get_rng_state()
        try:
            run.resume()
        finally:
            torch.set_rng_state(state)
        weights = {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
        return asdict(run.progress), weights


# ---- the checks ------------------------------------------------------------------------------------------------------


@contextmanager
def in_time(what: str) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"{what}: not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(path: Path, read: Callable[[], Meaning], label: str, meaning_of: Reader | None = None) -> None:
    """Damages ``path`` again and again; what is refused is refused by its name.

    Args:
        read: what uses the file.
        label: of the file, which the damage depends on.
        meaning_of: what a file that was accepted says by itself, for those whose content is their meaning.
    """
    whole = path.read_bytes()
    meant = read()
    refused = 0
    for number in range(INPUTS):
        seed = f"{label}-{number}"
        is_forged = fuzzing.damage(path, whole, seed)
        with in_time(seed):
            try:
                means = read()
            except (ValueError, OSError) as error:
                said = sentence(error)
                assert path.name in said and "\n" not in said, f"{seed}: {said}"
                refused += 1
                continue
            except Exception as error:
                raise AssertionError(f"{seed}: {type(error).__name__}: {error}") from error
        if meaning_of is not None:
            assert means == meaning_of(path), seed
        elif not is_forged:
            assert means == meant, f"{seed}: accepted, and means something else"
    path.write_bytes(whole)
    assert read() == meant
    assert refused > INPUTS // 4


METHODS: list[tuple[Any, str | None, bool]] = [
    ("full", None, False),
    ("hash", "40%", False),
    ("compositional", "40%", False),
    ({"kind": "multi_hash", "num_hashes": 2, "operation": "concat"}, "40%", False),
    ("mixed_dimension", "40%", True),
    ("unified", "40%", False),
    ("robe", "40%", False),
    ("pruned", "40%", False),
    ("pruned", "15%", False),
    ("pruned", "2%", False),
    ("frequency_cutoff", "40%", True),
    ("banded", "40%", True),
    ("drop_feature", "40%", False),
]


@pytest.mark.parametrize("number", range(len(METHODS)), ids=lambda i: f"{METHODS[i][0]}-{METHODS[i][1]}"[:30])
def test_tables(number: int, tmp_path: Path) -> None:
    path = tables_file(tmp_path, *METHODS[number])
    check(path, lambda: read_tables(path), f"tables{number}")
    plan_file = tmp_path / "plan.json"
    plan_file.write_text(json.dumps(EmbeddingTables.load(path).plan.to_dict()))
    check_plan(plan_file, f"plan{number}")


@pytest.mark.parametrize("number", range(len(METHODS)), ids=lambda i: f"{METHODS[i][0]}-{METHODS[i][1]}"[:30])
def test_tables_that_claim_more_ids_than_there_are_rows(number: int, tmp_path: Path) -> None:
    """What the served form of a method holds is for as many ids as it says, or for any number of them."""
    path = tables_file(tmp_path, *METHODS[number])
    whole, stored = path.read_bytes(), EmbeddingTables.load(path).plan
    for position, table in enumerate(stored.tables):

        def claim(plan: dict[str, Any], position: int = position) -> None:
            plan["tables"][position]["num_embeddings"] += 2**20

        path.write_bytes(fuzzing.described(whole, claim))
        (entry,) = (g.layout.entries[table.name] for g in stored.groups if table.name in g.layout.entries)
        if entry.variant in ("full", "mixed_by_rank", "banded_by_rank", "cut_off_by_rank", "bitmap", "compressed rows"):
            with pytest.raises(ValueError, match=f"{path.name} .*'{table.name}'"):
                read_tables(path)
        else:
            assert len(read_tables(path)[1][table.name]) > 2**20


def check_plan(path: Path, label: str) -> None:
    """Plans are given as data, so that no file can be named; what is accepted says what it said."""
    whole = path.read_bytes()
    for number in range(INPUTS):
        fuzzing.damage(path, whole, f"{label}-{number}")
        try:
            given = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            continue
        with in_time(f"{label}-{number}"):
            try:
                found = Plan.from_dict(given)
            except ValueError as error:
                assert "\n" not in str(error) and str(error), label
                continue
            except Exception as error:
                raise AssertionError(f"{label}-{number}: {type(error).__name__}: {error}") from error
        assert _covers(json.loads(json.dumps(found.to_dict())), given), f"{label}-{number}"
        assert str(found)


def _covers(said: Any, given: Any) -> bool:
    """Whether data say at least what other data say, which may leave defaults out."""
    if isinstance(given, dict) and isinstance(said, dict):
        return all(key in said and _covers(said[key], value) for key, value in given.items() if key != "sha256")
    if isinstance(given, list) and isinstance(said, list):
        return len(said) == len(given) and all(map(_covers, said, given))
    return bool(said == given)


@pytest.mark.parametrize(
    "name", ["manifest.json", "frequencies.parquet", "train/00000.parquet", "vocabulary/00000.parquet"]
)
def test_prepared_data(name: str, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    check(folder / name, lambda: read_data(folder / "manifest.json"), name)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "tables.safetensors"])
def test_served_models(name: str, sweep: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    shutil.copytree(sweep / "cells" / "hash-50pct-s0" / "served", folder)
    check(folder / name, lambda: read_served(folder / "model.json"), name)


@pytest.mark.parametrize("name", ["bundle.json", "vocabularies.safetensors"])
def test_bundles(name: str, sweep: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    save_bundle(sweep / "cells" / "hash-50pct-s0", PreparedDataset(data), folder)
    check(folder / name, lambda: read_bundle(folder), name)


def test_checkpoints(sweep: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(sweep / "cells" / "hash-50pct-s0", run)
    resume = Checkpoint(run, data)
    path = run / "checkpoint" / "last.pt"
    check(path, lambda: resume(path), "last.pt")


CELL = "cells/hash-50pct-s0"


@pytest.mark.parametrize(
    "name",
    [
        *("results.csv", "sweep.yaml", "differences.json", "test_labels.npy"),
        *(f"{CELL}/test_scores.npy", f"{CELL}/metrics.json", f"{CELL}/config.yaml"),
    ],
)
def test_sweeps(name: str, sweep: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    shutil.copytree(sweep, folder)
    if name == "differences.json":
        check_cache(folder)
    else:
        check(folder / name, lambda: read_sweep(folder), name)


def check_cache(folder: Path) -> None:
    """A cache never matters."""
    path = folder / "differences.json"
    whole, meant = path.read_bytes(), read_sweep(folder)
    for number in range(INPUTS):
        fuzzing.damage(path, whole, f"differences-{number}")
        with in_time(str(number)):
            assert read_sweep(folder) == meant, number


def test_results_of_a_run(sweep: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(sweep / CELL, run)
    resume = Checkpoint(run, data)
    trainer = Trainer(resume.config, resume.data, run)
    known = trainer.run()
    check(run / "metrics.json", lambda: {k: v for k, v in trainer.run().items() if k in known}, "run-metrics")
    check(run / "config.yaml", trainer.run, "run-config")


def test_configurations(tmp_path: Path) -> None:
    """A configuration of one's own means what it says; the seed is that of the command."""
    path = tmp_path / "run.yaml"
    config = load_config(flags={"tables.method": {"kind": "hash"}, "tables.budget": "10%"})
    path.write_text(config.to_yaml())
    check(path, lambda: read_config(path), "run.yaml", meaning_of=read_config)


@pytest.mark.parametrize("command", ["plan", "train", "sweep", "report", "export"])
def test_commands(command: str, sweep: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of each command one line on stderr, which names the file, and a code that is not 0."""
    own, folder = tmp_path / "data", tmp_path / "sweep"
    shutil.copytree(data, own)
    shutil.copytree(sweep, folder)
    run = folder / CELL
    options = ["--config", str(folder / "train.yaml"), "--method", "hash", "--budget", "50%"]
    path, arguments = {
        "plan": (own / "manifest.json", [str(own), "--method", "hash", "--budget", "10%"]),
        "train": (run / "metrics.json", [str(data), "--out", str(run), *options]),
        "sweep": (folder / "sweep.yaml", [str(data), "--out", str(folder)]),
        "report": (run / "test_scores.npy", [str(folder)]),
        "export": (run / "served" / "model.json", [str(run), str(tmp_path / "out")]),
    }[command]
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"[" * 5000, b"\xff" + whole, whole[:-1] + b"\0"):
        path.write_bytes(damaged)
        capfd.readouterr()
        assert main([command, *arguments]) == 2
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and path.name in lines[0], lines
    assert not (tmp_path / "out").exists()
