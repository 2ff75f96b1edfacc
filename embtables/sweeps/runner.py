"""Runs commands side by side, here in processes of their own or wherever else, and leaves none behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from embtables._util.interrupts import interruptible

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Job:
    """A command of Python, whose path is the first word, and the file that receives what it prints.

    `runs` are the folders that it writes, as the command names them; `environment` is added to that of this process.
    """

    name: str
    command: Sequence[str]
    log: Path
    runs: Sequence[Path] = ()
    working_directory: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a job ended: its exit code (negative: the signal that killed it) and the last line it printed."""

    job: Job
    code: int
    seconds: float

    @property
    def message(self) -> str:
        """One sentence for a job that failed."""
        if self.code < 0:
            name = signal.Signals(-self.code).name
            memory = ", perhaps for want of memory" if name == "SIGKILL" else ""
            return f"killed by {name}{memory}"
        return last_line(self.job.log) or f"ended with code {self.code} and printed nothing"


class Running(Protocol):
    """A job that was started."""

    def poll(self) -> int | None:
        """The exit code, as :class:`Ended` has it; None while there is none."""

    def stop(self, sign: signal.Signals) -> None:
        """Asks the job to end by SIGTERM, or ends it by SIGKILL; nothing where it has ended."""


class Workers(Protocol):
    """Where jobs run: :class:`Processes` of this machine, or others."""

    @property
    def threads(self) -> int:
        """Those of each job."""

    @property
    def folder(self) -> Path:
        """The sweep's folder, as the commands of jobs name it."""

    def start(self, job: Job) -> Running:
        """Starts `job`, and does not wait for it."""


def last_line(log: Path) -> str:
    """The last line with text in it, without colors and without the prefix of an error."""
    text = _ANSI.sub("", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else ""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_job(jobs: int, machines: Sequence[int] | None = None) -> int:
    """The most threads with which `jobs` fit at once, one a core, and never more than the caller's OMP_NUM_THREADS.

    `machines` are the cores of each machine; without it there is this one.
    """
    machines = [cores()] if machines is None else machines
    fitting = (n for n in range(max(machines), 0, -1) if sum(each // n for each in machines) >= jobs)
    share = next(fitting, 1)
    wish = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(wish)) if wish.isdigit() and int(wish) > 0 else share


def run_jobs(
    jobs: Iterable[Job], parallel: int, workers: Workers, on_start: Callable[[Job], None] = lambda job: None
) -> Iterator[Ended]:
    """Run `jobs` by `workers`, `parallel` at a time, and yield each as it ends.

    Leaving the iteration early, by an error, Ctrl-C or SIGTERM, ends those that still run.
    """
    waiting = iter(jobs)
    running: list[tuple[Job, Running, float]] = []
    with interruptible():
        try:
            while True:
                while len(running) < parallel and (job := next(waiting, None)) is not None:
                    on_start(job)
                    running.append((job, workers.start(job), time.monotonic()))
                if not running:
                    return
                time.sleep(POLL_SECONDS)
                for item in list(running):
                    job, run, started = item
                    code = run.poll()
                    if code is not None:
                        running.remove(item)
                        yield Ended(job, code, time.monotonic() - started)
        finally:
            _stop([run for _, run, _ in running])


@dataclass(frozen=True)
class Processes:
    """Jobs in processes of this machine.

    Should this process be killed outright, Linux ends them too; elsewhere they share `lock`, so that it is held until
    they end.
    """

    threads: int
    folder: Path = Path()
    lock: int | None = None

    def start(self, job: Job) -> Running:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS")
        threads = {name: str(self.threads) for name in names}
        with job.log.open("wb") as log:
            return _Process(
                [*_dying_with_parent(), *job.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=job.working_directory,
                env={**os.environ, **job.environment, **threads, "PYTHONUNBUFFERED": "1"},
                pass_fds=() if self.lock is None else (self.lock,),
                # A group of its own: Ctrl-C in the terminal reaches this process alone, which then ends the group.
                start_new_session=True,
            )


class _Process(subprocess.Popen[bytes]):
    def stop(self, sign: signal.Signals) -> None:
        if self.poll() is None:
            try:
                os.killpg(self.pid, sign)
            except ProcessLookupError:
                pass


# Asks Linux (PR_SET_PDEATHSIG) to kill this process when its parent dies, and becomes the command: the wish outlasts
# exec. (A preexec_fn would do without the detour, but may hang where another thread held a lock at the fork.)
_DYING = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, int(signal.SIGKILL)); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


def _dying_with_parent() -> list[str]:
    return [sys.executable, "-I", "-S", "-c", _DYING, str(os.getpid())] if sys.platform == "linux" else []


def _stop(running: Sequence[Running]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for run in running:
            run.stop(sign)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and any(run.poll() is None for run in running):
            time.sleep(POLL_SECONDS)
