"""Bands: ids by rank, those of each band in rows of one width and format, the most frequent ids in the largest rows.

What methods with bands have in common. The ids of a table begin on its lowest level, and climb level by level, frequent
ids first, as long as the budget lasts. The ids that end on one level are a band. A method says which levels there are,
and in which order ids climb.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from embtables.formats import FP32, RowFormat
from embtables.lookup.recipe import Range
from embtables.lookup.store import Store
from embtables.methods.base import Initializer, TableEntry, full_entry, full_layout
from embtables.methods.projecting import (
    Narrowed,
    ProjectingMethod,
    fit_projections,
    initialize_projections,
    projection_name,
    projection_of,
)
from embtables.methods.ranking import RankedMethod, rank_bytes, rank_code, ranks_of, remapped
from embtables.sizes.budget import Ints
from embtables.sizes.layout import FULL, Entry, Form, Group, Layout, Slab
from embtables.sizes.steps import Path, Shared, by_table


class Level(NamedTuple):
    """What the rows of a band look like."""

    width: int
    format: RowFormat


class Climb(NamedTuple):
    """Steps, in the order of their worth: the ranks from ``start`` to ``end`` of a table climb to a level.

    They are arrays ``[S]``. The ranks before ``start`` stand on that level or above, the others on the one below.
    """

    table: Ints
    level: Ints
    start: Ints
    end: Ints


class BandedMethod(RankedMethod, ProjectingMethod):
    """A method whose tables consist of bands.

    Where ``drops_lowest`` says so, ids on the lowest level of a table have no row, and zeros as their vectors.
    """

    drops_lowest: ClassVar[bool]

    def _levels(self, group: Group, dim: int) -> list[Level]:
        """The levels of tables of a dimension, the lowest first; rows of the highest are those of a full table."""
        raise NotImplementedError

    def _climb(self, group: Group) -> Climb:
        """All steps by which the ids of all tables climb from the lowest level to the highest."""
        raise NotImplementedError

    # ---- sizes ---------------------------------------------------------------------------------------------------

    def _solved(self, group: Group) -> Solved:
        """All sizes that the tables of a group can have."""
        return group.once(f"bands of {self!r}", lambda: Solved(self, group))

    def fit(self, group: Group, limit: int) -> Layout:
        if limit >= group.full_bytes:
            return full_layout(group)
        solved, starts = self._solved(group), remapped(group)
        entries: dict[str, Entry] = {}
        slabs: list[Slab] = []
        narrow: set[tuple[int, int]] = set()
        for t, (table, rows) in enumerate(zip(group.tables, solved.rows(limit))):
            dim, levels = table.embedding_dim, solved.levels[t]
            if rows[len(levels) - 1] == solved.ids[t] and table.name not in starts:
                entries[table.name], slab = full_entry(group, table)
                slabs.append(slab)
                continue
            own = range(int(self.drops_lowest), len(levels))
            bands = [(int(rows[i]), levels[i]) for i in reversed(own) if rows[i]]
            narrow |= {(dim, level.width) for _, level in bands if level.width < dim}
            slabs += [Slab(f"{table.name}/{j}", n, lv.width, lv.format.name) for j, (n, lv) in enumerate(bands)]
            entries[table.name] = self._entry(bands, starts.get(table.name))
        extras = tuple(projection_of(group, width, dim, trained=self.train_projection) for dim, width in sorted(narrow))
        return Layout.of(entries, Form(tuple(slabs), extras, rank_code(group)))

    def _entry(self, bands: Sequence[tuple[int, Level]], ranks_from: int | None) -> Entry:
        raise NotImplementedError

    # ---- the module ----------------------------------------------------------------------------------------------

    def _ranges(self, entry: TableEntry, group: Group) -> tuple[Range, ...]:
        """The bands of a table, as alternatives of a recipe."""
        name, dim = entry.table.name, entry.table.embedding_dim
        return tuple(
            Range(f"{name}/{j}", projection_name(group, width, dim) if width < dim else None)
            for j, width in enumerate(entry.entry.values["widths"])
        )

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        super().initialize(layout, group, store, init)
        initialize_projections(layout, store, init)

    def keep(self, layout: Layout, group: Group, store: Store, weights: Mapping[str, Tensor]) -> list[str]:
        """Takes over trained full tables: rows of width D as they are, narrower ones as near as the projection allows.

        A projection becomes the directions in which all vectors that it is for have most of their squares. Tables of
        which no id has a row are not among those taken over.
        """
        kept = super().keep(layout, group, store, weights)
        narrow: dict[str, list[Narrowed]] = {}
        counted = all(counts is not None for counts in group.counts)
        for table, counts in zip(group.tables, group.counts):
            entry = TableEntry(table, layout.entries[table.name])
            if table.name not in weights or entry.entry.variant == FULL:
                continue
            vectors, ids = weights[table.name], _ids_by_rank(entry, group, store)
            bands = self._ranges(entry, group)
            kept += [table.name] if bands else []
            for band in bands:
                slab = store.slab(band.slab)
                # The row for ids that are out of range, which a trained table does not have, stays as it is.
                places = (ids[: len(slab)] < len(vectors)).nonzero().squeeze(1)
                held, ids = ids[places], ids[len(slab) :]
                if band.projection is None:
                    slab[places] = vectors[held].to(slab)
                else:
                    shares = counts[held.cpu().numpy()] if counted and counts is not None else None
                    narrow.setdefault(band.projection, []).append(Narrowed(slab, places, vectors[held], shares))
        fit_projections(store, narrow)
        return kept


class Solved:
    """The steps of a group's tables and the bytes after each.

    Which ranks of a table stand on which level is said by ``[L]`` numbers of ranks, those that stand on each level or
    above: the first one is that of all ids.
    """

    def __init__(self, method: BandedMethod, group: Group) -> None:
        self._group, self._drops = group, method.drops_lowest
        self._starts, self._full = remapped(group), group.rows_bytes(group.num_rows)
        of_dim = {dim: method._levels(group, dim) for dim in {table.embedding_dim for table in group.tables}}
        self.levels = [of_dim[table.embedding_dim] for table in group.tables]
        self.ids = group.num_rows
        self._lowest = np.zeros((len(self.levels), max(map(len, self.levels))), dtype=np.int64)
        self._lowest[:, 0] = self.ids
        self._climb = climb = method._climb(group)
        own = np.empty(len(climb.table), dtype=np.int64)
        for t, steps in enumerate(by_table(climb.table, len(self.levels))):
            standing = np.zeros((len(steps), len(self.levels[t])), dtype=np.int64)
            standing[:, 0] = self.ids[t]
            standing[np.arange(len(steps)), climb.level[steps]] = climb.end[steps]
            own[steps] = self._own_bytes(t, np.maximum.accumulate(standing))
        # The projections, and which one the rows of each level need.
        narrow = sorted({(d, lv.width) for d, found in of_dim.items() for lv in found if lv.width < d})
        self._projections = np.array([FP32.slab_bytes(width, dim) for dim, width in narrow], dtype=np.int64)
        self._needs = np.full_like(self._lowest, -1)
        for needs, table, levels in zip(self._needs, group.tables, self.levels):
            for i, level in enumerate(levels):
                if level.width < table.embedding_dim:
                    needs[i] = narrow.index((table.embedding_dim, level.width))
        gains, loses = (self._needs[climb.table, level] for level in (climb.level, climb.level - 1))
        moved, needing = climb.end - climb.start, self._needing(self._lowest)
        shared = Shared(self._projections, gains, loses, moved, needing)
        before = np.array([self._own_bytes(t, row[None])[0] for t, row in enumerate(self._lowest)], dtype=np.int64)
        self.path = Path.of(climb.table, own, before, self._full, rank_bytes(group), shared)

    def rows(self, limit: int) -> Ints:
        """How many ids of each table have a row on each level, ``[T, L]``, where all of it takes ``limit`` bytes."""
        number = self.path.within(limit)
        climb, taken = self._climb, self.path.steps[:number]
        standing = self._lowest.copy()
        np.maximum.at(standing, (climb.table[taken], climb.level[taken]), climb.end[taken])
        if number < len(self.path.steps):
            step = self.path.steps[number]
            t, level, start = int(climb.table[step]), int(climb.level[step]), int(climb.start[step])

            def own(rows: Ints) -> Ints:
                moved = np.repeat(standing[t : t + 1], len(rows), axis=0)
                moved[:, level] = start + rows
                return self._own_bytes(t, moved)

            spare = limit - self.path.total(number)
            needed = int(self._needs[t, level])
            if needed >= 0 and not self._needing(standing)[needed]:
                spare -= int(self._projections[needed])
            more = self.path.part(number, own, int(climb.end[step]) - start, spare)
            standing[t, level] = max(standing[t, level], start + more)
        return _on_each(standing)

    def _own_bytes(self, t: int, standing: Ints) -> Ints:
        """The bytes of a table where ranks stand as in each row of ``standing``."""
        table, levels = self._group.tables[t], self.levels[t]
        rows = _on_each(standing[:, : len(levels)])
        if self._drops:
            rows[:, 0] = 0
        sizes = np.zeros(len(rows), dtype=np.int64)
        for rows_in in {level.format for level in levels}:
            own = [i for i, level in enumerate(levels) if level.format == rows_in]
            widths = np.array([levels[i].width for i in own])
            sizes += rows_in.slab_bytes(rows[:, own], np.broadcast_to(widths, (len(rows), len(own)))).sum(axis=1)
        if table.name in self._starts:
            return sizes
        return np.where(standing[:, len(levels) - 1] == self.ids[t], self._full[t], sizes)

    def _needing(self, standing: Ints) -> Ints:
        """How many rows need each projection."""
        rows, which = _on_each(standing), self._needs
        return np.bincount(which[which >= 0], rows[which >= 0], len(self._projections)).astype(np.int64)


def _ids_by_rank(entry: TableEntry, group: Group, store: Store) -> Tensor:
    """The ids of a table in the order of their ranks."""
    ranks, num_ids = ranks_of(entry, group), int(entry.table.rows or 0)
    if ranks is None:
        return torch.arange(num_ids, device=store.device)
    return store.code(ranks.code)[ranks.first : ranks.first + num_ids].argsort()


def _on_each(standing: Ints) -> Ints:
    """How many stand on each level, of how many stand on each or above."""
    return standing - np.pad(standing[:, 1:], ((0, 0), (0, 1)))
