"""What a sweep's results come to: a line per method and budget, and its paired difference to the full tables."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import yaml
from rich.progress import track

from embtables.benchmark.cells import takes_budget
from embtables.benchmark.results import COLUMNS
from embtables.benchmark.sweep import SweepConfig, read_config
from embtables.files import write_text
from embtables.training.metrics import bootstrap_auc_difference

DROP = "drop_feature"
LEAST_SEEDS_FOR_P = 5
_MOST_SEEDS_TO_ENUMERATE = 16


@dataclass(frozen=True)
class Difference:
    """Test AUC of one cell minus that of full with the same seed; low … high: 95 % over resampled test rows."""

    method: str
    budget: str
    seed: int
    difference: float
    low: float
    high: float


@dataclass
class Point:
    """One method at one budget over all seeds that are finished."""

    method: str
    budget: str
    takes_budget: bool
    rows: pd.DataFrame
    floor_bytes: int | None = None
    message: str = ""
    num_failed: int = 0
    differences: list[Difference] = field(default_factory=list)
    to_drop: float | None = None

    @property
    def num_ok(self) -> int:
        return len(self.rows)

    def mean(self, column: str) -> float:
        """Mean over the finished seeds; nan where there is none, or the column is empty."""
        return float(self.rows[column].mean()) if self.num_ok else math.nan

    def std(self, column: str) -> float:
        """Sample standard deviation over seeds; nan below two."""
        return float(self.rows[column].std(ddof=1)) if self.num_ok > 1 else math.nan

    @property
    def inference_bytes(self) -> int | None:
        return int(self.rows["inference_bytes"].max()) if self.num_ok else None

    @property
    def below_drop(self) -> bool:
        """Does it do worse, on average over common seeds, than dropping features at the same budget?"""
        return self.to_drop is not None and self.to_drop < 0

    @property
    def p_value(self) -> float | None:
        """Of the paired differences over seeds; None where there are too few of them."""
        return sign_flip_p([item.difference for item in self.differences])


@dataclass
class Summary:
    """A sweep as its files say it is now."""

    folder: Path
    config: SweepConfig
    points: list[Point]
    num_expected: int
    num_finished: int
    learning_rates: dict[str, dict[str, list[str]]]

    @property
    def is_partial(self) -> bool:
        return self.num_finished < self.num_expected

    def point(self, method: str, budget: str) -> Point | None:
        return next((p for p in self.points if (p.method, p.budget) == (method, budget)), None)

    @property
    def full(self) -> Point | None:
        return next((p for p in self.points if not p.takes_budget), None)


def sign_flip_p(differences: list[float]) -> float | None:
    """Two-sided p-value that the mean difference is 0, by flipping signs; None below five seeds.

    Exact up to 16 seeds, and with 2^16 drawn sign vectors (fixed seed) beyond. Five seeds cannot reach less than 1/16.
    """
    values = np.array([value for value in differences if math.isfinite(value)])
    if len(values) < LEAST_SEEDS_FOR_P:
        return None
    if len(values) <= _MOST_SEEDS_TO_ENUMERATE:
        signs = np.array(list(product((-1, 1), repeat=len(values))))
    else:
        signs = np.random.default_rng(0).choice((-1, 1), (2**_MOST_SEEDS_TO_ENUMERATE, len(values)))
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= abs(values.sum()) * (1 - 1e-12)))


def summarize(folder: Path, *, resamples: int, progress: bool = False) -> Summary:
    """Read the sweep in `folder`, finished or not; bootstraps that an earlier call made are used again.

    Raises:
        ValueError: `folder` is not a sweep, or has no results yet.
    """
    config = read_config(folder)
    frame = _read_results(folder / "results.csv")
    points = [_point(config, method, budget, frame) for method, budget in config.points]
    summary = Summary(
        folder,
        config,
        points,
        num_expected=len(config.points) * config.seeds,
        num_finished=int(frame["status"].isin(["ok", "infeasible"]).sum()),
        learning_rates=_learning_rates(folder, frame),
    )
    _compare_to_full(summary, resamples, progress)
    _compare_to_drop(summary)
    return summary


def _read_results(file: Path) -> pd.DataFrame:
    if not file.is_file():
        raise ValueError(f"{file} is missing: the sweep has not begun to train; start it again first")
    frame = pd.read_csv(file, dtype={"budget": str, "method": str, "message": str, "cell": str}, keep_default_na=True)
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise ValueError(f"{file} has no column {missing[0]!r}: start the sweep again, which writes it anew")
    frame[["budget", "message"]] = frame[["budget", "message"]].fillna("")
    return frame


def _point(config: SweepConfig, method: str, budget: str, frame: pd.DataFrame) -> Point:
    own = frame[(frame["method"] == method) & (frame["budget"] == budget)]
    infeasible = own[own["status"] == "infeasible"]
    failed = own[own["status"] == "failed"]
    point = Point(
        method, budget, takes_budget(config.methods[method]), own[own["status"] == "ok"], num_failed=len(failed)
    )
    if len(infeasible):
        point.floor_bytes = int(infeasible["floor_bytes"].max())
    if len(failed):
        point.message = str(failed["message"].iloc[0])
    return point


def _compare_to_drop(summary: Summary) -> None:
    for point in summary.points:
        drop = summary.point(DROP, point.budget)
        if drop is None or point.method == DROP or not point.takes_budget:
            continue
        both = point.rows.merge(drop.rows, on="seed", suffixes=("", "_drop"))
        if len(both):
            point.to_drop = float((both["test_auc"] - both["test_auc_drop"]).mean())


def _compare_to_full(summary: Summary, resamples: int, progress: bool) -> None:
    full = summary.full
    labels_file = summary.folder / "test_labels.npy"
    if full is None or not full.num_ok or not labels_file.is_file():
        return
    labels = np.load(labels_file)
    pairs = [
        (point, row, reference)
        for point in summary.points
        if point is not full
        for _, row in point.rows.iterrows()
        for _, reference in full.rows[full.rows["seed"] == row["seed"]].iterrows()
    ]
    file = summary.folder / "differences.json"
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept: dict[str, Any] = {}
    cache: dict[str, npt.NDArray[np.float32]] = {}
    for point, row, reference in track(pairs, "comparing to full", disable=not progress, transient=True):
        scores = _scores(summary.folder, row["cell"], len(labels))
        if reference["cell"] not in cache:
            cache = {reference["cell"]: _scores(summary.folder, reference["cell"], len(labels))}
        key = _fingerprint(scores, cache[reference["cell"]], labels, resamples)
        if key not in known:
            # The seed of the resampling is the cell's, and the rows drawn are the same for every method.
            found = bootstrap_auc_difference(
                labels, scores, cache[reference["cell"]], num_resamples=resamples, seed=int(row["seed"])
            )
            known[key] = [found.difference, found.low, found.high]
        kept[key] = known[key]
        point.differences.append(Difference(point.method, point.budget, int(row["seed"]), *kept[key]))
    write_text(file, json.dumps(kept))


def _scores(folder: Path, cell: str, rows: int) -> npt.NDArray[np.float32]:
    file = folder / "cells" / cell / "test_scores.npy"
    scores: npt.NDArray[np.float32] = np.load(file)
    if scores.shape != (rows,):
        raise ValueError(
            f"{file} holds {scores.shape} scores for {rows:,} test rows: delete the cell and train it again"
        )
    return scores


def _fingerprint(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()[:24]


def _learning_rates(folder: Path, frame: pd.DataFrame) -> dict[str, dict[str, list[str]]]:
    """{field: {value: methods trained with it}}, from the configurations of the finished cells."""
    found: dict[str, dict[str, list[str]]] = {}
    for _, row in frame[frame["status"] == "ok"].iterrows():
        file = folder / "cells" / row["cell"] / "config.yaml"
        if not file.is_file():
            continue
        for name, value in _flat(yaml.safe_load(file.read_text(encoding="utf-8"))):
            if name.rsplit(".", 1)[-1] in ("lr", "learning_rate") or name.endswith("_learning_rate"):
                methods = found.setdefault(name, {}).setdefault(str(value), [])
                if row["method"] not in methods:
                    methods.append(row["method"])
    return found


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [item for key, inner in value.items() for item in _flat(inner, f"{path}.{key}" if path else str(key))]
    return [(path, value)]
