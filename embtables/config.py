"""What a user says about a table, before any method or budget: ``TableConfig``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from embtables._util.numbers import as_int
from embtables.formats import FP32

Pooling = Literal["sum", "mean"]
OutOfRange = Literal["error", "hash", "oov"]

# Addresses are int64 and row offsets are added to ids, so ids and sizes stay well inside 63 bits.
MAX_NUM_EMBEDDINGS = 2**40
MAX_DIM = 65536


@dataclass(frozen=True)
class TableConfig:
    """A logical embedding table, as the model sees it (field names follow torchrec's ``EmbeddingBagConfig``).

    Args:
        name: unique among the tables of one plan; hash seeds derive from it.
        num_embeddings: number of ids, which are ``0 … num_embeddings - 1``. ``None``: any 64-bit id, without a
            vocabulary, for the methods that hash (the budget must then be absolute).
        embedding_dim: length D of every vector.
        feature_names: the features that are looked up here; the table's own name by default.
        pooling: how the vectors of a bag become one, unless a call says otherwise.
        on_out_of_range: what an id outside the range does: ``"error"`` names the feature and the id, ``"hash"`` folds
            it into the range, though not onto ``padding_idx``, ``"oov"`` sends it to one more row, which counts in the
            bytes.
        padding_idx: an id that yields zeros and receives no gradient.
        init_fn: initializes a tensor in place, as in torchrec: the table ``[num_embeddings, D]`` where it is stored in
            full. A compressed table takes its spread (root mean square), about 0.

    Raises:
        ValueError: naming the table and the field.
    """

    name: str
    num_embeddings: int | None
    embedding_dim: int
    feature_names: Sequence[str] = ()
    pooling: Pooling = "sum"
    on_out_of_range: OutOfRange = "error"
    padding_idx: int | None = None
    init_fn: Callable[[Tensor], object] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"TableConfig.name must be a non-empty string, not {self.name!r}")
        for name in ("num_embeddings", "embedding_dim", "padding_idx"):
            if (number := as_int(getattr(self, name))) is not None:
                object.__setattr__(self, name, number)
        n = self.num_embeddings
        if n is not None and (as_int(n) is None or not 1 <= n <= MAX_NUM_EMBEDDINGS):
            raise ValueError(
                f"table '{self.name}': num_embeddings must be an integer from 1 to 2**40, or None, not {n!r}"
            )
        if as_int(self.embedding_dim) is None or not 1 <= self.embedding_dim <= MAX_DIM:
            raise ValueError(
                f"table '{self.name}': embedding_dim must be an integer from 1 to {MAX_DIM}, not {self.embedding_dim!r}"
            )
        if isinstance(self.feature_names, str) or not isinstance(self.feature_names, Sequence):
            raise ValueError(f"table '{self.name}': feature_names must be a list of names, not {self.feature_names!r}")
        object.__setattr__(self, "feature_names", tuple(self.feature_names) or (self.name,))
        for feature in self.feature_names:
            if not isinstance(feature, str) or not feature:
                raise ValueError(
                    f"table '{self.name}': feature_names holds {feature!r}, which is not a non-empty string"
                )
            if self.feature_names.count(feature) > 1:
                raise ValueError(f"table '{self.name}': feature_names lists '{feature}' twice")
        _one_of(self, "pooling", self.pooling, get_args(Pooling))
        _one_of(self, "on_out_of_range", self.on_out_of_range, get_args(OutOfRange))
        if n is None and self.on_out_of_range != "error":
            raise ValueError(
                f"table '{self.name}': on_out_of_range has no meaning without num_embeddings; leave it out"
            )
        p = self.padding_idx
        if p is not None and (as_int(p) is None or p < 0 or (n is not None and p >= n)):
            raise ValueError(
                f"table '{self.name}': padding_idx {p!r} is not an id of the table (0 … num_embeddings - 1)"
            )
        if self.init_fn is not None and not callable(self.init_fn):
            raise ValueError(f"table '{self.name}': init_fn must be a function of a tensor, not {self.init_fn!r}")

    @property
    def rows(self) -> int | None:
        """Rows of the equivalent full table: the ids, and the oov row where there is one."""
        if self.num_embeddings is None:
            return None
        return self.num_embeddings + (self.on_out_of_range == "oov")

    @property
    def full_bytes(self) -> int | None:
        """Bytes of the equivalent full fp32 table; ``None`` where the number of ids is unknown."""
        return None if self.rows is None else FP32.slab_bytes(self.rows, self.embedding_dim)

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON. ``init_fn`` is code, and is left out."""
        fields = ("name", "num_embeddings", "embedding_dim", "pooling", "on_out_of_range", "padding_idx")
        return {f: getattr(self, f) for f in fields} | {"feature_names": list(self.feature_names)}


def _one_of(table: TableConfig, field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"table '{table.name}': {field} must be one of {', '.join(allowed)}, not {value!r}")
