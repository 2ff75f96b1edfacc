"""From a text file's rows to prepared data: the text is read once, and its rows wait in files until ids are known."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import numpy as np
import polars as pl

from embtables.datasets.prepared import GROUP, LABEL
from embtables.datasets.rejections import Rejections
from embtables.datasets.row_keys import Schema
from embtables.datasets.splits import SPLITS
from embtables.datasets.string_keys import StringKeys
from embtables.datasets.text import Block
from embtables.datasets.vocabulary import MISSING, KeyCounter, Vocabulary
from embtables.datasets.writing import Contents, Writer, list_column

LINE = "_line"
THREADS = min(4, os.cpu_count() or 1)  # each at work on a feature of its own


def write_streaming(
    writer: Writer,
    rejections: Rejections,
    rows: Iterable[Block],
    split: Callable[[Block], np.ndarray],
    schema: Schema,
    *,
    min_count: int,
    texts: Mapping[str, StringKeys] = MappingProxyType({}),
) -> None:
    """Writes the well-formed rows; memory grows with the vocabularies only.

    Args:
        rejections: of the rows.
        rows: blocks with the columns ``LABEL`` and ``GROUP`` (where the schema has a group), the dense features, and
            integer keys, null where a value is missing, of the other columns of the schema; further columns are for
            ``split``.
        split: the split code (index into SPLITS) of each row of a block; called when all rows have been read.
        texts: by column, what knows the raw values of keys; other columns' keys are their raw values.
    """
    waiting = _Waiting(writer.folder / "waiting")
    for block in rows:
        waiting.add(block)
    writer.record(rejections)

    # A vocabulary counts its own column and the histories that hold its values.
    counted = {name: [name] for name in schema.vocabularies}
    for history, feature in schema.histories.items():
        counted[feature].append(history)
    with ThreadPoolExecutor(THREADS) as pool:
        counters = {name: KeyCounter() for name in counted}
        for block in writer.progress.track(waiting.blocks(), waiting.num_blocks, description="Counting ids"):
            frame = _chosen(block.frame, split(block) == 0)
            list(pool.map(_count, counters.values(), (frame.select(names) for names in counted.values())))
        vocabularies = dict(zip(counters, pool.map(lambda counter: counter.vocabulary(min_count), counters.values())))
        del counters
        writer.declare(
            Contents(
                {name: vocabularies[name] for name in schema.categorical},
                schema.dense,
                {name: vocabularies[name] for name in schema.lists},
                schema.histories,
                schema.group,
                schema.item,
                {name: of.texts_of(vocabularies[name].keys) for name, of in texts.items()},
            )
        )

        groups = [] if schema.group is None else [GROUP]
        columns = (*schema.categorical, *schema.list_columns)
        of_column = [vocabularies[schema.histories.get(name, name)] for name in columns]
        blocks = waiting.blocks(remove=True)
        for block in writer.progress.track(blocks, waiting.num_blocks, description="Writing rows"):
            codes = split(block)
            for code, name in enumerate(SPLITS):
                chosen = codes == code
                if chosen.any():
                    frame = _chosen(block.frame, chosen)
                    ids = pool.map(_ids, (frame[column] for column in columns), of_column)
                    writer.write(name, frame.select(LABEL, *schema.dense, *groups).with_columns(ids))


def _count(counter: KeyCounter, columns: pl.DataFrame) -> None:
    for values in columns:
        counter.add(_keys(values)[0])


def _ids(values: pl.Series, vocabulary: Vocabulary) -> pl.Series:
    """The column with ids in place of keys."""
    keys, offsets = _keys(values)
    ids = vocabulary.ids(keys)
    return (pl.Series(ids) if offsets is None else list_column(ids, offsets)).alias(values.name)


def _chosen(frame: pl.DataFrame, rows: np.ndarray) -> pl.DataFrame:
    return frame if rows.all() else frame.filter(pl.Series(rows))


def _keys(values: pl.Series) -> tuple[np.ndarray, np.ndarray | None]:
    """int64 keys, and, of a column of lists, the lists' offsets among them."""
    offsets = None
    if isinstance(values.dtype, pl.List):
        offsets = np.r_[0, np.cumsum(values.list.len().to_numpy())].astype(np.int64)
        values = values.explode(empty_as_null=False)
    return values.cast(pl.Int64).fill_null(MISSING).to_numpy(), offsets


class _Waiting:
    """Keeps blocks in files, one file per block, and reads them back in order."""

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
