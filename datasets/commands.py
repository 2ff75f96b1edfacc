"""`embtables prepare KIND INPUT OUT`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from .criteo import Criteo, prepare_criteo
from .interactions import Interactions, parse_duration, prepare_interactions
from .log import LogOptions
from .movielens import MovieLens, prepare_movielens
from .negatives import Negatives
from .rejections import DEFAULT_LIMIT
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
LogSplit = Literal["random", "time", "leave-last-out"]
Split = Annotated[LogSplit, typer.Option(help="How rows are split; leave-last-out: each user's last row tests.")]
History = Annotated[int, typer.Option(help="Most items kept of a user's history, in its own column; 0: none.")]
MinCount = Annotated[int, typer.Option(help="Values rarer than this in training share id 1 with the unseen.")]
MaxRejected = Annotated[float, typer.Option(help="Share of malformed rows above which reading stops.")]
Shares = Annotated[str, typer.Option(help="Shares of train, valid and test.")]


@app.callback()
def kinds() -> None:
    """Keeps `prepare KIND` a group, whatever the number of kinds."""


@app.command(
    epilog="Example: embtables prepare criteo train.txt data/criteo --min-count 10   (train.txt may be gzipped)"
)
def criteo(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="train.txt as published.", show_default=False)],
    out: Out,
    split: Annotated[
        Literal["order", "random"], typer.Option(help="order: first 6/7 train, next 1/14 tests, last 1/14 validates.")
    ] = "order",
    shares: Shares = "0.8,0.1,0.1",
    min_count: MinCount = 1,
    seed: Seed = 0,
    max_rejected: MaxRejected = DEFAULT_LIMIT,
) -> None:
    """Criteo's display ads (Kaggle): 13 integers as ln(1 + max(x, 0)), 26 categories."""
    config = Criteo(split, numbers("--shares", shares), min_count, seed, max_rejected)
    prepare_criteo(source, out, config, progress=True)


@app.command(epilog="Example: embtables prepare movielens ml-1m data/ml-1m --split leave-last-out")
def movielens(
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="Folder: 100K, 1M, latest …, or RecBole's files.", show_default=False),
    ],
    out: Out,
    split: Split = "random",
    shares: Shares = "0.8,0.1,0.1",
    positive_from: Annotated[float, typer.Option(help="Ratings from here on are label 1.")] = 4.0,
    history: History = 50,
    min_count: MinCount = 1,
    seed: Seed = 0,
    max_rejected: MaxRejected = DEFAULT_LIMIT,
) -> None:
    """MovieLens ratings with what is known of users and films."""
    options = LogOptions(split, numbers("--shares", shares), history, min_count, seed)
    prepare_movielens(source, out, MovieLens(positive_from, max_rejected, options), progress=True)


@app.command(
    epilog="Examples:\n\n"
    "embtables prepare interactions clicks.parquet data/clicks --context device,country --days 3\n\n"
    "embtables prepare interactions log.csv.gz data/log --user uid --item sku --time ts --label bought --split time"
)
def interactions(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="CSV with a header (may be gzipped) or Parquet.", show_default=False)
    ],
    out: Out,
    user: Annotated[str | None, typer.Option(help="Column of the user; by default recognised by name.")] = None,
    item: Annotated[str | None, typer.Option(help="Column of the item; by default recognised by name.")] = None,
    time: Annotated[str | None, typer.Option(help="Column of the time; by default recognised by name.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label; without it every row is a click.")] = None,
    positive_from: Annotated[float | None, typer.Option(help="Labels from here on are positive.")] = None,
    context: Annotated[str, typer.Option(help="Further columns to use as features, separated by commas.")] = "",
    separator: Annotated[str | None, typer.Option(help="Of the CSV's fields; by default recognised.")] = None,
    time_unit: Annotated[
        Literal["auto", "s", "ms", "us", "ns"], typer.Option(help="Of times that are numbers; auto: by their size.")
    ] = "auto",
    start: Annotated[str | None, typer.Option("--from", help="First time to use: ISO date (UTC) or number.")] = None,
    end: Annotated[str | None, typer.Option("--to", help="First time not to use any more.")] = None,
    days: Annotated[float | None, typer.Option(help="Length of the span, from --from or the first row.")] = None,
    negatives: Annotated[int, typer.Option(help="Negatives a click, where there is no label.")] = 1,
    negative_sampling: Annotated[
        Literal["popularity", "uniform"], typer.Option(help="By clicks in the window, or any item alike.")
    ] = "popularity",
    negative_window: Annotated[str, typer.Option(help="Preceding clicks to draw from: 30m, 1h, 2d, all.")] = "1h",
    history: History = 50,
    split: Split = "random",
    shares: Shares = "0.8,0.1,0.1",
    min_count: MinCount = 1,
    seed: Seed = 0,
    max_rejected: MaxRejected = DEFAULT_LIMIT,
) -> None:
    """Any log of users, items and times. A negative is an item that the user never clicked, at the click's context."""
    config = Interactions(
        user=user,
        item=item,
        time=time,
        label=label,
        positive_from=positive_from,
        context=tuple(name for name in context.split(",") if name),
        separator=separator.replace("\\t", "\t") if separator else None,
        time_unit=time_unit,
        start=start,
        end=end,
        days=days,
        max_rejected=max_rejected,
        negatives=Negatives(negatives, negative_sampling, parse_duration(negative_window)),
        log=LogOptions(split, numbers("--shares", shares), history, min_count, seed),
    )
    prepare_interactions(source, out, config, progress=True)


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
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{option} {text!r}: numbers separated by commas are needed")
    return values
