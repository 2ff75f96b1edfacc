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
    tuning.csv          where a grid was given: its results on validation and the choice
    tensorboard/        HParams of the cells in results.csv
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from embtables._util.files import followed, remove_leftovers, sealed, sha256, write_bytes, write_text
from embtables._util.lock import locked
from embtables._util.names import has_patterns, number_of
from embtables._util.reading import read_json
from embtables.datasets import PreparedDataset
from embtables.models.registry import check_hyperparameters, is_built_in
from embtables.sweeps import results
from embtables.sweeps.cells import Cell, Place, assignments, file_name, points, value_text
from embtables.sweeps.choosing import chosen, finalists, num_finalists, tuning_cells
from embtables.sweeps.cluster import connected
from embtables.sweeps.config import LABELS_CHECKSUM, OWN, SweepConfig, read_config
from embtables.sweeps.planning import plan_points
from embtables.sweeps.runner import Ended, Job, Processes, Workers, run_jobs, threads_per_job
from embtables.training.checkpoint import identity_of
from embtables.training.config import AS_SERVED, RunConfig, parse_value, with_fields
from embtables.training.environment import environment
from embtables.training.learning_curve import MONITOR_LABELS, value_of
from embtables.training.logs import write_hparams
from embtables.training.loop import CHECKPOINT

#: {(variant, method, budget): bytes of the plan, or floor_bytes and message where it is infeasible}
Plans = Mapping[Place, Mapping[str, Any]]


def train_file(variant: str) -> str:
    """The name of the file with a variant's training configuration."""
    return f"{file_name('train', variant)}.yaml"


Command = Callable[[SweepConfig, Cell, Path], list[str]]


def train_command(config: SweepConfig, cell: Cell, run: Path) -> list[str]:
    """The command that trains `cell` into `run`, or goes on with it."""
    start = ["--config", str(run.parent.parent / train_file(cell.variant))]
    model = config.trains[cell.variant].model.name
    if not is_built_in(model):  # the name in the file is not looked for in the working directory
        start += ["--model", model]
    return [sys.executable, "-m", "embtables", *_train(config, cell, str(run), start)]


def shell_command(config: SweepConfig, cell: Cell) -> str:
    """A line for a shell that trains what `cell` was, without the files of the sweep: each field is set in it."""
    train = config.trains[cell.variant]
    # With the optimizer comes a learning rate of its own, wherever none is set.
    start = with_fields(RunConfig(), {"tables.optimizer": train.tables.optimizer, "tables.learning_rate": None}).flat()
    start["tables.optimizer"] = RunConfig().tables.optimizer
    tuned = {assignment.split("=", 1)[0] for assignment in assignments(cell.tuned)}
    options = ["--model", train.model.name]
    for field, value in train.flat().items():
        if value != start[field] and field not in (*OWN, "model.name") and field not in tuned:
            options += ["--set", f"{field}={value_text(value)}"]
    return shlex.join(["embtables", *_train(config, cell, f"runs/{cell.name}", options)])


def _train(config: SweepConfig, cell: Cell, out: str, options: Sequence[str]) -> list[str]:
    """The sub-command ``train`` for `cell`, with the options from which all cells start."""
    spec = config.methods[cell.method]
    command = ["train", config.data, "--out", out, *options]
    command += ["--method", spec if isinstance(spec, str) else json.dumps(spec)]
    command += ["--budget", cell.budget] if cell.budget else []
    command += ["--seed", str(cell.seed)]
    for assignment in assignments(cell.tuned):
        command += ["--set", assignment]
    return command


def run_sweep(
    config: SweepConfig,
    folder: Path,
    *,
    jobs: int = 1,
    on: str | None = None,
    console: Console | None = None,
    command: Command = train_command,
) -> list[dict[str, Any]]:
    """Run what is not finished of the sweep `config` in `folder`, `jobs` cells at a time.

    Everything is planned, and the data's checksums are compared, before `folder` is touched. Failed cells are tried
    again. Returns the rows of results.csv, and behind them those of failed cells that are of the grid alone.

    Args:
        config: what is asked for.
        folder: the sweep's folder, which only this process writes.
        jobs: how many cells are trained at a time.
        on: what trains them, as :func:`embtables.sweeps.cluster.connected` takes it; without it processes of this one.
        console: what progress is shown on.
        command: what trains a cell.

    Raises:
        ValueError: wrong configuration, damaged data, or a folder that is in use, of another sweep, or of no sweep; or
            a cluster that cannot be reached, or has a machine that is not like this one.
    """
    console = console or Console(stderr=True)
    folder = followed(folder)
    dataset = PreparedDataset(Path(config.data))
    _refuse_links(folder)
    _remove_leftovers(folder)
    _refuse_other(config, folder)
    with nullcontext() if on is None else connected(on, config) as cluster:
        dataset.verify(progress=console.is_terminal)
        plans = _plans(config, dataset)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder) as lock:
            _refuse_other(config, folder)
            workers: Workers
            if cluster is None:
                workers = Processes(threads_per_job(jobs), folder, lock)
            else:
                workers = cluster.workers(jobs, folder)
            _record(config, folder, plans, dataset, jobs, workers.threads)
            _announce(plans, console)
            sweep = _Sweep(config, folder, plans)
            _run_cells(sweep, jobs, console, command, workers)
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
            places = points(config.methods, config.budgets)
            planned = plan_points(dataset, train, config.methods, places, config.tune)
        except ValueError as error:
            raise ValueError(f"variant {variant!r}: {error}" if variant else str(error)) from None
        found |= {(variant, *point): plan for point, plan in planned.items()}
    return found


class _Sweep:
    """The state of a sweep, which lies in its files alone."""

    def __init__(self, config: SweepConfig, folder: Path, plans: Plans) -> None:
        self.config, self.folder, self.plans = config, folder, plans
        self.infeasible = {place for place, planned in plans.items() if "floor_bytes" in planned}
        self.grid = tuning_cells(config, self.infeasible)

    def run(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name

    def job(self, cell: Cell, beside: Sequence[Cell], command: Command, folder: Path | None = None) -> Job:
        """What trains `cell`, and with it the cells `beside` it, which are the same training in another form.

        `folder` is what the command calls the sweep's folder, where it runs in another place.
        """
        self._keep_checkpoint_of(self.run(cell), beside)
        run, *others = ((folder or self.folder) / "cells" / each.name for each in (cell, *beside))
        words = command(self.config, cell, run)
        for other, out in zip(beside, others):
            spec = {"method": self.config.methods[other.method]}
            tables = spec | {"budget": parse_value(other.budget, "budget")} if other.budget else spec
            words += ["--also", json.dumps({str(out): tables})]
        return Job(cell.name, words, self.run(cell).with_name(f"{cell.name}.log"), [run, *others])

    def _keep_checkpoint_of(self, run: Path, beside: Sequence[Cell]) -> None:
        """Removes a checkpoint of a training with which other cells went: that one cannot go on with these.

        Which cells go along may change from one start to the next, with the finalists and the values that are chosen,
        where a cell that had failed has not failed again.
        """
        identity = identity_of(run / CHECKPOINT / "last.pt")
        if identity is not None and set(identity.get("also", ())) != {cell.name for cell in beside}:
            (run / CHECKPOINT / "last.pt").unlink()

    def trainings(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """The cells that are not finished, one training each: the first one trains, and serves the others too.

        With it go all those of its kind that come after it, finished or not, so that a sweep that was stopped in the
        midst of a training goes on with the same one. Where the training depends on how it is served, each cell is one.
        """
        found: dict[tuple[Any, ...], list[Cell]] = {}
        for cell in filter(self.feasible, cells):
            training = self.config.trains[cell.variant].training
            alone = any(
                getattr(training, name) is not None or f"training.{name}" in self.config.tune for name in AS_SERVED
            )
            same = cell.place if alone else (cell.variant, self.plans[cell.place]["trains"])
            found.setdefault((same, cell.seed, cell.tuned), []).append(cell)
        pending = {cell.name for cell in self.pending(cells)}
        first = {key: next((i for i, c in enumerate(alike) if c.name in pending), None) for key, alike in found.items()}
        return [alike[first[key] :] for key, alike in found.items() if first[key] is not None]

    def failure(self, cell: Cell) -> Path:
        return self.run(cell).with_name(f"{cell.name}.failed.json")

    def why_failed(self, cell: Cell) -> str | None:
        """What is noted of a cell that failed; None where nothing is, or nothing legible: it is tried again anyway."""
        try:
            noted = read_json(self.failure(cell))
        except (FileNotFoundError, ValueError):
            return None
        message = noted.get("message") if isinstance(noted, dict) else None
        return message if isinstance(message, str) else None

    def hparams(self, cell: Cell) -> Path:
        return self.folder / "tensorboard" / cell.name

    def feasible(self, cell: Cell) -> bool:
        return cell.place not in self.infeasible

    def pending(self, cells: Iterable[Cell]) -> list[Cell]:
        return [cell for cell in cells if self.feasible(cell) and results.read_metrics(self.run(cell)) is None]

    def stages(self) -> Iterator[list[Cell]]:
        """What is trained: the grid, then the first seed, then the others; each once those before it have ended.

        Where further seeds wait for nothing they are one stage with the first.
        """
        yield self.grid
        done = set(self.grid)
        first = 1 if self.config.best is not None else self.config.seeds
        yield [cell for cell in self.main_cells() if cell.seed < first and cell not in done]
        yield [cell for cell in self.main_cells() if cell.seed >= first]

    def num_runs(self) -> int:
        """How many cells are trained in all, as far as it is known by now who gets every seed."""
        places = [place for place in self.config.points if place not in self.infeasible]
        values = self.values_of_places(self.chosen_values())
        untried = set(places) - {cell.place for cell in self.grid}
        further = (self.config.seeds - 1) * num_finalists(self.config, places, values)
        return len(self.grid) + len(untried) + further

    def main_cells(self) -> list[Cell]:
        """The cells of results.csv that are known: whose values are chosen, and who gets further seeds."""
        chosen_values = self.chosen_values()
        found = [
            replace(cell, tuned=chosen_values.get(cell.place, ""))
            for cell in self.config.cells(range(self.config.seeds))
            if cell.place in chosen_values or not self.config.tune or not self.feasible(cell)
        ]
        repeated = finalists(self.config, self.values_of_places(chosen_values))
        return [cell for cell in found if cell.seed == 0 or cell.place in repeated]

    def chosen_values(self) -> dict[Place, str]:
        """The entry of the grid of each place where it is chosen."""
        return chosen(self.config, self.infeasible, self.values(self.grid)) if self.grid else {}

    def values_of_places(self, chosen_values: Mapping[Place, str]) -> dict[Place, float | None]:
        """The value of the first seed, of each place that has one or never will."""
        if self.config.best is None:
            return {}
        cells = [replace(cell, tuned=chosen_values.get(cell.place, "")) for cell in self.config.cells([0])]
        return {cell.place: value for cell, value in self.values(cells).items()}

    def values(self, cells: Iterable[Cell]) -> dict[Cell, float | None]:
        """The monitor of each cell that is done, so that more is better; None where it failed or is infeasible."""
        found: dict[Cell, float | None] = {}
        for cell in cells:
            metrics = results.read_metrics(self.run(cell)) if self.feasible(cell) else None
            if metrics is not None and metrics["status"] == "ok":
                found[cell] = value_of(metrics, self.monitor(cell))
            elif metrics is not None or not self.feasible(cell) or self.why_failed(cell) is not None:
                found[cell] = None
        return found

    def monitor(self, cell: Cell) -> str:
        return self.config.trains[cell.variant].training.monitor

    def row(self, cell: Cell) -> dict[str, Any] | None:
        """The row of `cell`, or None while it has none."""
        name, model = self.config.dataset, self.config.trains[cell.variant].model.name
        planned = self.plans[cell.place]
        if not self.feasible(cell):
            return results.row(cell, "infeasible", name, model, planned)
        metrics = results.read_metrics(self.run(cell))
        if metrics is not None:
            return results.row(cell, str(metrics["status"]), name, model, {**planned, **metrics})
        message = self.why_failed(cell)
        return None if message is None else results.row(cell, "failed", name, model, {**planned, "message": message})

    def collect(self) -> list[dict[str, Any]]:
        """Write results.csv from the cells' files, sorted by variant, method, budget and seed, and what goes with it.

        Returns its rows, and behind them those of failed cells that are of the grid alone.
        """
        order = {place: number for number, place in enumerate(self.config.points)}
        cells = sorted(self.main_cells(), key=lambda cell: (order[cell.place], cell.seed))
        rows = {cell: row for cell in cells if (row := self.row(cell)) is not None}
        results.write_results(list(rows.values()), self.folder / "results.csv")
        for cell, row in rows.items():
            if row["status"] == "ok" and not self.hparams(cell).exists():
                write_hparams(self.hparams(cell), *results.hparams(row))
        tried = {cell: row for cell in self.grid if (row := rows.get(cell) or self.row(cell)) is not None}
        if self.config.tune:
            self._write_tuning(tried)
        return [
            *rows.values(),
            *(row for cell, row in tried.items() if row["status"] == "failed" and cell not in rows),
        ]

    def _write_tuning(self, rows: Mapping[Cell, Mapping[str, Any]]) -> None:
        chosen_values = self.chosen_values()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["variant", "method", "budget", "tuned", "monitor", "valid", "chosen"])
        for cell, row in rows.items():
            monitor = self.monitor(cell)
            is_chosen = chosen_values.get(cell.place) == cell.tuned
            writer.writerow([*cell.place, cell.tuned, monitor, row.get(f"valid_{monitor}"), int(is_chosen)])
        write_text(self.folder / "tuning.csv", text.getvalue())

    def note_end(self, cell: Cell, ended: Ended) -> str:
        """Record how `cell` ended and return its status in a few words.

        Of a cell of the grid they are what it is chosen by, not the test AUC, which is shown for what was chosen.
        """
        metrics = results.read_metrics(self.run(cell))
        if metrics is None:
            message = ended.message if ended.code != 0 else "the run ended without writing metrics.json"
            failure = {"message": message, "code": ended.code, "log": str(ended.job.log.relative_to(self.folder))}
            write_text(self.failure(cell), json.dumps(failure, indent=1))
            return f"failed: {message}"
        self.failure(cell).unlink(missing_ok=True)
        shutil.rmtree(self.hparams(cell), ignore_errors=True)  # those of an earlier training, which collect writes anew
        if metrics["status"] != "ok":
            return str(metrics["status"])
        name, column = "test AUC", "test_auc"
        if cell in self.grid:
            monitor = self.monitor(cell)
            name, column = f"validation {MONITOR_LABELS[monitor]}", f"valid_{monitor}"
        value = metrics.get(column)
        return f"{name} undefined" if value is None or value != value else f"{name} {value:.4f}"


def _run_cells(sweep: _Sweep, jobs: int, console: Console, command: Command, workers: Workers) -> None:
    (sweep.folder / "cells").mkdir(exist_ok=True)
    sweep.collect()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    remaining = TimeRemainingColumn(elapsed_when_finished=False)
    # Cells take minutes: the speed is taken over the whole sweep, not over the last half minute.
    with Progress(*columns, remaining, console=console, speed_estimate_period=1e9, transient=True) as progress:
        bar = progress.add_task("cells", total=None)

        def run(cells: list[Cell]) -> None:
            trainings = sweep.trainings(cells)
            pending = [cell for training in trainings for cell in training]
            progress.advance(bar, 0)
            done = sum(map(sweep.feasible, cells)) - len(pending)
            progress.update(bar, completed=progress.tasks[0].completed + done, total=sweep.num_runs())
            by_name = {training[0].name: training for training in trainings}
            active: list[str] = []

            def show(change: Callable[[str], None], name: str) -> None:
                change(name)
                progress.update(bar, description=", ".join(active) or "cells")

            queue = (sweep.job(first, beside, command, workers.folder) for first, *beside in trainings)
            for ended in run_jobs(queue, jobs, workers, lambda job: show(active.append, job.name)):
                show(active.remove, ended.job.name)
                for cell in by_name[ended.job.name]:
                    outcome = sweep.note_end(cell, ended)
                    console.out(f"{cell.name}  {ended.seconds:.0f} s  {outcome}", highlight=False)
                    progress.advance(bar)
                sweep.collect()

        for cells in sweep.stages():
            run(cells)


def _announce(plans: Plans, console: Console) -> None:
    for (variant, method, budget), planned in plans.items():
        if "floor_bytes" in planned:
            of_variant = f"{variant}: " if variant else ""
            floor = number_of(planned["floor_bytes"], "byte")
            console.out(f"{of_variant}{method} at {budget} is infeasible: its floor is {floor}", highlight=False)


def _record(config: SweepConfig, folder: Path, plans: Plans, dataset: PreparedDataset, jobs: int, threads: int) -> None:
    names = ("variant", "method", "budget")
    entries = [{**dict(zip(names, place)), **planned} for place, planned in plans.items()]
    write_text(folder / "plans.json", json.dumps(entries, indent=1))
    for variant, train in config.trains.items():
        write_text(folder / train_file(variant), train.to_yaml())
    described = environment(torch.device(config.train.training.device), threads)
    write_text(folder / "environment.json", json.dumps({**described, "jobs": jobs}, indent=1))
    if not (folder / "sweep.yaml").exists():
        labels = [batch.labels.numpy().astype(np.uint8) for batch in dataset.batches("test", 65536)]
        data = io.BytesIO()
        np.save(data, np.concatenate(labels) if labels else np.empty(0, np.uint8))
        write_bytes(folder / "test_labels.npy", data.getvalue())
    # Last: a folder with a sweep.yaml has the rest.
    content = {**config.model_dump(mode="json"), LABELS_CHECKSUM: sha256(folder / "test_labels.npy")}
    write_text(folder / "sweep.yaml", yaml.safe_dump(sealed(content), sort_keys=False, allow_unicode=True))


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
