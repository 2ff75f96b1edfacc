"""A log of users and items in memory, as keys, and its way into the prepared format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa

from .columns import KeyColumn
from .negatives import ABSENT, Negatives, draw_negatives
from .prepared import GROUP, LABEL
from .splits import DEFAULT_SHARES, SPLITS, check_shares, leave_last_out, random_split, time_split
from .vocabulary import Vocabulary
from .writing import Contents, Writer

USER, ITEM, HISTORY = "user_id", "item_id", "history"
CLICKS_AT_ONCE = 2**17
NO_NEGATIVES = Negatives(per_click=0)


@dataclass
class Log:
    """Parallel arrays, a row an interaction. Without `labels` every row is a click."""

    users: np.ndarray  # keys
    items: np.ndarray  # keys
    times: np.ndarray  # ms
    rows: np.ndarray  # row numbers in the file: the random split hashes them
    labels: np.ndarray | None = None  # 0 or 1
    context: dict[str, np.ndarray] = field(default_factory=dict)  # further features, as keys

    def take(self, rows: np.ndarray) -> Log:
        labels = None if self.labels is None else self.labels[rows]
        context = {name: keys[rows] for name, keys in self.context.items()}
        return Log(self.users[rows], self.items[rows], self.times[rows], self.rows[rows], labels, context)


@dataclass(frozen=True)
class LogOptions:
    """How a log becomes examples. `history` caps the list of a user's earlier items; 0: no such column."""

    split: Literal["random", "time", "leave-last-out"] = "random"
    shares: tuple[float, ...] = DEFAULT_SHARES
    history: int = 50
    min_count: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in ("random", "time", "leave-last-out"):
            raise ValueError(f"split '{self.split}': 'random', 'time' or 'leave-last-out' is needed")
        check_shares(self.shares)
        if self.history < 0:
            raise ValueError(f"history {self.history}: it cannot be negative")
        if self.min_count < 1:
            raise ValueError(f"min_count {self.min_count}: at least 1 is needed")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: it cannot be negative")


def write_log(
    writer: Writer,
    log: Log,
    options: LogOptions,
    negatives: Negatives = NO_NEGATIVES,
    columns: Mapping[str, KeyColumn] = MappingProxyType({}),
) -> None:
    """Splits, draws negatives where there are no labels, and writes, in the order of time.

    A click and its negatives share split, context and history. The history of a row is its user's items with label 1
    at strictly earlier times, whatever their split. `columns` knows the raw values of keys.
    """
    log = log.take(np.argsort(log.times, kind="stable"))
    users, items = _numbered(log.users), _numbered(log.items)
    if options.split == "random":
        split = random_split(log.rows, options.seed, options.shares)
    elif options.split == "time":
        split = time_split(log.times, options.shares)
    else:
        split = leave_last_out(users, log.times)

    task = writer.progress.add_task("Drawing negatives and counting ids", total=None)
    drawn = np.full((len(items), 0), ABSENT, np.int64)
    if log.labels is None:
        drawn, notes = draw_negatives(users, items, log.times, negatives, options.seed)
        writer.extra |= notes
    item_keys = np.zeros(int(items.max()) + 1, np.int64)
    item_keys[items] = log.items
    rows_a_click = 1 + (drawn != ABSENT).sum(1)

    train = split == 0
    vocabularies = {USER: _vocabulary(log.users[train], rows_a_click[train], options.min_count)}
    shown = np.concatenate([items[train], drawn[train].ravel()])
    counts = np.bincount(shown[shown != ABSENT], minlength=len(item_keys))
    vocabularies[ITEM] = Vocabulary(item_keys[counts > 0], counts[counts > 0], options.min_count)
    for name, keys in log.context.items():
        vocabularies[name] = _vocabulary(keys[train], rows_a_click[train], options.min_count)
    contents = Contents(
        vocabularies,
        histories={HISTORY: ITEM} if options.history else {},
        group_feature=USER,
        slice_feature=ITEM,
        published={name: column.values(vocabularies[name].keys) for name, column in columns.items()},
    )
    writer.declare(contents)

    item_ids = vocabularies[ITEM].ids(item_keys)
    histories = Histories(users, item_ids[items], log.times, log.labels, options.history)
    writer.progress.update(task, description="Writing rows", total=len(items))
    for start in range(0, len(items), CLICKS_AT_ONCE):
        part = slice(start, min(start + CLICKS_AT_ONCE, len(items)))
        offered = np.concatenate([items[part, None], drawn[part]], axis=1)
        click, place = np.nonzero(offered != ABSENT)  # row-major: a click, then its negatives
        source = start + click
        frame: dict[str, pl.Series | np.ndarray] = {
            LABEL: (place == 0) if log.labels is None else log.labels[source],
            USER: vocabularies[USER].ids(log.users[source]),
            ITEM: item_ids[offered[click, place]],
        }
        frame |= {name: vocabularies[name].ids(keys[source]) for name, keys in log.context.items()}
        frame[GROUP] = users[source]
        if options.history:
            frame[HISTORY] = histories.of(source)
        rows = pl.DataFrame(frame)
        for code, name in enumerate(SPLITS):
            writer.write(name, rows.filter(pl.Series(split[source] == code)))
        writer.progress.advance(task, part.stop - start)


class Histories:
    """For each row of a log in time order: its user's ids with label 1 at strictly earlier times, the last `cap`."""

    def __init__(
        self, users: np.ndarray, ids: np.ndarray, times: np.ndarray, labels: np.ndarray | None, cap: int
    ) -> None:
        order = np.argsort(users, kind="stable")  # by user, then time
        users, times = users[order], times[order]
        positive = np.ones(len(order), bool) if labels is None else labels[order] > 0
        before = np.cumsum(positive) - positive  # positives of anybody before each place
        new_user = np.r_[True, users[1:] != users[:-1]]
        new_instant = new_user | np.r_[True, times[1:] != times[:-1]]
        places = np.arange(len(order))
        first_of_user = before[np.maximum.accumulate(np.where(new_user, places, 0))]
        end = before[np.maximum.accumulate(np.where(new_instant, places, 0))]
        self._ids = ids[order][positive]
        self._begin, self._end = np.empty_like(end), np.empty_like(end)
        self._begin[order] = np.maximum(first_of_user, end - cap)
        self._end[order] = end

    def of(self, rows: np.ndarray) -> pl.Series:
        """The lists of the given rows, oldest first."""
        begin = self._begin[rows]
        lengths = self._end[rows] - begin
        offsets = np.r_[0, np.cumsum(lengths)]
        places = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], lengths)
        lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(self._ids[places]))
        return pl.Series(pl.from_arrow(lists))


def _numbered(keys: np.ndarray) -> np.ndarray:
    """Keys as 0, 1, … without gaps."""
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _vocabulary(keys: np.ndarray, weights: np.ndarray, min_count: int) -> Vocabulary:
    distinct, places = np.unique(keys, return_inverse=True)
    return Vocabulary(
        distinct, np.bincount(places, weights=weights, minlength=len(distinct)).astype(np.int64), min_count
    )
