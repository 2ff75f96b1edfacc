"""The others, each as its users get it by default and at the best setting known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contestants import Built, Contestant, Skipped, one_line
from benchmarks.workload import Workload

LR = 0.01
LOOP, FLAT = "nn.EmbeddingBag × 26", "F.embedding, one flat table"
TBE, TBE_BEST = "FBGEMM TBE, default", "FBGEMM TBE, one table, no check"
TBE_UNCHECKED, TBE_ONE = "FBGEMM TBE, 26 tables, no check", "FBGEMM TBE, one table"
TORCHREC, TORCHREC_FUSED = "torchrec EmbeddingBagCollection", "torchrec EmbeddingBagCollection, fused"
QR = "quotient–remainder bags × 26"
#: Bytes at the most against those of the weights: with state, and with gradients and temporaries that are as large.
_FACTOR = {"sgd": 1.0, "rowwise_adagrad": 1.1, "adagrad": 2.0, "adam": 3.0, "dense adam": 6.0, "none": 1.0}
_QR_THRESHOLD = 200  # ids; DLRM's `--qr-threshold`
_COLLISIONS = 10  # ids a quotient row: a tenth of the bytes, as embtables has here


def contestants(work: Workload, everything: bool = True) -> list[Contestant | Skipped]:
    """``everything``: dense Adam too, which takes a hundred times as long, and every form of every rival."""
    found: list[Contestant | Skipped] = []

    def add(name: str, optimizer: str, build: Callable[[Workload], Built], **what: Any) -> None:
        size = round(work.full_bytes * _FACTOR[optimizer] * what.pop("share", 1.0))
        found.append(Contestant(name, optimizer, False, size, build, **what))

    sparse = ("sgd", "adagrad", "adam", "dense adam")[: 4 if everything else 3]
    for name, tables in ((LOOP, loop), (FLAT, flat)):
        for optimizer in sparse if everything or name == LOOP else sparse[:2]:
            add(name, optimizer, tables(optimizer), forward=optimizer == "sgd")
    try:
        import fbgemm_gpu  # noqa: F401
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (  # noqa: F401
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except (ImportError, OSError) as error:  # OSError: the CUDA build on a host without a driver
        for name in (TBE, TBE_UNCHECKED, TBE_ONE, TBE_BEST):
            found.append(Skipped(name, "all", False, f"fbgemm_gpu cannot be imported here ({one_line(error)})"))
    else:
        for optimizer in ("sgd", "rowwise_adagrad", "adagrad"):
            if everything or optimizer != "adagrad":
                add(TBE, optimizer, tbe(optimizer), forward=optimizer == "sgd")
            add(TBE_BEST, optimizer, tbe(optimizer, one=True, check=False), forward=optimizer == "sgd")
        if everything:
            add(TBE_UNCHECKED, "none", tbe("sgd", check=False), forward=True, step=False)
        add(TBE_ONE, "none", tbe("sgd", one=True), forward=True, step=False)
        for name in (TBE, TBE_BEST):
            found.append(Skipped(name, "adam", False, "FBGEMM has no Adam on CPUs"))
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


def loop(optimizer: str) -> Callable[[Workload], Built]:
    """A bag a table in a Python loop, and the concatenation that a model needs."""

    def build(work: Workload) -> Built:
        sparse = not optimizer.endswith("dense adam")
        bags = [nn.EmbeddingBag(n, work.dim, mode="sum", sparse=sparse) for n in work.sizes]
        offsets = torch.arange(work.batch)

        def vectors(batch: int) -> Tensor:
            columns = work.columns[batch % work.batches]
            return torch.cat([bag(ids, offsets) for bag, ids in zip(bags, columns)], dim=1)

        weights = [bag.weight for bag in bags]
        return Built(vectors, _optimizer(optimizer, weights), [weight.detach() for weight in weights])

    return build


def flat(optimizer: str) -> Callable[[Workload], Built]:
    """One table for all features, and one lookup; the rows are computed beforehand."""

    def build(work: Workload) -> Built:
        weight = nn.Parameter(torch.empty(work.num_rows, work.dim))
        _fill(weight)
        sparse = not optimizer.endswith("dense adam")

        def vectors(batch: int) -> Tensor:
            return F.embedding(work.rows[batch % work.batches], weight, sparse=sparse).view(work.batch, -1)

        return Built(vectors, _optimizer(optimizer, [weight]), weight.detach().split(work.sizes))

    return build


def tbe(optimizer: str, one: bool = False, check: bool = True) -> Callable[[Workload], Built]:
    """FBGEMM's table-batched embedding: 26 tables, or ``one`` for all features with rows computed beforehand."""

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
        ids = work.rows_by_feature if one else work.by_feature
        offsets = torch.arange(work.num_ids + 1)
        weights = tables.split_embedding_weights()
        views = weights[0].split(work.sizes) if one else weights
        return Built(lambda batch: tables(ids[batch % work.batches], offsets), None, [v.detach() for v in views])

    return build


def _torchrec_inputs(work: Workload) -> tuple[list[Any], list[Any]]:
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    configs = [
        EmbeddingBagConfig(name=f"t_{name}", num_embeddings=n, embedding_dim=work.dim, feature_names=[name])
        for name, n in zip(work.names, work.sizes)
    ]
    lengths, offsets = torch.ones(work.num_ids, dtype=torch.int64), torch.arange(work.num_ids + 1)
    features = [KeyedJaggedTensor(work.names, ids, lengths=lengths, offsets=offsets) for ids in work.by_feature]
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
    offsets = torch.arange(work.batch)

    def vectors(batch: int) -> Tensor:
        return torch.cat([bag(ids, offsets) for bag, ids in zip(bags, work.columns[batch % work.batches])], dim=1)

    return Built(vectors, _optimizer("adagrad", bags.parameters()))
