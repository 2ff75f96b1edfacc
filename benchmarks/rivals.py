"""The others, each as its users get it by default and at the best setting known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contestants import Built, Contestant, Skipped, one_line
from benchmarks.workload import Workload

LR = 0.01
TORCHREC, TORCHREC_FUSED = "torchrec EmbeddingBagCollection", "torchrec EmbeddingBagCollection, fused"
QR = "quotient–remainder bags"


def _arrangements(rival: str, settings: Mapping[str, dict[str, bool]]) -> dict[str, dict[str, bool]]:
    """A rival with every combination of its settings, by name; the first one is its default."""
    found: dict[str, dict[str, bool]] = {rival: {}}
    for said, setting in settings.items():
        found |= {f"{name}, {said}": {**given, **setting} for name, given in found.items()}
    return found


_INT32 = {"int32": {"int32": True}}
LOOPS = _arrangements("nn.EmbeddingBag", {"last offset": {"last": True}, **_INT32})
FLATS = _arrangements("F.embedding, one flat table", _INT32)
TBES = _arrangements("FBGEMM TBE", {"one flat table": {"one": True}, "no check": {"check": False}, **_INT32})
LOOP, FLAT, TBE = (next(iter(names)) for names in (LOOPS, FLATS, TBES))
TBE_UNCHECKED, TBE_ONE = f"{TBE}, no check", f"{TBE}, one flat table"
TBE_ONE_UNCHECKED = f"{TBE}, one flat table, no check"
#: Bytes at the most against those of the weights: with state, and with gradients and temporaries that are as large.
_FACTOR = {"sgd": 1.0, "rowwise_adagrad": 1.1, "adagrad": 2.0, "adam": 3.0, "dense adam": 6.0, "none": 1.0}
_QR_THRESHOLD = 200  # ids; DLRM's `--qr-threshold`
_COLLISIONS = 10  # ids a quotient row: a tenth of the bytes, as embtables has here


def rival_of(name: str) -> str:
    """Whose arrangement a contestant is: the name of its default."""
    return next((next(iter(names)) for names in (LOOPS, FLATS, TBES) if name in names), name)


def contestants(work: Workload, everything: bool = True) -> list[Contestant | Skipped]:
    """Who takes part; a forward is timed on the tables of (row-wise) Adagrad.

    ``everything``: every arrangement of every rival, and dense Adam too, which takes a hundred times as long.
    """
    found: list[Contestant | Skipped] = []

    def add(name: str, optimizer: str, build: Callable[[Workload], Built], **what: Any) -> None:
        size = round(work.full_bytes * _FACTOR[optimizer] * what.pop("share", 1.0))
        found.append(Contestant(name, optimizer, False, size, build, **what))

    one_table = len(work.sizes) == 1
    rivals = [(LOOPS, loop)] if one_table and work.has_bags else [(LOOPS, loop), (FLATS, flat)]
    for arrangements, tables in rivals:
        for name, settings in arrangements.items() if everything else [next(iter(arrangements.items()))]:
            all_optimizers = ("adagrad", "sgd", "adam", "dense adam")[: 4 if everything else 3 if name == LOOP else 2]
            for optimizer in ("adagrad",) if settings else all_optimizers:
                add(name, optimizer, tables(optimizer, **settings), forward=optimizer == "adagrad")
    try:
        import fbgemm_gpu  # noqa: F401
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (  # noqa: F401
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except (ImportError, OSError) as error:  # OSError: the CUDA build on a host without a driver
        for name in TBES:
            found.append(Skipped(name, "all", False, f"fbgemm_gpu cannot be imported here ({one_line(error)})"))
    else:
        for name, settings in TBES.items():
            if one_table and "one" in settings:
                continue
            main = name in (TBE, TBE_ONE_UNCHECKED)
            if main or everything:
                add(name, "rowwise_adagrad", tbe("rowwise_adagrad", **settings), forward=True)
            if main:
                for optimizer in ("sgd", "adagrad") if everything else ("sgd",):
                    add(name, optimizer, tbe(optimizer, **settings))
        found.append(Skipped(TBE, "adam", False, "FBGEMM has no Adam on CPUs"))
    if one_table:  # what torchrec and the quotient–remainder trick are for is many tables
        return found
    try:
        import torchrec  # noqa: F401
    except (ImportError, OSError) as error:
        found.append(Skipped(TORCHREC, "all", False, f"torchrec cannot be imported here ({one_line(error)})"))
    else:
        add(TORCHREC, "sgd", torchrec_sparse, forward=True)
        if everything:
            add(TORCHREC_FUSED, "rowwise_adagrad", torchrec_fused)
    add(QR, "adagrad", quotient_remainder, forward=True, share=1.2 / _COLLISIONS)
    return found


def _optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    classes: dict[str, Any] = {
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "adam": torch.optim.SparseAdam,
        "dense adam": torch.optim.Adam,
        "fused dense adam": lambda p, lr: torch.optim.Adam(p, lr=lr, fused=True),
    }
    found: torch.optim.Optimizer = classes[name](list(parameters), lr=LR)
    return found


def _fill(weight: Tensor) -> None:
    nn.init.uniform_(weight, -0.01, 0.01)


def loop(optimizer: str, last: bool = False, int32: bool = False) -> Callable[[Workload], Built]:
    """A bag a table in a Python loop, and the concatenation that a model needs; ``last``: offsets include the last."""

    def build(work: Workload) -> Built:
        sparse = not optimizer.endswith("dense adam")
        bags = [nn.EmbeddingBag(n, work.dim, mode="sum", sparse=sparse, include_last_offset=last) for n in work.sizes]
        weights = [bag.weight for bag in bags]
        vectors = _in_a_loop(bags, work.narrow if int32 else work, last)
        return Built(vectors, _optimizer(optimizer, weights), [weight.detach() for weight in weights])

    return build


def _in_a_loop(bags: Sequence[nn.Module], work: Workload, last: bool = False) -> Callable[[int], Tensor]:
    offsets = [[o if last else o[:-1] for o in every] for every in work.column_offsets]

    def vectors(batch: int) -> Tensor:
        inputs = zip(bags, work.columns[batch % work.batches], offsets[batch % work.batches])
        found = [bag(ids, of_bags) for bag, ids, of_bags in inputs]
        return torch.cat(found, dim=1) if len(found) > 1 else found[0]

    return vectors


def flat(optimizer: str, int32: bool = False) -> Callable[[Workload], Built]:
    """One table for all features, and one lookup; the rows are computed beforehand."""

    def build(work: Workload) -> Built:
        weight = nn.Parameter(torch.empty(work.num_rows, work.dim))
        _fill(weight)
        sparse = not optimizer.endswith("dense adam")
        given = work.narrow if int32 else work
        rows, offsets = given.rows, given.row_offsets if work.has_bags else []

        def vectors(batch: int) -> Tensor:
            number = batch % work.batches
            if not offsets:
                return F.embedding(rows[number], weight, sparse=sparse).view(work.batch, -1)
            bags = F.embedding_bag(
                rows[number], weight, offsets[number], mode="sum", sparse=sparse, include_last_offset=True
            )
            return bags.view(work.batch, -1)

        return Built(vectors, _optimizer(optimizer, [weight]), weight.detach().split(work.sizes))

    return build


def tbe(optimizer: str, one: bool = False, check: bool = True, int32: bool = False) -> Callable[[Workload], Built]:
    """FBGEMM's table-batched embedding: as many tables, or ``one`` for all features with rows computed beforehand."""

    def build(work: Workload) -> Built:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        kinds = {
            "sgd": EmbOptimType.EXACT_SGD,
            "adagrad": EmbOptimType.EXACT_ADAGRAD,
            "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        }
        options: dict[str, Any] = {} if check else {"bounds_check_mode": BoundsCheckMode.NONE}
        rows = [work.num_rows] if one else work.sizes
        tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(n, work.dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for n in rows],
            feature_table_map=[0] * len(work.sizes) if one else None,
            optimizer=kinds[optimizer],
            learning_rate=LR,
            **options,
        )
        tables.init_embedding_weights_uniform(-0.01, 0.01)
        given = work.narrow if int32 else work
        ids, offsets = given.rows_by_feature if one else given.by_feature, given.offsets
        weights = tables.split_embedding_weights()
        views = weights[0].split(work.sizes) if one else weights

        def vectors(batch: int) -> Tensor:
            found: Tensor = tables(ids[batch % work.batches], offsets[batch % work.batches])
            return found

        return Built(vectors, None, [v.detach() for v in views])

    return build


def _torchrec_inputs(work: Workload) -> tuple[list[Any], list[Any]]:
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    configs = [
        EmbeddingBagConfig(name=f"t_{name}", num_embeddings=n, embedding_dim=work.dim, feature_names=[name])
        for name, n in zip(work.names, work.sizes)
    ]
    features = [
        KeyedJaggedTensor(work.names, ids, lengths=offsets.diff(), offsets=offsets)
        for ids, offsets in zip(work.by_feature, work.offsets)
    ]
    return configs, features


def torchrec_sparse(work: Workload) -> Built:
    """torchrec's collection; its bags are told to make sparse gradients, without which a step is as slow as dense."""
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    configs, features = _torchrec_inputs(work)
    collection = EmbeddingBagCollection(tables=configs)
    bags = list(collection.embedding_bags.values())
    for bag in bags:
        bag.sparse = True
        _fill(bag.weight)
    weights = [bag.weight.detach() for bag in bags]
    return Built(
        lambda batch: collection(features[batch % work.batches]).values(),
        _optimizer("sgd", collection.parameters()),
        weights,
    )


def torchrec_fused(work: Workload) -> Built:
    """The collection with the optimizer in backward, over FBGEMM: what ``apply_optimizer_in_backward`` leads to."""
    import torchrec
    from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

    configs, features = _torchrec_inputs(work)
    collection = FusedEmbeddingBagCollection(
        tables=configs,
        optimizer_type=torchrec.optim.RowWiseAdagrad,
        optimizer_kwargs={"lr": LR},
        device=torch.device("cpu"),
    )
    state = collection.state_dict()
    weights = [state[f"embedding_bags.t_{name}.weight"] for name in work.names]
    return Built(lambda batch: collection(features[batch % work.batches]).values(), None, weights)


class QuotientRemainderBag(nn.Module):
    """Two bags, of quotients and of remainders, multiplied: Shi et al., Compositional Embeddings, KDD 2020."""

    def __init__(self, num_embeddings: int, dim: int) -> None:
        super().__init__()
        self.quotients = nn.EmbeddingBag(math.ceil(num_embeddings / _COLLISIONS), dim, mode="sum", sparse=True)
        self.remainders = nn.EmbeddingBag(_COLLISIONS, dim, mode="sum", sparse=True)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        quotient = self.quotients(torch.div(ids, _COLLISIONS, rounding_mode="floor"), offsets)
        product: Tensor = quotient * self.remainders(ids % _COLLISIONS, offsets)
        return product


def quotient_remainder(work: Workload) -> Built:
    """A pair of bags a feature in a Python loop, as in DLRM's reference code; small tables in full."""
    bags = nn.ModuleList(
        QuotientRemainderBag(n, work.dim)
        if n > _QR_THRESHOLD
        else nn.EmbeddingBag(n, work.dim, mode="sum", sparse=True)
        for n in work.sizes
    )
    return Built(_in_a_loop(list(bags), work), _optimizer("adagrad", bags.parameters()))
