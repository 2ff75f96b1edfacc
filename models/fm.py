"""Factorization machines: Rendle, Factorization Machines, ICDM 2010."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from embtables.models.blocks import dropout_layer, first_and_rest, pooled

if TYPE_CHECKING:
    from embtables.datasets import Batch
    from embtables.tables import EmbeddingTables

__all__ = ["FM", "Factors"]


class Factors(nn.Module):
    """First-order weights and latent vectors of all features: what FM and DeepFM have in common.

    The first component of every vector is the feature's first-order weight w, the other D − 1 are its latent vector v.
    Dense features have a w and a v each, which are the model's.
    """

    def __init__(self, embeddings: EmbeddingTables, num_dense_features: int, embedding_dropout: float = 0.0) -> None:
        super().__init__()
        name = type(self).__name__
        self.dims = list(embeddings.embedding_dims)
        if not self.dims:
            raise ValueError(f"{name} needs at least one embedding; use --model mlp")
        if len(set(self.dims)) > 1:
            listed = ", ".join(f"{name}={dim}" for name, dim in zip(embeddings.output_names, self.dims))
            raise ValueError(
                f"{name} takes dot products, so all embedding_dims must be equal, not {listed}; "
                "give the tables one embedding_dim or use --model wide_deep"
            )
        if self.dims[0] < 2:
            raise ValueError(
                f"{name} takes a first-order weight and a latent vector from each embedding, so embedding_dim must be "
                "2 at least, not 1"
            )
        self.embeddings = embeddings
        self.embedding_dropout = dropout_layer("embedding_dropout", embedding_dropout)
        self.latent_dim = self.dims[0] - 1
        self.dense_weight = nn.Linear(num_dense_features, 1, bias=False) if num_dense_features else None
        self.dense_latent = (
            nn.Parameter(torch.empty(num_dense_features, self.latent_dim).normal_(std=0.01))
            if num_dense_features
            else None
        )

    def looked_up(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The first-order weights [B, F] and the latent vectors [B, F·(D − 1)] of the ids."""
        return first_and_rest(self.embedding_dropout(pooled(self.embeddings, batch)), self.dims)

    def factorized(self, weights: Tensor, latent: Tensor, dense: Tensor) -> Tensor:
        """Σ_j w_j·x_j + Σ_{i<j} ⟨v_i, v_j⟩·x_i·x_j, [B]: x is 1 for an id, and the value of a dense feature."""
        vectors = latent.unflatten(1, (-1, self.latent_dim))
        total, squares, logits = vectors.sum(1), vectors.square().sum(1), weights.sum(1)
        if self.dense_weight is not None and self.dense_latent is not None:
            logits = logits + self.dense_weight(dense).squeeze(1)
            total = total + dense @ self.dense_latent
            squares = squares + dense.square() @ self.dense_latent.square()
        return logits + 0.5 * (total.square() - squares).sum(1)


class FM(Factors):
    """A factorization machine of degree 2 (eq. 1), in linear time (Lemma 3.1).

        logit = b + Σ_j w_j·x_j + Σ_{i<j} ⟨v_i, v_j⟩·x_i·x_j

    with x = 1 for an id. One table holds an id's w, its first component, and its v, the others.

    Args:
        embeddings: the tables; all their ``embedding_dims`` must be equal, and 2 at least.
        num_dense_features: columns of ``batch.dense``; may be 0.
        embedding_dropout: dropout of the vectors as they leave the tables.

    Raises:
        ValueError: vectors of different sizes or of size 1; no embeddings; a rate outside [0, 1).

    Example::

        model = FM(tables, num_dense_features=13)
        logits = model(batch)  # [B]
    """

    def __init__(self, embeddings: EmbeddingTables, num_dense_features: int, *, embedding_dropout: float = 0.0) -> None:
        super().__init__(embeddings, num_dense_features, embedding_dropout)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        return self.bias + self.factorized(*self.looked_up(batch), batch.dense)
