"""The bytes of a text: unpacked, in UTF-8, with one kind of line end."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

BLOCK_BYTES = 2**24
NOT_TEXT = {b"PK\x03\x04": "a zip archive", b"PAR1": "a Parquet file"}
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class WrongEncoding(ValueError):
    """Bytes that are no text of the encoding."""


def open_raw(path: Path) -> tuple[BinaryIO, BinaryIO, str]:
    """Returns the bytes of a text, unpacked, the file itself, whose position is the progress, and how it was packed."""
    raw = open(path, "rb")
    start = raw.read(6)
    raw.seek(0)
    if start[:4] in NOT_TEXT:
        raw.close()
        raise ValueError(f"{path}: this is {NOT_TEXT[start[:4]]}, where text (plain, gzip, zstd, bzip2, xz) is needed")
    if start[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=raw), raw, "gzip"  # type: ignore[return-value]
    if start[:4] == b"(\xb5/\xfd":
        return pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"), raw, "zstd"
    if start[:3] == b"BZh":
        return bz2.BZ2File(raw), raw, "bzip2"  # type: ignore[return-value]
    if start == b"\xfd7zXZ\x00":
        return lzma.LZMAFile(raw), raw, "xz"  # type: ignore[return-value]
    return raw, raw, "plain"


def read_unpacked(
    path: Path, advance: Callable[[int], None] = lambda size: None, size: int = BLOCK_BYTES
) -> Generator[bytes, None, None]:
    """The file's bytes, unpacked where packed, a block at a time. ValueError where a packed file is damaged."""
    stream, raw, packing = open_raw(path)
    position = 0
    with raw, stream:
        while True:
            try:
                content = stream.read(size)
            except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
                if packing == "plain" or isinstance(error, OSError) and error.errno:
                    raise
                raise ValueError(
                    f"{path}: the {packing} file is truncated or damaged ({error}); fetch it again"
                ) from error
            advance(raw.tell() - position)
            position = raw.tell()
            if not content:
                break
            yield content


def read_normalized(path: Path, encoding: str, advance: Callable[[int], None], size: int) -> Iterator[bytes]:
    """The unpacked text in UTF-8, whose bytes are not checked where they are in UTF-8 already.

    A byte order mark is left out, and tells the encoding whatever ``encoding`` says. Where the first block has carriage
    returns and no line feed, the former end the lines and become the latter.
    """
    decoder: codecs.IncrementalDecoder | None = None
    returns: bool | None = None
    line = 1
    for number, content in enumerate(read_unpacked(path, advance, size)):
        if number == 0:
            encoding = next((name for mark, name in MARKS if content.startswith(mark)), encoding)
            content = content.removeprefix(codecs.BOM_UTF8)
            if codecs.lookup(encoding).name != "utf-8":
                decoder = codecs.getincrementaldecoder(encoding)()
        if decoder is not None:
            try:
                content = decoder.decode(content).encode()
            except UnicodeError as error:
                raise WrongEncoding(f"{path}:{line}: here or below is no {encoding} text ({error})") from error
            line += content.count(b"\n")
        if returns is None and content:
            returns = b"\r" in content and b"\n" not in content
        yield content.replace(b"\r", b"\n") if returns else content
