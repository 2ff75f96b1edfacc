"""Criteo's click logs: tab-separated text without a header, as published, or with commas, or with a header.

A row is a label, 13 integers (may be negative or empty) and 26 categories of 8 hex digits (may be empty). Dense
features are ln(1 + max(x, 0)), and 0 where x is empty. A category's raw value is the number that its digits write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import polars as pl
import typer

from embtables.datasets.options import MaxRejected, MinCount, Seed, Shares
from embtables.datasets.prepared import LABEL, PreparedDataset
from embtables.datasets.reader import Reader
from embtables.datasets.rejections import DEFAULT_LIMIT, Fault, Rejections
from embtables.datasets.row_keys import Schema
from embtables.datasets.splits import DEFAULT_SHARES, check_shares, random_split
from embtables.datasets.streaming import write_streaming
from embtables.datasets.text import Block, Format, read_header, read_text
from embtables.datasets.writing import Writer

DENSE = [f"I{number}" for number in range(1, 14)]
CATEGORIES = [f"C{number}" for number in range(1, 27)]
SCHEMA = Schema(LABEL, DENSE, CATEGORIES)
COLUMNS = (LABEL, *DENSE, *CATEGORIES)


@dataclass(frozen=True)
class Criteo(Reader):
    """Criteo's display ads (Kaggle): 13 integers as ln(1 + max(x, 0)), 26 categories.

    With ``split`` "order" the place in the file decides, which is in the order of time: the first six sevenths train;
    of the last seventh, which is one day, the first half tests and the second half validates. With "random" rows are
    split by ``shares``.
    """

    kind: ClassVar[str] = "criteo"
    input_help: ClassVar[str] = "train.txt as published."
    example: ClassVar[str] = (
        "Example: embtables prepare criteo train.txt data/criteo --min-count 10   (train.txt may be gzipped)"
    )

    split: Annotated[
        Literal["order", "random"],
        typer.Option(help="order: first 6/7 train, next 1/14 tests, last 1/14 validates."),
    ] = "order"
    shares: Shares = DEFAULT_SHARES
    min_count: MinCount = 1
    seed: Seed = 0
    max_rejected: MaxRejected = DEFAULT_LIMIT

    def __post_init__(self) -> None:
        if self.split not in ("order", "random"):
            raise ValueError(f"split '{self.split}': 'order' or 'random' is needed")
        check_shares(self.shares)
        if self.min_count < 1:
            raise ValueError(f"min_count {self.min_count}: at least 1 is needed")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: it cannot be negative")

    def write(self, source: Path, writer: Writer) -> None:
        rejections = Rejections(self.max_rejected)
        write_streaming(
            writer,
            rejections,
            _rows(writer, source, rejections),
            lambda block: _split(block.lines, rejections.lines_read, self),
            SCHEMA,
            min_count=self.min_count,
        )


def prepare_criteo(
    source: str | Path, out: str | Path, config: Criteo = Criteo(), *, progress: bool = False
) -> PreparedDataset:
    """Prepares ``train.txt``, plain or gzipped; memory grows with the vocabularies only.

    Example::

        data = prepare_criteo("criteo/train.txt", "runs/criteo", Criteo(min_count=10))
    """
    return config.prepare(source, out, progress=progress)


def _split(lines: np.ndarray, num_lines: int, config: Criteo) -> np.ndarray:
    """Split code by line number (from 1), so that a rejected row moves no other."""
    if config.split == "random":
        return random_split(lines, config.seed, config.shares)
    first = num_lines * 6 // 7
    test = first + (num_lines - first + 1) // 2
    return np.where(lines <= first, 0, np.where(lines <= test, 2, 1))


def _layout(path: Path) -> Format:
    """The published layout, or that of a copy with commas, or with the columns' names, in any order, in its first line.

    Raises:
        ValueError: the first line begins with a word, but does not name the columns.
    """
    first = read_header(path) if path.stat().st_size else ""
    separator = "," if first.count(",") == len(COLUMNS) - 1 else "\t"
    names = [name.strip(' "').lower() for name in first.split(separator)]
    if len(names) != len(COLUMNS) or not any(name in names for name in ("label", "i1", "c26")):
        return Format(separator, COLUMNS)
    known = {name.lower(): name for name in COLUMNS}
    if sorted(names) != sorted(known):
        raise ValueError(
            f"{path}:1: a header must name {LABEL}, I1 … I13 and C1 … C26, which {', '.join(names)[:80]} … does not"
        )
    return Format(separator, tuple(known[name] for name in names), header_lines=1, quoted=separator == ",")


def _rows(writer: Writer, path: Path, rejections: Rejections) -> Iterator[Block]:
    """Well-formed rows: float32 label and dense features, 32-bit keys of the categories."""
    advance = writer.meter(path)
    for block in read_text(path, _layout(path), rejections, advance):
        parsed = block.frame.select(
            pl.col(LABEL).cast(pl.Int8, strict=False),
            pl.col(DENSE).cast(pl.Int64, strict=False),
            pl.col(CATEGORIES).str.to_integer(base=16, dtype=pl.UInt32, strict=False),
        )
        wrong = block.frame.select(
            (parsed[LABEL].is_in([0, 1]).not_() | parsed[LABEL].is_null()).alias(LABEL),
            *(_unparsed(name, parsed).alias(name) for name in DENSE),
            *(_not_hex(name, parsed).alias(name) for name in CATEGORIES),
        )
        reasons = {
            LABEL: "the label is not 0 or 1",
            **{name: f"{name} is not an integer" for name in DENSE},
            **{name: f"{name} is not 8 hex digits" for name in CATEGORIES},
        }
        faults = {reason: Fault(wrong[name], block.frame[name]) for name, reason in reasons.items()}
        good = rejections.passing(faults, block.lines, lambda line: f"{path}:{line}")
        parsed = parsed.select(
            pl.col(LABEL).cast(pl.Float32),
            pl.col(DENSE).clip(0).fill_null(0).cast(pl.Float32).log1p(),
            *CATEGORIES,
        )
        yield Block(parsed, block.lines) if good.all() else Block(parsed.filter(pl.Series(good)), block.lines[good])


def _unparsed(name: str, parsed: pl.DataFrame) -> pl.Expr:
    return pl.lit(parsed[name].is_null()) & pl.col(name).is_not_null()


def _not_hex(name: str, parsed: pl.DataFrame) -> pl.Expr:
    raw = pl.col(name)
    signed = raw.str.starts_with("+")  # the parser takes it for a digit
    return _unparsed(name, parsed) | signed | (raw.str.len_bytes() != 8)
