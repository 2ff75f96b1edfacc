"""Quantization-aware training: a step computes with the rows that the served form would hold, and trains fp32 ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from embtables.formats import FP32, PackedFormat, RowFormat
from embtables.lookup.constants import WithConstants
from embtables.lookup.graphs import outside_graphs
from embtables.lookup.slabs import Slabs


class Rounding(nn.Module):
    """The rounding of all rows of a store whose served form has another format.

    Args:
        trained: where the fp32 rows lie.
        served: what they would be served as now. Slabs that it does not have are not rounded.
    """

    def __init__(self, trained: Slabs, served: Slabs) -> None:
        super().__init__()
        # Of no bytes: that it is in a state dict says that rows were rounded, also where no scales had to be kept.
        self.register_buffer("on", torch.empty(0, dtype=torch.int64))
        rounded = ((name, RoundedRows(name, trained, served)) for name in trained.weight_names)
        self.weights = nn.ModuleDict({name: rows for name, rows in rounded if rows.formats})

    @outside_graphs("which rows are rounded how, and which scales are due, no graph can hold")
    def rounded(self, values: Tensor, weight: str, stored: Tensor, index: Tensor) -> Tensor:
        """Rows as they would be served, whose gradients go straight through to the rows themselves.

        Args:
            values: ``[N, width]``, the rows ``index`` ``[N]``.
            weight: the attribute of their weight.
            stored: the weight, ``[rows, width]``.
            index: which rows these are.
        """
        if weight not in self.weights:
            return values
        rounds = self.weights[weight]
        assert isinstance(rounds, RoundedRows)
        found: Tensor = _StraightThrough.apply(values, rounds(values.detach(), stored.detach(), index))
        return found


class RoundedRows(WithConstants):
    """The rounding of one width's rows.

    Rows with scales of their own are rounded exactly as they would be served. Scales that rows have in common depend on
    rows that no step may look at for the sake of a few others. They are kept, and those of a block are found anew once
    in ``_TOUCHES`` times as many lookups of its rows as it has rows. So what is found anew is a fixed share of what is
    looked up, however large the table is, and blocks that are looked up often are found anew often.

    Args:
        weight: the attribute of the rows' weight.
        trained: where they lie.
        served: what they would be served as now.
    """

    starts: Tensor
    rows: Tensor
    format_of: Tensor
    share: Tensor
    block: Tensor
    seen: Tensor

    _TOUCHES = 16

    def __init__(self, weight: str, trained: Slabs, served: Slabs) -> None:
        super().__init__()
        slabs = trained.slabs_of(weight)
        self.formats: list[RowFormat] = []
        names: list[str] = []  # of the served weights, in the order of the formats
        each: list[tuple[int, int, int]] = []  # for each slab the number of its format, share and first block
        for slab in slabs:
            if not served.has_slab(slab) or served.format(slab) == FP32.name:
                each.append((-1, 1, 0))
                continue
            name = served.weight_of(slab)
            stored = served.stored_rows(name)
            if name not in names:
                names.append(name)
                self.formats.append(stored.format)
            # A slab of one row has no fewer scales than others: 1 stands for rows that have theirs for themselves.
            share = max(2, trained.rows(slab)) if stored.share is None else stored.share
            each.append((names.index(name), share, stored.place(served.start(slab))[1]))
        for number, name in enumerate(names):
            scales = served.scales(name)
            shared = any(kind == number and share > 1 for kind, share, _ in each)
            self.register_buffer(f"scales_{number}", scales.clone() if shared and scales is not None else None)
        if any(share > 1 for _, share, _ in each):
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64, device=trained.device))
        for constant, values in (
            ("starts", [trained.start(slab) for slab in slabs]),
            ("rows", [trained.rows(slab) for slab in slabs]),
            ("format_of", [number for number, _, _ in each]),
            ("share", [share for _, share, _ in each]),
            ("block", [block for _, _, block in each]),
        ):
            self.constant(constant, values)
        self.alike = {(kind, share) for kind, share, _ in each} == {(0, 1)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves like any module, and casts nothing: scales have the type in which they are served."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self

    def scales(self, number: int) -> Tensor | None:
        """The scales ``[blocks, scales]`` of a format by its number; ``None`` where no rows have them in common."""
        return self._buffers[f"scales_{number}"]

    def forward(self, values: Tensor, stored: Tensor, index: Tensor) -> Tensor:
        """``values`` ``[N, width]``, the rows ``index`` of the weight ``stored``, as they would be served."""
        if self.alike:
            return self.formats[0].rounded(values.float()).to(values.dtype)
        # Slabs without rows begin where the next one does, which is the last of these.
        slab = torch.bucketize(index, self.starts, right=True) - 1
        if "seen" in self._buffers:
            self._find_scales(stored, index, slab)
        kind, found = self.format_of[slab], values.clone()
        for number, rows_in in enumerate(self.formats):
            own = (kind == number).nonzero().squeeze(1)
            scales = self.scales(number)
            if scales is not None:
                within = index[own] - self.starts[slab[own]]
                blocks = self.block[slab[own]] + within // self.share[slab[own]]
                scales = scales[blocks].float()
            found[own] = rows_in.rounded(values[own].float(), scales).to(values.dtype)
        return found

    def _find_scales(self, stored: Tensor, index: Tensor, slab: Tensor) -> None:
        """Finds the scales anew that are due once more rows have been looked up."""
        number = self.seen + torch.arange(index.numel(), device=index.device)
        self.seen += index.numel()
        share = self.share[slab]
        due = ((share > 1) & (number % (self._TOUCHES * share) == 0)).nonzero().squeeze(1)
        if not due.numel():
            return
        slab, within = slab[due], index[due] - self.starts[slab[due]]
        place = within // share[due]
        first = place * share[due]
        size = torch.minimum(share[due], self.rows[slab] - first)
        columns = self.format_of[slab], self.block[slab] + place, self.starts[slab] + first, size
        blocks = torch.stack(columns, dim=1).unique(dim=0)
        for kind, length in blocks[:, [0, 3]].unique(dim=0).tolist():
            _, block, begin, _ = blocks[(blocks[:, 0] == kind) & (blocks[:, 3] == length)].unbind(1)
            rows = stored[begin.unsqueeze(1) + torch.arange(length, device=index.device)].flatten(1)
            rows_in, scales = self.formats[kind], self.scales(kind)
            assert isinstance(rows_in, PackedFormat) and scales is not None
            scales[block] = rows_in.scales_for(rows.float())


class _StraightThrough(torch.autograd.Function):
    """The second argument, as if it were the first.

    Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation",
    arXiv:1308.3432, 2013.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
