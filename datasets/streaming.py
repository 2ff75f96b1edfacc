"""From a text file's rows to prepared data in two passes: one that counts ids, one that writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import polars as pl

from .prepared import LABEL
from .rejections import Rejections
from .splits import SPLITS
from .text import Block
from .vocabulary import KeyCounter
from .writing import Contents, Writer


def write_in_two_passes(
    writer: Writer,
    rows: Callable[[str, Rejections], Iterator[Block]],
    split: Callable[[Block], np.ndarray],
    features: Sequence[str],
    dense_features: Sequence[str] = (),
    *,
    min_count: int,
    max_rejected: float,
) -> None:
    """Writes the well-formed rows; memory grows with the vocabularies only.

    Args:
        rows: a pass over the file, of the title that a progress bar shows: blocks with the label, the dense features
            and the features' int64 keys.
        split: the split code (index into SPLITS) of each row of a block.
    """
    rejections = Rejections(max_rejected)
    counters = {name: KeyCounter() for name in features}
    for block in rows("Counting ids", rejections):
        train = split(block) == 0
        for name, counter in counters.items():
            counter.add(block.frame[name].to_numpy()[train])
    rejections.check(final=True)
    writer.rows_read, writer.rows_rejected = rejections.rows_read, rejections.counts
    writer.report(rejections.lines())

    vocabularies = {name: counter.vocabulary(min_count) for name, counter in counters.items()}
    writer.declare(Contents(vocabularies, dense_features))
    for block in rows("Writing rows", Rejections(1.0)):
        codes = split(block)
        ids = [pl.Series(name, of.ids(block.frame[name].to_numpy())) for name, of in vocabularies.items()]
        frame = block.frame.select(LABEL, *dense_features, *ids)
        for code, name in enumerate(SPLITS):
            writer.write(name, frame.filter(pl.Series(codes == code)))
