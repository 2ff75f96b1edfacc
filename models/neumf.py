"""GMF, MLP and NeuMF: He et al., Neural Collaborative Filtering, WWW 2017."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from embtables.models.blocks import MLP, check_choice, check_mlp, check_positive, dropout_layer, join, outputs, pooled

if TYPE_CHECKING:
    from embtables.datasets import Batch
    from embtables.tables import EmbeddingTables

__all__ = ["NeuMF"]


class NeuMF(nn.Module):
    """A product and an MLP of user and item.

    GMF: logit = h·(p ∘ q) + b, with p the user's vector and q the item's (eq. 9). MLP: hidden layers over [p, q]
    (eq. 10). NeuMF: a linear layer over both (eq. 12), which see vectors of their own: here the first ``gmf_dim``
    components of user and item are GMF's, the others the MLP's. Published code keeps them in separate tables; here one
    table serves both, so that one budget counts all of it.

    Other features and dense features, which the paper does not have, join the MLP's inputs.

    Args:
        embeddings: the tables.
        num_dense_features: columns of ``batch.dense``; may be 0.
        user: the output of the tables that is the user; by default the first feature of the first table.
        item: the item's; by default the first feature of the second table.
        structure: ``"neumf"``, ``"gmf"`` or ``"mlp"``.
        gmf_dim: components of GMF in ``"neumf"``; by default half.
        units: hidden units of the MLP.
        activation: ``"relu"``, ``"sigmoid"``, ``"prelu"`` or ``"dice"``.
        dropout: dropout after every hidden layer of the MLP.
        input_dropout: dropout of what the MLP sees.
        embedding_dropout: dropout of the vectors as they leave the tables.
        batch_norm: batch normalization before every activation of the MLP.

    Raises:
        ValueError: no such user or item; dimensions that GMF cannot multiply or that have no half; ``"gmf"`` with
            features beside user and item; hyperparameters out of range.

    Example::

        model = NeuMF(tables, num_dense_features=0, user="user", item="item", gmf_dim=8, units=(32, 16, 8))
        logits = model(batch)  # [B]
    """

    def __init__(
        self,
        embeddings: EmbeddingTables,
        num_dense_features: int,
        *,
        user: str | None = None,
        item: str | None = None,
        structure: str = "neumf",
        gmf_dim: int | None = None,
        units: Sequence[int] = (32, 16, 8),
        activation: str = "relu",
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_positive("units", units)
        check_mlp(dropout, activation, batch_norm, input_dropout)  # gmf has none
        check_positive("gmf_dim", [] if gmf_dim is None else [gmf_dim])
        check_choice("structure", structure, ("neumf", "gmf", "mlp"))
        dims = dict(zip(embeddings.output_names, embeddings.embedding_dims))
        first = [next(iter(names)) for names in outputs(embeddings)]
        if len(first) < 2:
            raise ValueError(
                f"NeuMF needs a table of users and one of items; there is only {', '.join(first) or 'none'}"
            )
        self.user, self.item = user or first[0], item or first[1]
        for field, name in (("user", self.user), ("item", self.item)):
            if name not in dims:
                raise ValueError(
                    f"model hyperparameter {field} names '{name}', which is no output of the tables; "
                    f"they have {', '.join(dims)}"
                )
        if self.user == self.item:
            raise ValueError(f"model hyperparameters user and item both name '{self.user}'")
        others = [name for name in dims if name not in (self.user, self.item)]
        if structure == "gmf" and (others or num_dense_features):
            raise ValueError(
                f"structure: gmf sees '{self.user}' and '{self.item}' alone, but there are "
                f"{', '.join(others) or 'dense features'} too: leave them out of the data or use structure: neumf"
            )
        self.gmf_dim = _gmf_dim(structure, gmf_dim, self.user, self.item, dims)
        self.embeddings = embeddings
        self.embedding_dropout = dropout_layer("embedding_dropout", embedding_dropout)
        self.hidden = None
        if structure != "gmf":
            num_inputs = sum(dims.values()) - 2 * self.gmf_dim + num_dense_features
            self.hidden = MLP(num_inputs, units, dropout, activation, batch_norm, input_dropout)
        self.output = nn.Linear(self.gmf_dim + (self.hidden.num_outputs if self.hidden else 0), 1)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        parts = self.embedding_dropout(pooled(self.embeddings, batch)).split(self.embeddings.embedding_dims, dim=1)
        vectors = dict(zip(self.embeddings.output_names, parts))
        user, item = vectors.pop(self.user), vectors.pop(self.item)
        last = [user[:, : self.gmf_dim] * item[:, : self.gmf_dim]]
        if self.hidden is not None:
            inputs = [user[:, self.gmf_dim :], item[:, self.gmf_dim :], *vectors.values(), batch.dense]
            last.append(self.hidden(join(inputs)))
        logits: Tensor = self.output(join(last))
        return logits.squeeze(1)


def _gmf_dim(structure: str, gmf_dim: int | None, user: str, item: str, dims: dict[str, int]) -> int:
    """How many components of user and item are GMF's."""
    if structure == "mlp":
        return 0
    listed = f"{user}={dims[user]}, {item}={dims[item]}"
    least = min(dims[user], dims[item])
    if structure == "neumf" and gmf_dim is not None:
        if gmf_dim >= least:
            raise ValueError(
                f"model hyperparameter gmf_dim is {gmf_dim}, which leaves the MLP nothing of {listed}; "
                "GMF alone is structure: gmf"
            )
        return gmf_dim
    if dims[user] != dims[item]:
        raise ValueError(
            f"GMF multiplies user and item, so their embedding_dims must be equal, not {listed}; "
            "give them one embedding_dim, or neumf a gmf_dim below both"
        )
    if structure == "gmf":
        return least
    if least % 2:
        raise ValueError(f"an embedding_dim of {least} has no half for NeuMF's two parts: give gmf_dim or an even one")
    return least // 2
