"""Reference operators: gather with the optimiser fused into backward, in plain PyTorch.

Shapes: R rows, W width, N looked-up rows (duplicates included). Cost and memory depend on N alone, never on R.
``hyper`` is a float64 vector ``[lr, l2, eps, beta1, beta2]``, with the norm to clip rows at as a sixth where they are
clipped: a tensor, so that a new learning rate compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LR, L2, EPS, BETA1, BETA2, CLIP = range(6)


def coalesce(index: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows ``[U]`` in ascending order and the sum of each one's gradients ``[U, W]``, added in input order."""
    order = torch.argsort(index, stable=True)
    rows, counts = torch.unique_consecutive(index[order], return_counts=True)
    return rows, F.embedding_bag(order, grad, counts.cumsum(0) - counts, mode="sum")


def _sgd(weight: Tensor, rows: Tensor, grad: Tensor, state: list[Tensor], hyper: Tensor) -> Tensor:
    return hyper[LR] * grad


def _rowwise_adagrad(weight: Tensor, rows: Tensor, grad: Tensor, state: list[Tensor], hyper: Tensor) -> Tensor:
    total = state[0][rows] + grad.square().mean(1, keepdim=True)
    state[0][rows] = total
    return hyper[LR] * grad / (total.sqrt() + hyper[EPS])


def _adagrad(weight: Tensor, rows: Tensor, grad: Tensor, state: list[Tensor], hyper: Tensor) -> Tensor:
    total = state[0][rows] + grad.square()
    state[0][rows] = total
    return hyper[LR] * grad / (total.sqrt() + hyper[EPS])


def _adam(weight: Tensor, rows: Tensor, grad: Tensor, state: list[Tensor], hyper: Tensor) -> Tensor:
    first, second, step = state
    # 1 − β is taken in float64: in float32 1 − 0.999 is off by 1e-5.
    m = hyper[BETA1] * first[rows] + (1 - hyper[BETA1]) * grad
    v = hyper[BETA2] * second[rows] + (1 - hyper[BETA2]) * grad.square()
    first[rows], second[rows] = m, v
    m_hat = m / (1 - hyper[BETA1] ** step)
    v_hat = v / (1 - hyper[BETA2] ** step)
    return hyper[LR] * m_hat / (v_hat.sqrt() + hyper[EPS])


_RULES = {"sgd": _sgd, "rowwise_adagrad": _rowwise_adagrad, "adagrad": _adagrad, "adam": _adam}


@torch.library.custom_op("embtables::update_", mutates_args=("weight", "state"))
def update(weight: Tensor, state: list[Tensor], index: Tensor, grad: Tensor, hyper: Tensor, rule: str) -> None:
    """One optimiser step on the rows ``index`` [N] of ``weight`` [R, W], given ``grad`` [N, W].

    Gradients of the same row are summed first, in input order, and clipped as one. ``state`` is what the rule keeps:
    nothing, sums of squares, or Adam's two moments and the number of the present step.
    """
    if not index.numel():
        return
    rows, summed = coalesce(index, grad)
    if hyper.numel() > CLIP:
        norm = torch.linalg.vector_norm(summed, dim=1, keepdim=True)
        summed = summed * (hyper[CLIP] / norm.clamp(min=hyper[CLIP])).to(summed.dtype)
    summed = summed + hyper[L2] * weight[rows]
    weight.index_add_(0, rows, _RULES[rule](weight, rows, summed, state, hyper).to(weight.dtype), alpha=-1)


@torch.library.custom_op("embtables::lookup", mutates_args=())
def fused_lookup(weight: Tensor, state: list[Tensor], index: Tensor, hook: Tensor, hyper: Tensor, rule: str) -> Tensor:
    """Rows ``index`` [N] of ``weight`` [R, W] → [N, W]; its backward updates them in place by ``rule``.

    ``hook`` is any scalar that requires a gradient: it makes autograd come back here, and gets none.
    """
    return weight.index_select(0, index)


@fused_lookup.register_fake
def _(weight: Tensor, state: list[Tensor], index: Tensor, hook: Tensor, hyper: Tensor, rule: str) -> Tensor:
    return weight.new_empty(index.shape[0], weight.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # Kept on ctx, not through save_for_backward: an earlier backward of the same step may already have updated the
    # weights in place, which is meant, and autograd would take it for an error.
    ctx.weight, ctx.state, ctx.index, _, ctx.hyper, ctx.rule = inputs


# Called with the weights that a fused update is about to change.
before_updates: list[Callable[[Sequence[Tensor]], None]] = []


def _step(ctx: Any, grad: Tensor) -> tuple[None, list[None], None, None, None, None]:
    for prepare in before_updates:
        prepare([ctx.weight])
    update(ctx.weight, ctx.state, ctx.index, grad.contiguous(), ctx.hyper, ctx.rule)
    return None, [None] * len(ctx.state), None, None, None, None


fused_lookup.register_autograd(_step, setup_context=_keep)


def fused_dense(weight: Tensor, state: list[Tensor], hook: Tensor, hyper: Tensor, rule: str) -> Tensor:
    """The whole of a small parameter ``weight`` (any shape), updated by the same rule in backward, all rows at once."""
    flat = weight.view(weight.shape[0], -1) if weight.ndim > 1 else weight.view(1, -1)
    index = torch.arange(flat.shape[0], device=weight.device)
    return fused_lookup(flat, state, index, hook, hyper, rule).view(weight.shape)
