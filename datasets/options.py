"""``embtables prepare KIND INPUT OUT``: what the commands of all kinds share."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

SPAN_MS = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder to write; must not hold anything else.", show_default=False)
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
LogSplit = Literal["random", "time", "leave-last-out"]
Split = Annotated[LogSplit, typer.Option(help="How rows are split; leave-last-out: each user's last row tests.")]
History = Annotated[int, typer.Option(help="Most items kept of a user's history, in its own column; 0: none.")]
MinCount = Annotated[int, typer.Option(help="Values rarer than this in training share id 1 with the unseen.")]
MaxRejected = Annotated[float, typer.Option(help="Share of malformed rows above which reading stops.")]
Shares = Annotated[tuple[float, ...], typer.Option(help="Shares of train, valid and test.")]
LeaveOut = Annotated[tuple[float, ...], typer.Option(help="Rows with one of these labels are left out, e.g. 3.")]
Without = Annotated[tuple[str, ...], typer.Option(help="Features that are not written, e.g. zip_code.")]


def numbers(option: str, text: str) -> tuple[float, ...]:
    """The numbers of a comma-separated list."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{option} {text!r}: numbers separated by commas are needed")
    return values


def parse_duration(text: str) -> int | None:
    """ "90s", "30m", "1h", "2d" in milliseconds; "all" is None."""
    if text == "all":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None:
        raise ValueError(f"duration {text!r}: e.g. 90s, 30m, 1h, 2d or all is needed")
    milliseconds = round(float(match[1]) * SPAN_MS[match[2]])
    if milliseconds >= 2**62:
        raise ValueError(f"duration {text!r}: it is beyond any time; write all")
    return milliseconds
