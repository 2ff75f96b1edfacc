"""Avazu's click log, as published: CSV with a header.

A row is a unique number ``id``, ``click`` (0 or 1), ``hour`` (YYMMDDHH) and 21 categories: 12 integers and 9 of 8 hex
digits. ``id`` is left out, as in BARS' Avazu_x1 and Avazu_x4. ``hour`` becomes ``hour`` (0 … 23), ``weekday`` (0 is
Sunday) and ``weekend`` (0 or 1), as in BARS' Avazu_x4. The raw value of a category of hex digits is the number that
they write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import polars as pl
import typer

from embtables.datasets.derived import day, hour_of_day, weekday, weekend
from embtables.datasets.options import MaxRejected, MinCount, Seed, Shares
from embtables.datasets.prepared import LABEL, PreparedDataset
from embtables.datasets.reader import Reader
from embtables.datasets.rejections import DEFAULT_LIMIT, Fault, Rejections
from embtables.datasets.row_keys import Schema
from embtables.datasets.splits import DEFAULT_SHARES, check_shares, random_split
from embtables.datasets.streaming import write_streaming
from embtables.datasets.text import Block, Format, read_header, read_text
from embtables.datasets.writing import Writer

HEX = [
    *("site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model"),
]
CATEGORIES = ["C1", "banner_pos", *HEX, "device_type", "device_conn_type", *(f"C{number}" for number in range(14, 22))]
COLUMNS = ("id", "click", "hour", *CATEGORIES)
DAY = "_day"
TIMES = {"hour": hour_of_day, "weekday": weekday, "weekend": weekend}
FEATURES = ["hour", *CATEGORIES, "weekday", "weekend"]


@dataclass(frozen=True)
class Avazu(Reader):
    """Avazu's mobile ads (Kaggle): 21 categories, and hour, weekday and weekend of the time; without the id of the row.

    With ``split`` "time" the last day tests, the day before validates, and all earlier days train. With "random" rows
    are split by ``shares``.
    """

    kind: ClassVar[str] = "avazu"
    input_help: ClassVar[str] = "train or train.gz as published."
    example: ClassVar[str] = "Example: embtables prepare avazu train.gz data/avazu --min-count 2"

    split: Annotated[
        Literal["time", "random"],
        typer.Option(help="time: the last day tests, the one before validates."),
    ] = "time"
    shares: Shares = DEFAULT_SHARES
    min_count: MinCount = 1
    seed: Seed = 0
    max_rejected: MaxRejected = DEFAULT_LIMIT

    def __post_init__(self) -> None:
        if self.split not in ("time", "random"):
            raise ValueError(f"split '{self.split}': 'time' or 'random' is needed")
        check_shares(self.shares)
        if self.min_count < 1:
            raise ValueError(f"min_count {self.min_count}: at least 1 is needed")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: it cannot be negative")

    def write(self, source: Path, writer: Writer) -> None:
        header = tuple(read_header(source).split(","))
        if header != COLUMNS:
            raise ValueError(f"{source}:1: the header is not Avazu's, {','.join(COLUMNS)}; fetch the published file")
        rejections, days = Rejections(self.max_rejected), set[int]()
        write_streaming(
            writer,
            rejections,
            _rows(writer, source, rejections, days),
            lambda block: _split(block, days, self, source),
            Schema(LABEL, (), FEATURES),
            min_count=self.min_count,
        )


def prepare_avazu(
    source: str | Path, out: str | Path, config: Avazu = Avazu(), *, progress: bool = False
) -> PreparedDataset:
    """Prepares ``train`` or ``train.gz``; memory grows with the vocabularies only.

    Example::

        data = prepare_avazu("avazu/train.gz", "runs/avazu", Avazu(min_count=2))
    """
    return config.prepare(source, out, progress=progress)


def _split(block: Block, days: set[int], config: Avazu, path: Path) -> np.ndarray:
    if config.split == "random":
        return random_split(block.lines, config.seed, config.shares)
    if len(days) < 3:
        raise ValueError(
            f"{path}: {len(days)} different days, where the split by time needs at least 3; use --split random"
        )
    return np.searchsorted(sorted(days)[-2:], block.frame[DAY].to_numpy(), side="right")


def _rows(writer: Writer, path: Path, rejections: Rejections, days: set[int]) -> Iterator[Block]:
    """Well-formed rows: float32 label, integer keys of the features, and the day, counted from 1970.

    ``days`` receives all days of the log.
    """
    advance = writer.meter(path)
    layout = Format(",", COLUMNS, header_lines=1)
    hour = pl.col("hour")
    for block in read_text(path, layout, rejections, advance):
        raw = block.frame
        parsed = raw.select(
            pl.col("click").cast(pl.Int8, strict=False).alias(LABEL),
            *(of(hour).alias(name) for name, of in TIMES.items()),
            day(hour).cast(pl.Int32).alias(DAY),
            *(
                pl.col(name).str.to_integer(base=16, dtype=pl.UInt32, strict=False)
                if name in HEX
                else pl.col(name).cast(pl.Int64, strict=False)
                for name in CATEGORIES
            ),
        )
        not_an_hour = pl.lit(parsed[DAY].is_null()) | hour.str.contains(r"^\d{6}([01]\d|2[0-3])$").not_()
        no_click = pl.lit(parsed[LABEL].is_in([0, 1]).not_() | parsed[LABEL].is_null())
        wrong = {"the click is not 0 or 1": ("click", no_click), "hour is not YYMMDDHH": ("hour", not_an_hour)}
        for name in CATEGORIES:
            kind, form = ("8 hex digits", "^[0-9a-f]{8}$") if name in HEX else ("an integer", r"^-?\d{1,18}$")
            wrong[f"{name} is not {kind}"] = name, pl.col(name).str.contains(form).not_()
        rows = raw.select(fault.alias(reason) for reason, (_, fault) in wrong.items())
        faults = {reason: Fault(rows[reason], raw[name]) for reason, (name, _) in wrong.items()}
        good = rejections.passing(faults, block.lines, lambda line: f"{path}:{line}")
        parsed = parsed.with_columns(pl.col(LABEL).cast(pl.Float32))
        if not good.all():
            parsed = parsed.filter(pl.Series(good))
        days.update(parsed[DAY].unique())
        yield Block(parsed, block.lines[good])
