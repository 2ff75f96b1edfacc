"""A trained model as it is served: three files in a folder, no pickle.

``tables.safetensors`` holds the tables in their served form (see :meth:`embtables.EmbeddingTables.save`),
``model.safetensors`` the other weights and buffers, and ``model.json`` what is needed to build the model again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictStr
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from embtables._util.files import check_seal, not_written, replacing_folder, sealed, sha256
from embtables._util.reading import inside, read_json
from embtables.models import build_model
from embtables.models.registry import is_built_in
from embtables.plan.solver import Plan
from embtables.tables import EmbeddingTables
from embtables.tables.files import read_plan
from embtables.training.records import check_files, read_record, validated

__all__ = [
    "Served",
    "check_served",
    "copy_served",
    "dense_state",
    "described",
    "load_served",
    "save_served",
    "served_of",
]

FORMAT, VERSION = "embtables-served", 1
TABLES, WEIGHTS, MODEL = "tables.safetensors", "model.safetensors", "model.json"
_TABLES_PREFIX = "embeddings."


@dataclass(frozen=True)
class Served:
    """How to build the model again, and what its batches hold: columns of ``ids`` and ``dense``, names of ``lists``.

    ``histories`` maps those of the lists that are histories to the feature in whose id space they are; the model was
    trained on their latest ``max_history`` entries (``None``: on all).
    """

    model: str
    hyperparameters: Mapping[str, Any]
    feature_names: list[str]
    dense_features: list[str]
    list_features: list[str] = field(default_factory=list)
    histories: dict[str, str] = field(default_factory=dict)
    max_history: int | None = None


class _Description(BaseModel):
    """What model.json must hold; further entries are passed over."""

    model_config = ConfigDict(strict=True)

    model: str
    hyperparameters: dict[str, Any]
    feature_names: list[StrictStr]
    dense_features: list[StrictStr]
    list_features: list[StrictStr] = []
    histories: dict[str, StrictStr] = {}
    max_history: int | None = Field(default=None, ge=1)
    sha256: dict[str, StrictStr]


def dense_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict without its tables, which are kept in a file of their own."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith(_TABLES_PREFIX)}


def save_served(folder: Path, served: Served, tables: EmbeddingTables, weights: Mapping[str, torch.Tensor]) -> None:
    """Write ``folder`` in one step; a folder of that name is replaced."""
    description = {
        "format": FORMAT,
        "version": VERSION,
        "model": served.model,
        "hyperparameters": dict(served.hyperparameters),
        "feature_names": served.feature_names,
        "dense_features": served.dense_features,
        "list_features": served.list_features,
        "histories": served.histories,
        "max_history": served.max_history,
    }
    with replacing_folder(folder) as temporary:
        tables.save(temporary / TABLES)
        try:
            save_file({k: v.detach().cpu().clone().contiguous() for k, v in weights.items()}, temporary / WEIGHTS)
        except SafetensorError as error:
            raise not_written(folder / WEIGHTS, error) from error
        description["sha256"] = {name: sha256(temporary / name) for name in (TABLES, WEIGHTS)}
        (temporary / MODEL).write_text(json.dumps(sealed(description), indent=2) + "\n", encoding="utf-8")


def copy_served(source: Path, target: Path) -> None:
    """Checks the three files and copies them in one step; a folder of the target's name is replaced.

    Raises:
        ValueError: as ``check_served``.
    """
    check_served(source)
    with replacing_folder(target) as temporary:
        for name in (TABLES, WEIGHTS, MODEL):
            shutil.copyfile(source / name, temporary / name)


def check_served(folder: Path) -> None:
    """Checks a served folder without building its model: nothing in it is imported or run.

    Raises:
        ValueError: naming the file that is missing, damaged, a link out of the folder, or does not fit the others.
    """
    _read(folder)


def served_of(run: Path) -> Path:
    """The served folder of a run, which is checked, and that it is the run's own.

    Raises:
        ValueError: as ``check_served``, and where the tables are those of another plan.
    """
    served = inside(run, "served")
    check_served(served)
    if read_plan(served / TABLES).fingerprint != Plan.from_dict(read_json(inside(run, "plan.json"))).fingerprint:
        raise ValueError(f"{served} holds other tables than {run / 'plan.json'} describes: train the run again")
    return served


def described(folder: Path) -> Served:
    """What model.json of a served folder says of the model and its batches, where ``check_served`` has passed."""
    found = _Description.model_validate(read_json(inside(folder, MODEL)))
    return Served(**found.model_dump(exclude={"sha256"}))


def load_served(
    folder: str | Path,
    device: torch.device | str | None = None,
    *,
    model: type[nn.Module] | None = None,
    allow_import: bool = False,
) -> nn.Module:
    """The model of a served folder (``RUN/served``, or what ``embtables export`` wrote), ready for inference.

    Its ``forward`` takes a :class:`embtables.datasets.Batch` and returns logits ``[B]``; model.json says what the batch
    must hold (see :class:`Served`).

    Args:
        model: the class of a model of one's own. Models of this package need none.
        allow_import: whether to import instead what model.json names, which runs code of that name. Only for folders
            that you trust.

    Raises:
        ValueError: naming the file that is missing, damaged or does not fit, or a model that is not of this package.

    Example::

        served = load_served("runs/demo/served")
        with torch.no_grad():
            clicks = served(batch).sigmoid()
    """
    folder = Path(folder)
    description = _read(folder)
    name = description.model
    if model is None and not is_built_in(name) and not allow_import:
        raise ValueError(
            f"{folder / MODEL} names the model {name!r}, which is not of this package, and loading runs no other code: "
            "give its class as load_served(…, model=Class), or allow_import=True where you trust the folder"
        )
    tables = EmbeddingTables.load(folder / TABLES, device, verify=True)
    # The constructor draws weights that are overwritten: the caller's random numbers must not notice.
    with torch.random.fork_rng(devices=[]):
        try:
            misfit = _misfit(description, tables, folder) if model is None and is_built_in(name) else None
            if misfit is None:
                built = build_model(model or name, tables, len(description.dense_features), description.hyperparameters)
        except (ValueError, RuntimeError, AssertionError, ArithmeticError, LookupError, MemoryError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{folder / MODEL} describes no model that can be built: {reason}") from error
    if misfit is not None:
        raise ValueError(f"{folder / WEIGHTS} does not fit model {name!r} of {MODEL}: {misfit}")
    built.to(device)
    try:
        weights = load_file(folder / WEIGHTS, device=str(device or "cpu"))
        found = built.load_state_dict(weights, strict=False)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / WEIGHTS} does not fit model {name!r} of {MODEL}: {reason}") from error
    missing = [key for key in found.missing_keys if not key.startswith(_TABLES_PREFIX)]
    if missing or found.unexpected_keys:
        raise ValueError(
            f"{folder / WEIGHTS} does not fit model {name!r} of {MODEL}: "
            f"{'it lacks ' + missing[0] if missing else 'it has ' + found.unexpected_keys[0] + ' besides'}"
        )
    return built.eval()


def _read(folder: Path) -> _Description:
    """What model.json says, which fits the other two files."""
    path = folder / MODEL
    if not path.is_file():
        raise ValueError(f"{folder} holds no served model: {MODEL} is missing")
    content = read_record(folder, MODEL, "served model", FORMAT, VERSION)
    description = validated(path, _Description.model_validate, content)
    check_files(folder, (TABLES, WEIGHTS), description.sha256, MODEL)
    check_seal(content, path)
    _check_features(description, folder)
    return description


def _misfit(description: _Description, tables: EmbeddingTables, folder: Path) -> str | None:
    """The first weight of a model of these hyperparameters that is another in the file; ``None`` where all fit.

    Here the model is built without memory for its weights, so that a stranger's cannot fill it. No hyperparameter
    counts more parts than the file has bytes.
    """
    most, left = max(2**16, (folder / WEIGHTS).stat().st_size), [description.hyperparameters]
    while left:
        value: Any = left.pop()
        if isinstance(value, (dict, list)):
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and abs(value) > most:
            raise ValueError(f"the hyperparameter {value!r} is beyond all weights in {WEIGHTS}")
    with torch.device("meta"):
        empty = build_model(description.model, tables, len(description.dense_features), description.hyperparameters)
    wanted = {name: list(value.shape) for name, value in dense_state(empty).items()}
    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        return " ".join(str(error).split())
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            return f"{name} is {wanted.get(name, 'no weight')}, and {found.get(name, 'absent')} in {WEIGHTS}"
    return None


def _check_features(description: _Description, folder: Path) -> None:
    """The features of the model are those of its tables, which the checksum of the tables vouches for."""
    read = [*description.feature_names, *description.list_features, *description.histories]
    repeated = [name for name in read if read.count(name) > 1]
    if repeated:
        raise ValueError(f"{folder / MODEL} names the feature '{repeated[0]}' twice: it is damaged")
    strangers = [name for name in description.histories.values() if name not in description.feature_names]
    if strangers:
        raise ValueError(f"{folder / MODEL} has a history of '{strangers[0]}', which is no feature: it is damaged")
    named = set(read)
    looked_up = {feature for table in read_plan(folder / TABLES).tables for feature in table.feature_names}
    if named != looked_up:
        wrong = sorted(named ^ looked_up)[0]
        raise ValueError(
            f"{folder / MODEL} {'names' if wrong in named else 'leaves out'} the feature '{wrong}', "
            f"which {TABLES} {'does not look up' if wrong in named else 'looks up'}: it is damaged"
        )
