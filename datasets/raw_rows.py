"""Raw rows to be scored, from files and from memory, as frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
from rich.progress import Progress

from embtables.datasets.encoder import Encoder
from embtables.datasets.rejections import Rejections
from embtables.datasets.tabular import open_table

JSON_LINES = (".jsonl", ".ndjson")
BLOCK_BYTES = 2**24  # of JSON lines


class RawRows(NamedTuple):
    """Some rows, and where a row of them, counted from 0, is from, in words."""

    frame: pl.DataFrame
    place: Callable[[int], str]


def read_rows(path: Path, encoder: Encoder, progress: Progress) -> Iterator[RawRows]:
    """All rows of delimited text, Parquet, or a file of JSON objects, one a line, whose name ends in .jsonl or .ndjson.

    In a file of JSON the first 16 MiB tell the columns; what an object lacks is missing.

    Raises:
        ValueError: the file is none of these, damaged, without rows or a column that the encoder needs, or has a row
            that cannot be read.
    """
    encoding = encoder.encoding
    if path.suffix in JSON_LINES:
        yield from _of_json(path, encoder, progress)
        return
    table = open_table(path, encoding.separator, names=encoding.names, encoding=encoding.charset, stripped=True)
    encoder.check_columns(table.names, str(path))
    rejections = Rejections(1.0)
    any_rows = False
    for rows in table.rows(encoder.columns, rejections, progress, "Scoring"):
        _refuse_malformed(rejections)
        any_rows |= len(rows.frame) > 0
        yield RawRows(rows.frame, lambda row, rows=rows: rows.place(int(rows.numbers[row])))  # type: ignore[misc]
    _refuse_malformed(rejections)
    if not any_rows:
        raise ValueError(f"{path}: the file holds no rows")


def _refuse_malformed(rejections: Rejections) -> None:
    """Raises ValueError where a row could not be read: one that is left out would move the scores of all others."""
    for reason, place in rejections.first.items():
        raise ValueError(f"{place}: {reason}; every row is to have a score, so none is left out")


def _of_json(path: Path, encoder: Encoder, progress: Progress) -> Iterator[RawRows]:
    task = progress.add_task("Scoring", total=path.stat().st_size)
    line, any_rows = 1, False
    with path.open("rb") as file:
        while lines := file.readlines(BLOCK_BYTES):
            numbers = [number for number, text in enumerate(lines, line) if text.strip()]
            if numbers:
                frame = _json_frame(b"".join(lines), f"{path}:{line} … {line + len(lines) - 1}", len(numbers))
                if any_rows:
                    lacking = [pl.lit(None).alias(name) for name in encoder.columns if name not in frame.columns]
                    frame = frame.with_columns(lacking)
                any_rows = True
                yield RawRows(frame, lambda row, numbers=numbers: f"{path}:{numbers[row]}")  # type: ignore[misc]
            line += len(lines)
            progress.advance(task, sum(map(len, lines)))
    if not any_rows:
        raise ValueError(f"{path}: the file holds no rows")


def _json_frame(content: bytes, where: str, size: int) -> pl.DataFrame:
    try:
        frame = pl.read_ndjson(content, infer_schema_length=None)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not lines of JSON objects ({error})") from error
    if len(frame) != size:
        raise ValueError(f"{where}: {len(frame):,} JSON objects in {size:,} lines")
    return frame


def frame_of(rows: Any, encoder: Encoder) -> RawRows:
    """Rows in memory: a dict is one row, a list of dicts several; or a DataFrame of pandas or polars, a table of Arrow.

    In a list of dicts what some of them lack is missing.

    Raises:
        TypeError: they are none of these.
        ValueError: a column that the encoder needs is missing, or its values are not of one type.
    """
    place: Callable[[int], str] = "row {}".format
    if isinstance(rows, Mapping):
        rows = [rows]
    if isinstance(rows, (list, tuple)):
        if not all(isinstance(row, Mapping) for row in rows):
            raise TypeError("rows are a dict, a list of dicts, a DataFrame or an Arrow table, not a list of others")
        names = list(dict.fromkeys(name for row in rows for name in row)) if rows else encoder.columns
        encoder.check_columns(names, "the rows")
        columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in encoder.columns}
        return RawRows(pl.DataFrame([_column(name, values) for name, values in columns.items()]), place)
    if not hasattr(rows, "__arrow_c_stream__"):
        raise TypeError(f"rows are a dict, a list of dicts, a DataFrame or an Arrow table, not {type(rows).__name__}")
    encoder.check_columns(list(rows.column_names if hasattr(rows, "column_names") else rows.columns), "the rows")
    if hasattr(rows, "iloc"):  # of pandas, whose columns may hold objects of several types
        return RawRows(pl.DataFrame([_column(name, rows[name]) for name in encoder.columns]), place)
    return RawRows(pl.DataFrame(rows.select(encoder.columns)), place)


def _column(name: str, values: Any) -> pl.Series:
    try:
        return pl.Series(name, pl.from_arrow(pa.array(values)))
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(f"the rows: the values of column '{name}' are not of one type: {error}") from error
