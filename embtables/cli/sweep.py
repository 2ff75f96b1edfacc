"""The sub-commands ``plan``, ``sweep`` and ``report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from embtables.training.config import RunConfig

Data = Annotated[Path, typer.Argument(metavar="DATA", help="A folder made by `embtables prepare`.", show_default=False)]

On = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="ADDRESS",
        help="Train on a Ray cluster: ray (workers on this machine), auto, HOST:PORT or ray://HOST:PORT.",
    ),
]


def plan(
    data: Data,
    method: Annotated[str, typer.Option(help="A kind, such as hash, or {kind: compositional, operation: add}.")],
    budget: Annotated[
        str | None, typer.Option(help="Bytes of the served tables: 10%, 0.1, 64MB, 67108864. Not needed for full.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Of the served rows, such as int8; see train.")] = None,
    embedding_dim: Annotated[int, typer.Option(min=1, help="Length of every vector.")] = 16,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="For the training bytes: sgd, rowwise_adagrad, adagrad, adam, one of another package, or none for any "
            "of torch.optim; without it what `embtables train` takes."
        ),
    ] = None,
    leave_out: Annotated[
        str | None, typer.Option(help="Features to leave out, separated by commas; they have no table.")
    ] = None,
    training_budget: Annotated[str | None, typer.Option(help="Bound on the training bytes as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show the tables a method makes of a byte budget, to the byte, without training anything.

    Example:

    \b
      embtables plan data/globo --method compositional --budget 10%
    """
    from embtables.cli.train import names_of, value_of
    from embtables.datasets import PreparedDataset
    from embtables.training.config import load_config
    from embtables.training.planning import plan_tables, selected

    flags = {
        "tables.method": value_of(method, "--method"),
        "tables.budget": value_of(budget, "--budget"),
        "tables.precision": precision,
        "tables.embedding_dim": embedding_dim,
        "tables.training_budget": value_of(training_budget, "--training-budget"),
        "data.leave_out": names_of(leave_out),
        **(
            {"tables.fused": False} if optimizer == "none" else {"tables.optimizer": value_of(optimizer, "--optimizer")}
        ),
    }
    config = load_config(flags=flags)
    solved = plan_tables(config, selected(config, PreparedDataset(data)), any_model=True)
    typer.echo(json.dumps(solved.to_dict(), indent=1) if as_json else str(solved))


def sweep(
    data: Data,
    out: Annotated[Path, typer.Option(help="The sweep's folder. An unfinished sweep in it is gone on with.")],
    methods: Annotated[
        str,
        typer.Option(help="Kinds separated by commas, or all; with options as {kind: compositional, operation: add}."),
    ] = "full",
    precisions: Annotated[
        str | None,
        typer.Option(help="Served precisions to try each method in, such as fp32,int8,int4; else that of --set."),
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Separated by commas, such as 50%,10%,1% or 64MB,8MB. Not needed for full.")
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="NAME: {FIELD: VALUE}",
            help="A training configuration to compare with others: what differs from --set; repeatable.",
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Named defaults, such as bars; see `embtables train`.")] = None,
    leave_out: Annotated[str | None, typer.Option(help="Features and histories to leave out, by commas.")] = None,
    max_history: Annotated[int | None, typer.Option(help="Latest items kept of each history.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Such as dlrm, din or package.module:Class; without it that of --config, or dlrm."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds: 0, 1, …; each sets initialization, hashing and order.")
    ] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; each gets its share of the cores.")] = 1,
    on: On = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML for every cell: data, model, tables, dense, training.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field, such as training.epochs=3; repeatable."),
    ] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE,VALUE",
            help="Values to choose from on validation, with seed 0, for each method and budget, such as "
            "tables.regularization=0.03,0.1,0.3; repeatable, for all combinations.",
        ),
    ] = None,
    tune_at: Annotated[
        str | None,
        typer.Option(help="The one of --budgets at which --tune is tried, for all; else each has its own choice."),
    ] = None,
    best: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Train further seeds only for the baselines, and for so many others that are best on validation with "
            "seed 0, of each budget.",
        ),
    ] = None,
    learning_rates: Annotated[str | None, typer.Option(hidden=True)] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            help="With --budgets: add full (also in int8 and int4), drop_feature, frequency_cutoff and "
            "fewer_dimensions where missing."
        ),
    ] = True,
) -> None:
    """Train every variant, with every method at every budget, with every seed; stopped and started again, it goes on.

    Without --variant there is one training configuration for all. Infeasible cells are listed with their floors and
    not trained; full ignores the budgets. The result is OUT/results.csv; `embtables report OUT` makes a table and a
    figure of it, at any time.

    --tune chooses any field of the training for each method on validation, with seed 0: at every budget, or at the one
    of --tune-at for all. --best spends the further seeds on the methods that validation puts first. Both choose by
    training.monitor.

    Examples:

    \b
      embtables sweep data/globo --methods full,hash,compositional --budgets 50%,10%,1% --seeds 3 --out runs/globo
      embtables sweep data/globo --methods hash,robe --precisions fp32,int4 --budgets 10%,1% --out runs/precisions
      embtables sweep data/globo --methods robe --budgets 64MB --tune tables.learning_rate=0.02,0.05,0.1 --out runs/robe
      embtables sweep data/globo --methods all --precisions fp32,int4 --budgets 10%,1% \\
        --tune tables.regularization=0.1,0.3 --tune-at 1% --seeds 3 --best 5 --out runs/globo
      embtables sweep data/yelp --variant 'no history: {model.name: mlp, data.leave_out: [history]}' \\
        --variant 'DIN: {model.name: din}' --out runs/din
      embtables sweep data/globo --methods hash,robe --budgets 10%,1% --jobs 16 --on ray://head:10001 --out runs/globo
    """
    from embtables._util.names import number_of
    from embtables.cli.train import names_of
    from embtables.sweeps import cells
    from embtables.sweeps.config import describe
    from embtables.sweeps.sweep import run_sweep
    from embtables.training.config import load_config

    if learning_rates is not None:
        asked = f"tables.learning_rate={learning_rates}"
        typer.echo(f"--learning-rates will go: give --tune {asked} in its place.", err=True)
        tune = [*(tune or []), asked]
    chosen = cells.in_precisions(cells.parse_methods(methods), precisions)
    flags = {"model.name": model, "data.leave_out": names_of(leave_out), "data.max_history": max_history}

    def train(fields: dict[str, Any]) -> RunConfig:
        return load_config(config, preset=preset, flags=flags, overrides=overrides or [], fields=fields)

    rows = run_sweep(
        describe(
            data,
            cells.with_baselines(chosen) if baselines and budgets else chosen,
            cells.parse_budgets(budgets) if budgets is not None else [],
            seeds,
            train({}),
            {name: train(fields) for name, fields in cells.parse_variants(variants or []).items()},
            tune=cells.parse_tune(tune or []),
            tune_at=tune_at,
            best=best,
            preset=preset,
            precisions=precisions is not None,
        ),
        out,
        jobs=jobs,
        on=on,
    )
    count = {status: sum(row["status"] == status for row in rows) for status in ("ok", "infeasible", "failed")}
    typer.echo(", ".join(f"{number} {status}" for status, number in count.items()) + f": {out / 'results.csv'}")
    typer.echo(f"Table and figure: embtables report {out}")
    if count["failed"]:
        failed = next(row for row in rows if row["status"] == "failed")
        log = out / "cells" / f"{failed['cell']}.log"
        typer.secho(
            f"Error: {number_of(count['failed'], 'cell')} failed, first {failed['cell']}: {failed['message']} "
            f"(log: {log}). The same command tries {'it' if count['failed'] == 1 else 'them'} again.",
            fg=typer.colors.RED,
            err=True,
        )
        raise typer.Exit(1)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A sweep, finished or not.", show_default=False)],
    resamples: Annotated[int, typer.Option(min=20, help="Of the test rows, for the paired bootstrap.")] = 200,
) -> None:
    """Print the accuracy-memory table of a sweep; write report.html, report.md and accuracy_memory.png and .svg.

    They lie beside its results. report.html is a page that needs no network: what to choose, figures with everything
    that was measured, and the command behind each row.

    Example:

    \b
      embtables report runs/globo
    """
    import sys

    from embtables.sweeps.report import show, write_report

    show(write_report(folder, resamples=resamples, progress=sys.stderr.isatty()))
