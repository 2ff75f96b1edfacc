"""How fast text in Criteo's raw format is prepared and read back, against bare readers of the same file.

    python -m benchmarks.data                          # a million rows, a minute or two
    python -m benchmarks.data --rows 2000000 --peak    # one preparation in a process of its own: its peak memory

The first generates the file (skewed categories of Criteo's cardinalities), has readers, `embtables prepare criteo` and
the loader take turns, and prints medians: rows a second of wall clock and of CPU time (all threads). The second prints
one line of JSON: rows, bytes, seconds of wall clock and of CPU, peak resident memory of the whole process in MiB, that
of its imports alone, rows a second, and the number of ids found.
"""

from __future__ import annotations

import argparse
import binascii
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.csv
from rich.console import Console
from rich.table import Table

from benchmarks.timing import Timing

CARDINALITIES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652),
    *(2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
BLOCK = 100_000
COLUMNS = [f"column_{number}" for number in range(40)]
READER = "polars reads the text"
PREPARE = "embtables prepare criteo"


def generate(path: Path, rows: int, seed: int = 0) -> None:
    """A file of the raw format: label, 13 integers (some negative or empty), 26 categories of 8 hex digits or empty."""
    generator = np.random.default_rng(seed)
    with open(path, "wb") as file:
        for start in range(0, rows, BLOCK):
            n = min(BLOCK, rows - start)
            columns = {"label": pl.Series(generator.integers(0, 2, n))}
            for number in range(1, 14):
                values = np.floor(np.exp(generator.normal(2, 2, n))).astype(np.int64) - (3 if number == 2 else 0)
                columns[f"I{number}"] = _with_gaps(pl.Series(values), generator.random(n) < 0.2)
            for number, cardinality in enumerate(CARDINALITIES, 1):
                ranks = np.floor(cardinality ** generator.random(n)).astype(np.uint64)
                mixed = (ranks * np.uint64(2654435761) + np.uint64(number)) & np.uint64(0xFFFFFFFF)
                digits = np.frombuffer(binascii.hexlify(mixed.astype(">u4").tobytes()), "S8").astype(str)
                columns[f"C{number}"] = _with_gaps(pl.Series(digits), generator.random(n) < 0.03)
            pl.DataFrame(columns).write_csv(file, include_header=False, separator="\t")


def _with_gaps(values: pl.Series, gaps: np.ndarray) -> pl.Series:
    return pl.select(pl.when(pl.Series(~gaps)).then(values)).to_series()


@dataclass(frozen=True)
class Settings:
    """Rows of the file, rows of a batch, and how often everybody has a turn."""

    rows: int = 1_000_000
    batch: int = 2048
    rounds: int = 5


def run(settings: Settings, progress: Callable[[float], None] = lambda share: None) -> list[dict[str, Any]]:
    """A row for each contestant; `rows` is what it reads in a call."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "train.txt", Path(folder) / "out"
        generate(source, settings.rows)
        timings: dict[str, Timing] = {}
        rows: dict[str, int] = {}
        for number in range(settings.rounds + 1):
            for name, call in contestants(source, out, settings.batch).items():
                cpu, wall = time.process_time(), time.perf_counter()
                rows[name] = call()
                if number:  # the first turn of all is not timed
                    timing = timings.setdefault(name, Timing())
                    timing.wall.append(time.perf_counter() - wall)
                    timing.cpu.append(time.process_time() - cpu)
                progress((number * len(rows) + list(rows).index(name) + 1) / (len(rows) * (settings.rounds + 1)))
    return [{"name": name, "rows": rows[name], **timing.row()} for name, timing in timings.items()]


def contestants(source: Path, out: Path, batch: int) -> dict[str, Callable[[], int]]:
    """In the order in which they must be called; each returns the number of rows that it read."""
    from embtables.datasets import PreparedDataset
    from embtables.datasets.readers.criteo import prepare_criteo

    def by_polars() -> int:
        schema = dict.fromkeys(COLUMNS, pl.String)
        return len(pl.read_csv(source, has_header=False, separator="\t", quote_char=None, schema=schema))

    def by_pyarrow() -> int:
        options = pyarrow.csv.ReadOptions(column_names=COLUMNS)
        layout = pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False)
        types = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pyarrow.string()))
        return pyarrow.csv.read_csv(source, options, layout, types).num_rows

    def prepare() -> int:
        shutil.rmtree(out, ignore_errors=True)
        return prepare_criteo(source, out).manifest["rows_read"]

    def epoch(of: PreparedDataset) -> int:
        return sum(len(each.labels) for each in of.batches("train", batch, seed=0))

    opened: list[PreparedDataset] = []

    def first_epoch() -> int:
        opened[:] = [PreparedDataset(out)]
        return epoch(opened[0])

    return {
        READER: by_polars,
        "pyarrow reads the text": by_pyarrow,
        PREPARE: prepare,
        f"batches of {batch}, shuffled, from the disk": first_epoch,
        f"batches of {batch}, shuffled, in memory": lambda: epoch(opened[0]),
    }


def table(found: list[dict[str, Any]]) -> Table:
    reader = next(row for row in found if row["name"] == READER)
    shown = Table("", "rows/s", "rows per second of CPU", "CPU, of the reader's")
    for row in found:
        per_row = row["cpu_ms"] / row["rows"]
        shown.add_row(
            row["name"],
            f"{1e3 * row['rows'] / row['median_ms']:,.0f}",
            f"{1e3 / per_row:,.0f}",
            f"{per_row / (reader['cpu_ms'] / reader['rows']):.2f}",
        )
    return shown


def measure(source: Path, out: Path) -> dict[str, float]:
    """Prepares in this process and measures it: meant for a process that does nothing else."""
    start = time.perf_counter()
    import torch  # noqa: F401  # which the shards' batches need, and which takes twice as much with its CUDA libraries

    from embtables.datasets.readers.criteo import prepare_criteo

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = prepare_criteo(source, out)
    wall = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    rows = data.manifest["rows_read"]
    return {
        "rows": rows,
        "bytes": source.stat().st_size,
        "wall_seconds": round(wall, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_mib": round(usage.ru_maxrss / 1024, 1),
        "of_imports_mib": round(imported / 1024, 1),
        "rows_per_second": round(rows / wall),
        "ids": sum(data.num_embeddings.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=Settings.rows, help="of the generated file (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="turns of each (default: %(default)s)")
    parser.add_argument("--peak", action="store_true", help="measure one preparation in a process of its own")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "OUT"), help="prepare FILE into OUT in this process")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), Path(options.measure[1]))))
    elif options.peak:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "train.txt"
            generate(source, options.rows)
            command = [sys.executable, "-m", "benchmarks.data", "--measure", str(source), str(Path(folder) / "out")]
            subprocess.run(command, check=True)
    else:
        console = Console()
        found = run(Settings(options.rows, rounds=options.rounds))
        console.print(table(found))
        for row in found:
            if row["distrust"]:
                console.print(f"do not trust the wall clock of '{row['name']}': {row['distrust']}", highlight=False)


if __name__ == "__main__":
    main()
