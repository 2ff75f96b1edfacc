"""Delimited text, plain or packed, in blocks of rows that have the right number of columns."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import polars as pl

from embtables.datasets.prefetch import read_ahead
from embtables.datasets.quotes import MANY_LINES, read_quoted
from embtables.datasets.raw_bytes import BLOCK_BYTES, WrongEncoding, read_normalized
from embtables.datasets.rejections import Rejections

T = TypeVar("T")


@dataclass(frozen=True)
class Format:
    """How a text file is laid out. A separator of several characters is allowed.

    A field that is ``quoted`` stands in double quotes and may hold separators and line breaks; a line whose quotes are
    not well-formed is read as if they were ordinary characters. A byte order mark tells the encoding in any case.
    """

    separator: str
    columns: tuple[str, ...]
    header_lines: int = 0
    encoding: str = "utf-8"
    quoted: bool = False  # CSV: fields may stand in double quotes
    stripped: bool = False  # spaces at the ends of a field, in quotes or not, are no part of it


@dataclass(frozen=True)
class Block:
    """Some rows of a file, and the number of each row.

    ``read_text`` yields strings (an empty field is null) and the numbers of the lines in which rows begin, from 1.
    """

    frame: pl.DataFrame
    lines: np.ndarray


def read_text(
    path: Path, layout: Format, rejections: Rejections, advance: Callable[[int], None] = lambda size: None
) -> Iterator[Block]:
    """Yields the well-formed rows of a file. Blank lines are skipped; rows with a wrong number of fields are rejected.

    Raises ValueError naming file and line where the file is binary, empty, not of the encoding, or ends inside a row.
    """
    line, any_rows, rest = 1, False, b""
    for (content, complete), last in _with_last(read_ahead(_blocks(path, layout.encoding, advance, BLOCK_BYTES))):
        _check_utf8(content, path, line + rest.count(b"\n"))
        content = rest + content
        if b"\r" in content:
            content = content.replace(b"\r\n", b"\n")
        num_lines = _count(content, b"\n")
        skipped = min(num_lines, max(0, layout.header_lines - (line - 1)))
        for _ in range(skipped):
            content = content[content.index(b"\n") + 1 :]
        end = _End(complete, last, any_rows)
        block, rest = _parse(content, path, line + skipped, layout, rejections, end)
        num_lines -= rest.count(b"\n")
        if block is not None:
            any_rows = True
            yield block
        rejections.check()
        line += num_lines
        rejections.lines_read += num_lines
    if not any_rows:
        rejections.check(final=True)
        raise ValueError(f"{path}: the file holds no rows")


def most_frequent(separators: Sequence[str], text: str) -> str:
    """The separator that occurs most often, the first of several; spaces, which stand between words, count little."""
    return max(separators, key=lambda of: text.count(of) if of != " " else text.count(of) / 100)


def read_start(path: Path, encoding: str = "utf-8") -> str:
    """The first lines, some tens of thousands of characters."""
    for content, _ in _blocks(path, encoding, lambda size: None, 2**16):
        _check_utf8(content, path, 1)
        return content.decode().replace("\r\n", "\n")
    raise ValueError(f"{path}: the file is empty")


def read_header(path: Path, encoding: str = "utf-8") -> str:
    """The first line."""
    return read_start(path, encoding).partition("\n")[0]


def read_columns(path: Path, needed: Sequence[str], separator: str = ",") -> tuple[str, ...]:
    """The columns that the first line names, among which must be the needed ones."""
    names = tuple(name.strip().strip('"') for name in read_header(path).split(separator))
    for name in needed:
        if name not in names:
            raise ValueError(f"{path}:1: no column '{name}'; there are {', '.join(names)[:200]}")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"{path}:1: column '{repeated[0]}' occurs twice")
    return names


def read_lines(
    path: Path, rejections: Rejections, advance: Callable[[int], None] = lambda size: None
) -> Iterator[tuple[int, str]]:
    """Yields the lines that are not blank, with numbers that begin at 1. ``rejections`` counts them as rows read.

    Raises ValueError naming file and line where the file is binary, damaged or not UTF-8 text.
    """
    number = 1
    for content, _ in _blocks(path, "utf-8", advance, BLOCK_BYTES):
        _check_utf8(content, path, number)
        for line in content.decode().split("\n")[:-1]:
            if line.strip():
                rejections.rows_read += 1
                yield number, line
            number += 1


def _blocks(
    path: Path, encoding: str, advance: Callable[[int], None], size: int
) -> Generator[tuple[bytes, bool], None, None]:
    """Whole lines; False beside a last line that has no end."""
    rest = b""
    for content in read_normalized(path, encoding, advance, size):
        end = content.rfind(b"\n") + 1
        if end:
            yield b"".join((rest, memoryview(content)[:end])), True
            rest = content[end:]
        else:
            rest += content
            if len(rest) > 2**26:
                raise ValueError(f"{path}: no line ends within 64 MiB: not a text file of rows")
    if rest:
        yield rest + b"\n", False


def _check_utf8(content: bytes, path: Path, line: int) -> None:
    nul = content.find(b"\0")
    if nul >= 0:
        line += content.count(b"\n", 0, nul)
        raise WrongEncoding(f"{path}:{line}: a NUL byte: this is a binary file, or a text in UTF-16 or UTF-32")
    if not content.isascii():
        try:
            content.decode()
        except UnicodeDecodeError as error:
            line += content.count(b"\n", 0, error.start)
            raise WrongEncoding(f"{path}:{line}: not utf-8 text (byte {content[error.start]:#04x})") from error


@dataclass(frozen=True)
class _End:
    """What is known of the end of a part of a file."""

    complete: bool  # its last line has an end
    last: bool  # of the file
    any_rows: bool  # there were well-formed rows before it

    def may_be_cut(self, good: np.ndarray, rejections: Rejections) -> bool:
        """Whether a last row of a wrong width tells a truncated file, and not one where no row has the right width."""
        return self.any_rows or bool(good.any()) or not rejections.total and np.sum(~good) == 1


def _parse(
    content: bytes, path: Path, line: int, layout: Format, rejections: Rejections, end: _End
) -> tuple[Block | None, bytes]:
    """The well-formed rows of whole lines, and the lines of a row that goes on behind them."""
    if not content.strip(b"\n"):
        return None, b""
    separator = layout.separator
    if len(separator.encode()) > 1:  # an ASCII control character that separates units, absent from text
        content, separator = content.replace(separator.encode(), b"\x1f"), "\x1f"
    if layout.quoted and b'"' in content:
        block, rest = _parse_quoted(content, separator, path, line, layout, rejections, end)
        if separator != layout.separator:
            rest = rest.replace(separator.encode(), layout.separator.encode())
    else:
        block, rest = _parse_plain(content, separator, path, line, layout, rejections, end), b""
    if block is not None and layout.stripped and b" " in content:
        stripped = block.frame.select(pl.all().str.strip_chars(" "))
        block = Block(stripped.select(pl.when(pl.all() != "").then(pl.all())), block.lines)
    return block, rest


def _parse_plain(
    content: bytes, separator: str, path: Path, line: int, layout: Format, rejections: Rejections, end: _End
) -> Block | None:
    width = len(layout.columns)
    num_rows = _count(content, b"\n")
    frame = _regular(content, separator, layout.columns, num_rows)
    if frame is not None:
        rejections.rows_read += num_rows
        return Block(frame, line + np.arange(num_rows))
    characters = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(characters == ord("\n"))
    fields = np.diff(np.searchsorted(np.flatnonzero(characters == ord(separator)), ends), prepend=0) + 1
    lines = line + np.arange(num_rows)
    blank = np.diff(ends, prepend=-1) == 1
    good = (fields == width) & ~blank
    rejections.rows_read += num_rows - int(blank.sum())
    if not good.all():
        bad = np.flatnonzero(~good & ~blank)
        if not end.complete and not good[-1] and not blank[-1] and end.may_be_cut(good | blank, rejections):
            raise _truncated(path, int(lines[-1]), int(fields[-1]), width)
        _reject(path, lines[bad], fields[bad], width, rejections)
        starts = np.r_[0, ends[:-1] + 1]
        content = b"".join(content[starts[i] : ends[i] + 1] for i in np.flatnonzero(good))
        lines = lines[good]
    if len(lines) == 0:
        return None
    frame = _read_csv(content, separator, layout.columns)
    assert len(frame) == len(lines), (path, len(frame), len(lines))
    return Block(frame, lines)


def _count(content: bytes, character: bytes) -> int:
    """As bytes.count does, several times faster: comparisons of slices that stay in the cache."""
    values, size = np.frombuffer(content, np.uint8), 2**18
    starts = range(0, len(values), size)
    return int(sum(np.count_nonzero(values[start : start + size] == ord(character)) for start in starts))


def _read_csv(content: bytes, separator: str, columns: Sequence[str]) -> pl.DataFrame:
    schema = {name: pl.String for name in columns}
    return pl.read_csv(content, has_header=False, separator=separator, quote_char=None, schema=schema)


def _regular(content: bytes, separator: str, columns: Sequence[str], num_rows: int) -> pl.DataFrame | None:
    """The rows, if each is well-formed and none is blank; None where they must be looked at one by one.

    Polars refuses rows of too many fields and fills up those of too few: where it refuses nothing and there are as many
    separators as there should be, no row has too few.
    """
    if len(columns) == 1 or _count(content, separator.encode()) != num_rows * (len(columns) - 1):
        return None
    try:
        frame = _read_csv(content, separator, columns)
    except pl.exceptions.PolarsError:
        return None
    return frame if len(frame) == num_rows else None


def _parse_quoted(
    content: bytes, separator: str, path: Path, line: int, layout: Format, rejections: Rejections, end: _End
) -> tuple[Block | None, bytes]:
    width = len(layout.columns)
    read = read_quoted(content.decode(), separator, line, last=end.last)
    fields, lines = np.array([len(row) for row in read.rows], np.int64), np.array(read.lines, np.int64)
    rejections.rows_read += len(lines)
    good = fields == width
    if not good.all():
        if not end.complete and not good[-1] and end.may_be_cut(good, rejections):
            raise _truncated(path, int(lines[-1]), int(fields[-1]), width)
        _reject(path, lines[~good], fields[~good], width, rejections)
    rejected = set(lines[~good].tolist())
    for what, doubtful in (
        ("whose quotes do not fit together: they are read as ordinary characters", read.malformed),
        (f"of more than {MANY_LINES} lines each: a quote may be missing there", read.long),
    ):
        rejections.doubt(what, path, [line for line in doubtful if line not in rejected])
    if not end.complete and read.open_quote:
        raise _truncated(path, int(lines[-1]), int(fields[-1]), width)
    rest = read.rest.encode()
    if not good.any():
        return None, rest
    rows = (row for row, fits in zip(read.rows, good) if fits)
    columns = {name: [value or None for value in values] for name, values in zip(layout.columns, zip(*rows))}
    frame = pl.DataFrame(columns, schema={name: pl.String for name in layout.columns})
    if separator != layout.separator:
        frame = frame.select(pl.all().str.replace_all(separator, layout.separator, literal=True))
    return Block(frame, lines[good]), rest


def _reject(path: Path, lines: np.ndarray, fields: np.ndarray, width: int, rejections: Rejections) -> None:
    if len(lines):
        found = {int(line): int(count) for line, count in zip(lines[:1], fields[:1])}
        reason = f"not {width} columns"
        rejections.add(reason, lines, lambda number: f"{path}:{number} ({found[number]} columns)")


def _truncated(path: Path, line: int, fields: int, width: int) -> ValueError:
    return ValueError(
        f"{path}:{line}: the file ends inside a row ({fields} of {width} columns): it is truncated; fetch it again"
    )


def _with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """The items, each with whether it is the last one."""
    iterator = iter(items)
    for held in iterator:
        for item in iterator:
            yield held, False
            held = item
        yield held, True
