"""Taobao's UserBehavior.csv: clicks, purchases and more of about a million users in nine days.

File (Tianchi data set 649): no header, user_id,item_id,category_id,behavior,timestamp, behavior one of pv (a click on
an item's page), buy, cart, fav; 100,150,807 rows of 987,994 users, 4,162,024 items, 9,439 categories, 2017-11-25 to
2017-12-03 in Beijing. Some rows bear times outside these days and are rejected.

A row of the chosen behaviors is a positive; items that its user has no such row of are drawn as negatives. An item's
category is a feature, with its history; where a file gives an item several categories the first counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import polars as pl
import typer

from embtables.datasets.interaction_log import ITEM, USER, ItemFeatures, Log, LogOptions, write_log
from embtables.datasets.negatives import Negatives
from embtables.datasets.options import History, MaxRejected, MinCount, Seed, Shares, Split, Without, parse_duration
from embtables.datasets.prepared import PreparedDataset
from embtables.datasets.reader import Reader
from embtables.datasets.rejections import DEFAULT_LIMIT, Fault, Rejections
from embtables.datasets.side_tables import integers
from embtables.datasets.splits import DEFAULT_SHARES, row_uniforms
from embtables.datasets.text import Format, read_text
from embtables.datasets.writing import Writer

CATEGORY, BEHAVIOR, TIME = "category_id", "behavior", "timestamp"
COLUMNS = (USER, ITEM, CATEGORY, BEHAVIOR, TIME)
BEHAVIORS = ("pv", "buy", "cart", "fav")
FIRST, PAST = 1_511_539_200, 1_512_316_800  # seconds: 2017-11-25 and 2017-12-04, 0:00 in Beijing


@dataclass(frozen=True)
class Taobao(Reader):
    """Taobao's clicks (or purchases …) with sampled negatives; items and categories in histories.

    Rows with one of ``behaviors`` are positives. ``users`` is a share of the users, chosen by a hash of their id and
    the seed.
    """

    kind: ClassVar[str] = "taobao"
    input_help: ClassVar[str] = "UserBehavior.csv (may be gzipped)."
    example: ClassVar[str] = "Example: embtables prepare taobao UserBehavior.csv data/taobao --users 0.1"

    behaviors: tuple[str, ...] = ("pv",)
    users: float = 1.0
    max_rejected: float = DEFAULT_LIMIT
    negatives: Negatives = field(default_factory=Negatives)
    log: LogOptions = field(default_factory=lambda: LogOptions(split="time"))

    def __post_init__(self) -> None:
        for name in self.behaviors:
            if name not in BEHAVIORS:
                raise ValueError(f"behaviors '{name}': some of {', '.join(BEHAVIORS)} are needed")
        if not self.behaviors or len(set(self.behaviors)) < len(self.behaviors):
            raise ValueError(f"behaviors {','.join(self.behaviors)!r}: different ones, at least one, are needed")
        if not 0 < self.users <= 1:
            raise ValueError(f"users {self.users}: a share above 0 and up to 1 is needed")

    def write(self, source: Path, writer: Writer) -> None:
        write_log(writer, _read(writer, source, self), self.log, self.negatives)

    @classmethod
    def constructor(cls) -> Callable[..., Reader]:
        return _from_options


def prepare_taobao(
    source: str | Path, out: str | Path, config: Taobao = Taobao(), *, progress: bool = False
) -> PreparedDataset:
    """Prepares UserBehavior.csv. Groups are users, slices go by item.

    The text is read in blocks; memory is about 180 bytes per positive at the peak and 1 GB more, 17 GB for all clicks.
    On the disk an entry of a history is up to 8 bytes in each row: choose a share of the users, or short histories.

    Example::

        data = prepare_taobao("UserBehavior.csv", "data/taobao", Taobao(users=0.1))
    """
    return config.prepare(source, out, progress=progress)


def _read(writer: Writer, path: Path, config: Taobao) -> Log:
    rejections = Rejections(config.max_rejected)
    advance = writer.meter(path)
    parts = []
    for block in read_text(path, Format(",", COLUMNS), rejections, advance):
        frame = block.frame.select(
            *(integers(name) for name in (USER, ITEM, CATEGORY, TIME)), BEHAVIOR, pl.Series("row", block.lines)
        )
        ids, times = block.frame.select(USER, ITEM, CATEGORY), block.frame[TIME]
        is_behavior = frame[BEHAVIOR].is_in(BEHAVIORS).fill_null(False)
        faults = {
            "no integer ids": Fault(frame[USER].is_null() | frame[ITEM].is_null() | frame[CATEGORY].is_null(), ids),
            f"no behavior of {', '.join(BEHAVIORS)}": Fault(~is_behavior, frame[BEHAVIOR]),
            "no valid time": Fault(frame[TIME].is_null(), times),
            "a time outside 2017-11-25 to 2017-12-03": Fault(~frame[TIME].is_between(FIRST, PAST - 1), times),
        }
        good = rejections.passing(faults, block.lines, lambda line: f"{path}:{line}")
        good &= frame[BEHAVIOR].is_in(config.behaviors).fill_null(False).to_numpy()
        if config.users < 1:
            good &= row_uniforms(frame[USER].fill_null(0).to_numpy(), config.log.seed) < config.users
        parts.append(frame.filter(pl.Series(good)).drop(BEHAVIOR))
    writer.record(rejections)
    rows = pl.concat(parts)
    if len(rows) == 0:
        raise ValueError(f"{path}: no row of behaviors {', '.join(config.behaviors)} and of the chosen users")
    writer.extra["rows_chosen"] = len(rows)
    items = rows.select(ITEM, CATEGORY).unique(maintain_order=True)
    known = items.unique(ITEM, keep="first", maintain_order=True)
    writer.extra["items_of_several_categories"] = len(items) - len(known)
    return Log(
        rows[USER].to_numpy(),
        rows[ITEM].to_numpy(),
        rows[TIME].to_numpy() * 1000,
        rows["row"].to_numpy(),
        items_known=ItemFeatures(known[ITEM].to_numpy(), {CATEGORY: known[CATEGORY].to_numpy()}),
    )


def _from_options(
    behaviors: Annotated[tuple[str, ...], typer.Option(help="Which rows are positives: some of pv,buy,cart,fav.")] = (
        "pv",
    ),
    users: Annotated[float, typer.Option(help="Share of the users, chosen by a hash of their id.")] = 1.0,
    negatives: Annotated[int, typer.Option(help="Negatives per positive.")] = 1,
    negative_sampling: Annotated[
        Literal["popularity", "uniform"],
        typer.Option(help="By positives in the window, or all items with equal probability."),
    ] = "popularity",
    negative_window: Annotated[str, typer.Option(help="Preceding positives to draw from: 30m, 1h, 2d, all.")] = "1h",
    split: Split = "time",
    shares: Shares = DEFAULT_SHARES,
    history: History = 50,
    min_count: MinCount = 1,
    seed: Seed = 0,
    max_rejected: MaxRejected = DEFAULT_LIMIT,
    without: Without = (),
) -> Taobao:
    return Taobao(
        behaviors=behaviors,
        users=users,
        max_rejected=max_rejected,
        negatives=Negatives(negatives, negative_sampling, parse_duration(negative_window)),
        log=LogOptions(split, shares, history, min_count, seed, without=without),
    )
