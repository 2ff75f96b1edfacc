"""Lists of keys, one per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from embtables.datasets.histories import ranges


class KeyLists(NamedTuple):
    """Lists of keys, one after another: list ``i`` is ``values[offsets[i] : offsets[i + 1]]``."""

    values: np.ndarray  # int64
    offsets: np.ndarray  # int64, one more than there are lists

    def take(self, rows: np.ndarray) -> KeyLists:
        """The lists in the given places."""
        chosen, offsets = ranges(self.offsets[rows], self.offsets[rows + 1])
        return KeyLists(self.values[chosen], offsets)

    @staticmethod
    def of_lengths(values: np.ndarray, lengths: Sequence[np.ndarray]) -> KeyLists:
        """The lists whose values lie one after another, by the lengths of their parts."""
        return KeyLists(values, np.r_[0, np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]))].astype(np.int64))
