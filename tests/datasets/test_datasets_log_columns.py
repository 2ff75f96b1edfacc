"""What the columns of a log are taken for: labels, missing values, large integers, numbers and lists."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from decoded import all_decoded, decoded
from typer.testing import CliRunner

from embtables._util.files import unsealed
from embtables.cli.prepare import app
from embtables.datasets import PreparedDataset
from embtables.datasets.dense_scale import Scale
from embtables.datasets.interaction_log import LogOptions
from embtables.datasets.key_column import KeyColumn
from embtables.datasets.missing import DOUBTFUL, WORDS, MissingValues
from embtables.datasets.negatives import Negatives
from embtables.datasets.readers.interactions import Interactions, prepare_interactions
from embtables.datasets.recognized import LABELS, choose_label

SIZE = 300
HISTORY_0 = LogOptions(history=0)


def log(**columns: object) -> pl.DataFrame:
    base = {
        "user_id": [f"u{row % 23}" for row in range(SIZE)],
        "item_id": [f"i{row * 5 % 31}" for row in range(SIZE)],
        "timestamp": [1_569_888_000 + row for row in range(SIZE)],
    }
    return pl.DataFrame(base | columns)


def write(path: Path, frame: pl.DataFrame) -> Path:
    frame.write_parquet(path) if path.suffix == ".parquet" else frame.write_csv(path)
    return path


def positives(data: PreparedDataset) -> Counter[float]:
    return Counter(row["label"] for row in all_decoded(data))


FILES = ["log.csv", "log.parquet"]
BINARY = [row % 3 == 0 for row in range(SIZE)]


# --- labels


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", ["click", "Label", "CLICKED", "is_click", "Is-Click", "y", "conversion"])
def test_a_column_with_the_name_of_a_label_is_the_label(
    tmp_path: Path, file: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / file, log(**{name: [int(of) for of in BINARY]}))
    data = prepare_interactions(source, tmp_path / "out", progress=True)
    assert positives(data) == {1.0: sum(BINARY), 0.0: SIZE - sum(BINARY)}
    assert data.manifest["positives"] == sum(BINARY)
    shown = capsys.readouterr().err
    assert f"NOTE column '{name}' is taken for the label, by its name: --label none makes every row a click" in shown
    without = prepare_interactions(source, tmp_path / "none", Interactions(label="none"))
    assert positives(without) == {1.0: SIZE, 0.0: SIZE}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("spelled", [("True", "False"), ("yes", "no"), ("1.0", "0.0"), ("1", "0")])
def test_labels_in_words(tmp_path: Path, file: str, spelled: tuple[str, str]) -> None:
    words = [spelled[0] if of else spelled[1] for of in BINARY]
    source = write(tmp_path / file, log(click=words, bought=words))
    with pytest.raises(
        ValueError,
        match="columns 'click' and 'bought' may each be the label: give --label click, --label bought or --label none",
    ):
        prepare_interactions(source, tmp_path / "out")
    data = prepare_interactions(source, tmp_path / "out", Interactions(label="bought"))
    assert positives(data) == {1.0: sum(BINARY), 0.0: SIZE - sum(BINARY)}


def test_a_column_that_is_used_otherwise_is_no_label(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", log(click=[int(of) for of in BINARY]))
    data = prepare_interactions(source, tmp_path / "out", Interactions(context=("click",)))
    assert positives(data) == {1.0: SIZE, 0.0: SIZE} and "click" in data.feature_names


def test_a_label_that_is_always_1_makes_clicks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "log.csv", log(click=[1] * SIZE))
    assert positives(prepare_interactions(source, tmp_path / "out", progress=True)) == {1.0: SIZE, 0.0: SIZE}
    assert "column 'click' is 1 in every row: every row is a click" in capsys.readouterr().err


def test_what_has_the_name_of_a_label_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stars = write(tmp_path / "stars.csv", log(label=[row % 5 + 1 for row in range(SIZE)]))
    with pytest.raises(
        ValueError, match="column 'label' has the name of a label, but not only 0 and 1 .the first value is 1"
    ):
        prepare_interactions(stars, tmp_path / "out")
    words = write(tmp_path / "words.csv", log(label=["jazz", "rock", "pop"] * 100, y=[None] * SIZE))
    assert positives(prepare_interactions(words, tmp_path / "out", progress=True)) == {1.0: SIZE, 0.0: SIZE}
    assert "column 'label' has the name of a label, but holds no 0 and 1: not used" in capsys.readouterr().err


def test_a_wrong_label_is_one_wrong_row(tmp_path: Path) -> None:
    labels = [str(int(of)) for of in BINARY]
    labels[7], labels[200] = "2", ""
    data = prepare_interactions(write(tmp_path / "log.csv", log(click=labels)), tmp_path / "out")
    assert data.manifest["rows_rejected"] == {"no valid label in 'click'": 2}


def test_every_name_of_a_label_is_plain() -> None:
    assert all(name == name.lower().replace("-", "_") for name in LABELS) and len(set(LABELS)) == len(LABELS)
    for name in LABELS:
        assert choose_label(Path("x"), [pl.Series(name, [0, 1, None])])[0] == name


def test_ratings_left_out(tmp_path: Path) -> None:
    stars = [row % 5 + 1 for row in range(SIZE)]
    source = write(tmp_path / "log.csv", log(stars=stars))
    data = prepare_interactions(
        source, tmp_path / "out", Interactions(label="stars", positive_from=4, leave_out=(3.0,))
    )
    assert positives(data) == {1.0: 120, 0.0: 120} and data.manifest["rows_left_out"] == 60
    with pytest.raises(ValueError, match="leave_out needs a label column"):
        Interactions(leave_out=(3.0,))


# --- missing values


@pytest.mark.parametrize("file", FILES)
def test_missing_values_are_the_same_in_every_format(
    tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["", *WORDS]
    devices = [words[row % len(words)] if row % 2 else "phone" for row in range(SIZE)]
    users = ["NULL" if row in (5, 9) else f"u{row % 23}" for row in range(SIZE)]
    items = ["" if row == 7 else f"i{row % 31}" for row in range(SIZE)]
    source = write(tmp_path / file, log(device=devices, user_id=users, item_id=items))
    options = ["--context", "device", "--max-rejected", "0.05"]
    result = CliRunner().invoke(app, ["interactions", str(source), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    data = PreparedDataset(tmp_path / "out")
    assert data.manifest["rows_rejected"] == {"no user ('user_id' is empty)": 2, "no item ('item_id' is empty)": 1}
    place = f"{source}:7" if file == "log.csv" else f"{source}, row 6"
    assert f"2 rows rejected: no user ('user_id' is empty) (first {place}: 'NULL')" in result.output
    assert "column 'device': category, 50.0% missing" in result.output
    found = Counter(row["device"] for row in all_decoded(data) if row["label"])
    assert found == {"phone": 150, None: 147} and data.num_embeddings["device"] == 3


def test_missing_numbers_of_parquet(tmp_path: Path) -> None:
    users = [math.nan if row == 3 else float(row % 23) for row in range(SIZE)]
    source = write(tmp_path / "log.parquet", log(user_id=users))
    data = prepare_interactions(source, tmp_path / "out")
    assert data.manifest["rows_rejected"] == {"no user ('user_id' is empty)": 1} and data.manifest["users"] == 23


@pytest.mark.parametrize("file", FILES)
def test_further_words_for_missing_values(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    devices = ["unknown" if row % 3 else "NA" if row % 2 else "phone" for row in range(SIZE)]
    source = write(tmp_path / file, log(device=devices))

    def values(name: str, **options: object) -> tuple[set[object], str]:
        config = Interactions(context=("device",), **options)  # type: ignore[arg-type]
        data = prepare_interactions(source, tmp_path / name, config, progress=True)
        return {row["device"] for row in all_decoded(data)}, capsys.readouterr().err

    found, shown = values("plain")
    assert found == {"unknown", "phone", None}
    assert "column 'device': 67% of the values are 'unknown', which is read as a value" in shown
    assert "if it means a missing one, give --missing=unknown" in shown
    assert (
        "column 'device': 17% of the values are 'NA', which is read as a missing value (--keep-missing-words" in shown
    )
    assert values("more", missing=("unknown", "tablet"))[0] == {"phone", None}
    assert values("kept", keep_missing_words=True)[0] == {"unknown", "phone", "NA"}


def test_words_for_missing_values_do_not_meet_those_in_doubt() -> None:
    assert not set(WORDS) & set(DOUBTFUL)
    found = MissingValues().removed(pl.Series("x", [*WORDS, *DOUBTFUL, "", None]))
    assert found.to_list() == [None] * len(WORDS) + list(DOUBTFUL) + [None, None]


# --- integers


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (pl.UInt64, [2**63 + 5, 2**64 - 1, 7, 0]),
        (pl.UInt64, [2**63, 2**63 + 1, 1, 2**63 - 1]),
        (pl.UInt64, [3, 1, 4]),
        (pl.Int64, [-(2**63), 2**63 - 1, -1, 0]),
        (pl.Int64, [-5, 5]),
        (pl.Int8, [-128, 127]),
    ],
)
def test_integers_keep_their_values(tmp_path: Path, dtype: type[pl.DataType], values: list[int]) -> None:
    column = KeyColumn()
    blocks = [values[-1:], values, values[::-1], values[:1]]
    for block in blocks:
        column.add(pl.Series([*block, None], dtype=dtype))
    keys = column.take_keys()
    expected = [value for block in blocks for value in (*block, None)]
    present = np.array([value is not None for value in expected])
    assert column.values(keys[present]).to_list() == [value for value in expected if value is not None]
    assert len(set(keys.tolist())) == len(values) + 1 and len(set(keys[~present])) == 1

    source = write(
        tmp_path / "log.parquet",
        log(user_id=pl.Series([values[row % len(values)] for row in range(SIZE)], dtype=dtype)),
    )
    data = prepare_interactions(source, tmp_path / "out")
    found = Counter(row["user_id"] for row in all_decoded(data) if row["label"])
    assert found == Counter(values[row % len(values)] for row in range(SIZE))
    assert data.manifest["rows_rejected"] == {}


# --- numbers


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("scale", ["standard", "log", "none"])
def test_dense_columns(tmp_path: Path, file: str, scale: str) -> None:
    prices = [None if row % 10 == 4 else (row * 7 % 50) / 4 - 2 for row in range(SIZE)]
    source = write(tmp_path / file, log(price=prices, click=[int(of) for of in BINARY]))
    options = LogOptions(split="time", history=0, dense_scale=scale)  # type: ignore[arg-type]
    data = prepare_interactions(source, tmp_path / "out", Interactions(dense=("price",), log=options))
    assert data.dense_features == ["price"] and "price" not in data.feature_names
    cut = data.num_rows("train")
    train = np.array([price for price in prices[:cut] if price is not None])

    def scaled(price: float) -> float:
        if scale == "log":
            return math.log(1 + max(price, 0))
        return (price - float(np.mean(train))) / float(np.std(train)) if scale == "standard" else price

    fill = float(np.mean([scaled(price) for price in train]))
    expected = [fill if price is None else scaled(price) for price in prices]
    found = [row["price"] for split in ("train", "valid", "test") for row in decoded(data, split)]
    assert len(found) == SIZE
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    facts = data.manifest["dense"]["price"]
    assert (facts["kind"], facts["missing"]) == (scale, prices[:cut].count(None))
    assert facts["fill"] == pytest.approx(fill, abs=1e-9)


def test_a_dense_column_of_one_value_or_none() -> None:
    for values in ([3.0, 3.0, math.nan], [math.nan, math.nan]):
        scale = Scale.of(np.array(values), "standard")
        assert scale.apply(np.array(values)).tolist() == [0.0] * len(values) and scale.deviation == 1
    with pytest.raises(ValueError, match="dense_scale 'minmax': one of standard, log, none is needed"):
        LogOptions(dense_scale="minmax")  # type: ignore[arg-type]


def test_dense_values_that_are_none(tmp_path: Path) -> None:
    prices = [str(row) for row in range(SIZE)]
    prices[3], prices[4], prices[5], prices[6] = "cheap", "inf", "1e39", "NA"
    source = write(tmp_path / "log.csv", log(price=prices))
    with pytest.raises(ValueError, match=r"log.csv:5: 'price' is not a number \('cheap'\); 3 of 300"):
        prepare_interactions(source, tmp_path / "out", Interactions(dense=("price",), max_rejected=0.005))
    data = prepare_interactions(source, tmp_path / "out", Interactions(dense=("price",), max_rejected=0.05))
    assert data.manifest["rows_rejected"] == {"'price' is not a number": 3}


# --- lists


LISTS = [[f"t{number}" for number in range(row % 4)] for row in range(SIZE)]
WRITTEN = {
    "bars": ["|".join(of) for of in LISTS],
    "commas": [",".join(of) for of in LISTS],
    "spaces": [" ".join(of) for of in LISTS],
    "python": [str(of) for of in LISTS],
    "json": [str(of).replace("'", '"') for of in LISTS],
    "braces": ["{" + ",".join(of) + "}" for of in LISTS],
    "with gaps": ["; ".join([*of, "NULL"]) for of in LISTS],
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("form", WRITTEN)
def test_lists_in_text(tmp_path: Path, file: str, form: str) -> None:
    source = write(tmp_path / file, log(tags=WRITTEN[form]))
    data = prepare_interactions(source, tmp_path / "out", Interactions(lists=("tags",), log=LogOptions(history=2)))
    assert data.list_features == ["tags"] and data.num_embeddings["tags"] == 2 + 3
    rows = [row for row in all_decoded(data) if row["label"]]
    assert Counter(tuple(row["tags"]) for row in rows) == Counter(map(tuple, LISTS))


@pytest.mark.parametrize("inner", [pl.String, pl.Int32, pl.UInt64, pl.Categorical])
def test_lists_of_parquet(tmp_path: Path, inner: type[pl.DataType]) -> None:
    numbers = [[2**40 % (tag + 3) for tag in range(len(of))] for of in LISTS]
    values = numbers if inner in (pl.Int32, pl.UInt64) else LISTS
    column = pl.Series(values).cast(pl.List(inner)).set(pl.Series([row % 8 == 0 for row in range(SIZE)]), None)
    source = write(tmp_path / "log.parquet", log(tags=column))
    data = prepare_interactions(source, tmp_path / "out", Interactions(lists=("tags",)))
    rows = [row for row in all_decoded(data) if row["label"]]
    assert Counter(tuple(row["tags"]) for row in rows) == Counter(
        tuple(of) if row % 8 else () for row, of in enumerate(values)
    )
    # a negative shares the lists of its click
    assert Counter(tuple(row["tags"]) for row in all_decoded(data) if not row["label"]) == Counter(
        tuple(row["tags"]) for row in rows
    )


def test_a_separator_of_lists_that_is_given(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", log(tags=["a,b/c,d"] * SIZE))
    data = prepare_interactions(source, tmp_path / "out", Interactions(lists=("tags",), list_separator="/"))
    assert {tuple(row["tags"]) for row in all_decoded(data)} == {("a,b", "c,d")}


@pytest.mark.parametrize("role", ["user", "item", "time", "label", "context", "dense"])
def test_lists_where_one_value_is_needed(tmp_path: Path, role: str) -> None:
    source = write(tmp_path / "log.parquet", log(tags=LISTS, more=[{"a": 1}] * SIZE))
    for name, sentence in (
        ("tags", f"log.parquet: column 'tags' holds lists and cannot be --{role}; --lists tags takes it"),
        ("more", rf"log.parquet: column 'more' is of type Struct.* and cannot be --{role}: one value is needed"),
    ):
        given = {role: (name,) if role in ("context", "dense") else name}
        with pytest.raises(ValueError, match=sentence):
            prepare_interactions(source, tmp_path / "out", Interactions(**given))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="column 'more' is of type Struct.*, where lists or text are needed"):
        prepare_interactions(source, tmp_path / "out", Interactions(lists=("more",)))


def test_categories_that_are_rather_numbers_or_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = 3000
    frame = pl.DataFrame(
        {
            "user_id": [row % 50 for row in range(size)],
            "item_id": [row % 70 for row in range(size)],
            "timestamp": range(size),
            "price": [row / 8 for row in range(size)],
            "stock": [row % 1500 for row in range(size)],
            "tags": [f"t{row % 31},t{row % 5}" for row in range(size)],
            "device": [f"d{row % 3}" for row in range(size)],
        }
    )
    config = Interactions(context=("price", "stock", "tags", "device"), log=HISTORY_0)
    for file in FILES:
        prepare_interactions(write(tmp_path / file, frame), tmp_path / f"{file}-out", config, progress=True)
        shown = capsys.readouterr().err
        assert "context column 'price' has 3,000 different numbers: if quantities, give --dense price" in shown
        assert "context column 'stock' has 1,500 different numbers: if quantities, give --dense stock" in shown
        assert "context column 'tags' has ',' in most values: if they are lists, give --lists tags" in shown
        assert "context column 'device'" not in shown


# --- headers, times that are not there, messages


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        ("7,8,1569888000\n1,0,1569888001\n", {}, "log:1: the first line looks like a row and not like a header .7, 8"),
        ("0,0,1569888000\n1,0,1569888001\n", {}, "--columns user_id,item_id,timestamp"),
        ("0,0,1569888000\n", {"user": "uid"}, "log:1: the first line looks like a row"),
        ("user,item,time\n1,2,\xe9\n", {}, "log:2: not utf-8 text .byte 0xe9.; --encoding, e.g. latin-1"),
        ("user~item\n1~2\n", {}, "log:1: a header with at least user, item and time is needed.*--separator"),
        ("user,item,x\n1,2,3\n", {}, "which column is the time.*--history 0. needs none"),
        ("user,item,time,x\n1,2,3,4\n", {"dense": ("user_id",)}, "'user_id' and 'item_id' are features already"),
        ("user,item,time,x\n1,2,3,4\n", {"dense": ("x",), "lists": ("x",)}, "column 'x' is given twice"),
        ("user,item,time,x\n1,2,3,4\n", {"encoding": "klingon"}, "encoding 'klingon': unknown"),
        *(
            ("user,item,time\n1,2,3\n", {"encoding": name}, f"encoding .{name}.: unknown")
            for name in ("base64", "zip", "hex", "idna")
        ),
        ("user,item,time\n1,2,3\n", {"columns": ("a", "a")}, "columns a,a: a name is given twice"),
        ("user,item,time\n1,2,03/04/2019\n", {}, "the time '03/04/2019' may be day/month or month/day"),
        ("user,item,time\n1,2,3\n", {"time_format": "%Q"}, "no valid time in 'time'|not a format of times"),
    ],
)
def test_messages_name_what_mends_it(tmp_path: Path, content: str, options: dict, sentence: str) -> None:
    (tmp_path / "log").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=sentence):
        prepare_interactions(tmp_path / "log", tmp_path / "out", Interactions(**options))


def test_columns_that_are_not_used_may_be_doubled(tmp_path: Path) -> None:
    lines = ["user,x,item,time,x", *(f"{row % 23},a,{row % 31},{row},b" for row in range(SIZE))]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    assert prepare_interactions(tmp_path / "log.csv", tmp_path / "out").manifest["users"] == 23
    with pytest.raises(ValueError, match="log.csv:1: column 'x' occurs twice"):
        prepare_interactions(tmp_path / "log.csv", tmp_path / "other", Interactions(context=("x",)))


@pytest.mark.parametrize("given", ["absent", "none"])
def test_a_log_without_times(tmp_path: Path, given: str) -> None:
    frame = log() if given == "none" else log().drop("timestamp")
    source = write(tmp_path / "log.csv", frame)
    config = Interactions(time="none" if given == "none" else None, negatives=Negatives(2), log=HISTORY_0)
    data = prepare_interactions(source, tmp_path / "out", config)
    assert positives(data) == {1.0: SIZE, 0.0: 2 * SIZE - data.manifest["negatives_absent"]}
    assert data.manifest["negatives_beyond_window"] == 0 and "first_time" not in data.manifest
    for options in (LogOptions(history=3), LogOptions("time", history=0)):
        with pytest.raises(ValueError, match="which column is the time"):
            prepare_interactions(source, tmp_path / "other", Interactions(time=config.time, log=options))
    with pytest.raises(ValueError, match="which column is the time"):
        prepare_interactions(source, tmp_path / "other", Interactions(time=config.time, log=HISTORY_0, days=1.0))


def test_data_that_an_earlier_version_prepared_is_reused(tmp_path: Path) -> None:
    import json

    source = write(tmp_path / "log.csv", log())
    data = prepare_interactions(source, tmp_path / "out")
    manifest = json.loads((data.path / "manifest.json").read_text())
    for name in ("dense", "lists", "list_separator", "missing", "keep_missing_words", "columns", "encoding"):
        del manifest["config"][name]
    for name in ("without", "dense_scale"):
        del manifest["config"]["log"][name]
    (data.path / "manifest.json").write_text(json.dumps(unsealed(manifest)))  # earlier versions wrote no checksum
    before = (data.path / "manifest.json").stat().st_mtime_ns
    assert prepare_interactions(source, tmp_path / "out").path.joinpath("manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"out was prepared with missing = None, not \['-'\]"):
        prepare_interactions(source, tmp_path / "out", Interactions(missing=("-",)))
