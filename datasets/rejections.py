"""Malformed rows: counted by reason, reported with the first place, and too many of them stop the reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

DEFAULT_LIMIT = 0.01
PATIENCE = 10_000
"""After this many rows the share of malformed rows is checked while reading; it is always checked at the end."""

Values = pl.Series | pl.DataFrame


class Fault(NamedTuple):
    """Which rows are malformed in one way, ``bool`` (null: no), and what is told of the first of them."""

    rows: pl.Series
    values: Values | None = None  # of all rows: the column whose value is malformed, or all those of which one is
    hint: str | None = None  # what would be well-formed


def _first(values: Values) -> Any:
    """What stands in the first row; of several columns a tuple."""
    row = values.to_frame().row(0) if isinstance(values, pl.Series) else values.row(0)
    return row if len(row) > 1 else row[0]


class Rejections:
    """Counts the malformed rows of a source.

    Args:
        limit: the share of malformed rows, from 0 to 1, above which reading stops.
    """

    def __init__(self, limit: float = DEFAULT_LIMIT) -> None:
        if not 0 <= limit <= 1:
            raise ValueError(f"max_rejected {limit}: a share from 0 to 1 is needed")
        self.limit = limit
        self.rows_read = 0
        self.lines_read = 0  # of a text: rows, blank lines and the header
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}
        self.values: dict[str, str] = {}  # of the first row of a reason, where it is a value that is malformed
        self.hints: dict[str, str] = {}  # what would be well-formed, by reason
        self.skipped: dict[str, int] = {}  # lines that are no rows, by what they are
        self.doubts: dict[str, tuple[int, str]] = {}  # how many rows may be misread, by how, and the first place

    def add(self, reason: str, rows: np.ndarray, place: Callable[[int], str], values: Values | None = None) -> None:
        """Counts the rows with these numbers; ``place`` turns a number into words, e.g. "train.txt:17".

        Args:
            values: the malformed value of each row.
        """
        if len(rows):
            self.counts[reason] = self.counts.get(reason, 0) + len(rows)
            if reason not in self.first:
                self.first[reason] = place(int(rows[0]))
                if values is not None and (value := _first(values)) is not None:
                    self.values[reason] = repr(value)[:80]

    def skip(self, what: str, lines: int) -> None:
        """Counts lines that were taken for rows and are none, such as a header that is repeated."""
        if lines:
            self.rows_read -= lines
            self.skipped[what] = self.skipped.get(what, 0) + lines

    def doubt(self, what: str, path: Path, lines: Sequence[int]) -> None:
        """Counts rows that are read, and perhaps misread, by the lines in which they begin."""
        if lines:
            count, first = self.doubts.get(what, (0, f"{path}:{lines[0]}"))
            self.doubts[what] = count + len(lines), first

    def reject(self, reason: str, place: str) -> None:
        """Counts one malformed row. ``place`` is where it stands, e.g. "train.txt:17".

        Raises:
            ValueError: more than the allowed share of the rows read is malformed.
        """
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, place)
        self.check()

    def passing(
        self,
        faults: Mapping[str, Fault],
        rows: np.ndarray,
        place: Callable[[int], str],
    ) -> np.ndarray:
        """Which of the rows with these numbers have none of the faults (bool).

        A row counts once, under the reason of its first fault; ``place`` turns its number into words.
        """
        good = np.ones(len(rows), bool)
        for reason, fault in faults.items():
            if fault.rows.any():
                bad = fault.rows.fill_null(False).to_numpy() & good
                self.add(reason, rows[bad], place, None if fault.values is None else fault.values.filter(bad))
                good &= ~bad
                if fault.hint is not None:
                    self.hints[reason] = fault.hint
        self.check()
        return good

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def check(self, *, final: bool = False) -> None:
        """Raises ValueError when more than the allowed share of the rows read is malformed."""
        enough = final or self.rows_read >= PATIENCE
        if enough and self.total > self.limit * self.rows_read:
            reason = max(self.counts, key=lambda name: self.counts[name])
            value = f" ({self.values[reason]})" if reason in self.values else ""
            raise ValueError(
                f"{self.first[reason]}: {reason}{value}; {self.total:,} of {self.rows_read:,} rows read are malformed, "
                f"more than the allowed {self.limit:.3%}: {self.hints.get(reason, 'wrong kind of file')}, "
                "or allow more with --max-rejected"
            )

    def lines(self) -> list[str]:
        """One line per reason, for the person who runs the command."""
        lines = []
        for reason, count in self.counts.items():
            value = f": {self.values[reason]}" if reason in self.values else ""
            lines.append(f"{count:,} rows rejected: {reason} (first {self.first[reason]}{value})")
        lines += [f"{count:,} lines skipped: {what}" for what, count in self.skipped.items()]
        return lines + [f"NOTE {count:,} rows {what} (first {place})" for what, (count, place) in self.doubts.items()]
