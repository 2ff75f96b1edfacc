"""Wide & Deep: Cheng et al., Wide & Deep Learning for Recommender Systems, DLRS 2016."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from embtables.models.blocks import MLP, check_positive, dropout_layer, first_and_rest, join, pooled

if TYPE_CHECKING:
    from embtables.datasets import Batch
    from embtables.tables import EmbeddingTables

__all__ = ["WideDeep"]


class WideDeep(nn.Module):
    """A linear model and an MLP on the same features, their logits added (eq. 3).

    The first component of every vector is the feature's weight in the wide part, the others are its embedding in the
    deep part. Published code keeps the weights in tables of their own; here one table serves both, so that one budget
    counts all of it and a compressed table compresses all of it. A table of ``embedding_dim`` 1 is in the wide part
    alone: the place for crossed features (φ in the paper), which are features of the data as any other. Both parts see
    the dense features.

    Args:
        embeddings: the tables; their ``embedding_dims`` may differ.
        num_dense_features: columns of ``batch.dense``; may be 0.
        units: hidden units of the MLP.
        activation: ``"relu"``, ``"sigmoid"``, ``"prelu"`` or ``"dice"``.
        dropout: dropout after every hidden layer of the MLP.
        input_dropout: dropout of what the MLP sees.
        embedding_dropout: dropout of the vectors as they leave the tables.
        batch_norm: batch normalization before every activation of the MLP.

    Raises:
        ValueError: nothing for the deep part; no embeddings; hyperparameters out of range.

    Example::

        model = WideDeep(tables, num_dense_features=13, units=(256, 128))
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
        input_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_positive("units", units)
        self.dims = list(embeddings.embedding_dims)
        if not self.dims:
            raise ValueError("WideDeep needs at least one embedding; use --model mlp")
        num_inputs = sum(self.dims) - len(self.dims) + num_dense_features
        if num_inputs == 0:
            raise ValueError(
                "WideDeep takes the first component of each embedding for its wide part, and nothing is left for the "
                "deep one: give some table an embedding_dim of 2 or more"
            )
        self.embeddings = embeddings
        self.embedding_dropout = dropout_layer("embedding_dropout", embedding_dropout)
        self.dense_weight = nn.Linear(num_dense_features, 1, bias=False) if num_dense_features else None
        self.hidden = MLP(num_inputs, units, dropout, activation, batch_norm, input_dropout)
        self.output = nn.Linear(self.hidden.num_outputs, 1)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        weights, vectors = first_and_rest(self.embedding_dropout(pooled(self.embeddings, batch)), self.dims)
        logits: Tensor = self.output(self.hidden(join([vectors, batch.dense]))).squeeze(1) + weights.sum(1)
        return logits if self.dense_weight is None else logits + self.dense_weight(batch.dense).squeeze(1)
