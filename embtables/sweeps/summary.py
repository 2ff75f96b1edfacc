"""What a sweep's results come to: a line per variant, method and budget, and its paired differences."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import yaml
from rich.progress import track

from embtables._util.files import write_text
from embtables.sweeps.cells import takes_budget
from embtables.sweeps.results import COLUMNS
from embtables.sweeps.sweep import SweepConfig, read_config
from embtables.training.metrics import bootstrap_auc_difference

DROP = "drop_feature"
LEAST_SEEDS_FOR_P = 5
_MOST_SEEDS_TO_ENUMERATE = 16
_TEXTS = ("budget", "method", "message", "cell", "variant")
_SINCE_VARIANTS = ("variant", "valid_logloss", "valid_gauc_weighted", "valid_gauc_mean")


@dataclass(frozen=True)
class Difference:
    """Test AUC of one cell minus that of its reference with the same seed; low … high: 95 % over resampled test rows.

    The reference is full of the same variant; that of full is full of the first variant.
    """

    variant: str
    method: str
    budget: str
    seed: int
    difference: float
    low: float
    high: float


@dataclass
class Point:
    """One method at one budget of one variant, over all seeds that are finished."""

    method: str
    budget: str
    takes_budget: bool
    rows: pd.DataFrame
    floor_bytes: int | None = None
    message: str = ""
    num_failed: int = 0
    differences: list[Difference] = field(default_factory=list)
    to_drop: float | None = None
    variant: str = ""

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
    """A sweep as its files say it is now; or what of it is of one `variant`."""

    folder: Path
    config: SweepConfig
    points: list[Point]
    num_expected: int
    num_finished: int
    learning_rates: dict[str, dict[str, list[str]]]
    variant: str = ""

    @property
    def is_partial(self) -> bool:
        return self.num_finished < self.num_expected

    @property
    def title(self) -> str:
        """Data and what was trained on them."""
        trains = self.config.trains
        models = list(dict.fromkeys(train.model.name for train in trains.values()))
        if self.variant:
            return f"{self.config.dataset} · {self.variant}"
        if self.config.variants:
            return f"{self.config.dataset} · {len(trains)} variants of {', '.join(models)}"
        return f"{self.config.dataset} · {models[0]}"

    def of(self, variant: str) -> Summary:
        """The same of one variant alone."""
        return replace(self, points=[point for point in self.points if point.variant == variant], variant=variant)

    def point(self, method: str, budget: str, variant: str = "") -> Point | None:
        wanted = (variant, method, budget)
        return next((p for p in self.points if (p.variant, p.method, p.budget) == wanted), None)

    @property
    def full(self) -> Point | None:
        """Full tables, of the first variant that has them."""
        return next((p for p in self.points if not p.takes_budget), None)

    def reference(self, point: Point) -> Point | None:
        """What `point` is compared with: full of its variant, and for full that of the first variant."""
        found = self.of(point.variant).full if point.takes_budget else self.full
        return None if found is point else found


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
    points = [_point(config, *place, frame) for place in config.points]
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
    frame = pd.read_csv(file, dtype=dict.fromkeys(_TEXTS, str), keep_default_na=True)
    if "variant" not in frame.columns:  # a sweep from before there were variants
        frame = frame.reindex(columns=[*frame.columns, *(c for c in _SINCE_VARIANTS if c not in frame.columns)])
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise ValueError(f"{file} has no column {missing[0]!r}: start the sweep again, which writes it anew")
    frame[["budget", "message", "variant"]] = frame[["budget", "message", "variant"]].fillna("")
    return frame


def _point(config: SweepConfig, variant: str, method: str, budget: str, frame: pd.DataFrame) -> Point:
    own = frame[(frame["variant"] == variant) & (frame["method"] == method) & (frame["budget"] == budget)]
    infeasible = own[own["status"] == "infeasible"]
    failed = own[own["status"] == "failed"]
    point = Point(
        method,
        budget,
        takes_budget(config.methods[method]),
        own[own["status"] == "ok"],
        num_failed=len(failed),
        variant=variant,
    )
    if len(infeasible):
        point.floor_bytes = int(infeasible["floor_bytes"].max())
    if len(failed):
        point.message = str(failed["message"].iloc[0])
    return point


def _compare_to_drop(summary: Summary) -> None:
    for point in summary.points:
        drop = summary.point(DROP, point.budget, point.variant)
        if drop is None or point.method == DROP or not point.takes_budget:
            continue
        both = point.rows.merge(drop.rows, on="seed", suffixes=("", "_drop"))
        if len(both):
            point.to_drop = float((both["test_auc"] - both["test_auc_drop"]).mean())


def _compare_to_full(summary: Summary, resamples: int, progress: bool) -> None:
    labels_file = summary.folder / "test_labels.npy"
    pairs = [
        (point, row, other)
        for point in summary.points
        if (reference := summary.reference(point)) is not None
        for _, row in point.rows.iterrows()
        for _, other in reference.rows[reference.rows["seed"] == row["seed"]].iterrows()
    ]
    if not pairs or not labels_file.is_file():
        return
    labels = np.load(labels_file)
    file = summary.folder / "differences.json"
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept: dict[str, Any] = {}
    cache: dict[str, npt.NDArray[np.float32]] = {}
    for point, row, other in track(pairs, "comparing to full", disable=not progress, transient=True):
        scores = _scores(summary.folder, row["cell"], len(labels))
        if other["cell"] not in cache:
            cache = {other["cell"]: _scores(summary.folder, other["cell"], len(labels))}
        key = _fingerprint(scores, cache[other["cell"]], labels, resamples)
        if key not in known:
            # The seed of the resampling is the cell's, and the rows drawn are the same for every method.
            found = bootstrap_auc_difference(
                labels, scores, cache[other["cell"]], num_resamples=resamples, seed=int(row["seed"])
            )
            known[key] = [found.difference, found.low, found.high]
        kept[key] = known[key]
        point.differences.append(Difference(point.variant, point.method, point.budget, int(row["seed"]), *kept[key]))
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
            if name.rsplit(".", 1)[-1] in ("lr", "learning_rate"):
                methods = found.setdefault(name, {}).setdefault(str(value), [])
                label = f"{row['variant']}: {row['method']}" if row["variant"] else row["method"]
                if label not in methods:
                    methods.append(label)
    return found


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [item for key, inner in value.items() for item in _flat(inner, f"{path}.{key}" if path else str(key))]
    return [(path, value)]
