"""Lookups and training steps against their rivals, interleaved in one process; ratios of medians.

    python benchmarks/lookup.py --steps 60

Workload: 26 tables with the cardinalities of Criteo-Kaggle, those above 1,000 divided by ten, D = 16, one id a feature,
batch 2048, Zipf 1.05. Rivals at their best setting: forward against one `embedding_bag` over all rows with the same
ids; the training step against FBGEMM's table-batched embedding as one table with 26 features and no bounds check (where
fbgemm is installed) and against `nn.Embedding` over one flat table with sparse gradients.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from embtables import EmbeddingTables, TableConfig, plan
from embtables.methods import kinds

CARDINALITIES = (
    [1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194]
    + [27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572]
)  # fmt: skip
BATCH, DIM, LR = 2048, 16, 0.05


def zipf_ids(generator: np.random.Generator, num_ids: int, exponent: float = 1.05) -> np.ndarray:
    weights = np.arange(1, num_ids + 1, dtype=np.float64) ** -exponent
    cumulative = np.cumsum(weights)
    return np.searchsorted(cumulative, generator.random(BATCH) * cumulative[-1])


def fbgemm_step(num_rows: int, flat: torch.Tensor, grad: torch.Tensor) -> Callable[[], object] | None:
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except (ImportError, OSError):
        return None
    num_features = flat.numel() // BATCH
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(num_rows, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        feature_table_map=[0] * num_features,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LR,
        bounds_check_mode=BoundsCheckMode.NONE,
    )
    offsets = torch.arange(flat.numel() + 1)
    return lambda: tables(flat, offsets).backward(grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="interleaved runs of each contestant")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = np.random.default_rng(0)
    sizes = [n if n <= 1000 else n // 10 for n in CARDINALITIES]
    ids = torch.from_numpy(np.stack([zipf_ids(generator, n) for n in sizes], axis=1))
    tables = [TableConfig(f"C{i + 1}", n, DIM) for i, n in enumerate(sizes)]
    counts = {t.name: np.sort(generator.zipf(1.2, n).clip(max=10**6))[::-1] for t, n in zip(tables, sizes)}
    bases = torch.tensor([0, *np.cumsum(sizes)[:-1].tolist()])
    flat = (ids + bases).t().reshape(-1)
    grad = torch.randn(BATCH, len(sizes) * DIM)

    weight = torch.randn(sum(sizes), DIM)
    offsets = torch.arange(flat.numel())
    forward: dict[str, Callable[[], object]] = {"one embedding_bag": lambda: F.embedding_bag(flat, weight, offsets)}
    table = torch.nn.Embedding(sum(sizes), DIM, sparse=True)
    optimizer = torch.optim.Adagrad(table.parameters(), lr=LR)

    def sparse_adagrad() -> None:
        optimizer.zero_grad()
        table(flat).backward(grad.view(-1, DIM))
        optimizer.step()

    step: dict[str, Callable[[], object]] = {"flat nn.Embedding, sparse Adagrad": sparse_adagrad}
    fbgemm = fbgemm_step(sum(sizes), flat, grad)
    if fbgemm is not None:
        step["FBGEMM, row-wise Adagrad"] = fbgemm
    for kind in kinds():
        budget, fused = None if kind == "full" else "10%", "adagrad" if kind == "robe" else "rowwise_adagrad"
        module = EmbeddingTables(plan(tables, kind, budget, counts, fused))

        def look_up(module: EmbeddingTables = module) -> None:
            with torch.no_grad():
                module(ids)

        def train(module: EmbeddingTables = module) -> None:
            module(ids).backward(grad)

        forward[kind] = look_up
        if kind != "drop_feature":
            step[kind] = train

    for title, contestants in (("forward", forward), ("training step", step)):
        medians = interleaved(contestants, arguments.steps)
        rivals = [name for name in medians if name not in kinds()]
        print(f"\n{title}, {arguments.threads} thread{'s' * (arguments.threads > 1)}: ms, and ratio to {rivals[-1]}")
        for name, milliseconds in medians.items():
            print(f"  {name:36} {milliseconds:8.2f} {milliseconds / medians[rivals[-1]]:8.2f}")


def interleaved(contestants: dict[str, Callable[[], object]], steps: int) -> dict[str, float]:
    """Median milliseconds of each, run in turn so that a drift of the machine's speed meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(steps + 3):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if number >= 3:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
