"""Sequences of items with attributes, and what holds for items in logs; histories and negatives against loops."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from embtables.datasets import PreparedDataset
from embtables.datasets.interaction_log import ItemFeatures, Log, LogOptions, write_log
from embtables.datasets.key_column import KeyColumn
from embtables.datasets.negatives import Negatives
from embtables.datasets.readers.s3rec import S3Rec, prepare_s3rec
from embtables.datasets.vocabulary import MISSING
from embtables.datasets.writing import prepare

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "s3rec"


def sequences(seed: int = 0) -> dict[int, list[int]]:
    draw = random.Random(seed)
    return {user: [draw.randrange(1, 60) for _ in range(draw.randrange(1, 9))] for user in range(1, 120)}


def attributes() -> dict[int, list[int]]:
    return {item: [1 + (item * k) % 13 for k in range(item % 4)] for item in range(1, 55)}  # 55 … 59: unknown


def write_files(folder: Path, end: str = "\n") -> Path:
    text = end.join(" ".join(map(str, [user, *items])) for user, items in sequences().items())
    (folder / "Toy.txt").write_bytes((text + end).encode())
    (folder / "Toy_item2attributes.json").write_text(json.dumps({str(i): a for i, a in attributes().items()}))
    return folder / "Toy.txt"


def raw(data: PreparedDataset, feature: str) -> dict[int, int | None]:
    number = [f["name"] for f in data.manifest["features"]].index(feature)
    values = pl.read_parquet(data.path / "vocabulary" / f"{number:05d}.parquet")["value"].to_list()
    return {0: None, 1: -1} | dict(enumerate(values, 2))


def rows(data: PreparedDataset, split: str) -> list[dict]:
    return pl.DataFrame(pl.from_arrow(data.read(split))).to_dicts()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("cap, least", [(50, 1), (3, 0)])
def test_examples_against_loops(tmp_path: Path, end: str, cap: int, least: int) -> None:
    options = LogOptions("leave-last-out", history=cap, min_history=least, seed=1)
    data = prepare_s3rec(write_files(tmp_path, end), tmp_path / "out", S3Rec(log=options))
    users, items, tags = (raw(data, name) for name in ("user_id", "item_id", "attributes"))
    known, found = attributes(), {"train": 0, "valid": 0, "test": 0}
    for split in found:
        pairs = rows(data, split)
        assert len(pairs) % 2 == 0
        for click, negative in zip(pairs[::2], pairs[1::2]):
            assert (click["label"], negative["label"]) == (1, 0)
            assert click["user_id"] == negative["user_id"] and click["history"] == negative["history"]
            user = users[click["user_id"]]
            if user == -1 or items[click["item_id"]] == -1:
                continue
            sequence = sequences()[user]
            assert items[negative["item_id"]] not in sequence
            earlier = [items[i] for i in click["history"]]
            places = [
                place
                for place, item in enumerate(sequence)
                if item == items[click["item_id"]]
                and all(a in (b, -1) for a, b in zip(earlier, sequence[max(0, place - cap) : place], strict=False))
                and len(earlier) == min(place, cap)
            ]
            assert places and places[0] >= least
            if split != "train":
                assert places[-1] == len(sequence) - (1 if split == "test" else 2)
            for row in (click, negative):
                item = items[row["item_id"]]
                if item != -1:
                    shown = [tags[i] for i in row["attributes"]]
                    assert all(a in (b, -1) for a, b in zip(shown, known.get(item, []), strict=True))
        found[split] = len(pairs) // 2
    long = [len(s) for s in sequences().values() if len(s) >= 3]
    assert found["test"] == found["valid"] == len(long)
    assert found["train"] == sum(max(0, len(s) - least) for s in sequences().values()) - 2 * len(long)
    assert data.manifest["rows_without_history"] == (119 if least else 0)


def test_attributes_count_in_training_rows(tmp_path: Path) -> None:
    data = prepare_s3rec(write_files(tmp_path), tmp_path / "out")
    counts = np.zeros(data.num_embeddings["attributes"], int)
    for row in rows(data, "train"):
        np.add.at(counts, row["attributes"], 1)
    assert counts.tolist() == data.frequencies["attributes"].tolist() and data.list_features == ["attributes"]


def test_single_values_of_items_have_aligned_histories(tmp_path: Path) -> None:
    draw = random.Random(2)
    clicks = [(draw.randrange(30), draw.randrange(40), time) for time in range(600)]
    category = {item: item % 7 + 100 for item in range(36)}  # 36 … 39 have none

    def fill(writer: object) -> None:
        users, items, times = (np.array(column) for column in zip(*clicks))
        known = ItemFeatures(np.array(list(category)[::-1]), {"category": np.array(list(category.values())[::-1])})
        log = Log(users, items, times, np.arange(600), items_known=known)
        write_log(writer, log, LogOptions(history=4), Negatives(2, "uniform", None))  # type: ignore[arg-type]

    data = prepare(tmp_path / "out", "test", {}, [], fill)
    assert data.histories == {"history": "item_id", "category_history": "category"}
    items, categories = raw(data, "item_id"), raw(data, "category")
    for split in ("train", "valid", "test"):
        for row in rows(data, split):
            item = items[row["item_id"]]
            if item != -1:
                assert categories[row["category"]] == category.get(item)
            of_history = [
                (items[i], categories[c]) for i, c in zip(row["history"], row["category_history"], strict=True)
            ]
            assert all(i == -1 or c == category.get(i) for i, c in of_history)
    assert MISSING not in (key for key in categories.values() if key is not None)


def test_items_of_which_nothing_is_known(tmp_path: Path) -> None:
    source = write_files(tmp_path)
    (tmp_path / "Toy_item2attributes.json").write_text('{"1": [2]}')
    data = prepare_s3rec(source, tmp_path / "out")
    one = [raw_id for raw_id, item in raw(data, "item_id").items() if item == 1]
    assert all((row["attributes"] != []) == (row["item_id"] in one) for row in rows(data, "train"))
    items = {item for line in source.read_text().splitlines() for item in line.split()[1:]}
    assert data.manifest["not_in_side_files"] == {"Toy_item2attributes.json": len(items) - 1}
    (tmp_path / "Toy_item2attributes.json").unlink()
    assert prepare_s3rec(source, tmp_path / "plain").list_features == []


@pytest.mark.parametrize(
    "content, attributes_text, reason",
    [
        (b"", None, "holds no sequences"),
        (b"1 2 3\n2 x 3\n", None, r"Toy.txt:2: no line of a user and items"),
        (b"1 2 3\n7\n", None, r"Toy.txt:2: no line of a user and items"),
        (b"1 2 3\n2 -3 4\n", None, r"Toy.txt:2: no line of a user and items"),
        (b"1 2 3\n1 4 5\n", None, "a user has two lines"),
        (b"1 2 3\n\x00\x01", None, "Toy.txt:2: a NUL byte"),
        (b"1 2 3 4 5\n", '{"2": [1, 2', "not valid JSON"),
        (b"1 2 3 4 5\n", '{"2": 1}', "all integers"),
        (b"1 2 3 4 5\n", "[1, 2]", "all integers"),
        (b"1 2 3 4 5\n", '{"2": "12"}', "all integers"),
        (b"1 2 3 4 5\n", '{"2": [1.5]}', "all integers"),
        (b"1 2 3 4 5\n", "[" * 100_000, "Toy_item2attributes.json: not valid JSON"),
        (b"1 2 3 4 5\n", '{"99": [1]}', "it knows none of the 4 items of the sequences"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, content: bytes, attributes_text: str | None, reason: str) -> None:
    (tmp_path / "Toy.txt").write_bytes(content)
    if attributes_text:
        (tmp_path / "Toy_item2attributes.json").write_text(attributes_text)
    with pytest.raises(ValueError, match=reason):
        prepare_s3rec(tmp_path / "Toy.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_few_malformed_lines_are_counted(tmp_path: Path) -> None:
    source = write_files(tmp_path)
    source.write_text(source.read_text() + "900 a b\n")
    data = prepare_s3rec(source, tmp_path / "out", S3Rec(max_rejected=0.02))
    assert data.manifest["rows_rejected"] == {"no line of a user and items, all integers": 1}


def test_too_long_a_least_history_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="min_history leaves no example"):
        prepare_s3rec(write_files(tmp_path), tmp_path / "out", S3Rec(log=LogOptions(min_history=20)))
    with pytest.raises(ValueError, match="min_history 4: a number from 0 to history, 3"):
        LogOptions(history=3, min_history=4)
    with pytest.raises(ValueError, match=f"history {10**20}: at most"):
        LogOptions(history=10**20)


def test_key_column_stays_usable() -> None:
    column = KeyColumn()
    assert column.keys_of(pl.Series(["a", None, "a"])).tolist() == [0, MISSING, 0]


@pytest.mark.skipif(not SHARED.exists(), reason="the S3-Rec files are not here")
@pytest.mark.parametrize("name, users, items, clicks", [("Yelp", 30431, 20033, 316354)])
def test_published_files(tmp_path: Path, name: str, users: int, items: int, clicks: int) -> None:
    data = prepare_s3rec(SHARED / f"{name}.txt", tmp_path / "out")
    assert data.num_rows("test") == data.num_rows("valid") == 2 * users  # every user has at least five items
    assert data.num_rows("train") == 2 * (clicks - 3 * users)
    assert data.num_embeddings["item_id"] == items + 2 and data.num_embeddings["attributes"] == 1001 + 2
