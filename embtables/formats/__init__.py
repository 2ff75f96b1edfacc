"""Row formats: what a stored row looks like in bytes, by the names that ``precision=`` takes."""

from __future__ import annotations

import re
from dataclasses import replace

from embtables._util.names import did_you_mean
from embtables.formats.packed import PackedFormat, ResidualFormat
from embtables.formats.rows import DTYPES, SCALE, RowFormat, Size

FP32 = RowFormat("fp32", "float32")
BF16 = RowFormat("bf16", "bfloat16")
# What rows are stored in while they are trained.
TRAINING_FORMATS = (FP32.name, BF16.name)
FORMATS: dict[str, RowFormat] = {
    row_format.name: row_format
    for row_format in (
        FP32,
        RowFormat("fp16", "float16"),
        BF16,
        PackedFormat("int8", "uint8", 8),
        PackedFormat("int4", "uint8", 4),
        PackedFormat("int2", "uint8", 2),
        PackedFormat("binary", "uint8", 1),
        ResidualFormat("binary2", "uint8", 2),
        ResidualFormat("binary4", "uint8", 4),
    )
}


def row_format(name: str) -> RowFormat:
    """The format of this name: one of ``FORMATS``, whose scale ``/slab``, ``/64`` or ``/1`` may follow.

    Raises:
        ValueError: where there is none.
    """
    kind, slash, share = name.partition("/") if isinstance(name, str) else ("", "", "")
    found = FORMATS.get(kind)
    if found is not None and not slash:
        return found
    if slash and isinstance(found, PackedFormat):
        if share == "slab":
            return replace(found, name=name, share=0)
        if re.fullmatch("[1-9][0-9]{0,8}", share):
            return replace(found, name=name, share=int(share))
        raise ValueError(
            f"precision {name!r}: behind the slash stands how many rows have a scale in common, as in '{kind}/64', "
            f"or '{kind}/slab'"
        )
    if slash and found is not None:
        raise ValueError(f"precision {name!r}: {kind} has no scales that rows could have in common")
    raise ValueError(
        f"unknown precision {name!r}{did_you_mean(kind or name, list(FORMATS))}; there are: {', '.join(FORMATS)}"
    )


def weight_name(format_name: str, width: int) -> str:
    """What files and state dicts call the tensor that holds all rows of one format and width."""
    return f"weight_{width}" if format_name == FP32.name else f"weight_{format_name.replace('/', '_per_')}_{width}"


def scales_name(weight: str) -> str:
    """What files and state dicts call the scales of a weight."""
    return weight.replace("weight", "scales", 1)


__all__ = [
    "BF16",
    "DTYPES",
    "FORMATS",
    "FP32",
    "SCALE",
    "TRAINING_FORMATS",
    "PackedFormat",
    "ResidualFormat",
    "RowFormat",
    "Size",
    "row_format",
    "scales_name",
    "weight_name",
]
