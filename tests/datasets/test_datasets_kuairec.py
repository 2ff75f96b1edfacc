"""KuaiRec: examples of both matrices against loops, lists of categories, every way to be wrong."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from decoded import all_decoded, decoded, train_din

from embtables.datasets.interaction_log import LogOptions
from embtables.datasets.readers.kuairec import KuaiRec, prepare_kuairec

HEADER = "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio"
START = 1_593_878_903.438
VIDEOS = {video: [video % 7] if video % 3 else [27, 9, video % 5] for video in range(80)}
USERS = {user: ("high_active", 0, 5, "(0,10]", 107, "61-90", user % 3, None if user % 4 else 2.0) for user in range(30)}
USER_HEADER = (
    "user_id,user_active_degree,is_lowactive_period,follow_user_num,follow_user_num_range,register_days,"
    "register_days_range,onehot_feat0,onehot_feat4"
)
Row = tuple[int, int, float | None, float]


def matrix(users: range, videos: range, count: int, seed: int, timeless: float = 0.0) -> list[Row]:
    """(user, video, seconds, ratio)"""
    generator = random.Random(seed)
    rows: list[Row] = []
    for _ in range(count):
        time = None if generator.random() < timeless else START + generator.randrange(0, 60 * 86_400, 3600)
        ratio = round(generator.choice([0.3, 1.0, 1.9999, 2.0, 3.5]), 6)
        rows.append((generator.choice(users), generator.choice(videos), time, ratio))
    return rows


BIG = matrix(range(30), range(80), 1500, 0)
SMALL = matrix(range(10), range(40), 400, 1, timeless=0.05)


def text(rows: list[Row], end: str = "\n") -> str:
    lines = [HEADER + end]
    for user, video, time, ratio in rows:
        when = ",," if time is None else f"2020-07-05 00:08:23.438,20200705,{time:.3f}"
        lines.append(f"{user},{video},13838,10867,{when},{ratio}{end}")
    return "".join(lines)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "KuaiRec 2.0"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "big_matrix.csv").write_text(text(BIG))
    (folder / "data" / "small_matrix.csv").write_text(text(SMALL, "\r\n"))
    lists = [f'{v},"{of}"' if len(of) > 1 else f"{v},{of}" for v, of in VIDEOS.items()]
    (folder / "data" / "item_categories.csv").write_text("\n".join(["video_id,feat", *lists]) + "\n")
    rows = [
        f"{u}," + ",".join("" if v is None else f'"{v}"' if "," in str(v) else str(v) for v in of)
        for u, of in USERS.items()
    ]
    (folder / "data" / "user_features.csv").write_text("\n".join([USER_HEADER, *rows]) + "\n")
    return folder


def in_time(rows: list[Row]) -> list[Row]:
    return sorted((row for row in rows if row[2] is not None), key=lambda row: row[2] or 0)


def check(row: dict, user: int, video: int, ratio: float, history: list[int]) -> None:
    assert row["label"] == (ratio >= 2)
    assert row["user_id"] in (user, "unseen") and row["item_id"] in (video, "unseen")
    assert all(shown in (value, "unseen") for shown, value in zip(row["categories"], VIDEOS[video], strict=True))
    of = USERS[user]
    expected = {
        "user_active_degree": "high_active",
        "is_lowactive_period": "0",
        "follow_user_num_range": "(0,10]",
        "register_days_range": "61-90",
        "onehot_feat0": str(of[6]),
        "onehot_feat4": None if of[7] is None else str(of[7]),
    }
    assert {name: row[name] for name in expected} == expected
    assert all(shown in (item, "unseen") for shown, item in zip(row["history"], history, strict=True))


def test_the_big_matrix_against_a_loop(tmp_path: Path, folder: Path) -> None:
    data = prepare_kuairec(folder, tmp_path / "out", KuaiRec(log=LogOptions("time", history=5)))
    assert data.list_features == ["categories"] and data.histories == {"history": "item_id"}
    assert not {"follow_user_num", "register_days"} & set(data.feature_names)
    rows = in_time(BIG)
    liked = {user: [row for row in rows if row[0] == user and row[3] >= 2] for user in USERS}
    for row, (user, video, time, ratio) in zip(all_decoded(data), rows, strict=True):
        assert time is not None
        check(row, user, video, ratio, [v for _, v, when, _ in liked[user] if when is not None and when < time][-5:])
    past = rows[int(0.8 * len(rows))][2]
    assert data.num_rows("train") == sum(row[2] < past for row in rows if row[2] is not None and past is not None)
    batch = next(data.batches("train", 50, seed=0))
    assert set(batch.lists) == {"categories", "history"} and len(batch.lists["categories"].offsets) == 51


def test_the_small_matrix_tests(tmp_path: Path, folder: Path) -> None:
    options = LogOptions("time", (0.6, 0.2, 0.2), history=5)
    data = prepare_kuairec(folder, tmp_path / "out", KuaiRec(test_on="small", log=options))
    timeless = sum(row[2] is None for row in SMALL)
    assert data.manifest["rows_without_time"] == {"big_matrix.csv": 0, "small_matrix.csv": timeless} and timeless > 5
    big, small = in_time(BIG), in_time(SMALL)
    assert data.num_rows("test") == len(small)
    past = big[int(0.75 * len(big))][2] or 0
    assert data.num_rows("train") == sum((row[2] or 0) < past for row in big)
    liked = {user: [row for row in big if row[0] == user and row[3] >= 2] for user in USERS}  # of the big one only
    for found, rows in ((decoded(data, "train") + decoded(data, "valid"), big), (decoded(data, "test"), small)):
        for row, (user, video, time, ratio) in zip(found, rows, strict=True):
            check(row, user, video, ratio, [v for _, v, when, _ in liked[user] if (when or 0) < (time or 0)][-5:])


def test_thresholds(tmp_path: Path, folder: Path) -> None:
    data = prepare_kuairec(folder / "data", tmp_path / "out", KuaiRec(positive_from=1.0))
    assert Counter(row["label"] for row in all_decoded(data))[1.0] == sum(row[3] >= 1 for row in BIG)


def test_malformed_rows_are_counted(tmp_path: Path, folder: Path) -> None:
    def insert(name: str, rows: list[str]) -> None:
        lines = (folder / "data" / name).read_text().splitlines(keepends=True)
        (folder / "data" / name).write_text("".join(lines[:1] + [row + "\n" for row in rows] + lines[1:]))

    reference = prepare_kuairec(folder, tmp_path / "reference")
    good = "1,1,1,1,t,d"
    bad = [f"{good},soon,1", f"{good},1593878903", f"{good},1593878903,", f"{good},1593878903,-1", "", ",1,1,1,t,d,1,1"]
    insert("big_matrix.csv", [*bad, f"{good},1593878903,nan", "1,x,1,1,t,d,1593878903,1"])
    insert("item_categories.csv", ['1,"[1, two]"', '1,"[1"', "1,5", "x,[1]", f"1,[{'9' * 30}]"])
    with pytest.raises(ValueError, match="big_matrix.csv:4: no valid watch_ratio; 7 of 1,507 rows read are malformed"):
        prepare_kuairec(folder, tmp_path / "out", KuaiRec(max_rejected=0.001))
    with pytest.raises(ValueError, match=r"categories.csv:2: no list of integers in 'feat' \('\[1, two\]'\); 5 of 85"):
        prepare_kuairec(folder, tmp_path / "out")
    data = prepare_kuairec(folder, tmp_path / "out", KuaiRec(max_rejected=0.1))
    assert data.manifest["rows_rejected"] == {
        "not 8 columns": 1,
        "no integer user and video": 2,
        "no valid timestamp": 1,
        "no valid watch_ratio": 3,
    }
    assert all_decoded(data) == all_decoded(reference)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("big_matrix.csv", None, "no big_matrix.csv there"),
        ("small_matrix.csv", None, "no small_matrix.csv there"),
        ("item_categories.csv", None, "no item_categories.csv there"),
        ("big_matrix.csv", "", "big_matrix.csv: the file is empty"),
        ("big_matrix.csv", HEADER + "\n", "big_matrix.csv: the file holds no rows"),
        (
            "big_matrix.csv",
            "user_id,video_id,feat\n1,2,3\n",
            "big_matrix.csv:1: no column 'timestamp'; there are user_id",
        ),
        ("small_matrix.csv", HEADER + "\n1,2,3,4,,,,0.5\n", "small_matrix.csv: no row has a time"),
        ("big_matrix.csv", HEADER + "\n1,2,3", "big_matrix.csv:2: the file ends inside a row"),
        ("item_categories.csv", "video_id,feat\n999,[1]\n", "item_categories.csv: it knows none of the 80 ids"),
        ("user_features.csv", "user,age\n1,2\n", "user_features.csv:1: no column 'user_id'"),
        ("user_features.csv", "user_id,age,age\n1,2,3\n", "user_features.csv:1: column 'age' occurs twice"),
    ],
)
def test_bad_files(tmp_path: Path, folder: Path, file: str, content: str | None, sentence: str) -> None:
    path = folder / "data" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        prepare_kuairec(folder, tmp_path / "out", KuaiRec(test_on="small"))
    assert not (tmp_path / "out").exists()


def test_options() -> None:
    with pytest.raises(ValueError, match="test_on 'tiny': 'big' or 'small' is needed"):
        KuaiRec(test_on="tiny")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive_from nan: a number is needed"):
        KuaiRec(positive_from=float("nan"))


def test_a_model_trains(tmp_path: Path, folder: Path) -> None:
    data = prepare_kuairec(folder, tmp_path / "out", KuaiRec(test_on="small"))
    assert 0 < train_din(data, tmp_path / "run") < 1
