"""What tables are worth on a data set, and which methods do best within a budget: ``embtables probe``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from embtables._util.files import sha256
from embtables.datasets import PreparedDataset
from embtables.plan.probe import MethodSpec, Probe
from embtables.sweeps.racing import FAMILIES, ROUNDS, Runner, in_a_race, race, trained
from embtables.tables import EmbeddingTables
from embtables.training.config import RunConfig
from embtables.training.evaluation import main_metrics, score
from embtables.training.learning_curve import value_of
from embtables.training.planning import selected


class Course(NamedTuple):
    """What a probe will do, before it does anything."""

    reference: Runner
    runners: dict[str, list[Runner]]  # by budget
    left_out: dict[str, list[str]]  # by budget, methods that do not fit into it

    @property
    def epochs(self) -> float:
        """How many epochs it trains, where no two methods are so close that they are trained twice."""
        return self.reference.epochs(
            ROUNDS[-1].evaluations + sum(trained(len(runners)) for runners in self.runners.values())
        )


def course(
    data: PreparedDataset,
    config: RunConfig,
    budgets: Sequence[str],
    folder: Path,
    methods: Sequence[MethodSpec] = FAMILIES,
) -> Course:
    """Which trainings a probe consists of.

    Args:
        data: the prepared data.
        config: of the training; its method, budget and precision do not matter.
        budgets: as ``embtables sweep`` takes them.
        folder: where the trainings are.
        methods: those that race within each budget.

    Raises:
        ValueError: no method fits into a budget, or one cannot be trained so.
    """
    quick = in_a_race(config, data)
    reference = Runner("full", "", quick, data, folder)
    runners: dict[str, list[Runner]] = {}
    left_out: dict[str, list[str]] = {}
    for budget in budgets:
        entered = [Runner(spec, budget, quick, data, folder) for spec in methods]
        runners[budget] = [runner for runner in entered if runner.fits()]
        left_out[budget] = [runner.label for runner in entered if runner not in runners[budget]]
        paths = [runner.path() for runner in entered]
        twice = next((r.label for i, r in enumerate(entered) if r.path() in paths[:i]), None)
        if twice is not None:
            raise ValueError(f"two methods of the race have the same name in files: leave out {twice}")
        if not runners[budget]:
            raise ValueError(f"no method of the race fits into a budget of {budget}: give a larger one")
    return Course(reference, runners, left_out)


def probe(planned: Course, tick: Callable[[float], Any] = lambda epochs: None) -> Probe:
    """Trains what was planned, or goes on with it, and says what it found.

    Args:
        planned: what to do.
        tick: is told how many epochs have been trained since it was last called.
    """
    reference, last = planned.reference, ROUNDS[-1].evaluations
    config, data = reference.config, reference.data
    reference.run(last)
    tick(reference.epochs(last))
    worth = worth_of_tables(reference)
    races = [race(runners, reference, runners[0].budget_bytes, tick) for runners in planned.runners.values()]
    return Probe(
        data=sha256(data.path / "manifest.json"),
        model=config.model.name,
        monitor=config.training.monitor,
        reference=abs(reference.score(last)),
        reference_epochs=reference.epochs(last),
        regularization=config.tables.regularization,
        tables=worth,
        how=dict.fromkeys(worth, "ablation"),
        races=tuple(races),
    )


# The rows on which tables are told apart: their number falls where there are many tables.
_MOST_ROWS, _ROWS_TIMES_TABLES = 50_000, 4_000_000


def worth_of_tables(reference: Runner) -> dict[str, float]:
    """How much of the monitor is lost where all ids of a table have the mean of its trained vectors, by its name.

    The mean counts each id as often as it occurs in training. More is better for all monitors: of the log loss it is
    how much it rises. The best model so far is taken, and validation rows.
    """
    model, data, config = reference.served(), selected(reference.config, reference.data), reference.config
    tables = model.embeddings
    assert isinstance(tables, EmbeddingTables)
    names = [table.name for table in tables.plan.tables]
    most = max(2 * config.training.evaluation_batch_size, min(_MOST_ROWS, _ROWS_TIMES_TABLES // len(names)))
    whole = _monitored(model, data, config, most)
    worth = {}
    for name in names:
        rows = tables.store.slab(name)
        kept = rows.clone()
        counts = torch.from_numpy(np.maximum(data.frequencies[name], 0)).double()[: len(rows)]
        counts = torch.nn.functional.pad(counts, (0, len(rows) - len(counts)))
        mean = (counts @ rows.double()) / max(1.0, float(counts.sum()))
        with torch.no_grad():
            rows.copy_(mean.to(rows))
            worth[name] = whole - _monitored(model, data, config, most)
            rows.copy_(kept)
    return worth


def _monitored(model: nn.Module, data: PreparedDataset, config: RunConfig, most: int) -> float:
    training = config.training
    scored = score(model, data, "valid", training.evaluation_batch_size, torch.device("cpu"), most)
    measured = {f"valid_{name}": value for name, value in main_metrics(scored).items()}
    return value_of(measured, training.monitor)
