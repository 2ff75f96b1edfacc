"""The plan of a run: its configuration and prepared data, solved."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from embtables._util.files import sha256
from embtables.datasets import PreparedDataset
from embtables.methods import from_config, method_label
from embtables.optimizers import FusedOptimizer, averaged, optimizer_from_config
from embtables.plan.auto import told
from embtables.plan.probe import FILE, Probe
from embtables.plan.solver import Plan, by_pattern, plan
from embtables.sizes.budget import InfeasibleBudget
from embtables.tables.rounding import rounded_slabs
from embtables.training.config import RunConfig, TablesConfig
from embtables.training.loggers import loggers_named

# CTR models over-fit within a few epochs and early stop ends them there (Zhang et al., "Towards Understanding the
# Overfitting Phenomenon of Deep Click-Through Rate Prediction Models", CIKM 2022): schedules span at most these.
_SCHEDULED_EPOCHS = 3

_COMPARED = (
    "model.hyperparameters",
    "tables.precision",
    "tables.training_precision",
    "tables.embedding_dim",
    "tables.optimizer",
    "tables.l2",
    "tables.regularization",
    "dense.optimizer",
    "dense.learning_rate",
    "dense.weight_decay",
    "training.batch_size",
    "training.epochs",
    "training.average",
    "training.quantize_from",
)

__all__ = [
    "check_training",
    "fused_optimizer",
    "horizon_of",
    "hyperparameters",
    "labels",
    "last_step",
    "method_for",
    "method_label",
    "plan_tables",
    "probe_for",
    "quantization_step",
    "selected",
    "steps_per_epoch",
    "told_of_choice",
]


def selected(config: RunConfig, data: PreparedDataset) -> PreparedDataset:
    """The data as the run reads it: without what ``data.leave_out`` names, with histories of ``data.max_history``.

    Raises:
        ValueError: ``leave_out`` names something that the data does not have, or the data was opened with a selection
            of its own, of which the folder of the run would not know.
    """
    found = data.select(config.data.leave_out, config.data.max_history)
    if (set(found.leave_out), found.max_history) != (set(config.data.leave_out), config.data.max_history):
        raise ValueError(
            f"{data.path} was opened with leave_out={data.leave_out} and max_history={data.max_history}: open it whole "
            "and set data.leave_out and data.max_history in the configuration"
        )
    return found


def steps_per_epoch(config: RunConfig, data: PreparedDataset) -> int:
    return math.ceil(data.num_rows("train") / config.training.batch_size)


def fused_optimizer(tables: TablesConfig, horizon: int | None = None) -> FusedOptimizer | None:
    """The fused optimizer of the tables; ``None`` where they are ordinary parameters.

    ``horizon``: of the running mean that it keeps, in steps; ``None``: it keeps none.
    """
    if not tables.fused:
        return None
    fields = {"kind": tables.optimizer} if isinstance(tables.optimizer, str) else tables.optimizer
    optimizer = optimizer_from_config({**fields, "lr": tables.learning_rate, "l2": tables.l2})
    return optimizer if optimizer is None or horizon is None else averaged(optimizer, horizon)


def horizon_of(config: RunConfig, data: PreparedDataset) -> int | None:
    """The horizon of the running mean of all weights, in steps; ``None`` where there is none."""
    average = config.training.average
    return None if average is None else max(1, round(average * steps_per_epoch(config, data)))


def last_step(config: RunConfig, data: PreparedDataset) -> int:
    """How many steps a training that nothing stops consists of."""
    return math.ceil(Fraction(str(config.training.epochs)) * steps_per_epoch(config, data))


def quantization_step(config: RunConfig, data: PreparedDataset, solved: Plan) -> int | None:
    """How many steps are done when training begins to round rows as they are served; ``None`` where it never does.

    Raises:
        ValueError: for a method whose rows cannot be rounded.
    """
    begin = config.training.quantize_from
    if begin is None or not rounded_slabs(solved):
        return None
    return int(Fraction(str(begin)) * steps_per_epoch(config, data))


def method_for(config: RunConfig, num_steps: int) -> Any:
    """The configured method, or pattern → method, settled for a training of ``num_steps``.

    Raises:
        ValueError: an unknown method, or an unknown field of one.
    """
    method = config.tables.method
    if isinstance(method, dict) and "kind" not in method:
        return {pattern: from_config(spec).for_training(num_steps) for pattern, spec in method.items()}
    return from_config(method).for_training(num_steps)


def plan_tables(config: RunConfig, data: PreparedDataset, *, any_model: bool = False) -> Plan:
    """The plan that a run of ``config`` on ``data`` builds: one table a feature, split by its training frequencies.

    ``data`` is what :func:`selected` gives. ``any_model``: whether a probe counts that was made with another model.

    Raises:
        InfeasibleBudget: with the floor.
        ValueError: naming the field, table or method that is wrong.
    """
    tables = config.tables
    hash_seed = config.training.seed if tables.hash_seed is None else tables.hash_seed
    solved = plan(
        data.table_configs(tables.embedding_dim),
        method_for(config, min(last_step(config, data), _SCHEDULED_EPOCHS * steps_per_epoch(config, data))),
        tables.budget,
        data.frequencies,
        fused_optimizer(tables, horizon_of(config, data)),
        tables.training_budget,
        hash_seed=hash_seed,
        precision=tables.precision,
        training_precision=tables.training_precision,
        probe=probe_for(config, data, any_model=any_model),
    )
    check_training(config, data, solved)
    return solved


def probe_for(config: RunConfig, data: PreparedDataset, *, any_model: bool = False) -> Probe | None:
    """The probe beside the data, where the method has use for one; ``None`` where there is none.

    Raises:
        ValueError: it was made with other data or another model, or is damaged.
    """
    path = data.path / FILE
    chosen = by_pattern(config.tables.method).values()
    if not any(from_config(spec).chooses for spec in chosen) or not path.exists():
        return None
    found = Probe.load(path)
    again = f"run `embtables probe {data.path} --model {config.model.name}` again, or remove it"
    if found.data != sha256(data.path / "manifest.json"):
        raise ValueError(f"{path} was made with other data than this: {again}")
    names = {table.name for table in data.table_configs(config.tables.embedding_dim)}
    if set(found.tables) != names:
        other = sorted(set(found.tables) ^ names)[0]
        raise ValueError(
            f"{path} was made {'with' if other in found.tables else 'without'} the table '{other}': {again}"
        )
    if found.model != config.model.name and not any_model:
        raise ValueError(f"{path} was made with model {found.model}, not {config.model.name}: {again}")
    return found


def told_of_choice(config: RunConfig, data: PreparedDataset) -> list[str]:
    """What ``auto`` chooses for a run and what is expected of it, in words; nothing where nothing is chosen.

    Raises:
        ValueError: as ``plan_tables``.
    """
    if not any(from_config(spec).chooses for spec in by_pattern(config.tables.method).values()):
        return []
    selection = selected(config, data)
    try:
        lines = told(plan_tables(config, selection).explain())
    except InfeasibleBudget:
        return []
    found = probe_for(config, selection)
    if found is not None and found.regularization != config.tables.regularization:
        lines.append(
            f"Note: the probe was made with tables.regularization={found.regularization:g}, and this training has "
            f"{config.tables.regularization:g}: what is expected may not hold."
        )
    return lines


def check_training(config: RunConfig, data: PreparedDataset, solved: Plan) -> None:
    """``ValueError`` where what is planned cannot be trained as ``config`` says, so that no training begins in vain."""
    fused_optimizer(config.tables, horizon_of(config, data))
    quantization_step(config, data, solved)
    loggers_named(config.training.log_to)


def labels(config: RunConfig, data: PreparedDataset) -> dict[str, Any]:
    """The coordinates of a run among others."""
    return {
        "dataset": data.name,
        "model": config.model.name,
        "method": method_label(config.tables.method),
        "budget": config.tables.budget,
        "seed": config.training.seed,
        "learning_rate": config.tables.learning_rate,
    }


def hyperparameters(config: RunConfig, data: PreparedDataset) -> dict[str, Any]:
    """The coordinates of a run, and the fields by which runs are compared; ``None`` where one is not used."""
    fields = config.flat()
    # A share and a number of bytes are of one column.
    budget = "" if config.tables.budget is None else str(config.tables.budget)
    return {**labels(config, data), "budget": budget, **{name: fields[name] for name in _COMPARED}}
