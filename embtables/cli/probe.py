"""``embtables probe``."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embtables._util.names import number_of

if TYPE_CHECKING:
    from embtables.plan.probe import Probe
    from embtables.sweeps.probing import Course

__all__ = ["probe", "run_probe"]

# What commands that train several times are told of a training.
Model = Annotated[str | None, typer.Option(help="Such as dlrm, din, deepfm, or package.module:Class.")]
Config = Annotated[Path | None, typer.Option(help="YAML: data, model, tables, dense, training.")]
Preset = Annotated[str | None, typer.Option(help="Named defaults, such as bars; see `embtables train`.")]
LeaveOut = Annotated[str | None, typer.Option(help="Features and histories to leave out, by commas.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any field, such as training.epochs=3; repeatable."),
]
Methods = Annotated[
    str | None,
    typer.Option(
        help="Those that race within each budget, as `embtables sweep` takes them, or all; six families else."
    ),
]
Regularizations = Annotated[
    str | None,
    typer.Option(
        help="Strengths of tables.regularization of which full tables choose one, for all; by default 0.03,0.1,0.3, or "
        "the one above 0 that --set or --config gives."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be trained, and stop.")]


def probe(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder made by `embtables prepare`.")],
    budgets: Annotated[str, typer.Option(help="Separated by commas, such as 10%,1% or 64MB,8MB.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the short trainings; DATA with -probe behind it by default.")
    ] = None,
    methods: Methods = None,
    model: Model = None,
    config: Config = None,
    preset: Preset = None,
    leave_out: LeaveOut = None,
    max_history: Annotated[int | None, typer.Option(help="Latest items kept of each history.")] = None,
    overrides: Overrides = None,
    regularizations: Regularizations = None,
    dry_run: DryRun = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Find out what each table is worth, and which method does best within a budget, in short trainings.

    Full tables choose how strong regularization is. Within each budget six methods race: all are trained for a while,
    in batches a quarter as large, and whoever is behind on validation drops out. What a table is worth is what is lost
    on validation where all its ids have one vector; of the two biggest, where a model is trained without them. For one
    budget all that is no more epochs than one full training has.

    The result is DATA/probe.json, by which `--method auto` chooses from then on. Stopped and started again, a probe
    goes on. Give it what you will train with: the same model, --config, --set and --leave-out.

    Examples:

    \b
      embtables probe data/demo --budgets 10%
      embtables probe data/demo --budgets 10%,1% --model din --set tables.regularization=0.1
    """
    from embtables.cli.train import names_of
    from embtables.datasets import PreparedDataset
    from embtables.plan.probe import FILE
    from embtables.sweeps import cells, probing
    from embtables.sweeps.racing import entered
    from embtables.training.config import load_config

    flags = {"model.name": model, "data.leave_out": names_of(leave_out), "data.max_history": max_history}
    resolved = load_config(config, preset=preset, flags=flags, overrides=overrides or [])
    folder = data.with_name(f"{data.name}-probe") if out is None else out
    strengths = parse_regularizations(regularizations)
    planned = probing.course(
        PreparedDataset(data), resolved, cells.parse_budgets(budgets), folder, entered(methods), strengths
    )
    found = run_probe(planned, dry_run=dry_run, quiet=quiet)
    if found is None:
        return
    found.save(data / FILE)
    budget, strength = list(planned.runners)[0], found.regularization
    typer.echo(
        f"{data / FILE}: `embtables train {data} --method auto --budget {budget} "
        f"--set tables.regularization={strength:g}` uses it, with all else as it was given here"
    )


def parse_regularizations(text: str | None) -> list[float] | None:
    """Numbers separated by commas."""
    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0 <= strength < math.inf for strength in found):
        raise ValueError(f"--regularizations are numbers from 0 on, separated by commas, as 0.03,0.1, not {text!r}")
    return found


def run_probe(planned: Course, *, dry_run: bool, quiet: bool, trainings: int = 0, epochs: float = 0.0) -> Probe | None:
    """Says what it will cost, makes the probe, and prints what it found; ``None`` where it is only to say the cost.

    Args:
        planned: the probe.
        dry_run: whether the cost is all.
        quiet: whether there is no progress bar.
        trainings: how many follow the probe.
        epochs: how many those have at most, in all.
    """
    from embtables.methods import method_label
    from embtables.sweeps.probing import probe
    from embtables.training.logs import ProgressBar

    full = planned.references[0].config.training.epochs
    typer.echo(
        f"{number_of(planned.trainings, 'short training')}, {planned.epochs:.3g} epochs in all; a full training has up "
        f"to {full:g}",
        err=True,
    )
    if trainings:
        typer.echo(f"then {number_of(trainings, 'training')}, up to {epochs:.3g} epochs in all", err=True)
    for budget, names in planned.left_out.items():
        if names:
            typer.echo(f"do not fit into {budget}: {', '.join(names)}", err=True)
    if dry_run:
        return None
    done, ticks = 0.0, 0
    resumed, started = planned.references[0].path().exists(), 0.0
    with ProgressBar(not quiet, 0, round(100 * planned.epochs), "probing, 1/100 epochs") as bar:

        def tick(trained: float) -> None:
            nonlocal done, ticks, started
            done, ticks = done + trained, ticks + 1
            if ticks == 2 and not resumed:  # the first one was slower than all others, as things are made ready in it
                seconds = (time.monotonic() - started) / trained * (planned.epochs + epochs)
                total = number_of(planned.trainings + trainings, "training")
                bar.say(f"about {_minutes(seconds)} here, less where trainings stop early: {total}")
            started = time.monotonic()
            bar.step(round(100 * done))

        found = probe(planned, tick)
    typer.echo(f"tables.regularization: {found.regularization:g}, for full tables and all others")
    worth = sorted(found.tables.items(), key=lambda item: -item[1])
    typer.echo(f"what tables are worth ({found.monitor} lost without them):")
    for name, value in worth[:20]:
        typer.echo(f"  {name}: {value:+.4f}, by {found.how[name]}")
    for budget, race in zip(planned.runners, found.races):
        typer.echo(f"within {budget}, {race.budget_bytes:,} bytes, against full tables:")
        for entrant in race.entrants:
            seeds = f", {entrant.seeds} seeds" if entrant.seeds > 1 else ""
            told = f"{-entrant.loss:+.4f} ± {entrant.error:.4f} after {entrant.epochs:.3g} epochs{seeds}"
            typer.echo(f"  {method_label(entrant.method)}: {told}")
    return found


def _minutes(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return number_of(round(seconds / 60), "minute") if seconds < 5400 else f"{seconds / 3600:.1f} hours"
