"""Whether two versions of the library compute the same, bit for bit.

    python -m benchmarks.bits write after.json              # about three minutes, on one thread
    python -m benchmarks.bits write after.json --full       # twice as many cases
    python -m benchmarks.bits compare before.json after.json

``write`` trains small tables in thousands of cases and notes a SHA-256 digest of every result: initial weights, the
vectors of each step, gradients, updated weights, optimizer state, the dense form of each table, and what is looked up
after ``serve``, after ``save`` and ``load``, and after a resume from a state dict. With ``--full`` every method ×
optimizer × dtype × pooling × backend is a case; without it that holds for float32, and of the other dtypes each method
× optimizer × backend has one pooling or two. A fixed choice that depends on these alone adds what surrounds them:
tables, the way of the call, types of ids, weights of ids, regularization, frequencies, budgets. Further cases are views
by constructor, ``compress_``, torchrec's collections, empty batches, autocast and refused input. What the library
refuses is a result, too. Nothing but the public interface is used.

Digests hold for one machine, one build of torch and one instruction set, so that both files have to be written on the
same machine. Names of state-dict entries are results of their own ("names of …") and take no part in the others: a
renamed entry alone changes nothing else.

Example, the last release against the present files::

    git worktree add /tmp/before v0.1.0
    (cd /tmp/before && python setup.py build_ext --inplace)  # the native code, which is compared as well where it is
    PYTHONPATH=/tmp/before python benchmarks/bits.py write /tmp/before.json
    PYTHONPATH=$PWD python benchmarks/bits.py write /tmp/after.json
    python -m benchmarks.bits compare /tmp/before.json /tmp/after.json

``write`` prints which copy of the library it ran.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import embtables
from embtables import Embedding, EmbeddingBag, EmbeddingTables, Plan, TableConfig, compress_, ops, plan
from embtables.methods import kinds

try:
    from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from embtables.torchrec import EmbeddingBagCollection, EmbeddingCollection

    TORCHREC = ""
except (ImportError, OSError) as error:  # a broken fbgemm raises OSError
    TORCHREC = f"torchrec cannot be imported: {error}"

# Examples of each training step.
BATCHES = (7, 1, 5)

# ---- the axes --------------------------------------------------------------------------------------------------------

# Training of three steps goes through all events, the last of which reaches the target.
_PRUNING = {"kind": "pruned", "warmup_steps": 1, "prune_steps": 2, "interval": 1}

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
    {"kind": "unified", "width": 2},
    {"kind": "robe", "block_size": 1},
    {"kind": "robe", "block_size": 4, "signs": True},
    {"kind": "robe", "block_size": 3, "addressing": "random"},
    {"kind": "mixed_dimension", "first_block": 8, "block_growth": 2},
    {"kind": "banded", "precisions": ["bf16", "binary"], "widths": [1, 3], "decay": 1.0, "prior_count": 0.0},
    {"kind": "mixed_dimension", "train_projection": True},
    {"kind": "fewer_dimensions", "projection": True, "train_projection": True},
    {"kind": "low_rank", "inner_dim": 12},
    {"kind": "matryoshka", "nested_share": 1.0},
    {"kind": "hot_cold", "cold": "compositional", "hot": 0.3},
    {"kind": "hot_cold", "cold": {"kind": "multi_hash", "signs": True}},
    {"kind": "hot_cold", "cold": "unified", "hot": 0.5},
    {"kind": "hot_cold", "cold": {"kind": "robe", "signs": True}, "hot": 0.6},
    {"kind": "hot_cold", "cold": "frequency_cutoff"},
    _PRUNING | {"schedule": "exponential"},
]

# Tables of every arrangement begin with these letters. The first patterns prune some tables and hash the others.
MIXTURES: dict[str, dict[str, Any]] = {
    "a pruned, others hash": {"a": _PRUNING, "*": "hash"},
    "b mixed_dimension, a full, others robe": {
        "b": "mixed_dimension",
        "a": "full",
        "*": {"kind": "robe", "signs": True},
    },
    "c drop_feature, a compositional, others frequency_cutoff": {
        "c": "drop_feature",
        "a": {"kind": "compositional", "operation": "concat"},
        "*": "frequency_cutoff",
    },
}


def methods() -> dict[str, Any]:
    """Every kind as it is by default, the variants, and mixtures by pattern, under readable names."""
    defaults = {kind: _PRUNING if kind == "pruned" else {"kind": kind} for kind in kinds()}
    return defaults | {_label(variant): variant for variant in VARIANTS} | MIXTURES


def _label(variant: Mapping[str, Any]) -> str:
    hidden = _PRUNING if variant["kind"] == "pruned" else {"kind": variant["kind"]}
    return " ".join([variant["kind"], *(f"{k}={v}" for k, v in variant.items() if k not in hidden)])


OPTIMIZERS = ("dense", "sparse", "sgd", "rowwise_adagrad", "adagrad", "adam")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
FEWER_POOLINGS = {"float32": 5, "bfloat16": 2, "float16": 1, "float64": 1}
POOLINGS = ("config", "sum", "mean", "unpooled", "by feature")
BACKENDS = ("reference", "native")

# The ways of a call that know a pooling.
CALLS = {
    "config": ("forward", "lookup", "views", "collection"),
    "sum": ("forward", "lookup", "views"),
    "mean": ("forward", "lookup", "views"),
    "unpooled": ("forward", "lookup", "views", "collection"),
    "by feature": ("forward", "lookup", "views"),
}

# Arrangements of tables, and those whose vectors all fit one tensor.
ONE_DIM = ("one dim", "policies")
ARRANGEMENTS = (*ONE_DIM, "shared features", "odd dims", "wide")
# Methods that take tables without a vocabulary are tried on such, too.
HASHING = ("hash", "multi_hash", "unified", "robe")
# Methods that need to know how often ids occur.
COUNTED = ("frequency_cutoff", "banded", "hot_cold")


def arrangement(name: str) -> list[TableConfig]:
    """A few tables, the first letters of whose names are a, b and c."""
    if name == "one dim":
        return [
            TableConfig("a", 60, 16),
            TableConfig("b", 300, 16, padding_idx=0, pooling="mean"),
            TableConfig("c", 7, 16),
        ]
    if name == "policies":
        return [
            TableConfig("a", 50, 8, on_out_of_range="hash"),
            TableConfig("b", 150, 8, ["b", "history"], on_out_of_range="oov", padding_idx=5),
            TableConfig("c", 40, 8, on_out_of_range="hash", padding_idx=0, pooling="mean"),
            TableConfig("d", 90, 8, on_out_of_range="oov"),
        ]
    if name == "shared features":
        return [
            TableConfig("a", 60, 6, ["a", "x"], pooling="mean"),
            TableConfig("b", 200, 20, ["x", "y"], padding_idx=3),
            TableConfig("c", 90, 4, ["c", "y"]),
            TableConfig("d", 120, 6, ["d"], on_out_of_range="hash"),
        ]
    if name == "odd dims":
        return [
            TableConfig("a", 40, 5, init_fn=lambda weight: nn.init.uniform_(weight, -0.3, 0.3)),
            TableConfig("b", 150, 3, padding_idx=149),
            TableConfig("c", 80, 65, pooling="mean"),
            TableConfig("big", 400, 3, pooling="mean"),
        ]
    if name == "wide":
        return [
            TableConfig("a", 30, 64),
            TableConfig("b", 120, 64, on_out_of_range="oov"),
            TableConfig("c", 25, 96, pooling="mean", padding_idx=24),
        ]
    assert name == "no vocabulary"
    return [
        TableConfig("a", None, 8),
        TableConfig("b", None, 8, padding_idx=7),
        TableConfig("c", None, 8, pooling="mean"),
    ]


@dataclass(frozen=True)
class Case:
    """One training of a few steps. All fields are part of its name."""

    method: str
    optimizer: str
    dtype: str
    pooling: str
    backend: str
    call: str
    tables: str
    ids: str
    weighted: bool
    decay: str
    regularized: str
    frequencies: str
    budget: str | int | None

    @property
    def key(self) -> str:
        return " | ".join(f"{k} {v}" for k, v in self.surroundings.items()) + f" | {self.backend}"

    @property
    def surroundings(self) -> dict[str, Any]:
        """All but the backend, so that both see the same batches."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "backend"}

    @property
    def seed(self) -> int:
        return crc32(" | ".join(map(str, self.surroundings.values())).encode())


def grid(full: bool = False) -> Iterator[Case]:
    """Method × optimizer × dtype × pooling × backend, each with a choice of everything else.

    All of them are meant by ``full``; otherwise float32 alone has all poolings.

    The choice depends on the case alone: another method or pooling leaves the cases of the others as they are.
    """
    for method, optimizer, dtype, pooling in product(methods(), OPTIMIZERS, DTYPES, POOLINGS):
        turn = crc32(f"{method} | {optimizer} | {dtype}".encode()) + POOLINGS.index(pooling)
        if not full and turn % len(POOLINGS) >= FEWER_POOLINGS[dtype]:
            continue

        def choose(
            what: str, options: Sequence[Any], case: tuple[str, ...] = (method, optimizer, dtype, pooling)
        ) -> Any:
            return options[crc32(" | ".join((what, *case)).encode()) % len(options)]

        call = choose("call", CALLS[pooling])
        one_tensor = pooling == "unpooled" and call in ("forward", "collection")
        arrangements = list(ONE_DIM if one_tensor else ARRANGEMENTS)
        if method.split()[0] in HASHING:
            arrangements.append("no vocabulary")
        tables = choose("tables", arrangements)
        sums = pooling == "sum" or call in ("forward", "lookup")
        counted = any(kind in method for kind in COUNTED)
        case = dict(
            call=call,
            tables=tables,
            ids=choose("ids", ["int64 columns", "int32 columns", "int64 bags", "int32 bags"]),
            weighted=sums and choose("weighted", [True, False]),
            decay="none"
            if optimizer in ("dense", "sparse")
            else choose("decay", ["none", "none", "l2", "clip", "both"]),
            regularized=choose("regularized", ["no", "no", "plain", "by counts"]),
            frequencies=choose("frequencies", ["ranked", "unranked", *([] if counted else ["none"])]),
            budget=choose("budget", budgets(method, tables)),
        )
        for backend in BACKENDS:
            # Native code has no float64: it would be the reference once more.
            if dtype != "float64" or backend == "reference":
                yield Case(method, optimizer, dtype, pooling, backend, **case)


def budgets(method: str, tables: str) -> Sequence[str | int | None]:
    """Budgets that differ in what is stored: which tables in full, and in which sparse form."""
    if tables == "no vocabulary":
        return (2000, 8000)
    kind = method.split()[0]
    if kind == "full":
        return (None,)
    return ("60%", "30%", "6%", "5%", "1%") if kind == "pruned" else ("60%", "35%")


# ---- tables and batches ----------------------------------------------------------------------------------------------


def frequencies_of(tables: Sequence[TableConfig], how: str) -> dict[str, np.ndarray[Any, Any]] | None:
    """Counts for every table with a vocabulary; ``ranked``: ids are numbered by them."""
    if how == "none":
        return None
    counts = {t.name: np.maximum(1, 1000 // np.arange(1, t.num_embeddings + 1)) for t in tables if t.num_embeddings}
    if how == "ranked":
        return counts
    return {name: np.random.default_rng(len(n)).permutation(n) for name, n in counts.items()}


def optimizer_config(name: str, decay: str = "none", dtype: str = "float32") -> dict[str, Any] | None:
    if name in ("dense", "sparse"):
        return None
    l2 = {"l2": 0.02} if decay in ("l2", "both") else {}
    clip = {"clip_row_norm": 0.5} if decay in ("clip", "both") else {}
    # The default, 1e-8, is 0 in float16, where small moments are, too.
    eps = {"eps": 0.001} if dtype == "float16" and name != "sgd" else {}
    return {"kind": name, "lr": 0.05, **l2, **clip, **eps}


@cache
def _plan(method: str, optimizer: str, decay: str, dtype: str, tables: str, frequencies: str, budget: Any) -> Plan:
    configs = arrangement(tables)
    counts = frequencies_of(configs, frequencies)
    return plan(configs, methods()[method], budget, counts, optimizer_config(optimizer, decay, dtype), hash_seed=5)


def build(case: Case, seed: int = 3) -> EmbeddingTables:
    solved = _plan(case.method, case.optimizer, case.decay, case.dtype, case.tables, case.frequencies, case.budget)
    # Larger vectors than by default, so that narrow types do not round all updates away, nor decay to nothing.
    std = None if case.tables == "odd dims" else 0.25
    tables = EmbeddingTables(solved, seed=seed, std=std, sparse=case.optimizer == "sparse").to(DTYPES[case.dtype])
    if case.regularized != "no":
        counts = frequencies_of(solved.tables, "ranked") if case.regularized == "by counts" else None
        tables.regularize(0.05, counts)
    return tables


@dataclass(frozen=True)
class Batch:
    """Ids of all features: a column each, or flat with offsets."""

    ids: Tensor
    offsets: Tensor | None
    weights: Tensor | None

    @classmethod
    def draw(cls, configs: Sequence[TableConfig], size: int, kind: str, weighted: bool, seed: int) -> Batch:
        """Ids with repetitions, padding, ids out of range where that is no error, and empty bags."""
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.int32 if kind.startswith("int32") else torch.int64
        features = list(dict.fromkeys(f for t in configs for f in t.feature_names))
        if kind.endswith("columns"):
            lengths = torch.ones(len(features) * size, dtype=torch.int64)
        else:
            lengths = torch.randint(0, 4, (len(features) * size,), generator=generator)
        counts = lengths.view(len(features), size).sum(1).tolist()
        each = [
            _ids([t for t in configs if f in t.feature_names], n, dtype, generator) for f, n in zip(features, counts)
        ]
        weights = torch.randn(sum(counts), generator=generator) if weighted else None
        if kind.endswith("columns"):
            shaped = None if weights is None else weights.view(len(features), size).t().contiguous()
            return cls(torch.stack(each, 1), None, shaped)
        offsets = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(dtype)
        return cls(torch.cat(each), offsets, weights)

    def feature(self, number: int, num_features: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The ids, offsets ``[B + 1]`` and weights of one feature; ids ``[B, 1]`` where it is a column."""
        if self.offsets is None:
            weights = None if self.weights is None else self.weights[:, number : number + 1]
            return self.ids[:, number : number + 1], None, weights
        size = (self.offsets.numel() - 1) // num_features
        offsets = self.offsets[number * size : (number + 1) * size + 1]
        span = slice(int(offsets[0]), int(offsets[-1]))
        return self.ids[span], offsets - offsets[0], None if self.weights is None else self.weights[span]

    def jagged(self, features: Sequence[str]) -> Any:
        """The same for torchrec's collections."""
        values, weights, offsets = self.ids, self.weights, self.offsets
        if offsets is None:
            offsets = torch.arange(values.numel() + 1)
            values, weights = values.t().reshape(-1), None if weights is None else weights.t().reshape(-1)
        return KeyedJaggedTensor(list(features), values, weights, offsets=offsets)


def _ids(tables: Sequence[TableConfig], count: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Ids that every one of the tables takes."""

    def chance(share: float) -> Tensor:
        return torch.rand(count, generator=generator) < share

    sizes = [t.num_embeddings for t in tables if t.num_embeddings is not None]
    if not sizes:
        info = torch.iinfo(dtype)
        # Few distinct ones, so that some repeat.
        pool = torch.randint(info.min, info.max, (10,), generator=generator)
        ids = pool[torch.randint(10, (count,), generator=generator)]
    else:
        ids = (torch.rand(count, generator=generator) ** 2 * min(sizes)).long()
    if all(t.on_out_of_range != "error" for t in tables):
        outside = torch.randint(-1000, 1000, (count,), generator=generator)
        ids = torch.where(chance(0.2), outside, ids)
    for padding in [t.padding_idx for t in tables if t.padding_idx is not None]:
        ids = torch.where(chance(0.15), padding, ids)
    return ids.to(dtype)


def caller(case: Case, tables: EmbeddingTables) -> Callable[[Batch], list[Tensor]]:
    """Looks a batch up as the case says; for views and collections, the same ones in every call."""
    features = tables.feature_names
    pairs = [(table, feature) for table in tables.plan.tables for feature in table.feature_names]
    modes: list[Any] = ["sum", "mean", None] if case.call == "lookup" else ["sum", "mean"]
    by_feature = {feature: modes[i % len(modes)] for i, feature in enumerate(features)}
    pooling: Any = {"config": "config", "unpooled": None, "by feature": by_feature}.get(case.pooling, case.pooling)
    if case.call == "forward":
        return lambda b: [tables(b.ids, b.offsets, b.weights, pooling)]
    if case.call == "lookup":
        return lambda b: list(tables.lookup(b.ids, b.offsets, b.weights, pooling).values())
    if case.call == "collection":
        return _collection(case, tables)

    def view(table: TableConfig, feature: str) -> Callable[[Batch], Tensor]:
        number = features.index(feature)
        if case.pooling == "unpooled":
            one: Any = Embedding.of(tables, table.name).train(tables.training)
            return lambda b: one(b.feature(number, len(features))[0])
        mode = {"config": None, "by feature": by_feature[feature]}.get(case.pooling, case.pooling)
        bag = EmbeddingBag.of(tables, table.name, mode, include_last_offset=True).train(tables.training)
        return lambda b: bag(*b.feature(number, len(features)))

    views = [view(table, feature) for table, feature in pairs]
    return lambda b: [each(b) for each in views]


def _collection(case: Case, tables: EmbeddingTables) -> Callable[[Batch], list[Tensor]]:
    features = tables.feature_names
    if case.pooling == "unpooled":
        sequences = EmbeddingCollection.of(tables).train(tables.training)
        return lambda b: [found.values() for found in sequences(b.jagged(features)).values()]
    bags = EmbeddingBagCollection.of(tables, is_weighted=case.weighted).train(tables.training)
    return lambda b: [bags(b.jagged(features)).values()]


# ---- digests ---------------------------------------------------------------------------------------------------------


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of types, shapes and bits, in their order."""
    total = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1)
        total.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return total.hexdigest()


def unordered(tensors: Iterable[Tensor]) -> str:
    """The same for tensors whose names, and with them their order, may change."""
    return hashlib.sha256(" ".join(sorted(digest([tensor]) for tensor in tensors)).encode()).hexdigest()


def _state(tables: nn.Module) -> list[Tensor]:
    """The weights and codes of a state dict, without the plan's fingerprint and the optimizer's state."""
    others = ("_extra_state", "optimizer_state.")
    return [value for name, value in tables.state_dict().items() if not any(other in name for other in others)]


def _dense(tables: EmbeddingTables) -> list[Tensor]:
    return [tables.to_dense(table.name) for table in tables.plan.tables if table.num_embeddings is not None]


class Gradients:
    """Those of all steps: as they come, and with the rows of sparse ones added up."""

    def __init__(self) -> None:
        self.raw: list[str] = []
        self.summed: list[str] = []

    def add(self, parameters: Iterable[Tensor]) -> None:
        given = [p.grad for p in parameters if p.grad is not None]
        self.raw.append(unordered(part for g in given for part in _parts(g)))
        self.summed.append(unordered(part for g in given for part in _parts(g.coalesce() if g.is_sparse else g)))

    def results(self) -> dict[str, str]:
        joined = {"gradients": self.summed, "gradients as they come": self.raw}
        return {name: hashlib.sha256(" ".join(digests).encode()).hexdigest() for name, digests in joined.items()}


def _parts(gradient: Tensor) -> list[Tensor]:
    return [gradient._indices(), gradient._values()] if gradient.is_sparse else [gradient]


# ---- running a case --------------------------------------------------------------------------------------------------

Results = dict[str, str]


def attempt(backend: str, case: Callable[[Results], None]) -> Results:
    """What a case yields, up to the error that ends it where there is one."""
    results: Results = {}
    try:
        with ops.using(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case(results)
    except Exception as error:  # any: that the library raises it is a result like others
        results["error"] = type(error).__name__
        results["message"] = str(error)
    return results


def backward(outputs: Sequence[Tensor], generator: torch.Generator) -> None:
    """With another gradient for every value, some of them zero. Dropped tables need none."""
    needed = [output for output in outputs if output.requires_grad]
    gradients = [torch.randn(output.shape, generator=generator) for output in needed]
    for gradient in gradients:
        gradient[torch.rand(gradient.shape, generator=generator) < 0.1] = 0
    torch.autograd.backward(needed, [g.to(output.dtype) for g, output in zip(gradients, needed)])


@torch.no_grad()
def descend(parameters: Iterable[Tensor]) -> None:
    """A step of SGD; ``torch.optim`` has none for sparse gradients in float16."""
    for parameter in parameters:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None and gradient.is_sparse:
            parameter.index_add_(0, gradient._indices()[0], gradient._values(), alpha=-0.1)
        elif gradient is not None:
            parameter.sub_(gradient, alpha=0.1)


def train(
    tables: EmbeddingTables,
    call: Callable[[Batch], list[Tensor]],
    batches: Iterable[Batch],
    seed: int,
    results: Results,
) -> None:
    """Training steps, and what they change, as results."""
    generator = torch.Generator().manual_seed(seed)
    parameters = list(tables.parameters())
    gradients = Gradients()
    for step, batch in enumerate(batches, 1):
        outputs = call(batch)
        results[f"vectors of step {step}"] = digest(outputs)
        backward(outputs, generator)
        gradients.add(parameters)
        descend(parameters)
        if step == 2 and tables.plan.optimizer is not None:
            tables.set_learning_rate(0.02)
    results |= gradients.results()
    results["weights"] = unordered(_state(tables))
    results["optimizer state"] = unordered(tables.optimizer_state_dict().values())
    results["dense"] = digest(_dense(tables))


def run(case: Case, results: Results) -> None:
    tables = build(case)
    configs = tables.plan.tables
    results["plan"] = hashlib.sha256(tables.plan.fingerprint).hexdigest()
    results["initial weights"] = unordered(_state(tables))
    batches = [Batch.draw(configs, size, case.ids, case.weighted, case.seed + i) for i, size in enumerate(BATCHES)]
    train(tables, caller(case, tables), batches, case.seed, results)
    served = tables.serve().eval()
    results["served"] = digest(caller(case, served)(batches[0]))
    results["served dense"] = digest(_dense(served))
    results["served weights"] = unordered(_state(served))
    if case.seed % 5 == 0:
        resume(case, tables, batches, results)
    if case.seed % 4 == 1 and case.dtype == "float32":
        reload(case, tables, batches[0], results)


def resume(case: Case, tables: EmbeddingTables, batches: Sequence[Batch], results: Results) -> None:
    """Further training of other tables that have taken over the state."""
    others = build(case, seed=4)
    others.load_state_dict(tables.state_dict())
    others.load_optimizer_state_dict(tables.optimizer_state_dict())
    resumed: Results = {}
    train(others, caller(case, others), batches[:2], case.seed + 1, resumed)
    results |= {f"resumed: {name}": value for name, value in resumed.items()}


def reload(case: Case, tables: EmbeddingTables, batch: Batch, results: Results) -> None:
    """The tensors of a file, and what is looked up in it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tables.safetensors")
        tables.save(path)
        results["file"] = unordered(load_file(path).values())
        loaded = EmbeddingTables.load(path)
    results["loaded"] = digest(caller(case, loaded)(batch))
    results["loaded dense"] = digest(_dense(loaded))


# ---- further cases ---------------------------------------------------------------------------------------------------


def names(method: str, optimizer: str, results: Results) -> None:
    """The names in state dicts, as text."""
    for tables in ("one dim", "shared features"):
        case = Case(
            method, optimizer, "float32", "config", "", "forward", tables, "", False, "none", "no", "unranked", None
        )
        built = build(Case(**case.surroundings | {"backend": "", "budget": budgets(method, tables)[0]}))
        results[f"state of {tables}"] = " ".join(built.state_dict())
        results[f"optimizer state of {tables}"] = " ".join(sorted(built.optimizer_state_dict()))
        results[f"parameters of {tables}"] = " ".join(name for name, _ in built.named_parameters())
        results[f"served state of {tables}"] = " ".join(built.serve().state_dict())


def constructed(method: Any, optimizer: str, dims: tuple[int, ...], results: Results) -> None:
    """``Embedding`` by its constructor, its ids of several dimensions."""
    view = Embedding(
        200,
        12,
        padding_idx=-1,
        method=method,
        budget=None if method == {"kind": "full"} else "40%",
        optimizer=optimizer_config(optimizer),
        frequencies=np.arange(200)[::-1].copy(),
        on_out_of_range="oov",
        sparse=optimizer == "sparse",
        seed=7,
        hash_seed=8,
    )
    results["initial weights"] = unordered(_state(view.tables))
    ids = [torch.randint(-5, 220, dims, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    train(view.tables, lambda batch: [view(batch.ids)], [Batch(i, None, None) for i in ids], 9, results)
    view.tables.finalize()
    results["served"] = digest([view.eval()(ids[0])])


class Model(nn.Module):
    """What ``compress_`` is given."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.item = nn.Embedding(300, 8, padding_idx=0, sparse=sparse)
        self.user = nn.Embedding(90, 8, sparse=sparse)
        self.bag = nn.EmbeddingBag(150, 12, mode="mean", sparse=sparse)
        self.small = nn.Embedding(6, 4, sparse=sparse)
        self.history = self.item

    def forward(self, ids: Tensor) -> list[Tensor]:
        return [self.item(ids), self.history(ids // 2), self.user(ids % 90), self.bag(ids % 150), self.small(ids % 6)]


def compressed(method: Any, optimizer: str, results: Results) -> None:
    """A model whose tables were swapped."""
    torch.manual_seed(1)
    model = Model(optimizer == "sparse")
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    counts = {"item": 300, "user": 90, "bag": 150, "small": 6}
    compress_(
        model,
        method,
        None if method == {"kind": "full"} else "40%",
        optimizer=optimizer_config(optimizer),
        rebind=own,
        frequencies={name: np.arange(n)[::-1].copy() for name, n in counts.items()},
        seed=2,
    )
    results["initial weights"] = unordered(_state(model))
    generator = torch.Generator().manual_seed(3)
    gradients = Gradients()
    for step in range(3):
        outputs = model(torch.randint(300, (5, 2), generator=generator))
        results[f"vectors of step {step + 1}"] = digest(outputs)
        backward(outputs, generator)
        gradients.add(model.parameters())
        own.step()
        own.zero_grad()
    results |= gradients.results()
    results["weights"] = unordered(_state(model))
    swapped = [m for m in model.children() if isinstance(m, (Embedding, EmbeddingBag))]
    results["dense"] = digest(view.to_dense() for view in swapped)


def collected(method: Any, optimizer: str, pooled: bool, results: Results) -> None:
    """torchrec's collections by their constructors."""
    options: dict[str, Any] = dict(
        method=method,
        budget=None if method == {"kind": "full"} else "40%",
        optimizer=optimizer_config(optimizer),
        frequencies={"a": np.arange(60)[::-1].copy(), "b": np.arange(200)[::-1].copy()},
        hash_seed=1,
        seed=2,
    )
    shared: dict[str, Any] = dict(embedding_dim=8, init_fn=lambda weight: nn.init.uniform_(weight, -0.3, 0.3))
    a: dict[str, Any] = dict(name="a", num_embeddings=60, feature_names=["x", "y"], **shared)
    b: dict[str, Any] = dict(name="b", num_embeddings=200, feature_names=["y", "z"], **shared)
    if pooled:
        bags = [EmbeddingBagConfig(pooling=PoolingType.MEAN, **a), EmbeddingBagConfig(**b)]
        collection: Any = EmbeddingBagCollection(bags, **options)
    else:
        collection = EmbeddingCollection([EmbeddingConfig(**a), EmbeddingConfig(**b)], **options)
    results["initial weights"] = unordered(_state(collection))
    batches = [Batch.draw(collection.tables.plan.tables, 6, "int64 bags", False, seed) for seed in range(3)]

    def call(batch: Batch) -> list[Tensor]:
        found = collection(batch.jagged(collection.tables.feature_names))
        return [found.values()] if pooled else [sequence.values() for sequence in found.values()]

    train(collection.tables, call, batches, 4, results)


def surrounded(case: Case, how: str, results: Results) -> None:
    """A training step on an empty batch between two others, under autocast, or with lookups that do not train."""
    tables = build(case)
    call = caller(case, tables)
    sizes = (4, 0, 5) if how == "empty batch" else (4, 6, 5)
    batches = [Batch.draw(tables.plan.tables, n, case.ids, case.weighted, case.seed + n) for n in sizes]
    if how == "not training":
        silent = [tables.lookup(b.ids, b.offsets, b.weights, training=False) for b in batches]
        results["not training"] = digest(vector for found in silent for vector in found.values())
        with torch.no_grad():
            results["without gradients"] = digest(vector for b in batches for vector in call(b))
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        train(tables, call, batches, case.seed, results)


def refused(method: str, optimizer: str, call: str, wrong: str, results: Results) -> None:
    """Bad input in the second step: its error, and that it has changed nothing."""
    case = Case(
        method, optimizer, "float32", "sum", "", call, "one dim", "int64 bags", True, "none", "no", "ranked", None
    )
    case = Case(**case.surroundings | {"backend": "", "budget": budgets(method, "one dim")[0]})
    tables = build(case)
    look_up = caller(case, tables)
    good = Batch.draw(tables.plan.tables, 4, case.ids, True, 1)
    train(tables, look_up, [good], 1, results)
    assert good.offsets is not None and good.weights is not None
    ids, offsets, weights = good.ids.clone(), good.offsets.clone(), good.weights
    if wrong == "id too large":
        ids[-1] = 10**6
    elif wrong == "id negative":
        ids[0] = -1
    elif wrong == "ids of floats":
        ids = ids.float()
    elif wrong == "offsets that fall":
        offsets[2] = offsets[-1] + 1
    elif wrong == "weights too short":
        weights = weights[:-1]
    attempted = attempt(
        ops.backend(), lambda inner: inner.update(vectors=digest(look_up(Batch(ids, offsets, weights))))
    )
    results |= {f"refused: {name}": value for name, value in attempted.items()}
    after: Results = {}
    train(tables, look_up, [good], 1, after)
    results |= {f"after: {name}": value for name, value in after.items()}


WRONG = ("id too large", "id negative", "ids of floats", "offsets that fall", "weights too short")
SURROUNDINGS = ("empty batch", "autocast", "not training")


def cases(full: bool = False) -> Iterator[tuple[str, Callable[[], Results]]]:
    """All cases by name. Those for which something is missing here are left out; ``missing`` says what."""
    available = [name for name in BACKENDS if name == "reference" or ops.instructions() is not None]
    for case in grid(full):
        if case.backend in available and not (case.call == "collection" and TORCHREC):
            yield case.key, partial(attempt, case.backend, partial(run, case))
    for (label, method), optimizer in product(methods().items(), OPTIMIZERS):
        key = f"{label} | {optimizer}"
        turn = crc32(key.encode())
        if optimizer in ("dense", "rowwise_adagrad", "adam"):
            yield f"names of {key}", partial(attempt, "reference", partial(names, label, optimizer))
        for backend in available:
            for what, case_of in _others(label, method, optimizer, backend, turn):
                yield f"{what} | {key} | {backend}", partial(attempt, backend, case_of)


def _others(
    label: str, method: Any, optimizer: str, backend: str, turn: int
) -> Iterator[tuple[str, Callable[[Results], None]]]:
    if label not in MIXTURES:
        dims = ((6,), (4, 2, 3), (0,))[turn % 3]
        yield f"Embedding {dims}", partial(constructed, method, optimizer, dims)
        if optimizer in ("dense", "sparse", "adagrad"):
            yield "compress_", partial(compressed, method, optimizer)
        if optimizer in ("dense", "adam") and not TORCHREC:
            yield "EmbeddingBagCollection", partial(collected, method, optimizer, True)
            yield "EmbeddingCollection", partial(collected, method, optimizer, False)
    call, how = ("forward", "lookup", "views")[turn % 3], SURROUNDINGS[turn // 3 % 3]
    case = Case(
        *(label, optimizer, "float32", "config", backend, call, "shared features", "int64 bags", False),
        *("none", "no", "unranked", budgets(label, "shared features")[0]),
    )
    yield f"{how} by {call}", partial(surrounded, case, how)
    if optimizer in ("dense", "adam"):
        wrong = WRONG[turn // 9 % len(WRONG)]
        yield f"{wrong} by {call}", partial(refused, label, optimizer, call, wrong)


def missing() -> list[str]:
    """Why cases are left out here."""
    native = [] if ops.instructions() is not None else ["there is no native code in this process"]
    return native + ([TORCHREC] if TORCHREC else [])


# ---- files of digests ------------------------------------------------------------------------------------------------


def write(path: Path, only: str = "", full: bool = False) -> int:
    torch.set_num_threads(1)
    gc.freeze()  # compress_ collects garbage, which need not look at all modules each time
    print(f"embtables of {Path(embtables.__file__).parent}, native code: {ops.instructions()}", *missing(), sep="\n")
    begun, done = time.process_time(), {}
    for key, case in cases(full):
        if only in key:
            done[key] = case()
            if len(done) % 500 == 0:
                print(f"{len(done):,} cases", flush=True)
    gc.unfreeze()
    about = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "instructions": ops.instructions(),
        "missing": missing(),
    }
    path.write_text(json.dumps({"about": about, "cases": done}, indent=0, ensure_ascii=False), encoding="utf-8")
    errors = sum("error" in results for results in done.values())
    print(f"{len(done):,} cases, {errors:,} of which end in an error: {path}")
    print(f"{time.process_time() - begun:.0f} s of a processor")
    return 0


def compare(before: Path, after: Path, most: int = 40) -> int:
    """Prints what differs; 1 where anything does."""
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    for name in old["about"]:
        if old["about"][name] != new["about"].get(name):
            print(f"the files differ in their {name}: {old['about'][name]} and {new['about'].get(name)}")
    both = [key for key in old["cases"] if key in new["cases"]]
    differing = {key: _differing(old["cases"][key], new["cases"][key]) for key in both}
    differing = {key: results for key, results in differing.items() if results}
    lines = {
        "differ": [f"{key}: {', '.join(results)}" for key, results in differing.items()],
        "vanished": [key for key in old["cases"] if key not in new["cases"]],
        "appeared": [key for key in new["cases"] if key not in old["cases"]],
    }
    print(f"{len(both) - len(differing):,} of {len(both):,} cases are equal")
    for what, found in lines.items():
        if found:
            print(f"{len(found):,} {what}:", *found[:most], *(["…"] if len(found) > most else []), sep="\n  ")
    if differing:
        counts = Counter(result for results in differing.values() for result in results)
        print("results that differ:", ", ".join(f"{name} in {n:,}" for name, n in counts.most_common()))
    return int(any(lines.values()))


def _differing(old: Results, new: Results) -> list[str]:
    return [name for name in [*old, *(n for n in new if n not in old)] if old.get(name) != new.get(name)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="run all cases and note their digests")
    writing.add_argument("out", type=Path, help="the JSON file to write")
    writing.add_argument("--full", action="store_true", help="all dtypes with all poolings")
    writing.add_argument("--only", default="", metavar="TEXT", help="only cases whose name holds this text")
    comparing = commands.add_parser("compare", help="tell two such files apart; exit code 1 where they differ")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument(
        "--most", type=int, default=40, help="how many cases of a kind to name (default: %(default)s)"
    )
    chosen = parser.parse_args(arguments)
    if chosen.command == "write":
        return write(chosen.out, chosen.only, chosen.full)
    return compare(chosen.before, chosen.after, chosen.most)


if __name__ == "__main__":
    sys.exit(main())
