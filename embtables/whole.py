"""All lookups of a module in one native pass: from its arguments to a request, and from the values to its outputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from embtables import ops
from embtables.lookups import Lookups
from embtables.ops.native import LookupArgs
from embtables.ops.program import POOLING, ProgramTensors, compile_program
from embtables.store import Store


class WholeLookup:
    """The lookups of a module, as one program in the order of its outputs.

    Args:
        store: what they read.
        lookups: the module's or some of them, whose blocks all have ``recipes``.
        order: for each output its place among the blocks' lookups, one block after another. The features of these have
            a column of the input each.
    """

    def __init__(self, store: Store, lookups: Sequence[Lookups], order: Sequence[int]) -> None:
        pairs = [pair for each in lookups for pair in zip(each.entrances(), each.block.recipes() or [])]
        # What the blocks read, and no more: other weights take no part in a step.
        read = [(piece.width, piece.projection) for _, recipe in pairs for piece in recipe.pieces]
        widths, projections = {width for width, _ in read}, {name for _, name in read}
        weights = {width: rows for width, rows in store.weight_rows().items() if width in widths}
        extras = {name: shape for name, shape in store.extra_shapes().items() if name in projections}
        pairs = [pairs[i] for i in order]
        columns = {column: i for i, column in enumerate(sorted({entrance.column for entrance, _ in pairs}))}
        pairs = [(entrance._replace(column=columns[entrance.column]), recipe) for entrance, recipe in pairs]
        self.store = store
        self.num_features = len(columns)
        self.columns = [entrance.column for entrance, _ in pairs]
        self.dims = [entrance.embedding_dim for entrance, _ in pairs]
        self.width = sum(self.dims)
        self.starts = [0, *accumulate(self.dims)][:-1]
        pieces = [piece for _, recipe in pairs for piece in recipe.pieces]
        # A product's gradient depends on its factors, that of a sum with signs on the ids.
        products = any(recipe.operation == "mult" and len(recipe.pieces) > 1 for _, recipe in pairs)
        self.reads_weights = products or any(piece.projection is not None for piece in pieces)
        self.reads_ids = any(piece.sign_seed is not None for piece in pieces)
        names = [
            (feature, t.name, t.num_embeddings) for each in lookups for feature, t in zip(each.features, each.tables)
        ]
        self._ranges = json.dumps([names[i] for i in order])
        self._side_by_side: dict[tuple[str | None, ...], Tensor] = {}
        self.program = compile_program(pairs, self.num_features, weights, extras, store.codes())
        self._weight_shapes = [(rows, width) for width, rows in weights.items()]
        self._projection_shapes = list(extras.values())
        self._code_forms = [(code.dtype, code.shape) for code in store.code_tensors()]

    @classmethod
    def of(cls, store: Store, lookups: Sequence[Lookups], order: Sequence[int]) -> WholeLookup | None:
        """``None`` where a block says nothing, there is nothing to look up, or there is no native code."""
        if ops.instructions() is None or store.device.type != "cpu" or not store.widths or not lookups:
            return None
        if any(each.block.recipes() is None for each in lookups):
            return None
        whole = cls(store, lookups, order)
        return whole if whole.program.widths else None

    def takes(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, training: bool) -> bool:
        """Whether native code may look at these very tensors, and at the store's.

        Exported graphs hold PyTorch's own operators, so that they run where this package is not; so do compiled ones
        where the weights are parameters.
        """
        if ops.backend() != "native" or (weights is not None and weights.requires_grad):
            return False
        if torch.compiler.is_compiling():
            updates = training and self.store.optimizer is not None
            # A graph may put other updates before the backward of a lookup, which must not read their results.
            suits = not self.reads_weights if updates else not self.store.gives_gradients()
            return suits and not torch.compiler.is_exporting() and self._fits(self._tensors())
        return (
            all(t is None or (type(t) is Tensor and t.is_cpu) for t in (ids, offsets, weights))
            and not torch.jit.is_tracing()
            and not torch._C._are_functorch_transforms_active()
            and torch.autograd.forward_ad._current_level < 0
            and self.tensors() is not None
        )

    def fits(self) -> bool:
        """Whether native code looks up the store's tensors as they are now."""
        return ops.backend() == "native" and self.tensors() is not None

    def refuse(self, ids: Tensor, offsets: Tensor | None) -> None:
        """Raises ``Refused`` for what ``side_by_side`` would refuse, and does nothing else."""
        outputs = self._outputs(self.starts, self.dims, [None] * len(self.dims))
        tensors = self.tensors()
        assert tensors is not None
        ops.check(tensors, self._args(ids, offsets, None, outputs, 0, keeps=False))

    # ---- looking up ----------------------------------------------------------------------------------------------

    def side_by_side(
        self,
        ids: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        modes: Sequence[str | None],
        training: bool,
        begun: bool = False,
    ) -> Tensor:
        """Pooled vectors ``[B, ΣD]``; ``begun`` says that the step which they belong to has been counted."""
        batch = ids.shape[0] if offsets is None else (offsets.numel() - 1) // self.num_features
        key = tuple(modes)
        if key not in self._side_by_side:
            self._side_by_side[key] = self._outputs(self.starts, [self.width] * len(self.dims), modes)
        outputs = self._side_by_side[key]
        values = self._values(ids, offsets, weights, outputs, batch * self.width, training, begun)
        return values.view(batch, self.width)

    def one_by_one(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, modes: Sequence[str | None], training: bool
    ) -> list[Tensor]:
        """A tensor for each output: ``[B, D]``, or ``[N_f, D]`` where bags are not pooled."""
        if offsets is None:
            rows = [ids.shape[0]] * len(self.dims)
        else:
            batch = (offsets.numel() - 1) // self.num_features
            bounds = self._bounds(offsets, batch)
            rows = [
                batch if mode is not None else bounds[column + 1] - bounds[column]
                for mode, column in zip(modes, self.columns)
            ]
        sizes = [n * dim for n, dim in zip(rows, self.dims)]
        outputs = self._outputs([0, *accumulate(sizes)][:-1], self.dims, modes)
        values = self._values(ids, offsets, weights, outputs, sum(sizes), training)
        return [part.view(n, dim) for part, n, dim in zip(values.split(sizes), rows, self.dims)]

    def in_input_order(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, training: bool) -> Tensor:
        """The vectors of all ids, ``[B, F, D]`` or ``[N, D]``: of one D, with no feature in two tables."""
        dim, modes = self.dims[0], [None] * len(self.dims)
        if offsets is None:
            return self.side_by_side(ids, None, weights, modes, training).view(ids.shape[0], -1, dim)
        batch = (offsets.numel() - 1) // self.num_features
        bounds = self._bounds(offsets, batch)
        outputs = self._outputs([bounds[column] * dim for column in self.columns], self.dims, modes)
        return self._values(ids, offsets, weights, outputs, ids.numel() * dim, training).view(-1, dim)

    def _bounds(self, offsets: Tensor, batch: int) -> list[int]:
        """Where the ids of each feature begin, and where the last one's end."""
        return offsets[::batch].tolist() if batch else [0] * (self.num_features + 1)

    @staticmethod
    def _outputs(starts: Sequence[int], strides: Sequence[int], modes: Sequence[str | None]) -> Tensor:
        return torch.tensor([*zip(starts, strides, [POOLING[mode] for mode in modes])], dtype=torch.int64)

    def _values(
        self,
        ids: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        outputs: Tensor,
        num_values: int,
        training: bool,
        begun: bool = False,
    ) -> Tensor:
        store = self.store
        updates = training and store.optimizer is not None
        differentiates = store.optimizer is None and store.gives_gradients()
        args = self._args(ids, offsets, weights, outputs, num_values, keeps=updates or differentiates)
        if torch.compiler.is_compiling():
            return self._in_graph(args, updates, begun)
        tensors = self.tensors()
        assert tensors is not None  # as ``takes`` found
        if updates:
            return ops.update_in_backward(
                self.tensors, tensors, args, self.reads_weights, store._hook, int(store.next_step(begun))
            )
        if differentiates:
            widths, projections = self.program.widths, self.program.projections
            parameters = [*store.differentiated_weights(widths), *store.extra_weights(projections)]
            return ops.differentiate(tensors, args, self.reads_weights, parameters, store.sparse or store.many_lookups)
        return ops.look_up_values(tensors, args)

    def _args(
        self,
        ids: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        outputs: Tensor,
        num_values: int,
        *,
        keeps: bool,
    ) -> LookupArgs:
        """The arguments as native code takes them: copies of the caller's own where a backward will read them again."""

        def taken(tensor: Tensor, dtype: torch.dtype, copy: bool) -> Tensor:
            return tensor.to(dtype, copy=copy).contiguous()

        program = self.program
        if offsets is None:
            batch, num_rows = ids.shape[0], ids.shape[0] * program.rows_per_example
        else:
            batch, num_rows = (offsets.numel() - 1) // self.num_features, ids.numel() * program.rows_per_id
        return LookupArgs(
            taken(ids, ids.dtype, keeps and self.reads_ids),
            None if offsets is None else taken(offsets, torch.int64, keeps),
            None if weights is None else taken(weights, torch.float32, keeps),
            outputs,
            batch,
            num_values,
            num_rows,
        )

    def _in_graph(self, args: LookupArgs, updates: bool, begun: bool) -> Tensor:
        store, request = self.store, self._tensors()
        values: Tensor = ops.look_up(
            request.words,
            args.ids,
            args.offsets,
            args.id_weights,
            request.weights,
            request.projections,
            request.codes,
            args.outputs,
            request.states,
            request.projection_states,
            request.hyper,
            store.next_step(begun),
            args.num_values,
            args.num_rows,
            request.rule,
            self._ranges,
            store._hook if updates else None,
        )[0]
        return values

    def tensors(self) -> ProgramTensors | None:
        """What the program reads and writes as it is now; ``None`` where native code does not take it."""
        tensors = self._tensors()
        return tensors if self._fits(tensors) else None

    def _fits(self, tensors: ProgramTensors) -> bool:
        weights = [*tensors.weights, *tensors.projections]
        states = [state for state in (*tensors.states, *tensors.projection_states) if state.numel()]
        return (
            ops.fits(weights)
            and ops.fits(states)
            and (not states or states[0].dtype in (torch.float32, weights[0].dtype))
            and [w.shape for w in weights] == [*self._weight_shapes, *self._projection_shapes]
            and all(type(code) is Tensor and code.is_contiguous() for code in tensors.codes)
            and [(code.dtype, code.shape) for code in tensors.codes] == self._code_forms
        )

    def _tensors(self) -> ProgramTensors:
        store, widths, extras = self.store, self.program.widths, self.program.projections
        fused = store.optimizer
        return ProgramTensors(
            self.program.words,
            store.lookup_weights(widths),
            store.extra_weights(extras),
            store.code_tensors(),
            store.lookup_states(widths),
            store.extra_states(extras),
            store.hyper,
            "sgd" if fused is None else fused.kind,
        )
