"""MovieLens as published (100K, 1M, latest and its kin) and as RecBole's atomic files.

Label 1: a rating of 4 and more. Features: user_id and item_id, and what the side files give: gender, age, occupation,
zip_code of the user; release_year and genres of the film. A film's set of genres is one categorical value, its genres
in alphabetical order joined by "|".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer

from .columns import KeyColumn
from .log import ITEM, USER, Log, LogOptions, write_log
from .options import History, MaxRejected, MinCount, Out, Seed, Shares, Split, app, numbers
from .prepared import PreparedDataset
from .rejections import DEFAULT_LIMIT, Rejections
from .text import Format, read_header, read_text
from .writing import Writer
from .writing import prepare as prepare_folder

RATING, TIME, GENRES, YEAR = "rating", "timestamp", "genres", "release_year"
USER_FEATURES = ("gender", "age", "occupation", "zip_code")
ITEM_FEATURES = (YEAR, GENRES)
FLAGS_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


@dataclass(frozen=True)
class MovieLens:
    """Ratings from `positive_from` on are label 1."""

    positive_from: float = 4.0
    max_rejected: float = DEFAULT_LIMIT
    log: LogOptions = field(default_factory=LogOptions)


@dataclass(frozen=True)
class Side:
    """A file about users or items: the id's column, and expressions for the features that it gives."""

    path: Path
    layout: Format
    key: str
    features: dict[str, pl.Expr]


@dataclass(frozen=True)
class Release:
    """The files of one kind of release."""

    ratings: Path
    layout: Format
    users: Side | None
    items: Side | None


def prepare_movielens(
    source: str | Path, out: str | Path, config: MovieLens = MovieLens(), *, progress: bool = False
) -> PreparedDataset:
    """Prepares the folder of a release. Groups are users, slices go by film; `history`: films rated as positive before.

    Example::

        data = prepare_movielens("ml-1m", "runs/ml-1m", MovieLens(log=LogOptions(split="leave-last-out")))
    """
    release = find_release(Path(source))
    sides = [side for side in (release.users, release.items) if side is not None]
    inputs = [release.ratings, *(side.path for side in sides)]
    return prepare_folder(
        out, "movielens", asdict(config), inputs, lambda writer: _fill(writer, release, config), progress=progress
    )


def find_release(folder: Path) -> Release:
    """Recognises a release by its file names."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: the folder of a MovieLens release is needed")
    year = pl.col("title").str.extract(r"\((\d{4})\)\s*$")
    genres = pl.col(GENRES).str.replace("(no genres listed)", "", literal=True).str.split("|")
    rating_columns = (USER, ITEM, RATING, TIME)
    if (folder / "u.data").is_file():
        user_columns = (USER, "age", "gender", "occupation", "zip_code")
        item_columns = (ITEM, "title", "date", "video", "url", *FLAGS_100K)
        flags = [pl.when(pl.col(name) == "1").then(pl.lit(name)) for name in FLAGS_100K]
        films = {YEAR: pl.col("date").str.extract(r"(\d{4})$"), GENRES: _genre_set(pl.concat_list(flags))}
        return Release(
            folder / "u.data",
            Format("\t", rating_columns),
            _side(folder / "u.user", Format("|", user_columns), USER, _plain(user_columns)),
            _side(folder / "u.item", Format("|", item_columns, encoding="latin-1"), ITEM, films),
        )
    if (folder / "ratings.dat").is_file():
        user_columns = (USER, "gender", "age", "occupation", "zip_code")
        films = {YEAR: year, GENRES: _genre_set(genres)}
        layout = Format("::", (ITEM, "title", GENRES), encoding="latin-1")
        return Release(
            folder / "ratings.dat",
            Format("::", rating_columns),
            _side(folder / "users.dat", Format("::", user_columns), USER, _plain(user_columns)),
            _side(folder / "movies.dat", layout, ITEM, films),
        )
    if (folder / "ratings.csv").is_file():
        _expect_header(folder / "ratings.csv", "userId,movieId,rating,timestamp")
        films = {YEAR: year, GENRES: _genre_set(genres)}
        layout = Format(",", (ITEM, "title", GENRES), header_lines=1, quoted=True)
        return Release(
            folder / "ratings.csv",
            Format(",", rating_columns, header_lines=1, quoted=True),
            None,
            _side(folder / "movies.csv", layout, ITEM, films),
        )
    atomic = sorted(folder.glob("*.inter"))
    if atomic:
        return _find_atomic(atomic[0])
    raise ValueError(f"{folder}: none of u.data, ratings.dat, ratings.csv, *.inter is there: not a MovieLens release")


def _find_atomic(ratings: Path) -> Release:
    """RecBole's atomic files: tab-separated, with a header of name:type."""
    columns = _atomic_columns(ratings)
    for name in (USER, ITEM, RATING, TIME):
        if name not in columns:
            raise ValueError(f"{ratings}:1: no column '{name}'; there are {', '.join(columns)}")
    users, items = ratings.with_suffix(".user"), ratings.with_suffix(".item")
    user_side = item_side = None
    if users.is_file():
        names = _atomic_columns(users)
        user_side = _side(users, Format("\t", names, header_lines=1), USER, _plain(names))
    if items.is_file():
        names = _atomic_columns(items)
        films = {YEAR: pl.col(YEAR)} if YEAR in names else {}
        genre = next((name for name in ("class", "genre", GENRES) if name in names), None)
        if genre is not None:
            films[GENRES] = _genre_set(pl.col(genre).str.split(" "))
        item_side = _side(items, Format("\t", names, header_lines=1), ITEM, films)
    return Release(ratings, Format("\t", columns, header_lines=1), user_side, item_side)


def _atomic_columns(path: Path) -> tuple[str, ...]:
    return tuple(name.split(":")[0] for name in read_header(path).split("\t"))


def _expect_header(path: Path, expected: str) -> None:
    found = read_header(path).strip()
    if found.replace('"', "") != expected:
        raise ValueError(f"{path}:1: the header is {found[:80]!r}, not {expected!r}")


def _side(path: Path, layout: Format, key: str, features: dict[str, pl.Expr]) -> Side | None:
    if not path.is_file():
        return None
    if key not in layout.columns:
        raise ValueError(f"{path}:1: no column '{key}'; there are {', '.join(layout.columns)}")
    return Side(path, layout, key, features)


def _plain(columns: tuple[str, ...]) -> dict[str, pl.Expr]:
    return {name: pl.col(name) for name in USER_FEATURES if name in columns}


def _genre_set(genres: pl.Expr) -> pl.Expr:
    joined = genres.list.drop_nulls().list.unique().list.sort().list.join("|")
    return pl.when(joined != "").then(joined)


def _fill(writer: Writer, release: Release, config: MovieLens) -> None:
    rejections = Rejections(config.max_rejected)
    task = writer.progress.add_task("Reading ratings", total=release.ratings.stat().st_size)
    users, items = KeyColumn(), KeyColumn()
    ratings, times, lines = [], [], []
    for block in read_text(
        release.ratings, release.layout, rejections, lambda amount: writer.progress.advance(task, amount)
    ):
        parsed = block.frame.select(
            pl.col(USER, ITEM),
            pl.col(RATING).cast(pl.Float64, strict=False),
            pl.col(TIME).cast(pl.Float64, strict=False).cast(pl.Int64, strict=False) * 1000,
        )
        good = np.ones(len(parsed), bool)
        for name, what in ((USER, "user"), (ITEM, "film"), (RATING, "valid rating"), (TIME, "valid timestamp")):
            wrong = ~parsed[RATING].is_between(0, 10).fill_null(False) if name == RATING else parsed[name].is_null()
            bad = wrong.to_numpy() & good
            rejections.add(f"no {what}", block.lines[bad], lambda line: f"{release.ratings}:{line}")
            good &= ~bad
        kept = parsed.filter(pl.Series(good))
        users.add(kept[USER])
        items.add(kept[ITEM])
        ratings.append(kept[RATING].to_numpy())
        times.append(kept[TIME].to_numpy())
        lines.append(block.lines[good])
    rejections.check(final=True)
    writer.rows_read, writer.rows_rejected = rejections.rows_read, rejections.counts
    writer.report(rejections.lines())

    labels = (np.concatenate(ratings) >= config.positive_from).astype(np.int8)
    log = Log(users.take_keys(), items.take_keys(), np.concatenate(times), np.concatenate(lines), labels)
    columns = {USER: users, ITEM: items}
    for ids, side in ((users, release.users), (items, release.items)):
        if side is not None:
            keys = log.users if ids is users else log.items
            for name, values in _look_up(side, ids.all_values(), config.max_rejected, writer).items():
                columns[name] = KeyColumn()
                log.context[name] = columns[name].keys_of(values)[keys]
    write_log(writer, log, config.log, columns=columns)


def _look_up(side: Side, ids: pl.Series, limit: float, writer: Writer) -> dict[str, pl.Series]:
    """The side file's features for each of the ids, null where it does not know the id."""
    rejections = Rejections(limit)
    frames = [
        block.frame.select(pl.col(side.key), *(value.alias(name) for name, value in side.features.items()))
        for block in read_text(side.path, side.layout, rejections)
    ]
    rejections.check(final=True)
    writer.report(rejections.lines())
    table = pl.concat(frames).unique(side.key, keep="first", maintain_order=True)
    joined = pl.DataFrame({side.key: ids}).join(table, on=side.key, how="left", maintain_order="left")
    return {name: joined[name] for name in side.features}


@app.command(epilog="Example: embtables prepare movielens ml-1m data/ml-1m --split leave-last-out")
def movielens(
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="Folder: 100K, 1M, latest …, or RecBole's files.", show_default=False),
    ],
    out: Out,
    split: Split = "random",
    shares: Shares = "0.8,0.1,0.1",
    positive_from: Annotated[float, typer.Option(help="Ratings from here on are label 1.")] = 4.0,
    history: History = 50,
    min_count: MinCount = 1,
    seed: Seed = 0,
    max_rejected: MaxRejected = DEFAULT_LIMIT,
) -> None:
    """MovieLens ratings with what is known of users and films."""
    options = LogOptions(split, numbers("--shares", shares), history, min_count, seed)
    prepare_movielens(source, out, MovieLens(positive_from, max_rejected, options), progress=True)
