"""Ali's display ads: examples, side files and histories of both kinds against loops, every way to be wrong."""

from __future__ import annotations

import gzip
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from decoded import all_decoded, decoded, train_din, vocabulary

from embtables.datasets.histories import LatestEvents
from embtables.datasets.readers.alimama import AD_IDS, DAY, FIRST, PROFILE, Alimama, prepare_alimama

HOUR = 3600


def sample(seed: int = 0) -> list[tuple[int, int, int, str, int]]:
    """(user, time, ad, position, click)"""
    generator = random.Random(seed)
    rows = []
    for _ in range(800):
        time = FIRST + generator.randrange(0, 8 * DAY, 2 * HOUR)
        position = generator.choice(["430548_1007", "430539_1007"])
        rows.append(
            (generator.randrange(1, 40), time, generator.randrange(200), position, int(generator.random() < 0.3))
        )
    return rows


def views(seed: int = 1) -> list[tuple[int, int, str, int, int | None]]:
    """(user, time, btag, category, brand), in no order."""
    generator = random.Random(seed)
    rows = []
    for _ in range(4000):
        time = FIRST - 14 * DAY + generator.randrange(0, 22 * DAY, HOUR)
        brand = generator.choice([None, *range(30, 90)])
        btag = generator.choice(["pv"] * 8 + ["cart", "fav", "buy"])
        rows.append((generator.randrange(1, 60), time, btag, generator.randrange(25), brand))
    return rows


ADS = {
    ad: (ad % 20, ad // 2, ad % 50, None if ad % 7 == 0 else 30 + ad % 40, round(1.7 ** (ad % 30), 2))
    for ad in range(190)
}
USERS = {user: (0, user % 13, 1 + user % 2, user % 7, None if user % 3 else 2, 3, 0, None) for user in range(1, 36)}


def text(header: str, rows: list[tuple], end: str = "\n", absent: str = "") -> str:
    lines = [",".join(absent if value is None else str(value) for value in row) + end for row in rows]
    return header + end + "".join(lines)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "ads"
    folder.mkdir()
    rows = [(user, time, ad, position, 1 - click, click) for user, time, ad, position, click in sample()]
    (folder / "raw_sample.csv").write_text(text("user,time_stamp,adgroup_id,pid,nonclk,clk", rows))
    header = "adgroup_id,cate_id,campaign_id,customer,brand,price"
    (folder / "ad_feature.csv").write_text(text(header, [(ad, *of) for ad, of in ADS.items()], absent="NULL"))
    header = ",".join(("userid", *PROFILE)) + " "  # as published, with the blank
    (folder / "user_profile.csv").write_text(text(header, [(user, *of) for user, of in USERS.items()], "\r\n"))
    (folder / "behavior_log.csv").write_text(text("user,time_stamp,btag,cate,brand", views(), absent="NULL"))
    return folder


def test_examples_and_clicks_against_a_loop(tmp_path: Path, folder: Path) -> None:
    data = prepare_alimama(folder, tmp_path / "out", Alimama(history=3))
    assert data.feature_names == ["user_id", "item_id", "pid", *PROFILE, *AD_IDS, "price"]
    assert data.histories == {"history": "item_id"} | {f"{name}_history": name for name in (*AD_IDS, "price")}
    users, ads = ({row[place] for row in sample()} for place in (0, 2))
    unknown = {"ad_feature.csv": len(ads - set(ADS)), "user_profile.csv": len(users - set(USERS))}
    assert data.manifest["not_in_side_files"] == unknown and min(unknown.values()) > 1
    rows = sorted(sample(), key=lambda row: row[1])
    of_user = {user: [row for row in rows if row[0] == user] for user in range(40)}
    for split, days in (("train", range(6)), ("valid", [6]), ("test", [7])):
        found = decoded(data, split)
        expected = [row for row in rows if (row[1] - FIRST) // DAY in days]
        for row, (user, time, ad, position, click) in zip(found, expected, strict=True):
            assert (row["label"], row["pid"]) == (click, position)
            assert row["user_id"] in (user, "unseen") and row["item_id"] in (ad, "unseen")
            assert tuple(row[name] for name in PROFILE) == USERS.get(user, (None,) * 8)
            of_ad = ADS.get(ad, (None,) * 5)
            assert all(row[name] in (value, "unseen") for name, value in zip(AD_IDS, of_ad))
            assert row["cate_id"] == of_ad[0] and row["price"] in (level(of_ad[4]), "unseen")
            clicked = [row[2] for row in of_user[user] if row[1] < time and row[4]][-3:]
            assert len(row["history"]) == len(clicked)
            assert all(shown in (item, "unseen") for shown, item in zip(row["history"], clicked))
            assert row["cate_id_history"] == [ADS[item][0] if item in ADS else None for item in clicked]
    assert len({row["price"] for row in all_decoded(data)}) > 25


def level(price: float | None) -> int | None:
    return None if price is None else math.floor(4 * math.log2(price + 1))


@pytest.mark.parametrize("behaviors", [("pv",), ("cart", "fav", "buy")])
def test_views_against_a_loop(tmp_path: Path, folder: Path, behaviors: tuple[str, ...]) -> None:
    data = prepare_alimama(folder, tmp_path / "out", Alimama("views", behaviors, history=6))
    assert data.histories == {"cate_id_history": "cate_id", "brand_history": "brand"}
    rows = sorted(sample(), key=lambda row: row[1])
    seen = sorted((row for row in views() if row[2] in behaviors), key=lambda row: row[1])
    brands = set(vocabulary(data, "brand"))
    lengths: Counter = Counter()
    of_user = {user: [view for view in seen if view[0] == user] for user in range(60)}
    for row, (user, time, *_) in zip(all_decoded(data), rows, strict=True):
        before = [view for view in of_user[user] if view[1] < time]
        before = [view for view in before if view[1] >= before[-6:][0][1]]
        assert _by_time(row["cate_id_history"], before) and _by_time(row["brand_history"], before, brands)
        lengths[len(row["cate_id_history"])] += 1
    assert lengths[6] > 300 and data.manifest["histories_cut"] > 0
    last = max(row[1] for row in rows if row[1] < FIRST + 6 * DAY)
    users = {user for user, *_ in rows}
    counts = Counter(ADS[row[2]][0] for row in rows if row[1] < FIRST + 6 * DAY and row[2] in ADS)
    kept = [view for view in seen if view[0] in users and view[1] <= last]
    everything = counts + Counter(view[3] for view in kept)
    frequencies = dict(zip(vocabulary(data, "cate_id"), data.frequencies["cate_id"]))
    assert set(frequencies) - {None, "unseen"} == set(everything)
    assert all(counts[value] <= frequencies[value] <= everything[value] for value in everything)


def _by_time(history: list, before: list[tuple], brands: set | None = None) -> bool:
    """The latest 6, where views of one hour may stand in any order and some of the oldest hour be left out."""
    shown = [(view[1], view[3] if brands is None else view[4] if view[4] in brands else "unseen") for view in before]
    place = len(history)
    assert place == min(6, len(shown))
    while place:
        hour = shown[-1][0]
        of_hour = Counter(value for time, value in shown if time == hour)
        shown = [view for view in shown if view[0] < hour]
        size = min(place, of_hour.total())
        if not Counter(history[place - size : place]) <= of_hour:
            return False
        place -= size
    return True


def test_a_stream_keeps_what_histories_hold() -> None:
    """Whatever the blocks: the latest `cap` before every row are there, and little else."""
    generator = np.random.default_rng(0)
    users, times = generator.integers(0, 20, 300) * 7, generator.integers(1000, 2000, 300)
    of, when, value = generator.integers(0, 25, 5000) * 7, generator.integers(0, 2500, 5000), np.arange(5000)
    latest = LatestEvents(users, times, cap=3)
    for start in range(0, 5000, 111):
        part = slice(start, start + 111)
        latest.add(of[part], when[part], {"value": value[part]})
        if start % 3 == 0:
            latest._settle()  # as a long stream does from time to time
    events = latest.events()
    kept = set(events.values["value"])
    assert {(of[i], when[i]) for i in kept} == set(zip(events.users, events.times))
    for user, time in zip(users, times):
        before = np.flatnonzero((of == user) & (when < time))
        newest = before[np.argsort(when[before], kind="stable")][-3:]
        assert set(newest) <= kept
    assert len(kept) <= 3 * len(set(zip(users, times)))
    assert not any((of[i] not in users) or when[i] >= times[users == of[i]].max() for i in kept)


def test_a_share_of_the_users_and_gzip(tmp_path: Path, folder: Path) -> None:
    for name in ("raw_sample.csv", "behavior_log.csv"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    data = prepare_alimama(folder, tmp_path / "out", Alimama("views", users=0.4))
    chosen = {row["user_id"] for row in all_decoded(data)} - {"unseen"}
    assert 8 <= len(chosen) <= 24
    assert data.manifest["rows_chosen"] == sum(row[0] in chosen for row in sample())
    assert data.manifest["behaviors"]["rows_read"] == 4000
    assert 0 < data.manifest["behaviors"]["rows_kept"] <= sum(view[0] in chosen for view in views())
    batch = next(data.batches("train", 64, seed=0))
    assert batch.ids.shape == (64, 3 + 8 + 5) and set(batch.lists) == {"cate_id_history", "brand_history"}


def test_malformed_rows_are_counted(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def insert(name: str, rows: list[str]) -> None:
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:1] + [row + "\n" for row in rows] + lines[1:]))

    reference = prepare_alimama(folder, tmp_path / "reference", Alimama("views"))
    bad = [f"1,{FIRST},,p,1,0", f"1,{FIRST - 1},5,p,1,0", f"1,{FIRST + 8 * DAY},5,p,1,0", "1,then,5,p,1,0"]
    insert("raw_sample.csv", [*bad, f"1,{FIRST},5,p,1,1", f"1,{FIRST},5,p,-1,2", f"1,{FIRST},5,p,0", ""])
    insert(
        "ad_feature.csv",
        ["1,x,1,1,1,1", "2,1,1,1,none,1", "3,1,1,1,1,-4", "4,1,1,1,1,nan", "5,1,1,1,1,cheap", ",1,1,1,1,1"],
    )
    insert("user_profile.csv", ["1,a,1,1,1,1,1,1,1"])
    insert("behavior_log.csv", [f"1,{FIRST},look,1,1", "x,1,pv,1,1", "1,,pv,1,1", "1,-5,pv,1,1", "1,1,pv,one,1"])
    with pytest.raises(
        ValueError,
        match=r"raw_sample.csv:3: a time outside 2017-05-06 to 05-13 \('1493999999'\); .* more than",
    ):
        prepare_alimama(folder, tmp_path / "out", Alimama("views", max_rejected=0.005))
    data = prepare_alimama(folder, tmp_path / "out", Alimama("views", max_rejected=0.05), progress=True)
    said = capsys.readouterr().err
    for value in ("'then'", "('1', None)", "('1', '1')", "'look'", "('one', '1')", "'-4'", "'none'", "'a'"):
        assert f": {value})" in said
    assert data.manifest["rows_rejected"] == {
        "not 6 columns": 1,
        "no integer user and ad": 1,
        "a time outside 2017-05-06 to 05-13": 2,
        "no valid time": 1,
        "clk and nonclk are not 0 and 1": 2,
    }
    assert data.manifest["behaviors"]["rows_rejected"] == {
        "no btag of pv, cart, fav, buy": 1,
        "no integer user": 1,
        "no valid time": 2,
        "no integer cate and brand": 1,
    }
    assert all_decoded(data) == all_decoded(reference)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("raw_sample.csv", None, r"no raw_sample.csv \(or raw_sample.csv.gz\) there"),
        ("ad_feature.csv", None, "no ad_feature.csv"),
        ("user_profile.csv", None, "no user_profile.csv"),
        ("behavior_log.csv", None, "no behavior_log.csv"),
        ("raw_sample.csv", "", "raw_sample.csv: the file is empty"),
        ("raw_sample.csv", "user,time_stamp,adgroup_id,pid,nonclk,clk\n", "raw_sample.csv: the file holds no rows"),
        (
            "raw_sample.csv",
            "581738,1494137644,1,430548_1007,1,0\n",
            "raw_sample.csv:1: no column 'user'; there are 581738",
        ),
        (
            "ad_feature.csv",
            "adgroup_id,cate_id,customer,brand,price\n1,1,1,1,1\n",
            "ad_feature.csv:1: no column 'campaign_id'",
        ),
        (
            "ad_feature.csv",
            "adgroup_id,cate_id,campaign_id,customer,brand,price\n999,1,1,1,1,1\n",
            "ad_feature.csv: it knows none",
        ),
        ("user_profile.csv", "userid,userid\n", "user_profile.csv:1: no column 'cms_segid'"),
        (
            "behavior_log.csv",
            "user,time_stamp,btag,cate,brand\n1,1,pv\n",
            "behavior_log.csv:2: the file ends inside|not 5 columns",
        ),
    ],
)
def test_bad_files(tmp_path: Path, folder: Path, file: str, content: str | None, sentence: str) -> None:
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        prepare_alimama(folder, tmp_path / "out", Alimama("views"))
    assert not (tmp_path / "out").exists()


def test_a_truncated_log_of_behaviors(tmp_path: Path, folder: Path) -> None:
    packed = gzip.compress((folder / "behavior_log.csv").read_bytes())
    (folder / "behavior_log.csv").unlink()
    (folder / "behavior_log.csv.gz").write_bytes(packed[:-1000])
    with pytest.raises(ValueError, match="behavior_log.csv.gz: the gzip file is truncated or damaged"):
        prepare_alimama(folder, tmp_path / "out", Alimama("views"))
    assert prepare_alimama(folder, tmp_path / "out").num_rows("test") > 0  # of clicks it is not read


def test_options() -> None:
    for options, sentence in (
        ({"history_of": "ads"}, "history_of 'ads'"),
        ({"behaviors": ("see",)}, "behaviors 'see': some of pv, cart, fav, buy"),
        ({"behaviors": ()}, "behaviors ''"),
        ({"users": 0.0}, "users 0.0"),
        ({"history_of": "views", "history": 0}, "history 0: histories of views need"),
        ({"history": -1}, "history -1: it cannot be negative"),
        ({"min_count": 0}, "min_count 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Alimama(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("history_of", ["clicks", "views"])
def test_a_model_trains(tmp_path: Path, folder: Path, history_of: str) -> None:
    data = prepare_alimama(folder, tmp_path / "out", Alimama(history_of))  # type: ignore[arg-type]
    assert 0 < train_din(data, tmp_path / "run") < 1
