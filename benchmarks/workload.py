"""What is looked up: bags of ids of Criteo-Kaggle's tables or of others, several batches, in all layouts of rivals."""

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
ONE_ID, UNEVEN = "one id", "uneven"
#: What configurations call their bags: the ids of each, those of uneven ones on average.
BAGS = {ONE_ID: 1, "10 ids": 10, "50 ids": 50, UNEVEN: 10}


def sizes(divisor: int) -> list[int]:
    """The cardinalities, those above 1,000 divided."""
    return [n if n <= 1000 else n // divisor for n in CARDINALITIES]


class Workload:
    """Batches of bags of ids, drawn with probability ∝ 1/rank^1.05, and what else a contestant is given.

    Args:
        sizes: number of ids of each of F tables.
        dim: length D of every vector.
        batch: examples B a batch.
        batches: how many different ones there are; contestants take them in turn.
        bags: how many ids of each feature an example has; one by default.
        uneven: whether the lengths of bags of more than one id are drawn, geometrically from 0, with that mean.

    The layouts are made once, before anything is timed, so that no contestant pays for another's.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        dim: int,
        batch: int,
        batches: int = 16,
        seed: int = 0,
        bags: Sequence[int] | None = None,
        uneven: bool = False,
    ) -> None:
        self.sizes, self.batch, self.batches, self._seed = list(sizes), batch, batches, seed
        self.names = [f"C{i + 1}" for i in range(len(self.sizes))]
        bags = bags or [1] * len(self.sizes)
        self.has_bags = any(length != 1 for length in bags)
        generator, of_lengths = np.random.default_rng(seed), np.random.default_rng(seed + 1)
        lengths, columns = [], []
        for size, length in zip(self.sizes, bags):
            cumulative = np.cumsum(_zipf(size))
            shape = batches, batch
            if uneven and length > 1:
                lengths.append(of_lengths.geometric(1 / (1 + length), shape) - 1)
            else:
                lengths.append(np.full(shape, length))
            drawn = generator.random(lengths[-1].sum()) * cumulative[-1]
            ids = np.searchsorted(cumulative, drawn, side="right").clip(max=size - 1)
            columns.append(np.split(ids, np.cumsum(lengths[-1].sum(axis=1))[:-1]))
        #: ``[N]`` int64, feature by feature, as FBGEMM and torchrec take ids, a batch each.
        self.by_feature = [torch.from_numpy(np.concatenate([c[i] for c in columns])) for i in range(batches)]
        #: ``[F·B + 1]``: where the bags begin in them, and where the last one ends.
        self.offsets = [_offsets(torch.from_numpy(np.concatenate([c[i] for c in lengths]))) for i in range(batches)]
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

    @cached_property
    def narrow(self) -> Workload:
        """The same with ids and offsets in int32, in all layouts."""
        other = copy.copy(self)
        for name in [name for name, value in vars(Workload).items() if isinstance(value, cached_property)]:
            vars(other).pop(name, None)
        other.by_feature, other.offsets = ([t.int() for t in every] for every in (self.by_feature, self.offsets))
        return other

    @property
    def num_rows(self) -> int:
        return sum(self.sizes)

    @property
    def num_ids(self) -> int:
        """Ids looked up in a batch, the first one."""
        return self.by_feature[0].numel()

    @property
    def full_bytes(self) -> int:
        """Bytes of all tables in full, fp32."""
        return 4 * self.dim * self.num_rows

    @cached_property
    def frequencies(self) -> dict[str, np.ndarray]:
        """How often each id occurs in the rows of Criteo's data."""
        weights = {name: _zipf(size) for name, size in zip(self.names, self.sizes)}
        return {name: (w * (ROWS / w.sum())).astype(np.int64) for name, w in weights.items()}

    @cached_property
    def bases(self) -> Tensor:
        """Where each table begins among the rows of all."""
        return torch.tensor([0, *np.cumsum(self.sizes)[:-1].tolist()], dtype=self.by_feature[0].dtype)

    @cached_property
    def ids(self) -> list[Tensor]:
        """``[B, F]``; where every bag has one id."""
        return [ids.view(-1, self.batch).t().contiguous() for ids in self.by_feature]

    @cached_property
    def inputs(self) -> list[tuple[Tensor, ...]]:
        """What embtables is given: ids ``[B, F]`` where every bag has one, else flat ones with offsets."""
        return list(zip(self.by_feature, self.offsets)) if self.has_bags else [(ids,) for ids in self.ids]

    @cached_property
    def columns(self) -> list[tuple[Tensor, ...]]:
        """Of each batch the ids of each feature, bag by bag."""
        ends = [offsets[:: self.batch].diff().tolist() for offsets in self.offsets]
        return [ids.split(lengths) for ids, lengths in zip(self.by_feature, ends)]

    @cached_property
    def column_offsets(self) -> list[list[Tensor]]:
        """Of each batch and feature ``[B + 1]``: where its bags begin among its own ids, and the end of the last."""
        starts = range(0, len(self.sizes) * self.batch, self.batch)
        return [[o[s : s + self.batch + 1] - o[s] for s in starts] for o in self.offsets]

    @cached_property
    def rows_by_feature(self) -> list[Tensor]:
        """``by_feature`` as rows of one table that holds all."""
        return [torch.cat([ids + base for ids, base in zip(columns, self.bases)]) for columns in self.columns]

    @cached_property
    def rows(self) -> list[Tensor]:
        """``[N]``, example by example, as rows of one table that holds all."""
        found = []
        for rows, offsets, row_offsets in zip(self.rows_by_feature, self.offsets, self.row_offsets):
            moved = self._by_example(offsets[:-1]) - row_offsets[:-1]
            found.append(rows[moved.repeat_interleave(row_offsets.diff()) + torch.arange(len(rows))])
        return found

    @cached_property
    def row_offsets(self) -> list[Tensor]:
        """``[B·F + 1]``: where the bags begin in ``rows``, and where the last one ends."""
        return [_offsets(self._by_example(offsets.diff())) for offsets in self.offsets]

    def _by_example(self, of_bags: Tensor) -> Tensor:
        return of_bags.view(-1, self.batch).t().reshape(-1)


def _zipf(size: int) -> np.ndarray:
    return np.arange(1, size + 1, dtype=np.float64) ** -ZIPF


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])
