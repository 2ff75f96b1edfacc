"""The lookup of a method that no recipe can say, such as a tensor train: where values lie, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from embtables.formats import FP32, weight_name
from embtables.lookup.constants import WithConstants
from embtables.lookup.store import Store

# A dense parameter by its name, as the present step uses it: with a fused optimizer its backward updates it.
Extras: TypeAlias = Callable[[str], Tensor]


class Part(NamedTuple):
    """A request for rows of one width and format.

    ``rows``: int64 of any shape, counted from the first row of all slabs of that width and format (a slab begins at
    ``store.start(name)``); −1, where the block says ``may_skip``, yields zeros. ``subset``: which of the ids, counted
    flat, the first dimension of ``rows`` stands for; ``None`` for all of them, in their own shape. ``format``: the name
    of the row format, ``store.format(slab)``; what is gathered is fp32 in any case.
    """

    width: int
    rows: Tensor
    subset: Tensor | None = None
    format: str = FP32.name

    @property
    def weight(self) -> str:
        """The attribute of the weight that holds these rows."""
        return weight_name(self.format, self.width)


class Block(WithConstants):
    """The tables of one group, variant and dimension, looked up at once: ids in, vectors out, no Python per table.

    ``ids`` and ``feature`` are int64 and broadcast to one shape ``[...]``: ``[F, B]`` with ``feature`` ``[F, 1]``, or
    flat ``[N]`` each. ``feature`` counts the block's own lookups and indexes its constants.

    Args:
        store: where the values lie.
        embedding_dim: D.
    """

    # Whether rows may be −1, which yields zeros and takes no gradient.
    may_skip = False

    def __init__(self, store: Store, embedding_dim: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        # Reached through a list, so that the store is not registered as a part of every block.
        self._store = [store]

    @property
    def store(self) -> Store:
        """The storage of the tables."""
        return self._store[0]

    def address(self, ids: Tensor, feature: Tensor) -> Sequence[Part]:
        """Where the values of each id lie."""
        raise NotImplementedError

    def combine(self, values: list[Tensor], ids: Tensor, feature: Tensor, extras: Extras) -> Tensor:
        """Vectors ``[..., D]`` from the gathered values of each part, ``[*rows.shape, width]``.

        ``extras("name")`` is a dense parameter, as this step uses it.
        """
        raise NotImplementedError

    def signature(self, ids: Tensor, feature: Tensor) -> Tensor:
        """int64 ``[..., S]``: ids with equal signatures have equal vectors, whatever the weights."""
        parts = self.address(ids, feature)
        return torch.cat([part.rows.reshape(*ids.shape, -1) for part in parts], dim=-1)

    def check_codes(self, given: Callable[[str], Tensor | None]) -> None:
        """Raises ``ValueError`` for codes by which ``combine`` would read what is not there.

        Args:
            given: a code's new content by its name, before the store takes it; ``None`` where it stays as it is.
        """
