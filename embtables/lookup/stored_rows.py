"""The rows of one format and width: where those of each slab lie, and how they are read and written."""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from embtables.formats import DTYPES, FP32, SCALE, PackedFormat, ResidualFormat, RowFormat, row_format
from embtables.ops import unpacking
from embtables.ops.program import BF16, PLAIN, RowForm


class StoredRows:
    """Slabs of one format and width, one after another in one tensor; in another the scales that do not stand in rows.

    A row is counted from the first row of the first slab. Units and blocks that have a scale in common begin anew with
    every slab, so that no two slabs share one.

    Args:
        rows_in: the format.
        width: columns of the slabs.
    """

    # Rows that are packed at once.
    _CHUNK = 2**16

    def __init__(self, rows_in: RowFormat, width: int) -> None:
        self.format, self.width = rows_in, width
        self.together = rows_in.rows_per_unit(width)
        self.share = rows_in.rows_per_scale(width) if rows_in.scales else 1
        self.scale_columns = rows_in.scale_columns(width)
        # Of a row, or of some rows of one scalar.
        self.unit_bytes = (rows_in.columns(width) + self.scale_columns) * DTYPES[rows_in.dtype].itemsize
        self.rows, self.units, self.blocks = [0], [0], [0]  # the first of each slab, and behind the last one
        self.form = self._form()
        self._firsts: dict[torch.device, Tensor] = {}

    def add(self, rows: int) -> int:
        """Appends a slab, and returns its first row."""
        self.rows.append(self.rows[-1] + rows)
        self.units.append(self.units[-1] + -(-rows // self.together))
        self.blocks.append(self.blocks[-1] + self.format.scale_blocks(rows, self.width))
        self._firsts = {}
        return self.rows[-2]

    def empty(self, device: torch.device | str | None) -> tuple[Tensor, Tensor | None]:
        """The tensors for rows and scales, with nothing in them; ``None`` where no scales stand by themselves."""
        units, blocks = self.units[-1], self.blocks[-1]
        columns = self.format.columns(self.width) + self.scale_columns
        stored = torch.empty(units, columns, dtype=DTYPES[self.format.dtype], device=device)
        if not self.format.scales or self.scale_columns:
            return stored, None
        return stored, torch.empty(blocks, self.format.scales, dtype=DTYPES[SCALE], device=device)

    def _form(self) -> RowForm | None:
        """What kernels take the format for; ``None`` where they do not have it."""
        if isinstance(self.format, PackedFormat):
            kind = 2 if isinstance(self.format, ResidualFormat) else 1
            return RowForm(kind, self.format.bits, self.share or 0, self.together)
        halves = {FP32: PLAIN, row_format("fp16"): RowForm(3, 16, 1, 1), row_format("bf16"): BF16}
        return halves.get(self.format)

    def firsts(self, device: torch.device) -> Tensor:
        """The first row, unit and block of scales of every slab, ``[3, slabs]``."""
        if device not in self._firsts:
            self._firsts[device] = torch.stack(self._new_firsts(device))
        return self._firsts[device]

    def _new_firsts(self, device: torch.device) -> list[Tensor]:
        return [torch.tensor(each[:-1], device=device) for each in (self.rows, self.units, self.blocks)]

    def read(self, stored: Tensor, scales: Tensor | None, index: Tensor) -> Tensor:
        """Rows ``[N, width]`` in fp32."""
        unpack = unpacking(index)
        if unpack is not None and self.form is not None:
            return unpack(stored, scales, self.firsts(index.device), index, self.width, self.form)
        if self.together == self.share == 1:
            return self.format.unpack(stored[index], None, None if scales is None else scales[index], self.width)
        starts, units, blocks = self._new_firsts(index.device)  # which a graph holds as its own
        # Slabs without rows begin where the next one does, which is the last of these.
        slab = torch.bucketize(index, starts, right=True) - 1
        within = index - starts[slab]
        number = None if self.together == 1 else within % self.together
        block = blocks[slab] if self.share is None else blocks[slab] + within // self.share
        rows = stored[units[slab] + within // self.together]
        return self.format.unpack(rows, number, None if scales is None else scales[block], self.width)

    def place(self, start: int) -> tuple[int, int]:
        """Where the units of the slab whose first row is ``start`` begin, and its scales."""
        slab = bisect_right(self.rows[:-1], start) - 1
        return self.units[slab], self.blocks[slab]

    def write(self, stored: Tensor, scales: Tensor | None, start: int, values: Tensor) -> None:
        """Packs all rows ``[rows, width]`` of the slab whose first row is ``start``."""
        unit, block = self.place(start)
        step = self.share or max(1, len(values))
        # Whole blocks, and whole units.
        chunk = -(-self._CHUNK // (step * self.together)) * step * self.together
        for part in values.split(chunk):
            packed, own = self.format.pack(part)
            stored[unit : unit + len(packed)] = packed
            unit += len(packed)
            if scales is not None and own is not None:
                scales[block : block + len(own)] = own
                block += len(own)
