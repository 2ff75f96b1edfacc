"""Users' sequences of items with the items' attributes, as published with S3-Rec (Zhou et al., CIKM 2020).

``<name>.txt`` holds one line per user, ``user item item …``, in the order of time; ``<name>_item2attributes.json`` maps
each item to its attributes. Source of the files: the authors' repository RUCAIBox/CIKM2020-S3Rec (Beauty, Sports, Toys,
Yelp).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import typer

from embtables.datasets.interaction_log import ItemFeatures, Log, LogOptions, write_log
from embtables.datasets.negatives import Negatives
from embtables.datasets.options import History, MaxRejected, MinCount, Seed, Shares, Without
from embtables.datasets.prepared import PreparedDataset
from embtables.datasets.reader import Reader
from embtables.datasets.rejections import DEFAULT_LIMIT, Rejections
from embtables.datasets.splits import DEFAULT_SHARES
from embtables.datasets.text import read_lines
from embtables.datasets.writing import Writer

ATTRIBUTES = "attributes"


@dataclass(frozen=True)
class S3Rec(Reader):
    """Sequences of items, a line a user, with the items' attributes (S3-Rec's Yelp, Sports, Beauty, Toys).

    Every place of a sequence is a click, whose number in the sequence is its time. Negatives are items that the
    sequence of the user does not hold.
    """

    kind: ClassVar[str] = "s3rec"
    input_help: ClassVar[str] = "One line per user: user item item …"
    example: ClassVar[str] = (
        "Example: embtables prepare s3rec Yelp.txt data/yelp   (reads Yelp_item2attributes.json beside it)"
    )

    max_rejected: float = DEFAULT_LIMIT
    negatives: Negatives = field(default_factory=lambda: Negatives(1, "uniform", None))
    log: LogOptions = field(default_factory=lambda: LogOptions(split="leave-last-out", min_history=1))

    def inputs(self, source: Path) -> list[Path]:
        attributes = source.with_name(f"{source.stem}_item2attributes.json")
        return [source, *([attributes] if attributes.is_file() else [])]

    def write(self, source: Path, writer: Writer) -> None:
        _fill(writer, self.inputs(source), self)

    @classmethod
    def constructor(cls) -> Callable[..., Reader]:
        return _from_options


def prepare_s3rec(
    source: str | Path, out: str | Path, config: S3Rec = S3Rec(), *, progress: bool = False
) -> PreparedDataset:
    """Prepares ``<name>.txt`` and, where it lies beside, ``<name>_item2attributes.json``.

    Features: user_id, item_id and the multi-valued ``attributes`` of the item; groups are users; slices go by item.

    Example::

        data = prepare_s3rec("Yelp.txt", "data/yelp")
    """
    return config.prepare(source, out, progress=progress)


def _fill(writer: Writer, inputs: list[Path], config: S3Rec) -> None:
    rejections = Rejections(config.max_rejected)
    advance = writer.meter(inputs[0], title="Reading sequences")
    lines = list(_sequences(inputs[0], rejections, advance))
    rejections.check(final=True)
    if not lines:
        raise ValueError(f"{inputs[0]}: the file holds no sequences")
    writer.rows_read, writer.rows_rejected = rejections.rows_read, rejections.counts
    writer.report(rejections.lines())
    lengths = np.array([len(line) - 1 for line in lines])
    users = np.array([line[0] for line in lines])
    if len(np.unique(users)) < len(users):
        raise ValueError(f"{inputs[0]}: a user has two lines, but a line must be a user's whole sequence")
    log = Log(
        users=np.repeat(users, lengths),
        items=np.concatenate([line[1:] for line in lines]),
        times=np.concatenate([np.arange(length) for length in lengths]),
        rows=np.arange(lengths.sum()),
        timed=False,
    )
    if len(inputs) > 1:
        log.items_known = _known(inputs[1], np.unique(log.items), writer)
    write_log(writer, log, config.log, config.negatives)


def _sequences(path: Path, rejections: Rejections, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    for number, line in read_lines(path, rejections, advance):
        try:
            sequence = np.array(line.split(), dtype=np.int64)
        except (ValueError, OverflowError):
            sequence = np.zeros(0, np.int64)
        if len(sequence) < 2 or sequence.min() < 0:
            rejections.reject("no line of a user and items, all integers", f"{path}:{number}")
        else:
            yield sequence


def _known(path: Path, items: np.ndarray, writer: Writer) -> ItemFeatures:
    """The attributes of the given items, of which the file must know some; the others are counted and reported."""
    known = read_attributes(path)
    unknown = int((known.places(items) < 0).sum())
    writer.extra["not_in_side_files"] = {path.name: unknown}
    if unknown == len(items):
        raise ValueError(f"{path}: it knows none of the {len(items):,} items of the sequences: of another data set?")
    if unknown:
        writer.report([f"{unknown:,} of {len(items):,} items are not in {path.name}: they get an empty list"])
    return known


def read_attributes(path: Path) -> ItemFeatures:
    """The items' attributes from a JSON object {item: [attribute, …]}, all integers."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}): truncated? fetch it again") from None
    wanted = f'{path}: an object such as {{"11394": [1, 2, 3]}} is needed, all integers'
    if not isinstance(content, dict) or not all(isinstance(values, list) for values in content.values()):
        raise ValueError(wanted)
    attributes = [value for values in content.values() for value in values]
    if not all(type(value) in (int, str) for value in attributes):
        raise ValueError(wanted)
    try:
        items = np.array([int(item) for item in content], dtype=np.int64)
        keys = np.array([int(value) for value in attributes], dtype=np.int64)
    except (ValueError, OverflowError):
        raise ValueError(wanted) from None
    lengths = np.array([len(values) for values in content.values()], dtype=np.int64)
    return ItemFeatures(items, lists={ATTRIBUTES: (keys, np.r_[0, np.cumsum(lengths)])})


def _from_options(
    split: Annotated[
        Literal["random", "leave-last-out"], typer.Option(help="leave-last-out: each user's last item tests.")
    ] = "leave-last-out",
    shares: Shares = DEFAULT_SHARES,
    negatives: Annotated[int, typer.Option(help="Negatives per place; all items are equally likely.")] = 1,
    history: History = 50,
    min_history: Annotated[int, typer.Option(help="Places with fewer items before them give no example.")] = 1,
    min_count: MinCount = 1,
    seed: Seed = 0,
    max_rejected: MaxRejected = DEFAULT_LIMIT,
    without: Without = (),
) -> S3Rec:
    options = LogOptions(split, shares, history, min_count, seed, min_history, without)
    return S3Rec(max_rejected, Negatives(negatives, "uniform", None), options)
