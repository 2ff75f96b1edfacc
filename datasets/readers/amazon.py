"""Amazon reviews: a review is a positive, and a product that the user never reviewed its negative.

Files (McAuley et al., jmcauley.ucsd.edu/data/amazon): one JSON object per line. Reviews: reviewerID, asin and
unixReviewTime in the releases of 2014 and 2018, user_id, parent_asin and timestamp (ms) in that of 2023. Metadata:
``categories``, a list of paths, in 2014, when lines were Python literals; one path, as JSON, in ``category`` of 2018
and ``categories`` of 2023.

The protocol is DIN's (Zhou et al., KDD 2018, section 6.1, and the authors' repository zhougr1993/DeepInterestNetwork:
utils/2_remap_id.py, din/build_dataset.py): each user's reviews in the order of time and, as times are whole days, of
the file; a review's history is all before it, so the first is no example; one negative, drawn from all reviewed
products alike among those that the user never reviews; a product's category is the last element of its last path; the
last review tests. DIN has no validation split; here the one before the last validates. Electronics (5-core, 2014):
1,689,188 reviews of 192,403 users, 63,001 products, 801 categories (Table 1).
"""

from __future__ import annotations

import ast
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import polars as pl
import typer

from embtables.datasets.interaction_log import ITEM, USER, ItemFeatures, Log, LogOptions, write_log
from embtables.datasets.key_column import KeyColumn
from embtables.datasets.negatives import Negatives
from embtables.datasets.options import History, MaxRejected, MinCount, Seed, Shares, Split, Without
from embtables.datasets.prepared import PreparedDataset
from embtables.datasets.reader import Reader
from embtables.datasets.rejections import DEFAULT_LIMIT, Rejections
from embtables.datasets.splits import DEFAULT_SHARES
from embtables.datasets.text import read_lines
from embtables.datasets.writing import Writer

CATEGORY = "category"
REVIEW_FIELDS = (("reviewerID", "asin", "unixReviewTime", 1000), ("user_id", "parent_asin", "timestamp", 1))
PRODUCT_FIELDS = ("parent_asin", "asin")  # of 2023, and before


@dataclass(frozen=True)
class Amazon(Reader):
    """Amazon's reviews and products, of any release, by DIN's protocol.

    How reviews become examples; the defaults are DIN's protocol, with histories of up to 100 products.
    """

    kind: ClassVar[str] = "amazon"
    input_help: ClassVar[str] = "Reviews, one JSON object per line."
    example: ClassVar[str] = (
        "Example: embtables prepare amazon reviews_Electronics_5.json.gz data/electronics "
        "--metadata meta_Electronics.json.gz"
    )

    max_rejected: float = DEFAULT_LIMIT
    negatives: Negatives = field(default_factory=lambda: Negatives(1, "uniform", None))
    log: LogOptions = field(default_factory=lambda: LogOptions(split="leave-last-out", history=100, min_history=1))
    metadata: Path | None = None

    def inputs(self, source: Path) -> list[Path]:
        return [source, *([self.metadata] if self.metadata is not None else [])]

    def settings(self, source: Path) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "metadata"}  # it is among the inputs

    def write(self, source: Path, writer: Writer) -> None:
        _fill(writer, self.inputs(source), self)

    @classmethod
    def constructor(cls) -> Callable[..., Reader]:
        return _from_options


def prepare_amazon(
    reviews: str | Path,
    out: str | Path,
    metadata: str | Path | None = None,
    config: Amazon = Amazon(),
    *,
    progress: bool = False,
) -> PreparedDataset:
    """Prepares reviews of any release, and with ``metadata`` the products' categories.

    Features: user_id, item_id and ``category``; histories of the latter two; groups are users; slices go by product.

    Example::

        data = prepare_amazon("reviews_Electronics_5.json.gz", "data/electronics", "meta_Electronics.json.gz")
    """
    if metadata is not None:
        config = replace(config, metadata=Path(metadata))
    return config.prepare(reviews, out, progress=progress)


def _fill(writer: Writer, inputs: list[Path], config: Amazon) -> None:
    rejections = Rejections(config.max_rejected)
    users: list[str] = []
    items: list[str] = []
    times: list[int] = []
    lines: list[int] = []
    for number, review in _objects(inputs[0], rejections, writer, "Reading reviews"):
        found = _review(review)
        if found is None:
            rejections.reject("no user, product and time", f"{inputs[0]}:{number}")
        else:
            users.append(sys.intern(found[0]))  # each distinct text lies in memory once
            items.append(sys.intern(found[1]))
            times.append(found[2])
            lines.append(number)
    rejections.check(final=True)
    if not lines:
        raise ValueError(f"{inputs[0]}: the file holds no reviews")
    writer.rows_read, writer.rows_rejected = rejections.rows_read, rejections.counts
    writer.report(rejections.lines())
    columns = {USER: KeyColumn(), ITEM: KeyColumn()}
    log = Log(
        columns[USER].keys_of(pl.Series(users, dtype=pl.String)),
        columns[ITEM].keys_of(pl.Series(items, dtype=pl.String)),
        np.array(times, np.int64),
        np.array(lines, np.int64),
    )
    log.times += _places(log.users, log.times)
    if len(inputs) > 1:
        categories = _categories(inputs[1], columns[ITEM].all_values(), config, writer)
        columns[CATEGORY] = KeyColumn()
        keys = columns[CATEGORY].keys_of(categories)
        log.items_known = ItemFeatures(np.arange(len(keys)), {CATEGORY: keys})
    write_log(writer, log, config.log, config.negatives, columns)


def _review(review: dict[str, Any]) -> tuple[str, str, int] | None:
    """User, product and time in ms, where the review has all three."""
    for user, item, time, scale in REVIEW_FIELDS:
        if user in review:
            texts, moment = (_text(review.get(user)), _text(review.get(item))), review.get(time)
            if texts[0] and texts[1] and isinstance(moment, int) and abs(moment) < 2**50:
                return texts[0], texts[1], moment * scale
    return None


def _text(value: object) -> str | None:
    """The value where it is a text that can be stored (JSON may hold half a surrogate pair)."""
    try:
        return value if isinstance(value, str) and value.encode() else None
    except UnicodeEncodeError:
        return None


def _places(users: np.ndarray, times: np.ndarray) -> np.ndarray:
    """0, 1, … for rows of one user and time, in the order of the file: as ms they make it an order of time."""
    order = np.lexsort((times, users))
    new = np.r_[True, (np.diff(users[order]) != 0) | (np.diff(times[order]) != 0)]
    row = np.arange(len(order))
    places = np.empty(len(order), np.int64)
    places[order] = row - np.maximum.accumulate(np.where(new, row, 0))
    return places


def _categories(path: Path, items: pl.Series, config: Amazon, writer: Writer) -> pl.Series:
    """The category of each product, null where there is none; of two lines about a product the first counts."""
    wanted = set(items)
    known: dict[str, str | None] = {}
    rejections = Rejections(config.max_rejected)
    for number, product in _objects(path, rejections, writer, "Reading metadata"):
        item = next((product[name] for name in PRODUCT_FIELDS if name in product), None)
        if not isinstance(item, str):
            rejections.reject("no product", f"{path}:{number}")
        elif item in wanted:
            known.setdefault(item, _category(product))
    rejections.check(final=True)
    writer.report(rejections.lines())
    if not known:
        raise ValueError(f"{path}: it knows none of the {len(wanted):,} reviewed products: of another category?")
    unknown = len(wanted) - sum(category is not None for category in known.values())
    if unknown == len(wanted):
        raise ValueError(f"{path}: it gives none of the {len(wanted):,} reviewed products a category: is it metadata?")
    writer.extra["items_without_category"] = unknown
    if unknown:
        writer.report([f"{unknown:,} of {len(wanted):,} products have no category: they get id 0"])
    return pl.Series([known.get(item) for item in items], dtype=pl.String)


def _category(product: dict[str, Any]) -> str | None:
    """The last element of the last path, or of the only one."""
    path = product.get("categories") or product.get("category") or [None]
    if isinstance(path, list) and isinstance(path[-1], list):
        path = path[-1] or [None]
    return _text(path[-1]) if isinstance(path, list) else None


def _objects(path: Path, rejections: Rejections, writer: Writer, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines' objects, in JSON or as Python literals, with their numbers."""
    advance = writer.meter(path, title=what)
    for number, line in read_lines(path, rejections, advance):
        value = _parsed(line)
        if isinstance(value, dict):
            yield number, value
        else:
            rejections.reject("no JSON object", f"{path}:{number}")


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a backslash in a title
            return ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _from_options(
    metadata: Annotated[
        Path | None, typer.Option(help="The products' metadata; without it there are no categories.")
    ] = None,
    split: Split = "leave-last-out",
    shares: Shares = DEFAULT_SHARES,
    negatives: Annotated[int, typer.Option(help="Negatives per review; all products are equally likely.")] = 1,
    history: History = 100,
    min_history: Annotated[int, typer.Option(help="Reviews with fewer before them give no example.")] = 1,
    min_count: MinCount = 1,
    seed: Seed = 0,
    max_rejected: MaxRejected = DEFAULT_LIMIT,
    without: Without = (),
) -> Amazon:
    options = LogOptions(split, shares, history, min_count, seed, min_history, without)
    return Amazon(max_rejected, Negatives(negatives, "uniform", None), options, metadata)
