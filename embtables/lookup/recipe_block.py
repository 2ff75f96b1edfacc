"""Recipes in PyTorch: the addresses and the combination of all tables of a block at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import reduce
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embtables.hashing import balanced_ids, hash_ids, hash_signs
from embtables.lookup.block import Block, Extras, Part
from embtables.lookup.recipe import (
    BLOCKS,
    Address,
    Balanced,
    BalancedBlock,
    Capped,
    CircularBlock,
    Coded,
    Digit,
    Hashed,
    Listed,
    Range,
    Recipe,
    Row,
    SparseRow,
)
from embtables.lookup.sparse_rows import sparse_rows
from embtables.lookup.store import Store

_NO_END = 2**62
# Addresses that a seed decides.
_SEEDED = (Hashed, Balanced, *BLOCKS)


def shape_of(recipe: Recipe, store: Store) -> Hashable:
    """What recipes must have in common to be looked up together: everything but rows, seeds and where things begin."""
    ranks = None if recipe.ranks is None else recipe.ranks.code
    if recipe.sparse is not None:
        return recipe.combine, replace(recipe.sparse, first=0)
    if recipe.combine == "alternatives":
        rest = None if recipe.rest is None else shape_of(recipe.rest, store)
        return recipe.combine, ranks, recipe.projection, rest
    scalars = tuple(a.scalars for a in recipe.addresses if isinstance(a, BLOCKS))
    kinds = tuple(_kind(a, store) for a in recipe.addresses)
    behind = recipe.inner, recipe.projection, recipe.zeros
    return recipe.combine, ranks, behind, kinds, scalars, _runs(recipe, store)


def _runs(recipe: Recipe, store: Store) -> tuple[int, ...]:
    """The lengths of the runs of addresses that are found together: neighbors of one kind and, if seeded, one slab."""

    def together(address: Address) -> Hashable:
        return _kind(address, store), address.slab if isinstance(address, _SEEDED) else None

    return tuple(len(list(members)) for _, members in groupby(recipe.addresses, together))


def _kind(address: Address, store: Store) -> Hashable:
    """What neighboring addresses must have in common to be found together."""
    own: tuple[Any, ...] = ()
    if isinstance(address, _SEEDED):
        own = (address.sign_seed is not None,)
    if isinstance(address, Coded):
        own = (address.code,)
    if isinstance(address, Listed):
        own = (address.offsets, address.values, address.longest)
    return type(address), store.weight_of(address.slab), *own


class RecipeBlock(Block):
    """The lookup of tables whose recipes have one shape.

    Args:
        recipes: the recipe of each of the block's lookups.
        store: where the values lie.
        embedding_dim: D.
    """

    def __init__(self, recipes: Sequence[Recipe], store: Store, embedding_dim: int) -> None:
        super().__init__(store, embedding_dim)
        self.recipes = list(recipes)
        first = recipes[0]
        self.rank_code = None if first.ranks is None else first.ranks.code
        self.constant("ranks_from", [0 if r.ranks is None else r.ranks.first for r in recipes])
        self.values: _Combined | _Alternatives | _Sparse
        if first.sparse is not None:
            self.values = _Sparse(self, first.sparse)
        else:
            self.values = _Alternatives(self) if first.combine == "alternatives" else _Combined(self, "", recipes)

    ranks_from: Tensor
    first_row: Tensor

    @property
    def may_skip(self) -> bool:  # type: ignore[override]
        """Lists end with −1 where they are short; graphs look for every id among the rows of every kind."""
        return self.values.may_skip

    @property
    def weight_of_rows(self) -> str | None:
        """The weight, by its attribute, of which each vector is one row as it stands there; else ``None``."""
        return self.values.weight_of_rows

    def _ranks(self, ids: Tensor, feature: Tensor) -> Tensor:
        return ids if self.rank_code is None else self.code(self.rank_code, self.ranks_from[feature] + ids)

    def code(self, name: str, index: Tensor) -> Tensor:
        """The elements of a code buffer, as int64."""
        return self.store.code(name)[index].long()

    def address(self, ids: Tensor, feature: Tensor) -> list[Part]:
        return self.values.address(self._ranks(ids, feature), feature)

    def combine(self, values: list[Tensor], ids: Tensor, feature: Tensor, extras: Extras) -> Tensor:
        return self.values.combine(values, self._ranks(ids, feature), ids, feature, extras)

    def signature(self, ids: Tensor, feature: Tensor) -> Tensor:
        return self.values.signature(self._ranks(ids, feature), ids, feature)

    def check_codes(self, given: Callable[[str], Tensor | None]) -> None:
        if isinstance(self.values, _Sparse):
            self.values.matrix.check_codes(given)


class _Combined:
    """Values at all addresses of an id, combined: joined, summed, averaged or multiplied, and then projected.

    Their constants are buffers of the block whose names begin with ``prefix``.
    """

    def __init__(self, block: RecipeBlock, prefix: str, recipes: Sequence[Recipe]) -> None:
        first, store = recipes[0], block.store
        self.combination, self.zeros = first.combine, first.zeros
        self.projections = [name for name in (first.inner, first.projection) if name is not None]
        self.embedding_dim, self.store = block.embedding_dim, store
        self.runs: list[_Run] = []
        start = 0
        for length in _runs(first, store):
            addresses = [r.addresses[start : start + length] for r in recipes]
            self.runs.append(_Run(block, f"{prefix}run{len(self.runs)}", addresses))
            start += length
        self.may_skip = self.has_lists = any(run.kind is Listed for run in self.runs)
        self.weight_of_rows: str | None = None
        if len(first.addresses) == 1 and not self.projections:
            (run,) = self.runs
            if run.width == block.embedding_dim and run.kind is not Listed and not run.has_signs:
                self.weight_of_rows = store.weight_of(run.sample.slab)

    def address(self, ranks: Tensor, feature: Tensor) -> list[Part]:
        return [Part(run.width, run.rows(ranks, feature), format=run.format) for run in self.runs]

    def combine(self, values: list[Tensor], ranks: Tensor, ids: Tensor, feature: Tensor, extras: Extras) -> Tensor:
        signed = [run.signed(v, ids, feature) for run, v in zip(self.runs, values)]
        vectors = self._combined(signed, ranks, feature)
        return reduce(torch.matmul, map(extras, self.projections), vectors)

    def _combined(self, values: list[Tensor], ranks: Tensor, feature: Tensor) -> Tensor:
        """One vector from values ``[..., P, width]`` of each run."""
        if not values:
            return torch.zeros(*ranks.shape, self.embedding_dim, dtype=self.store.dtype, device=ranks.device)
        if self.combination == "concat":
            joined = [v.flatten(-2) for v in values]
            vectors = joined[0] if len(joined) == 1 else torch.cat(joined, dim=-1)
            return F.pad(vectors, (0, self.zeros)) if self.zeros else vectors
        together = values[0] if len(values) == 1 else torch.cat(values, dim=-2)
        if self.combination == "product":
            return reduce(torch.mul, together.unbind(-2))
        if self.combination == "sum":
            return together.sum(-2)
        if not self.has_lists:
            return together.mean(-2)
        lengths = self.runs[0].lengths(ranks, feature)
        return together.sum(-2) / lengths.clamp(min=1).unsqueeze(-1)

    def signature(self, ranks: Tensor, ids: Tensor, feature: Tensor) -> Tensor:
        found = [run.signature(ranks, ids, feature) for run in self.runs]
        if not found:
            return torch.zeros_like(ids).unsqueeze(-1)
        rows = torch.cat(found, dim=-1)
        # The order of its terms does not matter to a sum or product.
        return rows if self.combination == "concat" else rows.sort(-1).values


class _Sparse:
    """Rows of one sparse matrix, which are no rows of a weight: what is gathered is nothing."""

    may_skip = False
    weight_of_rows: str | None = None

    def __init__(self, block: RecipeBlock, sparse: SparseRow) -> None:
        self._block = [block]
        self.matrix = sparse_rows(sparse, block.store, block.embedding_dim)
        block.constant("first_row", [r.sparse.first for r in block.recipes if r.sparse is not None])

    def rows(self, ids: Tensor, feature: Tensor) -> Tensor:
        return self._block[0].first_row[feature] + ids

    def address(self, ranks: Tensor, feature: Tensor) -> list[Part]:
        return []

    def combine(self, values: list[Tensor], ranks: Tensor, ids: Tensor, feature: Tensor, extras: Extras) -> Tensor:
        return self.matrix.decode(self.rows(ranks, feature))

    def signature(self, ranks: Tensor, ids: Tensor, feature: Tensor) -> Tensor:
        return self.rows(ranks, feature).unsqueeze(-1)


class _Run:
    """Neighboring addresses of one kind and width: P of them, for each of the block's L lookups.

    Their constants are ``[L, P]`` buffers of the block, so that they move with it.
    """

    def __init__(self, block: RecipeBlock, name: str, addresses: Sequence[Sequence[Address]]) -> None:
        self._block, self._name = [block], name
        sample = addresses[0][0]
        self.sample, self.kind, self.width = sample, type(sample), block.store.width(sample.slab)
        self.format = block.store.format(sample.slab)
        starts, rows = block.store.start, block.store.rows
        self._keep("base", [[starts(a.slab) + getattr(a, "first", 0) for a in each] for each in addresses], Row)
        others = (*_SEEDED, Digit, Capped, Coded, Listed)
        self._keep("base", [[starts(a.slab) for a in each] for each in addresses], *others)
        self._keep("size", [[rows(a.slab) for a in each] for each in addresses], *_SEEDED, Digit)
        self._keep("last", [[rows(a.slab) - 1 for a in each] for each in addresses], Capped)
        for field, kinds in (
            ("seed", (Hashed, CircularBlock)),
            ("start", (Balanced, BalancedBlock)),
            ("turn", (Balanced, BalancedBlock)),
            ("scalars", (BalancedBlock,)),
            ("divisor", (Digit,)),
            ("first", (Coded, Listed)),
            ("column", (Coded,)),
        ):
            self._keep(field, [[getattr(a, field, 0) for a in each] for each in addresses], *kinds)
        in_turn = [[rows(a.slab) // getattr(a, "scalars", 1) for a in each] for each in addresses]
        self._keep("in_turn", in_turn, Balanced, BalancedBlock)
        self.has_signs = getattr(sample, "sign_seed", None) is not None
        if self.has_signs:
            self._keep("sign_seed", [[getattr(a, "sign_seed", 0) for a in each] for each in addresses], self.kind)
        if isinstance(sample, BLOCKS):
            scalars = [a.scalars for a in addresses[0] if isinstance(a, BLOCKS)]
            self.longest = max(scalars)
            # No ends of blocks that are shorter than others.
            taken = [p * self.longest + offset for p, n in enumerate(scalars) for offset in range(n)]
            self.cuts = len(taken) < self.longest * len(scalars)
            if self.cuts:
                block.constant(f"{name}_taken", taken)
            block.constant(f"{name}_offset", list(range(self.longest)))
        if isinstance(sample, Listed):
            block.constant(f"{name}_number", list(range(sample.longest)))

    def _keep(self, field: str, values: list[list[int]], *kinds: type) -> None:
        if self.kind in kinds:
            self._block[0].constant(f"{self._name}_{field}", values)

    def _constant(self, field: str) -> Tensor:
        constant: Tensor = getattr(self._block[0], f"{self._name}_{field}")
        return constant

    def rows(self, ids: Tensor, feature: Tensor) -> Tensor:
        """Rows ``[..., P]``, and of blocks and lists the scalars or rows of each, one after another."""
        if self.kind is Listed:
            return self._listed(ids, feature)
        if self.kind in BLOCKS:
            scalars = self._seeded(ids, feature).unsqueeze(-1) + self._constant("offset")
            within = scalars % self._constant("size")[feature].unsqueeze(-1)
            return self._cut((self._constant("base")[feature].unsqueeze(-1) + within).flatten(-2))
        return self._constant("base")[feature] + self._in_slab(ids, feature)

    def _in_slab(self, ids: Tensor, feature: Tensor) -> Tensor:
        """Rows ``[..., P]`` counted within the slab."""
        each = ids.unsqueeze(-1)
        if self.kind in _SEEDED:
            return self._seeded(ids, feature)
        if self.kind is Digit:
            # Integers only: a quotient by way of floating point is wrong beyond 2**24 (float32) or 2**53.
            quotient = torch.div(each, self._constant("divisor")[feature], rounding_mode="floor")
            return quotient % self._constant("size")[feature]
        if self.kind is Capped:
            return torch.minimum(each, self._constant("last")[feature])
        if isinstance(self.sample, Coded):
            codes = self._block[0].store.code(self.sample.code)
            place = self._constant("first")[feature] + each, self._constant("column")[feature]
            return codes.view(codes.shape[0], -1)[place].long()
        return each

    def _seeded(self, ids: Tensor, feature: Tensor) -> Tensor:
        each, size = ids.unsqueeze(-1), self._constant("size")[feature]
        if self.kind in (Hashed, CircularBlock):
            return hash_ids(each, self._constant("seed")[feature], size)
        start, turn, in_turn = (self._constant(name)[feature] for name in ("start", "turn", "in_turn"))
        scalars = self._constant("scalars")[feature] if self.kind is BalancedBlock else 1
        return balanced_ids(each, start, turn, size, in_turn, scalars)

    def _bounds(self, ids: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Where the lists ``[..., P]`` begin and how long they are."""
        assert isinstance(self.sample, Listed)
        place = self._constant("first")[feature] + ids.unsqueeze(-1)
        begin = self._block[0].code(self.sample.offsets, place)
        length = self._block[0].code(self.sample.offsets, place + 1) - begin
        return begin, length.clamp(0, self.sample.longest)

    def _listed(self, ids: Tensor, feature: Tensor) -> Tensor:
        assert isinstance(self.sample, Listed)
        begin, length = self._bounds(ids, feature)
        number = self._constant("number")
        there = number < length.unsqueeze(-1)
        values = self._block[0].code(self.sample.values, torch.where(there, begin.unsqueeze(-1) + number, 0))
        return torch.where(there, self._constant("base")[feature].unsqueeze(-1) + values, -1).flatten(-2)

    def lengths(self, ids: Tensor, feature: Tensor) -> Tensor:
        """How many rows the list of each id has."""
        return self._bounds(ids, feature)[1].sum(-1)

    def signed(self, values: Tensor, ids: Tensor, feature: Tensor) -> Tensor:
        """The values, each times its random sign where there are signs."""
        return values * self._signs(ids, feature).unsqueeze(-1) if self.has_signs else values

    def _signs(self, ids: Tensor, feature: Tensor) -> Tensor:
        signs = hash_signs(ids.unsqueeze(-1), self._constant("sign_seed")[feature])
        return signs if self.kind not in BLOCKS else self._cut(signs.repeat_interleave(self.longest, dim=-1))

    def _cut(self, scalars: Tensor) -> Tensor:
        """Of blocks as long as the longest ``[..., P · longest]`` those scalars that each has."""
        # By index even where they are the first ones: how a slice is laid out depends on whether B is 1.
        return scalars.index_select(-1, self._constant("taken")) if self.cuts else scalars

    def signature(self, ranks: Tensor, ids: Tensor, feature: Tensor) -> Tensor:
        if self.kind is Listed:
            return self.rows(ranks, feature)
        rows = self._constant("base")[feature] + self._in_slab(ranks, feature)
        if not self.has_signs:
            return rows
        return rows * 2 + (hash_signs(ids.unsqueeze(-1), self._constant("sign_seed")[feature]) > 0)


def _range_kind(address: Range, store: Store) -> tuple[int, str, str]:
    """What rows have in common that are looked up together: width, format, and projection, empty without one."""
    return store.width(address.slab), store.format(address.slab), address.projection or ""


class _Alternatives:
    """Looks up each kind of rows by itself: their positions, one gather, one product of matrices; then the rest."""

    weight_of_rows: str | None = None

    def __init__(self, block: RecipeBlock) -> None:
        self._block = [block]
        store = block.store
        each = [[a for a in recipe.addresses if isinstance(a, Range)] for recipe in block.recipes]
        # The kinds of rows, by their numbers. That of the ids that no range holds comes after them.
        self.kinds = sorted({_range_kind(a, store) for ranges in each for a in ranges})
        rests = [recipe.rest for recipe in block.recipes if recipe.rest is not None]
        self.rest = _Combined(block, "rest_", rests) if rests else None
        most = max(map(len, each)) + (self.rest is not None)
        ends, base, kind = [], [], []
        for ranges in each:
            stops = [0, *accumulate(store.rows(a.slab) for a in ranges)]
            # A row is its slab's first row plus the rank, less the ranks before the slab's; the rest counts from 0 on.
            bases = [store.start(a.slab) - before for a, before in zip(ranges, stops)]
            kinds = [self.kinds.index(_range_kind(a, store)) for a in ranges]
            if self.rest is not None:
                bases, kinds = [*bases, -stops[-1]], [*kinds, len(self.kinds)]
            padding = [0] * (most - len(bases))
            # The last alternative has no end, and what fills up the list is never reached.
            inner = stops[1 : len(bases)]
            ends.append([*inner, *[_NO_END] * (most - len(inner))])
            base.append(bases + padding)
            kind.append(kinds + padding)
        block.constant("ends", ends)
        block.constant("base", base)
        block.constant("kind", kind)

    @property
    def may_skip(self) -> bool:
        return torch.compiler.is_compiling()

    def _constant(self, name: str) -> Any:
        return getattr(self._block[0], name)

    def places(self, ranks: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Row of each id, of those of the rest their rank among them, and the number of its kind, ids by ids."""
        feature = feature.expand_as(ranks)
        number = (ranks.unsqueeze(-1) >= self._constant("ends")[feature]).sum(-1)
        return self._constant("base")[feature, number] + ranks, self._constant("kind")[feature, number]

    def _subsets(self, kind: Tensor) -> list[Tensor]:
        """The places, counted flat, of the ids of each kind of rows, and of the rest where there is any."""
        numbers = range(len(self.kinds) + (self.rest is not None))
        return [(kind.reshape(-1) == number).nonzero().squeeze(1) for number in numbers]

    def address(self, ranks: Tensor, feature: Tensor) -> list[Part]:
        rows, kind = self.places(ranks, feature)
        if torch.compiler.is_compiling():
            # How many ids have rows of a kind depends on data, so that each of them is asked for a row of each.
            parts = [Part(w, torch.where(kind == k, rows, -1), None, f) for k, (w, f, _) in enumerate(self.kinds)]
            if self.rest is not None:
                held = kind < len(self.kinds)
                of_rest = self.rest.address(torch.where(held, 0, rows), feature)
                parts += [part._replace(rows=part.rows.masked_fill(held.unsqueeze(-1), -1)) for part in of_rest]
            return parts
        rows, subsets = rows.reshape(-1), self._subsets(kind)
        parts = [Part(w, rows[subset], subset, f) for (w, f, _), subset in zip(self.kinds, subsets)]
        if self.rest is not None:
            subset, feature = subsets[-1], feature.expand_as(ranks).reshape(-1)
            parts += [p._replace(subset=subset) for p in self.rest.address(rows[subset], feature[subset])]
        return parts

    def combine(self, values: list[Tensor], ranks: Tensor, ids: Tensor, feature: Tensor, extras: Extras) -> Tensor:
        vectors = []
        for (_, _, projection), rows in zip(self.kinds, values):
            vectors.append(rows @ extras(projection) if projection else rows)
        of_rest = values[len(self.kinds) :]
        places, kind = self.places(ranks, feature)
        if torch.compiler.is_compiling():
            if self.rest is not None:
                vectors.append(self.rest.combine(of_rest, places, ids, feature, extras))
            return reduce(torch.add, vectors)  # all but one of them are zeros
        subsets = self._subsets(kind)
        if self.rest is not None:
            own, ids, feature = (t.expand_as(ranks).reshape(-1)[subsets[-1]] for t in (places, ids, feature))
            vectors.append(self.rest.combine(of_rest, own, ids, feature, extras))
        ordered = torch.cat(vectors).index_select(0, torch.cat(subsets).argsort())
        return ordered.view(*ranks.shape, ordered.shape[-1])

    def signature(self, ranks: Tensor, ids: Tensor, feature: Tensor) -> Tensor:
        rows, kind = self.places(ranks, feature)
        found = torch.stack([kind, rows], dim=-1)
        if self.rest is None:
            return found
        held = kind < len(self.kinds)
        of_rest = self.rest.signature(torch.where(held, 0, rows), ids, feature)
        # The number of a kind, and a row or what the rest has instead.
        beyond = torch.cat([kind.unsqueeze(-1), of_rest], dim=-1)
        return torch.where(held.unsqueeze(-1), F.pad(found, (0, beyond.shape[-1] - 2)), beyond)
