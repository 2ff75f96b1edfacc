"""Any log of users, items and times, in delimited text or Parquet."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import polars as pl
import typer

from embtables._util.names import few
from embtables.datasets.dense_scale import Scale
from embtables.datasets.encoding import Encoding
from embtables.datasets.interaction_log import HISTORY, ITEM, USER, Log, LogOptions, write_log
from embtables.datasets.key_column import KeyColumn
from embtables.datasets.log_columns import SEPARATORS, DenseColumn, ListColumn, doubts_about, plain
from embtables.datasets.missing import WORDS, MissingValues
from embtables.datasets.negatives import Negatives
from embtables.datasets.options import (
    SPAN_MS,
    History,
    LeaveOut,
    MaxRejected,
    MinCount,
    Seed,
    Shares,
    Split,
    parse_duration,
)
from embtables.datasets.prepared import PreparedDataset
from embtables.datasets.raw_bytes import WrongEncoding
from embtables.datasets.reader import Reader
from embtables.datasets.recognized import (
    NO_COLUMN,
    ROLES,
    choose_label,
    find_labels,
    find_role,
    labels_of,
    no_column,
    no_header,
    numbers_of_labels,
)
from embtables.datasets.rejections import DEFAULT_LIMIT, Fault, Rejections
from embtables.datasets.splits import DEFAULT_SHARES
from embtables.datasets.tabular import Rows, Table, open_table
from embtables.datasets.times import READ_AS, UNITS_MS, Clock, say
from embtables.datasets.writing import Writer


@dataclass(frozen=True)
class Interactions(Reader):
    """Any log of users, items and times. A negative is an item that the user never clicked, at the click's context.

    The fields name the columns and the rows to use. A column that is ``None`` is recognized by its name. The first line
    of a text names its columns, unless ``columns`` does.

    A column of 0 and 1 with the name of a label is the label; ``label`` names another one, and with "none" every row is
    a click. Labels are 0 and 1 (or true and false), or, with ``positive_from``, numbers, which are positive from there
    on; rows with a label of ``leave_out`` are left out. ``start`` and ``end`` (excluded) are dates (UTC) or numbers in
    the log's own unit; ``days`` counts from ``start``, or from the first row. The time is not needed for a random
    split without histories; with "none" it is not read.

    ``context`` names columns of categories, ``dense`` of numbers, ``lists`` of lists. Empty text, NaN and words such as
    NULL and NA are missing values, and so are the words of ``missing``.
    """

    kind: ClassVar[str] = "interactions"
    input_help: ClassVar[str] = "Text with a header (plain, gzip, zstd, bzip2, xz) or Parquet."
    example: ClassVar[str] = (
        "Examples:\n\n"
        "embtables prepare interactions clicks.parquet data/clicks --context device,country --days 3\n\n"
        "embtables prepare interactions log.csv.gz data/log --user uid --item sku --time ts --label bought "
        "--split time\n\n"
        "embtables prepare interactions shop.csv data/shop --label none --dense price --lists tags "
        "--missing=-,unknown\n\n"
        "embtables prepare interactions ratings.dat data/ml --columns user_id,item_id,rating,timestamp --label rating "
        "--positive-from 4 --leave-out 3\n\n"
        "embtables prepare interactions old.txt data/old --encoding latin-1 --separator ';' --time-format day-first"
    )

    user: str | None = None
    item: str | None = None
    time: str | None = None
    label: str | None = None
    positive_from: float | None = None
    leave_out: tuple[float, ...] = ()
    context: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    list_separator: str | None = None
    missing: tuple[str, ...] = ()
    keep_missing_words: bool = False
    columns: tuple[str, ...] = ()
    separator: str | None = None
    encoding: str = "utf-8"
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"
    time_format: str | None = None
    start: str | None = None
    end: str | None = None
    days: float | None = None
    max_rejected: float = DEFAULT_LIMIT
    negatives: Negatives = field(default_factory=Negatives)
    log: LogOptions = field(default_factory=LogOptions)

    def __post_init__(self) -> None:
        if self.time_unit not in ("auto", *UNITS_MS):
            raise ValueError(f"time_unit '{self.time_unit}': auto, s, ms, us or ns is needed")
        Clock(self.time_unit, self.time_format)  # refuses a format that is none before anything is read
        if self.days is not None and not 0 < self.days < float("inf"):
            raise ValueError(f"days {self.days}: a number above 0 is needed")
        if self.days is not None and self.end is not None:
            raise ValueError("both days and an end are given: one of them is enough")
        no_label = self.label is None or self.label == NO_COLUMN
        if no_label and (self.positive_from is not None or self.leave_out):
            raise ValueError(
                f"{'positive_from' if self.positive_from is not None else 'leave_out'} needs a label column"
            )
        if no_label and self.negatives.per_click < 1:
            raise ValueError("without a label column at least 1 negative per click is needed")
        chosen = [*self.context, *self.dense, *self.lists]
        repeated = [name for name in chosen if chosen.count(name) > 1]
        if repeated:
            kind = "context column" if repeated[0] in self.context else "column"
            raise ValueError(f"{kind} '{repeated[0]}' is given twice")
        if {USER, ITEM} & {*self.dense, *self.lists}:
            raise ValueError(f"'{USER}' and '{ITEM}' are features already and cannot be numbers or lists as well")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns {','.join(self.columns)}: a name is given twice")
        try:
            "a".encode(self.encoding)  # LookupError where it is unknown, or one that is not of texts, such as base64
            known = codecs.lookup(self.encoding).name not in ("idna", "punycode", "undefined")
        except (LookupError, UnicodeError):
            known = False
        if not known:
            raise ValueError(f"encoding '{self.encoding}': unknown; utf-8, latin-1 and cp1252 are some")

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
    try:
        table = open_table(path, config.separator, names=config.columns, encoding=config.encoding, stripped=True)
        read = _LogReader(table, config, rejections)
        log = read.log(writer)
    except WrongEncoding as error:
        raise ValueError(f"{error}; --encoding, e.g. latin-1 or utf-16-le, tells another one") from error
    writer.rows_read, writer.rows_rejected = rejections.rows_read, rejections.counts
    writer.report(rejections.lines())
    negatives = config.negatives
    if log.timed:
        first, past = _span(config, read.clock, log.times)
        inside = (log.times >= first) & (log.times < past)
        if not inside.any():
            raise ValueError(
                f"{path}: no row lies in the chosen span; the log goes from {say(log.times.min())} to "
                f"{say(log.times.max())}"
            )
        log = log.take(np.flatnonzero(inside))
    else:
        negatives = replace(negatives, window_ms=None)
    writer.extra["rows_in_span"] = len(log.rows)
    write_log(writer, log, config.log, negatives, read.columns)
    scales = {name: Scale(**of) for name, of in writer.extra.get("dense", {}).items()}
    writer.extra["encoding"] = read.encoding(scales).model_dump()
    writer.report(read.told(log, scales))


def _span(config: Interactions, clock: Clock, times: np.ndarray) -> tuple[int, int]:
    first = int(times.min()) if config.start is None else clock.point(config.start, "from")
    past = int(times.max()) + 1 if config.end is None else clock.point(config.end, "to")
    if config.days is not None:
        past = first + round(config.days * SPAN_MS["d"])
    return first, past


class _LogReader:
    """Reads the rows of a table into a log, and keeps what there is to tell about its columns."""

    def __init__(self, table: Table, config: Interactions, rejections: Rejections) -> None:
        self.table, self.config, self.rejections = table, config, rejections
        self.where = str(table.path)
        self.user, self.item, self.time = self._roles()
        features = [*config.context, *config.dense, *config.lists]
        self.label = None if config.label == NO_COLUMN else config.label
        for name in (*features, *([self.label] if self.label else [])):
            if name not in table.names:
                raise no_column(table, name)
        if {USER, ITEM} & set(config.context):
            raise ValueError(f"'{USER}' and '{ITEM}' are features already and cannot be context columns as well")
        besides = [*features, self.user, self.item, *([self.time] if self.time else [])]
        self.maybe_labels = find_labels(table.names, besides) if config.label is None else []
        self.clock = Clock(config.time_unit, config.time_format)
        self.missing = MissingValues([*([] if config.keep_missing_words else WORDS), *config.missing])
        self.keys = {name: KeyColumn() for name in (USER, ITEM, *config.context)}
        self.dense = {name: DenseColumn(name) for name in config.dense}
        self.lists = {name: ListColumn(config.list_separator, self.missing) for name in config.lists}
        self.moments: list[pl.DataFrame] = []
        self.rows: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.said: list[str] = []
        self.left_out = 0
        self._label_is_chosen = False

    def _roles(self) -> tuple[str, str, str | None]:
        table, config = self.table, self.config
        roles: dict[str, str | None] = {}
        for role in ROLES:
            given = getattr(config, role)
            roles[role] = None if role == "time" and given == NO_COLUMN else find_role(table, role, given)
        if len(table.names) < 3 and None in (roles["user"], roles["item"]):
            found = ", ".join(table.names)
            raise ValueError(
                f"{table.path}:1: a header with at least user, item and time is needed, this is {found[:80]!r}; "
                "--separator tells what stands between its fields"
            )
        for role, other in (("user", "item"), ("user", "time"), ("item", "time")):
            if roles[role] is not None and roles[role] == roles[other]:
                raise ValueError(f"{table.path}: column '{roles[role]}' cannot be both the {role} and the {other}")
        for role, column in roles.items():
            if column is None and not (role == "time" and self._timeless):
                raise self._no_role(role)
        user, item, time = roles.values()
        assert user is not None and item is not None
        return user, item, time

    def _no_role(self, role: str) -> ValueError:
        table = self.table
        if table.without_header:
            return no_header(table.path, table)
        more = "; a random split without histories (--history 0) needs none" if role == "time" else ""
        return ValueError(
            f"{table.path}: which column is the {role}? Give --{role}, one of {', '.join(table.names)}{more}"
        )

    @property
    def _timeless(self) -> bool:
        """Whether the log may be without times."""
        config = self.config
        span = (config.start, config.end, config.days)
        return config.log.split == "random" and config.log.history == 0 and all(of is None for of in span)

    @property
    def columns(self) -> dict[str, KeyColumn]:
        """By feature, what knows the raw values of its keys."""
        return self.keys | {name: column.keys for name, column in self.lists.items()}

    def encoding(self, scales: dict[str, Scale]) -> Encoding:
        """How the rows that were read become features."""
        config = self.config
        features = (*config.context, *config.dense, *config.lists)
        columns = {USER: self.user, ITEM: self.item, **{name: name for name in features}}
        between = {name: column.separator for name, column in self.lists.items()}
        if config.log.history:  # a row to be scored brings its own
            columns[HISTORY] = HISTORY
            between[HISTORY] = config.list_separator
        return Encoding(
            columns=columns,
            floats=[name for name, column in self.columns.items() if column.of_floats],
            scales=scales,
            separators={name: separator or SEPARATORS[0] for name, separator in between.items()},
            history=config.log.history,
            missing=list(self.missing.words),
            separator=config.separator,
            names=list(config.columns),
            charset=config.encoding,
        )

    def log(self, writer: Writer) -> Log:
        """Reads all rows."""
        config = self.config
        wanted = {self.user, self.item, *config.context, *config.dense, *config.lists, *self.maybe_labels}
        wanted |= {name for name in (self.time, self.label) if name is not None}
        for block in self.table.rows(sorted(wanted), self.rejections, writer.progress):
            self._add(block)
        self.rejections.check(final=True)
        if not sum(map(len, self.rows)):
            raise ValueError(f"{self.table.path}: the file holds no rows")
        rows = np.concatenate(self.rows)
        labels = np.concatenate(self.labels) if self.labels else None
        if labels is not None and self.maybe_labels and labels.all():
            labels = None
            self.said.append(f"column '{self.label}' is 1 in every row: every row is a click")
            self.label = None
        if self.left_out:
            writer.extra["rows_left_out"] = self.left_out
            self.said.append(f"{self.left_out:,} rows left out, for their label")
        moments = pl.concat(self.moments)
        return Log(
            self.keys[USER].take_keys(),
            self.keys[ITEM].take_keys(),
            np.zeros(len(rows), np.int64) if self.time is None else self.clock.settled(moments),
            rows,
            labels,
            {name: self.keys[name].take_keys() for name in config.context},
            {name: column.take() for name, column in self.dense.items()},
            {name: column.take() for name, column in self.lists.items()},
            timed=self.time is not None,
        )

    def _add(self, block: Rows) -> None:
        frame, where = block.frame, self.where
        users = self.missing.removed(plain(frame[self.user], "--user", where))
        items = self.missing.removed(plain(frame[self.item], "--item", where))
        faults = {
            f"no user ('{self.user}' is empty)": Fault(users.is_null(), frame[self.user]),
            f"no item ('{self.item}' is empty)": Fault(items.is_null(), frame[self.item]),
        }
        moments = pl.DataFrame({"time": pl.Series([], dtype=pl.Int64), "swapped": pl.Series([], dtype=pl.Int64)})
        if self.time is not None:
            times = plain(frame[self.time], "--time", where)
            moments = self.clock.read(times)
            wrong = moments["time"].is_null() | moments["swapped"].is_null()
            faults[f"no valid time in '{self.time}'"] = Fault(wrong, times, READ_AS)
        label = self._labels(frame, faults)
        numbers = {}
        for name, column in self.dense.items():
            numbers[name], wrong = column.numbers(self.missing.removed(plain(frame[name], "--dense", where)), where)
            faults[column.fault] = Fault(wrong, frame[name])
        good = self.rejections.passing(faults, block.numbers, block.place)
        if label is not None and self.config.leave_out:
            left_out = (
                good
                & numbers_of_labels(frame[str(self.label)])
                .is_in(list(map(float, self.config.leave_out)))
                .fill_null(False)
                .to_numpy()
            )
            self.left_out += int(left_out.sum())
            good = good & ~left_out
        kept = pl.Series(good)
        self.keys[USER].add(users.filter(kept))
        self.keys[ITEM].add(items.filter(kept))
        for name in self.config.context:
            self.keys[name].add(self.missing.removed(plain(frame[name], "--context", where)).filter(kept))
        for name, column in self.dense.items():
            column.add(numbers[name].filter(kept))
        for name, lists in self.lists.items():
            lists.add(lists.lists(frame[name].filter(kept), where))
        self.moments.append(moments.filter(kept) if self.time is not None else moments)
        self.rows.append(block.numbers[good])
        if label is not None:
            self.labels.append(label.filter(kept).to_numpy())

    def _labels(self, frame: pl.DataFrame, faults: dict[str, Fault]) -> pl.Series | None:
        """The labels of a block, whose first block tells whether a column with the name of one is the label."""
        if self.maybe_labels and not self._label_is_chosen and len(frame):
            columns = [self.missing.removed(frame[name]) for name in self.maybe_labels]
            self.label, said = choose_label(self.table.path, columns)
            self.said += said
            self._label_is_chosen = True
        if self.label is None:
            return None
        values = plain(frame[self.label], "--label", self.where)
        label = labels_of(values, self.config.positive_from)
        hint = "labels are 0 and 1, or numbers with --positive-from"
        faults[f"no valid label in '{self.label}'"] = Fault(label.is_null(), values, hint)
        return label

    def told(self, log: Log, scales: dict[str, Scale]) -> list[str]:
        """What became of the columns, and what may be wrong with them, in words."""
        config = self.config
        uses = {self.user: "user", self.item: "item"}
        if self.time is not None:
            uses[self.time] = f"time ({self.clock.description()})"
        if self.label is not None:
            uses[self.label] = "label"
        uses |= dict.fromkeys(config.context, "category")
        for name, scale in scales.items():
            uses[name] = f"number (scale {scale.kind}; a missing one is {scale.fill:g})"
        for name, column in self.lists.items():
            uses[name] = "list" + (f" (between values: {column.separator!r})" if column.separator else "")
        lines = []
        for name, use in uses.items():
            share = self.missing.share(name)
            lines.append(f"column '{name}': {use}" + (f", {share:.1%} missing" if share else ""))
        unused = [name for name in self.table.names if name not in uses]
        if unused:
            lines.append(f"columns not used: {few(unused, 20)}")
        if self.label is None:
            lines.append("no label: every row is a click, and negatives are drawn")
        for name in config.context:
            self.said += doubts_about(name, self.keys[name], log.context[name])
        return [*lines, *(f"NOTE {line}" for line in [*self.said, *self.missing.warnings(list(uses))])]


def _from_options(
    user: Annotated[str | None, typer.Option(help="Column of the user; by default recognized by name.")] = None,
    item: Annotated[str | None, typer.Option(help="Column of the item; by default recognized by name.")] = None,
    time: Annotated[
        str | None, typer.Option(help="Column of the time; by default recognized by name; none: no times.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Column of the label; by default recognized by name; none: every row is a click.")
    ] = None,
    positive_from: Annotated[float | None, typer.Option(help="Labels from here on are positive.")] = None,
    leave_out: LeaveOut = (),
    context: Annotated[
        tuple[str, ...], typer.Option(help="Further columns of categories to use as features, separated by commas.")
    ] = (),
    dense: Annotated[tuple[str, ...], typer.Option(help="Columns of numbers to use as dense features.")] = (),
    dense_scale: Annotated[
        Literal["standard", "log", "none"],
        typer.Option(help="Of dense features: (x - mean) / deviation, ln(1 + max(x, 0)), or x."),
    ] = "standard",
    lists: Annotated[tuple[str, ...], typer.Option(help="Columns of lists: Parquet's, or text such as a|b.")] = (),
    list_separator: Annotated[
        str | None, typer.Option(help="Between the values of lists in text; by default recognized.")
    ] = None,
    missing: Annotated[
        tuple[str, ...], typer.Option(help="Further words for a missing value, e.g. --missing=-,unknown.")
    ] = (),
    keep_missing_words: Annotated[
        bool, typer.Option("--keep-missing-words", help="NULL, None, NA, nan and the like are values.")
    ] = False,
    columns: Annotated[tuple[str, ...], typer.Option(help="Names of the columns of text without a header.")] = (),
    separator: Annotated[str | None, typer.Option(help="Of the text's fields; by default recognized.")] = None,
    encoding: Annotated[str, typer.Option(help="Of the text, e.g. latin-1.")] = "utf-8",
    time_unit: Annotated[
        Literal["auto", "s", "ms", "us", "ns"], typer.Option(help="Of times that are numbers; auto: by their size.")
    ] = "auto",
    time_format: Annotated[
        str | None, typer.Option(help="day-first or month-first, of 03/04/2019, or a format such as '%d.%m.%y %H:%M'.")
    ] = None,
    start: Annotated[str | None, typer.Option("--from", help="First time to use: date (UTC) or number.")] = None,
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
        leave_out=leave_out,
        context=context,
        dense=dense,
        lists=lists,
        list_separator=list_separator,
        missing=missing,
        keep_missing_words=keep_missing_words,
        columns=columns,
        separator=None if separator is None else separator.replace("\\t", "\t"),
        encoding=encoding,
        time_unit=time_unit,
        time_format=time_format,
        start=start,
        end=end,
        days=days,
        max_rejected=max_rejected,
        negatives=Negatives(negatives, negative_sampling, parse_duration(negative_window)),
        log=LogOptions(split, shares, history, min_count, seed, dense_scale=dense_scale),
    )
