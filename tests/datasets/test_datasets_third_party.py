"""A reader of another package: found by its entry point, and as good on the command line as those built in."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pytest

from embtables.cli.app import run
from embtables.datasets import Block, PreparedDataset, Reader, Rejections, RowReader, Schema, readers

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "third_party"
ITEMS = ["tea", "salt", *(f"item{number}" for number in range(30))]


def install(site: Path, name: str, points: dict[str, str]) -> None:
    """Writes what pip leaves in site-packages of a package with entry points."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[embtables.readers]", *lines]) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An environment in which another package has registered its reader."""
    folder = tmp_path / "site-packages"
    install(folder, "outsider", {"oddlog": "odd_log:OddLog"})
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("COLUMNS", "200")
    forget()
    yield folder
    forget()
    sys.modules.pop("odd_log", None)


def forget() -> None:
    """Has the next command look for readers anew, as a new process does."""
    readers._third_party.cache_clear()
    sys.modules.pop("embtables.cli.prepare", None)


def embtables(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs one command in a process of its own, which knows the package only through its entry point."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (site, FOLDER, ROOT)))}
    command = [sys.executable, "-m", "embtables", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def command_line(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs one command in this process; returns its exit code and what it printed to stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        return run([*map(str, arguments)]), *capfd.readouterr()

    return call


def write_log(path: Path, num_rows: int = 600) -> list[dict[str, Any]]:
    """A log in the order of time, and its rows in plain Python."""
    draw, start, rows = random.Random(5), datetime(2024, 3, 1), []
    for number in range(num_rows):
        item = draw.randrange(len(ITEMS))
        row = {
            "time": (start + timedelta(minutes=number)).timestamp(),
            "user": f"u{draw.randrange(40)}",
            "item": ITEMS[item],
            "tags": [f"t{draw.randrange(6)}" for _ in range(draw.randrange(3))],
            "price": draw.randrange(1, 400) / 4,
            "bought": int(draw.random() < 0.2 + 0.02 * item),
        }
        rows.append(row)
    path.write_text("".join(line_of(row) for row in rows))
    return rows


def line_of(row: dict[str, Any]) -> str:
    end = "ok" if row["bought"] else "no"
    return f"{row['time']:.0f} {row['user']}>{row['item']} [{';'.join(row['tags'])}] {row['price']} {end}\n"


def raw(data: PreparedDataset, feature: str) -> list[str | None]:
    """The raw value of each id, None for missing and unseen values."""
    (entry,) = (entry for entry in data.manifest["features"] if entry["name"] == feature)
    return [None, None, *pl.read_parquet(data.path / entry["vocabulary"]["file"])["value"].to_list()]


def test_help_lists_it_and_its_options(site: Path, command_line: Callable[..., tuple[int, str, str]]) -> None:
    _, listed, _ = command_line("prepare", "--help")
    assert "oddlog" in listed and "A shop's odd log." in listed and "criteo" in listed
    _, shown, _ = command_line("prepare", "oddlog", "--help")
    for text in ("A shop's odd log.", "The log, as the shop writes it.", "--without", "--dearest", "--min-count"):
        assert text in shown
    assert "Rows with a higher price are malformed." in shown and "not part of the help" not in shown
    assert "Example: embtables prepare oddlog shop.log" in shown


def test_prepared_and_trained_from_the_command_line(
    site: Path, tmp_path: Path, command_line: Callable[..., tuple[int, str, str]]
) -> None:
    log, out = tmp_path / "shop.log", tmp_path / "shop"
    rows = write_log(log)
    log.write_text(log.read_text() + "# a remark\n")
    options = ("--split", "time", "--without", "tea,salt", "--min-count", 2, "--max-rejected", 0.05)
    result = embtables(site, "prepare", "oddlog", log, out, *options)
    assert result.returncode == 0, result.stderr
    assert "1 rows rejected: not a line of the shop" in result.stderr and f"{log}:601" in result.stderr

    data = PreparedDataset(out)
    assert data.manifest["kind"] == "oddlog" and data.manifest["config"]["without"] == ["tea", "salt"]
    assert data.manifest["rows_read"] == 601
    assert data.manifest["rows_rejected"] == {"not a line of the shop": 1}
    assert [entry["file"] for entry in data.manifest["inputs"]] == ["shop.log"]
    assert (data.group_feature, data.slice_feature) == ("user", "item")

    kept = [row for row in rows if row["item"] not in ("tea", "salt")]
    first, past = int(len(kept) * 0.8), int(len(kept) * 0.9)
    expected = {"train": kept[:first], "valid": kept[first:past], "test": kept[past:]}
    values = {name: raw(data, name) for name in ("user", "item", "tags")}
    for name in ("user", "item"):
        counts = Counter(row[name] for row in expected["train"])
        assert {value for value in values[name] if value} == {value for value, n in counts.items() if n >= 2}
    for split, wanted in expected.items():
        found = data.read(split).to_pylist()
        assert len(found) == len(wanted)
        for row, raw_row in zip(found, wanted):
            assert row["label"] == raw_row["bought"] and row["price"] == np.float32(raw_row["price"])
            for name in ("user", "item"):
                value = raw_row[name]
                assert values[name][row[name]] == (value if value in values[name] else None)
            tags = [values["tags"][tag] for tag in row["tags"]]
            assert tags == [tag if tag in values["tags"] else None for tag in raw_row["tags"]]

    code, _, said = command_line("prepare", "oddlog", log, out, *options)
    assert code == 0 and "reused" in said
    code, _, said = command_line("prepare", "oddlog", log, out, "--split", "time")
    assert code == 2 and "was prepared with max_rejected = 0.05, not 0.01" in said

    sizes = ("--method", "hash", "--budget", "50%", "--embedding-dim", 4, "--epochs", 1, "--batch-size", 64)
    code, _, said = command_line("train", out, "--out", tmp_path / "run", "--model", "dlrm", *sizes, "--quiet")
    assert code == 0, said
    assert 0 <= json.loads((tmp_path / "run" / "metrics.json").read_text())["test_auc"] <= 1


@pytest.mark.parametrize(
    ("line", "reason", "value"),
    [
        ("1709251200 u1>item1 [t1] 3 maybe", "not a line of the shop", ""),
        ("yesterday u1>item1 [t1] 3 ok", "no valid time in 'time'", " ('yesterday')"),
        ("1709251200 u1>item1 [t1] cheap ok", "'price' is not a number", " ('cheap')"),
        ("1709251200 u1>item1 [t1] 2000 ok", "too dear", ""),
    ],
)
def test_malformed_rows_are_counted_and_too_many_stop(
    site: Path, tmp_path: Path, line: str, reason: str, value: str
) -> None:
    from odd_log import OddLog

    log = tmp_path / "shop.log"
    write_log(log)
    log.write_text(log.read_text() + f"{line}\n")
    reader = OddLog(split="time", dearest=1000)
    assert reader.prepare(log, tmp_path / "a").manifest["rows_rejected"] == {reason: 1}
    with pytest.raises(ValueError, match=re.escape(f"{log}:601: {reason}{value}; 1 of 601 rows")):
        replace(reader, max_rejected=0).prepare(log, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_random_and_last_out_splits(site: Path, tmp_path: Path) -> None:
    from odd_log import OddLog

    log = tmp_path / "shop.log"
    rows = write_log(log)
    data = OddLog(split="leave-last-out").prepare(log, tmp_path / "last")
    users = raw(data, "user")
    last = {row["user"]: row["item"] for row in rows}
    items = raw(data, "item")
    found = {users[row["user"]]: items[row["item"]] for row in data.read("test").to_pylist()}
    assert found == {user: item if item in items else None for user, item in last.items()}

    one, other = (OddLog(seed=seed).prepare(log, tmp_path / f"seed{seed}") for seed in (1, 2))
    prices = [one.read(split).column("price").to_pylist() for split in ("train", "valid", "test")]
    assert sorted(sum(prices, [])) == sorted(row["price"] for row in rows)
    assert 420 < len(prices[0]) < 540 and other.read("train").column("price").to_pylist() != prices[0]


@dataclass(frozen=True, kw_only=True)
class Given(RowReader):
    """Yields the block that a test gives it."""

    kind: ClassVar[str] = "given"
    schema: ClassVar[Schema] = Schema("label", ["price"], ["user", "item"], ["tags"], {"seen": "item"})
    block: ClassVar[Callable[[], Any]]

    def blocks(self, source: Path, rejections: Rejections, advance: Callable[[int], None]) -> Iterator[Block]:
        yield type(self).block()


def columns(num_rows: int = 60) -> dict[str, Any]:
    return {
        "label": [row % 2 for row in range(num_rows)],
        "price": [row / 2 for row in range(num_rows)],
        "user": [row % 7 for row in range(num_rows)],
        "item": [f"i{row % 5}" for row in range(num_rows)],
        "tags": [[row % 3, 9] for row in range(num_rows)],
        "seen": [["i1", f"i{row % 5}"] for row in range(num_rows)],
    }


def prepare_given(tmp_path: Path, block: Callable[[], Any]) -> PreparedDataset:
    Given.block = staticmethod(block)
    (tmp_path / "in").write_text("x")
    return Given().prepare(tmp_path / "in", tmp_path / "out")


def test_histories_share_the_vocabulary_of_their_feature(tmp_path: Path) -> None:
    data = prepare_given(tmp_path, lambda: Block(pl.DataFrame(columns()), np.arange(60)))
    assert data.histories == {"seen": "item"} and data.list_features == ["tags"]
    items = raw(data, "item")
    train = data.read("train").to_pylist()
    for row in train:
        assert [items[value] for value in row["seen"]] == ["i1", items[row["item"]]]
    counts = Counter(value for row in train for value in (row["item"], *row["seen"]))
    assert data.frequencies["item"].tolist() == [counts[value] for value in range(len(items))]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"price": [[1.0]] * 60}, r"reader 'given': column 'price' is of type List\(Float64\), where numbers or text"),
        ({"user": [b"x"] * 60}, "reader 'given': column 'user' is of type Binary"),
        ({"tags": [3] * 60}, "reader 'given': column 'tags' is of type Int64, where lists of text or integers"),
        ({"seen": [[0.5]] * 60}, r"reader 'given': column 'seen' is of type List\(Float64\), where lists"),
        ({"item": ["i1"] * 59}, "reader 'given': .*\"item\"|reader 'given': .*'item'"),
        ({"item": None}, "reader 'given': no column 'item'; there are label, price, user, tags, seen"),
    ],
)
def test_errors_of_the_author_name_reader_and_column(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    given = {name: values for name, values in (columns() | change).items() if values is not None}
    with pytest.raises(ValueError, match=sentence):
        prepare_given(tmp_path, lambda: Block(pl.DataFrame(given), np.arange(60)))
    assert not (tmp_path / "out").exists()


def test_blocks_of_a_wrong_kind_or_with_too_few_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reader 'given': blocks.. yields dict, not a Block"):
        prepare_given(tmp_path, columns)
    with pytest.raises(ValueError, match="reader 'given': 'lines' of a block has 59 numbers for 60 rows"):
        prepare_given(tmp_path, lambda: Block(pl.DataFrame(columns()), np.arange(59)))


def test_splits_that_a_reader_cannot_make() -> None:
    with pytest.raises(ValueError, match="split 'time': 'given' has no column of times, so 'random' is needed"):
        Given(split="time")
    with pytest.raises(ValueError, match="split 'hour': one of random, time, leave-last-out is needed"):
        replace(Given(), split="hour")  # type: ignore[arg-type]


def test_an_option_without_a_default_is_named() -> None:
    from embtables.datasets.reader import command

    @dataclass(frozen=True)
    class Unfinished(Reader):
        depth: int
        kind: ClassVar[str] = "unfinished"

        def write(self, source: Path, writer: object) -> None: ...

    with pytest.raises(ValueError, match="reader 'unfinished': its option 'depth' needs a default"):
        command(Unfinished)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("odd_log:LINE", "entry point 'bad' of embtables.readers is odd_log:LINE, which is not a Reader"),
        (
            "embtables.datasets.readers.criteo:Criteo",
            "entry point 'bad' of embtables.readers names its reader 'criteo', which exists",
        ),
    ],
)
def test_a_bad_entry_point_is_named(
    site: Path, value: str, message: str, command_line: Callable[..., tuple[int, str, str]]
) -> None:
    install(site, "broken", {"bad": value})
    with pytest.raises(ValueError, match=message):
        readers.all_readers()
    code, _, said = command_line("prepare", "--help")
    assert code == 2 and message in " ".join(said.split()) and "Traceback" not in said


@pytest.mark.parametrize("form", ["%Y-%m-%d %H:%M:%S", "%d.%m.%Y %H:%M:%S", "%a %b %d %H:%M:%S +0000 %Y"])
def test_times_in_text_order_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from odd_log import OddLog

    class InWords(OddLog):
        def blocks(self, source: Path, rejections: Rejections, advance: Callable[[int], None]) -> Iterator[Block]:
            for block in super().blocks(source, rejections, advance):
                seconds = block.frame["time"].cast(pl.Float64).cast(pl.Int64)
                words = pl.from_epoch(seconds, "s").dt.strftime(form)
                yield Block(block.frame.with_columns(words.alias("time")), block.lines)

    write_log(tmp_path / "shop.log")
    words = InWords(split="time").prepare(tmp_path / "shop.log", tmp_path / "words")
    numbers = OddLog(split="time").prepare(tmp_path / "shop.log", tmp_path / "numbers")
    for split in ("train", "valid", "test"):
        assert words.num_rows(split) == numbers.num_rows(split) > 0
        assert words.read(split).equals(numbers.read(split))
