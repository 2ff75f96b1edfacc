"""``embtables probe``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be trained, and stop.")]


def probe(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder made by `embtables prepare`.")],
    budgets: Annotated[str, typer.Option(help="Separated by commas, such as 10%,1% or 64MB,8MB.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the short trainings; DATA with -probe behind it by default.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Those that race within each budget, as `embtables sweep` takes them; six families else."),
    ] = None,
    model: Model = None,
    config: Config = None,
    preset: Preset = None,
    leave_out: LeaveOut = None,
    max_history: Annotated[int | None, typer.Option(help="Latest items kept of each history.")] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Find out what each table is worth, and which method does best within a budget, in short trainings.

    Within each budget six methods race: all are trained for a while, in batches a quarter as large, and whoever is
    behind on validation drops out. Full tables run along; what each of them is worth is what is lost on validation
    where all its ids have one vector. For one budget that is no more work than one full training of all its epochs.

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
    from embtables.sweeps.racing import FAMILIES
    from embtables.training.config import load_config

    flags = {"model.name": model, "data.leave_out": names_of(leave_out), "data.max_history": max_history}
    resolved = load_config(config, preset=preset, flags=flags, overrides=overrides or [])
    chosen = list(FAMILIES) if methods is None else list(cells.parse_methods(methods).values())
    if any(cells.kind_of(spec) == "auto" for spec in chosen):
        raise ValueError("auto chooses by what a probe finds, and takes no part in it: leave it out of --methods")
    folder = data.with_name(f"{data.name}-probe") if out is None else out
    planned = probing.course(PreparedDataset(data), resolved, cells.parse_budgets(budgets), folder, chosen)
    found = run_probe(planned, dry_run=dry_run, quiet=quiet)
    if found is None:
        return
    found.save(data / FILE)
    typer.echo(f"{data / FILE}: `embtables plan {data} --method auto --budget {list(planned.runners)[0]}` uses it")


def run_probe(planned: Course, *, dry_run: bool, quiet: bool) -> Probe | None:
    """Says what it will cost, makes the probe, and prints what it found; ``None`` where it is only to say the cost."""
    from embtables.methods import method_label
    from embtables.sweeps.probing import probe
    from embtables.sweeps.racing import ROUNDS
    from embtables.training.logs import ProgressBar

    number = 1 + sum(len(runners) for runners in planned.runners.values())
    shortest, longest = (planned.reference.epochs(ROUNDS[i].evaluations) for i in (0, -1))
    typer.echo(
        f"{number} trainings of {shortest:.3g} to {longest:.3g} epochs, "
        f"{planned.epochs:.3g} epochs in all; a full training has up to {planned.reference.config.training.epochs}",
        err=True,
    )
    for budget, names in planned.left_out.items():
        if names:
            typer.echo(f"do not fit into {budget}: {', '.join(names)}", err=True)
    if dry_run:
        return None
    done = 0.0
    with ProgressBar(not quiet, 0, round(100 * planned.epochs), "probing, 1/100 epochs") as bar:

        def tick(epochs: float) -> None:
            nonlocal done
            done += epochs
            bar.step(round(100 * done))

        found = probe(planned, tick)
    worth = sorted(found.tables.items(), key=lambda item: -item[1])
    typer.echo(f"what tables are worth ({found.monitor} lost without them):")
    for name, value in worth[:20]:
        typer.echo(f"  {name}: {value:+.4f}")
    for budget, race in zip(planned.runners, found.races):
        typer.echo(f"within {budget}, {race.budget_bytes:,} bytes, against full tables:")
        for entrant in race.entrants:
            seeds = f", {entrant.seeds} seeds" if entrant.seeds > 1 else ""
            told = f"{-entrant.loss:+.4f} ± {entrant.error:.4f} after {entrant.epochs:.3g} epochs{seeds}"
            typer.echo(f"  {method_label(entrant.method)}: {told}")
    return found
