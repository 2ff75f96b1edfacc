"""Tables and batches for the tests of the models, and formulas written out in numpy float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtables import EmbeddingTables, TableConfig, plan
from embtables.datasets import Batch, Jagged

COLUMNS = (("user", "user"), ("item", "item"), ("category", "category"))
LISTS = (("user", "user"), ("item", "item history"), ("category", "category category_history"), ("tags", "tags"))
SIZES = {"user": 40, "item": 60, "category": 8, "tags": 12}


def make_tables(
    features: Sequence[tuple[str, str]] = LISTS,
    dim: int | Mapping[str, int] = 8,
    method: Any = "full",
    budget: Any = None,
    optimizer: Any = None,
    padding: int | None = None,
    std: float | None = 0.5,
) -> EmbeddingTables:
    """Tables by name, each with the features that follow it; ``dim`` may be one a table."""
    configs = [
        TableConfig(
            name, SIZES[name], dim if isinstance(dim, int) else dim[name], names.split(), "mean", "error", padding
        )
        for name, names in features
    ]
    return EmbeddingTables(plan(configs, method, budget, optimizer=optimizer), seed=1, std=std)


def make_batch(
    features: Sequence[tuple[str, str]] = LISTS,
    lengths: Sequence[int] = (3, 0, 1, 6, 2, 4),
    num_dense: int = 0,
    seed: int = 0,
) -> Batch:
    """Random ids ≥ 1; histories have these lengths, and ``tags`` the same, the other way round."""
    generator = torch.Generator().manual_seed(seed)

    def draw(table: str, number: int) -> Tensor:
        return torch.randint(1, SIZES[table], (number,), generator=generator)

    size, columns, lists = len(lengths), [], {}
    for table, names in features:
        plain, *histories = names.split()
        if plain == "tags":
            lists[plain] = Jagged(draw(table, sum(lengths)), offsets_of(lengths[::-1]))
        else:
            columns.append(draw(table, size))
        lists |= {history: Jagged(draw(table, sum(lengths)), offsets_of(lengths)) for history in histories}
    ids = torch.stack(columns, dim=1) if columns else torch.zeros(size, 0, dtype=torch.int64)
    labels = torch.randint(2, (size,), generator=generator).float()
    return Batch(labels, torch.randn(size, num_dense, generator=generator), ids, None, lists)


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))


def take(batch: Batch, rows: Sequence[int]) -> Batch:
    """These rows of a batch, in this order."""
    lists = {}
    for name, (values, offsets) in batch.lists.items():
        parts = [values[offsets[row] : offsets[row + 1]] for row in rows]
        lists[name] = Jagged(torch.cat(parts), offsets_of([len(part) for part in parts]))
    index = torch.tensor(rows)
    return Batch(batch.labels[index], batch.dense[index], batch.ids[index], None, lists)


# ---- numpy -----------------------------------------------------------------------------------------------------------


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)


def weights(tables: EmbeddingTables) -> dict[str, np.ndarray]:
    return {table.name: array(tables.to_dense(table.name)) for table in tables.plan.tables}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def layers(module: nn.Module) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight and bias of the linear layers, in order."""
    return [(array(m.weight), array(m.bias)) for m in module.modules() if isinstance(m, nn.Linear)]


def relu_mlp(x: np.ndarray, module: nn.Module) -> np.ndarray:
    for weight, bias in layers(module):
        x = np.maximum(weight @ x + bias, 0)
    return x


def count(model: nn.Module) -> int:
    """Parameters beside the tables."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embeddings."))
