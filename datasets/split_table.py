"""Tables of rows with labels that are split already: what their columns are, and their way into the prepared format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import polars as pl

from embtables.datasets.derived import DERIVED
from embtables.datasets.histories import ranges
from embtables.datasets.key_lists import KeyLists
from embtables.datasets.missing import MissingValues
from embtables.datasets.prepared import GROUP, MOST_ENTRIES
from embtables.datasets.rejections import DEFAULT_LIMIT, Rejections
from embtables.datasets.row_keys import (
    KeyedRows,
    RowKeys,
    Schema,
    check_columns,
    single_values,
    without_blanks,
)
from embtables.datasets.splits import row_uniforms
from embtables.datasets.tabular import Table
from embtables.datasets.vocabulary import FIRST_ID, MISSING_ID, UNSEEN_ID, KeyCounter, Vocabulary
from embtables.datasets.writing import Contents, Writer, list_column


@dataclass(frozen=True)
class Columns(Schema):
    """What the columns of a table in files are.

    Args:
        derived: categorical columns that are computed: the name of a function in ``DERIVED`` and a column of the file.
        separator: what stands between the values of a list in text.
        max_history: the most values that are kept of a list; ``None`` keeps all.
        keep: which values of a longer list are kept.
        missing: text that means a missing value, as empty text does.
        min_count: values that training shows fewer times share an id with values that it never shows.
    """

    derived: Mapping[str, Sequence[str]] = field(default_factory=dict)
    separator: str = "^"
    max_history: int | None = None
    keep: Literal["first", "latest"] = "latest"
    min_count: int = 1
    missing: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (function, _) in self.derived.items():
            if name not in self.categorical or function not in DERIVED:
                raise ValueError(f"derived column '{name}': {function}(…) of {', '.join(DERIVED)} is needed")
        if not self.separator:
            raise ValueError("separator '' separates nothing: give what stands between the values of a list")
        if self.min_count < 1:
            raise ValueError(f"min_count {self.min_count}: at least 1 is needed")
        if self.max_history is not None and not 1 <= self.max_history <= MOST_ENTRIES:
            raise ValueError(f"max_history {self.max_history}: a number from 1 to {MOST_ENTRIES:,} is needed")

    def sources(self) -> list[str]:
        """The columns of the file that are read."""
        categorical = [self.derived[name][1] if name in self.derived else name for name in self.categorical]
        groups = [] if self.group is None else [self.group]
        return list(dict.fromkeys([self.label, *self.dense, *categorical, *groups, *self.list_columns]))

    def shortened(self, lists: KeyLists) -> KeyLists:
        """The lists with at most ``max_history`` values each."""
        begin, end = lists.offsets[:-1], lists.offsets[1:]
        if self.max_history is None:
            return lists
        if self.keep == "first":
            end = np.minimum(end, begin + self.max_history)
        else:
            begin = np.maximum(begin, end - self.max_history)
        chosen, offsets = ranges(begin, end)
        return KeyLists(lists.values[chosen], offsets)


def _keyed(
    columns: Columns, keys: RowKeys, table: Table, rejections: Rejections, writer: Writer, title: str
) -> Iterator[KeyedRows]:
    """The well-formed rows of a table as keys."""
    sources, where = columns.sources(), str(table.path)
    check_columns(table.names, sources, where)
    words = MissingValues(columns.missing)
    for rows in table.rows(sources, rejections, writer.progress, title):
        rows = rows._replace(frame=rows.frame.select(words.removed(values) for values in rows.frame))
        lists = [rows.frame[name] for name in columns.list_columns if rows.frame[name].dtype == pl.String]
        derived = [
            single_values(rows.frame[source], where)
            .cast(pl.String)
            .to_frame()
            .select(DERIVED[function](pl.col(source)).alias(name))
            .to_series()
            for name, (function, source) in columns.derived.items()
        ]
        frame = rows.frame.with_columns(
            *(without_blanks(values).str.split(columns.separator) for values in lists), *derived
        )
        yield keys.of(frame, rows.numbers, rejections, rows.place, where)[1]


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
    keys = RowKeys(columns, f"lists, or text with '{columns.separator}' between values,")
    rejections = Rejections(max_rejected)
    counters = {name: [KeyCounter()] for name in columns.vocabularies}
    in_history = {name: KeyCounter() for name in columns.histories}
    for name, feature in columns.histories.items():
        counters[feature].append(in_history[name])
    for part in _keyed(columns, keys, tables["train"], rejections, writer, "Counting ids"):
        train = row_uniforms(part.numbers, seed) >= valid_share
        for name, values in part.keys.items():
            counters[name][0].add(values[train])
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
            published={name: keys.of_column[name].texts_of(of.keys) for name, of in vocabularies.items()},
        )
    )
    num_rows = dict.fromkeys(tables, 0)
    cut = unaligned = 0
    for split, table in tables.items():
        counted = Rejections(1.0) if split == "train" else rejections  # those of train are counted already
        for part in _keyed(columns, keys, table, counted, writer, f"Writing {split}"):
            made = [pl.Series(name, vocabularies[name].ids(values)) for name, values in part.keys.items()]
            if part.groups is not None:
                made.append(pl.Series(GROUP, part.groups))
            for name, keys_of in part.lists.items():
                kept = columns.shortened(keys_of)
                of = vocabularies[columns.histories.get(name, name)]
                made.append(list_column(of.ids(kept.values), kept.offsets).alias(name))
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
    writer.record(rejections)
    if columns.histories:
        writer.extra |= {"histories_cut": cut, "rows_with_unaligned_histories": unaligned}
    return vocabularies, num_rows


def _vocabulary(counters: Sequence[KeyCounter], min_count: int) -> Vocabulary:
    """The values that a column, or one of its histories, shows ``min_count`` times, with their total counts."""
    counted = [counter.vocabulary() for counter in counters]
    shown = pl.concat(pl.DataFrame({"key": of.keys, "count": of.counts[FIRST_ID:]}) for of in counted)
    shown = shown.group_by("key").agg(total=pl.col("count").sum(), most=pl.col("count").max())
    kept = shown.filter(pl.col("most") >= min_count)
    vocabulary = Vocabulary(kept["key"].to_numpy(), kept["total"].to_numpy())
    vocabulary.counts[MISSING_ID] = sum(int(of.counts[MISSING_ID]) for of in counted)
    vocabulary.counts[UNSEEN_ID] = int(shown["total"].sum()) - int(kept["total"].sum())
    return vocabulary
