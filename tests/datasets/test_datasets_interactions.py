"""Interaction logs: negatives, histories, splits and spans, against loops; every way to be wrong."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from embtables.datasets import PreparedDataset
from embtables.datasets.interaction_log import LogOptions
from embtables.datasets.negatives import Negatives, draw_negatives
from embtables.datasets.options import parse_duration
from embtables.datasets.readers.interactions import Interactions, prepare_interactions

HOUR = 3_600_000
START = 1_506_826_800_000


def clicks(count: int = 2000, seed: int = 0) -> pl.DataFrame:
    generator = random.Random(seed)
    times = sorted(START + generator.randrange(0, 72 * HOUR, 60_000) for _ in range(count))
    generator.shuffle(times)
    return pl.DataFrame(
        {
            "user_id": [generator.randrange(1000, 1150) for _ in range(count)],
            "article_id": [int(generator.paretovariate(0.8)) % 4000 for _ in range(count)],
            "timestamp_ms": times,
            "device": [generator.choice(["phone", "tablet", None]) for _ in range(count)],
            "session": list(range(count)),
        }
    )


def write(path: Path, frame: pl.DataFrame) -> Path:
    frame.write_parquet(path) if path.suffix == ".parquet" else frame.write_csv(path)
    return path


def raw(data: PreparedDataset, feature: str) -> dict[int, object]:
    number = data.feature_names.index(feature)
    values = pl.read_parquet(data.path / "vocabulary" / f"{number:05d}.parquet")["value"].to_list()
    return {0: None, 1: "unseen"} | dict(enumerate(values, 2))


def examples(data: PreparedDataset) -> dict[str, list[dict]]:
    return {split: pl.DataFrame(pl.from_arrow(data.read(split))).to_dicts() for split in ("train", "valid", "test")}


# --- negatives


@pytest.mark.parametrize("per_click", [1, 3])
def test_negatives_against_loops(per_click: int) -> None:
    log = clicks().sort("timestamp_ms")
    users = log["user_id"].to_numpy() - 1000
    items = np.unique(log["article_id"], return_inverse=True)[1]
    times = log["timestamp_ms"].to_numpy()
    drawn, notes = draw_negatives(users, items, times, Negatives(per_click, "popularity", 6 * HOUR), seed=1)
    clicked = defaultdict(set)
    for user, item in zip(users, items):
        clicked[user].add(item)
    outside = 0
    for row in range(len(items)):
        window = {items[j] for j in range(len(items)) if times[row] - 6 * HOUR <= times[j] < times[row]}
        mine = [item for item in drawn[row] if item >= 0]
        assert len(set(mine)) == len(mine)
        assert not set(mine) & clicked[users[row]]
        outside += sum(item not in window for item in mine)
    assert outside <= notes["negatives_beyond_window"] < len(items) * per_click * 0.05
    assert (drawn < 0).sum() == notes["negatives_absent"] == 0
    again, _ = draw_negatives(users, items, times, Negatives(per_click, "popularity", 6 * HOUR), seed=1)
    other, _ = draw_negatives(users, items, times, Negatives(per_click, "popularity", 6 * HOUR), seed=2)
    assert np.array_equal(drawn, again) and not np.array_equal(drawn, other)


def test_popularity_follows_the_clicks_and_uniform_does_not() -> None:
    generator = np.random.default_rng(0)
    users = np.arange(40_000)  # everybody clicks once: nothing but the own item is refused
    items = generator.choice(4, 40_000, p=[0.55, 0.25, 0.15, 0.05])
    items[:4] = np.arange(4)
    times = np.arange(40_000)
    for rule, shares in (
        (Negatives(1, "popularity", None), [0.55, 0.25, 0.15, 0.05]),
        (Negatives(1, "uniform"), [0.25] * 4),
    ):
        drawn, _ = draw_negatives(users, items, times, rule, seed=0)
        for own in range(4):
            found = np.bincount(drawn[items == own, 0], minlength=4) / (items == own).sum()
            weights = np.array([share if item != own else 0 for item, share in enumerate(shares)])
            assert np.allclose(found, weights / weights.sum(), atol=0.05)


def test_the_window_forgets_old_items() -> None:
    users = np.arange(2000)
    items = np.r_[np.tile([0, 1], 500), np.tile([2, 3], 500)]
    times = np.arange(2000) * 1000
    drawn, _ = draw_negatives(users, items, times, Negatives(1, "popularity", 100_000), seed=0)
    assert set(drawn[200:1000, 0]) == {0, 1}
    assert set(drawn[1102:, 0]) == {2, 3}


def test_a_user_who_clicked_everything_gets_no_negative(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user": [1] * 30 + list(range(2, 32)), "item": list(range(30)) * 2, "time": range(60)})
    source = write(tmp_path / "log.csv", frame)
    data = prepare_interactions(source, tmp_path / "out", Interactions(log=LogOptions(shares=(0.4, 0.3, 0.3))))
    assert data.manifest["negatives_absent"] == 30
    rows = sum(examples(data).values(), [])
    assert Counter(row["label"] for row in rows) == {1.0: 60, 0.0: 30}


# --- examples


@pytest.mark.parametrize("split", ["random", "time", "leave-last-out"])
def test_examples_against_loops(tmp_path: Path, split: str) -> None:
    log = clicks()
    source = write(tmp_path / "log.parquet", log)
    config = Interactions(
        context=("device",), negatives=Negatives(2, "popularity", HOUR), log=LogOptions(split=split, history=5, seed=3)
    )
    data = prepare_interactions(source, tmp_path / "out", config)
    assert data.feature_names == ["user_id", "item_id", "device"]
    assert (data.group_feature, data.slice_feature) == ("user_id", "item_id")
    users, items, devices = raw(data, "user_id"), raw(data, "item_id"), raw(data, "device")
    rows = log.with_row_index().sort("timestamp_ms", maintain_order=True).to_dicts()
    found = examples(data)
    assert sum(map(len, found.values())) == 3 * len(log)

    # every example is a click or one of its negatives, in the order of time
    place = {name: 0 for name in found}
    groups: dict[int, int] = {}
    counts = {name: Counter() for name in data.feature_names}
    split_of = {}
    for click in rows:
        candidates = [
            name
            for name in found
            if place[name] < len(found[name]) and items[found[name][place[name]]["item_id"]] == click["article_id"]
        ]
        candidates = candidates or [name for name in found if place[name] < len(found[name])]
        for name in candidates:
            block = found[name][place[name] : place[name] + 3]
            same_user = users[block[0]["user_id"]] in (click["user_id"], "unseen")
            same_item = items[block[0]["item_id"]] in (click["article_id"], "unseen")
            if same_user and same_item and groups.get(click["user_id"], block[0]["_group"]) == block[0]["_group"]:
                break
        else:
            raise AssertionError(f"no example for {click}")
        place[name] += 3
        split_of[click["index"]] = name
        groups[click["user_id"]] = block[0]["_group"]
        assert [row["label"] for row in block] == [1.0, 0.0, 0.0]
        history = [
            earlier["article_id"]
            for earlier in rows
            if earlier["user_id"] == click["user_id"] and earlier["timestamp_ms"] < click["timestamp_ms"]
        ][-5:]
        for row in block:
            assert row["_group"] == block[0]["_group"] and row["user_id"] == block[0]["user_id"]
            assert devices[row["device"]] == click["device"]
            assert len(row["history"]) == len(history)
            assert all(items[i] in (item, "unseen") for i, item in zip(row["history"], history))
        if name == "train":
            for row in block:
                for feature in counts:
                    counts[feature][row[feature]] += 1
    assert len(set(groups.values())) == len(groups)
    # vocabulary and frequencies are those of the training examples
    for feature, counter in counts.items():
        assert data.frequencies[feature].tolist() == [counter[i] for i in range(data.num_embeddings[feature])]
    sizes = Counter(split_of.values())
    if split == "time":
        order = [split_of[row["index"]] for row in rows]
        assert order == sorted(order, key=["train", "valid", "test"].index)
    if split == "leave-last-out":
        many = sum(count >= 3 for count in Counter(log["user_id"]).values())
        assert sizes["test"] == sizes["valid"] == many
    else:
        assert abs(sizes["train"] / len(log) - 0.8) < 0.03


def test_csv_parquet_gzip_and_other_spellings_give_the_same_examples(tmp_path: Path) -> None:
    log = clicks(500)
    config = Interactions(context=("device",))
    reference = prepare_interactions(write(tmp_path / "a.parquet", log), tmp_path / "a", config)
    texts = {
        "csv": log.write_csv(),
        "quoted": log.write_csv(quote_style="always", null_value="").replace('""', ""),
        "semicolon": log.write_csv(separator=";"),
        "crlf": log.write_csv(line_terminator="\r\n"),
        "tab": log.rename({"user_id": "user_id:token", "article_id": "article_id:token"}).write_csv(separator="\t"),
        "iso": log.with_columns(pl.from_epoch("timestamp_ms", "ms").dt.to_string("iso:strict")).write_csv(),
    }
    assert texts["iso"].splitlines()[1].split(",")[2].startswith("2017-10-0")
    for name, text in texts.items():
        (tmp_path / f"{name}.csv").write_text(text, newline="")
        data = prepare_interactions(tmp_path / f"{name}.csv", tmp_path / name, config)
        for split in ("train", "valid", "test"):
            # text ids of equal frequency are numbered in the order in which they come, integers by size
            assert data.num_rows(split) > 0
        for feature in data.feature_names:
            assert data.num_embeddings[feature] > 2
        if name != "csv":
            first = examples(PreparedDataset(tmp_path / "csv"))
            assert examples(data) == first, name
    assert sum(reference.num_rows(split) for split in ("train", "valid", "test")) == 1000


def test_labels_and_thresholds(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"uid": [1, 1, 1, 1, 2, 2] * 20, "sku": list(range(6)) * 20, "ts": range(120), "stars": [5, 1, 4, 3, 2, 5] * 20}
    )
    source = write(tmp_path / "log.csv", frame)
    columns = dict(user="uid", item="sku", time="ts")
    data = prepare_interactions(source, tmp_path / "out", Interactions(**columns, label="stars", positive_from=4.0))
    rows = sum(examples(data).values(), [])
    assert Counter(row["label"] for row in rows) == {1.0: 60, 0.0: 60}
    items = raw(data, "item_id")
    assert {items[i] for row in rows for i in row["history"]} == {"0", "2", "5"}  # only positives are history
    with pytest.raises(ValueError, match=r"log.csv:2: no valid label in 'stars' \('5'\); 100 of 120 rows"):
        prepare_interactions(source, tmp_path / "out2", Interactions(**columns, label="stars"))


def test_span(tmp_path: Path) -> None:
    log = clicks(3000)
    source = write(tmp_path / "log.parquet", log)
    first = log["timestamp_ms"].min()
    day = 24 * HOUR
    second_day = datetime.fromtimestamp((START + day) / 1000, timezone.utc).replace(tzinfo=None).isoformat()
    cases = [
        (dict(days=1.0), first, first + day),
        (dict(start=second_day, days=0.5), START + day, START + 1.5 * day),
        (dict(start=str(START + day), end=str(START + 2 * day)), START + day, START + 2 * day),
        (dict(end=second_day), 0, START + day),
    ]
    for number, (options, low, high) in enumerate(cases):
        data = prepare_interactions(source, tmp_path / str(number), Interactions(**options))
        inside = log.filter((pl.col("timestamp_ms") >= low) & (pl.col("timestamp_ms") < high))
        assert data.manifest["rows_in_span"] == len(inside) > 100
        assert data.manifest["rows_read"] == 3000
    with pytest.raises(ValueError, match="no row lies in the chosen span; the log goes from 2017-10-01T"):
        prepare_interactions(source, tmp_path / "none", Interactions(start="2020-01-01"))
    with pytest.raises(ValueError, match="from 'soon': a number or an ISO date"):
        prepare_interactions(source, tmp_path / "none", Interactions(start="soon"))


def test_no_history_column(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", clicks(300))
    data = prepare_interactions(source, tmp_path / "out", Interactions(log=LogOptions(history=0)))
    assert "history" not in data.read("train").column_names and data.manifest["histories"] == []


def test_many_columns_are_not_all_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = (
        clicks(50)
        .select("user_id", "article_id", "timestamp_ms")
        .with_columns(pl.lit(0).alias(f"unused_{number}") for number in range(500))
    )
    prepare_interactions(write(tmp_path / "log.csv", log), tmp_path / "out", progress=True)
    assert ", unused_19 and 480 more\n" in capsys.readouterr().err


def test_malformed_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = clicks(1000).write_csv().splitlines()
    lines[10] = "1,2"
    lines[11] = ",5," + str(START) + ",phone,1"
    lines[12] = "7,," + str(START) + ",phone,1"
    lines[13] = "7,5,,phone,1"
    source = tmp_path / "log.csv"
    source.write_text("\n".join(lines) + "\n")
    data = prepare_interactions(source, tmp_path / "out", progress=True)
    assert data.manifest["rows_read"] == 1000
    assert data.manifest["rows_rejected"] == {
        "not 5 columns": 1,
        "no user ('user_id' is empty)": 1,
        "no item ('article_id' is empty)": 1,
        "no valid time in 'timestamp_ms'": 1,
    }
    assert f"1 rows rejected: no item ('article_id' is empty) (first {source}:13)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="4 of 1,000 rows read are malformed, more than the allowed 0.300%"):
        prepare_interactions(source, tmp_path / "out2", Interactions(max_rejected=0.003))


def damaged_parquet(path: Path) -> None:
    write(path.with_suffix(".parquet"), clicks(1000))
    path.write_bytes(path.with_suffix(".parquet").read_bytes()[:-50])


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        ("", {}, "log: the file is empty"),
        ("a,b\n1,2\n", {}, "log:1: a header with at least user, item and time is needed"),
        ("user,item,time\n", {}, "log: the file holds no rows"),
        ("who,item,time\n1,2,3\n", {}, "which column is the user\\? Give --user, one of who, item, time"),
        ("user,item,time\n1,2,3\n", {"item": "sku"}, "no column 'sku'; there are user, item, time"),
        ("user,item,time\n1,2,3\n", {"context": ("age",)}, "no column 'age'"),
        ("user,item,item,time\n1,2,2,3\n", {}, "log:1: column 'item' occurs twice"),
        ("user,item,time\n1,2,3\n1,2\n", {}, r"log:3 \(2 columns\): not 3 columns; 1 of 2 rows"),
        ("user,item,time\n1,2,3\n1,2", {}, "log:3: the file ends inside a row"),
        ("user,item,time\n1,2,3\n1,\0,3\n", {}, "log:3: a NUL byte"),
        ("user,item,time\n1,2,3\n", {"user": "item"}, "column 'item' cannot be both the user and the item"),
        ("user,item,time\n1,2,3\n", {"start": "inf"}, "from 'inf': a number or an ISO date"),
        (
            "user,item,time\n1,2,noon\n",
            {},
            r"log:2: no valid time in 'time' \('noon'\); .*: times that are read are seconds",
        ),
    ],
)
def test_bad_files(tmp_path: Path, content: str, options: dict, sentence: str) -> None:
    (tmp_path / "log").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        prepare_interactions(tmp_path / "log", tmp_path / "out", Interactions(**options))
    assert not (tmp_path / "out").exists()


def test_damaged_parquet(tmp_path: Path) -> None:
    damaged_parquet(tmp_path / "log")
    with pytest.raises(ValueError, match="log: the Parquet file is truncated or damaged"):
        prepare_interactions(tmp_path / "log", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(days=0.0), "days 0.0"),
        (dict(days=float("inf")), "days inf"),
        (dict(days=1.0, end="3"), "both days and an end"),
        (dict(positive_from=4.0), "needs a label"),
        (dict(negatives=Negatives(0)), "at least 1 negative"),
        (dict(context=("a", "a")), "'a' is given twice"),
    ],
)
def test_bad_options(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Interactions(**options)


def test_durations() -> None:
    assert [parse_duration(text) for text in ("90s", "30m", "1h", "2d", "0.5h", "all")] == [
        *(90_000, 1_800_000, 3_600_000, 172_800_000, 1_800_000),
        None,
    ]
    for text in ("soon", f"{10**20}d"):
        with pytest.raises(ValueError, match=f"duration '{text}'"):
            parse_duration(text)


def test_column_names_with_separators_and_colons(tmp_path: Path) -> None:
    rows = "".join(f'u{i % 9},"i{i * 7 % 31}",{1700000000 + i},x{i % 3},y{i % 2}\n' for i in range(300))
    (tmp_path / "log.csv").write_text('"user_id",item_id:token,timestamp:float,"size, in cm",os:name\n' + rows)
    context = ("size, in cm", "os:name")
    data = prepare_interactions(tmp_path / "log.csv", tmp_path / "out", Interactions(context=context))
    assert data.feature_names == ["user_id", "item_id", *context]
    assert set(raw(data, "size, in cm").values()) == {None, "unseen", "x0", "x1", "x2"}


@pytest.mark.data
def test_a_day_of_globo(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "globo" / "clicks.parquet"
    if not source.is_file():
        pytest.skip(f"{source} is absent")
    data = prepare_interactions(source, tmp_path / "out", Interactions(days=1.0, context=("os", "region")))
    log = pl.read_parquet(source)
    first = log["timestamp_ms"].min()
    day = log.filter(pl.col("timestamp_ms") < first + 24 * HOUR)
    assert data.manifest["rows_read"] == len(log) and data.manifest["rows_in_span"] == len(day)
    total = sum(data.num_rows(split) for split in ("train", "valid", "test"))
    assert total == 2 * len(day) - data.manifest["negatives_absent"]
    positives = pl.DataFrame(pl.from_arrow(data.read("train"))).filter(pl.col("label") == 1)
    assert len(positives) == pytest.approx(0.8 * len(day), rel=0.01)
