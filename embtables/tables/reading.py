"""Reading tables: their rows as dense vectors, which ids share everything, and how strongly rows are regularized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embtables.lookup.engine import without_autocast
from embtables.lookup.features import BlockLookup
from embtables.lookup.recipe import Range, Recipe
from embtables.lookup.recipe_block import RecipeBlock
from embtables.lookup.step import Step
from embtables.lookup.store import Store

# Ids that are looked up at once.
_CHUNK = 65536


def block_of(blocks: Sequence[BlockLookup], table: str) -> tuple[BlockLookup, int]:
    """The block that looks a table up, and the number of its first lookup there.

    Raises:
        ValueError: for an unknown table.
    """
    for block in blocks:
        for number, config in enumerate(block.tables):
            if config.name == table:
                return block, number
    names = sorted({config.name for block in blocks for config in block.tables})
    raise ValueError(f"there is no table '{table}'; the tables: {', '.join(names)}")


def dense_rows(lookup: BlockLookup, number: int, rows: slice) -> Tensor:
    """The vectors ``[n, D]`` of some of a table's ids."""
    block, feature, ids = lookup.block, lookup.lookup[number], _all_ids(lookup, number, rows)
    step = Step(block.store)

    def vectors(chunk: Tensor) -> Tensor:
        of_chunk = feature.expand_as(chunk)
        values = step.gather(block.address(chunk, of_chunk), may_skip=block.may_skip)
        return block.combine(values, chunk, of_chunk, step.extra)

    with without_autocast(block.store.device):
        dense = torch.cat([vectors(chunk) for chunk in ids.split(_CHUNK)])
    dense[ids == lookup.padding[feature]] = 0
    return dense


def share_of_collisions(lookup: BlockLookup, number: int) -> float:
    """Share of a table's ids that have their whole address in common with another id."""
    feature, ids = lookup.lookup[number], _all_ids(lookup, number)
    signatures = [lookup.block.signature(chunk, feature.expand_as(chunk)) for chunk in ids.split(_CHUNK)]
    _, inverse, counts = torch.unique(torch.cat(signatures), dim=0, return_inverse=True, return_counts=True)
    return float((counts[inverse] > 1).double().mean())


def strengths_of_rows(
    l2: float, blocks: Sequence[BlockLookup], counts: Mapping[str, npt.NDArray[np.int64]]
) -> dict[str, Tensor]:
    """λ·s/n of each row: n, how often it is looked up, at least 1; s, how much of a vector's square its own makes.

    s is 1 for a row that is a vector or stands in it as it is. A row of w scalars before a projection to D dimensions,
    which begins as w orthogonal rows of length √(D/w), has s = D/w, and one of k of which the mean is taken 1/k². Lists
    differ in length, and count as one row.

    Args:
        l2: λ.
        blocks: all blocks of tables that may share rows.
        counts: ``{table name: occurrences [rows]}``; tables without them look nothing up, and padding is never looked
            up.

    Returns:
        ``[R]`` of each weight, by its attribute, float32.
    """
    store = blocks[0].block.store
    lookups = {
        w: torch.zeros(len(store.matrix(w)), dtype=torch.float64, device=store.device) for w in store.weight_names
    }
    for name, of_table in counts.items():
        own = torch.tensor(of_table, dtype=torch.float64, device=store.device)
        for weight, rows, ids in _rows_by_chunk(blocks, name):
            lookups[weight].index_add_(0, rows.clamp(min=0).flatten(), (own[ids, None] * (rows >= 0)).flatten())
    strengths = {weight: l2 / of_rows.clamp(min=1) for weight, of_rows in lookups.items()}
    recipes = [
        (table, recipe)
        for block in blocks
        if isinstance(block.block, RecipeBlock)
        for table, recipe in zip(block.tables, block.block.recipes)
    ]
    scales = {slab: s for table, recipe in recipes for slab, s in _scales(recipe, table.embedding_dim, store)}
    for slab, scale in scales.items():
        start = store.start(slab)
        strengths[store.weight_of(slab)][start : start + store.rows(slab)] *= scale
    return {weight: each.to(torch.float32) for weight, each in strengths.items()}


def _scales(recipe: Recipe, dim: int, store: Store) -> Iterator[tuple[str, float]]:
    """Each slab of a recipe, with the share s of its rows as in ``strengths_of_rows``."""
    widths = {a: store.width(a.slab) * getattr(a, "scalars", 1) for a in recipe.addresses}
    for address in recipe.addresses:
        width, projected = widths[address], recipe.projection
        if isinstance(address, Range):
            projected = address.projection
        elif recipe.combine == "concat":
            width = sum(widths[each] for each in recipe.addresses)
        scale = dim / width if projected is not None else 1.0
        yield address.slab, scale / len(recipe.addresses) ** 2 if recipe.combine == "mean" else scale
    if recipe.rest is not None:
        yield from _scales(recipe.rest, dim, store)


def _rows_by_chunk(blocks: Sequence[BlockLookup], table: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The rows of a table's ids but padding: a weight, places in it ``[C, P]``, −1 for none, and the ids ``[C]``."""
    lookup, number = block_of(blocks, table)
    feature = lookup.lookup[number]
    ids_in_use = _all_ids(lookup, number)
    for ids in ids_in_use[ids_in_use != lookup.padding[feature]].split(_CHUNK):
        for part in lookup.block.address(ids, feature.expand_as(ids)):
            rows = part.rows.unsqueeze(1) if part.rows.ndim == 1 else part.rows.flatten(1)
            yield part.weight, rows, ids if part.subset is None else ids[part.subset]


def _all_ids(lookup: BlockLookup, number: int, rows: slice = slice(None)) -> Tensor:
    table = lookup.tables[number]
    if table.rows is None:
        raise ValueError(f"table '{table.name}' has no num_embeddings, so its ids cannot be listed")
    return torch.arange(*rows.indices(table.rows), device=lookup.block.store.device)
