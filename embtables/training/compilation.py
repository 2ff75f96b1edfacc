"""The dense part of a model under ``torch.compile``; the tables stay outside of its graphs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from embtables.datasets import Batch

__all__ = ["Compilation", "check_compiler", "uncompiled"]

# torch's own default; tests take one that needs no C++ compiler.
_BACKEND = "inductor"


def check_compiler(device: torch.device) -> None:
    """Compiles next to nothing.

    Raises:
        ValueError: torch cannot compile on this machine; the sentence says why, and what to do.
    """
    try:
        torch.compile(lambda x: x + 1, backend=_BACKEND)(torch.ones(8, device=device))
    except Exception as error:  # whatever a missing or broken compiler makes torch raise
        raise ValueError(
            f"training.compile: torch cannot compile on this machine ({_first_line(error)}): install a C++ compiler, "
            "such as g++, or name one in the environment variable CXX, or leave training.compile at false"
        ) from error


class Compilation:
    """Compiles a model in place, for training steps on batches of ``batch_size``.

    Its ``forward`` stays what it was, and so do the names in its state dict. Other batches, such as the last one of an
    epoch, run uncompiled, and so do evaluations (under :func:`uncompiled`): no size compiles anything anew, and what is
    evaluated is what is served. Lookups are no part of the graphs
    (see :func:`embtables.training.lookup_hooks.intercept`).

    Args:
        varying: batches differ in more than their rows, as those with histories do: one graph takes all sizes.
    """

    def __init__(self, model: nn.Module, batch_size: int, varying: bool) -> None:
        self.model, self.batch_size = model, batch_size
        self._compiled = False
        torch.compiler.reset()  # torch keeps a few graphs at most, those of earlier models among them
        model.compile(backend=_BACKEND, dynamic=varying)

    def is_due(self, batch: Batch) -> bool:
        """Whether a step on this batch is the one that compiles."""
        return not self._compiled and self._takes(batch)

    def call(self, batch: Batch) -> Any:
        """The model on this batch.

        Raises:
            ValueError: torch cannot compile this model; the sentence says why.
        """
        if not self._takes(batch):
            with uncompiled():
                return self.model(batch)
        from torch._dynamo.exc import TorchDynamoException

        try:
            output = self.model(batch)
        except TorchDynamoException as error:
            raise ValueError(
                f"training.compile: torch cannot compile model {type(self.model).__name__} ({_first_line(error)}): "
                "leave training.compile at false"
            ) from error
        self._compiled = True
        return output

    def _takes(self, batch: Batch) -> bool:
        return len(batch.labels) == self.batch_size


def uncompiled() -> AbstractContextManager[object]:
    """Where models run as they are written, compiled or not."""
    return torch.compiler.set_stance("force_eager")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
