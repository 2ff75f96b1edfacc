"""KuaiRec: how long users of Kuaishou watched videos, and for some of them nearly every video.

Files (Gao et al., CIKM 2022; kuairec.com, version 2.0), with headers: big_matrix.csv, 12,530,806 rows of 7,176 users
and 10,728 videos, and small_matrix.csv, 4,676,570 rows of 1,411 users and 3,327 videos, 99.6 % of all pairs: user_id,
video_id,play_duration,video_duration,time,date,timestamp,watch_ratio; item_categories.csv: video_id,feat, a list such
as "[27, 9]"; user_features.csv: user_id and groupings of the user. Some rows of the small matrix bear no time.

Label 1: a watch_ratio (time watched by length of the video) of 2 and more; the authors' page sets a like at above 2.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import polars as pl
import typer

from embtables.datasets.interaction_log import ITEM, USER, Log, LogOptions, write_log
from embtables.datasets.options import History, MaxRejected, MinCount, Seed, Shares, Split, Without
from embtables.datasets.prepared import PreparedDataset
from embtables.datasets.reader import Reader
from embtables.datasets.rejections import DEFAULT_LIMIT, Fault, Rejections
from embtables.datasets.side_tables import Side, integers, read_side
from embtables.datasets.splits import DEFAULT_SHARES
from embtables.datasets.text import Format, read_columns, read_text
from embtables.datasets.writing import Writer

VIDEO, RATIO, TIME, CATEGORIES = "video_id", "watch_ratio", "timestamp", "categories"
COUNTS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")  # their ranges are features


@dataclass(frozen=True)
class KuaiRec(Reader):
    """KuaiRec's matrices of watched videos, with categories of videos and groupings of users.

    Ratios from ``positive_from`` on are label 1.

    ``test_on`` small: the big matrix trains and, its latest part, validates, the small one tests; histories hold videos
    of the big one only. Both are of the same two months, so this asks about other videos, not about later ones.
    """

    kind: ClassVar[str] = "kuairec"
    input_help: ClassVar[str] = "Folder of big_matrix.csv and the others."
    example: ClassVar[str] = 'Example: embtables prepare kuairec "KuaiRec 2.0/data" data/kuairec --test-on small'

    positive_from: float = 2.0
    test_on: Literal["big", "small"] = "big"
    max_rejected: float = DEFAULT_LIMIT
    log: LogOptions = field(default_factory=lambda: LogOptions(split="time"))

    def __post_init__(self) -> None:
        if not math.isfinite(self.positive_from):
            raise ValueError(f"positive_from {self.positive_from}: a number is needed")
        if self.test_on not in ("big", "small"):
            raise ValueError(f"test_on '{self.test_on}': 'big' or 'small' is needed")

    def inputs(self, source: Path) -> list[Path]:
        names = ["big_matrix.csv", *(["small_matrix.csv"] if self.test_on == "small" else [])]
        return [_find(source, name) for name in (*names, "item_categories.csv", "user_features.csv")]

    def write(self, source: Path, writer: Writer) -> None:
        _fill(writer, self.inputs(source), self)

    @classmethod
    def constructor(cls) -> Callable[..., Reader]:
        return _from_options


def prepare_kuairec(
    source: str | Path, out: str | Path, config: KuaiRec = KuaiRec(), *, progress: bool = False
) -> PreparedDataset:
    """Prepares the folder of the files. Memory at the peak: about 200 bytes per row.

    Features: user_id and all groupings of the user, item_id (the video) and its multi-valued ``categories``.
    ``history``: videos with label 1 before. Groups are users, slices go by video. Rows without a time are left out and
    counted (``rows_without_time``).

    Example::

        data = prepare_kuairec("KuaiRec 2.0/data", "data/kuairec", KuaiRec(test_on="small"))
    """
    return config.prepare(source, out, progress=progress)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / "data" / name):
        if path.is_file():
            return path
    raise ValueError(f"{folder}: no {name} there")


def _fill(writer: Writer, inputs: Sequence[Path], config: KuaiRec) -> None:
    rejections = Rejections(config.max_rejected)
    matrices = [_read(writer, path, rejections) for path in inputs[:-2]]
    writer.record(rejections)
    rows = pl.concat(matrices)
    log = Log(
        rows[USER].to_numpy(),
        rows[ITEM].to_numpy(),
        rows[TIME].to_numpy(),
        rows["row"].to_numpy(),
        (rows[RATIO] >= config.positive_from).to_numpy().astype(np.int8),
    )
    if config.test_on == "small":
        assert log.labels is not None
        big = np.arange(len(rows)) < len(matrices[0])
        train, valid, _ = config.log.shares
        cut = np.sort(log.times[big])[int(big.sum() * train / (train + valid))]
        log.splits = np.where(big, log.times >= cut, 2).astype(np.int8)
        log.remembered = big & (log.labels > 0)
    videos, users = pl.Series(np.unique(log.items)), pl.Series(np.unique(log.users))
    log.items_known, columns = read_side(_videos(inputs[-2]), videos, videos.to_numpy(), config.max_rejected, writer)
    log.users_known, known = read_side(_users(inputs[-1]), users, users.to_numpy(), config.max_rejected, writer)
    write_log(writer, log, config.log, columns=columns | known)


def _read(writer: Writer, path: Path, rejections: Rejections) -> pl.DataFrame:
    """The rows with a time, in ms."""
    layout = Format(",", read_columns(path, (USER, VIDEO, TIME, RATIO)), header_lines=1)
    advance = writer.meter(path, title=f"Reading {path.name}")
    without_time, parts = 0, []
    for block in read_text(path, layout, rejections, advance):
        frame = block.frame.select(
            integers(USER),
            integers(VIDEO).alias(ITEM),
            (pl.col(TIME).cast(pl.Float64, strict=False) * 1000).round().cast(pl.Int64, strict=False),
            pl.col(RATIO).cast(pl.Float64, strict=False),
            pl.col(TIME).is_null().alias("timeless"),
            pl.Series("row", block.lines),
        )
        raw = block.frame
        faults = {
            "no integer user and video": Fault(frame[USER].is_null() | frame[ITEM].is_null(), raw.select(USER, VIDEO)),
            "no valid timestamp": Fault(~frame["timeless"] & frame[TIME].is_null(), raw[TIME]),
            "no valid watch_ratio": Fault(~frame[RATIO].is_between(0, 2**31).fill_null(False), raw[RATIO]),
        }
        good = rejections.passing(faults, block.lines, lambda line: f"{path}:{line}")
        without_time += int((good & frame["timeless"].to_numpy()).sum())
        parts.append(frame.filter(pl.Series(good), ~pl.col("timeless")).drop("timeless"))
    writer.extra.setdefault("rows_without_time", {})[path.name] = without_time
    rows = pl.concat(parts)
    if len(rows) == 0:
        raise ValueError(f"{path}: no row has a time")
    if without_time:
        writer.report([f"{without_time:,} rows of {path.name} have no time and are left out"])
    return rows


def _videos(path: Path) -> Side:
    layout = Format(",", read_columns(path, (VIDEO, "feat")), header_lines=1, quoted=True)
    listed = pl.col("feat").str.contains(r"^\[\s*(\d{1,18}\s*(,\s*\d{1,18}\s*)*)?\]$")
    lists = {CATEGORIES: pl.col("feat").str.extract_all(r"\d+").cast(pl.List(pl.Int64))}
    return Side(path, layout, integers(VIDEO), lists=lists, faults={"no list of integers in 'feat'": ~listed})


def _users(path: Path) -> Side:
    columns = read_columns(path, (USER,))
    groupings = {name: pl.col(name) for name in columns if name not in (USER, *COUNTS)}
    return Side(path, Format(",", columns, header_lines=1, quoted=True), integers(USER), groupings)


def _from_options(
    positive_from: Annotated[float, typer.Option(help="Watch ratios from here on are label 1.")] = 2.0,
    test_on: Annotated[
        Literal["big", "small"], typer.Option(help="The big matrix by --split, or the whole small matrix.")
    ] = "big",
    split: Split = "time",
    shares: Shares = DEFAULT_SHARES,
    history: History = 50,
    min_count: MinCount = 1,
    seed: Seed = 0,
    max_rejected: MaxRejected = DEFAULT_LIMIT,
    without: Without = (),
) -> KuaiRec:
    options = LogOptions(split, shares, history, min_count, seed, without=without)
    return KuaiRec(positive_from, test_on, max_rejected, options)
