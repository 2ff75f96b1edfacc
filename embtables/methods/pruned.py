"""Trained dense, pruned by magnitude on a schedule, served sparse."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import exp, gcd, inf, isqrt, log
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from embtables.config import TableConfig
from embtables.formats import FP32, SCALE, RowFormat
from embtables.lookup.block import Block, Extras, Part
from embtables.lookup.graphs import number_below
from embtables.lookup.recipe import Recipe, Row, concat
from embtables.lookup.store import Store
from embtables.lookup.stored_rows import StoredRows
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
_WORDS = 8  # int64 words of the bitmap for each entry of its directory


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

    def served_block(self, entries: Sequence[TableEntry], group: Group, store: Store) -> Block:
        return _SERVED[entries[0].entry.variant](entries, group, store)

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
            entry = layout.entries[tables.tables[0].name]
            if entry.variant != FULL:
                fill = _SERVED[entry.variant].fill
                fill(tables.name, trained.slab(tables.name), entry.values["entries"], served, group.format)


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
        blocks = -(-self.rows * self.dim // (64 * _WORDS))
        return (
            *self._values(kept),
            Code(f"{self.name}/bitmap", (blocks * _WORDS,), "int64", "index"),
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


def stored_values(rows_in: RowFormat, number: int) -> StoredRows:
    """How so many values lie in a format, as rows of one scalar each."""
    values = StoredRows(rows_in, 1)
    values.add(number)
    return values


class SparseBlock(Block):
    """Values in the order of rows and columns; a form says where those of a row begin and in which columns they are."""

    first: Tensor

    def __init__(self, entries: Sequence[TableEntry], group: Group, store: Store) -> None:
        super().__init__(store, entries[0].table.embedding_dim)
        self.name = _name(group, self.embedding_dim)
        self.constant("first", [e.entry.values["first_row"] for e in entries])
        self.num_values: int = entries[0].entry.values["entries"]
        self.values = stored_values(group.format, self.num_values)
        stored, scales = self.values.empty("meta")
        for name, wanted in (("values", stored.squeeze(1)), ("scales", scales)):
            if wanted is None:
                continue
            found = self.code(name) if f"{self.name}/{name}" in store.code_names() else torch.empty(())
            # Numbers in fp32 may have been cast with the tables.
            same = found.dtype == wanted.dtype or (wanted.dtype == torch.float32 and found.is_floating_point())
            if found.shape != wanted.shape or not same:
                raise ValueError(
                    f"'{self.name}' has {self.num_values:,} entries in {group.format.name}, but its {name} are others: "
                    "the plan is damaged"
                )
        for entry in entries:
            first, rows = entry.entry.values["first_row"], entry.table.rows
            if rows is None or first < 0 or first + rows > self.num_rows():
                raise ValueError(
                    f"table '{entry.table.name}' has {rows} rows from {first} on, but '{self.name}' has "
                    f"{self.num_rows()}: the plan is damaged"
                )

    def num_rows(self) -> float:
        """How many rows the codes have places for."""
        raise NotImplementedError

    def address(self, ids: Tensor, feature: Tensor) -> list[Part]:
        return []

    def signature(self, ids: Tensor, feature: Tensor) -> Tensor:
        return (self.first[feature] + ids).unsqueeze(-1)

    def combine(self, values: list[Tensor], ids: Tensor, feature: Tensor, extras: Extras) -> Tensor:
        return self.decode(self.first[feature] + ids)

    def code(self, name: str) -> Tensor:
        return self.store.code(f"{self.name}/{name}")

    def decode(self, rows: Tensor) -> Tensor:
        """Vectors ``[..., D]`` of rows ``[...]``."""
        raise NotImplementedError

    def value(self, position: Tensor) -> Tensor:
        """The values at positions of any shape."""
        scales = self.code("scales") if self.values.format.scales else None
        found = self.values.read(self.code("values").unsqueeze(1), scales, position.reshape(-1))
        return found.to(self.store.dtype).view(position.shape)

    def place(self, start: Tensor, counts: Tensor, row: Tensor, column: Tensor | None) -> Tensor:
        """Vectors ``[n, D]`` from ``counts`` entries from ``start`` on [n]; of each entry its row, 0 … n−1, and column.

        The work is that of the entries found, not of n·D.
        """
        position = (start - counts.cumsum(0) + counts)[row] + torch.arange(row.numel(), device=row.device)
        column = self.code("columns")[position].long() if column is None else column
        values = self.value(position)
        vectors = values.new_zeros(start.numel(), self.embedding_dim)
        vectors.view(-1)[row * self.embedding_dim + column] = values
        return vectors

    def check_codes(self, given: Callable[[str], Tensor | None]) -> None:
        columns = given(f"{self.name}/columns")
        if columns is not None:
            _check_range(f"{self.name}/columns", columns, self.embedding_dim)

    @classmethod
    def fill(cls, name: str, slab: Tensor, kept: int, store: Store, rows_in: RowFormat) -> None:
        """Writes the ``kept`` largest entries of ``slab`` [rows, D], in a format, into the codes of ``name``."""
        flat, done, dim = slab.view(-1), 0, slab.shape[1]
        values = flat.new_empty(kept, 1)
        for start, mask in _largest(flat, kept):
            position = mask.nonzero().squeeze(1)
            chunk = slice(done, done + position.numel())
            values[chunk, 0] = flat[start : start + mask.numel()][position]
            cls.write(name, store, chunk, start, mask, (start + position) // dim, (start + position) % dim)
            done = chunk.stop
        scales = store.code(f"{name}/scales") if rows_in.scales else None
        stored_values(rows_in, kept).write(store.code(f"{name}/values").unsqueeze(1), scales, 0, values)
        cls.finish(name, store)

    @classmethod
    def write(
        cls, name: str, store: Store, chunk: slice, start: int, mask: Tensor, rows: Tensor, columns: Tensor
    ) -> None:
        """Notes where the entries ``chunk`` are: in a mask of the flat table from ``start``, or by row and column."""
        raise NotImplementedError

    @classmethod
    def finish(cls, name: str, store: Store) -> None:
        """Called after the last ``write``."""


class BitmapBlock(SparseBlock):
    """A bit per entry of the full table, and how many of them are set before each block of 8 words."""

    def num_rows(self) -> float:
        return 64 * len(self.code("bitmap")) // self.embedding_dim

    def decode(self, rows: Tensor) -> Tensor:
        first = rows.reshape(-1) * self.embedding_dim
        bits = self._bits(first)
        if torch.compiler.is_compiling():  # how many bits are set depends on data
            position = self._set_before(first).unsqueeze(1) + bits.cumsum(1) - bits
            vectors = torch.where(bits > 0, self.value(position.clamp(max=self.num_values - 1)), 0)
        else:
            row, column = bits.nonzero(as_tuple=True)
            vectors = self.place(self._set_before(first), bits.sum(1), row, column)
        return vectors.view(*rows.shape, self.embedding_dim)

    def _bits(self, first: Tensor) -> Tensor:
        """The bits ``[n, D]`` that begin at ``first`` [n]."""
        bitmap = self.code("bitmap")
        number = -(-self.embedding_dim // 64)
        word = (first >> 6).unsqueeze(1) + torch.arange(number + 1, device=first.device)
        words = bitmap[word.clamp(max=len(bitmap) - 1)]
        # Aligned with the row: the upper bits of a word and the lower ones of the next. Shifts stay below 64.
        # Shifts by tensors are named, since ONNX has no such operator for >> and <<.
        shift = (first & 63).unsqueeze(1)
        upper = torch.bitwise_right_shift(words[:, :-1], shift) & ~(-1 << (63 - shift) << 1)
        aligned = upper | (torch.bitwise_left_shift(words[:, 1:], 63 - shift) << 1)
        places = torch.arange(min(64, self.embedding_dim), device=first.device)
        bits = torch.bitwise_right_shift(aligned.unsqueeze(2), places) & 1
        return bits.flatten(1)[:, : self.embedding_dim]

    def _set_before(self, bit: Tensor) -> Tensor:
        """How many bits are set before ``bit`` [n]."""
        block = bit // (64 * _WORDS)
        words = self.code("bitmap").view(-1, _WORDS).index_select(0, block)
        starts = 64 * torch.arange(_WORDS, device=bit.device)
        before = ((bit - 64 * _WORDS * block).unsqueeze(1) - starts).clamp(0, 64)
        half = before >> 1
        below = words & ~torch.bitwise_left_shift(-1 << half, before - half)
        return self.code("directory").index_select(0, block) + _count_bits(below).sum(1)

    def check_codes(self, given: Callable[[str], Tensor | None]) -> None:
        """The directory follows from the bitmap, and the bits are as many as the values."""
        bitmap, directory = given(f"{self.name}/bitmap"), given(f"{self.name}/directory")
        if bitmap is None or directory is None:
            return
        counts = _count_bits(bitmap).view(-1, _WORDS).sum(1)
        ends = counts.cumsum(0)
        if int(ends[-1]) != self.num_values or not torch.equal(ends - counts, directory.long()):
            raise ValueError(
                f"'{self.name}/bitmap' and '{self.name}/directory' do not say where {self.num_values:,} "
                "values are: the file or state dict is damaged"
            )

    @classmethod
    def write(
        cls, name: str, store: Store, chunk: slice, start: int, mask: Tensor, rows: Tensor, columns: Tensor
    ) -> None:
        size = 64 * _WORDS
        bits = F.pad(mask.long(), (0, -mask.numel() % size)).view(-1, 64)
        words = (bits << torch.arange(64, device=mask.device)).sum(1)
        store.code(f"{name}/bitmap")[start // 64 : start // 64 + len(words)] = words
        counts = bits.view(-1, size).sum(1)
        directory = store.code(f"{name}/directory")[start // size : start // size + len(counts)]
        directory.copy_(chunk.start + counts.cumsum(0) - counts)


class RowsBlock(SparseBlock):
    """Compressed rows: the column of every entry, and where each row's entries begin."""

    def num_rows(self) -> float:
        return len(self.code("pointers")) - 1

    def check_codes(self, given: Callable[[str], Tensor | None]) -> None:
        super().check_codes(given)
        pointers = given(f"{self.name}/pointers")
        if pointers is None:
            return
        _check_sorted(f"{self.name}/pointers", pointers)
        if int(pointers[0]) != 0 or int(pointers[-1]) != self.num_values:
            raise ValueError(
                f"'{self.name}/pointers' goes from {int(pointers[0])} to {int(pointers[-1])}, but there are "
                f"{self.num_values} values: the file or state dict is damaged"
            )

    def decode(self, rows: Tensor) -> Tensor:
        pointers, flat = self.code("pointers"), rows.reshape(-1)
        return self.between(pointers[flat].long(), pointers[flat + 1].long()).view(*rows.shape, self.embedding_dim)

    def between(self, start: Tensor, end: Tensor) -> Tensor:
        """Vectors ``[n, D]`` from the entries ``start`` to ``end`` [n] of each row."""
        if torch.compiler.is_compiling():
            return self._place_at_most_all(start, end)
        return self.place(start, end - start, torch.repeat_interleave(end - start), None)

    def _place_at_most_all(self, start: Tensor, end: Tensor) -> Tensor:
        """``between`` for graphs, where all rows have to be as long as the longest that there can be: n·D places."""
        dim = self.embedding_dim
        position = start.unsqueeze(1) + torch.arange(dim, device=start.device)
        there = position < end.unsqueeze(1)
        position = torch.where(there, position, 0)
        # Places behind the end of a row go to a column of their own, which is cut off.
        column = torch.where(there, self.code("columns")[position].long(), dim)
        values = self.value(position)
        return values.new_zeros(start.shape[0], dim + 1).scatter(1, column, values)[:, :dim]

    @classmethod
    def write(
        cls, name: str, store: Store, chunk: slice, start: int, mask: Tensor, rows: Tensor, columns: Tensor
    ) -> None:
        store.code(f"{name}/columns")[chunk] = columns.to(store.code(f"{name}/columns").dtype)
        if rows.numel():
            counts = torch.bincount(rows - rows[0])
            first = int(rows[0]) + 1
            store.code(f"{name}/pointers")[first : first + len(counts)] += counts.to(
                store.code(f"{name}/pointers").dtype
            )

    @classmethod
    def finish(cls, name: str, store: Store) -> None:
        pointers = store.code(f"{name}/pointers")
        pointers.copy_(pointers.cumsum(0))


class EntriesBlock(RowsBlock):
    """Sorted entries, each with its row and column; a row's are found by bisection."""

    def num_rows(self) -> float:
        return inf  # one that has no entry is zero

    def check_codes(self, given: Callable[[str], Tensor | None]) -> None:
        SparseBlock.check_codes(self, given)
        ids = given(f"{self.name}/ids")
        if ids is not None:
            _check_sorted(f"{self.name}/ids", ids)

    def decode(self, rows: Tensor) -> Tensor:
        ids = self.code("ids")
        wanted = rows.reshape(-1).to(ids.dtype)
        if torch.compiler.is_compiling():
            found = self.between(number_below(ids, wanted), number_below(ids, wanted + 1))
        else:
            found = self.between(torch.searchsorted(ids, wanted), torch.searchsorted(ids, wanted, right=True))
        return found.view(*rows.shape, self.embedding_dim)

    @classmethod
    def write(
        cls, name: str, store: Store, chunk: slice, start: int, mask: Tensor, rows: Tensor, columns: Tensor
    ) -> None:
        store.code(f"{name}/columns")[chunk] = columns.to(store.code(f"{name}/columns").dtype)
        store.code(f"{name}/ids")[chunk] = rows.to(store.code(f"{name}/ids").dtype)

    @classmethod
    def finish(cls, name: str, store: Store) -> None:
        pass


def _check_range(name: str, codes: Tensor, end: int) -> None:
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < end:
        raise ValueError(
            f"'{name}' holds {int(codes.min())} … {int(codes.max())}, but there are only 0 … {end - 1}: "
            "the file or state dict is damaged"
        )


def _check_sorted(name: str, codes: Tensor) -> None:
    if codes.numel() and (int(codes[0]) < 0 or bool((codes[1:] < codes[:-1]).any())):
        raise ValueError(f"'{name}' does not rise: the file or state dict is damaged")


_SERVED: dict[str, type[SparseBlock]] = {
    "bitmap": BitmapBlock,
    "compressed rows": RowsBlock,
    "entries": EntriesBlock,
}


# SWAR counts of bits: pairs, nibbles, bytes; their sum ends up in the top byte.
_PAIRS, _NIBBLES, _BYTES, _ONES = 0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x0101010101010101


def _count_bits(words: Tensor) -> Tensor:
    """Bits set in each int64; the masks clear what an arithmetic shift brings in."""
    words = words - (words >> 1 & _PAIRS)
    words = (words & _NIBBLES) + (words >> 2 & _NIBBLES)
    return ((words + (words >> 4) & _BYTES) * _ONES) >> 56
