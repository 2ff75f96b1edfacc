"""What tables are worth on a data set, and which methods do best within a budget: ``embtables probe``."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from embtables._util.files import sha256
from embtables._util.lock import locked
from embtables.datasets import PreparedDataset
from embtables.methods import from_config
from embtables.plan.probe import MethodSpec, Probe, as_worth
from embtables.sweeps.racing import FAMILIES, ROUNDS, Runner, in_a_race, race, trained
from embtables.tables import EmbeddingTables
from embtables.training.config import RunConfig, with_fields
from embtables.training.evaluation import main_metrics, score
from embtables.training.learning_curve import value_of
from embtables.training.planning import plan_tables, selected

#: Strengths of regularization, of which full tables choose one where none is given. What was best for whole trainings
#: on four data sets is among them. None at all is not: it is ahead in short trainings even where it ends behind.
REGULARIZATIONS = (0.03, 0.1, 0.3)
# After so many evaluations they choose.
_TO_CHOOSE = 4
# The biggest tables, of more than such a share of all bytes, are left out of a training each; so many evaluations show
# what that costs.
_MOST_BIG, _BIG, _WITHOUT = 2, 0.05, 3


class Course(NamedTuple):
    """What a probe will do, before it does anything."""

    references: list[Runner]  # full tables, for each strength of regularization
    without: dict[str, Runner]  # by big table: all others in full
    runners: dict[str, list[Runner]]  # by budget
    left_out: dict[str, list[str]]  # by budget, methods that do not fit into it

    @property
    def trainings(self) -> int:
        """How many models are trained, where no two methods are so close that they are trained twice."""
        return len(self.references) + len(self.without) + sum(map(len, self.runners.values()))

    @property
    def epochs(self) -> float:
        """How many epochs that takes."""
        choosing = (len(self.references) - 1) * _TO_CHOOSE
        races = sum(trained(len(runners)) for runners in self.runners.values())
        return self.references[0].epochs(choosing + ROUNDS[-1].evaluations + len(self.without) * _WITHOUT + races)


def course(
    data: PreparedDataset,
    config: RunConfig,
    budgets: Sequence[str],
    folder: Path,
    methods: Sequence[MethodSpec] = FAMILIES,
    regularizations: Sequence[float] | None = None,
) -> Course:
    """Which trainings a probe consists of.

    Args:
        data: the prepared data.
        config: of the training; its method, budget and precision do not matter.
        budgets: as ``embtables sweep`` takes them.
        folder: where the trainings are.
        methods: those that race within each budget.
        regularizations: strengths of mini-batch-aware L2 to choose from; by default that of ``config``, or where it
            regularizes nothing, ``REGULARIZATIONS``.

    Raises:
        ValueError: no method fits into a budget, or one cannot be trained so.
    """
    quick = in_a_race(config, data)
    if regularizations is None:
        own = quick.tables.regularization
        regularizations = (own,) if own or quick.tables.l2 else REGULARIZATIONS
    references = [
        Runner("full", "", with_fields(quick, {"tables.regularization": strength}), data, folder)
        for strength in dict.fromkeys(regularizations)
    ]
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
    return Course(references, _without_big(references[0]), runners, left_out)


def _without_big(reference: Runner) -> dict[str, Runner]:
    """By each of the biggest tables, what is trained without it."""
    tables = plan_tables(reference.cell(0), selected(reference.config, reference.data)).lines()
    sizes = {line["table"]: line["inference_bytes"] for line in tables}
    big = [name for name in sorted(sizes, key=lambda name: -sizes[name]) if sizes[name] > _BIG * sum(sizes.values())]
    return {
        name: replace(reference, spec={glob.escape(name): "drop_feature", "*": "full"})
        for name in big[:_MOST_BIG]
        if len(sizes) > 1
    }


def probe(planned: Course, tick: Callable[[float], Any] = lambda epochs: None) -> Probe:
    """Trains what was planned, or goes on with it, and says what it found.

    Args:
        planned: what to do.
        tick: is told how many epochs have been trained since it was last called.
    """
    folder = planned.references[0].folder
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        return _probe(planned, tick)


def _probe(planned: Course, tick: Callable[[float], Any]) -> Probe:
    reference = _best(planned.references, tick)
    config, data = reference.config, reference.data
    worth = worth_of_tables(reference)
    for name, runner in planned.without.items():
        without = replace(runner, config=config)
        tick(without.run(_WITHOUT))
        worth[name] = reference.score(_WITHOUT) - without.score(_WITHOUT)
    last = ROUNDS[-1].evaluations
    races = [
        race(
            [replace(runner, config=config, spec=_knowing(runner.spec, as_worth(worth))) for runner in runners],
            reference,
            runners[0].budget_bytes,
            tick,
        )
        for runners in planned.runners.values()
    ]
    return Probe(
        data=sha256(data.path / "manifest.json"),
        model=config.model.name,
        monitor=config.training.monitor,
        reference=abs(reference.score(last)),
        reference_epochs=reference.trained(last),
        regularization=config.tables.regularization,
        tables=worth,
        how={name: "retraining" if name in planned.without else "ablation" for name in worth},
        races=tuple(races),
    )


def _knowing(spec: MethodSpec, worth: Mapping[str, float]) -> MethodSpec:
    """The method, or pattern → method, told what tables are worth where it takes that and has not been told."""
    if isinstance(spec, dict) and "kind" not in spec:
        return {pattern: _knowing(part, worth) for pattern, part in spec.items()}
    if getattr(from_config(spec), "worth", ...) is not None:
        return spec
    return {**({"kind": spec} if isinstance(spec, str) else spec), "worth": dict(worth)}


def _best(references: Sequence[Runner], tick: Callable[[float], Any]) -> Runner:
    """The one that is ahead after a while, trained as far as races go."""
    best, *others = references
    for evaluations in (1, 2):  # soon, as they show how long all will take
        tick(best.run(evaluations))
    if others:
        for reference in references:
            tick(reference.run(_TO_CHOOSE))
        best = max(references, key=lambda reference: reference.score(_TO_CHOOSE))
    tick(best.run(ROUNDS[-1].evaluations))
    return best


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
