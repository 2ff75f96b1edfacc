"""How much accuracy `auto` gives away: what probes chose, beside what sweeps of the same data measured.

    python -m benchmarks.regret docs/results/probes

The folder holds a probe of each data set, NAME.json: `embtables probe` with the training configuration of the sweep in
docs/results/NAME-tuned. For each budget that both have, the method that `auto` takes is looked up in the sweep: its
test AUC, that of the best measured method at the budget, and the difference of the two, the regret. The loss against
full tables that the probe expected stands beside the one that was measured. Writes report.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from benchmarks.results import rendered
from embtables._util.files import write_text
from embtables.methods import method_label
from embtables.plan.probe import Probe
from embtables.sizes.budget import parse_budget

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
#: What `auto` takes without a probe.
RULE = "banded(precision=int8)"


class Cell(NamedTuple):
    """One budget of one data set; AUC of test rows, means over the seeds that were trained."""

    data: str
    budget: str
    chosen: str
    auc: float | None  # of what the probe chose
    by_rule: float | None
    best: str
    best_auc: float
    expected: float
    error: float
    measured: float | None  # loss of what was chosen against full tables


def cells(name: str, found: Probe, rows: pd.DataFrame) -> list[Cell]:
    """Those of a data set, in the order of the races."""
    rows = rows[rows["status"] == "ok"]
    full_bytes = int(rows["full_bytes"].max())
    auc = rows.groupby(["budget", "method"], dropna=False)["test_auc"].mean()
    full = float(rows[rows["method"] == "full"]["test_auc"].mean())
    result = []
    for race in found.races:
        same = [b for b in rows["budget"].dropna().unique() if parse_budget(b, full_bytes) == race.budget_bytes]
        if not same:
            continue
        at = auc[same[0]].sort_values(ascending=False)
        first = race.entrants[0]
        chosen = method_label(first.method)
        value = float(at[chosen]) if chosen in at else None
        result.append(
            Cell(
                name,
                same[0],
                chosen,
                value,
                float(at[RULE]) if RULE in at else None,
                str(at.index[0]),
                float(at.iloc[0]),
                first.loss,
                first.error,
                None if value is None else full - value,
            )
        )
    return result


def report(found: list[Cell]) -> str:
    """A table, a row for each cell."""
    lines = [
        ["data", "budget", "chosen by the probe", "test AUC", "best measured", "test AUC", "regret", "of the rule",
         "expected loss", "measured loss"],
        ["---", "---:", "---", "---:", "---", "---:", "---:", "---:", "---:", "---:"],
    ]  # fmt: skip
    for cell in found:
        lines.append(
            [
                *(cell.data, cell.budget, cell.chosen, _four(cell.auc), cell.best, _four(cell.best_auc)),
                _four(None if cell.auc is None else cell.best_auc - cell.auc),
                _four(None if cell.by_rule is None else cell.best_auc - cell.by_rule),
                f"{cell.expected:+.4f} ± {cell.error:.4f}",
                "" if cell.measured is None else f"{cell.measured:+.4f}",
            ]
        )
    return rendered(lines)


def _four(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def published(folder: Path) -> str:
    """The report of a folder of probes."""
    found = [
        cell
        for path in sorted(folder.glob("*.json"))
        for cell in cells(
            path.stem,
            Probe.load(path),
            pd.read_csv(RESULTS / f"{path.stem}-tuned" / "results.csv", dtype={"budget": str}),
        )
    ]
    return f"# What probes chose\n\n{report(found)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the probes; report.md is written there")
    folder = parser.parse_args().folder
    text = published(folder)
    write_text(folder / "report.md", text)
    print(text)


if __name__ == "__main__":
    main()
