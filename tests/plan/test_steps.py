"""Steps that spend a budget: what the group takes after each is added up once more, one step after another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embtables.sizes.budget import Ints
from embtables.sizes.steps import Path, Shared

pytestmark = pytest.mark.core


@st.composite
def arguments(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[int], int, Shared]:
    """Tables that mostly grow, and fall by a few bytes now and then; rows go from one shared thing to another."""
    tables = draw(st.integers(1, 3))
    table = draw(st.lists(st.integers(0, tables - 1), max_size=12))
    before = draw(st.lists(st.integers(1, 9), min_size=tables, max_size=tables))
    sizes, now = [], list(before)
    for t in table:
        now[t] = max(before[t], now[t] + draw(st.integers(-3, 9)))
        sizes.append(now[t])
    most = [
        max([b, *(s for s, t in zip(sizes, table) if t == i)]) - draw(st.integers(0, 2)) for i, b in enumerate(before)
    ]
    most = [max(m, b) for m, b in zip(most, before)]
    kinds = 2
    gains = [draw(st.integers(-1, kinds - 1)) for _ in table]
    needing = np.array([3] * kinds, dtype=np.int64)
    # Only rows that need something can lose it.
    loses, rows, held = [], [], needing.tolist()
    for gain in gains:
        can = [which for which in range(kinds) if which != gain and held[which]]
        lose = draw(st.sampled_from([-1, *can]))
        rows.append(draw(st.integers(1, 5 if lose < 0 else held[lose])))
        for which, sign in ((gain, 1), (lose, -1)):
            if which >= 0:
                held[which] += sign * rows[-1]
        loses.append(lose)
    num_bytes = draw(st.lists(st.integers(1, 20), min_size=kinds, max_size=kinds))
    arrays = (np.array(values, dtype=np.int64) for values in (num_bytes, gains, loses, rows))
    return table, sizes, before, most, draw(st.integers(0, 9)), Shared(*arrays, needing)


@given(arguments())
@settings(max_examples=400)
def test_what_is_taken_fits_and_no_table_ever_becomes_smaller(
    given_: tuple[list[int], list[int], list[int], list[int], int, Shared],
) -> None:
    table, sizes, before, most, apart, shared = given_
    arrays = (np.array(values, dtype=np.int64) for values in (table, sizes, before, most))
    path = Path.of(*arrays, apart, shared)
    assert len(set(path.steps.tolist())) == len(path.steps)

    def after(number: int) -> tuple[list[int], int]:
        own, needing = list(before), shared.before.tolist()
        for step in path.steps[:number].tolist():
            own[table[step]] = sizes[step]
            for which, sign in ((shared.gains[step], 1), (shared.loses[step], -1)):
                if which >= 0:
                    needing[which] += sign * int(shared.rows[step])
        common = sum(int(n) for n, rows in zip(shared.num_bytes, needing) if rows > 0)
        return own, apart + sum(own) + common

    least, floor = after(0)[1], path.floor()
    assert path.least == least and floor <= least
    last, total = before, 0
    for limit in range(floor, floor + sum(sizes) + 60):
        number = path.within(limit)
        own, found = after(number)
        assert path.total(number) == found <= limit and found >= total
        assert all(a <= b for a, b in zip(last, own)) and all(n <= m for n, m in zip(own, most))
        last, total = own, found
    # In the end each table has its last step, but for those after which it would be larger than it may be.
    for t in range(len(before)):
        ends = [sizes[s] for s in range(len(table)) if table[s] == t]
        assert last[t] == (ends[-1] if ends and ends[-1] <= most[t] else last[t])


@pytest.mark.parametrize("bits", [1, 4, 36 * 8, 64 * 32])
@pytest.mark.parametrize("rows", [1, 2, 5, 40, 300])
def test_of_a_step_that_does_not_fit_as_many_rows_are_taken_as_do(bits: int, rows: int) -> None:
    none, moved = np.array([-1, -1]), np.array([rows, rows])
    nothing = np.zeros(0, dtype=np.int64)

    def own(rows: Ints) -> Ints:
        return 100 + -(-rows * bits // 8) + 2 * -(-rows // 64)  # the bits of each, and two bytes for 64 of them

    sizes = own(np.array([rows, 2 * rows]))
    shared = Shared(nothing, none, none, moved, nothing)
    path = Path.of(np.array([0, 0]), sizes, np.array([100]), np.array([10_000_000]), 0, shared)
    largest = np.searchsorted(own(np.arange(rows)), 100 + np.arange(int(sizes[0]) - 100), side="right") - 1
    for spare in range(0, int(sizes[0]) - 100, 1 + rows * bits // 100_000):
        assert path.within(100 + spare) == 0 and path.part(0, own, rows, spare) == largest[spare]
