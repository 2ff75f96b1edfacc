"""Delimited text as people have it: packed, in any encoding, with any line end, separator and quotes."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from embtables.datasets import Format, Rejections, read_text
from embtables.datasets import text as text_module
from embtables.datasets.raw_bytes import WrongEncoding, read_unpacked
from embtables.datasets.text import read_header

COLUMNS = ("a", "b", "c")


def read(path: Path, layout: Format, rejections: Rejections | None = None) -> list[tuple[int, tuple]]:
    """The rows of a file with their line numbers."""
    blocks = read_text(path, layout, rejections or Rejections(1.0))
    return [(int(line), row) for block in blocks for line, row in zip(block.lines, block.frame.rows())]


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "zstd": zstd,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("block_bytes", [2**24, 64])
@pytest.mark.parametrize("packing", PACKED)
def test_packed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str, block_bytes: int) -> None:
    monkeypatch.setattr(text_module, "BLOCK_BYTES", block_bytes)
    rows = [(f"u{number}", str(number * 7), "é") for number in range(200)]
    content = "".join(",".join(row) + "\n" for row in rows).encode()
    pack = PACKED[packing]
    (tmp_path / "log").write_bytes(pack(content))
    assert read(tmp_path / "log", Format(",", COLUMNS)) == list(enumerate(rows, 1))
    (tmp_path / "twice").write_bytes(pack(content) * 2)  # as `cat` joins them
    assert [row for _, row in read(tmp_path / "twice", Format(",", COLUMNS))] == rows * 2


@pytest.mark.parametrize("packing", [name for name in PACKED if name != "plain"])
def test_truncated_packed_files_are_named(tmp_path: Path, packing: str) -> None:
    content = random.Random(0).randbytes(5000)
    (tmp_path / "log").write_bytes(PACKED[packing](content)[:-300])
    with pytest.raises(ValueError, match=f"log: the {packing} file is truncated or damaged"):
        b"".join(read_unpacked(tmp_path / "log"))


@pytest.mark.parametrize("block_bytes", [2**24, 40])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp1252"])
def test_encodings_and_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, end: str, block_bytes: int
) -> None:
    monkeypatch.setattr(text_module, "BLOCK_BYTES", block_bytes)
    rows = [("a", "b", "c"), ("é", "x,y", "ü"), ("1", "2", "3")]
    text = "".join(f'{a},"{b}",{c}{end}' for a, b, c in rows)
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""  # the others write their own
    (tmp_path / "log").write_bytes(mark + text.encode(encoding))
    told = "cp1252" if encoding == "cp1252" else "utf-8"
    layout = Format(",", COLUMNS, encoding=told, quoted=True)
    assert [row for _, row in read(tmp_path / "log", layout)] == rows
    assert read_header(tmp_path / "log", told) == 'a,"b",c'


def test_an_encoding_that_is_not_the_file_s_is_named(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"a,b,c\na,b,\xe9\n")
    with pytest.raises(ValueError, match="log:2: not utf-8 text .byte 0xe9"):
        read(tmp_path / "log", Format(",", COLUMNS))
    (tmp_path / "log").write_bytes(b"a,b,c\na,b,\x81\n")
    with pytest.raises(ValueError, match="log:1: here or below is no cp1252 text"):
        read(tmp_path / "log", Format(",", COLUMNS, encoding="cp1252"))
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):  # without a byte order mark
        (tmp_path / "log").write_bytes("a,b,c\na,b,é\n".encode(encoding))
        with pytest.raises(WrongEncoding, match="log:1: a NUL byte: .* or a text in UTF-16 or UTF-32"):
            read(tmp_path / "log", Format(",", COLUMNS))
        found = read(tmp_path / "log", Format(",", COLUMNS, encoding=encoding))
        assert found == [(1, ("a", "b", "c")), (2, ("a", "b", "é"))]
    (tmp_path / "log").write_bytes(b"\xff\xfea\x00,\x00\x00\xd8\n\x00")
    with pytest.raises(ValueError, match="log:1: here or below is no utf-16 text"):
        read(tmp_path / "log", Format(",", COLUMNS))


@pytest.mark.parametrize("block_bytes", [2**24, 200, 11])
@pytest.mark.parametrize("separator", [",", "\t", ";", "|", "::", "¦", " "])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_quotes_are_read_alike_with_every_separator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str, quoting: int, block_bytes: int
) -> None:
    monkeypatch.setattr(text_module, "BLOCK_BYTES", block_bytes)
    draw = random.Random(1)
    pieces = ["x", "7", separator, '"', "\n", "é", " ", "\n\n"]
    if len(separator) > 1 and quoting == csv.QUOTE_MINIMAL:  # csv.writer does not see that it must quote it
        pieces.remove(separator)
    rows = [tuple("".join(draw.choices(pieces, k=draw.randrange(5))) for _ in range(3)) for _ in range(150)]
    lines, written = [], io.StringIO()
    one = separator if len(separator) == 1 else "\x1f"  # csv.writer takes one character
    writer = csv.writer(written, delimiter=one, quoting=quoting, lineterminator="\n")
    for row in rows:
        lines.append(written.getvalue().count("\n") + 1)
        writer.writerow(row)
    text = written.getvalue().replace("\x1f", separator)
    (tmp_path / "log").write_text(text, encoding="utf-8", newline="")
    found = read(tmp_path / "log", Format(separator, COLUMNS, quoted=True))
    expected = [(line, tuple(value or None for value in row)) for line, row in zip(lines, rows)]
    assert found == expected


def test_a_quoted_field_may_be_long(tmp_path: Path) -> None:
    long = "x" * 200_000 + "\n" + "y" * 200_000
    (tmp_path / "log").write_text(f'1,"{long}",3\n4,5,6\n')
    limit = csv.field_size_limit()
    rejections = Rejections(0.0)
    assert read(tmp_path / "log", Format(",", COLUMNS, quoted=True), rejections) == [
        (1, ("1", long, "3")),
        (3, ("4", "5", "6")),
    ]
    assert (rejections.rows_read, rejections.lines_read) == (2, 3)
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("block_bytes", [2**24, 12, 5])
def test_quotes_that_are_not_well_formed_cost_their_own_line_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(text_module, "BLOCK_BYTES", block_bytes)
    lines = [
        "1,2,3",
        '4,"open,6',
        "7,8,9",
        '10,"a,b",12',
        '13,"a" b,15',
        '16,5" disk,18',
        '19,"x,y" z,21',
        '"",23,24',
        "25,26,27",
    ]
    (tmp_path / "log").write_text("\n".join(lines) + "\n")
    rejections = Rejections(1.0)
    found = read(tmp_path / "log", Format(",", COLUMNS, quoted=True), rejections)
    assert found == [
        (1, ("1", "2", "3")),
        (2, ("4", '"open', "6")),
        (3, ("7", "8", "9")),
        (4, ("10", "a,b", "12")),
        (5, ("13", '"a" b', "15")),
        (6, ("16", '5" disk', "18")),
        (8, (None, "23", "24")),
        (9, ("25", "26", "27")),
    ]
    assert rejections.counts == {"not 3 columns": 1} and rejections.first["not 3 columns"].endswith("log:7 (4 columns)")
    assert rejections.rows_read == 9 and rejections.lines_read == 9
    assert [line for line in rejections.lines() if line.startswith("NOTE")] == [
        f"NOTE 2 rows whose quotes do not fit together: they are read as ordinary characters (first {tmp_path}/log:2)"
    ]


def test_a_quote_that_the_end_of_the_file_leaves_open_is_a_truncated_file(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('1,2,3\n4,5,"cut off')
    with pytest.raises(ValueError, match="log:2: the file ends inside a row"):
        read(tmp_path / "log", Format(",", COLUMNS, quoted=True))
    (tmp_path / "log").write_text('1,2,3\n4,5,"a stray quote\n')
    assert read(tmp_path / "log", Format(",", COLUMNS, quoted=True))[1] == (2, ("4", "5", '"a stray quote'))


def test_an_open_quote_does_not_take_the_rest_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 1000)
    monkeypatch.setattr("embtables.datasets.quotes.LONGEST_ROW", 5000)
    rows = ["1,2,3"] * 3 + ['4,"open,6'] + [f"{number},8,9" for number in range(5000)]
    (tmp_path / "log").write_text("\n".join(rows) + "\n")
    found = read(tmp_path / "log", Format(",", COLUMNS, quoted=True))
    assert len(found) == len(rows) and found[3] == (4, ("4", '"open', "6")) and found[-1][0] == len(rows)


def test_two_stray_quotes_that_take_many_rows_for_one_are_told(tmp_path: Path) -> None:
    rows = ["1,2,3"] + ['4,"x,6'] + ["7,8,9"] * 150 + ['4,x",6'] + ["7,8,9"]
    (tmp_path / "log").write_text("\n".join(rows) + "\n")
    rejections = Rejections()
    assert len(read(tmp_path / "log", Format(",", COLUMNS, quoted=True), rejections)) == 3
    assert rejections.lines() == [
        f"NOTE 1 rows of more than 100 lines each: a quote may be missing there (first {tmp_path}/log:2)"
    ]


def test_spaces_at_the_ends_of_fields(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('1, 2 ,  \n4 ," 5", x y\n')
    assert read(tmp_path / "log", Format(",", COLUMNS, quoted=True, stripped=True)) == [
        (1, ("1", "2", None)),
        (2, ("4", "5", "x y")),
    ]
    assert read(tmp_path / "log", Format(",", COLUMNS))[0] == (1, ("1", " 2 ", "  "))


def test_many_rows_of_a_wrong_width_are_no_truncated_file(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("1;2;3\n4;5;6")
    with pytest.raises(ValueError, match=r"log:1 \(1 columns\): not 3 columns; 2 of 2 rows"):
        read(tmp_path / "log", Format(",", COLUMNS), Rejections(0.0))
