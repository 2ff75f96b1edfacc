"""The prepared format, read back: Parquet shards and a manifest."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Collection, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.progress import track

from embtables._util.files import check_seal
from embtables._util.reading import inside, read_json
from embtables.datasets.batch import Batch, Lists, Rows
from embtables.datasets.encoding import Encoding
from embtables.datasets.prefetch import read_ahead
from embtables.datasets.splits import SPLITS

if TYPE_CHECKING:
    from embtables import TableConfig

FORMAT, VERSION = "embtables-prepared", 1
MANIFEST, FREQUENCIES = "manifest.json", "frequencies.parquet"
LABEL, GROUP = "label", "_group"
MOST_ENTRIES = 2**31 - 1  # of one list
MOST_SHARD_ROWS = 2**24
"""More rows than any shard has that ``prepare`` writes: memory is taken for so many before they are read."""
WINDOW_BYTES = 2**31
"""A split of up to this many bytes is shuffled as a whole and stays in memory; a larger one by windows."""
BATCHES_AHEAD = 2
"""How many batches a thread makes before they are used, where a core is spare for it."""


class File(BaseModel):
    file: str
    sha256: str


class Shard(File):
    rows: int = Field(ge=0, le=MOST_SHARD_ROWS)
    bytes: int = Field(ge=0)
    list_values: dict[str, int] = {}  # ids in all lists of a column


class Split(BaseModel):
    rows: int = Field(ge=0)
    shards: list[Shard]


class Feature(BaseModel):
    name: str
    num_embeddings: int = Field(ge=2)
    vocabulary: File | None = None
    list: bool = False  # multi-valued: a column of lists


class History(BaseModel):
    """A list column of earlier ids, in the id space of ``feature``, oldest first."""

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
    group_feature: str | None  # what groups are, e.g. users; it need not be a feature
    slice_feature: str | None
    splits: dict[str, Split]
    frequencies: File
    encoding: Encoding | None = None  # of raw rows, where the kind has such

    def files(self) -> list[File]:
        """All files but the manifest itself."""
        vocabularies = [feature.vocabulary for feature in self.features if feature.vocabulary is not None]
        return [self.frequencies, *vocabularies, *(shard for split in self.splits.values() for shard in split.shards)]


class PreparedDataset:
    """A data set in a folder that ``embtables prepare`` wrote.

    Args:
        path: the folder.
        leave_out: names of features, dense features and histories that are not read. The histories of a feature are
            left out with it.
        max_history: the most entries of a history that are read, the latest ones; ``None`` reads all.

    Example::

        data = PreparedDataset("runs/globo")
        for batch in data.batches("train", 2048, seed=1, epoch=0):
            print(batch.labels.shape, batch.ids.shape, batch.lists["history"].values.shape)

    Raises:
        ValueError: the folder is not a prepared data set, or is damaged. The sentence names the file and the field.
    """

    def __init__(self, path: str | Path, leave_out: Collection[str] = (), max_history: int | None = None) -> None:
        self.path = Path(path)
        self.manifest, self._manifest = read_manifest(self.path)
        self.name = self._manifest.name
        self.leave_out = list(leave_out)
        self.max_history = max_history
        features = [feature for feature in self._manifest.features if feature.name not in leave_out]
        self.feature_names = [feature.name for feature in features if not feature.list]
        self.list_features = [feature.name for feature in features if feature.list]
        self.dense_features = [name for name in self._manifest.dense_features if name not in leave_out]
        self.num_embeddings = {feature.name: feature.num_embeddings for feature in features}
        self.histories = {
            history.name: history.feature
            for history in self._manifest.histories
            if history.name not in leave_out and history.feature in self.num_embeddings
        }
        self._check_selection(leave_out)
        self.group_feature = self._manifest.group_feature
        kept = self._manifest.slice_feature in self.num_embeddings
        self.slice_feature = self._manifest.slice_feature if kept else None
        self._frequencies: dict[str, np.ndarray] | None = None
        self._checked: set[str] = set()
        self._cache: dict[str, Rows] = {}
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

    def _check_selection(self, leave_out: Collection[str]) -> None:
        features = [feature.name for feature in self._manifest.features]
        known = [*features, *self._manifest.dense_features, *(history.name for history in self._manifest.histories)]
        for name in leave_out:
            if name not in known:
                raise ValueError(f"leave_out: {self.path} has no feature '{name}'; it has {', '.join(known)}")
        if not self.feature_names:
            raise ValueError(f"leave_out: no single-valued feature of {self.path} is left")
        if self.max_history is not None and not 1 <= self.max_history <= MOST_ENTRIES:
            raise ValueError(
                f"max_history {self.max_history}: a number from 1 to {MOST_ENTRIES:,} is needed; "
                "to do without, leave histories out"
            )

    def select(self, leave_out: Collection[str] = (), max_history: int | None = None) -> PreparedDataset:
        """Returns the same data with more left out and shorter histories, or itself where nothing changes."""
        out = list(dict.fromkeys([*self.leave_out, *leave_out]))
        most = min((n for n in (self.max_history, max_history) if n is not None), default=None)
        if (out, most) == (list(self.leave_out), self.max_history):
            return self
        return PreparedDataset(self.path, out, most)

    @property
    def frequencies(self) -> dict[str, np.ndarray]:
        """Training counts per id, int64[num_embeddings], by feature."""
        if self._frequencies is None:
            path = self.path / self._manifest.frequencies.file
            try:
                file = pq.ParquetFile(io.BytesIO(self._read(self._manifest.frequencies)))
                most = sum(feature.num_embeddings for feature in self._manifest.features)
                if _num_values(file, "counts") > most:  # compressed, they may be many more than the file has bytes
                    raise ValueError(f"{path}: more than the {most:,} counts that {MANIFEST} says")
                table = file.read()
                counts = table.column("counts")
                self._frequencies = {
                    name: counts[row].values.to_numpy()
                    for row, name in enumerate(table.column("feature").to_pylist())
                    if name in self.num_embeddings
                }
            except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
                raise ValueError(f"{path}: not a readable table of counts: {error}") from error
            for name, size in self.num_embeddings.items():
                if name not in self._frequencies or len(self._frequencies[name]) != size:
                    raise ValueError(f"{path}: no {size} counts for feature '{name}', as {MANIFEST} says")
        return self._frequencies

    def num_rows(self, split: str) -> int:
        """The number of rows of a split: "train", "valid" or "test"."""
        return self._split(split).rows

    def table_configs(self, embedding_dim: int) -> list[TableConfig]:
        """One table per feature. It has the name of the feature, whose histories share it, and averages lists."""
        from embtables import TableConfig

        configs = []
        for name, size in self.num_embeddings.items():
            histories = [history for history, feature in self.histories.items() if feature == name]
            pooling: Literal["sum", "mean"] = "mean" if histories or name in self.list_features else "sum"
            configs.append(TableConfig(name, size, embedding_dim, [name, *histories], pooling))
        return configs

    def verify(self, progress: bool = False) -> None:
        """Compares every file with its checksum. Raises ValueError naming the first that differs."""
        for file in track(self._manifest.files(), "Checking", disable=not progress):
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
        """Yields the batches of a split: in file order without a seed, else shuffled by seed and epoch alone.

        A split of up to ``WINDOW_BYTES`` is shuffled as a whole; a larger one by shards, and then within windows of
        that size, two of which are in memory: one is read while the other is used. ``skip`` leaves out the first
        batches, without reading what only they need.

        A thread reads windows ahead and, where a GPU or fewer threads than there are cores compute, another makes
        batches ahead. They end when the iterator is used up, closed or dropped. An error in a file is raised where the
        first batch that needs the file would have come.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: at least 1 is needed")
        if skip < 0:
            raise ValueError(f"skip {skip}: it cannot be negative")
        self._split(split)
        windows = read_ahead(self._loaded(split, seed, epoch, skip * batch_size))
        batches = cut_batches(windows, batch_size, drop_last)
        return read_ahead(batches, BATCHES_AHEAD) if _has_spare_core() else batches

    def _loaded(
        self, split: str, seed: int | None, epoch: int, to_skip: int
    ) -> Generator[tuple[Rows, np.ndarray | None, int], None, None]:
        """Yields windows, the order of their rows (None: as they are), and how many rows at the beginning to skip."""
        for number, window in enumerate(self._windows(split, seed, epoch)):
            num_rows = sum(shard.rows for shard in window)
            if to_skip >= num_rows:
                to_skip -= num_rows
                continue
            order = None if seed is None else _generator(seed, epoch, number + 1).permutation(num_rows)
            yield self._rows(split, window), order, to_skip
            to_skip = 0

    def _windows(self, split: str, seed: int | None, epoch: int) -> list[list[Shard]]:
        shards = [shard for shard in self._split(split).shards if shard.rows]
        limit = max(1, WINDOW_BYTES // self._row_bytes(split))
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

    def _row_bytes(self, split: str) -> int:
        """The average number of bytes of a row in memory."""
        flat = 4 * (1 + len(self.dense_features) + len(self.feature_names)) + 8
        lists = [*self.list_features, *self.histories]
        values = sum(shard.list_values.get(name, 0) for shard in self._split(split).shards for name in lists)
        return flat + 8 * len(lists) + 4 * values // max(1, self.num_rows(split))

    def _rows(self, split: str, window: list[Shard]) -> Rows:
        whole = sum(shard.rows for shard in window) == self.num_rows(split)
        if whole and split in self._cache:
            return self._cache[split]
        size = sum(shard.rows for shard in window)
        rows = Rows(
            np.empty(size, np.float32),
            np.empty((size, len(self.dense_features)), np.float32),
            np.empty((size, len(self.feature_names)), np.int32),
            None if self.group_feature is None else np.empty(size, np.int64),
            {},
        )
        groups = [] if rows.groups is None else [GROUP]
        lists: dict[str, list[Lists]] = {name: [] for name in (*self.list_features, *self.histories)}
        start = 0
        for shard in window:
            table = self._table(shard, [LABEL, *self.dense_features, *self.feature_names, *groups, *lists])
            self._check_values(shard, table)
            part = slice(start, start + shard.rows)
            rows.labels[part] = table.column(LABEL).to_numpy()
            for names, matrix in ((self.dense_features, rows.dense), (self.feature_names, rows.ids)):
                if names:  # stacked first: numpy transposes faster than it writes one column after another into rows
                    matrix[part] = np.stack([table.column(name).to_numpy() for name in names]).T
            if rows.groups is not None:
                rows.groups[part] = table.column(GROUP).to_numpy()
            for name, parts in lists.items():
                parts.append(self._lists(shard, table, name))
            start += shard.rows
        rows.lists.update({name: Lists.concatenated(parts) for name, parts in lists.items()})
        if whole:
            self._cache[split] = rows
        return rows

    def _lists(self, shard: Shard, table: pa.Table, name: str) -> Lists:
        column = table.column(name)
        listed = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        if not listed or not pa.types.is_integer(column.type.value_type) or column.null_count:
            found = "empty in some rows" if listed and column.null_count else f"of type {column.type}"
            raise ValueError(
                f"{self.path / shard.file}: column '{name}' is {found}, where {MANIFEST} says lists of ids"
            )
        lengths = pc.list_value_length(column).to_numpy().astype(np.int64)
        values = pc.list_flatten(column)
        most = self.num_embeddings[self.histories.get(name, name)] - 1
        ids = values.to_numpy()
        if values.null_count or (len(ids) and not 0 <= ids.min() <= ids.max() <= most):
            raise ValueError(
                f"{self.path / shard.file}: column '{name}' holds an id outside 0 … {most}, as {MANIFEST} says"
            )
        lists = Lists(ids.astype(np.int32, copy=False), np.r_[0, np.cumsum(lengths)])
        return lists.latest(self.max_history) if self.max_history is not None and name in self.histories else lists

    def _check_values(self, shard: Shard, table: pa.Table) -> None:
        """Checks that labels are 0 or 1 and ids in their range, which a correct checksum does not guarantee."""
        bounds = {LABEL: 1} | {name: self.num_embeddings[name] - 1 for name in self.feature_names}
        for name, most in bounds.items():
            column = table.column(name)
            allowed = pa.types.is_floating(column.type) if name == LABEL else pa.types.is_integer(column.type)
            if not allowed or column.null_count:
                found = f"of type {column.type}" if not allowed else "empty in some rows"
                raise ValueError(
                    f"{self.path / shard.file}: column '{name}' is {found}, where {MANIFEST} says otherwise"
                )
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
                raise ValueError(f"{self.path / shard.file}: no column '{missing[0]}', which {MANIFEST} names")
            num_rows = parquet.metadata.num_rows  # looked at first: a small file may claim any number
            if num_rows != shard.rows:
                raise ValueError(f"{self.path / shard.file}: {num_rows} rows where {MANIFEST} says {shard.rows}")
            return parquet.read(columns, use_threads=False)  # other cores are for the training that goes on
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.path / shard.file}: not a readable Parquet file: {error}") from error

    def _read(self, file: File) -> bytes:
        """The file's bytes, compared with the checksum when it is read for the first time."""
        path = self.path / file.file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(
                f"{path}, which {MANIFEST} names, cannot be read ({error.strerror}); prepare the data set again"
            ) from error
        if file.file not in self._checked:
            if hashlib.sha256(content).hexdigest() != file.sha256:
                raise ValueError(
                    f"{path}: the content does not match its checksum in {MANIFEST}: damaged; "
                    "prepare the data set again"
                )
            self._checked.add(file.file)
        return content

    def _split(self, split: str) -> Split:
        if split not in SPLITS:
            raise ValueError(f"unknown split '{split}': one of {', '.join(SPLITS)}")
        return self._manifest.splits[split]


def _has_spare_core() -> bool:
    """Whether a thread can make batches without slowing those that compute."""
    return torch.cuda.is_initialized() or torch.get_num_threads() < (os.cpu_count() or 1)


def cut_batches(
    windows: Generator[tuple[Rows, np.ndarray | None, int], None, None], batch_size: int, drop_last: bool = False
) -> Generator[Batch, None, None]:
    """Batches of windows: their rows, the order of these (None: as they are), and how many to skip in that order."""
    rest: Rows | None = None
    with closing(windows):
        for rows, order, position in windows:
            num_rows = len(rows.labels)
            if rest is not None:
                missing = batch_size - len(rest.labels)
                rest = rest.joined(_part(rows, order, 0, min(missing, num_rows)))
                position = min(missing, num_rows)
                if len(rest.labels) < batch_size:
                    continue
                yield rest.batch()
                rest = None
            while position + batch_size <= num_rows:
                yield _part(rows, order, position, position + batch_size).batch()
                position += batch_size
            if position < num_rows:
                rest = _part(rows, order, position, num_rows)
    if rest is not None and not drop_last:
        yield rest.batch()


def _part(rows: Rows, order: np.ndarray | None, start: int, stop: int) -> Rows:
    """A copy of the rows in these places of the order."""
    return rows.cut(slice(start, stop)) if order is None else rows.take(order[start:stop])


def _generator(seed: int, epoch: int, window: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch, window])))


def read_manifest(folder: Path) -> tuple[dict[str, Any], Manifest]:
    """Reads manifest.json: as plain data, and validated. Raises ValueError naming the file and the field."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder}: no prepared data set here ({MANIFEST} is missing); make one with `embtables prepare`"
        )
    try:
        raw = read_json(inside(folder, MANIFEST))
    except ValueError as error:
        raise ValueError(f"{error}; prepare the data set again") from error
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
    columns = [*names, *manifest.dense_features, *(history.name for history in manifest.histories)]
    repeated = next((name for name in columns if columns.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"{path}: field 'features': two features are named '{repeated}'")
    if manifest.slice_feature is not None and manifest.slice_feature not in names:
        raise ValueError(
            f"{path}: field 'slice_feature': '{manifest.slice_feature}' is none of the features {', '.join(names)}"
        )
    for history in manifest.histories:
        if history.feature not in names:
            raise ValueError(f"{path}: field 'histories': '{history.feature}' is none of the features")
    for split in SPLITS:
        if split not in manifest.splits:
            raise ValueError(f"{path}: field 'splits': '{split}' is missing")
        if manifest.splits[split].rows != sum(shard.rows for shard in manifest.splits[split].shards):
            raise ValueError(f"{path}: field 'splits.{split}.rows' is not the sum of its shards' rows")
    try:
        for file in manifest.files():
            inside(folder, file.file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    check_seal(raw, path)
    return raw, manifest


def _num_values(file: pq.ParquetFile, column: str) -> int:
    """How many values a column of lists holds in all, as the file's header says."""
    metadata = file.metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [group.column(j) for group in groups for j in range(group.num_columns)]
    return sum(chunk.num_values for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
