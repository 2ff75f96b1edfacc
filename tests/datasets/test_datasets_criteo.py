"""Criteo's raw format, against a plain reader in Python."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pytest

from embtables.datasets import PreparedDataset
from embtables.datasets import text as text_module
from embtables.datasets.readers.criteo import CATEGORIES, DENSE, Criteo, prepare_criteo

ROOT = Path(__file__).resolve().parents[2]


def raw_rows(count: int, seed: int = 0) -> list[list[str]]:
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        row = [str(generator.randint(0, 1))]
        row += [generator.choice(["", "0", "1", "-1", "-3", "7", "23159456"]) for _ in range(13)]
        for column in range(26):
            value = int(generator.paretovariate(0.7)) * 2654435761 + column
            row.append("" if generator.random() < 0.1 else f"{value % 2**32:08x}")
        rows.append(row)
    return rows


def write(path: Path, rows: list[list[str]], end: str = "\n") -> Path:
    path.write_text("".join("\t".join(row) + end for row in rows), newline="")
    return path


def expected(rows: list[list[str]], min_count: int = 1) -> dict[str, list[list[float]]]:
    """label, dense, ids of each row by split, in order."""
    lines = len(rows)
    first = lines * 6 // 7
    test = first + (lines - first + 1) // 2
    splits = {"train": rows[:first], "test": rows[first:test], "valid": rows[test:]}
    ids: list[dict[str, int]] = []
    for column in range(14, 40):
        counts = Counter(row[column] for row in splits["train"] if row[column])
        kept = sorted((value for value in counts if counts[value] >= min_count), key=lambda v: (-counts[v], int(v, 16)))
        ids.append({"": 0} | {value: number for number, value in enumerate(kept, 2)})
    return {
        name: [
            [float(row[0])]
            + [math.log(1 + max(int(value), 0)) if value else 0.0 for value in row[1:14]]
            + [ids[column].get(row[14 + column], 1) for column in range(26)]
            for row in part
        ]
        for name, part in splits.items()
    }


def check(data: PreparedDataset, expectation: dict[str, list[list[float]]]) -> None:
    for split, rows in expectation.items():
        table = data.read(split).select(["label", *DENSE, *CATEGORIES])
        found = np.stack([table.column(name).to_numpy() for name in table.column_names], axis=1)
        assert found.shape == (len(rows), 40)
        np.testing.assert_allclose(found, np.array(rows), rtol=1e-6)


@pytest.mark.parametrize("block_bytes", [2**24, 700])
@pytest.mark.parametrize("form", ["plain", "gzip", "crlf", "no final newline"])
def test_equals_a_plain_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, form: str) -> None:
    monkeypatch.setattr(text_module, "BLOCK_BYTES", block_bytes)
    rows = raw_rows(150)
    source = write(tmp_path / "train.txt", rows, "\r\n" if form == "crlf" else "\n")
    if form == "gzip":
        source.write_bytes(gzip.compress(source.read_bytes()))
    if form == "no final newline":
        source.write_bytes(source.read_bytes()[:-1])
    data = prepare_criteo(source, tmp_path / "out")
    check(data, expected(rows))
    data.verify()
    assert data.manifest["rows_read"] == 150 and data.manifest["rows_rejected"] == {}
    assert data.group_feature is None and data.slice_feature is None
    for name in CATEGORIES:
        ids = data.read("train", [name]).column(name).to_numpy()
        assert np.array_equal(data.frequencies[name], np.bincount(ids, minlength=data.num_embeddings[name]))
    raw = pl.read_parquet(tmp_path / "out" / "vocabulary" / "00000.parquet")["value"].to_list()
    assert [row[14] for row in rows[:2]] == [
        "" if i == 0 else f"{raw[i - 2]:08x}" for i in data.read("train")["C1"][:2].to_pylist()
    ]


def test_min_count_sends_rare_values_to_unseen(tmp_path: Path) -> None:
    rows = raw_rows(200, seed=5)
    data = prepare_criteo(write(tmp_path / "train.txt", rows), tmp_path / "out", Criteo(min_count=4))
    check(data, expected(rows, min_count=4))
    assert data.frequencies["C1"][1] > 0 and data.frequencies["C1"][2:].min() >= 4


def test_random_split_streams_to_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = raw_rows(400)
    source = write(tmp_path / "train.txt", rows)
    config = Criteo(split="random", shares=(0.5, 0.25, 0.25), seed=2)
    first = prepare_criteo(source, tmp_path / "first", config)
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 999)
    second = prepare_criteo(source, tmp_path / "second", config)
    assert [first.num_rows(split) for split in ("train", "valid", "test")] == [
        second.num_rows(split) for split in ("train", "valid", "test")
    ]
    assert all(first.read(split).equals(second.read(split)) for split in ("train", "valid", "test"))
    assert 150 < first.num_rows("train") < 250


def test_malformed_rows_are_counted_by_reason_and_the_others_stay_where_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = raw_rows(280)
    good = [list(row) for row in rows]
    rows[3] = rows[3][:-1]
    rows[9] = rows[9] + ["extra"]
    rows[4][0] = "2"
    rows[5][0] = ""
    rows[6][7] = "1.5"
    rows[7][20] = "xyz"
    rows[8][20] = "-1234567"
    rows[10][20] = "+1234567"
    rows[11][20] = "123456789"
    source = write(tmp_path / "train.txt", rows)
    with pytest.raises(ValueError, match=r"malformed, more than the allowed 1.000%"):
        prepare_criteo(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    data = prepare_criteo(source, tmp_path / "out", Criteo(max_rejected=0.05), progress=True)
    assert data.manifest["rows_read"] == 280
    assert data.manifest["rows_rejected"] == {
        "not 40 columns": 2,
        "the label is not 0 or 1": 2,
        "I7 is not an integer": 1,
        "C7 is not 8 hex digits": 4,
    }
    shown = capsys.readouterr().err
    assert f"2 rows rejected: not 40 columns (first {source}:4 (39 columns))" in shown
    assert f"4 rows rejected: C7 is not 8 hex digits (first {source}:8: 'xyz')" in shown
    # the vocabulary is built without them, the other rows keep their split
    kept = [row for number, row in enumerate(good) if number not in range(3, 12)]
    assert data.num_rows("train") == 240 - 9 and data.num_rows("test") == data.num_rows("valid") == 20
    labels = [float(row[0]) for row in kept]
    assert data.read("train")["label"].to_pylist() == labels[:231]


def binary(path: Path) -> None:
    path.write_bytes("\t".join(raw_rows(1)[0]).encode() + b"\nabc\0def\n")


def truncated(path: Path) -> None:
    write(path, raw_rows(200))
    path.write_bytes(path.read_bytes()[:-60])


def truncated_gzip(path: Path) -> None:
    write(path, raw_rows(200))
    path.write_bytes(gzip.compress(path.read_bytes())[:-400])


def without_labels(path: Path) -> None:
    write(path, [row[1:] for row in raw_rows(50)])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (binary, "train.txt:2: a NUL byte: this is a binary file"),
        (truncated, "train.txt:200: the file ends inside a row"),
        (truncated_gzip, "train.txt: the gzip file is truncated or damaged"),
        (without_labels, r"train.txt:1 \(39 columns\): not 40 columns; 50 of 50 rows read are malformed"),
        (lambda path: path.write_bytes(b""), "train.txt: the file holds no rows"),
        (lambda path: path.write_bytes(b"\n\n"), "train.txt: the file holds no rows"),
        (lambda path: path.write_bytes(b"PK\x03\x04rest"), "train.txt: this is a zip archive"),
        (lambda path: path.write_bytes(b"a,b\n1,2\n"), r"train.txt:1 \(1 columns\): not 40 columns"),
        (lambda path: path.write_bytes(b"1\t2\n\xff\xfe\n"), "train.txt:2: not utf-8 text"),
        (lambda path: path.mkdir(), "train.txt"),
        (lambda path: None, "train.txt: no such file"),
    ],
)
def test_unusable_files_get_one_sentence_and_leave_nothing(tmp_path: Path, make, sentence: str) -> None:  # noqa: ANN001
    source = tmp_path / "train.txt"
    make(source)
    with pytest.raises((ValueError, OSError), match=sentence) as error:
        prepare_criteo(source, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, the disk that is always full")
def test_a_disk_too_small_for_the_rows_that_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = pl.DataFrame.write_ipc

    def full(self: pl.DataFrame, path: Path, *, compression: Literal["uncompressed"]) -> None:
        original(self, "/dev/full", compression=compression)

    monkeypatch.setattr(pl.DataFrame, "write_ipc", full)
    source = write(tmp_path / "train.txt", raw_rows(300))
    with pytest.raises(OSError, match="out: No space left on device.*nothing was written"):
        prepare_criteo(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.txt"]


def test_a_wrong_file_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 2**16)
    source = tmp_path / "train.txt"
    source.write_text("a,b,c\n" * 200_000)
    with pytest.raises(ValueError, match="rows read are malformed") as error:
        prepare_criteo(source, tmp_path / "out", Criteo(split="random"))
    assert int(str(error.value).split(" of ")[1].split(" ")[0].replace(",", "")) < 50_000


@pytest.mark.slow
def test_300_000_rows_in_less_than_240_mib_beside_the_imports() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.data", "--rows", "300000", "--peak"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        # Every thread has buffers of its own, and polars keeps freed memory for seconds: 20 to 80 MiB, never the same.
        env={
            **os.environ,
            "POLARS_MAX_THREADS": "2",
            "_RJEM_MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:0",
        },
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["rows"] == 300_000 and measured["ids"] > 700_000
    assert measured["peak_rss_mib"] - measured["of_imports_mib"] < 240


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("header", [False, True])
def test_copies_with_commas_or_a_header(tmp_path: Path, separator: str, header: bool) -> None:
    rows = raw_rows(280)
    reference = prepare_criteo(write(tmp_path / "train.txt", rows), tmp_path / "reference", Criteo(split="random"))
    lines = [separator.join(row) for row in rows]
    if header:
        order = [0, *range(39, 0, -1)]  # the names tell the order
        names = ["label", *DENSE, *CATEGORIES]
        lines = [separator.join(row[place] for place in order) for row in [names, *rows]]
    (tmp_path / "copy.csv").write_text("\n".join(lines))  # no line end behind the last row
    data = prepare_criteo(tmp_path / "copy.csv", tmp_path / "out", Criteo(split="order"))
    assert data.manifest["rows_read"] == 280 and data.manifest["rows_rejected"] == {}
    found = [row for split in ("train", "test", "valid") for row in data.read(split, DENSE).to_pylist()]
    whole = [[math.log(1 + max(int(value), 0)) if value else 0.0 for value in row[1:14]] for row in rows]
    np.testing.assert_allclose([list(row.values()) for row in found], whole, rtol=1e-6)
    assert sum(map(data.num_rows, ("train", "valid", "test"))) == sum(
        map(reference.num_rows, ("train", "valid", "test"))
    )


def test_a_header_that_does_not_name_the_columns(tmp_path: Path) -> None:
    names = ["label", *DENSE, *CATEGORIES[:-1], "C27"]
    write(tmp_path / "train.txt", [names, *raw_rows(5)])
    with pytest.raises(
        ValueError, match="train.txt:1: a header must name label, I1 … I13 and C1 … C26, which label, i1"
    ):
        prepare_criteo(tmp_path / "train.txt", tmp_path / "out")


def test_another_separator_is_no_truncated_file(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("\n".join(";".join(row) for row in raw_rows(20)))
    with pytest.raises(
        ValueError, match=r"train.txt:1 \(1 columns\): not 40 columns; 20 of 20 rows read are malformed"
    ):
        prepare_criteo(tmp_path / "train.txt", tmp_path / "out")
