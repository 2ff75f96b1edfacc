"""The prepared format, read back: Parquet shards and a manifest."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.progress import track
from torch import Tensor

from .splits import SPLITS

if TYPE_CHECKING:
    from embtables import TableConfig

FORMAT, VERSION = "embtables-prepared", 1
MANIFEST, FREQUENCIES = "manifest.json", "frequencies.parquet"
LABEL, GROUP = "label", "_group"
WINDOW_BYTES = 2**31
"""Rows shuffled together: a split that fits in this many bytes is shuffled as a whole and stays in memory."""


class Batch(NamedTuple):
    """B examples. Columns of `dense` and `ids` follow the data set's `dense_features` and `feature_names`."""

    labels: Tensor  # float32 [B]
    dense: Tensor  # float32 [B, num_dense]
    ids: Tensor  # int64 [B, F]
    groups: Tensor | None  # int64 [B], the group (e.g. user) of each row for grouped metrics


class File(BaseModel):
    file: str
    sha256: str


class Shard(File):
    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)


class Split(BaseModel):
    rows: int = Field(ge=0)
    shards: list[Shard]


class Feature(BaseModel):
    name: str
    num_embeddings: int = Field(ge=2)
    vocabulary: File | None = None


class History(BaseModel):
    """A list column of earlier ids, in the id space of `feature`, oldest first."""

    name: str
    feature: str


class Manifest(BaseModel):
    """What manifest.json must hold; further fields are allowed."""

    model_config = ConfigDict(extra="allow")

    format: str
    version: int
    name: str
    kind: str
    config: dict[str, Any]
    inputs: list[dict[str, Any]]
    rows_read: int = Field(ge=0)
    rows_rejected: dict[str, int]
    dense_features: list[str]
    features: list[Feature]
    histories: list[History] = []
    group_feature: str | None
    slice_feature: str | None
    splits: dict[str, Split]
    frequencies: File


class PreparedDataset:
    """A folder written by `embtables prepare`.

    Example::

        data = PreparedDataset("runs/globo")
        for labels, dense, ids, groups in data.batches("train", 2048, seed=1, epoch=0):
            ...

    Raises ValueError, naming file and field, where the folder is not a prepared data set or is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest, self._manifest = read_manifest(self.path)
        self.name = self._manifest.name
        self.feature_names = [feature.name for feature in self._manifest.features]
        self.dense_features = list(self._manifest.dense_features)
        self.num_embeddings = {feature.name: feature.num_embeddings for feature in self._manifest.features}
        self.group_feature = self._manifest.group_feature
        self.slice_feature = self._manifest.slice_feature
        self._frequencies: dict[str, np.ndarray] | None = None
        self._checked: set[str] = set()
        self._cache: dict[str, _Rows] = {}
        for split in self._manifest.splits.values():
            for shard in split.shards:
                file = self.path / shard.file
                if not file.is_file():
                    raise ValueError(f"{file}: the shard is missing; prepare the data set again")
                if file.stat().st_size != shard.bytes:
                    raise ValueError(
                        f"{file}: {file.stat().st_size} bytes where {MANIFEST} says {shard.bytes}: "
                        "the shard is damaged; prepare the data set again"
                    )

    @property
    def frequencies(self) -> dict[str, np.ndarray]:
        """Training counts per id, int64[num_embeddings], by feature."""
        if self._frequencies is None:
            table = pq.read_table(io.BytesIO(self._read(self._manifest.frequencies)))
            counts = table.column("counts")
            self._frequencies = {
                name: counts[row].values.to_numpy() for row, name in enumerate(table.column("feature").to_pylist())
            }
            for name, size in self.num_embeddings.items():
                if name not in self._frequencies or len(self._frequencies[name]) != size:
                    raise ValueError(
                        f"{self.path / self._manifest.frequencies.file}: no {size} counts for feature '{name}'"
                    )
        return self._frequencies

    def num_rows(self, split: str) -> int:
        return self._split(split).rows

    def table_configs(self, embedding_dim: int) -> list[TableConfig]:
        """One table a feature, of the feature's name."""
        from embtables import TableConfig

        return [
            TableConfig(name=name, num_embeddings=size, embedding_dim=embedding_dim, feature_names=[name])
            for name, size in self.num_embeddings.items()
        ]

    def verify(self, progress: bool = False) -> None:
        """Compares every file with its checksum. Raises ValueError naming the first that differs."""
        files: list[File] = [self._manifest.frequencies]
        files += [feature.vocabulary for feature in self._manifest.features if feature.vocabulary is not None]
        files += [shard for split in self._manifest.splits.values() for shard in split.shards]
        for file in track(files, "Checking", disable=not progress):
            self._checked.discard(file.file)
            self._read(file)

    def read(self, split: str, columns: list[str] | None = None) -> pa.Table:
        """A split in file order, with all columns (also histories) or the named ones."""
        return pa.concat_tables([self._table(shard, columns) for shard in self._split(split).shards])

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        skip: int = 0,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """Batches of a split: in file order without a seed, else shuffled, as a pure function of (seed, epoch).

        A split of up to `WINDOW_BYTES` is shuffled as a whole; a larger one by shards, and then within windows of
        that size. `skip` leaves out the first batches, without reading what only they need.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: at least 1 is needed")
        if skip < 0:
            raise ValueError(f"skip {skip}: it cannot be negative")
        self._split(split)
        return self._iterate(split, batch_size, seed, epoch, skip, drop_last)

    def _iterate(
        self, split: str, batch_size: int, seed: int | None, epoch: int, skip: int, drop_last: bool
    ) -> Iterator[Batch]:
        to_skip = skip * batch_size
        rest: _Rows | None = None
        for number, window in enumerate(self._windows(split, seed, epoch)):
            num_rows = sum(shard.rows for shard in window)
            if to_skip >= num_rows:
                to_skip -= num_rows
                continue
            rows = self._rows(split, window)
            order = np.arange(num_rows) if seed is None else _generator(seed, epoch, number + 1).permutation(num_rows)
            position = to_skip
            to_skip = 0
            if rest is not None:
                position = batch_size - len(rest.labels)
                rest = rest.joined(rows.take(order[:position]))
                if len(rest.labels) < batch_size:
                    continue
                yield rest.batch()
                rest = None
            while position + batch_size <= num_rows:
                chosen = slice(position, position + batch_size)
                yield (rows.cut(chosen) if seed is None else rows.take(order[chosen])).batch()
                position += batch_size
            if position < num_rows:
                rest = rows.take(order[position:])
        if rest is not None and not drop_last:
            yield rest.batch()

    def _windows(self, split: str, seed: int | None, epoch: int) -> list[list[Shard]]:
        shards = [shard for shard in self._split(split).shards if shard.rows]
        limit = max(1, WINDOW_BYTES // (4 * (1 + len(self.dense_features) + len(self.feature_names)) + 8))
        if self.num_rows(split) <= limit:
            return [shards] if shards else []
        if seed is None:
            return [[shard] for shard in shards]
        windows: list[list[Shard]] = []
        filled = limit
        for index in _generator(seed, epoch, 0).permutation(len(shards)):
            if filled + shards[index].rows > limit:
                windows.append([])
                filled = 0
            windows[-1].append(shards[index])
            filled += shards[index].rows
        return windows

    def _rows(self, split: str, window: list[Shard]) -> _Rows:
        whole = sum(shard.rows for shard in window) == self.num_rows(split)
        if whole and split in self._cache:
            return self._cache[split]
        size = sum(shard.rows for shard in window)
        rows = _Rows(
            np.empty(size, np.float32),
            np.empty((size, len(self.dense_features)), np.float32),
            np.empty((size, len(self.feature_names)), np.int32),
            None if self.group_feature is None else np.empty(size, np.int64),
        )
        groups = [] if rows.groups is None else [GROUP]
        start = 0
        for shard in window:
            table = self._table(shard, [LABEL, *self.dense_features, *self.feature_names, *groups])
            self._check_values(shard, table)
            part = slice(start, start + shard.rows)
            rows.labels[part] = table.column(LABEL).to_numpy()
            for column, name in enumerate(self.dense_features):
                rows.dense[part, column] = table.column(name).to_numpy()
            for column, name in enumerate(self.feature_names):
                rows.ids[part, column] = table.column(name).to_numpy()
            if rows.groups is not None:
                rows.groups[part] = table.column(GROUP).to_numpy()
            start += shard.rows
        if whole:
            self._cache[split] = rows
        return rows

    def _check_values(self, shard: Shard, table: pa.Table) -> None:
        """A checksum vouches for what was written, not for who wrote it: labels are 0 or 1, ids in their range."""
        bounds = {LABEL: 1} | {name: size - 1 for name, size in self.num_embeddings.items()}
        for name, most in bounds.items():
            column = table.column(name)
            allowed = pa.types.is_floating(column.type) if name == LABEL else pa.types.is_integer(column.type)
            if not allowed or column.null_count:
                found = f"of type {column.type}" if not allowed else "empty in some rows"
                raise ValueError(f"{self.path / shard.file}: column '{name}' is {found}")
            values = column.to_numpy()
            wrong = ~np.isin(values, (0, 1)) if name == LABEL else (values < 0) | (values > most)
            if wrong.any():
                row = int(wrong.argmax())
                range_ = "0 or 1" if name == LABEL else f"0 … {most}, as {MANIFEST} says"
                raise ValueError(
                    f"{self.path / shard.file}: column '{name}' holds {values[row]} in row {row + 1}, outside {range_}"
                )

    def _table(self, shard: Shard, columns: list[str] | None) -> pa.Table:
        try:
            parquet = pq.ParquetFile(io.BytesIO(self._read(shard)))
            missing = [name for name in columns or [] if name not in parquet.schema_arrow.names]
            if missing:
                raise ValueError(f"{self.path / shard.file}: no column '{missing[0]}'")
            table = parquet.read(columns)
        except pa.ArrowException as error:
            raise ValueError(f"{self.path / shard.file}: not a readable Parquet file: {error}") from error
        if table.num_rows != shard.rows:
            raise ValueError(f"{self.path / shard.file}: {table.num_rows} rows where {MANIFEST} says {shard.rows}")
        return table

    def _read(self, file: File) -> bytes:
        """The file's bytes, compared with the checksum when it is read for the first time."""
        path = self.path / file.file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); prepare the data set again") from error
        if file.file not in self._checked:
            if hashlib.sha256(content).hexdigest() != file.sha256:
                raise ValueError(
                    f"{path}: the content does not match its checksum: damaged; prepare the data set again"
                )
            self._checked.add(file.file)
        return content

    def _split(self, split: str) -> Split:
        if split not in SPLITS:
            raise ValueError(f"unknown split '{split}': one of {', '.join(SPLITS)}")
        return self._manifest.splits[split]


class _Rows(NamedTuple):
    labels: np.ndarray
    dense: np.ndarray
    ids: np.ndarray  # int32: half the memory of what a batch hands out
    groups: np.ndarray | None

    def take(self, rows: np.ndarray) -> _Rows:
        groups = None if self.groups is None else self.groups.take(rows)
        return _Rows(self.labels.take(rows), self.dense.take(rows, axis=0), self.ids.take(rows, axis=0), groups)

    def cut(self, rows: slice) -> _Rows:
        groups = None if self.groups is None else self.groups[rows].copy()
        return _Rows(self.labels[rows].copy(), self.dense[rows].copy(), self.ids[rows], groups)

    def joined(self, other: _Rows) -> _Rows:
        groups = None
        if self.groups is not None and other.groups is not None:
            groups = np.concatenate([self.groups, other.groups])
        return _Rows(
            np.concatenate([self.labels, other.labels]),
            np.concatenate([self.dense, other.dense]),
            np.concatenate([self.ids, other.ids]),
            groups,
        )

    def batch(self) -> Batch:
        return Batch(
            torch.from_numpy(self.labels),
            torch.from_numpy(self.dense),
            torch.from_numpy(self.ids.astype(np.int64)),
            None if self.groups is None else torch.from_numpy(self.groups),
        )


def _generator(seed: int, epoch: int, window: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch, window])))


def read_manifest(folder: Path) -> tuple[dict[str, Any], Manifest]:
    """manifest.json as it stands and validated. ValueError names the file and the field."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder}: no prepared data set here ({MANIFEST} is missing); make one with `embtables prepare`"
        )
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); prepare the data set again") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f"{path}: field 'format' is not '{FORMAT}': not a prepared data set")
    if raw.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {raw.get('version')!r}, this release reads {VERSION}; prepare the data set again"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: field '{field}': {first['msg'].lower()}") from error
    names = [feature.name for feature in manifest.features]
    columns = [*names, *manifest.dense_features]
    repeated = next((name for name in columns if columns.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"{path}: field 'features': two features are named '{repeated}'")
    for field, value in (("group_feature", manifest.group_feature), ("slice_feature", manifest.slice_feature)):
        if value is not None and value not in names:
            raise ValueError(f"{path}: field '{field}': '{value}' is none of the features {', '.join(names)}")
    for split in SPLITS:
        if split not in manifest.splits:
            raise ValueError(f"{path}: field 'splits': '{split}' is missing")
        if manifest.splits[split].rows != sum(shard.rows for shard in manifest.splits[split].shards):
            raise ValueError(f"{path}: field 'splits.{split}.rows' is not the sum of its shards' rows")
    return raw, manifest
