"""Stored rows once more, bit by bit, with Python's integers and floats, from the description of the formats alone."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from embtables import EmbeddingTables


def kind_of(precision: str) -> tuple[str, int, int]:
    """The kind, the bits of a scalar, and how many scales belong together."""
    kind = precision.partition("/")[0]
    bits = {"int8": 8, "int4": 4, "int2": 2, "binary": 1, "binary2": 2, "binary4": 4}[kind]
    return kind, bits, bits if kind in ("binary2", "binary4") else 1


def rows_per_scale(precision: str, width: int, rows: int) -> int:
    """How many rows of a slab have their scales in common."""
    kind, bits, scales = kind_of(precision)
    share = precision.partition("/")[2]
    if share:
        return rows if share == "slab" else int(share)
    return 1 if (bits * width + 7) // 8 >= 8 * scales else 64


def bf16(tensor: Tensor) -> list[list[float]]:
    """The numbers of a bf16 tensor ``[n, m]``, which are the upper halves of fp32 numbers."""
    bits = tensor.view(torch.int16).tolist()
    return [[struct.unpack("<f", struct.pack("<I", (b & 0xFFFF) << 16))[0] for b in row] for row in bits]


def levels(precision: str, scales: Sequence[float]) -> list[float]:
    """What each integer stands for."""
    kind, bits, _ = kind_of(precision)
    if kind.startswith("binary"):
        signs = product((-0.5, 0.5), repeat=len(scales))  # the first sign is that of the lowest bit
        return [sum(s * scale for s, scale in zip(reversed(each), scales)) for each in signs]
    zero = {8: 128.0, 4: 8.0, 2: 1.5}[bits]
    return [(q - zero) * scales[0] for q in range(2**bits)]


def scales_are_in_rows(precision: str, width: int) -> bool:
    """Whether they stand behind the scalars of each row: its own do, where these are several in 32 bytes at most."""
    own = not precision.endswith("/slab") and rows_per_scale(precision, width, 0) == 1
    return own and width > 1 and kind_of(precision)[1] * width <= 8 * 32


def scales_of(precision: str, stored: Tensor, scales: Tensor | None, width: int) -> Tensor:
    """The scales ``[blocks, scales]`` of a slab that is alone in its tensors, wherever they stand."""
    _, bits, count = kind_of(precision)
    if not scales_are_in_rows(precision, width):
        assert scales is not None
        return scales
    assert scales is None and stored.shape[1] == (bits * width + 7) // 8 + 2 * count
    return stored[:, -2 * count :].clone(memory_format=torch.contiguous_format).view(torch.bfloat16)


def unpacked(precision: str, stored: Tensor, scales: Tensor | None, rows: int, width: int) -> list[list[float]]:
    """The rows ``[rows, width]`` of a slab that is alone in its tensors."""
    _, bits, _ = kind_of(precision)
    data, found, share = stored.tolist(), [], rows_per_scale(precision, width, rows)
    of_blocks = [levels(precision, each) for each in bf16(scales_of(precision, stored, scales, width))]
    for row in range(rows):
        values = []
        for column in range(width):
            # Rows of one scalar lie one after another without padding, others begin at a byte.
            bit = row * bits if width == 1 else column * bits
            byte = data[bit // 8][0] if width == 1 else data[row][bit // 8]
            values.append(of_blocks[row // share][byte >> bit % 8 & (2**bits - 1)])
        found.append(values)
    return found


def slab_of(tables: EmbeddingTables, name: str) -> Tensor:
    """The rows ``[rows, width]`` of a slab of tables, in whatever they are stored."""
    form = "serving" if tables.served else "training"
    slabs = [slab for g in tables.plan.groups for slab in getattr(g.layout, form).slabs]
    wanted = next(slab for slab in slabs if slab.name == name)
    if wanted.format == "fp32":
        return tables.store.slab(name)
    # The slabs of one format and width lie one after another; units and scales begin anew with each.
    before = [s for s in slabs[: slabs.index(wanted)] if (s.format, s.width) == (wanted.format, wanted.width)]
    tensors, key = tables.store.stored(), f"{wanted.format.replace('/', '_per_')}_{wanted.width}"
    stored = tensors[f"weight_{key}"]
    if wanted.format in ("fp16", "bf16"):
        start = sum(s.rows for s in before)
        return stored[start : start + wanted.rows].float()
    _, bits, _ = kind_of(wanted.format)
    unit = block = 0
    for s in before:
        share = rows_per_scale(s.format, s.width, s.rows)
        unit += -(-s.rows * bits // 8) if s.width == 1 else s.rows
        block += -(-s.rows // share) if s.rows else 0
    scales = None if scales_are_in_rows(wanted.format, wanted.width) else tensors[f"scales_{key}"][block:]
    return torch.tensor(unpacked(wanted.format, stored[unit:], scales, wanted.rows, wanted.width))
