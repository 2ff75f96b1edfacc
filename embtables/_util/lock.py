"""The lock on the folder of a run or a sweep, and on an output that is not there yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from embtables._util.files import hold, let_go, lock_beside, lock_in, naming

_PATIENCE_SECONDS = 2.0


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Holds ``folder`` for this process; the system lets go of it when the process ends, however it does.

    Yields:
        The descriptor of the lock, for children that shall hold it too.

    Raises:
        ValueError: another process holds it.
    """
    lock = lock_in(folder)
    # Cells of a process that was killed a moment ago may need one to die.
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with naming(folder):
            held = _try(lock)
        if held is not None:
            break
        if time.monotonic() > deadline:
            raise ValueError(
                f"{folder} is in use by process {_owner(lock)}: wait for it, stop it, or give another --out"
            )
        time.sleep(0.1)
    try:
        yield held
    finally:
        let_go(lock, held)


@contextmanager
def only_one(output: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds an output for this process, and waits while another one holds it; ``on_wait`` is called before that."""
    lock = lock_beside(output)
    held = _try(lock)
    if held is None:
        on_wait()
    while held is None:
        time.sleep(0.1)
        held = _try(lock)
    try:
        yield
    finally:
        let_go(lock, held)


def _try(lock: Path) -> int | None:
    try:
        return hold(lock)
    except BlockingIOError:
        return None


def _owner(lock: Path) -> str:
    try:
        return lock.read_text(encoding="utf-8").strip() or "?"
    except (OSError, UnicodeDecodeError):
        return "?"
