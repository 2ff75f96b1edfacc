"""A log of users and items in memory, as integer keys, and the function that writes it in the prepared format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import numpy as np
import polars as pl

from embtables.datasets.dense_scale import SCALES, Scale
from embtables.datasets.histories import EventHistories, Events, Histories, ranges
from embtables.datasets.key_column import KeyColumn
from embtables.datasets.key_lists import KeyLists
from embtables.datasets.negatives import ABSENT, Negatives, draw_negatives
from embtables.datasets.prepared import GROUP, LABEL, MOST_ENTRIES
from embtables.datasets.splits import DEFAULT_SHARES, SPLITS, check_shares, leave_last_out, random_split, time_split
from embtables.datasets.times import say
from embtables.datasets.vocabulary import MISSING, Vocabulary
from embtables.datasets.writing import Contents, Writer, list_column

USER, ITEM, HISTORY = "user_id", "item_id", "history"
T = TypeVar("T")
CLICKS_AT_ONCE = 2**17
NO_NEGATIVES = Negatives(per_click=0)


@dataclass
class ItemFeatures:
    """Features of items, or of users, which hold in every row of the item: a negative gets its own item's values.

    ``values`` holds the single-valued features, one key per item. ``lists`` holds the multi-valued features: the keys
    of all items one after another, and offsets, one more than there are items. Items that are not among ``items`` have
    missing values and empty lists.
    """

    items: np.ndarray  # keys, distinct
    values: dict[str, np.ndarray] = field(default_factory=dict)  # keys
    lists: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # keys, offsets

    def places(self, items: np.ndarray) -> np.ndarray:
        """Where the given items stand in ``items``; −1 for unknown ones."""
        if len(self.items) == 0:
            return np.full(len(items), -1)
        order = np.argsort(self.items)
        place = order[np.minimum(np.searchsorted(self.items, items, sorter=order), len(order) - 1)]
        return np.where(self.items[place] == items, place, -1)


@dataclass
class Log:
    """Parallel arrays with one entry per interaction. Without ``labels`` every interaction is a click."""

    users: np.ndarray  # keys
    items: np.ndarray  # keys
    times: np.ndarray  # ms
    rows: np.ndarray  # row numbers in the file: the random split hashes them
    labels: np.ndarray | None = None  # 0 or 1
    context: dict[str, np.ndarray] = field(default_factory=dict)  # further features, as keys
    dense: dict[str, np.ndarray] = field(default_factory=dict)  # numbers, float64, NaN where one is missing
    lists: dict[str, KeyLists] = field(default_factory=dict)  # multi-valued features
    items_known: ItemFeatures | None = None
    users_known: ItemFeatures | None = None  # the same of users
    splits: np.ndarray | None = None  # index into SPLITS, int8, where the reader knows better than LogOptions.split
    remembered: np.ndarray | None = None  # bool: rows that histories hold; without it those with label 1
    events: Events | None = None  # histories hold these, and no rows of the log
    timed: bool = True  # without, times are places in an order, or all the same

    def take(self, rows: np.ndarray) -> Log:
        """The log with the given rows only. Features of users and items, and events, stay as they are."""
        return replace(
            self,
            users=self.users[rows],
            items=self.items[rows],
            times=self.times[rows],
            rows=self.rows[rows],
            labels=None if self.labels is None else self.labels[rows],
            context={name: keys[rows] for name, keys in self.context.items()},
            dense={name: numbers[rows] for name, numbers in self.dense.items()},
            lists={name: lists.take(rows) for name, lists in self.lists.items()},
            splits=None if self.splits is None else self.splits[rows],
            remembered=None if self.remembered is None else self.remembered[rows],
        )


@dataclass(frozen=True)
class LogOptions:
    """How a log becomes examples.

    A history holds at most the latest ``history`` items of its user; with 0 there are no histories. A row with fewer
    than ``min_history`` earlier items does not become an example, but later histories hold it. Features in ``without``
    are not written, nor are their histories. ``Scale`` explains ``dense_scale``, the scale of dense features.
    """

    split: Literal["random", "time", "leave-last-out"] = "random"
    shares: tuple[float, ...] = DEFAULT_SHARES
    history: int = 50
    min_count: int = 1
    seed: int = 0
    min_history: int = 0
    without: tuple[str, ...] = ()
    dense_scale: Literal["standard", "log", "none"] = "standard"

    def __post_init__(self) -> None:
        if self.split not in ("random", "time", "leave-last-out"):
            raise ValueError(f"split '{self.split}': 'random', 'time' or 'leave-last-out' is needed")
        check_shares(self.shares)
        if self.history < 0:
            raise ValueError(f"history {self.history}: it cannot be negative")
        if self.history > MOST_ENTRIES:
            raise ValueError(f"history {self.history}: at most {MOST_ENTRIES:,} is possible")
        if not 0 <= self.min_history <= self.history:
            raise ValueError(f"min_history {self.min_history}: a number from 0 to history, {self.history}, is needed")
        if self.min_count < 1:
            raise ValueError(f"min_count {self.min_count}: at least 1 is needed")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: it cannot be negative")
        if self.dense_scale not in SCALES:
            raise ValueError(f"dense_scale '{self.dense_scale}': one of {', '.join(SCALES)} is needed")


def write_log(
    writer: Writer,
    log: Log,
    options: LogOptions,
    negatives: Negatives = NO_NEGATIVES,
    columns: Mapping[str, KeyColumn] = MappingProxyType({}),
) -> None:
    """Splits a log, draws negatives where there are no labels, and writes the examples in the order of time.

    A click and its negatives share split, context and history; what is known of an item goes with the item. The history
    of a row is its user's items with label 1 at strictly earlier times, whatever their split; the values of these
    items are histories of their own, aligned with it. Where the log comes with events, these make the histories; those
    up to the last training row count in the vocabularies of their features.

    Args:
        columns: by feature, the column that knows the raw values of keys. Keys of other features are raw values.

    Raises:
        ValueError: no user has enough rows for ``min_history``.
    """
    log = _without(log, options.without)
    examples = _Examples.of(log.take(np.argsort(log.times, kind="stable")), options)
    lengths = examples.histories.lengths
    writer.extra |= {
        "histories_cut": int((lengths > options.history)[examples.rows].sum()) if options.history else 0,
        "rows_without_history": len(lengths) - len(examples.rows),
    }
    task = writer.progress.add_task("Drawing negatives and counting ids", total=None)
    writer.extra |= examples.draw(negatives, options.seed)
    ids = _Ids(examples, options)
    published = {**ids.vocabularies, **ids.list_vocabularies}
    if ids.scales:
        writer.extra["dense"] = {name: asdict(scale) for name, scale in ids.scales.items()}
    writer.declare(
        Contents(
            ids.vocabularies,
            list(ids.scales),
            lists=ids.list_vocabularies,
            histories=ids.of_history,
            group_feature=USER,
            slice_feature=ITEM,
            published={
                name: column.values(published[name].keys) for name, column in columns.items() if name in published
            },
        )
    )
    writer.extra |= examples.summary()
    writer.progress.update(task, description="Writing rows", total=len(examples.rows))
    for start in range(0, len(examples.rows), CLICKS_AT_ONCE):
        part = examples.rows[start : start + CLICKS_AT_ONCE]
        source, frame = ids.frame(part)
        for code, name in enumerate(SPLITS):
            writer.write(name, frame.filter(pl.Series(examples.split[source] == code)))
        writer.progress.advance(task, len(part))


@dataclass
class _Examples:
    """A log in the order of time, with numbers in place of keys, and which of its rows are examples of what split."""

    log: Log
    user_keys: np.ndarray  # distinct
    users: np.ndarray  # places in user_keys, by row
    item_keys: np.ndarray  # distinct
    items: np.ndarray  # places in item_keys, by row
    histories: Histories | EventHistories
    rows: np.ndarray  # the rows that are examples
    split: np.ndarray  # index into SPLITS, by row
    drawn: np.ndarray  # negatives, by row: places in item_keys, or ABSENT

    @staticmethod
    def of(log: Log, options: LogOptions) -> _Examples:
        user_keys, users = _numbered(log.users)
        item_keys, items = _numbered(log.items)
        histories: Histories | EventHistories
        if log.events is not None:
            events = replace(log.events, users=np.searchsorted(user_keys, log.events.users))
            histories = EventHistories(users, log.times, events, options.history)
        else:
            positive = np.ones(len(users), bool) if log.labels is None else log.labels > 0
            remembered = positive if log.remembered is None else log.remembered
            histories = Histories(users, log.times, remembered, options.history)
        rows = np.flatnonzero(histories.lengths >= options.min_history)
        if not len(rows):
            raise ValueError(f"no user has more than {options.min_history} rows, so min_history leaves no example")
        if log.splits is not None:
            split = log.splits
        elif options.split == "random":
            split = random_split(log.rows, options.seed, options.shares)
        elif options.split == "time":
            split = time_split(log.times, options.shares)
        else:
            split = leave_last_out(users, log.times)
        none = np.full((len(items), 0), ABSENT, np.int64)
        return _Examples(log, user_keys, users, item_keys, items, histories, rows, split, none)

    def summary(self) -> dict[str, Any]:
        """What the manifest says about the log."""
        log, labels = self.log, self.log.labels
        facts: dict[str, Any] = {"users": len(self.user_keys), "items": len(self.item_keys)}
        if log.timed:
            facts |= {"first_time": say(log.times[0]), "last_time": say(log.times[-1])}
        return facts if labels is None else facts | {"positives": int((labels > 0).sum())}

    def draw(self, negatives: Negatives, seed: int) -> dict[str, int]:
        """Draws negatives where the log has no labels. Returns what the manifest says about them."""
        if self.log.labels is not None:
            return {}
        self.drawn, notes = draw_negatives(self.users, self.items, self.log.times, negatives, seed)
        return notes


class _Ids:
    """The vocabularies of a log, from its training rows, and its rows as ids."""

    def __init__(self, examples: _Examples, options: LogOptions) -> None:
        self.examples = examples
        log, min_count = examples.log, options.min_count
        train = examples.rows[examples.split[examples.rows] == 0]
        drawn = examples.drawn[train]
        shown_with = 1 + (drawn != ABSENT).sum(1)  # rows that a click becomes
        shown = np.concatenate([examples.items[train], drawn.ravel()])
        counts = np.bincount(shown[shown != ABSENT], minlength=len(examples.item_keys))
        user_counts = np.bincount(examples.users[train], shown_with, len(examples.user_keys)).astype(np.int64)
        seen = {}
        if log.events is not None:
            until = log.times[train].max() if len(train) else 0
            seen = {name: keys[log.events.times <= until] for name, keys in log.events.values.items()}
        self.of_user = _Known(log.users_known, examples.user_keys, user_counts, min_count)
        self.known = _Known(log.items_known, examples.item_keys, counts, min_count, seen)
        self.vocabularies = {
            USER: Vocabulary(examples.user_keys[user_counts > 0], user_counts[user_counts > 0], min_count),
            ITEM: Vocabulary(examples.item_keys[counts > 0], counts[counts > 0], min_count),
            **{name: _vocabulary(keys[train], shown_with, min_count) for name, keys in log.context.items()},
            **self.of_user.vocabularies,
            **self.known.vocabularies,
        }
        self.scales = {name: Scale.of(numbers[train], options.dense_scale) for name, numbers in log.dense.items()}
        self.dense = {name: scale.apply(log.dense[name]) for name, scale in self.scales.items()}
        self.list_vocabularies = {
            **{name: _list_vocabulary(lists.take(train), shown_with, min_count) for name, lists in log.lists.items()},
            **self.of_user.list_vocabularies,
            **self.known.list_vocabularies,
        }
        in_history = [ITEM, *self.known.values] if log.events is None else list(log.events.values)
        self.of_history = {_history_name(name): name for name in in_history} if options.history else {}
        self.of_item = {ITEM: self.vocabularies[ITEM].ids(examples.item_keys), **self.known.values}
        events = {} if log.events is None else log.events.values
        self.of_event = {name: self.vocabularies[name].ids(keys) for name, keys in events.items()}

    def frame(self, part: np.ndarray) -> tuple[np.ndarray, pl.DataFrame]:
        """The rows that the given rows of the log become, with their negatives: the row of the log, and the columns."""
        examples, log = self.examples, self.examples.log
        offered = np.concatenate([examples.items[part, None], examples.drawn[part]], axis=1)
        click, place = np.nonzero(offered != ABSENT)  # row-major: a click, then its negatives
        source, item = part[click], offered[click, place]
        user = examples.users[source]
        frame: dict[str, pl.Series | np.ndarray] = {
            LABEL: (place == 0) if log.labels is None else log.labels[source],
            USER: self.vocabularies[USER].ids(log.users[source]),
        }
        frame |= {name: numbers[source] for name, numbers in self.dense.items()}
        frame |= {name: ids[item] for name, ids in self.of_item.items()}
        frame |= {name: self.vocabularies[name].ids(keys[source]) for name, keys in log.context.items()}
        frame |= {name: ids[user] for name, ids in self.of_user.values.items()}
        for name, rows in log.lists.items():
            keys, offsets = rows.take(source)
            frame[name] = list_column(self.list_vocabularies[name].ids(keys), offsets)
        for lists, rows_of in ((self.of_user.lists, user), (self.known.lists, item)):
            frame |= {
                name: _lists(values, offsets[rows_of], offsets[rows_of + 1])
                for name, (values, offsets) in lists.items()
            }
        frame[GROUP] = user
        if self.of_history:
            earlier, offsets = examples.histories.of(source)
            if log.events is None:
                ids_of, earlier = self.of_item, examples.items[earlier]
            else:
                ids_of = self.of_event
            frame |= {name: list_column(ids_of[feature][earlier], offsets) for name, feature in self.of_history.items()}
        return source, pl.DataFrame(frame)


class _Known:
    """Features of items, or of users, as ids: the value, or the list of values, of each item number.

    ``counts``: how often training shows each item; ``seen``: further keys of features, each once. An item of which
    nothing is known has id 0, or an empty list.
    """

    def __init__(
        self,
        known: ItemFeatures | None,
        item_keys: np.ndarray,
        counts: np.ndarray,
        min_count: int,
        seen: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> None:
        known = known or ItemFeatures(np.zeros(0, np.int64))
        place = known.places(item_keys)
        self.vocabularies: dict[str, Vocabulary] = {}
        self.values: dict[str, np.ndarray] = {}
        for name, keys in known.values.items():
            of_item = np.where(place >= 0, keys[place] if len(keys) else MISSING, MISSING)
            shown, more = counts > 0, seen.get(name, np.zeros(0, np.int64))
            weights = np.concatenate([counts[shown], np.ones(len(more), np.int64)])
            self.vocabularies[name] = _vocabulary(np.concatenate([of_item[shown], more]), weights, min_count)
            self.values[name] = self.vocabularies[name].ids(of_item)
        self.list_vocabularies: dict[str, Vocabulary] = {}
        self.lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, (keys, offsets) in known.lists.items():
            begin = np.where(place >= 0, offsets[place], 0)
            end = np.where(place >= 0, offsets[place + 1], 0)
            chosen, starts = ranges(begin, end)
            times = np.repeat(counts, end - begin)
            self.list_vocabularies[name] = _vocabulary(keys[chosen][times > 0], times[times > 0], min_count)
            self.lists[name] = self.list_vocabularies[name].ids(keys[chosen]), starts


def _without(log: Log, names: Sequence[str]) -> Log:
    """The log without the given features, which must be there."""
    sides = [known for known in (log.users_known, log.items_known) if known is not None]
    holders = [log.context, log.dense, log.lists, *(of for known in sides for of in (known.values, known.lists))]
    there = [name for holder in holders for name in holder]
    for name in names:
        if name not in there:
            raise ValueError(f"without '{name}': no such feature; there are {', '.join(there) or 'none'}")

    def kept(holder: Mapping[str, T]) -> dict[str, T]:
        return {name: of for name, of in holder.items() if name not in names}

    known = [
        None if of is None else replace(of, values=kept(of.values), lists=kept(of.lists))
        for of in (log.users_known, log.items_known)
    ]
    return replace(
        log,
        context=kept(log.context),
        dense=kept(log.dense),
        lists=kept(log.lists),
        users_known=known[0],
        items_known=known[1],
    )


def _list_vocabulary(lists: KeyLists, times: np.ndarray, min_count: int) -> Vocabulary:
    """Of the values of lists, each of which is shown the given number of times."""
    return _vocabulary(lists.values, np.repeat(times, np.diff(lists.offsets)), min_count)


def _lists(values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> pl.Series:
    chosen, offsets = ranges(begin, end)
    return list_column(values[chosen], offsets)


def _history_name(feature: str) -> str:
    return HISTORY if feature == ITEM else f"{feature}_{HISTORY}"


def _numbered(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct keys, and the keys as places among them."""
    distinct, places = np.unique(keys, return_inverse=True)
    return distinct, places.astype(np.int64, copy=False)


def _vocabulary(keys: np.ndarray, weights: np.ndarray, min_count: int) -> Vocabulary:
    distinct, places = np.unique(keys, return_inverse=True)
    return Vocabulary(
        distinct, np.bincount(places, weights=weights, minlength=len(distinct)).astype(np.int64), min_count
    )
