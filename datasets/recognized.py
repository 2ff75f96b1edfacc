"""What the columns of a log are, told by their names and values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from embtables.datasets.tabular import Table

ROLES = {
    "user": (
        *("user_id", "userid", "user", "uid", "visitorid", "visitor_id", "customer_id", "customerid", "reviewerid"),
        *("member_id", "account_id", "client_id"),
    ),
    "item": (
        *("item_id", "itemid", "item", "iid", "article_id", "product_id", "movie_id", "movieid", "news_id", "video_id"),
        *("business_id", "asin", "content_id", "click_article_id", "productid", "track_id", "song_id", "book_id"),
        *("goods_id", "ad_id", "sku"),
    ),
    "time": (
        *("timestamp", "timestamp_ms", "time", "ts", "datetime", "date", "event_time", "unix_time", "time_ms"),
        *(
            "click_timestamp",
            "unixreviewtime",
            "created_at",
            "event_timestamp",
            "time_stamp",
            "date_time",
            "click_time",
        ),
    ),
}
LABELS = (
    *(
        "label",
        "target",
        "y",
        "click",
        "clicked",
        "is_click",
        "isclick",
        "is_clicked",
        "clk",
        "conversion",
        "converted",
    ),
    *(
        "is_conversion",
        "is_converted",
        "bought",
        "purchased",
        "is_purchase",
        "is_purchased",
        "like",
        "liked",
        "is_like",
    ),
    *("is_liked", "positive", "is_positive"),
)
NO_COLUMN = "none"
"""What --label and --time are where the log has no such column, whatever the names of its columns."""
WORDS = {"true": 1, "t": 1, "yes": 1, "false": 0, "f": 0, "no": 0}


def find_role(table: Table, role: str, given: str | None) -> str | None:
    """The column of the user, the item or the time: the given one, or the first with a known name.

    Raises:
        ValueError: the given column is not there.
    """
    if given is not None:
        if given not in table.names:
            raise no_column(table, given)
        return given
    known = {_plain(name): name for name in reversed(table.names)}
    return next((known[name] for name in ROLES[role] if name in known), None)


def no_column(table: Table, name: str) -> ValueError:
    """The error about a column that is not there."""
    if table.without_header:
        return no_header(table.path, table)
    return ValueError(f"{table.path}: no column '{name}'; there are {', '.join(table.names)}")


def no_header(path: Path, table: Table) -> ValueError:
    """The error about a first line that looks like a row."""
    line = ", ".join(table.header)
    return ValueError(
        f"{path}:1: the first line looks like a row and not like a header ({line[:80]}): name the columns of a file "
        "without a header, e.g. --columns user_id,item_id,timestamp"
    )


def find_labels(names: Sequence[str], besides: Sequence[str]) -> list[str]:
    """The columns whose names are those of labels, but for the given ones."""
    return [name for name in names if _plain(name) in LABELS and name not in besides]


def choose_label(path: Path, columns: Sequence[pl.Series]) -> tuple[str | None, list[str]]:
    """Which of the columns with names of labels is the label, if any, by their first values; and what to say about it.

    Raises:
        ValueError: several of them may be, or one is of numbers other than 0 and 1.
    """
    binary: list[pl.Series] = []
    numbers: list[pl.Series] = []
    others: list[pl.Series] = []
    for values in columns:
        present = values.len() - values.null_count()
        if values.dtype == pl.String or values.dtype.is_numeric() or values.dtype == pl.Boolean:
            of_labels = present and present - labels_of(values).count() <= 0.01 * present
            of_numbers = present and values.cast(pl.Float64, strict=False).count() >= 0.99 * present
            (binary if of_labels else numbers if of_numbers else others).append(values)
        else:
            others.append(values)
    if len(binary) > 1:
        first, *rest = (f"--label {values.name}" for values in binary)
        raise ValueError(
            f"{path}: columns {' and '.join(repr(values.name) for values in binary)} may each be the label: give "
            f"{first}, {', '.join(rest)} or --label {NO_COLUMN} (every row is a click)"
        )
    if not binary and numbers:
        name, shown = numbers[0].name, numbers[0].drop_nulls()[0]
        raise ValueError(
            f"{path}: column '{name}' has the name of a label, but not only 0 and 1 (the first value is {shown}): give "
            f"--label {name} --positive-from NUMBER, or --label {NO_COLUMN} (every row is a click)"
        )
    said = [f"column '{values.name}' has the name of a label, but holds no 0 and 1: not used" for values in others]
    if not binary:
        return None, said
    name = binary[0].name
    return name, [
        f"column '{name}' is taken for the label, by its name: --label {NO_COLUMN} makes every row a click",
        *said,
    ]


def labels_of(values: pl.Series, positive_from: float | None = None) -> pl.Series:
    """0 or 1, Int8, null where the value is neither, nor true or false. With ``positive_from``, any number."""
    numbers = numbers_of_labels(values)
    if positive_from is not None:
        return (numbers >= positive_from).cast(pl.Int8)
    return pl.select(pl.when(numbers.is_in([0.0, 1.0])).then(numbers)).to_series().cast(pl.Int8)


def numbers_of_labels(values: pl.Series) -> pl.Series:
    """Float64, null where the value is no number."""
    numbers = values.cast(pl.Float64, strict=False).fill_nan(None)
    if values.dtype != pl.String:
        return numbers
    words = values.str.to_lowercase().replace_strict(WORDS, default=None, return_dtype=pl.Float64)
    return numbers.fill_null(words)


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")
