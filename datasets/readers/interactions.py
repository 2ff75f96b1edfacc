"""Any log of users, items and times, in CSV or Parquet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import polars as pl
import typer

from embtables.datasets.interaction_log import ITEM, USER, Log, LogOptions, write_log
from embtables.datasets.key_column import KeyColumn
from embtables.datasets.negatives import Negatives
from embtables.datasets.options import (
    SPAN_MS,
    History,
    MaxRejected,
    MinCount,
    Seed,
    Shares,
    Split,
    parse_duration,
)
from embtables.datasets.prepared import PreparedDataset
from embtables.datasets.reader import Reader
from embtables.datasets.rejections import DEFAULT_LIMIT, Rejections
from embtables.datasets.splits import DEFAULT_SHARES
from embtables.datasets.tabular import open_table
from embtables.datasets.writing import Writer

ROLES = {
    "user": ("user_id", "userid", "user", "uid", "visitorid", "visitor_id", "customer_id", "reviewerid"),
    "item": (
        *("item_id", "itemid", "item", "iid", "article_id", "product_id", "movie_id", "movieid", "news_id", "video_id"),
        *("business_id", "asin", "content_id", "click_article_id"),
    ),
    "time": (
        *("timestamp", "timestamp_ms", "time", "ts", "datetime", "date", "event_time", "unix_time", "time_ms"),
        *("click_timestamp", "unixreviewtime", "created_at"),
    ),
}
UNITS_MS = {"s": 1000.0, "ms": 1.0, "us": 1e-3, "ns": 1e-6}


@dataclass(frozen=True)
class Interactions(Reader):
    """Any log of users, items and times. A negative is an item that the user never clicked, at the click's context.

    The fields name the columns and the rows to use. A column that is ``None`` is recognized by its name.

    Without ``label`` every row is a click. With it, labels are 0 and 1, or, with ``positive_from``, numbers, which
    are positive from there on. ``start`` and ``end`` (excluded) are ISO dates (UTC) or numbers in the log's own
    unit; ``days`` counts from ``start``, or from the first row.
    """

    kind: ClassVar[str] = "interactions"
    input_help: ClassVar[str] = "CSV with a header (may be gzipped) or Parquet."
    example: ClassVar[str] = (
        "Examples:\n\n"
        "embtables prepare interactions clicks.parquet data/clicks --context device,country --days 3\n\n"
        "embtables prepare interactions log.csv.gz data/log --user uid --item sku --time ts --label bought --split time"
    )

    user: str | None = None
    item: str | None = None
    time: str | None = None
    label: str | None = None
    positive_from: float | None = None
    context: tuple[str, ...] = ()
    separator: str | None = None
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"
    start: str | None = None
    end: str | None = None
    days: float | None = None
    max_rejected: float = DEFAULT_LIMIT
    negatives: Negatives = field(default_factory=Negatives)
    log: LogOptions = field(default_factory=LogOptions)

    def __post_init__(self) -> None:
        if self.time_unit not in ("auto", *UNITS_MS):
            raise ValueError(f"time_unit '{self.time_unit}': auto, s, ms, us or ns is needed")
        if self.days is not None and not 0 < self.days < float("inf"):
            raise ValueError(f"days {self.days}: a number above 0 is needed")
        if self.days is not None and self.end is not None:
            raise ValueError("both days and an end are given: one of them is enough")
        if self.label is None and self.positive_from is not None:
            raise ValueError("positive_from needs a label column")
        if self.label is None and self.negatives.per_click < 1:
            raise ValueError("without a label column at least 1 negative per click is needed")
        repeated = [name for name in self.context if self.context.count(name) > 1]
        if repeated:
            raise ValueError(f"context column '{repeated[0]}' is given twice")

    def write(self, source: Path, writer: Writer) -> None:
        _fill(writer, source, self)

    @classmethod
    def constructor(cls) -> Callable[..., Reader]:
        return _from_options


def prepare_interactions(
    source: str | Path, out: str | Path, config: Interactions = Interactions(), *, progress: bool = False
) -> PreparedDataset:
    """Prepares a log. Features: ``user_id``, ``item_id`` and the context columns; groups are users; slices go by item.

    The columns of the log lie in memory, its text does not: 8 bytes per row and column, and about 60 more per row.

    Example::

        data = prepare_interactions("clicks.parquet", "runs/clicks", Interactions(context=("device",), days=3))
    """
    return config.prepare(source, out, progress=progress)


def _fill(writer: Writer, path: Path, config: Interactions) -> None:
    rejections = Rejections(config.max_rejected)
    log, columns, clock = _read(path, config, rejections, writer)
    writer.rows_read, writer.rows_rejected = rejections.rows_read, rejections.counts
    writer.report(rejections.lines())
    first, past = _span(config, clock, log.times)
    inside = (log.times >= first) & (log.times < past)
    if not inside.any():
        raise ValueError(
            f"{path}: no row lies in the chosen span; the log goes from {_say(log.times.min())} to "
            f"{_say(log.times.max())}"
        )
    log = log.take(np.flatnonzero(inside))
    writer.extra |= {
        "rows_in_span": len(log.rows),
        "first_time": _say(log.times.min()),
        "last_time": _say(log.times.max()),
    }
    write_log(writer, log, config.log, config.negatives, columns)


class Clock:
    """Times of any kind as milliseconds since 1970; the unit of plain numbers is settled by the first block."""

    def __init__(self, unit: str) -> None:
        self._scale = UNITS_MS.get(unit)

    def milliseconds(self, values: pl.Series) -> pl.Series:
        """Int64, null where the value is no time."""
        if values.dtype == pl.Date or isinstance(values.dtype, pl.Datetime):
            return values.cast(pl.Datetime("ms")).cast(pl.Int64)
        if values.dtype == pl.String:
            numbers = values.cast(pl.Float64, strict=False)
            if numbers.null_count() > values.null_count() and self._scale is None:
                return values.map_elements(_iso_ms, return_dtype=pl.Int64)
            values = numbers
        if not values.dtype.is_numeric():
            raise ValueError(f"the time column is of type {values.dtype}: numbers, dates or ISO text are needed")
        if self._scale is None:
            largest = values.abs().max()
            digits = float(largest) if isinstance(largest, (int, float)) else 0.0
            unit = "s" if digits < 1e11 else "ms" if digits < 1e14 else "us" if digits < 1e17 else "ns"
            self._scale = UNITS_MS[unit]
        finite = values if values.dtype.is_integer() else values.replace(float("inf"), None).fill_nan(None)
        return (
            (finite * self._scale).floor().cast(pl.Int64, strict=False)
            if self._scale != 1
            else finite.cast(pl.Int64, strict=False)
        )

    def point(self, text: str, option: str) -> int:
        """A moment that the user names: a number in the log's unit or an ISO date."""
        try:
            return int(float(text) * (self._scale or 1000.0))
        except (ValueError, OverflowError):
            moment = _iso_ms(text)
            if moment is None:
                raise ValueError(
                    f"{option} {text!r}: a number or an ISO date such as 2017-10-02T12:00 is needed"
                ) from None
            return moment


def _iso_ms(text: str) -> int | None:
    try:
        moment = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        return None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp() * 1000)


def _say(milliseconds: int) -> str:
    try:
        return datetime.fromtimestamp(int(milliseconds) / 1000, timezone.utc).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return f"{int(milliseconds)} ms"


def _span(config: Interactions, clock: Clock, times: np.ndarray) -> tuple[int, int]:
    first = int(times.min()) if config.start is None else clock.point(config.start, "from")
    past = int(times.max()) + 1 if config.end is None else clock.point(config.end, "to")
    if config.days is not None:
        past = first + round(config.days * SPAN_MS["d"])
    return first, past


def _read(
    path: Path, config: Interactions, rejections: Rejections, writer: Writer
) -> tuple[Log, dict[str, KeyColumn], Clock]:
    table = open_table(path, config.separator)
    names = table.names
    if len(names) < 3:
        found = ", ".join(names)
        raise ValueError(f"{path}:1: a header with at least user, item and time is needed, this is {found[:80]!r}")
    roles = {role: _column(path, role, getattr(config, role), names) for role in ROLES}
    for role, other in (("user", "item"), ("user", "time"), ("item", "time")):
        if roles[role] == roles[other]:
            raise ValueError(f"{path}: column '{roles[role]}' cannot be both the {role} and the {other}")
    for name in (*config.context, *([config.label] if config.label else [])):
        if name not in names:
            raise ValueError(f"{path}: no column '{name}'; there are {', '.join(names)}")
    wanted = {*roles.values(), *config.context} | ({config.label} if config.label else set())
    columns = {name: KeyColumn() for name in (USER, ITEM, *config.context)}
    if len(columns) != 2 + len(config.context):
        raise ValueError(f"'{USER}' and '{ITEM}' are features already and cannot be context columns as well")
    clock = Clock(config.time_unit)
    times, rows, labels = [], [], []
    for frame, number, place in table.rows(sorted(wanted), rejections, writer.progress):
        moments = clock.milliseconds(frame[roles["time"]])
        faults = {
            f"no user ('{roles['user']}' is empty)": frame[roles["user"]].is_null(),
            f"no item ('{roles['item']}' is empty)": frame[roles["item"]].is_null(),
            f"no valid time in '{roles['time']}'": moments.is_null(),
        }
        if config.label:
            label = _labels(frame[config.label], config.positive_from)
            faults[f"no valid label in '{config.label}'"] = label.is_null()
        good = rejections.passing(faults, number, place)
        kept = pl.Series(good)
        frame = frame.filter(kept)
        columns[USER].add(frame[roles["user"]])
        columns[ITEM].add(frame[roles["item"]])
        for name in config.context:
            columns[name].add(frame[name])
        times.append(moments.filter(kept).to_numpy())
        rows.append(number[good])
        if config.label:
            labels.append(label.filter(kept).to_numpy())
    rejections.check(final=True)
    if not sum(map(len, rows)):
        raise ValueError(f"{path}: the file holds no rows")
    log = Log(
        columns[USER].take_keys(),
        columns[ITEM].take_keys(),
        np.concatenate(times),
        np.concatenate(rows),
        np.concatenate(labels) if labels else None,
        {name: columns[name].take_keys() for name in config.context},
    )
    return log, columns, clock


def _labels(values: pl.Series, positive_from: float | None) -> pl.Series:
    numbers = values.cast(pl.Float64, strict=False).fill_nan(None)
    if positive_from is not None:
        return (numbers >= positive_from).cast(pl.Int8)
    return pl.select(pl.when(numbers.is_in([0.0, 1.0])).then(numbers)).to_series().cast(pl.Int8)


def _column(path: Path, role: str, given: str | None, names: list[str]) -> str:
    if given is not None:
        if given not in names:
            raise ValueError(f"{path}: no column '{given}'; there are {', '.join(names)}")
        return given
    known = {name.lower(): name for name in names}
    for candidate in ROLES[role]:
        if candidate in known:
            return known[candidate]
    raise ValueError(f"{path}: which column is the {role}? Give --{role}, one of {', '.join(names)}")


def _from_options(
    user: Annotated[str | None, typer.Option(help="Column of the user; by default recognized by name.")] = None,
    item: Annotated[str | None, typer.Option(help="Column of the item; by default recognized by name.")] = None,
    time: Annotated[str | None, typer.Option(help="Column of the time; by default recognized by name.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label; without it every row is a click.")] = None,
    positive_from: Annotated[float | None, typer.Option(help="Labels from here on are positive.")] = None,
    context: Annotated[
        tuple[str, ...], typer.Option(help="Further columns to use as features, separated by commas.")
    ] = (),
    separator: Annotated[str | None, typer.Option(help="Of the CSV's fields; by default recognized.")] = None,
    time_unit: Annotated[
        Literal["auto", "s", "ms", "us", "ns"], typer.Option(help="Of times that are numbers; auto: by their size.")
    ] = "auto",
    start: Annotated[str | None, typer.Option("--from", help="First time to use: ISO date (UTC) or number.")] = None,
    end: Annotated[str | None, typer.Option("--to", help="First time not to use any more.")] = None,
    days: Annotated[float | None, typer.Option(help="Length of the span, from --from or the first row.")] = None,
    negatives: Annotated[int, typer.Option(help="Negatives per click, where there is no label.")] = 1,
    negative_sampling: Annotated[
        Literal["popularity", "uniform"],
        typer.Option(help="By clicks in the window, or all items with equal probability."),
    ] = "popularity",
    negative_window: Annotated[str, typer.Option(help="Preceding clicks to draw from: 30m, 1h, 2d, all.")] = "1h",
    history: History = 50,
    split: Split = "random",
    shares: Shares = DEFAULT_SHARES,
    min_count: MinCount = 1,
    seed: Seed = 0,
    max_rejected: MaxRejected = DEFAULT_LIMIT,
) -> Interactions:
    return Interactions(
        user=user,
        item=item,
        time=time,
        label=label,
        positive_from=positive_from,
        context=context,
        separator=None if separator is None else separator.replace("\\t", "\t"),
        time_unit=time_unit,
        start=start,
        end=end,
        days=days,
        max_rejected=max_rejected,
        negatives=Negatives(negatives, negative_sampling, parse_duration(negative_window)),
        log=LogOptions(split, shares, history, min_count, seed),
    )
