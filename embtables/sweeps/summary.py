"""What a sweep's results come to: a line per variant, method and budget, and its paired differences."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.progress import track

from embtables._util.files import check_seal, remove_leftovers, sealed, sha256, unsealed, write_json
from embtables._util.names import number_of
from embtables._util.reading import inside, read_array, read_json, read_text, read_yaml
from embtables.sweeps.cells import BASELINES, Cell, MethodSpec, Place, kind_of, labels_of, takes_budget
from embtables.sweeps.choosing import finalists, num_finalists, tuned_at
from embtables.sweeps.config import LABELS_CHECKSUM, SweepConfig, read_config
from embtables.sweeps.results import COLUMNS, LATE_COLUMNS, MEASURED, read_metrics
from embtables.training.learning_curve import value_of
from embtables.training.metrics import bootstrap_auc_difference

DROP = "drop_feature"
FEWER = "fewer_dimensions"
LEAST_SEEDS_FOR_P = 5
_MOST_SEEDS_TO_ENUMERATE = 16
_TEXTS = ("budget", "method", "message", "cell", "variant", "trained_with", "tuned")
_WHOLE = ("seed", "inference_bytes", "training_bytes", "full_bytes", "floor_bytes")


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


@dataclass(frozen=True)
class Rival:
    """The form of a baseline that a point is compared with, and test AUC of the point minus that of this ``method``."""

    method: str
    difference: float


@dataclass
class Point:
    """One method at one budget of one variant, over all seeds that are finished, of `num_seeds` that are asked for."""

    method: str
    spec: MethodSpec
    budget: str
    rows: pd.DataFrame
    num_seeds: int
    floor_bytes: int | None = None
    message: str = ""
    num_failed: int = 0
    differences: list[Difference] = field(default_factory=list)
    drop: Rival | None = None
    fewer: Rival | None = None
    variant: str = ""

    @property
    def place(self) -> Place:
        return self.variant, self.method, self.budget

    @property
    def name(self) -> str:
        """What a sentence calls it: ``DIN: hash at 10%``."""
        variant = f"{self.variant}: " if self.variant else ""
        return f"{variant}{self.method} at {self.budget}" if self.budget else f"{variant}{self.method}"

    @property
    def kind(self) -> str | None:
        return kind_of(self.spec)

    @property
    def takes_budget(self) -> bool:
        return takes_budget(self.spec)

    @property
    def num_ok(self) -> int:
        return len(self.rows)

    @property
    def tuned(self) -> str:
        """The values that were chosen from a grid; empty where there is no result, or was no grid."""
        return str(self.rows["tuned"].iloc[0]) if self.num_ok else ""

    def mean(self, column: str) -> float:
        """Mean over the finished seeds; nan where there is none, or the column is empty."""
        return float(self.rows[column].mean()) if self.num_ok else math.nan

    def std(self, column: str) -> float:
        """Sample standard deviation over seeds; nan below two."""
        return float(self.rows[column].std(ddof=1)) if self.num_ok > 1 else math.nan

    def minus(self, other: Point) -> dict[int, float]:
        """Test AUC less that of `other`, by seed, of the seeds that both have finished and where both have one."""
        theirs = dict(zip(other.rows["seed"], other.rows["test_auc"]))
        own = zip(self.rows["seed"], self.rows["test_auc"])
        found = {int(seed): float(value - theirs[seed]) for seed, value in own if seed in theirs}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    @property
    def inference_bytes(self) -> int | None:
        return int(self.rows["inference_bytes"].max()) if self.num_ok else None

    @property
    def below_drop(self) -> bool:
        """Does it do worse, on average over common seeds, than dropping features at the same budget?"""
        return self.drop is not None and self.drop.difference < 0

    @property
    def beats_fewer(self) -> bool:
        """Does it do better, on average over common seeds, than full tables of fewer dimensions at the same budget?

        True where they have no result, and for baselines.
        """
        return self.fewer is None or self.fewer.difference > 0

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
            return f"{self.config.dataset} · {number_of(len(trains), 'variant')} of {', '.join(models)}"
        return f"{self.config.dataset} · {models[0]}"

    def of(self, variant: str) -> Summary:
        """The same of one variant alone."""
        return replace(self, points=[point for point in self.points if point.variant == variant], variant=variant)

    def point(self, method: str, budget: str, variant: str = "") -> Point | None:
        return next((p for p in self.points if p.place == (variant, method, budget)), None)

    def tuned_at(self, point: Point) -> Point | None:
        """Where the values of `point` were chosen; None where its method is feasible nowhere."""
        infeasible = {p.place for p in self.points if p.floor_bytes is not None}
        place = tuned_at(self.config, infeasible, point.place)
        return None if place is None else self.point(place[1], place[2], place[0])

    @property
    def full(self) -> Point | None:
        """Full tables of the first variant: ``full``, or those in fp32, or where there are neither, in another form."""
        found = [point for point in self.points if not point.takes_budget]
        as_trained = (point for label in labels_of("full") for point in found if point.method == label)
        return next(as_trained, next(iter(found), None))

    def reference(self, point: Point) -> Point | None:
        """What `point` is compared with: full of its variant, and for that itself full of the first variant."""
        own = self.of(point.variant).full
        found = self.full if own is point else own
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
    remove_leftovers(folder)
    config = read_config(folder)
    frame = _read_results(inside(folder, "results.csv"))
    _check_cells(folder, frame)
    values = _values(config, frame)
    repeated = finalists(config, values)
    points = [_point(config, place, frame, config.seeds if place in repeated else 1) for place in config.points]
    summary = Summary(
        folder,
        config,
        points,
        num_expected=len(points) + (config.seeds - 1) * num_finalists(config, config.points, values),
        num_finished=int(frame["status"].isin(["ok", "infeasible"]).sum()),
        learning_rates=_learning_rates(folder, frame),
    )
    _compare_to_full(summary, resamples, progress)
    baselines = {kind_of(spec) for spec in BASELINES}
    for point in points:
        point.drop = _against_best(DROP, point, summary) if point.kind != DROP else None
        point.fewer = _against_best(FEWER, point, summary) if point.kind not in baselines else None
    return summary


def _values(config: SweepConfig, frame: pd.DataFrame) -> dict[Place, float | None]:
    """What the first seed of each place is worth on validation; None where it failed or is infeasible."""
    found: dict[Place, float | None] = {}
    for row in frame[frame["seed"] == 0].to_dict("records") if config.best is not None else ():
        train = config.trains.get(row["variant"], config.train)
        value = value_of(row, train.training.monitor) if row["status"] == "ok" else None
        found[row["variant"], row["method"], row["budget"]] = value
    return found


def _read_results(file: Path) -> pd.DataFrame:
    if not file.is_file():
        raise ValueError(f"{file} is missing: the sweep has not begun to train; start it again first")
    try:
        text = read_text(file)
        if not text.endswith("\n"):
            raise ValueError("its last row has no end")
        # Of rows of any other lengths pandas would make something, at length.
        lengths = {len(row) for row in csv.reader(io.StringIO(text), strict=True) if row}
        if len(lengths) > 1 or max(lengths, default=0) > 2 * len(COLUMNS):
            raise ValueError(f"its rows have {min(lengths):,} to {max(lengths):,} fields")
        frame = pd.read_csv(io.StringIO(text), dtype=dict.fromkeys(_TEXTS, str), keep_default_na=True)
    except (ValueError, csv.Error) as error:  # what cannot be parsed, what is empty, what is not UTF-8
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is damaged ({reason}): start the sweep again, which writes it anew") from None
    frame = frame.reindex(columns=[*frame.columns, *(column for column in LATE_COLUMNS if column not in frame.columns)])
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise ValueError(f"{file} has no column {missing[0]!r}: start the sweep again, which writes it anew")
    for column in COLUMNS:
        if column not in (*_TEXTS, "dataset", "model", "status"):
            try:
                frame[column] = pd.to_numeric(frame[column])
            except (ValueError, TypeError):
                raise ValueError(
                    f"{file} holds something else than numbers in {column}: start the sweep again, which writes it anew"
                ) from None
    known = frame["status"].isin(["ok", "infeasible", "failed"]) & frame["cell"].notna() & frame["seed"].notna()
    known &= (frame["status"] != "ok") | frame["inference_bytes"].notna()
    known &= (frame["status"] != "infeasible") | frame["floor_bytes"].notna()
    for column in _WHOLE:
        known &= frame[column].isna() | (frame[column].between(0, 2**62) & (frame[column] % 1 == 0))
    if not known.all() or frame.duplicated("cell").any():
        raise ValueError(f"{file} has rows that no sweep writes: start the sweep again, which writes it anew")
    texts = ["budget", "message", "variant", "trained_with", "tuned"]
    frame[texts] = frame[texts].astype(object).fillna("")  # a column without any text is one of numbers
    return frame


def _check_cells(folder: Path, frame: pd.DataFrame) -> None:
    """Raises ``ValueError`` where results.csv says something else than the cells that it was collected from."""
    for _, row in frame.iterrows():
        cell = Cell(str(row["method"]), row["budget"], int(row["seed"]), row["tuned"], row["variant"])
        if row["cell"] != cell.name:
            raise ValueError(
                f"{folder / 'results.csv'} calls the cell {cell.name} {row['cell']!r}: start the sweep again, which "
                "writes it anew"
            )
        metrics = read_metrics(inside(folder / "cells", row["cell"]))
        if metrics is None:
            continue
        if metrics["status"] != row["status"]:
            raise ValueError(
                f"{folder / 'results.csv'} calls the cell {row['cell']} {row['status']}, whose metrics.json says "
                f"{metrics['status']}: start the sweep again, which writes it anew"
            )
        for name in MEASURED if row["status"] == "ok" else ():
            said, measured = row[name], metrics.get(name)
            same = pd.isna(said) if measured is None else said == float(measured)
            if not same and not (pd.isna(said) and measured != measured):
                raise ValueError(
                    f"{folder / 'results.csv'} has {said} as {name} of cell {row['cell']}, whose metrics.json says "
                    f"{measured}: start the sweep again, which writes it anew"
                )


def _point(config: SweepConfig, place: Place, frame: pd.DataFrame, num_seeds: int) -> Point:
    variant, method, budget = place
    own = frame[(frame["variant"] == variant) & (frame["method"] == method) & (frame["budget"] == budget)]
    infeasible = own[own["status"] == "infeasible"]
    failed = own[own["status"] == "failed"]
    point = Point(
        method,
        config.methods[method],
        budget,
        own[own["status"] == "ok"],
        num_seeds,
        num_failed=len(failed),
        variant=variant,
    )
    if len(infeasible):
        point.floor_bytes = int(infeasible["floor_bytes"].max())
    if len(failed):
        point.message = str(failed["message"].iloc[0])
    return point


def _against_best(kind: str, point: Point, summary: Summary) -> Rival | None:
    """`point` beside the form of a kind that did best on validation at its budget, over the seeds that both have.

    None where there is no such form, or no such seed.
    """
    rivals = [
        other
        for other in summary.of(point.variant).points
        if other.kind == kind and other.budget == point.budget and other.num_ok
    ]
    if not rivals:
        return None
    best = max(rivals, key=lambda rival: rival.mean("valid_auc"))
    differences = point.minus(best)
    return Rival(best.method, sum(differences.values()) / len(differences)) if differences else None


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
    labels = _labels(summary.folder)
    file = summary.folder / "differences.json"
    known = _read_cache(file)
    kept: dict[str, list[float]] = {}
    cache: dict[str, npt.NDArray[np.float32]] = {}
    for point, row, other in track(pairs, "comparing to full", disable=not progress, transient=True):
        scores = _scores(summary.folder, row["cell"], len(labels))
        if other["cell"] not in cache:
            cache = {other["cell"]: _scores(summary.folder, other["cell"], len(labels))}
        key = _fingerprint(scores, cache[other["cell"]], labels, resamples, int(row["seed"]))
        if key not in known:
            # The seed of the resampling is the cell's, and the rows drawn are the same for every method.
            found = bootstrap_auc_difference(
                labels, scores, cache[other["cell"]], num_resamples=resamples, seed=int(row["seed"])
            )
            known[key] = [found.difference, found.low, found.high]
        kept[key] = known[key]
        point.differences.append(Difference(point.variant, point.method, point.budget, int(row["seed"]), *kept[key]))
    write_json(file, sealed({"differences": kept}))


def _read_cache(file: Path) -> dict[str, list[float]]:
    """The differences that an earlier report computed; none where the file is damaged, or not of this release."""
    try:
        known = read_json(inside(file.parent, file.name))
        check_seal(known, file)
        content = unsealed(known)
    except (OSError, ValueError, TypeError, AttributeError):  # it need not even be a mapping
        return {}
    # Without a checksum nobody knows what the numbers are made from.
    found = content.get("differences") if len(content) < len(known) else None
    return found if isinstance(found, dict) else {}


def _labels(folder: Path) -> npt.NDArray[np.uint8]:
    file = inside(folder, "test_labels.npy")
    labels = read_array(file, np.uint8)
    if labels.size and labels.max() > 1:
        raise ValueError(f"{file} is damaged: it holds labels other than 0 and 1")
    wanted = read_yaml(folder / "sweep.yaml").get(LABELS_CHECKSUM)
    if wanted is not None and sha256(file) != wanted:
        raise ValueError(f"{file} does not match its checksum in sweep.yaml: it is damaged")
    return labels


def _scores(folder: Path, cell: str, rows: int) -> npt.NDArray[np.float32]:
    run = inside(folder / "cells", cell)
    file = inside(run, "test_scores.npy")
    scores = read_array(file, np.float32)
    wanted = (read_metrics(run) or {}).get("test_scores_sha256")
    if wanted is not None and sha256(file) != wanted:
        raise ValueError(f"{file} does not match its checksum in metrics.json: delete {run} to train it again")
    if scores.shape != (rows,):
        raise ValueError(
            f"{file} holds {scores.shape} scores for {number_of(rows, 'test row')}: delete the cell and train it again"
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"{file} is damaged: it holds scores that are no numbers")
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
        run = inside(folder / "cells", row["cell"])
        if not (run / "config.yaml").is_file():
            continue
        content = read_yaml(inside(run, "config.yaml"))
        if not isinstance(content, dict) or not all(isinstance(content.get(s), dict) for s in ("tables", "dense")):
            raise ValueError(f"{run / 'config.yaml'} is not the configuration of a run: delete {run} to train it again")
        check_seal(content, run / "config.yaml")
        for name, value in _flat(content):
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
