"""``embtables bundle`` and ``embtables predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from embtables._util.files import sha256
from embtables._util.names import number_of
from embtables._util.reading import inside
from embtables.cli.train import check_finished, outside_runs
from embtables.datasets import PreparedDataset
from embtables.models import find_model
from embtables.training.bundle import BUNDLE, SERVED, check_bundle, save_bundle
from embtables.training.export import MODEL
from embtables.training.predictor import Predictor

__all__ = ["bundle", "predict"]

_Model = Annotated[
    str | None, typer.Option(help="package.module:Class of a model of your own, which is imported.", show_default=False)
]


def bundle(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished `embtables train`.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="The prepared data that it was trained on.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    graphs: Annotated[
        bool, typer.Option("--graphs", help="Also graph.pt2 (torch.export) and graph.onnx, where the model allows it.")
    ] = False,
    model: _Model = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle of another run at OUT.")] = False,
) -> None:
    """Write a run with all that it takes to score raw rows: tables, model, vocabularies, scales.

    OUT is what `embtables predict` and embtables.training.Predictor.load read. The data are those of `embtables
    prepare interactions` or `synthetic`. Vocabularies are kept as short hashes; what they take beside the tables is
    said.

    Example:

    \b
      embtables bundle runs/hash data/clicks bundles/clicks
    """
    check_finished(run)
    out = outside_runs(out)
    if out.exists():
        if not (out / BUNDLE).is_file():
            raise ValueError(f"{out} exists and is not a bundle: give another OUT")
        served = sha256(inside(run, f"served/{MODEL}"))
        if not overwrite and check_bundle(out).sha256[f"{SERVED}/{MODEL}"] != served:
            raise ValueError(f"{out} holds the bundle of another run: give another OUT, or --overwrite")
    made = save_bundle(run, PreparedDataset(data), out, graphs=graphs, model=_class(model))
    for line in [*made.words(), str(out)]:
        typer.echo(line)


def predict(
    source: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder made by `embtables bundle`.")],
    rows: Annotated[Path, typer.Argument(metavar="ROWS", help="Delimited text, Parquet, or .jsonl.")],
    out: Annotated[Path, typer.Option(help="The Parquet file to write: a column `score`, a row for each of ROWS.")],
    logits: Annotated[bool, typer.Option("--logits", help="A column `logit` instead of probabilities.")] = False,
    model: _Model = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Score the raw rows of a file: the probability of each that its label is 1.

    ROWS has the columns that the training had, but for label and time; where the model reads histories, also a column
    `history` of earlier items, oldest first. New values have the id of unseen ones, further columns are passed over,
    and a missing column or a text that is no number is an error. ROWS streams through memory.

    Example:

    \b
      embtables predict bundles/clicks monday.csv --out scores.parquet
    """
    written = Predictor.load(source, model=_class(model)).predict_file(rows, out, logits=logits, progress=not quiet)
    typer.echo(f"{out}: {number_of(written, 'row')}")


def _class(model: str | None) -> type[nn.Module] | None:
    return None if model is None else find_model(model, beside=Path.cwd())
