"""What validation decides in a sweep: the tuned values of each method, and which methods get every seed.

The run and the report ask the same functions. A value is what :func:`embtables.training.learning_curve.value_of` makes
of a finished cell, so that more is better; ``None`` stands for a cell that failed or is infeasible; a cell that is not
done is missing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from math import inf

from embtables.sweeps.cells import Cell, Place, grid, is_baseline
from embtables.sweeps.config import SweepConfig


def tuned_at(config: SweepConfig, infeasible: Collection[Place], place: Place) -> Place | None:
    """Where the values of `place` are chosen: there, or at ``tune_at``, or at the method's first feasible budget.

    ``None`` where the method is feasible nowhere.
    """
    variant, method, budget = place
    tried = [budget] if config.tune_at is None or not budget else [config.tune_at, *config.budgets]
    places = ((variant, method, each) for each in tried)
    return next((each for each in places if each not in infeasible), None)


def tuning_cells(config: SweepConfig, infeasible: Collection[Place]) -> list[Cell]:
    """The grid with the first seed, at every place where values are chosen; none without a grid."""
    places = dict.fromkeys(tuned_at(config, infeasible, place) for place in config.points)
    return config.cells([0], grid(config.tune), [place for place in places if place is not None])


def chosen(config: SweepConfig, infeasible: Collection[Place], values: Mapping[Cell, float | None]) -> dict[Place, str]:
    """The entry of the grid with the best value, of every place whose grid is done; the first where all failed."""
    found: dict[Place, str] = {}
    for place in config.points:
        home = tuned_at(config, infeasible, place)
        cells = [] if home is None else config.cells([0], grid(config.tune), [home])
        if cells and all(cell in values for cell in cells):
            found[place] = max(cells, key=lambda cell: _or_worst(values[cell])).tuned
    return found


def finalists(config: SweepConfig, values: Mapping[Place, float | None]) -> set[Place]:
    """The places that get every seed: all of them, or the baselines and the best of each variant and budget.

    Args:
        config: its ``best`` says how many of each variant and budget, baselines not counted.
        values: those of the first seed. While one is missing of a variant and budget, nothing is decided there.
    """
    found = set(_always(config, config.points))
    for group in _contenders(config, config.points, values):
        if all(place in values for place in group):
            found.update(sorted(group, key=lambda place: -_or_worst(values[place]))[: config.best])
    return found


def num_finalists(config: SweepConfig, places: Iterable[Place], values: Mapping[Place, float | None]) -> int:
    """How many of `places` get every seed in the end, as far as it is known which of them fail."""
    places = list(places)
    groups = _contenders(config, places, values)
    return len(_always(config, places)) + sum(len(group[: config.best]) for group in groups)


def _always(config: SweepConfig, places: Iterable[Place]) -> list[Place]:
    return [place for place in places if config.best is None or is_baseline(place[1])]


def _contenders(
    config: SweepConfig, places: Iterable[Place], values: Mapping[Place, float | None]
) -> list[list[Place]]:
    """By variant and budget, the places whose value decides, without those that are known to have none."""
    groups: dict[tuple[str, str], list[Place]] = {}
    always = set(_always(config, config.points))
    for place in places:
        if place not in always and values.get(place, -inf) is not None:
            groups.setdefault((place[0], place[2]), []).append(place)
    return list(groups.values())


def _or_worst(value: float | None) -> float:
    return -inf if value is None else value
