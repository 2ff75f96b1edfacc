"""``embtables versions``: served tables that are replaced while they are read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from embtables.serving import Versions, compact

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Replace served tables while they are read: versions in a folder, and what changed between them. "
    "embtables.serving.Reader(FOLDER, EmbeddingTables.load) opens the current one.",
    epilog="Example: embtables versions publish tables runs/hash/served/tables.safetensors",
)
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of the versions.")]
Keep = Annotated[int, typer.Option(help="How many of the latest versions stay; the current one always does.")]


@app.command("publish", epilog="Example: embtables versions publish tables runs/hash/served/tables.safetensors")
def publish(
    folder: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What EmbeddingTables.save wrote, or an export holds.")],
    keep: Keep = 2,
) -> None:
    """Copy a file of tables into FOLDER as a new version, check it, and make it current."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    versions = Versions(folder, keep)
    number = versions.publish(lambda path: shutil.copyfile(file, path))
    typer.echo(f"{versions.path(number)} is current, {versions.path(number).stat().st_size:,} bytes")


@app.command("list", epilog="Example: embtables versions list tables")
def show(folder: Folder) -> None:
    """List the versions in FOLDER, the oldest first."""
    versions = Versions(folder)
    current = versions.current()
    for number in versions.numbers():
        size = versions.path(number).stat().st_size
        typer.echo(f"{number} {size:,} bytes{' (current)' if number == current else ''}")


@app.command("use", epilog="Example: embtables versions use tables 6")
def use(
    folder: Folder, number: Annotated[int, typer.Argument(metavar="VERSION", help="One that `list` shows.")]
) -> None:
    """Check another version and make it current, such as the one before."""
    versions = Versions(folder)
    versions.use(number)
    typer.echo(f"{versions.path(number)} is current")


@app.command("delta", epilog="Example: embtables versions delta tables --since 6 --out 6-to-7.delta")
def delta(
    folder: Folder,
    since: Annotated[int, typer.Option(help="The version that others have.")],
    out: Annotated[Path, typer.Option(help="The file to write; one of that name is replaced.")],
) -> None:
    """Write the rows, codes and small tensors that changed from a version to the current one."""
    versions = Versions(folder)
    versions.delta(since, out)
    full = versions.path(versions.current()).stat().st_size
    typer.echo(f"{out}: {out.stat().st_size:,} bytes; all of version {versions.current()} has {full:,}")


@app.command("apply", epilog="Example: embtables versions apply copy 6-to-7.delta")
def apply(
    folder: Folder,
    file: Annotated[Path, typer.Argument(metavar="DELTA", help="What `delta` or `compact` wrote.")],
    keep: Keep = 2,
) -> None:
    """Make the version that a delta leads to from one in FOLDER, check it, and make it current."""
    versions = Versions(folder, keep)
    typer.echo(f"{versions.path(versions.apply(file))} is current")


@app.command("compact", epilog="Example: embtables versions compact 5-to-6.delta 6-to-7.delta --out 5-to-7.delta")
def compact_(
    files: Annotated[list[Path], typer.Argument(metavar="DELTA...", help="Each begins where the one before ends.")],
    out: Annotated[Path, typer.Option(help="The file to write; one of that name is replaced.")],
) -> None:
    """Make one delta of several that follow one another."""
    whole = compact(files, out)
    typer.echo(f"{out}: {whole}, {out.stat().st_size:,} bytes")
