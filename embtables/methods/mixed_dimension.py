"""Wide vectors for frequent ids, narrow ones for rare ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from embtables.lookup.recipe import Recipe
from embtables.methods.bands import BandedMethod, Climb, Level
from embtables.methods.base import Floor, TableEntry
from embtables.methods.ranking import is_ranked, ranked_entry, ranks_of
from embtables.sizes.budget import Floats, Ints
from embtables.sizes.layout import Counts, Entry, Group


class MixedDimension(BandedMethod):
    """Mixed dimensions: block b of ids has vectors of width d_b, projected to the common dimension D.

    e(x) = E_b[x]·P_{d_b}, with E_b of shape ``[n_b, d_b]`` and one projection ``[d_b, D]`` for each width below D. It
    has random orthogonal rows, or is fitted to trained tables by ``compress_``, and stays as it is.
    Widths are all integers from 1 to D. They follow a power law in p_b, the mean occurrences of one of the block's ids:
    d_b = λ·D·(p_b/p_max)^α. The temperature α rises from 0 until the budget is met, to at most 1; then λ falls. Of the
    block that is the last to become narrower so many of the first ids keep their width as the budget allows.

    With ``frequencies`` a table is cut into blocks by rank, each ``block_growth`` times as long as the one before;
    without, a table is one block, and p is 1 over its number of ids.

    Args:
        first_block: ids in the first block.
        block_growth: how many times longer each block is than the one before.
        train_projection: whether the projections are trained along with the rows, as in the paper.

    Ginart et al., "Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems", ISIT 2021.
    The width cannot fall below 1, so the least budget is about 1/D of the full tables.
    """

    kind: ClassVar[str] = "mixed_dimension"
    drops_lowest: ClassVar[bool] = False
    first_block: int = Field(default=64, ge=1)
    block_growth: int = Field(default=4, ge=2)

    def floor(self, group: Group) -> Floor:
        least = min(self._solved(group).path.floor(), group.full_bytes)
        return Floor(least, "one scalar per id, and the projection")

    def _levels(self, group: Group, dim: int) -> list[Level]:
        return [Level(width, group.format) for width in range(1, dim + 1)]

    def _climb(self, group: Group) -> Climb:
        """The blocks' widths as the power law turns back, from the narrowest to everything at D."""
        blocks = [
            (t, start, end, popularity)
            for t, (table, counts) in enumerate(zip(group.tables, group.counts))
            for start, end, popularity in self._blocks(int(table.rows or 1), counts)
        ]
        table, start, end = (np.array(column, dtype=np.int64) for column in list(zip(*blocks))[:3])
        popularity = np.array([block[3] for block in blocks])
        dims = group.dims[table]
        # A step for each block and each of its widths but the last.
        block = np.repeat(np.arange(len(blocks)), dims - 1)
        width = np.arange(len(block)) - np.repeat(np.cumsum(dims - 1) - (dims - 1), dims - 1) + 1
        time = _time(popularity[block] / popularity.max(), dims[block], width)
        order = np.argsort(-time, kind="stable")
        block, width = block[order], width[order]
        return Climb(table[block], width, start[block], end[block])

    def _blocks(self, num_rows: int, counts: Counts | None) -> list[tuple[int, int, float]]:
        """(first rank, behind the last one, mean share of lookups of an id) for each block, most popular first."""
        if counts is None:
            return [(0, num_rows, 1 / num_rows)]
        ends, end, size = [], 0, self.first_block
        while end < num_rows:
            end = min(num_rows, end + size)
            ends.append(end)
            size *= self.block_growth
        starts = [0, *ends[:-1]]
        traffic = np.add.reduceat(counts if is_ranked(counts) else np.sort(counts)[::-1], starts)
        # One occurrence more than was counted, so that no block has none; and never rising, as it might behind the ids
        # that prepared data reserve.
        mean = (traffic + 1) / np.diff([0, *ends]) / (counts.sum() + 1)
        popularity = np.maximum.accumulate(mean[::-1])[::-1]
        return list(zip(starts, ends, popularity.tolist()))

    def _entry(self, bands: Sequence[tuple[int, Level]], ranks_from: int | None) -> Entry:
        values = {"rows": [rows for rows, _ in bands], "widths": [level.width for _, level in bands]}
        return ranked_entry("mixed", values, ranks_from)

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        return Recipe("alternatives", self._ranges(entry, group), ranks_of(entry, group))


def _time(popularity: Floats, dim: Ints, width: Ints) -> Floats:
    """When the power law passes from the next width to this one: where it meets the geometric mean of the two.

    From 0 to 1 this is α; after that 1 + log 1/λ.

    Args:
        popularity: that of a block's ids as a share of the most popular ones'.
        dim: D.
        width: the narrower of the two widths.
    """
    fall, rarity = np.log(dim / np.sqrt(width * (width + 1))), -np.log(popularity)
    return np.where(rarity >= fall, fall / np.maximum(rarity, fall), 1 + fall - rarity)
