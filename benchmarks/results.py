"""Rows of a run, and ratios between them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks import dlrm, ours
from benchmarks.timing import OTHERS
from benchmarks.workload import ONE_ID

RESULTS, RUN = "results.csv", "run.json"
DAGGER = "†"  # marks what is not to be trusted
Pair = tuple[str, str]  # a contestant and its optimizer
FULL: Pair = (ours.FULL, "rowwise_adagrad")


_TEXT = (
    "suite",
    "scale",
    "contestant",
    "optimizer",
    "phase",
    "status",
    "distrust",
    "reason",
    "kind",
    "precision",
    "mode",
    "ops",
    "bags",
)
_NUMBERS = (
    *(
        "dim",
        "batch",
        "threads",
        "sitting",
        "others",
        "median_ms",
        "min_ms",
        "p99_ms",
        "cpu_ms",
        "calls",
        "table_share",
        "examples_per_second",
    ),
    *("repeat", "rows", "peak_bytes", "training_bytes", "bytes_per_second", "rows_per_second"),
)
_IDENTITY = [
    *("suite", "scale", "dim", "batch", "threads", "bags", "ops", "precision", "mode", "phase"),
    *("contestant", "optimizer", "sitting", "repeat"),
]


class Results:
    """Rows of a run, and how they are found."""

    def __init__(self, rows: pd.DataFrame, run: dict[str, Any]) -> None:
        self.run = run
        rows = rows.copy()
        for column in _TEXT:
            rows[column] = rows[column].fillna("").astype(str) if column in rows else ""
        for column in _NUMBERS:
            rows[column] = pd.to_numeric(rows[column]) if column in rows else float("nan")
        rows["bags"] = rows["bags"].replace("", ONE_ID)  # as in runs from before there were others
        self.rows = rows
        # Where there are no native operators, two jobs measure the same: the first one counts.
        self.ok = rows[rows["status"] == "ok"].drop_duplicates(_IDENTITY)
        self.threads = int(rows["threads"].max()) if rows["threads"].notna().any() else 0

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Raises ValueError where the folder holds no results."""
        if not (folder / RESULTS).is_file():
            raise ValueError(f"{folder} holds no {RESULTS}: run `python -m benchmarks.bench --out {folder}` first")
        run = json.loads((folder / RUN).read_text(encoding="utf-8")) if (folder / RUN).is_file() else {}
        return cls(pd.read_csv(folder / RESULTS), run)

    def select(self, suite: str, **values: Any) -> pd.DataFrame:
        found = self.ok[self.ok["suite"] == suite]
        for column, value in values.items():
            found = found[found[column] == value]
        return found

    def configuration(self, scale: str = "1/10", dim: int = 16, batch: int = 2048, phase: str = "step") -> pd.DataFrame:
        """The tables at all threads, with the operators that are the default."""
        found = self.select("tables", scale=scale, dim=dim, batch=batch, threads=self.threads, phase=phase)
        return default_ops(found)


def default_ops(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["ops"] == "native"] if (rows["ops"] == "native").any() else rows


class Measured(NamedTuple):
    """``value``: of medians; ``of_minima``: the same of the quickest calls, which noise touches less.

    ``where``: of several configurations the one whose value it is; empty where there is one.
    """

    value: float
    doubts: str = ""
    of_minima: float | None = None
    where: str = ""


def row_of(rows: pd.DataFrame, pair: Pair) -> pd.DataFrame:
    found = rows[rows["contestant"] == pair[0]]
    return found[found["optimizer"] == pair[1]] if pair[1] else found


def ratio(rows: pd.DataFrame, slow: Pair, fast: Pair) -> Measured | None:
    """Median time of ``slow`` over that of ``fast``, both of one sitting; by way of ``FULL`` where they share none."""
    if rows.empty:
        return None
    a, b = row_of(rows, slow), row_of(rows, fast)
    if a.empty or b.empty:
        return None
    both = sorted(set(a["sitting"]) & set(b["sitting"]))
    if both:
        first, second = (r[r["sitting"] == both[0]].iloc[0] for r in (a, b))
        value, of_minima = (first[column] / second[column] for column in ("median_ms", "min_ms"))
        return Measured(value, doubts_of([first, second]), of_minima)
    if FULL in (slow, fast):
        return None
    one, other = ratio(rows, slow, FULL), ratio(rows, fast, FULL)
    if one is None or other is None:
        return None
    doubts = "; ".join(dict.fromkeys(filter(None, (one.doubts, other.doubts))))
    of_minima = None if one.of_minima is None or not other.of_minima else one.of_minima / other.of_minima
    return Measured(one.value / other.value, doubts, of_minima)


def doubts_of(rows: Sequence[Any]) -> str:
    """Why a number made of these rows is not to be trusted; empty where it is."""
    others = max((float(row["others"]) for row in rows if row["others"] == row["others"]), default=0.0)
    if others > OTHERS:
        return f"others took {others:.0%} of the machine"
    return "; ".join(dict.fromkeys(f"{row['contestant']}: {row['distrust']}" for row in rows if row["distrust"]))


def memory_rows(results: Results) -> Iterator[tuple[str, str, pd.Series, float]]:
    """Contestant, optimizer, row and ratio of every process whose scale has one with the dense part alone."""
    rows = results.select("memory")
    for _, row in rows[rows["contestant"] != dlrm.ALONE].iterrows():
        alone = rows[(rows["contestant"] == dlrm.ALONE) & (rows["scale"] == row["scale"])]
        if len(alone):
            above = row["peak_bytes"] - alone.iloc[0]["peak_bytes"]
            yield row["contestant"], row["optimizer"], row, above / row["training_bytes"]


def rendered(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
