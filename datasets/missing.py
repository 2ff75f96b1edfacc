"""What counts as a missing value, in text and Parquet alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import polars as pl

WORDS = ("NULL", "null", "NaN", "nan", "-nan", "NA", "N/A", "n/a", "#N/A", "<NA>", "None", "NaT", r"\N")
"""Text that means a missing value, as databases, pandas, R and spreadsheets write it."""
DOUBTFUL = ("none", "nil", "(null)", "unknown", "undefined", "missing", "n.a.", "-", "--", "?", ".", "-1")
"""Text that may mean one: it is a value, and named where it holds much of a column. Compared in lower case."""
MUCH = 0.1  # of a column


class MissingValues:
    """Makes missing values null: empty text, NaN, and text that is one of ``words``. Counts what it finds by column."""

    def __init__(self, words: Iterable[str] = WORDS) -> None:
        self.words = tuple(dict.fromkeys(words))
        self._rows: Counter[str] = Counter()
        self._missing: Counter[str] = Counter()
        self._spelled: dict[str, Counter[str]] = {}

    def removed(self, values: pl.Series) -> pl.Series:
        """The values with null where one is missing."""
        if values.dtype.is_float():
            values = values.fill_nan(None)
        elif values.dtype == pl.String:
            shown = values.str.to_lowercase()
            word, doubtful = values.is_in(self.words), shown.is_in(DOUBTFUL)
            counts = self._spelled.setdefault(values.name, Counter())
            for text in (values.filter(word), shown.filter(doubtful & ~word)):
                counts.update(dict(text.value_counts().iter_rows()))
            values = values.set((word | (values == "")).fill_null(False), None)
        self._rows[values.name] += len(values)
        self._missing[values.name] += values.null_count()
        return values

    def share(self, name: str) -> float:
        """The share of a column's values that are missing."""
        return self._missing[name] / max(1, self._rows[name])

    def warnings(self, names: Sequence[str]) -> list[str]:
        """A sentence for each spelling that holds much of a column."""
        lines = []
        for name in names:
            for text, count in self._spelled.get(name, Counter()).most_common():
                share = count / max(1, self._rows[name])
                if share < MUCH:
                    break
                if text in self.words:
                    lines.append(
                        f"column '{name}': {share:.0%} of the values are {text!r}, which is read as a missing value "
                        "(--keep-missing-words reads it as a value)"
                    )
                else:
                    lines.append(
                        f"column '{name}': {share:.0%} of the values are {text!r}, which is read as a value like any "
                        f"other; if it means a missing one, give --missing={text}"
                    )
        return lines
