"""Which rows of a plan training can round as they are served."""

from __future__ import annotations

from embtables.formats import FP32
from embtables.plan.solver import Plan


def rounded_slabs(plan: Plan) -> list[str]:
    """The slabs that are served in another format than fp32 and the one in which they are trained.

    Raises:
        ValueError: for a method that serves something else than the rows that it trains, in another format than fp32:
            no row of it is rounded by itself.
    """
    found = []
    for g in plan.groups:
        served = {slab.name: slab for slab in g.layout.serving.slabs}
        formats = {g.group.format.name, *(slab.format for slab in served.values())}
        for slab in g.layout.training.slabs:
            other = served.get(slab.name)
            if other is not None and (other.rows, other.width) == (slab.rows, slab.width):
                found += [slab.name] if other.format not in (slab.format, FP32.name) else []
            elif formats != {FP32.name}:
                raise ValueError(
                    f"method {g.method.kind} serves something else than the rows that it trains, so training cannot "
                    f"round these as {next(name for name in formats if name != FP32.name)} does: train it without "
                    "quantization, or say precision: fp32 in it"
                )
    return found
