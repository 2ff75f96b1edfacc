"""A plain MLP over the concatenated vectors and dense features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from embtables.models.blocks import MLP as Layers
from embtables.models.blocks import check_positive, dropout_layer, join, pooled

if TYPE_CHECKING:
    from embtables.datasets import Batch
    from embtables.tables import EmbeddingTables

__all__ = ["MLP"]


class MLP(nn.Module):
    """Hidden layers over [vectors, dense features], then one logit. The vectors may have different sizes.

    Args:
        embeddings: the tables.
        num_dense_features: columns of ``batch.dense``; may be 0.
        units: hidden units.
        dropout: dropout after every hidden layer.
        input_dropout: dropout of what the first layer sees.
        embedding_dropout: dropout of the vectors as they leave the tables.
        activation: ``"relu"``, ``"sigmoid"``, ``"prelu"`` or ``"dice"``.
        batch_norm: batch normalization before every activation.

    Raises:
        ValueError: hyperparameters out of range; neither embeddings nor dense features.

    Example::

        model = MLP(tables, num_dense_features=0, units=(256, 128))
        logits = model(batch)  # [B]
    """

    def __init__(
        self,
        embeddings: EmbeddingTables,
        num_dense_features: int,
        *,
        units: Sequence[int] = (128, 64),
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        activation: str = "relu",
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_positive("units", units)
        num_inputs = sum(embeddings.embedding_dims) + num_dense_features
        if num_inputs == 0:
            raise ValueError("MLP needs at least one embedding or dense feature")
        self.embeddings = embeddings
        self.embedding_dropout = dropout_layer("embedding_dropout", embedding_dropout)
        self.hidden = Layers(num_inputs, units, dropout, activation, batch_norm, input_dropout)
        self.output = nn.Linear(self.hidden.num_outputs, 1)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        inputs = join([self.embedding_dropout(pooled(self.embeddings, batch)), batch.dense])
        logits: Tensor = self.output(self.hidden(inputs))
        return logits.squeeze(1)
