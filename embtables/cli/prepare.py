"""``embtables prepare KIND INPUT OUT``: one command per reader."""

from __future__ import annotations

import typer

from embtables.datasets.reader import command
from embtables.datasets.readers import all_readers

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Turn raw files into prepared data: Parquet shards and a manifest. A second run reuses what is there.",
)


@app.callback()
def kinds() -> None:
    """Keeps ``prepare KIND`` a group, whatever the number of kinds."""


for _kind, _reader in all_readers().items():
    app.command(_kind, epilog=_reader.example or None)(command(_reader))
