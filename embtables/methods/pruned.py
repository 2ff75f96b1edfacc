"""Trained dense, pruned by magnitude on a schedule, served sparse."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import exp, gcd, isqrt, log
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from embtables.config import TableConfig
from embtables.formats import FP32, SCALE, RowFormat
from embtables.lookup.recipe import Recipe, Row, SparseRow, concat
from embtables.lookup.sparse_rows import WORDS, SparseRows, sparse_rows, stored_values
from embtables.lookup.store import Store
from embtables.methods.base import Floor, Method, Stage, TableEntry, full_entry
from embtables.sizes.budget import split
from embtables.sizes.layout import FULL, Code, Entry, Form, Group, Layout, Slab

if TYPE_CHECKING:
    from embtables.lookup.engine import Touched

# Without for_training.
_WARMUP_STEPS, _PRUNE_STEPS = 1_000, 10_000
# Of the run, with it.
_WARMUP_SHARE, _PRUNE_SHARE = 0.1, 0.5
# An event costs about two passes over the table; this few of them vanish among thousands of steps.
_EVENTS = 20
# DeepLight's schedule stops short of its target by e^-ct; it ends here where a thousandth is left.
_STEEPNESS = log(1000)

_CHUNK = 2**18
# Entries whose magnitudes stand for those of all, between the beginning and the end of pruning.
_SAMPLE = 2**18


class Pruned(Method):
    """e(x) = E[x] with E of shape ``[n, embedding_dim]``, of whose entries only the largest are kept.

    Training works on the full tables. From ``warmup_steps`` on, for ``prune_steps``, every ``interval`` training
    forwards the smallest magnitudes are set to zero, ever more of them, ``"cubic"``-ally or ``"exponential"``-ly
    towards what the budget can hold, and at that level from then on. There is no mask: zeros may grow again. All tables
    of one dimension compete for the entries. What is ``None`` is settled by ``for_training``; without it warm-up takes
    1,000 steps and pruning 10,000, with 20 events.

    Served (``finalize``, ``serve``, ``save``) are exactly as many entries as the budget holds, in the form that holds
    most: a bitmap and values, compressed rows, or sorted (row, column, value) entries.

    Zhu & Gupta, "To Prune, or Not to Prune", 2017 (cubic); Deng et al., "DeepLight", WSDM 2021 (exponential).
    """

    kind: ClassVar[str] = "pruned"
    warmup_steps: int | None = Field(default=None, ge=0)
    prune_steps: int | None = Field(default=None, ge=1)
    interval: int | None = Field(default=None, ge=1)
    schedule: Literal["cubic", "exponential"] = "cubic"

    # ---- sizes ---------------------------------------------------------------------------------------------------

    def floor(self, group: Group) -> Floor:
        floors = [min(tables.full_bytes, tables.least_bytes) for tables in by_dim(group)]
        return Floor(sum(floors), "one entry for all tables of a dimension")

    def fit(self, group: Group, limit: int) -> Layout:
        parts = by_dim(group)
        floors = [min(tables.full_bytes, tables.least_bytes) for tables in parts]
        shares = split(limit, floors, [tables.full_bytes for tables in parts])
        entries: dict[str, Entry] = {}
        training: list[Slab] = []
        whole: list[Slab] = []
        codes: list[Code] = []
        for tables, share in zip(parts, shares):
            if share >= tables.full_bytes:
                pairs = [full_entry(group, table) for table in tables.tables]
                entries |= {table.name: entry for table, (entry, _) in zip(tables.tables, pairs)}
                whole += [slab for _, slab in pairs]
                continue
            form, kept, form_codes = tables.largest_form(share)
            for table, first in zip(tables.tables, tables.first_rows):
                entries[table.name] = Entry(form, {"entries": kept, "first_row": first})
            training.append(Slab(tables.name, tables.rows, tables.dim))
            codes += form_codes
        return Layout(
            {table.name: entries[table.name] for table in group.tables},
            Form(slabs=(*training, *whole)).in_format(FP32.name),
            Form(slabs=tuple(whole), codes=tuple(codes)),
        )

    def for_training(self, num_steps: int) -> Method:
        """Ten percent of the run for warm-up and half of it for pruning, where the method does not say otherwise."""
        warmup = round(_WARMUP_SHARE * num_steps) if self.warmup_steps is None else self.warmup_steps
        prune = max(1, round(_PRUNE_SHARE * num_steps)) if self.prune_steps is None else self.prune_steps
        return self.model_copy(update={"warmup_steps": warmup, "prune_steps": prune})

    # ---- the module ----------------------------------------------------------------------------------------------

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        return concat(Row(_name(group, entry.table.embedding_dim), entry.entry.values["first_row"]))

    def served_recipe(self, entry: TableEntry, group: Group) -> Recipe:
        stored = entry.entry
        matrix, first = _name(group, entry.table.embedding_dim), stored.values["first_row"]
        return Recipe(
            "sparse", sparse=SparseRow(matrix, stored.variant, stored.values["entries"], group.format.name, first)
        )

    def keep(self, layout: Layout, group: Group, store: Store, weights: Mapping[str, Tensor]) -> list[str]:
        """All of them, since training works on the full tables."""
        kept = super().keep(layout, group, store, weights)
        for name in weights.keys() - kept:
            table = next(t for t in group.tables if t.name == name)
            first = int(layout.entries[name].values["first_row"])
            store.slab(_name(group, table.embedding_dim))[first : first + len(weights[name])] = weights[name]
        return list(weights)

    def stage(self, layout: Layout, group: Group, store: Store) -> Stage | None:
        kept = {
            _name(group, table.embedding_dim): int(layout.entries[table.name].values["entries"])
            for table in group.tables
            if layout.entries[table.name].variant != FULL
        }
        return PruningStage(self, kept, store) if kept else None

    def serve(self, layout: Layout, group: Group, trained: Store, served: Store) -> None:
        for slab in layout.serving.slabs:
            served.write_slab(slab.name, trained.slab(slab.name))
        for tables in by_dim(group):
            entry = TableEntry(tables.tables[0], layout.entries[tables.tables[0].name])
            if entry.entry.variant != FULL:
                sparse = self.served_recipe(entry, group).sparse
                assert sparse is not None
                _fill(sparse_rows(sparse, served, tables.dim), trained.slab(tables.name))


# ---- sizes of the served forms ---------------------------------------------------------------------------------------


def _name(group: Group, dim: int) -> str:
    return f"{group.name}/{dim}"


def by_dim(group: Group) -> list[Tables]:
    """The tables of a group, those of one dimension together."""
    dims = dict.fromkeys(table.embedding_dim for table in group.tables)
    return [
        Tables(_name(group, d), d, tuple(t for t in group.tables if t.embedding_dim == d), group.format) for d in dims
    ]


class Tables(NamedTuple):
    """Tables of one dimension, stored as one, row after row."""

    name: str
    dim: int
    tables: tuple[TableConfig, ...]
    format: RowFormat

    @property
    def first_rows(self) -> list[int]:
        return [0, *accumulate(t.rows or 0 for t in self.tables)][:-1]

    @property
    def rows(self) -> int:
        return sum(t.rows or 0 for t in self.tables)

    @property
    def full_bytes(self) -> int:
        return sum(self.format.slab_bytes(t.rows or 0, self.dim) for t in self.tables)

    @property
    def least_bytes(self) -> int:
        return sum(code.num_bytes for code in self._entries(1, 1))

    def largest_form(self, limit: int) -> tuple[str, int, tuple[Code, ...]]:
        """The form that holds most entries within ``limit`` bytes, their number, and its codes."""
        best: tuple[str, int, tuple[Code, ...]] = ("", 0, ())
        # Where two hold as many the first is taken: it is also the faster. With one fixed order the bytes never fall
        # as the limit rises, since a form takes over with an entry that has just become affordable.
        for form, make in (("bitmap", self._bitmap), ("compressed rows", self._rows), ("entries", self._entries)):
            for most in (2**31 - 1, self.rows * self.dim):
                within = range(min(most, self.rows * self.dim) + 1)
                kept = bisect_right(within, limit, key=lambda n: sum(code.num_bytes for code in make(n, most))) - 1  # noqa: B023
                if kept > best[1]:
                    best = form, kept, make(kept, most)
        return best

    def _values(self, kept: int) -> tuple[Code, ...]:
        """The values, rows of one scalar each in the format, and their scales."""
        rows_in, stored = self.format, stored_values(self.format, kept)
        values = Code(f"{self.name}/values", (stored.units[-1],), rows_in.dtype, "weights")
        scales = Code(f"{self.name}/scales", (stored.blocks[-1], rows_in.scales), SCALE, "scales")
        return (values, scales) if rows_in.scales else (values,)

    def _bitmap(self, kept: int, most: int) -> tuple[Code, ...]:
        blocks = -(-self.rows * self.dim // (64 * WORDS))
        return (
            *self._values(kept),
            Code(f"{self.name}/bitmap", (blocks * WORDS,), "int64", "index"),
            Code(f"{self.name}/directory", (blocks,), _integer(most), "index"),
        )

    def _rows(self, kept: int, most: int) -> tuple[Code, ...]:
        return (
            *self._values(kept),
            Code(f"{self.name}/columns", (kept,), self._column, "index"),
            Code(f"{self.name}/pointers", (self.rows + 1,), _integer(most), "index"),
        )

    def _entries(self, kept: int, most: int) -> tuple[Code, ...]:
        return (
            *self._values(kept),
            Code(f"{self.name}/columns", (kept,), self._column, "index"),
            Code(f"{self.name}/ids", (kept,), _integer(self.rows), "index"),
        )

    @property
    def _column(self) -> str:
        return "uint8" if self.dim <= 2**8 else "int16" if self.dim <= 2**15 else "int32"


def _integer(largest: int) -> str:
    return "int32" if largest < 2**31 else "int64"


# ---- training --------------------------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """When entries are set to zero, and how many of them."""

    kind: str
    warmup_steps: int
    prune_steps: int
    interval: int

    @classmethod
    def of(cls, method: Pruned) -> Schedule:
        """A method's, with what is missing in it."""
        warmup = _WARMUP_STEPS if method.warmup_steps is None else method.warmup_steps
        prune = _PRUNE_STEPS if method.prune_steps is None else method.prune_steps
        return cls(method.schedule, warmup, prune, method.interval or max(1, prune // _EVENTS))

    def progress(self, step: int) -> float:
        """Share of the entries to be pruned that are gone by a step: 0 before, 1 at the end of pruning and after."""
        time = min(max((step - self.warmup_steps) / self.prune_steps, 0.0), 1.0)
        if self.kind == "cubic":
            return 1 - (1 - time) ** 3
        return (1 - exp(-_STEEPNESS * time)) / (1 - exp(-_STEEPNESS))

    def prunes_at(self, step: int) -> bool:
        since = step - self.warmup_steps
        # Counted back from the end, so that one event is exactly there.
        return since > 0 and (since - self.prune_steps) % self.interval == 0

    def prune(self, step: int, slabs: Sequence[Tensor], kept: Sequence[int]) -> None:
        """Does what is due at a step to the slabs ``[rows, D]``, of which so many entries are left in the end."""
        if not self.prunes_at(step):
            return
        for slab, left in zip(slabs, kept):
            number = round(slab.numel() - self.progress(step) * (slab.numel() - left))
            exact = step == self.warmup_steps + self.prune_steps or slab.numel() <= _SAMPLE
            threshold = _magnitude_of_rank(slab.view(-1), number) if exact else _estimated_magnitude(slab, number)
            below = _next_below(threshold, slab.dtype)
            for chunk in slab.view(-1).split(_CHUNK):
                chunk.copy_(F.hardshrink(chunk, below))  # zero where |x| ≤ below; many times faster than a mask


@torch.library.custom_op("embtables::prune_", mutates_args=("steps", "weights"))
def _step_in_graph(
    steps: Tensor, weights: list[Tensor], starts: list[int], rows: list[int], kept: list[int], schedule: str
) -> None:
    """``PruningStage.step`` on the slabs that begin at the rows ``starts``; ``schedule`` as JSON."""
    steps += 1
    slabs = [weight[start : start + count] for weight, start, count in zip(weights, starts, rows)]
    Schedule(*json.loads(schedule)).prune(int(steps), slabs, kept)


class PruningStage(Stage):
    """Counts training forwards, and prunes at some of them.

    Args:
        method: the schedule.
        kept: for each slab how many entries are left in the end.
        store: where the slabs are.
    """

    def __init__(self, method: Pruned, kept: dict[str, int], store: Store) -> None:
        super().__init__()
        self._store = [store]
        self.kept = kept
        self.schedule = Schedule.of(method)
        self._schedule_in_graphs = json.dumps(self.schedule)
        # On the CPU, so that looking at it waits for no device.
        self.steps = torch.zeros((), dtype=torch.int64, device="cpu")

    def done(self) -> bool:
        return int(self.steps) >= self.schedule.warmup_steps + self.schedule.prune_steps

    def state(self) -> dict[str, Tensor]:
        return {"steps": self.steps}

    @torch.no_grad()
    def step(self, touched: Touched) -> None:
        store = self._store[0]
        if torch.compiler.is_compiling():
            # As one operator, since graphs cannot ask what step it is.
            _step_in_graph(
                self.steps,
                [store.tensor(store.weight_of(name)) for name in self.kept],
                [store.start(name) for name in self.kept],
                [store.rows(name) for name in self.kept],
                list(self.kept.values()),
                self._schedule_in_graphs,
            )
            return
        self.steps += 1
        self.schedule.prune(int(self.steps), [store.slab(name) for name in self.kept], list(self.kept.values()))


def _next_below(magnitude: Tensor, dtype: torch.dtype) -> float:
    """The next smaller magnitude among the numbers of a type, or 0: without a sign their bits count up as they do."""
    kept = magnitude.to(dtype if dtype.itemsize == 2 else torch.float32)
    bits = kept.view(torch.int16 if kept.itemsize == 2 else torch.int32) - 1
    return float(bits.clamp(min=0).view(kept.dtype))


def _magnitudes(values: Tensor) -> Tensor:
    """|x| as int32 in the same order: without the sign the bits of a float32 count up as it does."""
    return values.float().view(torch.int32) & (2**31 - 1)


def _magnitude_of_rank(flat: Tensor, rank: int) -> Tensor:
    """The ``rank``-th largest magnitude (from 1) as float32, exactly: two passes with a histogram each, and no copy."""
    high = torch.zeros(2**15, dtype=torch.int64, device=flat.device)
    for chunk in flat.split(_CHUNK):
        high += torch.bincount(_magnitudes(chunk) >> 16, minlength=2**15)
    upper, above = _bin_of_rank(high, rank)
    low = torch.zeros(2**16, dtype=torch.int64, device=flat.device)
    for chunk in flat.split(_CHUNK):
        bits = _magnitudes(chunk)
        low += torch.bincount(bits[bits >> 16 == upper] & 0xFFFF, minlength=2**16)
    lower, _ = _bin_of_rank(low, rank - above)
    return torch.tensor((upper << 16) + lower, dtype=torch.int32, device=flat.device).view(torch.float32)


def _bin_of_rank(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the ``rank``-th from the top, and how many lie in the bins above it."""
    from_top = histogram.flip(0).cumsum(0)
    i = int(torch.searchsorted(from_top, rank))
    return len(histogram) - 1 - i, int(from_top[i - 1]) if i else 0


def _estimated_magnitude(slab: Tensor, rank: int) -> Tensor:
    """The ``rank``-th largest magnitude of ``[rows, D]`` or a little less, from every s-th entry, s prime to D."""
    stride = slab.numel() // _SAMPLE
    while gcd(stride, slab.shape[1]) > 1:
        stride += 1
    sample = slab.view(-1)[::stride].contiguous()
    expected = rank // stride
    # Two standard deviations on the safe side: what is pruned too much is lost, what is left too much goes later.
    return _magnitude_of_rank(sample, min(1 + expected + 2 * isqrt(expected), sample.numel()))


# ---- serving ---------------------------------------------------------------------------------------------------------


def _largest(flat: Tensor, number: int) -> Iterator[tuple[int, Tensor]]:
    """``(start, mask)`` of every chunk, set at the ``number`` largest magnitudes; among equals the first ones count."""
    threshold = _magnitudes(_magnitude_of_rank(flat, number))
    above = sum(int((_magnitudes(chunk) > threshold).sum()) for chunk in flat.split(_CHUNK))
    equals = number - above
    for start, chunk in zip(range(0, flat.numel(), _CHUNK), flat.split(_CHUNK)):
        bits = _magnitudes(chunk)
        equal = bits == threshold
        chosen = equal & (equal.cumsum(0) <= equals)
        equals -= int(chosen.sum())
        yield start, (bits > threshold) | chosen


def _fill(rows: SparseRows, slab: Tensor) -> None:
    """Stores the largest entries of ``slab`` [rows, D], as many as there are places for."""
    flat, done, dim = slab.view(-1), 0, slab.shape[1]
    values = flat.new_empty(rows.num_values)
    for start, mask in _largest(flat, rows.num_values):
        position = mask.nonzero().squeeze(1)
        chunk = slice(done, done + position.numel())
        values[chunk] = flat[start : start + mask.numel()][position]
        rows.write(chunk, start, mask, (start + position) // dim, (start + position) % dim)
        done = chunk.stop
    rows.write_values(values)
    rows.finish()
