"""The sub-commands ``plan``, ``sweep`` and ``report``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

DATA = typer.Argument(..., help="Prepared data: a directory that `embtables prepare` wrote.", show_default=False)


def plan(
    data: Path = DATA,
    method: str = typer.Option(..., help="Kind of method, such as hash, or {kind: compositional, operation: add}."),
    budget: str | None = typer.Option(
        None, help="Inference bytes of all tables: 10%, 0.1, 64MB, 64MiB or a number of bytes. Not needed for full."
    ),
    embedding_dim: int = typer.Option(16, min=1, help="Length of the vectors."),
    optimizer: str = typer.Option(
        "adagrad", help="sgd, rowwise_adagrad, adagrad or adam, for the training bytes; none: any of torch.optim."
    ),
    training_budget: str | None = typer.Option(None, help="Bound on the training bytes as well."),
    as_json: bool = typer.Option(False, "--json", help="Print the plan as JSON."),
) -> None:
    """Show the tables a method makes of a byte budget, to the byte, without training anything.

    Example: embtables plan data/globo --method compositional --budget 10%
    """
    from embtables.datasets import PreparedDataset
    from embtables.training.config import load_config, parse_value
    from embtables.training.planning import plan_tables

    flags = {
        "tables.method": parse_value(method, "method"),
        "tables.budget": parse_value(budget, "budget") if budget is not None else None,
        "tables.embedding_dim": embedding_dim,
        "tables.training_budget": parse_value(training_budget, "training budget") if training_budget else None,
        **({"tables.fused": False} if optimizer == "none" else {"tables.optimizer": optimizer}),
    }
    solved = plan_tables(load_config(flags=flags), PreparedDataset(data))
    typer.echo(json.dumps(solved.to_dict(), indent=1) if as_json else str(solved))


def sweep(
    data: Path = DATA,
    model: str | None = typer.Option(
        None, help="dlrm, mlp, or your own as package.module:Class; without it that of --config, or dlrm."
    ),
    methods: str = typer.Option(
        ..., help="Kinds separated by commas; with options as {kind: compositional, operation: add}."
    ),
    budgets: str = typer.Option(..., help="Budgets separated by commas, such as 50%,10%,1% or 64MB,8MB."),
    seeds: int = typer.Option(3, min=1, help="Number of seeds, 0, 1, …; a seed sets initialization and hashing."),
    out: Path = typer.Option(..., help="Directory of the sweep. An unfinished one is gone on with."),
    jobs: int = typer.Option(1, min=1, help="Cells at a time; each gets its share of the cores."),
    config: Path | None = typer.Option(None, help="Training configuration (YAML) of every cell."),
    overrides: list[str] | None = typer.Option(
        None, "--set", metavar="FIELD=VALUE", help="Set a field of the training configuration; may be repeated."
    ),
    learning_rates: str | None = typer.Option(
        None, help="Grid of table learning rates, chosen for each method and budget on validation with the first seed."
    ),
    baselines: bool = typer.Option(True, help="Add full, drop_feature and frequency_cutoff where they are missing."),
) -> None:
    """Train every method at every budget with every seed; stopped and started again, it goes on.

    Infeasible cells are listed with their floors and not trained; full ignores the budgets. The result is
    OUT/results.csv; `embtables report OUT` makes a table and a figure of it, at any time.

    Example: embtables sweep data/globo --model dlrm --methods full,hash,compositional --budgets 50%,10%,1%
    --seeds 3 --out runs/globo
    """
    from embtables.benchmark.cells import parse_budgets, parse_methods, with_baselines
    from embtables.benchmark.sweep import describe, run_sweep
    from embtables.training.config import load_config

    chosen = parse_methods(methods)
    rows = run_sweep(
        describe(
            data,
            with_baselines(chosen) if baselines else chosen,
            parse_budgets(budgets),
            seeds,
            load_config(config, flags={"model.name": model}, overrides=overrides or []),
            _numbers(learning_rates),
        ),
        out,
        jobs=jobs,
    )
    count = {status: sum(row["status"] == status for row in rows) for status in ("ok", "infeasible", "failed")}
    typer.echo(", ".join(f"{number} {status}" for status, number in count.items()) + f": {out / 'results.csv'}")
    typer.echo(f"Table and figure: embtables report {out}")
    if count["failed"]:
        failed = next(row for row in rows if row["status"] == "failed")
        log = out / "cells" / f"{failed['cell']}.log"
        typer.secho(
            f"Error: {count['failed']} cells failed, first {failed['cell']}: {failed['message']} (log: {log}). "
            "The same command tries them again.",
            fg=typer.colors.RED,
            err=True,
        )
        raise typer.Exit(1)


def _numbers(text: str | None) -> list[float]:
    if text is None:
        return []
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--learning-rates {text!r}: give numbers separated by commas, such as 0.01,0.03,0.1"
        ) from None
    if not all(0 < rate < float("inf") for rate in rates):
        raise ValueError(f"--learning-rates {text!r}: every learning rate must be above 0")
    return list(dict.fromkeys(rates))


def report(
    folder: Path = typer.Argument(..., help="Directory of a sweep, finished or not.", show_default=False),
    resamples: int = typer.Option(200, min=20, help="Resamples of the paired bootstrap over test rows."),
) -> None:
    """Print the accuracy-memory table of a sweep; write report.md and accuracy_memory.png and .svg beside its results.

    Example: embtables report runs/globo
    """
    import sys

    from embtables.benchmark.report import show, write_report

    show(write_report(folder, resamples=resamples, progress=sys.stderr.isatty()))
