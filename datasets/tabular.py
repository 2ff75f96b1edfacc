"""A table in delimited text (plain or packed) or in Parquet, read in frames of chosen columns."""

from __future__ import annotations

import csv
import io
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
from embtables.datasets.text import Format, most_frequent, read_start, read_text

RECBOLE_TYPE = re.compile(r":(token|float)(_seq)?$")  # RecBole's headers: name:type
SEPARATORS = ("\t", ",", ";", "|", "::", "\x01", " ")  # of those that the header shows most often, the first
NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?([eE][+-]?\d+)?")


class Rows(NamedTuple):
    """Columns of text are text (null where empty), those of Parquet as they are."""

    frame: pl.DataFrame
    numbers: np.ndarray  # of the rows: lines of a text from 1, rows of Parquet from 0
    place: Callable[[int], str]  # a number in words


@dataclass(frozen=True)
class Table:
    """A file and the names of its columns; without ``layout`` it is Parquet."""

    path: Path
    names: list[str]
    layout: Format | None = None
    header: tuple[str, ...] = ()  # the fields of the header, as they stand there

    @property
    def without_header(self) -> bool:
        """Whether what should be the header looks like a row."""
        return any(NUMBER.fullmatch(name) for name in self.header)

    def rows(
        self, columns: Sequence[str], rejections: Rejections, progress: Progress, title: str = "Reading"
    ) -> Iterator[Rows]:
        """The well-formed rows, of which ``rejections`` counts all. A header that is repeated is skipped."""
        for name in columns:
            if self.names.count(name) > 1:
                raise ValueError(f"{self.path}:1: column '{name}' occurs twice")
        if self.layout is None:
            return self._of_parquet(columns, rejections, progress, title)
        return self._of_text(self.layout, columns, rejections, progress, title)

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

    def _repeats_header(self, frame: pl.DataFrame) -> pl.Series:
        """Which rows are the header, as files that were joined have it."""
        same = pl.Series([bool(self.header)] * len(frame), dtype=pl.Boolean)
        for name, field in zip(frame.columns, self.header):
            if not same.any():
                break
            same &= frame[name].eq_missing(pl.Series([field or None], dtype=pl.String))
        return same

    def _of_text(
        self, layout: Format, columns: Sequence[str], rejections: Rejections, progress: Progress, title: str
    ) -> Iterator[Rows]:
        task = progress.add_task(title, total=self.path.stat().st_size)
        for block in read_text(self.path, layout, rejections, lambda size: progress.advance(task, size)):
            frame, lines = block.frame, block.lines
            again = self._repeats_header(frame)
            if again.any():
                rejections.skip("the header again", int(again.sum()))
                frame, lines = frame.filter(~again), lines[~again.to_numpy()]
            yield Rows(frame.select(columns), lines, lambda line: f"{self.path}:{line}")


def open_table(
    path: Path,
    separator: str | None = None,
    *,
    names: Sequence[str] = (),
    encoding: str = "utf-8",
    stripped: bool = False,
) -> Table:
    """Opens delimited text or Parquet, which it tells apart by their content.

    Args:
        separator: by default recognized in the first line.
        names: of the columns of a text that has no header.
        stripped: spaces at the ends of the fields of a text are no part of them.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        raise ValueError(f"{path}: the file is empty")
    if start == b"PAR1":
        return Table(path, list(_parquet(path).schema_arrow.names))
    if separator == "":
        raise ValueError("separator '' separates nothing: give what stands between the fields, or leave it out")
    text = read_start(path, encoding)
    before = len(text) - len(text.lstrip("\n"))
    declared = re.match(r"sep=(.)\n", text)  # a line of Excel's before the header
    if declared is not None:
        text, before, separator = text[declared.end() :], 1, separator or declared[1]
    first = text.lstrip("\n").partition("\n")[0]
    unquoted = re.sub('"[^"]*"', "", first)
    separator = separator or most_frequent(SEPARATORS, unquoted)
    found, header_lines = _fields(text.lstrip("\n"), separator)
    if names:
        found, header_lines = list(names), 0
    header = tuple(field.strip(" ") for field in found)
    columns = [RECBOLE_TYPE.sub("", name.strip()) for name in found]
    distinct = tuple(name if name not in columns[:place] else f"{name} {place}" for place, name in enumerate(columns))
    layout = Format(separator, distinct, before + header_lines, encoding, quoted=True, stripped=stripped)
    return Table(path, columns, layout, () if names else header)


def _fields(text: str, separator: str) -> tuple[list[str], int]:
    """The fields of the first row, and its number of lines."""
    one = separator if len(separator.encode()) == 1 else "\x1f"
    reader = csv.reader(io.StringIO(text.replace(separator, one), newline="\n"), delimiter=one)
    try:
        return [field.replace(one, separator) for field in next(reader)], reader.line_num
    except csv.Error:
        return text.partition("\n")[0].split(separator), 1


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: the Parquet file is truncated or damaged ({error}); fetch it again") from error
