"""What a stored row looks like in bytes: row formats. Every size in a plan and every slab's tensor follow from them."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

DTYPES = {
    "float32": torch.float32,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "uint8": torch.uint8,
}
Size = TypeVar("Size", int, npt.NDArray[np.int64])


@dataclass(frozen=True)
class RowFormat:
    """How a slab ``[rows, width]`` is stored.

    Rows of plain scalars are ``RowFormat(name, dtype)``. Any other format is a subclass, which overrides ``columns``
    where a row is not stored as ``width`` scalars (packed bits, a scale of its own), and ``slab_bytes`` where rows
    share something (a scale for each block of rows, or one for the slab). An instance in ``FORMATS`` is all that plans
    need: the methods solve for ``slab_bytes``, which must not fall where the rows or the width grow, and must be at
    least ``rows`` times ``row_bytes``. Sizes are integers, or int64 arrays that are computed with element by element.
    The store allocates ``[rows, columns(width)]`` of ``dtype``, under ``weight_name``; its lookups read fp32 rows.

    Args:
        name: what plans and files call it.
        dtype: of the tensor that holds the rows, one of ``DTYPES``.
    """

    name: str
    dtype: str

    def columns(self, width: Size) -> Size:
        """Elements of ``dtype`` that a row of ``width`` scalars takes."""
        return width

    def row_bytes(self, width: Size) -> Size:
        """Bytes of one row, without its part in what rows share."""
        return self.columns(width) * DTYPES[self.dtype].itemsize

    def slab_bytes(self, rows: Size, width: Size) -> Size:
        """Bytes of a slab, all that its rows share included."""
        return rows * self.row_bytes(width)

    def rows_within(self, num_bytes: int, width: int) -> int:
        """The most rows that fit into ``num_bytes``; below 0 where not even an empty slab does."""
        most = num_bytes // self.row_bytes(width)
        return bisect_right(range(most + 1), num_bytes, key=lambda rows: self.slab_bytes(rows, width)) - 1


FP32 = RowFormat("fp32", "float32")
FORMATS = {FP32.name: FP32}


def row_format(name: str) -> RowFormat:
    """The format of this name.

    Raises:
        ValueError: where there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown row format {name!r}; there are: {', '.join(FORMATS)}")
    return FORMATS[name]


def weight_name(format_name: str, width: int) -> str:
    """What files and state dicts call the tensor that holds all rows of one format and width."""
    return f"weight_{width}" if format_name == FP32.name else f"weight_{format_name}_{width}"
