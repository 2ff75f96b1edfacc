"""The part of ``EmbeddingTables`` that looks up and trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from embtables._util.numbers import is_non_negative
from embtables.config import TableConfig
from embtables.lookup.accumulation import accumulating
from embtables.lookup.engine import Lookup
from embtables.lookup.features import BlockLookup
from embtables.lookup.inputs import CONFIG, Input, PoolingLike, check_input, check_pooling
from embtables.lookup.step import Step, ViewSteps
from embtables.lookup.store import Store
from embtables.methods.base import Stage
from embtables.plan.solver import checked_counts
from embtables.tables.optimizer_state import OptimizerState
from embtables.tables.outputs import Outputs
from embtables.tables.reading import block_of, strengths_of_rows


class TableLookup(nn.Module):
    """Looks up the features of tables that lie in a store, and trains what it looks up.

    Args:
        tables: the tables, in the order of the outputs.
        served: whether the store holds their served form, which is not trained.
    """

    def __init__(self, tables: Sequence[TableConfig], *, served: bool = False) -> None:
        super().__init__()
        self._configs = tuple(tables)
        self.served = served
        self.outputs = Outputs(tables)
        self.feature_names = self.outputs.feature_names
        self.output_names = self.outputs.names
        self.embedding_dims = self.outputs.embedding_dims
        self._views: dict[str, Lookup] = {}

    def _look_up_in(self, store: Store, blocks: list[BlockLookup], order: Sequence[int], stages: list[Stage]) -> None:
        """Has lookups read a store from now on, those of views too; the arguments are as in ``Lookup``."""
        self.store = store
        self.stages = stages
        self.blocks = nn.ModuleList(blocks).to(store.device)
        self.lookups = Lookup(store, blocks, order, stages=stages).to(store.device)
        views, self._views = list(self._views), {}
        for table in views:
            self.view(table)
        self._view_steps = ViewSteps()
        # Python finds parts of a module by their names in several microseconds each.
        self._in_reach = store, self.lookups
        self._reading = Step(store)
        self.optimizer_state = OptimizerState(store, stages)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves like any module, and takes along its views, which are no parts of it."""
        super()._apply(fn, recurse)
        for view in self._views.values():
            view._apply(fn)
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        for view in self._views.values():
            view.forget()
        super()._load_from_state_dict(*arguments)

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
        if pooling is not CONFIG:
            self.outputs.check_one_tensor(pooling)
        given = Input(ids, offsets, per_sample_weights)
        lookups = self._in_reach[1]
        with self._step(training) as step:
            if pooling is None:
                return lookups.in_input_order(given, step)
            return lookups.side_by_side(given, self.outputs.modes(pooling), step)

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
            return dict(zip(self.output_names, self._in_reach[1].one_by_one(given, self.outputs.modes(pooling), step)))

    def _step(self, training: bool | None) -> Step:
        trains = self.trains(self.training if training is None else training)
        # Lookups that do not train leave nothing behind in their step, so that one serves them all. Graphs enter no
        # context that they have not made.
        if not (trains or torch.compiler.is_compiling()):
            return self._reading
        return Step(self._in_reach[0], trains=trains, stages=self.stages)

    def trains(self, training: bool) -> bool:
        """Whether a lookup of a module in training mode trains: not without gradients, served or frozen."""
        return training and self._in_reach[0].can_learn()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freezes the tables, or has them train again; frozen ones give outputs that require no gradient."""
        self.store.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    def view(self, table: str) -> tuple[Lookup, ViewSteps]:
        """The lookup of one table, for modules that share these tables, and what makes their lookups one step.

        Raises:
            ValueError: for an unknown table.
        """
        if table not in self._views:
            block, number = block_of(self.lookups.blocks, table)
            view = Lookup(self.store, [block], [0], only=number, stages=self.stages)
            self._views[table] = view.to(self.store.device)
        return self._views[table], self._view_steps

    # ---- training --------------------------------------------------------------------------------------------------

    def regularize(self, l2: float, frequencies: Mapping[str, Any] | None = None) -> None:
        """Mini-batch-aware L2 regularization from now on, in training, for any method and optimizer.

        In ``backward`` the gradient of each row r that a lookup read gets λ·s_r/n_r·r, once, however often the row
        occurs in the batch. n_r is how often it is looked up in training, by all ids that share it, so that over an
        epoch a row is pulled towards 0 about as strongly, whether one id has it or thousands. s_r is its share of the
        square of a vector: 1 for a row that is a vector or a part of it as it stands, D/w for one of w scalars that is
        multiplied with a projection to D, 1/k² for one of k of which the mean is taken. Where each id j has a row of
        its own, w_j, that is the gradient of ½·λ·Σ_j ‖w_j‖²/n_j over the distinct ids of the batch, as in the paper.
        What all ids have in common (projections, the networks of learned methods) and padding get none. It is clipped
        with the rest of a row's gradient. The loss does not show it, and a ``GradScaler``, which knows nothing of it,
        divides it by its scale. While ``fake_quantize`` is on, r is the rounded row.

        Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, equations 6 and 7.

        Args:
            l2: λ; 0 switches it off.
            frequencies: ``{table name: counts}``, how often each id occurs in training, as in ``embtables.plan``, for
                all tables that have a vocabulary; n_r is at least 1. ``None``: n_r is 1, plain L2 of the rows that are
                looked up. It takes 4 bytes per row beside the tables; ``memory()`` lists them under ``regularization``
                and counts them in its training bytes, which the plan, that knows nothing of them, does not.

        It belongs to the training at hand: no state dict or file holds it. Rows that a method moves in training take
        along how strongly they are pulled.

        Raises:
            ValueError: for an l2 that is negative or not finite, counts that are missing or do not fit, served tables,
                which are not trained, and tables on the meta device.

        Example::

            tables.regularize(0.01, frequencies={"item": item_counts, "user": user_counts})
        """
        if not is_non_negative(l2):
            raise ValueError(f"l2 must be a non-negative number, not {l2!r}")
        if self.served:
            raise ValueError("served tables are not trained, so there is nothing to regularize")
        if self.store.device.type == "meta":
            raise ValueError(
                "tables on the meta device do not know yet which ids share rows: regularize() after to_empty() and "
                "reset_parameters(), or after the weights are loaded"
            )
        counts = checked_counts(self._configs, frequencies)
        for table in self._configs:
            if frequencies is not None and table.num_embeddings is not None and table.name not in counts:
                raise ValueError(
                    f"frequencies lack table '{table.name}', which would be regularized as if each of its ids occurred "
                    "once: give counts of all tables, or frequencies=None"
                )
        self.store.regularize(strengths_of_rows(float(l2), self.lookups.blocks, counts) if l2 else {})

    def set_learning_rate(self, lr: float) -> None:
        """Sets the fused optimizer's learning rate; a schedule calls it before each step.

        Raises:
            ValueError: for what is no non-negative number, and tables without a fused optimizer.
        """
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

    def load_optimizer_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Fills the optimizer's state in place.

        Raises:
            ValueError: where names or shapes are not those of this plan and optimizer.
        """
        self.optimizer_state.fill(state)
