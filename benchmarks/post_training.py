"""What a trained model keeps when its tables are compressed afterwards, at once and after one further epoch.

    python -m benchmarks.post_training RUN DATA docs/results/post-training --budgets 25%,12.5%,5%,1%

RUN is a run of full tables by `embtables train` or a cell of a sweep, DATA what it was trained on. For each method and
budget the trained tables are fitted into the compressed ones (`EmbeddingTables.take_over`), the rest of the model stays
as it is, and what would be served is scored; then one more epoch of the run's own training follows, with new optimizer
state, and is scored again. Rows that results.csv holds are not run again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from embtables import EmbeddingTables, InfeasibleBudget
from embtables._util.files import write_json, write_text
from embtables._util.reading import read_yaml
from embtables.datasets import PreparedDataset
from embtables.models import build_model
from embtables.sweeps.cells import MethodSpec, parse_budgets, parse_methods, takes_budget
from embtables.sweeps.planning import cell_config
from embtables.sweeps.results import read_metrics
from embtables.training.config import RunConfig
from embtables.training.environment import environment
from embtables.training.evaluation import main_metrics, score
from embtables.training.export import dense_state, load_served
from embtables.training.loop import Run
from embtables.training.planning import plan_tables, selected

METHODS = (
    "{kind: full, precision: int8},{kind: full, precision: int4},{kind: banded, precision: int8},"
    "{kind: frequency_cutoff, precision: int4},{kind: hot_cold, hot: 0.7, precision: int4},"
    "{kind: hash, precision: int4},{kind: compositional, operation: concat, precision: int4},"
    "{kind: unified, precision: int4},{kind: robe, precision: int4},{kind: low_rank, precision: int4},"
    "{kind: pruned, precision: int4}"
)


def compress(run: Path, data: PreparedDataset, spec: MethodSpec, budget: str) -> dict[str, Any]:
    """One row: how much of the tables is held, and validation and test AUC at once and after an epoch."""
    content = read_yaml(run / "config.yaml")
    was = RunConfig.model_validate({name: content[name] for name in RunConfig.model_fields})
    config = cell_config(was, spec, budget, was.training.seed)
    config = config.model_copy(update={"training": config.training.model_copy(update={"epochs": 1})})
    data = selected(config, data)
    trained = load_served(run / "served")
    old = trained.embeddings
    assert isinstance(old, EmbeddingTables)
    torch.manual_seed(config.training.seed)
    tables = EmbeddingTables(plan_tables(config, data), seed=config.training.seed)
    shares = tables.take_over({t.name: old.to_dense(t.name) for t in old.plan.tables}, data.frequencies)
    model = build_model(config.model.name, tables, len(data.dense_features), config.model.hyperparameters)
    model.load_state_dict(dense_state(trained), strict=False)
    row: dict[str, Any] = {
        "inference_bytes": tables.plan.inference_bytes,
        "ratio": tables.plan.inference_bytes / (tables.plan.full_bytes or 1),
        **{f"held_{name}": share for name, share in shares.items()},
    }
    size, device = config.training.evaluation_batch_size, torch.device("cpu")
    with tables.as_served():
        row |= {
            f"{split}_auc_at_once": main_metrics(score(model, data, split, size, device))["auc"]
            for split in ("valid", "test")
        }
    with tempfile.TemporaryDirectory() as folder:
        result = Run(config, data, Path(folder), {"run": str(run)}, tables, model).run()
    assert result is not None  # as it does not pause
    return row | {f"{split}_auc_after_an_epoch": result[f"{split}_auc"] for split in ("valid", "test")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run of full tables")
    parser.add_argument("data", type=Path, help="the prepared data that it was trained on")
    parser.add_argument("out", type=Path, help="the folder of results.csv and environment.json")
    parser.add_argument("--methods", default=METHODS, help="as `embtables sweep` takes them")
    parser.add_argument("--budgets", default="25%,12.5%,5%,1%", help="as `embtables sweep` takes them")
    arguments = parser.parse_args()
    trained = read_metrics(arguments.run)
    if trained is None or trained["status"] != "ok":
        parser.error(f"{arguments.run} is no finished run")
    data = PreparedDataset(arguments.data)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "environment.json", environment(torch.device("cpu"), torch.get_num_threads()))
    path = arguments.out / "results.csv"
    rows = pd.read_csv(path, dtype={"budget": str}, keep_default_na=False).to_dict("records") if path.exists() else []
    done = {(row["method"], row["budget"]) for row in rows}
    print(f"full, trained for {trained['best_epoch']} epochs: test AUC {trained['test_auc']:.4f}")
    for label, spec in parse_methods(arguments.methods).items():
        for budget in parse_budgets(arguments.budgets) if takes_budget(spec) else [""]:
            if (label, budget) in done:
                continue
            row: dict[str, Any] = {"method": label, "budget": budget, "full_test_auc": trained["test_auc"]}
            try:
                row |= {"status": "ok"} | compress(arguments.run, data, spec, budget)
            except InfeasibleBudget as error:
                row |= {"status": "infeasible", "floor_bytes": error.floor_bytes}
            rows.append(row)
            write_text(path, pd.DataFrame(rows).to_csv(index=False))
            print(row, flush=True)


if __name__ == "__main__":
    main()
