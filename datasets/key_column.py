"""Columns of raw values as int64 keys: integers are their own keys, anything else is numbered as it comes."""

from __future__ import annotations

import numpy as np
import polars as pl

from embtables.datasets.vocabulary import MISSING


class KeyColumn:
    """Collects the keys of one column, block by block. It needs 8 bytes per row, and each distinct text once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] | None = None
        self._parts: list[np.ndarray] = []

    def add(self, values: pl.Series) -> None:
        self._parts.append(self.keys_of(values))

    def keys_of(self, values: pl.Series) -> np.ndarray:
        """int64 keys; null becomes MISSING."""
        if values.dtype.is_integer():
            values = values.reinterpret(signed=True) if values.dtype == pl.UInt64 else values.cast(pl.Int64)
            return values.fill_null(MISSING).to_numpy()
        if self._numbers is None:
            self._numbers = {}
        encoded = values.cast(pl.String).to_arrow().dictionary_encode()
        numbers = self._numbers
        codes = [numbers.setdefault(text, len(numbers)) for text in encoded.dictionary.to_pylist()]
        lookup = np.array([*codes, MISSING], np.int64)
        return lookup[encoded.indices.fill_null(len(codes)).to_numpy()]

    def take_keys(self) -> np.ndarray:
        """Returns all keys that were added so far, and forgets them."""
        keys = np.concatenate(self._parts) if self._parts else np.zeros(0, np.int64)
        self._parts = []
        return keys

    def values(self, keys: np.ndarray) -> pl.Series:
        """The raw values of keys."""
        if self._numbers is None:
            return pl.Series(keys)
        texts = np.array(list(self._numbers), dtype=object)
        return pl.Series(texts[keys].tolist(), dtype=pl.String)

    def all_values(self) -> pl.Series:
        """The distinct texts, in the order of their keys 0, 1, …"""
        return pl.Series(list(self._numbers or {}), dtype=pl.String)
