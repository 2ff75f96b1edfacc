"""Blocks that the models share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtables.models.activations import ACTIVATIONS, BatchNorm, make_activation

if TYPE_CHECKING:
    from embtables.datasets import Batch
    from embtables.tables import EmbeddingTables

__all__ = [
    "MLP",
    "bag",
    "bags",
    "check_choice",
    "check_mlp",
    "check_positive",
    "dropout_layer",
    "first_and_rest",
    "join",
    "outputs",
    "pooled",
]


# ---- hyperparameters -------------------------------------------------------------------------------------------------


def check_positive(name: str, values: Sequence[int]) -> None:
    """``ValueError`` naming the hyperparameter unless all values are positive integers."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"model hyperparameter {name} must hold positive integers, not {value!r}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """``ValueError`` naming the hyperparameter unless it is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"model hyperparameter {name} must be one of {', '.join(choices)}, not {value!r}")


def check_mlp(dropout: float, activation: str, batch_norm: bool, input_dropout: float) -> None:
    """``ValueError`` naming the hyperparameter of an MLP that is none, be there layers or not."""
    check_choice("activation", activation, ACTIVATIONS)
    if not isinstance(batch_norm, bool):
        raise ValueError(f"model hyperparameter batch_norm must be true or false, not {batch_norm!r}")
    for name, rate in (("dropout", dropout), ("input_dropout", input_dropout)):
        dropout_layer(name, rate)


# ---- from a batch to vectors -----------------------------------------------------------------------------------------


def bags(batch: Batch, feature_names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """A batch as the tables take it: ``(ids, offsets)`` of the features named, in their order.

    Features that ``batch.lists`` holds have as many ids as each example has of them; the others are the columns of
    ``batch.ids``, in this order. Where all are columns, ids are ``batch.ids`` [B, F] and offsets ``None``; else ids are
    flat and offsets ``[F·B + 1]``, feature by feature.

    Raises:
        ValueError: the batch has other columns or rows than that; the sentence names the features.
    """
    columns = [name for name in feature_names if name not in batch.lists]
    if len(columns) == len(feature_names):
        return batch.ids, None
    size, num_columns = batch.ids.shape
    if num_columns != len(columns):
        raise ValueError(
            f"batch.ids has {num_columns} columns, but the tables take {len(columns)} features from it: "
            f"{', '.join(columns) or 'none'}; those with several values belong into batch.lists, which has "
            f"{', '.join(batch.lists)}"
        )
    by_column = dict(zip(columns, batch.ids.unbind(1)))
    ones = batch.ids.new_ones(size)
    values, lengths = [], []
    for name in feature_names:
        if name in by_column:
            values.append(by_column[name])
            lengths.append(ones)
            continue
        if batch.lists[name].offsets.numel() != size + 1:
            raise ValueError(
                f"batch.lists['{name}'] has {batch.lists[name].offsets.numel() - 1} rows, but batch.ids {size}"
            )
        values.append(batch.lists[name].values)
        lengths.append(batch.lists[name].offsets.diff())
    return torch.cat(values), F.pad(torch.cat(lengths).cumsum(0), (1, 0))


def bag(batch: Batch, feature: str, feature_names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """One feature of what :func:`bags` takes: its ids [N] and offsets [B + 1]."""
    if feature in batch.lists:
        values, offsets = batch.lists[feature]
        return values, offsets
    columns = [name for name in feature_names if name not in batch.lists]
    return batch.ids[:, columns.index(feature)], torch.arange(batch.ids.shape[0] + 1, device=batch.ids.device)


def pooled(embeddings: EmbeddingTables, batch: Batch) -> Tensor:
    """All features' vectors, pooled as their tables say and side by side: [B, ΣD]."""
    vectors: Tensor = embeddings(*bags(batch, embeddings.feature_names))
    return vectors


def outputs(embeddings: EmbeddingTables) -> list[dict[str, str]]:
    """For every table its outputs, by name, and the feature of each."""
    names = iter(embeddings.output_names)
    return [{next(names): feature for feature in table.feature_names} for table in embeddings.plan.tables]


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate [B, n] blocks, without those that have no column; a single one is passed on without a copy."""
    filled = [part for part in parts if part.shape[1]]
    return filled[0] if len(filled) == 1 else torch.cat(filled, dim=1)


def first_and_rest(vectors: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of vectors side by side, [B, ΣD]: the first components [B, F], and the others [B, ΣD − F]."""
    parts = vectors.split([size for dim in dims for size in (1, dim - 1)], dim=1)
    return torch.cat(parts[::2], dim=1), torch.cat(parts[1::2], dim=1)


# ---- layers ----------------------------------------------------------------------------------------------------------


def dropout_layer(name: str, rate: float) -> nn.Dropout:
    """Dropout of a rate; ``ValueError`` naming the hyperparameter unless the rate lies in [0, 1)."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ValueError(f"model hyperparameter {name} must lie in [0, 1), not {rate!r}")
    return nn.Dropout(rate)


class MLP(nn.Module):
    """Linear layers, each with (batch normalization,) activation (and dropout): [B, num_inputs] -> [B, units[-1]].

    ``input_dropout`` is the rate of what the first layer sees. Together with ``dropout`` of the same rate it stands
    before every linear layer, that of the logit included.
    """

    def __init__(
        self,
        num_inputs: int,
        units: Sequence[int],
        dropout: float = 0.0,
        activation: str = "relu",
        batch_norm: bool = False,
        input_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_mlp(dropout, activation, batch_norm, input_dropout)
        self.input_dropout = dropout_layer("input_dropout", input_dropout)
        after = dropout_layer("dropout", dropout)
        layers: list[nn.Module] = []
        for num_outputs in units:
            layers.append(nn.Linear(num_inputs, num_outputs))
            if batch_norm:
                layers.append(BatchNorm(num_outputs))
            layers.append(make_activation(activation, num_outputs))
            if dropout:
                layers.append(after)
            num_inputs = num_outputs
        self.layers = nn.Sequential(*layers)
        self.num_outputs = num_inputs

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(self.input_dropout(inputs))
        return outputs
