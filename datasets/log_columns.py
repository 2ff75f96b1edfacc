"""Further columns of a log: categories, numbers and lists, from text and Parquet alike."""

from __future__ import annotations

from collections import Counter

import numpy as np
import polars as pl

from embtables.datasets.key_column import KeyColumn
from embtables.datasets.key_lists import KeyLists
from embtables.datasets.missing import MissingValues
from embtables.datasets.text import most_frequent

MANY_NUMBERS = 1000
"""A column of more different numbers than these is a quantity rather than a category, or an id."""
SEPARATORS = ("|", ";", ",", "^", " ")  # of lists in text: of those that occur most often, the first
LARGEST = float(np.finfo(np.float32).max)


def plain(values: pl.Series, what: str, where: str) -> pl.Series:
    """The values of a column that has one per row.

    Raises:
        ValueError: it holds lists, or nothing that has a text.
    """
    dtype = values.dtype
    if isinstance(dtype, (pl.List, pl.Array)):
        raise ValueError(
            f"{where}: column '{values.name}' holds lists and cannot be {what}; --lists {values.name} takes it"
        )
    if isinstance(dtype, (pl.Struct, pl.Object)):
        raise ValueError(
            f"{where}: column '{values.name}' is of type {dtype} and cannot be {what}: one value is needed"
        )
    return values.cast(pl.String) if dtype in (pl.Categorical, pl.Enum, pl.Binary) else values


class DenseColumn:
    """Collects a column of numbers."""

    def __init__(self, name: str) -> None:
        self.fault = f"'{name}' is not a number"
        self._parts: list[np.ndarray] = []

    def numbers(self, values: pl.Series, where: str) -> tuple[pl.Series, pl.Series]:
        """Float64, null where a number is missing; and which rows hold something that is none."""
        if values.dtype == pl.String:  # also with a decimal comma, which only quotes or another separator allow
            values = values.str.replace(r"^([+-]?\d+),(\d+)$", "$1.$2")
        elif not (values.dtype.is_numeric() or values.dtype in (pl.Boolean, pl.Null)):
            raise ValueError(f"{where}: column '{values.name}' is of type {values.dtype}, where numbers are needed")
        numbers = values.cast(pl.Float64, strict=False)
        wrong = values.is_not_null() & (numbers.is_null() | (numbers.abs() > LARGEST)).fill_null(False)
        return numbers.fill_nan(None), wrong

    def add(self, numbers: pl.Series) -> None:
        self._parts.append(numbers.fill_null(float("nan")).to_numpy())

    def take(self) -> np.ndarray:
        """All numbers, float64, NaN where one is missing."""
        return np.concatenate(self._parts)


class ListColumn:
    """Collects a column of lists, or of text with separators between values, in brackets and quotes or not."""

    def __init__(self, separator: str | None, missing: MissingValues) -> None:
        self.keys = KeyColumn()
        self.separator = separator
        self._missing = missing
        self._lengths: list[np.ndarray] = []

    def lists(self, values: pl.Series, where: str) -> pl.Series:
        """Lists of text or integers, without missing values.

        Raises:
            ValueError: the column holds neither lists nor text.
        """
        if isinstance(values.dtype, pl.Array):
            values = values.cast(pl.List(values.dtype.inner))
        if values.dtype in (pl.Categorical, pl.Enum, pl.Null) or values.dtype.is_integer():
            values = values.cast(pl.String)
        if values.dtype == pl.String:
            return self._of_text(values)
        if not isinstance(values.dtype, pl.List) or isinstance(values.dtype.inner, (pl.List, pl.Struct, pl.Array)):
            raise ValueError(
                f"{where}: column '{values.name}' is of type {values.dtype}, where lists or text are needed"
            )
        self.keys.of_floats |= values.dtype.inner.is_float()
        lists = values.fill_null([])
        return lists if values.dtype.inner.is_integer() else lists.cast(pl.List(pl.String))

    def _of_text(self, values: pl.Series) -> pl.Series:
        bare = values.str.strip_chars(" ").str.replace(r"^[\[({](.*)[\])}]$", "$1").fill_null("")
        if self.separator is None and (bare != "").any():
            text = "".join(bare.head(10_000))
            self.separator = most_frequent(SEPARATORS, text)
        return bare.str.split(self.separator or "|").list.eval(pl.element().str.strip_chars(" '\""))

    def flat(self, lists: pl.Series) -> tuple[pl.Series, np.ndarray]:
        """The values that are not missing, one list after another, and how many of them each list has."""
        lengths = lists.list.len().cast(pl.Int64).to_numpy()
        values = self._missing.removed(lists.explode(empty_as_null=False))
        present = values.is_not_null()
        if not present.all():
            of_list = np.repeat(np.arange(len(lengths)), lengths)
            lengths = np.bincount(of_list[present.to_numpy()], minlength=len(lengths))
        return values.filter(present), lengths

    def add(self, lists: pl.Series) -> None:
        values, lengths = self.flat(lists)
        self.keys.add(values)
        self._lengths.append(lengths)

    def take(self) -> KeyLists:
        """All lists, of keys."""
        return KeyLists.of_lengths(self.keys.take_keys(), self._lengths)


def doubts_about(name: str, column: KeyColumn, keys: np.ndarray) -> list[str]:
    """What a column of categories rather looks like, in words: numbers, or lists."""
    texts = column.all_values()
    if len(texts) == 0:  # integers are their own keys
        distinct, numeric = len(np.unique(keys)), True
    else:
        distinct = len(texts)
        numeric = distinct > MANY_NUMBERS and texts.cast(pl.Float64, strict=False).count() > 0.99 * distinct
    if numeric and distinct > MANY_NUMBERS:
        return [f"context column '{name}' has {distinct:,} different numbers: if quantities, give --dense {name}"]
    counted = Counter({of: int(texts.str.contains(of, literal=True).sum()) for of in SEPARATORS if of != " "})
    separator, most = counted.most_common(1)[0]
    if most > 0.5 * distinct and distinct > 2:
        return [f"context column '{name}' has '{separator}' in most values: if they are lists, give --lists {name}"]
    return []
