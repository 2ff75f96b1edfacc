"""Rows per second of a bundle's predictor, from a Parquet file of raw rows to a Parquet file of scores.

    python -m benchmarks.predict --rows 1000000 --threads 2 --profile

A DLRM over hashed tables is trained for a part of an epoch on the data of `make demo`, or on what the options say, and
scores rows of the same kind. CPU time is that of all threads, so that a busy machine shows.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from pathlib import Path

import polars as pl
import torch

from embtables.datasets import Synthetic, prepare_synthetic
from embtables.datasets.readers.synthetic import Truth
from embtables.training import Predictor, Trainer, load_config, save_bundle


def raw_rows(config: Synthetic) -> pl.DataFrame:
    """The rows of generated data before they are ids."""
    frames = []
    for _, keys, dense, _, _ in Truth(config).chunks():
        columns = {name: values for name, values in zip(config.feature_names, keys)}
        frames.append(pl.DataFrame(columns | {f"dense_{i}": dense[:, i] for i in range(dense.shape[1])}))
    return pl.concat(frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--cardinalities", default="20000,5000,1000,100")
    parser.add_argument("--dense", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--text", action="store_true", help="Ids are text, such as v17, in place of integers.")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cardinalities = tuple(map(int, options.cardinalities.split(",")))
    config = Synthetic(rows=200_000, cardinalities=cardinalities, num_dense=options.dense, unseen=0.02)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare_synthetic(folder / "data", config)
        short = {"training.epochs": 1, "tables.method": "hash", "tables.budget": "10%", "training.threads": 2}
        Trainer(load_config(flags=short), data, folder / "run").run()
        save_bundle(folder / "run", data, folder / "bundle")
        rows = raw_rows(Synthetic(rows=options.rows, cardinalities=cardinalities, num_dense=options.dense, seed=1))
        if options.text:
            rows = rows.with_columns(pl.format("v{}", pl.col("^feature_.*$")).name.keep())
        rows.write_parquet(folder / "rows.parquet")
        predictor = Predictor.load(folder / "bundle")
        for _ in range(options.repeats):
            wall, cpu = time.perf_counter(), time.process_time()
            predictor.predict_file(folder / "rows.parquet", folder / "scores.parquet")
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            print(f"{options.rows / wall:,.0f} rows/s, {options.rows / cpu:,.0f} rows per second of CPU")
        if options.profile:
            profile = cProfile.Profile()
            profile.runcall(predictor.predict, rows)
            pstats.Stats(profile).sort_stats("tottime").print_stats(12)


if __name__ == "__main__":
    main()
