"""Attention of a target over its history, on the entries that exist: no padding to the longest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtables.models.activations import ACTIVATIONS, make_activation
from embtables.models.blocks import check_choice, check_positive

__all__ = ["POOLINGS", "ActivationUnit", "TargetAttention", "check_attention", "segment_softmax"]

POOLINGS = ("attention", "softmax", "mean")


def segment_softmax(scores: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Softmax of scores [N] among those of the same row, which ``rows`` [N] gives: they sum to 1 in each."""
    largest = scores.new_zeros(num_rows).scatter_reduce(0, rows, scores.detach(), "amax", include_self=False)
    powers = (scores - largest[rows]).exp()
    return powers / powers.new_zeros(num_rows).index_add(0, rows, powers)[rows]


class ActivationUnit(nn.Module):
    """DIN's local activation unit: an MLP on [q, k, q − k, q ∘ k] that gives each history entry a score.

    Args:
        dim: size D of queries and keys.
        units: hidden units; a last layer of size 1 is added.
        activation: after every hidden layer.
        bias: whether the last layer has one (a softmax would not see it).
    """

    def __init__(self, dim: int, units: Sequence[int], activation: str, bias: bool = True) -> None:
        super().__init__()
        layers = [
            nn.Linear(num_inputs, num_outputs, bias=bias or i < len(units))
            for i, (num_inputs, num_outputs) in enumerate(pairwise([4 * dim, *units, 1]))
        ]
        self.first = layers[0]
        activated = [(make_activation(activation, layer.in_features), layer) for layer in layers[1:]]
        self.rest = nn.Sequential(*(module for pair in activated for module in pair))

    def forward(self, queries: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
        """Scores [N] of ``keys`` [N, D]; the query of key i is ``queries[rows[i]]``, of [B, D].

        The first layer is linear, W·[q, k, q − k, q ∘ k] = (Wq + Wd)·q + (Wk − Wd)·k + Wp·(q ∘ k), so that its part of
        q alone is computed once a row instead of once an entry.
        """
        of_query, of_key, of_difference, of_product = self.first.weight.chunk(4, dim=1)
        per_row = F.linear(queries, of_query + of_difference, self.first.bias)
        # Under autocast ``per_row`` is bfloat16: what is made for each entry follows it.
        queries, keys = queries.to(per_row.dtype), keys.to(per_row.dtype)
        per_entry = torch.cat([keys, queries.index_select(0, rows) * keys], dim=1)
        weight = torch.cat([of_key - of_difference, of_product], dim=1)
        hidden = F.linear(per_entry, weight) + per_row.index_select(0, rows)
        scores: Tensor = self.rest(hidden)
        return scores.squeeze(1)


def check_attention(pooling: str, units: Sequence[int], activation: str) -> None:
    """``ValueError`` naming the hyperparameter of ``TargetAttention`` that is none."""
    check_choice("pooling", pooling, POOLINGS)
    check_positive("attention_units", units)
    check_choice("attention_activation", activation, ACTIVATIONS)


class TargetAttention(nn.Module):
    """The sum of each row's keys, weighted by what they have to do with its query; zeros for a row without keys.

    Args:
        dim: size D of queries and keys.
        pooling: ``"attention"``: the weights are the unit's scores as they are (the paper's choice: their sum tells how
            strong the interest is); ``"softmax"``: normalized among the keys of a row, without a scale before (the
            authors' released code divides by √D; the last layer learns any scale); ``"mean"``: all equal, no unit.
        units: hidden units of the activation unit.
        activation: of the activation unit.
    """

    def __init__(self, dim: int, pooling: str, units: Sequence[int], activation: str) -> None:
        super().__init__()
        check_attention(pooling, units, activation)
        self.normalized = pooling == "softmax"
        bias = not self.normalized
        self.unit = None if pooling == "mean" else ActivationUnit(dim, units, activation, bias)

    def forward(self, queries: Tensor, keys: Tensor, offsets: Tensor) -> Tensor:
        """[B, D], from queries [B, D] and keys [N, D], those of row b being ``keys[offsets[b]:offsets[b + 1]]``."""
        num_rows, lengths = queries.shape[0], offsets.diff()
        rows = torch.repeat_interleave(lengths, output_size=keys.shape[0])
        if self.unit is None:
            weights = lengths[rows].to(keys.dtype).reciprocal()
        else:
            weights = self.unit(queries, keys, rows)
            if self.normalized:
                weights = segment_softmax(weights, rows, num_rows)
        weighted = weights.unsqueeze(1) * keys
        return weighted.new_zeros(num_rows, keys.shape[1]).index_add(0, rows, weighted)
