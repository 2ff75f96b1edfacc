"""The validation curve of a run: what chooses the best model, validation.csv, its figure, and over-fitting in words."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from embtables._util.files import replacing, write_text
from embtables._util.reading import read_text

__all__ = [
    "COLUMNS",
    "LEAST_LEARNED",
    "Row",
    "draw_curve",
    "overfitting",
    "read_curve",
    "remarks",
    "value_of",
    "write_curve",
]

Row: TypeAlias = dict[str, Any]
"""One evaluation, by column; ``None`` where a metric is not defined on the validation rows."""

COLUMNS = (
    "step",
    "epoch",
    "train_loss",
    "valid_logloss",
    "valid_auc",
    "valid_gauc_weighted",
    "valid_gauc_mean",
    "valid_auc_tail",
    "learning_rate_tables",
    "learning_rate_dense",
)
"""Columns of validation.csv. ``train_loss`` is the mean over the examples since the evaluation before."""

MONITOR_LABELS = {"auc": "AUC", "gauc_weighted": "gauc_weighted", "gauc_mean": "gauc_mean", "logloss": "log loss"}
"""What a sentence calls a monitor."""
_LEAST_LOSS = 0.0005
"""A monitor that ends this far behind its best has fallen; closer is noise."""
LEAST_LEARNED = 0.005
"""A validation AUC that never was this far from 0.5 says that nothing has been learned."""


def value_of(row: Row, monitor: str) -> float:
    """What an evaluation is chosen by: more is better, so the log loss is negated.

    Raises:
        ValueError: the monitor is not defined on the validation rows.
    """
    value: float | None = row[f"valid_{monitor}"]
    if value is None:
        what = "has no group with both classes" if monitor.startswith("gauc") else "holds one class only"
        raise ValueError(
            f"split 'valid' {what}, so no {monitor} can choose the best model: take another training.monitor"
        )
    return -value if monitor == "logloss" else value


def write_curve(rows: Sequence[Row], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_curve(path: Path) -> list[Row]:
    """What ``write_curve`` wrote.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        found = list(csv.DictReader(io.StringIO(read_text(path))))
        rows = [{name: float(row[name]) if row[name] else None for name in COLUMNS} for row in found]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: delete its run to start again ({error})") from None
    return [{**row, "step": int(row["step"] or 0)} for row in rows]


def overfitting(rows: Sequence[Row], monitor: str) -> str | None:
    """A sentence if the monitor fell after its best while the training loss went on falling, else ``None``."""
    values = [value_of(row, monitor) for row in rows]
    number = values.index(max(values))
    best, last = rows[number], rows[-1]
    if values[number] - values[-1] < _LEAST_LOSS or last["train_loss"] >= best["train_loss"]:
        return None
    name, column = MONITOR_LABELS[monitor], f"valid_{monitor}"
    kind = "one-epoch over-fitting" if best["epoch"] <= 1 < last["epoch"] else "over-fitting"
    advice = ["tables.regularization", "a lower tables.learning_rate", "a smaller tables.budget"]
    if number == 0:
        advice.insert(0, "a higher training.evaluations_per_epoch, as the best was the first evaluation")
    return (
        f"validation {name} was best at epoch {best['epoch']} ({best[column]:.4f}) and "
        f"{'rose' if monitor == 'logloss' else 'fell'} to {last[column]:.4f} by epoch {last['epoch']}, while the "
        f"training loss fell from {best['train_loss']:.4f} to {last['train_loss']:.4f}: {kind}; the model of epoch "
        f"{best['epoch']} is kept. Try {', '.join(advice[:-1])} or {advice[-1]}."
    )


def remarks(rows: Sequence[Row], monitor: str, *, out_of_patience: bool, decays: Sequence[str] = ()) -> list[str]:
    """What a curve shows besides over-fitting, a sentence each: nothing learned, rare ids still improving.

    Args:
        rows: the evaluations.
        monitor: what chose the best one.
        out_of_patience: whether training ended before its last epoch.
        decays: the fields that pulled weights to zero.
    """
    found = []
    areas = [row["valid_auc"] for row in rows if row["valid_auc"] is not None]
    if areas and all(abs(area - 0.5) < LEAST_LEARNED for area in areas):
        advice = ", ".join(["a higher tables.init_std", *(f"a lower {field}" for field in decays)])
        found.append(
            f"validation AUC never left 0.5 ({min(areas):.4f} to {max(areas):.4f}): the model has learned nothing. Try "
            f"{advice} or other learning rates."
        )
    values = [value_of(row, monitor) for row in rows]
    best, last = rows[values.index(max(values))], rows[-1]
    before, after = best.get("valid_auc_tail"), last.get("valid_auc_tail")
    if out_of_patience and before is not None and after is not None and after - before >= _LEAST_LOSS:
        found.append(
            f"training stopped for want of a better {MONITOR_LABELS[monitor]}, but the validation AUC of rare ids "
            f"still rose, from {before:.4f} at epoch {best['epoch']} to {after:.4f} at epoch {last['epoch']}: their "
            "rows pay off late. Try a higher training.patience, or tables.regularization for the frequent ones."
        )
    return found


def draw_curve(rows: Sequence[Row], kept: float, path: Path) -> None:
    """Losses and validation metrics against epochs, as SVG; the epoch whose model is ``kept`` is marked."""
    import matplotlib.pyplot as plt
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "embtables",
    }
    with plt.rc_context(style):
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        losses, ranking = figure.subplots(1, 2)
        curves = (
            (losses, "train_loss", "training, since the evaluation before", "#999999", "s"),
            (losses, "valid_logloss", "validation", "#D55E00", "o"),
            (ranking, "valid_auc", "AUC", "#0072B2", "o"),
            (ranking, "valid_gauc_weighted", "gauc_weighted", "#009E73", "^"),
            (ranking, "valid_gauc_mean", "gauc_mean", "#CC79A7", "v"),
        )
        for axes, column, label, color, marker in curves:
            points = [(row["epoch"], row[column]) for row in rows if row[column] is not None]
            if points:
                axes.plot(*zip(*points), color=color, marker=marker, markersize=4, label=label)
        for axes, label in ((losses, "log loss"), (ranking, "on validation")):
            axes.axvline(kept, color="black", linewidth=0.8, linestyle=(0, (4, 3)), label="kept")
            axes.set_xlabel("epoch")
            axes.set_ylabel(label)
            axes.legend(frameon=False, fontsize=9)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
