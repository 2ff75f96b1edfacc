"""Several backward passes that make one update: gradients of rows, kept until all are there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from embtables import ops
from embtables.lookup.graphs import outside_graphs

if TYPE_CHECKING:
    from embtables.lookup.store import Store


class Accumulation:
    """The gradients of the lookups within a block of ``accumulate``, by weight and row."""

    def __init__(self) -> None:
        # Whether a step has begun, which all lookups of the block share.
        self.begun = False
        self.is_open = True
        self._parts: list[tuple[str, Tensor, Tensor]] = []

    def add(self, weight: str, rows: Tensor, grad: Tensor) -> None:
        """Keeps gradients ``[N, width]`` of rows ``[N]`` of a weight or extra, by its attribute.

        Raises:
            RuntimeError: where the block has ended.
        """
        if not self.is_open:
            raise RuntimeError(
                "the backward of a lookup that was made within accumulate() comes after the end of its block, where "
                "the update has been made already: call backward inside the block"
            )
        self._parts.append((weight, rows, grad))

    def count(self) -> int:
        """How many gradients there are."""
        return len(self._parts)

    def drop_since(self, count: int) -> None:
        """Forgets the gradients that came after the first ``count``."""
        del self._parts[count:]

    def update(self, store: Store) -> None:
        """One step of the optimizer on all rows that have gradients."""
        for name in dict.fromkeys(name for name, _, _ in self._parts):
            parts = [(rows, grad) for other, rows, grad in self._parts if other == name]
            rows, grads = (torch.cat(each) for each in zip(*parts))
            ops.update_once(store.matrix(name), store.state_for_step(name), rows, grads, store.hyper, store.rule)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Copies and files of tables are outside any block."""
        return type(None), ()


@contextmanager
def accumulating(store: Store) -> Iterator[None]:
    """Within the block backward passes add up; see ``EmbeddingTables.accumulate``."""
    outer = store.accumulation
    block = Accumulation() if outer is None else outer
    began, count = block.begun, block.count()
    store.accumulation = block
    try:
        yield
        if outer is None:
            with torch.no_grad():
                block.update(store)
    except BaseException:
        block.drop_since(count)
        if block.begun and not began:
            block.begun = False
            store.count_step(-1)
        raise
    finally:
        store.accumulation = outer
        block.is_open = outer is not None


class _Rows(torch.autograd.Function):
    """Rows of a weight, whose gradients are added to an accumulation. ``hook`` only makes autograd call backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hook: Tensor,
        weight: Tensor,
        index: Tensor,
        name: str,
        accumulation: Accumulation,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.index, ctx.name, ctx.accumulation = index, name, accumulation
        return weight.index_select(0, index).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.accumulation.add(ctx.name, ctx.index, grad.contiguous())
        return (None,) * 6


@outside_graphs("accumulate() collects gradients between backward passes, which no graph can hold")
def accumulated_rows(
    store: Store, name: str, index: Tensor, accumulation: Accumulation, *, may_skip: bool = False
) -> Tensor:
    """Rows ``[N, width]`` of a weight or extra, by its attribute."""
    if may_skip:  # an index of −1 yields zeros and takes no gradient
        found = (index >= 0).nonzero().squeeze(1)
        some: Tensor = accumulated_rows(store, name, index[found], accumulation)
        return some.new_zeros(index.shape[0], some.shape[1]).index_put((found,), some)
    dtype = store.dtype_of_rows(name)
    rows: Tensor = _Rows.apply(store.hook, store.matrix(name), index, name, accumulation, dtype)
    return rows.to(store.dtype)
