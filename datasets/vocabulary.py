"""Ids of raw values: 0 is a missing value, 1 a value that training does not show, 2 and up are by frequency."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

if TYPE_CHECKING:
    import pandas as pd

MISSING = -(2**63)  # the key of an absent value
MISSING_ID, UNSEEN_ID, FIRST_ID = 0, 1, 2


class Ids:
    """The ids of keys (int64): ``keys[i]`` has id ``i + 2``."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = keys

    def ids(self, keys: np.ndarray) -> np.ndarray:
        """int32 ids of int64 keys."""
        places = self._index.get_indexer(keys)  # -1 where there is none, which makes UNSEEN_ID
        ids = (places + FIRST_ID).astype(np.int32)
        ids[keys == MISSING] = MISSING_ID
        return ids

    @cached_property
    def _index(self) -> pd.Index:
        """A hash table of the keys."""
        import pandas as pd

        return pd.Index(self.keys)


class Vocabulary(Ids):
    """The ids of one feature, from the counts of its keys (int64) in the training split.

    The most frequent key gets id 2; equal counts are ordered by key. Keys rarer than ``min_count`` share id 1 with
    the keys that training never saw. ``keys[i]`` has id ``i + 2``; ``counts[id]`` is the training count of each id.
    """

    def __init__(self, keys: np.ndarray, counts: np.ndarray, min_count: int = 1) -> None:
        if min_count < 1:
            raise ValueError(f"min_count {min_count}: at least 1 is needed")
        present = keys != MISSING
        missing = int(counts[~present].sum())
        keys, counts = keys[present], counts[present]
        frequent = counts >= min_count
        rare = int(counts[~frequent].sum())
        keys, counts = keys[frequent], counts[frequent]
        order = np.lexsort((keys, -counts))
        super().__init__(keys[order].astype(np.int64))
        self.counts = np.concatenate([[missing, rare], counts[order]]).astype(np.int64)
        if len(self.counts) > 2**31:
            raise ValueError(f"{len(self.counts)} distinct values: ids are stored in 32 bits; raise min_count")

    @property
    def num_embeddings(self) -> int:
        return len(self.counts)


class KeyCounter:
    """Counts keys chunk by chunk; memory grows with the number of distinct keys only."""

    def __init__(self) -> None:
        self._keys = pl.Series("key", [], dtype=pl.Int64)
        self._merged = pl.DataFrame({"key": self._keys, "count": self._keys})
        self._pending: list[pl.DataFrame] = []
        self._pending_rows = 0

    def add(self, keys: np.ndarray) -> None:
        distinct, counts = np.unique(keys, return_counts=True)
        self._pending.append(pl.DataFrame({"key": distinct, "count": counts}))
        self._pending_rows += len(distinct)
        if self._pending_rows > max(2**20, len(self._merged) // 2):
            self._merge()

    def _merge(self) -> None:
        self._merged = pl.concat([self._merged, *self._pending]).group_by("key").agg(pl.col("count").sum())
        self._pending, self._pending_rows = [], 0

    def vocabulary(self, min_count: int = 1) -> Vocabulary:
        self._merge()
        return Vocabulary(self._merged["key"].to_numpy(), self._merged["count"].to_numpy(), min_count)
