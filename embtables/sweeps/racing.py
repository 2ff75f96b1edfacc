"""Races: methods within one budget, trained side by side for a while; those that are behind drop out.

Successive halving (Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
AISTATS 2016): all are trained for a few epochs, the better half goes on, until one is left. Who is better is told by
where the curves lead: a damped trend (Gardner and McKenzie, "Forecasting Trends in Time Series", Management Science 31,
1985), since methods that share rows among ids rise longer than others. Each is a run of its own, which pauses between
the rounds, so that a race that is stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from torch import nn

from embtables._util.files import write_json
from embtables._util.reading import read_json
from embtables.datasets import PreparedDataset
from embtables.methods import from_config, method_label
from embtables.models import find_model
from embtables.models.registry import is_built_in
from embtables.plan.probe import Entrant, MethodSpec, Race
from embtables.plan.solver import by_pattern
from embtables.sizes.budget import InfeasibleBudget
from embtables.sweeps.cells import file_name, in_precisions, kind_of, parse_methods, takes_budget
from embtables.sweeps.planning import cell_config
from embtables.tables import EmbeddingTables
from embtables.training import Trainer
from embtables.training.config import RunConfig, with_fields
from embtables.training.evaluation import lookup_latency_us
from embtables.training.export import load_served
from embtables.training.learning_curve import Row, read_curve, value_of
from embtables.training.outcome import CHECKPOINT
from embtables.training.planning import plan_tables, selected, steps_per_epoch

#: One method of each family that comes first somewhere; which one does depends on data, model and budget.
FAMILIES: tuple[MethodSpec, ...] = (
    {"kind": "banded", "precision": "int8"},
    {"kind": "mixed_dimension", "precision": "int4"},
    {"kind": "compositional", "precision": "int4"},
    {"kind": "unified", "precision": "int4"},
    {"kind": "robe", "precision": "int4"},
    {"kind": "low_rank", "precision": "int4"},
)

#: Batches of a race are so many times smaller: what takes several epochs of large steps shows in the first.
SMALLER_BATCHES = 4
# Over so many evaluations gains are compared: over one alone they are noise.
_STEP = 2
# Two methods whose promises differ by less are trained with a second seed.
_CLOSE = 0.003
# Scores that differ by no more may be the same. Means of two seeds that differ by more are never a tie, however far the
# seeds are apart: they are the best guess there is.
_TIE = 0.001
# Sizes that differ by less, as a factor, are the same.
_SAME_SIZE = 1.02


class Round(NamedTuple):
    """All who are left are trained to so many evaluations, counted from the start.

    ``keep`` of them go on, and with the last of these all that are as good as it.
    """

    evaluations: int
    keep: int


#: The rounds of a race.
ROUNDS = (Round(3, 3), Round(7, 2), Round(8, 1))
# Between evaluations lies such a part of a full training that the whole probe of one budget takes no more than all of
# these: six methods have 6·3 + 3·4 + 2·1 evaluations; full tables, with three strengths of regularization, 3·4 and
# with the best of these 4 more; two trainings without a big table have 2·3.
_PARTS = 54


def entered(text: str | None) -> list[MethodSpec]:
    """The methods that race: those of a text as ``embtables sweep`` takes it, or by default one of each family.

    ``all`` are these and, with rows of four bits, every other method that a budget can bound.

    Raises:
        ValueError: as ``parse_methods``, or ``auto`` is among them.
    """
    if text is None:
        return list(FAMILIES)
    if text.strip() == "all":
        others = in_precisions(parse_methods(text), "int4").values()
        families = {kind_of(spec) for spec in FAMILIES}
        return [*FAMILIES, *(spec for spec in others if takes_budget(spec) and kind_of(spec) not in families)]
    found = list(parse_methods(text).values())
    if any(from_config(part).chooses for spec in found for part in by_pattern(spec).values()):
        raise ValueError("auto chooses by what a probe finds, and takes no part in it: leave it out of --methods")
    return found


def in_a_race(config: RunConfig, data: PreparedDataset) -> RunConfig:
    """How a run is trained in a race: in smaller batches, with many evaluations, and without an early stop.

    Its checkpoint stays, with the best model so far: of data of a few steps a race may reach the end. It is logged in
    its own folder alone.
    """
    size = max(1, config.training.batch_size // SMALLER_BATCHES)
    until_the_end = dict.fromkeys(("training.patience", "training.plateau_factor", "training.quantize_from"))
    of_a_race = {"training.batch_size": size, "training.keep_checkpoint": True, "training.log_to": []}
    quick = with_fields(config, {**of_a_race, **until_the_end})
    evaluations = min(float(steps_per_epoch(quick, data)), _PARTS / config.training.epochs)
    return with_fields(quick, {"training.evaluations_per_epoch": evaluations})


@dataclass
class Runner:
    """A method in a race: a run for each seed, and the evaluations that each has had so far."""

    spec: MethodSpec
    budget: str
    config: RunConfig
    data: PreparedDataset
    folder: Path
    inference_bytes: int = 0
    budget_bytes: int = 0
    curves: dict[int, list[Row]] = field(default_factory=dict, init=False)
    reached: dict[int, int] = field(default_factory=dict, init=False)

    @property
    def label(self) -> str:
        return method_label(self.spec)

    def cell(self, seed: int) -> RunConfig:
        return cell_config(self.config, self.spec, self.budget, seed)

    def path(self, seed: int = 0) -> Path:
        strength = f"regularization={self.config.tables.regularization:g}"
        # Names of tables may differ in what a file's name cannot hold.
        patterns = isinstance(self.spec, dict) and "kind" not in self.spec
        digest = hashlib.sha256(json.dumps(self.spec).encode()).hexdigest()[:8] if patterns else ""
        return self.folder / file_name(self.label, digest, self.budget.replace("%", "pct"), f"s{seed}", strength)

    def fits(self) -> bool:
        """Whether its tables fit into the budget; how many bytes both have is kept."""
        try:
            solved = plan_tables(self.cell(0), selected(self.config, self.data))
        except InfeasibleBudget:
            return False
        self.inference_bytes, self.budget_bytes = solved.inference_bytes, solved.budget_bytes or 0
        return True

    def epochs(self, evaluations: float) -> float:
        """The epochs after which so many evaluations have been made."""
        return evaluations / self.config.training.evaluations_per_epoch

    def run(self, evaluations: int, seed: int = 0) -> float:
        """Trains on, to so many evaluations in all; returns by how many epochs that is further than before."""
        before = self.reached.get(seed, 0)
        Trainer(self.cell(seed), self.data, self.path(seed)).run_until(self.epochs(evaluations - 0.5))
        self.curves[seed] = read_curve(self.path(seed) / "validation.csv")
        self.reached[seed] = max(before, evaluations)
        return self.epochs(self.reached[seed] - before)

    def trained(self, evaluations: int) -> float:
        """The epochs that so many evaluations took; fewer where the training ended before."""
        return float(self.curves[0][:evaluations][-1]["epoch"])

    def score(self, evaluations: int, seed: int = 0) -> float:
        """The best of so many evaluations; more is better."""
        monitor = self.config.training.monitor
        return max(value_of(row, monitor) for row in self.curves[seed][:evaluations])

    def promise(self, evaluations: int, seed: int = 0) -> float:
        """The score to be expected after half as many evaluations again; of fewer than five it is the score itself.

        A damped trend: what two evaluations gained shrinks by the factor by which it shrank before, and never grows. A
        gain that follows upon none may be noise, and promises nothing.
        """
        now = self.score(evaluations, seed)
        if evaluations < 2 * _STEP + 1:
            return now
        before, earlier = (self.score(evaluations - back * _STEP, seed) for back in (1, 2))
        gain, last_gain = now - before, before - earlier
        damping = min(1.0, gain / last_gain) if last_gain > 0 else 0.0
        return now + sum(gain * damping**k for k in range(1, round(evaluations / 2 / _STEP) + 1))

    def best(self) -> Path:
        """The folder of the best model so far, of the first seed, as it would be served."""
        return max((self.path() / CHECKPOINT).glob("best-*"), key=lambda path: path.stat().st_mtime)

    def served(self) -> nn.Module:
        """The best model so far. A class of the user's own is that of the configuration, whatever its folder names."""
        name = self.config.model.name
        return load_served(self.best(), model=None if is_built_in(name) else find_model(name))

    def lookup_us(self) -> float:
        """Microseconds of a lookup of one batch in the tables of the best model so far, measured once."""
        measured = self.path() / "lookup.json"
        if measured.exists() and isinstance(before := read_json(measured), float):
            return before
        tables = self.served().embeddings
        assert isinstance(tables, EmbeddingTables)
        data = selected(self.config, self.data)
        found = lookup_latency_us(tables, next(data.batches("valid", self.config.training.batch_size)))
        write_json(measured, found)
        return found

    def promises(self, evaluations: int) -> list[float]:
        """Those of all seeds."""
        return [self.promise(evaluations, seed) for seed in self.curves]


def race(
    runners: Sequence[Runner],
    reference: Runner,
    budget_bytes: int,
    tick: Callable[[float], Any],
    terms: Sequence[Round] = ROUNDS,
) -> Race:
    """Lets methods that fit into a budget run against each other.

    Args:
        runners: the methods.
        reference: full tables, which have run as far as the last round goes.
        budget_bytes: what the tables of all runners fit into.
        tick: is told how many epochs have been trained since it was last called.
        terms: the rounds.
    """
    left = list(runners)
    out: list[Entrant] = []
    done = 0
    for evaluations, keep in terms:
        for runner in left:
            tick(runner.run(evaluations))
        done = evaluations
        left.sort(key=lambda runner: -runner.promise(evaluations))
        if keep == 1 and len(left) > 1:
            left = _decided(left, evaluations, tick)
        elif keep < len(left):
            last = left[keep - 1].promise(evaluations)
            keep = sum(last - runner.promise(evaluations) <= _TIE for runner in left)
        out = [_entrant(runner, reference, evaluations) for runner in left[keep:]] + out
        left = left[:keep]
    found = [_entrant(runner, reference, done) for runner in left] + out
    return Race(budget_bytes=budget_bytes, entrants=tuple(found))


def trained(number: int, terms: Sequence[Round] = ROUNDS) -> int:
    """How many evaluations a race of so many methods takes, where no two that are close decide who goes on."""
    total = done = 0
    for evaluations, keep in terms:
        total += number * (evaluations - done)
        number, done = min(number, keep), evaluations
    return total


def _decided(left: list[Runner], evaluations: int, tick: Callable[[float], Any]) -> list[Runner]:
    """The last ones in their order: those that are close run once more, with another seed.

    Where the means of two methods, of two seeds each, differ by no more than their standard error it is a tie, which
    goes to fewer bytes, or of about as many to faster lookups.
    """
    first, second, *others = left
    if first.promise(evaluations) - second.promise(evaluations) >= _CLOSE:
        return left
    for runner in (first, second):
        tick(runner.run(evaluations, seed=1))
    promises = [runner.promises(evaluations) for runner in (first, second)]
    means, ranges = list(map(mean, promises)), (max(each) - min(each) for each in promises)
    # Of two numbers the mean has a standard error of half their difference.
    error = math.hypot(*ranges) / 2
    costs: Sequence[float] = [-value for value in means]
    if abs(means[0] - means[1]) <= min(error, _TIE):
        costs = sizes = [runner.inference_bytes for runner in (first, second)]
        if max(sizes) <= _SAME_SIZE * min(sizes):
            costs = [runner.lookup_us() for runner in (first, second)]
    return [first, second, *others] if costs[0] <= costs[1] else [second, first, *others]


def _entrant(runner: Runner, reference: Runner, evaluations: int) -> Entrant:
    """What a race says of a method that ran so far.

    The loss is how far it promises to be behind full tables that were trained as long; it is as far off as that differs
    from what it was half the way before, or as seeds differ.
    """
    promises = runner.promises(evaluations)
    behind = reference.promise(evaluations) - mean(promises)
    half = max(1, evaluations // 2)
    before = reference.score(half) - runner.score(half)
    return Entrant(
        method=runner.spec,
        loss=behind,
        error=max(abs(behind - before) / 2, (max(promises) - min(promises)) / 2),
        valid=abs(mean(runner.score(evaluations, seed) for seed in runner.curves)),
        epochs=runner.trained(evaluations),
        seeds=len(promises),
    )
