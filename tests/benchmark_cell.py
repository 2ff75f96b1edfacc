"""Stands for ``embtables train`` in the tests of sweeps: writes a run directory in a blink.

A score is the label plus noise, more of it for smaller budgets, and less of it the closer tuned fields are to 0.3.
Files in the directory FAKE names steer it: ``fail-METHOD``: ends with an error; ``fail-METHOD-BUDGET``: at this budget;
``fail-CELL``: this cell alone;
``slow``: waits until that is gone; ``die``: kills itself. Every start adds a line to ``started``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

NOISE = {
    "full": 1.0,
    "full(precision=fp32)": 1.0,
    "full(precision=int4)": 1.3,
    "hash": 1.5,
    "hash(precision=fp32)": 1.5,
    "hash(precision=int4)": 1.7,
    "drop_feature": 2.0,
    "drop_feature(precision=fp32)": 2.0,
    "drop_feature(precision=int4)": 1.6,
    "frequency_cutoff": 2.5,
    "fewer_dimensions": 1.9,
    "fewer_dimensions(projection=True)": 1.7,
}


def label(method: str | dict[str, object]) -> str:
    """What plans.json calls a method."""
    spec = json.loads(method) if isinstance(method, str) and method.startswith("{") else method
    if isinstance(spec, str):
        return spec
    options = ",".join(f"{name}={value}" for name, value in sorted(spec.items()) if name != "kind")
    return f"{spec['kind']}({options})" if options else str(spec["kind"])


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = (positive[:, None] > negative[None, :]).mean() + 0.5 * (positive[:, None] == negative[None, :]).mean()
    return float(wins)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--config")
    parser.add_argument("--method")
    parser.add_argument("--budget", default="")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--also", action="append", default=[])
    args = parser.parse_args()
    fake = Path(os.environ["FAKE"])
    with (fake / "started").open("a") as started:
        started.write(f"{args.out.name} {os.getpid()} {os.environ['OMP_NUM_THREADS']}\n")
    while (fake / "slow").exists():
        time.sleep(0.02)
    if (fake / "die").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    trained = {"method": args.method, "budget": args.budget}
    write(args.out, trained, args)
    for folder, tables in (item for text in args.also for item in json.loads(text).items()):
        write(Path(folder), trained | tables, args)


def write(out: Path, tables: dict[str, Any], args: argparse.Namespace) -> None:
    fake, method, budget = Path(os.environ["FAKE"]), label(tables["method"]), str(tables["budget"] or "")
    if any((fake / f"fail-{name}").exists() for name in (method, f"{method}-{budget}", out.name)):
        print("some progress\rError: the loss is NaN at step 7", file=sys.stderr)
        sys.exit(2)
    tuned = dict(item.split("=") for item in args.set)
    off = sum(abs(float(value) - 0.3) for value in tuned.values())
    labels = np.load(out.parent.parent / "test_labels.npy")
    generator = np.random.default_rng(args.seed)
    noise = NOISE.get(method, 1.2 + len(method) / 20) * (1 + 10 * off) + ("1%" == budget)
    scores = (labels + noise * generator.standard_normal(len(labels))).astype(np.float32)
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "test_scores.npy", scores)
    rate = tuned.get("tables.learning_rate", 0.05)
    (out / "config.yaml").write_text(f"tables: {{learning_rate: {rate}}}\ndense: {{learning_rate: 0.001}}\n")
    plans = json.loads((out.parent.parent / "plans.json").read_text())
    planned = next(p for p in plans if (p["method"], p["budget"]) == (method, budget))
    metrics = {
        **{key: planned[key] for key in ("inference_bytes", "training_bytes", "full_bytes", "ratio")},
        "status": "ok",
        "dataset": "?",
        "seed": args.seed,
        "valid_auc": auc(labels, scores) + 0.01,
        "valid_logloss": auc(labels, scores),  # best where the AUC is worst
        "test_auc": auc(labels, scores),
        "test_logloss": 0.5,
        "test_auc_unseen": None,
        "best_epoch": 1,
        "examples_per_second": 1e5,
        "train_seconds": 1.0,
        "peak_rss_bytes": 1 << 28,
        "collision_share": 0.25,
    }
    (out / ".metrics").write_text(json.dumps(metrics))
    os.replace(out / ".metrics", out / "metrics.json")


if __name__ == "__main__":
    main()
