"""BARS' preprocessed sets and other split tables, against a plain reader in Python."""

from __future__ import annotations

import csv
import gzip
import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from embtables.cli.prepare import app
from embtables.datasets import PreparedDataset
from embtables.datasets import text as text_module
from embtables.datasets.readers import reczoo
from embtables.datasets.readers.reczoo import PUBLISHED, Reczoo, prepare_reczoo
from embtables.datasets.split_table import Columns
from embtables.datasets.string_keys import StringKeys
from embtables.training.config import load_config
from embtables.training.trainer import Trainer

Row = dict[str, Any]
SPLITS = ("train", "valid", "test")


def zipf(generator: random.Random, size: int, shape: float = 0.6) -> int:
    return int(generator.paretovariate(shape)) % size


def sequence(generator: random.Random, size: int, longest: int) -> list[int]:
    return [zipf(generator, size, 0.4) for _ in range(generator.randrange(longest + 1))]


def amazon(generator: random.Random) -> Row:
    items = sequence(generator, 300, 130)
    item = zipf(generator, 300)
    row = {"label": generator.randint(0, 1), "user_id": generator.randrange(40), "item_id": item, "cate_id": item % 9}
    categories = [item % 9 for item in items]
    return row | {"item_history": "^".join(map(str, items)), "cate_history": "^".join(map(str, categories))}


def taobao(generator: random.Random) -> Row:
    """Histories of category and brand leave unknown ones out, so that they differ in length."""
    histories = {"btag_his": 5, "cate_his": 400, "brand_his": 900}
    row: Row = {"clk": generator.randint(0, 1)}
    row |= {name: "^".join(map(str, sequence(generator, size, 60))) for name, size in histories.items()}
    row |= {name: zipf(generator, 200, 0.5) for name in PUBLISHED["TaobaoAd_x1"].categorical}
    return row | {"price": round(generator.random() * 100, 2), "btag": 1}


def criteo_x4(generator: random.Random) -> Row:
    row: Row = {"Label": generator.randint(0, 1)}
    for number in range(1, 14):
        row[f"I{number}"] = generator.choice(["", 0, 1, 2, 3, -1, -2, zipf(generator, 10**6, 0.2)])
    for number in range(1, 27):
        row[f"C{number}"] = generator.choice(["", *[f"{zipf(generator, 999, 0.5) * 2654435761 % 2**32:08x}"] * 9])
    return row


def write(folder: Path, make: Callable[[random.Random], Row], sizes: Mapping[str, int]) -> dict[str, list[Row]]:
    """CSV as pandas writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for seed, (split, size) in enumerate(sizes.items()):
        generator = random.Random(seed)
        splits[split] = [make(generator) for _ in range(size)]
        write_csv(folder / f"{split}.csv", splits[split])
    return splits


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def kept(train: Sequence[Row], column: str, histories: Sequence[str], min_count: int) -> dict[str, int]:
    """Total counts of the values that one of the columns shows at least `min_count` times, by BARS' rule."""
    counts = [Counter(str(row[column]) for row in train)]
    counts += [Counter(value for row in train for value in row[name].split("^")) for name in histories]
    total = sum(counts, Counter())
    return {value: total[value] for value in total if value and max(of[value] for of in counts) >= min_count}


def raw_values(data: PreparedDataset, name: str) -> list[str]:
    """Of ids 2, 3, …"""
    file = next(of["vocabulary"]["file"] for of in data.manifest["features"] if of["name"] == name)
    return [str(value) for value in pl.read_parquet(data.path / file)["value"]]


def test_amazon_equals_a_plain_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = write(tmp_path / "AmazonElectronics_x1", amazon, {"train": 300, "test": 120})
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 5000)
    config = Reczoo(check_md5=False)
    data = prepare_reczoo(tmp_path / "AmazonElectronics_x1", tmp_path / "out", config, progress=True)
    assert data.feature_names == ["item_id", "cate_id"] and data.dense_features == []
    assert data.histories == {"item_history": "item_id", "cate_history": "cate_id"}
    assert (data.group_feature, data.slice_feature) == ("user_id", "item_id")
    for feature, history in (("item_id", "item_history"), ("cate_id", "cate_history")):
        totals = kept(splits["train"], feature, [history], 1)
        values = raw_values(data, feature)
        assert dict(zip(values, data.frequencies[feature][2:].tolist())) == totals
        assert sorted(totals, key=lambda value: (-totals[value], int(value))) == values
        ids = {"": 0} | {value: number for number, value in enumerate(values, 2)}
        for split in SPLITS:  # test validates
            rows = splits["train" if split == "train" else "test"]
            table = data.read(split)
            assert table[feature].to_pylist() == [ids.get(str(row[feature]), 1) for row in rows]
            lists = [[ids.get(value, 1) for value in row[history].split("^")] if row[history] else [] for row in rows]
            assert table[history].to_pylist() == [ids_of[:100] for ids_of in lists]  # FuxiCTR keeps the first 100
    batch = next(data.batches("test", 120))
    assert batch.groups is not None and batch.groups.tolist() == [row["user_id"] for row in splits["test"]]
    longer = sum(len(row["item_history"].split("^")) > 100 for rows in splits.values() for row in rows)
    assert data.manifest["histories_cut"] == longer > 0 and data.manifest["rows_with_unaligned_histories"] == 0
    assert data.manifest["valid_is_test"] is True
    shown = capsys.readouterr().err
    assert "the rows of test validate" in shown
    assert "train: 300 rows, published are 2,608,764" in shown and "cate_id: 11 ids, BARS has 803" in shown


def test_valid_split_off_train(tmp_path: Path) -> None:
    splits = write(tmp_path / "amazon", amazon, {"train": 1000, "test": 50})
    config = Reczoo("AmazonElectronics_x1", valid_share=0.2, check_md5=False, seed=3)
    data = prepare_reczoo(tmp_path / "amazon", tmp_path / "out", config)
    assert data.num_rows("train") + data.num_rows("valid") == 1000 and 150 < data.num_rows("valid") < 250
    assert data.num_rows("test") == 50 and "valid_is_test" not in data.manifest
    history = data.read("train")["item_history"].to_pylist() + data.read("valid")["item_history"].to_pylist()
    lengths = Counter(min(100, row["item_history"].count("^") + (row["item_history"] != "")) for row in splits["train"])
    assert Counter(map(len, history)) == lengths
    assert data.frequencies["cate_id"][2:].sum() > 0
    in_train = set(data.read("train")["item_id"].to_pylist())
    assert {1} >= set(data.read("valid")["item_id"].to_pylist()) - in_train - set(
        range(2, data.num_embeddings["item_id"])
    )
    again = prepare_reczoo(tmp_path / "amazon", tmp_path / "again", replace(config, seed=4))
    assert not again.read("valid").equals(data.read("valid"))


def test_taobao_counts_by_column_and_keeps_the_latest(tmp_path: Path) -> None:
    splits = write(tmp_path / "TaobaoAd_x1", taobao, {"train": 400, "test": 60})
    data = prepare_reczoo(tmp_path / "TaobaoAd_x1", tmp_path / "out", Reczoo(check_md5=False))
    assert data.dense_features == ["price"]
    assert data.read("test")["price"].to_pylist() == pytest.approx([row["price"] for row in splits["test"]], rel=1e-6)
    for feature in data.feature_names:
        histories = [name for name, of in data.histories.items() if of == feature]
        totals = kept(splits["train"], feature, histories, 10)
        assert dict(zip(raw_values(data, feature), data.frequencies[feature][2:].tolist())) == totals, feature
        assert data.num_embeddings[feature] == len(totals) + 2
    together = Counter(value for row in splits["train"] for value in (str(row["brand"]), *row["brand_his"].split("^")))
    assert any(together[value] >= 10 for value in set(together) - set(raw_values(data, "brand")) - {""})
    values = raw_values(data, "cate_id")
    ids = {value: number for number, value in enumerate(values, 2)}
    for row, found in zip(splits["test"], data.read("test")["cate_his"].to_pylist()):
        assert found == [ids.get(value, 1) for value in row["cate_his"].split("^") if value][-50:]
    lengths = [
        [row[name].count("^") + (row[name] != "") for name in data.histories] for row in sum(splits.values(), [])
    ]
    assert data.manifest["rows_with_unaligned_histories"] == sum(len(set(of)) > 1 for of in lengths)


@pytest.mark.parametrize(("name", "least"), [("Criteo_x4_001", 10), ("Criteo_x4_002", 2)])
def test_criteo_x4_has_buckets(tmp_path: Path, name: str, least: int) -> None:
    splits = write(tmp_path / "in", criteo_x4, {"train": 500, "valid": 60, "test": 60})
    data = prepare_reczoo(tmp_path / "in", tmp_path / "out", Reczoo(name, check_md5=False))
    assert data.dense_features == [] and len(data.feature_names) == 39

    def bucket(value: int | str) -> str:
        if value in ("", 0):
            return ""
        return str(math.floor(math.log(float(value)) ** 2) if float(value) > 2 else value)

    assert [bucket(value) for value in (3, 100, 2, -2)] == ["1", "21", "2", "-2"]
    for feature in data.feature_names:
        value_of = bucket if feature.startswith("I") else str
        counts = Counter(value_of(row[feature]) for row in splits["train"])
        values = raw_values(data, feature)
        assert set(values) == {value for value in counts if value and counts[value] >= least}
        ids = {"": 0} | {value: number for number, value in enumerate(values, 2)}
        assert data.read("test")[feature].to_pylist() == [ids.get(value_of(row[feature]), 1) for row in splits["test"]]


def test_avazu_x4_and_kkbox_are_derived(tmp_path: Path) -> None:
    hours = ["14102100", "14102523", "14102601"]  # Tuesday, Saturday, Sunday
    columns = [name for name in PUBLISHED["Avazu_x4_002"].categorical if name not in ("hour", "weekday", "weekend")]
    rows = [
        {"id": 1, "click": place % 2, "hour": hour} | dict.fromkeys(columns, "1") for place, hour in enumerate(hours)
    ]
    kkbox = [name for name in PUBLISHED["KKBox_x1"].categorical if name not in ("isrc", "bd")]
    songs = [
        {"isrc": "TWUM71", "bd": "0", "genre_ids": "465", "artist_name": 'The "B, C" D'},
        {"isrc": "", "bd": "10", "genre_ids": "", "artist_name": "a b"},
        {"isrc": "TW1", "bd": "61", "genre_ids": "465 458", "artist_name": "b"},
        {"isrc": "USX", "bd": "96", "genre_ids": "1 2 3 4", "artist_name": ""},
    ]
    music = [{"label": 1, "more": "x"} | dict.fromkeys(kkbox, "é") | song for song in songs]
    for folder, content in (("Avazu_x4", rows), ("KKBox_x1", music)):
        (tmp_path / folder).mkdir()
        for split in SPLITS:
            write_csv(tmp_path / folder / f"{split}.csv", content)
    data = prepare_reczoo(tmp_path / "Avazu_x4", tmp_path / "a", Reczoo("Avazu_x4_002", check_md5=False))
    found = {}
    for name in ("hour", "weekday", "weekend"):
        values = raw_values(data, name)
        found[name] = [int(values[number - 2]) for number in data.read("train")[name].to_pylist()]
    assert found == {"hour": [0, 23, 1], "weekday": [2, 6, 0], "weekend": [0, 1, 1]}

    data = prepare_reczoo(tmp_path / "KKBox_x1", tmp_path / "k", Reczoo(min_count=1, check_md5=False))
    assert data.list_features == ["genre_ids", "artist_name"] and data.histories == {} and data.group_feature is None
    values = {name: ["", None, *raw_values(data, name)] for name in ("isrc", "bd", "genre_ids", "artist_name", "msno")}
    table = data.read("train")
    assert [values["isrc"][number] for number in table["isrc"].to_pylist()] == ["TW", "", "TW", "US"]
    assert [values["bd"][number] for number in table["bd"].to_pylist()] == ["", "1", "7", ""]
    genres = [[values["genre_ids"][number] for number in ids] for ids in table["genre_ids"].to_pylist()]
    assert genres == [["465"], [], ["465", "458"], ["1", "2", "3"]]
    assert values["artist_name"][table["artist_name"].to_pylist()[0][1]] == '"B,'
    assert values["msno"][2:] == ["é"]


MINE = Columns("clicked", ["x"], ["user", "item"], [], {"seen": "item"}, "user", "item")


def mine(generator: random.Random) -> Row:
    row: Row = {"clicked": generator.randint(0, 1), "x": generator.choice(["", generator.random()])}
    row |= {"user": generator.choice(["", "ann", "bob", "5", "007"]), "item": zipf(generator, 30)}
    return row | {"seen": "^".join(map(str, sequence(generator, 40, 6)))}


def equal(first: PreparedDataset, second: PreparedDataset) -> bool:
    return first.frequencies.keys() == second.frequencies.keys() and all(
        first.read(split).equals(second.read(split)) for split in SPLITS
    )


def test_parquet_gives_the_same(tmp_path: Path) -> None:
    splits = write(tmp_path / "csv", mine, {"train": 200, "valid": 50, "test": 50})
    from_csv = prepare_reczoo(tmp_path / "csv", tmp_path / "a", Reczoo(columns=MINE))
    (tmp_path / "parquet").mkdir()
    (tmp_path / "mixed").mkdir()
    for split, rows in splits.items():
        frame = pl.DataFrame(
            {
                "item": [float(row["item"]) for row in rows],  # as pandas writes integers with missing ones
                "x": pl.Series([row["x"] if row["x"] != "" else float("nan") for row in rows]),
                "user": pl.Series([row["user"] for row in rows], dtype=pl.Categorical),
                "seen": [[int(value) for value in row["seen"].split("^") if value] for row in rows],
                "clicked": [bool(row["clicked"]) for row in rows],
            }
        )
        frame.write_parquet(tmp_path / "parquet" / f"{split}.parquet", row_group_size=70)
        if split == "train":
            frame.write_parquet(tmp_path / "mixed" / f"{split}.parquet")
        else:
            (tmp_path / "mixed" / f"{split}.csv.gz").write_bytes(
                gzip.compress((tmp_path / "csv" / f"{split}.csv").read_bytes().replace(b"\n", b"\r\n"))
            )
    assert equal(from_csv, prepare_reczoo(tmp_path / "parquet", tmp_path / "b", Reczoo(columns=MINE)))
    assert equal(from_csv, prepare_reczoo(tmp_path / "mixed", tmp_path / "c", Reczoo(columns=MINE)))
    assert from_csv.read("train")["user"].to_pylist().count(0) == sum(row["user"] == "" for row in splits["train"])
    assert {"ann", "5", "007"} <= set(raw_values(from_csv, "user"))
    assert from_csv.read("test")["x"].to_pylist() == pytest.approx([row["x"] or 0.0 for row in splits["test"]])


@pytest.mark.parametrize(
    ("column", "values", "sentence"),
    [
        ("clicked", [[1], [0]], r"column 'clicked' is of type List\(Int64\), where numbers or text are needed"),
        ("item", [{"a": 1}, {"a": 2}], "column 'item' is of type Struct"),
        ("seen", [[0.5], [1.0]], r"column 'seen' is of type List\(Float64\), where lists, or text with '\^'"),
        ("seen", [3, 4], "column 'seen' is of type Int64, where lists"),
        (
            "clicked",
            [0.5, 2],
            r"train.parquet, row 1: the label 'clicked' is not 0 or 1 \(0.5\); 2 of 2 rows read are malformed",
        ),
        ("item", [1.5, float("inf")], r"row 1: 'item' is neither text nor a whole number \(1.5\); 2 of 2 rows"),
        ("x", ["a", "inf"], r"row 1: 'x' is not a number \('a'\); 2 of 2 rows"),
    ],
)
def test_parquet_of_wrong_types(tmp_path: Path, column: str, values: list[Any], sentence: str) -> None:
    good = {"clicked": [0, 1], "x": [0.5, 1.5], "user": ["a", "b"], "item": [1, 2], "seen": [[1], []]}
    for split in SPLITS:
        frame = pl.DataFrame(good | ({column: values} if split == "train" else {}))
        frame.write_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=sentence) as error:
        prepare_reczoo(tmp_path, tmp_path / "out", Reczoo(columns=MINE))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_malformed_rows_are_counted_in_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = write(tmp_path / "in", mine, {"train": 300, "valid": 50, "test": 50})
    for split, rows in splits.items():
        rows[1] |= {"clicked": "2"}
        rows[2] |= {"clicked": ""}
        rows[3] |= {"x": "1,5"}  # written in quotes
        write_csv(tmp_path / "in" / f"{split}.csv", rows)
    with open(tmp_path / "in" / "test.csv", "a") as file:
        file.write("1,2\n")
    with pytest.raises(ValueError, match="10 of 401 rows read are malformed, more than the allowed 2.000%"):
        prepare_reczoo(tmp_path / "in", tmp_path / "out", Reczoo(columns=MINE, max_rejected=0.02))
    assert not (tmp_path / "out").exists()
    data = prepare_reczoo(tmp_path / "in", tmp_path / "out", Reczoo(columns=MINE, max_rejected=0.05), progress=True)
    assert data.manifest["rows_rejected"] == {
        "the label 'clicked' is not 0 or 1": 6,
        "'x' is not a number": 3,
        "not 5 columns": 1,
    }
    assert [data.num_rows(split) for split in SPLITS] == [297, 47, 47]
    assert f"rejected: 'x' is not a number (first {tmp_path / 'in' / 'train.csv'}:5: '1,5')" in capsys.readouterr().err


def publish(monkeypatch: pytest.MonkeyPatch, folder: Path, **facts: Any) -> None:
    """Lets the folder's files be the published ones."""
    md5 = {path.stem: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.glob("*.csv")}
    monkeypatch.setitem(reczoo.PUBLISHED, "Frappe_x1", replace(PUBLISHED["Frappe_x1"], md5=md5, **facts))


def test_md5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fields = PUBLISHED["Frappe_x1"].categorical
    sizes = {"train": 200, "valid": 50, "test": 50}
    folder = tmp_path / "Frappe_x1"
    splits = write(folder, lambda generator: {"label": 1} | {name: zipf(generator, 99) for name in fields}, sizes)
    with pytest.raises(
        ValueError, match=r"train.csv: its md5 is \w{32}, that of the published file ba7306e6.* --no-md5$"
    ):
        prepare_reczoo(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ids = [len({row[name] for row in splits["train"]}) + 2 for name in fields]
    publish(monkeypatch, folder, rows=sizes, ids=ids, total_ids=sum(ids))
    prepare_reczoo(folder, tmp_path / "out", progress=True)
    assert "Rows and ids are as many as published" in capsys.readouterr().err
    publish(monkeypatch, folder, rows=sizes | {"test": 51}, ids=[*ids[:-1], None], total_ids=7)
    prepare_reczoo(folder, tmp_path / "more", progress=True)
    shown = capsys.readouterr().err
    assert "test: 50 rows, published are 51" in shown and f"{sum(ids)} ids in all, BARS has 7" in shown
    assert "city:" not in shown
    content = (folder / "test.csv").read_bytes()
    (folder / "test.csv").unlink()
    (folder / "test.csv.gz").write_bytes(gzip.compress(content))  # what is packed counts
    prepare_reczoo(folder, tmp_path / "packed")
    (folder / "test.csv.gz").write_bytes(gzip.compress(content.replace(b"\n", b"\r\n")))
    with pytest.raises(ValueError, match="test.csv.gz: its md5 is"):
        prepare_reczoo(folder, tmp_path / "crlf")
    (folder / "test.csv.gz").write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(ValueError, match="test.csv.gz: the gzip file is truncated"):
        prepare_reczoo(folder, tmp_path / "crlf")
    (folder / "test.csv.gz").unlink()
    pl.DataFrame(splits["test"]).write_parquet(folder / "test.parquet")
    prepare_reczoo(folder, tmp_path / "parquet", progress=True)
    assert "test.parquet: not checked, as no md5 is published of it" in capsys.readouterr().err


def test_published_facts_add_up() -> None:
    for name, facts in PUBLISHED.items():
        assert not facts.ids or len(facts.ids) == len(facts.categorical) + len(facts.lists), name
        assert facts.md5.keys() == facts.rows.keys(), name
        assert all(len(md5) == 32 for md5 in facts.md5.values()) and set("".join(facts.md5.values())) <= set(
            "0123456789abcdef"
        )
    rows = {name: sum(facts.rows.values()) for name, facts in PUBLISHED.items()}
    assert rows["Criteo_x1"] == rows["Criteo_x4_001"] == 45_840_617 and rows["Avazu_x1"] == rows["Avazu_x4_002"]
    assert rows["MovielensLatest_x1"] == 2_006_859 and rows["TaobaoAd_x1"] == 25_029_426

    def logistic_regression(name: str) -> int:
        """Its parameters: one a value kept, for all unseen values of a feature, for a dense feature, and a bias."""
        ids = [number for number in PUBLISHED[name].ids if number is not None]
        return sum(ids) - len(ids) + len(PUBLISHED[name].dense) + 1

    logged = {"Criteo_x1": 2_086_317, "Criteo_x4_001": 910_709, "Avazu_x1": 1_298_600, "Frappe_x1": 5_390}
    assert {name: logistic_regression(name) for name in logged} == logged
    assert logistic_regression("MovielensLatest_x1") == 90_240


@pytest.mark.parametrize(
    ("change", "config", "sentence"),
    [
        (None, Reczoo(), "no such folder"),
        ({}, Reczoo(), "in: not the name of a set of BARS; give --name, one of Criteo_x1, "),
        ({"rename": "Avazu_x4"}, Reczoo(), "which setting is meant. Give --name Avazu_x4_001 or --name Avazu_x4_002"),
        ({"test.csv": None}, Reczoo(columns=MINE), r"in: no test.csv \(or"),
        ({"test.csv.gz": b""}, Reczoo(columns=MINE), "test.csv and test.csv.gz are both there"),
        ({"valid.csv": None}, Reczoo(columns=MINE), "no valid.csv .* --valid-share 0.1 splits it off train"),
        ({}, Reczoo(columns=MINE, valid_share=0.1), "valid.csv validates: --valid-share is for folders without"),
        ({"valid.csv": b""}, Reczoo(columns=MINE), "valid.csv: the file is empty"),
        ({"valid.csv": b"clicked,x,user,item,seen\n"}, Reczoo(columns=MINE), "valid.csv: the file holds no rows"),
        (
            {"train.csv": b"clicked,x,user,item\n1,2,3,4\n"},
            Reczoo(columns=MINE),
            "train.csv: no column 'seen'; there are",
        ),
        ({"train.csv": b"a,b,c\n\0"}, Reczoo(columns=MINE), "train.csv: no column 'clicked'"),
        (
            {"train.csv": b"clicked,x,user,item,seen,seen\n1,2,3,4,5,6\n"},
            Reczoo(columns=MINE),
            "train.csv:1: column 'seen' occurs twice",
        ),
        ({"test.csv": b"PAR1 and so on"}, Reczoo(columns=MINE), "test.csv: the Parquet file is truncated or damaged"),
        ({"test.csv": b"clicked,x,user,item,seen\n1,2,3,4,5\n1,2"}, Reczoo(columns=MINE), "ends inside a row"),
    ],
)
def test_unusable_folders_get_one_sentence(
    tmp_path: Path, change: dict[str, Any] | None, config: Reczoo, sentence: str
) -> None:
    folder = tmp_path / "in"
    if change is not None:
        write(folder, mine, {"train": 60, "valid": 20, "test": 20})
        for name, content in change.items():
            if name == "rename":
                folder = folder.rename(tmp_path / content)
            elif content is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        prepare_reczoo(folder, tmp_path / "out", config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Reczoo("Criteo"), "name 'Criteo': one of Criteo_x1"),
        (lambda: Reczoo("Criteo_x1", MINE), "'Criteo_x1' has its columns"),
        (lambda: Reczoo(valid_share=1.0), "valid_share 1.0"),
        (lambda: Reczoo(seed=-1), "seed -1"),
        (lambda: replace(MINE, min_count=0), "min_count 0"),
        (lambda: replace(MINE, max_history=0), "max_history 0"),
        (lambda: replace(MINE, max_history=10**20), f"max_history {10**20}"),
        (lambda: replace(MINE, item="x"), "item: 'x' is none of the categorical columns user, item"),
        (lambda: replace(MINE, histories={"seen": "y"}), "seen: 'y' is none of the categorical columns"),
        (lambda: replace(MINE, dense=["user"]), "column 'user' is given two meanings"),
        (lambda: replace(MINE, dense=["clicked"]), "column 'clicked' is given two meanings"),
        (lambda: Columns("clicked"), "at least one categorical column"),
        (lambda: replace(MINE, derived={"user": ("upper", "user")}), "derived column 'user': upper"),
    ],
)
def test_options_that_make_no_sense(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_command(tmp_path: Path) -> None:
    write(tmp_path / "in", mine, {"train": 200, "test": 50})
    arguments = ["reczoo", str(tmp_path / "in"), str(tmp_path / "out"), "--label", "clicked", "--dense", "x"]
    arguments += ["--categorical", "user,item", "--sequence", "seen:item", "--group", "user", "--item", "item"]
    arguments += ["--min-count", "2", "--max-history", "3", "--valid-share", "0.25"]
    for _ in range(2):  # the second finds the same
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    data = PreparedDataset(tmp_path / "out")
    assert data.histories == {"seen": "item"} and data.dense_features == ["x"]
    assert max(map(len, data.read("train")["seen"].to_pylist())) == 3
    for wrong, sentence in (
        (["--label", "clicked", "--categorical", "user", "--sequence", "seen"], "--sequence 'seen': pairs"),
        (["--categorical", "user"], "its --label is needed as well"),
    ):
        with pytest.raises(ValueError, match=sentence):
            CliRunner().invoke(app, [*arguments[:3], *wrong], catch_exceptions=False)


def test_din_trains_on_amazon(tmp_path: Path) -> None:
    write(tmp_path / "AmazonElectronics_x1", amazon, {"train": 600, "test": 120})
    data = prepare_reczoo(tmp_path / "AmazonElectronics_x1", tmp_path / "out", Reczoo(check_md5=False))
    config = load_config(overrides=["model.name=din", "tables.method=hash", "tables.budget=50%", "training.epochs=1"])
    Trainer(config, data, tmp_path / "run").run()
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_text_keys_are_one_to_one() -> None:
    texts = ["5", "-5", "05", "+5", "0", "-0", "00000005", "0000000a", "0000000A", "deadbeef", "12345678", "é", "a^b"]
    texts += [str(2**40), str(2**40 - 1), str(1 - 2**40), str(2**63), "1e5", " 5", "5.0", "ffffffff", "-1234567"]
    keys = StringKeys()
    first = keys.keys_of(pl.Series(["x", *texts[:4], None], dtype=pl.String))
    found = keys.keys_of(pl.Series(texts))
    assert len(set(found.tolist())) == len(texts) and found[:4].tolist() == first[1:5].tolist()
    assert keys.texts_of(found).to_list() == texts and first[5] == -(2**63)
    assert keys.keys_of(pl.Series([5, -5, None])).tolist() == [found[0], found[1], -(2**63)]
    large = pl.Series([2**40, 5, 2**63], dtype=pl.UInt64)
    assert keys.keys_of(large).tolist() == [found[13], found[0], found[16]]
    assert keys.keys_of(pl.Series([], dtype=pl.String)).tolist() == []


def test_words_for_missing_values_of_a_set_of_one_s_own(tmp_path: Path) -> None:
    rows = "".join(f"{row % 2},{'NULL' if row % 3 else 'ann'},{'-' if row % 5 else 'tea'}\n" for row in range(200))
    for split in SPLITS:
        (tmp_path / f"{split}.csv").write_text("clicked,user,item\n" + rows)

    def values(out: str, *options: str) -> list[set[str]]:
        arguments = ["reczoo", str(tmp_path), str(tmp_path / out), "--label", "clicked", "--categorical", "user,item"]
        result = CliRunner().invoke(app, [*arguments, *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        data = PreparedDataset(tmp_path / out)
        return [set(raw_values(data, name)) & {"ann", "NULL", "tea", "-"} for name in ("user", "item")]

    assert values("plain") == [{"ann"}, {"tea", "-"}]
    assert values("more", "--missing=-") == [{"ann"}, {"tea"}]
    assert values("kept", "--keep-missing-words") == [{"ann", "NULL"}, {"tea", "-"}]
