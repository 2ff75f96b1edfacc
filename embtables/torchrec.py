"""The tables as torchrec sees them: ``KeyedJaggedTensor`` in, ``KeyedTensor`` out.

torchrec's annotations are repeated as they stand (``List``, ``Optional``), since its signature comparison is exact.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtables.budget import Budget
from embtables.config import TableConfig
from embtables.layout import FULL
from embtables.optimizers import FusedOptimizer
from embtables.plan import MethodLike, plan
from embtables.tables import EmbeddingTables

try:
    from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
    from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
    from torchrec.sparse.tensor_dict import maybe_td_to_kjt
except (ImportError, OSError) as error:
    # OSError: fbgemm's CUDA build on a host without a driver.
    raise ImportError(
        f"embtables.torchrec needs torchrec with a working fbgemm-gpu, which cannot be imported here ({error}). "
        "On a host without a GPU, with torch 2.13: pip install --force-reinstall --no-deps fbgemm-gpu-cpu==1.8.0 "
        "torchrec==1.8.0 && pip install 'embtables[torchrec]'"
    ) from error

_POOLING = {PoolingType.SUM: "sum", PoolingType.MEAN: "mean"}
# What torchrec is told of a table that takes any 64-bit id.
_ANY_ID = 2**63 - 1


class EmbeddingBagCollection(EmbeddingBagCollectionInterface):
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

    With all tables stored in full the state dict has the stock collection's keys, ``embedding_bags.<table>.weight``.

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
        solved = plan(
            [_table_config(config) for config in tables],
            method,
            budget,
            frequencies=frequencies,
            optimizer=optimizer,
            hash_seed=hash_seed,
        )
        configs = []
        for config in tables:
            config = copy.copy(config)
            config.feature_names = list(config.feature_names) or [config.name]
            configs.append(config)
        self._hold(EmbeddingTables(solved, seed=seed, device=device), configs, is_weighted)

    @classmethod
    def of(cls, tables: EmbeddingTables, is_weighted: bool = False) -> "EmbeddingBagCollection":
        """A view of existing tables, which stay shared: training one trains the other."""
        collection = cls.__new__(cls)
        nn.Module.__init__(collection)
        collection._hold(tables, [_bag_config(table) for table in tables.plan.tables], is_weighted)
        return collection

    def _hold(self, tables: EmbeddingTables, configs: Sequence[EmbeddingBagConfig], is_weighted: bool) -> None:
        self.tables = tables
        self._configs = list(configs)
        self._is_weighted = is_weighted
        self.register_state_dict_post_hook(_write_stock_keys)
        self.register_load_state_dict_pre_hook(_read_stock_keys)

    def forward(
        self,
        features: KeyedJaggedTensor,
    ) -> KeyedTensor:
        """Pooled vectors of all features; see the class for keys and shapes."""
        given = maybe_td_to_kjt(features, None)
        inverse = given.inverse_indices_or_none()
        features = self._own_features(given)
        if self._is_weighted and features.weights_or_none() is None:
            raise ValueError("this collection is weighted, but the input has no weights")
        pooled = self.tables(
            features.values(),
            _uniform_offsets(features, expandable=inverse is not None),
            features.weights() if self._is_weighted else None,
        )
        if inverse is not None:
            pooled = self._expand(pooled, *inverse)
        return KeyedTensor(self.tables.output_names, self.tables.embedding_dims, pooled)

    def _own_features(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The features of these tables, in their order."""
        keys, wanted = features.keys(), self.tables.feature_names
        if keys == wanted:
            return features
        position = {key: i for i, key in enumerate(keys)}
        for feature in wanted:
            if feature not in position:
                raise KeyError(f"the input lacks the feature '{feature}'; it holds {', '.join(keys) or 'none'}")
        return features.permute([position[feature] for feature in wanted])

    def _expand(self, pooled: Tensor, keys: Sequence[str], inverse: Tensor) -> Tensor:
        """The whole batch from each feature's distinct bags; ``inverse`` ``[F, B]`` says which is whose."""
        row = {key: i for i, key in enumerate(keys)}
        outputs = pooled.split(self.tables.embedding_dims, dim=1)
        features = [feature for config in self._configs for feature in config.feature_names]
        return torch.cat([v.index_select(0, inverse[row[f]]) for v, f in zip(outputs, features)], dim=1)

    def embedding_bag_configs(
        self,
    ) -> List[EmbeddingBagConfig]:
        """The logical tables."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether the ids' weights in the input are used."""
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.tables.store.device

    def reset_parameters(self) -> None:
        """Initializes all weights anew; on the meta device there is nothing to do yet."""
        self.tables.reset_parameters()


def _uniform_offsets(features: KeyedJaggedTensor, expandable: bool) -> Tensor:
    """Offsets ``[F·B + 1]`` of the bags; features with fewer bags than others end in empty ones."""
    if not features.variable_stride_per_key():
        return features.offsets()
    strides = features.stride_per_key()
    if not expandable and len(set(strides)) > 1:
        raise ValueError(
            f"the features have different batch sizes ({', '.join(map(str, strides))}) and the input has no "
            "inverse_indices that say how to expand them"
        )
    lengths = [F.pad(n, (0, max(strides) - n.numel())) for n in features.lengths().split(strides)]
    return F.pad(torch.cat(lengths).cumsum(0), (1, 0))


def _table_config(config: EmbeddingBagConfig) -> TableConfig:
    if config.data_type != DataType.FP32:
        raise ValueError(
            f"table '{config.name}': data_type {config.data_type.name} is not supported, only FP32; "
            "to save bytes choose a method and a budget"
        )
    if config.pooling not in _POOLING:
        raise ValueError(f"table '{config.name}': pooling {config.pooling} yields no pooled vectors; use SUM or MEAN")
    return TableConfig(
        config.name,
        config.num_embeddings,
        config.embedding_dim,
        tuple(config.feature_names),
        pooling="mean" if config.pooling == PoolingType.MEAN else "sum",
        init_fn=config.init_fn,
    )


def _bag_config(table: TableConfig) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=table.name,
        num_embeddings=_ANY_ID if table.num_embeddings is None else table.num_embeddings,
        embedding_dim=table.embedding_dim,
        feature_names=list(table.feature_names),
        pooling=PoolingType.MEAN if table.pooling == "mean" else PoolingType.SUM,
        init_fn=table.init_fn,
    )


# ---- the stock state-dict keys, for tables stored in full ------------------------------------------------------------


def _all_full(tables: EmbeddingTables) -> bool:
    return all(entry.variant == FULL for g in tables.plan.groups for entry in g.layout.entries.values())


def _stored_weights(tables: EmbeddingTables) -> dict[str, list[str]]:
    """The tables whose rows make up each of the store's weights, in their order."""
    by_weight: dict[str, list[str]] = {}
    for name, slab in tables.store.named_slabs():
        by_weight.setdefault(f"tables.store.weight_{slab.shape[1]}", []).append(name)
    return by_weight


def _write_stock_keys(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    assert isinstance(module, EmbeddingBagCollection)
    if not _all_full(module.tables):
        return
    del state[f"{prefix}tables._extra_state"]
    for key, names in _stored_weights(module.tables).items():
        weights = state.pop(prefix + key).split([module.tables.store.slab(name).shape[0] for name in names])
        state.update({f"{prefix}embedding_bags.{name}.weight": w for name, w in zip(names, weights)})


def _read_stock_keys(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    assert isinstance(module, EmbeddingBagCollection)
    if not _all_full(module.tables):
        return
    state[f"{prefix}tables._extra_state"] = module.tables.get_extra_state()
    for key, names in _stored_weights(module.tables).items():
        weights = []
        for name in names:
            stock_key = f"{prefix}embedding_bags.{name}.weight"
            own = module.tables.store.slab(name)
            weight = state.pop(stock_key, None)
            if weight is None:
                missing.append(stock_key)
            elif weight.shape != own.shape:
                errors.append(
                    f"size mismatch for {stock_key}: it has shape {tuple(weight.shape)}, the table {tuple(own.shape)}"
                )
                weight = None
            weights.append(own if weight is None else weight)
        state[prefix + key] = torch.cat(weights)
