"""Test AUC of a sweep's variants by the length of the history, from the test scores that the sweep kept.

python benchmarks/history_lengths.py data/globo runs/globo-histories docs/results/globo-histories/history_lengths.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from embtables.datasets import PreparedDataset
from embtables.sweeps.cells import Cell
from embtables.training import metrics

BOUNDS = (0, 2, 5, 10, 20)  # a bin ends here, and the last has no end
FEWEST = 1000  # rows of a bin


def by_length(data: PreparedDataset, sweep: Path, history: str) -> pd.DataFrame:
    """A row a bin, variant and seed; bins with fewer than ``FEWEST`` rows are left out."""
    batches = list(data.batches("test", 2**16))
    labels = np.concatenate([batch.labels.numpy() for batch in batches])
    lengths = np.concatenate([batch.lists[history].offsets.diff().numpy() for batch in batches])
    settings = yaml.safe_load((sweep / "sweep.yaml").read_text(encoding="utf-8"))
    ends = [*BOUNDS, int(lengths.max())]
    rows = []
    for low, high in zip([0, *(end + 1 for end in BOUNDS)], ends):
        chosen = (lengths >= low) & (lengths <= high)
        if chosen.sum() < FEWEST:
            continue
        for variant in settings["variants"]:
            for seed in range(settings["seeds"]):
                run = sweep / "cells" / Cell("full", "", seed, variant=variant).name
                auc = metrics.auc(labels[chosen], np.load(run / "test_scores.npy")[chosen])
                length = str(low) if low == high else f"{low}–{high}"
                rows.append((length, int(chosen.sum()), variant, seed, auc))
    return pd.DataFrame(rows, columns=["history", "rows", "variant", "seed", "test_auc"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the prepared data that the sweep ran on")
    parser.add_argument("sweep", type=Path, help="the folder of a sweep over variants with full tables")
    parser.add_argument("out", type=Path, help="the CSV to write")
    parser.add_argument("--history", default="history", help="the history whose length counts")
    arguments = parser.parse_args()
    table = by_length(PreparedDataset(arguments.data), arguments.sweep, arguments.history)
    table.to_csv(arguments.out, index=False)
    print(table.groupby(["history", "variant"], sort=False)["test_auc"].mean().unstack().to_string())


if __name__ == "__main__":
    main()
