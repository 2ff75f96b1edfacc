"""Mini-batch-aware L2 regularization: the rows that a step reads, each by how rarely it is looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def regularized(rows: Tensor, index: Tensor, strength: Tensor) -> Tensor:
    """Rows ``[N, W]`` as they are, whose gradient is that of ½·Σ_r strength_r·‖row r‖² over the distinct ones as well.

    A row that occurs several times gets an equal part of it each time.

    Args:
        rows: those of ``index``.
        index: ``[N]``; −1 stands for none, which yields nothing.
        strength: ``[R]``, of all rows of the weight.
    """
    if not rows.requires_grad:
        return rows
    run, order = _runs(index)
    length = torch.zeros_like(run).index_add_(0, run, torch.ones_like(run))
    occurrences = torch.empty_like(run).index_copy_(0, order, length[run])
    share = torch.where(index < 0, 0, strength.index_select(0, index.clamp(min=0)) / occurrences)
    with_share: Tensor = _Regularized.apply(rows, share.unsqueeze(-1).to(rows.dtype))
    return with_share


def _runs(values: Tensor) -> tuple[Tensor, Tensor]:
    """The values in order ``[N]``, told by the number of their run of equal ones, and where each of them stood.

    ``torch.unique`` says the same, but breaks graphs: how many values differ depends on data.
    """
    ordered, order = values.sort()
    return (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0), order


class _Regularized(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, share: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, share = ctx.saved_tensors
        return torch.addcmul(grad, rows, share), None
