"""What users did before each row of a log."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class Histories:
    """Finds, for each row of a log, the rows of the same user at strictly earlier times.

    Args:
        users: the user of each row, int64.
        times: the time of each row, ascending.
        remembered: bool, the rows that histories hold, for example those with label 1.
        cap: the most rows per history; the latest are kept.

    Attribute ``lengths`` holds the number of earlier rows of each row before it is cut to ``cap``.
    """

    def __init__(self, users: np.ndarray, times: np.ndarray, remembered: np.ndarray, cap: int) -> None:
        order = np.argsort(users, kind="stable")  # by user, then time
        users, times, remembered = users[order], times[order], remembered[order]
        before = np.cumsum(remembered) - remembered  # remembered rows of anybody before each place
        new_user = np.r_[True, users[1:] != users[:-1]]
        new_instant = new_user | np.r_[True, times[1:] != times[:-1]]
        places = np.arange(len(order))
        first_of_user = before[np.maximum.accumulate(np.where(new_user, places, 0))]
        end = before[np.maximum.accumulate(np.where(new_instant, places, 0))]
        self._rows = order[remembered]
        self.lengths = np.empty_like(end)
        self._end = np.empty_like(end)
        self._end[order] = end
        self.lengths[order] = end - first_of_user
        self._begin = self._end - np.minimum(self.lengths, cap)

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The histories of the given rows: earlier rows, oldest first, one history after another, and offsets."""
        places, offsets = ranges(self._begin[rows], self._end[rows])
        return self._rows[places], offsets


@dataclass
class Events:
    """What users did elsewhere, as parallel arrays in any order. Histories then hold events, not rows of the log."""

    users: np.ndarray  # keys, all of them of users of the log
    times: np.ndarray  # ms
    values: dict[str, np.ndarray]  # keys, by the feature of the item whose history they are


class EventHistories:
    """Finds, for each row of a log, the events of its user at strictly earlier times, as ``Histories`` does for rows.

    ``users`` and the users of the events are numbered from 0 in the same way.
    """

    def __init__(self, users: np.ndarray, times: np.ndarray, events: Events, cap: int) -> None:
        first = min(times.min(), events.times.min(initial=times.min()))
        span = max(times.max(), events.times.max(initial=times.max())) - first + 1
        codes = events.users * span + (events.times - first)  # in the order of users and, of each, of time
        self._order = np.argsort(codes, kind="stable")
        codes = codes[self._order]
        self._end = np.searchsorted(codes, users * span + (times - first))
        self.lengths = self._end - np.searchsorted(codes, users * span)
        self._begin = self._end - np.minimum(self.lengths, cap)

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places, offsets = ranges(self._begin[rows], self._end[rows])
        return self._order[places], offsets


class LatestEvents:
    """Keeps those events of a stream that histories can hold, so that memory does not grow with the stream.

    ``users`` and ``times`` are the rows that will have histories. Between two rows of a user the latest ``cap`` events
    are kept; what follows the last row, and what other users do, is dropped.
    """

    def __init__(self, users: np.ndarray, times: np.ndarray, cap: int) -> None:
        self._users = np.unique(users)
        self._first, self._span = int(times.min()), int(times.max()) - int(times.min()) + 2
        self._rows = np.unique(self._code(np.searchsorted(self._users, users), times))
        self._cap = cap
        self._kept: list[dict[str, np.ndarray]] = []
        self._pending = self._settled = 0

    def _code(self, users: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Users and times as one number that is in order of both; times before the first row are alike."""
        return users * self._span + np.clip(times - self._first + 1, 0, self._span - 1)

    def add(self, users: np.ndarray, times: np.ndarray, values: dict[str, np.ndarray]) -> None:
        user = np.minimum(np.searchsorted(self._users, users), len(self._users) - 1)
        row = np.searchsorted(self._rows, self._code(user, times), side="right")  # the first that comes after it
        inside = (self._users[user] == users) & (row < len(self._rows))
        inside[inside] = self._rows[row[inside]] // self._span == user[inside]
        part = {"row": row, "time": times} | values
        self._kept.append({name: column[inside] for name, column in part.items()})
        self._pending += int(inside.sum())
        if self._pending > max(2**20, self._settled // 4):
            self._settle()

    def _settle(self) -> None:
        row, time = (np.concatenate([part[name] for part in self._kept]) for name in ("row", "time"))
        order = np.lexsort((time, row))
        row = row[order]
        order = order[np.searchsorted(row, row, side="right") - np.arange(len(row)) <= self._cap]
        del row, time
        self._kept = [{name: np.concatenate([part[name] for part in self._kept])[order] for name in self._kept[0]}]
        self._pending, self._settled = 0, len(order)

    def events(self) -> Events:
        self._settle()
        columns = self._kept[0]
        users = self._users[self._rows[columns["row"]] // self._span]
        return Events(users, columns["time"], {name: columns[name] for name in columns if name not in ("row", "time")})


def ranges(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The integers of all ranges ``begin[i] … end[i] − 1``, one range after another, and where each range begins."""
    offsets = np.r_[0, np.cumsum(end - begin)]
    return np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], end - begin), offsets
