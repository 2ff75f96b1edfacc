"""The lock on the directory of a run or a sweep."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_PATIENCE_SECONDS = 2.0


@contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """Hold `folder` for this process; the system lets go of it when the process ends, however it does.

    Raises:
        ValueError: another process holds it.
    """
    with open(folder / ".lock", "a+", encoding="utf-8") as lock:
        # Cells of a process that was killed a moment ago may need one to die.
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    lock.seek(0)
                    owner = lock.read().strip()
                    raise ValueError(
                        f"{folder} is in use by process {owner or '?'}: wait for it, stop it, or give another --out"
                    ) from None
                time.sleep(0.1)
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield lock
