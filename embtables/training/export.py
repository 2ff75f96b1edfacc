"""A trained model as it is served: three files in a folder, no pickle.

``tables.safetensors`` holds the tables in their served form (see :meth:`embtables.EmbeddingTables.save`),
``model.safetensors`` the other weights and buffers, and ``model.json`` what is needed to build the model again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from embtables._util.files import sha256
from embtables.models import build_model
from embtables.tables import EmbeddingTables

__all__ = ["Served", "copy_served", "dense_state", "load_served", "save_served"]

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
    with _replacing_folder(folder) as temporary:
        tables.save(temporary / TABLES)
        try:
            save_file({k: v.detach().cpu().clone().contiguous() for k, v in weights.items()}, temporary / WEIGHTS)
        except SafetensorError as error:
            raise OSError(f"cannot write {folder / WEIGHTS}: {error}") from error
        description["sha256"] = {name: sha256(temporary / name) for name in (TABLES, WEIGHTS)}
        (temporary / MODEL).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def copy_served(source: Path, target: Path) -> None:
    """Copy the three files in one step; a folder of the target's name is replaced."""
    with _replacing_folder(target) as temporary:
        for name in (TABLES, WEIGHTS, MODEL):
            shutil.copyfile(source / name, temporary / name)


def load_served(folder: str | Path, device: torch.device | str | None = None) -> nn.Module:
    """The model of a served folder (``RUN/served``, or what ``embtables export`` wrote), ready for inference.

    Its ``forward`` takes a :class:`embtables.datasets.Batch` and returns logits ``[B]``; model.json says what the batch
    must hold (see :class:`Served`). A model of one's own must be importable under the name that it was trained with.

    Raises:
        ValueError: naming the file that is missing, damaged or does not fit.

    Example::

        model = load_served("runs/demo/served")
        with torch.no_grad():
            clicks = model(batch).sigmoid()
    """
    folder = Path(folder)
    description = _read(folder)
    for name in (TABLES, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
        if sha256(folder / name) != description["sha256"].get(name):
            raise ValueError(f"{folder / name} does not match its checksum in {MODEL}: it is damaged")
    tables = EmbeddingTables.load(folder / TABLES, device)
    # The constructor draws weights that are overwritten: the caller's random numbers must not notice.
    with torch.random.fork_rng(devices=[]):
        model = build_model(
            description["model"], tables, len(description["dense_features"]), description["hyperparameters"]
        )
    model.to(device)
    try:
        weights = load_file(folder / WEIGHTS, device=str(device or "cpu"))
        found = model.load_state_dict(weights, strict=False)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / WEIGHTS} does not fit model {description['model']!r}: {reason}") from error
    missing = [name for name in found.missing_keys if not name.startswith(_TABLES_PREFIX)]
    if missing or found.unexpected_keys:
        raise ValueError(
            f"{folder / WEIGHTS} does not fit model {description['model']!r}: "
            f"{'it lacks ' + missing[0] if missing else 'it has ' + found.unexpected_keys[0] + ' besides'}"
        )
    return model.eval()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MODEL
    if not path.is_file():
        raise ValueError(f"{folder} holds no served model: {MODEL} is missing")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe a served model")
    if description.get("version") != VERSION:
        raise ValueError(f"{path} has version {description.get('version')!r}; this release reads version {VERSION}")
    absent = {"model", "hyperparameters", "feature_names", "dense_features", "sha256"} - set(description)
    if absent:
        raise ValueError(f"{path}: field '{sorted(absent)[0]}' is missing")
    return description


@contextmanager
def _replacing_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``folder``; when the block ends well it becomes ``folder``, else it is removed."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
