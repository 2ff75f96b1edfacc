"""A table in CSV with a header (plain or gzipped) or in Parquet, read in frames of chosen columns."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from embtables.datasets.rejections import Rejections
from embtables.datasets.text import Format, read_header, read_text

RECBOLE_TYPE = re.compile(r":(token|float)(_seq)?$")  # RecBole's headers: name:type


class Rows(NamedTuple):
    """Columns of CSV are text (null where empty), those of Parquet as they are."""

    frame: pl.DataFrame
    numbers: np.ndarray  # of the rows: lines of a text from 1, rows of Parquet from 0
    place: Callable[[int], str]  # a number in words


@dataclass(frozen=True)
class Table:
    """A file and the names of its columns; without ``separator`` it is Parquet."""

    path: Path
    names: list[str]
    separator: str | None

    def rows(
        self, columns: Sequence[str], rejections: Rejections, progress: Progress, title: str = "Reading"
    ) -> Iterator[Rows]:
        """The well-formed rows, of which ``rejections`` counts all."""
        if self.separator is None:
            return self._of_parquet(columns, rejections, progress, title)
        return self._of_text(self.separator, columns, rejections, progress, title)

    def _of_parquet(
        self, columns: Sequence[str], rejections: Rejections, progress: Progress, title: str
    ) -> Iterator[Rows]:
        parquet = _parquet(self.path)
        task = progress.add_task(title, total=parquet.metadata.num_rows)
        start = 0
        batches = parquet.iter_batches(2**18, columns=list(columns))
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(
                    f"{self.path}: unreadable after row {start} ({error}): damaged; fetch it again"
                ) from error
            if batch is None:
                return
            frame = pl.DataFrame(pl.from_arrow(pa.table(batch)))
            rejections.rows_read += len(frame)
            yield Rows(frame, start + np.arange(len(frame)), lambda row: f"{self.path}, row {row + 1}")
            start += len(frame)
            progress.advance(task, len(frame))

    def _of_text(
        self, separator: str, columns: Sequence[str], rejections: Rejections, progress: Progress, title: str
    ) -> Iterator[Rows]:
        task = progress.add_task(title, total=self.path.stat().st_size)
        layout = Format(separator, tuple(self.names), header_lines=1, quoted=separator != "\t")
        for block in read_text(self.path, layout, rejections, lambda size: progress.advance(task, size)):
            yield Rows(block.frame.select(columns), block.lines, lambda line: f"{self.path}:{line}")


def open_table(path: Path, separator: str | None = None) -> Table:
    """Opens CSV or Parquet, which it tells apart by their content. Without ``separator``, the header shows it."""
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        raise ValueError(f"{path}: the file is empty")
    if start == b"PAR1":
        return Table(path, list(_parquet(path).schema_arrow.names), None)
    header = read_header(path)
    if separator == "":
        raise ValueError("separator '' separates nothing: give what stands between the fields, or leave it out")
    separator = separator or max("\t,;|", key=header.count)
    quoted = separator != "\t" and len(separator) == 1
    fields = next(csv.reader([header], delimiter=separator), []) if quoted else header.split(separator)
    names = [RECBOLE_TYPE.sub("", name.strip().strip('"')) for name in fields]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"{path}:1: column '{repeated[0]}' occurs twice")
    return Table(path, names, separator)


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: the Parquet file is truncated or damaged ({error}); fetch it again") from error
