"""Reading tables: their rows as dense vectors, which of their ids share everything, and how often others share rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

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


def counts_of_rows(blocks: Sequence[BlockLookup], counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How often the rows of each id are looked up by all ids of all tables that share them, the mean over its rows.

    With a row of its own alone that is how often the id itself occurs.

    Args:
        blocks: all blocks of tables that may share rows.
        counts: ``{table name: occurrences [rows]}``.

    Returns:
        ``{table name: [rows]}``, fp32, on the device of the counts.
    """
    store = blocks[0].block.store
    lookups = {
        w: torch.zeros(len(store.matrix(w)), dtype=torch.float64, device=store.device) for w in store.weight_names
    }
    for name, of_table in counts.items():
        own = of_table.to(store.device, torch.float64)
        for weight, rows, ids in _rows_by_chunk(blocks, name):
            lookups[weight].index_add_(0, rows.clamp(min=0).flatten(), (own[ids, None] * (rows >= 0)).flatten())
    found = {}
    for name, of_table in counts.items():
        total, number = (torch.zeros(len(of_table), dtype=torch.float64, device=store.device) for _ in range(2))
        for weight, rows, ids in _rows_by_chunk(blocks, name):
            total.index_add_(0, ids, (lookups[weight][rows.clamp(min=0)] * (rows >= 0)).sum(1))
            number.index_add_(0, ids, (rows >= 0).sum(1).double())
        mean = torch.where(number > 0, total / number.clamp(min=1), of_table.to(total))
        found[name] = mean.to(of_table.device, torch.float32)
    return found


def _rows_by_chunk(blocks: Sequence[BlockLookup], table: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The rows of all ids of a table: a weight, places in it ``[C, P]``, −1 for none, and the ids ``[C]`` that ask."""
    lookup, number = block_of(blocks, table)
    feature = lookup.lookup[number]
    for ids in _all_ids(lookup, number).split(_CHUNK):
        for part in lookup.block.address(ids, feature.expand_as(ids)):
            rows = part.rows.unsqueeze(1) if part.rows.ndim == 1 else part.rows.flatten(1)
            yield part.weight, rows, ids if part.subset is None else ids[part.subset]


def _all_ids(lookup: BlockLookup, number: int, rows: slice = slice(None)) -> Tensor:
    table = lookup.tables[number]
    if table.rows is None:
        raise ValueError(f"table '{table.name}' has no num_embeddings, so its ids cannot be listed")
    return torch.arange(*rows.indices(table.rows), device=lookup.block.store.device)
