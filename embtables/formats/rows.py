"""What a stored row looks like in bytes. Every size in a plan and every slab's tensors follow from its row format."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "uint8": torch.uint8,
}
# Of scales: two bytes, and as many exponents as a weight may have.
SCALE = "bfloat16"
Size = TypeVar("Size", int, npt.NDArray[np.int64])


@dataclass(frozen=True)
class RowFormat:
    """How a slab ``[rows, width]`` is stored: as ``[units, columns(width)]`` of ``dtype``, and perhaps scales.

    Scales stand in a tensor of their own, or behind the columns of the row that they are for, where a lookup that
    fetches the row has them as well. Rows of plain scalars are ``RowFormat(name, dtype)``: a unit is a row. Any other
    format is a subclass. Sizes are integers, or int64 arrays that are computed with element by element; the methods
    solve for ``slab_bytes``, which must not fall where the rows or the width grow, and is at least ``rows`` times
    ``row_bits`` bits.

    Lookups read fp32 rows, whatever they are stored as. Training stores fp32 or bf16: all others are served alone.

    Args:
        name: what plans and files call it.
        dtype: of the tensor that holds the rows, one of ``DTYPES``.
    """

    name: str
    dtype: str

    # ---- sizes -----------------------------------------------------------------------------------------------------

    def columns(self, width: Size) -> Size:
        """Elements of ``dtype`` in a unit, those of scales aside."""
        return width

    def rows_per_unit(self, width: int) -> int:
        """How many rows a unit holds; more than one only where they are narrower than a byte."""
        return 1

    def rows_per_scale(self, width: int) -> int | None:
        """How many rows of a slab, from its first one on, have a scale in common; ``None``: all of them."""
        return 1

    @property
    def scales(self) -> int:
        """How many scales there are for each ``rows_per_scale`` rows."""
        return 0

    def scale_columns(self, width: int) -> int:
        """Elements of ``dtype`` behind the columns of a row that are its scales; 0 where these stand elsewhere."""
        return 0

    def row_bits(self, width: Size) -> Size:
        """The bits of one row, without its part in what rows share."""
        return self.columns(width) * (8 * DTYPES[self.dtype].itemsize)

    def mean_bits(self, width: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The bits of one row of many, with its part in what they share."""
        many = np.full_like(width, 2**20)
        return 8 * self.slab_bytes(many, width) / many

    def weight_bytes(self, rows: Size, width: Size) -> Size:
        """The bytes of a slab, those of its scales aside."""
        return rows * self.columns(width) * DTYPES[self.dtype].itemsize

    def scale_blocks(self, rows: Size, width: Size) -> Size:
        """How many times ``scales`` numbers a slab has."""
        return 0 * rows * width

    def scale_bytes(self, rows: Size, width: Size) -> Size:
        """The bytes of a slab's scales."""
        return self.scale_blocks(rows, width) * (self.scales * DTYPES[SCALE].itemsize)

    def slab_bytes(self, rows: Size, width: Size) -> Size:
        """The bytes of a slab."""
        return self.weight_bytes(rows, width) + self.scale_bytes(rows, width)

    def rows_within(self, num_bytes: int, width: int) -> int:
        """The most rows that fit into ``num_bytes``; below 0 where not even an empty slab does."""
        most = 8 * num_bytes // self.row_bits(width)
        return bisect_right(range(most + 1), num_bytes, key=lambda rows: self.slab_bytes(rows, width)) - 1

    # ---- values ----------------------------------------------------------------------------------------------------

    def pack(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """A slab ``[rows, width]`` as it is stored: its units, and scales ``[blocks, scales]`` that stand elsewhere.

        Numbers beyond the largest that the type holds become that one.
        """
        dtype = DTYPES[self.dtype]
        if dtype in (torch.float16, torch.bfloat16):
            most = torch.finfo(dtype).max
            values = values.clamp(-most, most)
        return values.to(dtype), None

    def unpack(self, stored: Tensor, number: Tensor | None, scales: Tensor | None, width: int) -> Tensor:
        """Rows ``[N, width]`` in fp32.

        Args:
            stored: the unit of each row, ``[N, columns + scale_columns]``.
            number: ``[N]``, which row of its unit each is; ``None`` where units are rows.
            scales: ``[N, scales]``, those of each row; ``None`` where there are none, or in the rows.
            width: columns of the slab.
        """
        return stored.float()

    def rounded(self, values: Tensor, scales: Tensor | None = None) -> Tensor:
        """Rows ``[N, width]`` in fp32 as ``unpack`` would give them after ``pack``.

        Args:
            values: the rows, in fp32.
            scales: ``[N, scales]`` in fp32, those of each row; ``None``: those that each row has where it is alone.
        """
        return self.pack(values)[0].float()
