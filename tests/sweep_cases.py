"""Small sweeps, whose cells a script fabricates."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from embtables.sweeps.cells import Cell, parse_methods
from embtables.sweeps.config import SweepConfig, describe
from embtables.sweeps.sweep import run_sweep, train_command
from embtables.training.config import load_config

CELL = Path(__file__).with_name("benchmark_cell.py")
METHODS = parse_methods("full,hash,drop_feature,frequency_cutoff")


def fake_cell(config: SweepConfig, cell: Cell, run: Path) -> list[str]:
    command = train_command(config, cell, run)
    assert command[:4] == [sys.executable, "-m", "embtables", "train"]
    return [sys.executable, str(CELL), *command[4:]]


def cell_of_cluster(config: SweepConfig, cell: Cell, run: Path) -> list[str]:
    """A fabricated cell where the sweep's folder is another one; the folder that FAKE names is there."""
    home = Path(os.environ["FAKE"]).parent / "sweep"
    return [sys.executable, str(CELL.with_name("cluster_cell.py")), str(home), *fake_cell(config, cell, run)[2:]]


def config_of(data: Path, seeds: int = 2, budgets: str = "50%,1%,8", **flags: object) -> SweepConfig:
    return describe(data, METHODS, budgets.split(","), seeds, load_config(flags=flags))


def run(
    config: SweepConfig,
    out: Path,
    jobs: int = 1,
    command: Callable[..., list[str]] = fake_cell,
    console: Console | None = None,
    on: str | None = None,
) -> list[dict]:
    return run_sweep(config, out, jobs=jobs, on=on, console=console or Console(quiet=True), command=command)


def read(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


def started(fake: Path) -> list[str]:
    """The names of the cells that trained, in order."""
    file = fake / "started"
    return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []
