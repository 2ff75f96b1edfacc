"""A whole lookup as one operator: ids in, pooled vectors of all features out, one update in backward.

Eagerly it is an ``autograd.Function``, since a custom operator's way through the dispatcher takes longer than the
lookup of a small batch; in compiled graphs it is ``embtables::look_up`` with ``embtables::update_rows_`` in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from embtables.ops.ids import raise_for_id
from embtables.ops.native import Bound, Given, Library, Refused
from embtables.ops.program import Request

_library: list[Library] = []


def use(library: Library) -> None:
    """The library that looks up from now on."""
    _library[:] = [library]


def bind(request: Request, reads_weights: bool = False, reads_ids: bool = False) -> Bound:
    """The request's program, weights and state, for lookups with any arguments; the flags as in ``Bound``."""
    return Bound(_library[0], request, reads_weights, reads_ids)


def _save(ctx: Any, bound: Bound, given: Given, parameters: Sequence[Tensor] = ()) -> None:
    """Has autograd notice where something that backward reads again is changed before."""
    read = [given.offsets, given.id_weights, given.ids if bound.reads_ids else None]
    ctx.save_for_backward(*(t if t is not None and not t.is_inference() else None for t in read), *parameters)


class _Updated(torch.autograd.Function):
    """The rows are updated in backward. ``hook`` only makes autograd call it."""

    @staticmethod
    def forward(ctx: Any, hook: Tensor, bound: Bound, given: Given, step: int) -> Tensor:
        values, ctx.looked = bound.look_up(given)
        bound.await_gradient(ctx.looked)
        ctx.bound, ctx.step = bound, step
        _save(ctx, bound, given)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.saved_tensors  # noqa: B018
        ctx.bound.update_rows(ctx.looked, grad, ctx.step)
        torch.autograd.graph.increment_version(ctx.bound.weights)
        return None, None, None, None


class _Differentiated(torch.autograd.Function):
    """The weights and projections get gradients, the weights' dense or sparse."""

    @staticmethod
    def forward(ctx: Any, bound: Bound, given: Given, sparse: bool, *parameters: Tensor) -> Tensor:
        values, ctx.looked = bound.look_up(given)
        ctx.bound, ctx.sparse = bound, sparse
        _save(ctx, bound, given, parameters if bound.reads_weights else ())
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018
        return None, None, None, *ctx.bound.gradients(ctx.looked, grad, ctx.sparse)


def update_in_backward(bound: Bound, given: Given, hook: Tensor, step: int) -> Tensor:
    """The values, flat; backward updates the rows in place. ``hook``: any tensor that requires a gradient.

    Raises:
        Refused: see ``Bound.look_up``.
    """
    return _Updated.apply(hook, bound, given, step)


def differentiate(bound: Bound, given: Given, parameters: Sequence[Tensor], sparse: bool) -> Tensor:
    """The values, flat; backward gives the weights (sparse or dense) and projections gradients.

    Raises:
        Refused: see ``Bound.look_up``.
    """
    return _Differentiated.apply(bound, given, sparse, *parameters)


# ---- in compiled graphs ----------------------------------------------------------------------------------------------


@torch.library.custom_op("embtables::look_up", mutates_args=())
def look_up(
    words: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    id_weights: Tensor | None,
    weights: list[Tensor],
    projections: list[Tensor],
    codes: list[Tensor],
    outputs: Tensor,
    states: list[Tensor],
    projection_states: list[Tensor],
    hyper: Tensor,
    step: Tensor,
    num_values: int,
    num_rows: int,
    rule: str,
    ranges: str,
    hook: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The values of a request and their addresses; a ``hook`` with a gradient makes backward update the rows."""
    request = Request(words, weights, projections, codes, states, projection_states, hyper, rule)
    given = Given(ids, offsets, id_weights, outputs, num_values, num_rows)
    try:
        values, looked = bind(request).look_up(given)
    except Refused as error:
        if error.lookup is None or error.id is None:
            raise ValueError(f"offsets must rise from 0 to the number of ids, {ids.numel()}") from None
        raise_for_id(error.id, error.lookup, ranges)
    return values, looked.rows


@look_up.register_fake
def _(
    words: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    id_weights: Tensor | None,
    weights: list[Tensor],
    projections: list[Tensor],
    codes: list[Tensor],
    outputs: Tensor,
    states: list[Tensor],
    projection_states: list[Tensor],
    hyper: Tensor,
    step: Tensor,
    num_values: int,
    num_rows: int,
    rule: str,
    ranges: str,
    hook: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return weights[0].new_empty(num_values), ids.new_empty(num_rows, dtype=torch.int64)


@torch.library.custom_op(
    "embtables::update_rows_", mutates_args=("weights", "projections", "states", "projection_states")
)
def update_rows(
    words: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    id_weights: Tensor | None,
    weights: list[Tensor],
    projections: list[Tensor],
    codes: list[Tensor],
    outputs: Tensor,
    states: list[Tensor],
    projection_states: list[Tensor],
    hyper: Tensor,
    step: Tensor,
    rule: str,
    rows: Tensor,
    grad: Tensor,
) -> None:
    """One step of the optimiser on the rows of a lookup, given the gradient of its values."""
    bound = bind(Request(words, weights, projections, codes, states, projection_states, hyper, rule))
    given = Given(ids, offsets, id_weights, outputs, grad.numel(), rows.numel())
    bound.update_rows(bound.looked(given, rows), grad, int(step))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.inputs, ctx.rows = inputs, output[1]
    ctx.mark_non_differentiable(output[1])


def _step(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    *tensors, num_values, num_rows, rule, ranges, hook = ctx.inputs
    update_rows(*tensors, rule, ctx.rows, grad)
    return tuple([None] * len(value) if isinstance(value, list) else None for value in ctx.inputs)


look_up.register_autograd(_step, setup_context=_keep)
