"""Columns of raw values as int64 keys: integers are their own keys, anything else is numbered as it comes."""

from __future__ import annotations

import numpy as np
import polars as pl

from embtables.datasets.vocabulary import MISSING


class KeyColumn:
    """Collects the keys of one column, block by block. It needs 8 bytes per row, and each distinct text once.

    Integers of 64 bits are their own keys, those without a sign by the same bits. The one integer whose bits are those
    of MISSING has none: a column that holds it is numbered like text.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] | None = None
        self._parts: list[np.ndarray] = []
        self._unsigned = False
        self._of_integers = True
        self.of_floats = False
        """Whether a block of floating-point numbers was among the values."""

    def add(self, values: pl.Series) -> None:
        self._parts.append(self.keys_of(values))

    def keys_of(self, values: pl.Series) -> np.ndarray:
        """int64 keys; null becomes MISSING."""
        if values.dtype.is_integer() and self._numbers is None:
            keys = values.reinterpret(signed=True) if values.dtype == pl.UInt64 else values.cast(pl.Int64)
            if not (keys == MISSING).any():
                self._unsigned = values.dtype == pl.UInt64
                return keys.fill_null(MISSING).to_numpy()
            self._number_integers()
        if self._numbers is None:
            self._numbers = {}
        self._of_integers &= values.dtype.is_integer()
        self.of_floats |= values.dtype.is_float()
        encoded = values.cast(pl.String).to_arrow().dictionary_encode()
        numbers = self._numbers
        codes = [numbers.setdefault(text, len(numbers)) for text in encoded.dictionary.to_pylist()]
        lookup = np.array([*codes, MISSING], np.int64)
        return lookup[encoded.indices.fill_null(len(codes)).to_numpy()]

    def _number_integers(self) -> None:
        """Numbers the integers of earlier blocks, which were their own keys."""
        earlier, self._numbers = self._parts, {}
        for place, keys in enumerate(earlier):
            integers = pl.Series(keys).set(pl.Series(keys == MISSING), None)
            self._parts[place] = self.keys_of(integers.reinterpret(signed=False) if self._unsigned else integers)

    def take_keys(self) -> np.ndarray:
        """Returns all keys that were added so far, and forgets them."""
        keys = np.concatenate(self._parts) if self._parts else np.zeros(0, np.int64)
        self._parts = []
        return keys

    def values(self, keys: np.ndarray) -> pl.Series:
        """The raw values of keys."""
        if self._numbers is None:
            integers = pl.Series(keys)
            return integers.reinterpret(signed=False) if self._unsigned and (keys < 0).any() else integers
        texts = pl.Series(np.array(list(self._numbers), dtype=object)[keys].tolist(), dtype=pl.String)
        if not self._of_integers:
            return texts
        signed = texts.cast(pl.Int64, strict=False)
        return signed if signed.null_count() == 0 else texts.cast(pl.UInt64)

    def all_values(self) -> pl.Series:
        """The distinct texts, in the order of their keys 0, 1, …"""
        return pl.Series(list(self._numbers or {}), dtype=pl.String)
