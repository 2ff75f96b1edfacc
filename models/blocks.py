"""Blocks that the models share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["MLP", "check_positive"]


def check_positive(name: str, values: Sequence[int]) -> None:
    """``ValueError`` naming the hyperparameter unless all values are positive integers."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"model hyperparameter {name} must hold positive integers, not {value!r}")


class MLP(nn.Module):
    """Linear layers with ReLU (and dropout) after each: [B, num_inputs] -> [B, units[-1]]."""

    def __init__(self, num_inputs: int, units: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"model hyperparameter dropout must lie in [0, 1), not {dropout!r}")
        layers: list[nn.Module] = []
        for num_outputs in units:
            layers += [nn.Linear(num_inputs, num_outputs), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
            num_inputs = num_outputs
        self.layers = nn.Sequential(*layers)
        self.num_outputs = num_inputs

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs)
        return outputs


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate [B, n] blocks; a single block is passed on without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
