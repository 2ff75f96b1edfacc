"""Ali's display ads (Ali_Display_Ad_Click): impressions and clicks on Taobao, what is known of ads and users, views.

Files (Tianchi data set 56), with headers: raw_sample.csv: user,time_stamp,adgroup_id,pid,nonclk,clk, 26,557,961 rows,
2017-05-06 to 05-13 in Beijing; ad_feature.csv: adgroup_id,cate_id,campaign_id,customer,brand,price, 846,811 rows, brand
NULL where unknown; user_profile.csv: userid and eight groupings, 1,061,768 rows, not of all users; behavior_log.csv:
user,time_stamp,btag,cate,brand, about 723 million rows of 22 days, btag one of pv (a page view), cart, fav, buy.

The last day tests, as is usual; the day before validates and the six before that train. (Published results train on
seven days and mostly have no validation of their own: BARS's TaobaoAd_x1 stops early on the test day.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import polars as pl
import typer

from embtables.datasets.histories import Events, LatestEvents
from embtables.datasets.interaction_log import ITEM, USER, Log, LogOptions, write_log
from embtables.datasets.key_column import KeyColumn
from embtables.datasets.options import History, MaxRejected, MinCount, Seed, Without
from embtables.datasets.prepared import PreparedDataset
from embtables.datasets.reader import Reader
from embtables.datasets.rejections import DEFAULT_LIMIT, Fault, Rejections
from embtables.datasets.side_tables import Side, integers, read_side
from embtables.datasets.splits import row_uniforms
from embtables.datasets.text import Format, read_columns, read_text
from embtables.datasets.vocabulary import MISSING
from embtables.datasets.writing import Writer

CATEGORY, BRAND, PRICE, POSITION, TIME = "cate_id", "brand", "price", "pid", "time_stamp"
AD_IDS = (CATEGORY, "campaign_id", "customer", BRAND)
PROFILE = (
    *("cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level", "shopping_level", "occupation"),
    "new_user_class_level",
)
BEHAVIORS = ("pv", "cart", "fav", "buy")
FIRST, DAY, DAYS = 1_494_000_000, 86_400, 8  # seconds: 2017-05-06, 0:00 in Beijing


@dataclass(frozen=True)
class Alimama(Reader):
    """Ali's display ads with clicks; of the eight days the last tests, the one before validates.

    Histories hold the ads that the user clicked (``history_of`` "clicks"), or the categories and brands in the log of
    behaviors ("views"). ``users`` is a share of the users, chosen by a hash of their id and the seed.
    """

    kind: ClassVar[str] = "alimama"
    input_help: ClassVar[str] = "Folder of raw_sample.csv and the others."
    example: ClassVar[str] = "Example: embtables prepare alimama taobao_ads data/ads --history-of views --users 0.1"

    history_of: Annotated[
        Literal["clicks", "views"], typer.Option(help="Clicked ads, or categories and brands of behavior_log.csv.")
    ] = "clicks"
    behaviors: Annotated[tuple[str, ...], typer.Option(help="What counts as a view: some of pv,cart,fav,buy.")] = (
        "pv",
    )
    users: Annotated[float, typer.Option(help="Share of the users, chosen by a hash of their id.")] = 1.0
    history: History = 50
    min_count: MinCount = 1
    seed: Seed = 0
    max_rejected: MaxRejected = DEFAULT_LIMIT
    without: Without = ()

    def __post_init__(self) -> None:
        if self.history_of not in ("clicks", "views"):
            raise ValueError(f"history_of '{self.history_of}': 'clicks' or 'views' is needed")
        if self.history_of == "views" and self.history < 1:
            raise ValueError("history 0: histories of views need a length of at least 1")
        if not self.behaviors or not set(self.behaviors) <= set(BEHAVIORS):
            raise ValueError(f"behaviors {','.join(self.behaviors)!r}: some of {', '.join(BEHAVIORS)} are needed")
        if not 0 < self.users <= 1:
            raise ValueError(f"users {self.users}: a share above 0 and up to 1 is needed")
        self.log_options()

    def log_options(self) -> LogOptions:
        return LogOptions("time", history=self.history, min_count=self.min_count, seed=self.seed, without=self.without)

    def inputs(self, source: Path) -> list[Path]:
        names = ["raw_sample", "ad_feature", "user_profile", *(["behavior_log"] if self.history_of == "views" else [])]
        return [_find(source, name) for name in names]

    def write(self, source: Path, writer: Writer) -> None:
        _fill(writer, self.inputs(source), self)


def prepare_alimama(
    source: str | Path, out: str | Path, config: Alimama = Alimama(), *, progress: bool = False
) -> PreparedDataset:
    """Prepares the folder of the files; behavior_log.csv is read for histories of views only.

    Features: user_id and the user's profile, item_id (the ad) with cate_id, campaign_id, customer, brand and its price
    in steps of 19 %, and pid. Histories: of clicks, the ads with all that is known of them; of views,
    ``cate_id_history`` and ``brand_history``. Groups are users, slices go by ad.

    Memory at the peak: about 200 bytes per impression. Of the log of behaviors stays what histories can hold, the
    latest ``history`` entries between two impressions of a user, at 120 bytes each: with 50, and views at random times,
    11 per impression, 35 GB for all users. A share of the users takes that share.

    Example::

        data = prepare_alimama("taobao_ads", "data/ads", Alimama(history_of="views", users=0.1))
    """
    return config.prepare(source, out, progress=progress)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.csv", folder / f"{name}.csv.gz"):
        if path.is_file():
            return path
    raise ValueError(f"{folder}: no {name}.csv (or {name}.csv.gz) there")


def _fill(writer: Writer, inputs: Sequence[Path], config: Alimama) -> None:
    log, columns = _read_sample(writer, inputs[0], config)
    ads, users = pl.Series(np.unique(log.items)), pl.Series(np.unique(log.users))
    log.items_known, known = read_side(_ads(inputs[1]), ads, ads.to_numpy(), config.max_rejected, writer)
    columns |= known
    log.users_known, known = read_side(_profiles(inputs[2]), users, users.to_numpy(), config.max_rejected, writer)
    columns |= known
    if config.history_of == "views":
        log.events = _read_views(writer, inputs[3], log, config)
    write_log(writer, log, config.log_options(), columns=columns)


def _read_sample(writer: Writer, path: Path, config: Alimama) -> tuple[Log, dict[str, KeyColumn]]:
    layout = Format(",", read_columns(path, ("user", TIME, "adgroup_id", POSITION, "nonclk", "clk")), header_lines=1)
    rejections = Rejections(config.max_rejected)
    advance = writer.meter(path, title="Reading impressions")
    position, parts = KeyColumn(), []
    for block in read_text(path, layout, rejections, advance):
        numbers = {USER: "user", ITEM: "adgroup_id", TIME: TIME, "clk": "clk", "nonclk": "nonclk"}
        frame = block.frame.select(
            *(integers(column).alias(name) for name, column in numbers.items()),
            POSITION,
            pl.Series("row", block.lines),
        )
        raw = block.frame
        outside = ~frame[TIME].is_between(FIRST, FIRST + DAYS * DAY - 1)
        one_of_two = frame["clk"].is_between(0, 1) & (frame["clk"] + frame["nonclk"] == 1)
        faults = {
            "no integer user and ad": Fault(
                frame[USER].is_null() | frame[ITEM].is_null(), raw.select("user", "adgroup_id")
            ),
            "no valid time": Fault(frame[TIME].is_null(), raw[TIME]),
            "a time outside 2017-05-06 to 05-13": Fault(outside, raw[TIME]),
            "clk and nonclk are not 0 and 1": Fault(~one_of_two.fill_null(False), raw.select("clk", "nonclk")),
        }
        good = rejections.passing(faults, block.lines, lambda line: f"{path}:{line}")
        good &= _chosen(frame[USER], config)
        frame = frame.filter(pl.Series(good))
        position.add(frame[POSITION])
        parts.append(frame.select(USER, ITEM, TIME, "row", pl.col("clk").cast(pl.Int8)))
    writer.record(rejections)
    rows = pl.concat(parts)
    if len(rows) == 0:
        raise ValueError(f"{path}: no impression of the chosen users")
    writer.extra["rows_chosen"] = len(rows)
    times = rows[TIME].to_numpy()
    log = Log(
        rows[USER].to_numpy(),
        rows[ITEM].to_numpy(),
        times * 1000,
        rows["row"].to_numpy(),
        rows["clk"].to_numpy(),
        {POSITION: position.take_keys()},
        splits=np.maximum((times - FIRST) // DAY - (DAYS - 3), 0).astype(np.int8),
    )
    return log, {POSITION: position}


def _chosen(users: pl.Series, config: Alimama) -> np.ndarray:
    if config.users == 1:
        return np.ones(len(users), bool)
    return row_uniforms(users.fill_null(0).to_numpy(), config.seed) < config.users


def _ads(path: Path) -> Side:
    layout = Format(",", read_columns(path, ("adgroup_id", *AD_IDS, PRICE)), header_lines=1)
    price = pl.col(PRICE).cast(pl.Float64, strict=False)
    level = (4 * (price + 1).log(2)).floor().cast(pl.Int64)  # a step is a factor of 2 ** (1 / 4)
    faults = {f"no integer in '{name}'": _no_integer(name) for name in AD_IDS}
    faults |= {"no valid price": ~price.is_between(0, 2**52) | _unparsed(PRICE, price)}
    values = {name: integers(name) for name in AD_IDS} | {PRICE: level}
    return Side(path, layout, integers("adgroup_id"), values, faults=faults)


def _profiles(path: Path) -> Side:
    layout = Format(",", read_columns(path, ("userid", *PROFILE)), header_lines=1)
    faults = {f"no integer in '{name}'": _no_integer(name) for name in PROFILE}
    return Side(path, layout, integers("userid"), {name: integers(name) for name in PROFILE}, faults=faults)


def _no_integer(column: str) -> pl.Expr:
    """True where a value is neither an integer nor empty nor NULL."""
    return _unparsed(column, integers(column))


def _unparsed(column: str, parsed: pl.Expr) -> pl.Expr:
    return parsed.is_null() & pl.col(column).is_not_null() & (pl.col(column) != "NULL")


def _read_views(writer: Writer, path: Path, log: Log, config: Alimama) -> Events:
    layout = Format(",", read_columns(path, ("user", TIME, "btag", "cate", BRAND)), header_lines=1)
    rejections = Rejections(config.max_rejected)
    advance = writer.meter(path, title="Reading behaviors")
    latest = LatestEvents(log.users, log.times, config.history)
    for block in read_text(path, layout, rejections, advance):
        frame = block.frame.select(*(integers(name) for name in ("user", TIME, "cate", BRAND)), "btag")
        raw = block.frame
        no_category = raw.select(_no_integer("cate") | _no_integer(BRAND)).to_series()
        known = frame["btag"].is_in(BEHAVIORS).fill_null(False)
        faults = {
            "no integer user": Fault(frame["user"].is_null(), raw["user"]),
            "no valid time": Fault(~frame[TIME].is_between(0, 2**40).fill_null(False), raw[TIME]),
            f"no btag of {', '.join(BEHAVIORS)}": Fault(~known, raw["btag"]),
            "no integer cate and brand": Fault(no_category, raw.select("cate", BRAND)),
        }
        good = rejections.passing(faults, block.lines, lambda line: f"{path}:{line}")
        good &= frame["btag"].is_in(config.behaviors).fill_null(False).to_numpy()
        frame = frame.filter(pl.Series(good))
        category, brand = (frame[name].fill_null(MISSING).to_numpy() for name in ("cate", BRAND))
        latest.add(frame["user"].to_numpy(), frame[TIME].to_numpy() * 1000, {CATEGORY: category, BRAND: brand})
    rejections.check(final=True)
    writer.report(rejections.lines())
    events = latest.events()
    writer.extra["behaviors"] = {
        "rows_read": rejections.rows_read,
        "rows_rejected": rejections.counts,
        "rows_kept": len(events.users),
    }
    return events
