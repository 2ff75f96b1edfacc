"""What short trainings on a user's data found out: what each table is worth, and which methods do best in a budget.

``embtables probe`` makes it; ``plan(…, probe=…)`` and ``--method auto`` choose by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from embtables._util.files import write_json
from embtables._util.reading import read_json
from embtables.methods import from_config

#: Its name beside the manifest of prepared data.
FILE = "probe.json"
FORMAT_VERSION = 1

Finite = Annotated[float, Field(allow_inf_nan=False)]
MethodSpec = str | dict[str, Any]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entrant(_Data):
    """A method that took part in a race.

    Args:
        method: as ``plan`` takes it: a kind, a mapping with options, or patterns of table names with either.
        loss: how far its monitor is expected to be behind that of full tables which were trained as long; below 0
            where it is ahead.
        error: how far off that may be of what it is at the end of training, as likely as not.
        valid: its best monitor on validation, the mean of its seeds.
        epochs: how many it was trained.
        seeds: how many times it was trained so far.
    """

    method: MethodSpec
    loss: Finite
    error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    valid: Finite
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    seeds: Annotated[int, Field(ge=1)] = 1

    @field_validator("method")
    @classmethod
    def _is_a_method(cls, method: MethodSpec) -> MethodSpec:
        if method == {}:
            raise ValueError("an empty mapping is no method")
        for spec in method.values() if isinstance(method, dict) and "kind" not in method else [method]:
            if from_config(spec).chooses:
                raise ValueError("auto, which chooses, takes no part in a race")
        return method


class Race(_Data):
    """Methods that were trained within one budget, the one to take first."""

    budget_bytes: Annotated[int, Field(ge=1, le=2**62)]
    entrants: Annotated[tuple[Entrant, ...], Field(min_length=1)]


def as_worth(measured: Mapping[str, float]) -> dict[str, float]:
    """What tables are worth, as methods take it: at least 0, in four digits, of which one is sure."""
    return {name: max(0.0, float(f"{value:.4g}")) for name, value in measured.items()}


class Expected(NamedTuple):
    """The loss against full tables, and between which bounds it lies as likely as not."""

    loss: float
    low: float
    high: float


class Probe(_Data):
    """What was measured on one prepared data set with one model.

    Args:
        data: the checksum of the manifest of the data.
        model: the model's name.
        monitor: the metric on validation by which methods are compared.
        reference: that of full tables, after ``reference_epochs``.
        regularization: the strength of mini-batch-aware L2 that all of them were trained with.
        tables: what each table is worth: how much of the monitor is lost without it.
        how: how each table's worth was found.
        races: one for each budget.
    """

    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)] = FORMAT_VERSION
    data: str
    model: str
    monitor: str
    reference: Finite
    reference_epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    regularization: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    tables: dict[str, Annotated[float, Field(ge=-1e9, le=1e9)]]
    how: dict[str, str]
    races: tuple[Race, ...] = ()

    @staticmethod
    def load(path: str | Path) -> Probe:
        """Reads a probe; a directory stands for prepared data.

        Raises:
            ValueError: one sentence, where the file is no probe or a damaged one.
            OSError: it cannot be read.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        values = read_json(path)
        try:
            return Probe.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            reason = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{path} is no probe, or a damaged one: {f'{where}: ' if where else ''}{reason}") from None

    def save(self, path: str | Path) -> None:
        """Writes it, whole or not at all."""
        write_json(Path(path), self.model_dump(mode="json"))

    def nearest(self, num_bytes: int) -> Race | None:
        """The race whose budget is nearest, by the ratio of the two; ``None`` where there was none."""
        return min(self.races, key=lambda race: abs(math.log(race.budget_bytes / max(1, num_bytes))), default=None)

    def worth_of(self, names: list[str]) -> dict[str, float] | None:
        """What tables are worth, as methods take it; ``None`` where it is not known of all of them."""
        return as_worth({name: self.tables[name] for name in names}) if self.tables.keys() >= set(names) else None
