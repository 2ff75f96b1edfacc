"""DeepFM: Guo et al., DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, IJCAI 2017."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from embtables.models.blocks import MLP, check_positive, first_and_rest, join, pooled

if TYPE_CHECKING:
    from embtables.datasets import Batch
    from embtables.tables import EmbeddingTables

__all__ = ["DeepFM"]


class DeepFM(nn.Module):
    """A factorization machine and an MLP on the same vectors, their logits added.

    The first component of every vector is the feature's first-order weight w, the other D − 1 are its latent vector v.
    Published code keeps w in a table of its own; here one table serves both, so that one budget counts all of it and a
    compressed table compresses all of it. With x_j the value of dense feature j, and 1 for an id,

        logit = Σ_j w_j·x_j + Σ_{i<j} ⟨v_i, v_j⟩·x_i·x_j + MLP([v of the ids, dense features])        (eq. 1–4)

    Dense features have a w and a v each, which are the model's. Multi-valued features come pooled, as their tables say.

    Args:
        embeddings: the tables; all their ``embedding_dims`` must be equal, and 2 at least.
        num_dense_features: columns of ``batch.dense``; may be 0.
        units: hidden units of the MLP.
        activation: ``"relu"``, ``"sigmoid"``, ``"prelu"`` or ``"dice"``.
        dropout: dropout after every hidden layer of the MLP.
        batch_norm: batch normalization before every activation of the MLP.

    Raises:
        ValueError: vectors of different sizes or of size 1; no embeddings; hyperparameters out of range.

    Example::

        model = DeepFM(tables, num_dense_features=13, units=(400, 400, 400))
        logits = model(batch)  # [B]
    """

    def __init__(
        self,
        embeddings: EmbeddingTables,
        num_dense_features: int,
        *,
        units: Sequence[int] = (128, 64),
        activation: str = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_positive("units", units)
        self.dims = list(embeddings.embedding_dims)
        if not self.dims:
            raise ValueError("DeepFM needs at least one embedding; use --model mlp")
        if len(set(self.dims)) > 1:
            listed = ", ".join(f"{name}={dim}" for name, dim in zip(embeddings.output_names, self.dims))
            raise ValueError(
                f"DeepFM takes dot products, so all embedding_dims must be equal, not {listed}; "
                "give the tables one embedding_dim or use --model wide_deep"
            )
        if self.dims[0] < 2:
            raise ValueError(
                "DeepFM takes a first-order weight and a latent vector from each embedding, so embedding_dim must be 2 "
                "at least, not 1"
            )
        self.embeddings = embeddings
        self.latent_dim = self.dims[0] - 1
        self.dense_weight = nn.Linear(num_dense_features, 1, bias=False) if num_dense_features else None
        self.dense_latent = (
            nn.Parameter(torch.empty(num_dense_features, self.latent_dim).normal_(std=0.01))
            if num_dense_features
            else None
        )
        self.hidden = MLP(len(self.dims) * self.latent_dim + num_dense_features, units, dropout, activation, batch_norm)
        self.output = nn.Linear(self.hidden.num_outputs, 1)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        weights, latent = first_and_rest(pooled(self.embeddings, batch), self.dims)
        logits: Tensor = self.output(self.hidden(join([latent, batch.dense]))).squeeze(1) + weights.sum(1)
        vectors = latent.unflatten(1, (-1, self.latent_dim))
        total, squares = vectors.sum(1), vectors.square().sum(1)
        if self.dense_weight is not None and self.dense_latent is not None:
            logits = logits + self.dense_weight(batch.dense).squeeze(1)
            total = total + batch.dense @ self.dense_latent
            squares = squares + batch.dense.square() @ self.dense_latent.square()
        return logits + 0.5 * (total.square() - squares).sum(1)
