"""Text as int64 keys. Texts that write a number need no memory."""

from __future__ import annotations

import numpy as np
import polars as pl

from embtables.datasets.vocabulary import MISSING

DECIMAL = 2**40  # integers of smaller size, written without sign or zeros in front, are their own keys
HEX = DECIMAL  # 8 hex digits: HEX + the number that they write, below HEX + 2**32
OTHER = 2**61  # any other text: OTHER + its number in the order of appearance


class StringKeys:
    """The keys of one feature: equal texts have equal keys. Memory grows with the texts that do not write a number."""

    def __init__(self) -> None:
        self._others: dict[str, int] = {}

    def keys_of(self, values: pl.Series) -> np.ndarray:
        """int64 keys of text, or of integers, which have the key of the text that writes them. Null becomes MISSING."""
        if values.dtype.is_integer():
            numbers = values.cast(pl.Int64, strict=False)
            if numbers.null_count() == values.null_count() and numbers.is_between(1 - DECIMAL, DECIMAL - 1).all():
                return numbers.fill_null(MISSING).to_numpy()
        encoded = values.cast(pl.String).to_arrow().dictionary_encode()
        texts = pl.Series(encoded.dictionary, dtype=pl.String)
        number = texts.cast(pl.Int64, strict=False)
        decimal = (number.is_between(1 - DECIMAL, DECIMAL - 1) & (number.cast(pl.String) == texts)).fill_null(False)
        hexadecimal = ~decimal & texts.str.contains("^[0-9a-f]{8}$")
        digits = texts.set(~hexadecimal, None).str.to_integer(base=16, dtype=pl.Int64)
        keys = np.where(decimal, number.fill_null(0), HEX + digits.fill_null(0).to_numpy())
        for place in np.flatnonzero(~(decimal | hexadecimal).to_numpy()):
            keys[place] = OTHER + self._others.setdefault(texts[int(place)], len(self._others))
        lookup = np.append(keys, MISSING)
        return lookup[encoded.indices.fill_null(len(texts)).to_numpy()]

    def texts_of(self, keys: np.ndarray) -> pl.Series:
        """The text of each key."""
        others = list(self._others)
        return pl.Series(
            [
                str(key) if key < HEX else f"{key - HEX:08x}" if key < OTHER else others[key - OTHER]
                for key in keys.tolist()
            ],
            dtype=pl.String,
        )
