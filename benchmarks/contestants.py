"""What takes part: tables with an optimizer, all of them called in the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.workload import Workload


class Built(NamedTuple):
    """A contestant's tables.

    ``vectors``: from the number of a batch to ``[B, F·D]``, under autograd. ``optimizer``: what updates the tables
    after ``backward``; ``None`` where backward does it. ``weights``: views ``[n, D]`` of the full tables, for tests.
    """

    vectors: Callable[[int], Tensor]
    optimizer: torch.optim.Optimizer | None = None
    weights: Sequence[Tensor] = ()

    def look_up(self, batch: int) -> None:
        with torch.no_grad():
            self.vectors(batch)

    def train(self, batch: int, grad: Tensor) -> None:
        """Forward, backward and update."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        self.vectors(batch).backward(grad)
        if self.optimizer is not None:
            self.optimizer.step()


class Contestant(NamedTuple):
    """Tables that have not been built.

    ``name`` and ``optimizer`` identify it; ``ours``: whether it is embtables; ``num_bytes``: of weights and state, and
    of gradients that are as large; ``forward``, ``step``: what of it is timed.
    """

    name: str
    optimizer: str
    ours: bool
    num_bytes: int
    build: Callable[[Workload], Built]
    forward: bool = False
    step: bool = True


class Skipped(NamedTuple):
    """One that cannot take part, and why, in one sentence."""

    name: str
    optimizer: str
    ours: bool
    reason: str


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def sittings(contestants: Sequence[Contestant], limit: int) -> tuple[list[list[Contestant]], list[Skipped]]:
    """Contestants that fit into ``limit`` bytes together, the first one among each of them; and those that never do.

    Times of different sittings are compared by way of the first contestant, which all have in common.
    """
    first, *others = contestants
    groups, used = [[first]], [first.num_bytes]
    left_out = []
    for contestant in others:
        if first.num_bytes + contestant.num_bytes > limit:
            reason = (
                f"needs {contestant.num_bytes / 1e9:.1f} GB beside the {first.num_bytes / 1e9:.1f} GB of "
                f"{first.name}; {limit / 1e9:.1f} GB are free"
            )
            left_out.append(Skipped(contestant.name, contestant.optimizer, contestant.ours, reason))
            continue
        for i, group in enumerate(groups):
            if used[i] + contestant.num_bytes <= limit:
                group.append(contestant)
                used[i] += contestant.num_bytes
                break
        else:
            groups.append([first, contestant])
            used.append(first.num_bytes + contestant.num_bytes)
    return groups, left_out
