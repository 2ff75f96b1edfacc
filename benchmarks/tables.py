"""The tables by themselves: a forward without gradients, and a training step (forward, backward, update)."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import machine, ours, rivals
from benchmarks.contestants import Built, Contestant, Skipped, one_line, sittings
from benchmarks.timing import Call, Others, Progress, ignore, interleaved, within
from benchmarks.workload import BAGS, CARDINALITIES, ONE_ID, UNEVEN, Workload, sizes

Row = dict[str, Any]
#: Of Criteo's features those that have bags: the largest one, a small one, and between.
FEATURES_WITH_BAGS = (0, 2, 9, 15, 21)
_IDS = 2**21  # drawn for a configuration, unless four batches need more


@dataclass(frozen=True)
class Settings:
    """One configuration: Criteo's cardinalities divided by ``divisor``, vectors of ``dim``, examples, threads.

    ``rows``: if not 0, there are ``tables`` tables of so many rows instead. ``bags``: a key of ``BAGS``, which all
    features of those have, and of Criteo's five; where there are bags or other tables than Criteo's, full ones alone
    take part, with row-wise Adagrad and Adagrad, and ``compositional``, which quotient–remainder bags are compared to.
    ``everything``: every method with every optimizer and dense Adam; else one optimizer for a compressed method.
    ``rivals``: whether others than embtables take part. ``only``: if not empty, the ``(name, optimizer)`` that do.
    """

    divisor: int = 10
    dim: int = 16
    batch: int = 2048
    threads: int = 2
    ops: str = "native"
    everything: bool = True
    rivals: bool = True
    only: tuple[tuple[str, str], ...] = ()
    rounds: int = 20
    rows: int = 0
    tables: int = 1
    bags: str = ONE_ID

    @property
    def scale(self) -> str:
        if not self.rows:
            return f"1/{self.divisor}"
        return f"{self.rows:,} rows" if self.tables == 1 else f"{self.tables:,} × {self.rows:,} rows"

    @property
    def is_pooled(self) -> bool:
        """Whether there are bags, or other tables than Criteo's."""
        return self.rows > 0 or self.bags != ONE_ID


def run(settings: Settings, progress: Progress) -> list[Row]:
    """A row for each contestant and each of ``forward`` and ``step``."""
    torch.set_num_threads(settings.threads)
    work = workload(settings)
    return measure(work, settings, participants(work, settings), progress)


def workload(settings: Settings) -> Workload:
    """What is looked up; of large batches there are fewer, so that they are drawn in the time of a few calls."""
    length = BAGS[settings.bags]
    if settings.rows:
        counts, bags = [settings.rows] * settings.tables, [length] * settings.tables
    else:
        counts = sizes(settings.divisor)
        bags = [length if number in FEATURES_WITH_BAGS else 1 for number in range(len(CARDINALITIES))]
    batches = max(4, min(16, _IDS // (settings.batch * sum(bags)))) if settings.is_pooled else 16
    return Workload(counts, settings.dim, settings.batch, batches, bags=bags, uneven=settings.bags == UNEVEN)


def participants(work: Workload, settings: Settings) -> list[Contestant | Skipped]:
    methods = (["full"] if settings.rows else ["full", "compositional"]) if settings.is_pooled else None
    found = ours.contestants(work, settings.everything, methods)
    if settings.rivals:
        found += rivals.contestants(work, settings.everything)
    if settings.is_pooled:
        found = [c for c in found if c.optimizer in ("rowwise_adagrad", "adagrad") and "optimizer=None" not in c.name]
    only = {tuple(pair) for pair in settings.only}
    return [c for c in found if (c.name, c.optimizer) in only] if only else found


def measure(
    work: Workload, settings: Settings, found: list[Contestant | Skipped], progress: Progress = ignore
) -> list[Row]:
    common = {k: v for k, v in asdict(settings).items() if k in ("dim", "batch", "threads", "bags")}
    common |= {"scale": settings.scale, "ops": machine.backend()}
    skipped = [c for c in found if isinstance(c, Skipped)]
    limit = machine.spare_bytes() - (machine.TABLE_BYTES if _with_ceiling(settings) else 0)
    groups, too_large = sittings([c for c in found if isinstance(c, Contestant)], limit)
    rows = []
    for number, group in enumerate(groups):
        sitting, failed = _sitting(work, settings, group, number, within(progress, number, len(groups)))
        rows += [common | row for row in sitting]
        skipped += failed
        gc.collect()
    for s in [*skipped, *too_large]:
        row = {"phase": "step", "contestant": s.name, "optimizer": s.optimizer, "ours": s.ours}
        rows.append(common | row | {"status": "skipped", "reason": s.reason})
    return rows


def _sitting(
    work: Workload, settings: Settings, group: list[Contestant], number: int, progress: Progress
) -> tuple[list[Row], list[Skipped]]:
    """Everything that fits into memory together, timed in turns."""
    built: dict[tuple[str, str], tuple[Contestant, Built]] = {}
    failed = []
    for contestant in group:
        try:
            tables = contestant.build(work)
            tables.train(0, work.grad) if contestant.step else tables.look_up(0)
            built[contestant.name, contestant.optimizer] = (contestant, tables)
        except Exception as error:
            failed.append(Skipped(contestant.name, contestant.optimizer, contestant.ours, one_line(error)))
    calls: dict[str, dict[str, Call]] = {
        "forward": {_key(c): t.look_up for c, t in built.values() if c.forward},
        "step": {_key(c): _step(t, work) for c, t in built.values() if c.step},
    }
    if _with_ceiling(settings) and number == 0:
        calls["forward"] |= machine.gathers(work.dim, work.num_ids)
    rows = []
    for half, (phase, contestants) in enumerate(calls.items()):
        others = Others()
        # Calls of small batches take microseconds: there are many of them in short turns.
        turns: dict[str, Any] = {"turn": 0.02, "most": 100} if settings.is_pooled else {}
        timings = interleaved(contestants, settings.rounds, progress=within(progress, half, 2), **turns)
        noise = others.share()
        for key, timing in timings.items():
            name, _, optimizer = key.partition(" | ")
            row: Row = {"phase": phase, "contestant": name, "optimizer": optimizer, "sitting": number}
            row["ours"] = name.startswith("embtables")
            if not optimizer:
                row["kind"] = "ceiling"
            row |= {"status": "ok", "others": noise, **timing.row()}
            rows.append(row | {"examples_per_second": 1e3 * work.batch / row["median_ms"]})
    return rows, failed


def _with_ceiling(settings: Settings) -> bool:
    """Whether rows at random are fetched too, in the same turns as the forward over the largest tables."""
    return settings.divisor == 1 and settings.rivals


def _key(contestant: Contestant) -> str:
    return f"{contestant.name} | {contestant.optimizer}"


def _step(tables: Built, work: Workload) -> Call:
    return lambda batch: tables.train(batch, work.grad)


def ceilings(threads: int, rounds: int, progress: Progress) -> list[Row]:
    """Copying, and a million random rows of 64 bytes a call."""
    torch.set_num_threads(threads)
    count = 2**20
    copy, num_bytes = machine.copies()
    calls: dict[str, Call] = {"copy": copy} | machine.gathers(16, count)
    others = Others()
    timings = interleaved(calls, rounds, turn=0.2, progress=progress)
    rows = []
    for name, timing in timings.items():
        row: Row = {"suite": "machine", "threads": threads, "contestant": name, "kind": "ceiling", "status": "ok"}
        row |= {"ops": machine.backend(), "others": others.share(), **timing.row()}
        seconds = row["median_ms"] / 1e3
        row |= {"bytes_per_second": num_bytes / seconds} if name == "copy" else {"rows_per_second": count / seconds}
        rows.append(row)
    return rows
