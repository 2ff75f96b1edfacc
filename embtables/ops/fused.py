"""A whole lookup as one operator: ids in, pooled vectors of all features out, one update in backward.

Eagerly it is an ``autograd.Function``, since a custom operator's way through the dispatcher takes longer than the
lookup of a small batch; in compiled graphs it is ``embtables::look_up`` with ``embtables::update_rows_`` in backward.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from embtables.ops.ids import raise_for_id
from embtables.ops.native import Library, LookupArgs, Refused, fits, has_native_form
from embtables.ops.program import ProgramTensors, values_dtype
from embtables.ops.reference import training_lock

_library: list[Library] = []
# Takes the gradients of weights (sparse, of distinct rows) and projections (dense) of a lookup, in their order.
Collect: TypeAlias = Callable[[list[Tensor]], None]


def use(library: Library) -> None:
    """The library that looks up from now on."""
    _library[:] = [library]


def look_up_values(tensors: ProgramTensors, args: LookupArgs) -> Tensor:
    """The values, without a gradient.

    Raises:
        Refused: see ``Library.forward``.
    """
    return _library[0].values(tensors, args)


def check(tensors: ProgramTensors, args: LookupArgs) -> None:
    """Raises ``Refused`` for what the other functions here would refuse, and does nothing else."""
    _library[0].check(tensors, args)


class Source(Protocol):
    """A program whose tensors may change from call to call.

    ``reads_weights``: whether gradients depend on weights, as those of products and of trained projections do.
    """

    reads_weights: bool

    def tensors(self) -> ProgramTensors | None:
        """What it reads and writes now; ``None`` where native code does not take it."""

    def changes(self, tensors: ProgramTensors) -> list[Tensor]:
        """Those of the weights and projections that a step of the optimizer changes."""

    def update_in_pytorch(self, gradients: list[Tensor], step: int) -> None:
        """A step of the optimizer, given the gradients of weights (sparse, of distinct rows) and projections."""


class SavedLookup:
    """A lookup that was done, for its backward: its arguments and the addresses that it found.

    It keeps no address of a weight, nor the weights themselves: they may lie elsewhere when backward comes. The
    arguments that it reads again have to be copies, since their owner may have refilled them by then.

    Args:
        program: what was looked up.
        tensors: what the lookup read.
    """

    def __init__(
        self,
        program: Source,
        tensors: ProgramTensors,
        args: LookupArgs,
        rows: Tensor,
    ) -> None:
        self.program, self.args, self.rows = program, args, rows
        self.forms = tensors.forms()
        self.versions = self._versions(tensors)
        # The rows that were read and the projections, noted where somebody else is about to change them.
        self.as_read: tuple[Tensor, list[Tensor]] | None = None

    def _versions(self, tensors: ProgramTensors) -> list[int]:
        """Of what the gradient depends on."""
        return [tensor._version for tensor in _read_in_backward(self.program, tensors)]

    def check(self, tensors: ProgramTensors | None) -> ProgramTensors:
        """The tensors.

        Raises:
            RuntimeError: where they are not what the lookup read, by type or shape.
        """
        if tensors is None or tensors.forms() != self.forms:
            raise RuntimeError(
                "the tables were cast to another type, resized or moved to another device between their lookup and its "
                "backward; call backward first"
            )
        return tensors

    def keep_rows(self, tensors: ProgramTensors) -> None:
        """Notes the rows that the gradient depends on, and the projections, as they are now."""
        if self.versions == self._versions(tensors):  # else somebody has changed them already: backward says so
            kept = _library[0].keep_rows(tensors, self.args, self.rows)
            self.as_read = kept, [projection.clone() for projection in tensors.projections]

    def update(self, grad: Tensor, step: int) -> list[Tensor]:
        """One step of the optimizer on all rows that were looked up; returns the weights and projections it changed.

        Raises:
            RuntimeError: where the gradient depends on weights that have been changed since, other than by updates.
        """
        tensors = self.check(self.program.tensors())
        changing = self.program.changes(tensors)
        _waiting.discard(self)
        settle(changing)
        self._check_versions(tensors)
        if has_native_form(tensors.rule):
            _library[0].update_rows(tensors, self.args, self.rows, grad.contiguous(), step, self.as_read)
        else:
            self.program.update_in_pytorch(self._gradients(tensors, grad), step)
        return changing

    def gradients(self, grad: Tensor) -> list[Tensor]:
        """The gradients of the weights, sparse, and of the projections.

        Raises:
            RuntimeError: as ``update``.
        """
        tensors = self.check(self.program.tensors())
        self._check_versions(tensors)
        _waiting.discard(self)
        return self._gradients(tensors, grad)

    def _gradients(self, tensors: ProgramTensors, grad: Tensor) -> list[Tensor]:
        return _library[0].gradients(
            tensors, self.args, self.rows, grad.contiguous(), sparse=True, as_read=self.as_read
        )

    def _check_versions(self, tensors: ProgramTensors) -> None:
        if self.as_read is None and self.versions != self._versions(tensors):
            raise RuntimeError(
                "the tables were changed between a lookup and its backward, and the gradient of this method depends on "
                "what they were; of a graph that is kept, backward can be called once: add up the losses instead"
            )


# Lookups whose gradient depends on rows that a fused update may change before it is taken.
_waiting: weakref.WeakSet[SavedLookup] = weakref.WeakSet()


def settle(changing: Sequence[Tensor]) -> None:
    """Has the lookups that wait for their gradients note the rows they read in weights about to change.

    It is called before the operators, which count the change as soon as they are called. Traced weights have no memory;
    what a compiled graph changes is noticed by the backward of such a lookup, which then refuses.
    """
    if _waiting:
        places = {tensor.data_ptr() for tensor in changing if type(tensor) in (Tensor, torch.nn.Parameter)}
        for saved in list(_waiting):
            tensors = saved.program.tensors()
            if tensors is None or tensors.forms() != saved.forms:
                continue  # its own backward will say so
            if not places.isdisjoint(t.data_ptr() for t in (*tensors.weights, *tensors.projections)):
                _waiting.discard(saved)
                saved.keep_rows(tensors)


def _read_in_backward(program: Source, tensors: ProgramTensors) -> list[Tensor]:
    """What the gradient of a lookup depends on beside its arguments."""
    return [*(tensors.weights if program.reads_weights else ()), *tensors.projections]


class _Updated(torch.autograd.Function):
    """The rows are updated in backward, or ``collect`` gets their gradients. ``hook`` only makes autograd call it."""

    @staticmethod
    def forward(
        ctx: Any,
        hook: Tensor,
        program: Source,
        tensors: ProgramTensors,
        args: LookupArgs,
        step: int,
        collect: Collect | None,
    ) -> Tensor:
        values, rows = _library[0].forward(tensors, args)
        ctx.saved, ctx.step, ctx.collect = SavedLookup(program, tensors, args, rows), step, collect
        if program.reads_weights:
            _waiting.add(ctx.saved)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        with training_lock:
            if ctx.collect is None:
                torch.autograd.graph.increment_version(ctx.saved.update(grad, ctx.step))
            else:
                ctx.collect(ctx.saved.gradients(grad))
        return (None,) * 6


class _Differentiated(torch.autograd.Function):
    """The weights and projections get gradients, the weights' dense or sparse."""

    @staticmethod
    def forward(
        ctx: Any, program: Source, tensors: ProgramTensors, args: LookupArgs, sparse: bool, *parameters: Tensor
    ) -> Tensor:
        values, rows = _library[0].forward(tensors, args)
        ctx.saved = SavedLookup(program, tensors, args, rows)
        ctx.tensors, ctx.sparse = tensors._replace(told=None), sparse  # they may lie elsewhere by then
        # Has autograd notice where they are changed before backward. ``parameters`` may be other names of them, which
        # count their changes by themselves.
        ctx.save_for_backward(*_read_in_backward(program, tensors))
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018
        saved, tensors = ctx.saved, ctx.tensors
        saved.check(tensors if fits([*tensors.weights, *tensors.projections]) else None)
        gradients = _library[0].gradients(tensors, saved.args, saved.rows, grad.contiguous(), ctx.sparse)
        return None, None, None, None, *gradients


def update_in_backward(
    program: Source,
    tensors: ProgramTensors,
    args: LookupArgs,
    hook: Tensor,
    step: int,
    collect: Collect | None = None,
) -> Tensor:
    """The values; backward updates the rows in place.

    Args:
        program: what is looked up.
        tensors: what it reads and writes now.
        args: the arguments of the lookup.
        hook: any tensor that requires a gradient.
        step: the number of the step.
        collect: where it is given, backward hands it the gradients and updates nothing.

    Raises:
        Refused: see ``Library.forward``.
    """
    return _Updated.apply(hook, program, tensors, args, step, collect)


def differentiate(
    program: Source, tensors: ProgramTensors, args: LookupArgs, parameters: Sequence[Tensor], sparse: bool
) -> Tensor:
    """The values; backward gives the weights (sparse or dense) and projections gradients.

    Raises:
        Refused: see ``Library.forward``.
    """
    return _Differentiated.apply(program, tensors, args, sparse, *parameters)


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
    scales: list[Tensor],
    strengths: list[Tensor],
    hyper: Tensor,
    step: Tensor,
    num_values: int,
    num_rows: int,
    rule: str,
    ranges: str,
    hook: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The values, and for backward their addresses and copies of ids, offsets and weights (empty where there are none).

    A ``hook`` with a gradient makes backward update the rows.
    """
    kept = _copies(ids, offsets, id_weights)
    if offsets is not None:
        offsets = kept[1]  # what is checked is what backward will read
    tensors = ProgramTensors(words, weights, projections, codes, states, [], hyper, rule, scales, strengths)
    args = LookupArgs(ids, offsets, id_weights, outputs, _batch(words, ids, offsets), (num_values,), num_rows)
    try:
        return *_library[0].forward(tensors, args), *kept
    except Refused as error:
        if error.lookup is None or error.id is None:
            raise ValueError(f"offsets must rise from 0 to the number of ids, {ids.numel()}") from None
        raise_for_id(error.id, error.lookup, ranges)


def look_up_in_graph(
    tensors: ProgramTensors, args: LookupArgs, step: Tensor, ranges: str, hook: Tensor | None
) -> Tensor:
    """``look_up`` with the same arguments as the functions for eager calls."""
    values: Tensor = look_up(
        tensors.words,
        args.ids,
        args.offsets,
        args.id_weights,
        tensors.weights,
        tensors.projections,
        tensors.codes,
        args.outputs,
        tensors.states,
        list(tensors.scales),
        list(tensors.strengths),
        tensors.hyper,
        step,
        math.prod(args.shape),
        args.num_rows,
        tensors.rule,
        ranges,
        hook,
    )[0]
    return values.view(args.shape)


def _copies(ids: Tensor, offsets: Tensor | None, id_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    no_offsets, no_weights = ids.new_empty(0, dtype=torch.int64), ids.new_empty(0, dtype=torch.float32)
    return (
        ids.clone(),
        no_offsets if offsets is None else offsets.clone(),
        no_weights if id_weights is None else id_weights.clone(),
    )


def _batch(words: Tensor, ids: Tensor, offsets: Tensor | None) -> int:
    return ids.shape[0] if offsets is None else (offsets.numel() - 1) // int(words[0])


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
    scales: list[Tensor],
    strengths: list[Tensor],
    hyper: Tensor,
    step: Tensor,
    num_values: int,
    num_rows: int,
    rule: str,
    ranges: str,
    hook: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = ids.new_empty(num_rows, dtype=torch.int64)
    dtype = values_dtype(weights, scales)
    return weights[0].new_empty(num_values, dtype=dtype), rows, *_copies(ids, offsets, id_weights)


@torch.library.custom_op("embtables::update_rows_", mutates_args=("weights", "states"))
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
    scales: list[Tensor],
    strengths: list[Tensor],
    hyper: Tensor,
    step: Tensor,
    rule: str,
    rows: Tensor,
    grad: Tensor,
) -> None:
    """One step of the optimizer on the rows of a lookup that trains no projection, given the gradient of its values."""
    tensors = ProgramTensors(words, weights, projections, codes, states, [], hyper, rule, scales, strengths)
    args = LookupArgs(ids, offsets, id_weights, outputs, _batch(words, ids, offsets), (grad.numel(),), rows.numel())
    with training_lock:
        _library[0].update_rows(tensors, args, rows, grad.contiguous(), int(step))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.inputs, ctx.kept = inputs, output[1:]
    ctx.mark_non_differentiable(*output[1:])


def _step(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    words, _, offsets, id_weights, *tensors = ctx.inputs[:13]
    rows, ids, kept_offsets, kept_weights = ctx.kept
    update_rows(
        words,
        ids,
        None if offsets is None else kept_offsets,
        None if id_weights is None else kept_weights,
        *tensors,
        ctx.inputs[15],
        rows,
        grad,
    )
    return tuple([None] * len(value) if isinstance(value, list) else None for value in ctx.inputs)


look_up.register_autograd(_step, setup_context=_keep)
