"""Sweeps: every variant, method, budget and seed, each in a process of its own, and their results in one file.

A sweep is a directory::

    sweep.yaml          what was asked for; a later start must ask for the same
    environment.json    where it ran
    train.yaml          the training configuration that every cell starts from, every field of it;
                        with variants train-VARIANT.yaml for each
    plans.json          bytes, or the floor, of every method at every budget
    test_labels.npy     uint8, in the order of the cells' test_scores.npy
    cells/NAME/         a run directory; metrics.json in it = finished
    cells/NAME.log      what the cell printed;  cells/NAME.failed.json why it failed
    results.csv         one row a cell that is finished, infeasible or failed
    learning_rates.csv  where a grid was given: its results on validation and the choice
    tensorboard/        HParams
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from embtables._util.files import (
    check_seal,
    followed,
    remove_leftovers,
    sealed,
    sha256,
    unsealed,
    write_bytes,
    write_text,
)
from embtables._util.lock import locked
from embtables._util.names import has_patterns
from embtables._util.reading import inside, read_json, read_yaml
from embtables.datasets import PreparedDataset
from embtables.models.registry import check_hyperparameters, is_built_in
from embtables.sweeps import results
from embtables.sweeps.cells import Cell, MethodSpec, Place, file_name, points, takes_budget
from embtables.sweeps.planning import cell_config, plan_points
from embtables.sweeps.runner import Ended, Job, run_jobs, threads_per_job
from embtables.training.config import RunConfig, parse_value
from embtables.training.environment import environment
from embtables.training.learning_curve import value_of
from embtables.training.loop import CHECKPOINT

#: The entry of sweep.yaml with the checksum of test_labels.npy.
LABELS_CHECKSUM = "test_labels_sha256"
MOST_SEEDS = 100_000

#: {(variant, method, budget): bytes of the plan, or floor_bytes and message where it is infeasible}
Plans = Mapping[Place, Mapping[str, Any]]


class SweepConfig(BaseModel):
    """What a sweep is asked for. Two starts in one directory must agree in every field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    dataset: str
    manifest_sha256: str
    methods: dict[str, MethodSpec]
    budgets: list[str]
    seeds: int = Field(ge=1)
    learning_rates: list[float] = []
    train: RunConfig
    variants: dict[str, RunConfig] = {}

    def check(self) -> None:
        """Raises ``ValueError`` where a method is given in a form that no command line gives."""
        if self.seeds > MOST_SEEDS or not self.methods:
            raise ValueError(f"seeds must be at most {MOST_SEEDS:,}, and there must be methods")
        for label, spec in self.methods.items():
            if isinstance(spec, dict) and "kind" not in spec and not all(_is_method(part) for part in spec.values()):
                raise ValueError(f"methods.{label} is no method")

    @property
    def trains(self) -> dict[str, RunConfig]:
        """The training configurations by variant; without variants the one, under an empty name."""
        return self.variants or {"": self.train}

    @property
    def points(self) -> list[Place]:
        return [(variant, *point) for variant in self.trains for point in points(self.methods, self.budgets)]

    def cells(self, seeds: Iterable[int], learning_rates: Iterable[float | None]) -> list[Cell]:
        """Seed by seed, so that a sweep that is cut short has whole curves."""
        rates = list(learning_rates)
        return [
            Cell(method, budget, seed, rate, variant)
            for seed in seeds
            for variant, method, budget in self.points
            for rate in rates
        ]


def _is_method(spec: object) -> bool:
    return isinstance(spec, str) or (isinstance(spec, dict) and "kind" in spec)


def train_file(variant: str) -> str:
    """The name of the file with a variant's training configuration."""
    return f"{file_name('train', variant)}.yaml"


Command = Callable[[SweepConfig, Cell, Path], list[str]]


def train_command(config: SweepConfig, cell: Cell, run: Path) -> list[str]:
    """The command that trains `cell` into `run`, or goes on with it."""
    spec = config.methods[cell.method]
    command = [sys.executable, "-m", "embtables", "train", config.data, "--out", str(run)]
    command += ["--config", str(run.parent.parent / train_file(cell.variant))]
    command += ["--method", spec if isinstance(spec, str) else json.dumps(spec)]
    command += ["--budget", cell.budget] if cell.budget else []
    command += ["--seed", str(cell.seed)]
    model = config.trains[cell.variant].model.name
    if not is_built_in(model):  # the name in the file is not looked for in the working directory
        command += ["--model", model]
    if cell.learning_rate is not None:
        command += ["--set", f"tables.learning_rate={cell.learning_rate!r}"]
    return command


def describe(
    data: Path,
    methods: dict[str, MethodSpec],
    budgets: list[str],
    seeds: int,
    train: RunConfig,
    learning_rates: list[float],
    variants: Mapping[str, RunConfig] | None = None,
) -> SweepConfig:
    """The configuration of a sweep over the prepared data at `data`, once for each of `variants` where there are any.

    Method, budget and seed of `train` are of no account: every cell has its own, so that no variant may set them.
    """
    for config_of_cells in (train, *(variants or {}).values()):
        if config_of_cells.tables.hash_seed is not None:
            raise ValueError(
                f"tables.hash_seed is {config_of_cells.tables.hash_seed}, but a sweep takes it from each seed, so that "
                "the spread includes luck with collisions: leave it null"
            )
    for name, own in (variants or {}).items():
        _refuse_what_cells_set(name, own, train, learning_rates)
    needing = [label for label, spec in methods.items() if takes_budget(spec)]
    if needing and not budgets:
        raise ValueError(f"method {needing[0]} needs a budget: give for example --budgets 50%,10%,1%")
    dataset = PreparedDataset(data)
    config = SweepConfig(
        data=str(data.resolve()),
        dataset=dataset.name,
        manifest_sha256=sha256(data / "manifest.json"),
        methods=methods,
        budgets=budgets,
        seeds=seeds,
        learning_rates=learning_rates,
        train=cell_config(train, "full", "", seed=0),
        variants={name: cell_config(own, "full", "", seed=0) for name, own in (variants or {}).items()},
    )
    names = Counter(cell.name for cell in config.cells([0], learning_rates or [None]))
    twice = next((name for name, times in names.items() if times > 1), None)
    if twice is not None:
        raise ValueError(
            f"two cells would both be named '{twice}': variants, methods, budgets or learning rates are too alike"
        )
    return config


def _refuse_what_cells_set(name: str, variant: RunConfig, train: RunConfig, learning_rates: list[float]) -> None:
    """``ValueError`` where a variant sets what every cell has of its own, and would be as if it did not."""
    ours, theirs = variant.tables, train.tables
    other_rate = ours.learning_rate != theirs.learning_rate and ours.optimizer == theirs.optimizer
    for field, cure, is_set in (
        ("tables.method", "give --methods", ours.method != theirs.method),
        ("tables.budget", "give --budgets", ours.budget != theirs.budget),
        ("training.seed", "give --seeds", variant.training.seed != train.training.seed),
        ("tables.learning_rate", "leave out --learning-rates", bool(learning_rates) and other_rate),
    ):
        if is_set:
            raise ValueError(f"variant {name!r} sets {field}, which every cell of a sweep has of its own: {cure}")


def run_sweep(
    config: SweepConfig,
    folder: Path,
    *,
    jobs: int = 1,
    console: Console | None = None,
    command: Command = train_command,
) -> list[dict[str, Any]]:
    """Run what is not finished of the sweep `config` in `folder`, `jobs` cells at a time.

    Everything is planned, and the data's checksums are compared, before `folder` is touched. Failed cells are tried
    again. Returns the rows of results.csv.

    Raises:
        ValueError: wrong configuration, damaged data, or a folder that is in use, of another sweep, or of no sweep.
    """
    console = console or Console(stderr=True)
    folder = followed(folder)
    dataset = PreparedDataset(Path(config.data))
    _refuse_links(folder)
    _remove_leftovers(folder)
    _refuse_other(config, folder)
    dataset.verify(progress=console.is_terminal)
    plans = _plans(config, dataset)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) as lock:
        _refuse_other(config, folder)
        _record(config, folder, plans, dataset, jobs)
        _announce(plans, console)
        sweep = _Sweep(config, folder, plans)
        _run_cells(sweep, jobs, console, command, lock)
        return sweep.collect()


def _refuse_links(folder: Path) -> None:
    """Nothing is written, or removed, behind a link that stands in the place of a part of the sweep."""
    for part in (folder / "cells", folder / "tensorboard", *folder.glob("cells/*")):
        if part.is_symlink():
            raise ValueError(f"{part} is a link, and a sweep writes into its own folder: give another --out")


def _remove_leftovers(folder: Path) -> None:
    """What processes that were killed were writing, here and in the cells."""
    cells = [cell for cell in folder.glob("cells/*") if cell.is_dir()]
    checkpoints = [cell / CHECKPOINT for cell in cells if not (cell / CHECKPOINT).is_symlink()]
    remove_leftovers(folder, folder / "cells", *cells, *checkpoints)


def _plans(config: SweepConfig, dataset: PreparedDataset) -> Plans:
    found: dict[Place, Mapping[str, Any]] = {}
    for variant, train in config.trains.items():
        try:
            check_hyperparameters(train.model.name, train.model.hyperparameters)
            planned = plan_points(dataset, train, config.methods, points(config.methods, config.budgets))
        except ValueError as error:
            raise ValueError(f"variant {variant!r}: {error}" if variant else str(error)) from None
        found |= {(variant, *point): plan for point, plan in planned.items()}
    return found


class _Sweep:
    """The state of a sweep, which lies in its files alone."""

    def __init__(self, config: SweepConfig, folder: Path, plans: Plans) -> None:
        self.config, self.folder, self.plans = config, folder, plans

    def run(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name

    def job(self, cell: Cell, beside: Sequence[Cell], command: Command) -> Job:
        """What trains `cell`, and with it the cells `beside` it, which are the same training in another form."""
        run = self.run(cell)
        words = command(self.config, cell, run)
        for other in beside:
            spec = {"method": self.config.methods[other.method]}
            tables = spec | {"budget": parse_value(other.budget, "budget")} if other.budget else spec
            words += ["--also", json.dumps({str(self.run(other)): tables})]
        return Job(cell.name, words, run.with_name(f"{cell.name}.log"))

    def trainings(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """The cells that are not finished, one training each: the first one trains, and serves the others too.

        With it go all those of its kind that come after it, finished or not, so that a sweep that was stopped in the
        midst of a training goes on with the same one. Where the training depends on how it is served, each cell is one.
        """
        found: dict[tuple[Any, ...], list[Cell]] = {}
        for cell in filter(self.feasible, cells):
            training = self.config.trains[cell.variant].training
            alone = training.quantize_from is not None or training.plateau_factor is not None
            same = cell.place if alone else (cell.variant, self.plans[cell.place]["trains"])
            found.setdefault((same, cell.seed, cell.learning_rate), []).append(cell)
        pending = {cell.name for cell in self.pending(cells)}
        first = {key: next((i for i, c in enumerate(alike) if c.name in pending), None) for key, alike in found.items()}
        return [alike[first[key] :] for key, alike in found.items() if first[key] is not None]

    def failure(self, cell: Cell) -> Path:
        return self.run(cell).with_name(f"{cell.name}.failed.json")

    def feasible(self, cell: Cell) -> bool:
        return "floor_bytes" not in self.plans[cell.place]

    def pending(self, cells: Iterable[Cell]) -> list[Cell]:
        return [cell for cell in cells if self.feasible(cell) and results.read_metrics(self.run(cell)) is None]

    def tuning_cells(self) -> list[Cell]:
        """Cells of the first seed, over the grid of learning rates; none without a grid."""
        return self.config.cells([0], self.config.learning_rates)

    def main_cells(self) -> list[Cell]:
        """The cells of results.csv that are known: with a grid, those whose learning rate has been chosen."""
        if not self.config.learning_rates:
            return self.config.cells(range(self.config.seeds), [None])
        chosen = self.chosen_rates()
        cells = [
            replace(cell, learning_rate=chosen.get(cell.place))
            for cell in self.config.cells(range(self.config.seeds), [None])
        ]
        return [cell for cell in cells if cell.learning_rate is not None or not self.feasible(cell)]

    def chosen_rates(self) -> dict[Place, float]:
        """The learning rate with the best monitor, of each place whose grid is done (failed cells left out)."""
        valid: dict[Place, dict[float, float]] = {}
        missing: set[Place] = set()
        for cell in self.tuning_cells():
            metrics = results.read_metrics(self.run(cell))
            if metrics is not None and metrics["status"] == "ok" and cell.learning_rate is not None:
                value = value_of(metrics, self.monitor(cell))
                valid.setdefault(cell.place, {})[cell.learning_rate] = value
            elif metrics is None and not self.failure(cell).exists():
                missing.add(cell.place)
        return {place: max(found, key=lambda r: found[r]) for place, found in valid.items() if place not in missing}

    def monitor(self, cell: Cell) -> str:
        return self.config.trains[cell.variant].training.monitor

    def row(self, cell: Cell) -> dict[str, Any] | None:
        """The row of `cell`, or None while it has none."""
        name, model = self.config.dataset, self.config.trains[cell.variant].model.name
        planned = self.plans[cell.place]
        if not self.feasible(cell):
            return results.row(cell, "infeasible", name, model, planned)
        metrics = results.read_metrics(self.run(cell))
        rate = {"learning_rate": cell.learning_rate}
        if metrics is not None:
            return results.row(cell, str(metrics["status"]), name, model, {**planned, **metrics, **rate})
        if self.failure(cell).exists():
            failure = read_json(self.failure(cell))
            if not isinstance(failure, dict):
                raise ValueError(f"{self.failure(cell)} is damaged: delete it to try the cell again")
            return results.row(cell, "failed", name, model, {**planned, **failure, **rate})
        return None

    def collect(self) -> list[dict[str, Any]]:
        """Write results.csv from the cells' files, sorted by variant, method, budget and seed; return its rows."""
        order = {place: number for number, place in enumerate(self.config.points)}
        cells = sorted(self.main_cells(), key=lambda cell: (order[cell.place], cell.seed))
        rows = [row for row in map(self.row, cells) if row is not None]
        results.write_results(rows, self.folder / "results.csv")
        if self.config.learning_rates:
            self._write_rates()
        return rows

    def _write_rates(self) -> None:
        chosen = self.chosen_rates()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["variant", "method", "budget", "learning_rate", "monitor", "valid", "chosen"])
        for cell in self.tuning_cells():
            metrics = results.read_metrics(self.run(cell))
            if metrics is not None:
                is_chosen = chosen.get(cell.place) == cell.learning_rate
                monitor = self.monitor(cell)
                value = metrics.get(f"valid_{monitor}")
                writer.writerow([*cell.place, cell.learning_rate, monitor, value, int(is_chosen)])
        write_text(self.folder / "learning_rates.csv", text.getvalue())

    def note_end(self, cell: Cell, ended: Ended) -> str:
        """Record how `cell` ended and return its status in a few words."""
        metrics = results.read_metrics(self.run(cell))
        if metrics is None:
            message = ended.message if ended.code != 0 else "the run ended without writing metrics.json"
            failure = {"message": message, "code": ended.code, "log": str(ended.job.log.relative_to(self.folder))}
            write_text(self.failure(cell), json.dumps(failure, indent=1))
            return f"failed: {message}"
        self.failure(cell).unlink(missing_ok=True)
        row = self.row(cell)
        if row is not None and row["status"] == "ok":
            results.write_hparams(row, self.folder / "tensorboard" / cell.name)
            area = row["test_auc"]
            return "test AUC undefined" if area is None or area != area else f"test AUC {area:.4f}"
        return str(metrics["status"])


def _run_cells(sweep: _Sweep, jobs: int, console: Console, command: Command, lock: int) -> None:
    (sweep.folder / "cells").mkdir(exist_ok=True)
    sweep.collect()
    config = sweep.config
    num_points = sum("floor_bytes" not in sweep.plans[place] for place in config.points)
    runs_of_a_point = config.seeds + max(0, len(config.learning_rates) - 1)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    remaining = TimeRemainingColumn(elapsed_when_finished=False)
    # Cells take minutes: the speed is taken over the whole sweep, not over the last half minute.
    with Progress(*columns, remaining, console=console, speed_estimate_period=1e9, transient=True) as progress:
        bar = progress.add_task("cells", total=num_points * runs_of_a_point)

        def run(cells: list[Cell]) -> None:
            trainings = sweep.trainings(cells)
            pending = [cell for training in trainings for cell in training]
            progress.advance(bar, 0)
            done = sum(map(sweep.feasible, cells)) - len(pending)
            progress.update(bar, completed=progress.tasks[0].completed + done)
            by_name = {training[0].name: training for training in trainings}
            active: list[str] = []

            def show(change: Callable[[str], None], name: str) -> None:
                change(name)
                progress.update(bar, description=", ".join(active) or "cells")

            queue = (sweep.job(first, beside, command) for first, *beside in trainings)
            for ended in run_jobs(queue, jobs, lambda job: show(active.append, job.name), lock):
                show(active.remove, ended.job.name)
                for cell in by_name[ended.job.name]:
                    outcome = sweep.note_end(cell, ended)
                    console.print(f"{cell.name}  {ended.seconds:.0f} s  {outcome}", highlight=False, markup=False)
                    progress.advance(bar)
                sweep.collect()

        if config.learning_rates:
            run(sweep.tuning_cells())
            chosen = sweep.main_cells()
            run([cell for cell in chosen if cell.seed > 0])
        else:
            run(sweep.main_cells())


def _announce(plans: Plans, console: Console) -> None:
    for (variant, method, budget), planned in plans.items():
        if "floor_bytes" in planned:
            of_variant = f"{variant}: " if variant else ""
            text = f"{of_variant}{method} at {budget} is infeasible: its floor is {planned['floor_bytes']:,} bytes"
            console.print(text, highlight=False, markup=False)


def _record(config: SweepConfig, folder: Path, plans: Plans, dataset: PreparedDataset, jobs: int) -> None:
    names = ("variant", "method", "budget")
    entries = [{**dict(zip(names, place)), **planned} for place, planned in plans.items()]
    write_text(folder / "plans.json", json.dumps(entries, indent=1))
    for variant, train in config.trains.items():
        write_text(folder / train_file(variant), train.to_yaml())
    described = environment(torch.device(config.train.training.device), threads_per_job(jobs))
    write_text(folder / "environment.json", json.dumps({**described, "jobs": jobs}, indent=1))
    if not (folder / "sweep.yaml").exists():
        labels = [batch.labels.numpy().astype(np.uint8) for batch in dataset.batches("test", 65536)]
        data = io.BytesIO()
        np.save(data, np.concatenate(labels) if labels else np.empty(0, np.uint8))
        write_bytes(folder / "test_labels.npy", data.getvalue())
    # Last: a folder with a sweep.yaml has the rest.
    content = {**config.model_dump(mode="json"), LABELS_CHECKSUM: sha256(folder / "test_labels.npy")}
    write_text(folder / "sweep.yaml", yaml.safe_dump(sealed(content), sort_keys=False, allow_unicode=True))


def read_config(folder: Path) -> SweepConfig:
    """The configuration of the sweep in `folder`; ValueError where there is none."""
    file = folder / "sweep.yaml"
    if not file.is_file():
        raise ValueError(f"{folder} is not the directory of a sweep: it has no sweep.yaml")
    try:
        content = read_yaml(inside(folder, "sweep.yaml"))
        if not isinstance(content, dict):
            raise ValueError("it holds no fields")
        check_seal(content, file)
        fields = {name: value for name, value in unsealed(content).items() if name != LABELS_CHECKSUM}
        config = SweepConfig.model_validate(fields)
        config.check()
        return config
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({' '.join(str(error).split())}): give another --out") from None


def _refuse_other(config: SweepConfig, folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a directory to --out")
    if not (folder / "sweep.yaml").exists():
        foreign = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        started = {"plans.json", "environment.json", "test_labels.npy", *map(train_file, config.trains)}
        if set(foreign) - started:
            raise ValueError(
                f"{folder} exists and is not a sweep (it holds {foreign[0]}): give a new directory to --out"
            )
        return
    before, now = read_config(folder).model_dump(mode="json"), config.model_dump(mode="json")
    difference = first_difference(before, now)
    if difference is not None:
        field, old, new = difference
        raise ValueError(
            f"{folder} holds a sweep with another {field}: {old} there, {new} now; "
            "give the same again to go on with it, or another --out"
        )


def first_difference(before: Any, now: Any, path: str = "") -> tuple[str, str, str] | None:
    """The first field, as a dotted path, in which two configurations differ, and both values as text."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            missing = "nothing"
            found = first_difference(
                before.get(key, missing), now.get(key, missing), f"{path}.{key}" if path else str(key)
            )
            if found is not None:
                return found
        if list(before) != list(now) and has_patterns(now):
            return path, str(before), str(now)
        return None
    return None if before == now else (path, str(before), str(now))
