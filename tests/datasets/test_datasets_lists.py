"""Lists in prepared data: jagged batches, selection of features, lengths of histories; against plain Python lists."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import embtables.datasets.writing as writing_module
from embtables._util.files import sealed, unsealed
from embtables.datasets import Batch, PreparedDataset
from embtables.datasets import prepared as prepared_module
from embtables.datasets.vocabulary import Vocabulary
from embtables.datasets.writing import Contents, Writer, prepare

ROWS = {"train": 1000, "valid": 10, "test": 10}


def lengths(row: int) -> tuple[int, int]:
    """Of the history and of the tags; some rows have none of either."""
    return (row * 7) % 11 % 9, row % 4


def history(row: int) -> list[int]:
    return [(row + 13 * i) % 300 for i in range(lengths(row)[0])]


def tags(row: int) -> list[int]:
    return [(3 * row + i) % 40 for i in range(lengths(row)[1])]


def fill(writer: Writer) -> None:
    items = Vocabulary(np.arange(1200), np.ones(1200, np.int64))
    tag = Vocabulary(np.arange(40), np.arange(40) + 1)
    contents = Contents(
        {"item": items, "other": items},
        ["x"],
        {"tags": tag},
        {"history": "item", "tag_history": "tags"},
        "item",
        "item",
    )
    writer.declare(contents)
    for split, size in ROWS.items():
        rows = range(size)
        frame = pl.DataFrame(
            {
                "label": [row % 2 for row in rows],
                "x": [float(row) for row in rows],
                "item": list(rows),
                "other": list(rows),
                "tags": [tags(row) for row in rows],
                "history": [history(row) for row in rows],
                "tag_history": [[i % 40 for i in history(row)] for row in rows],
                "_group": list(rows),
            },
            schema_overrides={"tags": pl.List(pl.Int64), "history": pl.List(pl.Int64)},
        )
        for start in range(0, size, 77):
            writer.write(split, frame.slice(start, 77))
    writer.rows_read = 1020


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedDataset:
    """Shards of 128 rows."""
    monkeypatch.setattr(writing_module, "ROWS_PER_SHARD", 128)
    return prepare(tmp_path / "lists", "test", {}, [], fill)


def listed(batch: Batch, name: str) -> list[list[int]]:
    values, offsets = batch.lists[name]
    assert values.dtype == offsets.dtype == torch.int64 and offsets.shape == (len(batch.labels) + 1,)
    assert offsets[0] == 0 and offsets[-1] == len(values)
    return [values[offsets[b] : offsets[b + 1]].tolist() for b in range(len(batch.labels))]


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("window", [2**31, 128 * 80])
def test_batches_hold_the_lists_of_their_rows(
    data: PreparedDataset, monkeypatch: pytest.MonkeyPatch, seed: int | None, window: int
) -> None:
    monkeypatch.setattr(prepared_module, "WINDOW_BYTES", window)
    seen: list[int] = []
    for batch in data.batches("train", 96, seed=seed, epoch=2):
        rows = batch.ids[:, 0].tolist()
        assert listed(batch, "history") == [history(row) for row in rows]
        assert listed(batch, "tags") == [tags(row) for row in rows]
        assert listed(batch, "tag_history") == [[i % 40 for i in history(row)] for row in rows]
        seen += rows
    assert sorted(seen) == list(range(1000)) and (seed is None) == (seen == sorted(seen))


def test_skipping_gives_the_same_later_batches(data: PreparedDataset) -> None:
    whole = list(data.batches("train", 96, seed=1))
    for skip in (1, 7):
        later = next(data.batches("train", 96, seed=1, skip=skip))
        assert listed(later, "history") == listed(whole[skip], "history")


@pytest.mark.parametrize("longest", [1, 3, 50])
def test_long_histories_keep_the_latest_entries_and_features_stay_whole(data: PreparedDataset, longest: int) -> None:
    batch = next(data.select(max_history=longest).batches("train", 200, seed=3))
    rows = batch.ids[:, 0].tolist()
    assert listed(batch, "history") == [history(row)[-longest:] for row in rows]
    assert listed(batch, "tags") == [tags(row) for row in rows]


def test_tables_share_between_a_feature_and_its_histories(data: PreparedDataset) -> None:
    item, other, tag = data.table_configs(8)
    assert (item.feature_names, item.pooling) == (("item", "history"), "mean")
    assert (other.feature_names, other.pooling) == (("other",), "sum")
    assert (tag.feature_names, tag.pooling, tag.num_embeddings) == (("tags", "tag_history"), "mean", 42)
    assert data.frequencies["tags"].tolist() == [0, 0, *range(40, 0, -1)]


def test_leaving_out(data: PreparedDataset) -> None:
    less = data.select(leave_out=["history", "other", "x"])
    batch = next(less.batches("test", 10))
    assert less.feature_names == ["item"] and batch.ids.shape == (10, 1) and batch.dense.shape == (10, 0)
    assert set(batch.lists) == {"tags", "tag_history"} and less.slice_feature == "item"
    assert [table.feature_names for table in less.table_configs(4)] == [("item",), ("tags", "tag_history")]
    without = data.select(leave_out=["item", "tags"])  # and with them their histories
    assert without.histories == {} and without.list_features == [] and without.slice_feature is None
    assert next(without.batches("test", 10)).lists == {} and set(without.frequencies) == {"other"}
    assert next(without.batches("test", 10)).groups is not None


def test_a_selection_of_a_selection_keeps_both(data: PreparedDataset) -> None:
    both = data.select(["other"], max_history=3).select(["x"], max_history=5)
    assert (both.feature_names, both.dense_features, both.max_history) == (["item"], [], 3)
    assert both.select(["other"]) is both


def test_wrong_selections_are_named(data: PreparedDataset) -> None:
    with pytest.raises(ValueError, match="no feature 'histroy'; it has item, other, tags, x, history, tag_history"):
        data.select(leave_out=["histroy"])
    with pytest.raises(ValueError, match="no single-valued feature"):
        data.select(leave_out=["item", "other"])
    for length in (0, 10**20):
        with pytest.raises(ValueError, match=f"max_history {length}: a number from 1"):
            data.select(max_history=length)


@pytest.mark.parametrize(
    "column, reason",
    [
        (pl.Series("history", [[2], [1202]] * 5), "column 'history' holds an id outside 0 … 1201"),
        (pl.Series("history", [[2], [-1]] * 5), "column 'history' holds an id outside 0 … 1201"),
        (pl.Series("history", [[2], None] * 5), "column 'history' is empty in some rows"),
        (pl.Series("history", [[2], [None]] * 5), "column 'history' holds an id outside"),
        (pl.Series("history", [2, 3] * 5), "column 'history' is of type int"),
        (pl.Series("tags", [["a"], []] * 5), "column 'tags' is of type large_list<.*string"),
    ],
)
def test_damaged_lists_are_named(data: PreparedDataset, column: pl.Series, reason: str) -> None:
    from hashlib import sha256

    shard = data.path / "test" / "00000.parquet"
    pl.read_parquet(shard).with_columns(column).write_parquet(shard)
    manifest = json.loads((data.path / "manifest.json").read_text())
    entry = manifest["splits"]["test"]["shards"][0]
    entry["bytes"], entry["sha256"] = shard.stat().st_size, sha256(shard.read_bytes()).hexdigest()
    (data.path / "manifest.json").write_text(json.dumps(sealed(unsealed(manifest))))
    with pytest.raises(ValueError, match=reason):
        next(PreparedDataset(data.path).batches("test", 10))
