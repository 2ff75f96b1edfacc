"""Avazu's raw format, against a plain reader in Python."""

from __future__ import annotations

import gzip
import random
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embtables.cli.prepare import app
from embtables.datasets import PreparedDataset
from embtables.datasets import text as text_module
from embtables.datasets.readers.avazu import FEATURES, Avazu, prepare_avazu

HEADER = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip,"
    "device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
)
NAMES = HEADER.split(",")
HEX = NAMES[5:14]


def raw_rows(count: int, days: int = 5, seed: int = 0) -> list[list[str]]:
    """In the order of time, from Friday 17 October 2014, as many rows a day."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        row = [str(generator.randrange(10**18, 1844674407 * 10**10)), str(generator.randint(0, 1))]
        row.append(f"1410{17 + number * days // count}{generator.randrange(24):02d}")
        for name in NAMES[3:]:
            value = int(generator.paretovariate(0.8)) % 5000
            row.append(f"{value * 2654435761 % 2**32:08x}" if name in HEX else str(value - 1))
        rows.append(row)
    return rows


def write(path: Path, rows: list[list[str]], end: str = "\n") -> Path:
    path.write_text("".join(line + end for line in [HEADER, *map(",".join, rows)]), newline="")
    return path


def values(row: list[str]) -> dict[str, int]:
    moment = datetime.strptime("20" + row[2], "%Y%m%d%H")
    raw = dict(zip(NAMES, row))
    return {
        "hour": moment.hour,
        "weekday": int(moment.strftime("%w")),
        "weekend": int(moment.strftime("%w") in "06"),
        **{name: int(raw[name], 16) if name in HEX else int(raw[name]) for name in NAMES[3:]},
    }


def expected(splits: dict[str, list[list[str]]], min_count: int = 1) -> dict[str, list[list[int]]]:
    """Label and ids of each row by split, in order."""
    ids = {}
    for name in FEATURES:
        counts = Counter(values(row)[name] for row in splits["train"])
        kept = sorted((value for value in counts if counts[value] >= min_count), key=lambda v: (-counts[v], v))
        ids[name] = {value: number for number, value in enumerate(kept, 2)}
    return {
        split: [[int(row[1]), *(ids[name].get(values(row)[name], 1) for name in FEATURES)] for row in rows]
        for split, rows in splits.items()
    }


def check(data: PreparedDataset, expectation: dict[str, list[list[int]]]) -> None:
    for split, rows in expectation.items():
        table = data.read(split).select(["label", *FEATURES])
        found = [list(map(int, row)) for row in zip(*(column.to_pylist() for column in table.columns))]
        assert found == rows, split


@pytest.mark.parametrize("block_bytes", [2**24, 900])
@pytest.mark.parametrize("form", ["plain", "gzip", "crlf"])
def test_equals_a_plain_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, form: str) -> None:
    monkeypatch.setattr(text_module, "BLOCK_BYTES", block_bytes)
    rows = raw_rows(250)
    source = write(tmp_path / "train", rows, "\r\n" if form == "crlf" else "\n")
    if form == "gzip":
        source.write_bytes(gzip.compress(source.read_bytes()))
    data = prepare_avazu(source, tmp_path / "out", Avazu(min_count=2))
    assert data.feature_names == FEATURES and len(FEATURES) == 24 and data.dense_features == []
    check(data, expected({"train": rows[:150], "valid": rows[150:200], "test": rows[200:]}, min_count=2))
    data.verify()
    assert data.manifest["rows_read"] == 250 and data.manifest["rows_rejected"] == {}


def test_days_decide_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = raw_rows(90, days=3)
    shuffled = random.Random(1).sample(rows, len(rows))
    data = prepare_avazu(write(tmp_path / "train", shuffled), tmp_path / "out")
    by_day = {day: [row for row in shuffled if row[2][4:6] == day] for day in ("17", "18", "19")}
    check(data, expected({"train": by_day["17"], "valid": by_day["18"], "test": by_day["19"]}))


def test_random_split_streams_to_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "train", raw_rows(400, days=1))
    config = Avazu(split="random", shares=(0.5, 0.25, 0.25), seed=2)
    first = prepare_avazu(source, tmp_path / "first", config)
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 999)
    second = prepare_avazu(source, tmp_path / "second", config)
    assert all(first.read(split).equals(second.read(split)) for split in ("train", "valid", "test"))
    assert 150 < first.num_rows("train") < 250


def test_malformed_rows_are_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = raw_rows(300)
    good = [list(row) for row in rows]
    rows[0] = rows[0][:-1]
    for place, (column, text) in enumerate(
        [(1, "2"), (1, ""), (2, "14101724"), (2, "14131701"), (2, "1410170"), (2, ""), (5, "1fbe01f"), (5, "+1fbe01f")]
        + [(5, "1fbe01fg"), (16, "1.5"), (16, "x"), (3, "99999999999999999999")],
        start=1,
    ):
        rows[place][column] = text
    rows[20][5] = rows[20][16] = good[20][5] = good[20][16] = ""  # absent, not malformed
    source = write(tmp_path / "train", rows)
    with pytest.raises(ValueError, match="13 of 300 rows read are malformed, more than the allowed 1.000%"):
        prepare_avazu(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    data = prepare_avazu(source, tmp_path / "out", Avazu(max_rejected=0.05), progress=True)
    assert data.manifest["rows_rejected"] == {
        "not 24 columns": 1,
        "the click is not 0 or 1": 2,
        "hour is not YYMMDDHH": 4,
        "site_id is not 8 hex digits": 3,
        "C14 is not an integer": 2,
        "C1 is not an integer": 1,
    }
    assert (
        f"1 rows rejected: C1 is not an integer (first {source}:14: '99999999999999999999')" in capsys.readouterr().err
    )
    assert data.read("train")["label"].to_pylist() == [float(row[1]) for row in good[13:180]]
    assert data.read("train")["site_id"][20 - 13].as_py() == 0 and data.read("train")["C14"][20 - 13].as_py() == 0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "train: the file is empty"),
        (HEADER.encode() + b"\n", "train: the file holds no rows"),
        (b"label,hour\n1,2\n", "train:1: the header is not Avazu's, id,click,hour"),
        (HEADER.replace("id,click", "id").encode() + b"\n", "train:1: the header is not Avazu's"),
        (gzip.compress(("\n".join([HEADER, *map(",".join, raw_rows(200))]) + "\n").encode())[:-500], "gzip file is tr"),
        ("\n".join([HEADER, *map(",".join, raw_rows(200))]).encode()[:-30], "train:201: the file ends inside a row"),
        (
            ("\n".join([HEADER, *map(",".join, raw_rows(50, days=2))]) + "\n").encode(),
            "2 different days.*--split ra",
        ),
        (b"PK\x03\x04rest", "train: this is a zip archive"),
        (b"PAR1", "train: this is a Parquet file"),
    ],
)
def test_unusable_files_get_one_sentence_and_leave_nothing(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "train").write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        prepare_avazu(tmp_path / "train", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Avazu(split="order"), "split 'order': 'time' or 'random'"),  # type: ignore[arg-type]
        (lambda: Avazu(min_count=0), "min_count 0"),
        (lambda: Avazu(seed=-1), "seed -1"),
        (lambda: Avazu(shares=(0.5, 0.6, 0.1)), "shares"),
    ],
)
def test_options_that_make_no_sense(make: Callable[[], Avazu], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_command(tmp_path: Path) -> None:
    source = write(tmp_path / "train", raw_rows(100))
    arguments = ["avazu", str(source), str(tmp_path / "out"), "--split", "random", "--min-count", "2", "--seed", "3"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert PreparedDataset(tmp_path / "out").manifest["config"]["min_count"] == 2
