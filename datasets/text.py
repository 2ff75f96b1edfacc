"""Delimited text, plain or gzipped, in blocks of rows that have the right number of columns."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl

from embtables.datasets.prefetch import read_ahead
from embtables.datasets.rejections import Rejections

BLOCK_BYTES = 2**24


@dataclass(frozen=True)
class Format:
    """How a text file is laid out. A separator of several characters is allowed."""

    separator: str
    columns: tuple[str, ...]
    header_lines: int = 0
    encoding: str = "utf-8"
    quoted: bool = False  # CSV: fields may stand in double quotes (line breaks inside them are not supported)


@dataclass(frozen=True)
class Block:
    """Some rows of a file, and the number of each row.

    ``read_text`` yields strings (an empty field is null) and line numbers that begin at 1.
    """

    frame: pl.DataFrame
    lines: np.ndarray


def open_raw(path: Path) -> tuple[BinaryIO, BinaryIO]:
    """Returns the bytes of a text, unpacked where gzipped, and the file itself, whose position is the progress."""
    raw = open(path, "rb")
    start = raw.read(4)
    raw.seek(0)
    if start[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=raw), raw  # type: ignore[return-value]
    packed = {b"PK\x03\x04": "a zip archive", b"PAR1": "a Parquet file", b"(\xb5/\xfd": "zstd-compressed"}
    if start in packed or start[:3] == b"BZh":
        raw.close()
        raise ValueError(
            f"{path}: this is {packed.get(start, 'bzip2-compressed')}, where text or gzipped text is needed"
        )
    return raw, raw


def read_text(
    path: Path, layout: Format, rejections: Rejections, advance: Callable[[int], None] = lambda size: None
) -> Iterator[Block]:
    """Yields the well-formed rows of a file. Blank lines are skipped; lines with a wrong number of fields are rejected.

    Raises ValueError naming file and line where the file is binary, empty, not of the encoding, or ends inside a row.
    """
    line, any_rows = 1, False
    for content, complete in read_ahead(_blocks(path, advance, BLOCK_BYTES)):
        num_lines = _count(content, b"\n")
        content = _as_utf8(content, path, line, layout.encoding)
        if b"\r" in content:
            content = content.replace(b"\r\n", b"\n")
        skipped = min(num_lines, max(0, layout.header_lines - (line - 1)))
        for _ in range(skipped):
            content = content[content.index(b"\n") + 1 :]
        block = _parse(content, path, line + skipped, layout, rejections, complete)
        if block is not None:
            any_rows = True
            yield block
        rejections.check()
        line += num_lines
        rejections.lines_read += num_lines
    if not any_rows:
        rejections.check(final=True)
        raise ValueError(f"{path}: the file holds no rows")


def read_header(path: Path, encoding: str = "utf-8") -> str:
    """The first line."""
    for content, _ in _blocks(path, lambda size: None, 2**16):
        return _as_utf8(content, path, 1, encoding).decode().splitlines()[0].lstrip("\ufeff")
    raise ValueError(f"{path}: the file is empty")


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
    for content, _ in _blocks(path, advance, BLOCK_BYTES):
        text = _as_utf8(content, path, number, "utf-8").decode()
        for line in text.split("\n")[:-1]:
            if line.strip():
                rejections.rows_read += 1
                yield number, line
            number += 1


def read_unpacked(
    path: Path, advance: Callable[[int], None] = lambda size: None, size: int = BLOCK_BYTES
) -> Generator[bytes, None, None]:
    """The text's bytes, unpacked where gzipped, a block at a time. ValueError where the gzip file is damaged."""
    stream, raw = open_raw(path)
    position = 0
    with raw, stream:
        while True:
            try:
                content = stream.read(size)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{path}: the gzip file is truncated or damaged ({error}); fetch it again") from error
            advance(raw.tell() - position)
            position = raw.tell()
            if not content:
                break
            yield content


def _blocks(path: Path, advance: Callable[[int], None], size: int) -> Generator[tuple[bytes, bool], None, None]:
    """Whole lines; False beside a last line that has no end."""
    rest = b""
    for content in read_unpacked(path, advance, size):
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


def _as_utf8(content: bytes, path: Path, line: int, encoding: str) -> bytes:
    nul = content.find(b"\0")
    if nul >= 0:
        line += content.count(b"\n", 0, nul)
        raise ValueError(f"{path}:{line}: a NUL byte: this is a binary file, not text")
    if encoding == "utf-8" and content.isascii():
        return content
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise ValueError(f"{path}:{line}: not {encoding} text (byte {content[error.start]:#04x})") from error
    return content if encoding == "utf-8" else text.encode()


def _parse(
    content: bytes, path: Path, line: int, layout: Format, rejections: Rejections, complete: bool
) -> Block | None:
    width = len(layout.columns)
    if not content.strip(b"\n"):
        return None
    separator = layout.separator
    if len(separator) > 1:  # an ASCII control character that separates units, absent from text
        content, separator = content.replace(separator.encode(), b"\x1f"), "\x1f"
    if layout.quoted and b'"' in content:
        return _parse_quoted(content, path, line, layout, rejections, complete)
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
        if not complete and not good[-1] and not blank[-1]:
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
    content: bytes, path: Path, line: int, layout: Format, rejections: Rejections, complete: bool
) -> Block | None:
    width = len(layout.columns)
    texts = content.decode().split("\n")[:-1]
    rows: list[Sequence[str]] = []
    lines, bad_lines, bad_fields = [], [], []
    for number, text in enumerate(texts, line):
        if not text:
            continue
        rejections.rows_read += 1
        try:
            fields = next(csv.reader([text], delimiter=layout.separator, strict=True))
        except csv.Error:
            fields = []
        if len(fields) == width:
            rows.append(fields)
            lines.append(number)
        else:
            if not complete and number == line + len(texts) - 1:
                raise _truncated(path, number, len(fields), width)
            bad_lines.append(number)
            bad_fields.append(len(fields))
    _reject(path, np.array(bad_lines, np.int64), np.array(bad_fields, np.int64), width, rejections)
    if not rows:
        return None
    columns = {name: [value or None for value in values] for name, values in zip(layout.columns, zip(*rows))}
    frame = pl.DataFrame(columns, schema={name: pl.String for name in layout.columns})
    return Block(frame, np.array(lines))


def _reject(path: Path, lines: np.ndarray, fields: np.ndarray, width: int, rejections: Rejections) -> None:
    if len(lines):
        found = {int(line): int(count) for line, count in zip(lines[:1], fields[:1])}
        reason = f"not {width} columns"
        rejections.add(reason, lines, lambda number: f"{path}:{number} ({found[number]} columns)")


def _truncated(path: Path, line: int, fields: int, width: int) -> ValueError:
    return ValueError(
        f"{path}:{line}: the file ends inside a row ({fields} of {width} columns): it is truncated; fetch it again"
    )
