"""``Embedding`` in the place of ``nn.Embedding`` in a small model of histories: the time of a whole step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import machine, ours
from benchmarks.rivals import LR
from benchmarks.tables import Row
from benchmarks.timing import Call, Others, Progress, interleaved
from benchmarks.workload import Workload
from embtables import Embedding

PLAIN, ALONE = "nn.Embedding, sparse", "dense part alone"
LENGTH, DIM = 50, 16  # items of a history, and of their vectors the scalars


@dataclass(frozen=True)
class Settings:
    """Histories of 50 of ``rows`` items, ``batch`` of them a step."""

    rows: int = 1_000_000
    batch: int = 256
    threads: int = 2
    rounds: int = 10

    @property
    def scale(self) -> str:
        return f"{self.rows:,} rows"


class Scorer(nn.Module):
    """Scores the last item by what it has to do with the others: attention over them, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(DIM, DIM)
        self.layers = nn.Sequential(nn.Linear(2 * DIM, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits ``[B]`` of ``[B, 51, D]``."""
        history, item = vectors[:, :-1], vectors[:, -1]
        attention = torch.einsum("bld,bd->bl", history, self.query(item)).softmax(1)
        summary = torch.einsum("bl,bld->bd", attention, history)
        logits: Tensor = self.layers(torch.cat([summary, item], dim=1)).squeeze(1)
        return logits


class Items(NamedTuple):
    """``vectors``: of ids ``[B, L]``; ``optimizer``: where backward does not update the table; ``weight``: of it."""

    vectors: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer | None = None
    weight: Tensor | None = None


def items(rows: int) -> dict[tuple[str, str], Items]:
    """The item tables, by contestant and optimizer, and vectors that are there already."""
    found: dict[tuple[str, str], Items] = {}
    for optimizer in ("rowwise_adagrad", "adagrad"):
        table = Embedding(rows, DIM, optimizer={"kind": optimizer, "lr": LR})
        found[ours.FULL, optimizer] = Items(table, None, table.tables.store.slab(table.name))
    plain = nn.Embedding(rows, DIM, sparse=True)
    nn.init.normal_(plain.weight, std=1 / DIM)  # as Embedding
    adagrad = torch.optim.Adagrad(plain.parameters(), lr=LR, eps=1e-8)  # likewise; gradients are small here
    found[PLAIN, "adagrad"] = Items(plain, adagrad, plain.weight.detach())
    return found


def alone(batch: int) -> Items:
    vectors = torch.randn(batch, LENGTH + 1, DIM)
    return Items(lambda ids: vectors)


def step(given: Items, ids: list[Tensor], labels: Tensor) -> Call:
    """A training step over the batches of ids in turn; the dense part is the same for all."""
    torch.manual_seed(0)
    model = Scorer()
    dense = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    optimizers = [dense] if given.optimizer is None else [dense, given.optimizer]

    def call(batch: int) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        logits = model(given.vectors(ids[batch % len(ids)]))
        F.binary_cross_entropy_with_logits(logits, labels).backward()
        for optimizer in optimizers:
            optimizer.step()

    return call


def run(settings: Settings, progress: Progress) -> list[Row]:
    """A row a contestant."""
    torch.set_num_threads(settings.threads)
    work = Workload([settings.rows], DIM, settings.batch * (LENGTH + 1), batches=8)
    ids = [batch.view(settings.batch, LENGTH + 1) for batch in work.by_feature]
    labels = torch.randint(2, (settings.batch,), generator=torch.Generator().manual_seed(0)).float()
    every = items(settings.rows) | {(ALONE, ""): alone(settings.batch)}
    calls = {" | ".join(key): step(given, ids, labels) for key, given in every.items()}
    others = Others()
    timings = interleaved(calls, settings.rounds, progress=progress)
    common: Row = {"scale": settings.scale, "dim": DIM, "batch": settings.batch, "threads": settings.threads}
    common |= {"ops": machine.backend(), "phase": "step", "sitting": 0, "status": "ok", "others": others.share()}
    rows = []
    for key, timing in timings.items():
        name, optimizer = key.split(" | ")
        row = common | {"contestant": name, "optimizer": optimizer, "ours": name == ours.FULL} | timing.row()
        rows.append(row | ({"kind": "ceiling"} if name == ALONE else {}))
    return rows
