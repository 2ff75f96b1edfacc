"""embtables: every method with every optimizer, and full tables as ordinary parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.contestants import Built, Contestant, Skipped, one_line
from benchmarks.workload import Workload
from embtables import EmbeddingTables, Plan, TableConfig, plan
from embtables.methods import kinds

OPTIMIZERS = ("sgd", "rowwise_adagrad", "adagrad", "adam")
BUDGET = "10%"
#: Settings that are named in the tables, whatever the defaults become.
SETTINGS: dict[str, dict[str, Any]] = {
    "multi_hash": {"num_hashes": 2},
    "compositional": {"operation": "mult"},
    "robe": {"block_size": 8},
    # One lookup an id, as full tables have; by default it is two of half the width.
    "unified_one": {"kind": "unified", "width": "dim"},
    # Rows of D columns alone; by default there are narrower ones.
    "banded_whole": {"kind": "banded", "widths": []},
}
FULL = "embtables full"


def name_of(kind: str) -> str:
    """As the tables of results call a method."""
    return {
        "multi_hash": "embtables multi_hash, k = 2",
        "compositional": "embtables compositional, mult",
        "robe": "embtables robe, block 8",
        "unified_one": "embtables unified, one lookup",
        "banded_whole": "embtables banded, whole rows",
    }.get(kind, f"embtables {kind}")


def solved(work: Workload, kind: str, optimizer: str | None, precision: str = "fp32") -> Plan:
    """``kind`` at 10 % of the bytes; frequencies are known."""
    tables = [TableConfig(name, size, work.dim) for name, size in zip(work.names, work.sizes)]
    if kind == "full":
        return plan(tables, "full", None, optimizer=optimizer, precision=precision)
    settings = {key: work.dim if value == "dim" else value for key, value in SETTINGS.get(kind, {}).items()}
    return plan(tables, {"kind": kind, **settings}, BUDGET, work.frequencies, optimizer, precision=precision)


def every_method() -> list[str]:
    """Full tables first, the others with the settings that have a name here."""
    return ["full", *(k for k in kinds() if k != "full"), "unified_one", "banded_whole"]


def contestants(
    work: Workload, everything: bool = True, methods: Sequence[str] | None = None
) -> list[Contestant | Skipped]:
    """Full tables with row-wise Adagrad first: what the others are compared with.

    ``everything``: every optimizer for every method, and ordinary parameters; else compressed methods have one.
    ``methods``: if given, those that take part.
    """
    found: list[Contestant | Skipped] = []
    for kind in every_method() if methods is None else methods:
        name = name_of(kind)
        forward = True  # is timed once a method, with the first optimizer that it takes
        order = ("rowwise_adagrad", "adagrad", "sgd", "adam")
        for optimizer in order if everything or kind == "full" else order[:2]:
            try:
                p = solved(work, kind, optimizer)
            except Exception as error:
                found.append(Skipped(name, optimizer, True, one_line(error)))
                continue
            found.append(Contestant(name, optimizer, True, p.training_bytes, built(p), forward))
            forward = False
            if not (everything or kind in ("full", "compositional")):
                break
    if everything:
        size = work.full_bytes
        found += [
            Contestant(f"{FULL}, optimizer=None, sparse", "adagrad", True, 2 * size, _parameters("adagrad")),
            Contestant(f"{FULL}, optimizer=None, sparse", "adam", True, 3 * size, _parameters("adam")),
            Contestant(f"{FULL}, optimizer=None", "dense adam", True, 6 * size, _parameters("dense adam")),
        ]
    return found


def built(p: Plan) -> Callable[[Workload], Built]:
    """How the tables of a plan are built."""

    def build(work: Workload) -> Built:
        tables = EmbeddingTables(p)
        weights = [tables.store.slab(name) for name in work.names] if p.groups[0].method.kind == "full" else []
        return Built(lambda batch: tables(*work.inputs[batch % work.batches]), None, weights)

    return build


def _parameters(optimizer: str) -> Callable[[Workload], Built]:
    def build(work: Workload) -> Built:
        tables = EmbeddingTables(solved(work, "full", None), sparse=optimizer != "dense adam")
        classes = {"adagrad": torch.optim.Adagrad, "adam": torch.optim.SparseAdam, "dense adam": torch.optim.Adam}
        weights = [tables.store.slab(name) for name in work.names]
        return Built(
            lambda batch: tables(*work.inputs[batch % work.batches]), classes[optimizer](tables.parameters()), weights
        )

    return build
