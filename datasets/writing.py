"""Writes the prepared format: once for all readers, whole or not at all."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from embtables._util.files import followed, naming, remove_leftovers, replacing_folder, sealed, sha256
from embtables._util.lock import only_one
from embtables.datasets.prepared import (
    FORMAT,
    FREQUENCIES,
    GROUP,
    LABEL,
    MANIFEST,
    VERSION,
    PreparedDataset,
    read_manifest,
)
from embtables.datasets.rejections import Rejections
from embtables.datasets.splits import SPLITS
from embtables.datasets.vocabulary import Vocabulary

ROWS_PER_SHARD = 2**18
ADDED = {
    *("dense", "lists", "list_separator", "dense_scale", "missing", "keep_missing_words", "time_format", "columns"),
    *("encoding", "leave_out", "without"),
}
"""Options that data prepared by version 0.1 do not name."""
ADDED_AS: tuple[Any, ...] = ([], None, False, "standard", "utf-8", "auto")
"""What these options are where they are not given, as the manifest has it."""
SHARDS_AT_ONCE = 2
"""How many shards are compressed and written in threads while further rows are made; they stay in memory meanwhile."""


@dataclass
class Contents:
    """What the data consist of: features with their vocabularies, lists, histories, and the columns for metrics."""

    features: Mapping[str, Vocabulary]
    dense_features: Sequence[str] = ()
    lists: Mapping[str, Vocabulary] = field(default_factory=dict)  # multi-valued features: columns of lists
    histories: Mapping[str, str] = field(default_factory=dict)  # list column: the feature whose ids it holds
    group_feature: str | None = None
    slice_feature: str | None = None
    published: Mapping[str, pl.Series] = field(default_factory=dict)  # raw values in id order where keys are not they

    def check(self) -> None:
        """Raises ValueError where two columns have one name."""
        names = [LABEL, GROUP, *self.dense_features, *self.features, *self.lists, *self.histories]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"column '{repeated[0]}' would occur twice: "
                f"{', '.join((LABEL, GROUP, *self.histories))} are reserved, rename it"
            )


class Writer:
    """Writes the rows of the three splits, in the order in which they come, to shards of ``rows_per_shard`` rows.

    A context: files are only complete when it has been left.
    """

    def __init__(self, folder: Path, console: Console, rows_per_shard: int) -> None:
        self.folder = folder
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet,
        )
        self.rows_per_shard = rows_per_shard
        self.rows_read = 0
        self.rows_rejected: dict[str, int] = {}
        self.extra: dict[str, Any] = {}
        self._contents: Contents | None = None
        self._vocabularies: list[dict[str, str]] = []
        self._waiting: dict[str, list[pl.DataFrame]] = {split: [] for split in SPLITS}
        self._shards: dict[str, list[Future[dict[str, Any]]]] = {split: [] for split in SPLITS}
        self._pool = ThreadPoolExecutor(SHARDS_AT_ONCE)
        self._under_way: deque[Future[dict[str, Any]]] = deque()
        for split in SPLITS:
            (folder / split).mkdir()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def declare(self, contents: Contents) -> None:
        """Writes vocabularies and frequencies. It is called once, before the first row."""
        contents.check()
        self._contents = contents
        (self.folder / "vocabulary").mkdir()
        vocabularies = {**contents.features, **contents.lists}
        for number, (name, vocabulary) in enumerate(vocabularies.items()):
            values = contents.published.get(name, pl.Series(vocabulary.keys))
            file = f"vocabulary/{number:05d}.parquet"
            _write_parquet(pl.DataFrame({"value": values}), self.folder / file)
            self._vocabularies.append({"file": file, "sha256": sha256(self.folder / file)})
        frequencies = {
            "feature": list(vocabularies),
            "counts": [pl.Series(vocabulary.counts) for vocabulary in vocabularies.values()],
        }
        _write_parquet(pl.DataFrame(frequencies), self.folder / FREQUENCIES)

    def meter(self, *paths: Path, title: str = "Reading") -> Callable[[int], None]:
        """A progress bar over the bytes of files; the function that it returns moves it on by a number of bytes."""
        task = self.progress.add_task(title, total=sum(path.stat().st_size for path in paths))
        return partial(self.progress.advance, task)

    def record(self, rejections: Rejections) -> None:
        """Puts the numbers of rows read and rejected into the manifest, and reports them.

        Raises:
            ValueError: more than the allowed share of the rows is malformed.
        """
        rejections.check(final=True)
        self.rows_read, self.rows_rejected = rejections.rows_read, rejections.counts
        self.report(rejections.lines())

    def report(self, lines: Sequence[str]) -> None:
        """Prints lines above the progress bars."""
        for line in lines:
            self.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def write(self, split: str, rows: pl.DataFrame) -> None:
        """Writes rows of a split, whose columns have the names of the format; types are converted here."""
        assert self._contents is not None, "declare() comes first"
        if len(rows) == 0:
            return
        types: dict[str, Any] = {LABEL: pl.Float32}
        types |= {name: pl.Float32 for name in self._contents.dense_features}
        types |= {name: pl.Int32 for name in self._contents.features}
        if self._contents.group_feature is not None:
            types[GROUP] = pl.Int64
        types |= {name: pl.List(pl.Int32) for name in (*self._contents.lists, *self._contents.histories)}
        types |= {name: dtype for name, dtype in rows.schema.items() if name not in types}
        waiting = self._waiting[split]
        waiting.append(rows.select(pl.col(name).cast(dtype) for name, dtype in types.items()))
        num_rows = sum(len(frame) for frame in waiting)
        if num_rows >= self.rows_per_shard:
            frame = pl.concat(waiting)
            full = num_rows - num_rows % self.rows_per_shard
            for start in range(0, full, self.rows_per_shard):
                self._begin_shard(split, frame.slice(start, self.rows_per_shard))
            self._waiting[split] = [frame.slice(full)] if full < num_rows else []

    def _begin_shard(self, split: str, rows: pl.DataFrame) -> None:
        if len(self._under_way) == SHARDS_AT_ONCE:
            self._under_way.popleft().result()
        name = f"{split}/{len(self._shards[split]):05d}.parquet"
        self._under_way.append(self._pool.submit(self._write_shard, name, rows))
        self._shards[split].append(self._under_way[-1])

    def _write_shard(self, name: str, rows: pl.DataFrame) -> dict[str, Any]:
        """The shard's entry in the manifest."""
        path = self.folder / name
        _write_parquet(rows, path)
        entry = {"file": name, "rows": len(rows), "bytes": path.stat().st_size, "sha256": sha256(path)}
        assert self._contents is not None
        lists = (*self._contents.lists, *self._contents.histories)
        entry["list_values"] = {name: int(rows[name].list.len().sum()) for name in lists}
        return entry

    def finish(self, kind: str, name: str, config: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
        """Writes the last shards and the manifest."""
        assert self._contents is not None, "declare() comes first"
        for split, waiting in self._waiting.items():
            if waiting:
                self._begin_shard(split, pl.concat(waiting))
        shards = {split: [shard.result() for shard in shards] for split, shards in self._shards.items()}
        splits = {split: {"rows": sum(shard["rows"] for shard in of), "shards": of} for split, of in shards.items()}
        for split, entry in splits.items():
            if entry["rows"] == 0:
                raise ValueError(
                    f"split '{split}' would be empty ({self.rows_read} rows read): "
                    "more data or another --split is needed"
                )
        contents = self._contents
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "name": name,
            "kind": kind,
            "config": config,
            "inputs": inputs,
            "rows_read": self.rows_read,
            "rows_rejected": self.rows_rejected,
            "dense_features": list(contents.dense_features),
            "features": [
                {
                    "name": feature,
                    "num_embeddings": vocabulary.num_embeddings,
                    "vocabulary": file,
                    "list": feature in contents.lists,
                }
                for (feature, vocabulary), file in zip(
                    {**contents.features, **contents.lists}.items(), self._vocabularies
                )
            ],
            "histories": [{"name": column, "feature": of} for column, of in contents.histories.items()],
            "group_feature": contents.group_feature,
            "slice_feature": contents.slice_feature,
            "splits": splits,
            "frequencies": {"file": FREQUENCIES, "sha256": sha256(self.folder / FREQUENCIES)},
            **self.extra,
        }
        (self.folder / MANIFEST).write_text(json.dumps(sealed(manifest), indent=1) + "\n", encoding="utf-8")


def prepare(
    out: str | Path,
    kind: str,
    config: dict[str, Any],
    inputs: Sequence[Path],
    fill: Callable[[Writer], None],
    *,
    progress: bool = False,
) -> PreparedDataset:
    """Prepares the data set that ``kind``, ``config`` and ``inputs`` describe, which ``fill`` gives to a writer.

    Where ``out`` holds that very data set already it is reused; where it holds anything else, ValueError. One process
    works on an ``out`` at a time, others wait. Rows go to a hidden folder beside ``out``, renamed at the end and
    removed on any failure.
    """
    out = followed(os.path.abspath(out))
    console = Console(stderr=True, quiet=not progress)
    config = json.loads(json.dumps(config))  # as the manifest will give it back
    for path in inputs:
        if not path.exists():
            raise ValueError(f"{path}: no such file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{out}: its parent is not a folder") from error
    with naming(out), only_one(out, lambda: console.print(f"another process is preparing {out}; waiting for it")):
        remove_leftovers(out.parent)
        return _prepare_locked(out, kind, config, inputs, fill, console)


def _prepare_locked(
    out: Path,
    kind: str,
    config: dict[str, Any],
    inputs: Sequence[Path],
    fill: Callable[[Writer], None],
    console: Console,
) -> PreparedDataset:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        _check_same(out, kind, config, inputs)
        dataset = PreparedDataset(out)
        console.print(f"{out} was prepared from the same input with the same options: reused", soft_wrap=True)
        return dataset
    described = [describe_input(path) for path in inputs]
    try:
        with replacing_folder(out) as partial, Writer(partial, console, ROWS_PER_SHARD) as writer, writer.progress:
            fill(writer)
            writer.finish(kind, out.name, config, described)
    except OSError as error:
        if error.filename in (None, str(out)):
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise OSError(f"{out}: {reason}; nothing was written") from error
        raise
    dataset = PreparedDataset(out)
    for line in _summary(dataset):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return dataset


def _summary(dataset: PreparedDataset) -> list[str]:
    """What was prepared, in words."""
    manifest = dataset.manifest
    rejected = sum(manifest["rows_rejected"].values())
    rows = ", ".join(f"{dataset.num_rows(split):,} {split}" for split in SPLITS)
    lines = [f"{dataset.path}: {rows} rows; {manifest['rows_read']:,} rows read, {rejected:,} rejected"]
    facts = [f"{manifest[name]:,} {name}" for name in ("users", "items", "positives") if name in manifest]
    if "first_time" in manifest:
        facts.append(f"from {manifest['first_time']} to {manifest['last_time']}")
    if facts:
        lines.append(", ".join(facts))
    names = [*dataset.feature_names, *dataset.list_features]
    lines.append("ids: " + ", ".join(f"{name} {dataset.num_embeddings[name]:,}" for name in names))
    if dataset.dense_features:
        lines.append("dense features: " + ", ".join(dataset.dense_features))
    if dataset.histories:
        lines.append("histories: " + ", ".join(f"{name} (of {of})" for name, of in dataset.histories.items()))
    return lines


def _check_same(out: Path, kind: str, config: dict[str, Any], inputs: Sequence[Path]) -> None:
    remedy = "choose another OUT, or remove it to prepare it anew"
    if not (out / MANIFEST).is_file():
        raise ValueError(f"{out} exists and is not a prepared data set: {remedy}")
    _, manifest = read_manifest(out)
    if manifest.kind != kind:
        raise ValueError(f"{out} holds a prepared data set of kind '{manifest.kind}', not '{kind}': {remedy}")
    before, now = _flat(manifest.config), _flat(config)
    before = {**{name: now[name] for name in ADDED & now.keys() if now[name] in ADDED_AS}, **before}
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old != new:
            raise ValueError(f"{out} was prepared with {key} = {old}, not {new}: {remedy}")
    same = len(inputs) == len(manifest.inputs) and all(map(_unchanged, inputs, manifest.inputs))
    if not same:
        raise ValueError(f"{out} was prepared from another input or an older version of it: {remedy}")


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Nested options by their innermost names, which are unique within a kind."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value) if isinstance(value, dict) else {key: value}
    return flat


def describe_input(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"file": path.name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns, "sha256": sha256(path)}


def _unchanged(path: Path, known: dict[str, Any]) -> bool:
    stat = path.stat()
    if (path.name, stat.st_size) != (known.get("file"), known.get("bytes")):
        return False
    return stat.st_mtime_ns == known.get("modified_ns") or sha256(path) == known.get("sha256")


def list_column(values: np.ndarray, offsets: np.ndarray) -> pl.Series:
    """A column of lists: list ``i`` is ``values[offsets[i] : offsets[i + 1]]``."""
    return pl.Series(pl.from_arrow(pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))))


def _write_parquet(rows: pl.DataFrame, path: Path) -> None:
    table: pa.Table = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
    pq.write_table(table, path, compression="zstd", compression_level=1, use_dictionary=False)
