"""What a batch holds, and the arrays in memory that batches are cut from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Jagged(NamedTuple):
    """One list of ids per example, for B examples. The list of example b is ``values[offsets[b]:offsets[b + 1]]``."""

    values: Tensor  # int64 [N]
    offsets: Tensor  # int64 [B + 1]


class Batch(NamedTuple):
    """B examples. The columns of ``dense`` and ``ids`` are the data set's ``dense_features`` and ``feature_names``."""

    labels: Tensor  # float32 [B]
    dense: Tensor  # float32 [B, num_dense]
    ids: Tensor  # int64 [B, F]
    groups: Tensor | None  # int64 [B], the group (e.g. user) of each row for grouped metrics
    lists: dict[str, Jagged] = {}  # multi-valued features and histories, by name


class Lists(NamedTuple):
    """Lists of ids, stored one after another: list i is ``values[offsets[i]:offsets[i + 1]]``."""

    values: np.ndarray  # int32
    offsets: np.ndarray  # int64, one more than lists

    @staticmethod
    def concatenated(parts: list[Lists]) -> Lists:
        if len(parts) == 1:
            return parts[0]
        lengths = [np.diff(part.offsets) for part in parts]
        return Lists(np.concatenate([part.values for part in parts]), np.r_[0, np.cumsum(np.concatenate(lengths))])

    def _between(self, begin: np.ndarray, end: np.ndarray) -> Lists:
        offsets = np.r_[0, np.cumsum(end - begin)]
        places = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], end - begin)
        return Lists(self.values.take(places), offsets)

    def latest(self, most: int) -> Lists:
        """The last ``most`` ids of each list."""
        begin, end = self.offsets[:-1], self.offsets[1:]
        return self._between(np.maximum(begin, end - most), end)

    def take(self, rows: np.ndarray) -> Lists:
        return self._between(self.offsets.take(rows), self.offsets.take(rows + 1))

    def cut(self, rows: slice) -> Lists:
        offsets = self.offsets[rows.start : rows.stop + 1]
        return Lists(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])


class Rows(NamedTuple):
    """Rows in memory. Their order is that of the files, or of a shuffled window."""

    labels: np.ndarray
    dense: np.ndarray
    ids: np.ndarray  # int32: half the memory of what a batch hands out
    groups: np.ndarray | None
    lists: dict[str, Lists]

    def take(self, rows: np.ndarray) -> Rows:
        groups = None if self.groups is None else self.groups.take(rows)
        lists = {name: of.take(rows) for name, of in self.lists.items()}
        return Rows(self.labels.take(rows), self.dense.take(rows, axis=0), self.ids.take(rows, axis=0), groups, lists)

    def cut(self, rows: slice) -> Rows:
        groups = None if self.groups is None else self.groups[rows].copy()
        lists = {name: of.cut(rows) for name, of in self.lists.items()}
        return Rows(self.labels[rows].copy(), self.dense[rows].copy(), self.ids[rows], groups, lists)

    def joined(self, other: Rows) -> Rows:
        groups = None
        if self.groups is not None and other.groups is not None:
            groups = np.concatenate([self.groups, other.groups])
        return Rows(
            np.concatenate([self.labels, other.labels]),
            np.concatenate([self.dense, other.dense]),
            np.concatenate([self.ids, other.ids]),
            groups,
            {name: Lists.concatenated([of, other.lists[name]]) for name, of in self.lists.items()},
        )

    def batch(self) -> Batch:
        return Batch(
            torch.from_numpy(self.labels),
            torch.from_numpy(self.dense),
            torch.from_numpy(self.ids.astype(np.int64)),
            None if self.groups is None else torch.from_numpy(self.groups),
            {
                name: Jagged(torch.from_numpy(of.values.astype(np.int64)), torch.from_numpy(of.offsets))
                for name, of in self.lists.items()
            },
        )
