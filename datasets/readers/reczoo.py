"""BARS' preprocessed data sets (github.com/reczoo/Datasets), and any other table that is split already.

A folder holds a file for each of train, valid and test: train.csv, train.csv.gz or train.parquet. Lists of ids are text
with ``^`` between them, or lists in Parquet. What is published of each set, and where, stands in reczoo.yaml.

As in BARS, a value has an id of its own if its column in train, or one history of it, shows it at least ``min_count``
times. Unlike there, id 0 is for missing values only, and user ids that serve metrics only need no feature. The vectors
that come with KuaiVideo_x1 and MicroVideo1.7M_x1 are not read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
import yaml

from embtables.datasets.missing import WORDS
from embtables.datasets.options import MaxRejected, Seed
from embtables.datasets.prepared import PreparedDataset
from embtables.datasets.raw_bytes import read_unpacked
from embtables.datasets.reader import Reader
from embtables.datasets.rejections import DEFAULT_LIMIT
from embtables.datasets.split_table import Columns, write_splits
from embtables.datasets.splits import SPLITS
from embtables.datasets.tabular import open_table
from embtables.datasets.vocabulary import Vocabulary
from embtables.datasets.writing import Writer

ENDINGS = (".csv", ".csv.gz", ".parquet")


@dataclass(frozen=True)
class Published(Columns):
    """A set of BARS: its columns, and what its files and their ids must be."""

    rows: Mapping[str, int] = field(default_factory=dict)
    md5: Mapping[str, str] = field(default_factory=dict)
    ids: Sequence[int | None] = ()  # of each of ``categorical``, then of ``lists``
    total_ids: int | None = None
    valid_is_test: bool = False

    def columns(self) -> Columns:
        return Columns(**{of.name: getattr(self, of.name) for of in fields(Columns)})


PUBLISHED = {
    name: Published(**facts)
    for name, facts in yaml.safe_load((Path(__file__).parent / "reczoo.yaml").read_text(encoding="utf-8")).items()
}


@dataclass(frozen=True)
class Reczoo(Reader):
    """BARS' preprocessed sets (Criteo_x1, Avazu_x4, AmazonElectronics_x1, …), or any table that is split already.

    ``columns``: those of a set that is not in PUBLISHED; ``name``: one that is, by default that of the folder.

    ``min_count`` and ``max_history`` are the set's own by default. Without a file for valid, the share ``valid_share``
    of train validates; 0: the rows of test do, as published for some sets: what is selected on them knows the test.
    """

    kind: ClassVar[str] = "reczoo"
    input_help: ClassVar[str] = "Folder with train, valid and test as .csv, .csv.gz or .parquet."
    example: ClassVar[str] = (
        "Examples:\n\n"
        "embtables prepare reczoo Criteo_x1 data/criteo_x1\n\n"
        "embtables prepare reczoo downloads/Avazu_x4 data/avazu_x4 --name Avazu_x4_001\n\n"
        "embtables prepare reczoo AmazonElectronics_x1 data/amazon --valid-share 0.1\n\n"
        "embtables prepare reczoo mine data/mine --label clicked --categorical user,item,brand --sequence seen:item"
    )

    name: str | None = None
    columns: Columns | None = None
    min_count: int | None = None
    max_history: int | None = None
    valid_share: float | None = None
    check_md5: bool = True
    seed: int = 0
    max_rejected: float = DEFAULT_LIMIT

    def __post_init__(self) -> None:
        if self.name is not None and self.columns is not None:
            raise ValueError(f"'{self.name}' has its columns: give either a name or the columns of another set")
        if self.name is not None and self.name not in PUBLISHED:
            raise ValueError(f"name '{self.name}': one of {', '.join(PUBLISHED)} is needed, or columns")
        if self.valid_share is not None and not 0 <= self.valid_share < 1:
            raise ValueError(f"valid_share {self.valid_share}: a share from 0 up to 1 is needed")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: it cannot be negative")

    def inputs(self, source: Path) -> list[Path]:
        return list(_files(source).values())

    def settings(self, source: Path) -> dict[str, Any]:
        name, columns = self._of_folder(source)
        return {
            "name": name,
            **asdict(columns),
            "valid_share": self._valid_share(source),
            "check_md5": self.check_md5,
            "seed": self.seed,
            "max_rejected": self.max_rejected,
        }

    def write(self, source: Path, writer: Writer) -> None:
        paths, (name, columns), valid_share = _files(source), self._of_folder(source), self._valid_share(source)
        published = None if name is None else PUBLISHED[name]
        if published is not None and self.check_md5:
            for split, path in paths.items():
                _check_md5(writer, path, published.md5.get(split))
        if "valid" not in paths and not valid_share:
            writer.extra["valid_is_test"] = True
            writer.report(
                ["No file for valid: the rows of test validate, so that what is selected on them knows the test"]
            )
        tables = {split: open_table(path, ",") for split, path in paths.items()}
        vocabularies, num_rows = write_splits(
            writer, tables, columns, valid_share=valid_share, seed=self.seed, max_rejected=self.max_rejected
        )
        if published is not None and columns.min_count == published.min_count and not valid_share:
            writer.report(_compared(published, vocabularies, num_rows))

    def _of_folder(self, folder: Path) -> tuple[str | None, Columns]:
        """The name of the published set in the folder, None for any other, and its columns."""
        if self.columns is not None:
            name, columns = None, self.columns
        else:
            name = self.name or _name(folder)
            columns = PUBLISHED[name].columns()
        if self.min_count is not None:
            columns = replace(columns, min_count=self.min_count)
        if self.max_history is not None:
            columns = replace(columns, max_history=self.max_history)
        return name, columns

    def _valid_share(self, folder: Path) -> float:
        """The share of train that validates; 0 where a file validates, or the rows of test."""
        paths, (name, _) = _files(folder), self._of_folder(folder)
        if "valid" in paths:
            if self.valid_share is not None:
                raise ValueError(f"{paths['valid']} validates: --valid-share is for folders without such a file")
            return 0.0
        if self.valid_share is None and not (name is not None and PUBLISHED[name].valid_is_test):
            raise ValueError(
                f"{folder}: no valid.csv (or .csv.gz, .parquet); --valid-share 0.1 splits it off train, "
                "with --valid-share 0 the rows of test validate"
            )
        return self.valid_share or 0.0

    @classmethod
    def constructor(cls) -> Callable[..., Reader]:
        return _from_options


def prepare_reczoo(
    source: str | Path, out: str | Path, config: Reczoo = Reczoo(), *, progress: bool = False
) -> PreparedDataset:
    """Prepares a folder, in two passes over train; memory grows with the vocabularies.

    Example::

        data = prepare_reczoo("Criteo_x1", "runs/criteo_x1")
        data = prepare_reczoo("mine", "runs/mine", Reczoo(columns=Columns("clicked", categorical=["user", "item"])))

    Raises ValueError, naming file, found and expected md5, where a file is not the published one.
    """
    return config.prepare(source, out, progress=progress)


def _files(folder: Path) -> dict[str, Path]:
    """The file of each split; that of valid may be missing."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; one with train.csv (or .csv.gz, .parquet) and test.csv is needed")
    paths: dict[str, Path] = {}
    for split in SPLITS:
        fitting = [folder / (split + ending) for ending in ENDINGS if (folder / (split + ending)).is_file()]
        if len(fitting) > 1:
            raise ValueError(
                f"{folder}: {' and '.join(path.name for path in fitting)} are both there; leave one of them"
            )
        if not fitting and split != "valid":
            raise ValueError(f"{folder}: no {split}.csv (or .csv.gz, .parquet)")
        if fitting:
            paths[split] = fitting[0]
    return paths


def _name(folder: Path) -> str:
    """The set that the folder is named after."""
    of_folder = folder.resolve().name.lower()
    fitting = [name for name in PUBLISHED if of_folder in (name.lower(), re.sub("_00[0-9]$", "", name.lower()))]
    if len(fitting) > 1:
        raise ValueError(f"{folder}: which setting is meant? Give --name {' or --name '.join(fitting)}")
    if not fitting:
        raise ValueError(
            f"{folder}: not the name of a set of BARS; give --name, one of {', '.join(PUBLISHED)}, "
            "or for any other set its --label and --categorical columns"
        )
    return fitting[0]


def _check_md5(writer: Writer, path: Path, expected: str | None) -> None:
    if expected is None or path.suffix == ".parquet":
        writer.report([f"{path}: not checked, as no md5 is published of it"])
        return
    digest = hashlib.md5(usedforsecurity=False)
    advance = writer.meter(path, title=f"Checking {path.name}")
    for content in read_unpacked(path, advance):
        digest.update(content)
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{path}: its md5 is {digest.hexdigest()}, that of the published file {expected}: damaged or of another "
            "version; fetch it again, or go on without this check with --no-md5"
        )


def _compared(published: Published, vocabularies: Mapping[str, Vocabulary], num_rows: Mapping[str, int]) -> list[str]:
    """What differs from the published numbers of rows and ids, in words."""
    lines = [
        f"{split}: {num_rows[split]:,} rows, published are {number:,}"
        for split, number in published.rows.items()
        if num_rows[split] != number
    ]
    names = (*published.categorical, *published.lists)
    known = {name: number for name, number in zip(names, published.ids) if number is not None}
    found = {name: vocabularies[name].num_embeddings for name in names}
    lines += [f"{name}: {found[name]:,} ids, BARS has {n:,}" for name, n in known.items() if found[name] != n]
    if published.total_ids not in (None, sum(found.values())):
        lines.append(f"{sum(found.values()):,} ids in all, BARS has {published.total_ids:,}")
    return lines or ["Rows and ids are as many as published"]


def _from_options(
    name: Annotated[str | None, typer.Option(help="Set of BARS; by default the folder's name.")] = None,
    label: Annotated[str | None, typer.Option(help="Of any other set: the column of 0 and 1.")] = None,
    categorical: Annotated[tuple[str, ...], typer.Option(help="Of any other set: the categorical columns.")] = (),
    dense: Annotated[tuple[str, ...], typer.Option(help="Of any other set: the numerical columns.")] = (),
    lists: Annotated[
        tuple[str, ...], typer.Option(help="Of any other set: columns of lists of values of their own.")
    ] = (),
    sequence: Annotated[
        tuple[str, ...],
        typer.Option(help="Of any other set: columns of lists of another column's values, e.g. seen:item."),
    ] = (),
    group: Annotated[str | None, typer.Option(help="Of any other set: the column that grouped AUC is over.")] = None,
    item: Annotated[str | None, typer.Option(help="Of any other set: the column by which metrics are sliced.")] = None,
    separator: Annotated[
        str, typer.Option(help="Of any other set: what stands between values of a list in text.")
    ] = "^",
    missing: Annotated[tuple[str, ...], typer.Option(help="Of any other set: further words for a missing value.")] = (),
    keep_missing_words: Annotated[
        bool,
        typer.Option("--keep-missing-words", help="Of any other set: NULL, None, NA, nan and the like are values."),
    ] = False,
    min_count: Annotated[
        int | None, typer.Option(help="Values rarer than this in training share id 1; by default BARS', or 1.")
    ] = None,
    max_history: Annotated[
        int | None, typer.Option(help="Most values kept of a list; by default BARS', or all.")
    ] = None,
    valid_share: Annotated[
        float | None, typer.Option(help="Share of train that validates where no file does; 0: the rows of test do.")
    ] = None,
    md5: Annotated[bool, typer.Option("--md5/--no-md5", help="Compare the files with the published ones.")] = True,
    seed: Seed = 0,
    max_rejected: MaxRejected = DEFAULT_LIMIT,
) -> Reczoo:
    columns = None
    if label is not None:
        columns = Columns(
            label,
            dense,
            categorical,
            lists,
            histories=_pairs(sequence),
            group=group,
            item=item,
            separator=separator,
            missing=(*([] if keep_missing_words else WORDS), *missing),
        )
    elif any((categorical, dense, lists, sequence, group, item, missing, keep_missing_words)):
        raise ValueError("columns of a set that is not BARS': its --label is needed as well")
    return Reczoo(name, columns, min_count, max_history, valid_share, md5, seed, max_rejected)


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.split(":") for text in texts]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ValueError(
            f"--sequence {','.join(texts)!r}: pairs COLUMN:OF separated by commas are needed, e.g. seen:item"
        )
    return {column: of for column, of in pairs}
