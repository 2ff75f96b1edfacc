"""Fills README.md's tables from docs/results/*/results.csv, so that no published number is typed by hand.

python benchmarks/readme_tables.py            # rewrite README.md
python benchmarks/readme_tables.py --check    # exit 1 where README.md is not what the results say
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = {"globo": "globo", "ml100k": "ml-100k"}


def table(results: pd.DataFrame) -> str:
    """Mean test AUC ± standard deviation over seeds, a row a method and a column a budget."""
    budgets = [b for b in results["budget"].dropna().unique() if b]
    header = ["method", *(f"{budget} of the bytes" for budget in budgets)]
    full = results[results["method"] == "full"]
    lines = [header, ["---", *["---:"] * len(budgets)]]
    lines.append([f"full: {_mean(full)}, {int(full['inference_bytes'].iloc[0]):,} bytes", *[""] * len(budgets)])
    others = results[results["method"] != "full"]
    for method in sorted(others["method"].unique(), key=lambda m: (-_at(others, m, "1%"), m)):
        cells = [_cell(others[(others["method"] == method) & (others["budget"] == budget)]) for budget in budgets]
        lines.append([f"[{method}](docs/methods/{method}.md)", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _at(results: pd.DataFrame, method: str, budget: str) -> float:
    cells = results[(results["method"] == method) & (results["budget"] == budget) & (results["status"] == "ok")]
    return float(cells["test_auc"].mean()) if len(cells) else 0.0


def _mean(cells: pd.DataFrame) -> str:
    return f"{cells['test_auc'].mean():.4f} ± {cells['test_auc'].std():.4f}"


def _cell(cells: pd.DataFrame) -> str:
    if (cells["status"] == "infeasible").all():
        return f"needs {int(cells['floor_bytes'].iloc[0]):,} bytes"
    return _mean(cells[cells["status"] == "ok"])


def filled(readme: str) -> str:
    for marker, folder in SWEEPS.items():
        # Budgets stay text: "10%" is no number, and an empty one is full's.
        results = pd.read_csv(ROOT / "docs" / "results" / folder / "results.csv", dtype={"budget": str})
        content = f"{table(results)}\n\n![test AUC against bytes](docs/results/{folder}/accuracy_memory.svg)"
        start, end = f"<!-- results:{marker} -->", f"<!-- /results:{marker} -->"
        readme, found = re.subn(f"{start}.*?{end}", lambda _: f"{start}\n{content}\n{end}", readme, flags=re.S)  # noqa: B023
        if not found:
            raise ValueError(f"README.md has no {start}")
    return readme


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where README.md is out of date")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = filled(old)
    if check:
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
