"""The tables by themselves: a forward without gradients, and a training step (forward, backward, update)."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import machine, ours, rivals
from benchmarks.contestants import Built, Contestant, Skipped, one_line, sittings
from benchmarks.timing import Call, Others, Progress, ignore, interleaved, within
from benchmarks.workload import Workload, sizes

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """One configuration: cardinalities divided by ``divisor``, vectors of ``dim``, examples, threads.

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

    @property
    def scale(self) -> str:
        return f"1/{self.divisor}"


def run(settings: Settings, progress: Progress) -> list[Row]:
    """A row for each contestant and each of ``forward`` and ``step``."""
    torch.set_num_threads(settings.threads)
    work = Workload(sizes(settings.divisor), settings.dim, settings.batch)
    return measure(work, settings, participants(work, settings), progress)


def participants(work: Workload, settings: Settings) -> list[Contestant | Skipped]:
    found = ours.contestants(work, settings.everything)
    if settings.rivals:
        found += rivals.contestants(work, settings.everything)
    only = {tuple(pair) for pair in settings.only}
    return [c for c in found if (c.name, c.optimizer) in only] if only else found


def measure(
    work: Workload, settings: Settings, found: list[Contestant | Skipped], progress: Progress = ignore
) -> list[Row]:
    common = {k: v for k, v in asdict(settings).items() if k in ("dim", "batch", "threads")}
    common |= {"suite": "tables", "scale": settings.scale, "ops": machine.backend()}
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
        timings = interleaved(contestants, settings.rounds, progress=within(progress, half, 2))
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
