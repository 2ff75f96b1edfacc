"""Log files as people have them, each from the file to a trained model."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from decoded import all_decoded, train_din
from typer.testing import CliRunner

from embtables.cli.prepare import app
from embtables.datasets import PreparedDataset

START = datetime(2019, 10, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Row:
    user: str
    item: str
    time: datetime
    label: int
    rating: int
    device: str | None
    price: float | None
    tags: tuple[str, ...]


def truth(seed: int = 0, count: int = 400) -> list[Row]:
    draw = random.Random(seed)
    minutes = sorted(draw.randrange(0, 60 * 24 * 30) for _ in range(count))
    return [
        Row(
            f"u{draw.randrange(12)}",
            f"i{draw.randrange(25)}",
            START + timedelta(minutes=minute),
            draw.randrange(2),
            draw.randrange(1, 6),
            draw.choice(["phone", "téléphone", None]),
            draw.choice([None, *(number / 4 for number in range(40))]),
            tuple(f"t{draw.randrange(6)}" for _ in range(draw.randrange(4))),
        )
        for minute in minutes
    ]


ROWS = truth()
SILENT = sum(row.device is None for row in ROWS) / len(ROWS)


@dataclass
class Case:
    """A file, the options that it takes, and what is to be found."""

    write: Callable[[Path], None]
    options: Sequence[str] = ()
    name: str = "log.csv"
    features: Sequence[str] = ("device",)
    dense: bool = False
    lists: bool = False
    label: Callable[[Row], int] | None = lambda row: row.label
    kept: Callable[[Row], bool] = lambda row: True
    timed: bool = True
    user: Callable[[Row], Any] = lambda row: row.user
    rejected: dict[str, int] = field(default_factory=dict)
    said: Sequence[str] = ()


def table(header: Sequence[str], rows: Sequence[Sequence[object]], separator: str = ",", **options: Any) -> str:
    written = io.StringIO()
    writer = csv.writer(written, delimiter=separator, lineterminator="\n", **options)
    writer.writerows([*([header] if header else []), *rows])
    return written.getvalue()


def shop_export(path: Path) -> None:
    """Quotes with line breaks and separators inside, CRLF, a byte order mark."""
    header = ["user_id", "item_id", "timestamp", "comment", "click", "device"]
    remarks = ['a, "b"', "two\nlines", "", "x" * 200_000]
    rows = [
        (
            row.user,
            row.item,
            row.time.isoformat(),
            remarks[min(n % 9, 3)] if n % 50 else remarks[3],
            row.label,
            row.device,
        )
        for n, row in enumerate(ROWS)
    ]
    path.write_bytes(b"\xef\xbb\xbf" + table(header, rows).replace("\n", "\r\n").encode())


def german_spreadsheet(path: Path) -> None:
    header = ["Kunde", "Artikel", "Datum", "Preis", "Gerät", "gekauft"]
    rows = [
        (
            row.user,
            row.item,
            row.time.strftime("%d.%m.%Y %H:%M"),
            "" if row.price is None else str(row.price).replace(".", ","),
            row.device,
            row.label,
        )
        for row in ROWS
    ]
    path.write_bytes(("sep=;\n" + table(header, rows, ";")).replace("\n", "\r\n").encode("cp1252"))


def american_spreadsheet(path: Path) -> None:
    """What a spreadsheet calls Unicode text: UTF-16 with tabs, quotes around everything."""
    header = ["User ID", "Item ID", "Date", "Device", "Clicked"]
    rows = [(row.user, row.item, row.time.strftime("%m/%d/%Y %I:%M %p"), row.device, row.label) for row in ROWS]
    path.write_bytes(table(header, rows, "\t", quoting=csv.QUOTE_ALL).encode("utf-16"))


def warehouse(path: Path) -> None:
    """Hive's text: control characters between fields, no header, \\N for nothing."""
    rows = [
        [
            row.user,
            row.item,
            row.time.strftime("%Y%m%d%H%M%S"),
            row.device or r"\N",
            r"\N" if row.price is None else row.price,
        ]
        for row in ROWS
    ]
    path.write_bytes(gzip.compress("".join("\x01".join(map(str, row)) + "\n" for row in rows).encode()))


def data_frame(path: Path) -> None:
    """What pandas writes: the index without a name, lists as Python shows them, nan."""
    header = ["", "user", "item", "ts", "tags", "device", "price"]
    rows = [
        (n, row.user, row.item, f"{row.time.timestamp():.1f}", list(row.tags), row.device or "nan", row.price or "nan")
        for n, row in enumerate(ROWS)
    ]
    path.write_bytes(pa.compress(table(header, rows).encode(), codec="zstd", asbytes=True))


def database(path: Path) -> None:
    """Aligned by spaces, with NULL, and milliseconds."""
    rows = [
        (
            row.user,
            row.item,
            int(row.time.timestamp() * 1000),
            row.device or "NULL",
            row.label,
            ",".join(row.tags) or "NULL",
        )
        for row in ROWS
    ]
    path.write_text("\n".join(" | ".join(f"{value!s:<12}" for value in row) for row in [NAMES, *rows]) + "\n")


NAMES = ("uid", "item_id", "event_time", "device", "label", "tags")


def joined_days(path: Path) -> None:
    """Files of two days, one behind the other, each with its header, in the form of Twitter's times."""
    header = ["user_id", "item_id", "created_at", "device", "is_like"]
    rows = [
        (
            row.user,
            row.item,
            row.time.strftime("%a %b %d %H:%M:%S +0000 %Y"),
            row.device,
            "true" if row.label else "false",
        )
        for row in ROWS
    ]
    path.write_bytes(bz2.compress((table(header, rows[:150], "\t") + table(header, rows[150:], "\t")).encode()))


def lake(path: Path) -> None:
    """Parquet with hashes as ids, lists, a category, NaN, and times of another zone."""
    frame = pl.DataFrame(
        {
            "user_id": pl.Series([hashed(row) for row in ROWS], dtype=pl.UInt64),
            "item_id": [row.item for row in ROWS],
            "event_time": pl.Series([row.time.replace(tzinfo=None) for row in ROWS]),
            "device": pl.Series([row.device for row in ROWS], dtype=pl.Categorical),
            "price": [math.nan if row.price is None else row.price for row in ROWS],
            "tags": [list(row.tags) or None for row in ROWS],
            "label": [bool(row.label) for row in ROWS],
        }
    )
    zoned = pl.col("event_time").dt.replace_time_zone("UTC").dt.convert_time_zone("America/New_York")
    frame.with_columns(zoned).write_parquet(path)


def hashed(row: Row) -> int:
    return 2**63 - 3 + int(row.user[1:])


def atomic_ratings(path: Path) -> None:
    header = ["user_id:token", "item_id:token", "rating:float"]
    path.write_text(table(header, [(row.user, row.item, f"{row.rating}.0") for row in ROWS], "\t"))


def old_machine(path: Path) -> None:
    """Carriage returns, spaces behind commas, some times that are none."""
    lines = ["user, item, date, device, y"]
    lines += [
        f"{row.user}, {row.item}, {row.time:%Y/%m/%d %H:%M:%S}, {row.device or 'N/A'}, {row.label}" for row in ROWS
    ]
    lines[20:20] = ["u1, i1, N/A, phone, 1", "u1, i1, soon, phone, 1"]
    path.write_bytes("".join(line + "\r" for line in lines).encode())


def two_colons(path: Path) -> None:
    """MovieLens' 1M, as any log."""
    path.write_text("".join(f"{row.user}::{row.item}::{row.rating}::{row.time.timestamp():.0f}\n" for row in ROWS))


CASES = {
    "shop export": Case(shop_export, ["--context", "device"], said=["column 'click' is taken for the label"]),
    "German spreadsheet": Case(
        german_spreadsheet,
        [*("--user", "Kunde", "--item", "Artikel", "--time", "Datum", "--label", "gekauft", "--context", "Gerät")]
        + ["--dense", "Preis", "--encoding", "cp1252"],
        features=("Gerät",),
        dense=True,
    ),
    "American spreadsheet": Case(american_spreadsheet, ["--context", "Device"], features=("Device",), name="log.txt"),
    "warehouse": Case(
        warehouse,
        ["--columns", "user_id,item_id,time,device,price", "--dense", "price", "--context", "device"],
        dense=True,
        label=None,
        said=["no label: every row is a click", "column 'time': time (digits of a date)"],
    ),
    "data frame": Case(
        data_frame,
        ["--context", "device", "--dense", "price", "--lists", "tags"],
        dense=True,
        lists=True,
        label=None,
        said=[f"column 'device': {SILENT:.0%} of the values are 'nan', which is read as a missing value"],
    ),
    "database": Case(database, ["--context", "device", "--lists", "tags"], lists=True),
    "joined days": Case(joined_days, ["--context", "device"], said=["1 lines skipped: the header again"]),
    "lake": Case(
        lake,
        ["--context", "device", "--dense", "price", "--lists", "tags"],
        name="log.parquet",
        dense=True,
        lists=True,
        user=hashed,
    ),
    "atomic ratings": Case(
        atomic_ratings,
        ["--label", "rating", "--positive-from", "4", "--leave-out", "3", "--history", "0"],
        name="ml.inter",
        features=(),
        label=lambda row: int(row.rating >= 4),
        kept=lambda row: row.rating != 3,
        timed=False,
    ),
    "old machine": Case(
        old_machine,
        ["--context", "device", "--max-rejected", "0.05"],
        rejected={"no valid time in 'date'": 2},
        said=["2 rows rejected: no valid time in 'date' (first", "log.csv:21: 'N/A')"],
    ),
    "two colons": Case(
        two_colons,
        ["--columns", "user_id,item_id,rating,timestamp", "--label", "rating", "--positive-from", "4"],
        name="ratings.dat",
        features=(),
        label=lambda row: int(row.rating >= 4),
    ),
}


def prepare(source: Path, out: Path, options: Sequence[str]) -> tuple[PreparedDataset, str]:
    arguments = ["interactions", str(source), str(out), "--split", "random", *options]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return PreparedDataset(out), result.output


@pytest.mark.parametrize("case", CASES)
def test_from_file_to_trained_model(tmp_path: Path, case: str) -> None:
    of = CASES[case]
    of.write(tmp_path / of.name)
    data, shown = prepare(tmp_path / of.name, tmp_path / "out", of.options)
    for sentence in of.said:
        assert sentence in shown
    kept = [row for row in ROWS if of.kept(row)]
    assert data.manifest["rows_rejected"] == of.rejected
    assert data.manifest["rows_read"] == len(ROWS) + sum(of.rejected.values())
    assert data.manifest["users"] == 12 and data.manifest["items"] == 25 and "12 users, 25 items" in shown
    first, last = (row.time.isoformat(timespec="seconds") for row in (kept[0], kept[-1]))
    assert not of.timed or f"from {first} to {last}" in shown
    assert of.timed == ("first_time" in data.manifest)

    rows = all_decoded(data)
    if of.label is None:  # every row is a click, with a negative beside it
        assert sum(row["label"] for row in rows) == len(kept)
        rows = [row for row in rows if row["label"]]
    (device,) = of.features or (None,)
    found = Counter(
        (row["user_id"], row["item_id"], row["label"], row[device] if device else None, tuple(row.get("tags", ())))
        for row in rows
    )
    assert found == Counter(
        (
            of.user(row),
            row.item,
            1 if of.label is None else of.label(row),
            row.device if device else None,
            row.tags if of.lists else (),
        )
        for row in kept
    )
    if of.dense:
        (name,) = data.dense_features
        facts = data.manifest["dense"][name]
        values = [row.price for row in kept]
        if case == "data frame":  # where a price of 0 was written as nan
            values = [value or None for value in values]
        scaled = [row[name] for row in rows]
        back = sorted(round(4 * (value * facts["deviation"] + facts["mean"])) / 4 for value in scaled if value)
        assert back == sorted(value for value in values if value is not None)
        assert scaled.count(0) == sum(value is None for value in values)
    assert 0 <= train_din(data, tmp_path / "run") <= 1
