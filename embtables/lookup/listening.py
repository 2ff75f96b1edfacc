"""Tells stages the gradients of the rows that a lookup read, before any of them is updated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from embtables import ops
from embtables.lookup.graphs import outside_graphs
from embtables.lookup.store import Store

if TYPE_CHECKING:
    from embtables.methods.base import Stage

# Takes rows ``[N]`` of all slabs of a width, any of them several times, and their gradients ``[N, width]``.
Tell: TypeAlias = Callable[[Tensor, Tensor], None]


class _Heard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, tell: Tell) -> Tensor:
        ctx.index, ctx.tell = index, tell
        return values.view_as(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with ops.training_lock:
            ctx.tell(ctx.index, grad)
        return grad, None, None


@outside_graphs("a stage that listens to gradients is called in backward, which no graph can hold")
def listened_to(values: Tensor, index: Tensor, weight: str, store: Store, stages: Sequence[Stage]) -> Tensor:
    """``values`` ``[N, width]``, the rows ``index`` of a weight; in backward stages hear their gradients."""
    pairs = [(stage, slab) for stage in stages for slab in stage.listens_to if store.weight_of(slab) == weight]
    if not pairs or not values.requires_grad:
        return values

    def tell(index: Tensor, grad: Tensor) -> None:
        rows, sums = ops.coalesce(index, grad)
        for stage, slab in pairs:
            own = rows - store.start(slab)
            inside = (own >= 0) & (own < store.rows(slab))
            if inside.any():
                stage.hear(slab, own[inside], sums[inside])

    found: Tensor = _Heard.apply(values, index, tell)
    return found
