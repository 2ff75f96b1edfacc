"""What a sweep is asked for: checked before anything is written, kept in sweep.yaml and read from there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from embtables._util.files import check_seal, sha256, unsealed
from embtables._util.reading import inside, read_yaml
from embtables.datasets import PreparedDataset
from embtables.models.registry import check_hyperparameters
from embtables.sweeps.cells import Cell, MethodSpec, Place, grid, points, same_budget, takes_budget, value_text
from embtables.sweeps.planning import cell_config
from embtables.training.config import RunConfig, load_config, with_fields

#: The entry of sweep.yaml with the checksum of test_labels.npy.
LABELS_CHECKSUM = "test_labels_sha256"
MOST_SEEDS = 100_000
MOST_COMBINATIONS = 1_000

# Fields that no grid can have: where every cell's own value comes from (which neither the training configuration nor a
# variant sets), and what another value would change.
OWN = {
    "tables.method": "--methods",
    "tables.budget": "--budgets",
    "tables.hash_seed": "--seeds",
    "training.seed": "--seeds",
}
_TABLES = ("embedding_dim", "precision", "training_precision", "training_budget", "optimizer", "fused")
_CHANGES = {
    **{f"tables.{name}": "the tables themselves" for name in (*_TABLES, "sparse_gradients")},
    "data.leave_out": "what is read",
    "data.max_history": "what is read",
    "model.name": "the model",
    "training.monitor": "what it is chosen by",
}


class SweepConfig(BaseModel):
    """What a sweep is asked for. Two starts in one directory must agree in every field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    dataset: str
    manifest_sha256: str
    methods: dict[str, MethodSpec]
    budgets: list[str]
    seeds: int = Field(ge=1)
    tune: dict[str, list[Any]] = {}
    tune_at: str | None = None
    best: int | None = Field(default=None, ge=1)
    train: RunConfig
    variants: dict[str, RunConfig] = {}

    def check(self) -> None:
        """Raises ``ValueError`` where fields do not go together, or have a form that no command line gives."""
        if self.seeds > MOST_SEEDS or not self.methods:
            raise ValueError(f"seeds must be at most {MOST_SEEDS:,}, and there must be methods")
        for label, spec in self.methods.items():
            if isinstance(spec, dict) and "kind" not in spec and not all(_is_method(part) for part in spec.values()):
                raise ValueError(f"methods.{label} is no method")
        combinations = math.prod(map(len, self.tune.values()))
        if not 0 < combinations <= MOST_COMBINATIONS:
            raise ValueError(f"--tune has {combinations:,} combinations of values: give 1 to {MOST_COMBINATIONS:,}")
        for field, values in self.tune.items():
            try:
                grid({field: values})
            except ValueError as error:
                raise ValueError(f"--tune {field}: {error}: leave it out") from None
        if self.tune_at is not None and not self.tune:
            raise ValueError("--tune-at says where a grid is tried: give the grid by --tune, or leave --tune-at out")
        if self.tune_at is not None and self.tune_at not in self.budgets:
            raise ValueError(f"--tune-at {self.tune_at} is not among --budgets ({', '.join(self.budgets) or 'none'})")
        if self.best is not None and self.seeds == 1:
            raise ValueError(f"--best {self.best} says who gets further seeds: give --seeds 2 or more, or leave it out")

    @property
    def trains(self) -> dict[str, RunConfig]:
        """The training configurations by variant; without variants the one, under an empty name."""
        return self.variants or {"": self.train}

    @property
    def points(self) -> list[Place]:
        return [(variant, *point) for variant in self.trains for point in points(self.methods, self.budgets)]

    def cells(
        self, seeds: Iterable[int], tuned: Sequence[str] = ("",), places: Sequence[Place] | None = None
    ) -> list[Cell]:
        """Those of `places`, or of all points: seed by seed, so that a sweep that is cut short has whole curves."""
        return [
            Cell(method, budget, seed, values, variant)
            for seed in seeds
            for variant, method, budget in (self.points if places is None else places)
            for values in tuned
        ]


def _is_method(spec: object) -> bool:
    return isinstance(spec, str) or (isinstance(spec, dict) and "kind" in spec)


def describe(
    data: Path,
    methods: dict[str, MethodSpec],
    budgets: list[str],
    seeds: int,
    train: RunConfig,
    variants: Mapping[str, RunConfig] | None = None,
    *,
    tune: Mapping[str, list[Any]] | None = None,
    tune_at: str | None = None,
    best: int | None = None,
    preset: str | None = None,
    precisions: bool = False,
) -> SweepConfig:
    """The configuration of a sweep over the prepared data at `data`, once for each of `variants` where there are any.

    Args:
        data: a folder made by ``embtables prepare``.
        methods: by label.
        budgets: as texts; full takes none.
        seeds: their number; they are 0, 1, ….
        train: what every cell starts from, without method, budget and seed, since every cell has its own.
        variants: by name, what takes the place of `train`.
        tune: {field: values}. Every combination is trained with seed 0, and the best on validation is chosen for each
            variant, method and budget.
        tune_at: the one budget at which they are tried; the choice made there is used at every budget.
        best: how many methods of each variant and budget are trained with every seed, beside the baselines; without it
            all.
        preset: that of `train`, whose seed is of no account.
        precisions: whether the precision is each method's own, as :func:`embtables.sweeps.cells.in_precisions` has it,
            so that `train` has none either.

    Raises:
        ValueError: one sentence that names what is wrong.
    """
    for config_of_cells in (train, *(variants or {}).values()):
        if config_of_cells.tables.hash_seed is not None:
            raise ValueError(
                f"tables.hash_seed is {config_of_cells.tables.hash_seed}, but a sweep takes it from each seed, so that "
                "the spread includes luck with collisions: leave it null"
            )
    cures = {field: f"give {option}" for field, option in OWN.items()}
    cures |= {"tables.precision": "leave out --precisions"} if precisions else {}
    _refuse_what_cells_set("the configuration", train, load_config(preset=preset), cures)
    cures |= dict.fromkeys(tune or {}, "leave out --tune")
    for name, own in (variants or {}).items():
        _refuse_what_cells_set(f"variant {name!r}", own, train, cures)
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
        tune=dict(tune or {}),
        tune_at=tune_at if tune_at is None else same_budget(tune_at, budgets) or tune_at,
        best=best,
        train=cell_config(train, "full", "", seed=0),
        variants={name: cell_config(own, "full", "", seed=0) for name, own in (variants or {}).items()},
    )
    config.check()
    config = config.model_copy(update={"tune": _as_fields_hold_them(config)})
    names = Counter(cell.name for cell in config.cells([0], grid(config.tune) or [""]))
    twice = next((name for name, times in names.items() if times > 1), None)
    if twice is not None:
        raise ValueError(
            f"two cells would both be named '{twice}': variants, methods, budgets or values of --tune are too alike"
        )
    return config


def _refuse_what_cells_set(which: str, config: RunConfig, start: RunConfig, cures: Mapping[str, str]) -> None:
    """``ValueError`` where `config` has another value than `start` of what every cell has of its own."""
    for field, cure in cures.items():
        # With another optimizer comes another learning rate, which nobody set.
        follows = field == "tables.learning_rate" and config.tables.optimizer != start.tables.optimizer
        if not follows and _held(config, field) != _held(start, field):
            raise ValueError(f"{which} sets {field}, which every cell of a sweep has of its own: {cure}")


def _as_fields_hold_them(config: SweepConfig) -> dict[str, list[Any]]:
    """The grid with each value as the configuration holds it and once, so that 0.1 and 0.10 are one.

    Raises:
        ValueError: a field that no grid can have, or a combination that a configuration does not take.
    """
    for field in config.tune:
        home = ".".join(field.split(".")[:2])
        if home in OWN:
            raise ValueError(f"--tune {field}: every cell of a sweep has its own, from {OWN[home]}")
        if home in _CHANGES:
            raise ValueError(f"--tune {field}: it changes {_CHANGES[home]}, and so what is compared: use --variant")
        if home in RunConfig.model_fields:
            raise ValueError(f"--tune {field}: it is a section of the configuration, no field")
        inner = next((other for other in config.tune if other.startswith(f"{field}.")), None)
        if inner is not None:
            raise ValueError(
                f"--tune {inner}: it is a part of {field}, which is tuned as a whole: leave one of them out"
            )
    found: dict[str, dict[str, Any]] = {field: {} for field in config.tune}
    for combination in product(*config.tune.values()) if config.tune else ():
        fields = dict(zip(config.tune, combination))
        try:
            trains = [with_fields(train, fields) for train in config.trains.values()]
            for train in trains:
                check_hyperparameters(train.model.name, train.model.hyperparameters)
            held_by_all = [{field: _held(train, field) for field in fields} for train in trains]
            if any(held != held_by_all[0] for held in held_by_all):
                raise ValueError("it stands for another value in each variant: write the values themselves")
        except ValueError as error:
            culprit = " ".join(f"{field}={value_text(value)}" for field, value in fields.items())
            raise ValueError(f"--tune {culprit}: {error}") from None
        for field, values in found.items():
            held = held_by_all[0][field]
            values.setdefault(value_text(held), held)
    return {field: list(values.values()) for field, values in found.items()}


def _held(config: RunConfig, field: str) -> Any:
    """The value of a field, as YAML holds it; ``None`` where the configuration has none."""
    value: Any = config.model_dump(mode="json")
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _reason(error: ValueError) -> str:
    """What is wrong in one line; of several fields with the first one."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    problem = error.errors()[0]
    return ": ".join([".".join(map(str, problem["loc"])), problem["msg"]][not problem["loc"] :])


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
        rates = fields.pop("learning_rates", [])  # before any field could be tuned
        config = SweepConfig.model_validate(fields)
        config.check()
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({_reason(error)}): give another --out") from None
    if rates:
        raise ValueError(
            f"{file} has a grid of learning_rates, which an earlier version wrote and this one does not read: give "
            "another --out, and --tune tables.learning_rate=…"
        )
    return config
