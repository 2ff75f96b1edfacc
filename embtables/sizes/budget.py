"""Budgets: reading one, splitting it between tables, and saying when it cannot be met."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from embtables._util.numbers import as_float, as_int
from embtables.config import TableConfig
from embtables.sizes.layout import Counts, Group
from embtables.sizes.memory import format_bytes

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Budget = int | float | str

_UNITS = {"": 1, "b": 1}  # in any case
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}
_WRITTEN = r"\s*([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?(?:[eE][0-9]{1,2})?|\.[0-9]+)\s*(%|[A-Za-z]*)\s*"

# Without frequencies every table gets rows in proportion to its size, but at least this share of an average table's:
# it keeps tiny tables, which cost next to nothing, in full.
_LEAST_SHARE = 0.05


class InfeasibleBudget(ValueError):
    """No tables of this method fit into the budget.

    ``floor_bytes`` is the least budget that does; ``why`` says what sets it.
    """

    def __init__(self, message: str, floor_bytes: int, why: str) -> None:
        super().__init__(message)
        self.floor_bytes = floor_bytes
        self.why = why

    def __reduce__(self) -> tuple[type[InfeasibleBudget], tuple[str, int, str]]:
        return type(self), (str(self), self.floor_bytes, self.why)


def infeasible(budget: int, floor: int, why: str, *, phase: str = "inference") -> InfeasibleBudget:
    share = f'. A share of the full tables has a percent sign: "{budget}%"' if 0 < budget <= 100 else ""
    return InfeasibleBudget(
        f"the {phase} budget of {budget:,} bytes is too small: the floor is {floor:,} bytes ({format_bytes(floor)}), "
        f"set by {why}. Give at least that, or choose a method with a lower floor{share}",
        floor,
        why,
    )


def parse_budget(budget: Budget, full_bytes: int | None) -> int:
    """Bytes that a budget stands for.

    An integer is bytes; a float in (0, 1] or ``"10%"`` a share of ``full_bytes``; ``"64MB"`` is 64·10⁶ and ``"64MiB"``
    64·2²⁰ bytes, in upper or lower case; ``"1e6"`` is 10⁶ bytes.

    Raises:
        ValueError: for anything else, with the forms that are understood.
    """
    forms = 'a number of bytes (67_108_864, "64MB", "64MiB") or a share of the full tables (0.1, "10%")'
    share: Fraction | None = None
    if (integer := as_int(budget)) is not None:
        num_bytes = integer
    elif (number_given := as_float(budget)) is not None:
        if not 0 < number_given <= 1:
            raise ValueError(f"budget {budget!r} is a float, thus a share of the full tables, and must lie in (0, 1]")
        share = Fraction(repr(number_given))
    elif not isinstance(budget, str):
        raise ValueError(f"budget {budget!r} is not {forms}")
    else:
        match = re.fullmatch(_WRITTEN, budget)
        unit = match[2].lower() if match else ""
        if not match or unit not in (*_UNITS, "%"):
            raise ValueError(f"budget {budget!r} is not {forms}")
        number = Fraction(match[1].replace("_", ""))
        if unit == "%":
            share = number / 100
            if not 0 < share <= 1:
                raise ValueError(f"budget {budget!r} must lie above 0% and be at most 100%")
        elif unit == "" and "." in match[1] and "e" not in match[1].lower():
            return parse_budget(float(number), full_bytes)
        else:
            num_bytes = int(number * _UNITS[unit])
    if share is not None:
        if full_bytes is None:
            raise ValueError(
                f"budget {budget!r} is a share of the full tables, whose size is unknown while a table has no "
                'num_embeddings: give bytes, such as "64MB"'
            )
        # In fractions: 29 % of 100 bytes are 29, not the 28.999… of floating point.
        num_bytes = int(share * full_bytes)
    if num_bytes < 1 and not share:
        raise ValueError(f"budget {budget!r} must be at least 1 byte")
    return num_bytes


def allocate(weights: Floats, lower: Ints, upper: Ints, bytes_of: Callable[[Ints], Ints], limit: int) -> Ints:
    """Divides a number of bytes among n tables, as rows for each.

    Each table gets ``clip(floor(λ·weight), lower, upper)`` rows, for the largest λ with which all of them fit in
    ``limit``. What is left over then buys one more row for each of the first tables that can have one. So less than one
    row is left unused, and a larger limit never takes a row from any table.

    Args:
        weights: ``[n]``, positive: the rows of the tables are in this proportion, as far as their bounds allow.
        lower: ``[n]``, the rows that each table has in any case. Together they must fit in ``limit``.
        upper: ``[n]``, the most rows that each table can use.
        bytes_of: gives the bytes ``[n]`` of the tables for their rows ``[n]``. More rows never take fewer bytes.
        limit: the bytes for all tables together.

    Returns:
        ``[n]``, the rows of each table.
    """

    def rows_at(scale: float) -> Ints:
        return np.clip(np.floor(np.minimum(scale * weights, upper)).astype(np.int64), lower, upper)

    def cost(rows: Ints) -> int:
        return int(bytes_of(rows).sum())

    low, high = 0.0, float((upper / weights).max()) + 1.0
    if cost(rows_at(high)) <= limit:
        return rows_at(high)
    while low < (middle := (low + high) / 2) < high:
        if cost(rows_at(middle)) <= limit:
            low = middle
        else:
            high = middle
    rows, more = rows_at(low), rows_at(high)
    spare = limit - cost(rows)
    extra = bytes_of(more) - bytes_of(rows)
    for i in np.flatnonzero(more > rows):
        spare -= int(extra[i])
        if spare < 0:
            break
        rows[i] = more[i]
    return rows


def collision_weights(group: Group) -> Floats:
    """The proportion ``[n]`` in which the n tables of a group should have rows, for methods whose ids share rows.

    Where all tables have counts, it is the proportion with the fewest collisions. Of a table that is looked up T times,
    whose ids have the shares p of these lookups, two lookups meet in one of m hashed rows although their ids differ
    with probability (1 − Σp²)/m. The sum of T·(1 − Σp²)/m over the tables, whose rows of d scalars have to fit in the
    budget, is least where m is in proportion to √(T·(1 − Σp²)/d) (by a Lagrange multiplier).

    Of balanced rows it is an upper bound: ids of one turn never meet, so that two lookups meet with probability
    (1 − ΣP²)/m, where P are the shares of the turns, each of m ids. These depend on m, and leave no such proportion.

    Without counts every table gets the same share of its own rows, and small tables a little more: at least a small
    share of the average.
    """
    return group.once("collision weights", lambda: _collision_weights(group))


def _collision_weights(group: Group) -> Floats:
    if group.tables and all(counts is not None for counts in group.counts):
        weights = [_colliding(counts) / t.embedding_dim for counts, t in zip(group.counts, group.tables)]
        return np.sqrt(np.maximum(np.array(weights), 1e-12))
    known = [t.rows for t in group.tables if t.rows is not None]
    # A table without vocabulary counts as much as the largest one that has one.
    rows = np.array([t.rows or max(known, default=1) for t in group.tables], dtype=np.float64)
    return raised(rows)


def raised(sizes: Floats) -> Floats:
    """Sizes of tables, those of tiny ones raised to a share of the mean: weights for tables without frequencies."""
    return np.maximum(sizes, _LEAST_SHARE * sizes.mean())


def _colliding(counts: Counts | None) -> float:
    assert counts is not None
    total = float(counts.sum())
    return total - float(np.square(counts.astype(np.float64)).sum()) / total if total else 0.0


def keep_apart(group: Group, limit: int, reserve: int) -> tuple[list[TableConfig], int]:
    """Decides which tables need not take part in a storage that the tables of a group share.

    A table is better stored in full where its due share of the budget, by ``collision_weights``, holds all of its rows.

    Args:
        limit: the bytes of the whole group.
        reserve: the bytes that are left for the shared storage in any case.

    Returns:
        The tables that are stored in full, and the bytes that are left for the shared storage.
    """
    if not any(t.rows is None for t in group.tables) and limit >= group.full_bytes:
        return list(group.tables), 0
    lower = np.zeros(len(group.tables), dtype=np.int64)
    rows = allocate(collision_weights(group), lower, group.num_rows, group.rows_bytes, limit - reserve)
    apart = [table for table, m in zip(group.tables, rows) if table.rows is not None and m >= table.rows]
    left = limit - sum(group.table_bytes(table) or 0 for table in apart)
    return apart, left


def split(
    limit: int, floors: Sequence[int], ceilings: Sequence[int], weights: Sequence[float] | None = None
) -> list[int]:
    """Splits ``limit`` bytes between groups in proportion to ``weights``, by default their ceilings.

    Each group gets at least its floor and at most its ceiling, in bytes; the floors together must fit. A group without
    weight gets what the others have no use for.
    """
    lower = np.array(floors, dtype=np.int64)
    upper = np.maximum(np.array(ceilings, dtype=np.int64), lower)
    shares = np.array(upper if weights is None else weights, dtype=np.float64)
    shares = np.maximum(shares, 1.0 if weights is None else 1e-9 * max(shares.max(), 1e-9))
    return [int(n) for n in allocate(shares, lower, upper, lambda shares: shares, limit)]
