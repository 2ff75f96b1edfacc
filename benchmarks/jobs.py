"""What is measured, in which order, and in processes of their own: a job is one configuration of one suite."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import bags, dlrm, frameworks, ours, rivals, sequence, small, step, tables
from benchmarks.timing import Progress, ignore
from benchmarks.workload import BAGS, ONE_ID

ROOT = Path(__file__).resolve().parents[1]
SUITES = (
    *("machine", "tables", "pooled", "bags", "small", "sequence", "dlrm", "step", "memory", "frameworks", "data"),
    "scaling",
)
_THREADS = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"
MODES = ("quick", "default", "full")
#: One table of a million rows, which is also what scaling begins from.
ROWS, DIM, BATCH = 1_000_000, 16, 2048
BATCHES = (1, 16, 256, BATCH, 10_000, 16_384)


@dataclass(frozen=True)
class Ceilings:
    """The machine's memory: see ``tables.ceilings``."""

    threads: int
    rounds: int = 10


@dataclass(frozen=True)
class Reading:
    """Preparing text and reading it back: see ``benchmarks.data``."""

    rows: int
    rounds: int
    threads: int


def _read(settings: Reading, progress: Progress) -> list[tables.Row]:
    from benchmarks import data  # polars and pyarrow, which no other job has in its memory

    found = data.run(data.Settings(settings.rows, rounds=settings.rounds), progress)
    common = {"suite": "data", "threads": settings.threads, "status": "ok"}
    return [common | {"contestant": row.pop("name"), **row} for row in found]


Settings = (
    tables.Settings
    | bags.Settings
    | small.Settings
    | sequence.Settings
    | dlrm.Settings
    | step.Settings
    | dlrm.Memory
    | frameworks.Settings
    | Ceilings
    | Reading
)
_SETTINGS: dict[str, type[Any]] = {
    "machine": Ceilings,
    "tables": tables.Settings,
    "pooled": tables.Settings,
    "scaling": tables.Settings,
    "bags": bags.Settings,
    "small": small.Settings,
    "sequence": sequence.Settings,
    "dlrm": dlrm.Settings,
    "step": step.Settings,
    "memory": dlrm.Memory,
    "frameworks": frameworks.Settings,
    "data": Reading,
}
_RUN: dict[str, Callable[[Any, Progress], list[tables.Row]]] = {
    "machine": lambda s, progress: tables.ceilings(s.threads, s.rounds, progress),
    "tables": tables.run,
    "pooled": tables.run,
    "scaling": tables.run,
    "bags": bags.run,
    "small": small.run,
    "sequence": sequence.run,
    "dlrm": dlrm.run,
    "step": step.run,
    "memory": dlrm.peak,
    "frameworks": frameworks.run,
    "data": _read,
}


@dataclass(frozen=True)
class Job:
    suite: str
    settings: Settings

    @property
    def name(self) -> str:
        """Unique, and short enough for a progress bar."""
        s = self.settings
        if isinstance(s, Ceilings):
            return f"machine: {_threads(s.threads)}"
        if isinstance(s, Reading):
            return f"data: {s.rows:,} rows, {_threads(s.threads)}"
        if isinstance(s, tables.Settings):
            parts = [s.scale, f"D = {s.dim}", f"batch {s.batch}", _threads(s.threads)]
            if s.is_pooled:
                parts.insert(2, s.bags)
            if s.ops != "native":
                parts.append(f"{s.ops} ops")
            return f"{self.suite}: {', '.join(parts)}"
        if isinstance(s, bags.Settings):
            return f"bags: {s.scale}, D = {s.dim}, {_threads(s.threads)}"
        if isinstance(s, small.Settings):
            return f"small calls: {_threads(s.threads)}"
        if isinstance(s, sequence.Settings):
            return f"sequence: {s.scale}, batch {s.batch}, {_threads(s.threads)}"
        if isinstance(s, dlrm.Settings):
            return f"DLRM: {s.scale}, {'bf16' if s.autocast else 'fp32'}, {_threads(s.threads)}"
        if isinstance(s, step.Settings):
            return f"step: 1/{s.divisor}, {_threads(s.threads)}"
        if isinstance(s, dlrm.Memory):
            who = f"{s.method}, {s.optimizer}" if s.method else dlrm.ALONE
            return f"memory: 1/{s.divisor}, {who}, {_threads(s.threads)}"
        names = frameworks.OURS if s.ours else frameworks.RIVALS
        return f"end to end: {names[s.model]}, {_threads(s.threads)}, {s.repeat + 1}"

    def dumps(self) -> str:
        return json.dumps({"suite": self.suite, "settings": asdict(self.settings)})

    @staticmethod
    def loads(text: str) -> Job:
        data = json.loads(text)
        return Job(data["suite"], _SETTINGS[data["suite"]](**data["settings"]))

    def run_here(self, progress: Progress) -> list[tables.Row]:
        return [{"suite": self.suite, **row} for row in _RUN[self.suite](self.settings, progress)]


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number > 1)}"


def planned(mode: str, suites: Sequence[str], threads: int) -> list[Job]:
    """All jobs of a mode, those that the table of targets needs first."""
    found: list[Job] = []

    def add(suite: str, *settings: Settings) -> None:
        if suite in suites:
            found.extend(Job(suite, s) for s in settings)

    quick = mode == "quick"
    rounds = 6 if quick else 20
    for number in (threads,) if quick or threads == 1 else (1, threads):
        add("machine", Ceilings(number, 4 if quick else 10))
    add("tables", tables.Settings(threads=threads, rounds=rounds, everything=not quick))
    if not quick:
        add("tables", tables.Settings(1, threads=threads, rounds=10, everything=mode == "full"))
    _add_pooled(add, quick, threads)
    # Beyond the caches, and within them.
    for num_rows, dim in ((1_000_000, 16), (1_000_000, 64), (20_000, 16)):
        add("bags", bags.Settings(num_rows, dim, rounds=rounds))
    for number in (threads,) if quick else sorted({1, threads}):
        add("small", small.Settings(threads=number, rounds=rounds))
        for batch in (256,) if quick else (256, BATCH):
            add("sequence", sequence.Settings(batch=batch, threads=number, rounds=rounds // 2))
    add("dlrm", dlrm.Settings(threads=threads, rounds=rounds // 2))
    if not quick:
        add("dlrm", dlrm.Settings(autocast=True, threads=threads, rounds=10))
        add("dlrm", dlrm.Settings(1, threads=threads, rounds=6))
        add("step", step.Settings(threads=threads, rounds=10))
    _add_memory(add, quick, threads)
    for repeat in range(1 if quick else 2):
        for model in frameworks.RIVALS:
            for is_ours in (True, False) if repeat % 2 == 0 else (False, True):
                steps = 10 if quick else 30
                add("frameworks", frameworks.Settings(model, is_ours, steps, threads=threads, repeat=repeat))
    if not quick:
        add("data", Reading(500_000, 3, threads))
    if mode == "default":
        axis = tables.Settings(threads=threads, everything=False, rounds=10)
        add("tables", replace(axis, ops="reference", rivals=False))
        if threads > 1:
            add("tables", replace(axis, threads=1))
        add("tables", replace(axis, batch=512), replace(axis, batch=8192), replace(axis, dim=64))
        # 8.65 GB of weights for each contestant: two at a time.
        only = ((ours.FULL, "rowwise_adagrad"), (rivals.TBE_ONE_UNCHECKED, "rowwise_adagrad"), (rivals.FLAT, "sgd"))
        add("tables", replace(axis, divisor=1, dim=64, only=only))
    if not quick:
        _add_scaling(add, threads)
    if mode == "full":
        done = {job.name for job in found}
        product = [
            Job("tables", tables.Settings(divisor, dim, batch, number, ops, rivals=ops == "native", rounds=10))
            for divisor in (10, 1)
            for dim in (16, 64)
            for batch in (512, 2048, 8192)
            for number in sorted({1, threads})
            for ops in ("native", "reference")
        ]
        found += [job for job in product if job.name not in done and "tables" in suites]
    return found


def _add_pooled(add: Callable[..., None], quick: bool, threads: int) -> None:
    one = tables.Settings(rows=ROWS, threads=threads, rounds=10)
    if quick:
        add("pooled", *(replace(one, bags=bags, batch=256) for bags in (ONE_ID, "10 ids")))
        return
    for number in sorted({1, threads}):
        for length in BAGS:
            add("pooled", *(replace(one, bags=length, batch=batch, threads=number) for batch in BATCHES))
    add("pooled", *(replace(one, rows=0, bags=length, batch=BATCH) for length in BAGS if length != ONE_ID))


def _add_scaling(add: Callable[..., None], threads: int) -> None:
    """Other numbers of rows, and widths, than ``pooled`` has, whose batches and bags are further axes; many tables."""
    only = (
        *((ours.FULL, "rowwise_adagrad"), (rivals.LOOP, "adagrad"), (rivals.FLAT, "adagrad")),
        *((name, "rowwise_adagrad") for name in (rivals.TBE, rivals.TBE_UNCHECKED, rivals.TBE_ONE_UNCHECKED)),
    )
    one = tables.Settings(threads=threads, rounds=5, only=only)
    add("scaling", *(replace(one, rows=10**n, bags="10 ids", batch=BATCH) for n in (4, 5, 7, 8)))
    add(
        "scaling",
        *(replace(one, rows=ROWS, dim=dim, bags="10 ids", batch=BATCH) for dim in (4, 8, 24, 48, 64, 96, 128)),
    )
    add("scaling", *(replace(one, rows=10_000, tables=number, batch=256) for number in (1, 10, 100, 1000, 2000)))


def _add_memory(add: Callable[..., None], quick: bool, threads: int) -> None:
    add("memory", dlrm.Memory(None, threads=threads), dlrm.Memory("full", "rowwise_adagrad", threads=threads))
    if not quick:
        add("memory", *(dlrm.Memory("full", optimizer, threads=threads) for optimizer in ("sgd", "adagrad", "adam")))
        # Compressed tables of the large scale alone: those of the small one take 23 MB, of which the dense part's peak
        # varies by two thirds from process to process.
        add("memory", dlrm.Memory(None, divisor=1, threads=threads))
        methods = ("full", "hash", "compositional")
        add("memory", *(dlrm.Memory(m, "rowwise_adagrad", 1, threads=threads) for m in methods))


class JobFailed(Exception):
    """A process that ended without a result; the message says how."""


def in_a_process(job: Job, progress: Progress = ignore) -> list[tables.Row]:
    """Runs a job in a fresh process with its own threads and operators, whose memory is gone afterwards.

    Raises:
        JobFailed: with the last line that the process wrote.
    """
    settings = job.settings
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "EMBTABLES_OPS": getattr(settings, "ops", "native")}
    environment |= {name: str(settings.threads) for name in _THREADS}
    if environment["EMBTABLES_OPS"] == "native":
        # The default: native where it was built, and the reference operators elsewhere.
        environment.pop("EMBTABLES_OPS")
    command = [sys.executable, "-m", "benchmarks.jobs", job.dumps()]
    rows = None
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                kind, _, value = line.partition(" ")
                if kind == "progress":
                    progress(float(value))
                elif kind == "rows":
                    rows = json.loads(value)
            process.wait()
        finally:
            process.kill()
        errors.seek(0)
        lines = [line for line in errors if line.strip()]
    if process.returncode or rows is None:
        raise JobFailed(lines[-1].strip() if lines else _ending(process.returncode))
    return list(rows)


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "it was killed, as the system does where memory runs out; close other programs"
    return f"it ended with exit code {code}"


def serve(text: str) -> None:
    """What the process of a job does: progress and rows go to standard output, a line each."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print is no part of the answer

    def progress(share: float) -> None:
        out.write(f"progress {share:.4f}\n")

    rows = Job.loads(text).run_here(progress)
    out.write("rows " + json.dumps(rows) + "\n")


if __name__ == "__main__":
    serve(sys.argv[1])
