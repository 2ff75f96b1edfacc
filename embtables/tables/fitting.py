"""Trained full tables in the rows of another method: the vectors nearest to theirs, by weighted least squares."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embtables.config import TableConfig
from embtables.lookup.engine import without_autocast
from embtables.lookup.features import BlockLookup
from embtables.lookup.recipe import Listed, Recipe, Row, concat
from embtables.lookup.recipe_block import RecipeBlock
from embtables.lookup.store import Store
from embtables.plan.solver import GroupPlan
from embtables.sizes.layout import Counts
from embtables.tables.reading import block_of, dense_rows

# Ids that are looked up at once.
_CHUNK = 65536
# Rounds over all slabs, at most, and the share of the error that one has to take away for another to follow.
_ROUNDS, _LEAST_GAIN = 50, 3e-4


@dataclass(eq=False)
class _Table:
    """A trained table ``weight`` ``[n, D]``, how much an id counts ``[n]``, and what looks it up in the new storage."""

    weight: Tensor
    counts: Tensor
    lookup: BlockLookup
    number: int
    recipe: Recipe

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Ids ``[C]``, their trained vectors ``[C, D]`` and counts ``[C, 1]``."""
        for ids in torch.arange(len(self.weight), device=self.weight.device).split(_CHUNK):
            yield ids, self.weight[ids], self.counts[ids].unsqueeze(1)


def checked_weights(
    tables: Sequence[TableConfig], weights: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Trained tables in fp32, where the others are.

    Raises:
        ValueError: naming a table that there is not, or one whose weight is no finite ``[num_embeddings, D]``.
    """
    shapes = {config.name: (config.num_embeddings, config.embedding_dim) for config in tables}
    for name, weight in weights.items():
        if name not in shapes:
            raise ValueError(f"there is no table '{name}'; the tables: {', '.join(shapes)}")
        if not isinstance(weight, Tensor) or weight.is_meta or weight.is_complex() or weight.layout != torch.strided:
            raise ValueError(f"the trained weight of table '{name}' must be a tensor of numbers that are there")
        if tuple(weight.shape) != shapes[name]:
            raise ValueError(f"table '{name}' is {list(shapes[name])}, its trained weight {list(weight.shape)}")
        if not torch.isfinite(weight).all():
            raise ValueError(f"the trained weight of table '{name}' holds NaN or infinite values")
    return {name: weight.detach().to(device, torch.float32) for name, weight in weights.items()}


def shared_with(g: GroupPlan, weights: Mapping[str, Tensor]) -> list[str]:
    """The tables of a group that are not given, where those that are given share storage with them."""
    names = [table.name for table in g.group.tables]
    shared = g.layout.training.bytes_by_table(names)[1]
    return [t.name for t in g.group.tables if shared and t.name not in weights and t.num_embeddings is not None]


def keep(
    groups: Sequence[GroupPlan], store: Store, weights: Mapping[str, Tensor], counts: Mapping[str, Counts]
) -> list[str]:
    """Takes over trained tables by their methods' own ways; the names of those that there is one for."""
    kept = []
    for g in groups:
        own = {table.name: weights[table.name] for table in g.group.tables if table.name in weights}
        group = replace(g.group, counts=tuple(counts.get(table.name) for table in g.group.tables))
        kept += g.method.keep(g.layout, group, store, own) if own else []
    return kept


def share_kept(lookups: Sequence[BlockLookup], name: str, weight: Tensor, counts: Counts | None) -> float:
    """How much of a trained table ``[n, D]`` its vectors hold: 1 − Σ c·‖e − w‖² ÷ Σ c·‖w‖² over its ids.

    1 is all of it, 0 what vectors of zeros would hold, and below 0 are vectors farther from it than those.
    """
    missed, whole = 0.0, 0.0
    lookup, number = block_of(lookups, name)
    shares = _shares(weight, counts, lookup.tables[number].padding_idx)
    for start in range(0, len(weight), _CHUNK):
        part = slice(start, min(start + _CHUNK, len(weight)))
        wanted, share = weight[part].double(), shares[part].unsqueeze(1)
        missed += float((share * (dense_rows(lookup, number, part).double() - wanted).square()).sum())
        whole += float((share * wanted.square()).sum())
    return 1 - missed / whole if whole else 1.0


def fit(
    store: Store,
    lookups: Sequence[BlockLookup],
    weights: Mapping[str, Tensor],
    counts: Mapping[str, Counts],
    copied: Collection[str] = (),
) -> list[str]:
    """Changes the rows of tables so that the vectors of their ids are as near to trained ones as they can be.

    It makes Σ_x c_x·‖e(x) − w(x)‖² small over all ids x of all tables at once, where c_x is how often an id occurs. A
    row that ids share as a whole becomes the mean of their vectors, weighted by how often they occur. Slab by slab,
    each is moved to where this sum is least while the others stay, which is exact where a scalar of a vector depends on
    one row of the slab; where it is a sum of m of them, each moves by the m-th part of what it would move alone, which
    makes the sum smaller as well (a majorization: Hunter & Lange, "A Tutorial on MM Algorithms", The American
    Statistician 58(1), 2004). Rounds end where they no longer gain.

    Tables whose vectors are products of matrices, whose slabs are factors of themselves, or which no recipe describes
    stay as they are.

    Args:
        store: in the form that is trained.
        lookups: of all tables.
        weights: trained tables ``[num_embeddings, D]`` by name.
        counts: occurrences ``[num_embeddings]`` of their ids by name, as far as they are known.
        copied: the tables whose method took them over already; those with a row of their own for every id are done.

    Returns:
        The names of the tables that were fitted.
    """
    tables = {}
    for name, weight in weights.items():
        lookup, number = block_of(lookups, name)
        recipe = lookup.block.recipes[number] if isinstance(lookup.block, RecipeBlock) else None
        if recipe is None or not recipe.all_addresses() or not _can_be_fitted(recipe):
            continue
        if not (name in copied and recipe == concat(Row(name))):
            shares = _shares(weight, counts.get(name), lookup.tables[number].padding_idx)
            tables[name] = _Table(weight, shares, lookup, number, recipe)
    users: dict[str, list[_Table]] = {}
    for table in tables.values():
        for address in table.recipe.all_addresses():
            if table not in users.setdefault(address.slab, []):
                users[address.slab].append(table)
    for slab, of_slab in users.items():
        if any(_is_summed(table.recipe, slab) for table in of_slab):
            # What their first values hold beside the sums that are wanted would never leave them.
            store.write_slab(slab, torch.zeros_like(store.read_slab(slab)))
    last = float("inf")
    with without_autocast(store.device):
        for _ in range(_ROUNDS):
            error = sum(_improve(store, slab, of_slab) for slab, of_slab in users.items())
            if error >= last * (1 - _LEAST_GAIN):
                break
            last = error
    return list(tables)


def _shares(weight: Tensor, counts: Counts | None, padding: int | None) -> Tensor:
    """How much each id counts: those that never occurred a little, so that a row of theirs alone is theirs."""
    shares = torch.ones(len(weight), device=weight.device)
    if counts is not None:
        shares += torch.from_numpy(counts[: len(weight)]).to(weight.device)
    if padding is not None and padding < len(shares):
        shares[padding] = 0  # its vector is zeros, whatever its row is
    return shares


def _can_be_fitted(recipe: Recipe) -> bool:
    slabs = [address.slab for address in recipe.addresses]
    squares = recipe.combine == "product" and len(set(slabs)) < len(slabs)
    return not recipe.projections() and not squares and (recipe.rest is None or _can_be_fitted(recipe.rest))


def _is_summed(recipe: Recipe, slab: str) -> bool:
    """Whether rows of the slab are terms of sums or means."""
    own = recipe.combine in ("sum", "mean") and any(address.slab == slab for address in recipe.addresses)
    return own or (recipe.rest is not None and _is_summed(recipe.rest, slab))


def _terms(recipe: Recipe, slab: str) -> int:
    """How many rows of the slab a scalar of a vector is a sum of, at most."""
    terms = 1
    if recipe.combine in ("sum", "mean"):
        of_slab = [address for address in recipe.addresses if address.slab == slab]
        terms = sum(address.longest if isinstance(address, Listed) else 1 for address in of_slab)
    return max(1, terms, _terms(recipe.rest, slab) if recipe.rest else 1)


def _improve(store: Store, slab: str, tables: list[_Table]) -> float:
    """Moves the rows of one slab to where the error is least; the error of its tables before."""
    values = store.read_slab(slab).float()
    slope, curvature = torch.zeros_like(values), torch.zeros_like(values)
    error = 0.0
    for table in tables:
        for ids, target, counts in table.chunks():
            error += _derivatives(store, slab, table, ids, target, counts, slope, curvature)
    terms = max(_terms(table.recipe, slab) for table in tables)
    store.write_slab(slab, values - slope / (terms * curvature).clamp(min=torch.finfo(values.dtype).tiny))
    return error


def _derivatives(
    store: Store,
    slab: str,
    table: _Table,
    ids: Tensor,
    target: Tensor,
    counts: Tensor,
    slope: Tensor,
    curvature: Tensor,
) -> float:
    """Adds the first and second derivatives of half the error of some ids, by the slab's scalars; that error."""
    block, feature = table.lookup.block, table.lookup.lookup[table.number].expand_as(ids)
    parts = block.address(ids, feature)
    rows = [store.read(part.weight, part.rows.clamp(min=0).flatten()).float() for part in parts]
    values = [r.view(*p.rows.shape, p.width) * (p.rows >= 0).unsqueeze(-1) for r, p in zip(rows, parts)]
    with torch.enable_grad():
        values = [value.requires_grad_() for value in values]
        vectors = block.combine(values, ids, feature, store.extra)

        def pulled(vector: Tensor) -> list[Tensor]:
            found = torch.autograd.grad(
                vectors, values, vector.expand_as(vectors), retain_graph=True, allow_unused=True
            )
            return [torch.zeros_like(v) if g is None else g for g, v in zip(found, values)]

        missed = vectors.detach() - target
        # A scalar of a row stands in one scalar of the vector, so that its derivatives are found one by one.
        each = zip(parts, pulled(counts * missed), pulled(counts), pulled(torch.ones_like(counts)))
    first, number = store.start(slab), store.rows(slab)
    for part, by_error, by_counts, by_one in each:
        if part.weight == store.weight_of(slab):
            index = part.rows.flatten() - first
            there = (index >= 0) & (index < number)
            slope.index_add_(0, index[there], by_error.reshape(-1, part.width)[there])
            curvature.index_add_(0, index[there], (by_counts * by_one).reshape(-1, part.width)[there])
    return float((counts * missed.square()).sum())
