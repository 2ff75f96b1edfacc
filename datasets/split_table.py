"""Tables of rows with labels that are split already: what their columns are, and their way into the prepared format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from embtables.datasets.derived import DERIVED
from embtables.datasets.histories import ranges
from embtables.datasets.prepared import GROUP, LABEL, MOST_ENTRIES
from embtables.datasets.rejections import DEFAULT_LIMIT, Rejections
from embtables.datasets.splits import row_uniforms
from embtables.datasets.string_keys import StringKeys
from embtables.datasets.tabular import Table
from embtables.datasets.vocabulary import FIRST_ID, MISSING_ID, UNSEEN_ID, KeyCounter, Vocabulary
from embtables.datasets.writing import Contents, Writer


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are; those that are not named are not read.

    `histories`: column of lists: the categorical column whose values they hold. Grouped metrics are over the values of
    `group`, which need not be a feature; metrics are told apart by how frequent the values of `item` are. `derived`: a
    categorical column is made by one of DERIVED of a column of the file. Of lists longer than `max_history` the
    `keep` values stay.
    """

    label: str
    dense: Sequence[str] = ()
    categorical: Sequence[str] = ()
    lists: Sequence[str] = ()  # multi-valued, with values of their own
    histories: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None
    item: str | None = None
    derived: Mapping[str, Sequence[str]] = field(default_factory=dict)  # name: (function, column)
    separator: str = "^"  # of lists in text
    max_history: int | None = None
    keep: Literal["first", "latest"] = "latest"
    min_count: int = 1

    def __post_init__(self) -> None:
        names = [*self.dense, *self.categorical, *self.lists, *self.histories]
        for name in names:
            if names.count(name) > 1 or name == self.label:
                raise ValueError(f"column '{name}' is given two meanings")
        if not self.categorical:
            raise ValueError("at least one categorical column is needed")
        for name, of in {**self.histories, **({} if self.item is None else {"item": self.item})}.items():
            if of not in self.categorical:
                raise ValueError(f"{name}: '{of}' is none of the categorical columns {', '.join(self.categorical)}")
        for name, (function, _) in self.derived.items():
            if name not in self.categorical or function not in DERIVED:
                raise ValueError(f"derived column '{name}': {function}(…) of {', '.join(DERIVED)} is needed")
        if self.min_count < 1:
            raise ValueError(f"min_count {self.min_count}: at least 1 is needed")
        if self.max_history is not None and not 1 <= self.max_history <= MOST_ENTRIES:
            raise ValueError(f"max_history {self.max_history}: a number from 1 to {MOST_ENTRIES:,} is needed")

    def sources(self) -> tuple[list[str], list[str]]:
        """The columns to read: those with a single value in each row and those with a list."""
        categorical = [self.derived[name][1] if name in self.derived else name for name in self.categorical]
        groups = [] if self.group is None else [self.group]
        single = dict.fromkeys([self.label, *self.dense, *categorical, *groups])
        return list(single), [*self.lists, *self.histories]


class Lists(NamedTuple):
    """Keys or ids of many lists, one after another, and where each begins."""

    values: np.ndarray
    offsets: np.ndarray

    def cut(self, columns: Columns) -> Lists:
        begin, end = self.offsets[:-1], self.offsets[1:]
        most = columns.max_history
        if most is None:
            return self
        if columns.keep == "first":
            end = np.minimum(end, begin + most)
        else:
            begin = np.maximum(begin, end - most)
        chosen, offsets = ranges(begin, end)
        return Lists(self.values[chosen], offsets)


class Part(NamedTuple):
    """Well-formed rows: label and dense features, keys of single-valued columns and of lists."""

    frame: pl.DataFrame
    keys: dict[str, np.ndarray]
    lists: dict[str, Lists]
    groups: np.ndarray | None
    numbers: np.ndarray


class Reader:
    """The rows of tables as keys, which mean the same in all of them."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.keys = {name: StringKeys() for name in (*columns.categorical, *columns.lists)}
        self._of_group = StringKeys()

    def parts(self, table: Table, rejections: Rejections, writer: Writer, title: str) -> Iterator[Part]:
        columns = self.columns
        single, lists = columns.sources()
        for name in (*single, *lists):
            if name not in table.names:
                raise ValueError(f"{table.path}: no column '{name}'; there are {', '.join(table.names)[:200]}")
        for rows in table.rows([*single, *lists], rejections, writer.progress, title):
            raw = {name: _single(rows.frame[name], table) for name in single}
            raw |= {name: _listed(rows.frame[name], columns.separator, table) for name in lists}
            numbers = {name: raw[name].cast(pl.Float64, strict=False) for name in (columns.label, *columns.dense)}
            label = numbers.pop(columns.label)
            values = {name: self._value(name, raw) for name in columns.categorical}
            faults = {f"the label '{columns.label}' is not 0 or 1": label.is_in([0.0, 1.0]).fill_null(False).not_()}
            for name, number in numbers.items():
                faults[f"'{name}' is not a number"] = raw[name].is_not_null() & number.is_null() | number.is_infinite()
            for name, value in values.items():
                if value.dtype.is_float():
                    faults[f"'{name}' is neither text nor a whole number"] = (value % 1 == 0).not_()
                    values[name] = value.cast(pl.Int64, strict=False)
            good = pl.Series(rejections.passing(faults, rows.numbers, rows.place))
            dense = {name: number.fill_nan(None).fill_null(0) for name, number in numbers.items()}
            yield Part(
                pl.DataFrame({LABEL: label, **dense}).filter(good),
                {name: self.keys[name].keys_of(value.filter(good)) for name, value in values.items()},
                {name: self._lists(name, raw[name].filter(good)) for name in lists},
                None if columns.group is None else self._of_group.keys_of(raw[columns.group].filter(good)),
                rows.numbers[good.to_numpy()],
            )

    def _value(self, name: str, raw: Mapping[str, pl.Series]) -> pl.Series:
        if name not in self.columns.derived:
            return raw[name]
        function, source = self.columns.derived[name]
        text = raw[source].cast(pl.String).to_frame(source)
        return text.select(DERIVED[function](pl.col(source))).to_series()

    def _lists(self, name: str, values: pl.Series) -> Lists:
        keys = self.keys[self.columns.histories.get(name, name)]
        offsets = np.r_[0, np.cumsum(values.list.len().to_numpy())].astype(np.int64)
        return Lists(keys.keys_of(_no_blanks(values.explode(empty_as_null=False))), offsets)


def _single(values: pl.Series, table: Table) -> pl.Series:
    """Numbers or text, null where there is nothing."""
    if values.dtype in (pl.Categorical, pl.Enum, pl.Null, pl.Boolean):
        values = values.cast(pl.Int8 if values.dtype == pl.Boolean else pl.String)
    if values.dtype.is_float():
        return values.fill_nan(None)
    if values.dtype == pl.String or values.dtype.is_integer():
        return _no_blanks(values)
    raise ValueError(
        f"{table.path}: column '{values.name}' is of type {values.dtype}, where numbers or text are needed"
    )


def _listed(values: pl.Series, separator: str, table: Table) -> pl.Series:
    """Lists of text or of integers, empty where there is nothing."""
    if values.dtype == pl.String:
        values = _no_blanks(values).str.split(separator)
    if isinstance(values.dtype, pl.List):
        inner = values.dtype.inner
        if inner == pl.String or inner.is_integer() or inner == pl.Null:
            return values.cast(pl.List(pl.String) if inner == pl.Null else values.dtype).fill_null([])
    raise ValueError(
        f"{table.path}: column '{values.name}' is of type {values.dtype}, where lists, or text with '{separator}' "
        "between values, are needed"
    )


def _no_blanks(values: pl.Series) -> pl.Series:
    return values.set(values == "", None) if values.dtype == pl.String else values


def write_splits(
    writer: Writer,
    tables: Mapping[str, Table],
    columns: Columns,
    *,
    valid_share: float = 0.0,
    seed: int = 0,
    max_rejected: float = DEFAULT_LIMIT,
) -> tuple[dict[str, Vocabulary], dict[str, int]]:
    """Writes the tables of train, valid and test, in two passes over train; returns vocabularies and rows of tables.

    Without a table for valid, a share of train, chosen by row, validates; if that is 0, all rows of test do.
    """
    reader = Reader(columns)
    rejections = Rejections(max_rejected)
    counters = {name: [KeyCounter()] for name in reader.keys}
    in_history = {name: KeyCounter() for name in columns.histories}
    for name, feature in columns.histories.items():
        counters[feature].append(in_history[name])
    for part in reader.parts(tables["train"], rejections, writer, "Counting ids"):
        train = row_uniforms(part.numbers, seed) >= valid_share
        for name, keys in part.keys.items():
            counters[name][0].add(keys[train])
        for name, lists in part.lists.items():
            counter = in_history.get(name) or counters[name][0]
            counter.add(lists.values[np.repeat(train, np.diff(lists.offsets))])
    rejections.check(final=True)

    vocabularies = {name: _vocabulary(of, columns.min_count) for name, of in counters.items()}
    writer.declare(
        Contents(
            {name: vocabularies[name] for name in columns.categorical},
            columns.dense,
            lists={name: vocabularies[name] for name in columns.lists},
            histories=columns.histories,
            group_feature=columns.group,
            slice_feature=columns.item,
            published={name: reader.keys[name].texts_of(of.keys) for name, of in vocabularies.items()},
        )
    )
    num_rows = dict.fromkeys(tables, 0)
    cut = unaligned = 0
    for split, table in tables.items():
        counted = Rejections(1.0) if split == "train" else rejections  # those of train are counted already
        for part in reader.parts(table, counted, writer, f"Writing {split}"):
            made = [pl.Series(name, vocabularies[name].ids(keys)) for name, keys in part.keys.items()]
            if part.groups is not None:
                made.append(pl.Series(GROUP, part.groups))
            for name, keys_of in part.lists.items():
                kept = keys_of.cut(columns)
                of = vocabularies[columns.histories.get(name, name)]
                listed = pa.LargeListArray.from_arrays(pa.array(kept.offsets), pa.array(of.ids(kept.values)))
                made.append(pl.Series(name, pl.from_arrow(listed)))
            lengths = np.array([np.diff(part.lists[name].offsets) for name in columns.histories])
            if len(lengths):
                cut += int((lengths > (columns.max_history or np.inf)).any(0).sum())
                unaligned += int((lengths != lengths[0]).any(0).sum())
            frame = part.frame.with_columns(made)
            num_rows[split] += len(frame)
            if split == "train" and valid_share:
                held_out = pl.Series(row_uniforms(part.numbers, seed) < valid_share)
                writer.write("valid", frame.filter(held_out))
                frame = frame.filter(~held_out)
            elif split == "test" and "valid" not in tables and not valid_share:
                writer.write("valid", frame)
            writer.write(split, frame)
    rejections.check(final=True)
    writer.rows_read, writer.rows_rejected = rejections.rows_read, rejections.counts
    writer.report(rejections.lines())
    if columns.histories:
        writer.extra |= {"histories_cut": cut, "rows_with_unaligned_histories": unaligned}
    return vocabularies, num_rows


def _vocabulary(counters: Sequence[KeyCounter], min_count: int) -> Vocabulary:
    """Of a column and its histories: what one of them shows often enough. Counts are those of all together."""
    counted = [counter.vocabulary() for counter in counters]
    shown = pl.concat(pl.DataFrame({"key": of.keys, "count": of.counts[FIRST_ID:]}) for of in counted)
    shown = shown.group_by("key").agg(total=pl.col("count").sum(), most=pl.col("count").max())
    kept = shown.filter(pl.col("most") >= min_count)
    vocabulary = Vocabulary(kept["key"].to_numpy(), kept["total"].to_numpy())
    vocabulary.counts[MISSING_ID] = sum(int(of.counts[MISSING_ID]) for of in counted)
    vocabulary.counts[UNSEEN_ID] = int(shown["total"].sum()) - int(kept["total"].sum())
    return vocabulary
