"""What both collections share: their configs, the features that they read, and torchrec's state-dict keys."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import Self

from embtables.config import Pooling, TableConfig
from embtables.faces.embedding import trained_weight
from embtables.faces.view import View
from embtables.formats import FP32, weight_name
from embtables.optimizers import FusedOptimizer, optimizer_from_config
from embtables.plan.solver import MethodLike, Plan, plan
from embtables.sizes.budget import Budget
from embtables.sizes.layout import FULL
from embtables.tables import EmbeddingTables

# What torchrec is told of a table that takes any 64-bit id.
ANY_ID = 2**63 - 1

# Of vectors that no table gives: on the meta device, and where there are no tables.
FLOAT = torch.float32

ConfigT = TypeVar("ConfigT", bound=BaseEmbeddingConfig)


class Shown(View):
    """The tables that a collection shows, the features that it reads, and the weight of each table by its name.

    It stands where the stock collection has its ``ModuleDict`` of tables. ``shown[name].weight`` is there where the
    table is stored in full and trained by a ``torch.optim`` optimizer; elsewhere reading it raises ``AttributeError``.

    Args:
        tables: what is looked up in. Whoever holds this module registers them.
        configs: the logical tables and the features of each that are read.
    """

    tables: EmbeddingTables

    def __init__(self, tables: EmbeddingTables, configs: Sequence[BaseEmbeddingConfig]) -> None:
        super().__init__()
        # Not a submodule, since the collection has the tables as its own.
        self.__dict__["tables"] = tables
        self.table_names = [config.name for config in configs]
        weights = tables.store.slab_modules
        # Not by ``add_module``, which refuses the names of attributes; a table may have any name.
        self._modules.update({table.name: weights[table.name] for table in tables.plan.tables if weights})
        read = {feature for config in configs for feature in config.feature_names}
        self.features = [feature for feature in tables.feature_names if feature in read]
        self.reads_all = len(self.features) == len(tables.feature_names)
        uses = [(t, feature) for t in tables.plan.tables for feature in t.feature_names]
        shown = [i for i, (_, feature) in enumerate(uses) if feature in read]
        self.output_names = [tables.output_names[i] for i in shown]
        self.output_features = [uses[i][1] for i in shown]
        self.output_dims = [tables.embedding_dims[i] for i in shown]

    # ---- the features of an input --------------------------------------------------------------------------------

    def own_features(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The features that are read here, in the order of the tables'."""
        keys = features.keys()
        if keys == self.features:
            return features
        position = {key: i for i, key in enumerate(keys)}
        for feature in self.features:
            if feature not in position:
                raise KeyError(f"the input lacks the feature '{feature}'; it holds {', '.join(keys) or 'none'}")
        return features.permute([position[feature] for feature in self.features])

    def offsets(self, features: KeyedJaggedTensor) -> Tensor:
        """Offsets ``[F·B + 1]`` for all features of the tables; those that are not read have empty bags.

        So have the last examples of a feature with fewer bags than others.
        """
        if self.reads_all and not features.variable_stride_per_key():
            return features.offsets()
        lengths = self.lengths(features)
        batch = max(n.numel() for n in lengths.values())
        none = features.lengths().new_zeros(batch)
        padded = [F.pad(n, (0, batch - n.numel())) for n in (lengths.get(f, none) for f in self.tables.feature_names)]
        return F.pad(torch.cat(padded).cumsum(0), (1, 0))

    def lengths(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        """How many ids each bag of each feature holds."""
        varying = features.variable_stride_per_key()
        strides = features.stride_per_key() if varying else [features.stride()] * len(self.features)
        return dict(zip(self.features, features.lengths().split(strides)))

    # ---- the weights by table ------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self.table_names:
            raise KeyError(f"there is no table '{name}'; the tables: {', '.join(self.table_names)}")
        own = self._modules.get(name)
        return _Table(self.tables, name) if own is None else own

    def __iter__(self) -> Iterator[str]:
        return iter(self.table_names)

    def __len__(self) -> int:
        return len(self.table_names)

    def __contains__(self, name: str) -> bool:
        return name in self.table_names

    def keys(self) -> list[str]:
        """The names of the tables."""
        return list(self.table_names)

    def values(self) -> list[nn.Module]:
        """A module with a ``weight`` for each table."""
        return [self[name] for name in self.table_names]

    def items(self) -> list[tuple[str, nn.Module]]:
        """``(name, module)`` for each table."""
        return list(zip(self.keys(), self.values()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Shown":
        """This does nothing, since what is registered here moves with the tables."""
        return self


class _Table(nn.Module):
    """A table whose ``weight`` is no parameter of its own: a part of one, or nothing that a caller could train."""

    def __init__(self, tables: EmbeddingTables, name: str) -> None:
        super().__init__()
        self.__dict__["tables"] = tables
        self.name = name

    def __getattr__(self, name: str) -> Any:
        return trained_weight(self.tables, self.name) if name == "weight" else super().__getattr__(name)


class Collection(View, Generic[ConfigT]):
    """Logical tables over one ``EmbeddingTables``, ``self.tables``, of which it may show some features only."""

    # The stock collection's ModuleDict, with which the keys of its state dict begin.
    stock_name: ClassVar[str]

    def hold(self, tables: EmbeddingTables, configs: Sequence[ConfigT], own: bool = False) -> None:
        """Becomes a view of ``tables`` that reads the features of ``configs``.

        ``own`` says that nobody else has the tables. Those stored in full are then parameters by name, as in the stock
        collection, where they are parameters at all.
        """
        if own and _all_full(tables) and tables.plan.optimizer is None:
            tables.store.split()
        self.tables = tables
        self.configs = list(configs)
        self.add_module(self.stock_name, Shown(tables, configs))
        self.register_state_dict_post_hook(_write_stock_keys)
        self.register_load_state_dict_pre_hook(_read_stock_keys)
        self.register_load_state_dict_post_hook(_lay)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freezes this collection's lookups, or has them train again; see ``View.requires_grad_``."""
        self.shown.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    @property
    def shown(self) -> Shown:
        """What is shown of the tables: the module that has the stock collection's name for its tables."""
        shown = self._modules[self.stock_name]
        assert isinstance(shown, Shown)
        return shown

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.tables.store.device

    def reset_parameters(self) -> None:
        """Initializes all weights anew; on the meta device there is nothing to do yet."""
        self.tables.reset_parameters()


def build_tables(
    tables: Sequence[TableConfig],
    method: MethodLike | Mapping[str, MethodLike],
    budget: Budget | None,
    frequencies: Mapping[str, Any] | None,
    optimizer: str | dict[str, Any] | FusedOptimizer | None,
    hash_seed: int,
    seed: int,
    device: torch.device | None,
) -> EmbeddingTables:
    """The tables that a collection holds. Unlike ``plan``, torchrec takes an empty list of them."""
    if tables:
        solved = plan(tables, method, budget, frequencies=frequencies, optimizer=optimizer, hash_seed=hash_seed)
    else:
        solved = Plan((), (), None, optimizer_from_config(optimizer), hash_seed)
    return EmbeddingTables(solved, seed=seed, device=device)


def filled(configs: Sequence[ConfigT]) -> list[ConfigT]:
    """Copies of torchrec's configs whose ``feature_names`` are not empty."""
    result = []
    for config in configs:
        config = copy.copy(config)
        config.feature_names = list(config.feature_names) or [config.name]
        result.append(config)
    return result


def table_config(config: BaseEmbeddingConfig, pooling: Pooling) -> TableConfig:
    """Raises ``ValueError`` for a ``data_type`` other than fp32."""
    if config.data_type != DataType.FP32:
        raise ValueError(
            f"table '{config.name}': data_type {config.data_type.name} is not supported, only FP32, which is what "
            "trains; to serve fewer bytes give a method a precision, such as "
            'method={"kind": "full", "precision": "int8"}'
        )
    return TableConfig(
        config.name,
        config.num_embeddings,
        config.embedding_dim,
        tuple(config.feature_names),
        pooling=pooling,
        init_fn=config.init_fn,
    )


def shown_features(tables: EmbeddingTables, features: Sequence[str] | None) -> list[tuple[TableConfig, list[str]]]:
    """The tables that have any of ``features``, and which; all for ``None``."""
    if features is None:
        return [(table, list(table.feature_names)) for table in tables.plan.tables]
    for feature in features:
        if feature not in tables.feature_names:
            raise ValueError(
                f"the tables have no feature '{feature}'; their features: {', '.join(tables.feature_names)}"
            )
    pairs = [(table, [f for f in table.feature_names if f in features]) for table in tables.plan.tables]
    return [(table, own) for table, own in pairs if own]


# ---- the stock state-dict keys, for tables stored in full ------------------------------------------------------------


def _all_full(tables: EmbeddingTables) -> bool:
    """Whether all tables are stored as in the stock collection: a row of fp32 for each id."""
    store = tables.store
    in_full = all(entry.variant == FULL for g in tables.plan.groups for entry in g.layout.entries.values())
    return in_full and all(store.is_plain(name) for name in store.weight_names)


def _stored_weights(tables: EmbeddingTables) -> dict[str, list[str]]:
    """The tables whose rows make up each of the store's weights, in their order."""
    by_weight: dict[str, list[str]] = {}
    for name, slab in tables.store.named_slabs():
        by_weight.setdefault(f"tables.store.{weight_name(FP32.name, slab.shape[1])}", []).append(name)
    return by_weight


def _write_stock_keys(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    assert isinstance(module, Collection)
    if not _all_full(module.tables):
        return
    del state[f"{prefix}tables._extra_state"]
    for key, names in _stored_weights(module.tables).items():
        if module.tables.store.split_weights:
            state.pop(prefix + key, None)
        else:
            whole = state.pop(prefix + key)
            weights = whole.split([module.tables.store.slab(name).shape[0] for name in names])
            state.update({f"{prefix}{module.stock_name}.{name}.weight": w for name, w in zip(names, weights)})


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
    assert isinstance(module, Collection)
    if not _all_full(module.tables):
        return
    store = module.tables.store
    state[f"{prefix}tables._extra_state"] = module.tables.get_extra_state()
    if store.split_weights:
        state.update({f"{prefix}tables.store.{name}": split for name, split in store.split_weights.items()})
        return
    for key, names in _stored_weights(module.tables).items():
        weights = []
        for name in names:
            stock_key = f"{prefix}{module.stock_name}.{name}.weight"
            own = store.slab(name)
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


def _lay(module: nn.Module, incompatible: Any) -> None:
    """Parameters that were assigned lie wherever they came from."""
    assert isinstance(module, Collection)
    module.tables.store.lay()
