"""What changed from one served file to another: rows, codes and small tensors, and the header.

A delta is a safetensors file. For a tensor of which some rows changed it holds the rows under ``<name>/values`` and
their numbers under ``<name>/rows``; a tensor of another shape or type, or one of which the rows that changed take as
many bytes as all of it, is there whole, under ``<name>/whole``. ``header`` is the beginning of the new file, byte by
byte, so that a delta applied to its base gives the very file that it was made from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from embtables._util.files import not_written, replacing
from embtables.serving.numpy_reader import CHECKSUM, File, open_file

Array = npt.NDArray[Any]
_KEY, _FORMAT_VERSION = "embtables-delta", 1
# Rows that are compared at once.
_CHUNK = 2**20


class Delta(NamedTuple):
    """A delta: the versions and checksums of the files between which it leads, and its tensors."""

    since: int
    to: int
    since_sha256: str
    to_sha256: str
    tensors: Mapping[str, Array]

    def __str__(self) -> str:
        return f"from version {self.since} to {self.to}"


def write_delta(path: Path, base: Path, new: Path, since: int, to: int) -> None:
    """Writes what leads from one file to another; the delta is there whole or not at all.

    Raises:
        OSError: where a file cannot be read or written.
        ValueError: for files that are damaged, or so old that they have no checksum.
    """
    before, after = opened(base), opened(new)
    tensors: dict[str, Array] = {"header": np.fromfile(new, np.uint8, _start(new))}
    for name, array in after.arrays.items():
        old = before.arrays.get(name)
        if old is None or old.shape != array.shape or before.dtypes[name] != after.dtypes[name]:
            tensors[f"{name}/whole"] = _bytes(array)
            continue
        changed = _changed(_rows(old), _rows(array))
        rows = changed.astype(np.int32 if len(array) < 2**31 else np.int64)
        values = _bytes(_rows(array)[changed])
        if rows.nbytes + values.nbytes >= array.nbytes > 0 and len(rows):
            tensors[f"{name}/whole"] = _bytes(array)
        elif len(rows):
            tensors |= {f"{name}/rows": rows, f"{name}/values": values}
    _write(path, Delta(since, to, before.described[CHECKSUM], after.described[CHECKSUM], tensors))


def read_delta(path: Path) -> Delta:
    """A delta that ``write_delta`` or ``compact`` wrote, mapped into memory.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: naming the file, where it is none.
    """
    try:
        file = open_file(path, key=_KEY)
        found = file.described
        version = found.get("format_version")
        if version != _FORMAT_VERSION:
            raise ValueError(f"it is of format version {version!r}, and this release reads {_FORMAT_VERSION}")
        since, to, before, after = (found.get(name) for name in ("since", "to", "since_sha256", "to_sha256"))
        if not (isinstance(since, int) and isinstance(to, int) and isinstance(before, str) and isinstance(after, str)):
            raise ValueError("its entries are damaged")
        if "header" not in file.arrays:
            raise ValueError("it lacks the header of the file that it leads to")
        return Delta(since, to, before, after, file.arrays)
    except ValueError as error:
        raise ValueError(f"{path} holds no delta that can be read: {error}") from error


def apply_delta(base: Path, delta: Path, out: Path) -> None:
    """Writes the file that a delta leads to from its base, bit for bit, which its checksum verifies.

    ``out`` is left behind where something fails; callers have it in a temporary folder.

    Raises:
        ValueError: naming the delta, where it is damaged, or that of another base.
    """
    read, before = read_delta(delta), opened(base)
    if read.since_sha256 != before.described[CHECKSUM]:
        raise ValueError(f"{delta} leads {read}, and {base} is another file than it was made from")
    try:
        header = read.tensors["header"]
        shapes = {name: entry for name, entry in json.loads(header[8:].tobytes()).items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in shapes.values()), default=0)
        if not 0 <= end <= sum(array.nbytes for array in (*before.arrays.values(), *read.tensors.values())):
            raise ValueError("it claims more than there is")
        with open(out, "wb") as file:
            file.write(header.tobytes())
            file.truncate(len(header) + end)
        whole = np.memmap(out, np.uint8, "r+")
        for name, entry in shapes.items():
            first, last = entry["data_offsets"]
            part = whole[len(header) + first : len(header) + last]
            if f"{name}/whole" in read.tensors:
                part[:] = read.tensors[f"{name}/whole"].reshape(-1)
                continue
            part[:] = _bytes(before.arrays[name])
            if f"{name}/rows" in read.tensors:
                rows = part.reshape(entry["shape"][0], -1)
                rows[read.tensors[f"{name}/rows"]] = read.tensors[f"{name}/values"].reshape(-1, rows.shape[1])
        whole.flush()
        opened(out).check()
    except OSError:
        raise
    except Exception as error:
        # Whatever a damaged delta leads to.
        raise ValueError(f"{delta} does not lead to a whole file from {base}: it is damaged ({error})") from error


def compact(deltas: Sequence[Path], out: Path) -> Delta:
    """Writes one delta in the place of several that follow one another, of which the later ones count.

    Raises:
        ValueError: where one is no delta, or does not begin where the one before ends.
    """
    read = [read_delta(path) for path in deltas]
    if not read:
        raise ValueError("there is no delta to compact")
    for path, one, next_one in zip(deltas[1:], read, read[1:]):
        if one.to_sha256 != next_one.since_sha256:
            raise ValueError(f"{path} leads {next_one}, and the one before it {one}: they do not follow one another")
    try:
        shapes = [json.loads(delta.tensors["header"][8:].tobytes()) for delta in read]
        tensors = {"header": read[-1].tensors["header"]}
        for name in shapes[-1].keys() - {"__metadata__"}:
            tensors |= _latest(name, shapes[-1][name]["shape"], read)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
        raise ValueError(f"one of {', '.join(map(str, deltas))} is damaged: {error}") from error
    whole = Delta(read[0].since, read[-1].to, read[0].since_sha256, read[-1].to_sha256, tensors)
    _write(out, whole)
    return whole


def _latest(name: str, shape: Sequence[int], deltas: Sequence[Delta]) -> dict[str, Array]:
    """What a tensor ``[rows, …]`` has after several deltas, as one has it; nothing where none changes it."""
    whole: Array | None = None
    rows, values = np.zeros(0, np.int64), np.zeros((0, 0), np.uint8)
    for delta in deltas:
        if f"{name}/whole" in delta.tensors:
            whole, rows = delta.tensors[f"{name}/whole"], np.zeros(0, np.int64)
        elif f"{name}/rows" in delta.tensors:
            number = delta.tensors[f"{name}/rows"]
            given = delta.tensors[f"{name}/values"].reshape(len(number), -1)
            if whole is not None:
                whole = whole.reshape(shape[0], -1).copy()
                whole[number] = given
                continue
            # The first of equal ones is kept, which is that of the later delta.
            number = np.concatenate([number, rows])
            given = np.concatenate([given, values]) if len(rows) else given
            rows, first = np.unique(number, return_index=True)
            values = given[first]
    if whole is not None:
        return {f"{name}/whole": whole.reshape(-1)}
    small = np.int32 if math.prod(shape[:1]) < 2**31 else np.int64
    return {f"{name}/rows": rows.astype(small), f"{name}/values": values.reshape(-1)} if len(rows) else {}


def _write(path: Path, delta: Delta) -> None:
    said = {"format_version": _FORMAT_VERSION, **{k: v for k, v in delta._asdict().items() if k != "tensors"}}
    with replacing(path) as temporary:
        try:
            save_file(
                {k: np.ascontiguousarray(v) for k, v in delta.tensors.items()}, temporary, {_KEY: json.dumps(said)}
            )
        except SafetensorError as error:
            raise not_written(path, error) from error


def opened(path: Path) -> File:
    """A served file that has a checksum, mapped into memory.

    Raises:
        ValueError: naming the file, where it is none.
    """
    try:
        file = open_file(path)
        if not isinstance(file.described.get(CHECKSUM), str):
            raise ValueError("it was written before files had checksums: load and save it again")
        return file
    except ValueError as error:
        raise ValueError(f"{path} holds no embedding tables that can be read: {error}") from error


def _start(path: Path) -> int:
    """Where the tensors of a file begin."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _bytes(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)


def _rows(array: Array) -> Array:
    """The rows of a tensor as integers, which unlike numbers are equal where their bits are."""
    return array.view(f"i{array.itemsize}").reshape(array.shape[0] if array.ndim else 1, -1)


def _changed(before: Array, after: Array) -> Array:
    """The numbers of the rows that differ."""
    chunks = range(0, len(after), _CHUNK)
    found = [
        start + np.flatnonzero((before[start : start + _CHUNK] != after[start : start + _CHUNK]).any(1))
        for start in chunks
    ]
    return np.concatenate([np.zeros(0, np.int64), *found])
