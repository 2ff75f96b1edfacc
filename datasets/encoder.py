"""Raw rows as a model takes them, by the vocabularies and scales of the data that it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from embtables._util.files import sha256
from embtables._util.names import few
from embtables._util.reading import inside
from embtables.datasets.batch import Lists, Rows
from embtables.datasets.encoding import Encoding, HashedVocabulary
from embtables.datasets.log_columns import DenseColumn, ListColumn, plain
from embtables.datasets.missing import MissingValues
from embtables.datasets.prepared import PreparedDataset, read_manifest
from embtables.datasets.vocabulary import MISSING_ID


@dataclass(frozen=True)
class Encoder:
    """Turns raw rows into ids, numbers and lists.

    Args:
        encoding: where each feature comes from.
        vocabularies: by feature and by list.
        feature_names: the columns of ids.
        dense_features: the columns of numbers.
        list_features: lists that have vocabularies of their own.
        histories: lists of another feature's values, and that feature.
        max_history: the most entries of a history, besides the most of the encoding; ``None``: all of those.
    """

    encoding: Encoding
    vocabularies: Mapping[str, HashedVocabulary]
    feature_names: Sequence[str]
    dense_features: Sequence[str]
    list_features: Sequence[str]
    histories: Mapping[str, str]
    max_history: int | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that raw rows must have."""
        used = [*self.feature_names, *self.dense_features, *self.list_features, *self.histories]
        return list(dict.fromkeys(self.encoding.columns[name] for name in used))

    def check_columns(self, names: Sequence[str], where: str) -> None:
        """Raises ValueError naming the columns that are missing."""
        missing = [name for name in self.columns if name not in names]
        if missing:
            raise ValueError(
                f"{where}: no column {few([repr(name) for name in missing], 5)}, which the model needs; "
                f"there are {few(list(map(str, names)), 20) or 'none'}"
            )

    def rows(self, frame: pl.DataFrame, where: str, place: Callable[[int], str]) -> Rows:
        """The rows of a frame, without labels (0) and groups. Columns that are not needed are passed over.

        Args:
            where: what the rows are of, such as a file.
            place: a row, counted from 0, in words.

        Raises:
            ValueError: naming the column that is missing or of a wrong type, and the row of a text that is no number.
        """
        self.check_columns(frame.columns, where)
        missing, encoding = MissingValues(self.encoding.missing), self.encoding
        size = len(frame)
        ids = np.empty((size, len(self.feature_names)), np.int32)
        dense = np.empty((size, len(self.dense_features)), np.float32)
        for number, name in enumerate(self.feature_names):
            values = _single(frame[encoding.columns[name]], where)
            if values.dtype.is_float() and values.is_not_nan().any():
                self._check_floats({name}, values.name, values.dtype, where)
            ids[:, number] = self._ids(name, values, missing)
        for number, name in enumerate(self.dense_features):
            dense[:, number] = self._numbers(name, frame[encoding.columns[name]], missing, where, place)
        lists = {}
        for name in (*self.list_features, *self.histories):
            column, raw = ListColumn(encoding.separators.get(name), missing), frame[encoding.columns[name]]
            vocabulary = self.histories.get(name, name)
            values, lengths = column.flat(column.lists(raw, where))
            if len(values):
                self._check_floats({vocabulary, name}, raw.name, getattr(raw.dtype, "inner", raw.dtype), where)
            of = self._ids(vocabulary, values, missing)
            lists[name] = Lists(of, np.r_[0, np.cumsum(lengths)].astype(np.int64))
        most = min(encoding.history, self.max_history or encoding.history)
        lists |= {name: lists[name].latest(most) for name in self.histories}
        return Rows(np.zeros(size, np.float32), dense, ids, None, lists)

    def _ids(self, vocabulary: str, values: pl.Series, missing: MissingValues) -> np.ndarray:
        """int32 ids of values, in a vocabulary."""
        if values.dtype.is_integer():
            return self.vocabularies[vocabulary].ids(values)
        encoded = values.to_arrow().dictionary_encode()  # of the many rows of a text each text is looked at once
        distinct = missing.removed(pl.Series(values.name, pl.from_arrow(encoded.dictionary)))
        of_distinct = np.append(self.vocabularies[vocabulary].ids(distinct), np.int32(MISSING_ID))
        return of_distinct[encoded.indices.fill_null(len(distinct)).to_numpy()]

    def _check_floats(self, features: set[str], column: str, dtype: pl.DataType, where: str) -> None:
        """Raises ValueError where values are floating-point numbers, and the features had none: 7.0 is not 7."""
        if dtype.is_float() and not features & set(self.encoding.floats):
            raise ValueError(
                f"{where}: column '{column}' is of type {dtype}, where the training had none: make integers or text of "
                "it, as whole numbers are often floats where some are missing"
            )

    def _numbers(
        self, name: str, values: pl.Series, missing: MissingValues, where: str, place: Callable[[int], str]
    ) -> np.ndarray:
        """A dense feature, float32."""
        raw = _single(values, where)
        numbers, wrong = DenseColumn(name).numbers(missing.removed(raw), where)
        if wrong.any():
            row = int(wrong.arg_max() or 0)
            raise ValueError(f"{place(row)}: column '{values.name}' holds {raw[row]!r}, where a number is needed")
        return self.encoding.scales[name].apply(numbers.fill_null(float("nan")).to_numpy())


def encoder_of(data: PreparedDataset) -> Encoder:
    """The encoder of raw rows that become rows of ``data``.

    Raises:
        ValueError: the data does not say how raw rows become its rows, or its vocabularies are damaged.
    """
    _, manifest = read_manifest(data.path)
    if manifest.encoding is None:
        raise ValueError(
            f"{data.path} (kind '{manifest.kind}') does not tell how raw rows become ids: of the kinds of "
            "`embtables prepare`, interactions and synthetic do since this release; prepare it again into another "
            "folder with one of these"
        )
    vocabularies = {}
    for feature in manifest.features:
        if feature.name not in data.num_embeddings:
            continue
        if feature.vocabulary is None:
            raise ValueError(f"{data.path}: feature '{feature.name}' has no vocabulary; prepare the data set again")
        path = inside(data.path, feature.vocabulary.file)
        try:
            if sha256(path) != feature.vocabulary.sha256:
                raise ValueError(f"{path} does not match its checksum: it is damaged; prepare the data set again")
            values: Any = pl.from_arrow(pq.read_table(path, columns=["value"]).column(0))
        except pa.ArrowException as error:
            raise ValueError(f"{path}: not a readable vocabulary: {error}; prepare the data set again") from error
        vocabularies[feature.name] = HashedVocabulary.of(values)
    return Encoder(
        manifest.encoding,
        vocabularies,
        data.feature_names,
        data.dense_features,
        data.list_features,
        data.histories,
        data.max_history,
    )


def _single(values: pl.Series, where: str) -> pl.Series:
    """Values of which each row has one: numbers, text, or what has a text.

    Raises:
        ValueError: they are lists, records or objects.
    """
    if values.dtype.is_nested() or values.dtype == pl.Object:
        raise ValueError(
            f"{where}: column '{values.name}' is of type {values.dtype}, where each row needs one number or text"
        )
    try:
        return values.cast(pl.String) if values.dtype == pl.Null else plain(values, "", where)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{where}: column '{values.name}' is not text: {error}") from error
