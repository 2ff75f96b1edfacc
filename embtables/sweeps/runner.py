"""Runs commands side by side in processes of their own, and leaves none behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from embtables._util.interrupts import interruptible

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Job:
    """A command, whose first word is a path, and the file that receives what it prints."""

    name: str
    command: Sequence[str]
    log: Path


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


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)


def last_line(log: Path) -> str:
    """The last line with text in it, without colors and without the prefix of an error."""
    text = _ANSI.sub("", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else ""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_job(jobs: int) -> int:
    """An equal share of the cores, and never more than the caller's own OMP_NUM_THREADS."""
    share = max(1, cores() // jobs)
    wish = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(wish)) if wish.isdigit() and int(wish) > 0 else share


def run_jobs(
    jobs: Iterable[Job], parallel: int, on_start: Callable[[Job], None] = lambda job: None, lock: int | None = None
) -> Iterator[Ended]:
    """Run `jobs`, `parallel` at a time, and yield each as it ends.

    Leaving the iteration early, by an error, Ctrl-C or SIGTERM, ends the processes that still run. Should this
    process be killed outright, Linux ends them too; elsewhere they share `lock`, so that it is held until they end.
    """
    environment = _environment(threads_per_job(parallel))
    waiting = iter(jobs)
    running: list[_Running] = []
    with interruptible():
        try:
            while True:
                while len(running) < parallel and (job := next(waiting, None)) is not None:
                    on_start(job)
                    running.append(_Running(job, _start(job, environment, lock)))
                if not running:
                    return
                time.sleep(POLL_SECONDS)
                for item in [item for item in running if item.process.poll() is not None]:
                    running.remove(item)
                    yield Ended(item.job, item.process.returncode, time.monotonic() - item.started)
        finally:
            _stop([item.process for item in running])


def _environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS")
    return {**os.environ, **{name: str(threads) for name in names}, "PYTHONUNBUFFERED": "1"}


def _start(job: Job, environment: dict[str, str], lock: int | None) -> subprocess.Popen[bytes]:
    with job.log.open("wb") as log:
        return subprocess.Popen(
            [*_dying_with_parent(), *job.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=() if lock is None else (lock,),
            # A group of its own: Ctrl-C in the terminal reaches this process alone, which then ends the group.
            start_new_session=True,
        )


# Asks Linux (PR_SET_PDEATHSIG) to kill this process when its parent dies, and becomes the command: the wish outlasts
# exec. (A preexec_fn would do without the detour, but may hang where another thread held a lock at the fork.)
_DYING = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, int(signal.SIGKILL)); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


def _dying_with_parent() -> list[str]:
    return [sys.executable, "-I", "-S", "-c", _DYING, str(os.getpid())] if sys.platform == "linux" else []


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                try:
                    os.killpg(process.pid, sign)
                except ProcessLookupError:
                    pass
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(POLL_SECONDS)
