"""The module that users hold: ``EmbeddingTables``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from embtables.lookup.accumulation import accumulating
from embtables.lookup.engine import Lookup
from embtables.lookup.features import BlockLookup
from embtables.lookup.inputs import CONFIG, Input, PoolingLike, check_input, check_pooling
from embtables.lookup.regularization import Regularizer
from embtables.lookup.step import Step, ViewSteps
from embtables.lookup.store import Store
from embtables.plan.solver import Plan, checked_counts
from embtables.sizes.memory import Memory
from embtables.tables.accounting import memory_of
from embtables.tables.build import build_blocks, build_stages
from embtables.tables.files import check_codes, reading_file, write_file
from embtables.tables.initialize import initialize
from embtables.tables.optimizer_state import OptimizerState
from embtables.tables.reading import block_of, dense_rows, share_of_collisions


class EmbeddingTables(nn.Module):
    """All tables of a plan, stored as it says.

    ``forward`` takes the ids of all features and gives their pooled vectors side by side, in the order of the tables
    and of the features inside a table (``output_names``; ``feature@table`` where a feature is in two tables).

    Args:
        plan: what ``embtables.plan`` returned.
        seed: of the initial weights. Addresses depend on the plan alone.
        device: where to allocate; ``"meta"`` allocates nothing until ``to_empty`` and ``reset_parameters``.
        std: standard deviation of every initial output. By default what the tables' ``init_fn`` yields, else
            1/√(3·n) for the n ids of the largest table.
        sparse: with ``optimizer=None``, whether the slabs' gradients are sparse (for SGD, Adagrad, SparseAdam).

    With a fused optimizer the weights are updated inside ``backward``, once for each forward (``accumulate`` makes one
    update of several), on touched rows only; ``parameters()`` is then empty, so that the dense part's optimizer leaves
    them alone. ``requires_grad_(False)`` of these tables freezes them, but that of a module around them does not, since
    it walks ``parameters()``: ``model.apply(lambda module: module.requires_grad_(False))`` freezes everything.

    Example::

        tables = EmbeddingTables(plan([TableConfig("user", 1_000_000, 16)], "hash", budget="10%"))
        vectors = tables(torch.randint(1_000_000, (32, 1)))    # [32, 16]
    """

    def __init__(
        self,
        plan: Plan,
        seed: int = 0,
        device: torch.device | str | None = None,
        std: float | None = None,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        if sparse and plan.optimizer is not None:
            raise ValueError(
                "sparse gradients need plan(..., optimizer=None): a fused optimizer makes no gradient at all"
            )
        if std is not None and not 0 < std <= 1e6:
            raise ValueError(f"std must be a positive number of at most 1e6, not {std!r}")
        self._prepare(plan, seed, std)
        self._build(Store([g.layout.training for g in plan.groups], plan.optimizer, sparse=sparse, device=device))
        initialize(plan, self.store, seed, std)

    # ---- building ------------------------------------------------------------------------------------------------

    def _prepare(self, plan: Plan, seed: int, std: float | None) -> None:
        self.plan, self.seed, self.std = plan, seed, std
        self.served = False
        self._regularization: tuple[float, dict[str, Tensor]] | None = None
        pairs = [(table, feature) for table in plan.tables for feature in table.feature_names]
        features = [feature for _, feature in pairs]
        self.feature_names: list[str] = list(dict.fromkeys(features))
        self.output_names = [f"{f}@{t.name}" if features.count(f) > 1 else f for t, f in pairs]
        self.embedding_dims = [table.embedding_dim for table, _ in pairs]
        self._features = features
        self._own_modes: list[str | None] = [table.pooling for table, _ in pairs]
        self._fits_one_tensor = len(set(self.embedding_dims)) == 1 and len(pairs) == len(self.feature_names)

    def _build(self, store: Store) -> None:
        """The lookup over a store: a block for each group, variant and dimension."""
        self.store = store
        blocks, order = build_blocks(self.plan, store, self.feature_names, served=self.served)
        self.blocks = nn.ModuleList(blocks).to(store.device)
        self.lookups = Lookup(store, blocks, order).to(store.device)
        views = list(self.__dict__.get("_views", ()))
        self._views: dict[str, Lookup] = {}
        for table in views:
            self.view(table)
        self._view_steps = ViewSteps()
        self._add_regularizers()
        self.stages = [] if self.served else build_stages(self.plan, store)
        self.optimizer_state = OptimizerState(store, self.stages)

    def _add_regularizers(self) -> None:
        for block in self._each_block():
            block.regularizer = None
            if self._regularization is not None and not self.served:
                l2, counts = self._regularization
                block.regularizer = Regularizer(l2, block.tables, counts).to(self.store.device)

    def _each_block(self) -> list[BlockLookup]:
        return self.lookups.blocks

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EmbeddingTables:
        """Moves and casts like any module; what leaves the meta device gets the constants that follow from the plan."""
        was_meta = self.store.device.type == "meta"
        super()._apply(fn, recurse)
        if was_meta and self.store.device.type != "meta":
            self.store.reset_state()
            self._build(self.store)
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initializes everything anew from ``seed``, optimizer state included; nothing yet on the meta device.

        Raises:
            ValueError: for served tables, whose trained form is gone.
        """
        if self.served:
            raise ValueError("served tables cannot be initialized anew: build EmbeddingTables(plan)")
        if self.store.device.type == "meta":
            return
        self.store.reset_state()
        # to_empty leaves the addressing constants undefined too, and they follow from the plan.
        self._build(self.store)
        initialize(self.plan, self.store, self.seed, self.std)

    # ---- looking up ----------------------------------------------------------------------------------------------

    def forward(
        self,
        ids: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        pooling: str | Mapping[str, str] | None = CONFIG,
        training: bool | None = None,
    ) -> Tensor:
        """Looks up all features.

        Args:
            ids: int32 or int64, ``[B, F]``, a column for each of ``feature_names``; or, with ``offsets``, flat values
                ``[N]``, feature by feature.
            offsets: ``[F·B + 1]``: the bag of feature f and example b is
                ``ids[offsets[f·B + b] : offsets[f·B + b + 1]]``.
            per_sample_weights: a factor for each id, of the shape of ``ids``. Mean pooling divides by the number of
                ids all the same.
            pooling: by default each table's own; ``"sum"`` or ``"mean"`` for all, or a mapping from feature to these;
                ``None`` for the vectors of all ids, unpooled.
            training: whether the lookup trains: is regularized, counted as a step, and updated by a fused optimizer.
                By default in training mode; views of shared tables say what mode they are in themselves.

        Returns:
            ``[B, ΣD]``, the outputs side by side. Every id becomes a vector first, then the bag is pooled; an empty bag
            gives zeros. With ``pooling=None`` ``[B, F, D]``, or ``[N, D]`` for flat values: all tables must then have
            one D, and no feature may be in two tables; ``lookup`` has neither limit.

        Raises:
            IndexError: for an id out of range, naming feature and id.
            ValueError: for shapes or offsets that do not fit, or an unknown pooling.
            TypeError: for ids that are not int32 or int64.
        """
        check_input(ids, offsets, per_sample_weights, self.feature_names)
        self._check_one_tensor(pooling)
        given = Input(ids, offsets, per_sample_weights)
        with self._step(training) as step:
            if pooling is None:
                return self.lookups.in_input_order(given, step)
            return self.lookups.side_by_side(given, self._modes(pooling), step)

    def lookup(
        self,
        ids: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        pooling: PoolingLike = CONFIG,
        training: bool | None = None,
    ) -> dict[str, Tensor]:
        """Looks up all features, each output by itself: pooled, or the vectors of a history's ids as they are.

        Args:
            ids: as in ``forward``.
            offsets: as in ``forward``.
            per_sample_weights: as in ``forward``; they multiply unpooled vectors too.
            pooling: as in ``forward``, and a mapping may say ``None`` for a feature, as in ``{"history": None}``.
            training: as in ``forward``.

        Returns:
            A tensor for each of ``output_names``, in their order, ``[B, D]`` where it is pooled, and where it is not
            ``[N_f, D]``, a vector for each of the feature's ids, in the order given. Without ``offsets`` all are
            ``[B, D]``. D may differ from table to table.

        It is one gather, and one update in ``backward``, whatever part of the outputs the loss depends on: vectors
        that it does not depend on get a gradient of zero.

        Raises:
            IndexError, ValueError, TypeError: as in ``forward``.

        Example::

            items = TableConfig("item", 1_000_000, 16, ["item", "history"])
            tables = EmbeddingTables(plan([items], "hash", budget="10%"))
            ids, offsets = torch.tensor([7, 8, 1, 2, 3]), torch.tensor([0, 1, 2, 5, 5])
            found = tables.lookup(ids, offsets, pooling={"history": None})
            found["item"], found["history"]    # [2, 16], [3, 16]: three earlier items of the first example
        """
        check_input(ids, offsets, per_sample_weights, self.feature_names)
        check_pooling(pooling, self.feature_names)
        with self._step(training) as step:
            given = Input(ids, offsets, per_sample_weights)
            return dict(zip(self.output_names, self.lookups.one_by_one(given, self._modes(pooling), step)))

    def _step(self, training: bool | None) -> Step:
        trains = self.trains(self.training if training is None else training)
        return Step(self.store, trains=trains, stages=self.stages)

    def trains(self, training: bool) -> bool:
        """Whether a lookup of a module in training mode trains: not without gradients, served or frozen."""
        return training and self.store.can_learn()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freezes the tables, or has them train again; frozen ones give outputs that require no gradient."""
        self.store.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    def _modes(self, pooling: PoolingLike) -> list[str | None]:
        """The pooling of each output: as the call says, else its table's own."""
        if pooling == CONFIG:
            return self._own_modes
        if isinstance(pooling, Mapping):
            return [pooling.get(feature, mode) for feature, mode in zip(self._features, self._own_modes)]
        return [pooling] * len(self._own_modes)

    def view(self, table: str) -> tuple[Lookup, ViewSteps]:
        """The lookup of one table, for modules that share these tables, and what makes their lookups one step.

        Raises:
            ValueError: for an unknown table.
        """
        if table not in self._views:
            block, number = block_of(self._each_block(), table)
            self._views[table] = Lookup(self.store, [block], [0], only=number).to(self.store.device)
        return self._views[table], self._view_steps

    def _check_one_tensor(self, pooling: PoolingLike) -> None:
        """Raises ``ValueError`` for an unknown pooling, and one whose outputs do not fit into one tensor."""
        check_pooling(pooling, self.feature_names)
        if isinstance(pooling, Mapping):
            unpooled = [feature for feature, mode in pooling.items() if mode is None]
            if unpooled:
                raise ValueError(
                    f"pooling is None for '{unpooled[0]}', whose vectors do not fit beside pooled ones: "
                    "call lookup, which gives each output by itself"
                )
        elif pooling is None and not self._fits_one_tensor:
            raise ValueError(
                "pooling=None needs tables of one embedding_dim, and no feature in two tables; lookup takes any"
            )

    # ---- regularization ------------------------------------------------------------------------------------------

    def regularize(self, l2: float, frequencies: Mapping[str, Any] | None = None) -> None:
        """Mini-batch-aware L2 regularization from now on, in training, for any method and optimizer.

        In ``backward`` the gradient of the vector w_j of each id j that a step looked up gets λ/n_j·w_j, once for each
        distinct id of a table, however often it occurs in the batch and in however many features of the table. That is
        the gradient of ½·λ·Σ_j ‖w_j‖²/n_j over the distinct ids of the batch. Padding gets none. The loss does not show
        it, and a ``GradScaler`` does not scale it.

        Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, equations 6 and 7.

        Args:
            l2: λ; 0 switches it off.
            frequencies: ``{table name: counts}``, how often each id occurs in training, as in ``embtables.plan``, for
                all tables that have a vocabulary; n_j is the count, at least 1, and 1 for the oov row. ``None``: n_j is
                1, plain L2 of the vectors that are looked up. They take 4 bytes per id beside the tables and on
                the host; ``memory()`` lists them under ``frequencies`` and counts them in its training bytes, which
                the plan, that knows nothing of them, does not.

        It belongs to the training at hand: no state dict or file holds it.

        Raises:
            ValueError: for an l2 that is negative or not finite, counts that are missing or do not fit, and served
                tables, which are not trained.

        Example::

            tables.regularize(0.01, frequencies={"item": item_counts, "user": user_counts})
        """
        if isinstance(l2, bool) or not 0 <= l2 < float("inf"):
            raise ValueError(f"l2 must be a non-negative number, not {l2!r}")
        if self.served:
            raise ValueError("served tables are not trained, so there is nothing to regularize")
        counts = checked_counts(self.plan.tables, frequencies)
        for table in self.plan.tables:
            if frequencies is not None and table.num_embeddings is not None and table.name not in counts:
                raise ValueError(
                    f"frequencies lack table '{table.name}', which would be regularized as if each of its ids occurred "
                    "once: give counts of all tables, or frequencies=None"
                )
        in_float32 = {name: torch.from_numpy(n).to(torch.float32) for name, n in counts.items()}
        self._regularization = (float(l2), in_float32) if l2 else None
        self._add_regularizers()

    # ---- reading -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def to_dense(self, table: str, rows: slice = slice(None)) -> Tensor:
        """The equivalent full table ``[n, D]``, or some of its rows: what ``forward`` gives for these ids.

        Bit for bit, but for products of matrices (mixed_dimension): their last bit depends on how many rows there are.

        Raises:
            ValueError: for an unknown table, or one without ``num_embeddings``.
        """
        block, number = block_of(self._each_block(), table)
        return dense_rows(block, number, rows)

    @torch.no_grad()
    def collision_share(self, table: str) -> float:
        """Share of a table's ids that have their whole address, and so their vector, in common with another id."""
        return share_of_collisions(*block_of(self._each_block(), table))

    def memory(self) -> Memory:
        """Bytes, taken from the storages that exist: of the served form, if that is what this module holds."""
        return memory_of(self)

    # ---- the fused optimizer -------------------------------------------------------------------------------------

    def set_learning_rate(self, lr: float) -> None:
        """Sets the fused optimizer's learning rate; a schedule calls it before each step."""
        self.store.set_learning_rate(lr)

    def accumulate(self) -> AbstractContextManager[None]:
        """Within this ``with`` block backward passes add up, and the fused optimizer makes one update at its end.

        The update is that of one batch of all that is looked up in the block, by these tables and all their views: the
        gradients of each row are summed, clipped by ``clip_row_norm`` and applied once, and it is one step for Adam and
        for pruning, which begins with the first lookup. ``regularize`` acts once for each lookup. Memory grows with the
        number of rows that are looked up. Blocks may be nested: the outermost one updates. An exception that leaves a
        block discards its gradients, and nothing is updated. Compiled lookups run uncompiled within it, and with
        ``fullgraph=True`` they are refused. With ``optimizer=None`` autograd adds up by itself.

        Raises:
            RuntimeError: in the backward of a lookup of the block that comes after its end.

        Example::

            with tables.accumulate():
                for chunk in chunks:
                    (loss(tables(chunk)) / len(chunks)).backward()
        """
        return accumulating(self.store)

    def optimizer_state_dict(self) -> dict[str, Tensor]:
        """Copies of the fused optimizer's state, and of the stages', which ``state_dict`` holds beside the weights."""
        return {name: tensor.detach().clone() for name, tensor in self.optimizer_state.tensors().items()}

    @torch.no_grad()
    def load_optimizer_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Fills the optimizer's state in place.

        Raises:
            ValueError: where names or shapes are not those of this plan and optimizer.
        """
        tensors = self.optimizer_state.tensors()
        if set(tensors) != set(state):
            raise ValueError(
                "the optimizer state is of another plan or optimizer: it holds "
                f"{', '.join(sorted(state)) or 'nothing'}, these tables have {', '.join(sorted(tensors)) or 'none'}"
            )
        for name, tensor in tensors.items():
            if name != "hyper" and tensor.shape != state[name].shape:
                raise ValueError(
                    f"the optimizer state '{name}' has shape {tuple(state[name].shape)}, "
                    f"these tables need {tuple(tensor.shape)}"
                )
        for name, tensor in tensors.items():
            if name == "hyper":
                # Of the hyper-parameters only the learning rate changes; the others are the plan's, in whatever order.
                tensor[0] = state[name][0]
            else:
                tensor.copy_(state[name])

    # ---- serving, saving, loading --------------------------------------------------------------------------------

    @torch.no_grad()
    def serve(self) -> EmbeddingTables:
        """The tables in the form that is exported; the same object where that is the trained form."""
        if self.served or all(g.layout.serving == g.layout.training for g in self.plan.groups):
            return self
        served = self._empty_served(self.plan, self.store.device)
        for g in self.plan.groups:
            g.method.serve(g.layout, g.group, self.store, served.store)
        return served.train(self.training)

    def finalize(self) -> EmbeddingTables:
        """Takes on the served form, in place, and returns this module; nothing changes where it is the trained one."""
        served = self.serve()
        if served is not self:
            self.served = True
            self._build(served.store)
        return self

    @classmethod
    def _empty_served(cls, plan: Plan, device: torch.device | str | None) -> EmbeddingTables:
        tables = cls.__new__(cls)
        nn.Module.__init__(tables)
        tables._prepare(plan, 0, None)
        tables.served = True
        tables._build(Store([g.layout.serving for g in plan.groups], None, trainable=False, device=device))
        return tables

    def save(self, path: Path | str) -> None:
        """Writes the served form: one safetensors file, its tensors the plan's inference bytes, the plan inside."""
        write_file(path, self.serve().store.stored(), self.plan)

    @classmethod
    @torch.no_grad()
    def load(cls, path: Path | str, device: torch.device | str | None = None) -> EmbeddingTables:
        """Reads what ``save`` wrote: served tables, for inference, without gradients or optimizer state.

        Raises:
            FileNotFoundError: where there is no such file.
            ValueError: naming the file, where it is damaged or no such file.
        """
        with reading_file(path) as (plan, tensors):
            tables = cls._empty_served(plan, device)
            check_codes(tables._each_block(), tensors)
            tables.store.load_state_dict(tensors)
        return tables.eval()

    # ---- state dict ----------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The plan's fingerprint, so that no weights load under other addresses; a tensor for ``weights_only``."""
        return torch.frombuffer(bytearray(self.plan.fingerprint), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        if bytes(state.cpu().tolist()) != self.plan.fingerprint:
            raise ValueError(
                "this state dict belongs to another plan (other tables, sizes, methods or hash_seed): "
                "its rows mean other ids"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *arguments: Any
    ) -> None:
        store = f"{prefix}store."
        given = {name.removeprefix(store): t for name, t in state_dict.items() if name.startswith(store)}
        check_codes(self._each_block(), given)
        device = next((t.device for t in given.values() if isinstance(t, Tensor)), self.store.device)
        if metadata.get("assign_to_params_buffers") and self.store.device.type == "meta" != device.type:
            # What is assigned brings its device along; what no state dict holds has to be there too.
            self.store.leave_meta(device)
            self._build(self.store)
        super()._load_from_state_dict(state_dict, prefix, metadata, *arguments)

    def extra_repr(self) -> str:
        method = ", ".join(g.method.kind for g in self.plan.groups)
        return f"{len(self.plan.tables)} tables, {method}, {self.plan.inference_bytes:,} bytes served"
