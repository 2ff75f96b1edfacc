"""Mini-batch-aware L2 regularization: only the vectors that a step looks up, each by how rare its id is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embtables import ops
from embtables.config import TableConfig
from embtables.lookup.graphs import in_memory


class Regularizer(nn.Module):
    """Adds λ/n_j·w_j to the gradient of a block's vectors, once for each distinct id j of a table.

    An id that occurs several times, in one feature or in several of its table, gets an equal part of it each time. It
    acts on the vectors, and the chain rule carries it on into whatever stores them.

    Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, equations 6 and 7.

    Args:
        l2: λ.
        tables: the table of each of the block's lookups.
        counts: ``{table name: n_j of each of its rows}``; a table without them has n_j = 1.
    """

    table: Tensor
    start: Tensor
    known: Tensor
    counts: Tensor

    def __init__(self, l2: float, tables: Sequence[TableConfig], counts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.l2 = l2
        distinct = list(dict.fromkeys(table.name for table in tables))
        given = [counts[name] for name in distinct if name in counts]
        lengths = torch.tensor([len(counts[name]) if name in counts else 0 for name in distinct])
        start = lengths.cumsum(0) - lengths
        self.span = None if any(t.rows is None for t in tables) else max(t.rows or 0 for t in tables)
        table = torch.tensor([distinct.index(t.name) for t in tables])
        for buffer, values in (("table", table), ("start", start[table]), ("known", lengths[table])):
            self.register_buffer(buffer, values, persistent=False)
        self.register_buffer("counts", torch.cat([torch.empty(0), *given]).clamp(min=1), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Regularizer:
        """Moves and casts like any module, but counts stay float32: in float16 those from 65,520 on would be inf."""
        counts = self.counts
        super()._apply(fn, recurse)
        if self.counts.dtype != counts.dtype:
            self.counts = counts.to(self.counts.device)
        return self

    def forward(self, vectors: Tensor, ids: Tensor, feature: Tensor, absent: Tensor | None = None) -> Tensor:
        """The vectors ``[..., D]`` of ``ids`` as they are; zero vectors, as those of padding, get nothing.

        ``absent``: which of the ids are none, and count as no occurrence.
        """
        if not vectors.requires_grad:
            return vectors
        regularized: Tensor = _Regularized.apply(vectors, self._share(ids, feature, absent).unsqueeze(-1))
        return regularized

    def _share(self, ids: Tensor, feature: Tensor, absent: Tensor | None) -> Tensor:
        """λ/(n_j·m_j): m_j, how often the id j of a table is among all ``ids``."""
        if absent is None and ops.backend() == "native" and in_memory(ids, feature):
            return ops.shares(ids, feature.expand_as(ids), self.table, self.start, self.known, self.counts, self.l2)
        return self.l2 / (self._training_count(ids, feature) * self._occurrences(ids, feature, absent))

    def _training_count(self, ids: Tensor, feature: Tensor) -> Tensor:
        if not self.counts.numel():
            return torch.ones_like(ids, dtype=torch.float32)
        counted = (ids >= 0) & (ids < self.known[feature])
        return torch.where(counted, self.counts[torch.where(counted, self.start[feature] + ids, 0)], 1.0)

    def _occurrences(self, ids: Tensor, feature: Tensor, absent: Tensor | None) -> Tensor:
        """How often each id of a table occurs among all ``ids``."""
        span = self.span
        if span is None:
            # 64-bit ids leave no room for the number of the table, their ranks do.
            run, order = _runs(ids)
            ids, span = torch.empty_like(run).index_copy_(0, order, run).view(ids.shape), ids.numel()
        known = self.table[feature] * span + ids
        run, order = _runs(known if absent is None else torch.where(absent, -1, known))
        length = torch.zeros_like(run).index_add_(0, run, torch.ones_like(run))
        return torch.empty_like(run).index_copy_(0, order, length[run]).view(ids.shape)


def _runs(values: Tensor) -> tuple[Tensor, Tensor]:
    """The values in order ``[N]``, told by the number of their run of equal ones, and where each of them stood.

    ``torch.unique`` says the same, but breaks graphs: how many values differ depends on data.
    """
    ordered, order = values.flatten().sort()
    return (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0), order


class _Regularized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, share)
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        vectors, share = ctx.saved_tensors
        return torch.addcmul(grad, vectors, share), None
