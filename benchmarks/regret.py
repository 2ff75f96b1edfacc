"""How much accuracy `auto` gives away: what probes chose, beside what sweeps of the same data measured.

    python -m benchmarks.regret docs/results/probes

The folder holds a probe of each data set, NAME.json: `embtables probe` with the training configuration of the sweep in
docs/results/NAME-tuned; what a probe chose and that sweep did not train is in docs/results/NAME-auto. For each budget
that both have, the method that `auto` takes is looked up there: its test AUC, that of the best measured method at the
budget, and the difference of the two, the regret. Beside it stands the best baseline that fits: dropped features, a
frequency cut-off, or full tables of low precision. Then the losses against full tables that the probe expected of all
that raced, by family, beside those that were measured, and the order in which methods left the race beside that of
whole trainings. Writes report.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import pandas as pd

from benchmarks.results import rendered
from embtables._util.files import write_text
from embtables.methods import method_label
from embtables.plan.probe import Entrant, Probe
from embtables.sizes.budget import parse_budget

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
#: What `auto` takes without a probe.
RULE = "banded(precision=int8)"
#: A regret that is of no account: seeds differ by as much.
SMALL = 0.002
#: The first words of their labels.
BASELINES = ("full(", "drop_feature", "frequency_cutoff")


class Measured(NamedTuple):
    """The test AUC of a method at a budget: mean, sample standard deviation and number of the seeds that it has."""

    auc: float
    std: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.auc:.4f}" + (f" ± {self.std:.4f}" if self.seeds > 1 else "")


class Cell(NamedTuple):
    """One budget of one data set."""

    data: str
    budget: str
    entrants: tuple[Entrant, ...]  # of the race, the first one chosen
    measured: dict[str, Measured]  # by method, at this budget
    baselines: dict[str, Measured]  # those that fit into it
    full: Measured

    @property
    def chosen(self) -> str:
        return method_label(self.entrants[0].method)

    @property
    def best(self) -> str:
        return max(self.measured, key=lambda method: self.measured[method].auc)

    def regret(self, method: str) -> float | None:
        """How far a method is behind the best one; ``None`` where it was not measured."""
        of = self.measured.get(method)
        return None if of is None else self.measured[self.best].auc - of.auc

    def losses(self) -> list[tuple[Entrant, float]]:
        """Those that raced and were measured, each with its loss against full tables."""
        found = ((entrant, self.measured.get(method_label(entrant.method))) for entrant in self.entrants)
        return [(entrant, self.full.auc - of.auc) for entrant, of in found if of is not None]


def cells(name: str, found: Probe, rows: pd.DataFrame) -> list[Cell]:
    """Those of a data set, in the order of the races."""
    rows = rows[rows["status"] == "ok"]
    full_bytes = int(rows["full_bytes"].max())
    result = []
    for race in found.races:
        same = [b for b in rows["budget"].dropna().unique() if parse_budget(b, full_bytes) == race.budget_bytes]
        if not same:
            continue
        at = _measured(rows[rows["budget"] == same[0]])
        fitting = rows[
            (rows["inference_bytes"] <= race.budget_bytes) & (rows["budget"].isin([same[0]]) | rows["budget"].isna())
        ]
        result.append(
            Cell(
                name,
                same[0],
                race.entrants,
                at,
                {method: of for method, of in _measured(fitting).items() if method.startswith(BASELINES)},
                _measured(rows)["full"],
            )
        )
    return result


def _measured(rows: pd.DataFrame) -> dict[str, Measured]:
    of = rows.groupby("method")["test_auc"].agg(["mean", "std", "count"])
    return {str(method): Measured(row["mean"], row["std"], int(row["count"])) for method, row in of.iterrows()}


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; nan where there are fewer than three pairs, or one side is constant."""
    if len(first) < 3:
        return math.nan
    return float(pd.Series(first).rank().corr(pd.Series(second).rank()))


def choices(found: Sequence[Cell]) -> str:
    """What was chosen, a row for each cell."""
    lines = [
        ["data", "budget", "chosen by the probe", "test AUC", "best measured", "test AUC", "regret", "of the rule",
         "best baseline that fits", "ahead of it by", "expected loss", "measured loss"],
        ["---", "---:", "---", "---:", "---", "---:", "---:", "---:", "---", "---:", "---:", "---:"],
    ]  # fmt: skip
    for cell in found:
        own = cell.measured.get(cell.chosen)
        baseline = max(cell.baselines, key=lambda method: cell.baselines[method].auc, default=None)
        first = cell.entrants[0]
        lines.append(
            [
                *(cell.data, cell.budget, cell.chosen, "not measured" if own is None else str(own)),
                *(cell.best, str(cell.measured[cell.best]), _four(cell.regret(cell.chosen)), _four(cell.regret(RULE))),
                "none" if baseline is None else f"{baseline} {cell.baselines[baseline]}",
                "" if own is None or baseline is None else f"{own.auc - cell.baselines[baseline].auc:+.4f}",
                f"{first.loss:+.4f} ± {first.error:.4f}",
                "" if own is None else f"{cell.full.auc - own.auc:+.4f}",
            ]
        )
    return rendered(lines)


def in_short(found: Sequence[Cell]) -> str:
    """How many regrets are small, and the largest."""
    known = [(regret, cell) for cell in found if (regret := cell.regret(cell.chosen)) is not None]
    worst, where = max(known, key=lambda pair: pair[0])
    small = sum(regret <= SMALL for regret, _ in known)
    return (
        f"The regret is at most {SMALL} in {small} of {len(known)} cells, and {worst:.4f} in the worst, "
        f"{where.data} at {where.budget}."
    )


def by_group(found: Sequence[Cell], name: str, key: Callable[[Cell, Entrant], str]) -> str:
    """Losses expected of methods that raced beside those that were measured, a row for each group of them."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for cell in found:
        for entrant, loss in cell.losses():
            groups.setdefault(key(cell, entrant), []).append((entrant.loss, loss))
    lines = [[name, "pairs", "mean error", "mean absolute error", "Spearman"], ["---", *["---:"] * 4]]
    for group, pairs in groups.items():
        errors = [expected - measured for expected, measured in pairs]
        rank = spearman([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        lines.append(
            [
                *(group, str(len(pairs)), f"{mean(errors):+.4f}", f"{mean(map(abs, errors)):.4f}"),
                "" if math.isnan(rank) else f"{rank:.2f}",
            ]
        )
    return rendered(lines)


def by_family(found: Sequence[Cell]) -> str:
    """Expected losses beside measured ones, a row for each family of methods."""
    return by_group(found, "family", lambda cell, entrant: _kind(entrant))


def orders(found: Sequence[Cell]) -> str:
    """The order of each race beside that of whole trainings."""
    lines = [
        ["data", "budget", "order of the race", "order of whole trainings", "Spearman"],
        ["---", "---:", "---", "---", "---:"],
    ]
    for cell in found:
        pairs = cell.losses()
        names = [_kind(entrant) for entrant, _ in pairs]
        trained = [_kind(entrant) for entrant, _ in sorted(pairs, key=lambda pair: pair[1])]
        rank = spearman(list(range(len(pairs))), [loss for _, loss in pairs])
        lines.append(
            [cell.data, cell.budget, ", ".join(names), ", ".join(trained), "" if math.isnan(rank) else f"{rank:.2f}"]
        )
    return rendered(lines)


def _kind(entrant: Entrant) -> str:
    return method_label(entrant.method).partition("(")[0]


def _four(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def read(folder: Path) -> list[Cell]:
    """All cells of a folder of probes."""
    return [
        cell
        for path in sorted(folder.glob("*.json"))
        for cell in cells(path.stem, Probe.load(path), _trained(path.stem))
    ]


def _trained(name: str) -> pd.DataFrame:
    """What was trained to the end on a data set: by its sweep, and what its probe chose beyond that."""
    files = [RESULTS / f"{name}-{part}" / "results.csv" for part in ("tuned", "auto")]
    return pd.concat([pd.read_csv(file, dtype={"budget": str}) for file in files if file.exists()], ignore_index=True)


def published(folder: Path) -> str:
    """The report of a folder of probes."""
    found = read(folder)
    parts = [
        "# What probes chose",
        "Test AUC: mean of the seeds that the sweep trained, ± their sample standard deviation. Regret: how far it is "
        "behind the best of all methods that were measured at the budget. The rule is what `auto` takes without a "
        "probe.",
        choices(found),
        in_short(found),
        "## Expected and measured losses",
        "Of all that raced: the loss against full tables when a method left the race, beside that of whole trainings.",
        by_family(found),
        by_group(found, "data and budget", lambda cell, entrant: f"{cell.data}, {cell.budget}"),
        "## The order of races",
        orders(found),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the probes; report.md is written there")
    folder = parser.parse_args().folder
    text = published(folder)
    write_text(folder / "report.md", text)
    print(text)


if __name__ == "__main__":
    main()
