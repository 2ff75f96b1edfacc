"""`embtables prepare KIND INPUT OUT`: what the commands of all kinds share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Turn raw files into prepared data: Parquet shards and a manifest. A second run reuses what is there.",
)

Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder to write; must not hold anything else.", show_default=False)
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
LogSplit = Literal["random", "time", "leave-last-out"]
Split = Annotated[LogSplit, typer.Option(help="How rows are split; leave-last-out: each user's last row tests.")]
History = Annotated[int, typer.Option(help="Most items kept of a user's history, in its own column; 0: none.")]
MinCount = Annotated[int, typer.Option(help="Values rarer than this in training share id 1 with the unseen.")]
MaxRejected = Annotated[float, typer.Option(help="Share of malformed rows above which reading stops.")]
Shares = Annotated[str, typer.Option(help="Shares of train, valid and test.")]


@app.callback()
def kinds() -> None:
    """Keeps `prepare KIND` a group, whatever the number of kinds."""


def numbers(option: str, text: str) -> tuple[float, ...]:
    """The numbers of a comma-separated list."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{option} {text!r}: numbers separated by commas are needed")
    return values
