"""Vectors of which lookups show the first columns alone, as stages say: zeros behind them, which take no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embtables.lookup.constants import WithConstants
from embtables.lookup.graphs import intervals
from embtables.lookup.inputs import Input

if TYPE_CHECKING:
    from embtables.methods.base import Stage


class Shown(WithConstants):
    """The columns of a lookup's outputs that are shown now.

    Args:
        tables: the name of the table of each output.
        dims: the dimension of each output.
        stages: those that show columns of some tables alone; of one table at most one.
    """

    hidden: Tensor
    number: Tensor

    def __init__(self, tables: Sequence[str], dims: Sequence[int], stages: Sequence[Stage]) -> None:
        super().__init__()
        self._stages, self.dims = tuple(stages), list(dims)  # a tuple, so that they are not registered as parts
        columns = [(table, column) for table, dim in zip(tables, dims) for column in range(dim)]
        # Of all outputs side by side: what is hidden outside of training, and for each stage the number of each column
        # of its tables within its vector.
        self.constant("hidden", [any(c >= s.shows.get(t, c + 1) for s in stages) for t, c in columns], torch.bool)
        self.constant("number", [[c if t in s.shows else -1 for t, c in columns] for s in stages])

    def _hidden(self, trains: bool) -> Tensor:
        if not trains:
            return self.hidden
        return reduce(torch.logical_or, (n >= stage.width for n, stage in zip(self.number.unbind(), self._stages)))

    def side_by_side(self, vectors: Tensor, trains: bool) -> Tensor:
        """Of outputs ``[B, ΣD]`` what is shown."""
        return vectors.masked_fill(self._hidden(trains), 0)

    def one_by_one(self, vectors: Sequence[Tensor], trains: bool) -> list[Tensor]:
        """Of each output ``[·, D]`` what is shown."""
        return [v.masked_fill(hidden, 0) for v, hidden in zip(vectors, self._hidden(trains).split(self.dims))]

    def in_input_order(self, vectors: Tensor, given: Input, trains: bool) -> Tensor:
        """Of the vectors of all ids, ``[B, F, D]`` or ``[N, D]``, what is shown."""
        count = len(self.dims)
        hidden = self._hidden(trains).view(count, -1)
        if given.offsets is not None:
            ends = given.offsets[torch.arange(1, count + 1, device=hidden.device) * given.batch(count)]
            # In graphs ids may follow the last bag.
            hidden = hidden[intervals(ends, vectors.shape[0]).clamp(max=count - 1)]
        return vectors.masked_fill(hidden, 0)
