"""Wide vectors for frequent ids, narrow ones for rare ids."""

from __future__ import annotations

from math import log, sqrt
from typing import ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from embtables.lookup.recipe import Range, Recipe
from embtables.lookup.store import Store
from embtables.methods.base import Floor, Initializer, TableEntry, full_entry, full_layout
from embtables.methods.projecting import orthogonal_rows
from embtables.methods.ranking import RankedMethod, counts_by_rank, rank_code, ranks_of, remapped
from embtables.sizes.layout import Counts, Entry, Extra, Form, Group, Layout, Slab


class MixedDimension(RankedMethod):
    """Mixed dimensions: block b of ids has vectors of width d_b, projected to the common dimension D.

    e(x) = E_b[x]·P_{d_b}, with E_b of shape ``[n_b, d_b]`` and one projection ``[d_b, D]`` for each width below D.
    Widths are D and the powers of two below it. They follow a power law in p_b, the mean occurrences of one of the
    block's ids: d_b = λ·D·(p_b/p_max)^α. The temperature α rises from 0 until the budget is met, to at most 1; then λ
    falls.

    With ``frequencies`` a table is cut into blocks by rank, each ``block_growth`` times as long as the one before;
    without, a table is one block, and p is 1 over its number of ids.

    Args:
        first_block: ids in the first block.
        block_growth: how many times longer each block is than the one before.

    Ginart et al., "Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems", ISIT 2021.
    The width cannot fall below 1, so the least budget is about 1/D of the full tables.
    """

    kind: ClassVar[str] = "mixed_dimension"
    first_block: int = Field(default=64, ge=1)
    block_growth: int = Field(default=4, ge=2)

    def floor(self, group: Group) -> Floor:
        return Floor(min(self._path(group).num_bytes), "one scalar per id, and the projection")

    def fit(self, group: Group, limit: int) -> Layout:
        path = self._path(group)
        number = next(number for number, num_bytes in enumerate(path.num_bytes) if num_bytes <= limit)
        if number == 0:
            return full_layout(group)
        chosen: list[list[tuple[_Block, int]]] = [[] for _ in group.tables]
        for block, width in zip(path.blocks, path.widths(number)):
            chosen[block.table].append((block, width))
        starts = remapped(group)
        entries: dict[str, Entry] = {}
        slabs: list[Slab] = []
        for table, own in zip(group.tables, chosen):
            if table.name not in starts and all(w == table.embedding_dim for _, w in own):
                entries[table.name], slab = full_entry(group, table)
                slabs.append(slab)
                continue
            slabs += [group.slab(f"{table.name}/{j}", b.rows, w) for j, (b, w) in enumerate(own)]
            values = {"rows": [b.rows for b, _ in own], "widths": [w for _, w in own]}
            if table.name in starts:
                entries[table.name] = Entry("mixed_by_rank", values | {"ranks_from": starts[table.name]})
            else:
                entries[table.name] = Entry("mixed", values)
        narrow = sorted({(b.widest, w) for own in chosen for b, w in own if w < b.widest})
        extras = tuple(_extra(group, widest, w) for widest, w in narrow)
        return Layout.of(entries, Form(tuple(slabs), extras, rank_code(group)))

    # ---- the power law -------------------------------------------------------------------------------------------

    def _blocks(self, group: Group) -> list[_Block]:
        return [
            _Block(i, rows, table.embedding_dim, popularity)
            for i, (table, counts) in enumerate(zip(group.tables, group.counts))
            for rows, popularity in self._popularity(int(table.rows or 1), counts)
        ]

    def _popularity(self, num_rows: int, counts: Counts | None) -> list[tuple[int, float]]:
        """(ids, occurrences of one of them on average) for each block of a table, most popular first."""
        if counts is None:
            return [(num_rows, 1 / num_rows)]
        ends, end, size = [], 0, self.first_block
        while end < num_rows:
            end = min(num_rows, end + size)
            ends.append(end)
            size *= self.block_growth
        traffic = np.add.reduceat(counts_by_rank(counts), [0, *ends[:-1]])
        rows = np.diff([0, *ends])
        # One occurrence more than was counted, so that no block has none; and never rising.
        popularity = np.minimum.accumulate((traffic + 1) / rows) / (counts.sum() + 1)
        return [(int(n), float(p)) for n, p in zip(rows, popularity)]

    def _path(self, group: Group) -> _Path:
        return group.once(f"path of {self!r}", lambda: self._walk(group))

    def _walk(self, group: Group) -> _Path:
        """All width assignments that the power law passes through, from everything at D to the narrowest."""
        blocks = self._blocks(group)
        top = max(b.popularity for b in blocks)
        ladders = {b.widest: _widths(b.widest) for b in blocks}
        events = sorted(
            (_time(b, wide, narrow, top), i)
            for i, b in enumerate(blocks)
            for wide, narrow in zip(ladders[b.widest], ladders[b.widest][1:])
        )
        starts = remapped(group)
        # Of each table's blocks the bytes, of those that are narrow the number, and of the whole table what it takes.
        parts, narrow = [0] * len(group.tables), [0] * len(group.tables)
        for b in blocks:
            parts[b.table] += group.format.slab_bytes(b.rows, b.widest)
        whole = [None if t.name in starts else group.table_bytes(t) or 0 for t in group.tables]

        def own_bytes(t: int) -> int:
            undivided = None if narrow[t] else whole[t]
            return parts[t] if undivided is None else undivided

        weights = sum(map(own_bytes, range(len(group.tables))))
        remap = sum(code.num_bytes for code in rank_code(group))
        projections = 0
        used: dict[tuple[int, int], int] = {}
        steps = [0] * len(blocks)
        num_bytes = [group.full_bytes]
        for _, i in events:
            b, ladder = blocks[i], ladders[blocks[i].widest]
            old, new = ladder[steps[i]], ladder[steps[i] + 1]
            weights -= own_bytes(b.table)
            parts[b.table] += group.format.slab_bytes(b.rows, new) - group.format.slab_bytes(b.rows, old)
            narrow[b.table] += steps[i] == 0
            weights += own_bytes(b.table)
            steps[i] += 1
            for width, more in ((new, 1), (old, -1)):
                if width < b.widest:
                    before = used.get((b.widest, width), 0)
                    used[b.widest, width] = before + more
                    if (before > 0) != (before + more > 0):
                        projections += more * _extra(group, b.widest, width).num_bytes
            num_bytes.append(weights + projections + remap)
        return _Path(blocks, np.array([i for _, i in events], dtype=np.int64), num_bytes)

    # ---- the module ----------------------------------------------------------------------------------------------

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        name, dim = entry.table.name, entry.table.embedding_dim
        ranges = [
            Range(f"{name}/{j}", _projection(group, dim, width) if width < dim else None)
            for j, width in enumerate(entry.entry.values["widths"])
        ]
        return Recipe("alternatives", tuple(ranges), ranks_of(entry, group))

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        super().initialize(layout, group, store, init)
        for extra in layout.training.extras:
            store.extra(extra.name).copy_(orthogonal_rows(extra.shape, init.generator(extra.name)))


class _Block(NamedTuple):
    """Some ids of a table that follow one another in rank."""

    table: int
    rows: int
    widest: int
    popularity: float


class _Path(NamedTuple):
    """Which block becomes narrower with each step, and the bytes before the first step and after each."""

    blocks: list[_Block]
    narrowed: Counts
    num_bytes: list[int]

    def widths(self, number: int) -> list[int]:
        """The widths of the blocks after so many steps."""
        steps = np.bincount(self.narrowed[:number], minlength=len(self.blocks)).tolist()
        ladders = {widest: _widths(widest) for widest in {block.widest for block in self.blocks}}
        return [ladders[block.widest][step] for block, step in zip(self.blocks, steps)]


def _widths(widest: int) -> list[int]:
    """D and the powers of two below it, falling."""
    return [widest, *(1 << k for k in reversed(range((widest - 1).bit_length())))]


def _time(block: _Block, wide: int, narrow: int, top: float) -> float:
    """When a block gives up a width: as the power law passes the geometric mean of the two.

    From 0 to 1 this is α; after that 1 + log 1/λ.
    """
    fall = log(block.widest / sqrt(wide * narrow))
    rarity = log(top / block.popularity)
    return fall / rarity if rarity >= fall else 1 + fall - rarity


def _extra(group: Group, widest: int, width: int) -> Extra:
    return Extra(_projection(group, widest, width), (width, widest))


def _projection(group: Group, widest: int, width: int) -> str:
    return f"{group.name}/projection_{width}_{widest}"
