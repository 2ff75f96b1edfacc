"""The running mean of a model's weights; the rows of its tables are averaged by their fused optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from embtables.plan.solver import Plan
from embtables.tables import EmbeddingTables

__all__ = ["RunningMean"]


class RunningMean:
    """The mean of everything but the tables, by the weights that ``embtables.optimizers.averaged`` gives each step.

    Args:
        model: the model, whose parameters and other numbers, such as the statistics of batch normalization, are
            averaged where they are no part of ``tables``.
        tables: its tables, with an optimizer that keeps their mean.
        horizon: of the mean, in steps.
    """

    def __init__(self, model: nn.Module, tables: EmbeddingTables, horizon: int) -> None:
        self.tables, self.horizon = tables, horizon
        ours = {id(tensor) for tensor in (*tables.parameters(), *tables.buffers())}
        found = dict(model.named_parameters()) | dict(model.named_buffers())
        self.parameters = {n: t for n, t in found.items() if id(t) not in ours and t.is_floating_point()}
        self.means = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after a step, the first of which is 1."""
        share = 1 / (min(step, self.horizon) + 1)
        for name, mean in self.means.items():
            mean.lerp_(self.parameters[name], share)

    @contextmanager
    def applied(self) -> Iterator[Callable[[Plan | None], EmbeddingTables]]:
        """The model has the means for its parameters meanwhile; yields what serves its tables of means by a plan."""
        weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._fill(self.means)
        try:
            yield self.tables.averaged
        finally:
            self._fill(weights)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.means)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ``ValueError`` where it holds the means of other parameters."""
        shapes = [{name: (mean.shape, mean.dtype) for name, mean in means.items()} for means in (self.means, state)]
        if shapes[0] != shapes[1]:
            raise ValueError("its running means are those of other parameters")
        for name, mean in self.means.items():
            mean.copy_(state[name])
