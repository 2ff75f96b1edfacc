"""Files about users or items that lie beside a log."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from embtables.datasets.interaction_log import ItemFeatures
from embtables.datasets.key_column import KeyColumn
from embtables.datasets.rejections import Fault, Rejections
from embtables.datasets.text import Format, read_text
from embtables.datasets.vocabulary import MISSING
from embtables.datasets.writing import Writer


@dataclass(frozen=True)
class Side:
    """How a file about users or items is read: the id of each row, its values, and the faults of malformed rows.

    Expressions see the file's columns as text (null where empty). Those of ``lists`` give lists.
    """

    path: Path
    layout: Format
    key: pl.Expr
    values: dict[str, pl.Expr] = field(default_factory=dict)
    lists: dict[str, pl.Expr] = field(default_factory=dict)
    faults: dict[str, pl.Expr] = field(default_factory=dict)  # by reason: true where the row is malformed


def read_side(
    side: Side, ids: pl.Series, keys: np.ndarray, limit: float, writer: Writer
) -> tuple[ItemFeatures, dict[str, KeyColumn]]:
    """Reads the features of ``ids``, whose keys in the log are ``keys``, and the columns that know their raw values.

    Of two rows with one id the first counts. Ids that the file does not know are counted and reported
    (``not_in_side_files`` of the manifest); ValueError where it knows none.
    """
    rejections = Rejections(limit)
    faults = {"no id": side.key.is_null(), **side.faults}
    read = {reason: list(dict.fromkeys(fault.meta.root_names())) for reason, fault in faults.items()}
    chosen = {"": side.key, **side.values, **side.lists}
    frames = []
    for block in read_text(side.path, side.layout, rejections):
        wrong = block.frame.select(fault.alias(reason) for reason, fault in faults.items())
        found = {reason: Fault(wrong[reason], block.frame.select(names)) for reason, names in read.items()}
        good = rejections.passing(found, block.lines, lambda line: f"{side.path}:{line}")
        frame = block.frame.filter(pl.Series(good)).select(value.alias(name) for name, value in chosen.items())
        frames.append(frame.join(pl.DataFrame({"": ids}), on="", how="semi"))
    rejections.check(final=True)
    writer.report(rejections.lines())
    table = pl.concat(frames).unique("", keep="first", maintain_order=True)
    unknown = len(ids) - len(table)
    writer.extra.setdefault("not_in_side_files", {})[side.path.name] = unknown
    if len(table) == 0:
        raise ValueError(f"{side.path}: it knows none of the {len(ids):,} ids of the log: of another data set?")
    if unknown:
        writer.report([f"{unknown:,} of {len(ids):,} ids are not in {side.path.name}: they get id 0 or an empty list"])

    joined = pl.DataFrame({"": ids}).join(table, on="", how="left", maintain_order="left")
    columns = {name: KeyColumn() for name in (*side.values, *side.lists)}
    features = ItemFeatures(keys, {name: columns[name].keys_of(joined[name]) for name in side.values})
    for name in side.lists:
        lists = joined[name].fill_null([])
        features.lists[name] = (
            columns[name].keys_of(lists.explode(empty_as_null=False)),
            np.r_[0, np.cumsum(lists.list.len().to_numpy())].astype(np.int64),
        )
    return features, columns


def integers(column: str) -> pl.Expr:
    """The column's integers, null where there is none, and where it is the one that stands for a missing value."""
    number = pl.col(column).cast(pl.Int64, strict=False)
    return pl.when(number != MISSING).then(number).name.keep()
