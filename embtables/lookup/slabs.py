"""Where the rows of every slab lie, and how they are read and written in their formats."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embtables.formats import FP32, row_format, scales_name, weight_name
from embtables.lookup.stored_rows import StoredRows
from embtables.sizes.layout import Form, Slab


class Slabs(nn.Module):
    """Slabs of one format and width stand side by side in one tensor, their weight.

    Args:
        forms: what there is.
        device: where it is.
    """

    _place: Tensor

    def __init__(self, forms: Sequence[Form], device: torch.device | str | None) -> None:
        super().__init__()
        # Moves along with the module, where there may be no other tensor (every table dropped).
        self.register_buffer("_place", torch.empty(0, device=device), persistent=False)
        self._slabs: dict[str, tuple[int, Slab]] = {}
        self._stored_rows: dict[str, StoredRows] = {}  # by the attributes of the weights
        for slab in (s for form in forms for s in form.slabs):
            if slab.name in self._slabs:
                raise ValueError(f"two slabs are named '{slab.name}'")
            name = weight_name(slab.format, slab.width)
            if name not in self._stored_rows:
                self._stored_rows[name] = StoredRows(row_format(slab.format), slab.width)
            self._slabs[slab.name] = (self._stored_rows[name].add(slab.rows), slab)
        self.weight_names = tuple(self._stored_rows)
        self._plain = [name for name, rows in self._stored_rows.items() if rows.format == FP32]

    def tensor(self, name: str) -> Tensor:
        """A tensor by its attribute."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        place = self._buffers["_place"]  # many times faster than by its name
        assert place is not None
        return place.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of all numbers that are stored in fp32, or what the module was cast to."""
        return self.tensor(self._plain[0] if self._plain else "_place").dtype

    def width(self, slab: str) -> int:
        """Columns of a slab."""
        return self._slabs[slab][1].width

    def rows(self, slab: str) -> int:
        """Rows of a slab."""
        return self._slabs[slab][1].rows

    def weight_of(self, slab: str) -> str:
        """The attribute of the weight that holds a slab's rows."""
        found = self._slabs[slab][1]
        return weight_name(found.format, found.width)

    def slabs_of(self, weight: str) -> list[str]:
        """The slabs whose rows a weight holds, by its attribute, in their order."""
        return [name for name in self._slabs if self.weight_of(name) == weight]

    def has_slab(self, name: str) -> bool:
        return name in self._slabs

    def format(self, slab: str) -> str:
        """The name of the row format of a slab."""
        return self._slabs[slab][1].format

    def start(self, slab: str) -> int:
        """First row of a slab among the rows of its format and width."""
        return self._slabs[slab][0]

    def read(self, weight: str, index: Tensor) -> Tensor:
        """A copy of rows ``[N, width]`` of a weight, by its attribute, as numbers of the type of extras."""
        return self._stored_rows[weight].read(self.tensor(weight), self.scales(weight), index).to(self.dtype)

    def read_slab(self, name: str) -> Tensor:
        """A copy ``[rows, width]`` of a slab's rows, as numbers of the type of extras."""
        start, slab = self._slabs[name]
        return self.read(self.weight_of(name), torch.arange(start, start + slab.rows, device=self.device))

    def write_slab(self, name: str, values: Tensor) -> None:
        """Stores all rows ``[rows, width]`` of a slab, rounded to its format."""
        start, slab = self._slabs[name]
        weight = self.weight_of(name)
        self._stored_rows[weight].write(self.tensor(weight).detach(), self.scales(weight), start, values)

    def stored_rows(self, weight: str) -> StoredRows:
        """How the rows of a weight are stored, by its attribute."""
        return self._stored_rows[weight]

    def is_plain(self, weight: str) -> bool:
        """Whether a weight, by its attribute, holds the rows themselves, and not a format that ``read`` knows."""
        return weight in self._plain

    def dtype_of_rows(self, weight: str) -> torch.dtype:
        """The type in which training computes with a weight or extra, by its attribute, whatever it is stored in."""
        in_other_format = weight in self._stored_rows and weight not in self._plain
        return torch.float32 if in_other_format else self.tensor(weight).dtype

    def scales(self, weight: str) -> Tensor | None:
        """The scales of a weight, by its attribute; ``None`` where none stand outside of its rows."""
        return self._buffers.get(scales_name(weight))
