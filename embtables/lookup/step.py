"""What lasts one lookup: whether it trains, the rows and parameters in use, and the number of its step."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtables import ops
from embtables.lookup.accumulation import Accumulation, accumulated_rows
from embtables.lookup.block import Part
from embtables.lookup.graphs import is_transformed
from embtables.lookup.listening import listened_to
from embtables.lookup.regularization import regularized
from embtables.lookup.rounding import Rounding
from embtables.lookup.store import Store

if TYPE_CHECKING:
    from embtables.lookup.engine import Touched
    from embtables.methods.base import Stage


class Step:
    """One lookup of a store, as a context manager: a training step is counted, and taken back where the lookup fails.

    Args:
        store: where the values lie.
        trains: whether the lookup trains: a fused optimizer then updates in its backward.
        counts: whether a step begins here; the later ones of several lookups in one step say ``False``.
        stages: what is told of a training step, once for each that is counted.
        aliases: where a step has several lookups with dense gradients, what adds them up as one.
    """

    # Of a lookup that does not train.
    accumulation: Accumulation | None = None
    counts = False
    stages: Sequence[Stage] = ()
    listeners: Sequence[Stage] = ()
    rounding: Rounding | None = None
    updates = False
    _locks = False

    def __init__(
        self,
        store: Store,
        *,
        trains: bool = False,
        counts: bool = True,
        stages: Sequence[Stage] = (),
        aliases: Aliases | None = None,
    ) -> None:
        self.store, self.trains = store, trains
        self.aliases = None if store.sparse or store.optimizer is not None else aliases
        # Two blocks that use one dense parameter update it once, by the sum of their gradients.
        self._extras: dict[str, Tensor] = {}
        if trains:
            self.accumulation = store.accumulation
            self.counts = counts and not (self.accumulation is not None and self.accumulation.begun)
            self.stages = list(stages) if self.counts else []
            # They hear of every lookup, not only of the one that begins a step.
            self.listeners = [stage for stage in stages if stage.listens_to]
            self.updates = store.optimizer is not None
            self.rounding = store.rounding
            # A lookup alone: its reading of rows that are updated, and what it counts. In graphs the operators lock.
            self._locks = (
                self.updates or bool(self.stages) or self.rounding is not None
            ) and not torch.compiler.is_compiling()

    def __enter__(self) -> Step:
        if self.updates:
            _refuse_what_fused_updates_cannot_do(self.store.device)
        if self._locks:
            ops.training_lock.acquire()
        if self.counts:
            self._count(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self.counts:
            self._count(-1)
        if self._locks:
            ops.training_lock.release()

    def _count(self, number: int) -> None:
        self.store.count_step(number)
        if self.accumulation is not None:
            self.accumulation.begun = number > 0

    def begin(self, touched: Touched) -> None:
        """Called once the ids are known to be good, before anything is read: a stage may change the weights."""
        if self.stages and getattr(self.store, "_is_fsdp_managed_module", False):
            # What a stage did to the weights that are put together for a forward would be gone after it.
            raise RuntimeError(
                "these tables change over the course of training, as pruned ones do, which fully_shard does not carry "
                "over to the pieces that it keeps: train them under DistributedDataParallel"
            )
        for stage in self.stages:
            stage.step(touched)

    def gather(self, parts: Sequence[Part], *, may_skip: bool = False) -> list[Tensor]:
        """The values of each part, ``[*rows.shape, width]``, by one gather for each width and format.

        ``may_skip`` says that an index may be −1, which yields zeros and takes no gradient.
        """
        values: list[Tensor | None] = [None] * len(parts)
        for weight, width in dict.fromkeys((part.weight, part.width) for part in parts):
            which = [i for i, part in enumerate(parts) if part.weight == weight]
            ordered = [_as_stored(parts[i].rows) for i in which]
            flats = [rows.reshape(-1) for rows in ordered]
            flat = torch.cat(flats) if len(flats) > 1 else flats[0]
            if may_skip and torch.compiler.is_compiling():
                rows = self._rows_that_are(weight, flat)
            elif may_skip:
                found = (flat >= 0).nonzero().squeeze(1)
                rows = self._rows(weight, flat[found])
                rows = rows.new_zeros(flat.shape[0], width).index_put((found,), rows)
            else:
                rows = self._rows(weight, flat)
            if self.listeners:
                rows = listened_to(rows, flat, weight, self.store, self.listeners)
            if self.trains and (strength := self.store.strength(weight)) is not None:
                rows = regularized(rows, flat, strength)
            chunks = rows.split([flat.numel() for flat in flats]) if len(flats) > 1 else [rows]
            for i, stored, chunk in zip(which, ordered, chunks):
                vectors = chunk.view(*stored.shape, width)
                values[i] = vectors if stored is parts[i].rows else vectors.transpose(0, 1)
        return [value for value in values if value is not None]

    def _rows(self, name: str, index: Tensor) -> Tensor:
        rows = self._stored_rows(name, index)
        return rows if self.rounding is None else self.rounding.rounded(rows, name, self.store.tensor(name), index)

    def _stored_rows(self, name: str, index: Tensor) -> Tensor:
        store, weight = self.store, self.store.tensor(name)
        _refuse_pieces(weight)
        if self.updates:
            if self.accumulation is not None:
                return accumulated_rows(store, name, index, self.accumulation)
            return self._fused_rows(name, index)
        if store.sparse:
            return F.embedding(index, weight, sparse=True)
        if self.aliases is not None and weight.requires_grad and torch.is_grad_enabled():
            return F.embedding(index, self.aliases.of(weight), sparse=True)
        if weight.requires_grad and torch.is_grad_enabled():
            return weight.index_select(0, index)
        return ops.gather(weight, index) if store.is_plain(name) else store.read(name, index)

    def sums_bags(self, name: str, index: Tensor, factors: Tensor | None) -> bool:
        """Whether ``bag_sums`` looks up rows of a weight, by its attribute.

        No row is there by itself then, for whoever computes with it, and only a fused update takes its gradient.
        """
        store = self.store
        if ops.summing(index) is None or is_transformed() or self.listeners:
            return False
        if self.accumulation is not None or self.rounding is not None:
            return False
        if self.trains and store.strength(name) is not None:
            return False
        given = store.tensor(name), factors
        return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given))

    def bag_sums(self, name: str, index: Tensor, bags: Tensor, factors: Tensor | None) -> Tensor:
        """The sums ``[M, width]`` of the rows ``index`` ``[N]`` of each bag, where ``sums_bags`` says that there are.

        ``bags`` ``[M + 1]``: their offsets; ``factors`` ``[N]``: what each row is multiplied with. An index of −1 adds
        nothing and takes no gradient.
        """
        store, weight = self.store, self.store.tensor(name)
        _refuse_pieces(weight)
        factors = None if factors is None else factors.to(store.dtype)
        if self.updates:
            return self._fused_rows(name, index, bags, factors)
        rows, kernel = store.stored_rows(name), ops.summing(index)
        assert kernel is not None and rows.form is not None
        given = weight, store.scales(name), rows.firsts(index.device), index, bags, factors
        return kernel(*given, store.dtype_of_rows(name), rows.width, rows.form).to(store.dtype)

    def _fused_rows(self, name: str, index: Tensor, *of_bags: Tensor | None) -> Tensor:
        store, weight = self.store, self.store.tensor(name)
        state, dtype = store.state_for_step(name), store.dtype_of_rows(name)
        rows = ops.fused_rows(weight, state, index, store.hook, store.hyper, store.rule, dtype, *of_bags)
        return self._watched(name, rows).to(store.dtype)

    def _watched(self, name: str, values: Tensor) -> Tensor:
        """Values of a weight or extra, by its attribute, whose backward refuses to update what is no longer stored."""
        store = self.store
        weight = store.tensor(name)

        def check(gradient: Tensor) -> None:
            if store.tensor(name) is not weight:
                raise RuntimeError(
                    "the tables were cast to another type, replaced or moved to another device between their lookup "
                    "and its backward; call backward first"
                )

        if values.requires_grad and not torch.compiler.is_compiling():
            values.register_hook(check)
        return values

    def _rows_that_are(self, name: str, index: Tensor) -> Tensor:
        """``_rows``, and zeros for an index of −1, in shapes that do not depend on data, as graphs need them."""
        store, weight = self.store, self.store.tensor(name)
        there = index.unsqueeze(-1) >= 0
        if not self.updates:
            return torch.where(there, self._rows(name, index.clamp(min=0)), 0)
        if self.accumulation is not None:
            rows = accumulated_rows(store, name, index, self.accumulation, may_skip=True)
        else:
            state, dtype = store.state_for_step(name), store.dtype_of_rows(name)
            rows = ops.fused_lookup_of_some(weight, state, index, store.hook, store.hyper, store.rule, dtype)
            rows = rows.to(store.dtype)
        if self.rounding is None:
            return rows
        return torch.where(there, self.rounding.rounded(rows, name, weight, index.clamp(min=0)), 0)

    def extra(self, name: str) -> Tensor:
        """A dense tensor, whole; where a fused optimizer trains it, its backward updates it."""
        store, key = self.store, self.store.key(name)
        weight = store.extra(name)
        _refuse_pieces(weight)
        if not store.is_trained(key):
            return weight.to(store.dtype)  # fully_shard casts parameters alone
        if not self.updates:
            return weight
        if name not in self._extras:
            if self.accumulation is not None:
                index = torch.arange(store.matrix(key).shape[0], device=weight.device)
                self._extras[name] = accumulated_rows(store, key, index, self.accumulation).view(weight.shape)
            else:
                state = store.state_for_step(key)
                dense = ops.fused_dense(weight, state, store.hook, store.hyper, store.rule)
                self._extras[name] = self._watched(key, dense)
        return self._extras[name]


def _as_stored(rows: Tensor) -> Tensor:
    """``rows``, or their transpose where that is how they lie in the memory of a GPU, as those of a matrix of ids do.

    Vectors that are gathered in this order need not be put into another one afterwards, nor their gradients. On the CPU
    the order of the features stays, and with it that of the sums of gradients.
    """
    if rows.ndim < 2 or rows.is_contiguous() or rows.device.type == "cpu" or torch.compiler.is_compiling():
        return rows
    turned = rows.transpose(0, 1)
    return turned if turned.is_contiguous() else rows


class ViewSteps:
    """The steps of views that share tables: a step lasts from its first lookup to the next backward.

    Each view looks up by itself, and the lookups before one backward belong to one step.
    """

    def __init__(self) -> None:
        self.begun = False
        self.aliases = Aliases()

    def step(self, store: Store, trains: bool, stages: Sequence[Stage], *, shared: bool) -> Step:
        """A lookup of a view; ``shared`` says that the storage may hold tables of other views."""
        # Graphs and transforms have weights of their own, which are gone after them; and PyTorch cannot add up sparse
        # gradients of half precision.
        in_place = not torch.compiler.is_compiling() and not is_transformed()
        aliases = self.aliases if shared and in_place and not store.is_half() else None
        return Step(store, trains=trains, counts=not self.begun, stages=stages, aliases=aliases)

    def await_backward(self, output: Tensor) -> None:
        """Called after a training lookup: its step ends with the backward of its output."""
        self.begun = True
        if output.requires_grad:
            output.register_hook(self._end)

    def _end(self, gradient: Tensor) -> None:
        self.begun = False


class _DenseOnce(torch.autograd.Function):
    """A weight under another name, to which lookups give sparse gradients: they add up as such, and become dense once.

    Otherwise each of a step's lookups would fill and add a tensor of the size of the weight.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, aliases: Aliases) -> Tensor:
        ctx.aliases = aliases
        return weight.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.aliases.clear()
        return grad.to_dense() if grad.is_sparse else grad, None


class Aliases(dict[tuple[int, int], Tensor]):
    """The weights' other names, by object and address, from the first lookup after a backward pass to the next one.

    On the meta device all addresses are 0.
    """

    def of(self, weight: Tensor) -> Tensor:
        """The weight under its other name; one that is frozen, which may change until backward, has none."""
        if not weight.requires_grad:
            return weight
        key = id(weight), weight.data_ptr()
        alias = self.get(key)  # another thread's backward may clear these names at any time
        if alias is None:
            alias = self[key] = _DenseOnce.apply(weight, self)
        return alias

    def __reduce__(self) -> tuple[type[Aliases], tuple[()]]:
        """Copies and files begin without."""
        return Aliases, ()


def _refuse_pieces(weight: Tensor) -> None:
    """Raises ``RuntimeError`` for a weight of which this process has a piece alone."""
    if type(weight) in (Tensor, nn.Parameter):
        return
    sharding = sys.modules.get("torch.distributed.tensor")
    if sharding is not None and isinstance(weight, sharding.DTensor):
        raise RuntimeError(
            "each process has a piece of these tables, which fully_shard puts together for the forward of the module "
            "that was given to it: call that, or name the method that is called to "
            "torch.distributed.fsdp.register_fsdp_forward_method(module, 'lookup')"
        )


def _refuse_what_fused_updates_cannot_do(device: torch.device) -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            "a fused optimizer updates the tables of each process by its own gradients, so they would drift apart with "
            f"{distributed.get_world_size()} processes: plan with optimizer=None and DistributedDataParallel"
        )
    if device.type == "meta":  # where there is no autocast; the lookup refuses it as such
        return
    if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16:
        raise RuntimeError(
            "a fused optimizer cannot undo the scaling of fp16 gradients: use bfloat16 autocast, "
            "or plan with optimizer=None"
        )
