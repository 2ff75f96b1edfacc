"""Spending a budget in steps, each of which makes one table of a group larger, in the order of what they are worth."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

import numpy as np

from embtables.sizes.budget import Ints

_TOO_LARGE = 2**62
# What rounding to bytes and a last scale can add to the two slabs that rows move between: of a slab less than a byte,
# and the scales of less than a block, of which no format has more than four.
_ROUNDING = 2 * (1 + 4 * 2)


class Shared(NamedTuple):
    """What rows have in common, such as a projection: it takes bytes while there is a row that needs it.

    Args:
        num_bytes: ``[K]``, the bytes of each.
        gains: ``[S]``, which one the rows of each step need after it; −1 for none.
        loses: ``[S]``, which one these rows needed before it; −1 for none.
        rows: ``[S]``, how many rows those are.
        before: ``[K]``, how many rows need each before the first step.
    """

    num_bytes: Ints
    gains: Ints
    loses: Ints
    rows: Ints
    before: Ints


class Path(NamedTuple):
    """The steps in the order in which they are taken, and how many bytes the group has after each.

    Steps after which a table would have to become smaller again, since scales are shared and rows rounded to bytes, are
    taken together with the next ones of that table. So no table ever becomes smaller where the budget grows.

    Args:
        steps: ``[P]``, numbers of steps.
        own: ``[P]``, the bytes of each step's table after it.
        least: the bytes of the group before the first step.
        totals: ``[P]``, the bytes of the group after each step; beyond all budgets where no path may end there.
    """

    steps: Ints
    own: Ints
    least: int
    totals: Ints

    @staticmethod
    def of(table: Ints, own: Ints, before: Ints, most: Ints, apart: int, shared: Shared) -> Path:
        """The path of steps that are given in the order of their worth.

        Args:
            table: ``[S]``, the table that each step makes larger.
            own: ``[S]``, the bytes of that table after the step.
            before: ``[T]``, the bytes of each table before the first step.
            most: ``[T]``, the bytes that no table may exceed.
            apart: bytes of the group that no step changes.
            shared: what tables have in common.
        """
        never = len(table)
        # The step with which each takes effect: after that one its table is no larger than it will ever be later.
        effect, more = np.full(never, never, dtype=np.int64), np.empty_like(own)
        for t, steps in enumerate(by_table(table, len(before))):
            sizes = own[steps]
            later = np.minimum.accumulate(np.append(sizes, most[t])[::-1])[::-1]
            ends = np.append(steps[sizes <= later[1:]], never)
            effect[steps] = ends[np.searchsorted(ends, steps)]
            more[steps] = np.diff(sizes, prepend=before[t])
        order = np.argsort(effect, kind="stable")[: np.count_nonzero(effect < never)]
        least = apart + int(before.sum()) + int(shared.num_bytes[shared.before > 0].sum())
        totals = least + np.cumsum(more[order]) + _needed(shared, order)
        return Path(order, own[order], least, np.where(effect[order] == order, totals, _TOO_LARGE))

    def total(self, number: int) -> int:
        """The bytes of the group after so many steps."""
        return int(self.totals[number - 1]) if number else self.least

    def floor(self) -> int:
        """The least bytes of the group."""
        return min(self.least, int(self.totals.min(initial=_TOO_LARGE)))

    def within(self, limit: int) -> int:
        """How many steps are taken with ``limit`` bytes: the most after which the group fits."""
        # It may become smaller by a step after which nothing needs a projection any longer.
        later = np.minimum.accumulate(self.totals[::-1])[::-1]
        return int(np.searchsorted(later, limit, side="right"))

    def part(self, number: int, own: Callable[[Ints], Ints], rows: int, spare: int) -> int:
        """How many of its rows move in the step behind the first ``number``, which does not fit as a whole.

        Args:
            number: how many steps are taken.
            own: gives the bytes of the step's table for so many rows of the step that move.
            rows: how many there are in the step; fewer move.
            spare: the bytes that are left for them.
        """
        end = number + int(np.argmax(self.totals[number:] < _TOO_LARGE))
        last = rows - 1
        before, after = (int(n) for n in own(np.array([0, last])))
        most = min(before + spare, int(self.own[end]))
        if after <= before or most < before:
            return 0
        # Rows take bytes in proportion to their number, but for rounding: the last one that fits is near the line.
        middle, width = last * (most - before) // (after - before), ceil(2 * _ROUNDING * last / (after - before))
        near = np.arange(max(0, min(middle, last) - width), min(middle + width, last) + 1)
        sizes = own(near)
        fitting = near[(before <= sizes) & (sizes <= most)]
        return int(fitting[-1]) if len(fitting) else 0


def by_table(table: Ints, num_tables: int) -> list[Ints]:
    """The numbers of the steps of each table, ascending."""
    ends = np.cumsum(np.bincount(table, minlength=num_tables))
    return np.split(np.argsort(table, kind="stable"), ends[:-1])


def _needed(shared: Shared, order: Ints) -> Ints:
    """The bytes of what is shared after each step, less those before the first one."""
    place = np.tile(np.arange(len(order)), 2)
    which = np.concatenate([shared.gains[order], shared.loses[order]])
    rows = np.concatenate([shared.rows[order], -shared.rows[order]])
    more = np.zeros(len(order), dtype=np.int64)
    for number, num_bytes in enumerate(shared.num_bytes):
        # By place; what a step gains comes before what it loses.
        own = np.flatnonzero(which == number)
        own = own[np.argsort(place[own], kind="stable")]
        needing = shared.before[number] + np.concatenate([[0], np.cumsum(rows[own])])
        np.add.at(more, place[own], num_bytes * np.diff((needing > 0).astype(np.int64)))
    return np.cumsum(more)
