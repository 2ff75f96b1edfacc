"""DLRM: Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems, 2019."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from embtables.models.blocks import MLP, check_choice, check_positive, dropout_layer, join, pooled

if TYPE_CHECKING:
    from embtables.datasets import Batch
    from embtables.tables import EmbeddingTables

__all__ = ["DLRM"]


class DLRM(nn.Module):
    """Dot products of all pairs of vectors, and an MLP over them; or the vectors themselves, and an MLP over them.

    The dense features pass a bottom MLP and become one more vector, x of size D. With vectors v_1 … v_m (x first, if
    there is one), the top MLP sees x and the m(m - 1)/2 dot products v_i · v_j, i > j (row by row of the lower
    triangle), and ends in one logit. Without dense features x is absent.

    With ``interaction="cat"`` the top MLP sees v_1 … v_m in place of x and the dot products, as the ``interaction_op``
    of the same name does elsewhere.

    Args:
        embeddings: the tables; all their ``embedding_dims`` must be equal.
        num_dense_features: columns of ``batch.dense``; may be 0.
        bottom_units: hidden units of the bottom MLP, whose last layer, of size D, is added.
        top_units: hidden units of the top MLP, whose last layer, of size 1, is added.
        dropout: dropout after every hidden layer of the top MLP.
        input_dropout: dropout of what the top MLP sees.
        embedding_dropout: dropout of the vectors as they leave the tables.
        interaction: ``"dot"`` or ``"cat"``.
        batch_norm: batch normalization before every activation of the top MLP.

    Raises:
        ValueError: vectors of different sizes; fewer than two vectors; hyperparameters out of range.

    Example::

        model = DLRM(tables, num_dense_features=13, top_units=(256, 128))
        logits = model(batch)  # [B]
    """

    def __init__(
        self,
        embeddings: EmbeddingTables,
        num_dense_features: int,
        *,
        bottom_units: Sequence[int] = (64, 32),
        top_units: Sequence[int] = (128, 64),
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        interaction: str = "dot",
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_positive("bottom_units", bottom_units)
        check_positive("top_units", top_units)
        check_choice("interaction", interaction, ("dot", "cat"))
        dims = list(embeddings.embedding_dims)
        if len(set(dims)) > 1:
            listed = ", ".join(f"{name}={dim}" for name, dim in zip(embeddings.output_names, dims))
            raise ValueError(
                f"DLRM takes dot products, so all embedding_dims must be equal, not {listed}; "
                "give the tables one embedding_dim or use --model mlp"
            )
        self.embeddings = embeddings
        self.embedding_dropout = dropout_layer("embedding_dropout", embedding_dropout)
        self.embedding_dim = dims[0] if dims else 0
        self.num_vectors = len(dims) + (num_dense_features > 0)
        if not dims or self.num_vectors < 2:
            raise ValueError(
                f"DLRM needs two vectors for a dot product, but there are {len(dims)} embeddings and "
                f"{num_dense_features} dense features; use --model mlp"
            )
        self.bottom = MLP(num_dense_features, [*bottom_units, self.embedding_dim]) if num_dense_features else None
        self.interaction = interaction
        num_pairs = self.num_vectors * (self.num_vectors - 1) // 2
        num_inputs = num_pairs + (self.embedding_dim if self.bottom else 0)
        if interaction == "cat":
            num_inputs = self.num_vectors * self.embedding_dim
        self.top = MLP(num_inputs, top_units, dropout, batch_norm=batch_norm, input_dropout=input_dropout)
        self.output = nn.Linear(self.top.num_outputs, 1)
        self.pairs: Tensor
        rows, columns = torch.tril_indices(self.num_vectors, self.num_vectors, offset=-1)
        self.register_buffer("pairs", rows * self.num_vectors + columns, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        flat = self.embedding_dropout(pooled(self.embeddings, batch))
        dense = [self.bottom(batch.dense)] if self.bottom is not None else []
        # Under autocast the bottom MLP gives bfloat16: the vectors become that too, once for all that follows.
        flat = flat.to(dense[0].dtype) if dense else flat
        joined = join([*dense, flat])
        if self.interaction == "dot":
            vectors = joined.unflatten(1, (self.num_vectors, self.embedding_dim))
            joined = join([*dense, _PairwiseDots.apply(vectors, self.pairs)])
        logits: Tensor = self.output(self.top(joined))
        return logits.squeeze(1)


class _PairwiseDots(torch.autograd.Function):
    """Dot products of pairs of vectors, [B, m, D] -> [B, P]; pair i·m + j, none of them twice, is that of v_i and v_j.

    Autograd would add up the gradients of what is picked, as if a product could be picked twice.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, pairs: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, pairs)
        transposed = vectors.transpose(1, 2).contiguous()  # as a view of strides it would multiply 1.5 times as slowly
        return torch.bmm(vectors, transposed).flatten(1).index_select(1, pairs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        vectors, pairs = ctx.saved_tensors
        vectors = vectors.to(grad.dtype)  # autocast multiplies in bfloat16 what came in float32
        size, number = vectors.shape[:2]
        products = grad.new_zeros(size, number * number).index_copy_(1, pairs, grad).view(size, number, number)
        return torch.baddbmm(torch.bmm(products, vectors), products.transpose(1, 2), vectors), None
