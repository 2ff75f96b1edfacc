"""DIN: Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtables.models.attention import TargetAttention, check_attention
from embtables.models.blocks import MLP, bag, bags, check_positive, dropout_layer, join, outputs

if TYPE_CHECKING:
    from embtables.datasets import Batch
    from embtables.tables import EmbeddingTables

__all__ = ["DIN"]


class DIN(nn.Module):
    """A user's history, each entry weighted by what it has to do with the target, and an MLP over everything.

    With q the target's vector and k_i those of the history, the history becomes Σ_i a(q, k_i)·k_i, where a is an MLP on
    [q, k, q − k, q ∘ k] (eq. 3–4). It runs on the entries that exist: no padding, whatever the lengths. An empty
    history gives zeros; entries whose ids are all ``padding_idx`` count for nothing. The top MLP sees [the other
    features' vectors, the target's among them; a vector for each pair; dense features].

    Mini-batch-aware regularization, the paper's third part, belongs to the tables' training, not to the model.

    Args:
        embeddings: the tables. A table's first feature is the plain one, all further ones are histories of it.
        num_dense_features: columns of ``batch.dense``; may be 0.
        pairs: mappings from history to target, such as ``[{"history": "item", "category_history": "category"}]``. The
            histories of one mapping are aligned, entry by entry, and are attended together: their vectors are
            concatenated, and so are their targets'. By default one mapping with all histories that the tables have. A
            history that no mapping names is pooled by its table, as other features are. A model without any pair is
            its top MLP. A feature of several tables has a name in each, ``feature@table``.
        pooling: ``"attention"``: the weights are not normalized, as published; ``"softmax"``: they are, within a
            history, without a scale before; ``"mean"``: all alike, the paper's base model.
        attention_units: hidden units of the activation unit, whose last layer, of size 1, is added.
        attention_activation: ``"dice"``, ``"prelu"``, ``"relu"`` or ``"sigmoid"`` (the authors' released code).
        units: hidden units of the top MLP.
        activation: of the top MLP; the same choice.
        dropout: dropout after every hidden layer of the top MLP.
        input_dropout: dropout of what the top MLP sees.
        embedding_dropout: dropout of the vectors as they leave the tables.
        batch_norm: batch normalization before every activation of the top MLP.

    Raises:
        ValueError: pairs of unknown features or of different dimensions; hyperparameters out of range; in ``forward``,
            histories of one mapping that differ in length.

    Example::

        item = TableConfig("item", 1_000_000, 16, ["item", "history"], pooling="mean")
        model = DIN(EmbeddingTables(plan([item], "hash", budget="10%")), num_dense_features=0)
        history = Jagged(torch.tensor([3, 9, 4]), torch.tensor([0, 2, 3]))     # two earlier items, and one
        batch = Batch(torch.zeros(2), torch.zeros(2, 0), torch.tensor([[7], [8]]), None, {"history": history})
        logits = model(batch)  # [B]
    """

    def __init__(
        self,
        embeddings: EmbeddingTables,
        num_dense_features: int,
        *,
        pairs: Sequence[Mapping[str, str]] | None = None,
        pooling: str = "attention",
        attention_units: Sequence[int] = (80, 40),
        attention_activation: str = "dice",
        units: Sequence[int] = (200, 80),
        activation: str = "dice",
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_positive("units", units)
        check_attention(pooling, attention_units, attention_activation)  # also where no history is attended to
        by_table = outputs(embeddings)
        self.features = {name: feature for names in by_table for name, feature in names.items()}
        self.padding = {
            name: table.padding_idx
            for table, names in zip(embeddings.plan.tables, by_table)
            for name in names
            if table.padding_idx is not None
        }
        dims = dict(zip(embeddings.output_names, embeddings.embedding_dims))
        self.pairs = implied_pairs(by_table) if pairs is None else [dict(pair) for pair in check_pairs(pairs)]
        histories = {history for pair in self.pairs for history in pair}
        check_outputs(self.pairs, histories, dims, self.features)
        self.unpooled = {self.features[name]: None for name in histories}
        self.others = [name for name in dims if name not in histories]
        sizes = [sum(dims[history] for history in pair) for pair in self.pairs]
        self.attention = nn.ModuleList(
            TargetAttention(size, pooling, attention_units, attention_activation) for size in sizes
        )
        num_inputs = sum(dims[name] for name in self.others) + sum(sizes) + num_dense_features
        if num_inputs == 0:
            raise ValueError("DIN needs at least one embedding or dense feature")
        self.embeddings = embeddings
        self.embedding_dropout = dropout_layer("embedding_dropout", embedding_dropout)
        self.hidden = MLP(num_inputs, units, dropout, activation, batch_norm, input_dropout)
        self.output = nn.Linear(self.hidden.num_outputs, 1)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        ids, offsets = bags(batch, self.embeddings.feature_names)
        found = self.embeddings.lookup(ids, offsets, pooling=self.unpooled)
        vectors = {name: self.embedding_dropout(vector) for name, vector in found.items()}
        interests = [
            self._interest(attention, pair, vectors, batch) for attention, pair in zip(self.attention, self.pairs)
        ]
        inputs = join([*(vectors[name] for name in self.others), *interests, batch.dense])
        logits: Tensor = self.output(self.hidden(inputs))
        return logits.squeeze(1)

    def _interest(self, attention: nn.Module, pair: dict[str, str], vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        """The histories of one mapping, attended together: [B, ΣD]."""
        entries = {name: bag(batch, self.features[name], self.embeddings.feature_names) for name in pair}
        (first, (_, offsets)), *aligned = entries.items()
        for name, (_, others) in aligned:
            if not torch.equal(offsets, others):
                row = int((offsets != others).nonzero()[0]) - 1
                raise ValueError(
                    f"histories '{first}' and '{name}' have {int(offsets.diff()[row])} and {int(others.diff()[row])} "
                    f"entries in row {row} of the batch, so they cannot be attended together: give them a mapping each "
                    f"in the model hyperparameter pairs"
                )
        queries = join([vectors[target] for target in pair.values()])
        keys = join([vectors[name] for name in pair])
        if all(name in self.padding for name in pair):
            kept = torch.stack([values != self.padding[name] for name, (values, _) in entries.items()]).any(0)
            keys, offsets = keys[kept], F.pad(kept.cumsum(0), (1, 0))[offsets]
        interest: Tensor = attention(queries, keys, offsets)
        return interest


def implied_pairs(by_table: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """One mapping of all features but the first of every table to that first one; none where tables have one each."""
    pair = {name: next(iter(names)) for names in by_table for name in list(names)[1:]}
    return [pair] if pair else []


def check_pairs(pairs: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
    """``pairs`` as given; ``ValueError`` unless they are mappings of names to names, none of them empty."""
    if isinstance(pairs, Mapping | str) or not isinstance(pairs, Sequence):
        raise ValueError(f"model hyperparameter pairs must be a list of mappings, history: target, not {pairs!r}")
    for pair in pairs:
        if not isinstance(pair, Mapping) or not pair or not all(isinstance(x, str) for x in (*pair, *pair.values())):
            raise ValueError(f"model hyperparameter pairs must hold mappings, history: target, not {pair!r}")
    return pairs


def check_outputs(
    pairs: Sequence[Mapping[str, str]], histories: set[str], dims: Mapping[str, int], features: Mapping[str, str]
) -> None:
    """``ValueError`` unless all names of ``pairs`` are outputs of the tables, and fit each other."""
    for history, target in (item for pair in pairs for item in pair.items()):
        for name in (history, target):
            if name not in dims:
                raise ValueError(f"pairs names '{name}', which is no output of the tables; they have {', '.join(dims)}")
        if target in histories:
            raise ValueError(f"pairs names '{target}' both as a history and as the target of '{history}'")
        if dims[history] != dims[target]:
            raise ValueError(
                f"history '{history}' has embedding_dim {dims[history]} and its target '{target}' {dims[target]}: "
                "let them share a table"
            )
    for name, feature in features.items():
        if name not in histories and feature in {features[history] for history in histories}:
            raise ValueError(f"pairs names the history '{feature}' of some of its tables only: name '{name}' too")
