"""The loop of one run: steps, evaluations, checkpoints, and the numbers at the end."""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import nn

from embtables._util.files import replacing, sealed, sha256, write_json
from embtables.datasets import Batch, PreparedDataset
from embtables.tables import EmbeddingTables
from embtables.training.averaging import RunningMean
from embtables.training.checkpoint import load_checkpoint, random_state, restore_random_state, save_checkpoint
from embtables.training.compilation import Compilation, uncompiled
from embtables.training.config import RunConfig, check_threads
from embtables.training.environment import peak_rss_bytes
from embtables.training.evaluation import (
    all_metrics,
    check_logits,
    lookup_latency_us,
    main_metrics,
    score,
    share_of_colliding_ids,
    slice_metrics,
    table_norms,
    to_device,
)
from embtables.training.export import Served, copy_served, dense_state, load_served, save_served
from embtables.training.learning_curve import COLUMNS, Row, draw_curve, overfitting, remarks, value_of, write_curve
from embtables.training.logs import Events, ProgressBar
from embtables.training.nan_guard import Watch
from embtables.training.optimization import Optimization
from embtables.training.planning import horizon_of, labels, method_label, quantization_step, steps_per_epoch

__all__ = ["CHECKPOINT", "Run"]

CHECKPOINT = "checkpoint"
"""The folder in a run's folder that holds what a resume needs."""


@dataclass
class _Progress:
    """How far a run is: what a checkpoint holds beside tensors."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    step: int = 0
    examples: int = 0  # of the steps in ``train_seconds``
    train_seconds: float = 0.0
    compile_seconds: float = 0.0  # of the steps that compiled the model
    peak_rss_bytes: int = 0
    best: float = -math.inf  # of the monitor, the log loss negated
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    loss_sum: float = 0.0  # of the examples since the last evaluation
    loss_examples: int = 0
    curve: list[Row] = field(default_factory=list)
    finished: bool = False

    def counted(self, quantization: int | None) -> list[Row]:
        """The evaluations that count: once training rounds rows, from the step ``quantization`` on, those after it."""
        begun = quantization is not None and self.step > quantization
        return [row for row in self.curve if row["step"] > quantization] if begun else self.curve

    def check(self, epochs: int, steps_per_epoch: int, monitor: str, quantization: int | None) -> None:
        """``ValueError`` where no run of so many epochs and steps, chosen by this monitor, can be so far."""
        steps = self.epoch * steps_per_epoch + self.batch
        within = 0 <= self.batch < steps_per_epoch and 0 <= self.epoch <= epochs
        if self.step != steps or not within:
            raise ValueError(f"step {self.step} is not in batch {self.batch} of epoch {self.epoch}")
        if self.epoch == epochs and not self.finished:
            raise ValueError("all its epochs are over, and it is not finished")
        counted = (self.examples, self.loss_examples, self.train_seconds, self.compile_seconds)
        if min(counted) < 0 or not all(map(math.isfinite, (*counted, self.loss_sum))):
            raise ValueError("something was counted below 0, or without end")
        if self.examples and not self.train_seconds:
            raise ValueError("it took no time")
        if [row.get("step") for row in self.curve] != sorted({row.get("step", 0) for row in self.curve}):
            raise ValueError("its evaluations are not in order")
        columns = [(set(row), *map(type, row.values())) for row in self.curve]
        if any(names != set(COLUMNS) or not {*types} <= {int, float, type(None)} for names, *types in columns):
            raise ValueError("an evaluation has other columns than numbers of this release")
        values = {row["step"]: value_of(row, monitor) for row in self.counted(quantization)}
        if values and values.get(self.best_step) != self.best:
            raise ValueError(f"there was no evaluation of {self.best} at its best step {self.best_step}")
        if self.stale != sum(step > self.best_step for step in values):
            raise ValueError(f"its best step is not {self.stale} evaluations ago")
        if self.finished and not values:
            raise ValueError("it is finished without an evaluation")


_PROGRESS = TypeAdapter(_Progress)


class Run:
    """A run that is under way in the folder ``out``; ``identity`` is what a resume must have in common with it."""

    def __init__(
        self,
        config: RunConfig,
        data: PreparedDataset,
        out: Path,
        identity: dict[str, Any],
        tables: EmbeddingTables,
        model: nn.Module,
        *,
        show_progress: bool = False,
    ) -> None:
        self.config, self.data, self.out, self.show_progress = config, data, out, show_progress
        self.tables, self.model = tables, model
        self.device = torch.device(config.training.device)
        self.identity = {**identity, "plan": tables.plan.fingerprint.hex()}
        self.checkpoint = out / CHECKPOINT
        self.progress = _Progress()
        self.steps_per_epoch = steps_per_epoch(config, data)
        if config.tables.regularization:
            tables.regularize(config.tables.regularization, data.frequencies)
        self.optimization = Optimization(config, model, tables)
        self.quantization = quantization_step(config, data, tables.plan)
        horizon = horizon_of(config, data)
        self.mean = None if horizon is None else RunningMean(model, tables, horizon)
        varying = bool(data.list_features or data.histories)
        self.compilation = Compilation(model, config.training.batch_size, varying) if config.training.compile else None

    # ---- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        self._remove_stale()
        events = Events(self.out / "tensorboard", self.progress.step)
        try:
            if not self.progress.finished:
                self._train(events)
            result = self._finish(events)
        finally:
            events.close()
        write_json(self.out / "metrics.json", sealed(result))
        if not self.config.training.keep_checkpoint:
            shutil.rmtree(self.checkpoint, ignore_errors=True)
        return result

    def _train(self, events: Events) -> None:
        training, progress = self.config.training, self.progress
        total = training.epochs * self.steps_per_epoch
        # On a CPU a number is there when it is asked for; elsewhere asking at each step would hold up the device.
        watch = Watch(self.model, self.tables, self.data.dense_features, waits=self.device.type == "cpu")
        name = method_label(self.config.tables.method)
        with ProgressBar(self.show_progress, progress.step, total, name) as bar:
            meter = _Meter(events, bar, training.log_every)
            last_checkpoint = time.monotonic()
            while not progress.finished:
                self.model.train()
                batches = self.data.batches(
                    "train", training.batch_size, seed=training.seed, epoch=progress.epoch, skip=progress.batch
                )
                for batch, seconds in _timed(batches):
                    start = time.perf_counter()
                    watch.step = progress.step + 1
                    compiles = self.compilation is not None and self.compilation.is_due(batch)
                    if compiles:
                        bar.note("compiling the model …")
                    if progress.step == self.quantization:
                        self._quantize()
                    self._step(batch, watch)
                    self._advance()
                    if self.mean is not None:
                        self.mean.update(progress.step)
                    evaluates = self._evaluation_is_due()
                    saves = evaluates or time.monotonic() - last_checkpoint >= training.checkpoint_seconds
                    if watch.waits or saves or progress.step % training.log_every == 0:
                        losses = watch.settle()
                        self._count_losses(losses)
                        meter.losses += losses
                    seconds += time.perf_counter() - start
                    if compiles:
                        progress.compile_seconds += seconds
                        bar.note(f"compiled in {progress.compile_seconds:.0f} s")
                    else:
                        progress.examples += len(batch.labels)
                        progress.train_seconds += seconds
                        meter.count(len(batch.labels), seconds)
                    meter.show(progress.step, self.optimization.learning_rates())
                    if evaluates:
                        bar.monitor(training.monitor, self._evaluate(events))
                        self._lower_learning_rates_or_stop()
                        self._save()
                        last_checkpoint = time.monotonic()
                        if progress.finished:
                            break
                        self.model.train()
                    elif saves:
                        self._save()
                        last_checkpoint = time.monotonic()
        watch.close()

    def _step(self, batch: Batch, watch: Watch) -> None:
        batch = to_device(batch, self.device)
        self.optimization.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.training.autocast is not None):
            logits = self.model(batch) if self.compilation is None else self.compilation.call(batch)
        check_logits(self.model, logits, batch)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), batch.labels)
        watch.loss(loss, logits, batch)
        loss.backward()
        watch.gradients()
        self.optimization.step()

    def _quantize(self) -> None:
        """Training rounds rows from now on. What was best before was trained for other rows, and does not count."""
        self.tables.fake_quantize()
        self.progress.best, self.progress.best_step, self.progress.stale = -math.inf, 0, 0

    def _advance(self) -> None:
        progress = self.progress
        progress.step += 1
        progress.batch += 1
        if progress.batch == self.steps_per_epoch:
            progress.epoch, progress.batch = progress.epoch + 1, 0

    def _count_losses(self, losses: list[tuple[float, int]]) -> None:
        for loss, examples in losses:
            self.progress.loss_sum += loss * examples
            self.progress.loss_examples += examples

    def _evaluation_is_due(self) -> bool:
        """At the first step that is past a multiple of an evaluation's share of an epoch, and at the end."""
        progress = self.progress
        spacing = self.steps_per_epoch / Fraction(str(self.config.training.evaluations_per_epoch))
        number = progress.step // spacing
        is_past = number >= 1 and math.ceil(number * spacing) == progress.step
        return is_past or progress.epoch == self.config.training.epochs

    def _lower_learning_rates_or_stop(self) -> None:
        progress, training = self.progress, self.config.training
        patience = training.patience
        if progress.stale and training.plateau_factor is not None and self._stages_done():
            self.optimization.lower_learning_rates(training.plateau_factor, training.min_learning_rate)
        out_of_patience = patience is not None and progress.stale >= patience and self._stages_done()
        progress.finished = progress.epoch == training.epochs or out_of_patience

    def _stages_done(self) -> bool:
        """Whether nothing is to come, such as the end of pruning or rounded rows, when the AUC may fall and recover."""
        begun = self.quantization is None or self.progress.step > self.quantization
        return begun and all(stage.done() for stage in self.tables.stages)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def _evaluate(self, events: Events) -> float:
        """Validation of the served form; the best one so far is kept on disk. Returns the monitored metric."""
        progress, monitor = self.progress, self.config.training.monitor
        means = nullcontext(self.tables.serve()) if self.mean is None else self.mean.applied()
        with means as served, _serving(self.model, self.tables, served), uncompiled():
            scored = score(self.model, self.data, "valid", self.config.training.evaluation_batch_size, self.device)
            measured = {f"valid_{name}": value for name, value in main_metrics(scored).items()}
            measured["valid_auc_tail"] = slice_metrics(scored, self.data)["auc_tail"]
            value = value_of(measured, monitor)
            if value > progress.best:
                progress.best, progress.best_step, progress.stale = value, progress.step, 0
                save_served(self._best(), _described(self.config, self.data), served, dense_state(self.model))
            else:
                progress.stale += 1
        rates = self.optimization.learning_rates()
        progress.curve.append(
            {
                "step": progress.step,
                "epoch": _epochs(progress.step, self.steps_per_epoch),
                "train_loss": progress.loss_sum / progress.loss_examples,
                **measured,
                **{name.replace("/", "_"): rate for name, rate in rates.items()},
            }
        )
        progress.loss_sum, progress.loss_examples = 0.0, 0
        memory = self.tables.memory()
        events.write(
            progress.step,
            {
                **{name.replace("_", "/", 1): metric for name, metric in measured.items()},
                f"valid/best_{monitor}": abs(progress.best),
                "bytes/inference": memory.inference_bytes,
                "bytes/training": memory.training_bytes,
                **table_norms(self.tables),
            },
        )
        return abs(value)

    def _best(self) -> Path:
        return self.checkpoint / f"best-{self.progress.best_step}"

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        folder = self.checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        self.progress.peak_rss_bytes = self._peak_rss()
        state = {
            "progress": asdict(self.progress),
            "threads": torch.get_num_threads(),
            "random": random_state(self.device),
            "model": dict(self.model.state_dict()),
            "optimization": self.optimization.state_dict(),
            **({} if self.mean is None else {"mean": self.mean.state_dict()}),
        }
        save_checkpoint(folder / "last.pt", self.identity, state)
        write_curve(self.progress.curve, self.out / "validation.csv")
        # Only now does no checkpoint refer to an earlier best.
        self._remove_stale()

    def _remove_stale(self) -> None:
        """Best models that the checkpoint does not refer to, such as those of a run that was killed before its save."""
        for other in self.checkpoint.glob("best-*"):
            if other != self._best():
                shutil.rmtree(other)

    def resume(self) -> None:
        """Go on from the last checkpoint, where there is one; ``ValueError`` where it is damaged."""
        path = self.checkpoint / "last.pt"
        if not path.exists():
            return
        state = load_checkpoint(path, self.identity)
        try:
            self.progress = _PROGRESS.validate_python(state["progress"])
            training = self.config.training
            self.progress.check(training.epochs, self.steps_per_epoch, training.monitor, self.quantization)
            if self.quantization is not None and self.progress.step > self.quantization:
                self.tables.fake_quantize()  # its scales are a part of the state
            if training.threads is None:
                # The order of sums depends on the number of threads.
                torch.set_num_threads(check_threads(state["threads"]))
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # such as that of the state of another optimizer
                self.model.load_state_dict(state["model"])
            self.optimization.load_state_dict(state["optimization"])
            if self.mean is not None:
                self.mean.load_state_dict(state["mean"])
            restore_random_state(state["random"], self.device)
        except Exception as error:  # values of any type may stand in the place of others
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"{path} is damaged ({reason}): delete it to start again") from error

    def _peak_rss(self) -> int:
        return max(self.progress.peak_rss_bytes, peak_rss_bytes() or 0)

    # ---- the end -------------------------------------------------------------------------------------------------

    def _finish(self, events: Events) -> dict[str, Any]:
        """The numbers of the best model, taken from its served files; the only place where the test split is read."""
        progress, training = self.progress, self.config.training
        counted = progress.counted(self.quantization)
        if not self._best().is_dir():
            raise ValueError(f"{self._best()} is missing: delete {self.checkpoint / 'last.pt'} to start again")
        copy_served(self._best(), self.out / "served")
        model = load_served(self.out / "served", self.device, model=type(self.model))
        tables = model.embeddings
        assert isinstance(tables, EmbeddingTables)
        valid = score(model, self.data, "valid", training.evaluation_batch_size, self.device)
        first = to_device(next(self.data.batches("valid", training.batch_size)), self.device)
        latency = lookup_latency_us(tables, first)
        test = score(model, self.data, "test", training.evaluation_batch_size, self.device)
        measured = {f"test_{name}": value for name, value in all_metrics(test, self.data).items()}
        with replacing(self.out / "test_scores.npy") as temporary, temporary.open("wb") as file:
            np.save(file, test.logits.astype(np.float32))
        write_curve(progress.curve, self.out / "validation.csv")
        draw_curve(progress.curve, _epochs(progress.best_step, self.steps_per_epoch), self.out / "validation.svg")
        memory = tables.memory()
        events.write(progress.step, {f"test/{name.removeprefix('test_')}": value for name, value in measured.items()})
        return {
            "status": "ok",
            **labels(self.config, self.data),
            "inference_bytes": memory.inference_bytes,
            "training_bytes": self.tables.memory().training_bytes,
            "full_bytes": memory.full_bytes,
            "ratio": memory.inference_bytes / memory.full_bytes if memory.full_bytes else None,
            **{f"valid_{name}": value for name, value in main_metrics(valid).items()},
            **measured,
            "best_epoch": _epochs(progress.best_step, self.steps_per_epoch),
            "epochs": _epochs(progress.step, self.steps_per_epoch),
            "steps": progress.step,
            "examples_per_second": progress.examples / progress.train_seconds if progress.examples else None,
            "train_seconds": progress.train_seconds,
            "compile_seconds": progress.compile_seconds if self.compilation is not None else None,
            "peak_rss_bytes": self._peak_rss() or None,
            "collision_share": share_of_colliding_ids(self.tables),
            "lookup_latency_us": latency,
            "overfitting": overfitting(counted, training.monitor),
            "remarks": remarks(counted, training.monitor, out_of_patience=progress.epoch < training.epochs),
            "test_scores_sha256": sha256(self.out / "test_scores.npy"),
        }


class _Meter:
    """Loss and speed, averaged between TensorBoard entries; ``losses``: (loss, examples) of each step."""

    def __init__(self, events: Events, bar: ProgressBar, log_every: int) -> None:
        self.events, self.bar, self.log_every = events, bar, log_every
        self.losses: list[tuple[float, int]] = []
        self.examples, self.seconds = 0, 0.0

    def count(self, examples: int, seconds: float) -> None:
        self.examples += examples
        self.seconds += seconds

    def show(self, step: int, rates: dict[str, float | None]) -> None:
        self.bar.step(step)
        if step % self.log_every == 0:
            mean = sum(loss for loss, _ in self.losses) / len(self.losses)
            speed = self.examples / self.seconds if self.examples else None
            self.events.write(step, {"train/loss": mean, "train/examples_per_second": speed, **rates})
            self.bar.loss(mean)
            self.losses, self.examples, self.seconds = [], 0, 0.0


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


def _epochs(step: int, steps_per_epoch: int) -> int | float:
    epochs = step / steps_per_epoch
    return int(epochs) if epochs == int(epochs) else round(epochs, 4)


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds that it took to make."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - start


@contextmanager
def _serving(model: nn.Module, tables: EmbeddingTables, served: EmbeddingTables) -> Iterator[None]:
    """The model with its tables in their served form."""
    model.embeddings = served
    try:
        yield
    finally:
        model.embeddings = tables
