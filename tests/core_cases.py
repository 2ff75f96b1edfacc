"""Random tables, methods, budgets and frequencies for the tests of the core. New methods are covered as they appear."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from embtables import EmbeddingTables, TableConfig
from embtables.formats import FORMATS
from embtables.methods import Method, from_config, kinds

TRAINED_PROJECTIONS = {"kind": "mixed_dimension", "train_projection": True}
# Configurations besides the default one of every kind.
VARIANTS: list[dict[str, Any]] = [
    {"kind": "hash", "addressing": "random"},
    {"kind": "multi_hash", "addressing": "random"},
    {"kind": "multi_hash", "num_hashes": 3, "operation": "mean"},
    {"kind": "multi_hash", "num_hashes": 2, "operation": "concat"},
    {"kind": "multi_hash", "num_hashes": 4, "operation": "sum", "signs": True},
    {"kind": "compositional", "operation": "add"},
    {"kind": "compositional", "operation": "concat"},
    {"kind": "compositional", "num_partitions": 3},
    {"kind": "compositional", "radices": "chinese_remainder"},
    {"kind": "fewer_dimensions", "projection": True, "train_projection": True},
    TRAINED_PROJECTIONS,
    {"kind": "low_rank", "inner_dim": 12},
    {"kind": "matryoshka", "nested_share": 1.0},
    {"kind": "unified", "width": 2},
    {"kind": "robe", "block_size": 1},
    {"kind": "robe", "block_size": 4, "signs": True},
    {"kind": "banded", "precisions": ["bf16", "binary"], "widths": [1, 3], "decay": 1.0, "prior_count": 0.0},
    {"kind": "robe", "block_size": 3, "addressing": "random"},
    {"kind": "hot_cold", "cold": "compositional", "hot": 0.3},
    {"kind": "hot_cold", "cold": {"kind": "multi_hash", "signs": True}},
    {"kind": "hot_cold", "cold": "unified", "hot": 0.5},
    {"kind": "hot_cold", "cold": {"kind": "robe", "signs": True}, "hot": 0.6},
    {"kind": "hot_cold", "cold": "frequency_cutoff"},
]
# Those that have to know how often ids occur.
NEEDS_COUNTS = ("banded", "frequency_cutoff", "hot_cold")
COLD = ("hash", "multi_hash", "compositional", "unified", "robe", "frequency_cutoff")


# Every format twice: by its name, and with scales of some other number of rows.
PRECISIONS = (*FORMATS, *(f"{name}/{share}" for name in ("int8", "int4", "binary2") for share in ("slab", 1, 7)))


def all_methods() -> list[Method]:
    """The default of every kind, and further configurations of those that have any."""
    variants = [v for v in VARIANTS if v["kind"] in kinds()]
    return [from_config(kind) for kind in kinds()] + [from_config(v) for v in variants]


def trained_methods() -> list[Method]:
    """``all_methods`` but the one that without a budget stores nothing, and so has nothing to train."""
    return [method for method in all_methods() if method.kind != "drop_feature"]


def shares_scalars(method: Method) -> bool:
    """Whether it has no rows for a row-wise optimizer: ROBE, and what looks cold ids up by it."""
    return "robe" in (method.kind, getattr(getattr(method, "cold", None), "kind", None))


class Graphs:
    """A backend of torch.compile that keeps the operators of every graph, which another backend runs."""

    def __init__(self, backend: str = "eager") -> None:
        self.backend: Any = torch._dynamo.lookup_backend(backend)
        self.operators: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.operators.append([str(node.target) for node in graph.graph.nodes])
        return self.backend(graph, inputs)


def examples(number: int) -> int:
    """How many random examples a long test takes: ``EMBTABLES_EXAMPLES`` times the number, once where it is not set."""
    return number * int(os.environ.get("EMBTABLES_EXAMPLES", "1"))


def projects(method: Method) -> bool:
    """Whether a method multiplies its rows with dense parameters, which fp32 stores whatever the precision."""
    narrow = getattr(method, "projection", False) or getattr(method, "widths", ())
    return method.kind in ("mixed_dimension", "low_rank") or bool(narrow)


def folds(method: Method) -> bool:
    """Whether what a method serves is a product of what it trains, which has other last bits."""
    return getattr(method, "inner_dim", None) is not None


def in_turn(methods: Sequence[Any], options: Sequence[Any], each: int) -> list[tuple[Any, Any]]:
    """Every method with `each` of the options, which take turns.

    What an option does is one piece of code for all methods, so that their product would test the same many times.
    """
    return [(m, options[(i * each + k) % len(options)]) for i, m in enumerate(methods) for k in range(each)]


def rounds(method: Method) -> bool:
    """Whether training can round its rows as they are served: rows that are served as wide as they are trained."""
    return method.kind not in ("pruned", "matryoshka") and not folds(method)


def draws(method: Method) -> bool:
    """Whether lookups that train show what each of them draws: those of one batch differ unless in eval mode."""
    return method.kind == "matryoshka"


def method_id(method: Method) -> str:
    settings = method.model_dump(exclude_defaults=True)
    return "-".join([method.kind, *(f"{k}={v}" for k, v in settings.items())])


def falling_counts(n: int) -> npt.NDArray[np.int64]:
    """Counts of ids that are numbered by frequency, as prepared data has them."""
    return np.maximum(1, 10_000 // np.arange(1, n + 1)).astype(np.int64)


def shuffled_counts(n: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Counts of ids in no order of frequency."""
    return np.random.default_rng(seed).permutation(falling_counts(n))


def counted_bytes(module: nn.Module) -> int:
    """Bytes of the distinct storages of a module's parameters and persistent buffers."""
    tensors: list[Tensor] = [p.data for p in module.parameters()]
    for child in module.modules():
        skipped = child._non_persistent_buffers_set
        tensors += [b for name, b in child._buffers.items() if b is not None and name not in skipped]
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def random_ids(tables: EmbeddingTables, batch: int, seed: int = 0) -> Tensor:
    """``[B, F]``: uniform ids, a column a feature."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {f: t.num_embeddings or 2**40 for t in tables.plan.tables for f in t.feature_names}
    columns = [torch.randint(sizes[f], (batch,), generator=generator) for f in tables.feature_names]
    return torch.stack(columns, dim=1)


# ---- hypothesis ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Arguments of ``plan``."""

    tables: list[TableConfig]
    method: Any
    frequencies: dict[str, npt.NDArray[np.int64]] | None
    precision: str = "fp32"

    @property
    def full_bytes(self) -> int:
        return sum(4 * t.embedding_dim * (t.num_embeddings + (t.on_out_of_range == "oov")) for t in self.tables)


@st.composite
def log_integers(draw: st.DrawFn, low: int, high: int) -> int:
    """Integers whose logarithm is about uniform, both ends included often."""
    exponent = draw(st.floats(0, 1))
    return min(high, max(low, round(low * (high / low) ** exponent)))


@st.composite
def configs(draw: st.DrawFn, dims: list[int], kind: str) -> dict[str, Any]:
    """A configuration of a kind that fits tables of these dimensions."""
    addressing = draw(st.sampled_from(["balanced", "random"]))
    if kind == "hash":
        return {"kind": kind, "addressing": addressing}
    if kind == "multi_hash":
        k = draw(st.integers(2, 4))
        operation = draw(st.sampled_from(["sum", "mean", "concat"] if min(dims) >= k else ["sum", "mean"]))
        signs = operation != "concat" and draw(st.booleans())
        return {"kind": kind, "num_hashes": k, "operation": operation, "signs": signs, "addressing": addressing}
    if kind == "compositional":
        operation = draw(st.sampled_from(["mult", "add", "concat"]))
        most = min(min(dims), 4) if operation == "concat" else 4
        partitions = draw(st.none() | st.integers(2, most)) if most >= 2 else None
        radices = draw(st.sampled_from([None, "quotient_remainder", "chinese_remainder"]))
        return {"kind": kind, "operation": operation, "num_partitions": partitions, "radices": radices}
    if kind == "mixed_dimension":
        blocks = {"first_block": draw(st.integers(1, 100)), "block_growth": draw(st.integers(2, 8))}
        return {"kind": kind, **blocks, "train_projection": draw(st.booleans())}
    if kind == "fewer_dimensions":
        return {"kind": kind, "projection": draw(st.booleans()), "train_projection": draw(st.booleans())}
    if kind == "banded":
        precisions = draw(st.lists(st.sampled_from(PRECISIONS), max_size=4))
        widths = draw(st.lists(st.integers(1, 9), max_size=3))
        prior_count = draw(st.sampled_from([0.0, 3.0, 100.0]))
        decay = draw(st.sampled_from([0.0, 1.0, 3.0]))
        narrow = {"widths": widths, "decay": decay, "train_projection": draw(st.booleans())}
        return {"kind": kind, "precisions": precisions, "prior_count": prior_count, **narrow}
    if kind == "low_rank":
        inner_dim = draw(st.none() | st.integers(1, 50))
        return {"kind": kind, "inner_dim": inner_dim, "train_projection": draw(st.booleans())}
    if kind == "matryoshka":
        return {"kind": kind, "nested_share": draw(st.floats(0, 1))}
    if kind == "unified":
        common = int(np.gcd.reduce(dims))
        widths = [w for w in range(1, common + 1) if common % w == 0]
        return {"kind": kind, "width": draw(st.none() | st.sampled_from(widths)), "addressing": addressing}
    if kind == "robe":
        size, signs = draw(st.integers(1, 16)), draw(st.booleans())
        return {"kind": kind, "block_size": size, "signs": signs, "addressing": addressing}
    if kind == "hot_cold":
        cold = draw(configs(dims, draw(st.sampled_from(COLD))))
        if draw(st.booleans()):
            cold |= {"precision": draw(st.sampled_from(PRECISIONS))}
        return {"kind": kind, "cold": cold, "hot": draw(st.none() | st.floats(0, 1))}
    return {"kind": kind}


@st.composite
def cases(
    draw: st.DrawFn,
    max_rows: int,
    use: list[str] | None = None,
    min_rows: int = 1,
    patterns: bool = True,
    precisions: Sequence[str] = ("fp32",),
) -> Case:
    """Tables with a method, or with methods by name pattern, in some precision, and frequencies or none."""
    use = use or kinds()
    step = draw(st.sampled_from([1, 1, 2, 8]))
    tables = []
    for i in range(draw(st.integers(1, 5))):
        n = draw(log_integers(min_rows, max_rows))
        tables.append(
            TableConfig(
                f"{draw(st.sampled_from('xy'))}{i}",
                n,
                step * draw(st.sampled_from([1, 2, 3, 4, 5, 8])),
                feature_names=[f"f{i}", "shared"] if draw(st.booleans()) else [],
                pooling=draw(st.sampled_from(["sum", "mean"])),
                on_out_of_range=draw(st.sampled_from(["error", "hash", "oov"])),
                padding_idx=draw(st.none() | st.just(n // 2)),
            )
        )
    by_letter = {letter: [t for t in tables if t.name[0] == letter] for letter in "xy"}
    chosen: Any
    if patterns and all(by_letter.values()) and draw(st.booleans()):
        chosen = {
            f"{letter}*": draw(configs([t.embedding_dim for t in members], draw(st.sampled_from(use))))
            for letter, members in by_letter.items()
        }
        needed = {c["kind"] for c in chosen.values()}
    else:
        chosen = draw(configs([t.embedding_dim for t in tables], draw(st.sampled_from(use))))
        needed = {chosen["kind"]}
    frequencies = None
    if max(t.num_embeddings for t in tables) <= 10_000:
        frequencies = {t.name: draw(counts(t.num_embeddings)) for t in tables if draw(st.booleans())}
    if needed & set(NEEDS_COUNTS):
        frequencies = {t.name: draw(counts(t.num_embeddings)) for t in tables}
    precision = draw(st.sampled_from(precisions))
    if isinstance(chosen, dict) and "kind" not in chosen and draw(st.booleans()):
        chosen = {
            pattern: method | {"precision": draw(st.sampled_from(precisions))} for pattern, method in chosen.items()
        }
    return Case(tables, chosen, frequencies, precision)


@st.composite
def counts(draw: st.DrawFn, n: int) -> npt.NDArray[np.int64]:
    how = draw(st.sampled_from(["falling", "shuffled", "zeros", "uniform"]))
    if how == "falling":
        return falling_counts(n)
    if how == "shuffled":
        return shuffled_counts(n, draw(st.integers(0, 3)))
    return np.zeros(n, np.int64) if how == "zeros" else np.full(n, 7)
