"""Records in folders: JSON that says what kind it is of, and vouches for the files beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from embtables._util.files import sha256
from embtables._util.reading import inside, read_json

__all__ = ["check_files", "read_record", "validated"]

Valid = TypeVar("Valid")


def read_record(folder: Path, name: str, noun: str, kind: str, version: int) -> dict[str, Any]:
    """The record ``name`` of a folder, whose ``format`` is ``kind``, of a version that this release reads.

    Raises:
        ValueError: it is of another kind or version, or no JSON; ``noun`` is what it should describe.
    """
    path = folder / name
    content = read_json(inside(folder, name))
    if not isinstance(content, dict) or content.get("format") != kind:
        raise ValueError(f"{path} does not describe a {noun}")
    if content.get("version") != version:
        raise ValueError(f"{path} has version {content.get('version')!r}; this release reads version {version}")
    return content


def validated(path: Path, validate: Callable[[Any], Valid], content: Mapping[str, Any]) -> Valid:
    """What ``validate`` makes of a record.

    Raises:
        ValueError: naming the first field that is missing or damaged.
    """
    try:
        return validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        reason = "is missing" if problem["type"] == "missing" else f"is damaged ({problem['msg'].lower()})"
        raise ValueError(f"{path}: field '{field}' {reason}") from None


def check_files(folder: Path, names: Iterable[str], checksums: Mapping[str, str], record: str) -> None:
    """``ValueError`` naming the first of some files that is missing or has another checksum than its record says."""
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
        if sha256(inside(folder, name)) != checksums.get(name):
            raise ValueError(f"{folder / name} does not match its checksum in {record}: it is damaged")
