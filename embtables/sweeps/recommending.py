"""From data and a budget to a recommendation: a probe, the trainings that it calls for, and what to take of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embtables.datasets import PreparedDataset
from embtables.methods import method_label
from embtables.plan.probe import MethodSpec, Probe
from embtables.sizes.memory import format_bytes
from embtables.sweeps.cells import FULL, takes_budget, with_baselines
from embtables.sweeps.config import SweepConfig, describe, read_config
from embtables.sweeps.summary import Point, Summary
from embtables.training.config import RunConfig, with_fields
from embtables.training.learning_curve import MONITOR_LABELS

#: Methods beside the winner of the race that are trained to the end.
BESIDE: tuple[MethodSpec, ...] = (*FULL, {"kind": "frequency_cutoff", "precision": "int4"})
#: ``--quick`` trains on no more examples than this.
QUICK_EXAMPLES = 1_000_000


def quickly(config: RunConfig, data: PreparedDataset) -> RunConfig:
    """The same training, of no more than ``QUICK_EXAMPLES``."""
    epochs = float(f"{QUICK_EXAMPLES / max(1, data.num_rows('train')):.4g}")
    return with_fields(config, {"training.epochs": min(config.training.epochs, epochs)})


def strengths_after(found: Probe, tried: Sequence[float], *, thorough: bool) -> list[float]:
    """The strengths of regularization that are worth a whole training.

    Short trainings favor weak ones: that which the probe chose of those it ``tried``, and the next stronger one.
    """
    stronger = sorted(strength for strength in tried if strength > found.regularization)
    return sorted(tried) if thorough else [found.regularization, *stronger[:1]]


def most_trainings(budgets: int, seeds: int, strengths: int, *, thorough: bool) -> int:
    """How many trainings :func:`sweep_for` calls for at most; fewer where one method wins within several budgets."""
    beside = sum(map(takes_budget, _with_beside({}, thorough=thorough).values()))
    return (1 + budgets * (budgets * _raced(thorough) + beside)) * (strengths + seeds - 1)


def _raced(thorough: bool) -> int:
    """How many of each race are trained."""
    return 2 if thorough else 1


def _with_beside(methods: dict[str, MethodSpec], *, thorough: bool) -> dict[str, MethodSpec]:
    """These methods and what is trained beside them, full tables first."""
    full, *others = BESIDE
    found = {method_label(spec): spec for spec in [full, *methods.values(), *others]}
    return with_baselines(found) if thorough else found


def sweep_for(
    data: Path,
    found: Probe,
    config: RunConfig,
    budgets: Sequence[str],
    seeds: int,
    strengths: Sequence[float],
    *,
    thorough: bool,
    preset: str | None = None,
) -> SweepConfig:
    """The trainings that a probe calls for: its winners and runners-up, full tables and the baselines.

    Args:
        data: the prepared data.
        found: what the probe found, with a race for each budget.
        config: of the training.
        budgets: as texts, in the order of the races.
        seeds: how many times each is trained.
        strengths: of regularization; each method has the one that is best on validation.
        thorough: whether runners-up are trained too, and all baselines.
        preset: that of ``config``.

    Raises:
        ValueError: ``config`` holds what each of these trainings has of its own, such as the method.
    """
    raced = [entrant.method for race in found.races for entrant in race.entrants[: _raced(thorough)]]
    methods = _with_beside({method_label(spec): spec for spec in raced}, thorough=thorough)
    first, *others = strengths
    config = with_fields(config, {"tables.regularization": first})
    tune = {"tables.regularization": [first, *others]} if others else None
    return describe(data, methods, list(budgets), seeds, config, tune=tune, preset=preset)


def check_before(
    data: Path, config: RunConfig, budgets: Sequence[str], seeds: int, preset: str | None, sweep: Path
) -> None:
    """``ValueError`` where the trainings after a probe would be refused, or are not those that ``sweep`` holds."""
    asked = describe(data, _with_beside({}, thorough=False), list(budgets), seeds, config, preset=preset)
    if not (sweep / "sweep.yaml").exists():
        return
    before = read_config(sweep)
    for name in ("manifest_sha256", "budgets", "seeds"):
        old, new = getattr(before, name), getattr(asked, name)
        if old != new:
            raise ValueError(
                f"{sweep} was made with other {'data' if name == 'manifest_sha256' else name}: {old} there, {new} now; "
                "give the same again to go on with it, or another --out"
            )


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
            column, monitor = f"valid_{self.monitor}", MONITOR_LABELS[self.monitor]
            lines.append(
                f"Next on validation ({monitor} {other.mean(column):.4f} after {self.point.mean(column):.4f}) is "
                f"{other.method}: {format_bytes(other.inference_bytes or 0)}, test AUC {other.mean('test_auc'):.4f}."
            )
        if not self.full.mean("test_normalized_entropy") < 1:
            lines.append(
                "Full tables predict no better than the click rate does, so none of this says anything: train longer, "
                "or find out what is wrong, such as --set tables.learning_rate=…."
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
    if not fitting:
        raise ValueError(f"nothing that fits into {budget} has been trained: see results.csv")
    if full is None or not full.num_ok:
        raise ValueError(f"full tables, with which what fits into {budget} is compared, have no result yet")
    best, *others = sorted(fitting, key=valid, reverse=True)
    return Recommendation(budget, best, full, others[0] if others else None, monitor)
