"""Inference over one table: bags of ids, pooled, in every precision, beside PyTorch's own packed bags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine
from benchmarks.timing import Call, Others, Progress, interleaved, within
from embtables import EmbeddingTables, TableConfig, plan

PRECISIONS = ("fp32", "bf16", "int8", "int4", "int2", "binary")
PLAIN = "nn.EmbeddingBag, fp32"
#: PyTorch's packed bags, as ``embedding_bag_*_prepack`` packs them: a scale and a bias of four bytes each in every row.
BYTES, NIBBLES = "torch.ops.quantized.embedding_bag_byte", "torch.ops.quantized.embedding_bag_4bit"
LENGTHS = (1, 10, 50)
_BATCHES = 8
Bags = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """A table of ``num_rows`` vectors of ``dim``, ``batch`` bags a call, ids drawn evenly."""

    num_rows: int
    dim: int
    batch: int = 2048
    threads: int = 1
    rounds: int = 20

    @property
    def scale(self) -> str:
        return f"{self.num_rows:,} rows"


def name_of(precision: str) -> str:
    return f"embtables full, {precision}"


def contestants(num_rows: int, dim: int) -> dict[str, Bags]:
    """Who sums the vectors of flat ids by bag, ``offsets`` with their last one; all have the same table, rounded."""
    config = TableConfig("table", num_rows, dim)
    tables = {
        precision: EmbeddingTables(plan([config], "full", precision=precision, optimizer=None)).serve().eval()
        for precision in PRECISIONS
    }
    weight = tables["fp32"].to_dense("table").detach()
    found: dict[str, Bags] = {name_of(precision): module for precision, module in tables.items()}
    found[PLAIN] = lambda ids, offsets: F.embedding_bag(ids, weight, offsets, mode="sum", include_last_offset=True)
    quantized: Any = torch.ops.quantized
    for name, kind in ((BYTES, "byte"), (NIBBLES, "4bit")):
        packed = getattr(quantized, f"embedding_bag_{kind}_prepack")(weight)
        look_up = getattr(quantized, f"embedding_bag_{kind}_rowwise_offsets")
        found[name] = _torch_bags(look_up, packed)
    return found


def _torch_bags(look_up: Any, packed: Tensor) -> Bags:
    # Scale gradients, mode (a sum), pruned weights, weights of ids, a map of pruned rows; the last offset is included.
    return lambda ids, offsets: look_up(packed, ids, offsets, False, 0, False, None, None, True)


def run(settings: Settings, progress: Progress) -> list[dict[str, Any]]:
    """A row for each contestant and length of the bags."""
    torch.set_num_threads(settings.threads)
    bags = contestants(settings.num_rows, settings.dim)
    common = {"suite": "bags", "scale": settings.scale, "dim": settings.dim, "batch": settings.batch, "status": "ok"}
    common |= {"threads": settings.threads, "ops": machine.backend(), "sitting": 0}
    rows = []
    for number, length in enumerate(LENGTHS):
        others = Others()
        with torch.no_grad():
            timings = interleaved(
                calls(bags, settings, length), settings.rounds, progress=within(progress, number, len(LENGTHS))
            )
        noise = others.share()
        rows += [
            common | {"phase": f"bags of {length}", "contestant": name, "others": noise, **timing.row()}
            for name, timing in timings.items()
        ]
    return rows


def calls(bags: Mapping[str, Bags], settings: Settings, length: int) -> dict[str, Call]:
    """What is timed: all contestants look up the same ids."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(settings.num_rows, (settings.batch * length,), generator=generator) for _ in range(_BATCHES)]
    offsets = torch.arange(0, settings.batch * length + 1, length)

    def call(look_up: Bags) -> Call:
        def of_batch(batch: int) -> None:
            look_up(ids[batch % _BATCHES], offsets)

        return of_batch

    return {name: call(look_up) for name, look_up in bags.items()}
