"""What tests of the readers share: prepared rows with raw values in place of ids, and a small model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from embtables.datasets import PreparedDataset
from embtables.training import Trainer, load_config

SPLITS = ("train", "valid", "test")


def vocabulary(data: PreparedDataset, name: str) -> list[Any]:
    """Raw values by id."""
    feature = next(feature for feature in data.manifest["features"] if feature["name"] == name)
    return [None, "unseen", *pl.read_parquet(data.path / feature["vocabulary"]["file"])["value"].to_list()]


def decoded(data: PreparedDataset, split: str) -> list[dict[str, Any]]:
    lists = {name: name for name in data.list_features} | data.histories
    values = {name: vocabulary(data, name) for name in data.num_embeddings}
    rows = []
    for row in pl.DataFrame(pl.from_arrow(data.read(split))).to_dicts():
        row |= {name: values[name][row[name]] for name in data.feature_names}
        rows.append(row | {name: [values[of][i] for i in row[name]] for name, of in lists.items()})
    return rows


def all_decoded(data: PreparedDataset) -> list[dict[str, Any]]:
    return [row for split in SPLITS for row in decoded(data, split)]


def train_din(data: PreparedDataset, folder: Path, epochs: int = 1, leave_out: Sequence[str] = ()) -> float:
    """Test AUC of a small DIN."""
    config = load_config(
        fields={
            "data.leave_out": list(leave_out),
            "model.name": "din",
            "model.hyperparameters": {"attention_units": [8], "units": [16]},
            "tables.embedding_dim": 8,
            "dense.learning_rate": 0.01,
            "training.batch_size": 256,
            "training.epochs": epochs,
        }
    )
    result = Trainer(config, data, folder).run()
    return float(result["test_auc"])
