"""From a text file's rows to prepared data: the text is read once, and its rows wait in files until ids are known."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl

from embtables.datasets.prepared import LABEL
from embtables.datasets.rejections import Rejections
from embtables.datasets.splits import SPLITS
from embtables.datasets.text import Block
from embtables.datasets.vocabulary import MISSING, KeyCounter
from embtables.datasets.writing import Contents, Writer

LINE = "_line"
THREADS = min(4, os.cpu_count() or 1)  # each at work on a feature of its own


def write_streaming(
    writer: Writer,
    rejections: Rejections,
    rows: Iterable[Block],
    split: Callable[[Block], np.ndarray],
    features: Sequence[str],
    dense_features: Sequence[str] = (),
    *,
    min_count: int,
) -> None:
    """Writes the well-formed rows; memory grows with the vocabularies only.

    Args:
        rejections: of the rows.
        rows: blocks with the label, the dense features and the features' integer keys, null where a value is missing;
            further columns are for `split`.
        split: the split code (index into SPLITS) of each row of a block; called when all rows have been read.
    """
    waiting = _Waiting(writer.folder / "waiting")
    for block in rows:
        waiting.add(block)
    rejections.check(final=True)
    writer.rows_read, writer.rows_rejected = rejections.rows_read, rejections.counts
    writer.report(rejections.lines())

    with ThreadPoolExecutor(THREADS) as pool:
        counters = [KeyCounter() for _ in features]
        for block in writer.progress.track(waiting.blocks(), waiting.num_blocks, description="Counting ids"):
            list(pool.map(KeyCounter.add, counters, _keys(block, features, split(block) == 0)))
        vocabularies = list(pool.map(lambda counter: counter.vocabulary(min_count), counters))
        del counters
        writer.declare(Contents(dict(zip(features, vocabularies)), dense_features))

        blocks = waiting.blocks(remove=True)
        for block in writer.progress.track(blocks, waiting.num_blocks, description="Writing rows"):
            codes = split(block)
            for code, name in enumerate(SPLITS):
                chosen = codes == code
                if chosen.any():
                    ids = pool.map(lambda of, keys: of.ids(keys), vocabularies, _keys(block, features, chosen))
                    others = _chosen(block.frame, chosen).select(LABEL, *dense_features)
                    writer.write(name, others.with_columns(map(pl.Series, features, ids)))


def _chosen(frame: pl.DataFrame, rows: np.ndarray) -> pl.DataFrame:
    return frame if rows.all() else frame.filter(pl.Series(rows))


def _keys(block: Block, features: Sequence[str], rows: np.ndarray) -> Iterator[np.ndarray]:
    keys = _chosen(block.frame.select(features), rows).select(pl.all().cast(pl.Int64).fill_null(MISSING))
    return (keys[name].to_numpy() for name in features)


class _Waiting:
    """Blocks in files of their own, read back in the order in which they came."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.num_blocks = 0

    def add(self, block: Block) -> None:
        frame = block.frame.with_columns(pl.Series(LINE, block.lines))
        frame.write_ipc(self._path(self.num_blocks), compression="uncompressed")
        self.num_blocks += 1

    def blocks(self, *, remove: bool = False) -> Iterator[Block]:
        for number in range(self.num_blocks):
            frame = pl.read_ipc(self._path(number))
            if remove:
                self._path(number).unlink()
            yield Block(frame.drop(LINE), frame[LINE].to_numpy())
        if remove:
            self.folder.rmdir()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.arrow"
