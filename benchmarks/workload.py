"""What is looked up: the tables of Criteo-Kaggle, Zipf ids, several batches of them, in every layout a rival wants."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

#: Numbers of ids of the 26 categorical features of Criteo's Kaggle data: 33.8 million in all.
CARDINALITIES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652),
    *(2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
ROWS = 45_840_617  # of that data; frequencies are what so many rows hold on average
ZIPF = 1.05


def sizes(divisor: int) -> list[int]:
    """The cardinalities, those above 1,000 divided."""
    return [n if n <= 1000 else n // divisor for n in CARDINALITIES]


class Workload:
    """Batches of one id a feature, drawn with probability ∝ 1/rank^1.05, and what else a contestant is given.

    Args:
        sizes: number of ids of each of F tables.
        dim: length D of every vector.
        batch: examples B a batch.
        batches: how many different ones there are; contestants take them in turn.

    The layouts are made once, before anything is timed, so that no contestant pays for another's.
    """

    def __init__(self, sizes: Sequence[int], dim: int, batch: int, batches: int = 16, seed: int = 0) -> None:
        self.sizes, self.batch, self.batches, self._seed = list(sizes), batch, batches, seed
        self.names = [f"C{i + 1}" for i in range(len(self.sizes))]
        generator = np.random.default_rng(seed)
        self.frequencies: dict[str, np.ndarray] = {}
        columns = []
        for name, size in zip(self.names, self.sizes):
            weights = np.arange(1, size + 1, dtype=np.float64) ** -ZIPF
            cumulative = np.cumsum(weights)
            drawn = np.searchsorted(cumulative, generator.random(batch * batches) * cumulative[-1], side="right")
            columns.append(drawn.clip(max=size - 1).reshape(batches, batch))
            self.frequencies[name] = (weights * (ROWS / cumulative[-1])).astype(np.int64)
        #: ``[B, F]`` int64, a batch each.
        self.ids = [torch.from_numpy(np.stack([column[i] for column in columns], axis=1)) for i in range(batches)]
        self._set_dim(dim)

    def _set_dim(self, dim: int) -> None:
        self.dim = dim
        #: The gradient of the output, ``[B, F·D]``; the same for all.
        self.grad = torch.randn(self.batch, len(self.sizes) * dim, generator=torch.Generator().manual_seed(self._seed))

    def of_dim(self, dim: int) -> Workload:
        """The same ids, which take long to draw, for vectors of another length."""
        other = copy.copy(self)
        other._set_dim(dim)
        return other

    @property
    def num_rows(self) -> int:
        return sum(self.sizes)

    @property
    def num_ids(self) -> int:
        """Ids looked up in a batch."""
        return self.batch * len(self.sizes)

    @property
    def full_bytes(self) -> int:
        """Bytes of all tables in full, fp32."""
        return 4 * self.dim * self.num_rows

    @cached_property
    def bases(self) -> Tensor:
        """Where each table begins among the rows of all."""
        return torch.tensor([0, *np.cumsum(self.sizes)[:-1].tolist()])

    @cached_property
    def columns(self) -> list[tuple[Tensor, ...]]:
        """Of each batch the ids of each feature, ``[B]``."""
        return [ids.t().contiguous().unbind() for ids in self.ids]

    @cached_property
    def by_feature(self) -> list[Tensor]:
        """``[F·B]``, feature by feature, as FBGEMM and torchrec take ids."""
        return [ids.t().reshape(-1) for ids in self.ids]

    @cached_property
    def rows_by_feature(self) -> list[Tensor]:
        """The same as rows of one table that holds all."""
        return [(ids + self.bases).t().reshape(-1) for ids in self.ids]

    @cached_property
    def rows(self) -> list[Tensor]:
        """``[B·F]``, example by example, as rows of one table that holds all."""
        return [(ids + self.bases).reshape(-1) for ids in self.ids]
