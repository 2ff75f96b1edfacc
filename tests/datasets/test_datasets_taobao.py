"""Taobao's UserBehavior.csv: examples against a loop over the log, every way to be wrong."""

from __future__ import annotations

import gzip
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from decoded import all_decoded, decoded, train_din

from embtables.datasets.interaction_log import LogOptions
from embtables.datasets.negatives import Negatives
from embtables.datasets.readers.taobao import FIRST, PAST, Taobao, prepare_taobao

Row = tuple[int, int, int, str, int]
UNIFORM = Negatives(2, "uniform", None)


def log(seed: int = 0) -> list[Row]:
    generator = random.Random(seed)
    rows = []
    for _ in range(1500):
        item = int(generator.paretovariate(0.7)) % 400
        time = FIRST + generator.randrange(0, PAST - FIRST, 3600)  # many at one instant
        behavior = generator.choice(["pv", "pv", "pv", "buy", "cart", "fav"])
        rows.append((generator.randrange(60), item + 10**6, item % 13, behavior, time))
    return rows


def write(path: Path, rows: list[Row], end: str = "\n") -> Path:
    text = "".join(",".join(map(str, row)) + end for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("split", ["time", "leave-last-out", "random"])
@pytest.mark.parametrize("behaviors", [("pv",), ("buy", "cart")])
def test_examples_against_a_loop(tmp_path: Path, split: str, behaviors: tuple[str, ...]) -> None:
    source = write(tmp_path / "UserBehavior.csv", log())
    config = Taobao(behaviors, negatives=UNIFORM, log=LogOptions(split, history=4))
    data = prepare_taobao(source, tmp_path / "out", config)
    assert data.feature_names == ["user_id", "item_id", "category_id"]
    assert data.histories == {"history": "item_id", "category_id_history": "category_id"}
    rows = sorted((row for row in log() if row[3] in behaviors), key=lambda row: row[4])
    mine = defaultdict(list)
    for user, item, _, _, time in rows:
        mine[user].append((time, item))
    users = sorted(mine)
    examples = {name: decoded(data, name) for name in ("train", "valid", "test")}
    if split == "time":
        past = rows[int(0.8 * len(rows))][4]
        assert data.num_rows("train") == 3 * sum(row[4] < past for row in rows)
    if split == "leave-last-out":
        long = sum(len(of) >= 3 for of in mine.values())
        assert data.num_rows("test") == data.num_rows("valid") == 3 * long

    found: Counter = Counter()
    negatives = set()
    known = {row["item_id"] for row in examples["train"]}
    for row in (row for of in examples.values() for row in of):
        user = users[row["_group"]]
        own = {item for _, item in mine[user]}
        assert row["user_id"] in (user, "unseen")
        if row["item_id"] != "unseen":
            assert row["category_id"] == (row["item_id"] - 10**6) % 13
            assert (row["item_id"] in own) == row["label"]
        if not row["label"]:
            negatives.add(row["item_id"])
        for item, category in zip(row["history"], row["category_id_history"], strict=True):
            assert item == "unseen" or category == (item - 10**6) % 13
        found[user, row["item_id"] if row["label"] else None, tuple(row["history"])] += 1
    assert len(negatives) > 30
    expected: Counter = Counter()
    for user, item, _, _, time in rows:
        history = [i if i in known else "unseen" for when, i in mine[user] if when < time][-4:]
        expected[user, item if item in known else "unseen", tuple(history)] += 1
        expected[user, None, tuple(history)] += 2
    assert found == expected


def test_a_share_of_the_users(tmp_path: Path) -> None:
    source = write(tmp_path / "UserBehavior.csv.gz", log(), "\r\n")
    whole = prepare_taobao(source, tmp_path / "whole")
    half = prepare_taobao(source, tmp_path / "half", Taobao(users=0.5))
    chosen = {row["user_id"] for row in all_decoded(half)} - {"unseen"}
    assert 20 <= len(chosen) <= 40
    assert half.manifest["rows_chosen"] == sum(row[0] in chosen and row[3] == "pv" for row in log())
    assert half.manifest["rows_read"] == len(log()) and half.manifest["rows_rejected"] == {}
    other = prepare_taobao(source, tmp_path / "other", Taobao(users=0.5, log=LogOptions("time", seed=1)))
    assert chosen != {row["user_id"] for row in all_decoded(other)} - {"unseen"}
    assert sum(map(whole.num_rows, ("train", "valid", "test"))) == 2 * sum(row[3] == "pv" for row in log())
    batch = next(whole.batches("train", 100, seed=0))
    assert batch.ids.shape == (100, 3) and set(batch.lists) == {"history", "category_id_history"}


def test_of_several_categories_the_first_counts(tmp_path: Path) -> None:
    rows = [(1, 7, 3, "pv", FIRST), (2, 7, 4, "pv", FIRST + 1), (2, 8, 5, "pv", FIRST + 2), *log()]
    data = prepare_taobao(write(tmp_path / "log.csv", rows), tmp_path / "out")
    assert data.manifest["items_of_several_categories"] == 1
    assert {row["category_id"] for row in all_decoded(data) if row["item_id"] == 7} == {3}


def test_malformed_rows_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = write(tmp_path / "good.csv", log()).read_text().splitlines(keepends=True)
    bad = [
        f"1,2,3,pv,{FIRST - 1}\n",
        f"1,2,3,pv,{PAST}\n",
        "1,2,3,pv,-1500000000\n",
        "1,2,3,pv,soon\n",
        f"1,,3,pv,{FIRST}\n",
        f"a,2,3,pv,{FIRST}\n",
        f"1,2,3,click,{FIRST}\n",
        f"1,2,3,,{FIRST}\n",
        f"1,2,3,pv,{FIRST},5\n",
        "\n",
    ]
    source = tmp_path / "UserBehavior.csv"
    source.write_text("".join(lines[:2] + bad + lines[2:]))
    with pytest.raises(
        ValueError, match=r"UserBehavior.csv:3: a time outside 2017-11-25 to 2017-12-03 \('1511539199'\); 9 of 1,509"
    ):
        prepare_taobao(source, tmp_path / "out", Taobao(max_rejected=0.001))
    assert not (tmp_path / "out").exists()
    data = prepare_taobao(source, tmp_path / "out", progress=True)
    said = capsys.readouterr().err
    assert "2 rows rejected: no integer ids (first" in said and ":7: ('1', None, '3'))" in said
    assert ":9: 'click')" in said and ":6: 'soon')" in said
    assert data.manifest["rows_rejected"] == {
        "not 5 columns": 1,
        "no integer ids": 2,
        "no behavior of pv, buy, cart, fav": 2,
        "no valid time": 1,
        "a time outside 2017-11-25 to 2017-12-03": 3,
    }
    reference = prepare_taobao(tmp_path / "good.csv", tmp_path / "reference")
    positives = [Counter((r["_group"], tuple(r["history"])) for r in all_decoded(d)) for d in (data, reference)]
    assert positives[0] == positives[1]


def test_bad_files_and_options(tmp_path: Path) -> None:
    def refused(content: bytes, sentence: str) -> None:
        source = tmp_path / "UserBehavior.csv"
        source.write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            prepare_taobao(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    whole = write(tmp_path / "good.csv", log()).read_bytes()
    refused(b"", "UserBehavior.csv: the file holds no rows")
    refused(gzip.compress(whole)[:-30], "the gzip file is truncated or damaged")
    refused(whole[:-20], r"UserBehavior.csv:1500: the file ends inside a row|no valid time")
    refused(b"user,time_stamp,adgroup_id,pid,nonclk,clk\n", r"UserBehavior.csv:1 \(6 columns\): not 5 columns")
    refused(f"1,2,3,buy,{FIRST}\n".encode(), "no row of behaviors pv and of the chosen users")
    refused(f"1,2,3,pv,{FIRST}\n".encode(), "split 'train' would be empty|split 'valid' would be empty")
    with pytest.raises(ValueError, match="behaviors 'click': some of pv, buy, cart, fav are needed"):
        Taobao(("pv", "click"))
    with pytest.raises(ValueError, match="behaviors 'pv,pv': different ones"):
        Taobao(("pv", "pv"))
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"users {share}: a share above 0 and up to 1"):
            Taobao(users=share)


def test_a_model_trains(tmp_path: Path) -> None:
    data = prepare_taobao(write(tmp_path / "log.csv", log()), tmp_path / "out")
    assert 0 < train_din(data, tmp_path / "run") < 1
