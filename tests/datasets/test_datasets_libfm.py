"""Frappe's and MovieLens-tag's libFM files, against a plain reader in Python."""

from __future__ import annotations

import gzip
import random
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embtables.cli.prepare import app
from embtables.datasets import PreparedDataset
from embtables.datasets import text as text_module
from embtables.datasets.readers.libfm import LibFM, prepare_libfm

FRAPPE = ["user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city"]
SIZES = [957, 4082, 7, 7, 2, 3, 2, 9, 80, 233]  # as the set's README says; an index counts on over the fields
FILES = {"train": "frappe.train.libfm", "valid": "frappe.validation.libfm", "test": "frappe.test.libfm"}


def raw_rows(count: int, seed: int, sizes: list[int] = SIZES) -> list[list[int]]:
    generator = random.Random(seed)
    starts = [sum(sizes[:field]) for field in range(len(sizes))]
    return [
        [
            generator.choice([-1, 1]),
            *(start + int(generator.paretovariate(0.6)) % size for start, size in zip(starts, sizes)),
        ]
        for _ in range(count)
    ]


def lines(rows: list[list[int]], end: str = "\r\n") -> bytes:
    """Frappe's lines end in CR LF."""
    return "".join(" ".join([str(row[0]), *(f"{index}:1" for index in row[1:])]) + end for row in rows).encode()


def write(folder: Path, counts: tuple[int, int, int] = (300, 80, 70), sizes: list[int] = SIZES) -> dict[str, list]:
    folder.mkdir(exist_ok=True)
    splits = {split: raw_rows(count, seed, sizes) for seed, (split, count) in enumerate(zip(FILES, counts))}
    for split, rows in splits.items():
        (folder / FILES[split]).write_bytes(lines(rows))
    return splits


def check(data: PreparedDataset, splits: dict[str, list[list[int]]], fields: list[str], min_count: int = 1) -> None:
    for place, name in enumerate(fields, 1):
        counts = Counter(row[place] for row in splits["train"])
        kept = sorted((value for value in counts if counts[value] >= min_count), key=lambda v: (-counts[v], v))
        ids = {value: number for number, value in enumerate(kept, 2)}
        for split, rows in splits.items():
            assert data.read(split)[name].to_pylist() == [ids.get(row[place], 1) for row in rows], (split, name)
    for split, rows in splits.items():
        assert data.read(split)["label"].to_pylist() == [float(row[0] == 1) for row in rows]


@pytest.mark.parametrize("block_bytes", [2**24, 700])
def test_frappe_equals_a_plain_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(text_module, "BLOCK_BYTES", block_bytes)
    splits = write(tmp_path / "frappe")
    data = prepare_libfm(tmp_path / "frappe", tmp_path / "out", LibFM(min_count=2))
    assert data.feature_names == FRAPPE and data.group_feature == "user" and data.slice_feature == "item"
    check(data, splits, FRAPPE, min_count=2)
    assert 1 in data.read("test")["item"].to_pylist()  # ids that training never showed
    assert data.manifest["rows_read"] == 450 and data.manifest["rows_rejected"] == {}
    groups = next(data.batches("test", 70)).groups
    assert groups is not None and groups.tolist() == [row[1] for row in splits["test"]]


def test_three_fields_are_movielens_tag(tmp_path: Path) -> None:
    splits = write(tmp_path / "ml-tag", sizes=[17045, 23743, 49657])
    data = prepare_libfm(tmp_path / "ml-tag", tmp_path / "out")
    check(data, splits, ["user", "item", "tag"])


def test_labels_of_zero_and_names_of_the_other_publication(tmp_path: Path) -> None:
    splits = write(tmp_path / "afn", sizes=[50, 60])
    for split, old in FILES.items():
        text = (tmp_path / "afn" / old).read_text().replace("-1 ", "0 ")
        (tmp_path / "afn" / f"{split}.libsvm.gz").write_bytes(gzip.compress(text.encode()))
        (tmp_path / "afn" / old).unlink()
    data = prepare_libfm(tmp_path / "afn", tmp_path / "out", LibFM(("a", "b")))
    check(data, splits, ["a", "b"])
    assert data.group_feature is None and data.slice_feature is None


def test_malformed_rows_are_counted_in_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = write(tmp_path / "in")
    wrong = {
        "train": [
            "2 1:1 2:1 3:1 4:1 5:1 6:1 7:1 8:1 9:1 10:1",
            "1 1:1 2:1",
            "1 1:1 2 3:1 4:1 5:1 6:1 7:1 8:1 9:1 10:1",
        ],
        "test": ["1 1:1 2:0.5 3:1 4:1 5:1 6:1 7:1 8:1 9:1 10:1", "x 1:1 2:1 3:1 4:1 5:1 6:1 7:1 8:1 9:1 10:1"],
    }
    for split, texts in wrong.items():
        path = tmp_path / "in" / FILES[split]
        path.write_bytes(path.read_bytes() + ("\r\n".join(texts) + "\r\n").encode())
    for limit, found in ((0.0, "3 of 303"), (0.0101, "5 of 455")):
        with pytest.raises(ValueError, match=rf"train.libfm:30\d.*; {found} rows read are malformed, more than the"):
            prepare_libfm(tmp_path / "in", tmp_path / "out", LibFM(max_rejected=limit))
        assert not (tmp_path / "out").exists()
    data = prepare_libfm(tmp_path / "in", tmp_path / "out", LibFM(max_rejected=0.02), progress=True)
    assert data.manifest["rows_read"] == 455
    assert data.manifest["rows_rejected"] == {
        "the label is not 1, −1 or 0": 2,
        "not 11 columns": 1,
        "item is not an index and the value 1": 2,
    }
    check(data, splits, FRAPPE)
    assert "2 rows rejected: the label is not 1, −1 or 0 (first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("train", b"", "frappe.train.libfm: the file is empty"),
        ("test", b"", "frappe.test.libfm: the file holds no rows"),
        ("valid", lines(raw_rows(90, 0), "\n")[:-12], "validation.libfm:90: the file ends inside a row"),
        ("valid", gzip.compress(lines(raw_rows(90, 0)))[:-90], "validation.libfm: the gzip file is truncated"),
        ("train", lines(raw_rows(9, 0, [5, 5, 5, 5])), "4 fields, whose names are unknown; give them with --fields"),
        ("test", lines(raw_rows(9, 0, [5, 5, 5, 5])), r"test.libfm:1 \(5 columns\): not 11 columns"),
        ("test", b"1 1:1\0", "test.libfm:1: a NUL byte"),
    ],
)
def test_unusable_files_get_one_sentence(tmp_path: Path, file: str, content: bytes, sentence: str) -> None:
    write(tmp_path / "in", (50, 20, 20))
    (tmp_path / "in" / FILES[file]).write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        prepare_libfm(tmp_path / "in", tmp_path / "out", LibFM(max_rejected=0.1))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_folder_and_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none: no such folder"):
        prepare_libfm(tmp_path / "none", tmp_path / "out")
    write(tmp_path / "in")
    with pytest.raises(ValueError, match="10 fields, but --fields names 2: a,b"):
        prepare_libfm(tmp_path / "in", tmp_path / "out", LibFM(("a", "b")))
    with pytest.raises(ValueError, match="'user' is given twice"):
        prepare_libfm(tmp_path / "in", tmp_path / "out", LibFM(("user", *FRAPPE[:9])))
    with pytest.raises(ValueError, match="min_count 0"):
        LibFM(min_count=0)
    (tmp_path / "in" / "more.train.libfm").write_bytes(b"")
    with pytest.raises(ValueError, match="there is frappe.train.libfm, more.train.libfm"):
        prepare_libfm(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "more.train.libfm").unlink()
    (tmp_path / "in" / FILES["valid"]).unlink()
    with pytest.raises(ValueError, match=r"one file \*.validation.libfm or valid.libsvm is needed, there is none"):
        prepare_libfm(tmp_path / "in", tmp_path / "out")


def test_command(tmp_path: Path) -> None:
    write(tmp_path / "in")
    arguments = ["libfm", str(tmp_path / "in"), str(tmp_path / "out"), "--fields", "a,b,c,d,e,f,g,h,i,j"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert PreparedDataset(tmp_path / "out").feature_names == list("abcdefghij")
