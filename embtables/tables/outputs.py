"""What a lookup gives: which outputs, in which order, and how each is pooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from embtables.config import TableConfig
from embtables.lookup.inputs import CONFIG, PoolingLike, check_pooling


class Outputs:
    """An output for each feature of each table, in the order of the tables.

    Args:
        tables: the tables of a plan.

    Attributes:
        feature_names: the features, each once, in the order of the input.
        names: the name of each output, ``feature@table`` where a feature is in two tables.
        embedding_dims: the dimension of each output.
    """

    def __init__(self, tables: Sequence[TableConfig]) -> None:
        pairs = [(table, feature) for table in tables for feature in table.feature_names]
        self._features = [feature for _, feature in pairs]
        self._own_modes: tuple[str | None, ...] = tuple(table.pooling for table, _ in pairs)
        self.feature_names: list[str] = list(dict.fromkeys(self._features))
        self.names = [f"{f}@{t.name}" if self._features.count(f) > 1 else f for t, f in pairs]
        self.embedding_dims = [table.embedding_dim for table, _ in pairs]
        self._fit_one_tensor = len(set(self.embedding_dims)) == 1 and len(pairs) == len(self.feature_names)

    def modes(self, pooling: PoolingLike) -> tuple[str | None, ...]:
        """The pooling of each output: as the call says, else its table's own."""
        if pooling == CONFIG:
            return self._own_modes
        if isinstance(pooling, Mapping):
            return tuple(pooling.get(feature, mode) for feature, mode in zip(self._features, self._own_modes))
        return (pooling,) * len(self._own_modes)

    def check_one_tensor(self, pooling: PoolingLike) -> None:
        """Raises ``ValueError`` for an unknown pooling, and one whose outputs do not fit into one tensor."""
        if pooling == CONFIG:
            return
        check_pooling(pooling, self.feature_names)
        if isinstance(pooling, Mapping):
            unpooled = [feature for feature, mode in pooling.items() if mode is None]
            if unpooled:
                raise ValueError(
                    f"pooling is None for '{unpooled[0]}', whose vectors do not fit beside pooled ones: "
                    "call lookup, which gives each output by itself"
                )
        elif pooling is None and not self._fit_one_tensor:
            raise ValueError(
                "pooling=None needs tables of one embedding_dim, and no feature in two tables; lookup takes any"
            )
