"""What a reader is: the class behind one KIND of ``embtables prepare KIND INPUT OUT``."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import numpy as np
import polars as pl
import typer

from embtables.datasets.options import LogSplit, MaxRejected, MinCount, Out, Seed, Shares, Split, numbers
from embtables.datasets.prepared import PreparedDataset
from embtables.datasets.rejections import DEFAULT_LIMIT, Fault, Rejections
from embtables.datasets.row_keys import RowKeys, Schema, check_columns
from embtables.datasets.splits import DEFAULT_SHARES, check_shares, leave_last_out, random_split, time_split
from embtables.datasets.streaming import write_streaming
from embtables.datasets.text import Block
from embtables.datasets.times import READ_AS, Clock
from embtables.datasets.writing import Writer
from embtables.datasets.writing import prepare as prepare_folder

_ROW = "_row"


@dataclass(frozen=True)
class Reader(ABC):
    """Turns the raw files of one kind into prepared data.

    A reader is a frozen dataclass. Its fields are the options of the command, and all of them have defaults; the help
    text of an option is written as ``Annotated[float, typer.Option(help="…")]``, and a field of type
    ``tuple[float, ...]`` (or ``str``, ``int``) is written with commas on the command line. The first paragraph of the
    docstring is the help text of the command.

    A subclass has to define ``kind`` and ``write``. ``RowReader`` is the easier base class for most files.
    """

    kind: ClassVar[str]
    """The word for KIND on the command line, which the manifest holds as well."""
    input_help: ClassVar[str] = "File or folder to read."
    """What INPUT is, for the help text."""
    example: ClassVar[str] = ""
    """One or more command lines, shown below the help text."""

    def inputs(self, source: Path) -> Sequence[Path]:
        """The files that are read, whose checksums the manifest holds. By default the source itself."""
        return [source]

    def settings(self, source: Path) -> dict[str, Any]:
        """The options as the manifest holds them. An existing folder is reused only if they are equal."""
        return asdict(self)

    @abstractmethod
    def write(self, source: Path, writer: Writer) -> None:
        """Reads the source and gives the rows to the writer.

        Raises:
            ValueError: the source cannot be used; the sentence names the file and, where there is one, the line.
        """

    @classmethod
    def constructor(cls) -> Callable[..., Reader]:
        """The callable whose parameters are the options of the command, and which returns the reader.

        By default this is the class itself. A reader overrides it where options are written otherwise on the command
        line than in Python.
        """
        return cls

    def prepare(self, source: str | Path, out: str | Path, *, progress: bool = False) -> PreparedDataset:
        """Prepares ``source`` in the folder ``out``, which is written completely or not at all.

        Where ``out`` already holds the same data set, prepared with the same options, it is reused.

        Raises:
            ValueError: the source cannot be used, or ``out`` holds something else.
        """
        path = Path(source)
        inputs = self.inputs(path)  # first: it says what is wrong with a folder
        return prepare_folder(out, self.kind, self.settings(path), inputs, partial(self.write, path), progress=progress)


def command(reader: type[Reader]) -> Callable[..., None]:
    """The function behind ``embtables prepare KIND``: INPUT, OUT, and one option per parameter of the constructor.

    Raises:
        ValueError: an option has no default.
    """
    make = reader.constructor()
    hints = get_type_hints(make, include_extras=True)
    source_type = Annotated[Path, typer.Argument(metavar="INPUT", help=reader.input_help, show_default=False)]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("source", kind, annotation=source_type)]
    parameters.append(inspect.Parameter("out", kind, annotation=Out))
    elements: dict[str, type] = {}  # of the options that are written with commas
    for name, parameter in inspect.signature(make).parameters.items():
        annotation, default = hints[name], parameter.default
        if default is inspect.Parameter.empty:
            raise ValueError(f"reader '{reader.kind}': its option '{name}' needs a default")
        bare = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
        if get_origin(bare) is tuple:
            elements[name] = get_args(bare)[0]
            described = getattr(annotation, "__metadata__", ())
            annotation = Annotated[str, described[0]] if described else str
            default = ",".join(value if isinstance(value, str) else f"{value:g}" for value in default)
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))

    def run(source: Path, out: Path, **options: Any) -> None:
        for name, element in elements.items():
            options[name] = _split_by_commas(name, options[name], element)
        make(**options).prepare(source, out, progress=True)

    run.__doc__ = inspect.cleandoc(reader.__doc__ or "").partition("\n\n")[0]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads the options from here
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _split_by_commas(name: str, text: str, element: type) -> tuple[Any, ...]:
    if element is str or not text:
        return tuple(part for part in text.split(",") if part)
    return tuple(map(element, numbers(f"--{name.replace('_', '-')}", text)))


@dataclass(frozen=True, kw_only=True)
class RowReader(Reader):
    """A reader that yields rows, and leaves everything else to the library.

    The library checks the columns, counts malformed rows, splits, builds vocabularies from the training rows, and
    writes. Memory grows with the vocabularies, and by 25 bytes per row where the split goes by time.

    A subclass defines ``kind``, ``schema`` and ``blocks``. The fields below are options that each such reader has.
    """

    schema: ClassVar[Schema]
    """What the columns of the blocks are."""
    time: ClassVar[str | None] = None
    """The column of times, numbers or dates, that ``split`` needs for "time" and "leave-last-out"."""

    split: Split = "random"
    shares: Shares = DEFAULT_SHARES
    min_count: MinCount = 1
    seed: Seed = 0
    max_rejected: MaxRejected = DEFAULT_LIMIT

    def __post_init__(self) -> None:
        check_shares(self.shares)
        if self.split not in get_args(LogSplit):
            raise ValueError(f"split '{self.split}': one of {', '.join(get_args(LogSplit))} is needed")
        if self.split != "random" and self.time is None:
            raise ValueError(f"split '{self.split}': '{self.kind}' has no column of times, so 'random' is needed")
        if self.split == "leave-last-out" and self.schema.group is None:
            raise ValueError(f"split '{self.split}': '{self.kind}' has no column of users, so 'random' is needed")
        if self.min_count < 1:
            raise ValueError(f"min_count {self.min_count}: at least 1 is needed")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: it cannot be negative")

    @abstractmethod
    def blocks(self, source: Path, rejections: Rejections, advance: Callable[[int], None]) -> Iterator[Block]:
        """The rows of the source, some thousands at a time.

        The frame of a block has the columns of ``schema``, and ``time``; further columns are ignored. Labels are 0
        and 1, dense features are numbers (where one is missing it becomes 0), other values are text or integers, where
        null and empty text are missing values. ``lines`` numbers the rows; the random split depends on these numbers.

        Args:
            source: the INPUT of the command.
            rejections: takes the malformed rows. The library rejects rows whose label, time or number is none.
            advance: moves the progress bar on by a number of bytes of the source.
        """

    def write(self, source: Path, writer: Writer) -> None:
        rejections = Rejections(self.max_rejected)
        keys = RowKeys(self.schema)
        rows = _SplitRows(self, keys)
        write_streaming(
            writer,
            rejections,
            rows.keyed(
                self._checked_blocks(source, rejections, writer.meter(*self.inputs(source))), source, rejections
            ),
            rows.split,
            self.schema,
            min_count=self.min_count,
            texts=keys.of_column,
        )

    def _checked_blocks(self, source: Path, rejections: Rejections, advance: Callable[[int], None]) -> Iterator[Block]:
        """The blocks. Errors of the author's code in the shape of a block become one sentence."""
        try:
            for block in self.blocks(source, rejections, advance):
                if not isinstance(block, Block) or not isinstance(block.frame, pl.DataFrame):
                    raise ValueError(f"reader '{self.kind}': blocks() yields {type(block).__name__}, not a Block")
                if len(block.lines) != len(block.frame):
                    raise ValueError(
                        f"reader '{self.kind}': 'lines' of a block has {len(block.lines)} numbers for "
                        f"{len(block.frame)} rows"
                    )
                yield block
        except pl.exceptions.PolarsError as error:
            raise ValueError(f"reader '{self.kind}': {error}") from error


class _SplitRows:
    """Turns the blocks of a reader into keys, and remembers of all rows what their split depends on."""

    def __init__(self, reader: RowReader, keys: RowKeys) -> None:
        self.reader = reader
        self.keys = keys
        self.num_rows = 0
        self._times: list[np.ndarray] = []
        self._users: list[np.ndarray] = []
        self._codes: np.ndarray | None = None
        self._clock: Clock | None = None

    def keyed(self, blocks: Iterator[Block], source: Path, rejections: Rejections) -> Iterator[Block]:
        reader, by_time = self.reader, self.reader.split != "random"
        for block in blocks:
            where = f"reader '{reader.kind}'"
            faults: dict[str, Fault] = {}
            times = None
            if by_time:
                assert reader.time is not None
                times = self._times_of(block.frame, reader.time, where)
                fault = Fault(times.is_null(), block.frame[reader.time], READ_AS)
                faults[f"no valid time in '{reader.time}'"] = fault
            good, rows = self.keys.of(
                block.frame, block.lines, rejections, lambda line: f"{source}:{line}", where, faults
            )
            if times is not None:
                self._times.append(times.filter(pl.Series(good)).to_numpy())
            if reader.split == "leave-last-out":
                assert rows.groups is not None
                self._users.append(rows.groups)
            frame = rows.as_frame().with_columns(pl.Series(_ROW, self.num_rows + np.arange(len(rows.frame))))
            self.num_rows += len(frame)
            rejections.rows_read = max(rejections.rows_read, self.num_rows + rejections.total)
            yield Block(frame, rows.numbers)

    def split(self, block: Block) -> np.ndarray:
        """The split code of each row of a block; all blocks have been read when it is called."""
        reader = self.reader
        if reader.split == "random":
            return random_split(block.lines, reader.seed, reader.shares)
        if self._codes is None:
            times = np.concatenate(self._times)
            if reader.split == "time":
                self._codes = time_split(times, reader.shares)
            else:
                self._codes = leave_last_out(np.concatenate(self._users), times)
            self._times, self._users = [], []
        return self._codes[block.frame[_ROW].to_numpy()]

    def _times_of(self, frame: pl.DataFrame, name: str, where: str) -> pl.Series:
        """Numbers in the order of time, null where there is no time."""
        check_columns(frame.columns, [name], where)
        values = frame[name]
        if values.dtype == pl.Date or isinstance(values.dtype, pl.Datetime):
            return values.cast(pl.Datetime("us")).cast(pl.Int64)
        if values.dtype == pl.String:
            numbers = values.cast(pl.Float64, strict=False)
            if self._clock is None and numbers.count() < 0.5 * values.count():
                self._clock = Clock()
            if self._clock is not None:
                return self._of_clock(self._clock, values, where)
            values = numbers
        if not values.dtype.is_numeric():
            raise ValueError(f"{where}: column '{name}' is of type {values.dtype}, where numbers or dates are needed")
        return values if values.dtype.is_integer() else values.fill_nan(None)

    def _of_clock(self, clock: Clock, values: pl.Series, where: str) -> pl.Series:
        moments = clock.read(values)
        unsettled = moments.filter(pl.col("time") != pl.col("swapped"))
        if len(unsettled):
            raise ValueError(
                f"{where}: the times in '{values.name}' may be day/month or month/day, which the reader must settle: "
                "let it yield dates"
            )
        return moments["time"]
