"""Where a whole DLRM step goes, and what tables without a fused optimizer cost.

    python -m benchmarks.step                    # two or three minutes on two cores
    python -m benchmarks.step --only precisions
    python -m benchmarks.step --only optimizers --divisor 100 --json

Each part is one interleaved run; tables are the 26 of Criteo, cardinalities divided by --divisor, D = 16:

- precisions: a step of DLRM (bottom 512-256-16, top 512-256-1, fused Adam) over full tables with row-wise Adagrad, in
  fp32 and bf16, as it is and compiled, beside the same model on vectors that are there already; and the parts of it.
- histories: a step of DIN as it is by default, over tables of its own: two histories of 0 to 40 entries.
- optimizers: the tables alone, with fused optimizers and as ordinary parameters under torch.optim.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, ours
from benchmarks.contestants import Built
from benchmarks.dlrm import BOTTOM, NUM_DENSE, TOP, Given, alone
from benchmarks.tables import Row
from benchmarks.timing import Others, Progress, ignore, interleaved, quartiles, within
from benchmarks.workload import Workload, sizes
from embtables import EmbeddingTables, TableConfig, plan
from embtables.datasets import Batch, Jagged
from embtables.models import DIN, DLRM

PARTS = ("lookup", "dense forward", "dense backward", "dense optimizer", "tables' update")


@dataclass(frozen=True)
class Settings:
    """``rounds``: turns of each contestant; ``compiled``: whether compiled ones take part, which needs a compiler."""

    divisor: int = 10
    dim: int = 16
    batch: int = 2048
    threads: int = 2
    rounds: int = 20
    compiled: bool = True


class Step:
    """A training step that notes the seconds of its parts. ``parts``: those of each call."""

    def __init__(self, work: Workload, tables: Built, bf16: bool, compiled: bool) -> None:
        self.tables, self.bf16 = tables, bf16
        torch.manual_seed(0)
        self.given = Given(work.names, work.dim)
        self.model = DLRM(self.given, NUM_DENSE, bottom_units=BOTTOM, top_units=TOP)  # type: ignore[arg-type]
        if compiled:
            # As training.compile does: what looks up stays outside of the graphs.
            self.given.forward = torch.compiler.disable(self.given.forward)  # type: ignore[method-assign]
            self.model.compile(dynamic=False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)
        self.batches = [
            Batch(torch.randint(2, (work.batch,)).float(), torch.randn(work.batch, NUM_DENSE), ids, None)
            for ids in work.ids
        ]
        self.parts: dict[str, list[float]] = defaultdict(list)

    def __call__(self, number: int) -> float:
        """One step; the seconds that the tables took of it."""
        batch = self.batches[number % len(self.batches)]
        times = [time.perf_counter()]
        vectors = self.tables.vectors(number)
        times.append(time.perf_counter())
        leaf = self.given.vectors = vectors.detach().requires_grad_()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = self.model(batch)
        loss = F.binary_cross_entropy_with_logits(logits.float(), batch.labels)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self.optimizer.step()
        times.append(time.perf_counter())
        if vectors.requires_grad:
            vectors.backward(leaf.grad)
        times.append(time.perf_counter())
        for part, start, end in zip(PARTS, times, times[1:]):
            self.parts[part].append(end - start)
        return self.parts["lookup"][-1] + self.parts["tables' update"][-1]


def precisions(settings: Settings, progress: Progress = ignore) -> list[Row]:
    """A row for each of fp32 and bf16, as it is and compiled, with tables and without: times, parts, the tables' share.

    ``first_s`` is the first call, in which torch compiles, or finds in a cache what it compiled before.
    """
    torch.set_num_threads(settings.threads)
    work = Workload(sizes(settings.divisor), settings.dim, settings.batch)
    over: dict[str, Callable[[Workload], Built]] = {
        "with tables": ours.built(ours.solved(work, "full", "rowwise_adagrad")),
        "dense part alone": alone,
    }
    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    for compiled in (False, True) if settings.compiled else (False,):
        for bf16 in (False, True):
            for name, build in over.items():
                key = f"{name}|{'bf16' if bf16 else 'fp32'}|{'compiled' if compiled else 'eager'}"
                steps[key] = Step(work, build(work), bf16, compiled)
                start = time.perf_counter()
                steps[key](0)
                first[key] = time.perf_counter() - start
    others = Others()
    timings = interleaved(steps, settings.rounds, turn=0.15, progress=progress)
    rows = []
    for key, timing in timings.items():
        name, precision, mode = key.split("|")
        row = _common(settings, "step") | {"contestant": name, "precision": precision, "mode": mode}
        row |= {"first_s": first[key], "others": others.share(), **timing.row()}
        shares = [part / whole for part, whole in zip(timing.returned, timing.wall)]
        row |= {"table_share": quartiles(shares)[1]}
        row |= {f"{part} ms": 1e3 * quartiles(seconds)[1] for part, seconds in steps[key].parts.items()}
        rows.append(row | {"examples_per_second": 1e3 * work.batch / float(row["median_ms"])})
    return rows


def histories(settings: Settings, progress: Progress = ignore) -> list[Row]:
    """A row for each of fp32 and bf16, as it is and compiled, of DIN over tables with row-wise Adagrad."""
    torch.set_num_threads(settings.threads)
    size, dim = settings.batch, settings.dim
    ids = {"user": 100_000, "item": 50_000, "category": 500}
    configs = [TableConfig("user", ids["user"], dim)]
    configs += [TableConfig(n, ids[n], dim, [n, f"{n}_history"], pooling="mean") for n in ("item", "category")]
    generator = torch.Generator().manual_seed(0)

    def draw(number: int, *shape: int) -> Tensor:
        return torch.randint(number, shape, generator=generator)

    batches = []
    for _ in range(8):
        offsets = F.pad(draw(41, size).cumsum(0), (1, 0))
        lists = {f"{n}_history": Jagged(draw(ids[n], int(offsets[-1])), offsets) for n in ("item", "category")}
        plain = torch.stack([draw(number, size) for number in ids.values()], dim=1)
        batches.append(Batch(draw(2, size).float(), torch.randn(size, 4, generator=generator), plain, None, lists))

    def step(bf16: bool, compiled: bool) -> Callable[[int], None]:
        torch.manual_seed(0)
        tables = EmbeddingTables(plan(configs, "full"))
        model = DIN(tables, 4)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        if compiled:
            tables.lookup = torch.compiler.disable(tables.lookup)  # type: ignore[method-assign]
            model.compile(dynamic=True)

        def run(number: int) -> None:
            batch = batches[number % len(batches)]
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(batch)
            F.binary_cross_entropy_with_logits(logits.float(), batch.labels).backward()
            optimizer.step()

        return run

    steps: dict[str, Callable[[int], None]] = {}
    first: dict[str, float] = {}
    for compiled in (False, True) if settings.compiled else (False,):
        for bf16 in (False, True):
            key = f"{'bf16' if bf16 else 'fp32'}|{'compiled' if compiled else 'eager'}"
            steps[key] = step(bf16, compiled)
            start = time.perf_counter()
            steps[key](0)
            first[key] = time.perf_counter() - start
    others = Others()
    rows = []
    for key, timing in interleaved(steps, settings.rounds, turn=0.15, progress=progress).items():
        precision, mode = key.split("|")
        row = _common(settings, "histories") | {"contestant": "DIN", "precision": precision, "mode": mode}
        rows.append(row | {"scale": "", "first_s": first[key], "others": others.share(), **timing.row()})
    return rows


def optimizers(settings: Settings, progress: Progress = ignore) -> list[Row]:
    """A row for each way to train the same full tables: lookup, backward and update."""
    torch.set_num_threads(settings.threads)
    work = Workload(sizes(settings.divisor), settings.dim, settings.batch)
    tables: dict[str, Built] = {}
    for kind in ("rowwise_adagrad", "adam"):
        tables[f'optimizer="{kind}"'] = ours.built(ours.solved(work, "full", kind))(work)
    for name, sparse, make in (
        ("None, sparse, SGD", True, lambda p: torch.optim.SGD(p, lr=0.01)),
        ("None, sparse, Adagrad", True, lambda p: torch.optim.Adagrad(p, lr=0.01)),
        ("None, sparse, SparseAdam", True, lambda p: torch.optim.SparseAdam(p, lr=0.01)),
        ("None, dense, Adam(fused=True)", False, lambda p: torch.optim.Adam(p, lr=0.01, fused=True)),
        ("None, dense, Adam", False, lambda p: torch.optim.Adam(p, lr=0.01)),
    ):
        module = EmbeddingTables(ours.solved(work, "full", None), sparse=sparse)
        tables[f"optimizer={name}"] = Built(
            lambda i, m=module: m(work.ids[i % work.batches]), make([*module.parameters()])
        )

    def call(built: Built) -> Callable[[int], None]:
        return lambda number: built.train(number, work.grad)

    others = Others()
    timings = interleaved(
        {name: call(built) for name, built in tables.items()}, settings.rounds, 0.1, progress=progress
    )
    return [
        _common(settings, "optimizer") | {"contestant": name, "others": others.share(), **timing.row()}
        for name, timing in timings.items()
    ]


def run(settings: Settings, progress: Progress = ignore) -> list[Row]:
    """The rows of all parts."""
    rows = []
    for number, part in enumerate(MEASURES.values()):
        rows += part(settings, within(progress, number, len(MEASURES)))
        gc.collect()
    return rows


MEASURES: dict[str, Callable[[Settings, Progress], list[Row]]] = {
    "precisions": precisions,
    "histories": histories,
    "optimizers": optimizers,
}


def _common(settings: Settings, phase: str) -> Row:
    row: Row = {"suite": "step", "phase": phase, "scale": f"1/{settings.divisor}", "dim": settings.dim}
    return row | {"batch": settings.batch, "threads": settings.threads, "ops": machine.backend(), "status": "ok"}


def show(rows: list[Row]) -> str:
    """The rows as text, with ratios to the first of their kind."""
    lines = []
    whole = [row for row in rows if row["phase"] == "step"]
    if whole:
        head = f"{'whole step':34} {'ms':>7} {'min':>7} {'ratio':>6} {'of min':>6} {'tables':>7} {'first s':>8}"
        lines.append(f"{head}   parts, ms")
    for row in whole:
        parts = "  ".join(f"{part} {row[f'{part} ms']:.2f}" for part in PARTS)
        name = f"{row['contestant']}, {row['precision']}, {row['mode']}"
        lines.append(
            f"{name:34} {row['median_ms']:7.2f} {row['min_ms']:7.2f} {row['median_ms'] / whole[0]['median_ms']:6.2f} "
            f"{row['min_ms'] / whole[0]['min_ms']:6.2f} {row['table_share']:7.1%} {row['first_s']:8.1f}   {parts}"
        )
    for phase, title in (("histories", "DIN"), ("optimizer", "tables alone")):
        found = [row for row in rows if row["phase"] == phase]
        if found:
            lines.append(f"{title:34} {'ms':>7} {'min':>7} {'ratio':>6} {'of min':>6}")
        for row in found:
            name = row["contestant"] if phase == "optimizer" else f"{row['precision']}, {row['mode']}"
            ratio, of_min = (row[kind] / found[0][kind] for kind in ("median_ms", "min_ms"))
            lines.append(f"{name:34} {row['median_ms']:7.2f} {row['min_ms']:7.2f} {ratio:6.2f} {of_min:6.2f}")
    doubts = sorted({f"{row['contestant']}: {row['distrust']}" for row in rows if row["distrust"]})
    return "\n".join([*lines, *(f"not to be trusted: {doubt}" for doubt in doubts)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(MEASURES), help="one of the parts")
    parser.add_argument("--divisor", type=int, default=10, help="of cardinalities above 1,000 (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2048, help="examples a step (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contestant (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave compiled models out")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    given = parser.parse_args()
    settings = Settings(given.divisor, 16, given.batch, given.threads, given.rounds, not given.no_compile)
    rows = run(settings) if given.only is None else MEASURES[given.only](settings, ignore)
    print(json.dumps(rows, indent=1) if given.json else show(rows))


if __name__ == "__main__":
    main()
