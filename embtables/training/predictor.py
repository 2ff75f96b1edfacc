"""Scores of raw rows."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import nn

from embtables._util.files import replacing
from embtables.datasets.encoder import Encoder
from embtables.datasets.prefetch import read_ahead
from embtables.datasets.prepared import cut_batches
from embtables.datasets.raw_rows import RawRows, frame_of, read_rows
from embtables.training.bundle import load_bundle
from embtables.training.evaluation import forward
from embtables.training.metrics import sigmoid

__all__ = ["Predictor"]


class Predictor:
    """Scores raw rows with the model of a bundle; ``Predictor.load`` makes one.

    ``columns`` are the names of the columns that rows must have. Several threads may use one predictor at a time.

    Example::

        predictor = Predictor.load("bundles/clicks")
        predictor.predict({"user": "u17", "item": 4, "device": None})     # array([0.031], dtype=float32)
        predictor.predict(frame)                                          # a DataFrame or an Arrow table: float32 [N]
        predictor.predict_file("monday.csv", "scores.parquet")
    """

    def __init__(self, encoder: Encoder, model: nn.Module, batch_size: int, device: torch.device) -> None:
        self._encoder, self._model, self._batch_size, self._device = encoder, model, batch_size, device
        self.columns = encoder.columns

    @staticmethod
    def load(
        path: str | Path,
        device: torch.device | str | None = None,
        *,
        model: type[nn.Module] | None = None,
        allow_import: bool = False,
    ) -> Predictor:
        """The predictor of a bundle, which ``embtables bundle`` writes.

        Args:
            path: the bundle's folder.
            device: where the model computes; the CPU by default.
            model: the class of a model of one's own. Models of this package need none.
            allow_import: whether to import instead the model that the bundle names, which runs code of that name. Only
                for bundles that you trust.

        Raises:
            ValueError: naming the file that is missing, damaged or does not fit, or a model of another package.
        """
        bundle, encoder, built = load_bundle(Path(path), device, model, allow_import)
        return Predictor(encoder, built, bundle.batch_size, torch.device(device or "cpu"))

    def predict(self, rows: Any, *, logits: bool = False) -> NDArray[np.float32]:
        """The probability of each row that its label is 1, float32 [N], in the order of the rows.

        Args:
            rows: a dict for one row, a list of dicts, a DataFrame of pandas or polars, or an Arrow table. No rows give
                no scores. Columns besides ``columns`` are passed over.
            logits: whether to return logits instead, those of an evaluation to the bit where rows come in the order and
                batches of the evaluation.

        Raises:
            TypeError: ``rows`` is none of these.
            ValueError: naming the column that is missing or of a wrong type, and the row of a text that is no number.
            FloatingPointError: a score is not finite; the sentence names the row.
        """
        raw = frame_of(rows, self._encoder)
        scores = [*self._scores(iter([raw]), "the rows", logits)] if len(raw.frame) else []
        return np.concatenate([np.zeros(0, np.float32), *scores])

    def predict_file(self, source: str | Path, out: str | Path, *, logits: bool = False, progress: bool = False) -> int:
        """Scores the rows of a file into a Parquet file with one column, ``score`` or ``logit``; returns their number.

        The file is delimited text, plain or packed, Parquet, or JSON objects, one a line (.jsonl, .ndjson). It streams:
        memory does not grow with it. ``out`` is written whole or not at all.

        Args:
            source: the file to read.
            out: the file to write.
            logits: whether to write logits instead of probabilities.
            progress: whether to draw a bar.

        Raises:
            ValueError: as ``predict``, and where the file cannot be read, has no rows, or a row that is malformed.
            OSError: a file cannot be read or written.
        """
        source, name, written = Path(source), "logit" if logits else "score", 0
        bar = Progress(console=Console(stderr=True), disable=not progress)
        schema = pl.DataFrame(schema={name: pl.Float32}).to_arrow().schema
        with replacing(out) as temporary, bar, pq.ParquetWriter(temporary, schema) as writer:
            for scores in self._scores(read_rows(source, self._encoder, bar), str(source), logits):
                writer.write_table(pl.DataFrame({name: scores}).to_arrow())
                written += len(scores)
        return written

    def _scores(self, parts: Iterable[RawRows], where: str, logits: bool) -> Iterator[NDArray[np.float32]]:
        """The scores of rows, batch by batch; a thread makes ids of further rows meanwhile."""

        def windows() -> Generator[Any, None, None]:
            for part in parts:
                yield self._encoder.rows(part.frame, where, part.place), None, 0

        batches = cut_batches(read_ahead(windows()), self._batch_size)
        for _, found in forward(self._model, batches, self._device, where):
            yield found if logits else sigmoid(found).astype(np.float32)
