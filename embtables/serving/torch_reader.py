"""Looks up served tables with plain PyTorch, on any device, without the code that trains them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embtables.serving.numpy_reader import File, NumpyTables, open_file

_BFLOAT16 = "BF16"


class TorchTables(NumpyTables):
    """The tables of a served file, as :class:`NumpyTables` reads them, with tensors in the place of arrays.

    Args:
        path: of the file, which stays mapped into memory where the device is the CPU.
        device: where its tensors are to be; ids and offsets are taken there.

    Example::

        tables = TorchTables("tables.safetensors")
        tables.lookup("item", torch.tensor([7, 8, 1]))    # [3, D]
    """

    xp = torch

    def __init__(self, path: Path | str, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        super().__init__(path)

    def _open(self, path: Path | str) -> tuple[dict[str, Any], Mapping[str, Any]]:
        file = open_file(path, "c")
        # Scales and rows in bfloat16 stay the 16-bit integers that they are read as.
        return file.described, {name: torch.from_numpy(a).to(self.device) for name, a in file.arrays.items()}

    def lookup(self, table: str, ids: Any) -> Tensor:
        with torch.device(self.device):
            found: Tensor = super().lookup(table, ids)
        return found

    def pooled(self, table: str, ids: Any, offsets: Any, pooling: str = "", weights: Any = None) -> Tensor:
        with torch.device(self.device):
            found: Tensor = super().pooled(table, ids, offsets, pooling, weights)
        return found


def tensors_of(file: File) -> dict[str, Tensor]:
    """The tensors of a file, each with storage of its own, in the memory that the file is mapped to."""
    tensors = {name: torch.from_numpy(array) for name, array in file.arrays.items()}
    return {name: t.view(torch.bfloat16) if file.dtypes[name] == _BFLOAT16 else t for name, t in tensors.items()}
