"""From data and a budget to a recommendation: a probe, the trainings that it calls for, and what to take of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embtables.methods import method_label
from embtables.plan.probe import MethodSpec, Probe
from embtables.sizes.memory import format_bytes
from embtables.sweeps.cells import with_baselines
from embtables.sweeps.config import SweepConfig, describe
from embtables.sweeps.summary import Point, Summary
from embtables.training.config import RunConfig

#: Methods beside the winner of the race that are trained to the end.
QUICK: tuple[MethodSpec, ...] = (
    "full",
    {"kind": "full", "precision": "int8"},
    {"kind": "full", "precision": "int4"},
    {"kind": "frequency_cutoff", "precision": "int4"},
)


def sweep_for(
    data: Path, found: Probe, config: RunConfig, budgets: Sequence[str], seeds: int, *, quick: bool
) -> SweepConfig:
    """The trainings that a probe calls for: its winners and runners-up, full tables and the baselines.

    Args:
        data: the prepared data.
        found: what the probe found, with a race for each budget.
        config: of the training.
        budgets: as texts, in the order of the races.
        seeds: how many times each is trained.
        quick: whether the winners alone are trained, beside full tables and a cut-off.
    """
    number = 1 if quick else 2
    raced = [entrant.method for race in found.races for entrant in race.entrants[:number]]
    methods = {method_label(spec): spec for spec in [*QUICK[:1], *raced, *QUICK[1:]]}
    return describe(data, methods if quick else with_baselines(methods), list(budgets), seeds, config)


@dataclass(frozen=True)
class Recommendation:
    """What to take within a budget: ``point`` of a sweep, of which ``full`` has the full tables."""

    budget: str
    point: Point
    full: Point
    runner_up: Point | None
    monitor: str

    @property
    def run(self) -> str:
        """The name of the cell of the first seed."""
        return str(self.point.rows.sort_values("seed")["cell"].iloc[0])

    def words(self) -> list[str]:
        """The recommendation, in sentences."""
        size, full_size = self.point.inference_bytes or 0, self.full.inference_bytes or 1
        auc, of_full = self.point.mean("test_auc"), self.full.mean("test_auc")
        lines = [
            f"Within {self.budget} take {self.point.method}: {format_bytes(size)} in place of "
            f"{format_bytes(full_size)} ({size / full_size:.2%}), test AUC {auc:.4f} against {of_full:.4f} of full "
            f"tables ({auc - of_full:+.4f})."
        ]
        if self.runner_up is not None:
            other = self.runner_up
            lines.append(
                f"Next on validation is {other.method}: {format_bytes(other.inference_bytes or 0)}, test AUC "
                f"{other.mean('test_auc'):.4f}."
            )
        if len(self.point.rows) < 2:
            lines.append("One training of each says nothing about luck: --seeds 3 does.")
        return lines


def recommendation(summary: Summary, budget: str, limit: int) -> Recommendation:
    """The best on validation of all that fits into ``limit`` bytes, baselines and full tables of low precision too.

    Raises:
        ValueError: nothing that fits has been trained.
    """
    monitor = summary.config.train.training.monitor
    sign = -1 if monitor == "logloss" else 1

    def valid(point: Point) -> float:
        return sign * point.mean(f"valid_{monitor}")

    full = summary.full
    fitting = [
        point
        for point in summary.points
        if point.num_ok and (point.inference_bytes or 0) <= limit and math.isfinite(valid(point))
    ]
    if full is None or not full.num_ok or not fitting:
        raise ValueError(f"nothing that fits into {budget} has been trained: see {summary.folder / 'results.csv'}")
    best, *others = sorted(fitting, key=valid, reverse=True)
    return Recommendation(budget, best, full, others[0] if others else None, monitor)
