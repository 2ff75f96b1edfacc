"""results.csv: one row a cell, collected from the cells' own files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embtables._util.files import check_seal, unsealed, write_text
from embtables._util.reading import inside, read_json
from embtables.sweeps.cells import Cell

#: Columns that the first sweeps did not have.
LATE_COLUMNS = (
    "variant",
    "valid_logloss",
    "valid_gauc_weighted",
    "valid_gauc_mean",
    "trained_with",
    "tuned",
    "test_calibration",
)
#: The columns of results.csv. A column is only ever added at the end of its part.
COLUMNS = (
    "dataset",
    "model",
    "method",
    "budget",
    "seed",
    "inference_bytes",
    "training_bytes",
    "ratio",
    "valid_auc",
    "test_auc",
    "test_logloss",
    "best_epoch",
    "examples_per_second",
    "train_seconds",
    "peak_rss_bytes",
    "status",
    "floor_bytes",
    "full_bytes",
    "test_normalized_entropy",
    "test_gauc_weighted",
    "test_gauc_mean",
    "test_auc_head",
    "test_auc_torso",
    "test_auc_tail",
    "test_auc_unseen",
    "collision_share",
    "lookup_latency_us",
    "epochs",
    "learning_rate",
    "cell",
    "message",
    *LATE_COLUMNS,
)

# What the sweep itself knows of a cell; a run's own word on these is not asked for.
_OF_THE_SWEEP = (
    "dataset",
    "model",
    "method",
    "budget",
    "seed",
    "status",
    "learning_rate",
    "cell",
    "message",
    "variant",
    "trained_with",
    "tuned",
)


#: Columns whose values are those of the runs' metrics.json.
MEASURED = tuple(name for name in COLUMNS if name not in (*_OF_THE_SWEEP, "floor_bytes"))


def read_metrics(run: Path) -> dict[str, Any] | None:
    """The metrics of a finished run; None while there are none. A run writes them last, and whole."""
    try:
        metrics = read_json(inside(run, "metrics.json"))
        if not isinstance(metrics, dict) or not isinstance(metrics.get("status"), str):
            raise ValueError(f"{run / 'metrics.json'} has no status")
        check_seal(metrics, run / "metrics.json")
        for name in COLUMNS:
            value = metrics.get(name)
            is_number = isinstance(value, (int, float)) and (isinstance(value, float) or abs(value) < 2**63)
            if name not in _OF_THE_SWEEP and not (is_number or value is None):
                raise ValueError(f"{run / 'metrics.json'} has {metrics[name]!r} as {name}, which is no number")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{error}: delete {run} to train it again") from None
    return unsealed(metrics)


def row(cell: Cell, status: str, dataset: str, model: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """One row: what the sweep knows of `cell`, and of `values` what has a column."""
    measured = {name: values[name] for name in COLUMNS if name in values and name not in _OF_THE_SWEEP}
    return {
        "dataset": dataset,
        "model": model,
        "method": cell.method,
        "budget": cell.budget,
        "seed": cell.seed,
        **measured,
        "status": status,
        "learning_rate": cell.tuned_value("tables.learning_rate"),
        "cell": cell.name,
        "message": values.get("message"),
        "variant": cell.variant,
        "trained_with": values.get("trained_with"),
        "tuned": cell.tuned,
    }


def write_results(rows: list[dict[str, Any]], path: Path) -> None:
    """Write `rows` in one step, so that a reader at any moment finds a whole file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def hparams(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the HParams page of TensorBoard says of a cell: its coordinates, and its results."""
    coordinates = {name: row[name] for name in ("dataset", "variant", "model", "method", "budget", "seed", "tuned")}
    return coordinates, {name: row[name] for name in row if name not in coordinates}
