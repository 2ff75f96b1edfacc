"""Reads files that may be damaged, or from strangers: what is wrong is a ``ValueError`` that names the file.

Nothing here imports or unpickles, and what is read here takes memory in proportion to the file.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

_MOST_YAML_BYTES = 2**22
_MOST_YAML_NODES = 2**20
_MOST_DEPTH = 200
_MOST_HEADER_BYTES = 10_000


def read_text(path: Path) -> str:
    """A text file in UTF-8.

    Raises:
        ValueError: where it is none.
        OSError: where it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 (byte {error.start:,})") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: where it is none.
        OSError: where it cannot be read.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: not valid JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"{path} is damaged: its brackets are nested too deeply") from None


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, as ``parse_yaml`` reads it.

    Raises:
        ValueError: where it is none, or larger than 4 MiB.
        OSError: where it cannot be read.
    """
    if path.is_file() and path.stat().st_size > _MOST_YAML_BYTES:
        raise ValueError(f"{path} is no configuration: it has more than {_MOST_YAML_BYTES:,} bytes")
    try:
        return parse_yaml(read_text(path))
    except NotYaml as error:
        raise ValueError(f"{path}:{error}") from None


class NotYaml(ValueError):
    """A text is not the YAML that this package takes."""


def parse_yaml(text: str) -> Any:
    """Plain data from YAML: what JSON knows too.

    Raises:
        NotYaml: where the text is none, nested too deeply, or so full of references that it stands for a million nodes,
            and for dates, sets and keys that are no text.
    """
    try:
        if _depth(text) > _MOST_DEPTH:  # which takes the parser long to find out
            raise RecursionError
        found = yaml.safe_load(text)
        strange = _strange(found, set())
        if strange is not None:
            raise NotYaml(f" holds {strange}: put it in quotes")
        nodes = _count(found, {})
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        raise NotYaml(f"{line} is not valid YAML ({getattr(error, 'problem', None) or error})") from None
    except RecursionError:
        raise NotYaml(" is not valid YAML: its brackets are nested too deeply") from None
    except NotYaml:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        # Dates that do not exist, keys that cannot be compared, numbers with too many digits.
        raise NotYaml(f" is not valid YAML ({' '.join(str(error).split())})") from None
    if nodes > _MOST_YAML_NODES:
        raise NotYaml(f" is not valid YAML: its references stand for more than {_MOST_YAML_NODES:,} values")
    return found


def _depth(text: str) -> int:
    """At most how deep brackets are nested; those in words count too."""
    depth = deepest = 0
    for character in re.findall(r"[\[\]{}]", text):
        depth += 1 if character in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _strange(value: Any, seen: set[int]) -> str | None:
    """What YAML knows and JSON does not, such as a date or a key that is a number; ``None`` where there is none."""
    if not isinstance(value, (dict, list)):
        plain = value is None or isinstance(value, (bool, int, float, str))
        return None if plain else f"a {type(value).__name__}, {str(value)!r}"
    if id(value) in seen:
        return None
    seen.add(id(value))
    if isinstance(value, dict):
        keys = [key for key in value if not isinstance(key, str)]
        if keys:
            return f"the key {keys[0]!r}, which is no text"
    inner = value.values() if isinstance(value, dict) else value
    return next((found for item in inner if (found := _strange(item, seen)) is not None), None)


def _count(value: Any, known: dict[int, int]) -> int:
    """The nodes of plain data, those that are referred to counted each time."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = 2**62  # of what refers to itself
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = min(2**62, 1 + sum(_count(item, known) for item in inner))
    return known[id(value)]


def read_array(path: Path, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The one-dimensional array in a .npy file, of the given type.

    Raises:
        ValueError: where it is no such file, or the size that its header claims is not that of the file.
        OSError: where it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, found = read(file, max_header_size=_MOST_HEADER_BYTES)
        except Exception as error:  # ValueError, EOFError, SyntaxError and others, for the header is Python text
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path} is damaged: no array can be read from it ({reason})") from None
        if found != np.dtype(dtype) or len(shape) != 1 or found.hasobject:
            raise ValueError(f"{path} is damaged: it holds {found} of shape {shape}, not a row of {np.dtype(dtype)}")
        if shape[0] * found.itemsize != size - file.tell():
            raise ValueError(f"{path} is damaged: its header claims {shape[0]:,} values, and its size is another")
        return np.frombuffer(file.read(), dtype=found).copy()


def check_archive(path: Path) -> None:
    """``ValueError`` where a zip archive, as PyTorch writes them, is damaged or would grow when it is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            damaged = None
            if all(entry.compress_type == zipfile.ZIP_STORED for entry in entries):
                damaged = archive.testzip()
    except (
        zipfile.BadZipFile,
        ValueError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        OSError,
        struct.error,
    ) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # places in the archive that are none, such as -1, come without a name
        raise ValueError(f"{path} is damaged ({str(error) or type(error).__name__})") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{path} is damaged: it is compressed, as no checkpoint is")
    if damaged is not None or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError(f"{path} is damaged: its parts do not match their checksums or sizes")


def inside(folder: Path, name: object) -> Path:
    """The file of a name that a record in ``folder`` gives, such as a shard.

    Raises:
        ValueError: where it lies outside of the folder, be it by its name or by a link.
    """
    path = folder / str(name)
    is_name = isinstance(name, str) and name and "\0" not in name and name.isprintable()
    if not is_name or Path(str(name)).is_absolute() or ".." in Path(str(name)).parts:
        raise ValueError(f"the file {name!r} is not inside of {folder}")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is a link out of its folder")
    return path
