"""The module that users hold: ``EmbeddingTables``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embtables.lookup.engine import without_autocast
from embtables.lookup.rounding import Rounding
from embtables.lookup.store import Store
from embtables.plan.solver import Plan, checked_counts
from embtables.sizes.memory import Memory
from embtables.tables.accounting import memory_of
from embtables.tables.files import check_codes, dtype_of, reading_file, write_file
from embtables.tables.fitting import checked_weights, fit, keep, share_kept, shared_with
from embtables.tables.initialize import initialize
from embtables.tables.reading import block_of, dense_rows, share_of_collisions
from embtables.tables.rounding import rounded_slabs
from embtables.tables.serving import PlannedTables


class EmbeddingTables(PlannedTables):
    """All tables of a plan, stored as it says.

    ``forward`` takes the ids of all features and gives their pooled vectors side by side, in the order of the tables
    and of the features inside a table (``output_names``; ``feature@table`` where a feature is in two tables).

    Args:
        plan: what ``embtables.plan`` returned.
        seed: of the initial weights. Addresses depend on the plan alone.
        device: where to allocate; ``"meta"`` allocates nothing until ``to_empty`` and ``reset_parameters``.
        std: standard deviation of the initial outputs of tables without ``init_fn``; by default 1/√(3·n) for the n ids
            of the largest table.
        sparse: with ``optimizer=None``, whether the slabs' gradients are sparse (for SGD, Adagrad, SparseAdam).

    With a fused optimizer the weights are updated inside ``backward``, once for each forward (``accumulate`` makes one
    update of several), on touched rows only; ``parameters()`` is then empty, so that the dense part's optimizer leaves
    them alone. ``requires_grad_(False)`` of these tables freezes them, but that of a module around them does not, since
    it walks ``parameters()``: ``model.apply(lambda module: module.requires_grad_(False))`` freezes everything. An
    average of weights, such as ``torch.optim.swa_utils.AveragedModel``, needs ``use_buffers=True`` to average them too.

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
        if not isinstance(plan, Plan):
            raise TypeError(
                f"EmbeddingTables takes a plan, not a {type(plan).__name__}: "
                "EmbeddingTables(embtables.plan(tables, method, budget))"
            )
        if sparse and plan.optimizer is not None:
            raise ValueError(
                "sparse gradients need plan(..., optimizer=None): a fused optimizer makes no gradient at all"
            )
        if std is not None and not 0 < std <= 1e6:
            raise ValueError(f"std must be a positive number of at most 1e6, not {std!r}")
        super().__init__(plan.tables)
        self.plan, self.seed, self.std = plan, seed, std
        # Scales of a state dict that is being loaded; none of them where the tables' own are to be found anew.
        self._rounding_to_load: dict[str, Tensor] | None = None
        self.register_load_state_dict_post_hook(_take_up_rounding)
        self._build(Store([g.layout.training for g in plan.groups], plan.optimizer, sparse=sparse, device=device))
        initialize(plan, self.store, seed, std)

    # ---- building ------------------------------------------------------------------------------------------------

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
        if self.store.rounding is not None:
            self.fake_quantize()

    # ---- training ------------------------------------------------------------------------------------------------

    def fake_quantize(self) -> None:
        """Quantization-aware training from now on: lookups that train compute with rows rounded as they are served.

        The rows themselves stay what they are: gradients, taken at the rounded rows, go straight through to them, and
        the optimizer updates them as before. So a row learns where its rounded form does best, which pays below 4 bits.
        Rows with scales of their own are rounded exactly as ``serve`` would at that moment. Of scales that rows have in
        common, as in ``"int4/64"``, the latest ones are kept beside the tables, in state dicts too, and found anew as
        their rows are looked up. What does not train is not rounded: ``serve`` gives what is to be evaluated. Where
        nothing is served in another format than it is trained in, nothing changes.

        Lookups that train go through PyTorch then, not through native code. A state dict says that it was saved after
        it, and tables that load one go on so.

        Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation",
        arXiv:1308.3432, 2013; Jacob et al., "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", CVPR 2018.

        Raises:
            ValueError: for served tables, tables on the meta device, and a method that serves something else than its
                rows, as ``pruned`` does.

        Example::

            tables = EmbeddingTables(plan(configs, "full", precision="int2"))
            train(tables)            # most of the training
            tables.fake_quantize()
            train(tables)            # the last part, of an epoch or more
            tables.finalize()
        """
        if self.served:
            raise ValueError("served tables are not trained, so there is nothing to round: fake_quantize() before")
        if self.store.device.type == "meta":
            raise ValueError("tables on the meta device have no rows to round: fake_quantize() after to_empty()")
        if rounded_slabs(self.plan):
            # Tensors of inference mode could not be trained with.
            with torch.inference_mode(False), torch.no_grad():
                self.store.rounding = Rounding(self.store, self.serve().store).to(self.store.device)

    @torch.no_grad()
    def take_over(
        self, weights: Mapping[str, Tensor], frequencies: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """Takes over trained full tables, as nearly as these can hold them.

        Tables in full are copied; bands, products of factors and pruned tables hold what they can. Rows that ids share
        become those that are nearest to the trained vectors by least squares: those of ``hash`` become the means of
        their ids' vectors. Ids count by how often they occur, where that is known. Optimizer state stays as it is.

        Args:
            weights: ``{table name: [num_embeddings, embedding_dim]}`` of any type of number. Tables that are not among
                them stay, or where they share storage with these, stay as near to what they are as they can.
            frequencies: ``{table name: counts}``, as in ``embtables.plan``.

        Returns:
            How much of each table is held as it will be served: 1 − Σ c·‖e − w‖² ÷ Σ c·‖w‖² over all ids, which occur
            c − 1 times (c = 1 where that is not known), of the vectors e that are served and w that are given. Tables
            that nothing could be taken over of, such as those of a method with a block of its own, are not in it.

        Raises:
            ValueError: for served tables and those on the meta device, an unknown table, a weight of another shape or
                with numbers that are not finite, and frequencies that ``embtables.plan`` would not take.
        """
        if self.served or self.store.device.type == "meta":
            raise ValueError(
                "served tables and those on the meta device take no weights over: EmbeddingTables(plan) does"
            )
        own = checked_weights(self.plan.tables, weights, self.store.device)
        counts = checked_counts(self.plan.tables, frequencies)
        groups = [g for g in self.plan.groups if any(table.name in own for table in g.group.tables)]
        # To leave the inference mode switches gradients on.
        with torch.inference_mode(False), torch.no_grad(), without_autocast(self.store.device):
            # Those that share storage with these stay as near to what they are as they can.
            others = {name: self.to_dense(name) for g in groups for name in shared_with(g, own)}
            kept = {*keep(groups, self.store, own | others, counts)}
            kept |= {*fit(self.store, self.lookups.blocks, own | others, counts, copied=kept)}
        if self.store.rounding is not None:
            self.fake_quantize()
        served = self.serve().lookups.blocks
        return {name: share_kept(served, name, own[name], counts.get(name)) for name in own if name in kept}

    # ---- reading -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def to_dense(self, table: str, rows: slice = slice(None)) -> Tensor:
        """The equivalent full table ``[n, D]``, or some of its rows: what ``forward`` gives for these ids.

        Bit for bit, but for products of matrices (low_rank, …): their last bit depends on how many rows there are.

        Raises:
            ValueError: for an unknown table, or one without ``num_embeddings``.
        """
        block, number = block_of(self.lookups.blocks, table)
        dense = dense_rows(block, number, rows)
        for stage in self.stages:
            dense[:, stage.shows.get(table, dense.shape[1]) :] = 0
        return dense

    @torch.no_grad()
    def collision_share(self, table: str) -> float:
        """Share of a table's ids that have their whole address, and so their vector, in common with another id."""
        return share_of_collisions(*block_of(self.lookups.blocks, table))

    def memory(self) -> Memory:
        """Bytes, taken from the storages that exist: of the served form, if that is what this module holds."""
        return memory_of(self)

    # ---- saving, loading ------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Writes the served form: one safetensors file, its tensors the plan's inference bytes, the plan inside.

        Weights keep the precision that they have: after ``half()`` the file takes half of that, and ``load`` gives
        tables of half precision.
        """
        served = self.serve()
        write_file(path, served.store, served.lookups.blocks, self.plan)

    @classmethod
    @torch.no_grad()
    def load(
        cls, path: Path | str, device: torch.device | str | None = None, *, verify: bool = False
    ) -> EmbeddingTables:
        """Opens what ``save`` wrote: served tables, for inference, without gradients or optimizer state.

        On the CPU the file is mapped into memory, so that tables of any size are there in milliseconds: nothing is
        copied, lookups read the rows that they need, and processes that load one file share what they have read of it.
        The file may be replaced by another one, as ``save`` does it, but must not be written over while it is in use.
        Who writes into the tables, or casts them, does so in memory of their own; the file stays as it is.

        Args:
            path: of the file.
            device: where the tables are to be; other devices than the CPU get a copy.
            verify: whether all of the file is read first and compared with the checksum in it, and codes are checked
                one by one. Without it only the header, the plan and all sizes are: a lookup of damaged contents gives
                wrong vectors or an ``IndexError``, and reads nothing outside of the tables.

        Raises:
            FileNotFoundError: where there is no such file.
            ValueError: naming the file, where it is damaged or no such file.
        """
        with reading_file(path, verify=verify) as (plan, tensors):
            tables = cls._served_with(plan, tensors, device)
            if verify:
                check_codes(tables.lookups.blocks, tensors)
            tables.to(dtype_of(tensors, tables.store))
        return tables.eval()

    # ---- state dict ----------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The plan's fingerprint, so that no weights load under other addresses; a tensor for ``weights_only``."""
        return torch.frombuffer(bytearray(self.plan.fingerprint), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ``ValueError`` where a state dict is that of another plan, whose rows mean other ids."""
        if not isinstance(state, Tensor) or bytes(state.cpu().tolist()) != self.plan.fingerprint:
            raise ValueError(
                "this state dict belongs to another plan (other tables, sizes, methods or hash_seed): "
                "its rows mean other ids"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *arguments: Any
    ) -> None:
        if (state := state_dict.get(f"{prefix}_extra_state")) is not None:
            self.set_extra_state(state)  # before anything that only another plan would explain
        store = f"{prefix}store."
        given = {name.removeprefix(store): t for name, t in state_dict.items() if name.startswith(store)}
        check_codes(self.lookups.blocks, given)
        if self.served and any(name.startswith("weight_") and name not in self.store.weight_names for name in given):
            raise ValueError(
                "these tables are served in other formats than this state of trained ones: "
                "load it into EmbeddingTables(plan), and serve() that"
            )
        device = next((t.device for t in given.values() if isinstance(t, Tensor)), self.store.device)
        if metadata.get("assign_to_params_buffers") and self.store.device.type == "meta" != device.type:
            # What is assigned brings its device along; what no state dict holds has to be there too.
            with torch.inference_mode(False), torch.no_grad():
                self.store.leave_meta(device)
                self._build(self.store)
        self._load_rounding(state_dict, f"{store}rounding.")
        super()._load_from_state_dict(state_dict, prefix, metadata, *arguments)

    def _load_rounding(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Notes what is to be done about rounding once the rows are loaded, by ``_take_up_rounding``."""
        self._rounding_to_load = None  # a load that was refused may have left some
        given = {name: t for name, t in state_dict.items() if name.startswith(prefix)}
        if self.store.rounding is None:
            self._rounding_to_load = {name.removeprefix(prefix): state_dict.pop(name) for name in given} or None
            return
        own = self.store.rounding.state_dict(prefix=prefix)
        lacking = {name: own[name] for name in own.keys() - given.keys()}
        state_dict.update(lacking)
        if lacking.keys() - {f"{prefix}on"}:  # which states of older releases have not
            self._rounding_to_load = {}

    def extra_repr(self) -> str:
        method = ", ".join(g.method.kind for g in self.plan.groups)
        return f"{len(self.plan.tables)} tables, {method}, {self.plan.inference_bytes:,} bytes served"


@torch.no_grad()
def _take_up_rounding(module: nn.Module, incompatible: object) -> None:
    """Rounds as the tables did whose state was loaded; where it does not say, as these did, by scales of its rows."""
    assert isinstance(module, EmbeddingTables)
    given, module._rounding_to_load = module._rounding_to_load, None
    if given is None or module.served or any(module.store.tensor(name).is_meta for name in module.store.weight_names):
        return
    module.fake_quantize()
    if given and module.store.rounding is not None:
        module.store.rounding.load_state_dict(given, strict="on" in given)
