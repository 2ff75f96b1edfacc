"""Ids by how often they occur, for methods that treat frequent ids better than rare ones.

Prepared data numbers ids by their frequency, and a range of frequencies is then a range of ids, which costs no bytes.
Tables whose ids are in another order need a remap from id to rank: an integer each, counted under
``index``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from embtables.lookup.recipe import Ranks
from embtables.methods.base import Method, TableEntry
from embtables.sizes.layout import Code, Counts, Entry, Group, Layout

# Prepared data gives id 0 to missing values and id 1 to unseen ones; from 2 on ids fall in frequency.
_RESERVED = 2
# The integers that ranks are stored as, and for how many ids each will do.
_RANKS = (("uint8", 2**8), ("int16", 2**15), ("int32", 2**31), ("int64", 2**63))
#: What the entry of a table whose ids need ranks says beside its sizes.
RANKS_FROM = "ranks_from"


class RankedMethod(Method):
    """A method that keeps the remap, where one is needed, among its codes."""

    def fixed_codes(self, layout: Layout) -> tuple[str, ...]:
        return tuple(code.name for code in layout.training.codes)

    def make_fixed_codes(self, layout: Layout, group: Group) -> dict[str, Any]:
        return make_ranks(group) if layout.training.codes else {}


def check_counted(group: Group, kind: str) -> None:
    """Raises ``ValueError``, naming the table, where a method of this kind is not told how often ids occur."""
    for table, counts in zip(group.tables, group.counts):
        if counts is None:
            raise ValueError(
                f"table '{table.name}': method {kind} needs to know how often ids occur: "
                "give its counts as frequencies={table: counts}, or to an Embedding as frequencies=counts"
            )


def is_ranked(counts: Counts) -> bool:
    """Whether a table's ids are sorted by their counts ``[n]`` already, so that an id is its own rank."""
    ranked = counts[_RESERVED:]
    return bool((ranked[1:] <= ranked[:-1]).all())


def counts_by_rank(counts: Counts) -> Counts:
    """The counts ``[n]`` of a table's ids in the order of their ranks, so that they never rise.

    Ids that are ranked already keep their order. Ids 0 and 1 of such a table, which prepared data reserve for values
    that are unseen or missing, then come first and count as often as the most frequent id.
    """
    if not is_ranked(counts):
        return np.sort(counts)[::-1]
    ranked = counts.copy()
    ranked[:_RESERVED] = counts.max(initial=0)
    return ranked


def runs_by_rank(counts: Counts) -> tuple[Counts, Counts, Counts]:
    """The counts ``[n]`` of a table's ids by rank, as ``counts_by_rank`` has them, those that are equal told once.

    Returns:
        Each count, from the highest on, the first rank that has it, and the one behind the last; arrays ``[R]``.
    """
    if not is_ranked(counts):
        ranked = np.sort(counts)[::-1]
        starts, ends = runs(ranked)
        return ranked[starts], starts, ends
    # Without a copy of what may be a billion counts.
    tail = counts[_RESERVED:]
    starts, ends = runs(tail)
    most, reserved = counts[: _RESERVED + 1].max(initial=0), min(_RESERVED, len(counts))
    found, starts, ends = np.append(most, tail[starts]), starts + _RESERVED, np.append(reserved, ends + _RESERVED)
    if len(tail) and tail[0] == most:  # those behind the reserved ids are of their run
        return found[1:], np.append(0, starts[1:]), ends[1:]
    return found, np.append(0, starts), ends


def runs(ranked: Counts) -> tuple[Counts, Counts]:
    """Where runs of equal counts begin and end, in counts ``[n]`` that never rise: most ids have few counts."""
    starts = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))[: len(ranked)]
    return starts, np.append(starts, len(ranked))[1:]


class ByWorth:
    """The ids of all tables of a group in one order: those with most occurrences per byte first.

    The last id of each table is left out: it would be alone in what the others share, and needs no row of its own.
    """

    def __init__(self, group: Group) -> None:
        each = [counts_by_rank(c)[:-1] for c in group.counts if c is not None]
        bounds = [runs(ranked) for ranked in each]
        # For each run its table, its first rank and the one behind its last.
        table = np.repeat(np.arange(len(each)), [len(starts) for starts, _ in bounds])
        start, end = (np.concatenate(column) for column in zip(*bounds))
        counts = np.concatenate([ranked[starts] for ranked, (starts, _) in zip(each, bounds)])
        order = np.argsort(-(counts / group.format.mean_bits(group.dims)[table]), kind="stable")
        self._table, self._start = table[order], start[order]
        self._behind = np.cumsum((end - start)[order])  # how many ids there are up to the end of each run
        # The runs of each table, one table after another, with keys that rise by table and place in the order.
        by_table = np.argsort(self._table, kind="stable")
        self._first_keys = np.arange(len(each)) * (len(order) + 1)
        self._keys = self._first_keys[self._table[by_table]] + by_table
        self._begins, self._ends = np.searchsorted(self._keys, self._first_keys), np.append(end[order][by_table], 0)

    @staticmethod
    def of(group: Group) -> ByWorth:
        """That of a group."""
        return group.once("ids by worth", lambda: ByWorth(group))

    def first(self, number: int) -> Counts:
        """How many of the first ``number`` ids are those of each table, ``[tables]``."""
        whole = int(np.searchsorted(self._behind, number, side="right"))
        behind = np.searchsorted(self._keys, self._first_keys + whole)
        found: Counts = np.where(behind > self._begins, self._ends[behind - 1], 0)
        if whole < len(self._table):
            before = int(self._behind[whole - 1]) if whole else 0
            found[self._table[whole]] = self._start[whole] + number - before
        return found

    def most(self, limit: int, bytes_of: Callable[[Counts], Counts]) -> Counts:
        """How many ids of each table, where so many of the first ones are taken as fit into ``limit`` bytes.

        ``bytes_of``: the bytes ``[tables]`` of so many, which do not fall where they are more.
        """
        numbers = range(1, int(self._behind.max(initial=0)) + 1)
        return self.first(bisect_right(numbers, limit, key=lambda number: int(bytes_of(self.first(number)).sum())))


def remapped(group: Group) -> dict[str, int]:
    """By the name of each table whose ids are no ranks yet: where its ranks begin in the group's ``rank_code``."""
    return group.once("remapped", lambda: _remapped(group))


def _remapped(group: Group) -> dict[str, int]:
    starts, end = {}, 0
    for table, counts in zip(group.tables, group.counts):
        if counts is not None and not is_ranked(counts):
            starts[table.name] = end
            end += len(counts)
    return starts


def rank_code(group: Group) -> tuple[Code, ...]:
    """The code buffer that gives the rank of each id, for all tables of a group that need one, one after another.

    It is the smallest integer that holds all of these ranks for each id. There is none, and the tuple is empty, where
    the ids of all tables are ranks already.
    """
    names = remapped(group)
    sizes = [len(c) for t, c in zip(group.tables, group.counts) if t.name in names and c is not None]
    if not sizes:
        return ()
    dtype = next(dtype for dtype, most in _RANKS if max(sizes) <= most)
    return (Code(rank_code_name(group), (sum(sizes),), dtype, "index"),)


def rank_bytes(group: Group) -> int:
    """The bytes of the ``rank_code``."""
    return sum(code.num_bytes for code in rank_code(group))


def rank_code_name(group: Group) -> str:
    return f"{group.name}/rank"


def ranked_entry(variant: str, values: Mapping[str, Any], ranks_from: int | None) -> Entry:
    """The entry of a table, which says where its ranks begin in the ``rank_code``; ``None``: its ids are ranks."""
    if ranks_from is None:
        return Entry(variant, values)
    return Entry(f"{variant}_by_rank", {**values, RANKS_FROM: ranks_from})


def ranks_of(entry: TableEntry, group: Group) -> Ranks | None:
    """What a table's recipe says about its ranks: where they begin in the group's ``rank_code``.

    ``None`` where the table's ids are ranks already.
    """
    first = entry.entry.values.get(RANKS_FROM)
    return None if first is None else Ranks(rank_code_name(group), first)


def make_ranks(group: Group) -> dict[str, Any]:
    """The content of the remap, by the name of its code."""
    names = remapped(group)
    counts = [c for t, c in zip(group.tables, group.counts) if t.name in names and c is not None]
    return {code.name: np.concatenate([_ranks(c, code.dtype) for c in counts]) for code in rank_code(group)}


def _ranks(counts: Counts, dtype: str) -> np.ndarray[Any, Any]:
    ranks = np.empty(len(counts), dtype=dtype)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return ranks
