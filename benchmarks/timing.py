"""Calls of several contestants, timed in turns; and whether the machine was quiet enough to believe the times."""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Call = Callable[[int], "float | None"]
Progress = Callable[[float], None]  # is told the share that is done

#: Above these a time is not to be trusted.
SPREAD = 0.25  # between the quartiles, as a share of the median
WAITING = 0.10  # of the wall time in which not even one thread ran
OTHERS = 0.05  # of the machine's processor time used by other processes, or taken by the hypervisor


def ignore(share: float) -> None:
    """For those who show no progress."""


def within(progress: Progress, number: int, count: int) -> Progress:
    """The progress of part ``number`` of ``count`` equal ones."""
    return lambda share: progress((number + share) / count)


@dataclass
class Timing:
    """Seconds a call: of wall clock, of CPU (all threads of the process), and what the call returned, if anything."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    returned: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Milliseconds a call, and the reason not to trust them (empty where there is none)."""
        low, median, high = quartiles(self.wall)
        return {
            "median_ms": 1e3 * median,
            "min_ms": 1e3 * min(self.wall),
            "q1_ms": 1e3 * low,
            "q3_ms": 1e3 * high,
            "p99_ms": 1e3 * sorted(self.wall)[99 * len(self.wall) // 100],
            "cpu_ms": 1e3 * statistics.median(self.cpu),
            "calls": len(self.wall),
            "distrust": distrust(self.wall, self.cpu),
        }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def distrust(wall: Sequence[float], cpu: Sequence[float]) -> str:
    """Why these times are not to be trusted, in a few words; empty where they are.

    A benchmark that computes keeps at least one thread running. Where its CPU time is below its wall time, it waited
    for a core.
    """
    low, median, high = quartiles(wall)
    reasons = []
    if len(wall) < 3:
        reasons.append(f"only {len(wall)} call{'s' * (len(wall) > 1)}")
    if high - low > SPREAD * median:
        reasons.append(f"quartiles {(high - low) / median:.0%} of the median apart")
    if sum(cpu) < (1 - WAITING) * sum(wall):
        reasons.append(f"waited for a core {1 - sum(cpu) / sum(wall):.0%} of the time")
    return ", ".join(reasons)


def interleaved(
    contestants: Mapping[str, Call],
    rounds: int,
    turn: float = 0.04,
    seed: int = 0,
    progress: Progress = ignore,
    most: int = 10,
) -> dict[str, Timing]:
    """Times all contestants in turns, so that a drift of the machine's speed meets all alike.

    In every round each has one turn, in an order that is drawn anew: a call that is not timed, after which its tables
    are in the caches as they would be in training, then as many timed calls as fit into ``turn`` seconds, at least one
    and at most ``most``. One whose call takes longer than a turn has a turn in every n-th round only, in at least five
    rounds (all, if there are fewer). Python's garbage collection waits until the end of a turn.

    A contestant is called with 0, 1, 2, …, the number of its batch; what it returns is kept beside the times.
    """
    timings = {name: Timing() for name in contestants}
    number = dict.fromkeys(contestants, 0)

    def call(name: str) -> tuple[float, float, float | None]:
        batch, number[name] = number[name], number[name] + 1
        cpu, wall = time.process_time(), time.perf_counter()
        returned = contestants[name](batch)
        return time.perf_counter() - wall, time.process_time() - cpu, returned

    expected = {}
    for name in contestants:  # the first call also allocates the optimizer's state
        call(name)
        expected[name] = min(call(name)[0] for _ in range(2))
    order = list(contestants)
    shuffler = random.Random(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_number in range(rounds):
            shuffler.shuffle(order)
            for name in order:
                every = min(max(1, round(expected[name] / turn)), max(1, rounds // 5))
                if round_number % every:
                    continue
                call(name)
                for _ in range(min(most, max(1, int(turn / expected[name])))):
                    wall, cpu, returned = call(name)
                    timings[name].wall.append(wall)
                    timings[name].cpu.append(cpu)
                    if returned is not None:
                        timings[name].returned.append(returned)
                gc.collect(0)
            progress((round_number + 1) / rounds)
    finally:
        if collecting:
            gc.enable()
    return timings


class Others:
    """The share of the machine's processor time that went to other processes since this was made."""

    def __init__(self) -> None:
        self._wall, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def share(self) -> float | None:
        """Between 0 and 1; ``None`` where the system does not say."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        available = (time.perf_counter() - self._wall) * (os.cpu_count() or 1)
        others = (busy - self._busy) - (_own_seconds() - self._own)
        return min(1.0, max(0.0, others / available)) if available > 0 else 0.0


def _busy_seconds() -> float | None:
    """Processor time of all processes, with what the hypervisor took away."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
