"""Logistic regression over ids: the baseline that costs one scalar for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from embtables.models.blocks import pooled

if TYPE_CHECKING:
    from embtables.datasets import Batch
    from embtables.tables import EmbeddingTables

__all__ = ["LR"]


class LR(nn.Module):
    """A weight for each id and each dense feature, and a bias: logit = b + Σ_j w_j·x_j, with x = 1 for an id.

    Args:
        embeddings: the tables, of ``embedding_dim`` 1.
        num_dense_features: columns of ``batch.dense``; may be 0.

    Raises:
        ValueError: tables of another ``embedding_dim``; neither embeddings nor dense features.

    Example::

        model = LR(tables, num_dense_features=13)
        logits = model(batch)  # [B]
    """

    def __init__(self, embeddings: EmbeddingTables, num_dense_features: int) -> None:
        super().__init__()
        wide = [f"{n}={d}" for n, d in zip(embeddings.output_names, embeddings.embedding_dims) if d != 1]
        if wide:
            raise ValueError(f"LR has one weight for each id, so embedding_dim must be 1, not {', '.join(wide)}")
        if not embeddings.output_names and not num_dense_features:
            raise ValueError("LR needs at least one embedding or dense feature")
        self.embeddings = embeddings
        self.dense_weight = nn.Linear(num_dense_features, 1, bias=False) if num_dense_features else None
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        logits = pooled(self.embeddings, batch).sum(1) + self.bias
        return logits if self.dense_weight is None else logits + self.dense_weight(batch.dense).squeeze(1)
