"""Pooled vectors: what takes the place of ``torchrec.EmbeddingBagCollection``."""

from collections.abc import Mapping, Sequence
from typing import Any, List, Optional

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from embtables.config import Pooling, TableConfig
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

_POOLING: dict[PoolingType, Pooling] = {PoolingType.SUM: "sum", PoolingType.MEAN: "mean"}


class EmbeddingBagCollection(Collection[EmbeddingBagConfig], EmbeddingBagCollectionInterface):
    """Takes the place of ``torchrec.EmbeddingBagCollection``, with the tables stored by any method.

    Models see *logical* tables: ``embedding_bag_configs()`` and the outputs are those of the stock collection, whatever
    is stored. ``self.tables`` is the ``EmbeddingTables`` underneath.

    Args:
        tables: torchrec's configs; ``init_fn`` and ``weight_init_min/max`` are honored. fp32 only. Not modified.
        is_weighted: whether the ids' weights in the input multiply their vectors.
        device: where to allocate; on ``"meta"`` nothing is, until ``to_empty`` and ``reset_parameters``.
        method: as in ``embtables.plan``: a method, its name, or a mapping from patterns of table names to these.
        budget: inference bytes for all tables together, as in ``embtables.plan``.
        optimizer: a fused optimizer, updated inside backward, or ``None`` for ordinary parameters.
        frequencies: ``{table name: counts}``, as in ``embtables.plan``.
        hash_seed: seed of all hashes.
        seed: of the initial weights, where ``init_fn`` does not set them.

    Shapes, with F features, batch size B and dimension D: the input is a ``KeyedJaggedTensor`` whose keys hold the
    features in any order, among others; the output a ``KeyedTensor`` ``[B, ΣD]`` whose keys are the features in the
    order of the tables, ``feature@table`` where two tables have a feature. An empty bag gives zeros.

    With all tables stored in full the state dict has the stock collection's keys, ``embedding_bags.<table>.weight``,
    and with ``optimizer=None`` so have ``named_parameters()``: each table is a parameter of its own. These belong to
    ``embedding_bags``, and ``tables.parameters()`` does not list them. ``embedding_bags[<table>].weight`` raises
    ``AttributeError`` where the table is stored in another way or updated by a fused optimizer. As soon as one table is
    stored in another way, the parameters and the state dict of all tables have the names of the storage, such as
    ``tables.store.weight_<D>``, which several tables share.

    torchrec's planner, ``DistributedModelParallel`` and ``quantize_embeddings`` pass this module by: it is replicated
    like the dense part, and every process has to plan with the same arguments.

    A symbolic trace holds the lookup as one node. TorchScript is not supported.

    Raises:
        ValueError: for two tables of one name, a ``data_type`` other than fp32, ``PoolingType.NONE``, and whatever
            ``embtables.plan`` refuses.
        KeyError: in ``forward``, naming a feature that the input lacks.
        IndexError: in ``forward``, for an id out of range, naming feature and id.

    Example::

        tables = [EmbeddingBagConfig(name="user", num_embeddings=1_000_000, embedding_dim=16, feature_names=["user"])]
        ebc = EmbeddingBagCollection(tables, method="hash", budget="10%")
        features = KeyedJaggedTensor.from_lengths_sync(["user"], torch.tensor([3, 7, 7]), torch.tensor([1, 0, 2]))
        ebc(features).values()    # [3, 16]
    """

    stock_name = "embedding_bags"

    def __init__(
        self,
        tables: List[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: Optional[torch.device] = None,
        *,
        method: MethodLike | Mapping[str, MethodLike] = "full",
        budget: Budget | None = None,
        optimizer: str | dict[str, Any] | FusedOptimizer | None = None,
        frequencies: Mapping[str, Any] | None = None,
        hash_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        logical = [table_config(config, _pooling(config)) for config in tables]
        built = build_tables(logical, method, budget, frequencies, optimizer, hash_seed, seed, device)
        self.hold(built, filled(tables), own=True)
        self._is_weighted = is_weighted

    @classmethod
    def of(
        cls, tables: EmbeddingTables, is_weighted: bool = False, features: Sequence[str] | None = None
    ) -> "EmbeddingBagCollection":
        """A view of existing tables, which stay shared: training one trains the other.

        The tables' parameters stay what they are, since an optimizer may hold them: ``tables.store.weight_<D>``, also
        where the state dict has the stock collection's keys. A view of another collection's ``tables`` has its
        parameters by table, as that has. Each view's own ``train()`` or ``eval()``, and with a fused optimizer its own
        ``requires_grad_()``, says whether its lookups are regularized and update the tables.

        Args:
            tables: what is looked up in.
            is_weighted: whether the ids' weights in the input multiply their vectors.
            features: which features of the tables it reads; all by default. See ``EmbeddingCollection`` for a target
                and its history.
        """
        configs = [_bag_config(table, own) for table, own in shown_features(tables, features)]
        collection = cls.__new__(cls)
        nn.Module.__init__(collection)
        collection.hold(tables, configs)
        collection._is_weighted = is_weighted
        return collection

    def forward(
        self,
        features: KeyedJaggedTensor,
    ) -> KeyedTensor:
        """Pooled vectors of all features; see the class for keys and shapes."""
        pooled = _look_up(self.tables, self.shown, features, self._is_weighted)
        return KeyedTensor(self.shown.output_names, self.shown.output_dims, pooled)

    def embedding_bag_configs(
        self,
    ) -> List[EmbeddingBagConfig]:
        """The logical tables."""
        return self.configs

    def is_weighted(self) -> bool:
        """Whether the ids' weights in the input are used."""
        return self._is_weighted


@torch.fx.wrap
def _look_up(tables: EmbeddingTables, shown: Shown, features: KeyedJaggedTensor, is_weighted: bool) -> Tensor:
    """Pooled vectors ``[B, ΣD]``. In a symbolic trace it is one node, which holds both modules."""
    given = maybe_td_to_kjt(features, None)
    inverse = given.inverse_indices_or_none()
    if is_weighted and given.weights_or_none() is None:
        raise ValueError("this collection is weighted, but the input has no weights")
    if given.values().is_meta or not shown.output_dims:
        batch = given.stride() if inverse is None else inverse[1].shape[1]
        return given.values().new_empty(batch, sum(shown.output_dims), dtype=FLOAT)
    features = shown.own_features(given)
    if inverse is None:
        _check_batch_sizes(features)
    offsets = shown.offsets(features)
    weights = features.weights() if is_weighted else None
    if shown.reads_all:
        pooled = tables(features.values(), offsets, weights, training=shown.learns)
    else:
        found = tables.lookup(features.values(), offsets, weights, training=shown.learns)
        pooled = torch.cat([found[name] for name in shown.output_names], dim=1)
    return pooled if inverse is None else _expand(shown, pooled, *inverse)


def _expand(shown: Shown, pooled: Tensor, keys: Sequence[str], inverse: Tensor) -> Tensor:
    """The whole batch from each feature's distinct bags; ``inverse`` ``[F, B]`` says which is whose."""
    row = {key: i for i, key in enumerate(keys)}
    outputs = pooled.split(shown.output_dims, dim=1)
    return torch.cat([v.index_select(0, inverse[row[f]]) for v, f in zip(outputs, shown.output_features)], dim=1)


def _check_batch_sizes(features: KeyedJaggedTensor) -> None:
    if features.variable_stride_per_key() and len(set(features.stride_per_key())) > 1:
        raise ValueError(
            f"the features have different batch sizes ({', '.join(map(str, features.stride_per_key()))}) and the input "
            "has no inverse_indices that say how to expand them"
        )


def _pooling(config: EmbeddingBagConfig) -> Pooling:
    if config.pooling not in _POOLING:
        raise ValueError(f"table '{config.name}': pooling {config.pooling} yields no pooled vectors; use SUM or MEAN")
    return _POOLING[config.pooling]


def _bag_config(table: TableConfig, features: Sequence[str]) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=table.name,
        num_embeddings=ANY_ID if table.num_embeddings is None else table.num_embeddings,
        embedding_dim=table.embedding_dim,
        feature_names=list(features),
        pooling=PoolingType.MEAN if table.pooling == "mean" else PoolingType.SUM,
        init_fn=table.init_fn,
    )
