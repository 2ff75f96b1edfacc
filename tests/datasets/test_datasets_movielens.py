"""MovieLens: every published form of the same ratings gives the same examples."""

from __future__ import annotations

import random
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import pytest
from decoded import all_decoded, decoded, train_din

from embtables.datasets import PreparedDataset
from embtables.datasets.interaction_log import LogOptions
from embtables.datasets.readers.movielens import FLAGS_100K, MovieLens, find_release, prepare_movielens

USERS = {1: ("F", "24", "writer", "85711"), 2: ("M", "53", "other", "94043"), 3: ("M", "23", "artist", "T8H1N")}
FILMS = {
    10: ("Toy Story", "1995", ["Animation", "Children's", "Comedy"]),
    11: ("Misérables, Les", "1994", ["Drama", "Musical"]),
    12: ('"Great" Escape', "1963", ["Adventure", "War"]),
    13: ("Unlisted", "", []),
}
GENERATOR = random.Random(0)
RATINGS = [
    (user, film, GENERATOR.randint(1, 5), 880_000_000 + GENERATOR.randint(0, 500))
    for user in USERS
    for film in FILMS
    for _ in range(20)
]


def write_100k(folder: Path) -> None:
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in RATINGS))
    rows = [f"{user}|{age}|{gender}|{job}|{code}\n" for user, (gender, age, job, code) in USERS.items()]
    (folder / "u.user").write_text("".join(rows))
    lines = []
    for film, (title, year, genres) in FILMS.items():
        flags = "|".join(str(int(name in genres)) for name in FLAGS_100K)
        date = f"01-Jan-{year}" if year else ""
        lines.append(f"{film}|{title} ({year})|{date}||http://x|{flags}\n")
    (folder / "u.item").write_bytes("".join(lines).encode("latin-1"))


def write_1m(folder: Path) -> None:
    (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in RATINGS))
    (folder / "users.dat").write_text("".join(f"{user}::{'::'.join(rest)}\n" for user, rest in USERS.items()))
    lines = [f"{film}::{title} ({year})::{'|'.join(genres)}\n" for film, (title, year, genres) in FILMS.items()]
    (folder / "movies.dat").write_bytes("".join(lines).encode("latin-1"))


def write_latest(folder: Path) -> None:
    ratings = "".join(f"{user},{film},{rating}.0,{time}\n" for user, film, rating, time in RATINGS)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + ratings)
    lines = ["movieId,title,genres"]
    for film, (title, year, genres) in FILMS.items():
        quoted = f"{title} ({year})".replace('"', '""')
        lines.append(f'{film},"{quoted}",{"|".join(genres) or "(no genres listed)"}')
    (folder / "movies.csv").write_bytes(("\r\n".join(lines) + "\r\n").encode())


def write_atomic(folder: Path) -> None:
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (folder / "ml.inter").write_text(header + "".join("\t".join(map(str, row)) + "\n" for row in RATINGS))
    rows = [f"{user}\t{age}\t{gender}\t{job}\t{code}\n" for user, (gender, age, job, code) in USERS.items()]
    header = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    (folder / "ml.user").write_text(header + "".join(rows))
    films = [f"{film}\t{title}\t{year}\t{' '.join(genres)}\n" for film, (title, year, genres) in FILMS.items()]
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    (folder / "ml.item").write_text(header + "".join(films))


FORMS = {"100k": write_100k, "1m": write_1m, "latest": write_latest, "atomic": write_atomic}


@pytest.mark.parametrize("genres", ["list", "set"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(tmp_path: Path, form: str, genres: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    FORMS[form](source)
    data = prepare_movielens(source, tmp_path / "out", MovieLens(genres=genres))
    user_features = [] if form == "latest" else ["gender", "age", "occupation", "zip_code"]
    names = ["user_id", "item_id", *user_features, "release_year"]
    assert sorted(data.feature_names) == sorted(names if genres == "list" else [*names, "genres"])
    assert data.list_features == (["genres"] if genres == "list" else [])
    assert "rating" not in data.read("train").column_names
    rows = all_decoded(data)
    assert len(rows) == len(RATINGS)
    found = Counter((row["user_id"], row["item_id"], row["label"]) for row in rows)
    assert found == Counter((str(user), str(film), float(rating >= 4)) for user, film, rating, _ in RATINGS)
    for row in rows:
        user, film = USERS[int(row["user_id"])], FILMS[int(row["item_id"])]
        if form != "latest":
            assert (row["gender"], row["age"], row["occupation"], row["zip_code"]) == user
        assert row["release_year"] == (film[1] or None)
        assert row["genres"] == (film[2] if genres == "list" else "|".join(film[2]) or None)
        assert row["release_year_history"] == [FILMS[int(item)][1] or None for item in row["history"]]


def test_forms_agree_and_thresholds(tmp_path: Path) -> None:
    prepared = {}
    for form, write in FORMS.items():
        source = tmp_path / form
        source.mkdir()
        write(source)
        prepared[form] = prepare_movielens(source, tmp_path / f"{form}-out", MovieLens(positive_from=3.0))
    for split in ("train", "valid", "test"):
        reference = [
            (row["user_id"], row["item_id"], row["label"], row["history"]) for row in decoded(prepared["1m"], split)
        ]
        for data in (prepared["100k"],):  # the same line numbers, hence the same split
            found = [(row["user_id"], row["item_id"], row["label"], row["history"]) for row in decoded(data, split)]
            assert found == reference
    rows = all_decoded(prepared["atomic"])
    assert sum(row["label"] for row in rows) == sum(rating >= 3 for _, _, rating, _ in RATINGS)


def test_leave_last_out_and_history(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_1m(source)
    data = prepare_movielens(source, tmp_path / "out", MovieLens(log=LogOptions(split="leave-last-out", history=4)))
    tests = decoded(data, "test")
    assert sorted(row["user_id"] for row in tests) == ["1", "2", "3"]
    for row in tests:
        mine = [rating for rating in RATINGS if str(rating[0]) == row["user_id"]]
        last = max(range(len(mine)), key=lambda number: (mine[number][3], number))
        assert (row["item_id"], row["label"]) == (str(mine[last][1]), float(mine[last][2] >= 4))
        liked = sorted((r for r in mine if r[3] < mine[last][3] and r[2] >= 4), key=lambda r: r[3])
        assert Counter(row["history"]) == Counter(str(r[1]) for r in liked[-4:])


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("ratings.dat", "1::10::5::880000000\n1::10::5\n", r"ratings.dat:2 \(3 columns\): not 4 columns"),
        ("ratings.dat", "1::10::five::880000000\n", "ratings.dat:1: no valid rating"),
        ("ratings.dat", "1::10::5::yesterday\n", "ratings.dat:1: no valid timestamp"),
        ("ratings.dat", "::10::5::880000000\n", "ratings.dat:1: no user"),
        ("ratings.dat", "1::10::5::880000000\n1::1", "ratings.dat:2: the file ends inside a row"),
        ("ratings.dat", "", "ratings.dat: the file holds no rows"),
        ("movies.dat", "10::Toy Story\n", r"movies.dat:1 \(2 columns\): not 3 columns"),
        ("users.dat", "1::F\0::24::x::y\n", "users.dat:1: a NUL byte"),
    ],
)
def test_bad_files(tmp_path: Path, file: str, content: str, sentence: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_1m(source)
    (source / file).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        prepare_movielens(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_not_a_release(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a MovieLens release"):
        find_release(tmp_path)
    with pytest.raises(ValueError, match="the folder of a MovieLens release is needed"):
        find_release(tmp_path / "ratings.csv")
    (tmp_path / "ratings.csv").write_text("user,movie\n")
    with pytest.raises(ValueError, match="ratings.csv:1: the header is 'user,movie', not 'userId"):
        find_release(tmp_path)
    with pytest.raises(ValueError, match="positive_from nan: a number is needed"):
        MovieLens(positive_from=float("nan"))
    with pytest.raises(ValueError, match="genres 'one': 'list' or 'set' is needed"):
        MovieLens(genres="one")  # type: ignore[arg-type]


def test_films_that_the_side_file_does_not_know(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_1m(source)
    (source / "movies.dat").write_text("10::Toy Story (1995)::Comedy\n10::Again (1990)::Drama\n99::Unrated (1)::War\n")
    (source / "users.dat").unlink()
    data = prepare_movielens(source, tmp_path / "out")
    assert data.manifest["not_in_side_files"] == {"movies.dat": 3}
    assert data.feature_names == ["user_id", "item_id", "release_year"]
    for row in decoded(data, "train"):
        known = row["item_id"] == "10"
        assert (row["release_year"], row["genres"]) == (("1995", ["Comedy"]) if known else (None, []))
    (source / "movies.dat").write_text("99::Unrated (1)::War\n")
    with pytest.raises(ValueError, match="movies.dat: it knows none of the 4 ids of the log"):
        prepare_movielens(source, tmp_path / "other")


@pytest.mark.data
@pytest.mark.parametrize("split", ["random", "time", "leave-last-out"])
def test_movielens_100k(shared_data: Path, tmp_path: Path, split: str) -> None:
    source = shared_data / "ml-100k"
    if not source.is_dir():
        pytest.skip(f"{source} is absent")
    data = prepare_movielens(source, tmp_path / "out", MovieLens(log=LogOptions(split=split)))
    rows = {name: data.num_rows(name) for name in ("train", "valid", "test")}
    assert sum(rows.values()) == data.manifest["rows_read"] == 100_000
    labels = sum(sum(data.read(name, ["label"])["label"].to_pylist()) for name in rows)
    assert labels == 55_375  # ratings of 4 and 5 in the published set
    if split == "leave-last-out":
        assert rows["valid"] == rows["test"] == 943
    if split == "random":
        assert data.num_embeddings["user_id"] == 945 and data.num_embeddings["gender"] == 4
    assert data.num_embeddings["genres"] == 2 + 19 and data.list_features == ["genres"]
    batch = next(data.batches("test", 64))
    assert set(batch.lists) == {"genres", "history", "release_year_history"}
    assert batch.lists["history"].offsets.equal(batch.lists["release_year_history"].offsets)


def test_a_model_trains(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_1m(source)
    assert 0 < train_din(prepare_movielens(source, tmp_path / "out"), tmp_path / "run") < 1


def test_ratings_left_out_and_features_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_1m(source)
    options = LogOptions(without=("zip_code", "release_year"))
    data = prepare_movielens(source, tmp_path / "out", MovieLens(leave_out=(3.0,), log=options))
    assert data.feature_names == ["user_id", "item_id", "gender", "age", "occupation"]
    assert list(data.histories) == ["history"] and data.list_features == ["genres"]
    found = Counter((row["user_id"], row["item_id"], row["label"]) for row in all_decoded(data))
    assert found == Counter(
        (str(user), str(film), float(rating >= 4)) for user, film, rating, _ in RATINGS if rating != 3
    )
    assert data.manifest["rows_left_out"] == sum(rating == 3 for _, _, rating, _ in RATINGS)
    with pytest.raises(
        ValueError, match="without 'zipcode': no such feature; there are gender, age, occupation, zip_code"
    ):
        prepare_movielens(source, tmp_path / "other", MovieLens(log=LogOptions(without=("zipcode",))))
    with pytest.raises(ValueError, match="ratings.dat: --leave-out leaves no rating"):
        prepare_movielens(source, tmp_path / "other", MovieLens(leave_out=(1, 2, 3, 4, 5)))


@pytest.mark.parametrize("form", ["1m", "latest", "atomic"])
def test_ratings_without_times(tmp_path: Path, form: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    FORMS[form](source)
    timed = prepare_movielens(source, tmp_path / "timed", MovieLens(log=LogOptions(history=0)))
    (path,) = (source / name for name in ("ratings.dat", "ratings.csv", "ml.inter") if (source / name).is_file())
    separator = {"1m": "::", "latest": ",", "atomic": "\t"}[form]
    lines = [line.rpartition(separator)[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    data = prepare_movielens(source, tmp_path / "out", MovieLens(log=LogOptions(history=0)))
    assert "first_time" in timed.manifest and "first_time" not in data.manifest

    def rows(of: PreparedDataset) -> Counter[tuple[str, str, str, float]]:
        return Counter(
            (split, row["user_id"], row["item_id"], row["label"])
            for split in ("train", "valid", "test")
            for row in decoded(of, split)
        )

    assert rows(data) == rows(timed)
    for options in (LogOptions(), LogOptions("time", history=0)):
        with pytest.raises(ValueError, match="the ratings have no times, so that only --split random --history 0 is"):
            prepare_movielens(source, tmp_path / "other", MovieLens(log=options))


def test_dates_in_place_of_seconds(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_latest(source)
    seconds = prepare_movielens(source, tmp_path / "seconds", MovieLens(log=LogOptions("time")))
    ratings = [
        f"{user},{film},{rating}.0,{datetime.fromtimestamp(time, timezone.utc):%Y-%m-%d %H:%M:%S}\n"
        for user, film, rating, time in RATINGS
    ]
    (source / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "".join(ratings))
    dates = prepare_movielens(source, tmp_path / "dates", MovieLens(log=LogOptions("time")))
    assert all_decoded(dates) == all_decoded(seconds)
