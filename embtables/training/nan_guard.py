"""NaN and infinity stop a run at the step where they appear, and name the tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from embtables.datasets import Batch
from embtables.tables import EmbeddingTables
from embtables.training.lookup_hooks import Vectors, intercept

__all__ = ["NonFiniteError", "Watch"]


class NonFiniteError(FloatingPointError):
    """A loss, gradient, weight or input is NaN or infinite."""


def _is_finite(tensor: Tensor) -> bool:
    # A sum of finite numbers can overflow, so only its finiteness is conclusive; it costs one pass.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _what(tensor: Tensor) -> str:
    return "NaN" if bool(torch.isnan(tensor).any()) else "infinite"


class _Bad(NamedTuple):
    """Of some tensors of a step, what is wrong with each: 0 nothing, 1 infinite, 2 NaN, ``[len(what)]``."""

    step: int
    what: list[str]
    codes: Tensor


class Watch:
    """Checks every step of a model. ``step`` is the number of the step that is under way.

    Args:
        waits: whether a step is checked before anything changes, for which each number has to be there. Where that
            would hold up a device, ``False``: what is seen is noted there, and ``settle`` reads it for many steps.
    """

    def __init__(
        self, model: nn.Module, tables: EmbeddingTables, dense_features: list[str], *, waits: bool = True
    ) -> None:
        self.model, self.tables, self.dense_features, self.waits = model, tables, dense_features, waits
        self.step = 0
        self._losses: list[tuple[int, Tensor, Tensor, Batch]] = []
        self._noted: list[_Bad] = []
        # The gradient of a slab of ordinary parameters has the size of the tables, and nothing in it that the gradients
        # of the vectors have not; a sum of those that overflows is a weight of the next loss.
        slabs = {id(tables.store.tensor(name)) for name in tables.store.weight_names}
        self._parameters = [(name, p) for name, p in model.named_parameters() if id(p) not in slabs]
        # A fused optimizer leaves no gradient behind: it is checked on its way into the tables, before they change.
        self.close = intercept(tables, self._on_vectors)

    def loss(self, loss: Tensor, logits: Tensor, batch: Batch) -> None:
        """Takes note of a step's loss."""
        self._losses.append((self.step, loss.detach(), logits.detach(), batch))
        if self.waits and not _is_finite(loss):
            self.settle()

    def gradients(self) -> None:
        """Checks the gradients of all ordinary parameters but the tables' slabs."""
        named = [(f"the gradient of '{name}'", p.grad) for name, p in self._parameters if p.grad is not None]
        # The largest absolute value is NaN or infinite where any value is.
        largest = [torch.linalg.vector_norm(_values(g), ord=torch.inf) for _, g in named if g.numel()]
        if largest:
            self._note([what for what, g in named if g.numel()], torch.stack(largest))

    def settle(self) -> list[tuple[float, int]]:
        """Loss and number of examples of each step since the last call.

        Raises:
            NonFiniteError: naming the first step of these, and the first tensor on its way, that is not finite.
        """
        losses, noted, self._losses, self._noted = self._losses, self._noted, [], []
        values = torch.stack([loss for _, loss, _, _ in losses]).tolist() if losses else []
        lost = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        bad = next((b for b in noted if bool(b.codes.any())), None) if _any(noted) else None
        if lost is not None and (bad is None or losses[lost][0] <= bad.step):
            step, _, logits, batch = losses[lost]
            raise NonFiniteError(self._why(step, values[lost], logits, batch))
        if bad is not None:
            what, code = next((w, c) for w, c in zip(bad.what, bad.codes.tolist()) if c)
            raise NonFiniteError(f"step {bad.step}: {what} is {'NaN' if code == 2 else 'infinite'}; {_REMEDY}")
        return [(value, len(batch.labels)) for value, (_, _, _, batch) in zip(values, losses)]

    def _why(self, step: int, value: float, logits: Tensor, batch: Batch) -> str:
        name = f"step {step}: the loss is {value}"
        for column, feature in enumerate(self.dense_features):
            if not _is_finite(batch.dense[:, column]):
                return f"{name} because dense feature '{feature}' is {_what(batch.dense[:, column])}"
        if not _is_finite(batch.labels):
            return f"{name} because the labels are {_what(batch.labels)}"
        if not self.waits:  # by now the loss has spoiled the weights
            return f"{name}; the logits are {_range(logits)}; {_REMEDY}"
        for state_name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not _is_finite(tensor):
                return f"{name} because '{state_name}' is {_what(tensor)}; {_REMEDY}"
        return f"{name}; the weights are finite, the logits {_range(logits)}; {_REMEDY}"

    # ---- gradients of vectors ------------------------------------------------------------------------------------

    def _on_vectors(self, vectors: Vectors) -> None:
        if isinstance(vectors, Tensor):
            if vectors.requires_grad:
                vectors.register_hook(self._gradient_of_all)
            return
        for name, output in vectors.items():
            if output.requires_grad:
                output.register_hook(partial(self._gradient_of, [name], [output.shape[-1]]))

    def _gradient_of_all(self, gradient: Tensor) -> None:
        dims = self.tables.embedding_dims
        if gradient.shape[-1] == sum(dims):
            self._gradient_of(self.tables.output_names, dims, gradient)
        else:
            self._gradient_of([], [gradient.shape[-1]], gradient)

    def _gradient_of(self, names: Sequence[str], dims: Sequence[int], gradient: Tensor) -> None:
        """Of outputs side by side in the last dimension; without ``names`` of all together."""
        if not gradient.numel() or (self.waits and _is_finite(gradient)):
            return
        columns = gradient.abs().flatten(0, -2).amax(0)
        what = [f"the gradient of the vectors of '{name}'" for name in names] or ["the gradient of the vectors"]
        self._note([w for w, dim in zip(what, dims) for _ in range(dim)], columns)

    def _note(self, what: list[str], largest: Tensor) -> None:
        codes = torch.where(largest.isnan(), 2, torch.where(largest.isinf(), 1, 0))
        self._noted.append(_Bad(self.step, what, codes))
        if self.waits and bool(codes.any()):
            self.settle()
        elif self.waits:
            self._noted.clear()


def _any(noted: list[_Bad]) -> bool:
    """Whether anything is bad, read from the device once."""
    return bool(noted) and bool(torch.cat([bad.codes for bad in noted]).any())


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


_REMEDY = "lower tables.learning_rate or dense.learning_rate"


def _range(tensor: Tensor) -> str:
    if bool(torch.isnan(tensor).any()):
        return "NaN"
    return f"between {tensor.min().item():g} and {tensor.max().item():g}"
