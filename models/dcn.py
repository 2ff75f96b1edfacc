"""DCN-V2: Wang et al., DCN V2: Improved Deep & Cross Network and Practical Lessons …, WWW 2021."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from embtables.models.blocks import MLP, check_choice, check_positive, dropout_layer, join, pooled

if TYPE_CHECKING:
    from embtables.datasets import Batch
    from embtables.tables import EmbeddingTables

__all__ = ["CrossLayer", "DCNv2", "MixtureCrossLayer"]


class CrossLayer(nn.Module):
    """x' = x0 ∘ (W·x + b) + x, of size n (eq. 1); with a ``rank`` r, W = U·Vᵀ with U and V of shape [n, r] (eq. 2)."""

    def __init__(self, size: int, rank: int | None = None) -> None:
        super().__init__()
        self.down = None if rank is None else nn.Linear(size, rank, bias=False)
        self.up = nn.Linear(size if rank is None else rank, size)

    def forward(self, first: Tensor, inputs: Tensor) -> Tensor:
        low = inputs if self.down is None else self.down(inputs)
        crossed: Tensor = first * self.up(low) + inputs
        return crossed


class MixtureCrossLayer(nn.Module):
    """x' = Σ_i G_i(x)·E_i(x) + x with experts E_i(x) = x0 ∘ (U_i·g(C_i·g(V_iᵀ·x)) + b) of rank r (eq. 3–4).

    g is tanh, and the gates G are a softmax over the experts. They sum to 1, so that Σ_i G_i·E_i is
    x0 ∘ (U·[G_i·g(…)]_i + b) with one matrix U [n, experts·r].
    """

    def __init__(self, size: int, rank: int, num_experts: int) -> None:
        super().__init__()
        self.down = nn.Linear(size, num_experts * rank, bias=False)
        self.middle = nn.Parameter(torch.empty(num_experts, rank, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.up = nn.Linear(num_experts * rank, size)
        self.gate = nn.Linear(size, num_experts, bias=False)

    def forward(self, first: Tensor, inputs: Tensor) -> Tensor:
        gates = self.gate(inputs).softmax(dim=1)
        low = self.down(inputs).tanh().unflatten(1, self.middle.shape[:2])
        low = torch.einsum("ber,esr->bes", low, self.middle).tanh()
        crossed: Tensor = first * self.up((gates.unsqueeze(2) * low).flatten(1)) + inputs
        return crossed


class DCNv2(nn.Module):
    """Explicit crosses of all components with each other, and an MLP after or beside them.

    x0 = [vectors, dense features] at its full width n; each cross layer raises the degree by one. Then a linear layer
    to one logit, over the MLP's output (stacked) or [crosses, MLP's output] (parallel). The vectors may have different
    sizes.

    Args:
        embeddings: the tables.
        num_dense_features: columns of ``batch.dense``; may be 0.
        num_layers: cross layers.
        rank: of every cross layer's matrix; ``None`` for a full one, n × n.
        num_experts: experts of every cross layer, each of rank ``rank``, mixed by a gate; 1 for none.
        structure: ``"parallel"``: the MLP sees x0; ``"stacked"``: it sees the crosses.
        units: hidden units of the MLP; none, with ``"stacked"``, for the crosses alone.
        activation: ``"relu"``, ``"sigmoid"``, ``"prelu"`` or ``"dice"``.
        dropout: dropout after every hidden layer of the MLP.
        input_dropout: dropout of what the MLP sees.
        embedding_dropout: dropout of the vectors as they leave the tables.
        batch_norm: batch normalization before every activation of the MLP.

    Raises:
        ValueError: hyperparameters out of range or at odds; neither embeddings nor dense features.

    Example::

        model = DCNv2(tables, num_dense_features=13, num_layers=3, rank=32, structure="stacked")
        logits = model(batch)  # [B]
    """

    def __init__(
        self,
        embeddings: EmbeddingTables,
        num_dense_features: int,
        *,
        num_layers: int = 3,
        rank: int | None = None,
        num_experts: int = 1,
        structure: str = "parallel",
        units: Sequence[int] = (128, 64),
        activation: str = "relu",
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_positive("num_layers", [num_layers])
        check_positive("rank", [] if rank is None else [rank])
        check_positive("num_experts", [num_experts])
        check_positive("units", units)
        check_choice("structure", structure, ("parallel", "stacked"))
        size = sum(embeddings.embedding_dims) + num_dense_features
        if size == 0:
            raise ValueError("DCNv2 needs at least one embedding or dense feature")
        if rank is None and num_experts > 1:
            raise ValueError("model hyperparameter num_experts is for layers of low rank: give rank too")
        if structure == "parallel" and not units:
            raise ValueError("model hyperparameter units is empty: crosses without an MLP are structure: stacked")
        self.embeddings = embeddings
        self.embedding_dropout = dropout_layer("embedding_dropout", embedding_dropout)
        self.crosses = nn.ModuleList(
            CrossLayer(size, rank) if rank is None or num_experts == 1 else MixtureCrossLayer(size, rank, num_experts)
            for _ in range(num_layers)
        )
        self.hidden = MLP(size, units, dropout, activation, batch_norm, input_dropout)
        self.parallel = structure == "parallel"
        self.output = nn.Linear(self.hidden.num_outputs + (size if self.parallel else 0), 1)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        first = crossed = join([self.embedding_dropout(pooled(self.embeddings, batch)), batch.dense])
        for layer in self.crosses:
            crossed = layer(first, crossed)
        last = join([crossed, self.hidden(first)]) if self.parallel else self.hidden(crossed)
        logits: Tensor = self.output(last)
        return logits.squeeze(1)
