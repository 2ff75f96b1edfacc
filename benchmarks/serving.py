"""Served files of gigabytes: how long they take to open, what memory readers need, how fast lookups are then.

    python -m benchmarks.serving docs/results/serving --gigabytes 1,8

Four tables in full, in fp32 with 16 columns, as one file of embtables and as one that `torch.save` wrote. Readers are
processes of their own with one thread each, one at a time and four at once. Each opens the file and looks up batches of
1,000 ids of each table, drawn uniformly. A cold file is one that the system has in no memory, so that the disk counts;
all else is measured on a file that was read before. A lookup is the median of 300, after 600 that meet nearly all pages
of the file. Memory is what the readers have more then, all together, than before they opened the file: pages that they
share count once (`Pss` in /proc/PID/smaps_rollup). Readers that would not fit into the free memory are left out. Rows
that results.csv holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from benchmarks.machine import describe
from embtables import EmbeddingTables, TableConfig, plan
from embtables._util.files import write_json, write_text
from embtables.serving import NumpyTables
from embtables.serving.numpy_reader import open_file

TABLES, DIM, IDS = 4, 16, 1000
STEADY = 300  # lookups, of which the median counts
UNCOUNTED = 600  # before those, in which nearly all pages of the file are met
READERS = (1, 4)
Lookup = Callable[[torch.Tensor], Any]


def embtables_file(path: Path) -> Lookup:
    return EmbeddingTables.load(path)


def verified(path: Path) -> Lookup:
    return EmbeddingTables.load(path, verify=True)


def numpy_file(path: Path) -> Lookup:
    tables = NumpyTables(path)
    return lambda ids: [tables.lookup(f"t{i}", column) for i, column in enumerate(ids.numpy().T)]


def _rows(weight: torch.Tensor) -> Lookup:
    first = torch.arange(TABLES) * (len(weight) // TABLES)
    return lambda ids: F.embedding(ids + first, weight)


def torch_file(path: Path) -> Lookup:
    return _rows(torch.load(path.with_suffix(".pt"), weights_only=True)["weight"])


def torch_mapped(path: Path) -> Lookup:
    return _rows(torch.load(path.with_suffix(".pt"), weights_only=True, mmap=True)["weight"])


def safetensors_file(path: Path) -> Lookup:
    from safetensors.torch import load_file

    return _rows(load_file(path)[f"weight_{DIM}"])


CONTESTANTS: dict[str, tuple[str, Callable[[Path], Lookup]]] = {
    "embtables": ("EmbeddingTables.load", embtables_file),
    "verify": ("EmbeddingTables.load(verify=True)", verified),
    "numpy": ("NumpyTables", numpy_file),
    "torch_mmap": ("torch.load(mmap=True)", torch_mapped),
    "torch": ("torch.load", torch_file),
    "safetensors": ("safetensors load_file", safetensors_file),
}
COPIES = ("torch",)  # the whole file into memory of each reader


# ---- the files -------------------------------------------------------------------------------------------------------


def make(path: Path, gigabytes: float) -> int:
    """Writes both files; returns the rows of a table."""
    rows = int(gigabytes * 1e9) // (TABLES * DIM * 4)
    configs = [TableConfig(f"t{i}", rows, DIM) for i in range(TABLES)]
    tables = EmbeddingTables(plan(configs, "full", optimizer=None), device="meta")
    tables.to_empty(device="cpu")
    weight = tables.store.weight(DIM).detach()
    some = torch.randn(2**20, DIM, generator=torch.Generator().manual_seed(0))
    for part in weight.split(len(some)):
        part.copy_(some[: len(part)])
    tables.save(path)
    torch.save({"weight": weight}, path.with_suffix(".pt"))
    return rows


def _forget(path: Path) -> None:
    """Has the system drop what it holds of a file in memory."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _warm(path: Path) -> None:
    with open(path, "rb") as file:
        while file.read(2**24):
            pass


# ---- a reader --------------------------------------------------------------------------------------------------------


def memory() -> int:
    """Bytes of this process, of shared pages its part."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def read(name: str, path: Path, seed: int, uncounted: int, steady: int) -> None:
    """Opens and looks up; two lines of standard input say when to begin, and when all have come so far."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    rows = open_file(path).arrays[f"weight_{DIM}"].shape[0] // TABLES
    batches = [torch.randint(rows, (IDS, TABLES), generator=generator) for _ in range(1 + uncounted + steady)]
    open_it = CONTESTANTS[name][1]
    # What is imported or compiled at the first call belongs to no file.
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "small.safetensors", 1e-4)
        open_it(Path(folder) / "small.safetensors")(batches[0] % 100)
    before = memory()
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    lookup = open_it(path)
    opened = time.perf_counter()
    lookup(batches[0])
    first = time.perf_counter()
    for batch in batches[1 : 1 + uncounted]:
        lookup(batch)
    seconds = []
    for batch in batches[1 + uncounted :]:
        start = time.perf_counter()
        lookup(batch)
        seconds.append(time.perf_counter() - start)
    print("done", flush=True)
    sys.stdin.readline()
    times = {"open_ms": opened - began, "first_ms": first - opened, "steady_ms": statistics.median(seconds or [0.0])}
    print(json.dumps({**{k: 1e3 * v for k, v in times.items()}, "bytes": memory() - before}), flush=True)
    sys.stdin.readline()


def measure(name: str, path: Path, readers: int, *lookups: int) -> dict[str, float]:
    """The slowest of so many readers at once, and the memory of all; ``lookups``: how many, not counted and counted."""
    command = [sys.executable, "-m", "benchmarks.serving", "--read", name, str(path), *map(str, lookups)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(seed)], **pipes) for seed in range(readers)]

    def lines() -> list[str]:
        found = [process.stdout.readline() for process in processes]
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        return found

    try:
        for expected in ("ready", "done"):
            said = lines()
            if any(line != f"{expected}\n" for line in said):
                raise RuntimeError(f"a reader of {name} ended: {said}")
        found = [json.loads(line) for line in lines()]
    finally:
        for process in processes:
            process.stdin.close()
            process.wait()
    slowest = {key: max(each[key] for each in found) for key in ("open_ms", "first_ms", "steady_ms")}
    return {**slowest, "mb": sum(each["bytes"] for each in found) / 1e6}


def free() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


# ---- all of them -----------------------------------------------------------------------------------------------------


def row_of(name: str, path: Path, gigabytes: float) -> dict[str, Any]:
    file = path.with_suffix(".pt") if name.startswith("torch") else path
    row: dict[str, Any] = {"gigabytes": gigabytes, "reader": CONTESTANTS[name][0]}
    for readers in READERS:
        if name in COPIES and readers * file.stat().st_size > 0.7 * free():
            row[f"mb_{readers}"] = "does not fit"
            continue
        if readers == 1:
            _forget(file)
            cold = measure(name, path, 1, 0, 0)
            row |= {"cold_open_ms": cold["open_ms"], "cold_first_ms": cold["first_ms"]}
        _warm(file)
        found = measure(name, path, readers, UNCOUNTED, STEADY)
        row |= {f"{key}_{readers}": value for key, value in found.items()}
    return row


COLUMNS = {
    "open_ms_1": "open, ms",
    "cold_open_ms": "open, cold, ms",
    "first_ms_1": "first lookup, ms",
    "cold_first_ms": "first lookup, cold, ms",
    "steady_ms_1": "lookup, ms",
    "steady_ms_4": "lookup, 4 readers, ms",
    "mb_1": "1 reader, MB",
    "mb_4": "4 readers, MB",
}


def table(folder: Path) -> str:
    """The rows of results.csv in a folder as Markdown."""

    def text(value: str) -> str:
        try:
            number = float(value)
        except ValueError:
            return value or "–"
        return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"

    rows = pd.read_csv(folder / "results.csv", dtype=str, keep_default_na=False).to_dict("records")
    lines = [["GB", "reader", *COLUMNS.values()], ["---:", "---", *["---:"] * len(COLUMNS)]]
    lines += [[text(row["gigabytes"]), row["reader"], *(text(row[name]) for name in COLUMNS)] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--read"]:
        uncounted, steady, seed = map(int, sys.argv[4:])
        read(sys.argv[2], Path(sys.argv[3]), seed, uncounted, steady)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder of results.csv, report.md and environment.json")
    parser.add_argument("--gigabytes", default="1,8", help="of the files; each takes that twice on the disk")
    parser.add_argument("--readers", default=",".join(CONTESTANTS), help="those to measure, by default all")
    parser.add_argument("--folder", type=Path, help="where the files are made; a temporary one by default")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "environment.json", describe())
    path = arguments.out / "results.csv"
    rows: list[dict[str, Any]] = pd.read_csv(path).to_dict("records") if path.exists() else []
    done = {(row["gigabytes"], row["reader"]) for row in rows}
    for gigabytes in map(float, arguments.gigabytes.split(",")):
        names = [n for n in arguments.readers.split(",") if (gigabytes, CONTESTANTS[n][0]) not in done]
        if not names:
            continue
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            make(Path(folder) / "tables.safetensors", gigabytes)
            for name in names:
                rows.append(row_of(name, Path(folder) / "tables.safetensors", gigabytes))
                write_text(path, pd.DataFrame(rows).to_csv(index=False))
                print(rows[-1], flush=True)
    said = (__doc__ or "").split("\n\n", 2)[2].strip()
    write_text(arguments.out / "report.md", f"# Served files\n\n{said}\n\n{table(arguments.out)}")
    print(table(arguments.out))


if __name__ == "__main__":
    main()
