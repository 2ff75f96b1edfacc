"""Unpooled vectors: what takes the place of ``torchrec.EmbeddingCollection``."""

from collections.abc import Mapping, Sequence
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollectionInterface, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from embtables.config import TableConfig
from embtables.faces.torchrec.shared import (
    ANY_ID,
    FLOAT,
    Collection,
    Shown,
    build_tables,
    filled,
    shown_features,
    table_config,
)
from embtables.optimizers import FusedOptimizer
from embtables.plan.solver import MethodLike
from embtables.sizes.budget import Budget
from embtables.tables import EmbeddingTables


class EmbeddingCollection(Collection[EmbeddingConfig], EmbeddingCollectionInterface):
    """Takes the place of ``torchrec.EmbeddingCollection``, with the tables stored by any method.

    Models see *logical* tables: ``embedding_configs()`` and the outputs are those of the stock collection, whatever is
    stored. ``self.tables`` is the ``EmbeddingTables`` underneath.

    Args:
        tables: torchrec's configs; ``init_fn`` and ``weight_init_min/max`` are honored. fp32 only, and one
            ``embedding_dim``, as torchrec has it. Not modified.
        device: where to allocate; on ``"meta"`` nothing is, until ``to_empty`` and ``reset_parameters``.
        need_indices: whether each output holds the ids as its ``weights()``.
        use_gather_select: of torchrec's sharded collection; kept and reported, without effect, as by the stock one.
        use_gather_select_per_sharding: likewise.
        method: as in ``embtables.plan``: a method, its name, or a mapping from patterns of table names to these.
        budget: inference bytes for all tables together, as in ``embtables.plan``.
        optimizer: a fused optimizer, updated inside backward, or ``None`` for ordinary parameters.
        frequencies: ``{table name: counts}``, as in ``embtables.plan``.
        hash_seed: seed of all hashes.
        seed: of the initial weights, where ``init_fn`` does not set them.

    Shapes, with dimension D: the input is a ``KeyedJaggedTensor`` whose keys hold the features in any order, among
    others; the output a dict of ``JaggedTensor``s, ``[N_f, D]`` for the N_f ids of feature f. Its keys are the features
    in the order of the tables, ``feature@table`` where two tables have a feature. Weights in the input are not used,
    and features may have different batch sizes; ``inverse_indices`` are the caller's to apply, as with the stock one.

    With all tables stored in full the state dict has the stock collection's keys, ``embeddings.<table>.weight``, and
    with ``optimizer=None`` so have ``named_parameters()``: each table is a parameter of its own. These belong to
    ``embeddings``, and ``tables.parameters()`` does not list them. ``embeddings[<table>].weight`` raises
    ``AttributeError`` where the table is stored in another way or updated by a fused optimizer. As soon as one table is
    stored in another way, the parameters and the state dict of all tables have the names of the storage, such as
    ``tables.store.weight_<D>``, which several tables share.

    torchrec's planner, ``DistributedModelParallel`` and ``quantize_embeddings`` pass this module by: it is replicated
    like the dense part, and every process has to plan with the same arguments.

    A symbolic trace holds the lookup as one node. TorchScript is not supported.

    Raises:
        ValueError: for two tables of one name, tables of different ``embedding_dim``, a ``data_type`` other than fp32,
            and whatever ``embtables.plan`` refuses.
        KeyError: in ``forward``, naming a feature that the input lacks.
        IndexError: in ``forward``, for an id out of range, naming feature and id.

    Example::

        tables = [EmbeddingConfig(name="item", num_embeddings=1_000_000, embedding_dim=16, feature_names=["history"])]
        ec = EmbeddingCollection(tables, method="hash", budget="10%")
        features = KeyedJaggedTensor.from_lengths_sync(["history"], torch.tensor([3, 7, 7]), torch.tensor([1, 0, 2]))
        ec(features)["history"].values()    # [3, 16]

    A target and its history in one table, the target pooled, the history as it is, both trained together::

        items = TableConfig("item", 1_000_000, 16, feature_names=["target", "history"])
        tables = EmbeddingTables(plan([items], "hash", budget="10%", optimizer=None))
        targets = EmbeddingBagCollection.of(tables, features=["target"])
        histories = EmbeddingCollection.of(tables, features=["history"])
    """

    stock_name = "embeddings"

    def __init__(
        self,
        tables: List[EmbeddingConfig],
        device: Optional[torch.device] = None,
        need_indices: bool = False,
        use_gather_select: bool = False,
        use_gather_select_per_sharding: Optional[Dict[str, bool]] = None,
        *,
        method: MethodLike | Mapping[str, MethodLike] = "full",
        budget: Budget | None = None,
        optimizer: str | dict[str, Any] | FusedOptimizer | None = None,
        frequencies: Mapping[str, Any] | None = None,
        hash_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        logical = [table_config(config, "sum") for config in tables]
        _check_one_dimension(logical)
        built = build_tables(logical, method, budget, frequencies, optimizer, hash_seed, seed, device)
        self.hold(built, filled(tables), own=True)
        self._need_indices = need_indices
        self._use_gather_select = use_gather_select
        self._use_gather_select_per_sharding = use_gather_select_per_sharding

    @classmethod
    def of(
        cls, tables: EmbeddingTables, need_indices: bool = False, features: Sequence[str] | None = None
    ) -> "EmbeddingCollection":
        """A view of existing tables, which stay shared: training one trains the other.

        The tables' parameters stay what they are, since an optimizer may hold them: ``tables.store.weight_<D>``, also
        where the state dict has the stock collection's keys. A view of another collection's ``tables`` has its
        parameters by table, as that has. Each view's own ``train()`` or ``eval()``, and with a fused optimizer its own
        ``requires_grad_()``, says whether its lookups are regularized and update the tables.
        With a fused optimizer each view's ``forward`` is an update of its own; one view of all features makes one.

        Args:
            tables: what is looked up in.
            need_indices: whether each output holds the ids as its ``weights()``.
            features: which features of the tables it reads; all by default.
        """
        shown = shown_features(tables, features)
        _check_one_dimension([table for table, _ in shown])
        collection = cls.__new__(cls)
        nn.Module.__init__(collection)
        collection.hold(tables, [_config(table, own) for table, own in shown])
        collection._need_indices = need_indices
        collection._use_gather_select = False
        collection._use_gather_select_per_sharding = None
        return collection

    def forward(
        self,
        features: KeyedJaggedTensor,
    ) -> Dict[str, JaggedTensor]:
        """The vectors of all features' ids; see the class for keys and shapes."""
        vectors, lengths, ids = _look_up(self.tables, self.shown, features)
        return {
            name: JaggedTensor(values=vectors[i], lengths=lengths[i], weights=ids[i] if self._need_indices else None)
            for i, name in enumerate(self.shown.output_names)
        }

    def embedding_configs(
        self,
    ) -> List[EmbeddingConfig]:
        """The logical tables."""
        return self.configs

    def need_indices(self) -> bool:
        """Whether each output holds the ids as its ``weights()``."""
        return self._need_indices

    def embedding_dim(self) -> int:
        """D, of all tables; −1 without tables, as torchrec has it."""
        return self.shown.output_dims[0] if self.shown.output_dims else -1

    def embedding_names_by_table(self) -> List[List[str]]:
        """The keys of the outputs, table by table."""
        names: list[list[str]] = get_embedding_names_by_table(self.configs)
        return names

    def use_gather_select(self) -> bool:
        """As the constructor was told."""
        return self._use_gather_select

    def use_gather_select_per_sharding(self) -> Optional[Dict[str, bool]]:
        """As the constructor was told."""
        return self._use_gather_select_per_sharding


@torch.fx.wrap
def _look_up(
    tables: EmbeddingTables, shown: Shown, features: KeyedJaggedTensor
) -> Tuple[List[Tensor], List[Tensor], List[Tensor]]:
    """The vectors, lengths and ids of each output. In a symbolic trace it is one node, which holds both modules."""
    given = maybe_td_to_kjt(features, None)
    if given.values().is_meta:
        by_key = given.to_dict()
        used = [by_key[feature] for feature in shown.output_features]
        empty = [f.values().new_empty(len(f.values()), dim, dtype=FLOAT) for f, dim in zip(used, shown.output_dims)]
        return empty, [f.lengths() for f in used], [f.values() for f in used]
    features = shown.own_features(given)
    if not shown.output_dims:
        return [], [], []
    lengths = shown.lengths(features)
    found = tables.lookup(features.values(), shown.offsets(features), pooling=None, training=shown.learns)
    vectors = [found[name] for name in shown.output_names]
    sizes = {feature: len(v) for v, feature in zip(vectors, shown.output_features)}
    ids = dict(zip(shown.features, features.values().split([sizes[feature] for feature in shown.features])))
    return vectors, [lengths[f] for f in shown.output_features], [ids[f] for f in shown.output_features]


def _check_one_dimension(tables: Sequence[TableConfig]) -> None:
    for table in tables:
        if table.embedding_dim != tables[0].embedding_dim:
            raise ValueError(
                f"an EmbeddingCollection has one embedding_dim, but table '{tables[0].name}' has "
                f"{tables[0].embedding_dim} and table '{table.name}' {table.embedding_dim}"
            )


def _config(table: TableConfig, features: Sequence[str]) -> EmbeddingConfig:
    return EmbeddingConfig(
        name=table.name,
        num_embeddings=ANY_ID if table.num_embeddings is None else table.num_embeddings,
        embedding_dim=table.embedding_dim,
        feature_names=list(features),
        init_fn=table.init_fn,
    )
