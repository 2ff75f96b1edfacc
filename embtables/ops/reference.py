"""Reference operators: gather with the optimizer fused into backward, in plain PyTorch.

Shapes: R rows, W width, N looked-up rows (duplicates included). Cost and memory depend on N alone, never on R.
``rule`` is the kind of a rule of ``embtables.optimizers``, and ``hyper`` the float64 vector of its ``hyper_values``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from embtables.ops.program import RowForm
from embtables.ops.stochastic import random_bits, rounded
from embtables.optimizers import rule_of

_NO_STEP = torch.zeros((), dtype=torch.int64)
# Held by whoever looks up in training or updates, so that of several threads each finds whole steps of the others.
training_lock = threading.RLock()


def split_step(state: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The state of a rule as the operators take it, told apart into tensors of rows and the step, 0 if not counted."""
    *rows, step = state if state and state[-1].ndim == 0 else (*state, _NO_STEP)
    return rows, step


def rounds_stochastically(weight: Tensor, grad: Tensor) -> bool:
    """Whether the rows of a weight are trained in 16 bits: updated in float32, as their gradients say, and rounded."""
    return weight.dtype == torch.bfloat16 and grad.dtype == torch.float32


def coalesce(index: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows ``[U]`` in ascending order and the sum of each one's gradients ``[U, W]``, added in input order."""
    order = torch.argsort(index, stable=True)
    rows, counts = torch.unique_consecutive(index[order], return_counts=True)
    return rows, F.embedding_bag(order, grad, counts.cumsum(0) - counts, mode="sum")


def update_rows(
    weight: Tensor, state: Sequence[Tensor], rows: Tensor, grad: Tensor, hyper: Tensor, kind: str, step: Tensor
) -> None:
    """One step of the optimizer on the distinct rows ``rows`` [U] of ``weight`` [R, W], given their gradients [U, W].

    ``state``: [R, columns] each, as the rule's ``state_widths`` has it; ``step``: the number of the present step, 0
    where nobody counts them.

    Rows in bfloat16 whose gradients are float32 are updated in float32, and rounded stochastically.

    Raises:
        ValueError: for an unknown rule, hyper-parameters of another one, or an ``update`` that returns other shapes.
        TypeError: for an ``update`` that returns anything but a tensor and a sequence of tensors.
    """
    rule = rule_of(kind)
    named = rule.hyper_by_name(hyper)
    # Of whole rows, index_select and index_copy_ are several times faster than [rows].
    rows = rows.long()
    stored, before = weight.index_select(0, rows), [tensor.index_select(0, rows) for tensor in state]
    old = stored.to(grad.dtype)
    if (most := named.get("clip_row_norm")) is not None:
        norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
        grad = grad * (most / norm.clamp(min=most)).to(grad.dtype)
    grad = grad + named["l2"] * old
    result: object = rule.update(grad, old, before, named, step)
    if not isinstance(result, tuple) or len(result) != 2 or isinstance(result[1], Tensor):
        raise TypeError(
            f"the update of the optimizer {kind} must return what is subtracted and a sequence of its new state, "
            f"not a {type(result).__name__}"
        )
    change, after = result
    expected, found = ([list(t.shape) for t in tensors] for tensors in ((old, *before), (change, *after)))
    if found != expected:
        raise ValueError(f"the update of the optimizer {kind} gives tensors of shapes {found}, not {expected}")
    if rounds_stochastically(weight, grad):
        new = rounded(old - change.float(), random_bits(step, rows, weight.shape[1]))
        after = rule.after_rounding(after, old - new.float() - change, named, step)
    else:
        new = stored - change.to(weight.dtype)
    for tensor, values in zip((weight, *state), (new, *after)):
        tensor.index_copy_(0, rows, values)


@torch.library.custom_op("embtables::update_", mutates_args=("weight", "state"))
def update(weight: Tensor, state: list[Tensor], index: Tensor, grad: Tensor, hyper: Tensor, rule: str) -> None:
    """One optimizer step on the rows ``index`` [N] of ``weight`` [R, W], given ``grad`` [N, W].

    Gradients of the same row are summed first, in input order, and clipped as one. ``state`` is what the rule keeps,
    with the number of the present step last where steps are counted.
    """
    if not index.numel():
        return
    rows, summed = coalesce(index, grad)
    kept, step = split_step(state)
    with training_lock:  # by itself in graphs
        update_rows(weight, kept, rows, summed, hyper, rule, step)


@torch.library.custom_op("embtables::lookup", mutates_args=())
def fused_lookup(
    weight: Tensor, state: list[Tensor], index: Tensor, hook: Tensor, hyper: Tensor, rule: str, dtype: torch.dtype
) -> Tensor:
    """Rows ``index`` [N] of ``weight`` [R, W] → [N, W]; its backward updates them in place by ``rule``.

    ``hook`` is any scalar that requires a gradient: it makes autograd come back here, and gets none. ``dtype``: of the
    values, and so of their gradients: the weight's, or float32 for a weight in bfloat16 that is trained in 16 bits.
    """
    return weight.index_select(0, index).to(dtype)


@fused_lookup.register_fake
def _empty_rows(
    weight: Tensor, state: list[Tensor], index: Tensor, hook: Tensor, hyper: Tensor, rule: str, dtype: torch.dtype
) -> Tensor:
    return weight.new_empty(index.shape[0], weight.shape[1], dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # Kept on ctx, not through save_for_backward: an earlier backward of the same step may already have updated the
    # weights in place, which is meant, and autograd would take it for an error.
    ctx.weight, ctx.state, ctx.index, _, ctx.hyper, ctx.rule, _ = inputs


# Called with the weights that a fused update is about to change.
before_updates: list[Callable[[Sequence[Tensor]], None]] = []


def update_once(weight: Tensor, state: list[Tensor], index: Tensor, grad: Tensor, hyper: Tensor, rule: str) -> None:
    """``update``, of which those are told first who have to know of a fused update."""
    with training_lock:
        for prepare in before_updates:
            prepare([weight])
        update(weight, state, index, grad, hyper, rule)


def _step(ctx: Any, grad: Tensor) -> tuple[None, list[None], None, None, None, None, None]:
    update_once(ctx.weight, ctx.state, ctx.index, grad.contiguous(), ctx.hyper, ctx.rule)
    return None, [None] * len(ctx.state), None, None, None, None, None


fused_lookup.register_autograd(_step, setup_context=_keep)


def numbers_of_bags(bags: Tensor, count: int) -> Tensor:
    """The bag [N] of each of ``count`` = N ids, given the offsets ``bags`` [M + 1], which rise from 0 to N."""
    return torch.repeat_interleave(bags.diff(), output_size=count)


def of_each_id(index: Tensor, grad: Tensor, bags: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows that there are, of ``index`` [N] all but −1, and the gradient of each, given ``grad`` [M, W] of bags."""
    found = (index >= 0).nonzero().squeeze(1)
    rows = grad[numbers_of_bags(bags, index.numel())[found]]
    return index[found], rows if factors is None else rows * factors[found].to(rows.dtype).unsqueeze(-1)


Unpack: TypeAlias = Callable[[Tensor, Tensor | None, Tensor, Tensor, int, RowForm], Tensor]
Sum: TypeAlias = Callable[
    [Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None, torch.dtype, int, RowForm], Tensor
]


class Kernels(NamedTuple):
    """A device's own kernels.

    ``gather``: of weight and index.
    ``look_up``: the arguments of ``fused_lookup``, differentiable, and the offsets of bags and factors of ids whose
    sums are looked up instead, or ``None`` for each.
    ``unpack``: rows ``[N, W]`` in fp32 from what ``StoredRows`` holds (rows, scales or ``None``, firsts), index [N], W
    and the form.
    ``bag_sums``: sums ``[M, W]`` of rows from the same, firsts ``None`` where rows are plain, with offsets of bags
    [M + 1], factors [N] or ``None``, and the type of the sums, behind the index; an index of −1 adds nothing.
    """

    gather: Callable[[Tensor, Tensor], Tensor]
    look_up: Callable[..., Tensor]
    unpack: Unpack
    bag_sums: Sum


# By type of device: what eager lookups call there, since the dispatcher takes several times as long as the kernels.
eager: dict[str, Kernels] = {}


def _eager(index: Tensor) -> Kernels | None:
    """Traced and wrapped tensors go through the dispatcher."""
    if type(index) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    return eager.get(index.device.type)


def gather(weight: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [N] of ``weight`` [R, W] → [N, W], without a gradient."""
    kernels = _eager(index)
    return weight.index_select(0, index) if kernels is None else kernels.gather(weight, index)


def unpacking(index: Tensor) -> Unpack | None:
    """The kernel that unpacks rows where ``index`` is; ``None`` where PyTorch does it."""
    kernels = _eager(index)
    return None if kernels is None else kernels.unpack


def summing(index: Tensor) -> Sum | None:
    """The kernel that looks up rows and sums them by bag where ``index`` is; ``None`` where there is none.

    Where there is one, ``fused_rows`` takes bags, too.
    """
    kernels = _eager(index)
    return None if kernels is None else kernels.bag_sums


def fused_rows(
    weight: Tensor,
    state: list[Tensor],
    index: Tensor,
    hook: Tensor,
    hyper: Tensor,
    rule: str,
    dtype: torch.dtype,
    bags: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """``fused_lookup``, by the shortest way that there is.

    With ``bags`` [M + 1], their offsets, the sums [M, W] of the rows of each, every row times its factor where there
    are ``factors`` [N]; an index of −1 adds nothing.
    """
    kernels = _eager(index)
    rows: Tensor
    if kernels is None:
        assert bags is None
        rows = fused_lookup(weight, state, index, hook, hyper, rule, dtype)
    else:
        rows = kernels.look_up(weight, state, index, hook, hyper, rule, dtype, bags, factors)
    return rows


@torch.library.custom_op("embtables::update_some_", mutates_args=("weight", "state"))
def update_some(weight: Tensor, state: list[Tensor], index: Tensor, grad: Tensor, hyper: Tensor, rule: str) -> None:
    """``update`` without the places whose index is −1; graphs cannot leave them out by themselves."""
    found = index >= 0
    update(weight, state, index[found], grad[found], hyper, rule)


@torch.library.custom_op("embtables::lookup_of_some", mutates_args=())
def fused_lookup_of_some(
    weight: Tensor, state: list[Tensor], index: Tensor, hook: Tensor, hyper: Tensor, rule: str, dtype: torch.dtype
) -> Tensor:
    """``fused_lookup``, where an index of −1 yields zeros and takes no gradient."""
    found = index >= 0
    rows = weight.new_zeros(index.shape[0], weight.shape[1], dtype=dtype)
    rows[found] = weight.index_select(0, index[found]).to(rows.dtype)
    return rows


fused_lookup_of_some.register_fake(_empty_rows)


def _step_of_some(ctx: Any, grad: Tensor) -> tuple[None, list[None], None, None, None, None, None]:
    with training_lock:
        for prepare in before_updates:
            prepare([ctx.weight])
        update_some(ctx.weight, ctx.state, ctx.index, grad.contiguous(), ctx.hyper, ctx.rule)
    return None, [None] * len(ctx.state), None, None, None, None, None


fused_lookup_of_some.register_autograd(_step_of_some, setup_context=_keep)


def fused_dense(weight: Tensor, state: list[Tensor], hook: Tensor, hyper: Tensor, rule: str) -> Tensor:
    """The whole of a small parameter ``weight`` (any shape), updated by the same rule in backward, all rows at once."""
    flat = weight.view(weight.shape[0], -1) if weight.ndim > 1 else weight.view(1, -1)
    index = torch.arange(flat.shape[0], device=weight.device)
    return fused_rows(flat, state, index, hook, hyper, rule, weight.dtype).view(weight.shape)
