"""Initial weights: one standard deviation for the whole model, whatever the methods and the budget."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from embtables.config import TableConfig
from embtables.hashing import seed_for
from embtables.lookup.store import Store
from embtables.methods.base import Initializer
from embtables.plan.solver import Plan
from embtables.sizes.layout import FULL


@torch.no_grad()
def initialize(plan: Plan, store: Store, seed: int, std: float | None) -> None:
    """Fills a plan's storage; nothing yet on the meta device.

    Args:
        plan: what the store was allocated from.
        store: where the weights and codes are.
        seed: of the random numbers, which are keyed by the names of slabs and dense parameters.
        std: standard deviation of every output; ``None``: what the tables' ``init_fn`` yields, else 1/√(3·n) for the n
            ids of the largest table.

    Raises:
        ValueError: where the plan lacks the ranks of ids that a method needs.
    """
    if store.device.type == "meta":
        return
    init = Initializer(_default_std(plan.tables, seed) if std is None else std, seed)
    for g in plan.groups:
        for name in g.method.fixed_codes(g.layout):
            if name not in plan.codes:
                raise ValueError(
                    f"this plan lost '{name}', the ranking of ids, on its way through JSON: plan again with "
                    "frequencies, or read trained tables with EmbeddingTables.load"
                )
            store.code(name).copy_(torch.from_numpy(plan.codes[name]))
        g.method.initialize(g.layout, g.group, store, init)
        for table in g.group.tables:
            if table.init_fn is not None and std is None and g.layout.entries[table.name].variant == FULL:
                _call_init_fn(table, store.slab(table.name), seed)


def _default_std(tables: Sequence[TableConfig], seed: int) -> float:
    with_init = [table for table in tables if table.init_fn is not None]
    if not with_init:
        return 1 / sqrt(3 * max((table.rows or 1 for table in tables), default=1))
    largest = max(with_init, key=lambda table: table.rows or 1)
    sample = torch.empty(max(1, 65536 // largest.embedding_dim), largest.embedding_dim)
    _call_init_fn(largest, sample, seed)
    return float(sample.double().square().mean().sqrt())


def _call_init_fn(table: TableConfig, weight: Tensor, seed: int) -> None:
    """``init_fn`` draws from torch's global generator, which is seeded for it and then left as it was."""
    assert table.init_fn is not None
    with torch.random.fork_rng():
        torch.manual_seed(seed_for(seed, "init_fn", table.name))
        table.init_fn(weight)
