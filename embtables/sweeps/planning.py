"""All plans of a sweep, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from embtables import InfeasibleBudget, Plan
from embtables.datasets import PreparedDataset
from embtables.methods import from_config
from embtables.plan.solver import by_pattern
from embtables.sweeps.cells import MethodSpec, grid
from embtables.training.config import RunConfig, TablesConfig, parse_value, with_fields
from embtables.training.planning import check_training, plan_tables, selected


def cell_config(train: RunConfig, spec: MethodSpec, budget: str, seed: int) -> RunConfig:
    """`train` with a cell's method, budget (empty: none) and seed, as ``embtables train`` reads them."""
    tables = {"method": spec, "budget": parse_value(budget, "budget") if budget else None}
    return train.model_copy(
        update={
            "tables": TablesConfig(**{**train.tables.model_dump(), **tables}),
            "training": train.training.model_copy(update={"seed": seed}),
        }
    )


def plan_points(
    dataset: PreparedDataset,
    train: RunConfig,
    methods: Mapping[str, MethodSpec],
    points: Sequence[tuple[str, str]],
    tune: Mapping[str, Sequence[Any]] | None = None,
) -> dict[tuple[str, str], dict[str, Any]]:
    """Bytes of every (method, budget) under `train`, or its floor where it is infeasible.

    Raises:
        ValueError: an unknown method or field, a budget that cannot be read, a method that cannot be trained so, with
            the values of `tune` neither.
    """
    tune = tune or {}
    tuned = dict(zip(grid(tune), (with_fields(train, dict(zip(tune, each))) for each in product(*tune.values()))))
    for spec in methods.values():
        for part in by_pattern(spec).values():
            from_config(part)
    dataset = selected(train, dataset)
    planned: dict[tuple[str, str], dict[str, Any]] = {}
    for label, budget in points:
        try:
            solved = plan_tables(cell_config(train, methods[label], budget, seed=0), dataset)
            _check_tuned(tuned, dataset, solved)
        except InfeasibleBudget as error:
            planned[label, budget] = {"floor_bytes": error.floor_bytes, "message": str(error)}
        except ValueError as error:
            raise ValueError(f"{label} at {budget or 'no budget'}: {error}") from None
        else:
            full = solved.full_bytes
            planned[label, budget] = {
                "inference_bytes": solved.inference_bytes,
                "training_bytes": solved.training_bytes,
                "full_bytes": full,
                "ratio": solved.inference_bytes / full if full else None,
                "trains": solved.training_fingerprint.hex(),
            }
    return planned


def _check_tuned(tuned: Mapping[str, RunConfig], dataset: PreparedDataset, solved: Plan) -> None:
    """``ValueError`` where what is planned cannot be trained with some entry of a grid, none of which changes it."""
    for values, config in tuned.items():
        try:
            check_training(config, dataset, solved)
        except ValueError as error:
            raise ValueError(f"--tune {values}: {error}") from None
