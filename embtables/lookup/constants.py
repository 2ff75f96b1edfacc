"""Tensors that follow from the plan and never change, which a module takes along to other devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self


class WithConstants(nn.Module):
    """A module whose constants move with it and are no buffers.

    They are in no state dict, and nothing that goes through ``buffers()`` finds them: an average of weights
    (``torch.optim.swa_utils.AveragedModel`` with ``use_buffers=True``) would round the seeds of hashes otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self._constants: dict[str, Tensor] = {}

    def constant(self, name: str, values: Any, dtype: torch.dtype = torch.int64) -> None:
        """Keeps values, such as one (or a list) for each lookup, as the tensor ``self.<name>``."""
        self._constants[name] = torch.as_tensor(values, dtype=dtype, device="cpu")
        setattr(self, name, self._constants[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name, values in self._constants.items():
            # From what it was made of: on the way over the meta device it has lost its values.
            setattr(self, name, values.to(fn(getattr(self, name)).device))
        return self


def constants_of(module: nn.Module) -> list[Tensor]:
    """The constants of a module and of all modules in it."""
    found = (each for each in module.modules() if isinstance(each, WithConstants))
    return [getattr(each, name) for each in found for name in each._constants]
