"""Lookups in one native pass: from the arguments of a call to native code, and from its values to outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from embtables import ops
from embtables.formats import FP32
from embtables.lookup.graphs import is_exporting, transforms
from embtables.lookup.inputs import Input
from embtables.lookup.program import InputSpec, compile_program
from embtables.lookup.recipe import Recipe
from embtables.lookup.step import Step
from embtables.lookup.store import Store
from embtables.ops.native import LookupArgs
from embtables.ops.program import POOLING, STATES, ProgramTensors


class _Known:
    """The tensors of the last lookups that trained, and of those that did not, as native code was told of them.

    Asking whether they lie as they did is faster than telling it anew: whether each is the same tensor, at the same
    address, of the same shape and type, and contiguous. All else of a program is that of its store, whose optimizer
    stays what it is. Copies begin without.
    """

    def __init__(self) -> None:
        self._last: dict[bool, tuple[ProgramTensors, list[Any]]] = {}

    def of(self, trains: bool, tensors: list[Tensor]) -> ProgramTensors | None:
        """The program's tensors, where these are they and lie as they did then."""
        last = self._last.get(trains)
        if last is None or len(tensors) != len(last[1]):
            return None
        for tensor, (known, place, shape, dtype) in zip(tensors, last[1]):
            if tensor is not known or tensor.data_ptr() != place or tensor.shape != shape:
                return None
            if tensor.dtype is not dtype or not tensor.is_contiguous():
                return None
        return last[0]

    def keep(self, trains: bool, program: ProgramTensors, tensors: list[Tensor]) -> ProgramTensors:
        """The program's tensors with what native code is told of them, for the next time."""
        places = [(tensor, tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in tensors]
        program = program._replace(told=ops.told(program))
        self._last[trains] = program, places
        return program

    def __reduce__(self) -> tuple[type[_Known], tuple[()]]:
        return _Known, ()


class NativeLookup:
    """Lookups that native code does as one program.

    Args:
        store: what they read.
        lookups: the input and the recipe of each, in the order of the outputs.
        num_features: columns of the input.
        block: as in ``compile_program``.
    """

    def __init__(
        self,
        store: Store,
        lookups: Sequence[tuple[InputSpec, Recipe]],
        num_features: int,
        block: Sequence[Recipe] = (),
    ) -> None:
        self.store, self.num_features = store, num_features
        self.columns = [spec.column for spec, _ in lookups]
        self.dims = [spec.embedding_dim for spec, _ in lookups]
        self.width = sum(self.dims)
        self._starts = [0, *accumulate(self.dims)][:-1]
        self._side_by_side: dict[tuple[str | None, ...], Tensor] = {}
        recipes = [recipe for _, recipe in lookups]
        # A product's gradient depends on its factors, that of a sum with signs on the ids.
        products = any("product" in (recipe.combine, recipe.rest and recipe.rest.combine) for recipe in recipes)
        signs = (getattr(address, "sign_seed", None) for recipe in recipes for address in recipe.all_addresses())
        self.reads_ids = any(seed is not None for seed in signs)
        self.ranges = ops.ranges((spec.feature, spec.table, spec.num_embeddings) for spec, _ in lookups)
        self.program = compile_program(lookups, num_features, store, block)
        # Weights, then projections, by their attributes.
        self._dense = [weight.name for weight in self.program.weights]
        self._dense += [store.key(name) for name in self.program.projections]
        self._shapes = [store.tensor(name).shape for name in self._dense]
        self._is_trained = [store.is_trained(name) for name in self._dense]
        # A projection's gradient depends on the rows that it multiplies, and theirs on the projection alone.
        self.reads_weights = products or any(self._is_trained[len(self.program.weights) :])
        # Of weights in other formats than fp32: types and shapes of the weight and, where there are any, of its scales.
        self._others = {
            i: [(tensor.dtype, tensor.shape) for tensor in map(store.tensor, weight.tensors)]
            for i, weight in enumerate(self.program.weights)
            if weight.rows.format != FP32
        }
        self._codes = [store.key(name) for name in self.program.codes]
        keeps_mean = store.optimizer is not None and store.optimizer.keeps_mean
        kept = [ops.state_places(store.state_names(name), keeps_mean, "") for name in self._dense]
        self._states = [name for names in kept for name in names]
        self._code_forms = [(code.dtype, code.shape) for code in map(store.code, self.program.codes)]
        # Of each weight the name of its scales, or an empty one, where any weight is in another format.
        scales = ["".join(weight.tensors[1:]) for weight in self.program.weights] if self._others else []
        hyper = [] if store.optimizer is None else ["_hyper"]
        # What a lookup reads, and what one reads that trains, by their names.
        self._read = [*self._dense, *self._codes, *scales]
        self._trained = [*self._read, *self._states, *hyper]
        # Where the names of weights, projections, codes and scales end.
        num_dense = len(self._dense)
        self._ends = len(self.program.weights), num_dense, num_dense + len(self._codes), len(self._read)
        self._no_states = [_NOTHING] * len(self._states)
        self._forms_of_states = [store.tensor(name).shape if name else None for name in self._states]
        self._form_of_hyper = store.hyper.shape, store.hyper.dtype
        self._known = _Known()

    def tensors(self, trains: bool = True, in_graph: bool = False) -> ProgramTensors | None:
        """What the program reads as it is now, and writes where it trains; ``None`` where native code has no way."""
        store, find = self.store, self.store.tensor
        found = [find(name) if name else _NOTHING for name in (self._trained if trains else self._read)]
        pulled = [store.strength(weight.name) for weight in self.program.weights] if trains else []
        strengths = [strength for strength in pulled if strength is not None]
        everything = [*found, *strengths] if strengths else found
        if not in_graph:  # graphs know no addresses
            known = self._known.of(trains, everything)
            if known is not None:
                return known
        weights, dense, codes, read = self._ends
        states = found[read : read + len(self._states)] if trains else self._no_states
        tensors = ProgramTensors(
            self.program.words,
            found[:weights],
            found[weights:dense],
            found[dense:codes],
            states[: STATES * weights],
            states[STATES * weights :],
            found[-1] if trains and store.optimizer is not None else _NOTHING,
            store.rule or "sgd",
            found[codes:read],
            strengths,
        )
        if not self._takes(tensors):
            return None
        if in_graph:
            return tensors
        if any(tensor.numel() and not tensor.data_ptr() for tensor in everything):
            return None  # its memory was freed
        return self._known.keep(trains, tensors, everything)

    def forget(self) -> None:
        """As ``Lookup.forget``."""
        self._known = _Known()

    def _takes(self, tensors: ProgramTensors) -> bool:
        """Whether native code takes the program's tensors as they are now: it would not notice what does not fit."""
        store = self.store
        dense = [*tensors.weights, *tensors.projections]
        if [weight.shape for weight in dense] != self._shapes:
            return False
        if self._others and store.dtype != torch.float32:
            return False
        if not ops.fits([tensor for i, tensor in enumerate(dense) if i not in self._others]):
            return False
        for i, forms in self._others.items():
            stored = [store.tensor(name) for name in self.program.weights[i].tensors]
            if [(t.dtype, t.shape) for t in stored if t.is_cpu and t.is_contiguous()] != forms:
                return False
        for code, form in zip(tensors.codes, self._code_forms):
            if type(code) is not Tensor or not code.is_cpu or not code.is_contiguous():
                return False
            if (code.dtype, code.shape) != form:
                return False
        if store.optimizer is None or tensors.hyper is _NOTHING:
            return True
        hyper = tensors.hyper
        if not hyper.is_cpu or not hyper.is_contiguous() or (hyper.shape, hyper.dtype) != self._form_of_hyper:
            return False
        states = (*tensors.states, *tensors.projection_states)
        if any(form is not None and state.shape != form for state, form in zip(states, self._forms_of_states)):
            return False
        kept = [state for state in states if state is not _NOTHING]
        if not kept:
            return True
        return ops.fits(kept) and ops.takes_state(type(store.optimizer), kept[0].dtype, tensors.weights[0].dtype)

    def changes(self, tensors: ProgramTensors) -> list[Tensor]:
        """Those of the weights and projections that a step of the optimizer changes."""
        return [t for t, trained in zip((*tensors.weights, *tensors.projections), self._is_trained) if trained]

    def update_in_pytorch(self, gradients: list[Tensor], step: int) -> None:
        """One step of a rule without a native form, given sparse gradients of the weights and dense of projections."""
        store, number = self.store, torch.tensor(step, device="cpu")
        for name, rows, values in self._by_row(gradients):
            ops.update_rows(store.tensor(name), store.state_of(name), rows, values, store.hyper, store.rule, number)

    def _by_row(self, gradients: list[Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The gradients of weights and trained projections, each by its attribute with its distinct rows."""
        for name, is_trained, gradient in zip(self._dense, self._is_trained, gradients):
            if not is_trained:
                continue
            if gradient.is_sparse:
                yield name, gradient._indices()[0], gradient._values()
            else:
                yield name, torch.arange(gradient.shape[0], device="cpu"), gradient

    def takes(self, given: Input, step: Step) -> ProgramTensors | None:
        """The program's tensors, if native code may look at them and at these very arguments.

        Exported graphs hold PyTorch's own operators, so that they run where this package is not; so do compiled ones
        where the weights are parameters.
        """
        if ops.backend() != "native" or (given.weights is not None and given.weights.requires_grad):
            return None
        if torch.compiler.is_compiling():
            # A graph may put other updates before the backward of a lookup, which must not read their results.
            suits = self._updates_in_graphs(step) if step.updates else not self.store.gives_gradients()
            return self.tensors(in_graph=True) if suits and not given.rest and not is_exporting() else None
        ids, offsets, weights, _ = given
        if type(ids) is not Tensor or not ids.is_cpu:
            return None
        if offsets is not None and (type(offsets) is not Tensor or not offsets.is_cpu):
            return None
        if weights is not None and (type(weights) is not Tensor or not weights.is_cpu):
            return None
        return None if torch._C._get_tracing_state() or transforms() else self.tensors(step.trains)

    def _updates_in_graphs(self, step: Step) -> bool:
        # A stage may change weights before they are read, and the operator checks the ids that it reads by itself.
        return (
            step.accumulation is None
            and not step.stages
            and not self.reads_weights
            and self.store.optimizer is not None
            and ops.has_native_form(self.store.optimizer.kind)
        )

    def check(self, tensors: ProgramTensors, given: Input) -> None:
        """Raises ``Refused`` for what the lookups would refuse, and does nothing else."""
        outputs = self._outputs(self._starts, self.dims, [None] * len(self.dims))
        ops.check(tensors, self._args(given, outputs, given.batch(self.num_features), (0,), keeps=False))

    # ---- looking up ------------------------------------------------------------------------------------------------

    def side_by_side(self, tensors: ProgramTensors, given: Input, modes: tuple[str | None, ...], step: Step) -> Tensor:
        """Pooled vectors ``[B, ΣD]``."""
        batch = given.batch(self.num_features)
        outputs = self._side_by_side.get(modes)
        if outputs is None:
            outputs = self._side_by_side[modes] = self._outputs(self._starts, [self.width] * len(self.dims), modes)
        return self._values(tensors, given, outputs, batch, (batch, self.width), step)

    def one_by_one(
        self, tensors: ProgramTensors, given: Input, modes: Sequence[str | None], step: Step
    ) -> list[Tensor]:
        """A tensor for each output: ``[B, D]``, or ``[N_f, D]`` where bags are not pooled."""
        batch = given.batch(self.num_features)
        rows = [batch] * len(self.dims)
        if given.offsets is not None:
            bounds = given.bounds(self.num_features)
            for i, (mode, column) in enumerate(zip(modes, self.columns)):
                if mode is None:
                    start, end = bounds[column : column + 2]
                    if not 0 <= start <= end <= given.ids.numel():  # there is no such tensor to be filled
                        raise ops.Refused(None, None)
                    rows[i] = end - start
        sizes = [n * dim for n, dim in zip(rows, self.dims)]
        outputs = self._outputs([0, *accumulate(sizes)][:-1], self.dims, modes)
        values = self._values(tensors, given, outputs, batch, (sum(sizes),), step)
        return [part.view(n, dim) for part, n, dim in zip(values.split(sizes), rows, self.dims)]

    def in_input_order(self, tensors: ProgramTensors, given: Input, step: Step) -> Tensor:
        """The vectors of all ids, ``[B, F, D]`` or ``[N, D]``: of one D, with no feature in two tables."""
        dim, modes = self.dims[0], (None,) * len(self.dims)
        ids, offsets = given.ids, given.offsets
        if offsets is None:
            return self.side_by_side(tensors, given, modes, step).view(ids.shape[0], self.num_features, dim)
        bounds = given.bounds(self.num_features)
        outputs = self._outputs([bounds[column] * dim for column in self.columns], self.dims, modes)
        return self._values(tensors, given, outputs, given.batch(self.num_features), (ids.numel(), dim), step)

    @staticmethod
    def _outputs(starts: Sequence[int], strides: Sequence[int], modes: Sequence[str | None]) -> Tensor:
        words = [*zip(starts, strides, [POOLING[mode] for mode in modes])]
        return torch.tensor(words, dtype=torch.int64, device="cpu")

    def _args(self, given: Input, outputs: Tensor, batch: int, shape: tuple[int, ...], *, keeps: bool) -> LookupArgs:
        """The arguments as native code takes them: copies of the caller's own where a backward will read them again."""
        program, (ids, offsets, weights) = self.program, given[:3]
        num_rows = batch * program.rows_per_example if offsets is None else ids.numel() * program.rows_per_id
        if keeps and self.reads_ids:
            ids = ids.clone()
        if not ids.is_contiguous():
            ids = ids.contiguous()
        if offsets is not None:
            offsets = _as(offsets, torch.int64, copy=keeps)
        if weights is not None:
            weights = _as(weights, torch.float32, copy=keeps)
        return LookupArgs(ids, offsets, weights, outputs, batch, shape, num_rows)

    def _values(
        self,
        tensors: ProgramTensors,
        given: Input,
        outputs: Tensor,
        batch: int,
        shape: tuple[int, ...],
        step: Step,
    ) -> Tensor:
        store = self.store
        differentiates = store.optimizer is None and store.gives_gradients()
        if torch.compiler.is_compiling():
            args = self._args(given, outputs, batch, shape, keeps=False)  # the operator itself makes the copies
            return ops.look_up_in_graph(
                tensors, args, store.step_number(), self.ranges, store.hook if step.updates else None
            )
        args = self._args(given, outputs, batch, shape, keeps=step.updates or differentiates)
        if step.updates:
            number = int(store.step_number())
            accumulation = step.accumulation

            def collect(gradients: list[Tensor]) -> None:
                assert accumulation is not None
                for name, rows, values in self._by_row(gradients):
                    accumulation.add(name, rows, values)

            return ops.update_in_backward(
                self, tensors, args, store.hook, number, None if accumulation is None else collect
            )
        if differentiates:
            weights = tensors.weights if step.aliases is None else [step.aliases.of(w) for w in tensors.weights]
            parameters = [*weights, *tensors.projections]
            sparse = store.sparse or step.aliases is not None
            return ops.differentiate(self, tensors, args, parameters, sparse)
        return ops.look_up_values(tensors, args)


_NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")


def _as(tensor: Tensor, dtype: torch.dtype, *, copy: bool) -> Tensor:
    """The contiguous tensor in a type; asking is faster than ``to``, which does nothing slowly."""
    return tensor.contiguous() if tensor.dtype is dtype and not copy else tensor.to(dtype, copy=copy).contiguous()
