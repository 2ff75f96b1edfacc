"""What a training leaves of one form in which its tables are served: evaluations, the best of them, the numbers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from embtables._util.files import replacing, sha256
from embtables.datasets import PreparedDataset
from embtables.plan.solver import Plan
from embtables.tables import EmbeddingTables
from embtables.training.config import RunConfig
from embtables.training.evaluation import (
    all_metrics,
    lookup_latency_us,
    main_metrics,
    score,
    slice_metrics,
    to_device,
)
from embtables.training.export import Served, copy_served, dense_state, load_served, save_served
from embtables.training.learning_curve import COLUMNS, Row, draw_curve, overfitting, remarks, value_of, write_curve
from embtables.training.planning import labels, last_step, steps_per_epoch

__all__ = ["CHECKPOINT", "Outcome", "Selection", "epochs_of"]

CHECKPOINT = "checkpoint"
"""The folder in a run's folder that holds what a resume needs."""


@dataclass
class Selection:
    """The evaluations of a served form, and which of them was best: a part of what a checkpoint holds."""

    best: float = -math.inf  # of the monitor, the log loss negated
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    curve: list[Row] = field(default_factory=list)
    over: bool = False  # out of patience

    def begin_anew(self) -> None:
        """What was best so far does not count any more."""
        self.best, self.best_step, self.stale = -math.inf, 0, 0

    def takes(self, value: float, step: int) -> bool:
        """Whether an evaluation is the best one so far."""
        if value > self.best:
            self.best, self.best_step, self.stale = value, step, 0
            return True
        self.stale += 1
        return False

    def check_curve(self, counted: Sequence[Row], monitor: str) -> None:
        """``ValueError`` where ``counted``, the evaluations that count, do not come to what is said of them."""
        if [row.get("step") for row in self.curve] != sorted({row.get("step", 0) for row in self.curve}):
            raise ValueError("its evaluations are not in order")
        columns = [(set(row), *map(type, row.values())) for row in self.curve]
        if any(names != set(COLUMNS) or not {*types} <= {int, float, type(None)} for names, *types in columns):
            raise ValueError("an evaluation has other columns than numbers of this release")
        values = {row["step"]: value_of(row, monitor) for row in counted}
        if values and values.get(self.best_step) != self.best:
            raise ValueError(f"there was no evaluation of {self.best} at its best step {self.best_step}")
        if self.stale != sum(step > self.best_step for step in values):
            raise ValueError(f"evaluations since its best step are not {self.stale}")
        if self.over and not values:
            raise ValueError("it is out of patience without an evaluation")


class Outcome:
    """One form in which what a run trains is served, and the folder in which it is left.

    Args:
        config: of the run, or of one that would train the same and serve it in this form.
        data: what is evaluated on.
        out: the folder.
        plan: how the tables are served.
    """

    def __init__(self, config: RunConfig, data: PreparedDataset, out: Path, plan: Plan) -> None:
        self.config, self.data, self.out, self.plan = config, data, out, plan
        self.selection = Selection()
        self.steps_per_epoch = steps_per_epoch(config, data)

    @property
    def best(self) -> Path:
        """The folder of the best model so far, in its served form."""
        return self.out / CHECKPOINT / f"best-{self.selection.best_step}"

    def remove_stale(self) -> None:
        """Removes best models that no checkpoint refers to, such as those of a run that was killed before its save."""
        for other in (self.out / CHECKPOINT).glob("best-*"):
            if other != self.best:
                shutil.rmtree(other)

    # ---- during training -----------------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module, served: EmbeddingTables, device: torch.device, step: int) -> Row:
        """Validation of a model that has its served tables; the best one so far is kept on disk."""
        training = self.config.training
        scored = score(model, self.data, "valid", training.evaluation_batch_size, device)
        measured: Row = {f"valid_{name}": value for name, value in main_metrics(scored).items()}
        measured["valid_auc_tail"] = slice_metrics(scored, self.data)["auc_tail"]
        if self.selection.takes(value_of(measured, training.monitor), step):
            save_served(self.best, _described(self.config, self.data), served, dense_state(model))
        return measured

    # ---- the end -------------------------------------------------------------------------------------------------

    def finish(
        self,
        model: type[nn.Module],
        device: torch.device,
        counted: Sequence[Row],
        of_training: Callable[[], dict[str, Any]],
    ) -> dict[str, Any]:
        """The numbers of the best model, taken from its served files; the only place where the test split is read.

        Args:
            model: the class of the model.
            device: where it is evaluated.
            counted: the evaluations that count.
            of_training: what is known of the training, asked for at the end.
        """
        selection, training, curve = self.selection, self.config.training, self.selection.curve
        copy_served(self.best, self.out / "served")
        loaded = load_served(self.out / "served", device, model=model)
        tables = loaded.embeddings
        assert isinstance(tables, EmbeddingTables)
        valid = score(loaded, self.data, "valid", training.evaluation_batch_size, device)
        first = to_device(next(self.data.batches("valid", training.batch_size)), device)
        latency = lookup_latency_us(tables, first)
        test = score(loaded, self.data, "test", training.evaluation_batch_size, device)
        measured = {f"test_{name}": value for name, value in all_metrics(test, self.data).items()}
        with replacing(self.out / "test_scores.npy") as temporary, temporary.open("wb") as file:
            np.save(file, test.logits.astype(np.float32))
        write_curve(curve, self.out / "validation.csv")
        best_epoch, steps = epochs_of(selection.best_step, self.steps_per_epoch), curve[-1]["step"]
        draw_curve(curve, best_epoch, self.out / "validation.svg")
        memory = tables.memory()
        ended_early = steps < last_step(self.config, self.data)
        fields = self.config.flat()
        decays = [name for name in ("tables.l2", "tables.regularization", "dense.weight_decay") if fields[name]]
        return {
            "status": "ok",
            **labels(self.config, self.data),
            "inference_bytes": memory.inference_bytes,
            "full_bytes": memory.full_bytes,
            "ratio": memory.inference_bytes / memory.full_bytes if memory.full_bytes else None,
            **{f"valid_{name}": value for name, value in main_metrics(valid).items()},
            **measured,
            "best_epoch": best_epoch,
            "epochs": epochs_of(steps, self.steps_per_epoch),
            "steps": steps,
            **of_training(),
            "lookup_latency_us": latency,
            "overfitting": overfitting(counted, training.monitor),
            "remarks": remarks(counted, training.monitor, out_of_patience=ended_early, decays=decays),
            "test_scores_sha256": sha256(self.out / "test_scores.npy"),
        }


def _described(config: RunConfig, data: PreparedDataset) -> Served:
    return Served(
        config.model.name,
        config.model.hyperparameters,
        data.feature_names,
        data.dense_features,
        data.list_features,
        data.histories,
        data.max_history,
    )


def epochs_of(step: int, steps_per_epoch: int) -> int | float:
    """So many steps in epochs."""
    epochs = step / steps_per_epoch
    return int(epochs) if epochs == int(epochs) else round(epochs, 4)
