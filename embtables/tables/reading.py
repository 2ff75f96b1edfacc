"""Reading single tables: their rows as dense vectors, and which of their ids share everything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embtables.lookup.engine import without_autocast
from embtables.lookup.features import BlockLookup
from embtables.lookup.step import Step

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


def _all_ids(lookup: BlockLookup, number: int, rows: slice = slice(None)) -> Tensor:
    table = lookup.tables[number]
    if table.rows is None:
        raise ValueError(f"table '{table.name}' has no num_embeddings, so its ids cannot be listed")
    return torch.arange(*rows.indices(table.rows), device=lookup.block.store.device)
