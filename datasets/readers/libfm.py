"""Categories in libFM's format, already split: Frappe and MovieLens-tag, published with Neural Factorization Machines.

A line is a label (1 and −1, or 1 and 0) and one ``index:1`` per field, e.g. ``-1 204:1 4798:1 5041:1``. All lines have
the same fields in the same places, and the place of a field says which it is. A folder holds ``<name>.train.libfm``,
``<name>.validation.libfm`` and ``<name>.test.libfm``, or ``train.libsvm``, ``valid.libsvm`` and ``test.libsvm`` as
published with Adaptive Factorization Networks. Both publish the same rows of Frappe, which are BARS' Frappe_x1 too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import polars as pl
import typer

from embtables.datasets.options import MaxRejected, MinCount
from embtables.datasets.prepared import GROUP, LABEL, PreparedDataset
from embtables.datasets.reader import Reader
from embtables.datasets.rejections import DEFAULT_LIMIT, Fault, Rejections
from embtables.datasets.splits import SPLITS
from embtables.datasets.text import Block, Format, read_header, read_text
from embtables.datasets.vocabulary import KeyCounter
from embtables.datasets.writing import Contents, Writer

ENDINGS = {"train": ("train",), "valid": ("validation", "valid"), "test": ("test",)}
KNOWN_FIELDS = {
    10: ("user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city"),  # Frappe
    3: ("user", "item", "tag"),  # MovieLens-tag
}


@dataclass(frozen=True)
class LibFM(Reader):
    """Frappe, MovieLens-tag and others in libFM's format, in their published split.

    ``fields``: their names, in order; by default those of Frappe (10 fields) or MovieLens-tag (3).
    """

    kind: ClassVar[str] = "libfm"
    input_help: ClassVar[str] = "Folder of the three files."
    example: ClassVar[str] = (
        "Examples:\n\n"
        "embtables prepare libfm frappe data/frappe   "
        "(frappe.train.libfm, frappe.validation.libfm, frappe.test.libfm)\n\n"
        "embtables prepare libfm ml-tag data/ml-tag --fields user,movie,tag"
    )

    fields: Annotated[
        tuple[str, ...],
        typer.Option(help="Names of the fields, in order; by default those of Frappe (10) or MovieLens-tag (3)."),
    ] = ()
    min_count: MinCount = 1
    max_rejected: MaxRejected = DEFAULT_LIMIT

    def __post_init__(self) -> None:
        if self.min_count < 1:
            raise ValueError(f"min_count {self.min_count}: at least 1 is needed")

    def inputs(self, source: Path) -> list[Path]:
        return list(_files(source).values())

    def write(self, source: Path, writer: Writer) -> None:
        _fill(writer, _files(source), self)


def prepare_libfm(
    source: str | Path, out: str | Path, config: LibFM = LibFM(), *, progress: bool = False
) -> PreparedDataset:
    """Prepares a folder of three files, keeping their split. Fields ``user`` and ``item`` make groups and slices.

    Example::

        data = prepare_libfm("data/frappe", "runs/frappe")
    """
    return config.prepare(source, out, progress=progress)


def _files(folder: Path) -> dict[str, Path]:
    """The file of each split."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; one with a .libfm file for each of train, validation, test is needed"
        )
    found = {}
    for split, names in ENDINGS.items():
        fitting = [
            path
            for path in sorted(folder.iterdir())
            if path.name.removesuffix(".gz").rpartition(".")[2] in ("libfm", "libsvm")
            and path.name.removesuffix(".gz").split(".")[-2] in names
        ]
        if len(fitting) != 1:
            others = ", ".join(path.name for path in fitting) or "none"
            raise ValueError(
                f"{folder}: one file *.{names[0]}.libfm or {names[-1]}.libsvm is needed, there is {others}"
            )
        found[split] = fitting[0]
    return found


def _fill(writer: Writer, paths: dict[str, Path], config: LibFM) -> None:
    fields = _fields(paths["train"], config)
    rejections = Rejections(config.max_rejected)
    counters = {name: KeyCounter() for name in fields}
    for block in _rows(writer, "Counting ids", paths["train"], fields, rejections):
        for name, counter in counters.items():
            counter.add(block.frame[name].to_numpy())
    rejections.check(final=True)
    vocabularies = {name: counter.vocabulary(config.min_count) for name, counter in counters.items()}
    group = "user" if "user" in fields else None
    slices = "item" if "item" in fields else None
    writer.declare(Contents(vocabularies, group_feature=group, slice_feature=slices))
    for split in SPLITS:
        counted = Rejections(1.0) if split == "train" else rejections  # those of train are counted already
        for block in _rows(writer, f"Writing {split}", paths[split], fields, counted):
            ids = [pl.Series(name, of.ids(block.frame[name].to_numpy())) for name, of in vocabularies.items()]
            groups = [] if group is None else [pl.col(group).alias(GROUP)]
            writer.write(split, block.frame.select(LABEL, *groups).with_columns(ids))
    writer.record(rejections)


def _fields(path: Path, config: LibFM) -> tuple[str, ...]:
    number = len(read_header(path).split()) - 1
    fields = config.fields or KNOWN_FIELDS.get(number, ())
    if not fields:
        raise ValueError(f"{path}:1: {number} fields, whose names are unknown; give them with --fields a,b,…")
    if len(fields) != number:
        raise ValueError(f"{path}:1: {number} fields, but --fields names {len(fields)}: {','.join(fields)}")
    repeated = [name for name in fields if fields.count(name) > 1]
    if repeated:
        raise ValueError(f"--fields: '{repeated[0]}' is given twice")
    return fields


def _rows(writer: Writer, title: str, path: Path, fields: tuple[str, ...], rejections: Rejections) -> Iterator[Block]:
    """Well-formed rows: float32 label and the fields' indices as int64."""
    advance = writer.meter(path, title=title)
    layout = Format(" ", (LABEL, *fields))
    for block in read_text(path, layout, rejections, advance):
        parsed = block.frame.select(
            pl.col(LABEL).str.extract(r"^\+?(-?1|0)(?:\.0*)?$").cast(pl.Int8),
            pl.col(fields).str.extract(r"^(\d{1,18}):1(?:\.0*)?$").cast(pl.Int64),
        )
        reasons = {LABEL: "the label is not 1, −1 or 0"}
        reasons |= {name: f"{name} is not an index and the value 1" for name in fields}
        faults = {reason: Fault(parsed[name].is_null(), block.frame[name]) for name, reason in reasons.items()}
        good = rejections.passing(faults, block.lines, lambda line: f"{path}:{line}")
        parsed = parsed.with_columns((pl.col(LABEL) > 0).cast(pl.Float32))
        yield Block(parsed.filter(pl.Series(good)), block.lines[good])
