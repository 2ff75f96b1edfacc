"""What is kept of how raw rows became ids: where each feature comes from, and vocabularies as short hashes."""

from __future__ import annotations

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from embtables.datasets.dense_scale import Scale
from embtables.datasets.vocabulary import MISSING, Ids

MOST_FALSE = 1e-6
"""The share of unknown values that may be taken for one of a vocabulary: hashes are as long as that needs."""
HASH_BYTES = 8
PROBES = ("", "user_1", "ü", 7, -1)
"""Values whose hashes a bundle holds, so that a library that hashes otherwise is noticed."""


class Encoding(BaseModel):
    """How raw rows become features, beside the vocabularies.

    A text is compared as it is, and any other value by its text; an integer and the text of its digits are the same.
    Where a value is missing a category has id 0 and a number its scale's fill; a missing list is empty, and what is
    missing inside of a list is left out. A value that is not in the vocabulary has id 1.
    """

    model_config = ConfigDict(extra="forbid")

    columns: dict[str, str]
    """By feature, dense feature, list and history: the column of the raw rows."""
    floats: list[str] = []
    """Categories and lists among whose values are floating-point numbers."""
    scales: dict[str, Scale] = {}
    """By dense feature."""
    separators: dict[str, str] = {}
    """By list and history: what stands between the values where they come as one text."""
    history: int = Field(default=0, ge=0)
    """The most entries of a history; the latest are kept."""
    missing: list[str] = []
    """Text that means a missing value, as empty text does."""
    separator: str | None = None
    """Between the fields of delimited text; ``None``: recognized in each file."""
    names: list[str] = []
    """The columns of delimited text without a header; empty: the first line names them."""
    charset: str = "utf-8"
    """The encoding of delimited text."""


def hashes_of(values: pl.Series) -> np.ndarray:
    """64 bits for each value, uint64 [N], the same for an integer and for the text that writes it; of null any."""
    from pandas.util import hash_array

    numbers = values.cast(pl.Int64, strict=False)
    if not values.dtype.is_integer():
        values = values.cast(pl.String)
        numbers = numbers.set((numbers.cast(pl.String) != values).fill_null(True), None)
    hashes = np.array(hash_array(numbers.fill_null(0).to_numpy()))
    others = numbers.is_null() & values.is_not_null()
    if others.any():
        texts = values.filter(others).cast(pl.String).to_numpy().astype(object)
        hashes[others.to_numpy()] = hash_array(texts, categorize=False)
    return hashes


def probe() -> list[str]:
    """The hashes of ``PROBES``, hexadecimal."""
    return [f"{int(hashes_of(pl.Series([value]))[0]):016x}" for value in PROBES]


class HashedVocabulary:
    """The vocabulary of one feature, as so many bytes of the hash of each value, in the order of ids.

    Args:
        hashes: uint8 [values, bytes], the lowest byte first; the value in row i has id i + 2.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        self.hashes = hashes
        self._bits = 8 * hashes.shape[1]
        whole = np.zeros((len(hashes), HASH_BYTES), np.uint8)
        whole[:, : hashes.shape[1]] = hashes
        self._ids = Ids(whole.view("<i8").reshape(len(hashes)))

    @staticmethod
    def of(values: pl.Series) -> HashedVocabulary:
        """The vocabulary of values in the order of ids: as few bytes as tell them apart and keep false matches rare."""
        hashes = hashes_of(values)
        for size in range(1, HASH_BYTES + 1):
            short = hashes & np.uint64(2 ** (8 * size) - 1)
            if size == HASH_BYTES or (
                len(values) <= MOST_FALSE * 2 ** (8 * size) and len(np.unique(short)) == len(values)
            ):
                break
        return HashedVocabulary(hashes.astype("<u8").view(np.uint8).reshape(len(values), HASH_BYTES)[:, :size].copy())

    @property
    def false_matches(self) -> int:
        """How many values of the vocabulary have the hash of another one, and so its id."""
        return len(self._ids.keys) - len(np.unique(self._ids.keys))

    @property
    def false_share(self) -> float:
        """The expected share of unknown values that are taken for one of the vocabulary."""
        return float(len(self.hashes) / 2.0**self._bits)

    def ids(self, values: pl.Series) -> np.ndarray:
        """int32 ids of values, null where one is missing."""
        keys = (hashes_of(values) & np.uint64(2**self._bits - 1)).view(np.int64)
        keys[values.is_null().to_numpy()] = MISSING
        return self._ids.ids(keys)
