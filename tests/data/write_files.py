"""Writes files as the present version of the library writes them, for later versions to read.

    python -m tests.data.write_files        # from the root of the repository

makes the folder ``tests/data/files-<version>``, once for each version of the format: it refuses to write over one that
is there, since what matters is that the code of that time wrote it. ``tests/tables/test_old_files.py`` reads all
folders.

A folder holds served tables of every method and variant, a plan as JSON, a state dict with its optimizer state of
tables in training under that plan, and in ``expected.safetensors`` what each gives for fixed ids, and after one more
step of training. All weights are rounded to multiples of 1/64. Sums and products of those are exact in float32, in any
order, so that every machine has to find the very same bits; a mean divides by a number that is no power of two, which
rounds once.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import embtables
from benchmarks.bits import methods
from embtables import EmbeddingTables, TableConfig, ops, plan

TABLES = [
    TableConfig("a", 30, 6, on_out_of_range="hash"),
    TableConfig("b", 90, 6, ["b", "history"], on_out_of_range="oov", padding_idx=2, pooling="mean"),
    TableConfig("c", 12, 4),
]
WIDE = [TableConfig("a", 20, 64), TableConfig("b", 10, 64, padding_idx=0)]

# What tables in training are stored as: pruned ones count their steps, and the ranks of unranked ids are in no JSON.
TRAINED = {
    "a": {"kind": "pruned", "warmup_steps": 1, "prune_steps": 4, "interval": 1},
    "b": {"kind": "robe", "block_size": 4, "signs": True},
    "*": {"kind": "compositional", "operation": "concat"},
}
OPTIMIZER = {"kind": "adam", "lr": 0.0625, "l2": 0.125, "clip_row_norm": 0.5}


class Served(NamedTuple):
    """A file, and the arguments of the plan of what it holds; ``frequencies`` are ``"ranked"`` or ``"unranked"``."""

    name: str
    tables: list[TableConfig]
    method: Any
    budget: Any
    frequencies: str


def served_files() -> Iterator[Served]:
    pruned = methods()["pruned"]
    for label, method in methods().items():
        yield Served(label, TABLES, method, None if label == "full" else "50%", "ranked")
    for kind in ("frequency_cutoff", "mixed_dimension"):
        yield Served(f"{kind} by rank", TABLES, kind, "50%", "unranked")
    yield Served("pruned entries", TABLES, pruned, "5%", "ranked")
    yield Served("pruned compressed rows", WIDE, pruned, "5%", "ranked")


def counts(tables: list[TableConfig], how: str) -> dict[str, np.ndarray[Any, Any]]:
    falling = {t.name: np.maximum(1, 500 // np.arange(1, (t.num_embeddings or 0) + 1)) for t in tables}
    if how == "ranked":
        return falling
    return {name: np.random.default_rng(len(n)).permutation(n) for name, n in falling.items()}


def fixed_ids(tables: EmbeddingTables) -> Tensor:
    """``[16, F]``: ids from all over each table, padding, and some out of range where that is no error."""
    generator = torch.Generator().manual_seed(1)
    columns = []
    for feature in tables.feature_names:
        table = next(t for t in tables.plan.tables if feature in t.feature_names)
        ids = torch.randint(table.num_embeddings or 0, (16,), generator=generator)
        if table.padding_idx is not None:
            ids[3] = table.padding_idx
        if table.on_out_of_range != "error":
            ids[5:7] = torch.tensor([1000, -1])
        columns.append(ids)
    return torch.stack(columns, 1)


@torch.no_grad()
def round_weights(tables: EmbeddingTables) -> None:
    for tensor in tables.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_((tensor * 64).round() / 64)


def step(tables: EmbeddingTables, ids: Tensor) -> None:
    """A training step whose loss is the sum of all outputs, weighted by 1/8, 2/8, … along each vector."""
    output = tables(ids, pooling="sum")
    output.backward(torch.arange(1.0, output.shape[1] + 1).expand_as(output) / 8)


def write(folder: Path) -> None:
    folder.mkdir(parents=True)
    expected: dict[str, Tensor] = {}
    for name, configs, method, budget, how in served_files():
        tables = EmbeddingTables(plan(configs, method, budget, counts(configs, how), "sgd"), seed=1, std=0.5)
        ids = fixed_ids(tables)
        for _ in range(3):
            step(tables, ids)
        round_weights(tables)
        stem = re.sub(r"\W+", "_", name)
        tables.save(folder / f"{stem}.safetensors")
        found = EmbeddingTables.load(folder / f"{stem}.safetensors").lookup(ids, pooling=None)
        expected |= {f"{stem}/ids": ids} | {f"{stem}/{output}": vectors for output, vectors in found.items()}

    tables = EmbeddingTables(plan(TABLES, TRAINED, "50%", optimizer=OPTIMIZER), seed=1, std=0.5)
    ids = fixed_ids(tables)
    for _ in range(3):
        step(tables, ids)
    round_weights(tables)
    (folder / "plan.json").write_text(json.dumps(tables.plan.to_dict(), indent=1) + "\n", encoding="utf-8")
    saved = {"state_dict": tables.state_dict(), "optimizer_state_dict": tables.optimizer_state_dict()}
    torch.save(saved, folder / "training.pt")
    expected["training/ids"] = ids
    expected |= {f"training/dense/{t.name}": tables.to_dense(t.name) for t in TABLES}
    step(tables, ids)
    expected |= {f"training/dense after a step/{t.name}": tables.to_dense(t.name) for t in TABLES}
    save_file(expected, folder / "expected.safetensors")


def main() -> int:
    folder = Path(__file__).parent / f"files-{embtables.__version__}"
    if folder.exists():
        print(f"{folder} is there already, and belongs to the version that wrote it", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    with ops.using("reference"):
        write(folder)
    files = list(folder.iterdir())
    print(f"{len(files)} files, {sum(file.stat().st_size for file in files):,} bytes: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
