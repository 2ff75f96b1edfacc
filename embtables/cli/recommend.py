"""``embtables recommend``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embtables.cli.probe import (
    Config,
    DryRun,
    LeaveOut,
    Methods,
    Model,
    Overrides,
    Preset,
    Regularizations,
    parse_regularizations,
    run_probe,
)
from embtables.cli.sweep import On

__all__ = ["recommend"]


def recommend(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A log, such as clicks.csv, or a folder made by `embtables prepare`.")
    ],
    budget: Annotated[str, typer.Option(help="Bytes of the served tables, such as 10MB or 1%; several by commas.")],
    out: Annotated[Path, typer.Option(help="Folder of everything that is made. What is in it is gone on with.")],
    model: Model = None,
    config: Config = None,
    preset: Preset = None,
    leave_out: LeaveOut = None,
    overrides: Overrides = None,
    methods: Methods = None,
    regularizations: Regularizations = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many times each method is trained to the end.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at a time; each gets its share of the cores.")] = 1,
    on: On = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="In minutes: no training sees more than a million examples.")
    ] = False,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Three seeds, and all baselines and runners-up beside the winner.")
    ] = False,
    dry_run: DryRun = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Say which tables to take within a budget: prepare, probe, train, compare, export.

    A raw log is prepared as `embtables prepare interactions` does by default. Then six methods race within the budget
    (`embtables probe`), and the winner is trained to the end beside full tables, full tables in low precision and a
    frequency cut-off, each with the regularization that the probe chose, and with the next stronger one. The best on
    validation is recommended, and its tables and model are exported. With --quick the one that the probe chose is all,
    and trainings are short.

    Stopped and started again the same command goes on. OUT holds the prepared data, the probe, the sweep with its
    report, and for each budget what is served, alone and as a bundle that scores raw rows.

    Examples:

    \b
      embtables recommend clicks.csv --budget 10MB --out runs/clicks
      embtables recommend data/demo --budget 10%,1% --set training.epochs=3 --out runs/demo
      embtables recommend data/demo --budget 1% --quick --out runs/quick
      embtables recommend data/demo --budget 1% --thorough --methods all --jobs 2 --out runs/thorough
    """
    import sys

    from embtables.cli.train import names_of
    from embtables.datasets import PreparedDataset
    from embtables.datasets.readers.interactions import prepare_interactions
    from embtables.sweeps import cells, probing
    from embtables.sweeps.racing import entered
    from embtables.sweeps.recommending import (
        check_before,
        most_trainings,
        quickly,
        recommendation,
        strengths_after,
        sweep_for,
    )
    from embtables.sweeps.report import write_report
    from embtables.sweeps.sweep import run_sweep
    from embtables.training.bundle import save_bundle
    from embtables.training.config import load_config
    from embtables.training.export import copy_served, served_of

    if quick and thorough:
        raise ValueError("--quick and --thorough exclude each other: leave one out")
    flags = {"model.name": model, "data.leave_out": names_of(leave_out)}
    resolved = load_config(config, preset=preset, flags=flags, overrides=overrides or [])
    budgets = cells.parse_budgets(budget)
    if not data.is_dir():
        typer.echo(f"preparing {data}", err=True)
        try:
            data = prepare_interactions(data, out / "data", progress=not quiet).path
        except ValueError as error:
            hint = "; options are those of `embtables prepare interactions`, whose folder `recommend` takes as well"
            raise ValueError(f"{error}{hint if '--' in str(error) else ''}") from None
    opened = PreparedDataset(data)
    if quick:
        resolved = quickly(resolved, opened)
    asked = parse_regularizations(regularizations)
    seeds = max(seeds, 3) if thorough else seeds
    check_before(data, resolved, budgets, seeds, preset, out / "sweep")
    planned = probing.course(opened, resolved, budgets, out / "probe", entered(methods), asked)
    tried = [reference.config.tables.regularization for reference in planned.references]
    most = 1 if quick else len(tried) if thorough else min(2, len(tried))
    number = most_trainings(len(budgets), seeds, most, thorough=thorough)
    epochs = number * resolved.training.epochs
    found = run_probe(planned, dry_run=dry_run, quiet=quiet, trainings=number, epochs=epochs)
    if found is None:
        return
    found.save(out / "probe.json")
    strengths = [found.regularization] if quick else strengths_after(found, tried, thorough=thorough)
    sweep = sweep_for(data, found, resolved, budgets, seeds, strengths, thorough=thorough, preset=preset)
    rows = run_sweep(sweep, out / "sweep", jobs=jobs, on=on)
    failed = next((row for row in rows if row["status"] == "failed"), None)
    if failed is not None:
        log = out / "sweep" / "cells" / f"{failed['cell']}.log"
        raise ValueError(f"{failed['cell']} failed: {failed['message']} (log: {log})")
    report = write_report(out / "sweep", progress=sys.stderr.isatty() and not quiet)
    typer.echo(f"Everything that was compared: {out / 'sweep' / 'report.html'}")
    for each, race in zip(budgets, found.races):
        taken = recommendation(report.summary, each, race.budget_bytes)
        served = out / "served" / each.replace("%", "pct")
        copy_served(served_of(out / "sweep" / "cells" / taken.run), served)
        for line in [*taken.words(), f"Served tables and model: {served}"]:
            typer.echo(line)
        bundle = out / "bundles" / served.name
        try:
            save_bundle(out / "sweep" / "cells" / taken.run, opened, bundle)
            typer.echo(f"The same with what it takes to score raw rows, for `embtables predict`: {bundle}")
        except ValueError as error:
            typer.echo(f"No bundle to score raw rows with: {error}")
