"""Prepared rows with raw values in place of ids, for tests of the readers."""

from __future__ import annotations

from typing import Any

import polars as pl

from embtables.datasets import PreparedDataset

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
