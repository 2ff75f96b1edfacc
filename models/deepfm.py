"""DeepFM: Guo et al., DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, IJCAI 2017."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from embtables.models.blocks import MLP, check_positive, join
from embtables.models.fm import Factors

if TYPE_CHECKING:
    from embtables.datasets import Batch
    from embtables.tables import EmbeddingTables

__all__ = ["DeepFM"]


class DeepFM(Factors):
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
        input_dropout: dropout of what the MLP sees.
        embedding_dropout: dropout of the vectors as they leave the tables.
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
        input_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__(embeddings, num_dense_features, embedding_dropout)
        check_positive("units", units)
        num_inputs = len(self.dims) * self.latent_dim + num_dense_features
        self.hidden = MLP(num_inputs, units, dropout, activation, batch_norm, input_dropout)
        self.output = nn.Linear(self.hidden.num_outputs, 1)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        weights, latent = self.looked_up(batch)
        deep: Tensor = self.output(self.hidden(join([latent, batch.dense]))).squeeze(1)
        return deep + self.factorized(weights, latent, batch.dense)
