"""Rows of raw values: what their columns are, how they are checked, and how they become integer keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import polars as pl

from embtables.datasets.key_lists import KeyLists
from embtables.datasets.prepared import GROUP, LABEL
from embtables.datasets.rejections import Fault, Rejections
from embtables.datasets.string_keys import StringKeys
from embtables.datasets.writing import list_column


@dataclass(frozen=True)
class Schema:
    """What the columns of rows are. Columns that it does not name are not read.

    Args:
        label: the column of the label, 0 or 1.
        dense: columns of numbers.
        categorical: columns of text or integers, each with a vocabulary and a table of its own.
        lists: multi-valued columns, lists of text or integers, each with a vocabulary and a table of its own.
        histories: columns of lists, oldest value first, and for each the categorical column whose values they hold.
        group: the column, usually of users, that grouped metrics are over. It need not be a feature.
        item: the categorical column by whose frequency metrics are sliced.
    """

    label: str
    dense: Sequence[str] = ()
    categorical: Sequence[str] = ()
    lists: Sequence[str] = ()
    histories: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None
    item: str | None = None

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

    @property
    def vocabularies(self) -> tuple[str, ...]:
        """The columns that have vocabularies of their own."""
        return (*self.categorical, *self.lists)

    @property
    def list_columns(self) -> tuple[str, ...]:
        return (*self.lists, *self.histories)


class KeyedRows(NamedTuple):
    """Well-formed rows with keys in place of raw values."""

    frame: pl.DataFrame  # the label and the dense features
    keys: dict[str, np.ndarray]  # int64, by categorical column
    lists: dict[str, KeyLists]
    groups: np.ndarray | None  # int64
    numbers: np.ndarray  # the number of each row

    def as_frame(self) -> pl.DataFrame:
        """Everything but the numbers as one frame."""
        columns = [pl.Series(name, keys) for name, keys in self.keys.items()]
        columns += [list_column(of.values, of.offsets).alias(name) for name, of in self.lists.items()]
        if self.groups is not None:
            columns.append(pl.Series(GROUP, self.groups))
        return self.frame.with_columns(columns)


class RowKeys:
    """Checks rows and turns their values into keys, which mean the same in all rows that one object is given."""

    def __init__(self, schema: Schema, form_of_lists: str = "lists of text or integers") -> None:
        """``form_of_lists``: what messages say about columns of lists that are of another type."""
        self.schema = schema
        self.form_of_lists = form_of_lists
        self.of_column = {name: StringKeys() for name in schema.vocabularies}
        self._of_group = StringKeys()

    def of(
        self,
        frame: pl.DataFrame,
        numbers: np.ndarray,
        rejections: Rejections,
        place: Callable[[int], str],
        where: str,
        more_faults: Mapping[str, Fault] = MappingProxyType({}),
    ) -> tuple[np.ndarray, KeyedRows]:
        """Which of the rows are well-formed (bool), and these rows with keys.

        Args:
            numbers: of the rows; ``place`` turns one into words.
            where: the file or the reader, which begins the message about a column that cannot be used.
            more_faults: further reasons to reject rows.

        Raises:
            ValueError: a column is missing or of a type that cannot be used, or too many rows are malformed.
        """
        schema = self.schema
        groups = [] if schema.group is None else [schema.group]
        single = list(dict.fromkeys([schema.label, *schema.dense, *schema.categorical, *groups]))
        check_columns(frame.columns, [*single, *schema.list_columns], where)
        raw = {name: single_values(frame[name], where) for name in single}
        listed = {name: self._lists_of_values(frame[name], where) for name in schema.list_columns}
        dense = {name: raw[name].cast(pl.Float64, strict=False) for name in (schema.label, *schema.dense)}
        label = dense.pop(schema.label)
        no_label = label.is_in([0.0, 1.0]).fill_null(False).not_()
        faults = {f"the label '{schema.label}' is not 0 or 1": Fault(no_label, raw[schema.label]), **more_faults}
        for name, number in dense.items():
            wrong = raw[name].is_not_null() & number.is_null() | number.is_infinite()
            faults[f"'{name}' is not a number"] = Fault(wrong, raw[name])
        values = {name: raw[name] for name in schema.categorical}
        for name, value in values.items():
            if value.dtype.is_float():
                values[name] = value.cast(pl.Int64, strict=False)
                wrong = (values[name] == value).not_() | (value.is_not_null() & values[name].is_null())
                faults[f"'{name}' is neither text nor a whole number"] = Fault(wrong, value)
        good = rejections.passing(faults, numbers, place)
        kept = pl.Series(good)
        filled = {name: number.fill_nan(None).fill_null(0) for name, number in dense.items()}
        return good, KeyedRows(
            pl.DataFrame({LABEL: label, **filled}).filter(kept),
            {name: self.of_column[name].keys_of(value.filter(kept)) for name, value in values.items()},
            {name: self._key_lists(name, values.filter(kept)) for name, values in listed.items()},
            None if schema.group is None else self._of_group.keys_of(raw[schema.group].filter(kept)),
            numbers[good],
        )

    def _lists_of_values(self, values: pl.Series, where: str) -> pl.Series:
        """Lists of text or of integers, empty where there is nothing."""
        if isinstance(values.dtype, pl.List):
            inner = values.dtype.inner
            if inner == pl.String or inner.is_integer() or inner == pl.Null:
                return values.cast(pl.List(pl.String) if inner == pl.Null else values.dtype).fill_null([])
        raise ValueError(
            f"{where}: column '{values.name}' is of type {values.dtype}, where {self.form_of_lists} are needed"
        )

    def _key_lists(self, name: str, values: pl.Series) -> KeyLists:
        keys = self.of_column[self.schema.histories.get(name, name)]
        offsets = np.r_[0, np.cumsum(values.list.len().to_numpy())].astype(np.int64)
        return KeyLists(keys.keys_of(without_blanks(values.explode(empty_as_null=False))), offsets)


def check_columns(names: Sequence[str], needed: Sequence[str], where: str) -> None:
    """Raises ValueError naming the first needed column that is missing."""
    for name in needed:
        if name not in names:
            raise ValueError(f"{where}: no column '{name}'; there are {', '.join(names)[:200]}")


def single_values(values: pl.Series, where: str) -> pl.Series:
    """Numbers or text, null where there is nothing."""
    if values.dtype in (pl.Categorical, pl.Enum, pl.Null, pl.Boolean):
        values = values.cast(pl.Int8 if values.dtype == pl.Boolean else pl.String)
    if values.dtype.is_float():
        return values.fill_nan(None)
    if values.dtype == pl.String or values.dtype.is_integer():
        return without_blanks(values)
    raise ValueError(f"{where}: column '{values.name}' is of type {values.dtype}, where numbers or text are needed")


def without_blanks(values: pl.Series) -> pl.Series:
    """The values, null where text is empty."""
    return values.set(values == "", None) if values.dtype == pl.String else values
