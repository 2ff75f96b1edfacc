"""Small calls, where what is around the arithmetic counts: a step of one small table, a few lookups, served tables."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks import machine, ours, rivals
from benchmarks.contestants import Contestant
from benchmarks.tables import Row
from benchmarks.timing import Call, Others, Progress, interleaved, within
from benchmarks.workload import Workload, sizes
from embtables import EmbeddingTables

BATCH = 256  # of a step
DENSE, SPARSE = f"{rivals.LOOP}, dense, no update", f"{rivals.LOOP}, sparse, no update"
SERVED_BATCHES = (1, 100, 2048)
PRECISIONS = ("fp32", "int8")
Key = tuple[str, str, str]  # contestant, optimizer, precision


@dataclass(frozen=True)
class Settings:
    """``rows``: of the small table; the 26 tables have Criteo's cardinalities divided by ``divisor``."""

    rows: int = 10_000
    divisor: int = 10
    threads: int = 2
    rounds: int = 20

    @property
    def scale(self) -> str:
        return f"1/{self.divisor}"


def run(settings: Settings, progress: Progress) -> list[Row]:
    """A row for each contestant of ``step``, of ``forward`` at batch 1 and of ``served`` at every batch."""
    torch.set_num_threads(settings.threads)
    parts = 2 + len(SERVED_BATCHES)

    def timed(number: int, phase: str, work: Workload, scale: str, calls: Mapping[Key, Call]) -> list[Row]:
        named = {" | ".join(key): call for key, call in calls.items()}
        others = Others()
        timings = interleaved(named, settings.rounds, 0.01, progress=within(progress, number, parts), most=200)
        common: Row = {"scale": scale, "dim": work.dim, "batch": work.batch, "threads": settings.threads}
        common |= {"ops": machine.backend(), "phase": phase, "sitting": 0, "status": "ok", "others": others.share()}
        rows = []
        for key, timing in timings.items():
            name, optimizer, precision = key.split(" | ")
            row = {"contestant": name, "optimizer": optimizer, "precision": precision}
            rows.append(common | row | {"ours": name.startswith("embtables")} | timing.row())
        return rows

    small = Workload([settings.rows], 16, BATCH)
    rows = timed(0, "step", small, f"{settings.rows:,} rows", steps(small))
    few = Workload(sizes(settings.divisor), 16, 1)
    rows += timed(1, "forward", few, settings.scale, lookups(few))
    gc.collect()
    tables = served(few)
    for number, batch in enumerate(SERVED_BATCHES, 2):
        work = Workload(few.sizes, 16, batch)
        rows += timed(number, "served", work, settings.scale, served_calls(work, tables))
    return rows


def steps(work: Workload) -> dict[Key, Call]:
    """A whole step of embtables, and of nn.EmbeddingBag a forward and a backward that no optimizer follows."""
    full = ours.built(ours.solved(work, "full", "rowwise_adagrad"))(work)
    found: dict[Key, Call] = {(ours.FULL, "rowwise_adagrad", "fp32"): lambda batch: full.train(batch, work.grad)}
    for name, sparse in ((DENSE, False), (SPARSE, True)):
        bag = nn.EmbeddingBag(work.num_rows, work.dim, mode="sum", sparse=sparse)
        found[name, "", "fp32"] = _without_update(work, bag)
    return found


def _without_update(work: Workload, bag: nn.EmbeddingBag) -> Call:
    def call(batch: int) -> None:
        bag.weight.grad = None
        number = batch % work.batches
        bag(work.by_feature[number], work.offsets[number][:-1]).backward(work.grad)

    return call


def lookups(work: Workload) -> dict[Key, Call]:
    """Full tables and their rivals, as they are trained."""
    found = [*ours.contestants(work, False, ["full"]), *rivals.contestants(work)]
    contestants = [c for c in found if isinstance(c, Contestant) and c.forward]
    return {(c.name, c.optimizer, "fp32"): c.build(work).look_up for c in contestants if c.name != rivals.QR}


def served(work: Workload) -> dict[tuple[str, str], EmbeddingTables]:
    """Every method in every precision, by name and precision."""
    found = {}
    for kind in ours.every_method():
        for precision in PRECISIONS:
            tables = EmbeddingTables(ours.solved(work, kind, None, precision)).serve().eval()
            found[ours.name_of(kind), precision] = tables
    return found


def served_calls(work: Workload, tables: Mapping[tuple[str, str], EmbeddingTables]) -> dict[Key, Call]:
    """Those, and what looks up the same ids without them."""
    found: dict[Key, Call] = {(name, "", precision): _look_up(work, each) for (name, precision), each in tables.items()}
    for name, build in ((rivals.LOOP, rivals.loop), (rivals.FLAT, rivals.flat)):
        found[name, "", "fp32"] = build("sgd")(work).look_up
    return found


def _look_up(work: Workload, tables: EmbeddingTables) -> Call:
    def call(batch: int) -> None:
        with torch.no_grad():
            tables(*work.inputs[batch % work.batches])

    return call
