"""An iterator whose items are made in a thread while earlier items are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Generator[T, None, None], depth: int = 1) -> Generator[T, None, None]:
    """Yields the same items in order; one thread makes up to ``depth`` of them before they are used.

    An error while an item is made is raised where the item would have come. The thread ends, and ``items`` is closed,
    with the last item, with an error, or when this generator is closed or dropped.
    """
    done = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        pending = deque(pool.submit(next, items, done) for _ in range(depth))
        while (item := pending.popleft().result()) is not done:
            pending.append(pool.submit(next, items, done))
            yield item  # type: ignore[misc]  # it is a T, as it is not ``done``
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()
