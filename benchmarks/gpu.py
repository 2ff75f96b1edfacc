"""The tables on a GPU, against nn.EmbeddingBag with sparse optimizers and against copying memory.

    python -m benchmarks.gpu                                       # a few minutes
    python -m benchmarks.gpu --divisor 1 --dims 16,64 --batches 65536 --out runs/bench-gpu-full

Workload: the 26 cardinalities of Criteo-Kaggle, those above 1,000 divided by --divisor, one id a feature, Zipf 1.05;
and bags of --bags ids each of the largest table alone, summed. All contestants of a configuration take turns in one
process, and are timed by CUDA events around a call; the rate of a large copy is measured in the same turns. Prints the
results and saves results.csv, environment.json and report.md in --out. What runs on a GPU and how: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import itertools
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.workload import Workload, sizes
from embtables import EmbeddingTables, TableConfig, plan
from embtables._util.files import replacing
from embtables.formats import FP32, row_format, weight_name
from embtables.ops import gpu

LR = 0.01
OURS, OPERATOR = "embtables, Full", "embtables, the operator alone"
GRAPH = "embtables, Full, as a CUDA graph"
LOOP, FLAT, BAG = "nn.EmbeddingBag × 26", "F.embedding, one flat table", "nn.EmbeddingBag"
COPY = "copy"
BATCHES = 4  # different ones; their ids alone are larger than the caches of an H100 where batches are large
RULES = ("sgd", "rowwise_adagrad", "adagrad", "adam")
BAG_RULES = ("sgd", "adagrad")  # which both have
PRECISIONS = ("fp16", "int8", "int4", "int2", "binary", "binary2")
STATE_WIDTHS = {"sgd": lambda d: 0, "rowwise_adagrad": lambda d: 1, "adagrad": lambda d: d, "adam": lambda d: 2 * d}
SPARSE: dict[str, Callable[..., Any]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.SparseAdam,
}
NO_DEVICE = "there is no CUDA device here, so nothing was measured: run this on a machine with one"

Row = dict[str, Any]
Call = Callable[[int], None]


class Contestant(NamedTuple):
    """What is timed: ``call(number of the batch)``; ``num_bytes`` that it has to read and write at least."""

    phase: str
    name: str
    optimizer: str
    num_bytes: float
    call: Call


Build = Callable[[], list[Contestant]]


class Batches:
    """A workload's tensors on the device, and what a step over them has to move."""

    def __init__(self, work: Workload, device: torch.device) -> None:
        self.work, self.device = work, device
        self.dim, self.batch, self.num_rows = work.dim, work.batch, work.num_rows
        self.ids = [ids.to(device) for ids in work.ids]
        self.columns = [ids.t().contiguous().unbind() for ids in self.ids]
        self.rows = [rows.to(device) for rows in work.rows]
        self.grad = work.grad.to(device)
        self.flat_grad = self.grad.view(-1, work.dim)
        self.distinct = statistics.mean(rows.unique().numel() for rows in work.rows)

    def forward_bytes(self, row_bytes: float | None = None) -> float:
        """Ids and rows, in fp32 or of so many bytes, are read; vectors are written."""
        vector_bytes = 4 * self.work.dim
        return self.work.num_ids * (8 + (vector_bytes if row_bytes is None else row_bytes) + vector_bytes)

    def update_bytes(self, rule: str) -> float:
        """Gradients are read; weights and state of distinct rows are read and written."""
        widths = self.work.dim + STATE_WIDTHS[rule](self.work.dim)
        return self.work.num_ids * (8 + 4 * self.work.dim) + 2 * 4 * widths * self.distinct

    def step_bytes(self, rule: str) -> float:
        return self.forward_bytes() + self.update_bytes(rule)

    def contestants(self) -> Iterator[Build]:
        yield from ours(self)
        yield from rivals(self)


class Bags:
    """Bags of ``length`` ids each of one table, whose vectors are summed, and what that has to move."""

    def __init__(self, num_rows: int, dim: int, batch: int, length: int, device: torch.device) -> None:
        self.num_rows, self.dim, self.batch, self.length, self.device = num_rows, dim, batch, length, device
        work = Workload([num_rows], 1, batch * length, BATCHES)
        self.ids = [ids.flatten().to(device) for ids in work.ids]
        self.offsets = torch.arange(0, batch * length + 1, length, device=device)
        self.grad = torch.randn(batch, dim, generator=torch.Generator().manual_seed(0)).to(device)
        self.distinct = statistics.mean(ids.unique().numel() for ids in self.ids)

    def forward_bytes(self) -> float:
        """Offsets, ids and rows are read; a vector for each bag is written."""
        return self.batch * (8 + self.length * (8 + 4 * self.dim) + 4 * self.dim)

    def step_bytes(self, rule: str) -> float:
        """Besides, ids and the gradients of bags are read; weights and state of distinct rows are read and written."""
        widths = self.dim + STATE_WIDTHS[rule](self.dim)
        return self.forward_bytes() + self.batch * (8 * self.length + 4 * self.dim) + 2 * 4 * widths * self.distinct

    def contestants(self) -> Iterator[Build]:
        yield from (lambda rule=rule: self._ours(rule) for rule in BAG_RULES)  # type: ignore[misc]
        yield from (lambda rule=rule: self._rival(rule) for rule in BAG_RULES)  # type: ignore[misc]

    def _ours(self, rule: str) -> list[Contestant]:
        solved = plan([TableConfig("table", self.num_rows, self.dim)], "full", optimizer=rule)
        module = EmbeddingTables(solved, device=self.device)
        return self._both(OURS, rule, module, lambda: None, lambda: None)

    def _rival(self, rule: str) -> list[Contestant]:
        module = nn.EmbeddingBag(
            self.num_rows, self.dim, mode="sum", sparse=True, include_last_offset=True, device=self.device
        )
        optim = SPARSE[rule](module.parameters(), lr=LR)
        return self._both(BAG, rule, module, optim.zero_grad, optim.step)

    def _both(
        self, name: str, rule: str, module: nn.Module, before: Callable[[], Any], after: Callable[[], Any]
    ) -> list[Contestant]:
        def look_up(batch: int) -> None:
            with torch.no_grad():
                module(self.ids[batch], self.offsets)

        def train(batch: int) -> None:
            before()
            module(self.ids[batch], self.offsets).backward(self.grad)
            after()

        found = [Contestant(f"step, bags of {self.length}", name, rule, self.step_bytes(rule), train)]
        if rule == BAG_RULES[0]:
            found.append(Contestant(f"forward, bags of {self.length}", name, "", self.forward_bytes(), look_up))
        return found


# ---- contestants -----------------------------------------------------------------------------------------------------


def ours(data: Batches) -> Iterator[Build]:
    tables = [TableConfig(name, size, data.work.dim) for name, size in zip(data.work.names, data.work.sizes)]

    def build(rule: str) -> list[Contestant]:
        module = EmbeddingTables(plan(tables, "full", optimizer=rule), device=data.device)
        store, name = module.store, weight_name(FP32.name, data.work.dim)
        weight, state, hyper, hook = store.tensor(name), store.state_for_step(name), store.hyper, store.hook

        def look_up(batch: int) -> None:
            with torch.no_grad():
                module(data.ids[batch])

        def train(batch: int) -> None:
            module(data.ids[batch]).backward(data.grad)

        def gather(batch: int) -> None:
            with torch.no_grad():
                torch.ops.embtables.lookup(weight, state, data.rows[batch], hook, hyper, rule, weight.dtype)

        def update(batch: int) -> None:
            torch.ops.embtables.update_(weight, state, data.rows[batch], data.flat_grad, hyper, rule)

        found = [
            Contestant("step", OURS, rule, data.step_bytes(rule), train),
            Contestant("update", OPERATOR, rule, data.update_bytes(rule), update),
        ]
        if data.device.type == "cuda":
            # Ids out of range get a vector of their own, so that nothing waits for the GPU to have seen them.
            bounded = [dataclasses.replace(table, on_out_of_range="oov") for table in tables]
            step = Captured(EmbeddingTables(plan(bounded, "full", optimizer=rule), device=data.device), data)
            found.append(Contestant("step", GRAPH, rule, data.step_bytes(rule), step))
        if rule == RULES[0]:
            found.append(Contestant("forward", OURS, "", data.forward_bytes(), look_up))
            found.append(Contestant("forward", OPERATOR, "", data.forward_bytes(), gather))
        return found

    def serve(precision: str) -> list[Contestant]:
        whole = EmbeddingTables(plan(tables, "full", precision=precision, optimizer=None), device=data.device)
        module = whole.serve()
        (name,) = module.store.weight_names
        num_bytes = data.forward_bytes(row_format(precision).mean_bits(np.array([data.work.dim])).item() / 8)

        def look_up(batch: int) -> None:
            module(data.ids[batch])

        def unpack(batch: int) -> None:
            module.store.read(name, data.rows[batch])

        return [
            Contestant("forward", f"{OURS} in {precision}", "", num_bytes, look_up),
            Contestant("forward", f"{OPERATOR}, {precision}", "", num_bytes, unpack),
        ]

    yield from (lambda rule=rule: build(rule) for rule in RULES)  # type: ignore[misc]
    yield from (lambda precision=precision: serve(precision) for precision in PRECISIONS)  # type: ignore[misc]


class Captured:
    """A step that is captured once; then ids are copied to where it reads them, and it is replayed."""

    def __init__(self, module: EmbeddingTables, data: Batches) -> None:
        # The graph knows the addresses of the module's tensors, and does not keep them alive.
        self.module, self.data, self.ids, self.graph = module, data, data.ids[0].clone(), torch.cuda.CUDAGraph()
        aside, current = torch.cuda.Stream(data.device), torch.cuda.current_stream(data.device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            module(self.ids).backward(data.grad)
        current.wait_stream(aside)
        with torch.cuda.graph(self.graph):
            module(self.ids).backward(data.grad)

    def __call__(self, batch: int) -> None:
        self.ids.copy_(self.data.ids[batch])
        self.graph.replay()


def rivals(data: Batches) -> Iterator[Build]:
    def both(
        name: str, optimizer: str, forward: Callable[[int], Tensor], weights: list[nn.Parameter]
    ) -> list[Contestant]:
        optim = SPARSE[optimizer](weights, lr=LR)

        def look_up(batch: int) -> None:
            with torch.no_grad():
                forward(batch)

        def train(batch: int) -> None:
            optim.zero_grad()
            forward(batch).backward(data.grad)
            optim.step()

        found = [Contestant("step", name, optimizer, data.step_bytes(optimizer), train)]
        if optimizer == "sgd":
            found.append(Contestant("forward", name, "", data.forward_bytes(), look_up))
        return found

    def loop(optimizer: str) -> list[Contestant]:
        bags = [nn.EmbeddingBag(n, data.work.dim, mode="sum", sparse=True, device=data.device) for n in data.work.sizes]
        offsets = torch.arange(data.work.batch, device=data.device)

        def forward(batch: int) -> Tensor:
            return torch.cat([bag(ids, offsets) for bag, ids in zip(bags, data.columns[batch])], dim=1)

        return both(LOOP, optimizer, forward, [bag.weight for bag in bags])

    def flat(optimizer: str) -> list[Contestant]:
        weight = nn.Parameter(torch.randn(data.work.num_rows, data.work.dim, device=data.device))

        def forward(batch: int) -> Tensor:
            return F.embedding(data.rows[batch], weight, sparse=True).view(data.work.batch, -1)

        return both(FLAT, optimizer, forward, [weight])

    return (lambda b=b, o=o: b(o) for b in (loop, flat) for o in SPARSE)  # type: ignore[misc]


def copying(device: torch.device, num_bytes: int) -> Contestant:
    source, target = (torch.ones(num_bytes // 4, device=device) for _ in range(2))

    def copy(_: int) -> None:
        target.copy_(source)

    return Contestant(COPY, COPY, "", 2 * num_bytes, copy)


def build_all(data: Batches | Bags, copy_bytes: int) -> tuple[list[Contestant], list[str]]:
    """Those that fit into the device's memory together, and why others do not take part."""
    found, left_out = [copying(data.device, copy_bytes)], []
    for build in data.contestants():
        try:
            built = build()
            for contestant in built:
                contestant.call(0)
            found += built
        except torch.OutOfMemoryError as error:
            left_out.append(f"out of memory after {len(found)} contestants: {str(error).splitlines()[0]}")
    return found, left_out


# ---- timing ----------------------------------------------------------------------------------------------------------


def timed(call: Call, batches: Sequence[int], device: torch.device) -> list[float]:
    """Milliseconds of each call: on a GPU what lies between two events, so time that it waits for the host counts."""
    if device.type != "cuda":
        times = []
        for batch in batches:
            start = time.perf_counter()
            call(batch)
            times.append(1e3 * (time.perf_counter() - start))
        return times
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in batches]
    for batch, (start, end) in zip(batches, events):
        start.record()
        call(batch)
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def interleaved(contestants: Sequence[Contestant], data: Batches | Bags, rounds: int, calls: int) -> list[list[float]]:
    """``calls`` times of each contestant in every round, in an order drawn anew each time, after one that warms up."""
    times: list[list[float]] = [[] for _ in contestants]
    order = list(range(len(contestants)))
    shuffler = random.Random(0)
    for round_number in range(rounds):
        shuffler.shuffle(order)
        for i in order:
            batches = [(round_number * calls + k) % len(data.ids) for k in range(calls + 1)]
            times[i] += timed(contestants[i].call, batches, data.device)[1:]
        print(f"\r  round {round_number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def measure(data: Batches | Bags, rounds: int, calls: int, copy_bytes: int) -> tuple[list[Row], list[str]]:
    contestants, left_out = build_all(data, copy_bytes)
    rows: list[Row] = []
    for contestant, times in zip(contestants, interleaved(contestants, data, rounds, calls)):
        low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        row: Row = {"dim": data.dim, "batch": data.batch, "rows": data.num_rows, "phase": contestant.phase}
        row |= {"contestant": contestant.name, "optimizer": contestant.optimizer, "calls": len(times)}
        row |= {"median_ms": median, "min_ms": min(times), "q1_ms": low, "q3_ms": high}
        rows.append(row | {"gb_per_second": contestant.num_bytes / median / 1e6})
    rate = rows[0]["gb_per_second"]
    ours_by = {(r["phase"], r["optimizer"]): r["median_ms"] for r in rows if r["contestant"] == OURS}
    for row in rows:
        row["share_of_copy"] = row["gb_per_second"] / rate
        own = ours_by.get((row["phase"], row["optimizer"]))
        row["times_ours"] = row["median_ms"] / own if own else ""
    return rows, left_out


# ---- results ---------------------------------------------------------------------------------------------------------


def report(rows: Sequence[Row], about: dict[str, Any], notes: Sequence[str]) -> str:
    lines = ["# embtables on a GPU", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += ["Milliseconds of a call, between two CUDA events. *× ours*: the time against embtables' own in the same"]
    lines += [
        "phase, so above 1 is slower. *of copy*: the bytes that a call has to move, over its time, against the rate"
    ]
    lines += ["of the large copy. `step` is forward, backward and update; `update` the operator of the backward alone."]
    lines += ["Bags are those of one table, summed."]
    for dim, batch, count in dict.fromkeys((row["dim"], row["batch"], row["rows"]) for row in rows):
        lines += ["", f"## D = {dim}, batch {batch:,}, {count:,} rows", ""]
        lines += ["| phase | contestant | optimizer | median ms | min ms | × ours | GB/s | of copy |"]
        lines += ["| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"]
        own = [row for row in rows if (row["dim"], row["batch"], row["rows"]) == (dim, batch, count)]
        for row in sorted(own, key=lambda row: row["phase"]):
            ratio = f"{row['times_ours']:.2f}" if row["times_ours"] else ""
            cells = [row["phase"], row["contestant"], row["optimizer"], f"{row['median_ms']:.4f}"]
            cells += [f"{row['min_ms']:.4f}", ratio, f"{row['gb_per_second']:,.3g}", f"{row['share_of_copy']:.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join(lines) + "\n"


def save(folder: Path, rows: Sequence[Row], about: dict[str, Any], text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "results.csv") as path, open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with replacing(folder / "environment.json") as path:
        Path(path).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    with replacing(folder / "report.md") as path:
        Path(path).write_text(text, encoding="utf-8")


def describe(device: torch.device) -> dict[str, Any]:
    about = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: a trial on the CPU"}
    if device.type == "cuda":
        about["memory"] = f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB"
        about["driver"] = driver()
        about["CUDA"] = str(torch.version.cuda)
        about["triton"] = version("triton")
        about["operators"] = "Triton" if "cuda" in gpu.registered else "reference"
    about |= {k: v for k, v in machine.describe().items() if k in ("processor", "python", "torch")}
    return about | {"date": datetime.date.today().isoformat()}


def driver() -> str:
    """The version of NVIDIA's driver, as ``nvidia-smi`` says; empty where there is no such program."""
    if (program := shutil.which("nvidia-smi")) is None:
        return ""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def configurations(chosen: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Batches | Bags]]:
    """What is measured together, each with its title."""
    cardinalities = sizes(chosen.divisor)
    for batch in chosen.batches:
        work = Workload(cardinalities, chosen.dims[0], batch, BATCHES)
        for dim in chosen.dims:
            yield f"D = {dim}, batch {batch:,}", Batches(work.of_dim(dim), device)
    for length, batch, dim in itertools.product(chosen.bags, chosen.batches, chosen.dims):
        title = f"bags of {length}, D = {dim}, batch {batch:,}"
        yield title, Bags(max(cardinalities), dim, batch, length, device)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--divisor", type=int, default=10, help="of the cardinalities above 1,000 (default: 10)")
    parser.add_argument("--dims", type=numbers, default=[16, 64], help="lengths of the vectors (default: 16,64)")
    parser.add_argument("--batches", type=numbers, default=[2048, 8192, 65536], help="(default: 2048,8192,65536)")
    parser.add_argument("--bags", type=numbers, default=[10, 50], help="ids in a bag (default: 10,50)")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contestant (default: 20)")
    parser.add_argument("--calls", type=int, default=10, help="timed calls a turn (default: 10)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gpu"), help="folder of the results")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # "cpu": a trial of the benchmark itself
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(NO_DEVICE)
    rows: list[Row] = []
    notes: list[str] = []
    copy_bytes = 2**30 if device.type == "cuda" else 2**24
    for title, data in configurations(chosen, device):
        print(title, file=sys.stderr)
        found, left_out = measure(data, chosen.rounds, chosen.calls, copy_bytes)
        del data  # the next one needs its memory
        rows += found
        notes += [f"{title}: {why}" for why in left_out]
        about = describe(device)
        text = report(rows, about, notes)
        save(chosen.out, rows, about, text)
    print(text)
    print(f"saved in {chosen.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
