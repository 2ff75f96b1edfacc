"""Initial weights: one standard deviation for the whole model, but for tables that bring a function of their own."""

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

# Up to this size a compressed table's ``init_fn`` is shown a tensor of the table's own shape (64 MiB).
_MOST_SCALARS = 2**24


@torch.no_grad()
def initialize(plan: Plan, store: Store, seed: int, std: float | None) -> None:
    """Fills a plan's storage; nothing yet on the meta device.

    A table that is trained in full is filled by its ``init_fn``, where it has one. A compressed one takes the spread of
    its function, and a storage that tables share the root mean square of theirs.

    Args:
        plan: what the store was allocated from.
        store: where the weights and codes are.
        seed: of the random numbers, which are keyed by the names of slabs and dense parameters.
        std: standard deviation of the outputs of tables without ``init_fn``; ``None``: 1/√(3·n) for the n ids of the
            largest table.

    Raises:
        ValueError: where the plan lacks the ranks of ids that a method needs, or a table's ``init_fn`` fails.
    """
    if store.device.type == "meta":
        return
    default = 1 / sqrt(3 * max((table.rows or 1 for table in plan.tables), default=1)) if std is None else std
    for g in plan.groups:
        for name in g.method.fixed_codes(g.layout):
            if name not in plan.codes:
                raise ValueError(
                    f"this plan lost '{name}', the ranking of ids, on its way through JSON: plan again with "
                    "frequencies, or read trained tables with EmbeddingTables.load"
                )
            store.code(name).copy_(torch.from_numpy(plan.codes[name]))
        shapes = {slab.name: (slab.rows, slab.width) for slab in g.layout.training.slabs}
        in_full = [t for t in g.group.tables if t.init_fn and shapes.get(t.name) == (t.rows, t.embedding_dim)]
        own = {t.name: default if t.init_fn is None or t in in_full else _spread(t, seed) for t in g.group.tables}
        g.method.initialize(g.layout, g.group, store, Initializer(_joint(list(own.values())), seed, own))
        for table in in_full:
            weight = store.slab(table.name)[: table.num_embeddings]
            values = weight.to(store.dtype)  # itself, unless it is stored in fewer bits
            _call_init_fn(table, values, seed)
            weight.copy_(values)


def _joint(own: Sequence[float]) -> float:
    """The root mean square; where all are the same, that very number."""
    return own[0] if len(set(own)) == 1 else sqrt(sum(std**2 for std in own) / len(own))


def _spread(table: TableConfig, seed: int) -> float:
    """The root mean square of what ``init_fn`` fills a tensor of the table's shape with, or a part of a large one."""
    most = max(1, _MOST_SCALARS // table.embedding_dim)
    sample = torch.empty(min(table.num_embeddings or most, most), table.embedding_dim)
    _call_init_fn(table, sample, seed)
    return float(sample.double().square().mean().sqrt())


def _call_init_fn(table: TableConfig, weight: Tensor, seed: int) -> None:
    """``init_fn`` draws from torch's global generator, which is seeded for it and then left as it was."""
    assert table.init_fn is not None
    with torch.random.fork_rng():
        torch.manual_seed(seed_for(seed, "init_fn", table.name))
        try:
            table.init_fn(weight)
        except Exception as error:
            part = "" if weight.shape[0] == table.num_embeddings else ", a part of the table, which is compressed,"
            raise ValueError(
                f"table '{table.name}': its init_fn failed on a tensor {list(weight.shape)}{part} with: {error}"
            ) from error
