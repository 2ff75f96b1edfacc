"""Rows of their own for the ids most worth it; any other method for the rest."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field, field_serializer, field_validator
from torch import Tensor

from embtables.config import TableConfig
from embtables.formats import DTYPES, FP32, row_format
from embtables.lookup.recipe import Range, Recipe, Row, concat
from embtables.lookup.store import Store
from embtables.methods import from_config
from embtables.methods.base import Floor, Initializer, Method, TableEntry, full_entry, full_layout
from embtables.methods.hash import Hash
from embtables.methods.ranking import (
    RANKS_FROM,
    ByWorth,
    RankedMethod,
    check_counted,
    counts_by_rank,
    make_ranks,
    rank_bytes,
    rank_code,
    rank_code_name,
    ranks_of,
    remapped,
    runs,
)
from embtables.optimizers import FusedOptimizer
from embtables.sizes.budget import Floats, collision_weights
from embtables.sizes.layout import FULL, Counts, Entry, Form, Group, Layout, owner_of

# Of the bytes that a budget twice as large adds, these parts are tried for the cold ids.
_PARTS = 8
# What entries say beside what those of the cold method do, and where their ranks begin.
_HOT = "hot_rows"


class HotCold(Method):
    """e(x) = H[rank(x)] for the hot ids, those with most occurrences per byte over all tables; ``cold`` for the rest.

    The hot ids of a table are the first h of its ranking, and H has the shape ``[h, embedding_dim]``; all others are
    looked up by the cold method as it is, by their rank less h. A table for which hot and cold rows would cost no less
    than all its rows is kept in full. It needs ``frequencies``.

    How many bytes the hot rows have is solved: it is where the lookups that the rows explain are most,

        Σ_x c_x²/N_x · A_x/(A_x + κ)

    over all ids x, c_x lookups each, in whose row N_x lookups meet; A_x = Σ_y c_y²/N_x over all ids y of it. A row of
    its own has N = A = c. The cold bytes of a table count as so many hashed rows m: beside a cold id there are then
    (T − c_x)/m other lookups on average, and (Q − c_x²)/m in place of their squares, where T = Σc and Q = Σc² are those
    of all its cold ids. It is the variance that effects of equal size explain if each row is estimated from the lookups
    that meet in it, and shrunk by κ as ridge regression does. Rows of one price are worth most to the most frequent
    ids: all others then have the least that the cold method takes. Cold rows that are cheaper, such as those of a lower
    precision, get more.

    From the least budget on each doubling of it is divided so that the sum is greatest, with 0, 1/8 … 8/8 of what is
    added for the cold ids; between two such budgets hot and cold bytes grow in proportion. So neither falls where the
    budget grows.

    The cold bytes are split between tables by the cold method, as by counts of which none is above the mean count of
    all ids, whatever is hot: so no table shrinks where the budget grows.

    Args:
        cold: the method of the other ids: its name, mapping or config. One that goes by frequency itself gets its least
            bytes: one row for each table with ``frequency_cutoff``, none with ``banded``. Its own ``precision`` holds
            for the cold rows alone.
        hot: the share of the bytes for hot rows, those of the remap set apart; ``None``: solved.
        shrinkage: κ, in lookups.

    Zhang et al., "Model Size Reduction Using Frequency Based Double Hashing for Recommender Systems", RecSys 2020;
    online Zhang et al., "CAFE: Towards Compact, Adaptive, and Fast Embedding", SIGMOD 2024.
    """

    kind: ClassVar[str] = "hot_cold"
    cold: Method = Hash()
    hot: float | None = Field(default=None, ge=0, le=1)
    shrinkage: float = Field(default=100.0, gt=0, allow_inf_nan=False)

    @field_validator("cold", mode="before")
    @classmethod
    def _read_cold(cls, cold: Any) -> Method:
        found = from_config(cold)
        says_itself = type(found)
        if says_itself.block is not Method.block or says_itself.stage is not Method.stage:
            raise ValueError(f"method {found.kind} says more than a recipe can, which alone can look up cold ids")
        if isinstance(found, HotCold):
            raise ValueError("the cold ids of hot_cold cannot be looked up by hot_cold once more")
        return found

    @field_serializer("cold")
    def _write_cold(self, cold: Method) -> dict[str, Any]:
        return cold.to_dict()

    # ---- sizes ---------------------------------------------------------------------------------------------------

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        super().check(group, optimizer)
        check_counted(group, self.kind)
        cold = self._cold_group(group)
        self.cold.check(cold, optimizer)
        layout = self.cold.fit(cold, self.cold.floor(cold).num_bytes)
        if layout.training != layout.serving.in_format(FP32.name):
            raise ValueError(
                f"method hot_cold: its cold method {self.cold.kind} trains another form than it serves, as with "
                "inner_dim: leave that out"
            )
        for table in group.tables:
            if _cold_recipe(self.cold, TableEntry(table, layout.entries[table.name]), group).combine == "alternatives":
                raise ValueError(f"method hot_cold: its cold method {self.cold.kind} has ranges of ranks of its own")

    def _cold_group(self, group: Group) -> Group:
        """The same tables as the cold method is to see them: by rank, no id more frequent than the mean."""

        def make() -> Group:
            known = [counts_by_rank(counts) for counts in group.counts if counts is not None]
            mean = -(-sum(int(c.sum()) for c in known) // sum(map(len, known)))
            capped = tuple(np.minimum(counts, max(1, mean)) for counts in known)
            rows_in = group.format if self.cold.precision is None else row_format(self.cold.precision)
            return Group(group.name, group.tables, capped, group.hash_seed, rows_in)

        return group.once(f"cold group of {self.cold!r}", make)

    def floor(self, group: Group) -> Floor:
        least = self._cold_floor(group)
        why = f"the rows of cold ids, {least.why}"
        why += " and the ranks of ids that are not numbered by frequency" if rank_code(group) else ""
        used = self._parts(group, least.num_bytes)
        return Floor(min(used.shared + int(used.without_hot.sum()), group.full_bytes), why)

    def _cold_floor(self, group: Group) -> Floor:
        return self.cold.floor(self._cold_group(group))

    def fit(self, group: Group, limit: int) -> Layout:
        if limit >= group.full_bytes:
            return full_layout(group)
        parts = self._parts(group, self._cold_bytes(group, limit))
        hot = parts.most_hot(limit)
        full = parts.bytes_of(hot) >= parts.full
        kept = {table.name: full_entry(group, table) for table, is_full in zip(group.tables, full) if is_full}
        others = _without(group, kept)
        starts = remapped(others)
        entries: dict[str, Entry] = {}
        slabs = [slab for _, slab in kept.values()]
        for table, rows in zip(group.tables, hot.tolist()):
            if table.name in kept:
                entries[table.name] = kept[table.name][0]
                continue
            if rows:
                slabs.append(group.slab(_hot_slab(table), rows, table.embedding_dim))
            cold = parts.layout.entries[table.name]
            own = {_HOT: rows} | ({RANKS_FROM: starts[table.name]} if table.name in starts else {})
            entries[table.name] = Entry(f"hot, cold {cold.variant}", {**own, **cold.values})
        names = [table.name for table in group.tables]
        form, left = parts.layout.serving, len(kept) < len(names)
        slabs += [slab for slab in form.slabs if left and owner_of(slab.name, names) not in kept]
        extras = tuple(extra for extra in form.extras if left and owner_of(extra.name, names) not in kept)
        codes = tuple(code for code in form.codes if left and owner_of(code.name, names) not in kept)
        remap = rank_code(others)
        return Layout.of(entries, Form(tuple(slabs), extras, (*remap, *codes)))

    def _cold_bytes(self, group: Group, limit: int) -> int:
        """The bytes of the cold ids within a budget: neither they nor what they leave fall where it grows."""
        least = self._cold_floor(group).num_bytes
        if isinstance(self.cold, RankedMethod):
            return least
        if self.hot is not None:
            free = limit - rank_bytes(group)
            return max(least, free - int(Fraction(repr(self.hot)) * max(0, free)))
        path = self._path(group)
        after = next(i for i, (budget, _) in enumerate(path) if limit <= budget)
        (low, first), (high, last) = path[max(0, after - 1)], path[after]
        return first + (last - first) * (limit - low) // max(1, high - low)

    def _path(self, group: Group) -> list[tuple[int, int]]:
        """Budgets, each twice the one before, and the bytes of the cold ids within each."""

        def walk() -> list[tuple[int, int]]:
            path = [(max(1, self.floor(group).num_bytes), self._cold_floor(group).num_bytes)]
            while path[-1][0] < group.full_bytes:
                budget, cold = path[-1]
                choices = [cold + budget * part // _PARTS for part in range(_PARTS + 1)]
                worths = [self._worth(group, 2 * budget, choice) for choice in choices]
                path.append((2 * budget, choices[int(np.argmax(worths))]))
            return path

        return group.once(f"path of {self!r}", walk)

    def _worth(self, group: Group, limit: int, cold_bytes: int) -> float:
        """The lookups that are explained within a budget, so many bytes of it for the cold ids."""
        parts = self._parts(group, cold_bytes)
        hot = parts.most_hot(limit)
        full = parts.bytes_of(hot) >= parts.full
        hot = np.where(full, group.num_rows, hot)
        cold_rows = self._cold_rows(group, parts).tolist()
        return sum(
            lookups.explained(h, m, self.shrinkage) for lookups, h, m in zip(_lookups(group), hot.tolist(), cold_rows)
        )

    def _cold_rows(self, group: Group, parts: _Parts) -> Floats:
        """As how many hashed rows of each table the cold bytes count; shared ones are divided as hash would."""
        weights = collision_weights(self._cold_group(group)) * group.dims
        row_bytes = self._cold_group(group).format.mean_bits(group.dims) / 8
        found: Floats = (parts.cold + parts.shared * weights / weights.sum()) / row_bytes
        alone = [parts.layout.entries[table.name].variant == FULL for table in group.tables]
        return np.where(alone, np.inf, found)

    def _parts(self, group: Group, cold_bytes: int) -> _Parts:
        """What tables take beside their hot rows where the cold ids have so many bytes."""
        layout = self.cold.fit(self._cold_group(group), cold_bytes)
        names = [table.name for table in group.tables]
        own, shared = layout.serving.bytes_by_table(names)
        cold = np.array([own[name] for name in names], dtype=np.int64)
        if all(entry.variant == FULL for entry in layout.entries.values()):
            cold_bytes = shared + int(cold.sum())  # it could not use more
        return _Parts(group, layout, cold_bytes, shared, cold)

    # ---- the module ----------------------------------------------------------------------------------------------

    def fixed_codes(self, layout: Layout) -> tuple[str, ...]:
        return tuple(code.name for code in layout.training.codes if code.kind == "index")

    def make_fixed_codes(self, layout: Layout, group: Group) -> dict[str, Any]:
        kept = {name for name, entry in layout.entries.items() if entry.variant == FULL}
        return make_ranks(_without(group, kept)) if self.fixed_codes(layout) else {}

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        rest = _cold_recipe(self.cold, _cold_entry(entry), group)
        ranks = ranks_of(entry, group)
        if not entry.entry.values[_HOT]:
            return replace(rest, ranks=ranks)
        return Recipe("alternatives", (Range(_hot_slab(entry.table)),), ranks, rest=rest)

    def _cold_part(self, layout: Layout, group: Group) -> tuple[Layout, Group]:
        """The tables that have cold ids, with what the cold method alone gave them."""
        tables = tuple(t for t in group.tables if layout.entries[t.name].variant != FULL)
        entries = {t.name: _cold_entry(TableEntry(t, layout.entries[t.name])).entry for t in tables}
        others = {_hot_slab(t) for t in tables} | {t.name for t in group.tables} - set(entries)
        form = layout.training
        codes = tuple(code for code in form.codes if code.name != rank_code_name(group))
        own = Form(tuple(slab for slab in form.slabs if slab.name not in others), form.extras, codes)
        part = Group(group.name, tables, (None,) * len(tables), group.hash_seed, group.format)
        return Layout(entries, own, own), part

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        cold, part = self._cold_part(layout, group)
        self.cold.initialize(cold, part, store, init)
        of_cold = {slab.name for slab in cold.training.slabs}
        for slab in layout.training.slabs:
            if slab.name not in of_cold:
                self.initialize_slab(slab, store, init)

    def keep(self, layout: Layout, group: Group, store: Store, weights: Mapping[str, Tensor]) -> list[str]:
        """Takes over tables in full and hot rows; the cold method takes over what it can of the other ids."""
        kept = super().keep(layout, group, store, weights)
        cold, part = self._cold_part(layout, group)
        of_cold = {}
        for table in part.tables:
            if table.name not in weights:
                continue
            entry, weight = layout.entries[table.name], weights[table.name]
            ranks = ranks_of(TableEntry(table, entry), group)
            if ranks is not None:
                by_rank = store.code(ranks.code)[ranks.first : ranks.first + (table.rows or 0)].argsort()
                # An id for all that are out of range is never among the weights that are given.
                weight = weight[by_rank[by_rank < len(weight)]]
            hot = entry.values[_HOT]
            if hot:
                store.slab(_hot_slab(table))[: len(weight[:hot])] = weight[:hot]
                kept.append(table.name)
            of_cold[table.name] = weight[hot:]
        return [*kept, *(name for name in self.cold.keep(cold, part, store, of_cold) if name not in kept)]


class _Parts(NamedTuple):
    """A group whose cold ids are laid out.

    ``cold_bytes``: the bytes that are the cold method's; ``shared``: what tables share of those that it took, and
    ``cold`` ``[tables]`` what is their own.
    """

    group: Group
    layout: Layout
    cold_bytes: int
    shared: int
    cold: Counts

    @property
    def full(self) -> Counts:
        """The bytes ``[tables]`` of the tables in full."""
        return self.group.rows_bytes(self.group.num_rows)

    def bytes_of(self, hot: Counts) -> Counts:
        """The bytes ``[tables]`` of tables with so many hot rows, with the ranks of their ids."""
        ranks = self.group.once("bytes of ranks", lambda: _ranks_bytes(self.group))
        return np.minimum(self.group.rows_bytes(hot) + self.cold + ranks, self.full)

    @property
    def without_hot(self) -> Counts:
        """The bytes ``[tables]`` of tables with no hot row."""
        return self.bytes_of(np.zeros_like(self.cold))

    def most_hot(self, limit: int) -> Counts:
        """The hot rows ``[tables]``: of the ids most worth it as many as fit into what the cold ids leave."""
        # Where a table is in full its cold rows are saved, and further hot ids cost nothing.
        return ByWorth.of(self.group).most(limit - self.cold_bytes + int(self.cold.sum()), self.bytes_of)


class _Lookups(NamedTuple):
    """The counts of a table's ids in falling order: the distinct ones above 0, and how many ids have each."""

    counts: Floats
    times: Counts

    def explained(self, hot: int, rows: float, shrinkage: float) -> float:
        """The lookups that are explained where the first ``hot`` ids have rows of their own, all others so many."""
        before = np.cumsum(self.times) - self.times
        of_hot = np.clip(hot - before, 0, self.times)
        others, c = self.times - of_hot, self.counts
        total = float((of_hot * c * c / (c + shrinkage)).sum())
        if not rows:
            return total
        squares = c * c
        meet = c + np.maximum((others * c).sum() - c, 0) / rows
        mean = (squares + np.maximum((others * squares).sum() - squares, 0) / rows) / meet
        return total + float((others * squares / meet * mean / (mean + shrinkage)).sum())


def _lookups(group: Group) -> list[_Lookups]:
    def of(counts: Counts) -> _Lookups:
        starts, ends = runs(counts)
        found, times = counts[starts], ends - starts
        return _Lookups(found[found > 0].astype(np.float64), times[found > 0])

    return group.once("lookups by count", lambda: [of(counts_by_rank(c)) for c in group.counts if c is not None])


def _ranks_bytes(group: Group) -> Counts:
    """The bytes ``[tables]`` of the ranks of tables whose ids need them."""
    starts = remapped(group)
    of_one = max((DTYPES[code.dtype].itemsize for code in rank_code(group)), default=0)
    return np.array([of_one * (table.name in starts) for table in group.tables]) * group.num_rows


def _hot_slab(table: TableConfig) -> str:
    return f"{table.name}/hot"


def _cold_entry(entry: TableEntry) -> TableEntry:
    """A table as the cold method stores it."""
    values = {name: value for name, value in entry.entry.values.items() if name not in (_HOT, RANKS_FROM)}
    return TableEntry(entry.table, Entry(entry.entry.variant.removeprefix("hot, cold "), values))


def _cold_recipe(cold: Method, entry: TableEntry, group: Group) -> Recipe:
    # The lookup of a table in full is nothing that a method says.
    return concat(Row(entry.table.name)) if entry.entry.variant == FULL else cold.recipe(entry, group)


def _without(group: Group, names: Container[str]) -> Group:
    """The group without some of its tables."""
    pairs = [(t, c) for t, c in zip(group.tables, group.counts) if t.name not in names]
    return Group(group.name, tuple(t for t, _ in pairs), tuple(c for _, c in pairs), group.hash_seed, group.format)
