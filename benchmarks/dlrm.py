"""A whole DLRM step over different tables, the share of it that the tables take, and the memory it needs at most."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import machine, ours, rivals
from benchmarks.contestants import Built, Contestant, Skipped, one_line, sittings
from benchmarks.tables import Row
from benchmarks.timing import Call, Others, Progress, ignore, interleaved, quartiles, within
from benchmarks.workload import Workload, sizes
from embtables.datasets import Batch
from embtables.models import DLRM

BOTTOM, TOP, NUM_DENSE = (512, 256), (512, 256), 13
ALONE = "dense part alone"


@dataclass(frozen=True)
class Settings:
    """``autocast``: whether the dense part computes in bfloat16."""

    divisor: int = 10
    autocast: bool = False
    dim: int = 16
    batch: int = 2048
    threads: int = 2
    rounds: int = 20

    @property
    def scale(self) -> str:
        return f"1/{self.divisor}"


class Given(nn.Module):
    """Stands for the tables in a model: gives the vectors that it was given."""

    vectors: Tensor

    def __init__(self, names: Sequence[str], dim: int) -> None:
        super().__init__()
        self.feature_names = self.output_names = list(names)
        self.embedding_dims = [dim] * len(names)

    def forward(self, *_: object) -> Tensor:
        return self.vectors


class Step:
    """A training step of DLRM on tables of any make.

    The dense part (bottom 512-256-D, top 512-256-1), its loss and its optimizer, fused Adam, are the same for all
    contestants. Backward runs in two parts, through the dense part down to the vectors and then through the tables, so
    that the seconds of the tables (their lookup, backward, update and the zeroing of their gradients) can be told from
    the rest; the values computed are those of one backward.
    """

    def __init__(self, work: Workload, tables: Built, autocast: bool = False) -> None:
        self.tables, self.autocast = tables, autocast
        torch.manual_seed(0)
        self.given = Given(work.names, work.dim)
        self.model = DLRM(self.given, NUM_DENSE, bottom_units=BOTTOM, top_units=TOP)  # type: ignore[arg-type]
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            Batch(
                torch.randint(2, (work.batch,), generator=generator).float(),
                torch.randn(work.batch, NUM_DENSE, generator=generator),
                ids,
                None,
            )
            for ids in work.ids
        ]

    def __call__(self, number: int) -> float:
        """One step; the seconds that the tables took of it."""
        clock, batch, optimizer = time.perf_counter, self.batches[number % len(self.batches)], self.tables.optimizer
        start = clock()
        vectors = self.tables.vectors(number)
        seconds = clock() - start
        leaf = vectors.detach().requires_grad_()
        self.given.vectors = leaf
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits = self.model(batch)
        F.binary_cross_entropy_with_logits(logits.float(), batch.labels).backward()
        self.optimizer.step()
        start = clock()
        if vectors.requires_grad:
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
            vectors.backward(leaf.grad)
            if optimizer is not None:
                optimizer.step()
        return seconds + clock() - start


def alone(work: Workload) -> Built:
    """Vectors that are there already."""
    vectors = torch.randn(work.batch, len(work.sizes) * work.dim)
    return Built(lambda batch: vectors)


def participants(work: Workload, divisor: int) -> list[Contestant | Skipped]:
    """embtables with row-wise Adagrad first, and at full size only what the question there is about."""
    found = [c for c in ours.contestants(work, False) + rivals.contestants(work, True) if c.optimizer != "sgd"]
    size = work.full_bytes
    for name, tables in ((rivals.LOOP, rivals.loop), (rivals.FLAT, rivals.flat)):
        found.append(Contestant(name, "fused dense adam", False, 4 * size, tables("fused dense adam")))
    found.append(Contestant(ALONE, "", False, 0, alone))
    # Of arrangements that differ by little beside a dense part, only FBGEMM's, the quickest rival's.
    found = [c for c in found if c.name not in {*rivals.LOOPS, *rivals.FLATS} - {rivals.LOOP, rivals.FLAT}]
    compressed = ("embtables hash", "embtables unified", "embtables compositional")
    if divisor == 1:
        return [
            c
            for c in found
            if (c.name, c.optimizer) == (ours.FULL, "rowwise_adagrad")
            or c.name == ALONE
            or (c.name in (rivals.LOOP, rivals.FLAT) and "dense" in c.optimizer)
            or (c.name in rivals.TBES and c.optimizer == "rowwise_adagrad")
        ]
    return [c for c in found if not c.ours or c.name.startswith((ours.FULL, *compressed))]


def run(settings: Settings, progress: Progress) -> list[Row]:
    """A row a contestant, with the share of the step that its tables took."""
    torch.set_num_threads(settings.threads)
    work = Workload(sizes(settings.divisor), settings.dim, settings.batch)
    return measure(work, settings, participants(work, settings.divisor), progress)


def measure(
    work: Workload, settings: Settings, found: list[Contestant | Skipped], progress: Progress = ignore
) -> list[Row]:
    common: Row = {"suite": "dlrm", "scale": settings.scale, "dim": work.dim, "batch": work.batch}
    common |= {"threads": settings.threads, "ops": machine.backend()}
    common |= {"precision": "bf16" if settings.autocast else "fp32", "phase": "step"}
    skipped = [c for c in found if isinstance(c, Skipped)]
    contestants = [c for c in found if isinstance(c, Contestant) and c.step]
    groups, too_large = sittings(contestants, machine.spare_bytes())
    rows = []
    for number, group in enumerate(groups):
        calls: dict[str, Call] = {}
        for c in group:
            try:
                step = Step(work, c.build(work), settings.autocast)
                step(0)
                calls[f"{c.name} | {c.optimizer}"] = step
            except Exception as error:
                skipped.append(Skipped(c.name, c.optimizer, c.ours, one_line(error)))
        others = Others()
        timings = interleaved(
            calls,
            settings.rounds,
            turn=0.15,
            progress=within(progress, number, len(groups)),
        )
        noise = others.share()
        for key, timing in timings.items():
            name, _, optimizer = key.partition(" | ")
            row = common | {"contestant": name, "optimizer": optimizer, "ours": name.startswith("embtables")}
            row |= {"sitting": number, "status": "ok", "others": noise, **timing.row()}
            if name == ALONE:
                row["kind"] = "ceiling"
            shares = [part / whole for part, whole in zip(timing.returned, timing.wall)]
            row |= {"table_share": quartiles(shares)[1], "table_ms": 1e3 * quartiles(timing.returned)[1]}
            rows.append(row | {"examples_per_second": 1e3 * work.batch / float(row["median_ms"])})
        del calls, step
        gc.collect()
    for s in [*skipped, *too_large]:
        row = {"contestant": s.name, "optimizer": s.optimizer, "ours": s.ours}
        rows.append(common | row | {"status": "skipped", "reason": s.reason})
    return rows


# ---- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """``method``: of embtables, or ``None`` for the dense part alone."""

    method: str | None
    optimizer: str = ""
    divisor: int = 10
    batch: int = 2048
    threads: int = 2
    steps: int = 30


def peak(settings: Memory, progress: Progress) -> list[Row]:
    """The most memory that a process needs to build the tables and train; meant for a process that does nothing else.

    What came before, the modules and the making of the batches, counts with what of it is still held.
    """
    torch.set_num_threads(settings.threads)
    work = Workload(sizes(settings.divisor), 16, settings.batch)
    training_bytes = 0
    p = ours.solved(work, settings.method, settings.optimizer) if settings.method is not None else None
    vars(work).pop("frequencies", None)
    gc.collect()
    # At its first backward from a gradient that is given, as that of tables is here, PyTorch imports tens of megabytes.
    torch.ones(1, requires_grad=True).clone().backward(torch.ones(1))
    forget_peak()
    if p is None:
        tables = alone(work)
    else:
        training_bytes = p.training_bytes
        tables = ours.built(p)(work)
    step = Step(work, tables)
    for number in range(settings.steps):
        step(number)
        progress((number + 1) / settings.steps)
    name = ALONE if settings.method is None else ours.name_of(settings.method)
    row: Row = {"suite": "memory", "scale": f"1/{settings.divisor}", "dim": 16, "batch": settings.batch}
    row |= {"threads": settings.threads, "ops": machine.backend(), "contestant": name, "status": "ok"}
    row |= {"optimizer": settings.optimizer, "ours": settings.method is not None}
    return [row | {"training_bytes": training_bytes, "peak_bytes": peak_bytes()}]


def peak_bytes() -> int:
    """Most resident memory of this process; not ``ru_maxrss``, which is inherited from the process that started it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Begins to count anew, where Linux lets it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
