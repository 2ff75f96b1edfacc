"""A model of your own under `embtables train` and `embtables sweep`, beside the same model on plain nn.Embedding.

    embtables prepare synthetic - data/demo --rows 100000 --cardinalities 20000,2000,200
    PYTHONPATH=. embtables train data/demo --model examples.own_model:FactorizationMachine \
        --method hash --budget 10% --out runs/fm

`Before` is how such a model is usually written. `FactorizationMachine` is what becomes of it: a table a feature gives
way to one `EmbeddingTables`, which the command line plans for the method and the budget. Run as a script, this file
shows that both compute the same where the method is `full`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embtables import EmbeddingTables, TableConfig, plan
from embtables.datasets import Batch


def pairwise(vectors: Tensor) -> Tensor:
    """Sum of the dot products of all pairs of `vectors` [B, F, D], as [B] (Rendle, 2010)."""
    return 0.5 * (vectors.sum(1).square() - vectors.square().sum(1)).sum(1)


class Before(nn.Module):
    """A factorization machine over one nn.Embedding a feature."""

    def __init__(self, num_embeddings: list[int], embedding_dim: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, embedding_dim) for n in num_embeddings)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        vectors = torch.stack([table(ids[:, f]) for f, table in enumerate(self.embeddings)], dim=1)
        return self.bias + pairwise(vectors)


class FactorizationMachine(nn.Module):
    """The same over `EmbeddingTables`, with the constructor that `--model package.module:Class` asks for.

    Args:
        embeddings: tables of one embedding_dim.
        num_dense_features: columns of ``batch.dense``; they enter linearly.
        dropout: of the vectors' elements. Any keyword with a default is a hyperparameter:
            ``--set model.hyperparameters.dropout=0.1``.
    """

    def __init__(self, embeddings: EmbeddingTables, num_dense_features: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        dims = set(embeddings.embedding_dims)
        if len(dims) != 1:
            raise ValueError(f"FactorizationMachine needs tables of one embedding_dim, not {sorted(dims)}")
        self.embeddings = embeddings
        self.dim = dims.pop()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(num_dense_features, 1) if num_dense_features else None
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch) -> Tensor:
        vectors = self.dropout(self.embeddings(batch.ids).view(len(batch.ids), -1, self.dim))
        logits = self.bias + pairwise(vectors)
        return logits if self.linear is None else logits + self.linear(batch.dense).squeeze(1)


def main() -> None:
    torch.manual_seed(0)
    sizes, dim = [5_000, 300, 20], 8
    before = Before(sizes, dim)
    tables = [TableConfig(f"feature_{f}", size, dim) for f, size in enumerate(sizes)]
    after = FactorizationMachine(EmbeddingTables(plan(tables, "full")), num_dense_features=0)
    with torch.no_grad():
        for table, embedding in zip(tables, before.embeddings):
            embedding.weight.copy_(after.embeddings.to_dense(table.name))

    ids = torch.stack([torch.randint(size, (256,)) for size in sizes], dim=1)
    batch = Batch(labels=torch.zeros(256), dense=torch.zeros(256, 0), ids=ids, groups=None)
    difference = (before(ids) - after(batch)).abs().max().item()
    print(f"full tables: largest difference {difference:.1e} to the model on nn.Embedding")
    assert difference < 1e-5
    for budget in ("50%", "10%", "1%"):
        compressed = FactorizationMachine(EmbeddingTables(plan(tables, "compositional", budget)), 0)
        size, shape = compressed.embeddings.memory().inference_bytes, tuple(compressed(batch).shape)
        print(f"{budget:>4}: {size:>7,} bytes, logits {shape}")


if __name__ == "__main__":
    main()
