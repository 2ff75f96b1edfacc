"""Wide vectors for frequent ids, narrow ones for rare ids."""

from __future__ import annotations

from math import log, sqrt
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field

from embtables.lookup.recipe import Range, Recipe
from embtables.lookup.store import Store
from embtables.methods.base import Floor, Initializer, TableEntry, full_entry, full_layout
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
        return Floor(min(step.num_bytes for step in self._steps(group)), "one scalar per id, and the projection")

    def fit(self, group: Group, limit: int) -> Layout:
        chosen = next(step for step in self._steps(group) if step.num_bytes <= limit)
        if all(w == b.widest for w, b in zip(chosen.widths, chosen.blocks)):
            return full_layout(group)
        starts = remapped(group)
        entries: dict[str, Entry] = {}
        slabs: list[Slab] = []
        for i, table in enumerate(group.tables):
            own = [(b, w) for b, w in zip(chosen.blocks, chosen.widths) if b.table == i]
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
        narrow = sorted({(b.widest, w) for b, w in zip(chosen.blocks, chosen.widths) if w < b.widest})
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

    def _steps(self, group: Group) -> list[_Step]:
        """All width assignments that the power law passes through, from everything at D to the narrowest."""
        blocks = self._blocks(group)
        top = max(b.popularity for b in blocks)
        events = sorted(
            (_time(b, wide, narrow, top), i)
            for i, b in enumerate(blocks)
            for wide, narrow in zip(_widths(b.widest), _widths(b.widest)[1:])
        )
        widths = [b.widest for b in blocks]
        tables = range(len(group.tables))
        blocks_of = [[i for i, b in enumerate(blocks) if b.table == t] for t in tables]
        starts = remapped(group)

        def own_bytes(t: int) -> int:
            table = group.tables[t]
            if table.name not in starts and all(widths[i] == table.embedding_dim for i in blocks_of[t]):
                return group.table_bytes(table) or 0
            return sum(group.format.slab_bytes(blocks[i].rows, widths[i]) for i in blocks_of[t])

        weights = sum(own_bytes(t) for t in tables)
        remap = sum(code.num_bytes for code in rank_code(group))
        used: dict[tuple[int, int], int] = {}
        steps = [_Step(blocks, tuple(widths), group.full_bytes)]
        for _, i in events:
            widest, old = blocks[i].widest, widths[i]
            new = _widths(widest)[_widths(widest).index(old) + 1]
            weights -= own_bytes(blocks[i].table)
            widths[i] = new
            weights += own_bytes(blocks[i].table)
            used[widest, new] = used.get((widest, new), 0) + 1
            if old < widest:
                used[widest, old] -= 1
            projections = sum(_extra(group, d, w).num_bytes for (d, w), times in used.items() if times)
            steps.append(_Step(blocks, tuple(widths), weights + projections + remap))
        return steps

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
            # Orthogonal rows of length √(D/w): the projected vectors keep the standard deviation of the narrow ones.
            width, widest = extra.shape
            gaussian = torch.randn(widest, width, generator=init.generator(extra.name))
            rows = torch.linalg.qr(gaussian).Q.t() * sqrt(widest / width)
            store.extra(extra.name).copy_(rows)


class _Block(NamedTuple):
    """Some ids of a table that follow one another in rank."""

    table: int
    rows: int
    widest: int
    popularity: float


class _Step(NamedTuple):
    blocks: list[_Block]
    widths: tuple[int, ...]
    num_bytes: int


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
