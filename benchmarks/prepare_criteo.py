"""Time and peak memory of preparing a file in Criteo's raw format.

    python benchmarks/prepare_criteo.py --rows 2000000

generates the file (skewed categories of Criteo's cardinalities), prepares it in a process of its own, and prints one
line of JSON: rows, bytes, seconds of wall clock and of both cores, peak resident memory of the whole process, rows a
second, and the number of ids found.
"""

from __future__ import annotations

import argparse
import binascii
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

CARDINALITIES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652),
    *(2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
BLOCK = 100_000


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


def prepare(source: Path, out: Path) -> dict[str, float]:
    """Prepares in this process and measures it: meant for a process that does nothing else."""
    start = time.perf_counter()
    from embtables.datasets.criteo import prepare_criteo

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
        "rows_per_second": round(rows / wall),
        "ids": sum(data.num_embeddings.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "OUT"), help="only prepare FILE into OUT")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(prepare(Path(options.measure[0]), Path(options.measure[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "train.txt"
        generate(source, options.rows)
        command = [sys.executable, __file__, "--measure", str(source), str(Path(folder) / "out")]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
