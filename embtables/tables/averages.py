"""The running mean of the weights, as a store of its own."""

from __future__ import annotations

import torch

from embtables.formats import FP32
from embtables.lookup.store import Store
from embtables.plan.solver import Plan


@torch.no_grad()
def mean_of(store: Store, plan: Plan) -> Store:
    """The mean of the weights of a store, and its codes: in fp32, or what the store was cast to.

    Args:
        store: where the tables of the plan are trained, with an optimizer that keeps a running mean.
        plan: that of the tables.
    """
    forms = [g.layout.training.in_format(FP32.name) for g in plan.groups]
    mean = Store(forms, None, trainable=False, device=store.device)
    mean.to(store.dtype)
    for weight in store.weight_names:
        rows = store.running_mean(weight)
        for slab in store.slabs_of(weight):
            start = store.start(slab)
            mean.slab(slab).copy_(rows[start : start + store.rows(slab)])
    for name, tensor in mean.stored().items():
        if name not in mean.weight_names:
            tensor.copy_(store.running_mean(name) if tensor.is_floating_point() else store.tensor(name))
    return mean
