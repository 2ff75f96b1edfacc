"""A cell of ``benchmark_cell`` on a worker: ``python cluster_cell.py SWEEP ARGUMENTS``, in a folder of its own.

What fabricated scores are made of is fetched from the folder of the sweep, which trainings do not need. The folder
FAKE stands beside it; in its file ``workers`` is a line for every start: the cell, and the process of its worker.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import benchmark_cell

if __name__ == "__main__":
    sweep = Path(sys.argv.pop(1))
    fake = sweep.parent / "fake"
    os.environ["FAKE"] = str(fake)
    for name in ("plans.json", "test_labels.npy"):
        shutil.copy(sweep / name, name)
    with (fake / "workers").open("a") as workers:
        workers.write(f"{Path(sys.argv[sys.argv.index('--out') + 1]).name} {os.getppid()}\n")
    benchmark_cell.main()
