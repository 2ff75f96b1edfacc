"""SIGINT and SIGTERM alike: either is a ``KeyboardInterrupt``, after which what is unfinished is cleared away."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_REPEATED_SECONDS = 2.0
"""Who stops a process often signals twice: within so many seconds of the first, further signals do not count."""


class Received:
    """Which signal has come; ``code`` is the exit code that tells it, as shells do."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.at = 0.0

    @property
    def code(self) -> int:
        return 128 + (self.number or signal.SIGINT)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self.at = number, time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self.at > _REPEATED_SECONDS:
            os._exit(self.code)  # clearing away takes too long for whoever waits


@contextmanager
def interruptible() -> Iterator[Received]:
    """Has SIGINT and SIGTERM raise ``KeyboardInterrupt`` once; asked for again later, they end the process at once.

    In other threads than the main one, where signals cannot be set, nothing is changed. Inside of another such block
    it is that block's signals which count.
    """
    outer = signal.getsignal(signal.SIGTERM)
    if isinstance(outer, Received):
        yield outer
        return
    received = Received()
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            # What the caller ignores, as nohup does, stays ignored.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, received)
    except ValueError:
        pass
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
