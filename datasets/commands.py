"""`embtables prepare KIND INPUT OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .synthetic import Synthetic, prepare_synthetic

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Turn raw files into prepared data: Parquet shards and a manifest. A second run reuses what is there.",
)

Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder to write; must not hold anything else.", show_default=False)
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Shares = Annotated[str, typer.Option(help="Shares of train, valid and test.")]


@app.callback()
def kinds() -> None:
    """Keeps `prepare KIND` a group, whatever the number of kinds."""


@app.command(
    epilog="Example: embtables prepare synthetic - data/toy --rows 500000 --cardinalities 50000,5000,500 --unseen 0.02"
)
def synthetic(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="- : the data is generated.", show_default=False)],
    out: Out,
    rows: Annotated[int, typer.Option(help="Number of rows.")] = 1_000_000,
    cardinalities: Annotated[str, typer.Option(help="Number of ids of each feature.")] = "100000,10000,1000",
    zipf: Annotated[float, typer.Option(help="An id of rank r is drawn with probability ∝ 1/r^ZIPF.")] = 1.05,
    bias: Annotated[float, typer.Option(help="Constant part of the logit.")] = -1.0,
    effect_std: Annotated[
        str, typer.Option(help="Standard deviation of the ids' effects: one, or one a feature.")
    ] = "1",
    interaction_std: Annotated[float, typer.Option(help="Standard deviation of the pairwise part of the logit.")] = 0.0,
    interaction_rank: Annotated[int, typer.Option(help="Length of the ids' vectors in the pairwise part.")] = 4,
    num_dense: Annotated[int, typer.Option(help="Number of dense features.")] = 0,
    dense_std: Annotated[float, typer.Option(help="Standard deviation of the dense part of the logit.")] = 0.5,
    unseen: Annotated[float, typer.Option(help="Share of ids in valid and test that training never sees.")] = 0.0,
    shares: Shares = "0.8,0.1,0.1",
    seed: Seed = 0,
) -> None:
    """Zipf ids with planted effects, whose best possible AUC is known (`bayes_auc` in the manifest)."""
    if source != "-":
        raise ValueError(f"INPUT {source!r}: synthetic data has no input, write - in its place")
    config = Synthetic(
        rows=rows,
        cardinalities=tuple(int(number) for number in numbers("--cardinalities", cardinalities)),
        zipf=zipf,
        bias=bias,
        effect_std=numbers("--effect-std", effect_std),
        interaction_std=interaction_std,
        interaction_rank=interaction_rank,
        num_dense=num_dense,
        dense_std=dense_std,
        unseen=unseen,
        shares=numbers("--shares", shares),
        seed=seed,
    )
    prepare_synthetic(out, config, progress=True)


def numbers(option: str, text: str) -> tuple[float, ...]:
    """The numbers of a comma-separated list."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text!r}: numbers separated by commas are needed") from None
