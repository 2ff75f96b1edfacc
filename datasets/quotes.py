"""Rows of delimited text with quoted fields."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

LONGEST_FIELD = 2**31 - 1
LONGEST_ROW = 2**24
"""A quote that is still open after this many bytes is taken for a character."""
MANY_LINES = 100
"""More than a text that somebody wrote has: two quotes of two rows may have been taken for a pair."""


@dataclass
class QuotedRows:
    """The rows of some lines, the line in which each begins, and the lines at the end whose row has no end yet.

    ``malformed`` holds the lines, of those in which rows begin, whose quotes are read as ordinary characters, and
    ``long`` those of rows of more than ``MANY_LINES`` lines.
    """

    rows: list[list[str]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    rest: str = ""
    malformed: list[int] = field(default_factory=list)
    long: list[int] = field(default_factory=list)
    open_quote: bool = False  # the last line opens a quote that nothing closes


def read_quoted(text: str, separator: str, first_line: int, *, last: bool) -> QuotedRows:
    """Reads whole lines. A field may stand in double quotes and then hold separators, line breaks and doubled quotes.

    A line whose quotes are not well-formed is read as if they were ordinary characters.

    Args:
        last: no more lines follow, so that a quote that is open at the end is not well-formed.
    """
    lines = list(io.StringIO(text, newline="\n"))
    read, start = QuotedRows(), 0
    with _fields_of_any_length():
        while start < len(lines):
            begin = start
            reader = csv.reader((lines[i] for i in range(begin, len(lines))), delimiter=separator, strict=True)
            try:
                for fields in reader:
                    if fields:
                        read.rows.append(fields)
                        read.lines.append(first_line + start)
                        if begin + reader.line_num - start > MANY_LINES:
                            read.long.append(first_line + start)
                    start = begin + reader.line_num
            except csv.Error:
                open_at_the_end = begin + reader.line_num == len(lines)
                if open_at_the_end and not last:
                    rest = "".join(lines[start:])
                    if len(rest) < LONGEST_ROW:
                        read.rest = rest
                        break
                read.open_quote = open_at_the_end and start == len(lines) - 1
                read.rows.append(lines[start].rstrip("\n").split(separator))
                read.lines.append(first_line + start)
                read.malformed.append(first_line + start)
                start += 1
    return read


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """The csv module's limit, of 131,072 characters by default, is one for the whole process."""
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
