"""Rows of few bits: small integers, several to a byte, times a scale that a row, a block of rows or a slab has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import ceil
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embtables.formats.rows import DTYPES, SCALE, RowFormat, Size

# A row of so many times the bytes of its scales has them for itself by default: they are then at most a quarter more.
_OWN_SCALES = 4
# Rows that have one in common by default, where a row is smaller than that.
_BLOCK = 64
# The most bytes of a row that its scales stand behind: half of a cache line. Behind longer ones, which would lie across
# two lines where they fill one, they would cost more than they save.
_SHORT = 32
# The scale of least squared error is found in rounds, of which the first few make nearly all of the difference.
_ROUNDS = 8


@dataclass(frozen=True)
class PackedFormat(RowFormat):
    """Each scalar is an integer of ``bits`` bits, and there is no padding between the scalars of a row.

    The integer q stands for (q − zero)·scale. Rows begin at a byte; where they are single scalars, as in the array of
    ROBE or among the values of a pruned table, several of them share one. A scale takes two bytes. A row's own stands
    behind its scalars where these take 32 bytes at most; all others stand in a tensor of their own.

    int8 and int4: scale = max|x| / (2^(bits−1) − 1) over the rows that have it in common, rounded up, so that no scalar
    changes by more than half a scale, and 0 stays 0. int2 and binary have the few levels ±scale/2 and ±3·scale/2, and
    the scale of least squared error; the values beyond the outermost level become that level.

    Args:
        bits: 1, 2, 4 or 8.
        share: how many rows have a scale in common: 0 for all rows of a slab; ``None`` for the default, by which rows
            of at least four times the bytes of a scale have their own, and 64 smaller ones share one.
    """

    bits: int = 8
    share: int | None = None

    # ---- sizes -----------------------------------------------------------------------------------------------------

    def columns(self, width: Size) -> Size:
        return -(-self.bits * width // 8)

    def rows_per_unit(self, width: int) -> int:
        return 8 // self.bits if width == 1 else 1

    def rows_per_scale(self, width: int) -> int | None:
        if self.share is None:
            return 1 if self.columns(width) >= self._own_scales else _BLOCK
        return self.share or None

    @property
    def scales(self) -> int:
        return 1

    def scale_columns(self, width: int) -> int:
        in_rows = width > 1 and self.rows_per_scale(width) == 1 and self.columns(width) <= _SHORT
        return self.scales * DTYPES[SCALE].itemsize if in_rows else 0

    @property
    def _own_scales(self) -> int:
        """The bytes of the smallest row that has scales of its own by default."""
        return _OWN_SCALES * self.scales * DTYPES[SCALE].itemsize

    def row_bits(self, width: Size) -> Size:
        return _where(width == 1, self.bits, 8 * self.columns(width))

    def weight_bytes(self, rows: Size, width: Size) -> Size:
        return -(-rows // _where(width == 1, 8 // self.bits, 1)) * self.columns(width)

    def scale_blocks(self, rows: Size, width: Size) -> Size:
        if self.share is None:
            return -(-rows // _where(self.columns(width) >= self._own_scales, 1, _BLOCK))
        return (-(-rows // self.share) if self.share else _where(rows > 0, 1, 0)) + 0 * width

    # ---- values ----------------------------------------------------------------------------------------------------

    @property
    def zero(self) -> float:
        """The integer that stands for 0, or the middle of the two next to it."""
        return 2.0 ** (self.bits - 1) - (0 if self.bits > 2 else 0.5)

    def pack(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        rows, width = values.shape
        share = self.rows_per_scale(width) or max(1, rows)
        # What is left of the last block is a block of its own.
        whole = rows - rows % share
        parts = [values[:whole].reshape(whole // share, share * width), values[whole:].reshape(1, -1)]
        encoded = [self.encode(part.float()) for part in parts if part.numel()]
        if encoded:
            packed = self._joined(torch.cat([integers.reshape(-1, width) for integers, _ in encoded]))
            scales = torch.cat([scales for _, scales in encoded])
        else:
            packed = self._joined(values.new_zeros(rows, width))
            scales = values.new_zeros(0, self.scales, dtype=DTYPES[SCALE])
        if not self.scale_columns(width):
            return packed, scales
        return torch.cat([packed, scales.view(DTYPES[self.dtype])], dim=1), None

    def unpack(self, stored: Tensor, number: Tensor | None, scales: Tensor | None, width: int) -> Tensor:
        columns = self.columns(width)
        scales = _joined_bytes(stored[:, columns:]) if scales is None else scales
        stored = stored[:, :columns]
        integers = _fields(stored.unsqueeze(-1), 8 // self.bits, self.bits).flatten(1)
        integers = integers[:, :width] if number is None else integers.gather(1, number.unsqueeze(1))
        return self.decode(integers, scales.float())

    def rounded(self, values: Tensor, scales: Tensor | None = None) -> Tensor:
        scales = self.scales_for(values).float() if scales is None else scales
        return self.decode(self.integers(values, scales), scales)

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The integers of blocks of scalars ``[blocks, n]``, and the scales of each block, ``[blocks, scales]``."""
        scales = self.scales_for(values)
        return self.integers(values, scales.float()), scales

    def scales_for(self, values: Tensor) -> Tensor:
        """The scales ``[blocks, scales]`` that blocks of scalars ``[blocks, n]`` are stored with."""
        magnitudes = values.abs()
        if self.bits > 2:
            return _scale_of(magnitudes.amax(dim=1, keepdim=True), 2 ** (self.bits - 1) - 1)
        scales = 2.0 ** (2 - self.bits) * magnitudes.mean(dim=1, keepdim=True)
        # Of two levels it is the best one already, since each scalar has the level of its sign whatever the scale is.
        for _ in range(_ROUNDS if self.bits > 1 else 0):
            levels = self.integers(values, scales) - self.zero
            scales = (values * levels).sum(dim=1, keepdim=True) / levels.square().sum(dim=1, keepdim=True)
        return scales.to(DTYPES[SCALE])

    def integers(self, values: Tensor, scales: Tensor) -> Tensor:
        """The integers ``[blocks, n]``, as floating-point numbers, that stand for scalars under scales in fp32."""
        middle = ceil(self.zero)
        nearest = (values / torch.where(scales > 0, scales, 1.0) + (self.zero - middle)).round() + middle
        return nearest.clamp(1 if self.bits > 2 else 0, 2**self.bits - 1)

    def decode(self, integers: Tensor, scales: Tensor) -> Tensor:
        """Scalars ``[N, width]`` from their integers and the scales of each row, ``[N, scales]`` in fp32."""
        return (integers.float() - self.zero) * scales

    def _joined(self, integers: Tensor) -> Tensor:
        """The units ``[units, columns]`` of integers ``[rows, width]``."""
        rows, width = integers.shape
        together, count = self.rows_per_unit(width), 8 // self.bits
        units = F.pad(integers, (0, -(width * together) % count, 0, -rows % together)).nan_to_num()
        fields = units.to(DTYPES[self.dtype]).view(-(-rows // together), self.columns(width), count)
        return reduce(torch.bitwise_or, (fields[..., i] << self.bits * i for i in range(count)))


@dataclass(frozen=True)
class ResidualFormat(PackedFormat):
    """Each scalar is a sum of ``bits`` signs, each times a scale of its own: x ≈ Σ ±scale_j / 2.

    The first sign and scale stand for the scalar as in binary, the next ones for what those before leave of it.

    Li et al., "Performance Guaranteed Network Acceleration via High-Order Residual Quantization", ICCV 2017.
    """

    @property
    def scales(self) -> int:
        return self.bits

    def scales_for(self, values: Tensor) -> Tensor:
        scales: list[Tensor] = []
        for _ in range(self.bits):
            scales.append((2 * values.abs().mean(dim=1, keepdim=True)).to(DTYPES[SCALE]))
            values = values - _sign(values) * scales[-1].float()
        return torch.cat(scales, dim=1)

    def integers(self, values: Tensor, scales: Tensor) -> Tensor:
        integers = torch.zeros_like(values)
        for j in range(self.bits):
            sign = _sign(values)
            integers += (sign + 0.5) * 2**j
            values = values - sign * scales[:, j : j + 1]
        return integers

    def decode(self, integers: Tensor, scales: Tensor) -> Tensor:
        signs = _fields(integers.unsqueeze(-1), self.bits, 1) - 0.5
        # One after another, as native code adds them up.
        return reduce(torch.add, (signs[..., j] * scales[:, j : j + 1] for j in range(self.bits)))


def _where(condition: Any, yes: Any, no: Any) -> Any:
    """An integer for an integer, an array for an array."""
    return np.where(condition, yes, no) if isinstance(condition, np.ndarray) else yes if condition else no


def _joined_bytes(stored: Tensor) -> Tensor:
    """bf16 numbers in fp32 ``[N, n]`` from their bytes ``[N, 2n]``, the lower one of each first.

    By arithmetic, since ONNX cannot take the bits of one type for another.
    """
    low, high = stored.long().unflatten(1, (-1, 2)).unbind(-1)
    exponent, fraction = high % 128 * 2 + low // 128, low % 128
    # The smallest numbers have no leading one, and the exponent of the next ones; those of the last exponent are
    # infinite, or with a fraction none.
    powers = [2.0**-126, *(2.0**e for e in range(-126, 128)), float("inf"), float("nan")]
    place = exponent + ((exponent == 255) & (fraction > 0)).long()
    power = torch.tensor(powers, dtype=torch.float32, device=stored.device)[place]
    return (1 - 2 * (high // 128)).float() * power * (fraction / 128 + (exponent > 0).float())


def _fields(integers: Tensor, count: int, bits: int) -> Tensor:
    """``[..., count]`` fields of so many bits each from integers ``[..., 1]``, the lowest bits first.

    By division, since ONNX shifts unsigned integers alone.
    """
    divisors = 2 ** (bits * torch.arange(count, device=integers.device, dtype=torch.int32))
    return torch.div(integers.int(), divisors, rounding_mode="floor") % 2**bits


def _sign(values: Tensor) -> Tensor:
    """½ where a value is 0 or more, −½ elsewhere."""
    return (values >= 0).float() - 0.5


def _scale_of(most: Tensor, levels: int) -> Tensor:
    """The smallest scales in bf16 under which so many levels reach non-negative numbers; NaN stays NaN."""
    nearest = (most / levels).to(DTYPES[SCALE])
    above = (nearest.view(torch.int16) + 1).view(DTYPES[SCALE])
    # The product is exact, where the quotient of a very small number is 0 or too small.
    return torch.where(nearest.float() * levels < most, above, nearest)
