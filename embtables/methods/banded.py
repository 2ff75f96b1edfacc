"""Ids by rank in bands, of which each has its width and precision; the rarest have no row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator

from embtables.formats import FP32, RowFormat, row_format
from embtables.lookup.recipe import Recipe
from embtables.lookup.stored_rows import StoredRows
from embtables.methods.bands import BandedMethod, Climb, Level
from embtables.methods.base import Floor, TableEntry
from embtables.methods.ranking import check_counted, rank_bytes, ranked_entry, ranks_of, runs_by_rank
from embtables.optimizers import FusedOptimizer
from embtables.sizes.budget import Floats
from embtables.sizes.layout import FULL, Counts, Entry, Group, Layout

# By default, the projections of a dimension may take this part of the bytes of its full tables, and a budget for rows
# has so many times the bytes of all. Where the next projection does not fit yet, what it takes is left unused.
_MOST_OF_FULL = 1 / 200
_LEAST_BUDGET = 5

# Rows of random numbers on which the rounding of a format is measured: eight blocks of the default scales.
_SAMPLE = 512


class Banded(BandedMethod):
    """Bands: ids in the order of their frequency, the more frequent the more bits; the rarest have none.

    A band has rows of one width w and one precision p. Those of full width are vectors as they stand; narrower ones are
    multiplied with a projection ``[w, D]``, one for each w and D: e(x) = E_b[x]·P_w. It has random orthogonal rows, or
    is fitted to trained tables by ``compress_``, and stays as it is. The vectors of ids beyond the last band are zeros:
    a trained row that thousands of rare ids share says little about any of them, and disturbs the rest. Bands are
    ranges of ranks, which cost no bytes.

    Where the bands of all tables end is solved under the one budget. An id that occurs n times is worth
    v(x) = n·n/(n + κ)·q(w, p): its lookups, times the share of what its row learns that is signal, times the share q of
    that which the row keeps. q is what rounding leaves of a Gaussian row, 1 − E‖x − x̂‖²/E‖x‖², times what w of D
    columns hold of a vector whose j-th direction has a variance in proportion to j^−α. With ``worth``, v is scaled so
    that the ids of each table add up to what the table is worth where all its rows are kept whole; without, lookups
    count alike in all tables. Each byte goes to the id, of all tables, to which it is worth most. So the bytes of rows
    are divided as well as they can be, but for less than one row; these last bytes move the boundary of one band id by
    id. A larger budget moves no id down, but where ``widths`` is ``None`` for the one budget at which rows begin to be
    narrow.

    It needs ``frequencies``.

    Args:
        precisions: what bands may be stored in, beside ``precision``, where that takes fewer bits. No row is always
            among the choices.
        widths: how many columns rows may have beside D. ``None`` stands for a quarter, half and three quarters of D,
            but only for D of which the projections take at most 1/200 of the bytes that full tables of D columns have
            in fp32, and only where those of all D together take at most a fifth of the budget. Else all rows have D.
        decay: α, how fast the directions of vectors lose importance: 0 where all count alike, and the larger, the more
            of a vector a narrow row keeps. It matters only where rows may be narrow.
        train_projection: whether the projections of narrow rows are trained along with these.
        prior_count: κ, the occurrences of an id from which half of what its row learns is signal.
        worth: by the name of each table, what it is worth in any one unit, such as the AUC that is lost without it.
            Tables that are worth nothing get rows when no other table has use for them. ``embtables probe`` measures
            what tables are worth.
        precision: what the most frequent ids are stored in, and all of a table that fits in full; fp32 where neither
            it nor ``plan`` says another.

    Ginart et al., "Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems", ISIT 2021
    (blocks of ids by frequency); Li et al., "Mixed-Precision Embeddings for Large-Scale Recommendation Models", 2024
    (precision by frequency group, 0 bits among them).
    """

    kind: ClassVar[str] = "banded"
    drops_lowest: ClassVar[bool] = True
    later_fields: ClassVar[tuple[str, ...]] = (*BandedMethod.later_fields, "worth")
    precisions: tuple[str, ...] = ("int8", "int4", "int2", "binary")
    widths: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    decay: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    prior_count: float = Field(default=100.0, ge=0, allow_inf_nan=False)
    worth: dict[str, Annotated[float, Field(ge=0, le=1e9)]] | None = None

    @field_validator("precisions")
    @classmethod
    def _check_precisions(cls, precisions: tuple[str, ...]) -> tuple[str, ...]:
        for precision in precisions:
            row_format(precision)
        return precisions

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        super().check(group, optimizer)
        check_counted(group, self.kind)
        for table in group.tables:
            if self.worth is not None and table.name not in self.worth:
                raise ValueError(f"table '{table.name}': method banded, field 'worth' does not say what it is worth")

    def floor(self, group: Group) -> Floor:
        ranks = rank_bytes(group)
        why = "the ranks of ids that are not numbered by frequency" if ranks else "nothing: no id has a row"
        return Floor(min(ranks, group.full_bytes), why)

    def fit(self, group: Group, limit: int) -> Layout:
        if self.widths is not None:
            return super().fit(group, limit)
        narrow_from = self._narrow_from(group)
        if limit >= narrow_from:
            layout = super().fit(group, limit)
            # Until narrow rows use as many bytes as whole ones did, those stay: no larger budget uses fewer.
            if layout.serving.num_bytes >= narrow_from:
                return layout
        return self.model_copy(update={"widths": ()}).fit(group, min(limit, narrow_from - 1))

    def _narrow_from(self, group: Group) -> int:
        """The least budget with which rows may be narrow by default."""
        dims = {table.embedding_dim for table in group.tables}
        projections = sum(FP32.slab_bytes(sum(self._widths(group, dim)), dim) for dim in dims)
        return rank_bytes(group) + _LEAST_BUDGET * projections

    # ---- what rows are worth -------------------------------------------------------------------------------------

    def _levels(self, group: Group, dim: int) -> list[Level]:
        return [choice.level for choice in self._choices(group, dim)]

    def _choices(self, group: Group, dim: int) -> list[Choice]:
        def find() -> list[Choice]:
            formats = [row_format(precision) for precision in self.precisions]
            return choices(group.format, formats, dim, self._widths(group, dim), self.decay)

        return group.once(f"kinds of {dim} columns of {self!r}", find)

    def _widths(self, group: Group, dim: int) -> Sequence[int]:
        if self.widths is not None:
            return self.widths
        widths = sorted({dim * quarters // 4 for quarters in (1, 2, 3)} - {0})
        full = sum(FP32.slab_bytes(t.rows or 0, dim) for t in group.tables if t.embedding_dim == dim)
        return widths if FP32.slab_bytes(sum(widths), dim) <= _MOST_OF_FULL * full else ()

    def _climb(self, group: Group) -> Climb:
        """Ids of one count climb together, and those of all tables in the order of what that is worth per bit."""
        parts = []
        for t, table in enumerate(group.tables):
            counts, starts, ends = _runs(group)[t]
            signal = self._signal(counts)
            if self.worth is not None:
                signal *= self.worth[table.name] / (float(signal @ (ends - starts)) or 1.0)
            kinds = self._choices(group, table.embedding_dim)
            slopes = np.array([_slope(less, more) for less, more in zip(kinds, kinds[1:])])
            # Neither rises, whatever the last digit: ids climb level by level, and none before a more frequent one.
            signal, slopes = np.minimum.accumulate(signal), np.minimum.accumulate(slopes)
            level = np.repeat(np.arange(1, len(kinds)), len(starts))
            worth = np.outer(slopes, signal).ravel()
            of_all = (np.tile(column, len(slopes)) for column in (starts, ends))
            parts.append((np.full(len(level), t), level, *of_all, worth))
        table_, level, start, end, worth = (np.concatenate(column) for column in zip(*parts))
        # Of ids that are worth nothing on any level, all reach one before any goes on to the next.
        order = np.lexsort((level, -worth))
        return Climb(table_[order], level[order], start[order], end[order])

    def _signal(self, counts: Counts) -> Floats:
        """What ids of these counts are worth with rows that keep all, but for what their table is worth."""
        each = counts.astype(np.float64)
        return each * (each / np.maximum(each + self.prior_count, 1.0))

    def kept(self, layout: Layout, group: Group) -> dict[str, float]:
        """Which share of all that its ids are worth each table keeps, from 0 to 1: Σv(x) over that of whole rows."""
        found = {}
        for table, (counts, starts, ends) in zip(group.tables, _runs(group)):
            entry = layout.entries[table.name]
            if entry.variant == FULL:
                found[table.name] = 1.0
                continue
            # What all ids before a rank are worth lies on a line between the ends of runs.
            ranks, sums = np.append(0, ends), np.append(0.0, np.cumsum(self._signal(counts) * (ends - starts)))
            share, first = 0.0, 0
            for rows, width, precision in zip(*(entry.values[name] for name in ("rows", "widths", "precisions"))):
                before, with_these = np.interp([first, first + rows], ranks, sums)
                choice = _choice(Level(width, row_format(precision)), table.embedding_dim, self.decay)
                share += float(with_these - before) * choice.kept
                first += rows
            found[table.name] = share / (float(sums[-1]) or 1.0)
        return found

    # ---- the module ----------------------------------------------------------------------------------------------

    def _entry(self, bands: Sequence[tuple[int, Level]], ranks_from: int | None) -> Entry:
        values = {
            "rows": [rows for rows, _ in bands],
            "widths": [level.width for _, level in bands],
            "precisions": [level.format.name for _, level in bands],
        }
        return ranked_entry("banded", values, ranks_from if bands else None)

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        bands, zeros = self._ranges(entry, group), Recipe("sum", ())
        rest = zeros if sum(entry.entry.values["rows"]) < int(entry.table.rows or 0) else None
        return Recipe("alternatives", bands, ranks_of(entry, group), rest=rest) if bands else zeros


def _runs(group: Group) -> list[tuple[Counts, Counts, Counts]]:
    """By table, the counts of its ids by rank, those that are equal told once."""
    return group.once("runs by rank", lambda: [runs_by_rank(c) for c in group.counts if c is not None])


class Choice(NamedTuple):
    """A kind of rows, the bits of one of them, and the share of a vector that it keeps."""

    level: Level
    bits: float
    kept: float


def choices(
    rows_in: RowFormat, formats: Sequence[RowFormat], dim: int, widths: Sequence[int], decay: float
) -> list[Choice]:
    """The kinds of rows that are best for some number of bits, the smallest first; at the front no row at all.

    They are the corners of the concave hull of what rows keep over their bits: no kind between two of them keeps more
    than a mixture of the two.

    Args:
        rows_in: the format of full tables, in which the last of the kinds is.
        formats: others, of which those count that take fewer bits and keep less.
        dim: D, the width of the last kind.
        widths: others, of which those below D count.
        decay: α of the variances j^−α that the directions of a vector have.
    """
    full = Level(dim, rows_in)
    largest = _choice(full, dim, decay)
    levels = (Level(width, each) for each in (rows_in, *formats) for width in {dim, *(w for w in widths if w < dim)})
    found = (_choice(level, dim, decay) for level in levels)
    smaller = [c for c in found if c.bits < largest.bits and c.kept < largest.kept]
    hull = [Choice(full, 0.0, 0.0)]
    for choice in [*sorted(smaller, key=lambda c: (c.bits, -c.kept)), largest]:
        if choice.bits == hull[-1].bits:
            continue
        while len(hull) > 1 and _slope(hull[-2], choice) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def _choice(level: Level, dim: int, decay: float) -> Choice:
    bits = float(level.format.mean_bits(np.array([level.width]))[0])
    return Choice(level, bits, _kept_of_width(level.width, dim, decay) * _kept_of_rounding(level.format, level.width))


def _slope(less: Choice, more: Choice) -> float:
    return (more.kept - less.kept) / (more.bits - less.bits)


def _kept_of_width(width: int, dim: int, decay: float) -> float:
    """What the first directions hold of a vector whose j-th direction has a variance in proportion to j^−decay."""
    variances = np.arange(1, dim + 1) ** -decay
    return float(variances[:width].sum() / variances.sum())


@cache
def _kept_of_rounding(rows_in: RowFormat, width: int) -> float:
    """What a format keeps of rows of standard normal numbers: 1 less the squared error, as a share of the squares."""
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((_SAMPLE, width), dtype=np.float32))
    stored = StoredRows(rows_in, width)
    stored.add(_SAMPLE)
    error = stored.read(*rows_in.pack(rows), torch.arange(_SAMPLE, device=rows.device)) - rows
    return max(0.0, 1 - float(error.double().square().sum() / rows.double().square().sum()))
