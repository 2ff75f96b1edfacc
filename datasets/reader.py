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
from embtables.datasets.prepared import GROUP, LABEL, PreparedDataset
from embtables.datasets.rejections import DEFAULT_LIMIT, Rejections
from embtables.datasets.row_keys import RowKeys, Schema
from embtables.datasets.splits import DEFAULT_SHARES, check_shares, leave_last_out, random_split, time_split
from embtables.datasets.streaming import write_streaming
from embtables.datasets.text import Block
from embtables.datasets.vocabulary import MISSING
from embtables.datasets.writing import Writer, list_column
from embtables.datasets.writing import prepare as prepare_folder

_ROW = "_row"


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
        return asdict(self)  # type: ignore[call-overload]  # a reader is a dataclass

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
        return prepare_folder(
            out, self.kind, self.settings(path), self.inputs(path), partial(self.write, path), progress=progress
        )


def command(reader: type[Reader]) -> Callable[..., None]:
    """The function behind ``embtables prepare KIND``: INPUT, OUT, and one option per parameter of the constructor.

    Raises:
        ValueError: an option has no default.
    """
    make = reader.constructor()
    hints = get_type_hints(make, include_extras=True)
    source_type = Annotated[str, typer.Argument(metavar="INPUT", help=reader.input_help, show_default=False)]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("source", kind, annotation=source_type)]
    parameters.append(inspect.Parameter("out", kind, annotation=Out))
    elements: dict[str, type] = {}  # of the options that are written with commas
    for name, parameter in inspect.signature(make).parameters.items():
        annotation, default = hints[name], parameter.default
        if default is inspect.Parameter.empty or isinstance(default, type(_NO_DEFAULT)):
            raise ValueError(f"reader '{reader.kind}': its option '{name}' needs a default")
        bare = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
        if get_origin(bare) is tuple:
            elements[name] = get_args(bare)[0]
            annotation = Annotated[(str, *getattr(annotation, "__metadata__", ()))]  # type: ignore[index]
            default = ",".join(value if isinstance(value, str) else f"{value:g}" for value in default)
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))

    def run(source: str, out: Path, **options: Any) -> None:
        for name, element in elements.items():
            options[name] = _split_by_commas(name, options[name], element)
        make(**options).prepare(source, out, progress=True)

    run.__doc__ = inspect.cleandoc(reader.__doc__ or "").partition("\n\n")[0]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads the options from here
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
