"""One table under the shapes of ``torch.nn``: ``Embedding`` and ``EmbeddingBag``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from embtables._util.numbers import as_int
from embtables.config import OutOfRange, Pooling, TableConfig
from embtables.faces.view import View
from embtables.lookup.inputs import Input
from embtables.optimizers import FusedOptimizer
from embtables.plan.solver import MethodLike, plan
from embtables.sizes.budget import Budget
from embtables.sizes.layout import FULL
from embtables.tables import EmbeddingTables


def stored_in_full(tables: EmbeddingTables, name: str) -> bool:
    """Whether a table has a row of fp32 of its own for each id, which is then the slab of its name."""
    entries = (entry for g in tables.plan.groups if (entry := g.layout.entries.get(name)) is not None)
    in_full = any(entry.variant == FULL for entry in entries)
    return in_full and tables.store.is_plain(tables.store.weight_of(name))


def trained_weight(tables: EmbeddingTables, name: str) -> Tensor:
    """The parameter that is a table, or the part of one that is.

    Raises:
        AttributeError: where the table is not stored in full, or no optimizer of torch trains it.
    """
    store, instead = tables.store, "to_dense() gives the vectors of all ids"
    if not stored_in_full(tables, name):
        raise AttributeError(f"table '{name}' is not stored in full, so it has no weight; {instead}")
    weight = store.parameter(name)
    if weight is None:
        why = "its fused optimizer updates it inside backward" if store.optimizer else "it is served, not trained"
        raise AttributeError(f"table '{name}' has no weight to train, since {why}; {instead}")
    return weight


class _OneTable(View):
    """A table of an ``EmbeddingTables``, which other modules may share."""

    weight: Tensor

    def _hold(self, tables: EmbeddingTables, name: str) -> None:
        configs = {table.name: table for table in tables.plan.tables}
        if name not in configs:
            raise ValueError(f"there is no table '{name}'; the tables: {', '.join(configs)}")
        config = configs[name]
        self.tables, self.name = tables, name
        self.num_embeddings, self.embedding_dim = config.num_embeddings, config.embedding_dim
        self.padding_idx = config.padding_idx
        self.sparse = tables.store.sparse
        tables.view(name)  # made now, since no graph can make it
        self._clear_padding()

    @classmethod
    def of(cls, tables: EmbeddingTables, name: str) -> Self:
        """A view of a table of existing tables, which stay shared: training one trains the other.

        Raises:
            ValueError: for a name that is not among the tables.
        """
        view = cls.__new__(cls)
        nn.Module.__init__(view)
        view._hold(tables, name)
        return view

    # ---- looking up ----------------------------------------------------------------------------------------------

    def _check_ids(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
            kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"the ids of table '{self.name}' must be an int32 or int64 tensor, not {kind}")
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                f"DataParallel copies table '{self.name}' to other devices without its addresses: "
                "use DistributedDataParallel, or one device"
            )

    def _look_up(self, given: Input, mode: Pooling | None) -> Tensor:
        """The output: pooled ``[B, D]``, or ``[N, D]`` of ids ``[N, 1]``."""
        tables = self.tables
        lookup, steps = tables.view(self.name)
        trains = tables.trains(self.learns)
        with steps.step(tables.store, trains, tables.stages, shared=len(tables.plan.tables) > 1) as step:
            output = lookup.side_by_side(given, (mode,), step)
        # Graphs cannot wait for a backward; they need not where nobody counts steps.
        if trains and (tables.stages or tables.store.counts_steps):
            steps.await_backward(output)
        return output

    def to_dense(self, rows: slice = slice(None)) -> Tensor:
        """The equivalent full table ``[n, D]``, or some of its rows, without a gradient.

        Raises:
            ValueError: where ``num_embeddings`` is ``None``.
        """
        return self.tables.to_dense(self.name, rows)

    # ---- the weight ----------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        # No property: its AttributeError would be replaced by a plain one.
        return trained_weight(self.tables, self.name) if name == "weight" else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"table '{self.__dict__.get('name', '')}' is stored in .tables, so a new weight would not be used: "
                "fill the present one in place (.weight.data.copy_), where there is one"
            )
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Initializes the tables anew, all that share their storage, from their seed."""
        self.tables.reset_parameters()
        self._clear_padding()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """What modules of torch.nn saved, a ``weight``, is taken where the table is stored in full."""
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None:
            errors: list[str] = arguments[4]
            if not stored_in_full(self.tables, self.name):
                errors.append(
                    f"{prefix}weight: table '{self.name}' is not stored in full and in fp32, so it cannot take a weight"
                )
            elif weight.shape != (slab := self.tables.store.slab(self.name)[: self.num_embeddings]).shape:
                errors.append(f"size mismatch for {prefix}weight: {list(weight.shape)}, not {list(slab.shape)}")
            else:
                with torch.no_grad():
                    slab.copy_(weight)
            state_dict.update(self.tables.state_dict(prefix=f"{prefix}tables."))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @torch.no_grad()
    def _clear_padding(self) -> None:
        """Padding gives zeros whatever is stored; zeros are stored, so that ``weight`` says the same."""
        full, store = stored_in_full(self.tables, self.name), self.tables.store
        if full and self.padding_idx is not None and store.device.type != "meta":
            store.slab(self.name)[self.padding_idx] = 0

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


class Embedding(_OneTable):
    """Takes the place of ``nn.Embedding``, with the table stored by any method.

    ``weight`` is there only where the table is stored in full and trained by a ``torch.optim`` optimizer: it is then
    the very parameter, or the part of a parameter that holds this table. Elsewhere reading it raises
    ``AttributeError``, and ``to_dense`` gives the vectors. ``tables`` is the ``EmbeddingTables`` underneath;
    ``Embedding.of(tables, name)`` is a view of a table that others share. Each view's own ``train()`` or ``eval()``
    says whether its lookups are regularized and update the table.

    With a fused optimizer every call is an update of its own: a table looked up twice in a step is updated twice, each
    time by its own gradient, which for SGD is the same as once. Likewise ``tables.regularize`` acts once for each call.
    ``requires_grad_(False)`` of this module freezes its lookups, and only its own among those of views; that of a model
    around it walks ``parameters()``, where fused tables have none: ``EmbeddingTables`` says how to freeze a model.

    Args:
        num_embeddings: number of ids; ``None``: any 64-bit id, for methods that hash.
        embedding_dim: D.
        padding_idx: an id that yields zeros and receives no gradient; a negative one counts from the end.
        method: as in ``embtables.plan``.
        budget: inference bytes, as in ``embtables.plan``.
        optimizer: a fused optimizer, updated inside backward, or ``None`` for ordinary parameters.
        frequencies: how often each id occurs, ``[num_embeddings]``.
        on_out_of_range: what an id outside the range does, as in ``TableConfig``.
        sparse: with ``optimizer=None``, whether gradients are sparse (for SGD, Adagrad, SparseAdam).
        std: standard deviation of the initial vectors; 1/D by default, from where models that multiply vectors learn.
            That of ``nn.Embedding`` is 1, from where they hardly do.
        init_fn: fills the initial vectors in place instead, as in ``TableConfig``.
        seed: of the initial weights; by default one is drawn from PyTorch's generator, as ``nn.Embedding`` does.
        hash_seed: of the hashes.
        name: of the table, in messages and as a part of the hashes' seeds: tables of one name, size and ``hash_seed``
            have the same hashes, in all processes of a training too, so tables that stand side by side need names of
            their own.
        device: where to allocate.

    Shapes: ids, int32 or int64, ``[...]`` → vectors ``[..., D]``.

    Raises:
        ValueError: for what ``TableConfig`` and ``embtables.plan`` refuse.
        InfeasibleBudget: where the method cannot meet the budget.
        TypeError: in ``forward``, for ids that are not int32 or int64.
        IndexError: in ``forward``, for an id out of range, naming it.

    Example::

        item = Embedding(1_000_000, 16, padding_idx=0, method="hash", budget="10%")
        item(torch.tensor([[1, 2, 0]]))    # [1, 3, 16]
    """

    def __init__(
        self,
        num_embeddings: int | None,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        method: MethodLike = "full",
        budget: Budget | None = None,
        optimizer: str | dict[str, Any] | FusedOptimizer | None = None,
        frequencies: Any = None,
        on_out_of_range: OutOfRange = "error",
        sparse: bool = False,
        std: float | None = None,
        init_fn: Callable[[Tensor], object] | None = None,
        seed: int | None = None,
        hash_seed: int = 0,
        name: str = "embedding",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        padding_idx = _from_the_end(padding_idx, num_embeddings)
        table = TableConfig(
            name,
            num_embeddings,
            embedding_dim,
            padding_idx=padding_idx,
            on_out_of_range=on_out_of_range,
            init_fn=init_fn,
        )
        counts = None if frequencies is None else {name: frequencies}
        solved = plan([table], method, budget, counts, optimizer, hash_seed=hash_seed)
        std = 1 / embedding_dim if std is None else std
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        self._hold(EmbeddingTables(solved, seed=seed, device=device, std=std, sparse=sparse), name)

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, padding_idx: int | None = None, **options: Any
    ) -> Self:
        """An ``Embedding`` of vectors that are trained already, as that of ``nn.Embedding``.

        Args:
            embeddings: ``[num_embeddings, D]``, which are copied.
            freeze: whether they stay as they are.
            padding_idx: as of ``Embedding``.
            options: the other arguments of ``Embedding``.

        Raises:
            ValueError: for a tensor of another shape, and methods that cannot take trained vectors as they are.
        """
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 2:
            shape = list(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise ValueError(f"embeddings must be a tensor [num_embeddings, D], not {shape}")
        num_embeddings, embedding_dim = embeddings.shape
        module = cls(
            num_embeddings, embedding_dim, padding_idx, init_fn=lambda weight: weight.copy_(embeddings), **options
        )
        if not stored_in_full(module.tables, module.name):
            method = module.tables.plan.groups[0].method.kind
            raise ValueError(
                f"method {method} cannot take trained vectors as they are: use the method 'full', or train it anew"
            )
        return module.requires_grad_(False) if freeze else module

    def forward(self, input: Tensor) -> Tensor:
        """Vectors ``[..., D]`` of ids ``[...]``."""
        self._check_ids(input)
        vectors = self._look_up(Input(input.reshape(-1, 1)), None)
        return vectors.view(*input.shape, self.embedding_dim)


class EmbeddingBag(_OneTable):
    """Takes the place of ``nn.EmbeddingBag``: a view of one table, with the bags' vectors summed or averaged.

    What ``Embedding`` says of ``weight`` and of fused optimizers holds here too. ``EmbeddingBag.of(tables, name)`` is a
    view of a table that others share.

    Args:
        num_embeddings: as of ``Embedding``.
        embedding_dim: D.
        mode: ``"sum"`` or ``"mean"``, the default as in ``nn.EmbeddingBag``.
        include_last_offset: whether offsets end with the end of the last bag.
        padding_idx: as of ``Embedding``.
        options: the other arguments of ``Embedding``.

    Raises:
        ValueError: for another mode, and as ``Embedding``.

    Shapes: ids ``[B, N]``, or flat ``[M]`` with ``offsets`` ``[B]`` (``[B + 1]`` where ``include_last_offset``) →
    ``[B, D]``. ``per_sample_weights``, of the shape of the ids, for sums alone.
    """

    mode: Pooling
    include_last_offset: bool

    def __init__(
        self,
        num_embeddings: int | None,
        embedding_dim: int,
        *,
        mode: Pooling = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.mode, self.include_last_offset = _checked_mode(mode), include_last_offset
        table = Embedding(num_embeddings, embedding_dim, padding_idx, **options)
        self._hold(table.tables, table.name)

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        mode: Pooling = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        **options: Any,
    ) -> Self:
        """An ``EmbeddingBag`` of vectors that are trained already; see ``Embedding.from_pretrained``."""
        table = Embedding.from_pretrained(embeddings, False, padding_idx, **options)
        module = cls.of(table.tables, table.name, mode, include_last_offset)
        return module.requires_grad_(False) if freeze else module

    @classmethod
    def of(
        cls, tables: EmbeddingTables, name: str, mode: Pooling | None = None, include_last_offset: bool = False
    ) -> Self:
        """A view of a table of existing tables; ``mode`` is by default the table's own pooling."""
        view = super().of(tables, name)
        own: Pooling = next(table.pooling for table in tables.plan.tables if table.name == name)
        view.mode = own if mode is None else _checked_mode(mode)
        view.include_last_offset = include_last_offset
        return view

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Pooled vectors ``[B, D]``; an empty bag gives zeros.

        Raises:
            ValueError: for offsets or weights that do not fit.
            TypeError: for ids or offsets that are not int32 or int64.
        """
        bags = self._bags(input, offsets)
        if per_sample_weights is not None:
            if self.mode != "sum":
                raise ValueError(f"per_sample_weights are for mode 'sum', but table '{self.name}' has '{self.mode}'")
            if per_sample_weights.shape != input.shape:
                raise ValueError(
                    f"per_sample_weights have shape {tuple(per_sample_weights.shape)}, but ids {tuple(input.shape)}"
                )
            per_sample_weights = per_sample_weights.reshape(-1)
        self._check_ids(input)
        ids = input.reshape(-1)
        # Ids behind the last bag belong to none; whether there are any is data, at which a graph cannot look.
        may_rest = self.include_last_offset and offsets is not None
        rest = may_rest and torch.compiler.is_compiling()
        if may_rest and not rest and (end := int(bags[-1])) != ids.numel():
            # They are checked like all others, but no row may be updated for them.
            _check_bags(bags, ids.numel())
            self.tables.view(self.name)[0].check_range(ids[end:])
            ids = ids[:end]
            per_sample_weights = None if per_sample_weights is None else per_sample_weights[:end]
        try:
            return self._look_up(Input(ids, bags, per_sample_weights, rest), self.mode)
        except ValueError:
            _check_bags(bags, ids.numel())  # says it of the offsets as they were given, without an end of their own
            raise

    def _bags(self, ids: Tensor, offsets: Tensor | None) -> Tensor:
        """Offsets ``[B + 1]`` of the bags, the end of the last one included."""
        if ids.ndim == 2:
            if offsets is not None:
                raise ValueError("ids [B, N] are bags of N each, so offsets must be None")
            return torch.arange(ids.shape[0] + 1, device=ids.device) * ids.shape[1]
        if ids.ndim != 1 or offsets is None or offsets.ndim != 1:
            raise ValueError(f"ids must be [B, N], or flat with 1-D offsets; they have shape {tuple(ids.shape)}")
        if offsets.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"offsets must be int32 or int64, not {offsets.dtype}")
        bags = offsets.long() if self.include_last_offset else F.pad(offsets.long(), (0, 1), value=ids.numel())
        return bags if bags.numel() else _check_bags(bags, ids.numel())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"


def _from_the_end(padding_idx: Any, num_embeddings: Any) -> Any:
    """A negative index counts from the end, as in torch.nn; what is no integer is left for others to refuse."""
    index, count = as_int(padding_idx), as_int(num_embeddings)
    return index + count if index is not None and count is not None and -count <= index < 0 else padding_idx


def _checked_mode(mode: Any) -> Pooling:
    if mode not in get_args(Pooling):
        raise ValueError(f"mode must be one of {', '.join(get_args(Pooling))}, not {mode!r}")
    return cast(Pooling, mode)


def _check_bags(bags: Tensor, num_ids: int) -> Tensor:
    """The bags; raises ``ValueError`` for wrong ones, which unlike their shape is data."""
    if not bags.numel() or bags[0] != 0 or bags[-1] > num_ids or bool((bags.diff() < 0).any()):
        raise ValueError(f"offsets must rise from 0 to at most the number of ids, {num_ids}")
    return bags
