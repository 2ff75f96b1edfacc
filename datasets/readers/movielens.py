"""MovieLens as published (100K, 1M, latest and its kin) and as RecBole's atomic files.

Label 1: a rating of 4 and more. Features: user_id and item_id, and what the side files give: gender, age, occupation,
zip_code of the user; release_year and genres of the film. Genres are multi-valued, or, on request, a film's set of
genres is one categorical value, its genres in alphabetical order joined by "|".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import polars as pl
import typer

from embtables.datasets.interaction_log import ITEM, USER, ItemFeatures, Log, LogOptions, write_log
from embtables.datasets.key_column import KeyColumn
from embtables.datasets.options import History, LeaveOut, MaxRejected, MinCount, Seed, Shares, Split, Without
from embtables.datasets.prepared import PreparedDataset
from embtables.datasets.reader import Reader
from embtables.datasets.rejections import DEFAULT_LIMIT, Fault, Rejections
from embtables.datasets.side_tables import Side, read_side
from embtables.datasets.splits import DEFAULT_SHARES
from embtables.datasets.text import Format, read_header, read_text
from embtables.datasets.times import Clock
from embtables.datasets.writing import Writer

RATING, TIME, GENRES, YEAR = "rating", "timestamp", "genres", "release_year"
USER_FEATURES = ("gender", "age", "occupation", "zip_code")
ITEM_FEATURES = (YEAR, GENRES)
FLAGS_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


@dataclass(frozen=True)
class MovieLens(Reader):
    """MovieLens ratings with what is known of users and films.

    Ratings of ``positive_from`` and more are label 1; those of ``leave_out`` are left out. Without times, the ratings
    can be split at random, without histories. With ``genres`` "list" the genres of a film are a multi-valued
    feature; with "set" each combination of genres is one value.
    """

    kind: ClassVar[str] = "movielens"
    input_help: ClassVar[str] = "Folder: 100K, 1M, latest …, or RecBole's files."
    example: ClassVar[str] = (
        "Examples:\n\n"
        "embtables prepare movielens ml-1m data/ml-1m --split leave-last-out\n\n"
        "embtables prepare movielens ml-1m data/ml-1m --leave-out 3 --history 0 --without zip_code"
    )

    positive_from: float = 4.0
    leave_out: tuple[float, ...] = ()
    genres: Literal["list", "set"] = "list"
    max_rejected: float = DEFAULT_LIMIT
    log: LogOptions = field(default_factory=LogOptions)

    def __post_init__(self) -> None:
        if not math.isfinite(self.positive_from):
            raise ValueError(f"positive_from {self.positive_from}: a number is needed")
        if self.genres not in ("list", "set"):
            raise ValueError(f"genres '{self.genres}': 'list' or 'set' is needed")

    def inputs(self, source: Path) -> list[Path]:
        release = find_release(source)
        return [release.ratings, *(side.path for side in (release.users, release.items) if side is not None)]

    def write(self, source: Path, writer: Writer) -> None:
        _fill(writer, find_release(source), self)

    @classmethod
    def constructor(cls) -> Callable[..., Reader]:
        return _from_options


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
    """Prepares the folder of a release. Groups are users, slices go by film.

    Histories: the films that the user rated as positive before (``history``) and their years
    (``release_year_history``).

    Example::

        data = prepare_movielens("ml-1m", "runs/ml-1m", MovieLens(log=LogOptions(split="leave-last-out")))
    """
    return config.prepare(source, out, progress=progress)


def find_release(folder: Path) -> Release:
    """Recognizes a release by its file names."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: the folder of a MovieLens release is needed")
    year = pl.col("title").str.extract(r"\((\d{4})\)\s*$")
    genres = _listed(pl.col(GENRES).str.replace("(no genres listed)", "", literal=True).str.split("|"))
    rating_columns = (USER, ITEM, RATING, TIME)
    if (folder / "u.data").is_file():
        user_columns = (USER, "age", "gender", "occupation", "zip_code")
        item_columns = (ITEM, "title", "date", "video", "url", *FLAGS_100K)
        flags = [pl.when(pl.col(name) == "1").then(pl.lit(name)) for name in FLAGS_100K]
        year, genres = pl.col("date").str.extract(r"(\d{4})$"), _listed(pl.concat_list(flags))
        layout = Format("|", item_columns, encoding="latin-1")
        return Release(
            folder / "u.data",
            Format("\t", rating_columns),
            _side(folder / "u.user", Format("|", user_columns), USER, _plain(user_columns)),
            _side(folder / "u.item", layout, ITEM, {YEAR: year}, genres),
        )
    if (folder / "ratings.dat").is_file():
        fields = read_header(folder / "ratings.dat").count("::") + 1 if (folder / "ratings.dat").stat().st_size else 0
        user_columns = (USER, "gender", "age", "occupation", "zip_code")
        layout = Format("::", (ITEM, "title", GENRES), encoding="latin-1")
        return Release(
            folder / "ratings.dat",
            Format("::", rating_columns[:3] if fields == 3 else rating_columns),
            _side(folder / "users.dat", Format("::", user_columns), USER, _plain(user_columns)),
            _side(folder / "movies.dat", layout, ITEM, {YEAR: year}, genres),
        )
    if (folder / "ratings.csv").is_file():
        timed = _is_timed(folder / "ratings.csv")
        layout = Format(",", (ITEM, "title", GENRES), header_lines=1, quoted=True)
        return Release(
            folder / "ratings.csv",
            Format(",", rating_columns if timed else rating_columns[:3], header_lines=1, quoted=True),
            None,
            _side(folder / "movies.csv", layout, ITEM, {YEAR: year}, genres),
        )
    atomic = sorted(folder.glob("*.inter"))
    if atomic:
        return _find_atomic(atomic[0])
    raise ValueError(f"{folder}: none of u.data, ratings.dat, ratings.csv, *.inter is there: not a MovieLens release")


def _find_atomic(ratings: Path) -> Release:
    """RecBole's atomic files: tab-separated, with a header of name:type."""
    columns = _atomic_columns(ratings)
    for name in (USER, ITEM, RATING):
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
        listed = None if genre is None else _listed(pl.col(genre).str.split(" "))
        item_side = _side(items, Format("\t", names, header_lines=1), ITEM, films, listed)
    return Release(ratings, Format("\t", columns, header_lines=1), user_side, item_side)


def _atomic_columns(path: Path) -> tuple[str, ...]:
    return tuple(name.split(":")[0] for name in read_header(path).split("\t"))


def _is_timed(path: Path) -> bool:
    """Whether ratings.csv has times, which some copies of it lack."""
    expected = "userId,movieId,rating,timestamp"
    found = read_header(path).strip()
    if found.replace('"', "") not in (expected, expected.removesuffix(",timestamp")):
        raise ValueError(f"{path}:1: the header is {found[:80]!r}, not {expected!r}")
    return found.endswith(("timestamp", 'timestamp"'))


def _side(
    path: Path, layout: Format, key: str, values: dict[str, pl.Expr], genres: pl.Expr | None = None
) -> Side | None:
    if not path.is_file():
        return None
    if key not in layout.columns:
        raise ValueError(f"{path}:1: no column '{key}'; there are {', '.join(layout.columns)}")
    return Side(path, layout, pl.col(key), values, {} if genres is None else {GENRES: genres})


def _plain(columns: tuple[str, ...]) -> dict[str, pl.Expr]:
    return {name: pl.col(name) for name in USER_FEATURES if name in columns}


def _listed(genres: pl.Expr) -> pl.Expr:
    return genres.list.eval(pl.element().filter(pl.element() != "").unique(maintain_order=True))


def _with_sets(side: Side) -> Side:
    """The same file with the set of genres as one value."""
    joined = {name: genres.list.sort().list.join("|") for name, genres in side.lists.items()}
    sets = {name: pl.when(text != "").then(text) for name, text in joined.items()}
    return replace(side, values=side.values | sets, lists={})


def _fill(writer: Writer, release: Release, config: MovieLens) -> None:
    rejections = Rejections(config.max_rejected)
    timed = TIME in release.layout.columns
    if not timed and not (config.log.split == "random" and config.log.history == 0):
        raise ValueError(
            f"{release.ratings}: the ratings have no times, so that only --split random --history 0 is possible"
        )
    advance = writer.meter(release.ratings, title="Reading ratings")
    users, items, clock = KeyColumn(), KeyColumn(), Clock("s")
    ratings, times, lines = [], [], []
    left_out = 0
    for block in read_text(release.ratings, release.layout, rejections, advance):
        parsed = block.frame.select(pl.col(USER, ITEM), pl.col(RATING).cast(pl.Float64, strict=False))
        moments = clock.read(block.frame[TIME])["time"] if timed else pl.Series([0] * len(parsed), dtype=pl.Int64)
        faults = {
            "no user": Fault(parsed[USER].is_null()),
            "no film": Fault(parsed[ITEM].is_null()),
            "no valid rating": Fault(~parsed[RATING].is_between(0, 10).fill_null(False), block.frame[RATING]),
        }
        if timed:
            faults["no valid timestamp"] = Fault(moments.is_null(), block.frame[TIME])
        good = rejections.passing(faults, block.lines, lambda line: f"{release.ratings}:{line}")
        unwanted = good & parsed[RATING].is_in(list(map(float, config.leave_out))).fill_null(False).to_numpy()
        left_out += int(unwanted.sum())
        good &= ~unwanted
        kept = parsed.filter(pl.Series(good))
        users.add(kept[USER])
        items.add(kept[ITEM])
        ratings.append(kept[RATING].to_numpy())
        times.append(moments.filter(pl.Series(good)).to_numpy())
        lines.append(block.lines[good])
    writer.record(rejections)
    if config.leave_out:
        writer.extra["rows_left_out"] = left_out
        writer.report([f"{left_out:,} ratings left out"])
    if not sum(map(len, lines)):
        raise ValueError(f"{release.ratings}: --leave-out leaves no rating")

    labels = (np.concatenate(ratings) >= config.positive_from).astype(np.int8)
    log = Log(users.take_keys(), items.take_keys(), np.concatenate(times), np.concatenate(lines), labels, timed=timed)
    columns = {USER: users, ITEM: items}
    if release.users is not None:
        log.users_known, known = _look_up(release.users, users, config, writer)
        columns |= known
    if release.items is not None:
        side = release.items if config.genres == "list" else _with_sets(release.items)
        log.items_known, known = _look_up(side, items, config, writer)
        columns |= known
    write_log(writer, log, config.log, columns=columns)


def _look_up(
    side: Side, ids: KeyColumn, config: MovieLens, writer: Writer
) -> tuple[ItemFeatures, dict[str, KeyColumn]]:
    values = ids.all_values()
    return read_side(side, values, np.arange(len(values)), config.max_rejected, writer)


def _from_options(
    split: Split = "random",
    shares: Shares = DEFAULT_SHARES,
    positive_from: Annotated[float, typer.Option(help="Ratings from here on are label 1.")] = 4.0,
    leave_out: LeaveOut = (),
    genres: Annotated[
        Literal["list", "set"], typer.Option(help="Multi-valued, or a film's set of genres as one value.")
    ] = "list",
    history: History = 50,
    min_count: MinCount = 1,
    seed: Seed = 0,
    max_rejected: MaxRejected = DEFAULT_LIMIT,
    without: Without = (),
) -> MovieLens:
    options = LogOptions(split, shares, history, min_count, seed, without=without)
    return MovieLens(positive_from, leave_out, genres, max_rejected, options)
