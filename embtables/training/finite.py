"""NaN and infinity stop a run at the step where they appear, and name the tensor."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from embtables.datasets import Batch
from embtables.tables import EmbeddingTables
from embtables.training.interception import Vectors, intercept

__all__ = ["NonFiniteError", "Watch"]


class NonFiniteError(FloatingPointError):
    """A loss, gradient, weight or input is NaN or infinite."""


def _is_finite(tensor: Tensor) -> bool:
    # A sum of finite numbers can overflow, so only its finiteness is conclusive; it costs one pass.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _what(tensor: Tensor) -> str:
    return "NaN" if bool(torch.isnan(tensor).any()) else "infinite"


class Watch:
    """Checks every step of a model. ``step`` is the number of the step that is under way."""

    def __init__(self, model: nn.Module, tables: EmbeddingTables, dense_features: list[str]) -> None:
        self.model, self.tables, self.dense_features = model, tables, dense_features
        self.step = 0
        # A fused optimizer leaves no gradient behind: it is checked on its way into the tables, before they change.
        self.close = intercept(tables, self._on_vectors)

    def loss(self, loss: Tensor, logits: Tensor, batch: Batch) -> float:
        """The loss as a number; if it is not finite, the first tensor on the way to it that is not is named."""
        value = loss.item()
        if value - value == 0:  # neither NaN nor infinite
            return value
        name = f"the loss is {value}"
        for column, feature in enumerate(self.dense_features):
            if not _is_finite(batch.dense[:, column]):
                raise NonFiniteError(
                    f"step {self.step}: {name} because dense feature '{feature}' is {_what(batch.dense[:, column])}"
                )
        if not _is_finite(batch.labels):
            raise NonFiniteError(f"step {self.step}: {name} because the labels are {_what(batch.labels)}")
        for state_name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not _is_finite(tensor):
                raise NonFiniteError(f"step {self.step}: {name} because '{state_name}' is {_what(tensor)}; {_REMEDY}")
        raise NonFiniteError(
            f"step {self.step}: {name}; the weights are finite, the logits {_range(logits)}; {_REMEDY}"
        )

    def gradients(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        named = [(name, p.grad) for name, p in parameters if p.grad is not None]
        for name, gradient in named:
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            if not _is_finite(values):
                raise NonFiniteError(f"step {self.step}: the gradient of '{name}' is {_what(values)}; {_REMEDY}")

    def _on_vectors(self, vectors: Vectors) -> None:
        if isinstance(vectors, Tensor):
            if vectors.requires_grad:
                vectors.register_hook(self._gradient_of_all)
            return
        for name, output in vectors.items():
            if output.requires_grad:
                output.register_hook(partial(self._gradient_of_one, name))

    def _gradient_of_all(self, gradient: Tensor) -> None:
        if _is_finite(gradient):
            return
        if gradient.shape[-1] != sum(self.tables.embedding_dims):
            raise NonFiniteError(f"step {self.step}: the gradient of the vectors is {_what(gradient)}; {_REMEDY}")
        for name, part in zip(self.tables.output_names, gradient.split(self.tables.embedding_dims, dim=1)):
            self._gradient_of_one(name, part)

    def _gradient_of_one(self, name: str, gradient: Tensor) -> None:
        if not _is_finite(gradient):
            raise NonFiniteError(
                f"step {self.step}: the gradient of the vectors of '{name}' is {_what(gradient)}; {_REMEDY}"
            )


_REMEDY = "lower tables.learning_rate or dense.learning_rate"


def _range(tensor: Tensor) -> str:
    if bool(torch.isnan(tensor).any()):
        return "NaN"
    return f"between {tensor.min().item():g} and {tensor.max().item():g}"
