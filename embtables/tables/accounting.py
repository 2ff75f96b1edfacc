"""The bytes that tables occupy, taken from the storages that exist."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from embtables.lookup.constants import constants_of
from embtables.sizes.memory import Memory, storage_bytes

if TYPE_CHECKING:
    from embtables.tables.module import EmbeddingTables


def memory_of(tables: EmbeddingTables) -> Memory:
    """Bytes of the form that these tables have at present, the trained or the served one."""
    found: Counter[str] = Counter()
    form = "serving" if tables.served else "training"
    forms = [getattr(g.layout, form) for g in tables.plan.groups]
    kinds: dict[str, str] = {code.name: code.kind for each in forms for code in each.codes}
    kinds |= {extra.name: "weights" for each in forms for extra in each.extras}
    gradients = 0
    for name, tensor, is_buffer in tables.store.tensors():
        in_rows = 0
        if name in tables.store.weight_names:
            in_rows = tensor.shape[0] * tables.store.stored_rows(name).scale_columns * tensor.itemsize
        found["scales"] += in_rows
        found[kinds.get(name, "scales") if is_buffer else "weights"] += storage_bytes([tensor]) - in_rows
        gradients += 0 if is_buffer else storage_bytes([tensor])
    by_kind = dict(+found)  # those that occur
    # The few hyper-parameters are constants, as seeds and offsets are; they are not counted.
    state = storage_bytes(tensor for name, tensor in tables.store.optimizer_state().items() if name != "hyper")
    held = sum(by_kind.values())
    changes_form = any(g.layout.serving != g.layout.training for g in tables.plan.groups)
    inference = tables.plan.inference_bytes if changes_form and not tables.served else held
    training = held + (state if tables.plan.optimizer is not None else gradients)
    if tables.served:
        training = tables.plan.training_bytes
    by_kind |= {"optimizer state": state} if state else {}
    if tables.store.rounding is not None:
        scales = storage_bytes(tables.store.rounding.buffers())
        by_kind |= {"scales": scales} if scales else {}
        training += scales
    strengths = storage_bytes(tables.store.strengths())
    by_kind |= {"regularization": strengths} if strengths else {}
    training += strengths
    constants = storage_bytes([*constants_of(tables), *tables.blocks.buffers()])
    dense = tables.plan.optimizer is None and not (tables.served or tables.store.sparse)
    return Memory(
        inference,
        training,
        tables.plan.full_bytes,
        by_kind,
        constants,
        gradients if dense else 0,
        tables.lookups.ops,
    )
